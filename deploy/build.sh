#!/bin/sh
# build.sh [-v] [-p] [CMake options]: configures and builds moed into build/ (see common.sh), RelWithDebInfo,
# Ninja. Prints a line now and then and the end of the log only if it fails; -v prints everything, -p builds
# the programs alone, without tests.
set -eu
# shellcheck source=deploy/common.sh
. "$(dirname "$0")/common.sh"

verbose=0 targets=
while :; do
    case ${1:-} in
    -v) verbose=1 ;;
    -p) targets="--target moed moectl" ;;
    *) break ;;
    esac
    shift
done
mkdir -p "$build" || die "cannot make $build"
log=$build/build.log

fail() {
    tail -n 60 "$log" >&2
    die "$1; the whole log is $log"
}

# $targets holds words.
# shellcheck disable=SC2086
make_all() { cmake --build "$build" $targets; }
configure() { cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo "$@"; }

if [ "$verbose" -eq 1 ]; then
    configure "$@"
    make_all
    exit
fi

say "configuring in $build"
if ! configure "$@" >"$log" 2>&1; then
    # A cache of another place or generator cannot be used again: begin anew, once.
    rm -rf "$build/CMakeCache.txt" "$build/CMakeFiles"
    configure "$@" >"$log" 2>&1 || fail "configuring failed"
fi

# Ninja's lines are "[done/all] what": one is shown at each fifth of the way.
status=$build/build.status
rm -f "$status"
{
    NINJA_STATUS='[%f/%t] '
    export NINJA_STATUS
    if make_all 2>&1; then echo 0 >"$status"; else echo 1 >"$status"; fi
} | {
    shown=0
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        case $line in
        "["*/*"]"*)
            steps=${line#\[}
            steps=${steps%%\]*}
            done=${steps%/*} all=${steps#*/}
            fifth=$((done * 5 / all))
            if [ "$all" -gt 10 ] && [ "$fifth" -gt "$shown" ]; then
                shown=$fifth
                say "built $done of $all"
            fi
            ;;
        esac
    done
}
[ "$(cat "$status" 2>/dev/null || echo 1)" -eq 0 ] || fail "the build failed"
