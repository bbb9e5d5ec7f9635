"""Figures of running clusters against the reference: MoeForward layer by layer, perplexity, idle processor time,
memory per shard, text and statistics that add up.

The reference gives a layer's MoE input (normed) and the layer's output (with the residual). What the experts
add is the output less the residual; the residual is the normed input, divided by the norm's weight, times the
root mean square r, which follows from mean(u^2) = 1 - eps / r^2 with u the input divided by the weight.
"""
import array
import math
import os
import struct
import time

from daemon import DEMO, MICRO, SHARED, SOURCE, Daemon, Skip, check, cpu_ns, golden, main
from refuse import write_npy


def read_npy(path):
    with open(path, "rb") as f:
        data = f.read()
    n = struct.unpack_from("<H", data, 8)[0]
    return data[10:10 + n].decode(), data[10 + n:]


def floats(raw):
    a = array.array("f")
    a.frombytes(raw)
    return a.tolist()


def bf16_bytes(values):
    out = bytearray()
    for v in values:
        bits = struct.unpack("<I", struct.pack("<f", v))[0]
        out += struct.pack("<H", (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return bytes(out)


def from_bf16(raw):
    return [struct.unpack("<f", struct.pack("<I", h << 16))[0] for (h,) in struct.iter_unpack("<H", raw)]


class Gguf:
    """F32 tensors of a GGUF file of version 3, read without moed."""

    SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def __init__(self, path):
        with open(path, "rb") as f:
            self.data = f.read()
        self.at = 24
        n_tensors, n_keys = struct.unpack_from("<QQ", self.data, 8)
        alignment = 32
        for _ in range(n_keys):
            name = self.text()
            value = self.value(self.number("<I"))
            if name == "general.alignment":
                alignment = value
        self.tensors = {}
        for _ in range(n_tensors):
            name = self.text()
            shape = [self.number("<Q") for _ in range(self.number("<I"))]
            self.tensors[name] = (self.number("<I"), shape, self.number("<Q"))
        self.base = (self.at + alignment - 1) // alignment * alignment

    def number(self, form):
        v = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return v

    def text(self):
        n = self.number("<Q")
        self.at += n
        return self.data[self.at - n:self.at].decode(errors="replace")

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            of, n = self.number("<I"), self.number("<Q")
            for _ in range(n):
                self.value(of)
            return None
        n = self.SIZES[kind]
        self.at += n
        return int.from_bytes(self.data[self.at - n:self.at], "little")

    def f32(self, name):
        kind, shape, offset = self.tensors[name]
        check(kind == 0, f"{name} is not F32")
        n = math.prod(shape)
        return floats(self.data[self.base + offset:self.base + offset + 4 * n])


def added_by_experts(layer, weight, eps):
    """Rows of what the experts add, from the reference alone."""
    rows = []
    for h, out in zip(layer["moe_input"], layer["layer_output"]):
        u = [a / w for a, w in zip(h, weight)]
        r = math.sqrt(eps / (1 - math.fsum(a * a for a in u) / len(u)))
        rows.append([o - r * a for o, a in zip(out, u)])
    return rows


def worst(got, want):
    """Largest difference relative to the largest value of its row."""
    return max(max(abs(a - b) for a, b in zip(g, w)) / max(map(abs, w)) for g, w in zip(got, want))


def test_forward():
    g = golden()
    gguf = Gguf(MICRO)
    with Daemon(shards=3) as d:
        d.start()
        x, y = os.path.join(d.folder, "x.npy"), os.path.join(d.folder, "y.npy")
        for i, layer in enumerate(g["cases"][0]["layers"]):
            want = added_by_experts(layer, gguf.f32(f"blk.{i}.ffn_norm.weight"), g["shape"]["eps"])
            rows, hidden = len(want), len(want[0])
            flat = [v for row in layer["moe_input"] for v in row]
            write_npy(x, rows, hidden, values=array.array("f", flat).tobytes())
            d.ctl_json("forward", "--layer", i, "--in", x, "--out", y)
            header, raw = read_npy(y)
            check("'<f4'" in header and f"({rows}, {hidden})" in header, header)
            got = floats(raw)
            error = worst([got[r * hidden:(r + 1) * hidden] for r in range(rows)], want)
            check(error < 2e-4, f"layer {i}: f32 differs by {error:.2e}")
            write_npy(x, rows, hidden, descr="<V2", values=bf16_bytes(flat))
            d.ctl_json("forward", "--layer", i, "--in", x, "--out", y)
            header, raw = read_npy(y)
            check("'<V2'" in header, header)
            half = from_bf16(raw)
            error16 = worst([half[r * hidden:(r + 1) * hidden] for r in range(rows)], want)
            # Input and output are rounded to 8 bits of mantissa, half a unit each.
            check(error16 < 2e-2, f"layer {i}: bf16 differs by {error16:.2e}")
            check(error16 > error, "bf16 cannot be the better one")
            print(f"  layer {i}: f32 within {error:.1e}, bf16 within {error16:.1e} of the largest value", flush=True)
        # More rows than a step holds go through in pieces, and each row is the same as alone.
        many = 1100
        flat = (flat * (many // rows + 1))[:many * hidden]
        write_npy(x, many, hidden, values=array.array("f", flat).tobytes())
        d.ctl_json("forward", "--layer", len(g["cases"][0]["layers"]) - 1, "--in", x, "--out", y)
        big = floats(read_npy(y)[1])
        check(len(big) == many * hidden, "rows are missing")
        check(big[:rows * hidden] == got and big[rows * hidden:2 * rows * hidden] == got, "a row depends on its company")
        d.stop()


def perplexity(d, path, context):
    start = time.monotonic()
    r = d.ctl_json("perplexity", path, "--ctx", context, timeout=170)
    print(f"  {os.path.basename(path)}: {r['ppl']:.4f} over {r['tokens']} tokens in {time.monotonic() - start:.1f} s", flush=True)
    return r


def test_perplexity():
    want = golden()["perplexity"]
    with Daemon(shards=2) as d:
        d.start()
        r = perplexity(d, os.path.join(SOURCE, "tests/golden/micro-held-out.txt"), want["context"])
        check(r["tokens"] == want["tokens"], f"{r['tokens']} tokens, expected {want['tokens']}")
        check(abs(r["ppl"] / want["ppl"] - 1) < 1e-3, f"perplexity {r['ppl']}, expected {want['ppl']}")
        check(abs(r["nll"] - want["nll"]) < 1e-4, f"nll {r['nll']}, expected {want['nll']}")
        check(0 < r["stderr"] < r["ppl"], f"standard error {r['stderr']}")
        d.stop()


def held_out(model, want, within):
    text = os.path.join(SHARED, "corpus/held-out.txt")
    if not model or not os.path.exists(model) or not os.path.exists(text):
        raise Skip("no shared models and texts here (MOED_SHARED)")
    with Daemon(model, shards=2) as d:
        d.start()
        r = perplexity(d, text, 256)
        check(abs(r["ppl"] / want - 1) < within, f"perplexity {r['ppl']}, expected {want} within {within}")
        d.stop()


def test_held_out_f32():
    held_out(os.path.join(SHARED, "models/tinymoe-f32.gguf"), 45.429, 1e-4)


def test_held_out_q8_0():
    held_out(os.path.join(SHARED, "models/tinymoe-q8_0.gguf"), 45.429, 0.002)


def test_held_out_q4_k_m():
    held_out(DEMO, 45.429, 0.01)


def test_idle():
    """All ranks, mpirun and the daemon together: under 1 % of a core."""
    with Daemon(routers=2, shards=3) as d:
        d.start()
        d.ctl("generate", "-p", "Once", "-n", "4")
        pids = [d.process.pid, d.mpirun_pid(), *d.rank_pids()]
        check(len(pids) == 7, f"{len(pids)} processes")
        time.sleep(1)
        start, before = time.monotonic(), {p: cpu_ns(p) for p in pids}
        time.sleep(5)
        took = (time.monotonic() - start) * 1e9
        share = {p: (cpu_ns(p) - before[p]) / took for p in pids}
        print("  idle: %.3f %% of a core in all (daemon %.3f, mpirun %.3f, ranks %s)" % (
            100 * sum(share.values()), 100 * share[pids[0]], 100 * share[pids[1]],
            ", ".join("%.3f" % (100 * share[p]) for p in pids[2:])), flush=True)
        check(sum(share.values()) < 0.01, "an idle cluster takes 1 % of a core or more")
        d.stop()


def shard_memory(**shape):
    with Daemon(DEMO, **shape) as d:
        d.start()
        ranks = [r for r in d.status()["ranks"] if r["role"] == "shard"]
        d.stop()
    return ranks


def test_memory():
    """A shard holds its own experts and no others."""
    one = shard_memory(shards=1)[0]
    two = shard_memory(shards=2)
    uneven = shard_memory(experts=["0-3", "4-15", ""])
    whole = one["weight_bytes"]
    check(whole > 4 << 20, f"{whole} bytes of experts")
    check([r["weight_bytes"] for r in two] == [whole // 2] * 2, f"{two}")
    check([r["weight_bytes"] for r in uneven] == [whole // 4, whole * 3 // 4, 0], f"{uneven}")
    check([r["experts"] for r in uneven] == ["0-3", "4-15", ""], f"{uneven}")
    # Resident: less by about what it does not own. The rest (libraries, buffers) is the same.
    saved = one["rss_bytes"] - max(r["rss_bytes"] for r in two)
    print("  resident: %.1f MiB with all experts, %s MiB with half" % (
        one["rss_bytes"] / 2**20, ", ".join("%.1f" % (r["rss_bytes"] / 2**20) for r in two)), flush=True)
    check(saved > whole // 4, f"half of the experts saves only {saved} of {whole} bytes")


def test_statistics():
    """What routers sent is what shards computed, and counts follow from the tokens."""
    n = 12
    with Daemon(shards=2) as d:
        d.start()
        r = d.ctl_json("generate", "-p", "Once upon a time", "-n", n, "--ignore-eos")
        s = d.ctl_json("stats")["ranks"]
        check([x["rank"] for x in s] == [0, 1, 2], f"ranks are answered for as {[x['rank'] for x in s]}")
        router = next(x for x in s if x["role"] == "router")
        shards = [x for x in s if x["role"] == "shard"]
        check(len(shards) == 2, f"{len(shards)} shards answered")
        rows = r["prompt_tokens"] + n - 1  # the last token is not computed on
        shape = d.status()["shape"]
        computed = router["counters"]["tokens_prefill"] + router["counters"]["tokens_decode"]
        check(computed == rows, f"{computed} positions computed, expected {rows}")
        for l in range(shape["layers"]):
            # A row travels once to each shard that has one of its experts.
            sent = router["layers"][l]["rows"]
            check(rows <= sent <= 2 * rows and sent == sum(x["layers"][l]["rows"] for x in shards), f"layer {l}: {sent} rows sent")
            check(sum(x["layers"][l]["pairs"] for x in shards) == rows * shape["top_k"], f"layer {l}: pairs")
            check(sum(x["layers"][l]["slices"] for x in shards) == router["layers"][l]["slices"], f"layer {l}: slices")
            check(sum(e["rows"] for e in router["experts"] if e["layer"] == l) == rows * shape["top_k"], f"layer {l}: experts")
        for x in shards:
            for e in x["experts"]:
                same = [q["rows"] for q in router["experts"] if (q["layer"], q["expert"]) == (e["layer"], e["expert"])]
                check(same == [e["rows"]], f"expert {e}: the router counts {same}")
        text = d.ctl("generate", "-p", "Once upon a time", "-n", n, "--ignore-eos").stdout
        check(text.decode(errors="replace").rstrip("\n") == r["text"].rstrip("\n"), "streamed text and JSON differ")
        d.stop()


if __name__ == "__main__":
    main([test_forward, test_perplexity, test_held_out_f32, test_held_out_q8_0, test_held_out_q4_k_m, test_idle, test_memory,
          test_statistics])
