"""A token's bits do not depend on company: tokens and printed log probabilities of sixteen requests are equal,
digit by digit, on every shape of cluster, in every batch, with every chunk of prefill, to one router and one
shard that serve them one by one.
"""
import json
import os
import struct
import tempfile

from daemon import DEMO, MICRO, Daemon, check, golden, main, stopped, wait_for


def requests(longest):
    """Sixteen requests as options of moectl: greedy and sampled, short and long prompts."""
    cases = [c["prompt_tokens"] for c in golden()["cases"]]
    whole = sum(cases, [])
    made = []
    for i in range(16):
        # Prompts of 70 tokens and more meet every chunk size; equal prompts meet in one batch.
        ids = (whole + whole + whole)[:longest - 20] if i % 4 == 3 else cases[i % len(cases)]
        options = ["--prompt-ids", ",".join(map(str, ids)), "-n", str(6 + i % 7), "--logprobs", "20", "--ignore-eos"]
        if i % 2:
            options += ["-T", "0.9", "--top-p", "0.95", "--seed", str(1000 + i)]
        if i % 5 == 4:
            options += ["--top-k", "40", "--repetition-penalty", "1.2"]
        made.append(options + ["--json"])
    return made


def take(process):
    out, err = process.communicate(timeout=100)
    check(process.returncode == 0, f"moectl generate ended with {process.returncode}: {err.decode()}")
    # parse_float: the digits as printed, so that equal means equal bits.
    answer = json.loads(out, parse_float=str)
    return answer["tokens"], answer["logprobs"], answer["text"], answer["finish_reason"]


def run_batch(d, wanted):
    """Routers are held until all requests have reached them, so that they really share batches."""
    routers = d.rank_pids("router")
    before = d.counters("router")
    with stopped(routers):
        running = [d.begin("generate", *w) for w in wanted]
        n = len(wanted)
        wait_for(f"{n} requests to reach the routers", 12, lambda: d.status()["running"] == n)
    answers = [take(p) for p in running]
    after = d.counters("router")
    steps = after["steps"] - before["steps"]
    return answers, sum(len(a[0]) for a in answers) / steps


def compare(answers, wanted, what):
    for i, (got, want) in enumerate(zip(answers, wanted)):
        check(got[0] == want[0], f"{what}, request {i}: tokens {got[0]}, expected {want[0]}")
        for t, (a, b) in enumerate(zip(got[1], want[1])):
            check(a == b, f"{what}, request {i}, token {t}: log probabilities differ: "
                          f"{[(x, y) for x, y in zip(a, b) if x != y][:2]}")
        check(got == want, f"{what}, request {i}: {got[2:]}, expected {want[2:]}")


def run_cluster(wanted, reference, what, batches=(1, 4, 16), **shape):
    with Daemon(**shape) as d:
        d.start()
        for batch in batches:
            name = f"{what}, batch {batch}"
            if batch == 1:
                answers = [take(d.begin("generate", *w)) for w in wanted[:6]]
                compare(answers, reference, name)
                continue
            answers, shared = [], []
            for i in range(0, 16, batch):
                some, tokens_per_step = run_batch(d, wanted[i:i + batch])
                answers += some
                shared.append(tokens_per_step)
            compare(answers, reference, name)
            # Prefill in small chunks takes steps without a token; else a batch must show.
            small = shape.get("prefill_chunk", 64) < 64 or d.n_routers > 1
            check(small or max(shared) > batch / 3, f"{name}: only {shared} tokens in a step")
        print(f"  equal: {what}", flush=True)
        d.stop()


def reference_of(wanted, model):
    with Daemon(model, routers=1, shards=1) as d:
        d.start()
        answers = [take(d.begin("generate", *w)) for w in wanted]
        d.stop()
    check(len({json.dumps(a) for a in answers}) > 8, "the requests are too much alike to prove anything")
    return answers


