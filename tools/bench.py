"""What this machine does: matrix products, tokenizer, training, generation.

Run by `make bench`; `tools/bench.py --json FILE` also leaves a record to compare with.
Each line is the median of repetitions, with the slowest and fastest beside it.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from itertools import islice

import llmfs
from llmfs.data.stories import Stories
from llmfs.evaluation.generate import generate_batch
from llmfs.hardware import hardware, matmul_flops, require_mlx
from llmfs.model.transformer import GPT, flops_per_token, preset
from llmfs.tokenizer.vocab import train_tokenizer
from llmfs.training.data_loader import Batch
from llmfs.training.optimizer import make_optimizer
from llmfs.training.step import TrainConfig, TrainStep

require_mlx()
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

BATCH, LENGTH, VOCAB = 16, 256, 1024


def repeat(work, times: int) -> dict:
    "Median, slowest and fastest of the rates that work returns; the first call is not counted"
    work()
    rates = sorted(work() for _ in range(times))
    return {"median": statistics.median(rates), "slowest": rates[0], "fastest": rates[-1]}


def rate(amount: float, work) -> float:
    start = time.perf_counter()
    work()
    return amount / (time.perf_counter() - start)


def stories(n: int) -> list[str]:
    return [s.text for s in islice(Stories().stream(), n)]


def encoding():
    texts = stories(2000)
    tokenizer = train_tokenizer(texts, VOCAB)
    text, n = "\n".join(texts), sum(len(t.encode()) for t in texts)
    return lambda: rate(n / 1e6, lambda: tokenizer.encode_array(text))


def training(name: str):
    model = GPT(preset("tiny", vocab_size=VOCAB))
    step = TrainStep(model, make_optimizer(name, model), TrainConfig(batch_size=BATCH, seq_len=LENGTH))
    ids = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1), dtype=np.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:], np.zeros((BATCH, LENGTH), np.int32))

    def steps(n=3):
        for _ in range(n):
            mx.eval(step([batch], 1.0)[0], model.parameters())

    return lambda: rate(3 * BATCH * LENGTH, steps)


def generation(rows: int):
    tokenizer = train_tokenizer(stories(200), 512)
    model = GPT(preset("tiny", vocab_size=512))

    def work():
        start = time.perf_counter()
        out = generate_batch(model, tokenizer, n=rows, max_tokens=100)
        return sum(len(g.ids) for g in out) / (time.perf_counter() - start)

    return work


BENCHES = {
    "matrix product, GFLOP/s": (lambda: lambda: matmul_flops() / 1e9, 5),
    "encoding, MB/s": (encoding, 5),
    "training tiny, AdamW, tokens/s": (lambda: training("adamw"), 5),
    "training tiny, Muon, tokens/s": (lambda: training("muon"), 5),
    "one text, tokens/s": (lambda: generation(1), 3),
    "64 texts together, tokens/s": (lambda: generation(64), 3),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write a record there")
    args = parser.parse_args()
    machine = asdict(hardware())
    versions = {name: version(name) for name in ("mlx", "numpy")} | {"llmfs": llmfs.__version__}
    print(f"{machine['chip']}, {machine['backend']}, {machine['n_cores']} cores, BLAS {machine['blas']}")
    results = {}
    for name, (make, times) in BENCHES.items():
        results[name] = r = repeat(make(), times)
        print(f"{name:<32}{r['median']:>12,.1f}   ({r['slowest']:,.1f} to {r['fastest']:,.1f})", flush=True)
    flops = flops_per_token(preset("tiny", vocab_size=VOCAB), LENGTH, training=True)
    share = results["training tiny, AdamW, tokens/s"]["median"] * flops / 1e9
    share /= results["matrix product, GFLOP/s"]["median"]
    print(f"{'of the peak, training, AdamW':<32}{share:>12.1%}")
    if args.json:
        record = {"date": str(date.today()), "machine": machine, "versions": versions, "results": results}
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(record, f, indent=1, ensure_ascii=False)
            f.write("\n")


if __name__ == "__main__":
    main()
