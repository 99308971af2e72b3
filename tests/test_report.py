"What evaluate says: every number against loops or a second way to it; and bad input to the commands."

import json
import math
import os
import subprocess
import sys
from itertools import islice

import llmfs
from llmfs.data.stories import Stories
from llmfs.evaluation import report as R
from llmfs.evaluation.metrics import evaluate_documents
from llmfs.model.transformer import GPT, preset
from llmfs.tokenizer.vocab import CharTokenizer, train_tokenizer

import mlx.core as mx
import numpy as np
import pytest

TEXTS = ["the cat sat.", "a", "the dog sat on the cat, and the cat sat on the dog. " * 3, "on a mat", "the"]


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(TEXTS, 280)


def make(vocab_size, seed=0, **shape):
    mx.random.seed(seed)
    shape = dict(n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, max_seq_len=24, init_std=0.3) | shape
    return GPT(preset("tiny", vocab_size=vocab_size, **shape)).eval()


def token_losses(model, tok, text):
    "Loss of every token of a document by NumPy, pieces of the context's length."
    ids, out, L = [tok.eot_id, *tok.encode(text), tok.eot_id], [], model.cfg.max_seq_len
    for a in range(0, len(ids) - 1, L):
        run = ids[a : a + L + 1]
        z = np.array(model(mx.array([run[:-1]]))[0], dtype=np.float64)
        out.append(np.logaddexp.reduce(z, axis=-1) - z[np.arange(len(run) - 1), run[1:]])
    return out


# ---- loss by position


def test_positions_equal_loops(tok):
    model = make(tok.vocab_size)
    pieces = [p for text in TEXTS for p in token_losses(model, tok, text)]
    got = R.by_position(model, tok, TEXTS, batch_size=3)
    assert [(b["first"], b["last"]) for b in got] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 24)]
    for b in got:
        parts = [p[b["first"] - 1 : b["last"]] for p in pieces]
        parts = [p for p in parts if len(p)]
        all_of_them = np.concatenate(parts)
        assert b["tokens"] == len(all_of_them)
        assert b["loss"] == pytest.approx(all_of_them.mean(), abs=1e-4)
    assert sum(b["tokens"] for b in got) == evaluate_documents(model, tok, TEXTS).n_tokens
    total = sum(b["tokens"] * b["loss"] for b in got)
    assert total == pytest.approx(evaluate_documents(model, tok, TEXTS).nll_nats, rel=1e-4)


def test_error_of_a_position_shrinks_with_documents(tok):
    model = make(tok.vocab_size)
    draw = np.random.default_rng(0)
    word = lambda: "".join(draw.choice(list("thecatsondgm "), 12))
    texts = [word() for _ in range(160)]
    few, many = (R.by_position(model, tok, t)[2]["error"] for t in (texts[:10], texts))
    assert 2.5 < few / many < 6.5  # about the root of 16
    third = np.array([sum(p[2:4]) / 2 for t in texts for p in token_losses(model, tok, t)])
    assert many == pytest.approx(third.std(ddof=1) / math.sqrt(len(third)), rel=0.02)


def test_positions_of_odd_contexts_and_few_tokens(tok):
    for L in (1, 5, 8, 9):
        got = R.by_position(make(tok.vocab_size, max_seq_len=L), tok, TEXTS)
        assert got[-1]["last"] == L and sum(b["tokens"] for b in got) == sum(
            len(tok.encode(t)) + 1 for t in TEXTS
        )
    few = R.by_position(make(tok.vocab_size), tok, TEXTS, max_tokens=5)
    assert sum(b["tokens"] for b in few) < 12
    one = R.by_position(make(tok.vocab_size), tok, ["a"])
    assert one[0]["error"] is None and len(one) == 2


def test_dropout_is_off_and_comes_back(tok):
    model = make(tok.vocab_size, dropout=0.5).train()
    assert R.by_position(model, tok, TEXTS) == R.by_position(model, tok, TEXTS)
    assert model.training


def test_plots_are_files_and_repeat(tok, tmp_path):
    curves = {"a": R.by_position(make(tok.vocab_size), tok, TEXTS)}
    svg = R.save_positions(curves, tmp_path / "new" / "a.svg")
    text = svg.read_bytes()
    assert text.startswith(b"<?xml") and b"<dc:date>" not in text
    R.save_positions(curves, svg)
    assert svg.read_bytes() == text
    assert R.save_positions(curves, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="svg"):
        R.save_positions(curves, tmp_path / "a.docx")


