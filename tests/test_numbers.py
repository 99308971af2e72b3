"""Measured numbers in prose: keys into records and outputs, and none typed by hand."""

import json
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "book"))
import measured  # noqa: E402

RECORD = {"a": {"b": 0.11504, "n": 16800}, "runs": [{"size": "tiny", "s": 168.6}, {"size": "50m", "s": 7}],
          "tokens/s": 11714, "two words": 3, "ok": True, "zero": 0}  # fmt: skip


@pytest.mark.parametrize("formula, value", [
    ("a.b", 0.11504), ("runs.0.s", 168.6), ("runs.[size=50m].s", 7), ("runs.0.s/60", 2.81),
    ("a.n*2", 33600), ("runs.0.s/runs.1.s", 168.6 / 7), ("tokens%2Fs", 11714), ("two%20words", 3)])
def test_paths_and_formulas(formula, value):
    assert measured.value_of(RECORD, formula) == pytest.approx(value)


@pytest.mark.parametrize("formula", ["a.c", "a", "runs.2.s", "runs.[size=1b].s", "a.b.c", "ok", "", "runs.x"])
def test_an_unknown_key_is_an_error(formula):
    with pytest.raises(KeyError):
        measured.value_of(RECORD, formula)


@pytest.mark.parametrize("shown, value, now", [
    ("0.1159", 0.11504, "0.1150"), ("1", 2.6, "3"), ("1,234", 9999.6, "10,000"), ("85%", 0.9, "90%"),
    ("85.0%", 0.9012, "90.1%"), ("2.8 minutes", 3.04, "3.0 minutes"), ("about 7×", 8.2, "about 8×"),
    ("−1.5", -2.25, "−2.2"), ("12", 16800, "16,800")])
def test_a_value_is_written_as_the_text_writes_it(shown, value, now):
    assert measured.written_like(shown, value) == now


@pytest.mark.parametrize("shown", ["many", "1 of 2"])
def test_a_key_stands_for_one_number(shown):
    with pytest.raises(KeyError, match="holds"):
        measured.written_like(shown, 1.0)


def cell(source, *outputs, kind="code"):
    made = {"cell_type": kind, "id": "x", "source": source}
    return made | {"outputs": [{"output_type": "stream", "text": o} for o in outputs]}


def test_numbers_of_an_output():
    shown = cell("#| label: ratios\nx", "{'a': 0.39, 'b': -1,200}\n", "3e-05 v2 7%")
    assert measured.printed_numbers(shown) == [0.39, -1200, 3e-05, 0.07]
    cells = measured.labelled([cell("y = 1"), shown])
    assert measured.fill("[0.55](#ratios.0) [9](#other) [§](#ratios)", cells).startswith("[0.39](#ratios.0) [9](#other)")
    for text in ("[0.4](#ratios.9)", "[0.4](#rations.0)"):
        with pytest.raises(KeyError):
            measured.fill(text, cells)


def test_a_record_that_is_missing_is_an_error():
    with pytest.raises(KeyError, match="no record"):
        measured.fill("[1](results/none.json#a)")


QUICK = "results/quickstart.json#training.seconds/60"


def test_the_book_gets_the_number_of_the_record():
    pytest.importorskip("nbdev")
    import nbdev_reader
    now = json.loads((REPO / "nbs/results/quickstart.json").read_text(encoding="utf-8"))["training"]["seconds"] / 60
    nb = {"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": f"# T\n[99.9 minutes]({QUICK})"}],
          "metadata": {}, "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
    (made,) = nbdev_reader.read(json.dumps(nb)).cells
    assert f"[{now:.1f} minutes](https://" in made.source and "{.measured}" in made.source
    nb["cells"][0]["source"] = "# T\n[1](results/quickstart.json#training.hours)"
    with pytest.raises(KeyError, match="hours"):
        nbdev_reader.read(json.dumps(nb))


@pytest.mark.parametrize("text", [
    "It took 4.3 s.", "It took 12 ms a step.", "about 3 minutes", "at 11,714 tokens/s", "reads 90 MB/s", "of 2.5 GB",
    "85% of them", "85 percent", "1.12 bits per byte", "a loss of 0.4", "2.5 times faster", "3× the size",
    "three times as fast", "forty seconds", "- an item, 5 ms", "| row | 5 GB |", "between 2 and 4 hours", "it is 0.123"])
def test_typed_numbers_are_found(text):
    assert measured.typed(text), text


@pytest.mark.parametrize("text", [
    "`4.3 s`", "$4.3$ and $$2 \\cdot 3\\% $$", f"[2.8]({QUICK}) minutes", "B = 4 and 12 heads", "Python 3.11",
    "it needs 2 GB {cite:p}`dao2022`.", "Others say [80 GB/s](https://example.org).", "chapter 02b, part 2",
    "at most 4 minutes <!-- given: the limit in Quickstart -->", "```\n4 s\n```", "![5 s](a.svg)", "step 4 sums",
    "- 5 GB\n- 6 GB\n<!-- given: sizes of cards -->", "2 characters", "MLX 0.32 or newer", "glibc 2.35"])
def test_what_is_not_measured_passes(text):
    assert measured.typed(text) == [], text


def test_an_allowance_is_for_its_item_only_and_has_a_reason():
    assert measured.typed("- 5 GB <!-- given: a -->\n- 6 GB") == ["6 GB"]
    assert measured.typed("5 GB <!-- given: -->") == ["5 GB"]
    assert measured.typed("It takes 5 s. Others need 6 s {cite:p}`a`.") == ["5 s"]


def test_exercises_may_suppose():
    cells = [cell("## Exercises", kind="markdown"), cell("Suppose 80 GB.", kind="markdown"),
             cell("## References", kind="markdown"), cell("It took 80 s.", kind="markdown")]  # fmt: skip
    assert [t for _, t in measured.markdown_cells(cells)][-1] == "It took 80 s." and len(list(measured.markdown_cells(cells))) == 2


@pytest.mark.parametrize("path", measured.sources(), ids=lambda p: p.stem)
def test_numbers_hold(path):
    said = measured.outdated(path)
    assert not said, "\n".join([*said, "write today's: python book/measured.py --fill"])


@pytest.mark.parametrize("path", measured.sources(), ids=lambda p: p.stem)
def test_no_measured_number_is_typed(path):
    said = measured.findings(path)
    assert not said, "\n".join([f"{path.name}: typed by hand (book/measured.py says what to do)", *said])
