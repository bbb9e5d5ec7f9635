"""Clients that speak frames but not sense: numbers at the ends of their types, fields nobody knows, questions without
reading the answers, more connections than the daemon may hold. Each must cost nobody else anything.
"""
import os
import resource
import signal
import socket
import struct
import subprocess
import time

from daemon import MICRO, MOED, Daemon, check, die_with_parent, main, stopped, wait_for
from refuse import write_npy

GOOD = ["generate", "--prompt-ids", "79,110,373", "-n", "8", "--ignore-eos"]
BIG = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)

# Field numbers of proto/moed.proto.
GENERATE, TOKEN, SCORES, DONE, FAILED, CANCEL, STATUS_QUERY, TOKENIZE, FORWARD = 20, 21, 22, 23, 24, 25, 40, 43, 60


def varint(v):
    v &= 2**64 - 1
    out = b""
    while v > 127:
        out += bytes([v & 127 | 128])
        v >>= 7
    return out + bytes([v])


def number(field, v):
    return varint(field << 3) + varint(v)


def real(field, v):
    return varint(field << 3 | 5) + struct.pack("<f", v)


def text(field, data):
    return varint(field << 3 | 2) + varint(len(data)) + data


def frame(kind, message, payload=b""):
    envelope = text(kind, message)
    return b"MOF1" + struct.pack("<IQ", len(envelope), len(payload)) + envelope + payload


def generate(ids=(79, 110, 373), max_tokens=4, sampling=b"", more=b""):
    packed = b"".join(varint(i) for i in ids)
    out = text(2, packed) + number(3, 1) + number(4, max_tokens)
    return frame(GENERATE, out + (text(5, sampling) if sampling else b"") + more)


def sampling(**changed):
    """All fields of a Sampling, because one that is left out is 0."""
    v = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0, **changed}
    return (real(1, v["temperature"]) + number(2, v["top_k"]) + real(3, v["top_p"]) + real(4, v["min_p"]) +
            real(5, v["repetition_penalty"]) + number(6, v["seed"]))


class Client:
    def __init__(self, path):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(20)
        self.s.connect(path)

    def send(self, data):
        self.s.sendall(data)

    def exactly(self, n):
        out = b""
        while len(out) < n:
            part = self.s.recv(n - len(out))
            if not part:
                raise EOFError
            out += part
        return out

    def receive(self):
        """The kind of the next message."""
        head = self.exactly(16)
        envelope, payload = struct.unpack("<IQ", head[4:])
        body = self.exactly(envelope + payload)
        tag, shift = 0, 0
        for b in body:
            tag |= (b & 127) << shift
            shift += 7
            if b < 128:
                break
        return tag >> 3

    def outcome(self):
        """DONE or FAILED, whatever comes before it."""
        while True:
            kind = self.receive()
            if kind in (DONE, FAILED):
                return kind

    def close(self):
        self.s.close()


def expect(d, name, data, kind):
    c = Client(d.socket)
    c.send(data)
    got = c.outcome()
    c.close()
    check(got == kind, f"{name}: message {got}, expected {kind}")


def test_numbers():
    with Daemon() as d:
        d.start()
        pids = d.rank_pids()
        expect(d, "plain", generate(), DONE)
        expect(d, "no token to generate", generate(max_tokens=0), DONE)
        for v in BIG[2:]:
            expect(d, f"max_tokens {v}", generate(max_tokens=v), FAILED)
            expect(d, f"n_logprobs {v}", generate(more=number(6, v)), FAILED)
            expect(d, f"score_from {v}", generate(more=number(8, v)), FAILED)
        expect(d, "n_logprobs 20", generate(more=number(6, 20)), DONE)
        expect(d, "n_logprobs 21", generate(more=number(6, 21)), FAILED)
        for ids in ((), (-1,), (2**31 - 1,), (-2**31,), (2048,)):
            expect(d, f"prompt {ids}", generate(ids=ids), FAILED)
        expect(d, "a deadline of 49 days", generate(more=number(9, 2**32 - 1)), DONE)
        expect(d, "top_k of all", generate(sampling=sampling(temperature=1, top_k=2**31 - 1)), DONE)
        for key, values in {"top_k": (-1, -2**31), "temperature": (-1, float("nan"), float("inf")),
                            "top_p": (-0.5, 1.5, float("nan")), "min_p": (-0.5, 1.5, float("nan")),
                            "repetition_penalty": (-1, 0, float("nan"), float("inf"))}.items():
            for v in values:
                expect(d, f"{key} {v}", generate(sampling=sampling(**{key: v})), FAILED)
        data = d.status()["ranks"][0]["data_address"][5:]
        for v in BIG:
            for message in (number(1, v) + number(2, 1) + number(3, 64), number(1, 0) + number(2, v) + number(3, 64),
                            number(1, 0) + number(2, 1) + number(3, v), number(1, 0) + number(2, 1) + number(3, 64) + number(4, v)):
                c = Client(data)
                c.send(frame(FORWARD, message, b"\0" * 255))
                check(c.receive() == FAILED, f"Forward {message.hex()} of 255 bytes")
                c.close()
        c = Client(d.socket)
        for v in (0, 7, 2**64 - 1):
            c.send(frame(CANCEL, number(1, v)))  # of nothing: no answer
        c.send(generate())
        check(c.outcome() == DONE, "no answer after cancels of nothing")
        c.close()
        check(d.ctl(*GOOD).returncode == 0 and d.rank_pids() == pids, "numbers cost a rank its life")
        d.stop()


