"""From a finished quick start to the record that README, landing page and chapter 04d show.

    make quickstart                          # or llmfs quickstart, on a machine that does nothing else
    python tools/quickstart_record.py checkpoints/quickstart --device "two x86-64 cores"

Then run 04d with its cells marked `slow`, which draw the two pictures (nbdev-test --save --flags slow), and 00a. tests/test_readme.py
says which numbers of the README differ from the record.
"""

import argparse
import json
import math
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path

import llmfs  # before mlx
from llmfs.data.stories import Stories
from llmfs.evaluation.metrics import token_nll
from llmfs.training.checkpoint import load_model, read_log

import mlx.core as mx
import numpy as np

RECORD = Path(__file__).resolve().parent.parent / "nbs" / "results" / "quickstart.json"
WHAT = ("One run of `llmfs quickstart` at its defaults, in an empty folder. "
        "The first four groups are those of the quickstart.json that it writes.")
STORY = ("The first of the stories: each word and what it cost the model, in bits; "
         "the end of the text cost the rest.")
KEPT = ("steps", "tokens", "train_loss", "val_loss", "best_step", "seconds", "tokens_per_second")


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in ("mlx", "mkl", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found | {"llmfs": llmfs.__version__}


def rounded(x):
    "Six digits behind the point, however deep the number lies."
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return round(x, 6) if isinstance(x, float) else x


def losses(out: Path, log: list[dict]) -> dict:
    "Both curves of the log, and the tokens of a byte of their texts: a document counts its end."
    found = {}
    for name, key in (("train", "loss"), ("validation", "val_loss")):
        header = json.loads(next((out / "data").glob(f"{name}-*.json")).read_text(encoding="utf-8"))
        lines = [line for line in log if key in line]
        found[name] = {"unit": "nats per token",
                       "tokens_per_byte": (header["n_tokens"] - 1) / header["n_bytes"],
                       "step": [line["step"] for line in lines],
                       "loss": [line[key] for line in lines]}  # fmt: skip
    return found


def story(model, tokenizer, text: str) -> dict:
    "What each word of a story costs: the tokens that begin in it."
    ids = np.concatenate([[tokenizer.eot_id], tokenizer.encode_array(text), [tokenizer.eot_id]])
    model.eval()
    nll = token_nll(model(mx.array(ids[None, :-1])), mx.array(ids[None, 1:]))[0]
    bits = np.array(nll, np.float64) / math.log(2)
    words = re.findall(r"\s*\S+", text)
    ends = list(accumulate(len(w.encode()) for w in words))
    starts = np.cumsum([0] + [len(tokenizer.decode_bytes([i])) for i in ids[1:-1]])[:-1]
    of = np.searchsorted(ends, starts, side="right")
    cost = np.bincount(of, bits[:-1], len(words))
    return {"what": STORY, "bits": round(float(bits.sum()), 2),
            "least_bits": round(-Stories().logprob(text) / math.log(2), 2),
            "words": words, "bits_per_word": [round(float(b), 2) for b in cost]}  # fmt: skip


def one_line(match) -> str:
    "A list of short things, numbers or words, in one line."
    items = re.split(r"\n\s+", match[1])
    return match[0] if max(map(len, items)) > 40 else "[" + " ".join(items) + "]"


def record(out: Path, device: str) -> dict:
    note = json.loads((out / "quickstart.json").read_text(encoding="utf-8"))
    if not note.get("finished"):
        raise SystemExit(f"{out} holds no finished quick start")
    model, tokenizer, _ = load_model(out / "best.npz")
    note["training"] = {k: note["training"][k] for k in KEPT}
    groups = {k: note[k] for k in ("bits_per_byte", "samples", "training", "settings")}
    groups["settings"]["out"] = "checkpoints/quickstart"
    found = {"what": WHAT, **groups, "device": device, "versions": versions(),
             "loss": losses(out, read_log(out))}  # fmt: skip
    return rounded(found) | {"story": story(model, tokenizer, note["samples"]["stories"][0])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of the quick start")
    parser.add_argument("--device", required=True, help="where it ran, in words")
    args = parser.parse_args()
    text = json.dumps(record(args.out, args.device), indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", one_line, text)
    RECORD.write_text(text + "\n", encoding="utf-8")
    print(f"{RECORD.name}: {args.device}")


if __name__ == "__main__":
    main()
