"""A model of 124M parameters on a hundred megabytes of books: the run behind nbs/results/books_124m.json.

python tools/train_books.py books.txt --tokenizer gpt2.json --minutes 4 --out checkpoints/books --record FILE

The text is one file with <|endoftext|> between books; the last tenth of the books is held back.
The preset, its recipe and the trainer are the library's; the record keeps settings, versions,
device, curve, the held-out bits per byte, samples and what the run cost. On one GPU.
"""

import argparse
import json
import platform
import time
from datetime import date
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import llmfs  # before mlx
from llmfs.evaluation.generate import generate_batch
from llmfs.evaluation.metrics import bits_per_byte, evaluate_loss, perplexity
from llmfs.hardware import hardware
from llmfs.model.transformer import GPT, count_params, flops_per_token, preset
from llmfs.training.checkpoint import load_model, read_log
from llmfs.training.data_loader import eval_batches
from llmfs.training.prepare import run_text
from llmfs.training.trainer import Trainer, recipe

import mlx.core as mx

PROMPTS = ["", "It was a", "The old house at the end of the", '"I do not', "Chapter I"]


def versions() -> dict:
    found = {"llmfs": llmfs.__version__, "python": platform.python_version()}
    for name in ("mlx", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--size", default="124m")
    parser.add_argument("--steps", type=int, default=100_000, help="at most")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--accum", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--weight-decay", type=float, help="default: the recipe's")
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="checkpoints/books")
    parser.add_argument("--record", required=True)
    args = parser.parse_args()
    start = time.perf_counter()
    tokenizer, train, held = run_text(args.out, [args.text], tokenizer=args.tokenizer)
    prepared = time.perf_counter() - start
    # rows of the table beyond the tokenizer's ids: a GPU multiplies by multiples of 64 faster
    shape = preset(args.size, vocab_size=-(-tokenizer.vocab_size // 64) * 64,
                   max_seq_len=args.length, dropout=args.dropout)  # fmt: skip
    cfg = recipe(args.size, shape, batch_size=args.batch, grad_accum=args.accum, seq_len=args.length,
                 max_minutes=args.minutes, max_steps=args.steps, optimizer=args.optimizer, seed=args.seed,
                 weight_decay=args.weight_decay,
                 eval_every=args.eval_every, eval_batches=12, save_every=100_000, keep=0, log_every=10)  # fmt: skip
    mx.random.seed(args.seed)
    model = GPT(shape)
    trainer = Trainer(model, cfg, tokenizer=tokenizer, train=train, validation=held, out=args.out)
    report = trainer.fit()
    trained, log = time.perf_counter() - start - prepared, read_log(args.out)
    best, _, _ = load_model(report["best"])
    best.set_dtype(getattr(mx, "float32" if hardware().backend == "cpu" else "bfloat16"))
    found = evaluate_loss(best, eval_batches(held, args.batch, args.length))
    tokens, nats, size = found.n_tokens, float(found.nll_nats), held.header["n_bytes"]
    texts = generate_batch(best, tokenizer, PROMPTS, max_tokens=160, temperature=0.8, top_p=0.95, seed=1)
    head = lambda f: {k: f.header[k] for k in ("n_tokens", "n_documents", "n_bytes", "sha256")}
    flops = flops_per_token(shape, args.length, training=True) * report["tokens_per_second"]
    record = dict(
        date=str(date.today()), device=hardware().chip,
        versions=versions(), seed=args.seed, n_params=count_params(shape), shape=shape.to_dict(), train=cfg.to_dict(),
        text=dict(train=head(train), held_out=head(held), sha256=sha256(Path(args.text).read_bytes()).hexdigest()),
        seconds=dict(prepare=round(prepared, 1), train=round(trained, 1)),
        steps=report["steps"], tokens=report["tokens"], epochs=round(report["tokens"] / train.header["n_tokens"], 2),
        tokens_per_second=report["tokens_per_second"], tflops=round(flops / 1e12, 1),
        peak_gb=round(mx.get_peak_memory() / 1e9, 1), best_step=report["best_step"],
        held_out=dict(nats_per_token=round(nats / tokens, 4), perplexity=round(float(perplexity(nats, tokens)), 2),
                      bits_per_byte=round(float(bits_per_byte(nats, size)) * held.header["n_tokens"] / tokens, 4)),
        curve=[[r["step"], r["loss"]] for r in log if "loss" in r],
        validation=[[r["step"], r["val_loss"]] for r in log if "val_loss" in r],
        samples=[dict(prompt=p, text=g.text) for p, g in zip(PROMPTS, texts)],
    )  # fmt: skip
    Path(args.record).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({k: record[k] for k in ("steps", "tokens", "epochs", "tokens_per_second", "held_out", "seconds")}))


if __name__ == "__main__":
    main()
