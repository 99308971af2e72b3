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


# The configuration -----------------------------------------------------------------------

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
            assert alt is not None and "/" not in alt, (page.name, image)


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
