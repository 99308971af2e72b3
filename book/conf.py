"""How the book is rendered: `make book`, or see the command in the Makefile."""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
REPO = HERE.parent
NBS = REPO / "nbs"
sys.path[:0] = [str(HERE), str(REPO)]

import llmfs  # noqa: E402  (before anything that imports MLX)

import downloads  # noqa: E402
import landing  # noqa: E402
import measured  # noqa: E402
import nbdev_reader  # noqa: E402
import terms  # noqa: E402
from docutils import nodes  # noqa: E402

project = "llmfs"
author = "the llmfs authors"
copyright = "the llmfs authors. Text CC BY 4.0, code Apache-2.0"
release = version = llmfs.__version__
language = "en"
GITHUB = "https://github.com/llmfs/llmfs"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_togglebutton",
    "sphinx-mathjax-offline",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["text", "results", "data", "checkpoints", "**/_*", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
default_role = "code"
numfig = True
nitpicky = True
# Other projects' names are not resolved: that would need the network.
nitpick_ignore_regex = [("py:.*", r"(?!llmfs).*")]

# Notebooks ---------------------------------------------------------------------------------
nb_custom_formats = {".ipynb": "nbdev_reader.read"}
nb_execution_mode = "off"  # the outputs stored in the notebooks
nb_merge_streams = True
myst_enable_extensions = [
    "amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

bibtex_bibfiles = ["../book/references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

# Pages -------------------------------------------------------------------------------------
html_theme = "sphinx_book_theme"
html_title = "llmfs"
html_static_path = ["_static"]
html_css_files = ["llmfs.css"]
html_copy_source = False  # downloads.py makes copies that run alone, without solutions where those are off
html_show_sourcelink = False
html_show_search_summary = False  # it would fetch pages, which file:// refuses
html_last_updated_fmt = None
html_context = {"default_mode": "auto"}
html_theme_options = {
    "repository_url": GITHUB,
    "repository_branch": "main",
    "path_to_docs": "nbs",
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "show_navbar_depth": 1, "max_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_start": [], "navbar_center": [], "navbar_end": [], "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_content_items": ["copyright"],
}
copybutton_selector = "div.cell_input pre, div.highlight-console pre, div.highlight-bash pre"
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

# API reference: one page a module, made from the docstrings ---------------------------------
autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"


def modules():
    "Chapter, module for every notebook that exports one, in the order of the book."
    for path in sorted(NBS.glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            found = re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.M)
            if found and (REPO / "llmfs" / (found[1].replace(".", "/") + ".py")).exists():
                yield path.stem, f"llmfs.{found[1]}"


def shown_in(name):
    "Chapter and its title, for a name whose code a chapter shows; None for others."
    if not PLACES:
        for chapter, module in modules():
            nb = nbdev_reader.read((NBS / f"{chapter}.ipynb").read_text(encoding="utf-8"))
            title = nb.cells[0].source.split("\n")[0].lstrip("# ")
            for cell in nb.cells:
                for found in re.findall(r"^\(code-([\w.-]+)\)=$", cell.source, re.M):
                    PLACES[found] = chapter, title
    return PLACES.get(nbdev_reader.label(name).removeprefix("code-"))


PLACES = {}


def write_if_new(page, text):
    if not page.exists() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")


def write_pages(app):
    "Write nbs/terms.md, and nbs/api/MODULE.md, where they changed; remove pages of modules that are gone."
    write_if_new(NBS / "terms.md", terms.page())
    folder, pages = NBS / "api", {}
    for chapter, module in modules():
        pages[f"{module}.md"] = (
            f"# {module}\n\nWritten and explained in {{doc}}`/{chapter}`.\n\n"
            f"```{{eval-rst}}\n.. automodule:: {module}\n```\n")
    listing = "\n".join(Path(name).stem for name in pages)
    pages["index.md"] = (
        "# API reference\n\nEvery public name of the package, from the docstrings of the "
        f"chapters.\n\n```{{toctree}}\n:maxdepth: 2\n\n{listing}\n```\n")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        write_if_new(folder / name, text)


def outdated_api(app, env, added, changed, removed):
    "Read the reference again each time: a module's page changes with what it imports."
    return [doc for doc in env.found_docs if doc.startswith("api/")]


def plain_rest(line):
    "Outside backticks, characters that reST would take for markup stand for themselves."
    parts = line.split("`")
    parts[::2] = [re.sub(r"(?<!\\)[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", p) for p in parts[::2]]
    return "`".join(parts)


def document_parameters(app, what, name, obj, options, lines):
    "Add the comment beside each parameter (fastcore's docments) to the docstring."
    if not any(line.lstrip().startswith((".. ", ":")) for line in lines):
        lines[:] = [plain_rest(line) for line in lines]
    if what == "module":  # the title and link of the page say it already
        lines[:] = [line for line in lines if "AUTOGENERATED" not in line]
    if what not in ("function", "class", "method") or any(":param" in s for s in lines):
        return
    from fastcore.docments import docments
    try:
        found = docments(obj, full=True, returns=True)
    except Exception:  # no source to read: a built-in, a generated method
        return
    if shown_in(name):
        lines += ["", f"Where it is built: :ref:`{shown_in(name)[1]} <{nbdev_reader.label(name)}>`.", ""]
    notes = [(k, v.get("docment")) for k, v in found.items() if v.get("docment")]
    lines += [""] * bool(notes)
    for key, note in notes:
        field = "returns" if key == "return" else f"param {key}"
        lines.append(f":{field}: {plain_rest(' '.join(str(note).split()))}")


def plain_types(app, what, name, obj, options, signature, returns):
    "`Annotated[int, ...]` tells the command line something; the reader it is an int."
    if signature and "Annotated[" in signature:
        signature = re.sub(r"Annotated\[(.+?), ~?tyro\.[^\]]*\]", r"\1", signature)
    return signature, returns


def forget_pages(app, exception):
    "Pages of chapters that are gone or have another name."
    made = {"genindex", "search", "py-modindex"} | set(app.env.found_docs)
    for page in Path(app.outdir).rglob("*.html"):
        name = page.relative_to(app.outdir).with_suffix("").as_posix()
        if not exception and not name.startswith("_") and name not in made:
            page.unlink()


def mend_page(app, pagename, templatename, context, doctree):
    "What axe minds in what others write: lists of definitions without terms, a role that was taken back."
    def one(match):
        lines = re.sub(r"<(/?)dd>", lambda m: "</span>" if m[1] else '<span class="llmfs-param">', match[1])
        return f'<span class="llmfs-params">{lines}</span>'
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')
        context["body"] = re.sub(r"<dl>\s*((?:<dd>(?:(?!</?d[dlt]>).)*</dd>\s*)+)</dl>", one, context["body"], flags=re.S)


def name_corners(app, doctree):
    "A table's empty corner gets a word for those who listen to the page."
    for head in doctree.findall(nodes.thead):
        for entry in head.findall(nodes.entry):
            if not entry.astext().strip():
                entry += nodes.raw("", '<span class="visually-hidden">row</span>', format="html")


def drop_empty_parts(app, docname, content):
    "A part of the book that has no chapters yet does not appear in the contents."
    if docname == "index":
        content[0] = re.sub(
            r"```\{toctree\}\n(?::.*\n)*:glob:\n(?::.*\n)*\n(\S+)\n```\n",
            lambda m: m[0] if any(NBS.glob(m[1] + ".ipynb")) else "", content[0])


def numbers_of_records(app, docname, content):
    "Pages in Markdown: the same keys as in chapters."
    if not (NBS / f"{docname}.ipynb").exists():
        content[0] = measured.fill(content[0], None, nbdev_reader.number_link, docname)


def readme(app, path, parent, content):
    "README.md in the book: today's numbers, the story in words, links that lead somewhere."
    content[0] = measured.fill(content[0], None, nbdev_reader.number_link, Path(path).name)
    content[0] = landing.story_in_words(content[0])
    repository_links(app, path, parent, content)


def repository_links(app, path, parent, content):
    "README.md is written for GitHub: its relative links become chapters or links to GitHub."
    def target(match):
        label, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        page = re.fullmatch(r"nbs/([\w./-]+\.(?:ipynb|md))", link)
        if page and (REPO / link).exists():
            return f"[{label}]({page[1]})"
        return f"[{label}]({GITHUB}/blob/main/{link})"
    content[0] = re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", target, content[0])


def setup(app):
    # A change of these reads all chapters again, where only changed chapters are read otherwise.
    app.add_config_value("reader_source", "".join((HERE / f"{n}.py").read_text() for n in ("conf", "nbdev_reader", "measured", "terms", "landing")), "env")
    app.add_config_value("reader_solutions", nbdev_reader.SOLUTIONS, "env")
    app.connect("builder-inited", write_pages)
    app.connect("env-get-outdated", outdated_api)
    app.connect("autodoc-process-signature", plain_types)
    app.connect("autodoc-process-docstring", document_parameters)
    app.connect("doctree-read", name_corners)
    app.connect("source-read", drop_empty_parts)
    app.connect("source-read", numbers_of_records)
    app.connect("include-read", readme)
    app.connect("html-page-context", mend_page)
    app.connect("html-page-context", downloads.add_button, priority=900)
    app.connect("build-finished", downloads.write)
    app.connect("build-finished", forget_pages)
