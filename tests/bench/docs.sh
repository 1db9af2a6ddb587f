#!/usr/bin/env bash
# docs.sh - how fast and how small documents are, beside @y/websocket-server.
#
# SPDX-License-Identifier: MIT
#
#   docs.sh [quick]
#
# Runs every scenario against the reference (yjs_server.js) and collabd, in
# alternating order, and prints the medians of three rounds.  quick: one round
# with a short piece of the recorded paper.  A ratio is taken within a round and
# compares with the reference in the same scenario.  The reference keeps nothing
# on disk; collabd does.  The server has one CPU and the load generator another.
#
#   COLLABD         the server                (build/collabd)
#   BENCH           docload and what is made  (build/bench)
#   COLLABD_TRACES  the recorded paper        (see trace.mjs)
#   ROUNDS          rounds                    (3)
#   ONLY            scenarios to run, a regular expression
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
collabd=${COLLABD:-$here/../../build/collabd}
bench=${BENCH:-$here/../../build/bench}
rounds=${ROUNDS:-3} few=()
some=(warm=2000 edits=7000) many=(warm=5000 edits=15000)
talk=(warm_ms=2000 ms=10000)
if [ "${1:-}" = quick ]; then
    rounds=1 few=(edits=20000)
    some=(warm=1000 edits=2500) many=(warm=2000 edits=4000)
    talk=(warm_ms=1000 ms=3000)
fi

tmp=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill "$pid"; rm -rf "$tmp"' EXIT

fail() {
    echo "docs.sh: $*" >&2
    [ ! -s "$tmp/log" ] || tail -n 3 "$tmp/log" >&2
    exit 1
}

# ----- the subjects ----------------------------------------------------------

[ -x "$collabd" ] || fail "$collabd is missing"
[ -x "$bench/docload" ] || fail "$bench/docload is missing"
subjects='' node=''
if (cd "$here" && node --input-type=module -e 'import "yjs"' 2>/dev/null); then
    subjects=reference node=yes
    node "$here/trace.mjs" "$bench" || fail "trace.mjs made no edits"
elif [ -e "$bench/1m.bin" ]; then
    echo "Node or its package yjs is missing: the reference is left out"
else
    echo "skipped: Node or its package yjs is missing"
    exit 0
fi
server_on=() load_on=()
if [ "$(nproc)" -ge 2 ] && taskset -c 0,1 true 2>/dev/null; then
    server_on=(taskset -c 0) load_on=(taskset -c 1)
fi
if nice -n -10 true 2>/dev/null && [ "$(nice -n -10 nice)" -lt 0 ]; then
    server_on=(nice -n -10 "${server_on[@]}")
    load_on=(nice -n -10 "${load_on[@]}")
fi

# serve SUBJECT [collabd's settings]: sets pid, port and path.
serve() {
    local subject=$1
    shift
    if [ "$subject" = reference ]; then
        path=/bench
        set -- node "$here/yjs_server.js"
    else
        path=/yjs/bench
        set -- "$collabd" --listen 127.0.0.1:0 --data "$tmp/data" "$@"
    fi
    : >"$tmp/log" # before the server is there to do it
    "${server_on[@]}" "$@" >"$tmp/out" 2>"$tmp/log" &
    pid=$!
    until grep -q '^info: ready' "$tmp/log"; do
        kill -0 "$pid" 2>/dev/null || { pid=; fail "$subject did not start"; }
        sleep 0.02
    done
    port=$(sed -n 's|^info: listening on http://.*:||p' "$tmp/log")
}

stop() {
    kill "$pid"
    wait "$pid" 2>/dev/null || true
    pid=
}

# note SCENARIO SUBJECT NAME VALUE
note() {
    [ -z "$4" ] || echo "$1 $2 $round $3 $4" >>"$tmp/results"
}

# load SCENARIO SUBJECT MODE [name=value ...]: notes what it says as
# "scenario subject round name value"; names get the suffix.
suffix=
load() {
    local scenario=$1 subject=$2
    shift 2
    "${load_on[@]}" "$bench/docload" "$@" port="$port" pid="$pid" path="$path" |
        sed "s/^\([^ ]*\)/$scenario $subject $round \1$suffix/" \
            >>"$tmp/results" || fail "$scenario failed with $subject"
}

wanted() {
    [[ "$1" =~ ${ONLY:-.} ]]
}

