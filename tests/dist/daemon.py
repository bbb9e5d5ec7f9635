"""What the tests of running clusters share: a daemon with its configuration, moectl, processes, a harness.

A Daemon writes its own configuration into a temporary folder, starts `moed up`, and is ended by stop() or by
the end of this process, whatever that is: the kernel then kills it, and its ranks with it. Only the standard
library of Python is used.
"""
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback

BUILD = os.environ.get("MOED_BUILD", "build")
SOURCE = os.environ.get("MOED_SOURCE", os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
SHARED = os.environ.get("MOED_SHARED", "")
MOED, MOECTL = os.path.join(BUILD, "moed"), os.path.join(BUILD, "moectl")
MICRO = os.path.join(SOURCE, "tests/golden/micro-f32.gguf")
DEMO = os.path.join(SOURCE, "deploy/demo/tinymoe-q4_k_m.gguf")
READY_S = 60


class Skip(Exception):
    pass


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def check(condition, text):
    if not condition:
        raise AssertionError(text)


def wait_for(what, seconds, question):
    """Asks until the answer is true; fails naming what was waited for."""
    end = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.05)


# ---- processes ----

def stat_fields(pid):
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rsplit(")", 1)[1].split()


def is_running(pid):
    try:
        return stat_fields(pid)[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids():
    return [int(p) for p in os.listdir("/proc") if p.isdigit()]


def children(pid):
    found = []
    for p in pids():
        try:
            if int(stat_fields(p)[1]) == pid:
                found.append(p)
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def with_argument(text):
    """Running processes that have `text` in their command line."""
    found = []
    for p in pids():
        try:
            with open(f"/proc/{p}/cmdline", "rb") as f:
                if os.fsencode(text) in f.read() and p != os.getpid() and is_running(p):
                    found.append(p)
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def cpu_ns(pid):
    """Processor time of all threads of a process."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/schedstat") as f:
                total += int(f.read().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            pass
    return total


def shared_memory():
    """Names in /dev/shm that a job of ours may have left."""
    return {n for n in os.listdir("/dev/shm") if n.startswith(("moed", "vader", "openmpi", "sm_segment"))}


# ---- a cluster ----

class Daemon:
    def __init__(self, model=MICRO, routers=1, shards=2, experts=None, folder=None, **keys):
        """experts: a list of strings, one per shard. keys: kernels, threads, kv_tokens, mpirun, or limits.

        per_layer_ms is long, because tests hold shards, and a busy machine makes a moment long."""
        self.folder = folder or tempfile.mkdtemp(prefix="moed-test.", dir="/tmp")
        self.keeps_folder = folder is not None
        self.config = os.path.join(self.folder, "cluster.yaml")
        self.socket = os.path.join(self.folder, "s")
        self.log_path = os.path.join(self.folder, "log")
        self.process = None
        self.n_routers = routers
        self.n_shards = len(experts) if experts else shards
        self.write_config(self.config, model, experts, dict(keys))

    def write_config(self, path, model, experts, keys):
        threads = keys.pop("threads", 1)
        kv = keys.pop("kv_tokens", 8192)
        lines = [f"model: {model}", f"front: {{socket: {self.socket}}}", f"kernels: {keys.pop('kernels', 'auto')}"]
        lines.append("launch: {mpirun: %s, relaunches: %d}" % (keys.pop("mpirun", "mpirun"), keys.pop("relaunches", 3)))
        lines.append("routers:")
        lines += [f"  - {{kv_tokens: {kv}, threads: {threads}}}"] * self.n_routers
        lines.append("shards:")
        for i in range(self.n_shards):
            owns = f', experts: "{experts[i]}"' if experts and experts[i] is not None else ""
            lines.append(f"  - {{threads: {threads}{owns}}}")
        lines.append("limits:")
        lines += [f"  {k}: {v}" for k, v in {"drain_s": 20, "per_layer_ms": 5000, **keys}.items()]
        with open(path, "w") as f:
            f.write("\n".join(lines) + "\n")

    def start(self, *arguments, environment=None, ready=True):
        self.log_file = open(self.log_path, "ab")
        self.process = subprocess.Popen([MOED, "up", "-c", self.config, *arguments], stdin=subprocess.DEVNULL,
                                        stdout=self.log_file, stderr=self.log_file, preexec_fn=die_with_parent,
                                        env={**os.environ, **(environment or {})})
        if ready:
            self.wait_ready()
        return self

    def wait_ready(self, launches=None):
        def is_ready():
            if self.process.poll() is not None:
                raise AssertionError(f"moed up ended with {self.process.returncode}")
            s = self.status(may_fail=True)
            return s and s["state"] == "ready" and (launches is None or s["launches"] >= launches)
        wait_for("the daemon to be ready", READY_S, is_ready)

    def stop(self):
        """Drains; the daemon must end with 0 and leave nothing."""
        pid = self.process.pid
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=40)
        check(status == 0, f"moed up ended with {status} after SIGTERM")
        self.check_nothing_left(pid)

    def check_nothing_left(self, pid):
        wait_for("the ranks to be gone", 20, lambda: not with_argument(self.config))
        check(not os.path.exists(self.socket), "the socket is left")
        left = [n for n in os.listdir(self.folder) if n.startswith("s")]
        check(not left, f"sockets are left: {left}")
        left = [n for n in os.listdir("/dev/shm") if n.startswith(f"moed.{pid}.")]
        check(not left, f"left in /dev/shm: {left}")

    def close(self):
        """The end after a failure or a success: nothing of this daemon goes on."""
        if self.process is not None and self.process.poll() is None:
            for p in [self.process.pid] + with_argument(self.config):
                try:
                    os.kill(p, signal.SIGCONT)
                except ProcessLookupError:
                    pass
            self.process.kill()
            self.process.wait()
        if not self.keeps_folder:
            subprocess.run(["rm", "-rf", self.folder], check=False)

    def log(self):
        with open(self.log_path, errors="replace") as f:
            return f.read()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is not None and kind is not Skip and os.path.exists(self.log_path):
            print("--- log of the daemon ---\n" + self.log()[-6000:] + "---", flush=True)
        self.close()

    # ---- clients ----

    def command(self, *arguments):
        return [MOECTL, arguments[0], "-s", self.socket, *map(str, arguments[1:])]

    def ctl(self, *arguments, timeout=120):
        return subprocess.run(self.command(*arguments), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)

    def ctl_json(self, *arguments, timeout=120):
        r = self.ctl(*arguments, "--json", timeout=timeout)
        check(r.returncode == 0, f"moectl {arguments[0]} ended with {r.returncode}: {r.stderr.decode()}")
        return json.loads(r.stdout)

    def begin(self, *arguments):
        """A moectl that goes on while the test does something else."""
        return subprocess.Popen(self.command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, preexec_fn=die_with_parent)

    def status(self, may_fail=False):
        r = self.ctl("status", "--json")
        if r.returncode != 0:
            check(may_fail, f"moectl status ended with {r.returncode}: {r.stderr.decode()}")
            return None
        return json.loads(r.stdout)

    def rank_pids(self, role=None):
        return [r["pid"] for r in self.status()["ranks"] if role in (None, r["role"])]

    def counters(self, role):
        total = {}
        for r in self.ctl_json("stats")["ranks"]:
            if r["role"] == role:
                for k, v in r["counters"].items():
                    total[k] = total.get(k, 0) + v
        return total

    def mpirun_pid(self):
        found = [p for p in children(self.process.pid) if is_running(p)]
        check(len(found) == 1, f"moed up has {len(found)} children")
        return found[0]


class stopped:
    """Holds processes while a test arranges something."""

    def __init__(self, stop_these):
        self.stop_these = stop_these

    def __enter__(self):
        for p in self.stop_these:
            os.kill(p, signal.SIGSTOP)
        return self

    def __exit__(self, kind, value, trace):
        for p in self.stop_these:
            try:
                os.kill(p, signal.SIGCONT)
            except ProcessLookupError:
                pass


def golden(name="micro.json"):
    with open(os.path.join(SOURCE, "tests/golden", name)) as f:
        return json.load(f)


# ---- harness ----

def main(tests):
    """Runs the tests named on the command line, or all. The last line is the summary."""
    names = sys.argv[1:] or [t.__name__ for t in tests]
    known = {t.__name__: t for t in tests}
    n = {"ok": 0, "FAILED": 0, "skipped": 0}
    for name in names:
        start, reason, result = time.monotonic(), "", "ok"
        try:
            known[name]()
        except Skip as e:
            result, reason = "skipped", f": {e}"
        except Exception:  # a test may fail in any way
            result = "FAILED"
            traceback.print_exc(file=sys.stdout)
        n[result] += 1
        print(f"{result:8} {name} ({time.monotonic() - start:.1f} s){reason}", flush=True)
    print(f"{n['ok']} passed, {n['FAILED']} failed, {n['skipped']} skipped")
    sys.exit(1 if n["FAILED"] else 77 if n["ok"] == 0 else 0)