def test_micro():
    """Odd shapes: 10 experts over 2, 3 and 5 shards, by hand, one by one, interleaved, none at all."""
    wanted = requests(120)
    reference = reference_of(wanted, MICRO)
    c = golden()["cases"][0]
    n = next((i for i, m in enumerate(c["greedy_margin"]) if m < 1e-3), len(c["greedy"]))
    check(reference[0][0][:n] == c["greedy"][:n][:len(reference[0][0])], "the tokens are not the golden ones")
    run_cluster(wanted, reference, "1 router, 1 shard", batches=(4, 16), shards=1)
    run_cluster(wanted, reference, "1 router, 2 shards", shards=2)
    run_cluster(wanted, reference, "1 router, 3 shards", shards=3)
    run_cluster(wanted, reference, "1 router, 5 shards", shards=5)
    run_cluster(wanted, reference, "2 routers, 3 shards", routers=2, shards=3)
    run_cluster(wanted, reference, "uneven", batches=(1, 16), experts=["0", "1-8", "9"], threads=2)
    run_cluster(wanted, reference, "interleaved", batches=(1, 16), experts=["1,3,5,7,9", "8,6,4,2,0"])
    run_cluster(wanted, reference, "a shard without experts", batches=(1, 16), experts=["0-9", ""])
    for chunk in (1, 7, 64):
        run_cluster(wanted, reference, f"prefill chunk {chunk}", prefill_chunk=chunk)


def gate_offsets(data):
    """Places of the ffn_gate_inp weights (F32) in a GGUF: (offset, bytes) each."""
    at = 8
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(form):
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(form, data, at - struct.calcsize(form))[0]

    def text():
        nonlocal at
        n = number("<Q")
        at += n
        return data[at - n:at]

    def skip(kind):
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            inner, n = number("<I"), number("<Q")
            for _ in range(n):
                skip(inner)
        else:
            at += sizes[kind]

    n_tensors, n_keys = number("<Q"), number("<Q")
    for _ in range(n_keys):
        text()
        skip(number("<I"))
    gates = []
    for _ in range(n_tensors):
        name, n = text(), 1
        for _ in range(number("<I")):
            n *= number("<Q")
        kind, offset = number("<I"), number("<Q")
        if name.endswith(b"ffn_gate_inp.weight"):
            check(kind == 0, "the gate is not F32")
            gates.append((offset, 4 * n))
    start = (at + 31) // 32 * 32
    return [(start + offset, n) for offset, n in gates]


def test_one_expert():
    """A gate of zeros makes all experts equal, so the lowest wins: every row of every layer goes to expert 0."""
    with open(MICRO, "rb") as f:
        data = bytearray(f.read())
    places = gate_offsets(data)
    check(len(places) == golden()["shape"]["layers"], f"{len(places)} gates found")
    for offset, n in places:
        data[offset:offset + n] = bytes(n)
    wanted = requests(120)
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.join(folder, "one-expert.gguf")
        with open(model, "wb") as f:
            f.write(data)
        reference = reference_of_skewed(wanted, model)
        run_cluster(wanted, reference, "all to one expert, 3 shards", model=model, shards=3, top_k=1)
        run_cluster(wanted, reference, "all to one expert, 2 routers, 3 shards", model=model, routers=2, shards=3,
                    top_k=1)


def reference_of_skewed(wanted, model):
    with Daemon(model, routers=1, shards=1, top_k=1) as d:
        d.start()
        answers = [take(d.begin("generate", *w)) for w in wanted]
        rows = {(e["layer"], e["expert"]) for r in d.ctl_json("stats")["ranks"] if r["role"] == "shard"
                for e in r["experts"]}
        check({e for _, e in rows} == {0}, f"experts in use: {sorted(rows)}")
        d.stop()
    return answers


def test_demo():
    """The shipped model: K-quants, so activations travel as int8 blocks."""
    wanted = requests(200)
    reference = reference_of(wanted, DEMO)
    run_cluster(wanted, reference, "demo, 1 router, 1 shard", batches=(4, 16), model=DEMO, shards=1)
    run_cluster(wanted, reference, "demo, 1 router, 2 shards", model=DEMO, shards=2)
    run_cluster(wanted, reference, "demo, 1 router, 3 shards", batches=(1, 16), model=DEMO, shards=3)
    run_cluster(wanted, reference, "demo, 1 router, 5 shards", batches=(1, 16), model=DEMO, shards=5)
    run_cluster(wanted, reference, "demo, 2 routers, 3 shards", batches=(1, 16), model=DEMO, routers=2, shards=3)
    for chunk in (1, 7, 64):
        run_cluster(wanted, reference, f"demo, prefill chunk {chunk}", batches=(4, 16), model=DEMO, prefill_chunk=chunk)
    run_cluster(wanted, reference, "demo, scalar kernels", batches=(1, 16), model=DEMO, kernels="scalar")


if __name__ == "__main__":
    main([test_micro, test_one_expert, test_demo])
