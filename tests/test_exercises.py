"""Exercises: every one of the book has a specification; solutions pass it, stubs and wrong answers fail."""

import ast
import builtins
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import symtable
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import llmfs  # noqa: F401  before mlx
from llmfs.exercises import exercises, find, judge
from llmfs.grading import check_file, outline

import pytest

REPO = Path(__file__).parent.parent
NBS = REPO / "nbs"
CHAPTERS = [p.stem for p in sorted(NBS.glob("*.ipynb")) if not p.stem.startswith("07")]
HEADING = re.compile(r"### (\d+)\. (.+)")
CHECK = re.compile(r'^check\("(\w+\.\d+)", (\w+)\)$', re.M)
pytest.importorskip("mlx.core")


@cache
def cells(chapter):
    "(kind, source, outputs) of each cell."
    nb = json.loads((NBS / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    return [(c["cell_type"], "".join(c["source"]), c.get("outputs", [])) for c in nb["cells"]]


@cache
def sections(chapter):
    "Exercise number → (title, its cells), from the headings below ## Exercises."
    found, within, now = {}, False, None
    for cell in cells(chapter):
        kind, source, _ = cell
        if kind == "markdown" and source.startswith("## "):
            within, now = source.strip() == "## Exercises", None
        elif within and kind == "markdown" and (m := HEADING.fullmatch(source.strip())):
            now = f"{chapter[:3]}.{m[1]}"
            assert now not in found, f"{chapter}: two exercises have number {m[1]}"
            found[now] = m[2], []
        elif now:
            found[now][1].append(cell)
    return found


WITH = [name for name in CHAPTERS if any(s.strip() == "## Exercises" for _, s, _ in cells(name))]


def solution_of(number):
    "The solution cells of an exercise, up to the one that checks it."
    section = sections(find(number).chapter)[number][1]
    code = [(s, out) for kind, s, out in section if kind == "code"]
    last = next(i for i, (s, _) in enumerate(code) if f'check("{number}", ' in s)
    return code[: last + 1]


# The book and the specifications ----------------------------------------------------------

@pytest.mark.parametrize("chapter", WITH)
def test_every_exercise_has_a_specification_and_every_specification_an_exercise(chapter):
    there = {number: title for number, (title, _) in sections(chapter).items()}
    known = {e.number: e.title for e in exercises().values() if e.chapter == chapter}
    assert there and there == known


def test_every_specification_belongs_to_a_chapter():
    assert {e.chapter for e in exercises().values()} <= set(WITH)
    numbers = list(exercises())
    assert len(numbers) > 60 and numbers == [e.number for e in outline()]


@pytest.mark.parametrize("chapter", WITH)
def test_the_stored_solutions_are_right_and_the_tasks_name_what_they_ask_for(chapter):
    for number, (_, section) in sections(chapter).items():
        text = "\n".join(s for kind, s, _ in section if kind == "markdown")
        name = re.escape(find(number).name)
        assert re.search(rf"`{name}[`(]|### \d+\. .*{name}", text), f"{number} does not say {name}"
        assert sum(f'check("{number}", ' in s for _, s, _ in section) == 1, f"{number} is checked twice"
        code, outputs = solution_of(number)[-1]
        assert code.startswith("#| solution\n"), number
        (checked,) = [m for m in CHECK.findall(code) if m[0] == number]
        assert checked[1] == find(number).name, number
        assert f"{number} right" in json.dumps(outputs), f"{number} is stored as not right"


# Solutions pass, other things do not -------------------------------------------------------

def symbols(source):
    "(names of the chapter that a piece of code reads, names that it binds there)."
    top = symtable.symtable(source, "cell", "exec")
    reads = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    inner = list(top.get_children())
    while inner:
        table = inner.pop()
        reads |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        inner += table.get_children()
    return reads, {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}


def open_names(tree):
    "What a cell reads from the cells before it."
    found, own = set(), set()
    for statement in tree.body:
        reads, binds = symbols(ast.unparse(statement))
        loops = isinstance(statement, ast.For | ast.With | ast.FunctionDef | ast.ClassDef)
        found |= reads - own - (binds if loops else set())
        own |= binds
    return found - vars(builtins).keys(), own


def pieces(source, number):
    "What of a solution cell may be left out: a function needs no example of its use."
    if find(number).asks:
        return [source]
    return [ast.unparse(s) for s in ast.parse(source).body]


def needed(chapter):
    "(the chapter's module, the code that its solutions need, in order)."
    code = [s for kind, s, _ in cells(chapter) if kind == "code"]
    module = re.search(r"default_exp (\S+)", "\n".join(code))[1]
    exported = dict(vars(importlib.import_module(f"llmfs.{module}")))
    solutions = {s: n for n in sections(chapter) for s, _ in solution_of(n)}
    keep, missing = [], set()
    for cell in reversed(code):
        if re.search(r"^#\|\s*(slow|eval: false)", cell, re.M):
            continue
        cell = "\n".join("" if re.match(r"\s*[%!]", x) else x for x in cell.split("\n"))
        number = solutions.get(cell)
        for source in reversed(pieces(cell, number) if number else [cell]):
            tree = ast.parse(source)
            reads, binds = open_names(tree)
            imports = all(isinstance(n, ast.Import | ast.ImportFrom) for n in tree.body)
            checks = number and CHECK.search(source.replace("'", '"'))
            whole = checks or number and find(number).asks
            if imports or whole or (binds & missing) - exported.keys():
                missing = missing - binds | reads
                keep.append(source)
    return exported, keep[::-1]


def run(chapter, check):
    "Run what the solutions of a chapter need; each is handed to check(number, answer, namespace)."
    space, sources = needed(chapter)
    here, space["__name__"] = os.getcwd(), "chapter"
    os.chdir(NBS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for source in sources:
                exec(compile(source, chapter, "exec"), space)
                space["check"] = lambda number, answer: check(number, answer, space)
    finally:
        os.chdir(here)


@cache
def answers(chapter):
    "Answer and verdict of each solution of a chapter; nothing else of it runs."
    found = {}
    run(chapter, lambda n, answer, space: found.setdefault(n, (answer, judge(find(n), answer))))
    assert found.keys() == set(sections(chapter))
    return found


CHECKED = [pytest.param(name, id=name) for name in WITH if sections(name)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("LLMFS_SCALE", "ci")
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.mark.parametrize("chapter", CHECKED)
def test_solutions_are_right(chapter):
    wrong = [verdict.text for _, verdict in answers(chapter).values() if not verdict]
    assert not wrong, "\n".join(wrong)


class Stub:
    "Takes anything, and does nothing."

    def __init__(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("number", [n for n, e in exercises().items() if not e.asks])
def test_stubs_are_not_right(number):
    for stub in (None, ..., 0, lambda *a, **k: None, lambda *a, **k: a[0] if a else None,
                 lambda *a, **k: 0, lambda *a, **k: [], lambda *a, **k: True, Stub):
        assert not judge(find(number), stub), f"{number}: {stub} is right"


def perturbed(x):
    "Values near x that are other answers."
    if isinstance(x, bool):
        return [not x]
    if x is None:
        return ["something"]
    if isinstance(x, int | float):
        return [x * 1.5 + 1, -x - 1]
    if isinstance(x, str | bytes):
        return [x[:0], x[:-1], x + x[-1:]]
    if hasattr(x, "tolist"):
        return perturbed(x.tolist())
    if isinstance(x, list | tuple):
        one = [[*x[:i], p, *x[i + 1:]] for i, v in enumerate(x) for p in perturbed(v)[:1]]
        return [*map(type(x), one), x[:-1], [*x, *x[-1:]]]
    return []


@pytest.mark.parametrize("chapter", CHECKED)
def test_answers_beside_the_right_ones_are_not_right(chapter):
    for number, (answer, _) in answers(chapter).items():
        e = find(number)
        if not e.asks:
            continue
        others = perturbed(answer) if not number.endswith("00a.2") else [answer + "x"]
        for other in [None, "", [], (), object(), *others]:
            assert not judge(e, other) or LOOSE.get(number, lambda x: False)(other), f"{number}: {other} is right"


# Questions with more than one right answer: which of the values near it are right, too.
LOOSE = {
    "00a.2": lambda x: True,
    "01a.8": lambda x: False,
    "01g.3": lambda x: True,
}


# A file in a terminal ----------------------------------------------------------------------

RIGHT = "def bound(m, k, n, peak, bandwidth):\n" \
        "    flops, size = 2 * m * k * n, 4 * (m * k + k * n + m * n)\n" \
        "    return 'memory' if flops / size < peak / bandwidth else 'arithmetic'\n"


@pytest.fixture
def mine(tmp_path):
    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text, encoding="utf-8")
        return path
    return write


@pytest.mark.parametrize("text, line", [
    (RIGHT.replace("<", ">"), "gave "),
    (RIGHT.replace("def bound(", "def bound("), None),
    (RIGHT.replace("bound", "bond"), "does not define bound(m, k, n, peak, bandwidth); is it bond"),
    (RIGHT.replace("peak, bandwidth)", "peak"), "mine.py, line 1: "),
    ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError: No module named"),
    ("import sys\nsys.exit(1)\n", "line 2: leaves Python before bound can be tried"),
    ("input()\n", "line 1: asks for input"),
    ("import os\nos._exit(7)\n", "ended Python before there was a verdict (exit code 7)"),
    ("\0", "is no Python file"),
    ("", "does not define bound"),
    ("bound = 5\n", "it asks for bound(m, k, n, peak, bandwidth), and 5 is no function"),
    ("print('hello')\n" + RIGHT, None),
    ("if __name__ == '__main__':\n    1 / 0\n" + RIGHT, None),
    ("import sys\nsys.stdout.close()\n" + RIGHT, None),
])
def test_every_file_gets_a_clear_verdict(mine, text, line):
    verdict = check_file("00b.4", mine(text))
    assert bool(verdict) == (line is None), verdict.text
    if line:
        assert verdict.text.startswith("00b.4 not yet") and line in verdict.text
        assert "Traceback" not in verdict.text and len(verdict.text.splitlines()) <= 5


def test_files_that_never_end(mine, monkeypatch):
    import llmfs.exercises as module
    for e in ("00b.4", "01c.2"):
        monkeypatch.setitem(module._found, e, replace(find(e), seconds=0.1))
    start = time.monotonic()
    hangs_in_c = "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n" \
                 "import time\nwhile True:\n    time.sleep(9)\n"
    verdict = check_file("00b.4", mine(hangs_in_c), grace=1.5)
    assert not verdict and "was stopped after 1.7 seconds" in verdict.text
    assert time.monotonic() - start < 10


def test_an_endless_loop_is_interrupted_from_inside(mine):
    from llmfs.grading import NoAnswer, read_answer
    with pytest.raises(NoAnswer, match=r"mine.py, line [12]: still running after 0\.1 seconds"):
        read_answer(replace(find("00b.4"), seconds=0.1), mine("while True:\n    pass\n"))

    def endless(*args):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(1)
    verdict = judge(replace(find("00b.4"), seconds=0.1), endless)
    assert not verdict and "no answer within 0.1 seconds" in verdict.text


def test_the_command_in_a_process(mine):
    command = [sys.executable, "-c", "import sys; from llmfs.cli import main; sys.exit(main())", "check", "00b.4"]
    done = subprocess.run([*command, str(mine("print('hi')\n" + RIGHT))], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "00b.4 right: 8 cases\n", "hi\n")


def test_the_command(mine, capsys):
    from llmfs.cli import main

    def llmfs_check(*args):
        return main(["check", *map(str, args)]), *capsys.readouterr()

    path = mine(RIGHT.replace("<", ">"))
    code, out, _ = llmfs_check("00b.4", path)
    assert code == 1 and "gave      'arithmetic'" in out and "expected  'memory'" in out
    code, out, _ = llmfs_check("00b.4", path, "--json")
    assert code == 1 and json.loads(out)["right"] is False
    code, out, _ = llmfs_check("--list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(exercises())
    assert llmfs_check("00b.4")[1].split()[:4] == ["00b.4", "Memory", "or", "arithmetic"]
    for args in ([], ["00b.4", path, path], ["00x.1", path], ["00b.4", path.with_name("no.py")]):
        code, out, err = llmfs_check(*args)
        assert code == 2 and not out and err.startswith("llmfs: ") and err.count("\n") == 1


# Specifications that can tell ----------------------------------------------------------------

SWAP = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
        ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
        ast.Pow: ast.Mult, ast.Mod: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}


def mutants(source):
    "The same code with one operator or number changed, one at a time."
    n = sum(1 for _ in ast.walk(ast.parse(source)))
    for i in range(n):
        tree = ast.parse(source)
        node = list(ast.walk(tree))[i]
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAP:
            node.op = SWAP[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAP:
            node.ops[0] = SWAP[type(node.ops[0])]()
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            node.value += 1
        else:
            continue
        yield ast.unparse(tree)


def killed(chapter):
    "(mutants, those that are not right) of the functions that solutions define."
    dead, alive = [], []

    def kill(number, answer, space):
        e = replace(find(number), seconds=2)
        own = [n for s, _ in solution_of(number) for n in ast.parse(s).body
               if isinstance(n, ast.FunctionDef) and n.name == e.name]
        for mutant in (m for n in own for m in mutants(ast.unparse(n))):
            there = dict(space)
            exec(compile(mutant, chapter, "exec"), there)
            (alive if judge(e, there[e.name]) else dead).append(f"{number}: {mutant}")

    run(chapter, kill)
    return dead, alive


@pytest.mark.stress
@pytest.mark.parametrize("chapter", CHECKED)
def test_most_small_mistakes_are_found(chapter):
    dead, alive = killed(chapter)
    print(f"{chapter}: {len(dead)} of {len(dead + alive)} mutants found")
    # some mutants are right too: a longer hash, more random cases, a bound that is never met
    assert len(alive) <= 3 + 0.1 * len(dead + alive), "\n".join(alive)
