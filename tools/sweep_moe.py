"""Train dense models and mixtures of experts on the same text, and note where the routers send each part of it.

    python tools/sweep_moe.py nbs/results/moe_grid.json --out RECORDS.jsonl [--workers 6] [--budget 280]

The grid is a list of runs, the most important first: {"label", "corpus", "shape", "train", ...}. shape: fields of
GPTConfig, or with "kind": "moe" of MoEConfig, without vocab_size; train: fields of TrainConfig. corpus: "stories" or
"ledger", who likes what and nothing else (both with "n_stories", "n_facts", "vocab_size"; a ledger also with "often"),
or a token file as in sweep.py. "watch": so many times on the way, the load of each expert is noted. Runs that OUT
holds already are skipped; what ran out of time leaves no line.
"""

import json
import math
import sys
import time
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

from llmfs.data.stories import Stories, tell
from llmfs.data.tokens import TokenFile
from llmfs.tokenizer.vocab import load_tokenizer

import numpy as np
import sweep
from ledger import Ledger

HELD_OUT = 1000  # stories that judge every run
LATE = 2  # steps that may be under way at once
WATCHED = 64  # of them, whose routing is looked at
GROUPS = {"say": "fixed text", "pick": "choice", "recall": "recall"}
TOLD = "stories", "ledger"  # corpora that are made here


def story_marks(text: str, world: Stories) -> list[tuple[int, str, str]]:
    "End, slot and group of each part of a story."
    from llmfs.data.stories import _Reader

    class Marking(_Reader):
        def follow(self, ops, memory):
            for op in ops:
                super().follow([op], memory)
                slot = "fixed text" if op.kind == "say" else op.text
                group = "fact" if op.text == "fact" else GROUPS[op.kind]
                marks.append((self.at, slot, group))

    marks, reader = [], Marking(text, world)
    tell(world, reader)
    return marks


def parts_of(text: str, ids, tokenizer, world) -> list[tuple[str, str]]:
    "Slot and group of each token: those of its last character."
    marks = iter(world.marks(text) if isinstance(world, Ledger) else story_marks(text, world))
    end, slot, group = next(marks)
    at, found = 0, []
    for i in ids:
        at += len(tokenizer.decode([i]).encode())
        while at > end:
            end, slot, group = next(marks)
        found.append((slot, group))
    return found


def world_of(corpus: str, n_facts: int, often: int):
    return Ledger(n_facts, often) if corpus == "ledger" else Stories(n_facts)


def key_of(run: dict) -> tuple:
    "What `world_of` makes a run's world from."
    return run["corpus"], run["n_facts"], run.get("often", 1)


def tell_block(block: int, world) -> list[str]:
    return [s.text for s in islice(world.stream("train", 1000 + block), sweep.BLOCK)]


def text_files(folder: Path, run: dict, processes: int) -> Path:
    "Training texts and their tokenizer, written once."
    n, V, key = run["n_stories"], run["vocab_size"], key_of(run)
    path = folder / f"{'-'.join(map(str, key))}-{V}-{n}.npy"
    if not path.with_suffix(".json").is_file():
        sweep.write_stories(path, partial(tell_block, world=world_of(*key)), n, V, processes)
    return path


@lru_cache(2)
def exam_of(path: Path, key: tuple):
    return Exam(path, world_of(*key))


class Exam:
    "Held-out texts as rows of ids, each token with its part of the grammar."

    def __init__(self, path: Path, world):
        tok = load_tokenizer(path.with_suffix(".tokenizer"))
        stories = list(islice(world.stream("validation", 1), HELD_OUT))
        self.tokenizer, self.texts = tok, [s.text for s in stories]
        self.floor = [-s.logprob for s in stories]
        ids = [tok.encode(s.text) for s in stories]
        length = max(map(len, ids)) + 1
        self.ids = np.full((len(ids), length), tok.eot_id, np.int32)
        self.parts = np.full((len(ids), length), -1, np.int16)
        self.names = {}
        for row, (story, one) in enumerate(zip(stories, ids)):
            self.ids[row, 1 : len(one) + 1] = one
            marks = parts_of(story.text, one, tok, world)
            index = [self.names.setdefault(m, len(self.names)) for m in marks]
            self.parts[row, 1 : len(one) + 1] = index


