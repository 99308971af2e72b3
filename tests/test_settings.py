"The dial: the packaged text, the look-up order, one-line errors"

import sys
from dataclasses import fields
from pathlib import Path

from llmfs.settings import COLORS, DIAL, Settings, parse_dial, settings

import pytest

ROOT = Path(__file__).parent.parent
SCALES = ["ci", "laptop", "gpu"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working directory, no scale in the environment"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMFS_SCALE", raising=False)
    return tmp_path


def test_packaged_text_is_the_file():
    assert (ROOT / "settings.ini").read_text(encoding="utf-8") == DIAL


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_complete_and_typed(here, monkeypatch, scale):
    monkeypatch.setenv("LLMFS_SCALE", scale)
    cfg = settings()
    assert cfg.scale == scale
    for f in fields(Settings):
        assert type(getattr(cfg, f.name)) is f.type


def test_sections_hold_only_what_differs():
    import configparser

    ini = configparser.ConfigParser(default_section="none", inline_comment_prefixes="#")
    ini.read_string(DIAL)
    for scale in SCALES:
        assert not [k for k, v in ini[scale].items() if ini["DEFAULT"].get(k) == v]


def test_order_of_look_up(here, monkeypatch):
    deep = here / "a" / "b"
    deep.mkdir(parents=True)
    (here / "settings.ini").write_text("[llmfs]\nscale = laptop\n[laptop]\ntrain_steps = 7\n")
    monkeypatch.chdir(deep)
    cfg = settings()
    assert (cfg.scale, cfg.train_steps) == ("laptop", 7)  # the file, found upwards
    assert cfg.samples == 100  # not in the file: packaged
    monkeypatch.setenv("LLMFS_SCALE", "ci")
    assert settings().scale == "ci"  # the environment comes first
    (deep / "settings.ini").write_text("[tool]\nscale = 1\n")  # another tool's file
    assert settings().scale == "ci"


def test_a_default_in_the_file_beats_a_packaged_section(here):
    (here / "settings.ini").write_text("[llmfs]\nscale=gpu\n[DEFAULT]\ntrain_steps = 5\n[gpu]\n")
    assert settings().train_steps == 5


def test_minutes_of_one_chapter(here, monkeypatch):
    monkeypatch.setenv("LLMFS_SCALE", "ci")
    (here / "settings.ini").write_text("[llmfs]\n[DEFAULT]\nminutes = 1\nminutes_02b = 2.5\n[ci]\n")
    assert settings("02b").minutes == 2.5 and settings("02c").minutes == 1


def test_own_section(here):
    (here / "settings.ini").write_text("[llmfs]\nscale=mine\n[mine]\nsamples = 3\n")
    cfg = settings()
    assert (cfg.scale, cfg.samples) == ("mine", 3)


def test_prints_minutes_of_the_chapter(here, monkeypatch, capsys):
    monkeypatch.setenv("LLMFS_SCALE", "ci")
    settings()
    assert capsys.readouterr().out == ""
    settings("00a")
    assert capsys.readouterr().out.startswith("scale ci: about ")
    settings("99z")  # no minutes of its own
    assert capsys.readouterr().out == "scale ci: about 1 minute\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("[llmfs]\n[DEFAULT]\ntrain_step = 5", "unknown key 'train_step'; did you mean train_steps?"),
        ("[llmfs]\n[gpu]\nzzz = 5", "unknown key 'zzz'; known: minutes"),
        ("[llmfs]\nscale = huge", "no scale called 'huge'; choose one of auto, ci, laptop, gpu"),
        ("[llmfs]\nscale=ci\n[ci]\nsamples = many", "samples = 'many' is not a whole number"),
        ("[llmfs]\nscale=ci\n[ci]\nminutes = soon", "minutes = 'soon' is not a number"),
        ("[llmfs]\n[ci]\n[ci]", "already exists"),
        ("[llmfs]\n[ci]\nnonsense", "nonsense"),
    ],
)
def test_one_line_errors(here, text, said):
    (here / "settings.ini").write_text(text)
    with pytest.raises(ValueError) as e:
        settings()
    assert said in str(e.value) and "\n" not in str(e.value)
    assert str(here / "settings.ini") in str(e.value)


def test_parse_dial_names_its_source():
    with pytest.raises(ValueError, match="^mine.ini: unknown key"):
        parse_dial("[ci]\nbatch = 5", "mine.ini")


@pytest.mark.parametrize(
    "system, packages, driver, expected",
    [
        ("Darwin", [], False, "laptop"),
        ("Linux", [], True, "ci"),
        ("Linux", ["mlx-cuda-12"], True, "gpu"),
        ("Linux", ["mlx-cuda-13"], True, "gpu"),
        ("Linux", ["mlx-cuda-12"], False, "ci"),
    ],
)
def test_auto_scale(monkeypatch, system, packages, driver, expected):
    from llmfs import settings as module

    class Found:
        name = "found"

    def load(name):
        if not driver:
            raise OSError(name)

    monkeypatch.setattr(module.platform, "system", lambda: system)
    found = lambda name: [Found()] if name in packages else []
    monkeypatch.setattr(module.metadata, "distributions", found)
    monkeypatch.setattr(module.ctypes, "CDLL", load)
    assert module.auto_scale() == expected


def test_colors_differ_for_colour_blind_eyes():
    np = pytest.importorskip("numpy")
    simulate = {  # Machado, Oliveira, Fernandes 2009, severity 1
        "normal": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(color, eye):
        c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        xyz = to_xyz @ np.clip(np.array(eye) @ linear, 0, 1) / [0.9505, 1, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    for eye in simulate.values():
        seen = [lab(c, eye) for c in COLORS]
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
        assert min(gaps) > 30  # 1 is just noticeable side by side


def test_book_style_writes_the_same_svg_twice(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from llmfs.settings import book_style

    import matplotlib.pyplot as plt

    with matplotlib.rc_context():
        book_style()
        written = []
        for name in ("a.svg", "b.svg"):
            fig, ax = plt.subplots()
            ax.plot([1, 2], label="x")
            ax.legend()
            fig.savefig(tmp_path / name, metadata={"Date": None, "Creator": None})
            plt.close(fig)
            written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert b"#ffffff" not in written[0]  # nothing white: the page shows through


def test_missing_matplotlib_is_one_line(monkeypatch):
    from llmfs.settings import book_style

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match="^plots need matplotlib"):
        book_style()
