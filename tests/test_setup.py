"tools/setup.sh and the Makefile, on machines that we imitate: every program they call is a stand-in"

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REAL = "bash cat cksum dirname head mkdir rm sed tr awk make env chmod cp".split()

PYTHON = """#!/bin/bash
# stands in for python: VERSION is its minor version; makes environments; records what pip gets
case "$*" in
    *version_info*) [ "${VERSION:-13}" -ge 11 ] ;;
    --version) echo "Python 3.${VERSION:-13}.0" ;;
    "-m venv"*) [ -z "${NO_VENV:-}" ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip install"*) shift 3; printf '%s\\n' "$*" >> "$LOG"; [ -z "${PIP_FAILS:-}" ] ;;
    *) exit 9 ;;
esac
"""
UV = """#!/bin/bash
case "$*" in
    venv*) mkdir -p .venv/bin; cp "$(dirname "$0")/fakepython" .venv/bin/python ;;
    "pip install"*) printf 'uv %s\\n' "$*" >> "$LOG" ;;
esac
"""


class Machine:
    "A clone whose path has a space and ends in llmfs, and a PATH of stand-ins"

    def __init__(self, tmp: Path):
        self.clone, self.bin, self.log = tmp / "my books" / "llmfs", tmp / "bin", tmp / "log"
        (self.clone / "tools").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("pyproject.toml", "constraints.txt", "Makefile", "tools/setup.sh"):
            shutil.copy(ROOT / name, self.clone / name)
        for name in REAL:
            (self.bin / name).symlink_to(shutil.which(name))
        self.put("python3", PYTHON)
        self.says("uname", 'case "$1" in -s) echo Linux ;; *) echo x86_64 ;; esac')
        self.says("getconf", "echo glibc 2.39")

    def put(self, name: str, text: str):
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def says(self, name: str, script: str):
        self.put(name, f"#!/bin/bash\n{script}\n")

    def run(self, *command: str, **env: str):
        env = {"PATH": str(self.bin), "LOG": str(self.log), "HOME": str(self.clone)} | env
        return subprocess.run(command, cwd=self.clone, env=env, capture_output=True, text=True)

    def setup(self, *extras: str, **env: str):
        return self.run("bash", "tools/setup.sh", *extras, **env)

    def installs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def one_line(done, *words):
    "It failed with one line that holds the words"
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("llmfs: ")
    for word in words:
        assert word in done.stderr


def test_python_too_old(machine):
    done = machine.setup(VERSION="9")
    one_line(done, "Python 3.11 or newer", "found Python 3.9.0")
    assert not (machine.clone / ".venv").exists() and not machine.installs()


def test_python_missing(machine):
    (machine.bin / "python3").unlink()
    one_line(machine.setup(), "Python 3.11 or newer", "found none")


def test_newer_python_beside_an_old_one(machine):
    machine.put("python3.12", PYTHON)
    machine.put("python3", PYTHON.replace("VERSION:-13", "OLD:-9"))
    assert machine.setup().returncode == 0


def test_python_asked_for(machine):
    machine.put("other", PYTHON)
    assert machine.setup(PYTHON="other").returncode == 0
    shutil.rmtree(machine.clone / ".venv")
    one_line(machine.setup(PYTHON="other", VERSION="8"), "other is not Python 3.11")


def test_venv_missing(machine):
    one_line(machine.setup(NO_VENV="1"), "python3-venv")
    assert not (machine.clone / ".venv").exists()


def test_environment_of_an_old_python(machine):
    assert machine.setup().returncode == 0
    one_line(machine.setup(VERSION="10"), "rm -rf .venv")


@pytest.mark.parametrize(
    "script, backend",
    [
        ("exit 127", "cpu"),
        ("echo '| NVIDIA-SMI 470.1  Driver Version: 470.1  CUDA Version: 11.4 |'", "cpu"),
        ("echo '| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: 12.4 |'", "cuda12"),
        ("echo '| NVIDIA-SMI 580.82  Driver Version: 580.82  CUDA Version: 13.0 |'", "cuda13"),
        ("echo '| NVIDIA-SMI 590.1 KMD Version: 590.1 CUDA UMD Version: 13.1 |'", "cuda13"),
        ("echo 'NVIDIA-SMI has failed because it could not reach the driver'; exit 9", "cpu"),
    ],
)
def test_backend_on_linux(machine, script, backend):
    machine.says("nvidia-smi", script)
    assert machine.setup("dev").returncode == 0
    (line,) = machine.installs()
    assert line.endswith(f"--editable .[{backend},dev]")
    assert "editable_mode=compat" in line and "--constraint constraints.txt" in line


