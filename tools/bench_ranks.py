"""Tokens a second of the real training step on 1 and N devices, and whether they compute the same.

    python tools/bench_ranks.py --devices 1 2 --model-size 124m --json ranks.json

It starts the processes itself, with the environment that mlx.launch sets: on CUDA NCCL, each rank on a GPU of its own;
elsewhere the ring on this machine (`--backend ring --model-size tiny --batch-per-device 4 --seq-len 64 --precision float32`).
A part that fails or takes too long leaves its error in the record, and the next one runs.
"""

import argparse
import gc
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import llmfs  # noqa: E402
from llmfs.hardware import hardware  # noqa: E402
from llmfs.model.transformer import GPT, count_params, flops_per_token, preset  # noqa: E402
from llmfs.training.data_loader import Batch  # noqa: E402
from llmfs.training.distributed import Ranks, join_ranks  # noqa: E402
from llmfs.training.optimizer import make_optimizer  # noqa: E402
from llmfs.training.sharding import Shards  # noqa: E402
from llmfs.training.step import TrainConfig, TrainStep  # noqa: E402
from llmfs.training.tracking import OneProcess  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

MIB = 2**20


class Tuned(Ranks):
    "Ranks that try other ways to average the gradients"

    def tune(self, bundle_mib=32, message="float32", stream=False):
        self.bundle, self.message = int(bundle_mib * MIB), getattr(mx, message)
        own = stream and mx.default_device() == mx.Device(mx.gpu)
        self.stream = mx.new_stream(mx.default_device()) if own else None
        return self

    def mean(self, tree):
        loss, grads = tree
        loss = mx.distributed.all_sum(loss, group=self.group) / self.size
        names, grads = zip(*tree_flatten(grads)[::-1])  # as they arrive: the last layer's first
        grads = [g.astype(self.message) for g in grads]
        grads = nn.average_gradients(grads, self.group, self.bundle, self.stream)
        return loss, tree_unflatten(list(zip(names, grads)))


def cases(a, n):
    "What is run on n devices"
    weak = dict(kind="speed", batch=a.batch_per_device * n)
    yield weak | dict(name="weak")
    yield dict(name="equal", kind="losses", batch=a.equal_batch)
    if n == 1:
        if a.strong_batch != a.batch_per_device:
            yield dict(name="strong", kind="speed", batch=a.strong_batch)
        return
    yield dict(name="strong", kind="speed", batch=a.strong_batch)
    yield weak | dict(name="apart", ranks="apart")
    yield weak | dict(name="shard", ranks="shard")
    yield weak | dict(name="shard, recomputed", ranks="shard", recompute=True)
    yield dict(name="equal, shard", kind="losses", batch=a.equal_batch, ranks="shard")
    yield dict(name="messages", kind="messages")
    for mib in a.bundle_mib:
        for message in a.message:
            for stream in a.stream:
                if (mib, message, stream) != (32, "float32", 0):
                    how = dict(bundle_mib=mib, message=message, stream=bool(stream))
                    name = f"weak, {mib:g} MiB, {message}" + ", own stream" * bool(stream)
                    yield weak | dict(name=name, ranks="tuned", how=how)


# What a rank does


def build(a, case, ranks):
    "The step, the batch of this rank, and how to restart"
    mx.random.seed(0)
    L = a.seq_len if case["kind"] == "speed" else min(a.seq_len, a.equal_len)
    precision = a.precision if case["kind"] == "speed" else a.equal_precision
    shape = preset(a.model_size, vocab_size=a.vocab, max_seq_len=L)
    cfg = TrainConfig(batch_size=case["batch"], seq_len=L, precision=precision, max_steps=10_000,
                      optimizer=a.optimizer, grad_checkpoint=bool(case.get("recompute")))  # fmt: skip
    model = GPT(shape)
    optimizer = make_optimizer(a.optimizer, model, lr=1e-3)
    model, optimizer = ranks.hold(model, optimizer) if ranks.size > 1 else (model, optimizer)
    rows = ranks.rows(case["batch"])
    ids = np.random.default_rng(1).integers(0, a.vocab, (case["batch"], L + 1), dtype=np.int32)
    mine = ids[ranks.rank * rows : (ranks.rank + 1) * rows]
    return TrainStep(model, optimizer, cfg, ranks), [Batch(mine[:, :-1], mine[:, 1:], None)], shape


