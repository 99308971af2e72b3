"""A training step, and a race to a loss, beside a compiled torch model on the same GPU.

python tests/bench_gpu.py check                          the kernel of the heads against the plain way
python tests/bench_gpu.py step [--record FILE]           124M parameters, 32 x 1,024 tokens, bfloat16
python tests/bench_gpu.py race --text FILE [--record FILE]   Shakespeare's characters to 1.4697

The torch model is that of nanogpt.py (fused AdamW, autocast to bfloat16, torch.compile, flash
attention), with activation, norms and positions as asked for. Every contestant runs in a process
of its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nanogpt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BATCH, LENGTH, VOCAB, TARGET = 32, 1024, 50_304, 1.4697
BASE = dict(n_layers=12, d_model=768, n_heads=12, max_seq_len=LENGTH, vocab_size=VOCAB)
SHAPES = {  # what both build: our preset of 124M parameters, GPT-2's shape, and the cheapest
    "preset": dict(BASE, d_ff=2048, norm="rmsnorm", activation="swiglu", positions="rope", qk_norm=True),
    "gpt2": dict(BASE, d_ff=3072, norm="layernorm", activation="gelu", positions="learned", qk_norm=False),
    "relu2": dict(BASE, d_ff=3072, norm="rmsnorm", activation="relu2", positions="rope", qk_norm=False),
}  # fmt: skip

# --- torch ----------------------------------------------------------------------------------


class Torch:
    "A training step of the torch model"

    def __init__(self, shape: dict, lr: float, decay: float, betas: tuple):
        import torch

        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        self.torch, self.model = torch, nanogpt.model(shape).cuda()
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(nanogpt.groups(self.params, decay), lr=lr, betas=betas, fused=True)
        self.compiled = torch.compile(self.model)
        self.n_params = sum(p.numel() for p in self.params)

    def step(self, inputs, targets, lr=None):
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        with self.torch.autocast("cuda", self.torch.bfloat16):
            loss = self.compiled(inputs, targets)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.last = loss.detach()

    def settle(self):
        self.torch.cuda.synchronize()

    def arrays(self, ids):
        return self.torch.from_numpy(np.asarray(ids, np.int64)).cuda()

    def peak(self, reset=False) -> float:
        if reset:
            self.torch.cuda.reset_peak_memory_stats()
        return self.torch.cuda.max_memory_allocated()


# --- ours -----------------------------------------------------------------------------------


class Ours:
    "A training step of llmfs"

    def __init__(self, shape: dict, optimizer: str, train: dict, options: dict):
        import llmfs  # noqa: F401, I001  before mlx
        from llmfs.model.transformer import GPT, GPTConfig, count_params
        from llmfs.training.optimizer import make_optimizer
        from llmfs.training.step import TrainConfig, TrainStep

        import mlx.core as mx

        mx.random.seed(0)
        self.mx, self.shape = mx, GPTConfig(**shape)
        self.model, self.n_params = GPT(self.shape), count_params(self.shape)
        self.model.train()
        self.optimizer = make_optimizer(optimizer, self.model, **options)
        self.cfg = TrainConfig(optimizer=optimizer, precision="bfloat16", **train)
        self.train, self.last = TrainStep(self.model, self.optimizer, self.cfg), None

    def step(self, inputs, targets, scale=1.0):
        from llmfs.training.data_loader import Batch

        before, self.last = self.last, self.train([Batch(inputs, targets, None)], scale)[0]
        if before is not None:
            self.mx.eval(before)  # at most one step runs ahead, as in Trainer

    def settle(self):
        self.mx.eval(self.last, self.model.parameters(), self.optimizer.state)

    def arrays(self, ids):
        return np.asarray(ids, np.int32)

    def peak(self, reset=False) -> float:
        if reset:
            self.mx.reset_peak_memory()
        return self.mx.get_peak_memory()


# --- one step -------------------------------------------------------------------------------


def time_step(job: dict) -> dict:
    "Median time of a step over five groups of six"
    start, shape = time.perf_counter(), SHAPES[job["shape"]]
    if job["who"] == "torch":
        run = Torch(shape, 1e-4, 0.1, (0.9, 0.95))
    else:
        if job.get("limit"):
            import llmfs  # noqa: F401, I001  before mlx
            import mlx.core as mx

            mx.set_memory_limit(int(job["limit"] * 1e9))
        train = dict(batch_size=BATCH, seq_len=LENGTH)
        run = Ours(shape, job.get("optimizer", "adamw"), train, dict(lr=1e-4, weight_decay=0.1))
    ids = run.arrays(np.random.default_rng(0).integers(0, 50_257, (BATCH, LENGTH + 1)))
    for _ in range(3):
        run.step(ids[:, :-1], ids[:, 1:])
    run.settle()
    ready, times = time.perf_counter() - start, []
    run.peak(reset=True)
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(6):
            run.step(ids[:, :-1], ids[:, 1:])
        run.settle()
        times.append((time.perf_counter() - start) / 6)
    t = float(np.median(times))
    return job | dict(n_params=run.n_params, ms=round(1e3 * t, 2), spread_ms=[round(1e3 * min(times), 2),
        round(1e3 * max(times), 2)], tokens_per_second=round(BATCH * LENGTH / t),
        peak_gb=round(run.peak() / 1e9, 2), seconds_to_ready=round(ready, 1), loss=round(float(run.last.item()), 3))  # fmt: skip


# --- the race -------------------------------------------------------------------------------

NANOGPT = dict(
    shape=dict(n_layers=6, d_model=384, n_heads=6, d_ff=1536, max_seq_len=256, norm="layernorm",
               activation="gelu", positions="learned", qk_norm=False, dropout=0.2),
    batch=64, steps=5000, warmup=100, lr=1e-3, min_lr=1e-4, betas=(0.9, 0.99), decay=0.1,
)  # fmt: skip
OURS = dict(
    shape=dict(n_layers=6, d_model=384, n_heads=6, d_ff=1536, max_seq_len=256,
               activation="relu2", dropout=0.1, init_std=0.02),
    batch=64, steps=360, warmup=20, lr=3e-3, muon_lr=0.03, decay=1.0,
)  # fmt: skip


def race(job: dict) -> dict:
    "Train on characters until the validation loss is at the target; a clock counts training only"
    text, setting = Path(job["text"]).read_text(encoding="utf-8"), job["setting"]
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids, cut, L = np.array([letters[c] for c in text], np.int32), int(0.9 * len(text)), 256
    held, B = ids[cut:], setting["batch"]
    rows = (len(held) - 1) // L
    held = [held[:-1][: rows * L].reshape(rows, L), held[1:][: rows * L].reshape(rows, L)]
    shape, steps = dict(setting["shape"], vocab_size=len(letters)), setting["steps"]

    def make():
        if job["who"] == "torch":
            return Torch(shape, setting["lr"], setting["decay"], tuple(setting["betas"]))
        train = dict(batch_size=B, seq_len=L, max_steps=steps, warmup=setting["warmup"])
        options = dict(lr=setting["lr"], muon_lr=setting["muon_lr"], weight_decay=setting["decay"])
        return Ours(shape, "muon", train, options)

    def rate(step):
        if job["who"] == "ours":
            from llmfs.training.step import lr_scale

            return lr_scale(run.cfg, step)
        return nanogpt.rate(step, steps, setting["warmup"], setting["lr"], setting["min_lr"])

    def batch():
        at = rng.integers(0, cut - L, B)[:, None] + np.arange(L + 1)
        return ids[at][:, :-1], ids[at][:, 1:]

    def loss():
        if job["who"] == "ours":
            from llmfs.evaluation.metrics import evaluate_loss
            from llmfs.training.data_loader import Batch
            from llmfs.training.step import computing_weights

            parts = [Batch(x, y, None) for x, y in zip(*(np.array_split(a, 7) for a in held))]
            with computing_weights(run.train) as model:
                return float(evaluate_loss(model, parts).loss)
        run.model.eval()
        with run.torch.no_grad(), run.torch.autocast("cuda", run.torch.bfloat16):
            parts = [(run.arrays(x), run.arrays(y)) for x, y in zip(*(np.array_split(a, 7) for a in held))]
            total = sum(run.model(x, y).item() * x.numel() for x, y in parts)
        run.model.train()
        return total / (rows * L)

    rng = np.random.default_rng(0)
    run, start = make(), time.perf_counter()
    for _ in range(2):  # libraries load, kernels are compiled: not counted
        run.step(*map(run.arrays, batch()), 0.0)
    run.settle()
    loss()
    ready = time.perf_counter() - start
    if job["who"] == "torch":
        state = nanogpt.model(shape).state_dict()
        run.model.load_state_dict(state)
        run.optimizer.state.clear()
    else:
        fresh = make()
        run.model.update(fresh.model.parameters())
        run.optimizer.load_state(fresh.optimizer.state)
    seconds, curve, hit, every = 0.0, [], None, 100 if job["who"] == "torch" else steps // 24
    for done in range(0, steps, every):
        start = time.perf_counter()
        for step in range(done, min(done + every, steps)):
            run.step(*map(run.arrays, batch()), rate(step))
        run.settle()
        seconds += time.perf_counter() - start
        curve.append([min(done + every, steps), round(seconds, 2), round(loss(), 4)])
        if curve[-1][2] <= TARGET and hit is None:
            hit = curve[-1]
        if hit and job["who"] == "torch" and curve[-1][0] >= hit[0] + 500:
            break  # it overfits from here on
    return job | dict(text=Path(job["text"]).name, n_params=run.n_params, to_target=hit, best=min(c[2] for c in curve),
                      seconds=round(seconds, 2), seconds_to_ready=round(ready, 1), curve=curve)  # fmt: skip


# --- the kernel -----------------------------------------------------------------------------


def check() -> list[dict]:
    "Largest relative difference between kernel and plain way: results and gradients"
    import llmfs  # noqa: F401, I001  before mlx
    from llmfs.model import heads
    from llmfs.model.embedding import Rope

    import mlx.core as mx

    found = []
    cases = [(12, 12, 64, 1, 1, "float32"), (12, 12, 64, 1, 1, "bfloat16"), (4, 1, 128, 0, 1, "float32"),
             (12, 12, 64, 0, 0, "float32"), (8, 4, 32, 1, 0, "float32")]  # fmt: skip
    for H, G, K, norm, rope, name in cases:
        T = getattr(mx, name)
        random = lambda *s: mx.random.normal(s).astype(T)
        qkv, scales = random(3, 37, (H + 2 * G) * K), (1 + 0.3 * random(K), 1 + 0.3 * random(K))
        up = [random(3, n, 37, K) for n in (H, G, G)]
        turn = Rope(K) if rope else None

        def run(way, qkv, *scales):
            out = way(qkv, H, G, scales if norm else None, 1e-6, turn)
            return sum((a * b).astype(mx.float32).sum() for a, b in zip(out, up)), out

        both = []
        for way in (heads.split_plainly, heads.split_heads):
            f = mx.value_and_grad(lambda *a: run(way, *a), argnums=(0, 1, 2) if norm else (0,))
            (_, out), grads = f(qkv, *scales)
            both.append([*out, *(grads if norm else [grads[0] if isinstance(grads, tuple) else grads])])
        far = lambda a, b: (mx.linalg.norm((a - b).astype(mx.float32).reshape(-1))
                            / mx.linalg.norm(a.astype(mx.float32).reshape(-1))).item()  # fmt: skip
        worst = max(far(a, b) for a, b in zip(*both))
        found.append(dict(H=H, G=G, K=K, norm=norm, rope=rope, dtype=name, difference=float(f"{worst:.2g}")))
        print(found[-1], flush=True)
        assert worst < (1e-5 if T == mx.float32 else 2e-2), "kernel and plain way differ"
    return found


# --- commands -------------------------------------------------------------------------------


def facts() -> dict:
    versions = {}
    for name in ("mlx", "torch", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    smi = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return dict(device=(smi.stdout.splitlines() or ["none"])[0], versions=versions | dict(python=platform.python_version()))


def apart(job: dict) -> dict | None:
    "A job in a process of its own"
    done = subprocess.run([sys.executable, __file__, "worker"], input=json.dumps(job), capture_output=True, text=True,
                          env=os.environ | {"PYTHONWARNINGS": "ignore"})  # fmt: skip
    line = next((x for x in done.stdout.splitlines() if x.startswith("{")), None)
    found = json.loads(line) if line else job | dict(error=done.stderr.strip().splitlines()[-1:])
    shown = {k: v for k, v in found.items() if k not in ("setting", "curve", "text", "what")}
    print(json.dumps(shown), flush=True)
    return found


def measure(jobs: list[dict], record: str | None) -> list[dict]:
    "One after the other; the record is written again after each"
    runs = []
    for job in jobs:
        runs.append(apart(job))
        write(record, runs)
    return runs


def write(path: str | None, runs: list[dict]):
    if path:
        record = facts() | dict(runs=[{k: v for k, v in r.items() if k != "what"} for r in runs])
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["check", "step", "race", "worker"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--who", nargs="+", default=["torch", "ours"], choices=["torch", "ours"])
    parser.add_argument("--limits", nargs="*", type=float, default=[], help="step: also with these memory limits, GB")
    parser.add_argument("--muon", action="store_true", help="step: also with Muon")
    parser.add_argument("--text", help="race: Shakespeare's characters")
    parser.add_argument("--change", nargs="*", default=[], help="race: JSON of fields of our setting, each a run")
    parser.add_argument("--record", metavar="FILE")
    args = parser.parse_args()
    if args.what == "worker":
        job = json.load(sys.stdin)
        print(json.dumps(dict(step=time_step, race=race)[job["what"]](job)), flush=True)
        return
    if args.what == "check":
        runs = check()
    elif args.what == "step":
        jobs = [dict(what="step", shape=s, who=w) for s in args.shapes for w in args.who]
        jobs += [dict(what="step", shape=s, who="ours", limit=x) for x in args.limits for s in args.shapes]
        jobs += [dict(what="step", shape=s, who="ours", optimizer="muon") for s in args.shapes[:1] if args.muon]
        runs = measure(jobs, args.record)
    else:
        settings = [("torch", NANOGPT)] if "torch" in args.who else []
        for change in args.change or ["{}"]:
            change = json.loads(change)
            mine = {k: change.get(k, v) for k, v in OURS.items() if k != "shape"}
            mine["shape"] = OURS["shape"] | {k: v for k, v in change.items() if k not in OURS}
            settings.append(("ours", mine))
        jobs = [dict(what="race", who=w, text=args.text, setting=s) for w, s in settings]
        runs = measure(jobs, args.record)
    write(args.record, runs)


if __name__ == "__main__":
    main()
