#!/bin/sh
# deps.sh [build|test|all] [--list]: installs the Debian packages that moed needs and that are missing.
#
#   build   to build and run moed (default)
#   test    and to run every test
#   all     and to fuzz, to format, and to run under clang's sanitizers
#   --list  print the packages, install nothing
#
# Does nothing, and asks for no rights, when all of them are there. Otherwise it needs root or sudo.
set -eu

build_packages="build-essential cmake ninja-build pkg-config
    openmpi-bin libopenmpi-dev protobuf-c-compiler libprotobuf-c-dev
    libyaml-dev libevent-dev libjansson-dev libpcre2-dev libxxhash-dev libhwloc-dev"
test_packages="python3 binutils qemu-user iproute2"
all_packages="clang-14 libclang-rt-14-dev clang-format-14"

packages=$build_packages list=0
for word in "$@"; do
    case $word in
    build) ;;
    test) packages="$packages $test_packages" ;;
    all) packages="$packages $test_packages $all_packages" ;;
    --list) list=1 ;;
    *)
        echo "usage: deps.sh [build|test|all] [--list]" >&2
        exit 2
        ;;
    esac
done
if [ "$list" -eq 1 ]; then
    # $packages holds words.
    # shellcheck disable=SC2086
    printf '%s\n' $packages
    exit 0
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    echo "deps.sh: this is no Debian system, so nothing was installed. Needed are the equivalents of:" >&2
    # shellcheck disable=SC2086
    echo " " $packages >&2
    echo "deps.sh: going on; the build will name what it does not find." >&2
    exit 0
fi

missing=
for p in $packages; do
    case $(dpkg-query -W -f='${db:Status-Abbrev}' "$p" 2>/dev/null || true) in
    ii*) ;;
    *) missing="$missing $p" ;;
    esac
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -eq 0 ]; then
    as_root=
elif command -v sudo >/dev/null; then
    as_root="sudo"
else
    echo "deps.sh: packages are missing, and this is neither root nor is there sudo. As root, run:" >&2
    echo "  apt-get update && apt-get install -y --no-install-recommends$missing" >&2
    exit 1
fi
echo "installing$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# $as_root and $missing hold words. env: sudo drops the environment.
# shellcheck disable=SC2086
if ! $as_root apt-get update -q >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "deps.sh: apt-get update failed; trying with the package lists that are there" >&2
fi
# shellcheck disable=SC2086
if ! $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    echo "deps.sh: these packages could not be installed:$missing" >&2
    exit 1
fi