class Loop:
    "Steps as the trainer takes them: one is read while the next one is computed"

    def __init__(self, step, batches, ranks):
        self.step, self.batches, self.ranks, self.pending = step, batches, ranks, []

    def take(self, n):
        losses = []
        for _ in range(n):
            news = self.ranks.post(0.0, False)
            self.pending.append((self.step(self.batches, 1.0), news))
            losses += self.settle(1)
        return losses + self.settle(0)

    def settle(self, leave):
        losses = []
        while len(self.pending) > leave:
            (loss, *_), news = self.pending.pop(0)
            losses.append(loss.item())
            self.ranks.hear(news)
        return losses


def speed(a, case, ranks):
    mx.reset_peak_memory()
    step, batches, shape = build(a, case, ranks)
    loop = Loop(step, batches, ranks)
    start = time.perf_counter()
    first = loop.take(1)[0]
    compiled = time.perf_counter() - start
    loop.take(a.warmup)
    seconds = []
    for _ in range(a.repeats):
        ranks.wait()
        start = time.perf_counter()
        last = loop.take(a.steps)[-1]
        seconds.append((time.perf_counter() - start) / a.steps)
    tokens = case["batch"] * a.seq_len
    s = statistics.median(seconds)
    return dict(tokens_per_second=tokens / s, seconds_a_step=s, all_seconds=seconds, first_step=compiled,
                peak_bytes=mx.get_peak_memory(), first_loss=first, last_loss=last,
                tflops_a_device=flops_per_token(shape, a.seq_len) * tokens / s / 1e12 / ranks.size)  # fmt: skip


def losses(a, case, ranks):
    step, batches, _ = build(a, case, ranks)
    found = Loop(step, batches, ranks).take(a.equal_steps)
    agree = None
    if ranks.size > 1:
        whole = [p for n, p in tree_flatten(step.model.parameters()) if ".module." not in n]
        sums = ranks.gather([float(mx.abs(p).sum()) for p in whole])
        agree = bool((sums == sums[0]).all())
        heard = ranks.gather(found)
        agree = agree and bool((heard == heard[0]).all())
    return dict(losses=found, ranks_agree=agree)


def messages(a, case, ranks):
    "GB/s of all_sum, counted as NCCL's bus bandwidth"
    found = {}
    for mib in a.message_mib:
        x = mx.ones(int(mib * MIB // 4))
        mx.eval(x)

        def once(x=x):
            y = x
            for _ in range(10):
                y = mx.distributed.all_sum(y, group=ranks.group) / ranks.size
            mx.eval(y)

        once()
        seconds = []
        for _ in range(3):
            ranks.wait()
            start = time.perf_counter()
            once()
            seconds.append((time.perf_counter() - start) / 10)
        moved = 2 * (ranks.size - 1) / ranks.size * mib * MIB
        found[f"{mib:g} MiB"] = moved / statistics.median(seconds) / 1e9
    return dict(bus_gb_per_second=found)


KINDS = dict(speed=speed, losses=losses, messages=messages)


def worker(a):
    "One rank: the cases it is told, a line of JSON for each"
    todo, out = json.loads(a.worker), Path(a.out)
    ranks = join_ranks(Tuned, patience=60)
    out = out.with_suffix(f".{ranks.rank}")
    with open(out, "a") as f:
        for case in todo:
            print(json.dumps({"begun": case["name"]}), file=f, flush=True)
            try:
                kind = case.get("ranks")
                here = ranks
                if kind == "apart":
                    here = Apart(ranks)
                elif kind == "shard":
                    here = Shards(ranks.group)
                elif ranks.size > 1:
                    here = ranks.tune(**case.get("how", {}))
                found = KINDS[case["kind"]](a, case, here)
            except Exception as e:
                found = dict(error=f"{type(e).__name__}: {e}", trace=traceback.format_exc()[-1500:])
            print(json.dumps(case | found), file=f, flush=True)
            if "error" in found and ranks.size > 1:
                sys.exit(1)  # the others may stand elsewhere: the driver starts all anew
            gc.collect()
            mx.clear_cache()


class Apart(OneProcess):
    "The same work at the same time, with nothing exchanged: what the machine could do at best"

    def __init__(self, ranks):
        self.rank, self.size, self.others = 0, 1, ranks

    def rows(self, batch_size):
        return batch_size // self.others.size

    def wait(self):
        self.others.wait()


def dying(a):
    "Steps for ever; the last rank is killed after a few"
    ranks = join_ranks(Tuned, patience=60).tune()
    case = dict(kind="losses", batch=a.equal_batch)
    step, batches, _ = build(a, case, ranks)
    loop = Loop(step, batches, ranks)
    with ranks.guard("checkpoints"):
        for i in range(10**9):
            loop.take(1)
            if i == 5 and ranks.rank == ranks.size - 1:
                Path(a.out).with_suffix(".died").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)


# What starts the ranks


def free_ports(n):
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def environments(a, n, folder):
    "What mlx.launch would set for each rank"
    ports = free_ports(n)
    hosts = Path(folder, "hosts.json")
    hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in ports]) if n > 1 else "")
    gpus = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g] or None
    for rank in range(n):
        env = dict(os.environ, MLX_RANK=str(rank), PYTHONUNBUFFERED="1")
        if a.backend == "nccl":
            env |= dict(NCCL_HOST_IP="127.0.0.1", NCCL_PORT=str(ports[0]), MLX_WORLD_SIZE=str(n),
                        CUDA_VISIBLE_DEVICES=gpus[rank] if gpus else str(rank))  # fmt: skip
        else:
            env |= dict(MLX_HOSTFILE=str(hosts))
        yield env