# ---- comparison


def test_difference_is_paired(tok):
    a, b = make(tok.vocab_size), make(tok.vocab_size, seed=1)
    found = R.compare([("a", a, tok), ("b", b, tok)], TEXTS)
    assert R.DIFFERENCE not in found["a"]["measures"]
    value, error = found["b"]["measures"][R.DIFFERENCE]
    x, y = (evaluate_documents(m, tok, TEXTS) for m in (a, b))
    bits = lambda f: f["measures"]["bits per byte"][0]
    assert value == pytest.approx(bits(found["b"]) - bits(found["a"]), abs=1e-9)
    d, n = (y.nll - x.nll) / math.log(2), x.n_bytes
    r = d.sum() / n.sum()
    want = math.sqrt(((d - r * n) ** 2).sum() * len(d) / (len(d) - 1)) / n.sum()
    assert error == pytest.approx(want)
    same = R.compare([("a", a, tok), ("again", a, tok)], TEXTS)["again"]["measures"][R.DIFFERENCE]
    assert same == (0.0, 0.0)


def test_models_with_other_tokenizers_are_compared_in_bytes(tok):
    letters = CharTokenizer(set("".join(TEXTS)))
    even = lambda t: make(t.vocab_size, init_std=1e-9)
    found = R.compare([("bpe", even(tok), tok), ("char", even(letters), letters)], TEXTS)
    n_bytes = sum(map(len, TEXTS))
    for name, t in (("bpe", tok), ("char", letters)):
        tokens = sum(len(t.encode(text)) + 1 for text in TEXTS)
        bits = found[name]["measures"]["bits per byte"][0]
        assert bits == pytest.approx(tokens * math.log2(t.vocab_size) / n_bytes, rel=1e-4)


def test_stories_get_a_floor_and_kinds_of_mistakes():
    world = Stories()
    texts = [s.text for s in islice(world.stream("validation"), 6)]
    tok = train_tokenizer(texts, 300)
    model = make(tok.vocab_size, max_seq_len=64)
    found = R.judge(model, tok, texts, n_samples=7)
    floor = -sum(world.logprob(t) for t in texts)
    nll = evaluate_documents(model, tok, texts).nll_nats
    assert found["measures"]["ratio to the least possible"][0] == pytest.approx(nll / floor)
    bits = floor / math.log(2) / sum(map(len, texts))
    assert found["measures"]["least possible bits per byte"][0] == pytest.approx(bits)
    assert sum(found["mistakes"].values()) == 7  # all are wrong: it knows nothing
    assert found["measures"]["share of invented stories accepted"][0] == 0
    quiet = R.judge(model, tok, texts, n_samples=0)
    assert "mistakes" not in quiet and "share of invented stories accepted" not in quiet["measures"]
    json.dumps(found, allow_nan=False)


def test_one_document_has_no_error(tok):
    found = R.judge(make(tok.vocab_size), tok, ["the cat"])
    assert found["measures"]["perplexity"][1] is None
    json.dumps(found, allow_nan=False)


def test_table(tok):
    measures = {"loss (nats a token)": (1.5, 0.25), "bits per byte": (2.0, None)}
    found = {
        "a.npz": {"measures": measures, "mistakes": {"broken sentence": 12}},
        "longer/name.npz": {"measures": measures | {R.DIFFERENCE: (-0.5, 0.01)}, "mistakes": {}},
    }
    lines = R.table(found).splitlines()
    assert lines[0].split() == ["loss", "bits/byte", "difference"]
    assert lines[1].split() == ["a.npz", "1.5000", "±", "0.2500", "2.0000", "-"]
    assert lines[2].split()[-3:] == ["-0.5000", "±", "0.0100"]
    assert lines[3] == "" and lines[5].split() == ["broken", "sentence", "12", "0"]
    assert len({line.rindex("2.0000") for line in lines[1:3]}) == 1, "columns are aligned"


# ---- the command


LLMFS = [sys.executable, "-c", "import sys; from llmfs.cli import main; sys.exit(main())"]
ENV = os.environ | {"MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def llmfs_run(words, cwd, shell="", **kwargs):
    command = LLMFS + words.split()
    if shell:  # redirections that subprocess cannot say
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    kwargs = dict(stdin=subprocess.DEVNULL) | kwargs if "input" not in kwargs else kwargs
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, timeout=120, **kwargs)


