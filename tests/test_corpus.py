"""Downloads: from the grammar, from files, through `datasets`; cut short at every point."""
import hashlib
import json
import os
import subprocess
import sys
from itertools import islice

from llmfs.data import corpus
from llmfs.data.corpus import HUB, Source, download
from llmfs.data.stories import Stories
from llmfs.data.text import EOT, belongs_to, read_documents

import pytest


def files(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def documents(out, side):
    return list(read_documents(out / f"{side}.txt"))


def check_manifest(out, manifest):
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "train.txt", "validation.txt"]
    for side, facts in manifest["splits"].items():
        raw = (out / f"{side}.txt").read_bytes()
        assert facts == dict(documents=len(documents(out, side)), bytes=len(raw),
                             sha256=hashlib.sha256(raw).hexdigest())


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A folder laid out like a data set: 4 Parquet files of 300 rows, a validation file."
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow import parquet
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for i in range(4):
        rows = {"id": list(range(300)), "text": [f"row {i}.{k}" for k in range(300)]}
        parquet.write_table(pa.table(rows), folder / "data" / f"train-{i}.parquet",
                            row_group_size=50)
    rows = {"id": list(range(90)), "text": [f"held {k}" for k in range(90)]}
    parquet.write_table(pa.table(rows), folder / "data" / "validation-0.parquet")
    own = dict(train="data/train-*.parquet", validation="data/validation-*.parquet")
    monkeypatch.setitem(HUB, "toy", Source(str(folder), **own))
    monkeypatch.setitem(HUB, "toy-hash", Source(str(folder), train="data/train-*.parquet"))
    return folder


def test_stories(tmp_path):
    manifest = download("stories", 200, tmp_path / "a", seed=3, progress=False)
    check_manifest(tmp_path / "a", manifest)
    expected = [s.text for s in islice(Stories().stream("train", seed=3), 200)]
    assert documents(tmp_path / "a", "train") == expected
    held = documents(tmp_path / "a", "validation")
    assert held == [s.text for s in islice(Stories().stream("validation", seed=3), 20)]
    again = download("stories", 200, tmp_path / "b", seed=3, progress=False)
    assert files(tmp_path / "a") == files(tmp_path / "b") and again == manifest


def test_hub_with_its_own_validation(tmp_path, hub):
    manifest = download("toy", 700, tmp_path / "out", progress=False)
    check_manifest(tmp_path / "out", manifest)
    assert documents(tmp_path / "out", "train") == [f"row {i // 300}.{i % 300}" for i in range(700)]
    assert documents(tmp_path / "out", "validation") == [f"held {k}" for k in range(70)]
    assert manifest["source"]["path"] == str(hub)


def test_hub_split_by_hash(tmp_path, hub):
    download("toy-hash", 500, tmp_path / "out", progress=False)
    train, held = (documents(tmp_path / "out", side) for side in ("train", "validation"))
    assert (len(train), len(held)) == (500, 50)
    assert all(belongs_to(t) == "train" for t in train)
    assert all(belongs_to(t) == "validation" for t in held)
    everything = download("toy-hash", None, tmp_path / "all", progress=False)
    assert sum(f["documents"] for f in everything["splits"].values()) == 1200


def test_hub_name_column_and_splits(tmp_path, hub):
    "A folder with no entry in the table, in the layout that `datasets` guesses."
    folder = tmp_path / "lines"
    folder.mkdir()
    for name, n in dict(train=60, dev=9).items():
        lines = (json.dumps({"body": f"{name} {i}"}) for i in range(n))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    source = Source(str(folder), column="body", train="train.jsonl", validation="dev.jsonl")
    streams = corpus._open_hub(source)
    assert [side for side, _ in streams] == ["train", "validation"]
    assert [next(iter(s)) for _, s in streams] == ["train 0", "dev 0"]
    wrong = Source(str(folder), train="train.jsonl")
    with pytest.raises(ValueError, match="no column 'text': name one of body"):
        next(iter(corpus._open_hub(wrong)[0][1]))
    with pytest.raises(ValueError, match="data files|no-such"):
        corpus._open_hub(Source(str(folder), train="no-such-*.parquet"))


