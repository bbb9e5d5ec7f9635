#!/bin/sh
# net_loss.sh PROGRAM death|stopped: one of four ranks is lost in mid-exchange. mpirun's exit status
# means nothing then (--enable-recovery), so the verdicts of the survivors are counted, and what is left
# in /dev/shm is compared with what was there before.
set -eu
dir=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
segments() { find /dev/shm -name 'moed-bell-*' | sort; }
segments >"$work/before"
"$dir/mpirun.sh" 4 --enable-recovery -- "$1" "$2" >"$work/out" 2>&1 || true
cat "$work/out"
ok=$(grep -c "^rank [0-2]: $2 ok$" "$work/out" || true)
# Another test may be starting right now: its segment is gone in a moment, a forgotten one stays.
segments | comm -13 "$work/before" - >"$work/left"
for _ in $(seq 100); do
    [ -s "$work/left" ] || break
    sleep 0.1
    segments | comm -12 "$work/left" - >"$work/still"
    mv "$work/still" "$work/left"
done
echo "$ok of 3 survivors finished, $(wc -l <"$work/left") segments left"
[ "$ok" -eq 3 ] && [ ! -s "$work/left" ]
