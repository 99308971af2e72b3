"""Tokenizer speed beside tiktoken and tokenizers: python tests/bench_tokenizer.py [--help]

`--record` also measures bytes per token for many vocabulary sizes and writes
nbs/results/tokenizer_books.json, which the chapter on byte-pair encoding plots.
"""

import argparse
import json
import lzma
import os
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))


def books(megabytes, skip=0):
    "Text of the book corpus: `megabytes` million characters after `skip` million."
    with lzma.open(DATA / "books.txt.xz", "rt", encoding="utf-8", newline="") as f:
        f.read(int(skip * 1e6))
        return f.read(int(megabytes * 1e6))


def code(megabytes):
    "Python source of the standard library."
    folder, out = Path(os.__file__).parent, []
    for path in sorted(folder.glob("*.py")):
        out.append(path.read_text(encoding="utf-8", errors="replace"))
    return "".join(out)[: int(megabytes * 1e6)]


clock = time.perf_counter


def seconds(f, *args):
    start = clock()
    result = f(*args)
    return clock() - start, result


def train_tokenizers(lines, vocab_size):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def training(text, vocab_size, processes):
    from llmfs.tokenizer.bpe import train_bpe

    lines = text.splitlines(keepends=True)
    print(f"train {vocab_size:,} on {len(text) / 1e6:.0f} MB, seconds", flush=True)
    ours, merges = seconds(lambda: train_bpe(text, vocab_size, processes=processes))
    print(f"  llmfs, {processes} process(es)  {ours:6.1f}", flush=True)
    rust, _ = seconds(train_tokenizers, lines, vocab_size)
    print(f"  tokenizers, from lines  {rust:6.1f}", flush=True)
    return merges, {"llmfs": round(ours, 1), "tokenizers": round(rust, 1)}


def encoding(text, name, processes):
    from llmfs.data.words import GPT2_PATTERN
    from llmfs.tokenizer.vocab import from_gpt2_files, to_tokenizer_json

    import tiktoken
    from tokenizers import Tokenizer

    ours = from_gpt2_files(DATA / "gpt2")
    tik = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ours.bpe.ranks, special_tokens={}
    )
    hf = Tokenizer.from_str(json.dumps(to_tokenizer_json(ours)))
    rates, size = {}, len(text.encode()) / 1e6
    print(f"encode {size:.0f} MB of {name}, MB/s", flush=True)

    def report(who, time_taken):
        rates[who] = round(size / time_taken, 1)
        print(f"  {who:24}{rates[who]:6.1f}", flush=True)

    t, ids = seconds(ours.encode_array, text)
    report("llmfs", t)
    t, theirs = seconds(tik.encode_ordinary, text)
    report("tiktoken", t)
    assert ids.tolist() == theirs
    pieces = text.splitlines(keepends=True)
    t, _ = seconds(lambda: [e.ids for e in hf.encode_batch_fast(pieces)])
    report("tokenizers", t)
    if processes > 1:
        t, again = seconds(lambda: ours.encode_array(text, processes=processes))
        report(f"llmfs, {processes} processes", t)
        assert (again == ids).all()
    return rates


def compression(merges, texts, sizes):
    "Bytes per token for the first merges of one training."
    from llmfs.tokenizer.bpe import BPE, encode_array

    return {
        name: [
            round(len(text.encode()) / len(encode_array(BPE(merges[: v - 257]), text)), 3)
            for v in sizes
        ]
        for name, text in texts.items()
    }


def record_languages():
    "GPT-2's tokens for the sentences of the chapter on vocabularies."
    from llmfs.tokenizer.vocab import from_gpt2_files

    notebook = json.loads((ROOT / "nbs" / "01d_tokenizer.vocab.ipynb").read_text("utf-8"))
    found = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and "".join(cell["source"]).startswith("SENTENCES"):
            exec("".join(cell["source"]), found)
    gpt2 = from_gpt2_files(DATA / "gpt2")
    tokens = {k: sum(len(gpt2.encode(s)) for s in v) for k, v in found["SENTENCES"].items()}
    path = ROOT / "nbs" / "results" / "tokenizer_languages.json"
    path.write_text(json.dumps({"gpt2_tokens": tokens}, indent=1) + "\n", encoding="utf-8")
    print("wrote", path.relative_to(ROOT))


def record(args, merges, speed):
    from llmfs.tokenizer.bpe import BPE, encode_array

    sizes = [2**k for k in range(9, 16)]
    texts = {
        "books": books(1, skip=60),
        "children's stories": (DATA / "tinystories.txt").read_text("utf-8")[:1_000_000],
        "Python code": code(1),
    }
    tokens = [x + y for x, y in merges]
    ids = encode_array(BPE(merges), texts["books"])
    used = np.array([1] * 256 + [len(t) for t in tokens])[ids]
    result = {
        "machine": args.machine,
        "text": f"{args.mb:g} MB of books",
        "vocab_sizes": sizes,
        "bytes_per_token": compression(merges, texts, sizes),
        "token_lengths": np.bincount([1] * 256 + [len(t) for t in tokens]).tolist(),
        "token_lengths_used": np.bincount(used).tolist(),
        "speed": speed,
    }
    path = ROOT / "nbs" / "results" / "tokenizer_books.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("wrote", path.relative_to(ROOT))
    record_languages()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=20, help="million characters of books")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--only", choices=["train", "encode"])
    parser.add_argument("--cpu", action="store_true", help="processor time, one process")
    parser.add_argument("--record", action="store_true", help="implies --cpu")
    parser.add_argument("--machine", default=f"one core, {platform.machine()}")
    args = parser.parse_args()
    if not (DATA / "books.txt.xz").is_file():
        print("bench_tokenizer: no ../shared/data/books.txt.xz here, nothing to measure")
        return
    if args.cpu or args.record:
        global clock
        clock, args.processes = time.process_time, 1
        os.environ["RAYON_NUM_THREADS"] = "1"  # for tokenizers, which is in Rust
    text, speed = books(args.mb), {}
    if args.only != "encode":
        key = f"train {args.vocab_size:,} on {args.mb:g} MB, seconds"
        merges, speed[key] = training(text, args.vocab_size, args.processes)
    if args.only != "train":
        for name, sample in ("books", text), ("Python code", code(5)):
            speed[f"encode {name}, MB/s"] = encoding(sample, name, args.processes)
    if args.record:
        from llmfs.tokenizer.bpe import train_bpe

        record(args, train_bpe(text, 32_768 + 1), speed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / (1e6 if sys.platform == 'linux' else 1e9):.1f} GB")


if __name__ == "__main__":
    main()
