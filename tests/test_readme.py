"""README and the chapters' map: their numbers are the record's, and every chapter is on the map."""

import html
import json
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
README = re.sub(r"\[([^\[\]]+)\]\([\w/]*results/[^)#]+#[^)]+\)", r"\1",  # keys as the numbers they show
                (REPO / "README.md").read_text(encoding="utf-8"))
RECORD = json.loads((REPO / "nbs/results/quickstart.json").read_text(encoding="utf-8"))
RESULT = README[README.index("A story that"):README.index("## Two commands")]
CHAPTERS = sorted(p.relative_to(REPO / "nbs").with_suffix("").as_posix()
                  for p in (REPO / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def printed():
    "Rows of the table that `llmfs quickstart` prints for the record."
    from llmfs.quickstart import report_text
    lines = report_text(RECORD).split("\n\n")[0].splitlines()[1:]
    return {cells[0]: cells[1:] for cells in (re.split(r"  +", line) for line in lines)}


def test_the_table_is_what_the_command_printed():
    rows = [[c.strip() for c in line.strip("|").split("|")]
            for line in RESULT.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "model", "5-gram", "least possible"] and len(rows) == 5
    expected = printed()
    for name, *cells in rows[2:]:
        assert [c for c in cells if c] == expected[name], name


def test_every_number_of_the_result_is_the_records():
    bits, made, run = (RECORD[k] for k in ("bits_per_byte", "samples", "training"))
    assert 0 < bits["floor"] < bits["model"] < bits["ngram"]
    known = {f"{bits[k]:.4f}" for k in ("model", "ngram", "floor")}
    known |= {f"{bits[k]:.3f}" for k in ("model_ratio", "ngram_ratio")}
    known |= {f"{made[k]['accepted']:.1%}" for k in ("model", "ngram")}
    known |= {f"{run['seconds'] / 60:.1f}"}
    assert set(re.findall(r"\d+\.\d+%?", RESULT)) == known
    q = RECORD["settings"]
    assert f"On {q['n_eval']:,} stories" in RESULT and f"Of {q['n_samples']} stories" in RESULT
    assert RECORD["device"] in RESULT
    assert "makes none that pass" in RESULT and made["ngram"]["accepted"] == 0
    assert "within one percent" in RESULT and bits["model_ratio"] < 1.01


def test_the_picture_of_the_story_is_the_records():
    picture, story = (REPO / "nbs/images/story.svg").read_text(encoding="utf-8"), RECORD["story"]
    shown = re.findall(r'font-size="15">([^<]+)<', picture)
    assert [html.unescape(w) for w in shown] == [w.strip() for w in story["words"]]
    shares = [float(x.rstrip("%")) / 100 for x in re.findall(r'font-size="11">([^<]+)<', picture)]
    assert all(abs(p - 2**-b) < 0.006 for p, b in zip(shares, story["bits_per_word"], strict=True))
    assert "".join(story["words"]) == RECORD["samples"]["stories"][0]


def test_what_is_said_of_the_story_is_so():
    priced = [(w.strip(" .,\""), 2**-b) for w, b in zip(RECORD["story"]["words"], RECORD["story"]["bits_per_word"])]
    for word in re.search(r"choices such as ([\w ,]+) stand", RESULT)[1].replace(" and", ",").split(", "):
        first, *later = [p for w, p in priced if w == word]
        assert 0.05 <= first <= 0.2 and all(p >= 0.985 for p in later), word


def test_the_picture_was_drawn_from_the_record():
    path = re.search(r"!\[[^]]+\]\(([^)]*quickstart.svg)\)", RESULT)[1]
    bits = RECORD["bits_per_byte"]
    claim = re.search(r"<dc:description>(.+)</dc:description>", (REPO / path).read_text())[1]
    assert re.findall(r"\d\.\d+", claim) == [f"{bits[k]:.4f}" for k in ("model", "floor", "ngram")]


def test_the_record_is_of_todays_defaults():
    pytest.importorskip("mlx.core")
    from dataclasses import asdict

    from llmfs.quickstart import Quickstart
    assert RECORD["settings"] == asdict(Quickstart())


def test_the_losses_end_where_the_results_say():
    from math import log
    c = RECORD["loss"]["validation"]
    end = c["loss"][-1] * c["tokens_per_byte"] / log(2)
    assert end == pytest.approx(RECORD["bits_per_byte"]["model"], rel=0.01)
    assert c["step"][-1] == RECORD["training"]["steps"]


@pytest.mark.parametrize("where", ["README.md", "nbs/00a_overview.ipynb"])
def test_every_chapter_is_on_the_map(where):
    text = (REPO / where).read_text(encoding="utf-8")
    on_map = set(re.findall(r"\]\((?:nbs/)?((?:experiments/)?\w[\w.-]+)\.ipynb\)", text))
    assert on_map == set(CHAPTERS), (where, on_map ^ set(CHAPTERS))


def test_the_first_change_silences_a_head():
    mx = pytest.importorskip("mlx.core")
    from types import ModuleType

    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    below, line = re.search(r"below `([^`]+)`, add\n\n   ```python\n   (.+)\n", text).groups()
    source = (REPO / "llmfs/model/attention.py").read_text(encoding="utf-8")
    assert source.count(below) == (REPO / "nbs/02b_model.attention.ipynb").read_text(encoding="utf-8").count(below) == 1
    changed = ModuleType("llmfs.model.changed")
    changed.__package__ = "llmfs.model"
    exec(source.replace(below, f"{below}\n{line}"), vars(changed))
    layer, x = changed.Attention(16, 2), mx.random.normal((1, 5, 16))
    before, values = layer(x), layer.v_proj.weight
    for head, heard in ((slice(0, 8), False), (slice(8, 16), True)):
        layer.v_proj.weight = mx.array(values)
        layer.v_proj.weight[head] += 1
        assert (mx.abs(layer(x) - before).max().item() > 1e-3) == heard
