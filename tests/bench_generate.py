"""Generation beside mlx-lm on the same exported folder: python tests/bench_generate.py [--help]

A model with random weights is exported; llmfs and mlx-lm load that folder and write the same
number of tokens from the same prompts, turn about in one process: greedily, and drawn at
temperature 1. The rate is new tokens a second of the whole call: prefill, decoding, text.
`--record FILE` leaves what was measured, one entry a machine and precision, case by case; the
chapter on serving prints it. `--merge FILE` adds the entries of another machine's record and measures
nothing. Where mlx-lm is missing, llmfs is measured alone.
"""

import argparse
import json
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import llmfs  # noqa: E402, F401  before mlx
from llmfs.evaluation.generate import Sampling, generate_batch, stream  # noqa: E402
from llmfs.hardware import hardware  # noqa: E402
from llmfs.model.pretrained import read_pretrained, write_pretrained  # noqa: E402
from llmfs.model.transformer import GPT, preset  # noqa: E402
from llmfs.tokenizer.vocab import Tokenizer  # noqa: E402

import mlx.core as mx  # noqa: E402

VOCAB = {"tiny": 8_000}  # the others: GPT-2's
PROMPT = 64  # tokens
CASES = {"1": [PROMPT], "8": [PROMPT] * 8, "8 unequal": [64, 12, 33, 48, 21, 57, 6, 40]}


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    "Byte-level BPE whose tokens are printable: every byte, pairs, pairs and a letter."
    letters = [bytes([b]) for b in range(33, 127)]
    tokens = [bytes([b]) for b in range(256)]
    pairs = [a + b for a in letters for b in letters]
    tokens += pairs + [pair + c for pair in pairs[:5000] for c in letters[:10]]
    tokens = tokens[: vocab_size - 1]
    ranks = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(ranks, {"<|endoftext|>": len(ranks)})


def make_folder(name: str, precision: str, out: Path) -> None:
    "Export a preset with random weights that never ends a text."
    mx.random.seed(0)
    tokenizer = made_up_tokenizer(VOCAB.get(name, 50_257))
    model = GPT(preset(name, vocab_size=tokenizer.vocab_size))
    table = model.embed_tokens.weight
    table[tokenizer.eot_id] = 0.0  # its logit is 0, never the largest
    model.embed_tokens.weight = table
    write_pretrained(out, model, tokenizer, precision)


def make_prompts(tokenizer: Tokenizer, lengths: list[int]) -> list[str]:
    "Texts of about so many tokens."
    draw = random.Random(0)
    texts = []
    for n in lengths:
        ids = [draw.randrange(256, tokenizer.vocab_size - 1) for _ in range(2 * n)]
        ids = tokenizer.encode(tokenizer.decode(ids))[:n]
        texts.append(tokenizer.decode(ids))
    return texts


def ours(folder: Path):
    "prompts, number of tokens -> ids of each text"
    model, tokenizer, _ = read_pretrained(folder)

    def write(prompts, n, temperature):
        s = Sampling(max_tokens=n, temperature=temperature)
        if len(prompts) == 1:
            pieces = stream(model, tokenizer, prompts[0], s, begin=False)
            while True:
                try:
                    next(pieces)
                except StopIteration as end:
                    return [end.value.ids]
        out = generate_batch(model, tokenizer, prompts, sampling=s, begin=False)
        return [g.ids for g in out]

    return write, tokenizer


def theirs(folder: Path):
    "The same with mlx-lm."
    from mlx_lm import batch_generate, load, stream_generate
    from mlx_lm.sample_utils import make_sampler

    model, tokenizer = load(str(folder))

    def write(prompts, n, temperature):
        ids = [tokenizer.encode(p, add_special_tokens=False) for p in prompts]
        how = dict(max_tokens=n, sampler=make_sampler(temp=temperature))
        if len(prompts) == 1:
            return [[r.token for r in stream_generate(model, tokenizer, ids[0], **how)]]
        return batch_generate(model, tokenizer, ids, return_token_ids=True, **how).token_ids

    return write


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    "Share of tokens before the first difference of each text."
    same = 0
    for x, y in zip(a, b):
        same += next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y)))
    return same / sum(map(len, a))


