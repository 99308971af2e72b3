"""How long a training step of a mixture of experts takes, beside a dense model of as many active parameters.

    python tools/bench_moe.py --size 124m --batch 32 --seq 1024 --out bench_moe.json

Every part is measured on its own; one that fails leaves its error in the record and the next one runs.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path

import llmfs
from llmfs.evaluation.metrics import token_loss
from llmfs.hardware import compile_pays, hardware, pick_precision
from llmfs.model.moe import MoEConfig
from llmfs.model.transformer import GPT, count_params, flops_per_token, preset
from llmfs.training.data_loader import Batch
from llmfs.training.optimizer import make_optimizer
from llmfs.training.step import TrainConfig, TrainStep

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map


def parts(args) -> list[dict]:
    "What is measured: name, fields of the config, optimizer, batches a step"
    moe = lambda **fields: dict(kind="moe", n_experts=args.experts, top_k=args.k, **fields)
    paths = {
        "dense": {},
        "batched": moe(dispatch="batched", capacity=1.25),
        "batched, capacity 1": moe(dispatch="batched", capacity=1.0),
        "gather": moe(dispatch="gather"),
        "loop": moe(dispatch="loop"),
        "auto": moe(),
    }
    if args.only:
        paths = {name: fields for name, fields in paths.items() if name in args.only}
    grid = [(o, a) for a in args.accum for o in args.optimizer]
    return [
        dict(path=name, fields=fields, optimizer=o, accum=a)
        for o, a in grid for name, fields in paths.items()
    ]  # fmt: skip


def shape(args, fields):
    "The config of a part: the dense preset, or its sparse sibling"
    cfg = preset(args.size, vocab_size=args.vocab, max_seq_len=args.seq)
    return MoEConfig(**{k: v for k, v in cfg.to_dict().items() if k != "kind"} | {
        k: v for k, v in fields.items() if k != "kind"
    }) if fields else cfg  # fmt: skip


def clock(run, args, window=4) -> list[float]:
    "Seconds of one repetition: several under way at once, as in training, after a warm-up"
    for _ in range(args.warmup):
        mx.eval(run())
    took = []
    for _ in range(args.steps):
        mx.synchronize()
        start, last = time.perf_counter(), None
        for _ in range(window):
            now = run()
            mx.async_eval(now)
            if last is not None:
                mx.eval(last)
            last = now
        mx.eval(last)
        mx.synchronize()
        took.append((time.perf_counter() - start) / window)
    return took


def measure(part, args) -> dict:
    "One part: a whole step; forward alone and forward with backward where they are asked for"
    cfg, compiled = shape(args, part["fields"]), part["path"] != "loop" and compile_pays()
    mx.random.seed(0)
    model, rng = GPT(cfg), np.random.default_rng(0)
    optimizer = make_optimizer(part["optimizer"], model, lr=1e-4)
    train = TrainConfig(precision=args.precision, compile=compiled, optimizer=part["optimizer"])
    step = TrainStep(model, optimizer, train)
    ids = rng.integers(0, args.vocab, (part["accum"], args.batch, args.seq + 1)).astype(np.int32)
    batches = [Batch(x[:, :-1], x[:, 1:], None) for x in ids]
    mx.reset_peak_memory()
    took = clock(lambda: step(batches, 1.0)[0], args)
    out = dict(params=count_params(cfg), active=count_params(cfg, active=True), compiled=compiled)
    out |= dict(flops_per_token=flops_per_token(cfg, args.seq), seconds=took)
    out |= dict(median=float(np.median(took)), peak_bytes=mx.get_peak_memory())
    if args.pieces and part["accum"] == 1:
        out["pieces"] = pieces(step, batches[0], args)
    return out


def pieces(step, batch, args) -> dict:
    "Median seconds of the forward pass, and of forward and backward, without the update"
    tokens, targets, params = mx.array(batch.inputs), mx.array(batch.targets), step.model.trainable_parameters()

    def forward(params):
        step.model.update(tree_map(lambda p: p.astype(step.dtype), params))
        nll, n = token_loss(step.model(tokens), targets)
        for m in step.asking:
            nll, m._extra_loss = nll + m._extra_loss, None
        return nll / n

    both = mx.value_and_grad(forward)
    run = {"forward": forward, "forward and backward": both}
    if compile_pays():
        run = {name: mx.compile(f) for name, f in run.items()}
    out = {}
    for name, f in run.items():
        try:
            out[name] = float(np.median(clock(lambda: f(params), args)))
        except Exception as e:
            out[name] = f"{type(e).__name__}: {e}"
    step.model.update(params)
    return out


def apart(part, args) -> dict:
    "`measure` in a process of its own: how MLX starts kernels is settled once a process"
    told = json.dumps([part, {k: v for k, v in vars(args).items() if k != "out"}])
    done = subprocess.run([sys.executable, __file__, "--worker"], input=told, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else dict(error=done.stderr.strip()[-600:])


def worker():
    part, args = json.load(sys.stdin)
    try:
        found = measure(part, argparse.Namespace(**args))
    except Exception as e:
        traceback.print_exc()
        found = dict(error=f"{type(e).__name__}: {e}")
    print(json.dumps(found), flush=True)


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--size", default="tiny", help="preset of the dense model")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--vocab", type=int, default=50_304, help="a multiple of 64: others cost time on CUDA")
    p.add_argument("--experts", type=int, default=8)
    p.add_argument("--k", type=int, default=2)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--precision", default="auto")
    p.add_argument("--optimizer", nargs="+", default=["adamw"])
    p.add_argument("--accum", nargs="+", type=int, default=[1])
    p.add_argument("--only", nargs="+", help="paths to measure, of those in `parts`")
    p.add_argument("--pieces", action="store_true", help="also forward and backward alone")
    p.add_argument("--out", type=Path, default=Path("bench_moe.json"))
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.worker:
        worker()
        return 0
    machine = hardware()
    record = dict(device=str(machine), backend=machine.backend, mlx=mx.__version__,
                  llmfs=llmfs.__version__, precision=pick_precision(args.precision), parts=[])  # fmt: skip
    record["asked"] = {k: v for k, v in vars(args).items() if k not in ("out", "worker")}
    for part in parts(args):
        part |= apart(part, args)
        record["parts"].append(part)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        said = part.get("error") or f"{1000 * part['median']:.1f} ms, {part['peak_bytes'] / 1e9:.1f} GB"
        print(f"{part['path']:<22}{part['optimizer']:<7}x{part['accum']:<3}{said} {part.get('pieces', '')}", flush=True)
    return int(any("error" in part for part in record["parts"]))


if __name__ == "__main__":
    sys.exit(main())