def test_backend_asked_for(machine):
    machine.says("nvidia-smi", "echo 'CUDA Version: 13.0'")
    assert machine.setup(BACKEND="cpu").returncode == 0
    assert machine.installs()[0].endswith(".[cpu]")


def test_apple_silicon(machine):
    machine.says("uname", 'case "$1" in -s) echo Darwin ;; *) echo arm64 ;; esac')
    assert machine.setup().returncode == 0
    assert machine.setup("dev").returncode == 0
    assert [x.split("--editable ")[1] for x in machine.installs()] == [".", ".[dev]"]


@pytest.mark.parametrize(
    "uname, words", [("Darwin x86_64", "Apple Silicon"), ("MINGW64_NT x86_64", "WSL")]
)
def test_machines_without_mlx(machine, uname, words):
    system, chip = uname.split()
    machine.says("uname", f'case "$1" in -s) echo {system} ;; *) echo {chip} ;; esac')
    one_line(machine.setup(), words)


def test_old_glibc(machine):
    machine.says("getconf", "echo glibc 2.31")
    one_line(machine.setup(), "glibc 2.35", "this is 2.31")


def test_no_getconf_is_no_reason_to_stop(machine):
    machine.says("getconf", "exit 1")
    assert machine.setup().returncode == 0


def test_second_call_is_instant_until_something_changes(machine):
    assert machine.setup("dev").returncode == 0
    assert machine.setup("dev").stdout == "" and machine.setup().stdout == ""
    assert len(machine.installs()) == 1
    assert machine.setup("book").returncode == 0  # another extra: added to those there
    assert machine.installs()[1].endswith(".[cpu,dev,book]")
    with (machine.clone / "constraints.txt").open("a") as f:
        f.write("# changed\n")
    assert machine.setup("dev").returncode == 0 and len(machine.installs()) == 3


def test_moved_clone_is_installed_again(machine):
    assert machine.setup().returncode == 0
    machine.clone = machine.clone.rename(machine.clone.with_name("elsewhere"))
    assert machine.setup().returncode == 0 and len(machine.installs()) == 2


def test_failed_installation_is_not_remembered(machine):
    one_line(machine.setup(PIP_FAILS="1"), "installation failed")
    assert machine.setup().returncode == 0 and len(machine.installs()) == 2


def test_uv_where_it_is_installed(machine):
    machine.put("uv", UV)
    machine.put("fakepython", PYTHON)
    (machine.bin / "python3").unlink()
    assert machine.setup("dev").returncode == 0
    (line,) = machine.installs()
    assert line.startswith("uv pip install --python .venv/bin/python --constraint")


def test_makefile_in_a_path_with_a_space(machine):
    done = machine.run("make", "help")
    listed = [x.split()[1] for x in done.stdout.splitlines()]
    assert listed == "help quickstart test check book book-check book-serve lab stress bench clean".split()
    done = machine.run("make", "check", VERSION="9")
    assert done.returncode == 2 and done.stderr.startswith("llmfs: needs Python 3.11 or newer")


def test_clean_keeps_what_cost_something(machine):
    for name in ("data", "checkpoints", ".venv", "book/_site", "nbs", "llmfs", "tests"):
        (machine.clone / name).mkdir(parents=True, exist_ok=True)
        (machine.clone / name / "x").touch()
    (machine.bin / "find").symlink_to(shutil.which("find"))
    assert machine.run("make", "clean").returncode == 0
    left = {str(p.relative_to(machine.clone)) for p in machine.clone.glob("*/x")}
    assert left == {f"{n}/x" for n in ("data", "checkpoints", ".venv", "nbs", "llmfs", "tests")}
    assert not (machine.clone / "book/_site").exists()
