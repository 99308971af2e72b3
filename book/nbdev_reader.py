"""How a chapter becomes a page: nbdev's `#|` directives turned into myst-nb's tags.

myst-nb calls `read` with the text of a notebook (`nb_custom_formats` in conf.py).
"""

import ast
import json
import os
import re

import measured
import nbformat
import terms
from fastcore.nbio import dict2nb
from nbdev.process import NBProcessor

# LLMFS_SOLUTIONS=off builds the book without solutions, for teaching.
SOLUTIONS = os.environ.get("LLMFS_SOLUTIONS", "on") != "off"


def _is(value, word):
    "Directives come as `code-fold: true` or just `code-fold`."
    return str(value).strip().lower() == word


def tags(directives):
    "The myst-nb tags for a code cell's directives."
    d, out = directives, set()
    if d.keys() & {"default_exp", "hide"} or _is(d.get("include"), "false"):
        out.add("remove-cell")
    if d.keys() & {"hide_input"} or _is(d.get("echo"), "false"):
        out.add("remove-input")
    if d.keys() & {"hide_output"} or _is(d.get("output"), "false"):
        out.add("remove-output")
    if "export" in d or ("code-fold" in d and not _is(d["code-fold"], "false")):
        out.add("hide-input")
    if "solution" in d:
        out.add("hide-cell" if SOLUTIONS else "remove-cell")
    return out


def prompt(directives, source=""):
    "What the fold is called, if the cell is folded."
    if "solution" in directives:
        return "Solution"
    if "code-summary" in directives:
        return directives["code-summary"].strip("\"' ")
    lines = [s for s in source.splitlines() if s and not s.startswith((" ", ")", "#"))]
    return "Imports" if all(s.startswith(("import ", "from ")) for s in lines) else "Code"


def figure(directives):
    "`label`, `fig-cap` and `fig-alt` as myst-nb wants them."
    d, out = {k: v.strip("\"' ") for k, v in directives.items()}, {}
    if "fig-cap" in d:
        out["figure"] = {"caption": d["fig-cap"]}
        if "label" in d:
            out["figure"]["name"] = d["label"]
    if "fig-alt" in d or "fig-cap" in d:
        out["image"] = {"alt": d.get("fig-alt") or d["fig-cap"]}
    return out


def draws(cell):
    "Whether a cell's outputs hold a picture."
    outputs = cell.get("outputs", [])
    return any(k.startswith("image/") for o in outputs for k in o.get("data", {}))


def caption_below(cell):
    "A Markdown cell's first paragraph, if it is in italics: how a caption under a plot is written."
    first = cell.source.strip().partition("\n\n")[0] if cell.cell_type == "markdown" else ""
    text = " ".join(first.split())
    found = re.match(r"([*_])(?!\1)(.+)\1$", text)
    return re.sub(r"[*_`$]", "", found[2]) if found else ""


def public_names(source):
    "Functions and classes that an exported cell adds to its module's API."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    names = [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")]
    return list(dict.fromkeys(names))


def api_link(module, names):
    "The line under an exported cell that leads to the API reference."
    links = ", ".join(f"{{py:obj}}`{n} <{module}.{n}>`" for n in names)
    return f":::{{div}} llmfs-api\nin {{py:mod}}`{module}`: {links}\n:::"


def label(name):
    "The target above the code of llmfs.module.name, for links from the API reference."
    plain = re.sub("[A-Z]", lambda m: "-" + m[0].lower(), name)  # labels know no case, names do
    return "code-" + plain.replace(".", "-")


RECORDS = "https://github.com/llmfs/llmfs/blob/main/nbs/results/"


def number_link(shown, file, key):
    "A number from a record leads to it; one that a cell of the page prints just stands there."
    if not file:
        return shown
    return f'[{shown}]({RECORDS}{file.rpartition("/")[2]} "{key}"){{.measured}}'


def remarks(cells):
    "Places of the Markdown cells about a solution: below it, before the next heading."
    found, within, solved = set(), False, False
    for i, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] != "markdown":
            solved = solved or within and source.startswith("#| solution")
        elif source.startswith("#"):
            within = source.startswith("## Exercises") or within and source.startswith("### ")
            solved = False
        elif solved:
            found.add(i)
    return found


def folded(source):
    "A remark that gives a solution away, behind a click."
    if source.startswith("<details>"):
        return source
    return f"<details>\n<summary>Why</summary>\n\n{source}\n\n</details>"


def read(text):
    "The notebook in `text`, ready for myst-nb."
    cells = NBProcessor(nb=dict2nb(json.loads(text))).nb.cells
    module = next((f"llmfs.{c.directives_['default_exp'].split()[0]}" for c in cells
                   if c.cell_type == "code" and "default_exp" in c.directives_), None)
    title = cells[0].source.split("\n")[0].lstrip("# ") if cells else ""
    introduced = set()
    raw = json.loads(text)["cells"]
    out, linked, printed, about = [], set(), measured.labelled(raw), remarks(raw)
    for i, (cell, below) in enumerate(zip(cells, [*cells[1:], None], strict=True)):
        if i in about and not SOLUTIONS:
            continue
        source, d = cell.source, cell.directives_ if cell.cell_type == "code" else {}
        if cell.cell_type == "markdown":
            source = terms.mark(measured.fill(source, printed, number_link), title, introduced)
            source = folded(source) if i in about else source
            out.append(nbformat.v4.new_markdown_cell(source))
        elif cell.cell_type == "code" and source.strip():
            fold = prompt(d, source)
            meta = {"tags": sorted({*cell.metadata.get("tags", []), *tags(d)}),
                    "mystnb": {"code_prompt_show": fold, "code_prompt_hide": fold, **figure(d)}}
            if draws(cell) and "image" not in meta["mystnb"] and below:
                meta["mystnb"]["image"] = {"alt": caption_below(below) or "Plot"}
            outputs = [nbformat.from_dict(o) for o in cell.get("outputs", [])]
            names = public_names(source) if d.keys() & {"export", "exports"} else []
            names = [n for n in names if module]
            targets = [f"({label(f'{module}.{n}')})=" for n in names if n not in linked]
            linked |= {*names}
            if targets:
                out.append(nbformat.v4.new_markdown_cell("\n".join([*targets, ":::{div} llmfs-code", ":::"])))
            out.append(nbformat.v4.new_code_cell(source, metadata=meta, outputs=outputs))
            if names:
                out.append(nbformat.v4.new_markdown_cell(api_link(module, names)))
    meta = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    for i, cell in enumerate(out):
        cell["id"] = f"c{i}"
    return nbformat.v4.new_notebook(cells=out, metadata=meta)
