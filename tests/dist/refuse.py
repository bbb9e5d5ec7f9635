"""What a daemon refuses, and that it goes on serving others: garbage on its sockets, prompts and tensors that
do not fit, a second daemon on the same socket, ranks with another configuration, more requests than the
queue holds, a client that leaves.
"""
import os
import shlex
import signal
import socket
import struct
import subprocess
import tempfile

from daemon import MICRO, MOECTL, Daemon, check, die_with_parent, main, stopped, wait_for

GOOD = ["generate", "--prompt-ids", "79,110,373", "-n", "8", "--ignore-eos"]


def frame(envelope, payload=b"", magic=b"MOF1"):
    return magic + struct.pack("<IQ", len(envelope), len(payload)) + envelope + payload


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\0" * 64,
    b"MOF1" + b"\xff" * 12,                     # 4 GiB of envelope
    frame(b"\xff" * 50),                        # no protobuf
    frame(b"\xf8\x3f\x01"),                     # a field nobody knows
    frame(b"\xd2\x01\x00", magic=b"MOF2"),
    frame(b"\xd2\x01\x00")[:10],                # half a header, then the end
    frame(b"\xa2\x01\x04\x22\x02\x08"),         # ends inside a field
    frame(b"\x0a\x00", b"payload for nobody"),  # an empty Hello with a payload
    frame(b"\xaa\x01\x02\x08\x01"),             # a Token: not a client's message
    os.urandom(4096),
]


def throw(address, data):
    kind, _, rest = address.partition(":")
    check(kind == "unix", f"address {address}")
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(20)
    s.connect(rest)
    try:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        while s.recv(65536):
            pass
    except (BrokenPipeError, ConnectionResetError):
        pass
    s.close()


def test_garbage():
    with Daemon() as d:
        d.start()
        want = d.ctl(*GOOD, "--json")
        check(want.returncode == 0, f"{want}")
        data = d.status()["ranks"][0]["data_address"]
        before = d.rank_pids()
        for address in ("unix:" + d.socket, "unix:" + d.socket + ".ranks", data):
            for g in GARBAGE:
                throw(address, g)
            check(d.ctl(*GOOD).returncode == 0, f"no answer after garbage on {address}")
        check(d.rank_pids() == before and d.status()["launches"] == 1, "garbage cost a rank its life")
        # Connections that say nothing hold nobody up.
        idle = []
        for address in (d.socket, d.socket + ".ranks", data[5:]):
            for _ in range(8):
                s = socket.socket(socket.AF_UNIX)
                s.connect(address)
                idle.append(s)
        check(d.ctl(*GOOD).returncode == 0, "no answer beside silent connections")
        for s in idle:
            s.close()
        d.stop()


def refused(d, arguments, status, text):
    r = d.ctl(*arguments)
    check(r.returncode == status, f"{arguments}: exit status {r.returncode}, expected {status}: {r.stderr.decode()}")
    check(text in r.stderr.decode(), f"{arguments}: '{text}' is not in: {r.stderr.decode()}")


def write_npy(path, rows, columns, descr="<f4", values=None, order="False"):
    header = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': ({rows}, {columns}), }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    if values is None:
        values = b"\0" * (rows * columns * int(descr[-1]))
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + values)


