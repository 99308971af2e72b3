"""Each chapter as a notebook and a script that run alone, anywhere the package is installed.

The build writes them to `_site/downloads/`. What a chapter reads from the repository comes with it: records of long runs are
written by a cell at the top, pictures are attachments. Cells marked `slow` are commented out: their outputs are records.
"""

import ast
import base64
import json
import re
import sys
from pathlib import Path

import measured

NBS = Path(__file__).resolve().parent.parent / "nbs"
TOOLS = NBS.parent / "tools"
SOURCE = "git+https://github.com/llmfs/llmfs"
RECORDS = "https://github.com/llmfs/llmfs/blob/main/nbs/results/"
KIND = {"svg": "image/svg+xml", "png": "image/png"}
BROUGHT = {"llmfs", "mlx", "numpy", "matplotlib", "tqdm", "tyro", "datasets", "pyarrow", "IPython",
           "matplotlib_inline"}  # fmt: skip  (llmfs and Jupyter install these)
PACKAGE = {"mlx_lm": "mlx-lm", "ipywidgets": "ipywidgets"}
LONG = "# A long run: what it printed is kept below as its record. Take the # away to run it.\n"


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def has(cell: dict, *directives: str) -> bool:
    "Whether a code cell carries one of these."
    names = "|".join(directives)
    return cell["cell_type"] == "code" and bool(re.search(rf"^#\|\s*(?:{names})\b", text_of(cell), re.M))


def parse(source: str) -> ast.AST:
    "A code cell as a syntax tree, without lines of magics."
    try:
        return ast.parse(source)
    except SyntaxError:
        lines = [x for x in source.split("\n") if not re.match(r"\s*[%!?]", x)]
        return ast.parse("\n".join(lines))


