"""Real training steps of presets beside what `llmfs plan` says of them: tokens/s, memory, utilisation.

python tools/bench_steps.py 124m 500m 1b --json steps.json
A preset may carry its own settings: 124m:batch_size=32,seq_len=1024,optimizer=adamw,grad_checkpoint=1
The record is written again after each preset; one that fails leaves the text of its error.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import llmfs
from llmfs.hardware import hardware, matmul_flops, pick_precision, require_mlx
from llmfs.model.transformer import GPT, count_params, flops_per_token, preset
from llmfs.performance import bandwidth
from llmfs.plan import describe, plan
from llmfs.training.data_loader import Batch
from llmfs.training.optimizer import make_optimizer
from llmfs.training.step import TrainStep, recipe

require_mlx()
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402


def typed(word: str):
    "7, 0.5, or the word itself"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def wanted(spec: str, args) -> tuple[str, dict]:
    "The preset and the fields of TrainConfig that were asked for"
    name, _, own = spec.partition(":")
    given = {k: getattr(args, k) for k in ("batch_size", "seq_len", "grad_accum", "optimizer", "precision")}
    given["grad_checkpoint"] = args.grad_checkpoint or None
    given |= {k: typed(v) for k, v in (pair.split("=") for pair in own.split(",") if pair)}
    if given["grad_checkpoint"] is not None:
        given["grad_checkpoint"] = bool(given["grad_checkpoint"])
    return name, {k: v for k, v in given.items() if v is not None}


def measure(name: str, vocab: int, given: dict, steps: int, seconds: float) -> dict:
    "Time and peak memory of steps of the real TrainStep on random tokens"
    cfg = preset(name, vocab_size=vocab)
    train = recipe(name, cfg, **given)
    gc.collect()  # models and steps refer to each other
    mx.clear_cache()
    held = mx.get_active_memory()  # not this model's
    mx.random.seed(0)
    model = GPT(cfg)
    mx.eval(model.parameters())
    step = TrainStep(model, make_optimizer(train.optimizer, model), train)
    mx.eval(step.optimizer.state)
    rng, shape = np.random.default_rng(0), (train.batch_size, train.seq_len + 1)
    times, losses, peaks, stop = [], [], [], None
    while len(times) < steps + 1 and not (len(times) > 1 and time.perf_counter() > stop):
        batches = []
        for _ in range(train.grad_accum):
            ids = rng.integers(0, vocab, shape, dtype=np.int32)
            batches.append(Batch(ids[:, :-1], ids[:, 1:], None))
        mx.reset_peak_memory()
        start = time.perf_counter()
        out = step(batches, 1.0)
        mx.eval(out, model.parameters(), step.optimizer.state)
        mx.synchronize()
        times.append(time.perf_counter() - start)
        peaks.append(mx.get_peak_memory() - held)
        losses.append(out[0].item())
        stop = stop or time.perf_counter() + seconds
    tokens, median = train.grad_accum * train.batch_size * train.seq_len, statistics.median(times[1:])
    flops = flops_per_token(cfg, train.seq_len) * tokens
    return dict(
        params=count_params(cfg), train=asdict(train), tokens=tokens, first_step=times[0], times=times[1:],
        seconds=median, tokens_per_second=tokens / median, peak_memory=max(peaks[1:]),
        first_peak=peaks[0], flops=flops, losses=losses,
    )  # fmt: skip


def attempt(work, **more):
    "What work returns, or its error as text"
    try:
        return work(**more)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}


def line(row: dict) -> str:
    m, p = row["measured"], row["plan"]
    if "error" in m:
        return f"{row['preset']:<9} {m['error']}"
    t = m["train"]
    text = (f"{row['preset']:<9} B {t['batch_size']}x{t['grad_accum']} L {t['seq_len']} {t['optimizer']}"
            f"{' recomputing' * t['grad_checkpoint']}: {m['tokens_per_second']:,.0f} tokens/s,"
            f" {m['seconds']:.3g} s a step, {m['peak_memory'] / 2**30:.2f} GiB, MFU {m['mfu']:.1%}")  # fmt: skip
    if "error" in p:
        return f"{text}; plan: {p['error']}"
    time_off, memory_off = p["seconds"] / m["seconds"] - 1, p["memory"]["total"] / m["peak_memory"] - 1
    return f"{text}; plan: time {time_off:+.0%}, memory {memory_off:+.0%} ({p['took']:.1f} s)"


def planned(name, vocab, given):
    start = time.perf_counter()
    p = plan(name, vocab, **given)
    took = time.perf_counter() - start
    print(describe(p), flush=True)
    return p.to_dict() | {"took": took}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="+", metavar="PRESET[:FIELD=VALUE,…]")
    for name in ("--batch-size", "--seq-len", "--grad-accum"):
        parser.add_argument(name, type=int)
    parser.add_argument("--optimizer", choices=("adamw", "muon"))
    parser.add_argument("--precision")
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument("--steps", type=int, default=8, help="steps timed; one more before them is not")
    parser.add_argument("--seconds", type=float, default=20.0, help="no new step after so long")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    versions = {}
    for name in ("mlx", "mlx-cuda-13", "mlx-cuda-12", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    precision = pick_precision(args.precision or "auto")
    record = dict(date=str(date.today()), llmfs=llmfs.__version__, versions=versions, machine=asdict(hardware()),
                  precision=precision, rows=[])  # fmt: skip
    record["peak_flops"] = attempt(lambda: max(matmul_flops(n, precision, 0.3) for n in (1024, 4096))
                                   if hardware().backend == "cpu" else matmul_flops(8192, precision, 1.0))  # fmt: skip
    record["bandwidth"] = attempt(lambda: bandwidth(1 << 23 if hardware().backend == "cpu" else 1 << 28))
    print(record["machine"]["chip"], record["peak_flops"], record["bandwidth"], flush=True)
    for spec in args.presets:
        name, given = spec.partition(":")[0], {}
        row = {"preset": name, "spec": spec}
        try:
            name, given = wanted(spec, args)
            vocab = given.pop("vocab_size", args.vocab_size)
            row |= {"preset": name, "given": given}
            row["plan"] = attempt(planned, name=name, vocab=vocab, given=given)
            mx.clear_cache()
            row["measured"] = attempt(measure, name=name, vocab=vocab, given=given,
                                      steps=args.steps, seconds=args.seconds)  # fmt: skip
        except Exception as e:
            row["measured"] = row["plan"] = {"error": f"{type(e).__name__}: {e}"}
        mx.clear_cache()
        if "error" not in row["measured"] and isinstance(record["peak_flops"], float):
            row["measured"]["mfu"] = row["measured"]["flops"] / row["measured"]["seconds"] / record["peak_flops"]
        record["rows"].append(row)
        print(line(row), flush=True)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as f:
                json.dump(record, f, indent=1, ensure_ascii=False)
                f.write("\n")


if __name__ == "__main__":
    main()