def start(a, n, folder, *more):
    args = [sys.executable, __file__, *a.given, *more]
    ranks = []
    for rank, env in enumerate(environments(a, n, folder)):
        err = open(Path(folder, f"err.{rank}"), "ab")
        ranks.append(subprocess.Popen(args, env=env, cwd=HERE, stdout=err, stderr=err))
    return ranks


def attend(ranks, seconds):
    "Wait as mlx.launch does: one that fails ends the others. Returns what happened"
    end, asked = time.time() + seconds, None
    while any(p.poll() is None for p in ranks):
        failed = [p.poll() for p in ranks if p.poll()]
        if asked is None and (failed or time.time() > end):
            asked = time.time()
            for p in ranks:
                p.terminate()
        if asked and time.time() > asked + 60:
            for p in ranks:
                p.kill()
        time.sleep(0.1)
    codes = [p.wait() for p in ranks]
    return codes, ("" if asked is None else f"exit codes {codes}" + (", timed out" if time.time() > end else ""))


def tail(folder, rank, n=600):
    path = Path(folder, f"err.{rank}")
    return path.read_text(errors="replace")[-n:] if path.exists() else ""


def run_all(a, n, note):
    "All cases on n devices; after a failure the rest is started anew"
    todo = [c for c in cases(a, n) if not a.only or c["name"] in a.only]
    while todo:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "found")
            ranks = start(a, n, folder, "--worker", json.dumps(todo), "--out", str(out))
            codes, trouble = attend(ranks, a.timeout)
            path = out.with_suffix(".0")
            lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
            done = [x for x in lines if "kind" in x]
            for x in done:
                note(n, x)
            left = todo[len(done) :]
            if left and (trouble or len(done) < len(todo)):
                failed = bool(done and "error" in done[-1])
                if not failed:
                    words = " | ".join(tail(folder, r) for r in range(n))
                    note(n, left.pop(0) | dict(error=trouble or "ended early", stderr=words))
            todo = left


def lose_one(a, n, note):
    "Kill the last rank, as mlx.launch would see it, and time the others' end"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found")
        ranks = start(a, n, folder, "--dying", "--out", str(out))
        codes, _ = attend(ranks, a.timeout)
        died = out.with_suffix(".died")
        found = dict(name="a rank is killed", kind="lost", exit_codes=codes)
        if died.exists():
            found |= dict(seconds_to_end=time.time() - float(died.read_text()))
        found["last_words"] = [tail(folder, r).strip().rpartition("\n")[2][-300:] for r in range(n - 1)]
        note(n, found)


def launched_by_mlx(a, n, note):
    "One case through MLX's own launcher"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found")
        case = dict(name="mlx.launch", kind="losses", batch=a.equal_batch)
        code = "from mlx._distributed_utils.launch import main; main()"
        args = [sys.executable, "-c", code, "-n", str(n), "--backend", a.backend,
                "--starting-port", str(free_ports(1)[0]), "--nccl-port", str(free_ports(1)[0]), "--",
                sys.executable, str(Path(__file__).resolve()), *a.given,
                "--worker", json.dumps([case]), "--out", str(out)]  # fmt: skip
        try:
            done = subprocess.run(args, cwd=HERE, timeout=a.timeout, capture_output=True, text=True,
                                  stdin=subprocess.DEVNULL)  # fmt: skip
            path = out.with_suffix(".0")
            lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
            found = [x for x in lines if "kind" in x]
            note(n, found[0] if found else case | dict(error=f"no result: {done.stderr[-600:]}"))
        except subprocess.TimeoutExpired:
            note(n, case | dict(error="timed out"))


