"""Clusters that serve a folder of Hugging Face's form (config.json, safetensors, tokenizer.json): in floats with
the digits of the GGUF file that it was made from, quantised by GPTQ with equal digits over any number of shards
and from packed experts; and a folder that asks for what moed does not compute, refused before anything starts.
"""
import json
import os
import subprocess
import tempfile

from daemon import BUILD, DEMO, MICRO, MOECTL, MOED, Daemon, check, main

PROMPTS = ["Once upon a time", "The king's daughter said: \"I will go,\"\n\nand", "In 1812, wolves"]


def make_folder(into, source, *options):
    folder = os.path.join(into, "-".join(("model",) + options))
    subprocess.run([os.path.join(BUILD, "tests/make_folder"), source, folder, *options], check=True)
    return folder


def answers_of(model, shards, edit=None):
    """What a cluster says to every prompt, greedy and sampled, with digits as printed."""
    made = []
    with Daemon(model, routers=1, shards=shards) as d:
        if edit is not None:
            with open(d.config, "a") as f:
                f.write(edit)
        d.start()
        for i, prompt in enumerate(PROMPTS):
            for options in ([], ["-T", "0.8", "--seed", str(7 + i)]):
                r = d.ctl("generate", "-p", prompt, "-n", "16", "--logprobs", "5", "--json", *options)
                check(r.returncode == 0, f"moectl generate ended with {r.returncode}: {r.stderr.decode()}")
                a = json.loads(r.stdout, parse_float=str)
                made.append([a["tokens"], a["logprobs"], a["text"], a["finish_reason"]])
        d.stop()
    check(len({json.dumps(a) for a in made}) > 3, "the answers are too much alike to prove anything")
    return made


def test_floats():
    want = answers_of(MICRO, 1)
    with tempfile.TemporaryDirectory() as t:
        check(answers_of(make_folder(t, MICRO, "odd"), 2) == want, "the folder and its GGUF file differ")


def test_gptq():
    with tempfile.TemporaryDirectory() as t:
        folder = make_folder(t, DEMO, "gptq", "bf16", "pairs")
        want = answers_of(folder, 1)
        check(answers_of(folder, 2) == want, "2 shards differ from 1")
        check(answers_of(os.path.join(folder, "model.safetensors"), 3) == want, "3 shards differ from 1")
        pack = os.path.join(t, "experts.pack")
        subprocess.run([MOECTL, "pack", folder, pack], check=True, stdout=subprocess.DEVNULL)
        check(answers_of(folder, 2, f"packed: {pack}\n") == want, "packed experts differ")


def test_refused():
    with tempfile.TemporaryDirectory() as t:
        folder = make_folder(t, MICRO)
        served = json.loads(subprocess.run([MOECTL, "inspect", folder, "--json"], check=True,
                                           capture_output=True).stdout)
        check(served["served"] is True and served["why_not"] == "", f"inspect says {served['why_not']}")
        path = os.path.join(folder, "config.json")
        with open(path) as f:
            config = json.load(f)
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
        with open(path, "w") as f:
            json.dump(config, f)
        with Daemon(folder) as d:
            r = subprocess.run([MOED, "check", "-c", d.config], capture_output=True)
            check(r.returncode == 2 and b"rope_scaling of type yarn is not implemented" in r.stderr,
                  f"moed check ended with {r.returncode}: {r.stderr.decode()}")


if __name__ == "__main__":
    main([test_floats, test_gptq, test_refused])
