#!/bin/sh
# Unit tests for other machines, run here by qemu-user: `tests/cross.sh s390x
# armhf`.  s390x is big-endian, armhf has 32 bits; the journal fixture they read
# was written on neither.  One line of TAP for each program.
#
# The libraries come from the distribution into a folder of their own,
# build/sysroot/ARCH, and stay there; dpkg hears nothing of it.  What cannot be
# had is skipped, and it is said why.
#
# SPDX-License-Identifier: MIT
set -u
unset LIBRARY_PATH
cd "$(dirname "$0")/.." || exit 1
programs="bytes ring sync journal"
packages="libc6-dev libwslay-dev libmbedtls-dev libcmocka-dev"
number=0 failed=0

# The compiler's prefix, and qemu's word.
machine() {
    case $1 in
    s390x) echo s390x-linux-gnu s390x ;;
    armhf) echo arm-linux-gnueabihf arm ;;
    arm64) echo aarch64-linux-gnu aarch64 ;;
    mipsel) echo mipsel-linux-gnu mipsel ;;
    i386) echo i686-linux-gnu i386 ;;
    *) return 1 ;;
    esac
}

# Where this machine has its packages from, main suite only: the others are out
# of step too often, and do not have every architecture.
sources() {
    suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    if [ -r /etc/apt/sources.list.d/debian.sources ]; then
        awk -v RS= 'NR == 1' /etc/apt/sources.list.d/debian.sources |
            sed "s/^Suites:.*/Suites: $suite/" >"$1/base.sources"
    else
        grep -E "^deb .* $suite main" /etc/apt/sources.list >"$1/base.list"
    fi
}

# apt with a state of its own: apt_for ARCH FOLDER COMMAND...
apt_for() (
    arch=$1 state=$2
    shift 2
    apt-get -qq -o Dir::State="$state" -o Dir::State::status="$state/status" \
        -o Dir::State::lists="$state/lists" -o Dir::Cache="$state/cache" \
        -o Dir::Etc::SourceList=/dev/null \
        -o Dir::Etc::SourceParts="$state/parts" -o APT::Architecture="$arch" \
        -o APT::Architectures::="$arch" -o APT::Install-Recommends=false \
        -o APT::Sandbox::User=root "$@" </dev/null
)

# Unpacks the packages, and all they need, for ARCH into FOLDER; or as before.
sysroot() {
    arch=$1 dir=$2 state=$2/.apt
    [ "$(cat "$dir/.packages" 2>/dev/null)" != "$packages" ] || return 0
    rm -rf "$dir"
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial" \
        "$state/parts"
    : >"$state/status"
    sources "$state/parts" || return 1
    apt_for "$arch" "$state" update ||
        apt_for "$arch" "$state" update || return 1
    # shellcheck disable=SC2086
    apt_for "$arch" "$state" install -y --download-only $packages || return 1
    for deb in "$state"/cache/archives/*.deb; do
        dpkg -x "$deb" "$dir" || return 1
    done
    [ -e "$dir/lib" ] || ln -s usr/lib "$dir/lib"
    rm -rf "$state"
    echo "$packages" >"$dir/.packages"
}

# Sets `why` to what an architecture lacks here.
lacks() {
    why=
    if ! machine "$1" >/dev/null; then
        why="$1 is not known to this script"
    elif ! command -v "$cc" >/dev/null; then
        why="$cc is not installed"
    elif ! command -v "$qemu" >/dev/null; then
        why="$qemu is not installed"
    elif ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
        why="no apt-get or dpkg to fetch libraries with"
    elif ! sysroot "$1" "$root" >"$out/sysroot.log" 2>&1; then
        why="packages cannot be had: $(tail -n 1 "$out/sysroot.log")"
    fi
    [ -n "$why" ]
}

# Builds and runs one program; its output is told only if it fails.
try() {
    log=$out/$1.log
    if "$cc" --sysroot="$root" -std=c11 -O0 -g -Wall -Wextra -Wpedantic \
        -Wshadow -Wconversion -Wno-unused-function -Werror \
        -fsanitize=undefined -fno-sanitize-recover=undefined -static-libubsan \
        "tests/unit/test_$1.c" -o "$out/test_$1" -pthread -lcmocka -lwslay \
        -lmbedtls -lmbedx509 -lmbedcrypto >"$log" 2>&1 &&
        timeout 100 "$qemu" -L "$root" "$out/test_$1" >>"$log" 2>&1 &&
        count=$(sed -n 's/^\[  PASSED  \] \([1-9][0-9]*\) test.*/\1/p' "$log") &&
        [ -n "$count" ]; then
        echo "ok $number - $arch test_$1 ($count tests)"
    else
        echo "not ok $number - $arch test_$1 ($log)"
        grep -avE '^\[ (RUN|      OK) ' "$log" | tail -n 30 | sed 's/^/# /'
        failed=1
    fi
}

[ $# -gt 0 ] || { echo "usage: tests/cross.sh ARCH..." >&2; exit 2; }
for arch; do
    # shellcheck disable=SC2046
    set -- $(machine "$arch")
    cc=${1:-}-gcc qemu=qemu-${2:-}-static
    root=$PWD/build/sysroot/$arch out=build/cross/$arch
    mkdir -p "$out" "$root"
    lacks "$arch"
    for program in $programs; do
        number=$((number + 1))
        if [ -n "$why" ]; then
            echo "ok $number - $arch test_$program # SKIP skipped: $why"
        else
            try "$program"
        fi
    done
done
exit $failed
