"""Time to validation loss 1.88 on Shakespeare's characters, beside nanoGPT's CPU setting.

python tests/bench_shakespeare.py [--text FILE] [--record FILE]   both, on the same two cores
python tests/bench_shakespeare.py --apart FILE                    what each change of ours does

nanoGPT's README publishes a setting for laptops without a GPU: 4 layers, width 128, 2,000
steps. Its model is written in torch from that description (nanogpt.py); ours is made of llmfs's
modules. Each trains in a process of its own, a few seconds at a time in turn, so that both
meet the same machine. Both are evaluated on the whole last tenth of the text; a clock counts
training only. `tests/test_shakespeare.py` checks both, and the records in nbs/results.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nanogpt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NAME = "tinyshakespeare.txt"
TEXTS = ROOT / "data" / NAME, ROOT.parent / "shared" / "data" / NAME
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TARGET, CORES, LENGTH, EVAL_ROWS = 1.88, 2, 64, 64
sys.path.insert(0, str(ROOT))

# --- the two settings -----------------------------------------------------------------------

NANOGPT = dict(
    n_layer=4, n_head=4, n_embd=128, block_size=LENGTH, batch_size=12, max_iters=2000,
    warmup_iters=100, learning_rate=1e-3, min_lr=1e-4, betas=[0.9, 0.99], weight_decay=0.1,
    grad_clip=1.0, dropout=0.0, bias=False,
)  # fmt: skip
# The same setting in llmfs's words: `shape` for GPTConfig, `train` for TrainConfig,
# `optimizer` for make_optimizer. Warm-up is a share of the steps, as runs here are shorter.
START = dict(
    shape=dict(
        n_layers=4, d_model=128, n_heads=4, d_ff=512, max_seq_len=LENGTH, norm="layernorm",
        norm_eps=1e-5, activation="gelu", positions="learned", qk_norm=False, init_std=0.02,
        residual_init="scaled",
    ),
    train=dict(
        optimizer="adamw", batch_size=12, seq_len=LENGTH, warmup=0.05, lr=1e-3,
        schedule="cosine", final_lr=0.1, weight_decay=0.1, grad_clip=1.0,
    ),
    optimizer=dict(betas=[0.9, 0.99]),
)  # fmt: skip
# What was changed, in this order: (what, fields). Together they are our setting.
ADAMW = dict(optimizer="adamw", muon_lr=None, ns_steps=None)
CHANGES = [
    ("Muon for AdamW on the blocks' matrices", dict(
        optimizer="muon", muon_lr=0.02, lr=3e-3, weight_decay=0.0, betas=[0.9, 0.95])),
    ("linear to zero for cosine to a tenth", dict(schedule="linear", final_lr=0.0)),
    ("batches of 32 for 12", dict(batch_size=32)),
    ("RMSNorm for LayerNorm, and on q and k", dict(norm="rmsnorm", norm_eps=1e-6, qk_norm=True)),
    ("rotary for learned positions", dict(positions="rope")),
    ("squared ReLU for GELU", dict(activation="relu2")),
    ("2 heads for 4", dict(n_heads=2)),
    ("first weights 0.05 wide, outputs zero", dict(init_std=0.05, residual_init="zero")),
    ("3 layers for 4", dict(n_layers=3)),
    ("3 Newton-Schulz rounds for 5", dict(ns_steps=3)),
]  # fmt: skip
# From our setting, one thing else: what was tried and left out.
DETOURS = [
    ("AdamW on everything, rate 3e-3", dict(ADAMW, lr=3e-3)),
    ("AdamW on everything, rate 6e-3", dict(ADAMW, lr=6e-3)),
    ("batches of 16", dict(batch_size=16)),
    ("batches of 64", dict(batch_size=64)),
    ("SwiGLU, as many parameters", dict(activation="swiglu", d_ff=344)),
    ("GELU", dict(activation="gelu")),
    ("learned positions", dict(positions="learned")),
    ("1 head", dict(n_heads=1)),
    ("2 layers", dict(n_layers=2)),
    ("outputs scaled, not zero", dict(residual_init="scaled")),
]
STEPS = dict(nanogpt=2000, ours=200)


def evaluations(steps: int) -> list[int]:
    "After which steps to evaluate: each tenth of the run, each fortieth of its last quarter"
    return sorted({round(steps * k / 40) for k in [*range(4, 30, 4), *range(30, 41)]} - {0})


def changed(setting: dict, fields: dict) -> dict:
    "The setting with some fields changed, each in the group where it belongs; None drops one"
    new = {group: dict(values) for group, values in setting.items()}
    for key, value in fields.items():
        group = "optimizer" if key in ("betas", "ns_steps") else "train"
        group = "shape" if key in START["shape"] else group
        new[group][key] = value
        if value is None:
            del new[group][key]
    return new


def our_setting() -> dict:
    setting = START
    for _, fields in CHANGES:
        setting = changed(setting, fields)
    return setting


# --- nanoGPT --------------------------------------------------------------------------------


def torch_gpt(vocab_size: int, cfg: dict):
    "nanoGPT's model, from its own words"
    D, words = cfg["n_embd"], dict(n_layers="n_layer", n_heads="n_head", max_seq_len="block_size")
    return nanogpt.model(
        dict({ours: cfg[theirs] for ours, theirs in words.items()}, vocab_size=vocab_size, d_model=D,
             d_ff=4 * D, norm="layernorm", activation="gelu", gelu="none", positions="learned",
             qk_norm=False, dropout=cfg["dropout"]))  # fmt: skip


def nanogpt_rate(step: int, cfg: dict) -> float:
    return nanogpt.rate(step, cfg["max_iters"], cfg["warmup_iters"], cfg["learning_rate"], cfg["min_lr"])


class NanoGPT:
    "One run of nanoGPT's setting"

    def __init__(self, job: dict):
        import torch

        torch.manual_seed(job["seed"])
        torch.set_num_threads(CORES)
        self.torch, self.cfg, self.done = torch, job["setting"], 0
        ids = [np.load(Path(job["folder"], f"{x}.npy")) for x in ("train", "validation")]
        self.train, self.validation = (torch.from_numpy(x.astype(np.int64)) for x in ids)
        self.model = torch_gpt(job["n_characters"], self.cfg)
        params = list(self.model.parameters())
        groups = nanogpt.groups(params, self.cfg["weight_decay"])
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=tuple(self.cfg["betas"]))
        self.n_params = sum(p.numel() for p in params)

    def step(self):
        torch, L = self.torch, self.cfg["block_size"]
        starts = torch.randint(len(self.train) - L, (self.cfg["batch_size"],)).tolist()
        x = torch.stack([self.train[i : i + L] for i in starts])
        y = torch.stack([self.train[i + 1 : i + 1 + L] for i in starts])
        for group in self.optimizer.param_groups:
            group["lr"] = nanogpt_rate(self.done, self.cfg)
        logits = self.model(x)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg["grad_clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    def settle(self):
        pass

    def loss(self) -> float:
        nll, total = self.torch.nn.functional.cross_entropy, 0.0
        with self.torch.no_grad():
            for x, y in windows(self.validation, self.cfg["block_size"], EVAL_ROWS):
                total += nll(self.model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        return total / (len(self.validation) - 1)


def windows(ids, length: int, rows: int):
    "Inputs and targets of neighbouring windows: each id after the first is a target once"
    whole = (len(ids) - 1) // length
    for a in range(0, whole, rows):
        b = min(a + rows, whole)
        yield (ids[a * length : b * length].reshape(-1, length),
               ids[a * length + 1 : b * length + 1].reshape(-1, length))  # fmt: skip
    if whole * length < len(ids) - 1:
        yield ids[None, whole * length : -1], ids[None, whole * length + 1 :]


# --- ours -----------------------------------------------------------------------------------


class Ours:
    "One run of a setting in llmfs's words"

    def __init__(self, job: dict):
        import llmfs  # noqa: F401, I001  before mlx: it loads a fast BLAS
        from llmfs.model.transformer import GPT, GPTConfig, count_params
        from llmfs.training.data_loader import DataLoader
        from llmfs.training.optimizer import make_optimizer
        from llmfs.training.step import TrainConfig, TrainStep, lr_scale

        import mlx.core as mx

        ids = [np.load(Path(job["folder"], f"{x}.npy")) for x in ("train", "validation")]
        self.mx, self.validation, self.done = mx, ids[1], 0
        shape, train, options = (job["setting"][k] for k in ("shape", "train", "optimizer"))
        warmup = max(1, round(train["warmup"] * job["steps"]))
        self.cfg = TrainConfig(
            **train | dict(warmup=warmup, max_steps=job["steps"], seed=job["seed"])
        )
        self.rate = lambda: lr_scale(self.cfg, self.done)
        mx.random.seed(job["seed"])
        shape = GPTConfig(vocab_size=job["vocab_size"], **shape)
        self.model, self.n_params = GPT(shape), count_params(shape)
        options = dict(options, lr=self.cfg.lr, weight_decay=self.cfg.weight_decay)
        if self.cfg.optimizer == "muon":
            options["muon_lr"] = self.cfg.muon_lr
        optimizer = make_optimizer(self.cfg.optimizer, self.model, **options)
        self.train = TrainStep(self.model, optimizer, self.cfg)
        self.loader = DataLoader(ids[0], self.cfg.batch_size, self.cfg.seq_len, seed=job["seed"])
        self.report = None
        mx.eval(self.model.parameters(), optimizer.state)

    def step(self):
        report = self.train([next(self.loader)], self.rate())
        if self.report:
            self.mx.eval(self.report[0])  # at most one step runs ahead, as in Trainer
        self.report = report
        self.done += 1

    def settle(self):
        self.mx.eval(self.model.parameters(), self.train.optimizer.state)

    def loss(self) -> float:
        from llmfs.evaluation.metrics import evaluate_loss
        from llmfs.training.data_loader import eval_batches

        batches = eval_batches(self.validation, EVAL_ROWS, self.cfg.seq_len)
        return float(evaluate_loss(self.model, batches).loss)


# --- taking turns ---------------------------------------------------------------------------


def worker():
    "Train when told to, for so many seconds; report each evaluation"
    said, sys.stdout = sys.stdout, sys.stderr
    job = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    make = dict(nanogpt=NanoGPT, ours=Ours)[job["who"]]
    warm = make(job)  # what a library loads or tunes at its first steps is not counted
    for _ in range(2):
        warm.step()
    warm.settle()
    run, due = make(job), evaluations(job["steps"])
    seconds = cpu = 0.0
    curve = [[0, 0.0, 0.0, round(run.loss(), 4)]]
    print(json.dumps(dict(n_params=run.n_params)), file=said, flush=True)
    for line in sys.stdin:
        start, busy = time.perf_counter(), time.process_time()
        while run.done < job["steps"] and time.perf_counter() - start < float(line):
            run.step()
            if run.done in due:
                break
        run.settle()
        seconds += time.perf_counter() - start
        cpu += time.process_time() - busy
        if run.done in due and run.done != curve[-1][0]:
            curve.append([run.done, round(seconds, 3), round(cpu, 3), round(run.loss(), 4)])
        report = dict(done=run.done, curve=curve)
        print(json.dumps(report), file=said, flush=True)


class Contestant:
    "A worker seen from outside"

    def __init__(self, job: dict):
        threads = {f"{x}_NUM_THREADS": str(CORES) for x in ("OMP", "MKL", "OPENBLAS")}
        command = [sys.executable, __file__, "--worker"]
        self.job, self.done = job, 0
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=os.environ | threads)  # fmt: skip
        self.n_params = self.ask(json.dumps(job))["n_params"]

    def ask(self, line: str) -> dict:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"bench_shakespeare: {self.job['who']} stopped, exit {self.process.wait()}")
        return json.loads(answer)

    def turn(self, seconds: float):
        report = self.ask(str(seconds))
        self.done, self.curve = report["done"], report["curve"]

    @property
    def share(self) -> float:
        return self.done / self.job["steps"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def race(jobs: list[dict], turn: float, say) -> list[dict]:
    "Run all jobs in turns, whoever is behind first, so that each meets the same load"
    runs = [Contestant(job) for job in jobs]
    while any(r.share < 1 for r in runs):
        run = min(runs, key=lambda r: r.share)
        run.turn(turn)
        step, seconds, _, loss = run.curve[-1]
        say(f"{run.job['who']:8} step {step:5}  {seconds:6.1f} s  validation {loss:.4f}")
    for r in runs:
        r.close()
    return [result(r) for r in runs]


def result(run: Contestant) -> dict:
    "One run as a record: its setting, its curve, and when it reached the target"
    columns = dict(zip(("step", "seconds", "cpu_seconds", "loss"), map(list, zip(*run.curve))))
    hit = next((i for i, x in enumerate(columns["loss"]) if x <= TARGET), None)
    return dict(
        who=run.job["who"], seed=run.job["seed"], setting=run.job["setting"],
        steps=run.job["steps"], n_params=run.n_params,
        seconds=columns["seconds"][-1], loss=columns["loss"][-1],
        to_target=None if hit is None else {k: c[hit] for k, c in columns.items()},
        curve=columns,
    )  # fmt: skip


# --- the text, the machine, the commands ----------------------------------------------------


@contextmanager
def prepared(text: str):
    "nanoGPT's split as ids, in a folder, and what a job must know of it"
    from llmfs.tokenizer.vocab import CharTokenizer

    tokenizer = CharTokenizer(text)
    ids, cut = tokenizer.encode_array(text), int(0.9 * len(text))
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "train.npy"), ids[:cut])
        np.save(Path(folder, "validation.npy"), ids[cut:])
        yield dict(folder=folder, n_characters=len(set(text)), vocab_size=tokenizer.vocab_size)


def facts(text: str, args, threads: int = CORES) -> dict:
    "What a reader of the record must know; no names, no paths"
    from llmfs.hardware import load_blas

    versions = {}
    for name in ("mlx", "mkl", "torch", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    return dict(
        text=dict(name="tinyshakespeare", characters=len(text),
                  sha256=sha256(text.encode()).hexdigest(),
                  split="first 90 % training, last 10 % validation, all of it evaluated"),
        target=TARGET, seed=args.seed, device=args.machine, threads=threads, blas=load_blas(),
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY"),
        versions=versions | dict(python=platform.python_version()),
    )  # fmt: skip


def write(path: str, record: dict):
    "As JSON, each list of numbers on one line"
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n", encoding="utf-8")


def side_by_side(text: str, args):
    "Both contestants, once a seed"
    who = ["nanogpt", "ours"]
    try:
        version("torch")
    except PackageNotFoundError:
        print("torch is not installed (make bench TORCH=1): only ours is measured")
        who = ["ours"]
    steps = dict.fromkeys(STEPS, 2) if args.quick else STEPS
    setting = dict(nanogpt=NANOGPT, ours=our_setting())
    last = {}

    def say(line):  # one line an evaluation, not one a turn
        if line != last.get(line[:8]):
            last[line[:8]] = line
            print(line, flush=True)

    with prepared(text) as where:
        jobs = [dict(where, who=w, seed=args.seed, setting=setting[w], steps=steps[w])
                for w in who]  # fmt: skip
        runs = race(jobs, args.turn, say)
    record = facts(text, args) | dict(runs=runs)
    if len(runs) == 2:
        record["ratio"] = compare(*runs)
    for r in runs:
        t, end = r["to_target"], f"{r['loss']:.4f} after {r['seconds']:.1f} s, {r['steps']} steps"
        hit = f"{TARGET} after {t['seconds']:.1f} s, step {t['step']}" if t else f"never {TARGET}"
        print(f"{r['who']:8} {hit}; {end}")
    if ratio := record.get("ratio"):
        print("ours / nanoGPT: {seconds:.3f} of the time, {cpu_seconds:.3f} of the "
              "processor time".format(**ratio))  # fmt: skip
    return record


def compare(theirs: dict, ours: dict) -> dict | None:
    "Our time to the target as a share of theirs; of their whole run where they do not reach it"
    if not ours["to_target"]:
        return None
    full = {k: c[-1] for k, c in theirs["curve"].items()}
    base = theirs["to_target"] or full
    return {k: round(ours["to_target"][k] / base[k], 4) for k in ("seconds", "cpu_seconds")}


def ladder(seed: int) -> list[tuple[str, str, dict, int]]:
    "All settings that are compared: (kind, what, setting, seed)"
    rungs, setting = [("ladder", "nanoGPT's setting", START, seed)], START
    for what, fields in CHANGES:
        setting = changed(setting, fields)
        rungs.append(("ladder", what, setting, seed))
    rungs += [("detour", what, changed(setting, fields), seed) for what, fields in DETOURS]
    return rungs + [("seed", "our setting, another seed", setting, seed + i) for i in (1, 2)]


def apart(text: str, args) -> dict:
    "Time a step of every setting, all in turn; then train each for as many steps as fit"
    os.environ |= {f"{x}_NUM_THREADS": "1" for x in ("OMP", "MKL", "OPENBLAS")}
    rungs = ladder(args.seed)[:: 5 if args.quick else 1]
    rounds, steps = (1, 1) if args.quick else (6, 4)
    record = facts(text, args, threads=1) | dict(budget_seconds=args.budget, rungs=[])
    with prepared(text) as where:
        def build(setting, seed, n):
            return Ours(dict(where, seed=seed, setting=setting, steps=n))

        runs, times = [build(s, seed, 10_000) for _, _, s, seed in rungs], [[] for _ in rungs]
        for _ in range(rounds + 1):  # the first is not counted
            for run, seen in zip(runs, times):
                start = time.process_time()
                for _ in range(steps):
                    run.step()
                run.settle()
                seen.append((time.process_time() - start) / steps)
        del runs
        for (kind, what, setting, seed), seen in zip(rungs, times):
            ms = 1000 * float(np.median(seen[1:]))
            n = 2 if args.quick else round(1000 * args.budget / ms)
            run = build(setting, seed, n)
            while run.done < n:
                run.step()
            run.settle()
            row = dict(kind=kind, what=what, seed=seed, ms=round(ms, 1), steps=n,
                       n_params=run.n_params, loss=round(run.loss(), 4), setting=setting)  # fmt: skip
            record["rungs"].append(row)
            print(f"{kind} {what:42} {ms:6.1f} ms {n:5} steps  {row['loss']:.4f}", flush=True)
            write(args.apart, record)
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="Shakespeare's characters; default: data/" + NAME)
    parser.add_argument("--record", metavar="FILE", help="write the two runs as JSON")
    parser.add_argument("--apart", metavar="FILE", help="instead: one change at a time, as JSON")
    parser.add_argument("--budget", type=float, default=24, help="--apart: seconds of one core a setting")
    parser.add_argument("--turn", type=float, default=2, help="seconds one trains before the other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", default=f"two {platform.machine().replace('_', '-')} cores")
    parser.add_argument("--quick", action="store_true", help="two steps each on a little text, to try the script")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker()
    found = [p for p in ([Path(args.text)] if args.text else TEXTS) if p.is_file()]
    if not found:
        print(f"bench_shakespeare: no {args.text or TEXTS[0].relative_to(ROOT)}, nothing measured; "
              f"get it: curl --create-dirs -o data/{NAME} {URL}")  # fmt: skip
        return
    text = found[0].read_text(encoding="utf-8")
    if args.quick:
        text = text[:20_000]
    if args.apart:
        return apart(text, args)
    record = side_by_side(text, args)
    if args.record:
        write(args.record, record)
        print(f"wrote {args.record}")


if __name__ == "__main__":
    main()
