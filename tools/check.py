"""The house rules that a machine can check. Reads the tree, works on a copy, changes nothing.

Run by `make check`. Prints one line a finding and exits 1 where there is any.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = {"__init__.py", "_modidx.py"}  # modules that have no notebook of their own
KEPT = ("__init__.py", "__main__.py")  # hand-written
MAX_BYTES, MAX_LINES = 300_000, 40
HOME = re.compile(r"(?<![\w.])(?:/home/|/Users/|/root/|/private/var/|/tmp/tmp)\w+")


class Notebook:
    "A chapter or an experiment, as the rules see it"

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in self.cells:
            cell["source"] = "".join(cell["source"])
        self.code = [c for c in self.cells if c["cell_type"] == "code"]
        self.source = "\n".join(c["source"] for c in self.cells)
        match = re.search(r"^#\|\s*default_exp\s+(\S+)", self.source, re.M)
        self.module = match[1] if match else None

    def imports(self, exported=False) -> list[str]:
        "Modules imported, in order; `from a import b` gives a.b"
        found = []
        for cell in self.code:
            if exported and not re.search(r"^#\|\s*exports?\b", cell["source"], re.M):
                continue
            for node in ast.walk(parse(cell["source"])):
                if isinstance(node, ast.Import):
                    found += [a.name for a in node.names]
                elif isinstance(node, ast.ImportFrom):
                    found += [f"{node.module}.{a.name}" for a in node.names]
        return found


def parse(source: str) -> ast.AST:
    "A code cell as a syntax tree; lines with magics (%matplotlib, !ls) are left out"
    try:
        return ast.parse(source)
    except SyntaxError:
        lines = [x for x in source.split("\n") if not re.match(r"\s*[%!?]", x)]
        return ast.parse("\n".join(lines))


def house(root: Path) -> list[str]:
    "Rules on notebooks and modules, from their text alone"
    notebooks = [Notebook(p) for p in sorted((root / "nbs").glob("*.ipynb"))]
    experiments = [Notebook(p) for p in sorted((root / "nbs").glob("*/*.ipynb"))]
    bad = one_to_one(root, notebooks, experiments)
    place = {f"llmfs.{nb.module}": i for i, nb in enumerate(notebooks)}
    for i, nb in enumerate(notebooks + experiments):
        own = i if i < len(notebooks) else len(notebooks)
        bad += [f"{nb.path.name}: {x}" for x in rules(nb, own, place)]
    for path in [*root.glob("tests/**/*.py"), *root.glob("tools/*.py"), *root.glob("book/*.py")]:
        if path != Path(__file__) and (hit := HOME.search(path.read_text(encoding="utf-8"))):
            bad.append(f"{path.relative_to(root)}: the path {hit[0]} is on one machine only")
    return bad


def one_to_one(root: Path, notebooks: list[Notebook], experiments: list[Notebook]) -> list[str]:
    "Each notebook one module, each module one notebook"
    bad, owner = [], {}
    for nb in notebooks:
        expected = re.sub(r"^\d\d[a-z]_", "", nb.name)
        if nb.name == "00a_overview":
            expected = "settings"
        if nb.module != expected:
            bad.append(f"{nb.path.name}: default_exp is {nb.module}, the file's name says {expected}")
        if nb.module in owner:
            bad.append(f"{nb.path.name}: {owner[nb.module]} exports {nb.module} already")
        owner[nb.module] = nb.path.name
    bad += [f"{nb.path.name}: an experiment exports nothing" for nb in experiments if nb.module]
    for path in sorted((root / "llmfs").rglob("*.py")):
        module = ".".join(path.relative_to(root / "llmfs").with_suffix("").parts)
        if path.name not in GENERATED and path.name not in KEPT and module not in owner:
            bad.append(f"{path.relative_to(root)}: no notebook exports it; remove it or restore the notebook")
    return bad


def rules(nb: Notebook, own: int, place: dict[str, int]) -> list[str]:
    "What a notebook may hold and import; own is its place among the chapters"
    try:
        imports, exported = nb.imports(), nb.imports(exported=True)
    except SyntaxError as e:
        return [f"a code cell is no Python: {e}"]
    bad = []
    first = {m: next((i for i, x in enumerate(imports) if x.split(".")[0] == m), None) for m in ("llmfs", "mlx")}
    if first["mlx"] is not None and (first["llmfs"] is None or first["llmfs"] > first["mlx"]):
        bad.append("imports mlx before llmfs, which must load a fast BLAS first")
    for name in exported if nb.name == "00a_overview" else imports:
        later = [m for m, i in place.items() if i > own and (name == m or name.startswith(m + "."))]
        bad += [f"imports {m}, a later chapter" for m in later]
    if any(x.endswith(".*") for x in imports):
        bad.append("imports *: name what is needed")
    text = json.dumps(nb.cells, ensure_ascii=False)
    if hit := HOME.search(text):
        bad.append(f"the path {hit[0]} is on one machine only")
    if (size := nb.path.stat().st_size) > MAX_BYTES:
        bad.append(f"{size:,} bytes; at most {MAX_BYTES:,}")
    for cell in nb.code:
        if any(o["output_type"] == "error" for o in cell["outputs"]):
            bad.append(f"cell {cell['id']} stores an error")
        if (n := cell["source"].count("\n") + 1) > MAX_LINES:
            bad.append(f"cell {cell['id']} has {n} lines; at most {MAX_LINES}")
    return bad


def run(*command: str, cwd: Path) -> str:
    "What a command says; '' where it succeeds"
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip() or f"exit {done.returncode}"


def nbdev(function: str, cwd: Path) -> list[str]:
    module = {"nbdev_clean": "nbdev.clean", "nbdev_export": "nbdev.doclinks"}[function]
    said = run("-c", f"from {module} import {function}; {function}()", cwd=cwd)
    return [f"{function}: {said}"] if said else []


def sources(path: Path) -> list:
    "A notebook without its outputs"
    nb = json.loads(path.read_text(encoding="utf-8"))
    return [nb["metadata"], [{k: v for k, v in c.items() if k != "outputs"} for c in nb["cells"]]]


def drift(root: Path) -> list[str]:
    "Clean and export a copy: nothing may change. Then notebook → text → notebook"
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "text")
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "llmfs-check"
        copy.mkdir()
        for name in ("nbs", "llmfs"):
            shutil.copytree(root / name, copy / name, ignore=ignore)
        shutil.copy(root / "pyproject.toml", copy)
        before = {p: sources(p) for p in sorted((copy / "nbs").rglob("*.ipynb"))}
        bad = nbdev("nbdev_clean", copy)
        bad += [f"{p.name}: not clean; run nbdev-clean" for p in before if before[p] != sources(p)]
        bad += nbdev("nbdev_export", copy)
        names = {p.relative_to(r) for r in (root, copy) for p in (r / "llmfs").rglob("*.py")}
        for name in sorted(names):
            old, new = [p.read_bytes() if (p := r / name).is_file() else b"" for r in (root, copy)]
            if old != new:
                bad.append(f"{name}: differs from its notebook; run nbdev-export")
        files = [str(p.relative_to(copy)) for p in before]
        said = run("-m", "jupytext", "-q", "--test", "-x", "--to", "py:percent", *files, cwd=copy)
        return bad + ([f"jupytext: notebook and text copy do not agree\n{said}"] if said else [])


def lint(root: Path) -> list[str]:
    said = run("-m", "ruff", "check", "--no-cache", "--quiet", "--output-format", "concise", ".", cwd=root)
    return said.splitlines()


def check(root: Path) -> list[str]:
    "Every finding in the tree at root"
    return house(root) + drift(root) + lint(root)


if __name__ == "__main__":
    findings = check(ROOT)
    print("\n".join(findings) or "check: no drift, no finding")
    sys.exit(bool(findings))