def summary(found):
    "Efficiencies, and the largest differences of losses"
    at = {(c["devices"], c["name"]): c for c in found if "error" not in c}
    sizes = sorted({c["devices"] for c in found})
    rate = lambda n, name: at[n, name]["tokens_per_second"] if (n, name) in at else None
    rows = []
    for n in sizes[1:] if sizes and sizes[0] == 1 else []:
        base = rate(1, "weak")
        strong = rate(1, "strong") or base
        row = dict(devices=n)
        for name in sorted({k[1] for k in at if k[0] == n and "tokens_per_second" in at[k]}):
            if r := rate(n, name):
                ref = strong if name == "strong" else base
                row[name] = dict(tokens_per_second=round(r), of_linear=round(r / (n * ref), 4) if ref else None)
        one = at.get((1, "equal"))
        for name in ("equal", "equal, shard", "mlx.launch"):
            if one and (n, name) in at:
                pairs = zip(one["losses"], at[n, name]["losses"], strict=True)
                row[f"{name}: largest difference"] = max(abs(x - y) for x, y in pairs)
        rows.append(row)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--devices", type=int, nargs="+", default=[1, 2])
    add("--model-size", default="124m")
    add("--batch-per-device", type=int, default=32)
    add("--strong-batch", type=int, help="rows on all devices together (default: --batch-per-device)")
    add("--seq-len", type=int, default=1024)
    add("--vocab", type=int, default=50_304)
    add("--precision", default="bfloat16")
    add("--optimizer", default="muon")
    add("--backend", default="nccl" if mx.cuda.is_available() else "ring", choices=["nccl", "ring"])
    add("--bundle-mib", type=float, nargs="*", default=[8, 32, 128, 1024])
    add("--message", nargs="*", default=["float32", "bfloat16"])
    add("--stream", type=int, nargs="*", default=[0], help="1: messages on a stream of their own")
    add("--message-mib", type=float, nargs="*", default=[1, 32, 512])
    add("--steps", type=int, default=20)
    add("--warmup", type=int, default=5)
    add("--repeats", type=int, default=3)
    add("--equal-batch", type=int, default=8)
    add("--equal-len", type=int, default=256)
    add("--equal-steps", type=int, default=20)
    add("--equal-precision", default="float32")
    add("--only", nargs="*", help="names of cases, as in the record; also: lost, launch")
    add("--timeout", type=float, default=240, help="seconds for all cases of one start")
    add("--json", help="record to write")
    add("--worker", help=argparse.SUPPRESS)
    add("--dying", action="store_true", help=argparse.SUPPRESS)
    add("--out", help=argparse.SUPPRESS)
    a = p.parse_args()
    a.given = sys.argv[1:]
    a.strong_batch = a.strong_batch or a.batch_per_device
    if a.worker:
        return worker(a)
    if a.dying:
        return dying(a)
    found, began = [], time.time()
    h = hardware()
    shape = preset(a.model_size, vocab_size=a.vocab, max_seq_len=a.seq_len)
    record = dict(date=date.today().isoformat(), device=h.chip, backend=a.backend, mlx=mx.__version__,
                  llmfs=llmfs.__version__, python=platform.python_version(), parameters=count_params(shape),
                  settings={k: v for k, v in vars(a).items() if k not in ("given", "worker", "dying", "out", "json")},
                  cases=found)  # fmt: skip

    def note(n, case):
        case = dict(devices=n) | {k: v for k, v in case.items() if k != "begun"}
        found.append(case)
        what = case.get("error") or {k: case[k] for k in ("tokens_per_second", "losses", "bus_gb_per_second",
                                                          "seconds_to_end") if k in case}  # fmt: skip
        if isinstance(what, dict) and "losses" in what:
            what = f"loss {what['losses'][0]:.6f} … {what['losses'][-1]:.6f}, ranks agree: {case['ranks_agree']}"
        print(f"{n} × {case['name']}: {what}", flush=True)
        record.update(summary=summary(found), seconds=round(time.time() - began))
        if a.json:
            Path(a.json).write_text(json.dumps(record, indent=1) + "\n")

    for n in a.devices:
        run_all(a, n, note)
        if n > 1 and (not a.only or "launch" in a.only):
            launched_by_mlx(a, n, note)
        if n > 1 and (not a.only or "lost" in a.only):
            lose_one(a, n, note)
    print(json.dumps(record.get("summary"), indent=1))


if __name__ == "__main__":
    main()
