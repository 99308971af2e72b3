"""tools/book_check.py finds what it promises to find in a page, and says in one line where it cannot look."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("book_check", ROOT / "tools" / "book_check.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

PAGE = """<!doctype html><html lang="en" data-theme="light"><head><title>T</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head>
<body><main class="bd-article"><h1>T</h1>{body}</main></body></html>"""
GOOD = "<p>Words.</p><div style='overflow-x: auto' tabindex='0'><table><tr><th>a</th></tr><tr><td>" + "x" * 400 + "</td></tr></table></div>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    sync = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("axe_playwright_python")
    if tool.find_browser() is None:
        pytest.skip("no Chromium here")
    with sync.sync_playwright() as playwright:
        made = tool.Browser(playwright, tool.find_browser(), str(tmp_path_factory.mktemp("profile")))
        yield made
        made.context.close()


@pytest.fixture
def check(browser, tmp_path, monkeypatch):
    "Findings of one page with this body and style"
    monkeypatch.setattr(tool, "SITE", tmp_path)
    monkeypatch.setattr(tool, "SHOTS", tmp_path / "shots")
    monkeypatch.setattr(tool, "SECONDS", 30)

    def run(body, css=""):
        page = tmp_path / "page.html"
        page.write_text(PAGE.format(body=body, css=css))
        return "\n".join(tool.check(browser, page)[0])

    return run


def test_a_good_page_passes_and_is_pictured(check, tmp_path):
    assert check(GOOD) == ""
    assert len(list((tmp_path / "shots").glob("page.*.png"))) == 4


@pytest.mark.parametrize("body, css, said", [
    ("<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' width=9 height=9>", "", "axe image-alt"),
    ("<p>pale</p>", "p {color: #ccc}", "light: axe color-contrast"),
    ("<p>dark</p>", "[data-theme=dark] {background: #111; color: #222}", "dark: axe color-contrast"),
    ("<table><tr><th>a</th></tr><tr><td>" + "x" * 400 + "</td></tr></table>", "", "phone: wider than the page"),
    ("<pre>" + "y" * 400 + "</pre>", "", "phone: wider than the page: the page"),
    ("<script>fetch('https://example.org/a.js').catch(() => 0)</script>", "", "asks for https://example.org/a.js"),
    ("<script>throw new Error('broken')</script>", "", "script error: broken")])  # fmt: skip
def test_a_bad_page_is_found(check, body, css, said):
    assert said in check(body, css)


def test_a_slow_page_is_found(check, monkeypatch):
    monkeypatch.setattr(tool, "SECONDS", 0)
    assert "s to load" in check(GOOD)


def test_a_search_that_finds_nothing_is_found(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "SITE", tmp_path)
    monkeypatch.setattr(tool, "SEARCHES", {"perplexity": "metrics", "Muon": "optimizer"})
    hit = "<ul id='search-results'><li><a href='a.metrics.html'>x</a></li></ul>"
    (tmp_path / "search.html").write_text(PAGE.format(body=hit, css=""))
    assert tool.search(browser) == ["search: 'Muon' does not find optimizer among the first ten"]
    monkeypatch.setattr(tool, "PATIENCE", 200)
    (tmp_path / "search.html").write_text(PAGE.format(body="", css=""))
    assert [x.split(" finds ")[1] for x in tool.search(browser)] == ["nothing", "nothing"]


def test_without_a_browser_it_says_so_and_skips(tmp_path):
    (tmp_path / "tools").mkdir()
    copy = tmp_path / "tools" / "book_check.py"
    copy.write_text((ROOT / "tools" / "book_check.py").read_text())
    env = {"PATH": str(tmp_path), "CHROMIUM": str(tmp_path / "none")}
    run = lambda: subprocess.run([sys.executable, copy], capture_output=True, text=True, env=env)  # noqa: E731
    assert run().returncode == 1 and "make book" in run().stdout
    (tmp_path / "book" / "_site").mkdir(parents=True)
    (tmp_path / "book" / "_site" / "index.html").touch()
    done = run()
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "skipped, no Chromium" in done.stdout
    env["CI"] = "true"
    assert run().returncode == 1
