"""The book: how chapters are read, what the configuration does, what the built site asks for."""

import json
import re
import sys
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
NBS, SITE = REPO / "nbs", REPO / "book" / "_site"
CHAPTERS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

for package in ("nbdev", "nbformat"):
    pytest.importorskip(package)
sys.path.insert(0, str(REPO / "book"))
import nbdev_reader as reader  # noqa: E402


def notebook(*cells):
    "JSON of a notebook; a cell that starts with `# ` or a word is Markdown."
    made = []
    for source in cells:
        kind = "code" if source.startswith("#|") or "=" in source else "markdown"
        extra = {"outputs": [], "execution_count": None} if kind == "code" else {}
        made.append({"cell_type": kind, "id": f"x{len(made)}", "metadata": {},
                     "source": source.splitlines(keepends=True)} | extra)
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def only(source):
    "The one cell that `source` becomes."
    (cell,) = reader.read(notebook(source)).cells
    return cell


# The reader ------------------------------------------------------------------------------

@pytest.mark.parametrize("directives, tags", [
    ("", []), ("#| exports", []), ("#| slow", []), ("#| eval: false", []),
    ("#| hide", ["remove-cell"]), ("#| default_exp model.attention", ["remove-cell"]),
    ("#| include: false", ["remove-cell"]), ("#| echo: false", ["remove-input"]),
    ("#| echo: true", []), ("#| output: false", ["remove-output"]),
    ("#| code-fold: true", ["hide-input"]), ("#| code-fold: false", []),
    ("#| export", ["hide-input"]), ("#| solution", ["hide-cell"]),
    ("#| slow\n#| echo: false", ["remove-input"])])
def test_directives_become_tags_and_leave_the_page(directives, tags):
    cell = only(directives + "\nx = 1")
    assert cell.metadata["tags"] == tags
    assert cell.source == "x = 1"


def test_folds_have_names():
    def name(source):
        return only(source).metadata["mystnb"]["code_prompt_show"]
    assert name("#| solution\nx = 1") == "Solution"
    assert name("#| export\nimport os\nfrom a import (\n    b,\n)  # =") == "Imports"
    assert name("#| export\nimport os\nx = 1") == "Code"
    assert name('#| code-fold: true\n#| code-summary: "The plot"\nx = 1') == "The plot"


def test_a_book_without_solutions(monkeypatch):
    monkeypatch.setattr(reader, "SOLUTIONS", False)
    assert only("#| solution\nx = 1").metadata["tags"] == ["remove-cell"]


def test_remarks_on_solutions_are_folded_and_leave_with_them(monkeypatch):
    book = notebook("## Exercises", "### 1. A", "The task", "#| solution\nx = 1", "The reason", "### 2. B", "Another task")
    shown = [c.source for c in reader.read(book).cells if "reason" in c.source]
    assert shown == ["<details>\n<summary>Why</summary>\n\nThe reason\n\n</details>"]
    monkeypatch.setattr(reader, "SOLUTIONS", False)
    left = [c.source for c in reader.read(book).cells if c.cell_type == "markdown"]
    assert left == ["## Exercises", "### 1. A", "The task", "### 2. B", "Another task"]


def test_figures_have_caption_name_and_alt():
    meta = only("#| label: fig-a\n#| fig-cap: One claim: it falls.\nx = 1").metadata["mystnb"]
    assert meta["figure"] == {"caption": "One claim: it falls.", "name": "fig-a"}
    assert meta["image"] == {"alt": "One claim: it falls."}
    meta = only('#| fig-cap: "A"\n#| fig-alt: "A curve"\nx = 1').metadata["mystnb"]
    assert meta["image"] == {"alt": "A curve"}


def test_a_caption_in_italics_is_the_alt_text_of_the_plot_above():
    made = json.loads(notebook("x = 1", "*The claim: `x` falls.*"))
    made["cells"][0]["outputs"] = [{"output_type": "display_data", "metadata": {},
                                    "data": {"image/svg+xml": "<svg/>"}}]
    cells = reader.read(json.dumps(made)).cells
    assert cells[0].metadata["mystnb"]["image"] == {"alt": "The claim: x falls."}
    assert "image" not in reader.read(notebook("x = 1", "*y*")).cells[0].metadata["mystnb"]