def nats_by_group(model, exam: Exam, rows: int = 50) -> dict:
    "Mean loss of the tokens of each part: {group: [nats a token, tokens]}."
    from llmfs.evaluation.metrics import token_nll

    import mlx.core as mx

    total = {}
    for at in range(0, len(exam.ids), rows):
        x, parts = exam.ids[at : at + rows], exam.parts[at : at + rows, 1:]
        nll = np.array(token_nll(model(mx.array(x[:, :-1])), mx.array(x[:, 1:])))
        for (_, group), i in exam.names.items():
            hit, old = parts == i, total.get(group, (0.0, 0))
            total[group] = old[0] + float(nll[hit].sum()), old[1] + int(hit.sum())
    return {g: [round(s / n, 5), n] for g, (s, n) in total.items() if n}


def watch(model, tokens) -> dict:
    "Load of each expert and entropy of the router, in each layer."
    from llmfs.model.moe import routing
    from llmfs.model.router import expert_load

    choices, entropy = routing(model, tokens), []
    for c in choices:
        p = np.array(c.score, np.float64)
        p /= p.sum(-1, keepdims=True)
        entropy.append(float(-(p * np.log(p + 1e-12)).sum(-1).mean()))
    return dict(load=expert_load(choices).round(4).tolist(), entropy=np.round(entropy, 4).tolist())


def who_goes_where(model, exam: Exam) -> dict:
    "At the end: how often each expert was chosen for each slot, and the words it saw most."
    from llmfs.model.moe import routing

    import mlx.core as mx

    x, parts = exam.ids[:WATCHED], exam.parts[:WATCHED].ravel()
    E, names = model.cfg.n_experts, {i: n for n, i in exam.names.items()}
    slots, words = [], []
    for c in routing(model, mx.array(x)):
        chosen = np.array(c.chosen)
        seen = {f"{g}: {s}" if g != s else s: np.bincount(chosen[parts == i].ravel(), minlength=E).tolist()
                for i, (s, g) in sorted(names.items())}  # fmt: skip
        slots.append(seen)
        words.append([favourites(x.ravel()[(chosen == e).any(1) & (parts >= 0)], exam) for e in range(E)])
    return dict(slots=slots, words=words)


def favourites(ids, exam: Exam, n: int = 8) -> list:
    "The tokens that an expert saw most often."
    seen, count = np.unique(ids, return_counts=True)
    order = np.argsort(-count)[:n]
    return [[exam.tokenizer.decode([int(seen[i])]), int(count[i])] for i in order]


def train(model, file: TokenFile, cfg, deadline: float, looks: int, tokens) -> dict:
    "Train to the end of the schedule, looking at the routers on the way. Raises OutOfTime, FloatingPointError."
    from llmfs.training.step import lr_scale

    step, loader = sweep.trained_by(model, file, cfg)
    marks = {round(cfg.max_steps * (i + 1) / looks) for i in range(looks)}
    curve, seen, looking, waiting = [], [], 0.0, []
    for s in range(cfg.max_steps):
        waiting.append(step([next(loader)], lr_scale(cfg, s))[0])
        if s + 1 in marks:
            start = time.time()
            seen.append(dict(step=s + 1) | watch(model, tokens))
            looking += time.time() - start
        if len(waiting) == LATE or s + 1 == cfg.max_steps:
            curve += [(s + 1 - len(waiting) + j, x.item()) for j, x in enumerate(waiting, 1)]
            waiting.clear()
            if not math.isfinite(curve[-1][1]):
                raise FloatingPointError(f"loss not finite near step {s}")
        if time.time() > deadline:
            raise sweep.OutOfTime
    return dict(curve=sweep.thinned(curve), watched=seen, looking=looking)