def test_files(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"\n{EOT}\n".join(f"{i} {k}" for k in range(50)))
    one = download([tmp_path / "0.txt", str(tmp_path / "[1-3].txt")], None, tmp_path / "x",
                   progress=False)
    check_manifest(tmp_path / "x", one)
    assert sum(f["documents"] for f in one["splits"].values()) == 200
    assert len(one["source"]["files"]) == 4


def test_documents_survive(tmp_path):
    "Marks, newlines, lone surrogates, blank rows: what is written is read back."
    odd = [" a\n", "\n\nb", f"c{EOT}d", " ", "", "é\r\n", "x\ud800y"] + [f"n{i}" for i in range(99)]
    (tmp_path / "odd.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in odd))
    download(tmp_path / "odd.jsonl", None, tmp_path / "out", progress=False)
    found = [t for side in ("train", "validation") for t in documents(tmp_path / "out", side)]
    wanted = [" a\n", "\n\nb", "c", "d", "é\r\n", "x?y"] + odd[7:]
    assert sorted(found) == sorted(wanted)


class Cut(Exception):
    pass


@pytest.mark.parametrize("name", ["toy", "toy-hash", "stories"])
def test_resume_equals_never_stopped(tmp_path, hub, monkeypatch, name):
    whole = download(name, 600, tmp_path / "whole", progress=False)
    right, fill = corpus._Part.write, corpus._fill
    monkeypatch.setattr(corpus, "_fill", lambda w, s, b: fill(w, s, b, every=70))
    for cut in (0, 1, 333, 601, 655):
        left = iter(range(cut))

        def write(part, text):
            if next(left, None) is None:
                raise Cut
            right(part, text)

        out = tmp_path / f"cut{cut}"
        monkeypatch.setattr(corpus._Part, "write", write)
        with pytest.raises(Cut):
            download(name, 600, out, progress=False)
        assert not (out / "train.txt").exists() and not (out / "manifest.json").exists()
        monkeypatch.setattr(corpus._Part, "write", right)
        assert download(name, 600, out, progress=False) == whole
        assert files(out) == files(tmp_path / "whole")


def test_resume_reads_little(tmp_path, hub, monkeypatch):
    "After a cut, only what follows the last note is read again, also in later files."
    monkeypatch.setattr(corpus, "_fill", lambda w, s, b, f=corpus._fill: f(w, s, b, every=50))
    right, left, read = corpus._Part.write, iter(range(1000)), []

    def write(part, text):
        if next(left, None) is None:
            raise Cut
        right(part, text)

    monkeypatch.setattr(corpus._Part, "write", write)
    with pytest.raises(Cut):
        download("toy", 1100, tmp_path / "out", progress=False)
    monkeypatch.setattr(corpus._Part, "write", right)
    field = corpus.text_field
    monkeypatch.setattr(corpus, "text_field", lambda *a: read.append(1) or field(*a))
    download("toy", 1100, tmp_path / "out", progress=False)
    assert len(read) <= 100 + 50 + 110


KILLED = """
import os, sys
from llmfs.data import corpus
n, kind, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
place = {"write": corpus._Part, "replace": os, "rmtree": corpus.shutil}[kind]
right, calls = getattr(place, kind), iter(range(n))
def dying(*args, **kwargs):
    if next(calls, None) is None:
        os._exit(9)
    return right(*args, **kwargs)
setattr(place, kind, dying)
fill = corpus._fill
corpus._fill = lambda w, s, b: fill(w, s, b, every=40)
corpus.download("stories", 120, out, progress=False)
"""


@pytest.mark.parametrize("kind,n", [("write", 100), ("replace", 2), ("replace", 4),
                                    ("replace", 5), ("replace", 6), ("rmtree", 0), ("rmtree", 1)])
def test_killed(tmp_path, kind, n):
    "The process dies at a write, at each of the moves that publish, at the clearing up."
    whole = download("stories", 120, tmp_path / "whole", progress=False)
    run = [sys.executable, "-c", KILLED, str(n), kind, str(tmp_path / "out")]
    died = subprocess.run(run, capture_output=True, text=True)
    assert died.returncode in (9, 0), died.stderr
    assert download("stories", 120, tmp_path / "out", progress=False) == whole
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_nothing_is_written_over(tmp_path):
    out = tmp_path / "out"
    first = download("stories", 50, out, progress=False)
    before = files(out)
    stamps = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert download("stories", 50, out, progress=False) == first  # the same: found
    assert stamps == {p: p.stat().st_mtime_ns for p in out.iterdir()}
    with pytest.raises(FileExistsError, match="--overwrite"):
        download("stories", 60, out, progress=False)
    assert files(out) == before
    other = download("stories", 60, out, overwrite=True, progress=False)
    assert other["splits"]["train"]["documents"] == 60
    (out / "train.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds"):
        download("stories", 60, out, progress=False)


def test_files_of_others_stay(tmp_path):
    (tmp_path / "train.txt").write_text("my own text")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(FileExistsError, match="train.txt"):
        download("stories", 10, tmp_path, progress=False)
    assert files(tmp_path) == {"train.txt": b"my own text", "notes.md": b"x"}
    download("stories", 10, tmp_path, overwrite=True, progress=False)
    assert (tmp_path / "notes.md").read_text() == "x"


def test_overwrite_keeps_the_old_until_the_new_is_complete(tmp_path, monkeypatch):
    download("stories", 20, tmp_path, progress=False)
    before = files(tmp_path)

    right, fill, left = corpus._Part.write, corpus._fill, iter(range(9))

    def write(part, text):
        if next(left, None) is None:
            raise Cut
        right(part, text)

    with monkeypatch.context() as m, pytest.raises(Cut):
        m.setattr(corpus._Part, "write", write)
        m.setattr(corpus, "_fill", lambda w, s, b: fill(w, s, b, every=2))
        download("stories", 30, tmp_path, overwrite=True, progress=False)
    assert files(tmp_path) == before
    with pytest.raises(FileExistsError, match="unfinished"):
        download("stories", 40, tmp_path, progress=False)
    new = download("stories", 30, tmp_path, progress=False)  # goes on
    assert new["splits"]["train"]["documents"] == 30


def test_one_line_errors(tmp_path):
    out, quiet = tmp_path / "out", dict(progress=False)
    (tmp_path / "one.txt").write_text("a single document")
    (tmp_path / "empty.txt").write_text("")
    cases = [
        (ConnectionError, "--dataset stories", ("tinystories", 10, out)),
        (ConnectionError, "some/thing", ("some/thing", 10, out)),
        (ValueError, "try tinystories", ("tinystory", 10, out)),
        (ValueError, "stories, tinystories, openwebtext", ("zzz", 10, out)),
        (FileNotFoundError, "no text in", (str(tmp_path / "no.txt"), 10, out)),
        (FileNotFoundError, "no text in", ("missing.jsonl", 10, out)),
        (ValueError, "too few documents, 1 for train and 0", (tmp_path / "one.txt", 10, out)),
        (ValueError, "too few documents, 0 for train", (tmp_path / "empty.txt", 10, out)),
        (ValueError, "at least 1", ("stories", 0, out)),
        (ValueError, "never end", ("stories", None, out)),
    ]
    for kind, message, args in cases:
        with pytest.raises(kind, match=message) as e:
            download(*args, **quiet)
        assert "\n" not in str(e.value)
        assert not list(tmp_path.glob("out/*"))


def test_a_stream_that_breaks_off(tmp_path, hub, monkeypatch):
    "An error of the network in the middle says what to do, and the next run goes on."
    field, left = corpus.text_field, iter(range(250))

    def broken(*args):
        if next(left, None) is None:
            raise RuntimeError("connection reset by peer")
        return field(*args)

    with monkeypatch.context() as m:
        m.setattr(corpus, "text_field", broken)
        with pytest.raises(ConnectionError, match="repeat the command"):
            download("toy", 400, tmp_path / "out", progress=False)
    download("toy", 400, tmp_path / "out", progress=False)
    download("toy", 400, tmp_path / "whole", progress=False)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_pins():
    for source in HUB.values():
        assert len(source.revision) == 40 and source.train.endswith(".parquet")
        assert source.licence != Source("x").licence


def test_progress_shows_and_nothing_else(tmp_path, hub):
    code = ("from llmfs.data.corpus import *; from llmfs.data.corpus import HUB, Source, download;"
            f"HUB['toy'] = Source({str(hub)!r}, train='data/train-*.parquet');"
            f"download('toy', 300, {str(tmp_path / 'out')!r})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and "330/330" in done.stderr
    assert "Exception" not in done.stderr and "Warning" not in done.stderr