def test_exported_cells_link_to_the_reference():
    exported = "#| exports\ndef f(x=1): pass\nclass C: pass\ndef _private(): pass\nK = 2"
    cells = reader.read(notebook("#| default_exp model.attention", exported)).cells
    assert "{py:obj}`f <llmfs.model.attention.f>`" in cells[-1].source
    assert "{py:obj}`C <llmfs.model.attention.C>`" in cells[-1].source
    assert "_private" not in cells[-1].source and "K" not in cells[-1].source
    cells = reader.read(notebook("#| default_exp model.attention", "x = 1")).cells
    assert all(c.cell_type == "code" for c in cells)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_chapter_reads(path):
    nb = reader.read(path.read_text(encoding="utf-8"))
    assert nb.cells[0].source.startswith("# ")
    assert not [c.source for c in nb.cells if c.source.lstrip().startswith("#|")]
    assert nb.metadata["language_info"]["name"] == "python"
    titles = [line for c in nb.cells if c.cell_type == "markdown"
              for line in c.source.splitlines() if line.startswith("# ")]
    assert len(titles) == 1


# What every chapter has ------------------------------------------------------------------

def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def header(path):
    "The table on top of a chapter, as names and values; it may lie on its side."
    for cell in cells_of(path)[:4]:
        rows = [[x.strip() for x in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
                for line in "".join(cell["source"]).splitlines() if line.startswith("|")]
        rows = [r for r in rows if any(r) and not re.fullmatch(r"[-: ]+", r[0])]
        if rows and any(x.startswith("minutes") for x in rows[0]) and len(rows) > 1:
            return dict(zip(*rows[:2]))
        if rows and any(r[0].startswith("minutes") for r in rows):
            return {r[0]: r[1] for r in rows}
    return {}


NUMBERED = [p for p in CHAPTERS if p.parent == NBS]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_the_table_on_top_is_complete(path):
    table = {k.split()[0]: v for k, v in header(path).items()}
    wanted = {"needs", "minutes", "exports"} if path in NUMBERED else {"minutes"}
    assert wanted <= set(table), f"{path.name}: its table has {sorted(table)}"
    assert all(table[k] for k in wanted)
    minutes = re.match(r"\d+(\.\d+)?", table["minutes"])
    assert minutes and 0 < float(minutes[0]) <= 3, f"{path.name}: {table['minutes']} minutes at scale ci"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_headings_go_down_one_level_at_a_time(path):
    level, titles = 0, []
    for cell in cells_of(path):
        if cell["cell_type"] == "markdown":
            text = re.sub(r"^(```|~~~).*?^\1", "", "".join(cell["source"]), flags=re.M | re.S)
            for marks, title in re.findall(r"^(#{1,6}) (.+)$", text, re.M):
                assert len(marks) <= level + 1, f"{path.name}: {title!r} skips a level"
                level = len(marks)
                titles.append((marks, title))
    assert [m for m, _ in titles].count("#") == 1


PLAIN_ALT = re.compile(r"plot|figure|image|picture", re.I)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_plot_says_what_it_shows(path):
    pytest.importorskip("nbdev")
    for cell in reader.read(path.read_text(encoding="utf-8")).cells:
        if cell.cell_type == "code" and reader.draws(cell) and not {"remove-output", "remove-cell"} & set(cell.metadata["tags"]):
            alt = cell.metadata["mystnb"].get("image", {}).get("alt", "")
            assert len(alt) > 15, (f"{path.name}: a plot without a text: put `#| fig-alt:` or `#| fig-cap:` into its "
                                   f"cell, or a caption in *italics* below: {cell.source[:80]!r}")
        if cell.cell_type == "markdown":
            for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)", cell.source):
                assert len(alt) > 15 and not PLAIN_ALT.fullmatch(alt), (path.name, target)


@pytest.mark.parametrize("path", [*CHAPTERS, NBS / "index.md", NBS / "course.md"], ids=lambda p: p.stem)
def test_links_inside_the_book_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in cells_of(path) if c["cell_type"] == "markdown")
    text = re.sub(r"^(```|~~~).*?^\1|`[^`\n]*`", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} leads to {target}"


def test_the_course_meets_every_part():
    text = (NBS / "course.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\((\d\d\w_[\w.]+)\.ipynb\)", text))
    assert {x[1] for x in linked} >= {"0", "1", "2", "3", "4", "5"}
    assert len(re.findall(r"^\| \d+ \|", text, re.M)) == 12


def test_the_times_are_of_the_chapters_that_are():
    names = {p.relative_to(NBS).with_suffix("").as_posix() for p in CHAPTERS}
    record = json.loads((NBS / "results" / "chapter_seconds.json").read_text(encoding="utf-8"))
    for machine in record["machines"]:
        gone = set(machine["seconds"]) - names
        assert not gone, f"python tools/time_chapters.py forgets what is gone: {sorted(gone)}"
        missing = names - set(machine["seconds"])
        assert not missing, f"python tools/time_chapters.py measures what is new: {sorted(missing)}"
        assert set(machine["code"]) == names and all(0 < s < 600 for s in machine["seconds"].values())


# Terms -------------------------------------------------------------------------------------

