"""Ends and losses: a drain lets running requests finish and leaves nothing behind; a killed rank or mpirun ends
running requests with an error that says who, within their deadline, and the daemon serves again by itself; a
killed daemon takes its ranks with it.
"""
import os
import signal
import time

from daemon import Daemon, check, is_running, main, shared_memory, stopped, wait_for, with_argument

LONG = ["generate", "--prompt-ids", "79,110,373", "-n", "60", "--ignore-eos", "--json"]


def begin_running(d, count=1):
    """Requests that are under way for as long as a shard is held."""
    processes = [d.begin(*LONG) for _ in range(count)]
    wait_for("the requests to run", 20, lambda: d.status()["running"] == count)
    return processes


def answer_of(process, seconds):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out.decode(), err.decode()


def test_drain():
    before = shared_memory()
    with Daemon() as d:
        d.start()
        shards = d.rank_pids("shard")
        pid = d.process.pid
        with stopped(shards[:1]):
            running = begin_running(d, 2)
            d.process.send_signal(signal.SIGTERM)
            wait_for("the drain to begin", 20, lambda: d.status()["state"] == "draining")
            refused = d.ctl("generate", "-p", "late")
            check(refused.returncode == 1 and b"draining" in refused.stderr, f"a late request: {refused}")
            check(all(p.poll() is None for p in running), "a request ended while its shard was held")
        for p in running:
            rc, out, err = answer_of(p, 20)
            check(rc == 0 and '"finish_reason":"length"' in out, f"a request during the drain: {rc} {err}")
        check(d.process.wait(timeout=20) == 0, "moed up did not end with 0")
        d.check_nothing_left(pid)
        # Another test may be running: what it made goes away, or bears the number of another daemon.
        left = {n for n in shared_memory() - before if n.startswith(f"moed.{pid}.") or not n.startswith("moed.")}
        wait_for(f"{left} to be gone from shared memory", 20, lambda: not left & shared_memory())


def test_drain_by_client():
    with Daemon() as d:
        d.start()
        pid = d.process.pid
        r = d.ctl("drain")
        check(r.returncode == 0, f"moectl drain: {r}")
        check(d.process.wait(timeout=20) == 0, "moed up did not end with 0")
        d.check_nothing_left(pid)


def test_second_signal():
    """A drain that takes too long for a person is ended by a second signal."""
    with Daemon() as d:
        d.start()
        pid = d.process.pid
        with stopped(d.rank_pids("shard")[:1]):
            running = begin_running(d)[0]
            d.process.send_signal(signal.SIGINT)
            wait_for("the drain to begin", 20, lambda: d.status()["state"] == "draining")
            d.process.send_signal(signal.SIGINT)
            start = time.monotonic()
            check(d.process.wait(timeout=20) == 1, "moed up should end with 1")
            check(time.monotonic() - start < 15, "a second signal took as long as a drain")
            rc, _, err = answer_of(running, 20)
            check(rc == 1 and err, "the running request should have failed")
        d.check_nothing_left(pid)


def lose(kill_whom, must_say):
    with Daemon() as d:
        d.start()
        first = d.ctl_json(*LONG[:-1])["tokens"]
        old = d.rank_pids()
        with stopped(d.rank_pids("shard")):
            running = begin_running(d, 2)
            start = time.monotonic()
            os.kill(kill_whom(d), signal.SIGKILL)
            for p in running:
                rc, _, err = answer_of(p, 20)
                check(rc == 1, f"a running request ended with {rc}")
                check(must_say in err, f"the error does not say '{must_say}': {err}")
            took = time.monotonic() - start
            check(took < 12, f"the error took {took:.1f} s: silence found it, not the end of the connection")
        d.wait_ready(launches=2)
        print(f"  error after {took:.2f} s, serving again after {time.monotonic() - start:.1f} s", flush=True)
        wait_for("the old ranks to be gone", 20, lambda: not any(is_running(p) for p in old))
        check(d.ctl_json(*LONG[:-1])["tokens"] == first, "other tokens after the relaunch")
        check(len(with_argument(d.config)) == 5, "more processes than a job has (daemon, mpirun, three ranks)")
        d.stop()


def test_shard_killed():
    lose(lambda d: d.rank_pids("shard")[1], "shard s1 (rank 2")


def test_router_killed():
    lose(lambda d: d.rank_pids("router")[0], "router r0 (rank 0")


def test_mpirun_killed():
    lose(lambda d: d.mpirun_pid(), "")


def test_waiting_request_survives():
    """A request that no router has yet is served after the relaunch."""
    with Daemon(kv_tokens=64, max_sequences=1) as d:
        d.start()
        with stopped(d.rank_pids("shard")):
            running = begin_running(d)[0]
            waiting = d.begin(*LONG)
            wait_for("the second to wait", 20, lambda: d.status()["waiting"] == 1)
            os.kill(d.rank_pids("shard")[0], signal.SIGKILL)
            check(answer_of(running, 20)[0] == 1, "the running request should fail")
        rc, out, err = answer_of(waiting, 60)
        check(rc == 0 and '"length"' in out, f"the waiting request: {rc} {err}")
        d.stop()


def test_daemon_killed():
    with Daemon() as d:
        d.start()
        pid, ranks, mpirun = d.process.pid, d.rank_pids(), d.mpirun_pid()
        with stopped(d.rank_pids("shard")[:1]):
            running = begin_running(d)[0]
            d.process.kill()
            d.process.wait()
            # A rank that is held dies as well: its death does not need its help.
            wait_for("ranks and mpirun to be gone", 20, lambda: not any(is_running(p) for p in ranks + [mpirun]))
        rc, _, err = answer_of(running, 20)
        check(rc == 1 and "closed the connection" in err, f"the client of a dead daemon: {rc} {err}")
        # The next daemon takes over the socket and clears what the dead one left.
        d.start()
        left = [n for n in os.listdir("/dev/shm") if n.startswith(f"moed.{pid}.")]
        check(not left, f"left by the dead daemon: {left}")
        d.stop()


def test_gives_up():
    """Launches that never get ready end the daemon instead of going on for ever."""
    with Daemon(mpirun="/bin/false", relaunches=2) as d:
        d.start(ready=False)
        check(d.process.wait(timeout=30) == 1, "moed up should end with 1")
        check("giving up" in d.log(), "the log does not say so")
        check(d.log().count("launching again") == 2, "not two launches more")
    with Daemon(mpirun="/nonexistent/mpirun") as d:
        d.start(ready=False)
        check(d.process.wait(timeout=30) == 1, "moed up should end with 1")
        check("cannot start /nonexistent/mpirun" in d.log(), "the log does not name the program")
        check("launching again" not in d.log(), "a missing program is not worth another launch")


if __name__ == "__main__":
    main([test_drain, test_drain_by_client, test_second_signal, test_shard_killed, test_router_killed, test_mpirun_killed,
          test_waiting_request_survives, test_daemon_killed, test_gives_up])
