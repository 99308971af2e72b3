"""From the lines of a sweep to a record that the book plots: predict first, then look.

    python tools/scaling_record.py SWEEP.jsonl --corpus stories --out nbs/results/scaling_stories.json
    python tools/scaling_record.py SWEEP.jsonl --corpus stories --out nbs/results/scaling_stories.json --look

The first call keeps the runs labelled "fit" (and "small", "seed", "rate"), fits the law to those of "fit", and writes where the run
labelled "largest" should end; of that run it reads its size and nothing else, or, with --plan GRID.json, the size it will have, before it was made. The second adds what it reached, and refuses
where the prediction in the record is not the one that the runs in it give. With --positions it keeps the runs labelled
"positions" and their loss by position instead.
"""

import argparse
import json
import sys
from pathlib import Path

import llmfs
from llmfs.evaluation.scaling import fit_law

import numpy as np

SHARE, DRAWS, DELTA = 0.9, 1000, 0.2
SIZES = ("params", "body_params", "tokens", "flops")
REACHED = ("loss", "loss_error", "bits_per_byte", "bits_error", "floor", "ratio", "ratio_error", "epoch", "curve")


def corpus_of(line: dict) -> str:
    return Path(line["run"]["corpus"]).stem


def short(line: dict, reached: bool = True) -> dict:
    "What the book needs of a line."
    run, keys = line["run"], SIZES + (REACHED if reached else ())
    about = dict(label=run["label"], shape=run["shape"], train=run["train"], seconds=line["seconds"])
    return about | {k: rounded(line[k]) for k in keys if k in line}


def rounded(x):
    return float(f"{x:.7g}") if isinstance(x, float) else x


def measure(runs: list[dict], stories: bool) -> tuple[np.ndarray, float | None]:
    "What the law is about: the ratio to the floor on stories, bits per byte elsewhere."
    return np.array([r["ratio" if stories else "bits_per_byte"] for r in runs]), 1.0 if stories else None


def used(runs: list[dict], least_tokens: float) -> list[dict]:
    return [r for r in runs if r["label"] == "fit" and r["tokens"] >= least_tokens]


def predict(runs: list[dict], size: dict, stories: bool, params: str, least_tokens: float) -> dict:
    "Where a run of this size should end."
    fit = used(runs, least_tokens)
    loss, floor = measure(fit, stories)
    columns = {name: np.array([r[key] for r in fit]) for name, key in (("params", params), ("tokens", "tokens"))}
    law = fit_law(loss, floor, DRAWS, delta=DELTA, **columns)
    where = law.interval(SHARE, params=size[params], tokens=size["tokens"])
    return dict(
        of="ratio" if stories else "bits_per_byte", params=params, least_tokens=least_tokens, share=SHARE, delta=DELTA,
        runs=len(fit), size={k: size[k] for k in SIZES}, low=rounded(where.low), middle=rounded(where.middle),
        high=rounded(where.high), floor=rounded(law.floor), exponent={k: rounded(v) for k, v in law.exponent.items()},
        scale={k: rounded(v) for k, v in law.scale.items()}, spread=rounded(law.spread))  # fmt: skip


def planned(run: dict, lines: list[dict]) -> dict:
    "What is known of a run before it is made; a step takes as many tokens as those of the other runs."
    from llmfs.model.transformer import GPTConfig, count_params, flops_per_token

    steps = lambda x: x["run"]["train"]["max_steps"]
    each = [x["tokens"] / steps(x) for x in lines if x["run"]["train"]["batch_size"] == run["train"]["batch_size"]]
    tokens = round(run["train"]["max_steps"] * sum(each) / len(each))
    length = run["train"]["seq_len"]
    shape = GPTConfig(**{"max_seq_len": length, "vocab_size": run["vocab_size"]} | run["shape"])
    return dict(
        label=run["label"], shape=run["shape"], train=run["train"], params=count_params(shape),
        body_params=count_params(shape, embeddings=False), tokens=tokens,
        flops=tokens * flops_per_token(shape, length))  # fmt: skip


