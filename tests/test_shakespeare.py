"The contest on Shakespeare's characters: both settings, the records, and what is said of them."

import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import bench_shakespeare as bench
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results"
NOTEBOOK = ROOT / "nbs" / "experiments" / "shakespeare.ipynb"


@pytest.fixture(scope="module")
def text():
    found = [p for p in bench.TEXTS if p.is_file()]
    if not found:
        pytest.skip(f"no {bench.NAME}")
    return found[0].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def contest():
    return json.loads((RESULTS / "shakespeare_cpu.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def changes():
    return json.loads((RESULTS / "shakespeare_changes.json").read_text(encoding="utf-8"))


def groups(setting):
    "As JSON gives it back: tuples are lists"
    return json.loads(json.dumps(setting))


# the contestants


def test_nanogpt_has_the_published_shape():
    torch = pytest.importorskip("torch")
    model = bench.torch_gpt(65, bench.NANOGPT)
    D, N, L, V = 128, 4, 64, 65
    block = 4 * D * D + 8 * D * D + 2 * D  # attention, feed-forward, two norms without bias
    assert sum(p.numel() for p in model.parameters()) == V * D + L * D + N * block + D == 804_096
    out = model(torch.zeros(2, 5, dtype=torch.long))
    assert out.shape == (2, 5, V)
    with torch.no_grad():  # causal: a later character changes nothing before it
        a = torch.randint(65, (1, 64))
        b = a.clone()
        b[0, 40] = (b[0, 40] + 1) % 65
        same = (model(a) - model(b)).abs().amax(-1)[0]
    assert same[:40].max() == 0 and same[40:].min() > 0


def test_nanogpt_is_what_torch_makes_of_gpt2():
    "The same function as transformers' GPT-2, with its weights and biases of zero"
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = bench.torch_gpt(65, bench.NANOGPT)
    words = {"attn.c_attn": "qkv", "attn.c_proj": "out", "mlp.c_fc": "up", "mlp.c_proj": "down",
             "ln_1": "n1", "ln_2": "n2", "ln_f": "nf"}  # fmt: skip
    shape = dict(vocab_size=65, n_positions=64, n_embd=128, n_layer=4, n_head=4)
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(**shape, activation_function="gelu")).eval()
    with torch.no_grad():
        for name, p in gpt2.named_parameters():
            name = name.removeprefix("transformer.")
            for theirs, own in words.items():
                name = name.replace(theirs, own)
            mine = dict(ours.named_parameters()).get(name)
            if mine is None:
                assert name.endswith("bias")
                p.zero_()
            else:
                transposed = p.shape != mine.shape or name.endswith(("qkv.weight", "out.weight", "down.weight"))
                p.copy_(mine.T if transposed and p.dim() == 2 and "wte" not in name else mine)
        x = torch.randint(65, (2, 64))
        assert torch.allclose(gpt2(x).logits, ours(x), atol=1e-4)


def test_rates_at_both_ends():
    rate = [bench.nanogpt_rate(s, bench.NANOGPT) for s in range(2001)]
    assert rate[0] == pytest.approx(1e-3 / 101) and rate[100] == pytest.approx(1e-3)
    assert rate[2000] == pytest.approx(1e-4) and max(rate) == rate[100]


def test_start_is_nanogpts_setting_in_our_words():
    from llmfs.model.transformer import GPTConfig, count_params

    shape, train = bench.START["shape"], bench.START["train"]
    pairs = dict(n_layers="n_layer", n_heads="n_head", d_model="n_embd", max_seq_len="block_size")
    assert all(shape[a] == bench.NANOGPT[b] for a, b in pairs.items())
    assert train["lr"] == bench.NANOGPT["learning_rate"]
    assert train["batch_size"] == bench.NANOGPT["batch_size"]
    assert train["final_lr"] * train["lr"] == pytest.approx(bench.NANOGPT["min_lr"])
    assert bench.START["optimizer"]["betas"] == bench.NANOGPT["betas"]
    assert count_params(GPTConfig(vocab_size=65, **shape)) == 804_096


def test_windows_cover_each_target_once():
    ids = np.arange(1000)
    pairs = [(x.ravel(), y.ravel()) for x, y in bench.windows(ids, 64, 4)]
    x, y = (np.concatenate(a) for a in zip(*pairs))
    assert x.tolist() == list(range(999)) and y.tolist() == list(range(1, 1000))


def test_both_are_judged_on_the_same_characters(text):
    "A model that prefers one character pays for it at the same places in both"
    torch, V = pytest.importorskip("torch"), 66
    bias = np.random.default_rng(0).normal(size=V).astype(np.float32)
    with bench.prepared(text) as where:
        job = dict(where, seed=0, steps=2, n_characters=V)
        theirs = bench.NanoGPT(dict(job, setting=bench.NANOGPT))
        ours = bench.Ours(dict(job, setting=bench.our_setting()))
        part = slice(0, 64 * 40 + 7)
        theirs.validation, ours.validation = theirs.validation[part], ours.validation[part]
        ids = ours.validation[1:]
        theirs.model = lambda x: torch.from_numpy(bias).expand(*x.shape, V)
        ours.model = lambda x, segments=None: ours.mx.broadcast_to(ours.mx.array(bias), (*x.shape, V))
    expected = np.log(np.exp(bias).sum()) - bias[ids].mean()
    assert theirs.loss() == pytest.approx(expected, abs=1e-4)
    assert ours.loss() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("who", ["nanogpt", "ours"])
def test_both_learn(text, who):
    if who == "nanogpt":
        pytest.importorskip("torch")
    make = dict(nanogpt=(bench.NanoGPT, bench.NANOGPT), ours=(bench.Ours, bench.our_setting()))[who]
    with bench.prepared(text) as where:
        run = make[0](dict(where, seed=0, setting=make[1], steps=20))
        run.validation = run.validation[:2000]
        before = run.loss()
        for _ in range(8):
            run.step()
        run.settle()
    assert run.done == 8 and run.loss() < before - 0.1


def test_the_script_runs(text):
    command = [sys.executable, ROOT / "tests" / "bench_shakespeare.py", "--quick"]
    patient = os.environ | {"OMP_WAIT_POLICY": "passive"}  # no spinning where others work
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=patient)
    assert done.returncode == 0, done.stderr
    assert "ours" in done.stdout and "2 steps" in done.stdout


