"tools/check.py finds what it promises to find, and changes nothing"

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("check", ROOT / "tools" / "check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


def notebook(path: Path, *cells: str, outputs=(), metadata=None):
    "Write a notebook of code cells; a cell that starts with # and a space is Markdown"
    made = []
    for i, source in enumerate(cells):
        cell = {"cell_type": "markdown", "id": f"c{i}", "metadata": {}, "source": source.splitlines(True)}
        if not source.startswith("# "):
            cell |= {"cell_type": "code", "execution_count": None, "outputs": list(outputs)}
        made.append(cell)
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nb = {"cells": made, "metadata": metadata or {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


HEAD = "# A chapter\n> A promise."


@pytest.fixture
def house(tmp_path):
    "A house of two chapters and an experiment, in order"
    (tmp_path / "llmfs").mkdir()
    (tmp_path / "llmfs" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    notebook(tmp_path / "nbs/00a_overview.ipynb", HEAD, "#| default_exp settings", "#| export\nx = 1")
    notebook(tmp_path / "nbs/01a_data.stories.ipynb", HEAD, "#| default_exp data.stories", "#| export\ny = 2")
    notebook(tmp_path / "nbs/experiments/one.ipynb", HEAD, "from llmfs.data.stories import y")
    (tmp_path / "llmfs/data").mkdir()
    (tmp_path / "llmfs/settings.py").touch()
    (tmp_path / "llmfs/data/stories.py").touch()
    return tmp_path


@pytest.fixture
def exported(house):
    "The same, with its modules exported"
    assert not check.nbdev("nbdev_export", house)
    return house


def snapshot(root: Path) -> dict:
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_house_in_order(exported):
    before = snapshot(exported)
    assert check.house(exported) == [] and check.drift(exported) == []
    assert snapshot(exported) == before


def test_drift_is_found_and_left_alone(exported):
    (exported / "llmfs/settings.py").write_text("x = 1  # edited by hand\n")
    path = exported / "nbs/01a_data.stories.ipynb"
    path.write_text(path.read_text().replace('"execution_count": null', '"execution_count": 7'))
    before = snapshot(exported)
    found = check.drift(exported)
    assert "llmfs/settings.py: differs from its notebook; run nbdev-export" in found
    assert "01a_data.stories.ipynb: not clean; run nbdev-clean" in found and len(found) == 2
    assert snapshot(exported) == before


def test_text_copy_that_loses_a_cell_is_found(exported):
    notebook(exported / "nbs/experiments/one.ipynb", HEAD, "x = 1\n# %%\ny = 2")
    assert any("jupytext" in x for x in check.drift(exported))


CHAPTER = "01a_data.stories.ipynb"
EXPORT = "#| default_exp data.stories"


@pytest.mark.parametrize(
    "cells, said",
    [
        ((EXPORT, "import mlx.core as mx\nimport llmfs"), "imports mlx before llmfs"),
        ((EXPORT, "from mlx import core"), "imports mlx before llmfs"),
        ((EXPORT, "from llmfs.hardware import *"), "imports *"),
        ((EXPORT, "x = '/home" + "/ann/data'"), "is on one machine only"),
        ((EXPORT, "x = 1\n" * 40 + "x"), "has 41 lines; at most 40"),
        ((EXPORT, "x = 'y" + "y" * 300_000 + "'"), "at most 300,000"),
        ((EXPORT, "def f(:"), "is no Python"),
        (("#| default_exp data.story",), "the file's name says data.stories"),
        (("x = 1",), "default_exp is None"),
        (("#| default_exp settings",), "00a_overview.ipynb exports settings already"),
    ],
)
def test_rules(house, cells, said):
    notebook(house / "nbs" / CHAPTER, HEAD, *cells)
    found = [x for x in check.house(house) if said in x]
    assert found and found[0].startswith(CHAPTER)


def test_good_cells_pass(house):
    cells = ("import llmfs\nimport mlx.core as mx", "%matplotlib inline\nx = 1", "(1\n!= 2)", "from llmfs.settings import x")
    notebook(house / "nbs" / CHAPTER, HEAD, EXPORT, *cells)
    assert check.house(house) == []


def test_only_earlier_chapters(house):
    notebook(house / "nbs/01b_data.corpus.ipynb", HEAD, "#| default_exp data.corpus")
    for line in ("from llmfs.data.corpus import z", "import llmfs.data.corpus", "from llmfs.data import corpus"):
        notebook(house / "nbs" / CHAPTER, HEAD, EXPORT, line)
        (said,) = check.house(house)
        assert "imports llmfs.data.corpus, a later chapter" in said


def test_overview_may_look_ahead_but_not_export_it(house):
    path, name = house / "nbs/00a_overview.ipynb", "#| default_exp settings"
    notebook(path, HEAD, name, "from llmfs.data.stories import y")
    assert check.house(house) == []
    notebook(path, HEAD, name, "#| export\nfrom llmfs.data.stories import y")
    assert "a later chapter" in check.house(house)[0]


def test_orphan_module_and_exporting_experiment(house):
    (house / "llmfs/data/old.py").write_text("")
    notebook(house / "nbs/experiments/one.ipynb", HEAD, "#| default_exp data.two")
    found = "\n".join(check.house(house))
    assert "llmfs/data/old.py: no notebook exports it" in found
    assert "one.ipynb: an experiment exports nothing" in found


def test_stored_error(house):
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
    notebook(house / "nbs" / CHAPTER, HEAD, EXPORT, outputs=[error])
    assert "stores an error" in check.house(house)[0]
