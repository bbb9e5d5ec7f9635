# shellcheck shell=sh
# common.sh: sourced by the scripts of this folder; sets $root (the repository) and $build (where it is
# built). Root and an ordinary user may use one clone in turn: who does not own build/ gets a folder of
# their own, so neither trips over the other's files. MOED_BUILD_DIR names another place.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)

choose_build() {
    if [ -n "${MOED_BUILD_DIR:-}" ]; then
        printf '%s\n' "$MOED_BUILD_DIR"
    elif [ -e "$root/build" ] && [ -O "$root/build" ]; then
        printf '%s\n' "$root/build"
    elif [ ! -e "$root/build" ] && [ -w "$root" ]; then
        printf '%s\n' "$root/build"
    else
        # One folder per clone: two clones must not share a CMake cache.
        printf '%s/moed/build-%s\n' "${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}" \
            "$(printf '%s' "$root" | cksum | cut -d' ' -f1)"
    fi
}
# shellcheck disable=SC2034 # for those who source this
build=$(choose_build)

say() { printf '%s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}
