#!/bin/bash
# Runs every test there is, one stage after the other, and goes on after a
# failure.  Its last line counts what all stages counted.
set -u
cd "$(dirname "$0")/.." || exit 1
log=build/test-logs
mkdir -p "$log"
passed=0 failed=0 skipped=0
broken=

# stage NAME COMMAND...: counts TAP from node, cmocka's lines, or the stage as one.
stage() {
    local name=$1 out="$log/$1.log" status p f s start=$SECONDS
    shift
    "$@" >"$out" 2>&1
    status=$?
    p=$(grep -acE '^\[       OK \]|^ *ok [0-9]+' "$out")
    f=$(grep -acE '^\[  FAILED  \] [a-z_A-Z0-9]+$|^ *not ok [0-9]+' "$out")
    s=$(grep -acE '^\[  SKIPPED \] [a-z_A-Z0-9]+$|^ *ok [0-9]+.*# SKIP' "$out")
    [ "$p" -gt 0 ] || [ "$f" -gt 0 ] || [ $status -ne 0 ] || p=1
    [ $status -eq 0 ] || [ "$f" -gt 0 ] || f=1
    passed=$((passed + p - s)) failed=$((failed + f)) skipped=$((skipped + s))
    printf '%-22s %5d passed %3d failed %3d skipped %4d s\n' "$name" \
        $((p - s)) "$f" "$s" $((SECONDS - start))
    if [ $status -ne 0 ] || [ "$f" -gt 0 ]; then
        broken="$broken $name"
        grep -aE '^ *not ok|FAILED|error:|ERROR|warning:' "$out" | head -40
        tail -n 25 "$out"
    fi
}

node_tests() (
    cd tests && node --test --test-reporter=tap --test-concurrency=2 "$@"
)

stage build make all
stage lint make lint
stage unit make -j2 unit
stage unit-clang make -j2 unit CC=clang BUILD=build/clang
stage valgrind make -j2 valgrind
stage cross tests/cross.sh s390x armhf
stage fuzz make -j2 fuzz FUZZ_SECONDS="${FUZZ_SECONDS:-6}"
stage e2e node_tests e2e/
# The same once more against the sanitizers' build; the storm is shorter, and
# what tests no server or only takes long is left out.
stage asan make asan
export COLLABD="$PWD/build/asan/collabd" COLLABD_SLOW=1 COLLABD_STORM_MS=5000
export COLLABD_SHORT=1
export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1
(cd tests && ls e2e/*.test.js) | grep -v e2e/45- >"$log/e2e-asan.list"
# shellcheck disable=SC2046
stage e2e-asan node_tests $(cat "$log/e2e-asan.list")

[ -z "$broken" ] || echo "broken stages:$broken (logs in $log)"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ] && [ -z "$broken" ]