def other_packages(cells: list[dict]) -> list[str]:
    "What a chapter imports that installing llmfs and Jupyter does not bring."
    found = set()
    for cell in cells:
        if cell["cell_type"] != "code" or has(cell, "slow", r"eval:\s*false"):
            continue
        for node in ast.walk(parse(text_of(cell))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found |= {n.split(".")[0] for n in names}
    extra = found - BROUGHT - set(sys.stdlib_module_names) - {p.stem for p in TOOLS.glob("*.py")}
    return sorted(PACKAGE.get(name, name) for name in extra)


def install_cell(name: str, version: str, cells: list[dict]) -> str:
    "What to install, as the first cell of a chapter."
    more = "".join(" " + x for x in other_packages(cells))
    return (
        f"**To run this chapter** (`{name}` of llmfs {version}) you need Python 3.11 or newer and, in a terminal:\n\n"
        f'    pip install "llmfs-mlx[cpu] @ {SOURCE}" jupyterlab{more}    # Linux; cuda12 or cuda13 with an NVIDIA GPU\n'
        f'    pip install "llmfs-mlx @ {SOURCE}" jupyterlab{more}         # a Mac with Apple Silicon\n\n'
        "Then run the cells from first to last. Nothing else is needed, and no repository around it.")  # fmt: skip


def records_cell(cells: list[dict]) -> str:
    "Code that writes what a chapter reads of the repository: records, tools; '' where it reads none."
    code = "\n".join(text_of(c) for c in cells if c["cell_type"] == "code")
    records = sorted({n for n in re.findall(r"[\w.-]+\.json", code) if (NBS / "results" / n).exists()})
    tools = sorted({n for n in re.findall(r"^(?:import|from) (\w+)", code, re.M) if (TOOLS / f"{n}.py").exists()})
    lines = ["# What this chapter reads of the repository: records of long runs, and programs that made them.",
             "from pathlib import Path", ""]  # fmt: skip
    if records:
        lines.append('Path("results").mkdir(exist_ok=True)')
    for n in records:
        record = json.loads((NBS / "results" / n).read_text(encoding="utf-8"))
        lines.append(f'Path("results/{n}").write_text({json.dumps(record)!r}, encoding="utf-8");')
    for n in tools:
        lines.append(f'Path("{n}.py").write_text({(TOOLS / f"{n}.py").read_text(encoding="utf-8")!r}, encoding="utf-8");')
    return "\n".join(lines) if records or tools else ""


def attach(cell: dict, folder: Path) -> dict:
    "A Markdown cell with its pictures inside."
    attachments = {}

    def one(match):
        path = folder / match[2]
        if re.match(r"\w+:", match[2]) or not path.is_file() or path.suffix[1:] not in KIND:
            return match[0]
        data = base64.b64encode(path.read_bytes()).decode()
        attachments[path.name] = {KIND[path.suffix[1:]]: data}
        return f"![{match[1]}](attachment:{path.name})"

    text = re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", one, text_of(cell))
    text = re.sub(r"\]\((?:\.\./)?results/([^)\s]+)\)", rf"]({RECORDS}\1)", text)
    return cell | {"source": text.splitlines(True)} | ({"attachments": attachments} if attachments else {})


def standalone(nb: dict, name: str, version: str, solutions: bool = True) -> dict:
    "The notebook as it is handed out."
    folder, made = (NBS / name).parent, []
    import nbdev_reader
    about = set() if solutions else nbdev_reader.remarks(nb["cells"])
    given = [c for i, c in enumerate(nb["cells"]) if not has(c, "default_exp", "hide")
             and (solutions or not has(c, "solution")) and i not in about]
    labels = measured.labelled(nb["cells"])
    for cell in given:
        if cell["cell_type"] == "markdown":
            text = measured.fill(text_of(cell), labels, lambda shown, file, key: shown)
            made.append(attach(cell | {"source": text.splitlines(True), "metadata": {}}, folder))
        elif cell["cell_type"] == "code":
            text = re.sub(r"^#\|.*\n?", "", text_of(cell), flags=re.M).strip("\n")
            text = text.replace("../results", "results")
            if has(cell, "slow", r"eval:\s*false"):
                text = LONG + "\n".join(f"# {x}".rstrip() for x in text.split("\n"))
            if text:
                made.append(cell | {"source": text.splitlines(True), "execution_count": None, "metadata": {}})
    first = [("markdown", install_cell(name, version, nb["cells"]))]
    if records := records_cell(given):
        first.append(("code", records))
    for kind, text in reversed(first):
        extra = {"outputs": [], "execution_count": None} if kind == "code" else {}
        made.insert(0, {"cell_type": kind, "id": f"llmfs-{kind}", "metadata": {}, "source": text.splitlines(True)} | extra)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def script(nb: dict) -> str:
    "The same as a plain Python file; editors that know `# %%` show its cells."
    import jupytext
    import nbformat
    bare = {**nb, "cells": [{k: v for k, v in c.items() if k != "attachments"} for c in nb["cells"]]}
    bare["metadata"] = {"jupytext": {"notebook_metadata_filter": "-all", "cell_metadata_filter": "-all"}}
    text = jupytext.writes(nbformat.reads(json.dumps(bare), as_version=4), fmt="py:percent")
    return re.sub(r"\]\(attachment:[^)]*\)", "]", text)


def write(app, exception):
    "After the build: both kinds for every chapter, and none of chapters that are gone."
    if exception or app.builder.name != "html":
        return
    import nbdev_reader
    folder, kept = Path(app.outdir) / "downloads", set()
    for path in sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts):
        name = path.relative_to(NBS).with_suffix("").as_posix()
        nb = standalone(json.loads(path.read_text(encoding="utf-8")), name, app.config.version, nbdev_reader.SOLUTIONS)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".ipynb", json.dumps(nb, indent=1, ensure_ascii=False) + "\n"), (".py", script(nb))):
            file = target.with_name(target.name + suffix)
            file.write_text(text, encoding="utf-8")
            kept.add(file)
    for file in folder.rglob("*.*"):
        if file.is_file() and file not in kept:
            file.unlink()


def add_button(app, pagename, templatename, context, doctree):
    "The download button of a chapter's page."
    if not (NBS / f"{pagename}.ipynb").exists() or "header_buttons" not in context:
        return
    base = context["pathto"](f"downloads/{pagename}", 1)
    buttons = [
        {"type": "link", "url": base + ".ipynb", "text": "Notebook that runs alone", "tooltip": "Jupyter notebook",
         "icon": "fas fa-book", "label": "download-notebook-button"},
        {"type": "link", "url": base + ".py", "text": "Python script", "tooltip": "the same as a plain script",
         "icon": "fas fa-file-code", "label": "download-script-button"},
        {"type": "javascript", "javascript": "window.print()", "text": "Print or PDF", "tooltip": "print this page",
         "icon": "fas fa-file-pdf", "label": "download-pdf-button"},
    ]  # fmt: skip
    context["header_buttons"].insert(0, {"type": "group", "tooltip": "Download this chapter", "icon": "fas fa-download",
                                         "buttons": buttons, "label": "download-buttons"})  # fmt: skip
