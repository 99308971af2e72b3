"""Measured numbers in prose are keys: `[0.1159](results/quickstart.json#bits_per_byte.model)`.

Such a link reads well in Jupyter and on GitHub, where it leads to the record. When the book is
built, the number is taken from the record again, in the form in which it stands there (decimals,
thousands, %, unit); an unknown key fails the build. The part behind # is a path of names, places in lists
(`runs.0`), or items found by a field (`runs.[size=tiny]`); paths and numbers may be multiplied and
divided: `training.seconds/60`. Other characters are written as in any URL (%20, %2F).

`[0.39](#ratios.2)` is the third number that the cell with `#| label: ratios` prints (counted from 0).

    python book/measured.py              # what is out of date, and what looks measured but is typed
    python book/measured.py --fill       # write today's numbers of the records into the text

A number that is set and not measured (a limit, a size somebody chose), or somebody else's, is allowed where its
paragraph, row or item holds `<!-- given: why -->`, where its sentence cites a source, and among exercises.
Alone on its line, right below, the note covers a whole block.
"""

import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

REPO = Path(__file__).resolve().parent.parent
NBS = REPO / "nbs"
LINK = re.compile(r"\[([^\[\]\n]+)\]\(((?:[\w./-]*results/[\w.-]+\.json)?)#([^\s()]+)\)")
NUMBER = re.compile(r"[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?")


# Keys and their values ---------------------------------------------------------------------

def look_up(record, path: str):
    "The value at a path such as runs.0.loss or runs.[size=tiny].loss. Raises KeyError."
    for name in re.findall(r"\[[^\]]*\]|[^.]+", path):
        name = unquote(name)
        try:
            if name.startswith("["):
                field, value = name[1:-1].split("=", 1)
                (record,) = [x for x in record if str(x.get(field)) == value]
            else:
                record = record[int(name) if isinstance(record, list) else name]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise KeyError(f"no {name!r} in the path {path!r}") from None
    return record


def value_of(record, formula: str) -> float:
    "A path, or paths and numbers joined by * and /."
    total, sign = 1.0, "*"
    for part in re.split(r"([*/])", formula):
        if part in ("*", "/"):
            sign = part
            continue
        number = re.fullmatch(r"\d+(\.\d+)?(e\d+)?", part) and not _has(record, part)
        x = float(part) if number else look_up(record, part)
        if isinstance(x, bool) or not isinstance(x, int | float):
            raise KeyError(f"{part!r} is no number but {str(x)[:40]!r}")
        total = total * x if sign == "*" else total / x
    return total


def _has(record, name):
    return isinstance(record, dict) and name in record


def written_like(shown: str, value: float) -> str:
    "The value in the form of the number in `shown`: its decimals, thousands, sign of percent."
    found = list(NUMBER.finditer(shown))
    if len(found) != 1:
        raise KeyError(f"{shown!r} holds {len(found)} numbers; a key stands for one")
    old = found[0][0]
    decimals = len(old.rstrip("%").partition(".")[2])
    value = value * 100 if old.endswith("%") else value
    grouped = "," in old or abs(value) >= 10_000
    new = f"{value:{',' if grouped else ''}.{decimals}f}" + "%" * old.endswith("%")
    new = new.replace("-", "−") if "−" in old else new
    return shown[:found[0].start()] + new + shown[found[0].end():]


def printed_numbers(cell: dict) -> list[float]:
    "Every number in the text that a cell shows, in order."
    text = ""
    for out in cell.get("outputs", []):
        data = out.get("text") or out.get("data", {}).get("text/plain", "")
        text += "".join(data) + "\n"
    found = re.findall(r"(?<![\w.])[-−]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?%?", text)
    return [_number(x) for x in found]


def _number(text):
    x = text.replace("−", "-").replace(",", "").rstrip("%.")
    return float(x) / (100 if text.endswith("%") else 1)


def labelled(cells: list[dict]) -> dict[str, dict]:
    "Code cells by their `#| label:`."
    found = {}
    for cell in cells:
        label = re.search(r"^#\|\s*label:\s*(\S+)", "".join(cell["source"]), re.M)
        if cell["cell_type"] == "code" and label:
            found[label[1]] = cell
    return found


