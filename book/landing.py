"""The story of the landing page, as words that flow with the page; README.md, on GitHub, shows its picture."""

import html
import json
import re
from pathlib import Path

RECORD = Path(__file__).resolve().parent.parent / "nbs" / "results" / "quickstart.json"
PICTURE = re.compile(r"!\[[^\]]*\]\(nbs/images/story\.svg\)")


def words() -> str:
    "Each word of the record's story over its probability, in HTML."
    story = json.loads(RECORD.read_text(encoding="utf-8"))["story"]
    cells = []
    for word, bits in zip(story["words"], story["bits_per_word"], strict=True):
        p = 2.0**-bits
        shade = min(bits / 6, 1) * 0.55
        cells.append(f'<span class="llmfs-word" style="background: rgb(66 97 189 / {shade:.2f})">'
                     f"{html.escape(word.strip())}<small>{percent(p)}</small></span>")
    return '<div class="llmfs-story">' + " ".join(cells) + "</div>"


def percent(p: float) -> str:
    "A probability in at most four characters."
    return f"{p:.0%}" if p >= 0.095 else f"{p:.1%}" if p >= 0.00095 else "&lt;0.1%"


def story_in_words(text: str) -> str:
    return PICTURE.sub(lambda m: "\n" + words() + "\n", text)