# one SCENARIO SUBJECT MODE [name=value ...]: with a server of its own.
settings=()
one() {
    wanted "$1" || return 0
    rm -rf "$tmp/data"
    serve "$2" "${settings[@]}"
    load "$@"
    stop
}

# last SCENARIO NAME: what was noted last.
last() {
    awk -v s="$1" -v n="$2" '$1 == s && $4 == n { v = $5 } END { print v }' \
        "$tmp/results"
}

# probe: does this collabd serve documents?
probe() {
    serve collabd
    "$bench/docload" fetch port="$port" path="$path" >"$tmp/out" 2>&1 ||
        return 1
    stop
}

# metric NAME: what collabd counted.
metric() {
    curl -s "http://127.0.0.1:$port/metrics" |
        awk -v n="$1" '$1 == n { print $2 }'
}

# ----- the scenarios ---------------------------------------------------------

# checked SUBJECT: what was fetched is the paper.
checked() {
    [ -z "$node" ] ||
        node "$here/trace.mjs" check "$tmp/paper" "$(last trace-3 edits)" ||
        fail "$1 has another text"
}

# The whole paper, typed so fast that many edits come in one read, but not
# faster than they are read; then what is left of it, in memory and on disk.
paper() {
    local subject=$1 bytes
    wanted trace-3 || return 0
    rm -rf "$tmp/data"
    serve "$subject"
    load trace-3 "$subject" trace file="$bench/paper.bin" readers=3 \
        in_flight=1000 "${few[@]}"
    load trace-3 "$subject" fetch out="$tmp/paper"
    checked "$subject"
    if [ "$subject" = collabd ]; then
        note trace-3 collabd merge_ms "$(metric collabd_doc_merge_us_max |
            awk '{ print $1 / 1000 }')"
        note trace-3 collabd journal_bytes \
            "$(metric collabd_journal_bytes_total)"
        stop
        bytes=$(find "$tmp/data" -type f -printf '%s\n' |
            awk '{ n += $1 } END { print n }')
        serve collabd
        load reload collabd fetch out="$tmp/paper"
        checked "collabd, started again,"
        note trace-3 collabd load_ms "$(metric collabd_doc_load_us_max |
            awk '{ print $1 / 1000 }')"
    else
        bytes=$(stat -c %s "$tmp/paper") # as Yjs writes it
    fi
    note trace-3 "$subject" stored_bytes "$bytes"
    stop
}

# The same edits in an empty document and in one of 10 MB.
big() {
    wanted big || return 0
    settings=(--doc-memory 512M --max-doc 64M)
    one big "$1" big file="$bench/paper.bin" "${few[@]}"
    suffix=_10m
    one big "$1" big file="$bench/paper.bin" "${few[@]}" \
        document="$bench/10m.bin"
    suffix='' settings=()
}

echo "$("$collabd" --version | head -n 1), $(nproc) CPUs, Linux $(uname -r)," \
    "load average $(cut -d' ' -f1 /proc/loadavg)"
touch "$tmp/results"
if probe; then
    subjects+=" collabd"
else
    echo "this collabd serves no documents: only the reference is measured"
    kill "$pid"
    pid=
fi
order=$subjects
for round in $(seq "$rounds"); do
    for subject in $order; do
        if [ -e "$bench/paper.bin" ]; then
            paper "$subject"
            trace=(trace "file=$bench/paper.bin")
            one trace-3-x1 "$subject" "${trace[@]}" readers=3 in_flight=1 \
                "${many[@]}"
            one trace-100-x1 "$subject" "${trace[@]}" readers=100 in_flight=1 \
                "${many[@]}"
            one trace-100 "$subject" "${trace[@]}" readers=100 "${some[@]}"
            big "$subject"
        fi
        one join "$subject" join members=50 document="$bench/1m.bin"
        one awareness "$subject" awareness members=200 "${talk[@]}"
        settings=(--max-rooms 128)
        one memory "$subject" memory docs=100 document="$bench/16k.bin"
        settings=()
    done
    order=$(tr ' ' '\n' <<<"$order" | tac | paste -sd' ')
done

# ----- the figures -----------------------------------------------------------
# scenario, value or quotient of two, unit, and for collabd the target: "ratio"
# to the reference or the "value" itself is at most that much.  trace-3-x1 waits
# for each edit before the next; trace-100 sends faster than anyone reads.

