#!/usr/bin/env bash
# bench.sh - how fast and how small collabd is, beside other relays.
#
# SPDX-License-Identifier: MIT
#
#   bench.sh [quick]
#
# Runs every scenario against the floor (floor.c), collabd, libwebsockets
# (lws_relay.c) and Node's ws (ws_relay.js), in alternating order, and prints
# the medians of three rounds.  quick: one short round.  A ratio is taken
# within a round and compares with the floor in the same scenario.  The server
# has one CPU and the load generator another, so that no figure depends on
# where the scheduler puts them.  On a busy machine figures are wrong in both
# directions, since who is kept waiting finds more to send at once; the last
# line says so.
#
#   COLLABD   the server            (build/collabd)
#   BENCH     load, floor, ...      (build/bench)
#   EVERYONE  members who all type  (100)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
collabd=${COLLABD:-$here/../../build/collabd}
bench=${BENCH:-$here/../../build/bench}
everyone=${EVERYONE:-100}
rounds=3 time=(warm_ms=200 ms=700) long=(warm_ms=200 ms=1500) idle_ms=5000
if [ "${1:-}" = quick ]; then
    rounds=1 time=(warm_ms=100 ms=250) long=(warm_ms=150 ms=500) idle_ms=1000
fi

tmp=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill "$pid"; rm -rf "$tmp"' EXIT

fail() {
    echo "bench.sh: $*" >&2
    [ ! -s "$tmp/log" ] || tail -n 3 "$tmp/log" >&2
    exit 1
}

# ----- the subjects ----------------------------------------------------------

[ -x "$collabd" ] || fail "$collabd is missing"
[ -x "$bench/load" ] || fail "$bench/load is missing"
[ -x "$bench/floor" ] || fail "$bench/floor is missing"
subjects="floor collabd"
if [ -x "$bench/lws_relay" ]; then
    subjects+=" lws"
else
    echo "no lws_relay in $bench: libwebsockets is left out"
fi
if (cd "$here" && node --input-type=module -e 'import "ws"') 2>/dev/null; then
    subjects+=" ws"
else
    echo "Node or its package ws is missing: ws is left out"
fi

server_on=() load_on=()
if [ "$(nproc)" -ge 2 ] && taskset -c 0,1 true 2>/dev/null; then
    server_on=(taskset -c 0) load_on=(taskset -c 1)
fi
if nice -n -10 true 2>/dev/null && [ "$(nice -n -10 nice)" -lt 0 ]; then
    server_on=(nice -n -10 "${server_on[@]}")
    load_on=(nice -n -10 "${load_on[@]}")
fi

# serve SUBJECT [collabd's settings]: sets pid, port and, if it has one, tls.
serve() {
    local subject=$1
    shift
    case $subject in
    floor) set -- "$bench/floor" ;;
    lws) set -- "$bench/lws_relay" ;;
    ws) set -- node "$here/ws_relay.js" ;;
    coalesce) set -- "$collabd" --listen 127.0.0.1:0 --coalesce 10 "$@" ;;
    *) set -- "$collabd" --listen 127.0.0.1:0 "$@" ;;
    esac
    "${server_on[@]}" "$@" 2>"$tmp/log" &
    pid=$!
    until grep -q '^info: ready' "$tmp/log"; do
        kill -0 "$pid" 2>/dev/null || { pid=; fail "$subject did not start"; }
        sleep 0.02
    done
    port=$(sed -n 's|^info: listening on http://.*:||p' "$tmp/log")
    tls=$(sed -n 's|^info: listening on https://.*:||p' "$tmp/log")
}

stop() {
    kill "$pid"
    wait "$pid" 2>/dev/null || true
    pid=
}

# load SCENARIO SUBJECT MODE [name=value ...]: notes what it says as
# "scenario subject round name value".
load() {
    local scenario=$1 subject=$2
    shift 2
    "${load_on[@]}" "$bench/load" "$@" port="$port" tls_port="${tls:-0}" pid="$pid" |
        sed "s/^/$scenario $subject $round /" >>"$tmp/results" ||
        fail "$scenario failed with $subject"
}

# one SCENARIO SUBJECT MODE [name=value ...]: the same with a server of its own.
one() {
    serve "$2" --max-clients 1100
    load "$@"
    stop
}

# ----- the scenarios ---------------------------------------------------------

echo "$("$collabd" --version | head -n 1), $(nproc) CPUs, Linux $(uname -r)," \
    "load average $(cut -d' ' -f1 /proc/loadavg)"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
    -subj /CN=localhost -keyout "$tmp/key" -out "$tmp/cert" 2>/dev/null ||
    fail "openssl made no certificate"

