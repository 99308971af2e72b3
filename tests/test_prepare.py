import os
import random

import llmfs
from llmfs.tokenizer.vocab import CharTokenizer, Tokenizer, train_tokenizer
from llmfs.training import prepare as P

import numpy as np
import pytest


def test_splits_lose_and_share_nothing():
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 25)
        docs = ["".join(rng.choices("ab \n", k=rng.randint(20, 200))) + "x" for _ in range(n)]
        train, held = P.split_documents(docs)
        if n >= 10:
            assert train + held == docs
        else:
            assert len(train) == len(held) == n
            assert [a + b for a, b in zip(train, held)] == docs
            for text, back in zip(docs, held):
                assert 0.1 * len(text) <= len(back) <= 0.3 * len(text) + 1


def test_cuts_at_line_ends_then_spaces():
    lines = "\n".join(f"line {i}" for i in range(100))
    (train,), (held,) = P.split_documents([lines])
    assert train.endswith("\n") and held.startswith("line")
    words = " ".join(f"word{i}" for i in range(100))
    (train,), (held,) = P.split_documents([words])
    assert train.endswith(" ") and held.startswith("word")
    (train,), (held,) = P.split_documents(["x" * 100])
    assert (len(train), len(held)) == (90, 10)


@pytest.mark.parametrize("docs", [[], [""], [" \n"], ["x"]])
def test_too_little_text(docs):
    with pytest.raises(ValueError):
        P.split_documents(docs)


def test_tokenizers(tmp_path):
    texts = ["hello world, hello moon"] * 5
    assert isinstance(char := P.make_tokenizer("char", texts), CharTokenizer)
    assert char.decode(char.encode(texts[0])) == texts[0]
    assert isinstance(P.make_tokenizer("bpe", iter(texts), 270), Tokenizer)
    char.save(tmp_path / "t.json")
    assert P.make_tokenizer(str(tmp_path / "t.json"), texts).hash == char.hash
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        P.make_tokenizer("nowhere.json", texts)


def test_ids_are_written_once_and_again_when_the_text_changes(tmp_path):
    tok = train_tokenizer(["hello world"], 260)
    source = tmp_path / "train.txt"
    source.write_text("hello")
    path = P.token_path(tmp_path, "train", tok)
    first = P.encode_texts(["hello"], tok, path, source)
    assert tok.decode(np.array(first.ids)[1:-1]) == "hello"
    kept = P.encode_texts(["never read"], tok, path, source)
    assert kept.header == first.header
    os.utime(source, ns=(2 * 10**18, 2 * 10**18))
    changed = P.encode_texts(["other"], tok, path, source)
    assert tok.decode(np.array(changed.ids)[1:-1]) == "other"
    path.write_bytes(path.read_bytes()[:-1])  # damaged: written again
    os.utime(path, ns=(3 * 10**18, 3 * 10**18))
    again = P.encode_texts(["other"], tok, path, source)
    assert again.header == changed.header


def test_other_tokenizers_have_other_files(tmp_path):
    a, b = CharTokenizer("abc"), CharTokenizer("abcd")
    assert P.token_path(tmp_path, "train", a) != P.token_path(tmp_path, "train", b)


def test_run_files_move_with_the_run(tmp_path):
    run, data = tmp_path / "a" / "run", tmp_path / "a" / "data"
    run.mkdir(parents=True)
    data.mkdir()
    P.save_run_files(run, train=data / "train.npy")
    assert P.load_run_files(run) == {"train": data / "train.npy"}
    (tmp_path / "a").rename(tmp_path / "b")
    moved = P.load_run_files(tmp_path / "b" / "run")["train"]
    assert moved == tmp_path / "b" / "data" / "train.npy"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"train": 3}'])
def test_damaged_run_files(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="damaged"):
        P.load_run_files(tmp_path)


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run"):
        P.load_run_files(tmp_path)