def first(lines: list[dict], args) -> dict:
    "A record with a prediction and without what it is about."
    runs = [short(x) for x in lines if x["run"]["label"] in ("fit", "small", "seed", "rate")]
    largest = [short(x, reached=False) for x in lines if x["run"]["label"] == "largest"]
    if args.plan:
        grid = json.loads(args.plan.read_text(encoding="utf-8"))
        largest = [planned(r, lines) for r in grid if r["label"] == "largest" and Path(r["corpus"]).stem == args.corpus]
    record = dict(
        what=args.what, corpus=args.corpus, device=lines[0]["device"], versions=lines[0]["versions"],
        precision=lines[0]["precision"], tokenizer=lines[0]["tokenizer"], data=lines[0].get("data"))  # fmt: skip
    given = (args.corpus == "stories", args.params, args.least_tokens)
    record["prediction"] = predict(runs, largest[0], *given) if largest else None
    return record | dict(largest=largest[0] if largest else None, runs=runs)


def look(record: dict, lines: list[dict]) -> dict:
    "The record with what the largest run reached."
    p = record["prediction"]
    again = predict(record["runs"], p["size"], record["corpus"] == "stories", p["params"], p["least_tokens"])
    if any(abs(again[k] - p[k]) > 1e-4 * p[k] for k in ("low", "middle", "high")):
        raise ValueError("the prediction in the record is not the one that its runs give")
    largest = [short(x) for x in lines if x["run"]["label"] == "largest"]
    return record | dict(largest=largest[0])


def positions(lines: list[dict], args) -> dict:
    "The record of the runs that differ in how they tell positions."
    kept = [x for x in lines if x["run"]["label"] == "positions"]
    run = kept[0]["run"]
    reached = ("params", "tokens", "seconds", "bits_per_byte", "bits_error")
    runs = [dict(kind=x["run"]["shape"]["positions"], seed=x["run"]["train"]["seed"],
                 by_position=x["by_position"], **{k: rounded(x[k]) for k in reached}) for x in kept]  # fmt: skip
    about = {k: kept[0][k] for k in ("device", "versions", "precision", "data")}
    return dict(what=args.what, corpus=args.corpus) | about | dict(
        shape=run["shape"], train=run["train"], trained=run["train"]["seq_len"], length=run["positions"],
        runs=runs)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sweep", help="JSON lines of tools/sweep.py", type=Path)
    parser.add_argument("--corpus", help="stories, or the stem of a token file", required=True)
    parser.add_argument("--out", help="the record", type=Path, required=True)
    parser.add_argument("--look", help="add what the largest run reached", action="store_true")
    parser.add_argument("--plan", help="grid with the run that is not made yet", type=Path)
    parser.add_argument("--positions", help="record loss by position", action="store_true")
    parser.add_argument("--params", help="params or body_params: which the law counts", default="body_params")
    parser.add_argument("--least-tokens", help="fit only runs of so many tokens", type=float, default=0)
    parser.add_argument("--what", help="first line of the record", default="A sweep of tools/sweep.py.")
    args = parser.parse_args()
    lines = [json.loads(x) for x in args.sweep.read_text(encoding="utf-8").splitlines()]
    lines = [x for x in lines if corpus_of(x) == args.corpus]
    make = positions if args.positions else first
    record = look(json.loads(args.out.read_text(encoding="utf-8")), lines) if args.look else make(lines, args)
    text = json.dumps(record, ensure_ascii=False)
    for cut in ('"prediction": ', '"largest": ', '"runs": '):
        text = text.replace(cut, "\n" + cut)
    for run in ('{"label"', '{"kind"'):
        text = text.replace(run, "\n" + run)
    args.out.write_text(text + "\n", encoding="utf-8")
    if p := record.get("prediction"):
        print(f"{p['of']} {p['middle']} ({p['low']} to {p['high']}) from {p['runs']} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