def test_without_the_text_it_says_where_to_get_it(tmp_path):
    command = [sys.executable, ROOT / "tests" / "bench_shakespeare.py"]
    done = subprocess.run([*command, "--text", tmp_path / "no.txt"], capture_output=True, text=True)
    assert done.returncode == 0 and "nothing measured" in done.stdout and "curl" in done.stdout


# the records


def test_the_record_is_of_these_settings(contest):
    theirs, ours = contest["runs"]
    assert (theirs["who"], theirs["setting"]) == ("nanogpt", groups(bench.NANOGPT))
    assert (ours["who"], ours["setting"]) == ("ours", groups(bench.our_setting()))
    assert [r["steps"] for r in contest["runs"]] == [bench.STEPS["nanogpt"], bench.STEPS["ours"]]
    assert contest["target"] == bench.TARGET == 1.88 and contest["threads"] == bench.CORES == 2


def test_a_third_of_the_time(contest):
    theirs, ours = contest["runs"]
    assert ours["to_target"]["loss"] <= 1.88
    assert contest["ratio"] == bench.compare(theirs, ours)
    assert contest["ratio"]["seconds"] <= 1 / 3 and contest["ratio"]["cpu_seconds"] <= 1 / 3


def test_the_record_is_of_this_text(text, contest, changes):
    for record in (contest, changes):
        assert record["text"]["sha256"] == sha256(text.encode()).hexdigest()
        assert record["text"]["characters"] == len(text)


def test_the_ladder_is_of_these_settings(changes):
    rungs = [(r["kind"], r["what"], r["setting"], r["seed"]) for r in changes["rungs"]]
    assert rungs == [(k, w, groups(s), seed) for k, w, s, seed in bench.ladder(changes["seed"])]
    top = [r["setting"] for r in changes["rungs"] if r["kind"] == "ladder"]
    assert top[0] == groups(bench.START) and top[-1] == groups(bench.our_setting())


def test_each_rung_had_the_same_time(changes):
    for r in changes["rungs"]:
        assert r["steps"] * r["ms"] / 1000 == pytest.approx(changes["budget_seconds"], rel=0.02)


# what is said of them


def test_numbers_in_the_text_are_the_records(contest, changes):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    shown = "\n".join(
        "".join(o.get("text", "")) for c in cells if c["cell_type"] == "code" for o in c["outputs"]
    )
    for run in contest["runs"]:
        assert f"{run['loss']:.3f} after {run['seconds']:.1f} s" in shown
    assert f"{contest['ratio']['seconds']:.0%} of the time" in shown
    for r in changes["rungs"]:
        if r["kind"] != "seed":
            assert re.search(rf"{re.escape(r['what'])} +{r['ms']:.0f} ms +{r['steps']} steps", shown)
    known = {f"{r['loss']:.3f}" for r in changes["rungs"]}
    known |= {f"{x:.3f}" for run in contest["runs"] for x in run["curve"]["loss"]}
    assert set(re.findall(r"\b[12]\.\d{3}\b", prose)) <= known
