"""The command llmfs, as a shell sees it: exit codes, one-line errors, nothing written over."""

import json
import math
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import time

import llmfs
from llmfs.cli import COMMANDS, UsageError, describe, fold_box, parse

import pytest

LLMFS = [sys.executable, "-c", "import sys; from llmfs.cli import main; sys.exit(main())"]
ENV = os.environ | {"MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SMALL = "--max-steps 2 --seq-len 32 --batch-size 2".split()


def llmfs_run(*args, cwd, **kwargs):
    return subprocess.run([*LLMFS, *map(str, args)], cwd=cwd, env=ENV, text=True,
                          capture_output=True, timeout=120, **kwargs)  # fmt: skip


def tree(folder):
    "All files below a folder, with content and time of change."
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def one_line(done, code=2):
    "The single line of an error; nothing else may have been printed."
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("llmfs: "), done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a text, a trained run in checkpoints/, and some files that are not what they seem."
    folder = tmp_path_factory.mktemp("cli")
    text = "".join(f"The cat number {i} sat on mat {i * 7 % 31}.\n" for i in range(300))
    (folder / "cats.txt").write_text(text)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("Only a few words in here, not enough for a batch.\n")
    (folder / "fake.npz").write_bytes(b"PK\x03\x04 not really")
    done = llmfs_run("train", "--text", "cats.txt", "--tokenizer", "char", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


BAD = {
    "missing text": ("train --text nowhere.txt --out new", "nowhere.txt"),
    "empty text": ("train --text empty.txt --out new", "empty.txt"),
    "no text at all": ("train --out new", "download-data"),
    "no text for a tokenizer": ("train-tokenizer --out new", "download-data"),
    "missing checkpoint": ("generate --checkpoint nowhere.npz", "nowhere.npz"),
    "checkpoint of another name": ("generate --checkpoint checkpoints/b.npz", "last.npz"),
    "checkpoint is a text": ("generate --checkpoint cats.txt", "not a checkpoint"),
    "checkpoint is cut off": ("generate --checkpoint fake.npz", "fake.npz"),
    "checkpoint is a folder": ("evaluate --checkpoint checkpoints", "best.npz"),
    "batch does not fit": (
        "train --text short.txt --tokenizer char --out new --batch-size 500", "batch"),
    "unknown size": ("train --text cats.txt --out new --model-size huge", "124m"),
    "unknown optimizer": ("train --text cats.txt --out new --optimizer sgd", "muon"),
    "unknown precision": ("train --text cats.txt --out new --precision int8", "float32"),
    "no steps": ("train --text cats.txt --out new --max-steps 0", "max_steps"),
    "negative batch": ("train --text cats.txt --out new --batch-size -1", "batch_size"),
    "missing tokenizer": ("train --text cats.txt --tokenizer no.json --out new", "no.json"),
    "tokenizer is a text": ("train --text cats.txt --tokenizer cats.txt --out new", "cats.txt"),
    "folder is a file": ("train --text cats.txt --out cats.txt/run", "cats.txt"),
    "folder in /proc": ("train --text cats.txt --out /proc/run", "/proc/run"),
    "second run": ("train --text cats.txt", "--resume"),
    "nothing to resume": ("train --resume --out new", "new"),
    "resume with text": ("train --resume --text cats.txt", "--text"),
    "cold": ("generate --temperature -1", "temperature"),
    "no samples": ("generate --num-samples 0", "num"),
    "wrong flag": ("train --bogus 3", "--bogus"),
    "wrong number": ("train --max-steps many", "--max-steps"),
    "misspelled flag": ("train --model-sze tiny", "--model-size"),
    "misspelled command": ("trian", "train"),
    "no command": ("", "quickstart"),
    "export of nothing": ("export --checkpoint nowhere.npz --out new", "nowhere.npz"),
    "export over files": ("export --out . --overwrite --checkpoint checkpoints/last.npz", "no part of"),
    "export in int8": ("export --precision int8 --checkpoint checkpoints/last.npz --out new", "float32"),
    "import of nothing": ("import nowhere --out new/best.npz", "nowhere/config.json"),
    "import of a text": ("import cats.txt --out new/best.npz", "cats.txt"),
    "import of a run": ("import checkpoints --out new/best.npz", "config.json"),
    "import over a run": ("import . --out checkpoints/last.npz", "--overwrite"),
    "import without a folder": ("import --out new/best.npz", "DIR"),
    "quickstart in a run": ("quickstart --out checkpoints", "--overwrite"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_costs_one_line_and_nothing_else(place, name):
    args, hint = BAD[name]
    before = tree(place)
    line = one_line(llmfs_run(*args.split(), cwd=place))
    assert hint in line and len(line) < 300
    after = tree(place)
    assert before.items() <= after.items(), "a file was changed"
    assert not (place / "new" / "best.npz").exists()


def test_debug_shows_the_traceback(place):
    done = llmfs_run("generate", "--checkpoint", "nowhere.npz", "--debug", cwd=place)
    assert "Traceback" in done.stderr and done.returncode == 1


def test_help_is_quick_and_light(place):
    start = time.perf_counter()
    done = llmfs_run("--help", cwd=place)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)
    assert time.perf_counter() - start < 5  # on a busy machine; alone it takes 0.2 s
    code = "import sys, llmfs.cli; print(sorted({'mlx.core', 'numpy', 'torch', 'matplotlib'} & set(sys.modules)))"
    seen = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=ENV)
    assert seen.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as e:
        parse([command, "--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert "--json" in out and "--debug" in out


def test_flags_mean_the_same_everywhere():
    kinds = {}
    for kind in COMMANDS.values():
        for name, annotation in kind.__dataclass_fields__.items():
            if "Positional" not in str(annotation.type):  # a word without a flag
                kinds.setdefault(name, set()).add(str(annotation.type))
    assert {name for name, k in kinds.items() if len(k) > 1} == {"checkpoint"}  # evaluate takes several


def test_usage_errors_fold_to_a_line():
    with pytest.raises(UsageError, match=r"--model-size"):
        parse(["train", "--model-sze", "x"])
    box = "╭─ Title ─╮\n│ One. Two │\n│ three.   │\n│ ──────── │\n│ more     │\n╰─────────╯"
    assert fold_box(box) == "One. Two three."
    plain = " Title   \n ------- \n  One. Two \n  three.   \n  ------ \n  more \n"
    assert fold_box(plain) == "One. Two three."


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_usage_errors_in_any_encoding(place, encoding):
    env = ENV | {"PYTHONIOENCODING": encoding}
    for args in (["train", "--model-sze", "x"], ["train", "--max-steps", "many"], ["trian"]):
        done = subprocess.run([*LLMFS, *args], cwd=place, env=env, text=True, capture_output=True)
        assert done.returncode == 2 and args[-1] in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_mlx_missing_is_one_line(place):
    hide = "import sys; sys.modules.update({'mlx': None, 'mlx.core': None});"
    commands = "test-model", "train --text cats.txt --out new", "generate", "evaluate", "quickstart"
    for args in commands:
        code = f"{hide} from llmfs.cli import main; sys.exit(main({args.split()}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=place, env=ENV, text=True,
                              capture_output=True, timeout=60)  # fmt: skip
        assert "llmfs-mlx" in one_line(done) or sys.platform == "darwin"


def test_exit_codes():
    from llmfs.training.checkpoint import DiskFull
    from llmfs.training.trainer import NonFiniteLoss, Stopped

    assert describe(NonFiniteLoss("nan"))[0] == 3
    assert describe(DiskFull(27, "no space left"))[0] == 4
    assert describe(OSError(28, "No space left on device", "x"))[0] == 4
    assert describe(Stopped("saved")) == (130, "saved")
    assert describe(PermissionError(13, "Permission denied", "x")) == (2, "x: permission denied")
    assert describe(ValueError("two\nlines")) == (2, "two lines")
    code, line = describe(TypeError("oops"))
    assert code == 1 and "--debug" in line


# ---- the way of the data


def test_one_step_finds_what_the_step_before_left(tmp_path):
    done = llmfs_run("download-data", "--dataset", "stories", "--num-samples", 300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "train.txt").stat().st_size > 10_000
    done = llmfs_run("train-tokenizer", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == "data/tokenizer.json"
    done = llmfs_run("train", "--max-steps", 3, "--batch-size", 2, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 3 and (tmp_path / report["best"]).is_file()
    done = llmfs_run("generate", "--interactive", "--max-tokens", 5, cwd=tmp_path, input="Once\n")
    assert done.returncode == 0, done.stderr
    done = llmfs_run("evaluate", "--num-samples", 3, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["measures"]
    assert found["ratio to the least possible"][0] > 1
    # nothing that is there is written over
    before = tree(tmp_path)
    one_line(llmfs_run("download-data", "--dataset", "stories", cwd=tmp_path))
    one_line(llmfs_run("train-tokenizer", cwd=tmp_path))
    one_line(llmfs_run("train", cwd=tmp_path))
    assert tree(tmp_path) == before


def test_own_text_trains_a_tokenizer_first(place, tmp_path):
    done = llmfs_run("train", "--text", place / "cats.txt", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    known = json.loads((tmp_path / "checkpoints" / "data" / "tokenizer.json").read_text())
    assert known["type"] == "bpe"
    out = llmfs_run("evaluate", "--text", place / "cats.txt", "--json", cwd=tmp_path)
    measures = json.loads(out.stdout)["measures"]
    assert measures["bits per byte"][0] > 0 and "ratio to the least possible" not in measures


def test_overwrite_and_resume(place, tmp_path):
    args = ["train", "--text", place / "cats.txt", "--tokenizer", "char", *SMALL, "--json"]
    assert llmfs_run(*args, cwd=tmp_path).returncode == 0
    done = llmfs_run("train", "--resume", "--max-steps", 5, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 5
    done = llmfs_run(*args, "--overwrite", cwd=tmp_path)
    assert json.loads(done.stdout)["steps"] == 2


def test_ctrl_c_saves_and_says_how_to_go_on(place, tmp_path):
    args = ["train", "--text", str(place / "cats.txt"), "--tokenizer", "char", "--seq-len", "32",
            "--batch-size", "2", "--max-steps", "100000"]  # fmt: skip
    run = subprocess.Popen([*LLMFS, *args], cwd=tmp_path, env=ENV, stderr=subprocess.PIPE,
                           stdout=subprocess.PIPE, text=True)  # fmt: skip
    log, deadline = tmp_path / "checkpoints" / "metrics.jsonl", time.time() + 60
    while not (log.exists() and log.stat().st_size) and time.time() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "--resume" in err.splitlines()[-1] and "Traceback" not in err
    assert (tmp_path / "checkpoints" / "last.npz").is_file()
    steps = json.loads(log.read_text().splitlines()[-1])["step"] + 20
    done = llmfs_run("train", "--resume", "--max-steps", steps, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_loss_that_is_not_finite_exits_3(place, tmp_path):
    args = ["train", "--text", place / "cats.txt", "--tokenizer", "char", "--seq-len", 32,
            "--batch-size", 2, "--max-steps", 60, "--lr", "1e38", "--muon-lr", "1e38"]  # fmt: skip
    done = llmfs_run(*args, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr and "not finite" in done.stderr


def test_a_full_disk_exits_4(place, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    args = ["train", "--text", place / "cats.txt", "--tokenizer", "char", *SMALL]
    done = llmfs_run(*args, cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr and "space" in done.stderr


def test_export_and_import_keep_the_model(place, tmp_path):
    last = place / "checkpoints" / "last.npz"
    done = llmfs_run("export", "--checkpoint", last, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"path": "checkpoints/export", "shape": "qwen3"}
    assert "--overwrite" in one_line(llmfs_run("export", "--checkpoint", last, cwd=tmp_path))
    done = llmfs_run("import", "checkpoints/export", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["notes"] == []
    args = ["generate", "--prompt", "The cat", "--temperature", 0, "--checkpoint"]
    there = llmfs_run(*args, "checkpoints/imported.npz", cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    here = llmfs_run(*args, last, cwd=tmp_path)
    assert here.returncode == 0, here.stderr
    assert there.stdout == here.stdout


def test_a_full_disk_leaves_no_half_export(place, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    args = ["export", "--checkpoint", place / "checkpoints" / "last.npz", "--out", "new"]
    done = llmfs_run(*args, cwd=tmp_path, preexec_fn=limit)
    one_line(done, 4)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_shape_is_announced(place, tmp_path, monkeypatch, capsys):
    from llmfs.cli import main
    from llmfs.model.transformer import PRESETS

    text = ["--text", str(place / "cats.txt"), "--tokenizer", "char"]
    for name, odd in (("a", {}), ("b", {"activation": "relu2"})):
        monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"] | odd)
        assert main(["train", *text, *SMALL, "--out", str(tmp_path / name)]) == 0
        assert ("activation='relu2'" in capsys.readouterr().out) == bool(odd)


# ---- writing text


def test_generate_is_reproducible_and_json_is_a_line_each(place):
    args = ["generate", "--prompt", "The cat", "--max-tokens", 20, "--seed", 5]
    a, b = (llmfs_run(*args, cwd=place).stdout for _ in range(2))
    assert a == b and a.startswith("The cat")
    done = llmfs_run(*args, "--json", "--num-samples", 3, cwd=place)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 3 and rows[0]["prompt"] + rows[0]["text"] + "\n" == a
    assert len(rows[0]["logprobs"]) >= len(rows[0]["ids"])
    piped = llmfs_run("generate", "--prompt", "-", "--max-tokens", 20, "--seed", 5, cwd=place,
                      input="The cat\n")  # fmt: skip
    assert piped.stdout == a


def test_a_reader_that_leaves_is_no_error(place):
    command = " ".join(f"'{a}'" for a in LLMFS)
    shell = f"exec 2>err; {command} generate --num-samples 500 --max-tokens 3 | head -c 1"
    subprocess.run(["bash", "-c", shell], cwd=place, env=ENV, stdout=subprocess.DEVNULL, timeout=60)
    assert "Traceback" not in (place / "err").read_text()


class Terminal:
    "A command in a pseudo-terminal."

    def __init__(self, args, cwd):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in a background
            os.execve(LLMFS[0], [*LLMFS, *args], ENV | {"TERM": "dumb"})
        self.seen = ""

    def wait_for(self, text, seconds=60):
        end = time.time() + seconds
        while text not in self.seen:
            assert time.time() < end, f"waited for {text!r}, saw {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:
                    assert text in self.seen, f"ended before {text!r}: {self.seen!r}"
        before, self.seen = self.seen.split(text, 1)
        return before

    def send(self, text):
        os.write(self.fd, text.encode())

    def end(self, seconds=30):
        "Exit code."
        deadline = time.time() + seconds
        while time.time() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            with_output = select.select([self.fd], [], [], 0.05)[0]
            if with_output:
                try:
                    os.read(self.fd, 4096)
                except OSError:
                    pass
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("still running")


@pytest.fixture
def terminal(place):
    return lambda *args: Terminal(["generate", "--interactive", *args], place)


def test_conversation_in_a_terminal(terminal):
    t = terminal("--prompt", "The cat", "--max-tokens", "8")
    t.wait_for("> The cat")
    t.wait_for("> ")
    t.send("/set max_tokens 4\n")
    t.wait_for("> ")
    t.send("/set\n")
    t.wait_for("max_tokens 4")
    t.wait_for("> ")
    t.send("/reset\n")
    t.wait_for("> ")
    t.send('"""\nThe mat\nThe dog\n"""\n')
    t.wait_for(". ")
    t.wait_for("> ")
    t.send("/history\n")
    t.wait_for("The mat\r\nThe dog")
    t.wait_for("> ")
    t.send("/nonsense\n")
    t.wait_for("no command /nonsense")
    t.wait_for("> ")
    t.send("\x04")
    assert t.end() == 0


def test_several_lines_and_settings_in_a_terminal(terminal):
    t = terminal("--max-tokens", "3", "--temperature", "0")
    t.wait_for("> ")
    t.send("The cat\\\n")  # a backslash: the turn goes on
    t.wait_for(". ")
    t.send("The mat\n")
    t.wait_for("> ")
    t.send("/history\n")
    t.wait_for("The cat\r\nThe mat")
    t.wait_for("> ")
    for typed, said in (
        ("/set humor 11", "no setting 'humor'"), ("/set top_k many", "must be a number"),
        ("/set temperature -3", "temperature is -3"), ("/set top_p 0", "top_p is 0"),
        ("/help", "Ctrl-C stops the model"), ("/sing", "no command /sing"),
    ):  # fmt: skip
        t.send(typed + "\n")
        t.wait_for(said)
        t.wait_for("> ")
    t.send("/set temperature 0.8\n")
    t.wait_for("> ")
    t.send("/set\n")
    t.wait_for("temperature 0.8")
    t.wait_for("> ")
    t.send('"' * 3 + "\nnever closed\n\x04")  # end of input inside a block
    assert t.end() == 0


def test_ctrl_c_while_several_lines_are_typed(terminal):
    t = terminal("--max-tokens", "3")
    t.wait_for("> ")
    t.send('"' * 3 + "\n")
    t.wait_for(". ")
    t.send("thrown away\n")
    t.wait_for(". ")
    t.send("\x03")
    t.wait_for("Ctrl-D ends")
    t.wait_for("> ")
    t.send("/history\n")
    assert "thrown away" not in t.wait_for("> ")
    t.send("/quit\n")
    assert t.end() == 0


def test_a_terminal_that_closes_during_an_answer(terminal, endless):
    t = terminal("--checkpoint", str(endless), "--max-tokens", "1000000")
    t.wait_for("> ")
    t.send("The cat\n")
    t.wait_for("The cat")
    time.sleep(1)
    os.close(t.fd)
    assert ended(t.pid), "still running"


@pytest.fixture
def endless(place):
    "A checkpoint whose model never ends a text: every logit is equal, but for that of the end."
    from llmfs.training.checkpoint import load_model, save_checkpoint

    import mlx.core as mx

    model, tokenizer, _ = load_model(place / "checkpoints" / "best.npz")
    for layer in model.layers:
        for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writes.weight = mx.zeros_like(writes.weight)
    rows = mx.ones_like(model.embed_tokens.weight)
    rows[tokenizer.eot_id] = -1.0
    model.embed_tokens.weight, model.norm.weight = rows, mx.ones_like(model.norm.weight)
    return save_checkpoint(place / "endless.npz", model=model, config=model.cfg, tokenizer=tokenizer)


def test_ctrl_c_stops_the_answer_not_the_program(terminal, endless):
    t = terminal("--checkpoint", str(endless), "--max-tokens", "1000000")
    t.wait_for("> ")
    t.send("The cat\n")
    t.wait_for("The cat")
    time.sleep(2)
    t.send("\x03")
    t.wait_for("(stopped)")
    t.wait_for("> ")
    t.send("\x03")
    t.wait_for("Ctrl-D ends")
    t.wait_for("> ")
    t.send("/set max_tokens 3\n")
    t.wait_for("> ")
    t.send("/quit\n")
    assert t.end() == 0


def test_a_terminal_that_closes_ends_the_program(terminal):
    t = terminal("--max-tokens", "5")
    t.wait_for("> ")
    os.close(t.fd)
    assert ended(t.pid), "still running"


def ended(pid, seconds=30):
    "Wait for a process; one that goes on is killed."
    deadline = time.time() + seconds
    while time.time() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


def test_model_table(place):
    done = llmfs_run("test-model", "--json", "--max-params", 10_000_000, cwd=place)
    assert done.returncode == 0, done.stderr
    rows = {r["preset"]: r for r in json.loads(done.stdout)["presets"]}
    mixtures = ["moe-tiny", "moe-124m", "moe-500m", "moe-1b"]
    assert list(rows) == ["tiny", "50m", "124m", "500m", "1b", "3b", *mixtures]
    assert abs(rows["tiny"]["loss"] - math.log(50_257)) < 0.5 and rows["3b"]["loss"] is None
    assert abs(rows["moe-tiny"]["loss"] - math.log(50_257)) < 0.5
    assert re.search(r"3b +28", done.stderr)