def rate(write, prompts, n, temperature) -> float:
    start = time.perf_counter()
    out = write(prompts, n, temperature)
    seconds = time.perf_counter() - start
    made = sum(map(len, out))
    if not temperature:
        assert made == n * len(prompts), f"{made} tokens instead of {n * len(prompts)}"
    return made / seconds


def spread(values: list[float]) -> list[float]:
    "Median, lower and upper quartile."
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(x, 4) for x in (middle, low, high)]


def compare(mine, other, prompts, n, temperature, rounds) -> dict:
    "Rates of both, taken turn about; the ratio is that of neighbours."
    writers = {"llmfs": mine} | ({"mlx-lm": other} if other else {})
    firsts = {name: write(prompts, n, temperature) for name, write in writers.items()}  # warm
    rates = {name: [] for name in writers}
    for i in range(rounds):
        for name in list(writers)[:: 1 if i % 2 else -1]:
            rates[name].append(rate(writers[name], prompts, n, temperature))
    found = {name: spread(values) for name, values in rates.items()}
    if other:
        found["ratio"] = spread([a / b for a, b in zip(rates["llmfs"], rates["mlx-lm"])])
        if not temperature:
            found["same tokens"] = agreement(firsts["llmfs"], firsts["mlx-lm"])
    return found


def versions() -> dict:
    found = {"llmfs": llmfs.__version__, "python": platform.python_version()}
    for name in ("mlx", "mlx-lm", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "50m"], help="presets")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each text")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of both")
    parser.add_argument("--precision", default="auto", help="of the export; auto: bfloat16 on a GPU")
    parser.add_argument("--record", metavar="FILE", help="add what was measured to this JSON")
    parser.add_argument("--merge", metavar="FILE", help="add this record's entries to --record")
    args = parser.parse_args()
    if args.merge:
        entries = json.loads(Path(args.merge).read_text(encoding="utf-8"))
        return add_entries(Path(args.record), entries)
    machine = hardware()
    if args.precision == "auto":
        args.precision = "float32" if machine.backend == "cpu" else "bfloat16"
    print(f"{machine.chip}, {machine.backend}, {machine.n_cores} cores, {args.precision}", flush=True)
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            make_folder(name, args.precision, Path(folder) / "model")
            mine, tokenizer = ours(Path(folder) / "model")
            try:
                other = theirs(Path(folder) / "model")
            except ImportError as e:
                print(f"mlx-lm is not measured: {e}")
                other = None
        for t, case in ((t, case) for t in args.temperatures for case in args.cases):
            if t and "unequal" in case:
                continue
            prompts = make_prompts(tokenizer, CASES[case])
            found = compare(mine, other, prompts, args.tokens, t, args.rounds)
            row = {"model": name, "batch": case, "temperature": t, "new_tokens": args.tokens}
            rows.append(row | {"prompt_tokens": CASES[case], "rounds": args.rounds} | found)
            print(line(rows[-1]), flush=True)
    if args.record:
        entry = {"backend": machine.backend, "chip": machine.chip, "cores": machine.n_cores}
        entry |= {"precision": args.precision, "versions": versions(), "rows": rows}
        add_entries(Path(args.record), [entry])


def line(row: dict) -> str:
    text = f"{row['model']:<6}batch {row['batch']:<11}temperature {row['temperature']:<4g}llmfs {row['llmfs'][0]:>9,.1f} tokens/s"
    if "ratio" in row:
        middle, low, high = row["ratio"]
        text += f"   mlx-lm {row['mlx-lm'][0]:>9,.1f}   ratio {middle:.3f} ({low:.3f} to {high:.3f})"
    if "same tokens" in row:
        text += f"   same tokens {row['same tokens']:.0%}"
    return text


def add_entries(path: Path, entries: list[dict]) -> None:
    "A row replaces that of the same case on the same machine with the same versions."
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    same = ("backend", "chip", "precision", "versions")
    case = lambda row: (row["model"], row["batch"], row["temperature"])
    for entry in entries:
        for there in [e for e in old if all(e[k] == entry[k] for k in same)]:
            rows = {case(row): row for row in there["rows"] + entry["rows"]}
            entry = entry | {"rows": list(rows.values())}
        machine = [entry[k] for k in same[:3]]
        old = [e for e in old if [e[k] for k in same[:3]] != machine] + [entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(old, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([\d., \n-]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
