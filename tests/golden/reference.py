"""Reference of a quantised qwen3moe file, in float64, from nothing of moed: gguf-py expands the weights, numpy
computes. It is what the file means when nothing is rounded on the way; moed's integer kernels stay near it.

usage: reference.py MODEL.gguf PROMPTS.json HELD_OUT.txt CONTEXT OUT.json     (pip install numpy gguf regex)

PROMPTS.json: a reference such as micro.json, of which prompt and prompt_tokens are taken.
"""
import json
import sys

import numpy as np
import regex
from gguf import GGUFReader
from gguf.quants import dequantize

PATTERN = regex.compile(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                        r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def encode(reader, text):
    keys = {f: reader.fields["tokenizer.ggml." + f].contents() for f in ("tokens", "merges")}
    ids = {t: i for i, t in enumerate(keys["tokens"])}
    rank = {tuple(m.split(" ")): i for i, m in enumerate(keys["merges"])}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte = {b: chr(b) for b in plain}
    byte.update({b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in byte)})
    out = []
    for word in PATTERN.findall(text):
        parts = [byte[b] for b in word.encode()]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), 1 << 30))
            if (parts[best], parts[best + 1]) not in rank:
                break
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        out += [ids[p] for p in parts]
    return out


class Model:
    def __init__(self, reader):
        key = lambda k: reader.fields["qwen3moe." + k].contents()
        self.layers, self.heads, self.kv = key("block_count"), key("attention.head_count"), key("attention.head_count_kv")
        self.topk, self.eps = key("expert_used_count"), key("attention.layer_norm_rms_epsilon")
        self.theta, self.dim = key("rope.freq_base"), key("attention.key_length")
        self.t = {t.name.removesuffix(".weight"): dequantize(t.data, t.tensor_type).astype(np.float64)
                  .reshape(tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors}

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.t[name]

    def rope(self, x):  # [time, head, dim]
        half = self.dim // 2
        angle = np.arange(len(x))[:, None, None] * self.theta ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1)

    def attention(self, x, b):
        n = len(x)
        q, k, v = ((x @ self.t[b + name].T).reshape(n, -1, self.dim) for name in ("attn_q", "attn_k", "attn_v"))
        q, k = self.rope(self.norm(q, b + "attn_q_norm")), self.rope(self.norm(k, b + "attn_k_norm"))
        k, v = (np.repeat(z, self.heads // self.kv, 1) for z in (k, v))
        s = np.einsum("thd,shd->hts", q, k) / np.sqrt(self.dim)
        s[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return np.einsum("hts,shd->thd", p, v).reshape(n, -1) @ self.t[b + "attn_output"].T

    def experts(self, x, b):
        s = x @ self.t[b + "ffn_gate_inp"].T
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = np.zeros_like(x)
        for i, row in enumerate(p):
            ids = np.argsort(-row, kind="stable")[:self.topk]
            for e in ids:
                g, u = self.t[b + "ffn_gate_exps"][e] @ x[i], self.t[b + "ffn_up_exps"][e] @ x[i]
                out[i] += row[e] / row[ids].sum() * (self.t[b + "ffn_down_exps"][e] @ (g / (1 + np.exp(-g)) * u))
        return out

    def logits(self, ids):
        x = self.t["token_embd"][ids]
        for i in range(self.layers):
            b = f"blk.{i}."
            x = x + self.attention(self.norm(x, b + "attn_norm"), b)
            x = x + self.experts(self.norm(x, b + "ffn_norm"), b)
        return self.norm(x, "output_norm") @ self.t.get("output", self.t["token_embd"]).T


def main(path, prompts, held, context, out):
    reader, n = GGUFReader(path), int(context)
    m, cases = Model(reader), []
    for case in json.load(open(prompts))["cases"]:
        ids, one = case["prompt_tokens"], {k: case[k] for k in ("prompt", "prompt_tokens")}
        assert encode(reader, case["prompt"]) == ids
        logits = m.logits(ids)
        one["logits"] = [{"position": t, "max_abs": abs(row).max(), "top": [
            {"id": int(j), "logit": row[j]} for j in np.argsort(-row)[:5]]} for t, row in enumerate(logits)]
        seq, one["greedy_margin"] = list(ids), []
        while len(seq) < len(ids) + 32:
            row = m.logits(seq)[-1]
            best = np.argsort(-row)[:2]
            one["greedy_margin"].append(row[best[0]] - row[best[1]])
            seq.append(int(best[0]))
        one["greedy"] = seq[len(ids):]
        cases.append(one)
    ids, nll, count = encode(reader, open(held).read()), 0.0, 0
    for s in range(0, len(ids) - n, n):
        row = m.logits(ids[s:s + n])[n // 2:n - 1]
        row = row - row.max(-1, keepdims=True)
        row -= np.log(np.exp(row).sum(-1, keepdims=True))
        target = ids[s + n // 2 + 1:s + n]
        nll -= row[np.arange(len(target)), target].sum()
        count += len(target)
    json.dump({"cases": cases, "perplexity": {"context": n, "tokens": count, "nll": nll / count,
                                              "ppl": float(np.exp(nll / count))}}, open(out, "w"))


if __name__ == "__main__":
    main(*sys.argv[1:])
