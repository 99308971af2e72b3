"""README.md for the package index: `python tools/index_readme.py v0.1.0`. Links of the repository become links to GitHub, at that tag.

The release workflow runs it on its own copy, just before building; the file in the repository stays relative.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = "https://github.com/llmfs/llmfs/blob/{}/{}"
FILE = "https://raw.githubusercontent.com/llmfs/llmfs/{}/{}"


def absolute(text: str, tag: str) -> str:
    "The text with every relative link and picture made absolute."
    def one(match):
        picture, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        return f"{picture}[{label}]({(FILE if picture else PAGE).format(tag, target)})"
    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", one, text)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(absolute(path.read_text(encoding="utf-8"), sys.argv[1]), encoding="utf-8")
