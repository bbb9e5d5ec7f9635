#!/bin/sh
# net_loss.sh PROGRAM death|stopped: one of four ranks is lost in mid-exchange. mpirun's exit status
# means nothing then (--enable-recovery), so the verdicts of the survivors are counted, and what is left
# in /dev/shm is compared with what was there before.
set -eu
dir=$(dirname "$0")
out=$(mktemp)
trap 'rm -f "$out"' EXIT
before=$(find /dev/shm -name 'moed-bell-*' | wc -l)
"$dir/mpirun.sh" 4 --enable-recovery -- "$1" "$2" >"$out" 2>&1 || true
cat "$out"
ok=$(grep -c "^rank [0-2]: $2 ok$" "$out" || true)
# Another test may be starting right now: its segment is gone in a moment, a forgotten one is not.
for try in 1 2 3 4 5; do
    after=$(find /dev/shm -name 'moed-bell-*' | wc -l)
    [ "$after" -gt "$before" ] || break
    sleep "0.$try"
done
echo "$ok of 3 survivors finished, $((after - before)) segments left"
[ "$ok" -eq 3 ] && [ "$after" -le "$before" ]
