#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Is collabd.c still a book?  Checks that the table of chapters in its first
# comment agrees with the banners, in number, name and order; that the words to
# search for are found in their chapters; that there is no forward declaration
# of a static function; and that every source file says its licence.
#
# book.sh [FILE]: looks at FILE instead of collabd.c (for trying it out).
set -eu
cd "$(dirname "$0")/../.."
book=${1:-collabd.c}
status=0

fail() {
    echo "book: $*" >&2
    status=1
}

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# ----- the table against the banners

awk '/^ \*  *[0-9]+  [A-Z]/ {
         match($0, /[0-9]+  [A-Z]/)
         rest = substr($0, RSTART)
         if (split(rest, part, /  +/) >= 4)
             print part[1] "  " part[2] "|" part[3]
     }
     /\*\/$/ { exit }' "$book" > "$tmp/table"
sed -n 's/^\/\* ===== \([0-9]*\)  \([A-Za-z ]*[A-Za-z]\) =*$/\1  \2/p' \
    "$book" > "$tmp/banners"
sed 's/|.*//' "$tmp/table" > "$tmp/chapters"

[ -s "$tmp/table" ] || fail "$book: no table of chapters in the first comment"
# Chapter 1 is the first comment itself: its banner opens the file or is absent.
grep -q '^1  ' "$tmp/banners" || sed -n '/^1  /p' "$tmp/chapters" |
    cat - "$tmp/banners" > "$tmp/all" && [ -s "$tmp/all" ] &&
    mv "$tmp/all" "$tmp/banners"
if ! diff "$tmp/chapters" "$tmp/banners" > "$tmp/diff"; then
    fail "$book: table (<) and banners (>) differ:"
    sed -n 's/^[<>]/    &/p' "$tmp/diff" >&2
fi
awk '{ if ($1 != NR) { print NR; exit } }' "$tmp/banners" > "$tmp/gap"
[ ! -s "$tmp/gap" ] || fail "$book: there is no banner $(cat "$tmp/gap"), or not in its place"
grep '^/\* =====' "$book" | grep -v '^/\* ===== [0-9][0-9]*  [A-Z][A-Za-z ]* =*$' \
    > "$tmp/odd" || true
[ ! -s "$tmp/odd" ] || fail "$book: banners of another form: $(cat "$tmp/odd")"

# ----- the words to search for

while IFS='|' read -r chapter words; do
    number=${chapter%% *}
    [ "$number" != 1 ] || continue
    awk -v n="$number" '/^\/\* =====/ { on = $3 == n } on' "$book" > "$tmp/text"
    for word in $words; do
        grep -q "^$word" "$tmp/text" ||
            fail "$book: chapter $chapter has no function $word..."
    done
done < "$tmp/table"

# ----- forward declarations: a `static` with parentheses that ends in ; before
# any { or =.  Pointers to functions are variables.

awk '{ line = $0; sub(/\/\*.*\*\//, "", line); sub(/\/\*.*/, "", line) }
     /^static / || open {
         if (!open) { at = FNR; text = "" }
         open = 1
         text = text " " line
         if (!match(text, /[;={]/)) next
         open = 0
         if (substr(text, RSTART, 1) == ";" && text ~ /\(/ && text !~ /\( *\*/ &&
             text !~ /_Static_assert/)
             print FILENAME ":" at ":" text
     }' "$book" > "$tmp/forward"
[ ! -s "$tmp/forward" ] || fail "forward declarations:
$(cat "$tmp/forward")"

# ----- licences

[ -s LICENSE ] || fail "LICENSE is missing"
find . -path ./.git -prune -o -path ./build -prune -o -name node_modules -prune \
    -o -type f \( -name '*.[ch]' -o -name '*.js' \) -print | sort > "$tmp/files"
while read -r file; do
    head -n 12 "$file" | grep -q 'SPDX-License-Identifier: MIT' ||
        fail "${file#./}: no line SPDX-License-Identifier: MIT at the top"
done < "$tmp/files"

[ "$status" -ne 0 ] || echo "book: $(wc -l < "$tmp/table") chapters agree"
exit "$status"