def test_unknown_fields():
    """What a newer client sends is dropped, also while its request waits: nothing of the frame may be kept."""
    unknown = b"".join(text(1000 + i, os.urandom(64)) for i in range(200))
    with Daemon(kv_tokens=16) as d:
        d.start()
        want = d.ctl(*GOOD, "--json").stdout
        with stopped(d.rank_pids("router")):
            first = d.begin(*GOOD)
            wait_for("one to run", 20, lambda: d.status()["running"] == 1)
            c = Client(d.socket)
            for _ in range(4):
                c.send(generate(sampling=sampling() + unknown, more=unknown))
            wait_for("four to wait", 20, lambda: d.status()["waiting"] == 4)
            check(d.status()["running"] == 1, "more run than the KV cache holds")
        check(first.wait(timeout=20) == 0, "the first request failed")
        check([c.outcome() for _ in range(4)] == [DONE] * 4, "a request with unknown fields failed")
        c.close()
        check(want and d.status()["launches"] == 1, "unknown fields cost a launch")
        d.stop()


def test_never_reads():
    """Answers nobody reads are bounded, however many questions came in one go."""
    with Daemon() as d:
        d.start()
        before = rss(d.process.pid)
        c = Client(d.socket)
        try:
            for _ in range(40):
                c.send(frame(STATUS_QUERY, b"") * 20000)
        except (BrokenPipeError, ConnectionResetError):
            pass
        wait_for("the daemon to cut it off", 20, lambda: "does not read" in d.log())
        check(d.ctl(*GOOD).returncode == 0, "no answer beside a client that does not read")
        c.close()
        said = d.log().count("does not read")
        check(said == 1, f"the daemon says {said} times that one client does not read")
        grown = (peak_rss(d.process.pid) - before) >> 20
        check(grown < 150, f"the daemon grew by {grown} MiB for one client")
        d.stop()


def rss(pid):
    return memory(pid, "VmRSS:")


def peak_rss(pid):
    return memory(pid, "VmHWM:")


def memory(pid, key):
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(key))


def test_connections():
    """Out of file descriptors the daemon waits for one, without spinning, and then serves again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with Daemon() as d:
        d.start()
        pid = d.process.pid
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 20, hard))
        idle = [Client(d.socket) for _ in range(60)]
        time.sleep(0.5)
        before, lines = cpu_s(pid), len(d.log().splitlines())
        time.sleep(2)
        used, said = cpu_s(pid) - before, len(d.log().splitlines()) - lines
        check(used < 0.4, f"{used:.2f} s of processor time in 2 s without a free descriptor")
        check(said < 40, f"{said} lines of log in 2 s without a free descriptor")
        for c in idle:
            c.close()
        wait_for("the daemon to serve again", 20, lambda: d.status(may_fail=True))
        check(d.ctl(*GOOD).returncode == 0, "no answer after too many connections")
        d.stop()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_strangers():
    """Connections that never say who they are do not take the descriptors of clients and ranks."""
    with Daemon() as d:
        d.start()
        pid = d.process.pid
        before = len(os.listdir(f"/proc/{pid}/fd"))
        idle = [Client(d.socket + ".ranks") for _ in range(200)]
        check(d.ctl(*GOOD).returncode == 0, "no answer beside silent connections")
        taken = len(os.listdir(f"/proc/{pid}/fd")) - before
        check(taken < 50, f"200 strangers hold {taken} descriptors")
        for c in idle:
            c.close()
        os.kill(d.rank_pids("shard")[0], signal.SIGKILL)
        d.wait_ready(launches=2)  # ranks still get in
        d.stop()


def test_silent_tensor_clients():
    """Connections to a router's tensor service that ask nothing give way to one that does."""
    with Daemon() as d:
        d.start()
        x, y = os.path.join(d.folder, "x.npy"), os.path.join(d.folder, "y.npy")
        write_npy(x, 2, 64)
        idle = [Client(d.socket + ".r0") for _ in range(40)]
        idle[-1].send(b"MOF1")  # a frame that never ends
        for _ in range(3):
            check(d.ctl("forward", "--layer", 0, "--in", x, "--out", y).returncode == 0, "no answer beside silent connections")
        for c in idle:
            c.close()
        check(d.ctl("forward", "--layer", 0, "--in", x, "--out", y).returncode == 0, "no answer after silent connections")
        d.stop()


