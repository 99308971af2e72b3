"The package from outside: what the wheel holds, what an import costs, what works without MLX"

import os
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
    for extra in ("cpu", "cuda12", "cuda13", "book", "dev", "ref"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_installed_wheel_works(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import llmfs.settings as s; print(s.__file__); s.settings('00a')"
    done = python(code, tmp_path, LLMFS_SCALE="ci")
    assert done.stdout.split("\n")[0].startswith(str(tmp_path)), done.stderr
    assert "scale ci" in done.stdout


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
