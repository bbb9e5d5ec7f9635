#!/bin/bash
# Three "hosts" on one machine: network namespaces behind a bridge, each with its own host name, /dev/shm
# and processes, and a remote-shell agent for mpirun that enters them. One router and two shards, one a host:
# the control connections and the tensor service run over TCP, slices over Open MPI's tcp. The tokens must be
# those of one machine. usage: hosts.sh BUILD SOURCE
set -eu
build=$1 source=$2
skip() { echo "skipped: $1"; exit 77; }
[ "$(id -u)" = 0 ] || skip "network namespaces need root"
command -v ip >/dev/null || skip "no ip command (iproute2)"
run=$(mktemp -d /tmp/moed-hosts.XXXXXX)
tag=m$$
ip netns add "$tag-sw" 2>/dev/null || { rm -rf "$run"; skip "network namespaces cannot be made here"; }
daemon=
clean() {
    status=$?
    trap - EXIT
    [ -z "$daemon" ] || kill -KILL "$daemon" 2>/dev/null || true
    for h in sw 0 1 2; do ip netns del "$tag-$h" 2>/dev/null || true; done
    rm -rf "$run"
    exit "$status"
}
trap clean EXIT

ip -n "$tag-sw" link add br0 type bridge || skip "no bridge in this kernel"
ip -n "$tag-sw" link set br0 up
echo "127.0.0.1 localhost" >"$run/hosts"
for i in 0 1 2; do
    ip netns add "$tag-$i"
    ip -n "$tag-$i" link set lo up
    ip link add eth0 netns "$tag-$i" type veth peer name "p$i" netns "$tag-sw"
    ip -n "$tag-sw" link set "p$i" master br0 up
    ip -n "$tag-$i" addr add "10.78.0.$((10 + i))/24" dev eth0
    ip -n "$tag-$i" link set eth0 up
    echo "10.78.0.$((10 + i)) host$i" >>"$run/hosts"
done

# enter N PIDS COMMAND...: runs a command on host N.
cat >"$run/enter" <<EOF
#!/bin/bash
n=\$1; shift
exec ip netns exec "$tag-\$n" unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc bash -c '
hostname "host\$0"; mount --make-rprivate /; mount --bind "$run/hosts" /etc/hosts; mount -t tmpfs tmpfs /dev/shm
exec "\$@"' "\$n" "\$@"
EOF
# What mpirun calls in place of ssh: options, the host, a command line.
cat >"$run/agent" <<EOF
#!/bin/bash
while [[ \$1 == -* ]]; do shift; done
host=\$1; shift
exec "$run/enter" "\${host#host}" bash -c "\$*"
EOF
chmod +x "$run/enter" "$run/agent"

config() { # config FILE SOCKET REST
    printf 'model: %s/deploy/demo/tinymoe-q4_k_m.gguf\n%s\n' "$source" "$2" >"$1"
}
config "$run/far.yaml" "front: {socket: $run/far.sock, control: 'tcp:10.78.0.10:7171'}
routers: [{host: host0, kv_tokens: 1024}]
shards: [{host: host1}, {host: host2}]
launch: {options: '--mca plm_rsh_agent $run/agent'}"
config "$run/near.yaml" "front: {socket: $run/near.sock}
routers: [{kv_tokens: 1024}]
shards: [{}]"

tokens() { "$build/moectl" generate -s "$1" -p "Once upon a time" -n 48 --json --logprobs 3 | sed 's/"timings":{[^}]*},*//'; }
wait_ready() {
    for _ in $(seq 300); do
        "$build/moectl" status -s "$1" 2>/dev/null | head -1 | grep -q "is ready" && return 0
        sleep 0.1
    done
    cat "$run/log"
    echo "not ready within 30 s"
    return 1
}

"$build/moed" up -c "$run/near.yaml" >"$run/log" 2>&1 &
daemon=$!
wait_ready "$run/near.sock"
tokens "$run/near.sock" >"$run/near.json"
"$build/moectl" drain -s "$run/near.sock"
wait "$daemon"

"$run/enter" 0 "$build/moed" up -c "$run/far.yaml" >"$run/log" 2>&1 &
daemon=$!
wait_ready "$run/far.sock"
"$build/moectl" status -s "$run/far.sock" | grep -c ' host[012] ' | grep -qx 3 || { echo "ranks are not on three hosts"; exit 1; }
tokens "$run/far.sock" >"$run/far.json"
cmp "$run/near.json" "$run/far.json" || { echo "tokens differ from one machine's"; exit 1; }

# Hidden states go to the router's own TCP address, from another host.
python3 - "$run/x.npy" <<'EOF'
import struct, sys
h = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 256), }"
h += b" " * (117 - len(h)) + b"\n"
values = [((i * 37) % 101 - 50) / 50 for i in range(768)]
open(sys.argv[1], "wb").write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + h + struct.pack("<768f", *values))
EOF
"$run/enter" 2 "$build/moectl" forward -s "$run/far.sock" --layer 1 --in "$run/x.npy" --out "$run/y.npy"
[ "$(stat -c %s "$run/y.npy")" = "$(stat -c %s "$run/x.npy")" ] || { echo "forward gave another size"; exit 1; }
"$build/moectl" drain -s "$run/far.sock"
wait "$daemon"
daemon=
echo "1 passed, 0 failed"