def test_bad_requests():
    with Daemon() as d:
        d.start()
        refused(d, ["generate", "--prompt-ids", ",".join(["1"] * 130), "-n", "1"], 1, "context of 128")
        refused(d, ["generate", "-p", "Once", "-n", "500"], 1, "context of 128")
        refused(d, ["generate", "-p", ""], 1, "prompt is empty")
        refused(d, ["generate", "--prompt-ids", "1,999999"], 1, "the vocabulary has 2048")
        refused(d, ["generate", "--prompt-ids", "1,x"], 2, "--prompt-ids")
        refused(d, ["generate", "-p", "a", "--prompt-ids", "1"], 2, "either")
        refused(d, ["generate"], 2, "either")
        refused(d, ["generate", "-p", "a", "-T", "nan"], 2, "temperature")
        refused(d, ["generate", "-p", "a", "--logprobs", "21"], 2, "0 to 20")
        refused(d, ["generate", "-p", "a", "--no-such"], 2, "no-such")
        for verb in ("generate", "status", "stats", "drain", "forward"):
            refused(d, [verb, "extra"], 2, "unexpected argument 'extra'")
        refused(d, ["perplexity", __file__, "extra"], 2, "unexpected argument 'extra'")
        refused(d, ["inspect", MICRO, "extra"], 2, "unexpected argument 'extra'")
        refused(d, ["perplexity", "/nonexistent"], 2, "/nonexistent")
        refused(d, ["perplexity", __file__, "--ctx", "4096"], 2, "context of 128")
        x, y = os.path.join(d.folder, "x.npy"), os.path.join(d.folder, "y.npy")
        forward = ["forward", "--in", x, "--out", y, "--layer"]
        write_npy(x, 3, 64)
        check(d.ctl(*forward, 0).returncode == 0, "a good forward")
        refused(d, [*forward, 3], 2, "layers 0 to 2")
        refused(d, ["forward", "--layer", "0"], 2, "--in")
        write_npy(x, 3, 65)
        refused(d, [*forward, 0], 2, "hidden size is 64")
        write_npy(x, 3, "64, 2", values=b"\0" * 1536)
        refused(d, [*forward, 0], 2, "shape")
        write_npy(x, 3, 64, "<f8")
        refused(d, [*forward, 0], 2, "x.npy")
        write_npy(x, 3, 64, values=b"\0" * 100)
        refused(d, [*forward, 0], 2, "x.npy")
        write_npy(x, 3, 64, order="True")
        refused(d, [*forward, 0], 2, "Fortran")
        with open(x, "wb") as f:
            f.write(b"no array")
        refused(d, [*forward, 0], 2, "x.npy")
        write_npy(x, 2, 64, values=struct.pack("<f", float("nan")) * 64 + b"\0" * 256)
        r = d.ctl(*forward, 0)
        check(r.returncode == 1 and r.stderr, f"a row of NaN: {r}")
        check(d.ctl(*GOOD).returncode == 0, "no answer after refusals")
        d.stop()
    r = subprocess.run([MOECTL, "status", "-s", "/nonexistent/s"], capture_output=True)
    check(r.returncode == 2 and b"no daemon" in r.stderr, f"no daemon: {r}")


def test_deadline():
    """A request past its deadline ends, although a shard does not answer; the shard is not lost for it."""
    with Daemon() as d:
        d.start()
        with stopped(d.rank_pids("shard")[:1]):
            refused(d, [*GOOD, "--deadline", "700"], 1, "deadline")
        check(d.ctl(*GOOD).returncode == 0, "no answer after a deadline")
        check(d.status()["launches"] == 1, "a deadline cost a launch")
        d.stop()


def test_queue_full():
    with Daemon(kv_tokens=16, max_queue=2) as d:
        d.start()
        with stopped(d.rank_pids("router")):
            held = [d.begin(*GOOD)]
            wait_for("one to run", 20, lambda: d.status()["running"] == 1)
            held += [d.begin(*GOOD) for _ in range(2)]
            wait_for("two to wait", 20, lambda: d.status()["waiting"] == 2)
            refused(d, GOOD, 1, "queue is full")
        for p in held:
            p.communicate(timeout=60)
            check(p.returncode == 0, "a waiting request failed")
        d.stop()


def test_client_leaves():
    """The memory of a request whose client left is free again."""
    with Daemon() as d:
        d.start()
        with stopped(d.rank_pids("shard")[:1]):
            running = [d.begin(*GOOD[:-2], "100", "--ignore-eos") for _ in range(3)]
            wait_for("three to run", 20, lambda: d.status()["running"] == 3)
            for p in running:
                p.send_signal(signal.SIGKILL)
                p.wait()
        wait_for("no request to run", 20, lambda: d.status()["running"] == 0)
        c = d.counters("router")
        check(c["kv_pages_free"] == c["kv_pages"], f"{c['kv_pages_free']} of {c['kv_pages']} pages free")
        check(d.ctl(*GOOD).returncode == 0, "no answer after clients left")
        d.stop()