def resolve(shown: str, file: str, key: str, cells: dict[str, dict]) -> str | None:
    "The text of one link, today. None where it is no key. Raises KeyError where it is unknown."
    if file:
        path = NBS / "results" / Path(file).name
        if not path.exists():
            raise KeyError(f"no record {file}")
        return written_like(shown, value_of(json.loads(path.read_text(encoding="utf-8")), key))
    label, _, place = key.rpartition(".")
    if not label or not place.isdigit() or (cells is not None and label not in cells):
        if NUMBER.fullmatch(shown.split()[0]) and "." in key:
            raise KeyError(f"no cell is labelled {label!r}")
        return None
    numbers = printed_numbers(cells[label])
    if int(place) >= len(numbers):
        raise KeyError(f"cell {label!r} prints {len(numbers)} numbers, no number {place}")
    return written_like(shown, numbers[int(place)])


def fill(text: str, cells: dict[str, dict] | None = None, link=None, where="") -> str:
    "Today's numbers in a text; link(shown, file, key) is how each is written, else as it was."
    def one(match):
        shown, file, key = match.groups()
        try:
            now = resolve(shown, file, key, cells or {})
        except (KeyError, ZeroDivisionError) as e:
            raise KeyError(f"{where or 'text'}: {match[0]}: {e.args[0]}") from None
        if now is None:
            return match[0]
        return link(now, file, key) if link else f"[{now}]({file}#{key})"
    return LINK.sub(one, text)


# Numbers that look measured and are typed ---------------------------------------------------

_N = r"(?<![\w.$\\^_{#-])[~≈±]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_WORD = r"\b(?:two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|forty|fifty|a hundred|hundred)"
_TIME = r"(?:ms|µs|us|ns|s|seconds?|milliseconds?|microseconds?|minutes?|hours?|days)"
_SIZE = r"(?:[KMGT]i?B|kB)"
_RATE = r"(?:(?:tokens|tok|characters|bytes|stories|steps|words|rows|[KMGT]i?B)(?:/s| a second| per second)|[GTM]FLOP/?s)"
_UNIT = rf"(?:{_TIME}|{_SIZE}|{_RATE}|%|percent|bits? (?:per|a) (?:byte|token|word|story|character)|nats\b(?: (?:per|a) \w+)?)"
_MORE = r"(?:times|×|x|-fold)(?:\s+(?:as|faster|slower|smaller|larger|longer|shorter|cheaper|dearer|more|less|fewer|the)\b|\b)"
TYPED = re.compile(
    rf"{_N}(?:[ \u00a0-]?(?:to|and|–|-)[ \u00a0]?[\d.,]+)?[ \u00a0-]?{_UNIT}(?![\w/])"
    rf"|{_N}(?:[ \u00a0]?(?:to|–|-)[ \u00a0]?[\d.,]+)?[ \u00a0]?{_MORE}"
    rf"|{_WORD} (?:times (?:as|faster|slower|smaller|larger|longer|shorter|cheaper|more|less|fewer)|{_TIME}\b|percent)"
    rf"|(?<![\w.,$\\^_{{#-])\d+\.\d{{2,}}(?![\w.])"
    rf"|(?:loss|losses|perplexity|accuracy|ratio|error|MFU)(?: (?:of|is|was|at|about|to|from|by)){{1,2}} {_N}")
_NAMED = "Python|Ubuntu|Debian|glibc|macOS|CUDA|MLX|NumPy|[Vv]ersions?|Apache-|CC BY|WCAG"
GIVEN = re.compile(r"<!--\s*given:\s*\S.*?-->")
BARE_GIVEN = re.compile(r"<!--\s*given:?\s*-->")


def _prose(block: str) -> str:
    "A block without what is no prose: code, maths, keys, links' targets, roles, comments."
    block = LINK.sub(" ", block)
    block = re.sub(r"!\[[^\]]*\]\([^)]*\)|<!--.*?-->|\$\$.*?\$\$", " ", block, flags=re.S)
    block = re.sub(r"\{[\w:]+\}`[^`]+`", " CITED " if "{cite" in block else " ", block)
    block = re.sub(r"`[^`]*`|\$[^$\n]+\$", " ", block)
    block = re.sub(r"\]\(https?:[^)]*\)", "] CITED ", block)
    block = re.sub(rf"\b(?:{_NAMED}) ?v?\d[\d.]*\d", " ", block)
    return re.sub(r"\]\([^)]*\)", "]", block)