def one_line(done, *said):
    "The single line of an error."
    err = done.stderr.decode()
    assert done.returncode == 2, (done.returncode, err)
    lines = [x for x in err.splitlines() if x]
    assert len(lines) == 1 and lines[0].startswith("llmfs: ") and len(lines[0]) < 300, err
    assert "bug" not in lines[0] and all(s in lines[0] for s in said), lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tok):
    from llmfs.training.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("report")
    for i, positions in enumerate(("rope", "learned")):
        model = make(tok.vocab_size, seed=i, positions=positions)
        save_checkpoint(folder / f"{positions}.npz", model=model, config=model.cfg, tokenizer=tok)
    (folder / "some.txt").write_text("\n".join(TEXTS * 20))
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n\t\n")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 9)
    return folder


def test_evaluate_compares(place):
    done = llmfs_run("evaluate --checkpoint rope.npz learned.npz --text some.txt", place)
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode()
    assert "difference" in out and "rope.npz" in out and "learned.npz" in out
    assert "loss by position: loss_by_position.svg" in out
    assert b"<svg" in (place / "loss_by_position.svg").read_bytes()
    words = "evaluate --checkpoint rope.npz learned.npz --text some.txt --plot new/it.png --json"
    done = llmfs_run(words, place)
    found = json.loads(done.stdout)
    assert [c["checkpoint"] for c in found["checkpoints"]] == ["rope.npz", "learned.npz"]
    assert found["plot"] == "new/it.png" and (place / "new" / "it.png").is_file()
    for c in found["checkpoints"]:
        assert c["positions"][0]["first"] == 1 and c["measures"]["perplexity"][1] > 0
    assert R.DIFFERENCE in found["checkpoints"][1]["measures"]


def test_evaluate_one(place):
    done = llmfs_run("evaluate --checkpoint rope.npz --text some.txt --json", place)
    found = json.loads(done.stdout)
    assert found["checkpoint"] == "rope.npz"
    shown = llmfs_run("evaluate --checkpoint rope.npz --text some.txt", place).stdout.decode()
    value, error = found["measures"]["bits per byte"]
    assert f"{value:.4f} ± {error:.4f}" in shown