def test_second_daemon():
    with Daemon() as d:
        d.start()
        with Daemon(folder=d.folder) as other:
            other.log_path += "2"
            other.start(ready=False)
            check(other.process.wait(timeout=20) not in (0, None), "a second daemon on one socket")
            check("another daemon serves this socket" in other.log(), "it does not say why")
            os.unlink(other.log_path)
        check(d.ctl(*GOOD).returncode == 0, "the first daemon does not serve any more")
        d.stop()


def by_hand(d, config):
    """The ranks of d as a person would start them, with a configuration of their own."""
    line = subprocess.run([os.path.join(os.path.dirname(MOECTL), "moed"), "up", "--print-mpirun", "-c", d.config],
                          capture_output=True, check=True).stdout.decode()
    words = [config if w == d.config else w for w in shlex.split(line)]
    environment = {**os.environ, "MOED_JOB": "by-hand", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    out = open(os.path.join(d.folder, "mpirun.log"), "wb")
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=die_with_parent,
                            env=environment)


def test_by_hand():
    with Daemon() as d:
        d.start("--no-launch", environment={"MOED_JOB": "by-hand"}, ready=False)
        mpirun = by_hand(d, d.config)
        d.wait_ready()
        check(d.ctl(*GOOD).returncode == 0, "no answer from ranks started by hand")
        d.stop()
        check(mpirun.wait(timeout=30) == 0, "mpirun did not end with 0")


def test_other_configuration():
    with Daemon() as d:
        other = os.path.join(d.folder, "other.yaml")
        d.write_config(other, MICRO, None, {"max_queue": 128, "deadline_s": 7})
        d.start("--no-launch", environment={"MOED_JOB": "by-hand"}, ready=False)
        mpirun = by_hand(d, other)
        check(d.process.wait(timeout=30) == 1, "the daemon should give up")
        said = "limits.max_queue (256 here, 128 there)"
        check(said in d.log(), f"the daemon does not say '{said}'")
        check("deadline_s" not in d.log(), "not the first difference")
        mpirun.wait(timeout=30)
        with open(os.path.join(d.folder, "mpirun.log")) as f:
            check(said in f.read(), "the rank does not say why it was refused")


def test_bad_model():
    """A model that cannot be served ends the daemon at once, with the file's name."""
    with tempfile.TemporaryDirectory(prefix="moed-test.", dir="/tmp") as folder:
        cut = os.path.join(folder, "cut.gguf")
        with open(MICRO, "rb") as f, open(cut, "wb") as g:
            g.write(f.read(100000))
        for model, status in ((cut, 2), (os.path.join(folder, "none.gguf"), None), (__file__, 2)):
            with Daemon(model) as d:
                d.start(ready=False)
                rc = d.process.wait(timeout=20)
                check(rc == status or (status is None and rc in (1, 2)), f"{model}: exit status {rc}")
                check(os.path.basename(model) in d.log(), f"{model} is not named")
                check(not os.path.exists(d.socket), "a socket is left")


def test_bad_placement():
    for experts, text in ((["0-3", "5-9"], "owned by no shard: 4"), (["0-5", "5-9"], "expert 5 is owned by shard 0 and by shard 1"),
                          (["0-9", "10"], "10"), (["0-4", "9-5"], "runs backwards")):
        with Daemon(experts=experts) as d:
            with open(d.config, "a") as f:
                f.write("placement: {strategy: explicit}\n")
            d.start(ready=False)
            check(d.process.wait(timeout=20) == 2, f"{experts}: exit status")
            check(text in d.log(), f"{experts}: the log does not say '{text}'")


if __name__ == "__main__":
    main([test_garbage, test_bad_requests, test_deadline, test_queue_full, test_client_leaves, test_second_daemon, test_by_hand,
          test_other_configuration, test_bad_model, test_bad_placement])
