"""Rows of tokens to the slots of experts and back: naive, by look-ups both ways, by kernels; the router's kernels; every way to the experts.

python tests/bench_slots.py [--record FILE]

Checks results and gradients of the kernels against the plain look-ups, and every way to the experts against one
expert after the other; then times one layer's rows, there and back, forward and backward. Without CUDA there are no kernels, and the last row is the one before.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import llmfs  # noqa: E402
from llmfs.hardware import hardware, on_cuda  # noqa: E402
from llmfs.model import router, slots  # noqa: E402
from llmfs.model.moe import RUN, Experts, MoEConfig  # noqa: E402
from llmfs.model.router import Choice, Router  # noqa: E402

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

CASES = [(50, 24, 5, 3, "float32"), (700, 128, 8, 2, "float32"), (5000, 768, 8, 2, "bfloat16"),
         (1000, 200, 16, 1, "float16"), (1, 64, 4, 2, "bfloat16")]  # fmt: skip


def made_up(T, E, k, capacity):
    "A plan for random choices"
    rng = np.random.default_rng(T)
    chosen = np.argsort(rng.normal(size=(T, E)) + np.linspace(0, 1, E), axis=1)[:, :k].astype(np.int32)
    choice = Choice(mx.array(chosen), mx.array(rng.random((T, k), np.float32)), None, None)
    return slots.plan_capacity(choice, E, slots.room(T, k, E, capacity))


def naive(x, plan, weight):
    rows = x[plan.pair // plan.slots.shape[1]]
    return (weight[..., None].astype(x.dtype) * rows[plan.slots]).sum(1)


def ours(x, plan, weight):
    return slots.collect(slots.spread(x, plan), plan._replace(weight=weight))


def slope(way, plan, up):
    "Result and gradients as a function of rows and weights"
    dead = plan.weight == 0
    mx.eval(dead)

    def size(x, weight):
        y = way(x, plan, mx.where(dead, 0, weight))
        return (y.astype(mx.float32) * up).sum(), y

    def run(x, weight):
        (_, y), grads = mx.value_and_grad(size, argnums=(0, 1))(x, weight)
        return [y, *grads]

    return run


def plainly(run):
    "Without the kernels, whatever the device"
    fits, slots._fits = slots._fits, lambda x: False
    try:
        out = run()
        mx.eval(out)
        return out
    finally:
        slots._fits = fits


def far(a, b):
    a, b = (v.astype(mx.float32).reshape(-1) for v in (a, b))
    return (mx.linalg.norm(a - b) / (mx.linalg.norm(a) + 1e-30)).item()


def check() -> list[dict]:
    found = []
    for T, D, E, k, name in CASES:
        plan, dtype = made_up(T, E, k, 1.0), getattr(mx, name)
        x, up = mx.random.normal((T, D), key=mx.random.key(1)), mx.random.normal((T, D), key=mx.random.key(2))
        exact = plainly(lambda: slope(ours, plan, up)(x, plan.weight))
        got = slope(ours, plan, up)(x.astype(dtype), plan.weight)
        worst = max(far(a, b) for a, b in zip(exact, got, strict=True))
        found.append(dict(T=T, D=D, E=E, k=k, dtype=name, left_out=int((plan.weight == 0).sum()),
                          kernel=slots._fits(x.astype(dtype)), difference=float(f"{worst:.2g}")))  # fmt: skip
        print(found[-1], flush=True)
        assert worst < (1e-5 if name == "float32" else 1e-2), "kernel and plain way differ"
    return found


def one_after_the_other(experts, x, choice):
    "Every expert on every token, weighed: nothing is moved"
    y = 0
    for e in range(experts.up_proj.weight.shape[0]):
        gate, up, down = (experts[n].weight[e] for n in ("gate_proj", "up_proj", "down_proj"))
        h = x @ gate.T
        w = (choice.weight * (choice.chosen == e)).sum(-1, keepdims=True)
        y = y + w.astype(x.dtype) * ((h * mx.sigmoid(h) * (x @ up.T)) @ down.T)
    return y


def check_ways() -> list[dict]:
    "Whether nobody is lost: outputs of loop, gather and batched, for one token and for many"
    found = []
    cases = [(1, "float32"), (7, "float32"), (3000, "float32")]
    for T, name in cases + [(1, "bfloat16"), (3000, "bfloat16")] * on_cuda():
        mx.random.seed(T)
        cfg = MoEConfig(vocab_size=8, d_model=128, n_heads=2, d_ff=256, init_std=0.5)
        experts, x, dtype = Experts(cfg), mx.random.normal((T, 128)), getattr(mx, name)
        choice = Router(cfg)(x)
        exact = one_after_the_other(experts, x, choice)
        experts.set_dtype(dtype)
        for way, run in RUN.items():
            apart = far(exact, run(experts, x.astype(dtype), choice, cfg.n_experts / cfg.top_k))
            found.append(dict(way=way, T=T, dtype=name, difference=float(f"{apart:.2g}")))
            print(found[-1], flush=True)
            assert apart < (2e-3 if name == "float32" else 2e-2), "a way to the experts loses something"  # TF32
    return found


def check_router() -> list[dict]:
    "The router's logits and choices against NumPy in float64, and the product that rounds to TF32"
    found = []
    for T, D, E, k, name in [*CASES, (3000, 256, 64, 8, "bfloat16"), (99, 64, 33, 33, "float32")]:
        x = mx.random.normal((T, D), key=mx.random.key(3)).astype(getattr(mx, name))
        weight = mx.random.normal((E, D), key=mx.random.key(4))
        exact = np.array(x.astype(mx.float32)).astype(np.float64) @ np.array(weight).T.astype(np.float64)
        distance = lambda z: float(f"{np.linalg.norm(np.array(z) - exact) / np.linalg.norm(exact):.2g}")
        logits, plain = router._dots(x, weight), x.astype(mx.float32) @ weight.T
        choice = np.array(router.best_first(mx.round(logits), k))  # rounded: some are equal
        best = np.argsort(-np.array(mx.round(logits)), axis=1, kind="stable")[:, :k]
        found.append(dict(T=T, D=D, E=E, k=k, dtype=name, kernel=router._fits(E, x),
                          difference=distance(logits), product=distance(plain)))  # fmt: skip
        print(found[-1], flush=True)
        assert found[-1]["difference"] < 1e-5 or not router._fits(E, x), "logits are not exact to float32"
        assert np.array_equal(choice, best), "the best were not found"
    return found


def clock(run, x, weight, rounds=5, each=4):
    "Median milliseconds of one"
    mx.eval(run(x, weight))
    took = []
    for _ in range(rounds):
        mx.synchronize()
        start = time.perf_counter()
        for _ in range(each):
            mx.eval(run(x, weight))
        mx.synchronize()
        took.append(1e3 * (time.perf_counter() - start) / each)
    return round(statistics.median(took), 3)


def times(T, D, E, k) -> dict:
    "Of one layer's rows; the loss around them is the same for all"
    dtype = mx.bfloat16 if on_cuda() else mx.float32
    plan = made_up(T, E, k, 1.25)
    x, up = mx.random.normal((T, D)).astype(dtype), mx.random.normal((T, D))
    mx.eval(list(plan), x, up)
    compiled = lambda way: mx.compile(slope(way, plan, up))
    found = {"naive": clock(compiled(naive), x, plan.weight)}
    fits, slots._fits = slots._fits, lambda x: False
    found["look-ups both ways"] = clock(compiled(ours), x, plan.weight)
    slots._fits = fits
    if on_cuda():
        found["kernels"] = clock(compiled(ours), x, plan.weight)
    print(found, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32 * 1024 if on_cuda() else 2048)
    parser.add_argument("--record", metavar="FILE")
    args = parser.parse_args()
    machine, shape = hardware(), dict(T=args.tokens, D=768, E=8, k=2)
    record = dict(device=machine.chip, mlx=mx.__version__, llmfs=llmfs.__version__, check=check(),
                  router=check_router(), ways=check_ways(), shape=shape | dict(capacity=1.25), milliseconds=times(**shape))  # fmt: skip
    if args.record:
        Path(args.record).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
