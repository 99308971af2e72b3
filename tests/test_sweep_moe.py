"tools/sweep_moe.py and tools/ledger.py: what a sweep of mixtures records, and what its texts are made of"

import importlib
import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path

import llmfs  # noqa: F401
from llmfs.data.stories import CLASSES, Stories

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs/results"


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    "The tools as they are on the command line, where they import each other"
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sweep_moe = importlib.import_module("sweep_moe")
    monkeypatch.setattr(sweep_moe, "HELD_OUT", 20)
    monkeypatch.setattr(sweep_moe, "WATCHED", 8)
    return sweep_moe


@pytest.fixture
def ledger(tools):
    return importlib.import_module("ledger")


def test_a_page_holds_true_lines_and_costs_who_is_named(ledger):
    facts = ledger.all_lines()
    assert len(facts) == 49152 and set(facts.values()) == set(CLASSES["food"])
    page = next(ledger.Ledger(100).stream("train", 3))
    lines = page.text.removesuffix(".").split(". ")
    assert len(lines) == 20 and page.logprob == pytest.approx(-20 * math.log(100))
    first = list(facts)[:100]
    for line in lines:
        owner, food = line.removeprefix("The ").split(" likes ")
        assert owner in first and facts[owner] == food


def test_often_is_half_the_lines_of_training_and_not_of_the_exam(ledger):
    world = ledger.Ledger(320, often=16)
    often = [owner for owner, _ in world.often]
    share = {}
    for split in ("train", "validation"):
        text = " ".join(p.text for p in islice(world.stream(split, 0), 200))
        seen = Counter(line.removeprefix("The ").split(" likes ")[0] for line in text[:-1].split(". "))
        share[split] = sum(seen[o] for o in often) / 4000
    assert len(often) == 20
    assert abs(share["train"] - (0.5 + 0.5 / 16)) < 0.04 and abs(share["validation"] - 1 / 16) < 0.02


@pytest.mark.parametrize("n", [0, 49153])
def test_a_ledger_has_so_many_facts(ledger, n):
    with pytest.raises(ValueError, match="between 1 and 49152"):
        ledger.Ledger(n)


def test_parts_are_found_where_they_stand(ledger, tools):
    world = ledger.Ledger(50)
    text = next(world.stream()).text
    marks, at = world.marks(text), 0
    foods = []
    for end, _, group in marks:
        if group == "fact":
            foods.append(text[at:end].strip())
        at = end
    assert foods == [line.split(" likes ")[1] for line in text[:-1].split(". ")]
    story = next(Stories(40).stream("validation", 1)).text
    marks = tools.story_marks(story, Stories(40))
    assert marks[-1][0] == len(story)
    (at,) = [i for i, (_, slot, _) in enumerate(marks) if slot == "fact"]
    assert story[marks[at - 1][0] : marks[at][0]] in CLASSES["food"]


def moe_run(**more):
    shape = dict(n_layers=1, d_model=16, n_heads=1, d_ff=16, n_experts=4, kind="moe", dispatch="batched")
    train = dict(max_steps=4, batch_size=4, seq_len=64, warmup=1, compile=False)
    return dict(label="x", corpus="stories", n_stories=400, n_facts=8, vocab_size=300, shape=shape,
                train=train, watch=2, where=True) | more  # fmt: skip


def test_a_sweep_of_mixtures_says_what_was_reached_and_who_went_where(tools, tmp_path):
    dense = dict(n_layers=1, d_model=16, n_heads=1, d_ff=16)
    runs = [moe_run(), moe_run(label="d", shape=dense), moe_run(label="l", corpus="ledger", n_stories=100)]
    (grid := tmp_path / "grid.json").write_text(json.dumps(runs), encoding="utf-8")
    args = tools.sweep.arguments("", str(tmp_path)).parse_args([str(grid), "--out", str(tmp_path / "out.jsonl")])
    kind = tools.sweep.Kind(tools.perform, tools.text_files, tools.line_of, tools.TOLD)
    assert tools.sweep.main(args, kind=kind) == 0
    moe, d, ledger = tools.sweep.read_records(tmp_path / "out.jsonl")
    assert moe["active"] < moe["params"] and d["active"] == d["params"] and d["watched"] == []
    assert [w["step"] for w in moe["watched"]] == [2, 4] and 0 < moe["watched"][0]["entropy"][0] <= math.log(4)
    assert sum(moe["watched"][0]["load"][0]) == pytest.approx(1, abs=1e-3)
    assert set(moe["parts"]) == {"fixed text", "choice", "recall", "fact"}
    assert set(ledger["parts"]) == {"fixed text", "choice", "fact"} and ledger["ratio"] > 1
    asked = sum(moe["slots"][0]["fact"])
    assert asked > 0 and asked % 2 == 0  # each token asks two
    lines = [json.dumps(r | dict(device=r["run"]["label"])) for r in (moe, d, ledger)]
    (tmp_path / "out.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tools.condense(tmp_path / "out.jsonl", tmp_path)
    rows = json.loads((tmp_path / "moe_runs.json").read_text(encoding="utf-8"))
    assert [r["label"] for r in rows] == [r["device"] for r in rows] == ["d", "l", "x"] and rows[2]["bits_per_byte"] == moe["bits_per_byte"]


def test_the_records_of_the_book_are_runs_of_its_grids(tools):
    read = lambda name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    asked = {(r["label"], r["train"]["seed"]): r["train"]["max_steps"] for n in ("moe_grid", "moe_books_grid") for r in read(n)}
    rows = read("moe_runs")
    found = {(r["label"], r["seed"]): r["steps"] for r in rows}
    assert len(found) == len(rows) and all(asked[key] == steps for key, steps in found.items())