def perform(run: dict, deadline: float = math.inf) -> dict:
    "One run, from nothing to its record."
    from llmfs.model import moe  # noqa: F401  (makes its kind of config known)
    from llmfs.model.transformer import GPT, GPTConfig, count_params
    from llmfs.training.step import TrainConfig

    import mlx.core as mx

    if time.time() > deadline:
        raise sweep.OutOfTime
    mx.set_cache_limit(1 << 30)  # several workers share a GPU
    path, cfg = Path(run["path"]), TrainConfig(**run["train"])
    file, told = TokenFile(path), run["corpus"] in TOLD
    shape = dict(vocab_size=file.header["vocab_size"], max_seq_len=cfg.seq_len) | run["shape"]
    shape, exam = GPTConfig.from_dict(shape), None
    if told:
        exam = exam_of(path, key_of(run))
    mx.random.seed(cfg.seed)
    model, start = GPT(shape), time.time()
    ids = exam.ids[:WATCHED][exam.parts[:WATCHED] >= 0] if told else file.ids
    looked = ids[: len(ids[: 16384]) // cfg.seq_len * cfg.seq_len].reshape(-1, cfg.seq_len)
    sparse = shape.kind == "moe"
    looks = run.get("watch", 0) if sparse else 0
    found = train(model, file, cfg, deadline, looks, mx.array(looked.astype(np.int32)))
    seconds = time.time() - start - found.pop("looking")
    model.eval()
    if told:
        corpus = sweep.Corpus(file, None, exam.tokenizer, exam.texts, exam.floor)
        found |= sweep.judge(model, corpus, cfg) | dict(parts=nats_by_group(model, exam))
        found |= who_goes_where(model, exam) if sparse and run.get("where") else {}
    else:
        found |= sweep.judge(model, sweep.open_corpus(path), cfg)
    found["tokens"] = cfg.max_steps * cfg.batch_size * cfg.grad_accum * cfg.seq_len
    found |= dict(params=count_params(shape), active=count_params(shape, active=True), seconds=round(seconds, 1))
    return sweep.record_of(run, shape, cfg, found)


def line_of(r: dict, seconds: float) -> str:
    run, fact = r["run"], r.get("parts", {}).get("fact", ["", 0])[0]
    return (f"{seconds:.0f} s: {run['label']:<26} seed {run['train'].get('seed', 0)} "
            f"{r['bits_per_byte']:.4f} bits/byte  fact {fact}  {r['seconds']:.0f} s")  # fmt: skip


def condense(records: Path, folder: Path) -> None:
    "moe_runs.json and moe_routing.json of the book from the lines of a sweep."
    rows, watched, seen = [], [], set()
    for r in sweep.read_records(records):
        run = r["run"]
        key = dict(label=run["label"], seed=run["train"].get("seed", 0))
        if (mark := (key["label"], key["seed"])) in seen:
            continue
        seen.add(mark)
        plain = ("params", "active", "flops", "tokens", "loss", "bits_per_byte", "ratio", "floor", "parts", "seconds")
        about = {k: r[k] for k in ("device", "precision", "versions")}
        rows.append(key | dict(steps=run["train"]["max_steps"]) | {k: r[k] for k in plain if k in r}
                    | dict(curve=r["curve"][::4] if key["seed"] == 0 else []) | about)  # fmt: skip
        if r["watched"] and (run["watch"] >= 20 or "balance" in key["label"]):
            more = {k: r[k] for k in ("slots", "words") if k in r}
            watched.append(key | dict(watched=r["watched"]) | more | about)
    order = lambda x: (x["label"], x["seed"])
    for name, found in (("moe_runs", rows), ("moe_routing", watched)):
        lines = [json.dumps(x) for x in sorted(found, key=order)]
        text = "[\n" + ",\n".join(lines) + "\n]\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> int:
    parser = sweep.arguments(__doc__, "data/sweep")
    parser.add_argument("--only", default="", help="runs whose label contains this")
    parser.add_argument("--condense", type=Path, help="only write the book's records of OUT into this folder")
    args = parser.parse_args()
    if args.condense:
        condense(args.out, args.condense)
        return 0
    kind = sweep.Kind(perform, text_files, line_of, TOLD)
    return sweep.main(args, lambda run: args.only in run["label"], kind)


if __name__ == "__main__":
    sys.exit(main())
