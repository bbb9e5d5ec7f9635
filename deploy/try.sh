#!/bin/sh
# try.sh: from a fresh clone to a story. Installs what is missing, builds, starts one router and two shards
# over mpirun on the bundled demo model, streams text, shows which shard did what, stops everything.
#
# Sockets and configuration lie in a temporary folder, so several users can try at once. Whatever ends
# this script, Ctrl-C too, ends the daemon and removes the folder.
set -eu
# shellcheck source=deploy/common.sh
. "$(dirname "$0")/common.sh"

ready_s=120
daemon=
run=

alive() { [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; }

# Waits up to $1 seconds for the daemon to end.
wait_end() {
    n=$(($1 * 10))
    while alive && [ "$n" -gt 0 ]; do
        sleep 0.1
        n=$((n - 1))
    done
    ! alive
}

clean() {
    status=$?
    trap - EXIT HUP INT TERM
    if alive; then
        kill -TERM "$daemon" 2>/dev/null || true
        wait_end 8 || kill -TERM "$daemon" 2>/dev/null || true # a second signal: end now
        wait_end 8 || kill -KILL "$daemon" 2>/dev/null || true # its ranks die with it
        wait "$daemon" 2>/dev/null || true
    fi
    [ -z "$run" ] || rm -rf "$run"
    exit "$status"
}
trap clean EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

give_up() {
    say
    say "--- log of the daemon ---"
    cat "$run/log" 2>/dev/null || true
    die "$1"
}

"$root/deploy/deps.sh" build
"$root/deploy/build.sh" -p

# A socket's path may have 90 characters: a long TMPDIR is left aside.
tmp=${TMPDIR:-/tmp}
[ "${#tmp}" -le 50 ] && [ -w "$tmp" ] || tmp=/tmp
run=$(mktemp -d "$tmp/moed-try.XXXXXX")
sed -e "s|^model: *|&$root/deploy/|" -e "s|^front:.*|front: {socket: $run/moed.sock}|" \
    "$root/deploy/demo.yaml" >"$run/demo.yaml"
MOED_SOCKET=$run/moed.sock
export MOED_SOCKET

say
say "\$ moed up -c demo.yaml     # 1 router and 2 shards, started over mpirun"
# No job control: Ctrl-C reaches the daemon too, which drains; clean() waits for it.
"$build/moed" up -c "$run/demo.yaml" >"$run/log" 2>&1 &
daemon=$!

n=$((ready_s * 5))
until "$build/moectl" status 2>/dev/null | head -n 1 | grep -q ' is ready'; do
    alive || give_up "the daemon ended before it was ready"
    n=$((n - 1))
    [ "$n" -gt 0 ] || give_up "not ready within $ready_s s"
    sleep 0.2
done
sed -n 's/^.*\(ready: .*\)$/\1/p' "$run/log" | tail -n 1

prompt="Once upon a time"
say
say "\$ moectl generate -p \"$prompt\" -n 120 -T 0.8 --seed 7"
printf '%s' "$prompt"
"$build/moectl" generate -p "$prompt" -n 120 -T 0.8 --seed 7 || give_up "generating failed"

say
say "\$ moectl status"
"$build/moectl" status || give_up "no status"
say
say "\$ moectl stats     # who did what"
"$build/moectl" stats >"$run/stats" || give_up "no statistics"
awk -f "$root/deploy/stats.awk" "$run/stats"

say
say "\$ moectl drain"
"$build/moectl" drain || give_up "draining failed"
wait_end 20 || give_up "the daemon did not end after the drain"
status=0
wait "$daemon" || status=$?
daemon=
[ "$status" -eq 0 ] || give_up "the daemon ended with status $status"
say
say "That is all: nothing is left running. README.md tells how to serve your own model."