def blocks(text: str):
    "Paragraphs, rows of tables and items of lists, without fenced code; with whether they are given."
    text = re.sub(r"^(```|~~~|:::).*?^\1[ \t]*$", "", text, flags=re.M | re.S)
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip().split("\n")
        whole = any(GIVEN.fullmatch(x.strip()) for x in lines)
        parts = []
        for line in lines:
            if not parts or re.match(r"\s*(?:[-*+]|\d+\.)\s|\s*\|", line):
                parts.append(line)
            else:
                parts[-1] += "\n" + line
        for part in parts:
            yield part, whole or bool(GIVEN.search(part))


def typed(text: str) -> list[str]:
    "Numbers in a Markdown text that look measured, have no key and no allowance."
    found = []
    for block, given in blocks(text):
        if given:
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z*`\[(])", _prose(block)):
            if "CITED" not in sentence:
                found += [m[0].strip() for m in TYPED.finditer(sentence)]
    return found


def markdown_cells(cells: list[dict]):
    "Markdown cells outside the exercises: index, text."
    exercises = False
    for i, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if heading := re.match(r"##? (.+)", text):
                exercises = heading[1].startswith("Exercise")
            if not exercises:
                yield i, text


def near(number: str, cells: list[dict], i: int) -> str:
    "A hint: the cell above whose output shows the number."
    digits = NUMBER.search(number)
    if not digits:
        return ""
    for cell in reversed(cells[:i]):
        if cell["cell_type"] != "code":
            continue
        for k, x in enumerate(printed_numbers(cell)):
            try:
                if NUMBER.search(written_like(digits[0], x))[0] == digits[0] and x not in (0, 1, 2):
                    label = re.search(r"^#\|\s*label:\s*(\S+)", "".join(cell["source"]), re.M)
                    return f" (number {k} of cell {label[1] if label else cell['id']})"
            except KeyError:
                pass
    return ""


def sources() -> list[Path]:
    "All texts of the book."
    chapters = [p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    pages = [p for p in sorted(NBS.glob("*.md")) if p.name != "terms.md"]
    return [REPO / "README.md", *pages, *chapters]


def findings(path: Path) -> list[str]:
    "One line for each typed number of a file, and for a note without a reason."
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
        return [f"typed: {x}" for x in typed(text)] + ["a note without a reason"] * len(BARE_GIVEN.findall(text))
    cells, found = json.loads(path.read_text(encoding="utf-8"))["cells"], []
    for i, text in markdown_cells(cells):
        found += [f"cell {cells[i]['id']}: {x}{near(x, cells, i)}" for x in typed(text)]
        found += [f"cell {cells[i]['id']}: a note without a reason"] * len(BARE_GIVEN.findall(text))
    return found


def outdated(path: Path, write: bool = False) -> list[str]:
    "Keys that are unknown or whose text is not today's number; write: put it there."
    raw = path.read_text(encoding="utf-8")
    nb = json.loads(raw) if path.suffix == ".ipynb" else None
    cells = labelled(nb["cells"]) if nb else {}
    bad, changed = [], False
    for cell in nb["cells"] if nb else [None]:
        if cell is not None and cell["cell_type"] != "markdown":
            continue
        text = "".join(cell["source"]) if cell else raw
        try:
            new = fill(text, cells, where=path.name)
        except KeyError as e:
            bad.append(e.args[0])
            continue
        if new != text:
            pairs = zip(LINK.findall(text), LINK.findall(new), strict=True)
            bad += [f"{path.name}: {a[0]} is {b[0]} in {b[1]}#{b[2]}" for a, b in pairs if a != b]
            changed = True
            if cell:
                cell["source"] = new.splitlines(keepends=True)
            else:
                raw = new
    if write and changed:
        text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n" if nb else raw
        path.write_text(text, encoding="utf-8")
    return bad


def main(args: list[str]) -> int:
    write = "--fill" in args
    paths = [Path(a) for a in args if not a.startswith("-")] or sources()
    bad = 0
    for path in paths:
        lines = outdated(path, write) + ([] if write else findings(path))
        bad += len(lines)
        if lines:
            print(f"{path.name}: {len(lines)}", *(f"  {x}" for x in lines), sep="\n")
    return int(bool(bad) and not write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