def test_terms_are_marked_where_they_are_introduced():
    import terms
    text = terms.mark("A <dfn>KV cache</dfn>, a <dfn>Query</dfn>, a <dfn>query</dfn>.", "The title", set())
    assert "[KV cache]{#term-kv-cache-the-title .dfn}{index}`" in text and "<KV cache>`" in text
    assert text.count("#term-query-the-title") == 1 and text.count("<query>`") == 2
    assert terms.sentence("One. A <dfn>key</dfn> offers {cite:p}`a`. Two.\n\nThree.", "key") == "A *key* offers."


def test_the_page_of_terms_is_made_from_the_chapters():
    import terms
    found = terms.terms()
    assert len({t.lower() for t, *_ in found}) == len(found) > 40
    page = terms.page()
    for term, name, title, words in found:
        assert (NBS / name).exists() and f"[{title}](#{terms.anchor(term, title)})" in page
        assert len(words) > len(term) + 8, f"{name}: {term!r} stands in no sentence"


# Downloads -----------------------------------------------------------------------------------

def test_a_download_brings_what_it_needs():
    import downloads
    made = [json.loads(notebook(x))["cells"][0] for x in (
        "#| default_exp model.x\nx = 1", "#| export\nimport regex as r\nx=1", "#| slow\nx = 1",
        "#| solution\ny = 1", 'z = "results/quickstart.json"', "# Title")]
    nb = downloads.standalone({"cells": made}, "04d_quickstart", "9.9")
    first, records, *rest = ["".join(c["source"]) for c in nb["cells"]]
    assert "pip install" in first and "jupyterlab regex" in first and "llmfs 9.9" in first
    assert "write_text" in records and "bits_per_byte" in records
    compile(records, "records", "exec")
    assert rest == ["import regex as r\nx=1", downloads.LONG + "# x = 1", "y = 1", made[4]["source"][0], "# Title"]
    nb = downloads.standalone({"cells": made}, "04d_quickstart", "9.9", solutions=False)
    assert "y = 1" not in json.dumps(nb)
    assert downloads.script(nb).startswith("# %% [markdown]\n# **To run")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_download_is_a_notebook_and_python(path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("jupytext")
    import downloads
    name = path.relative_to(NBS).with_suffix("").as_posix()
    nb = downloads.standalone(json.loads(path.read_text(encoding="utf-8")), name, "0", solutions=False)
    nbformat.validate(nbformat.reads(json.dumps(nb), as_version=4))
    compile(downloads.script(nb), name, "exec")
    text = "\n".join("".join(c["source"]) for c in nb["cells"])
    code = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code")
    assert "](results/" not in text and "](../results" not in text
    assert "../results" not in code and "\n#|" not in code
    solutions = ["".join(c["source"]) for c in cells_of(path) if downloads.has(c, "solution")]
    for answer in solutions:
        assert answer.split("\n", 1)[1].strip() not in code, f"{name}: a solution is handed out"


# The configuration -----------------------------------------------------------------------

def test_the_command_opens_the_book(tmp_path, monkeypatch):
    pytest.importorskip("tyro")
    import webbrowser

    from llmfs.cli import main
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    page = tmp_path / "a b" / "book" / "_site" / "index.html"
    page.parent.mkdir(parents=True)
    page.touch()
    (tmp_path / "a b" / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "a b" / "nbs")
    assert main(["book"]) in (0, None) and opened == [page.as_uri()]
    assert main(["book", "--folder", str(tmp_path)]) == 2 and len(opened) == 1


def test_long_signatures_are_lines():
    pytest.importorskip("sphinx")
    import conf
    context = {"body": "<dl class='py'><dt>f(<dl>\n<dd><em>a</em>,</dd>\n<dd>b</dd>\n</dl>\n)</dt><dd>text</dd></dl>"}
    conf.mend_page(None, "api/x", "page.html", context, None)
    assert context["body"].count("<dl") == 1 and context["body"].count('class="llmfs-param"') == 2
    assert "<dd>text</dd>" in context["body"]
    context = {"body": '<div class="citation" role="doc-biblioentry">'}
    conf.mend_page(None, "bibliography", "page.html", context, None)
    assert context["body"] == '<div class="citation" role="listitem">'


def test_pages_of_chapters_that_are_gone_go(tmp_path):
    pytest.importorskip("sphinx")
    from types import SimpleNamespace

    import conf
    kept = ["a.html", "api/b.html", "search.html", "_static/x.html"]
    for name in [*kept, "old.html"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    conf.forget_pages(SimpleNamespace(outdir=tmp_path, env=SimpleNamespace(found_docs={"a", "api/b"})), None)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.html")) == sorted(kept)


def test_a_table_corner_gets_a_word():
    pytest.importorskip("sphinx")
    import conf
    from docutils import nodes
    doc = nodes.section("", nodes.table("", nodes.tgroup("", nodes.thead("", nodes.row(
        "", nodes.entry("", nodes.paragraph()), nodes.entry("", nodes.paragraph("", "a")))))))
    conf.name_corners(None, doc)
    assert [len(list(e.findall(nodes.raw))) for e in doc.findall(nodes.entry)] == [1, 0]


def test_every_chapter_is_in_the_contents():
    patterns = re.findall(r"^([\w/*]+)$", (NBS / "index.md").read_text(), re.M)
    names = [p.relative_to(NBS).with_suffix("").as_posix() for p in CHAPTERS]
    assert names and not [n for n in names if not any(fnmatch(n, p) for p in patterns)]


def test_every_citation_has_an_entry():
    bib = (REPO / "book" / "references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{(\w+),", bib, re.M)
    assert len(keys) == len(set(keys)) > 40
    for path in CHAPTERS:
        for group in re.findall(r"\{cite:\w+\}`([^`]+)`", path.read_text(encoding="utf-8")):
            missing = {k.strip() for k in group.split(",")} - set(keys)
            assert not missing, f"{path.name} cites {missing}: add it to book/references.bib"


def test_docstrings_and_links_survive_their_renderers():
    pytest.importorskip("sphinx")
    import conf
    assert conf.plain_rest("a * b | c_ and `x * y_`") == r"a \* b \| c\_ and `x * y_`"
    content = ["[a](CONTRIBUTING.md) [b](https://x.y) [c](nbs/00b_hardware.ipynb) ![d](e.svg)"]
    conf.repository_links(None, None, None, content)
    assert content == [f"[a]({conf.GITHUB}/blob/main/CONTRIBUTING.md) [b](https://x.y) "
                       "[c](00b_hardware.ipynb) ![d](e.svg)"]


def test_every_module_has_a_page():
    pytest.importorskip("sphinx")
    import conf
    documented = {m for _, m in conf.modules()}
    exported = {"llmfs." + p.relative_to(REPO / "llmfs").with_suffix("").as_posix().replace("/", ".")
                for p in (REPO / "llmfs").rglob("*.py") if not p.stem.startswith("_")}
    assert documented == exported


# The site, where `make book` has built it ------------------------------------------------

class Requests(HTMLParser):
    "What a browser fetches by itself to show a page."

    def __init__(self):
        super().__init__()
        self.urls, self.images = [], []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.urls.append(a.get("src") or a.get("srcset") or "")
        if tag == "link" and a.get("rel") not in ("canonical", "search", "next", "prev", "author"):
            self.urls.append(a.get("href") or "")
        if tag == "img":
            self.images.append(a)


def pages():
    return sorted(SITE.rglob("*.html")) if (SITE / "index.html").exists() else []


built = pytest.mark.skipif(not pages(), reason="the book is not built: make book")


@built
def test_pages_ask_for_nothing_outside_and_nothing_missing():
    for page in pages():
        if "_static" in page.parts:
            continue
        parser = Requests()
        parser.feed(page.read_text(encoding="utf-8"))
        for url in filter(None, parser.urls):
            assert not re.match(r"(\w+:)?//", url), f"{page.name} fetches {url}"
            if not url.startswith("data:"):
                assert (page.parent / url.split("?")[0].split("#")[0]).exists(), (page.name, url)


@built
def test_every_picture_has_a_text():
    for page in pages():
        parser = Requests()
        parser.feed(page.read_text(encoding="utf-8"))
        for image in parser.images:
            alt = image.get("alt")
            assert alt is not None and not re.search(r"\w+/\w+\.(svg|png)", alt), (page.name, image)


@built
def test_every_chapter_can_be_taken_away():
    for path in CHAPTERS:
        name = path.relative_to(NBS).with_suffix("").as_posix()
        page = SITE / f"{name}.html"
        for suffix in (".ipynb", ".py"):
            assert (SITE / "downloads" / f"{name}{suffix}").exists(), f"{name}: make book"
            assert f"downloads/{name}{suffix}" in page.read_text(encoding="utf-8")
    assert not list(SITE.glob("_sources/**/*.ipynb"))  # they would hold the solutions


@built
def test_the_reference_leads_back_into_the_chapters():
    page = (SITE / "api" / "llmfs.model.attention.html").read_text(encoding="utf-8")
    assert "Where it is built:" in page and re.search(r'href="\.\./02b_model.attention.html#code-', page)


@built
def test_styles_ask_for_nothing_outside():
    for sheet in SITE.rglob("*.css"):
        outside = re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)\s]+", sheet.read_text())
        assert not outside, (sheet.name, outside[:3])


@built
def test_maths_is_typeset_from_disk():
    with_maths = [p for p in pages() if 'class="math' in p.read_text(encoding="utf-8")]
    for page in with_maths:
        assert "_static/mathjax" in page.read_text(encoding="utf-8"), page.name