def test_any_bytes():
    """Names and paths that are no UTF-8, or hold quotes, still give JSON."""
    with Daemon() as d:
        folder = os.fsencode(d.folder) + b"/\xff\"'\\"
        os.mkdir(folder)
        with open(MICRO, "rb") as f:
            model = f.read()
        name = b"tinymoe"
        check(name in model, "the model has another name")
        with open(folder + b"/m.gguf", "wb") as f:
            f.write(model.replace(name, b"tiny\xff\xfe\xc3"))
        with open(d.config) as f, open(folder + b"/c.yaml", "w") as g:
            g.write(f.read().replace(MICRO, "m.gguf"))
        d.config = os.fsdecode(folder + b"/c.yaml")
        d.start()
        s = d.status()
        check(s["model_name"].startswith("tiny\ufffd\ufffd\ufffd "), f"the name is {s['model_name']}")
        check(s["model"].endswith("/\ufffd\"'\\/m.gguf"), f"the path is {s['model']}")
        x, y = os.path.join(d.folder, "x.npy"), os.fsdecode(folder + b"/y.npy")
        write_npy(x, 1, 64)
        check(d.ctl_json("forward", "--layer", 0, "--in", x, "--out", y)["out"].endswith("\"'\\/y.npy"), "the path of a result")
        d.stop()


def test_closed_files():
    """Without standard input, output and error no socket takes their numbers, so no log goes there."""
    with Daemon() as d:
        closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
        d.process = subprocess.Popen([*closed, MOED, "up", "-c", d.config], preexec_fn=die_with_parent)
        d.wait_ready()
        for fd in range(3):
            to = os.readlink(f"/proc/{d.process.pid}/fd/{fd}")
            check(to == "/dev/null", f"descriptor {fd} of the daemon is {to}")
        r = subprocess.run([*closed, *d.command(*GOOD)], timeout=20, check=False)
        check(r.returncode == 0, f"moectl without standard files ended with {r.returncode}")
        d.stop()


def cpu_s(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_many_small():
    """More requests at once than a router queues: they wait in the daemon, none is refused by a router."""
    with Daemon(max_sequences=2, max_queue=100) as d:
        d.start()
        c = Client(d.socket)
        with stopped(d.rank_pids("router")):
            c.send(generate(ids=(79,), max_tokens=1) * 102)
            wait_for("all to be taken", 20, lambda: sum(d.status()[k] for k in ("running", "waiting")) == 102)
        ends = [c.outcome() for _ in range(102)]
        check(ends == [DONE] * 102, f"{ends.count(FAILED)} of 102 requests failed")
        c.close()
        d.stop()


def test_not_a_socket():
    """A file where the socket should be is a person's: it stays."""
    with Daemon() as d:
        with open(d.socket, "w") as f:
            f.write("precious")
        d.start(ready=False)
        check(d.process.wait(timeout=20) not in (0, None), "a daemon without a socket")
        with open(d.socket) as f:
            check(f.read() == "precious", "the file is gone")
        check("is no socket" in d.log(), "it does not say why")


def test_two_at_once():
    """Of two daemons started in one moment one serves, and the other does not take its socket away."""
    for _ in range(3):
        with Daemon() as d, Daemon(folder=d.folder) as other:
            other.log_path += "2"
            d.start(ready=False)
            other.start(ready=False)
            loser = wait_for("one to give up", 20, lambda: next((x for x in (d, other) if x.process.poll() is not None), None))
            winner = other if loser is d else d
            check("another daemon serves this socket" in loser.log(), f"the loser says {loser.log()}")
            winner.wait_ready()
            check(d.ctl(*GOOD).returncode == 0, "no answer from the one that serves")
            winner.process.send_signal(signal.SIGTERM)
            check(winner.process.wait(timeout=40) == 0, "its exit status")


def test_hangup():
    """The terminal goes away: the same as SIGTERM."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as a terminal has it, also where this test runs under nohup
    with Daemon() as d:
        d.start()
        pid = d.process.pid
        d.process.send_signal(signal.SIGHUP)
        check(d.process.wait(timeout=40) == 0, "the exit status after SIGHUP")
        d.check_nothing_left(pid)


if __name__ == "__main__":
    main([test_numbers, test_unknown_fields, test_never_reads, test_connections, test_many_small, test_not_a_socket,
          test_two_at_once, test_hangup, test_strangers, test_silent_tensor_clients, test_any_bytes, test_closed_files])