order=$subjects
for round in $(seq $rounds); do
    for members in 100 1000; do
        for in_flight in 1 16; do
            for subject in $order; do
                one "fanout-$members-x$in_flight" "$subject" fanout "${time[@]}" \
                    members=$members in_flight=$in_flight
            done
        done
    done
    for subject in $order coalesce; do
        one everyone "$subject" everyone "${long[@]}" members="$everyone" rate=10
    done
    one stalled collabd stalled "${long[@]}" in_flight=16
    serve collabd --tls-listen 127.0.0.1:0 --tls-cert "$tmp/cert" \
        --tls-key "$tmp/key"
    load handshakes collabd handshakes "${long[@]}" rate=200
    stop
    order=$(tr ' ' '\n' <<<"$order" | tac | paste -sd' ')
done

round=1
for subject in $subjects; do
    one idle-1000 "$subject" idle members=1000 ms=100
done
serve collabd
load idle-0 collabd idle members=0 ms=$idle_ms
load idle-100 collabd idle members=100 ms=$idle_ms
stop
export ALLOCS="$tmp/allocs" # the other programs take no notice
LD_PRELOAD=$bench/allocs.so serve collabd
load allocs-fanout collabd fanout warm_ms=0 ms=500 in_flight=16 allocs="$ALLOCS"
load allocs-everyone collabd everyone warm_ms=0 ms=1200 rate=10 allocs="$ALLOCS"
stop

# ----- the figures -----------------------------------------------------------
# scenario, value or quotient of two, unit; which subject has which target:
# "ratio" to the floor or the "value" itself is at most that much.

awk -v subjects="$subjects coalesce" -v rounds=$rounds '
function sorted_middle(list, n,    i, j, t) {
    for (i = 2; i <= n; i++)
        for (j = i; j > 1 && list[j] < list[j - 1]; j--) {
            t = list[j]; list[j] = list[j - 1]; list[j - 1] = t
        }
    return n % 2 ? list[(n + 1) / 2] : (list[n / 2] + list[n / 2 + 1]) / 2
}
function at(scenario, subject, round, name,    part) {
    if (split(name, part, "/") == 2)
        return value[scenario, subject, round, part[1]] / \
               value[scenario, subject, round, part[2]]
    return value[scenario, subject, round, name]
}
function median(scenario, subject, name, over,    list, n, r) {
    for (r = 1; r <= rounds; r++)
        if ((scenario, subject, r) in ran)
            list[++n] = at(scenario, subject, r, name) / \
                        (over ? at(scenario, over, r, name) : 1)
    return sorted_middle(list, n)
}
# (ws has threads that wait for each other)
FILENAME != "-" && $2 != "ws" && $4 ~ /^waited_percent/ {
    runs++
    disturbed += $5 > 5
}
FILENAME != "-" {
    value[$1, $2, $3, $4] = $5
    ran[$1, $2, $3]
    next
}
NF {
    n = split(subjects, all, " ")
    for (i = 1; i <= n; i++) {
        s = all[i]
        if (!(($1, s, 1) in ran))
            continue
        number = median($1, s, $2)
        line = sprintf("%-16s %-9s %10.3f %-12s", $1, s, number, $3)
        ratio = ""
        if (($1, "floor", 1) in ran) {
            ratio = median($1, s, $2, "floor")
            line = line sprintf(" %6.3f of floor", ratio)
        }
        if ($2 == "cpu_us" || $2 == "core_percent")
            line = line sprintf("  %8d/s  p50 %6d  p99 %6d us  RSS %5d KiB", \
                median($1, s, "deliveries_per_s"), median($1, s, "p50_us"), \
                median($1, s, "p99_us"), median($1, s, "rss_kib"))
        for (j = 4; j + 2 <= NF; j += 3)
            if ($j == s) {
                got = $(j + 1) == "ratio" ? ratio : number
                ok = got <= $(j + 2)
                misses += !ok
                line = line sprintf("  target <= %s %s", $(j + 2), \
                                    ok ? "ok" : "MISS")
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
' "$tmp/results" - <<'EOT'
fanout-100-x1   cpu_us              us/delivery collabd ratio 1.03
fanout-100-x16  cpu_us              us/delivery collabd ratio 0.13
fanout-1000-x1  cpu_us              us/delivery collabd ratio 1.03
fanout-1000-x16 cpu_us              us/delivery collabd ratio 0.13
everyone        core_percent        %-of-core   collabd value 10 coalesce value 3
stalled         p99_us_with/p99_us  times-p99   collabd value 1.2
handshakes      p99_us_with/p99_us  times-p99   collabd value 3
idle-0          rss_anon_kib        KiB-anon    collabd value 512
idle-1000       client_kib          KiB/client  collabd value 0.6
idle-1000       rss_kib             KiB-RSS     collabd value 4096
idle-0          wakeups_per_s       wakeups/s   collabd value 0
idle-100        wakeups_per_s       wakeups/s   collabd value 1
allocs-fanout   allocs              calls       collabd value 0
allocs-everyone allocs              calls       collabd value 0
EOT