BAD = {
    "empty text": ("evaluate --checkpoint rope.npz --text empty.txt", "empty.txt"),
    "blank text": ("evaluate --checkpoint rope.npz --text blank.txt", "blank.txt"),
    "binary text": ("evaluate --checkpoint rope.npz --text binary.txt", "binary.txt"),
    "a checkpoint as text": ("evaluate --checkpoint rope.npz --text rope.npz", "rope.npz"),
    "no text known": ("evaluate --checkpoint rope.npz", "--text"),
    "text as checkpoint": ("evaluate --checkpoint some.txt --text some.txt", "some.txt"),
    "one of two is missing": ("evaluate --checkpoint rope.npz no.npz --text some.txt", "no.npz"),
    "one of two is no checkpoint": ("evaluate --checkpoint rope.npz binary.txt --text some.txt", "binary.txt"),
    "no checkpoint named": ("evaluate --checkpoint --text some.txt", "--checkpoint"),
    "samples below none": ("evaluate --checkpoint rope.npz --text some.txt --num-samples -1", "num-samples"),
    "plot of no kind": ("evaluate --checkpoint rope.npz --text some.txt --plot a.docx", ".svg"),
    "top-p of nothing": ("generate --checkpoint rope.npz --top-p 0", "top_p"),
    "temperature nan": ("generate --checkpoint rope.npz --temperature nan", "temperature"),
    "no tokens": ("generate --checkpoint rope.npz --max-tokens 0", "max_tokens"),
    "seed below zero": ("generate --checkpoint rope.npz --seed -1", "seed"),
    "text to write with": ("generate --checkpoint binary.txt", "binary.txt"),
    "JSON conversation": ("generate --checkpoint rope.npz --interactive --json", "--interactive"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_nonsense_costs_one_line(place, name):
    words, said = BAD[name]
    one_line(llmfs_run(words, place), said)


def test_stdin_that_is_no_text(place):
    words = "generate --checkpoint rope.npz --max-tokens 3 --prompt -"
    one_line(llmfs_run(words, place, input=b"the cat \xff\xfe"), "UTF-8", "0xff")
    one_line(llmfs_run(words, place, shell="<&-"), "closed")
    words = "generate --checkpoint rope.npz --max-tokens 3 --interactive"
    one_line(llmfs_run(words, place, shell="<&-"), "closed")


def test_stdin_with_nothing_in_it_is_a_text_from_nothing(place):
    words = "generate --checkpoint rope.npz --max-tokens 9 --prompt"
    empty = llmfs_run(f"{words} -", place, input=b"")
    assert empty.returncode == 0 and empty.stdout == llmfs_run(words + "=", place).stdout


def test_closed_stdout(place):
    for words in ("generate --checkpoint rope.npz --max-tokens 3", "evaluate --checkpoint rope.npz --text some.txt"):
        done = llmfs_run(words, place, shell=">&-")
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["rope.npz", "learned.npz"])
def test_a_prompt_longer_than_the_context(place, name):
    prompt = ("the cat sat on the dog. " * 500).encode()
    done = llmfs_run(f"generate --checkpoint {name} --max-tokens 30 --prompt -", place, input=prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prompt.rstrip(b"\n"))


def test_half_characters_in_a_prompt(place):
    command = ["bash", "-c", '"$@" --prompt $\'caf\\xc3\'', "bash", *LLMFS, "generate",
               "--checkpoint", "rope.npz", "--max-tokens", "3"]  # fmt: skip
    done = subprocess.run(command, cwd=place, env=ENV, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(b"caf"), done.stderr


def test_json_is_one_object_a_line(place):
    words = "generate --checkpoint rope.npz --max-tokens 5 --num-samples 3 --prompt - --json"
    done = llmfs_run(words, place, input="the naïve\ncat\n".encode())
    rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [r["prompt"] for r in rows] == ["the naïve\ncat"] * 3
    assert {"text", "ids", "logprobs", "finish"} <= rows[0].keys()


# ---- one long text


def test_stretches_equal_loops(tok):
    "Byte-long tokens: every edge but the odd ones falls between two of them."
    letters = CharTokenizer(set("".join(TEXTS)))
    model, text = make(letters.vocab_size), "the cat sat on the dog. " * 40  # 960 bytes
    losses = np.concatenate(token_losses(model, letters, text))
    got = R.stretches(model, letters, [text], n=8, least=1)
    for i in range(8):
        want = losses[120 * i : 120 * (i + 1) + (i == 7)]  # the end of the text: the last's
        assert got.nll[i] == pytest.approx(want.sum(), abs=1e-3)
        assert got.tokens[i] == pytest.approx(len(want)) and got.n_bytes[i] == 120
    split = R.stretches(model, letters, [text], n=7, least=1)  # edges inside tokens
    assert split.nll.sum() == pytest.approx(losses.sum()) and len(split.nll) == 7
    edge = 960 / 7
    assert split.nll[0] == pytest.approx(losses[:137].sum() + (edge - 137) * losses[137], abs=1e-3)


def test_stretches_of_any_text(tok):
    model = make(tok.vocab_size)
    texts = ["naïve 😀 café " * 120, "a", "", "the cat " * 300]
    got = R.stretches(model, tok, texts)
    whole = evaluate_documents(model, tok, texts)
    assert got.nll.sum() == pytest.approx(whole.nll_nats, rel=1e-5)
    assert got.tokens.sum() == pytest.approx(whole.n_tokens)
    assert got.n_bytes.sum() == pytest.approx(whole.n_bytes.sum()) and len(got.nll) == 2 + 1 + 1 + 2
    short = R.score(model, tok, TEXTS)
    np.testing.assert_allclose(short.nll, evaluate_documents(model, tok, TEXTS).nll, rtol=1e-4)


def test_stretches_tell_the_error_of_a_book(tok):
    "A text of random words: its stretches are as different as independent documents."
    draw = np.random.default_rng(1)
    text = " ".join("".join(draw.choice(list("thecatsondgm"), 5)) for _ in range(8000))
    model = make(tok.vocab_size)
    value, error = R.judge(model, tok, [text])["measures"]["bits per byte"]
    parts = [text[i : i + 1200] for i in range(0, len(text) - 1200, 1200)]
    apart = R.judge(model, tok, parts)["measures"]["bits per byte"]
    assert len(parts) >= 32 and 0.5 < error / apart[1] < 2 and abs(value - apart[0]) < 0.1


def test_batches_fit_into_memory(tok):
    big = preset("124m", vocab_size=50_257)
    rows = R._rows(type("Big", (), {"cfg": big}))
    assert 1 <= rows <= 3 and rows * big.max_seq_len * big.vocab_size * 4 <= 2**29 * 1.5
    assert R._rows(make(tok.vocab_size)) == 32
