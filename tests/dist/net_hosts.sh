#!/bin/sh
# net_hosts.sh PROGRAM ARGUMENT: three ranks that believe to be on three hosts (each has its own host
# name), so that they wake each other by datagram. Needs root for unshare; skipped aloud without.
set -eu
dir=$(cd "$(dirname "$0")" && pwd)
if ! unshare --uts true 2>/dev/null; then
    echo "skipped: unshare --uts is not permitted here"
    exit 77
fi
export MOED_BELL_ADDRESS=127.0.0.1 MOED_MPIRUN_BTL=self,tcp MOED_LOG=debug
out=$(mktemp)
trap 'rm -f "$out"' EXIT
status=0
"$dir/mpirun.sh" 3 unshare --uts \
    sh -c 'hostname "host$OMPI_COMM_WORLD_RANK" && exec "$@"' sh "$@" >"$out" 2>&1 || status=$?
cat "$out"
[ "$status" -eq 0 ]
# Proof that no rank took another for its neighbour.
[ "$(grep -c '0 peers on this host, 2 elsewhere' "$out")" -eq 3 ]
