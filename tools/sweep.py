"""Train a list of small runs and leave one JSON line for each.

    python tools/sweep.py GRID.json --out RECORDS.jsonl [--workers 6] [--budget 300]

GRID.json is a list of runs, the most important first:

    {"label": "fit", "corpus": "stories", "shape": {...}, "train": {...}}

shape: fields of GPTConfig, without vocab_size; train: fields of TrainConfig. corpus: "stories", the built-in one
(with "n_stories", "vocab_size"), or a token file NAME.npy that write_tokens left, with NAME-held.npy beside it. A run
with "positions": L is also judged on windows of L tokens, position by position. Runs that OUT holds already are
skipped, so the same command goes on after an interruption; what ran out of time leaves no line.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import llmfs
from llmfs.data.stories import Stories
from llmfs.data.tokens import TokenFile, write_tokens
from llmfs.data.words import map_blocks
from llmfs.tokenizer.vocab import load_tokenizer, train_tokenizer

import numpy as np

BLOCK = 2000  # stories told by one call of a worker
HELD_OUT = 1000  # stories that judge every run
CURVE = 40  # points of a training curve
LATE = 8  # steps that may be under way at once


class Corpus(NamedTuple):
    "What runs read and what judges them."

    train: TokenFile
    held: TokenFile
    tokenizer: object = None  # None: held is judged in windows
    texts: list = ()  # held-out stories
    floor: list = ()  # nats that the grammar itself pays for each


class OutOfTime(Exception):
    "The budget was spent before the run's end."


def tell(block: int) -> list[str]:
    "One block of training stories."
    return [s.text for s in islice(Stories().stream("train", 1000 + block), BLOCK)]


def stories_files(folder: Path, n_stories: int, vocab_size: int, processes: int = 1) -> Path:
    "Training stories, held-out stories and their tokenizer, written once; the path of the first."
    path = folder / f"stories-{vocab_size}-{n_stories}.npy"
    if not path.with_suffix(".json").is_file():
        tokenizer = write_stories(path, tell, n_stories, vocab_size, processes)
        write_tokens((s.text for s in held_out()), tokenizer, held_beside(path))
    return path


def write_stories(path: Path, tell, n_stories: int, vocab_size: int, processes: int):
    "What `tell(block)` tells as a token file, and its tokenizer beside it; returned."
    tokenizer = train_tokenizer(chain.from_iterable(map(tell, range(2))), vocab_size)
    tokenizer.save(path.with_suffix(".tokenizer"))
    blocks = map_blocks(tell, range(-(-n_stories // BLOCK)), processes)
    write_tokens(islice(chain.from_iterable(blocks), n_stories), tokenizer, path, processes)
    return tokenizer


def held_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-held.npy")


def held_out() -> list:
    return list(islice(Stories().stream("validation", 1), HELD_OUT))


def open_corpus(path: str) -> Corpus:
    "The corpus of a token file."
    path = Path(path)
    train, held = TokenFile(path), TokenFile(held_beside(path))
    if not (tokenizer := path.with_suffix(".tokenizer")).is_file():
        return Corpus(train, held)
    tokenizer, stories = load_tokenizer(tokenizer), held_out()
    return Corpus(train, held, tokenizer, [s.text for s in stories], [-s.logprob for s in stories])


def name_of(run: dict) -> str:
    "A short hash of all that decides a run's result."
    told = {k: v for k, v in run.items() if k not in ("label", "path")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def padded(batch, multiple: int):
    "Columns of padding, so that few shapes of a batch occur and each is compiled once."
    from llmfs.training.data_loader import IGNORE, Batch

    more = -batch.inputs.shape[1] % multiple
    if not more:
        return batch
    fill = lambda a, value: np.pad(a, ((0, 0), (0, more)), constant_values=value)
    return Batch(fill(batch.inputs, 0), fill(batch.targets, IGNORE), None)


def trained_by(model, file: TokenFile, cfg):
    "A training step of the model and a loader of its text."
    from llmfs.training.data_loader import DataLoader
    from llmfs.training.optimizer import make_optimizer
    from llmfs.training.step import TrainStep

    rates = dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    rates |= dict(muon_lr=cfg.muon_lr) if cfg.optimizer == "muon" else {}
    step = TrainStep(model, make_optimizer(cfg.optimizer, model, **rates), cfg)
    return step, DataLoader(file, cfg.batch_size, cfg.seq_len, cfg.mode, cfg.seed)


def train(model, corpus: Corpus, cfg, pad: int, deadline: float) -> dict:
    "Train to the end of the schedule. Raises OutOfTime, FloatingPointError."
    from llmfs.training.step import lr_scale

    step, loader = trained_by(model, corpus.train, cfg)
    curve, waiting, tokens, bad = [], deque(), 0, 0
    for s in range(cfg.max_steps):
        batch = padded(next(loader), pad) if cfg.mode == "buckets" else next(loader)
        loss, _, good, n = step([batch], lr_scale(cfg, s))
        waiting.append((s + 1, loss, good))
        tokens += n
        while len(waiting) > (LATE if s + 1 < cfg.max_steps else 0):
            at, loss, good = waiting.popleft()
            curve.append((at, loss.item()))
            bad = 0 if good.item() else bad + 1
        if bad >= cfg.max_bad_steps:
            raise FloatingPointError(f"loss not finite near step {s}")
        if time.time() > deadline:
            raise OutOfTime
    return dict(tokens=tokens, curve=thinned(curve), epoch=loader.state()["epoch"])


def thinned(curve: list) -> list:
    "Means over about CURVE equal parts: [last step, loss]."
    parts = np.array_split(np.array(curve), min(CURVE, len(curve)))
    return [[int(p[-1, 0]), round(float(p[:, 1].mean()), 5)] for p in parts]


def judge(model, corpus: Corpus, cfg) -> dict:
    "Bits per byte on the held-out text; on stories also the ratio to the floor."
    from llmfs.evaluation.metrics import (
        bits_per_byte,
        evaluate_documents,
        evaluate_loss,
        floor_ratio,
    )
    from llmfs.training.data_loader import eval_batches

    if corpus.tokenizer is None:
        r = evaluate_loss(model, eval_batches(corpus.held, 32, cfg.seq_len))
        size = corpus.held.header["n_bytes"] / r.n_tokens
        bits = bits_per_byte(r.nll, r.tokens * size)
        return dict(loss=float(r.loss), loss_error=r.loss.error, bits_per_byte=float(bits),
                    bits_error=bits.error)  # fmt: skip
    r = evaluate_documents(model, corpus.tokenizer, corpus.texts, 100)
    bits, ratio = bits_per_byte(r.nll, r.n_bytes), floor_ratio(r.nll, corpus.floor)
    least = bits_per_byte(corpus.floor, r.n_bytes)
    return dict(loss=float(r.loss), loss_error=r.loss.error, bits_per_byte=float(bits),
                bits_error=bits.error, floor=float(least), ratio=float(ratio),
                ratio_error=ratio.error)  # fmt: skip


def by_position(model, corpus: Corpus, length: int, rows: int = 128) -> list[float]:
    "Mean loss at each position of windows of the held-out text, nats."
    from llmfs.evaluation.metrics import token_nll
    from llmfs.training.data_loader import eval_batches

    import mlx.core as mx

    total, count = np.zeros(length), np.zeros(length)
    for batch in islice(eval_batches(corpus.held, 16, length), rows // 16):
        nll = token_nll(model(mx.array(batch.inputs)), mx.array(batch.targets))
        total += np.array(nll.sum(0))
        count += (batch.targets >= 0).sum(0)
    return (total / count).round(4).tolist()


def perform(run: dict, deadline: float = math.inf) -> dict:
    "One run, from nothing to its record."
    from llmfs.model.transformer import GPT, GPTConfig, count_params
    from llmfs.training.step import TrainConfig

    import mlx.core as mx

    start, corpus = time.time(), open_corpus(run["path"])
    if start > deadline:
        raise OutOfTime
    cfg = TrainConfig(**run["train"])
    shape = {"max_seq_len": cfg.seq_len} | run["shape"]
    shape = GPTConfig(vocab_size=corpus.train.header["vocab_size"], **shape)
    mx.set_cache_limit(6 << 30)  # several runs share one GPU
    mx.random.seed(cfg.seed)
    model = GPT(shape)
    found = train(model, corpus, cfg, run.get("pad", 8), deadline)
    trained = time.time()
    model.eval()
    found |= judge(model, corpus, cfg)
    if run.get("positions"):
        found["by_position"] = by_position(model, corpus, run["positions"])
    found |= dict(params=count_params(shape), body_params=count_params(shape, embeddings=False),
        tokenizer=corpus.train.header["tokenizer"][:12], data=corpus.train.header["sha256"][:12],
        seconds=round(trained - start, 1), seconds_judging=round(time.time() - trained, 1))  # fmt: skip
    return record_of(run, shape, cfg, found)


def record_of(run: dict, shape, cfg, found: dict) -> dict:
    "What was found, and what every record says."
    from llmfs.hardware import hardware, pick_precision
    from llmfs.model.transformer import flops_per_token

    where, flops = hardware(), found["tokens"] * flops_per_token(shape, cfg.seq_len)
    return {"id": name_of(run), "run": {k: v for k, v in run.items() if k != "path"}} | found | dict(
        flops=flops, precision=pick_precision(cfg.precision), device=f"{where.chip} ({where.backend})",
        versions=versions())  # fmt: skip


def versions() -> dict:
    found = dict(llmfs=llmfs.__version__, python=".".join(map(str, sys.version_info[:2])))
    for name in ("mlx", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = getattr(sys.modules.get(name), "__version__", "unknown")
    return found


def read_records(path: Path) -> list[dict]:
    "The lines that were written whole; one cut short by a crash is left out."
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(path: Path, record: dict) -> None:
    with open(path, "a+b") as f:
        if f.seek(0, os.SEEK_END):
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")  # a line cut short stays by itself
        f.write(json.dumps(record).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


class Kind(NamedTuple):
    "What differs between sweeps."

    perform: object  # of a run and a deadline, its record
    files: object  # of a folder, a run and how many processes, the path of its texts
    line_of: object  # of a record and the seconds since the start, what is said of it
    told: tuple = ("stories",)  # corpora that are made here; another is a path


def results(todo: list[dict], perform, workers: int, deadline: float):
    "Pairs of a run and its future, as they finish; one worker works in this process."
    if workers == 1:
        for run in todo:
            yield run, lambda run=run: perform(run, deadline)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = {pool.submit(perform, run, deadline): run for run in todo}
        for done in as_completed(waiting):
            yield waiting[done], done.result


def sweep(runs: list[dict], out: Path, data: Path, workers: int = 1, budget: float = math.inf,
          say=partial(print, flush=True), kind: Kind | None = None) -> int:  # fmt: skip
    "Perform what is not in OUT yet; how many runs failed."
    kind, start, failed, late = kind or DENSE, time.time(), 0, 0
    known = {r["id"] for r in read_records(out)}
    todo = [run for run in runs if name_of(run) not in known]
    say(f"{len(runs)} runs, {len(todo)} to do, {workers} at a time")
    for run in todo:
        run["path"] = run["corpus"]
        if run["corpus"] in kind.told:
            run["path"] = str(kind.files(data, run, os.cpu_count() if workers > 1 else 1))
    for path in {run["path"] for run in todo if run["corpus"] not in kind.told}:
        open_corpus(path)  # says at once where a file is missing
    say(f"{time.time() - start:.0f} s: texts ready")
    for run, result in results(todo, kind.perform, workers, start + budget):
        try:
            record = result()
        except OutOfTime:
            late += 1
        except Exception as e:
            failed += 1
            say(f"{name_of(run)} {run.get('label', '')} failed: {type(e).__name__}: {e}")
        else:
            append(out, record)
            say(kind.line_of(record, time.time() - start))
    say(f"{time.time() - start:.0f} s: {len(todo) - late - failed} done, {late} out of time, {failed} failed")
    return failed


def line_of(record: dict, seconds: float) -> str:
    ratio = f"  ratio {record['ratio']:.4f}" if "ratio" in record else ""
    return (f"{seconds:.0f} s: {record['id']} {record['run'].get('label', ''):<10}{record['params']:>11,} parameters"
            f"{record['tokens']:>12,} tokens  {record['bits_per_byte']:.4f} bits/byte{ratio}"
            f"  in {record['seconds']:.0f} + {record['seconds_judging']:.0f} s")  # fmt: skip


DENSE = Kind(perform, lambda data, run, n: stories_files(data, run["n_stories"], run["vocab_size"], n), line_of)


def arguments(about: str, data: str) -> argparse.ArgumentParser:
    "Of the command line; `data`: where token files of stories go unless it is said."
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("grid", help="JSON list of runs", type=Path)
    parser.add_argument("--out", help="records, one JSON line each", type=Path, required=True)
    parser.add_argument("--data", help="folder of the stories' token files", type=Path, default=Path(data))
    parser.add_argument("--workers", help="runs at a time", type=int, default=1)
    parser.add_argument("--budget", help="seconds after which nothing goes on", type=float, default=math.inf)
    return parser


def main(args, wanted=lambda run: True, kind: Kind = DENSE) -> int:
    "The sweep of a command line; its exit code."
    runs = [run for run in json.loads(args.grid.read_text(encoding="utf-8")) if wanted(run)]
    args.data.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return min(1, sweep(runs, args.out, args.data, args.workers, args.budget, kind=kind))


if __name__ == "__main__":
    sys.exit(main(arguments(__doc__, "data/scaling").parse_args()))
