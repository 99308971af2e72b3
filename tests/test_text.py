"""Documents out of files of all kinds, whatever the sizes of the pieces."""
import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import tracemalloc

from llmfs.data import text as data_text
from llmfs.data.text import (
    EOT,
    READERS,
    belongs_to,
    beside,
    find_files,
    read_documents,
    split_stream,
    write_json,
)

import pytest


def test_split_equals_str_split():
    rng = random.Random(0)
    bits = [EOT, EOT[:5], EOT[5:], "<", "|>", "a", "\n", "é", "<|endoftext", "endoftext|>"]
    for _ in range(2000):
        text = "".join(rng.choices(bits, k=rng.randint(0, 9)))
        cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 6)))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        assert list(split_stream(chunks)) == text.split(EOT)


def test_split_is_linear():
    "One document of 20 MB in pieces of 4 KB: copying it at each piece would be 50 GB."
    chunks = ("x" * 4096 for _ in range(5000))
    assert [len(d) for d in split_stream(chunks)] == [5000 * 4096]


@pytest.mark.parametrize("size", [1, 7, 65530, 70000])
def test_marks_and_newlines(tmp_path, size):
    docs = ["a" * size, "\nb\n\n", "ç\r\nd", "last\n"]
    path = tmp_path / "x.txt"
    path.write_bytes("".join(f"{d}\n{EOT}\n" for d in docs).encode())
    assert list(read_documents(path)) == docs
    path.write_bytes(EOT.join(docs[:1] + ["c"]).encode())
    assert list(read_documents(path)) == [docs[0], "c"]


def test_plain_text_is_untouched(tmp_path):
    text = "\n one\r\n\ntwo\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.md").write_bytes(f"# t\n{EOT}\nx".encode())
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfbom")
    (tmp_path / "d.txt").write_bytes(f"  \n{EOT}\n\n{EOT}\n".encode())
    assert list(read_documents(tmp_path)) == [text, f"# t\n{EOT}\nx", "bom"]


def test_formats(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    docs = ["eins", "zwei\nzwo", "três"]
    raw = f"\n{EOT}\n".join(docs).encode()
    for name, pack in {"a.txt.gz": gzip, "b.txt.xz": lzma, "c.txt.bz2": bz2}.items():
        (tmp_path / name).write_bytes(pack.compress(raw))
    lines = "\n\n".join(json.dumps({"text": d, "n": 1}) for d in docs)
    (tmp_path / "d.jsonl").write_text(lines)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pa.table({"n": [1, 2, 3, 4], "text": [*docs, None]})
    parquet.write_table(table, tmp_path / "f.parquet", row_group_size=2)
    for path in sorted(tmp_path.iterdir()):
        assert list(read_documents(path)) == docs, path
    assert list(read_documents(tmp_path)) == 6 * docs


def test_other_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pa.table({"story": ["x"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"story": "y"}\n')
    assert list(read_documents(tmp_path, column="story")) == ["x", "y"]
    for name in ("a.parquet", "b.jsonl"):
        with pytest.raises(ValueError, match="no column 'text': name one of story"):
            list(read_documents(tmp_path / name))
    with pytest.raises(ValueError, match="holds no text but int"):
        list(read_documents(tmp_path / "a.parquet", column="n"))


def test_which_files(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/image.png", ".hidden/d.txt", "sub/.e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(what):
        return [str(p.relative_to(tmp_path)) for p in find_files(what)]

    assert names(tmp_path) == ["a.md", "b.txt", "sub/c.txt"]
    assert names(str(tmp_path / "*.txt")) == ["b.txt"]
    assert names(str(tmp_path / "**" / "*.txt")) == ["b.txt", "sub/c.txt"]
    assert names([tmp_path / "sub", tmp_path / "a.md"]) == ["sub/c.txt", "a.md"]
    assert names(tmp_path / "sub" / "image.png") == ["sub/image.png"]  # named: read as text
    (tmp_path / "odd[1].txt").write_text("x")
    assert names(tmp_path / "odd[1].txt") == ["odd[1].txt"]
    (tmp_path / "none").mkdir()
    for nothing in (tmp_path / "none", tmp_path / "no.txt", str(tmp_path / "*.pdf")):
        with pytest.raises(FileNotFoundError, match="no text in"):
            find_files(nothing)


def test_bad_files(tmp_path):
    pytest.importorskip("pyarrow")
    bad = {
        "a.txt": (b"caf\xe9 " * 10, "no UTF-8"),
        "b.jsonl": (b'{"text": "x"}\n{"text": \n', "line 2 is no JSON"),
        "c.parquet": (b"PAR1 nothing", "no Parquet"),
        "d.txt.gz": (gzip.compress(bytes(range(200)) * 9)[:-20], "damaged|UTF-8"),
        "e.txt.gz": (b"no gzip", "damaged"),
        "f.txt.xz": (lzma.compress(b"hello")[:-5], "damaged"),
        "g.jsonl": (b"[1, 2]\n", "no column"),
        "h.txt.bz2": (b"no bz2", "damaged"),
    }
    for name, (raw, message) in bad.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=message) as e:
            list(read_documents(tmp_path / name))
        assert "\n" not in str(e.value) and name in str(e.value)


def test_memory_stays_flat(tmp_path):
    def peak(n):
        path = tmp_path / f"{n}.txt"
        path.write_text(f"\n{EOT}\n".join(f"document {i} " + 200 * "x" for i in range(n)))
        tracemalloc.start()
        assert sum(1 for _ in read_documents(path)) == n
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    assert peak(20_000) < 1.2 * peak(2000)


def test_new_formats_are_entries(tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, ".caps", lambda path, column: [path.read_text().upper()])
    (tmp_path / "a.caps").write_text("x")
    assert list(read_documents(tmp_path)) == ["X"]


def test_sides():
    texts = [f"text {i}" for i in range(20_000)]
    held = sum(belongs_to(t) == "validation" for t in texts) / len(texts)
    assert abs(held - 0.1) < 0.01
    assert belongs_to("text 1") == belongs_to("text 1")
    assert abs(sum(belongs_to(t, 2) == "train" for t in texts) / len(texts) - 0.5) < 0.02
    assert belongs_to("\ud800") in ("train", "validation")


def test_light_import():
    code = ("import llmfs.data.corpus, sys; "
            "assert not {'mlx.core', 'datasets', 'pyarrow', 'pandas'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("when", ["to_disk", "replace", "inside"])
def test_what_breaks_off_leaves_the_old_file(tmp_path, monkeypatch, when):
    write_json({"old": 1}, tmp_path / "deep" / "a.json")

    def fail(*args):
        raise OSError(28, "no space")

    if when != "inside":
        monkeypatch.setattr(*((data_text, "to_disk") if when == "to_disk" else (os, "replace")), fail)
    with pytest.raises(OSError), beside(tmp_path / "deep" / "a.json") as f:
        f.write(b"new")
        if when == "inside":
            fail()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"old": 1}


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    "And on a Mac the drive is asked, where the drive can be asked"
    calls, target = [], tmp_path / "a.json"
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    write_json({}, target)
    assert calls == ["fsync", "replace", "fsync"]  # the file; its name; the folder
    monkeypatch.setattr(data_text.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(data_text.fcntl, "fcntl", lambda f, what: calls.append(what))
    calls.clear()
    write_json({}, target)
    assert calls == [51, "replace", "fsync"]

    def refuse(f, what):
        raise OSError(45, "not supported")

    monkeypatch.setattr(data_text.fcntl, "fcntl", refuse)
    calls.clear()
    write_json({}, target)
    assert calls == ["fsync", "replace", "fsync"]
