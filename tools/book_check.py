"""The built book in a real browser: `make book-check`, after `make book`.

Every page, from disk: accessibility (axe) in light and dark, loaded in under a second, nothing asked of
the network, no script error, nothing wider than a phone but in a box that scrolls; and search finds.
Screenshots go to book/_shots/. One line a finding; exit 1 where there is any. Where no browser is, exit 0,
but 1 with CI set, as it is on a server that tests: what was not looked at is not green there.

    python tools/book_check.py [PAGE...]      # names such as 02b_model.attention; none: all
    CHROMIUM=/path/to/browser                 # where it is not found by itself
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE, SHOTS = ROOT / "book" / "_site", ROOT / "book" / "_shots"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SECONDS, TRIES = 1.0, 3  # the best of so many loads counts: other programs run too
PATIENCE = 10_000  # milliseconds for the search
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
MAC = ("/Applications/Chromium.app/Contents/MacOS/Chromium",
       "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")  # fmt: skip
SEARCHES = {"perplexity": "evaluation.metrics", "grouped-query attention": "02b_model.attention",
            "Muon": "03b_training.optimizer"}  # fmt: skip

THEME = "m => { document.documentElement.dataset.theme = m; document.documentElement.dataset.mode = m }"
LOADED = "() => performance.getEntriesByType('navigation')[0].duration / 1000"
# Tokens of code repeat thousands of times: one of a kind and colour in a kind of box stays, others become text.
# Formulas are MathJax's to make accessible, and its own texts for listeners are not looked at.
SIMPLER = """() => { const seen = new Set(); document.querySelectorAll('mjx-container').forEach(e => e.remove());
  for (const e of [...document.querySelectorAll('pre span')]) {
    if (e.querySelector('a') || e.parentElement.closest('span.sig-name')) continue;
    const key = e.className + '|' + e.closest('div[class]').className;
    if (seen.has(key)) e.replaceWith(...e.childNodes); else seen.add(key) }
  document.querySelectorAll('pre').forEach(e => e.normalize()) }"""
AXE = """rules => axe.run(Object.assign({resultTypes: ['violations']}, rules)).then(r => r.violations.map(v =>
  [v.id, v.nodes.length, v.nodes[0].target.join(' '), v.nodes[0].html.slice(0, 160)]))"""
# What is wider than the page, and not inside an element that scrolls by itself.
WIDE = """() => { const w = document.documentElement.clientWidth, found = [];
  const scrolls = e => e && e !== document.body && (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  if (document.documentElement.scrollWidth > w) found.push('the page, ' + document.documentElement.scrollWidth + ' px');
  for (const e of document.querySelectorAll('.bd-article pre, .bd-article table, .bd-article img, .bd-article svg, mjx-container, .bd-article p')) {
    const r = e.getBoundingClientRect();
    if (r.width && r.right > w + 1 && !scrolls(e.tagName === 'PRE' ? e : e.parentElement))
      found.push(e.tagName.toLowerCase() + ': ' + e.textContent.trim().slice(0, 40)) }
  return found }"""


def find_browser() -> str | None:
    "A Chromium of this machine."
    asked = os.environ.get("CHROMIUM")
    if asked:
        return asked if Path(asked).is_file() else None
    found = [shutil.which(name) for name in BROWSERS] + [p for p in MAC if Path(p).is_file()]
    return next((p for p in found if p), None)


def pages(names: list[str]) -> list[Path]:
    "Files of the site, without those of its themes."
    every = [p for p in sorted(SITE.rglob("*.html")) if not p.relative_to(SITE).parts[0].startswith("_")]
    return [p for p in every if not names or name_of(p) in names]


def name_of(page: Path) -> str:
    return page.relative_to(SITE).with_suffix("").as_posix()


class Browser:
    "One browser without a network, and what its pages ask for or complain of."

    def __init__(self, playwright, program: str, profile: str, scheme: str = "light"):
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        self.context = playwright.chromium.launch_persistent_context(
            profile, executable_path=program, headless=True, offline=True, viewport=DESKTOP,
            color_scheme=scheme, args=FLAGS + ["--no-sandbox"] * root)  # fmt: skip
        self.page = self.context.pages[0] if self.context.pages else self.context.new_page()
        self.asked, self.errors = [], []
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda e: self.errors.append(str(e).split("\n")[0]))
        self.axe = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")

    def _note(self, request):
        if not request.url.startswith(("file:", "data:", "blob:", "about:")):
            self.asked.append(request.url)

    def load(self, page: Path, query: str = "") -> float:
        "Seconds until the page had loaded."
        self.page.goto(page.as_uri() + query, wait_until="load")
        return self.page.evaluate(LOADED)

    def settle(self):
        "Let MathJax finish, and fonts."
        self.page.evaluate("async () => { if (window.MathJax && MathJax.startup) await MathJax.startup.promise;"
                           " await document.fonts.ready }")  # fmt: skip

    def shot(self, name: str):
        SHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name.replace('/', '.')}.png")

    def violations(self, rules: dict) -> list:
        return self.page.evaluate(AXE, rules)


def check(browser: Browser, page: Path, pictures: bool = True) -> tuple[list[str], float]:
    "Findings of one page, and its seconds."
    name, bad, tab = name_of(page), [], browser.page
    browser.asked.clear(), browser.errors.clear()
    tab.set_viewport_size(DESKTOP)
    seconds = browser.load(page)
    for _ in range(TRIES - 1):
        if seconds > SECONDS:
            seconds = min(seconds, browser.load(page))
    if seconds > SECONDS:
        bad.append(f"took {seconds:.2f} s to load")
    browser.settle()
    tab.add_style_tag(content="* { transition: none !important }")  # else colours are judged on their way
    for size, shape in ((PHONE, "phone"), (DESKTOP, "desktop")):
        tab.set_viewport_size(size)
        for mode in ("light", "dark") if pictures else ():
            tab.evaluate(THEME, mode)
            browser.shot(f"{name}.{shape}.{mode}")
        if size is PHONE:
            bad += [f"phone: wider than the page: {x}" for x in tab.evaluate(WIDE)]
    tab.evaluate(SIMPLER)
    tab.evaluate(browser.axe)
    everything, colours = {}, {"runOnly": ["color-contrast", "link-in-text-block"]}
    for mode, rules in (("light", everything), ("dark", colours)):
        tab.evaluate(THEME, mode)
        found = browser.violations(rules)
        bad += [f"{mode}: axe {rule} ({n}): {where}  {' '.join(html.split())}" for rule, n, where, html in found]
    bad += [f"asks for {x}" for x in browser.asked] + [f"script error: {x}" for x in browser.errors]
    return [f"{name}: {x}" for x in bad], seconds


def search(browser: Browser) -> list[str]:
    "The search page, from disk, finds a word where it is taught."
    bad = []
    for words, where in SEARCHES.items():
        browser.load(SITE / "search.html", f"?q={words.replace(' ', '+')}")
        try:
            browser.page.wait_for_selector("#search-results li a", timeout=PATIENCE)
        except Exception:
            bad.append(f"search: {words!r} finds nothing")
            continue
        found = browser.page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
        if not any(where in x for x in found[:10]):
            bad.append(f"search: {words!r} does not find {where} among the first ten")
    return bad


def plots(browser: Browser, page: Path) -> None:
    "Every picture of a page, in light and dark, one below the other."
    tab = browser.page
    tab.set_viewport_size({"width": 900, "height": 900})
    browser.load(page)
    for mode in ("light", "dark"):
        tab.evaluate(THEME, mode)
        for i, image in enumerate(tab.query_selector_all(".bd-article img")):
            if image.is_visible():
                SHOTS.mkdir(exist_ok=True)
                image.screenshot(path=SHOTS / f"{name_of(page)}.plot{i}.{mode}.png".replace("/", "."))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", help="names of pages; none: all, and search")
    parser.add_argument("--plots", action="store_true", help="also a picture of every plot, in both modes")
    parser.add_argument("--no-shots", action="store_true", help="no pictures")
    args = parser.parse_args()
    if not (SITE / "index.html").exists():
        print("book-check: the book is not built: make book")
        return 1
    program = find_browser()
    if program is None:
        print("book-check: skipped, no Chromium here (apt install chromium; or CHROMIUM=/path/to/it)")
        return int("CI" in os.environ)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        print("book-check: skipped, no playwright here: bash tools/setup.sh browser")
        return int("CI" in os.environ)
    bad, times = [], {}
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        browser = Browser(playwright, program, profile)
        for page in pages(args.pages):
            found, times[name_of(page)] = check(browser, page, not args.no_shots)
            bad += found
            print(*found, sep="\n", end="\n" * bool(found), flush=True)
            if args.plots:
                plots(browser, page)
        if not args.pages:
            found = search(browser)
            bad += found
            print(*found, sep="\n", end="\n" * bool(found))
        browser.context.close()
    if not times:
        print(f"book-check: no page called {' '.join(args.pages)}")
        return 1
    slowest = max(times, key=times.get)
    print(f"book-check: {len(times)} pages, {len(bad)} findings; slowest {slowest} {times[slowest]:.2f} s; pictures in book/_shots/")
    (SHOTS / "times.json").write_text(json.dumps(times, indent=1)) if SHOTS.exists() else None
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
