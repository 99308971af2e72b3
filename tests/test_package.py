"The package from outside: what the wheel holds, what an import costs, what works without MLX"

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLAIN = ["data.*", "tokenizer.*", "model.ngram", "settings", "hardware"]  # these know no MLX


def python(code: str, *path: Path, **env: str):
    "Run code in a fresh interpreter that sees only path and the installed packages"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | env
    return subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the tree"
    pytest.importorskip("setuptools", minversion="77")
    tmp = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp)
    shutil.copytree(ROOT / "llmfs", tmp / "llmfs", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=tmp, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((tmp / "dist").glob("*.whl"))


def test_wheel_holds_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    held = {str(p.relative_to(ROOT)) for p in (ROOT / "llmfs").rglob("*.py")}
    assert held | {"llmfs/py.typed"} <= names
    info = next(n.split("/")[0] for n in names if n.endswith("METADATA"))
    assert {n for n in names if not n.startswith(info)} == held | {"llmfs/py.typed"}
    entry = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "llmfs = llmfs.cli:main" in entry
    metadata = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode()
    for extra in ("cpu", "cuda12", "cuda13", "book", "browser", "dev", "ref"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_installed_wheel_works(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import llmfs.settings as s; print(s.__file__); s.settings('00a')"
    done = python(code, tmp_path, LLMFS_SCALE="ci")
    assert done.stdout.split("\n")[0].startswith(str(tmp_path)), done.stderr
    assert "scale ci" in done.stdout


def test_the_wheel_is_small_typed_and_says_what_it_is(wheel):
    import tomllib
    from email.parser import Parser

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wheel.stat().st_size < 500_000
    archive = zipfile.ZipFile(wheel)
    info = next(n.split("/")[0] for n in archive.namelist() if n.endswith("METADATA"))
    meta = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    for field in ("Name", "Version", "Summary", "Author", "License-Expression", "Keywords", "Requires-Python"):
        assert meta[field], f"{field} is missing"
    links = dict(x.split(", ", 1) for x in meta.get_all("Project-URL"))
    assert {"Homepage", "Source", "Issues", "Changelog"} <= set(links)
    assert len(meta.get_payload()) > 1000 and meta["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in meta.get_all("Classifier") and archive.read("llmfs/py.typed") == b""
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert len(project["keywords"]) >= 5


def test_the_index_gets_a_readme_without_relative_links():
    spec = importlib.util.spec_from_file_location("index_readme", ROOT / "tools" / "index_readme.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.absolute((ROOT / "README.md").read_text(), "v9.9.9")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets and all(re.match(r"https://|#", t) for t in targets)
    assert "](https://raw.githubusercontent.com/llmfs/llmfs/v9.9.9/nbs/images/story.svg)" in text
    kept = [t for t in targets if "/v9.9.9/" in t]
    assert kept and all((ROOT / t.split("/v9.9.9/")[1].split("#")[0]).exists() for t in kept)


def test_help_explains_the_package():
    code = "import llmfs, pydoc; print(pydoc.render_doc(llmfs, renderer=pydoc.plaintext))"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "PACKAGE CONTENTS" in done.stdout and "a book you run" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "llmfs").rglob("*.py")), ids=lambda p: p.stem)
def test_every_public_name_is_documented(path):
    tree = ast.parse(path.read_text())
    if path.name == "__init__.py" and not tree.body or path.name == "_modidx.py":
        return
    assert ast.get_docstring(tree), f"{path.name}: the module has no docstring"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def standalone(name: str, folder: Path) -> Path:
    "The script that the book offers for one chapter, alone in a folder"
    pytest.importorskip("jupytext")
    sys.path.insert(0, str(ROOT / "book"))
    import downloads

    nb = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    script = folder / "chapter.py"
    script.write_text(downloads.script(downloads.standalone(nb, name, "0")), encoding="utf-8")
    return script


QUICK = ["01a_data.text", "02a_model.embedding"]
ALL = sorted(p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
             if ".ipynb_checkpoints" not in p.parts)  # fmt: skip


def runs_alone(name, wheel, tmp_path):
    if importlib.util.find_spec("mlx") is None:
        pytest.skip("MLX is not installed")
    package, alone = tmp_path / "package", tmp_path / "alone"
    zipfile.ZipFile(wheel).extractall(package)
    alone.mkdir()
    script = standalone(name, alone)
    script.write_text(script.read_text() + "\nassert __import__('llmfs').__file__.startswith("
                      f"{str(package)!r})\n")  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(package), "LLMFS_SCALE": "ci", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, script.name], cwd=alone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", QUICK)
def test_a_chapter_runs_alone_with_the_wheel(name, wheel, tmp_path):
    runs_alone(name, wheel, tmp_path)


@pytest.mark.stress
@pytest.mark.parametrize("name", [n for n in ALL if n not in QUICK])
def test_every_chapter_runs_alone_with_the_wheel(name, wheel, tmp_path):
    runs_alone(name, wheel, tmp_path)


def modules(patterns: list[str]) -> list[str]:
    found = []
    for pattern in patterns:
        paths = (ROOT / "llmfs").glob(pattern.replace(".", "/") + ".py")
        names = [p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in paths]
        found += [n for n in names if not n.endswith("__init__")]
    return sorted(found)


WITHOUT_MLX = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None\n"


@pytest.mark.parametrize("module", modules(PLAIN))
def test_works_without_mlx(module):
    done = python(WITHOUT_MLX + f"import {module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["llmfs", *modules(PLAIN), "llmfs.cli"])
def test_import_is_light(module):
    heavy = "mlx.core matplotlib datasets torch transformers pandas IPython nbdev".split()
    code = f"import sys, {module}; print(*[m for m in {heavy} if m in sys.modules])"
    done = python(code)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_version_is_said_once():
    import llmfs

    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert "version:" not in (ROOT / "CITATION.cff").read_text().replace("cff-version:", "")
    assert f"## {llmfs.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_kind_of_constraint_is_pinned():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(x) for x in lines if x and not x.startswith("#")]
    assert all(len(r.specifier) == 1 and str(r.specifier).startswith("==") for r in pins)
    for version in ("3.11.0", "3.12.0", "3.13.0"):  # no two pins of one package apply at once
        for system in ("linux", "darwin"):
            env = {"python_version": version[:4], "python_full_version": version, "sys_platform": system}
            names = [r.name for r in pins if not r.marker or r.marker.evaluate(env)]
            assert len(names) == len(set(names)) > 100


def test_constraints_hold_what_pyproject_asks_for():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [Requirement(x) for x in project["dependencies"] + sum(extras, [])]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(x) for x in lines if x and not x.startswith("#")]
    for r in asked:
        versions = [str(p.specifier)[2:] for p in pins if p.name == r.name]
        assert versions, f"{r.name} is not in constraints.txt: renew it (its second line says how)"
        assert all(r.specifier.contains(v) for v in versions), r
