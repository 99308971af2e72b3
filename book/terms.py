"""The index of terms, made from the chapters: `<dfn>perplexity</dfn>` marks where a term is introduced.

Jupyter and GitHub show such a word in italics. The book enters it in the index, and the page of terms lists
each with the sentence that introduces it.
"""

import json
import re
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"
NAMES = ("Adam", "Feistel", "Muon")  # of people and programs: never lower case
TERM = re.compile(r"<dfn>([^<>\n]+)</dfn>")


def mark(text: str, title: str, seen: set) -> str:
    "The text for Sphinx: at each term an entry of the index, and at its first place something to link to."
    def one(match):
        term = match[1]
        target = "" if entry(term) in seen else f"#{anchor(term, title)} "
        seen.add(entry(term))
        return f"[{term}]{{{target}.dfn}}{{index}}`\u200b <{entry(term)}>`"
    return TERM.sub(one, text)


def entry(term: str) -> str:
    "How the term stands in the index: an initial letter alone is lower case."
    keep = term.split()[0] in NAMES or any(c.isupper() for c in term[1:])
    return term if keep else term[:1].lower() + term[1:]


def anchor(term: str, title: str) -> str:
    "The target of a term in the chapter with this title."
    return "term-" + re.sub(r"[^a-z0-9]+", "-", f"{entry(term)} {title}".lower()).strip("-")


def sentence(text: str, term: str) -> str:
    "The sentence of a paragraph or an item that introduces a term."
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.)\s)", text)
    part = next(p for p in parts if f"<dfn>{term}</dfn>" in p)
    found = re.split(r"(?<=[.!?])\s+(?=[A-Z<*`$])", re.sub(r"^\s*(?:[-*+>]|\d+\.)\s+", "", " ".join(part.split())))
    words = next(s for s in found if f"<dfn>{term}</dfn>" in s)
    words = re.sub(r"<!--.*?-->|\s*\{cite:\w+\}`[^`]*`", "", TERM.sub(r"*\1*", words))
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words).strip()


def terms() -> list[tuple[str, str, str, str]]:
    "Term, file of its chapter, the chapter's title, the sentence: in alphabetical order, the first of each."
    found = {}
    for path in sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts):
        title = path.stem
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] != "markdown":
                continue
            if heading := re.match(r"# (.+)", text):
                title = heading[1]
            for term in TERM.findall(text):
                name = path.relative_to(NBS).as_posix()
                found.setdefault(entry(term).lower(), (term, name, title, sentence(text, term)))
    return [found[k] for k in sorted(found)]


def page() -> str:
    "The page of terms, in Markdown."
    lines = ["# Terms\n\nWhere each word is introduced, with the sentence that does it.\n"]
    for term, name, title, words in terms():
        lines.append(f"**{entry(term)}**\n: {words}\n  [{title}](#{anchor(term, title)})\n")
    return "\n".join(lines)