awk -v rounds="$rounds" '
function sorted_middle(list, n,    i, j, t) {
    for (i = 2; i <= n; i++)
        for (j = i; j > 1 && list[j] < list[j - 1]; j--) {
            t = list[j]; list[j] = list[j - 1]; list[j - 1] = t
        }
    return n % 2 ? list[(n + 1) / 2] : (list[n / 2] + list[n / 2 + 1]) / 2
}
function known(scenario, subject, name,    part, n, i) {
    n = split(name, part, "/")
    for (i = 1; i <= n; i++)
        if (!((scenario, subject, 1, part[i]) in value))
            return 0
    return 1
}
function at(scenario, subject, round, name,    part) {
    if (split(name, part, "/") == 2)
        return value[scenario, subject, round, part[1]] / \
               value[scenario, subject, round, part[2]]
    return value[scenario, subject, round, name]
}
function median(scenario, subject, name, over,    list, n, r) {
    for (r = 1; r <= rounds; r++)
        list[++n] = at(scenario, subject, r, name) / \
                    (over ? at(scenario, over, r, name) : 1)
    return sorted_middle(list, n)
}
# (the reference has threads that wait for each other)
FILENAME != "-" && $2 == "collabd" && $4 ~ /^waited_percent/ {
    runs++
    disturbed += $5 > 5
}
FILENAME != "-" {
    value[$1, $2, $3, $4] = $5
    next
}
NF {
    split("reference collabd", all, " ")
    for (i = 1; i <= 2; i++) {
        s = all[i]
        if (!known($1, s, $2)) {
            if (NF > 3 && s == "collabd" && known($1, s, "seconds")) {
                printf "%-13s %-9s %12s %-18s  MISS\n", $1, s, "unknown", $3
                misses++
            }
            continue
        }
        number = median($1, s, $2)
        line = sprintf("%-13s %-9s %12.3f %-18s", $1, s, number, $3)
        ratio = ""
        if (s == "collabd" && known($1, "reference", $2)) {
            ratio = median($1, s, $2, "reference")
            line = line sprintf(" %6.3f of reference", ratio)
        }
        if ($2 == "cpu_us" && known($1, s, "p50_us"))
            line = line sprintf("  %7d/s  p50 %7d  p99 %7d us  RSS %6d KiB", \
                median($1, s, "per_s"), median($1, s, "p50_us"), \
                median($1, s, "p99_us"), median($1, s, "rss_kib"))
        if (NF > 3 && s == "collabd" && ($4 == "value" || ratio != "")) {
            ok = ($4 == "ratio" ? ratio : number) <= $5
            misses += !ok
            line = line sprintf("  target <= %s %s", $5, ok ? "ok" : "MISS")
        }
        print line
    }
}
END {
    printf "%d missed\n", misses
    if (disturbed)
        printf "not a quiet machine: the server had to wait for its CPU in " \
            "%d of %d runs\n", disturbed, runs
}
' "$tmp/results" - <<'TABLE'
trace-3       cpu_us                            us/edit             ratio 0.1
trace-3       rss_kib                           KiB-RSS             value 5120
trace-3       peak_kib                          KiB-peak
trace-3       stored_bytes                      bytes-stored        value 220000
trace-3       journal_bytes/update_bytes        journal/update      value 2.5
trace-3       merge_ms                          ms/compaction       value 30
trace-3       load_ms                           ms/load             value 10
trace-3-x1    cpu_us                            us/edit
trace-100-x1  cpu_us                            us/edit             ratio 0.45
trace-100     cpu_us                            us/edit             ratio 0.25
big           middle_cpu_us                     us/edit-empty
big           middle_cpu_us_10m                 us/edit-10MB
big           middle_cpu_us_10m/middle_cpu_us   10MB/empty          value 1.2
big           cpu_us_10m/cpu_us                 10MB/empty-all      value 3
big           worst_batch_ms_10m                ms-worst-batch
big           rss_kib_10m                       KiB-RSS-10MB
join          cpu_us                            us/client           ratio 0.1
join          grown_part                        of-doc+64K/client   value 1
join          seconds                           s-until-all-have
awareness     cpu_us                            us/delivery
awareness     core_percent                      %-of-core
memory        doc_kib                           KiB-RSS/document
memory        rss_kib                           KiB-RSS
TABLE
