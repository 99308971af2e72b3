import json

import llmfs
from llmfs import quickstart as Q

import pytest

SMALL = dict(n_stories=300, vocab_size=400, batch_size=2, seq_len=256, max_steps=4,
             n_eval=10, n_samples=4, max_tokens=40)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick") / "run"
    lines = []
    results = Q.quickstart(Q.Quickstart(out=str(out), **SMALL), say=lines.append)
    return out, results, lines


def test_five_steps_and_their_numbers(run):
    out, results, lines = run
    assert [line[:3] for line in lines] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    bits = results["bits_per_byte"]
    assert 0 < bits["floor"] < bits["ngram"] < bits["model"]
    assert bits["model_ratio"] == pytest.approx(bits["model"] / bits["floor"])
    assert len(results["samples"]["stories"]) == 3
    for name in ("best.npz", "metrics.jsonl", "tokenizer.json", "run.json", "quickstart.json"):
        assert (out / name).is_file()
    assert json.loads((out / "quickstart.json").read_text())["finished"]
    text = Q.report_text(results)
    assert "10 unseen stories" in text and str(out) in text


def test_floor_is_that_of_the_scored_stories(run):
    from itertools import islice
    from math import log

    from llmfs.data.stories import Stories

    _, results, _ = run
    unseen = list(islice(Stories().stream("validation", 1), 10))
    bits = -sum(s.logprob for s in unseen) / log(2)
    assert results["bits_per_byte"]["floor"] == pytest.approx(
        bits / sum(len(s.text.encode()) for s in unseen)
    )


def fake(folder, note=None, best=b"weights", **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "best.npz").write_bytes(best)
    if note is not None:
        (folder / "quickstart.json").write_text(json.dumps(note))
    for name, content in files.items():
        (folder / name).write_text(content)


SIGNED = {"finished": True, "best": Q.sha256(b"weights").hexdigest()}


def test_an_empty_folder_is_used(tmp_path):
    Q.make_room(tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["quickstart.json"]


def test_a_finished_quick_start_waits_in_previous(tmp_path):
    fake(tmp_path, SIGNED, notes="mine")
    Q.make_room(tmp_path)
    assert (tmp_path / "previous" / "best.npz").read_bytes() == b"weights"
    assert not (tmp_path / "best.npz").exists()
    assert (tmp_path / "notes").read_text() == "mine"
    fake(tmp_path, {"finished": False}, best=b"unfinished")  # the second one is stopped
    Q.make_room(tmp_path)
    assert (tmp_path / "previous" / "best.npz").read_bytes() == b"weights"
    (tmp_path / "best.npz").write_bytes(b"third")
    Q._settle(tmp_path, {})
    assert not (tmp_path / "previous").exists() and Q._is_ours(tmp_path)


@pytest.mark.parametrize(
    "note",
    [None, SIGNED | {"best": "other"}, {"finished": True}, []],
    ids=["somebody's run", "trained further", "unsigned", "damaged note"],
)
def test_anything_else_is_refused_and_untouched(tmp_path, note):
    fake(tmp_path, note)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="--overwrite"):
        Q.make_room(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    Q.make_room(tmp_path, overwrite=True)
    assert not (tmp_path / "best.npz").exists()


def test_training_further_takes_the_folder_away_from_quickstart(run):
    from llmfs.training.prepare import continue_run

    out, _, _ = run
    continue_run(out, say=str, max_steps=5, max_minutes=None).fit()
    with pytest.raises(FileExistsError):
        Q.make_room(out)
