"""Measuring the parts of a step, and the plan made of them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import llmfs
from llmfs.hardware import Hardware
from llmfs.model import moe  # noqa: F401 - adds presets
from llmfs.model.transformer import (
    _PIECE,
    count_params,
    flops_per_token,
    memory_bytes,
    preset,
)

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from llmfs import performance  # noqa: E402
from llmfs import plan as planning  # noqa: E402
from llmfs.plan import chip_parts, describe, muon_flops, plan  # noqa: E402
from llmfs.training import loss  # noqa: E402
from llmfs.training.data_loader import Batch  # noqa: E402
from llmfs.training.optimizer import make_optimizer  # noqa: E402
from llmfs.training.step import TrainConfig, TrainStep  # noqa: E402

SMALL = dict(batch_size=2, seq_len=32, optimizer="adamw")


def test_a_clock_that_ticks_once_a_look(monkeypatch):
    "Each look is a second: one call a round, so a call takes one second."
    now = iter(range(10**6))
    monkeypatch.setattr(performance.time, "perf_counter", lambda: next(now))
    assert performance.seconds_of(lambda: mx.array(1) + 1, budget=0) == 1


def test_a_step_is_the_sum_of_its_parts(monkeypatch):
    "With parts of known times the sum is by hand: two pieces of 4 texts, 4 layers, recomputed."
    monkeypatch.setattr(planning, "_blocks", lambda *a: (2.0, 0.5))
    monkeypatch.setattr(planning, "ends_seconds", lambda cfg, b, n, dtype: 0.25 * b)
    monkeypatch.setattr(planning, "_update", lambda *a: 3.0)
    monkeypatch.setattr(planning, "bandwidth", lambda: 12.0)
    cfg = preset("tiny", vocab_size=500)
    train = TrainConfig(batch_size=4, seq_len=32, grad_accum=2, grad_checkpoint=True, precision="float32")
    parts = planning.step_parts(cfg, train)
    assert parts == {"blocks": 16.0, "recomputing": 4.0, "ends": 2.0, "update": 3.0, "copies": count_params(cfg)}


def test_a_line_is_followed_and_never_falls():
    run = lambda b, n: 1.0 + 0.01 * b * n
    assert planning._linear(run, (4, 100), (2, 100), 1000) == pytest.approx(11.0)
    assert planning._linear(lambda b, n: 5.0, (4, 100), (2, 100), 1000) == 5.0
    disturbed = iter([5.0, 6.0, 5.0, 3.0])  # the small one took 3 s, had nobody else been there
    assert planning._linear(lambda b, n: next(disturbed), (4, 100), (2, 100), 1000) == pytest.approx(11.0)
    assert planning._linear(run, (4, 100), (2, 100), 400) == 5.0


def clock_of_updates(cfg, optimizer, dtype, layers=None):
    "2 ms, 1 ns a parameter (Muon: 0.75 in blocks), and Muon's products at 1 TFLOP/s"
    some = replace(cfg, n_layers=max(1, layers)) if layers is not None else cfg
    blocks = 0 if layers == 0 else count_params(some, embeddings=False)
    table, muon = count_params(some) - count_params(some, embeddings=False), optimizer == "muon"
    work = muon_flops(some) if muon and layers != 0 else 0
    return 2e-3 + 1e-9 * (table + (0.75 if muon else 1) * blocks) + 1e-12 * work


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("size", ["50m", "500m", "moe-124m"])
@pytest.mark.parametrize("limit, allowed", [(1e12, 1e18), (8e7, 1e18), (8e7, 2e11), (12e6, 1e11)])
def test_an_update_is_told_from_some_of_its_layers(monkeypatch, optimizer, size, limit, allowed):
    "With a clock that is known: all layers, several, one, and a narrower one give the same"
    seen, cfg = [], preset(size, vocab_size=50_304)

    def clock(cfg, *how, layers=None):
        seen.extend([cfg] if layers != 0 else [])
        return clock_of_updates(cfg, *how, layers=layers)

    monkeypatch.setattr(planning, "update_seconds", clock)
    found = planning._update(cfg, optimizer, "float32", limit, allowed)
    assert found == pytest.approx(clock_of_updates(cfg, optimizer, "float32"), rel=0.01)
    largest = max(count_params(c, embeddings=False) for c in seen)
    assert limit == 1e12 or largest <= 8.01 * limit


def test_layers_of_an_update():
    "None, one, and all of them: each layer adds its parameters"
    timed = [0, 1, None]
    cfg = preset("tiny", vocab_size=300)
    sizes = []
    make = performance.make_optimizer
    for n in timed:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(performance, "make_optimizer",
                          lambda kind, model: sizes.append(len(model.layers)) or make(kind, model))  # fmt: skip
            assert performance.update_seconds(cfg, "adamw", budget=0, layers=n) > 0
    assert sizes == [0, 1, cfg.n_layers]


def test_flops_of_muon():
    "By hand: four square matrices of attention, three of the feed-forward layer."
    for m, n in ((64, 64), (64, 192)):
        k, j = min(m, n), max(m, n)
        by_hand = 4 * k * k * j + 36 * k**3 if j >= 2 * k else 5 * (4 * k * k * j + 2 * k**3)
        cfg = preset("tiny", vocab_size=500, n_layers=1, d_model=m, d_ff=n, n_heads=1, n_kv_heads=1, head_dim=m)
        square = 5 * 6 * m**3
        assert muon_flops(cfg) == 4 * square + 3 * by_hand


def test_chips_scale_as_their_data_sheets():
    cfg, train = preset("124m"), TrainConfig(batch_size=8, seq_len=512, precision="float16")
    one, max_, ultra = (chip_parts(cfg, train, c) for c in ("M1", "M1 Max", "M1 Ultra"))
    assert one["products"] / max_["products"] == pytest.approx(10.4 / 2.6)
    assert max_["passes"] / ultra["passes"] == pytest.approx(2)
    least = 8 * 512 * flops_per_token(cfg, 512) / 10.4e12
    assert max_["products"] > least


@pytest.mark.parametrize("given", [SMALL, SMALL | dict(grad_accum=2), SMALL | dict(grad_checkpoint=True),
                                   SMALL | dict(optimizer="muon")])  # fmt: skip
def test_plan_of_this_machine(given):
    p = plan("tiny", 300, **given)
    assert p.source == "measured" and p.fits and p.advice == "" and 0 < p.seconds < 600
    assert p.tokens == 2 * 32 * given.get("grad_accum", 1)
    found = json.loads(json.dumps(p.to_dict()))
    assert found["tokens_per_second"] == pytest.approx(p.tokens / p.seconds)
    assert ("recomputing" in p.parts) == given.get("grad_checkpoint", False)
    assert "tokens/s" in describe(p)


def test_plan_of_a_mixture():
    assert plan("moe-tiny", 300, **SMALL).seconds > 0


def test_what_does_not_fit_is_told_what_would():
    p = plan("124m", chip="M1", batch_size=64, seq_len=1024)
    words = p.advice.split()
    assert not p.fits and "--batch-size" in words
    again = plan("124m", chip="M1", batch_size=int(words[words.index("--batch-size") + 1]), seq_len=1024,
                 grad_accum=int(words[words.index("--grad-accum") + 1]),
                 grad_checkpoint="--grad-checkpoint" in words)  # fmt: skip
    assert again.fits and again.tokens == p.tokens
    assert "several machines" in plan("3b", chip="M1").advice


def test_unknown_chip_is_one_line():
    with pytest.raises(ValueError, match="'M9' is unknown; choose one of M1, M1 Pro"):
        plan("tiny", chip="M9")


def test_predictions_are_marked():
    p = plan("tiny", chip="M2 Max")
    assert p.source == "predicted" and "(predicted)" in describe(p)
    assert p.train["precision"] == "float16" == plan("tiny", chip="M1").train["precision"]


def test_rows_side_by_side_are_the_whole_batch():
    "Two streams give the losses of one, up to the order of additions; also with odd rows and pieces."
    from llmfs.hardware import cpu_streams
    from llmfs.model.transformer import GPT

    if mx.default_device() != mx.cpu:
        pytest.skip("streams are for CPUs")
    make = getattr(mx, "new_thread_unsafe_stream", mx.new_stream)
    streams = cpu_streams() or (make(mx.cpu), make(mx.cpu))
    ids = np.random.default_rng(0).integers(0, 300, (5, 33), dtype=np.int32)
    batches = [Batch(ids[:, :-1], ids[:, 1:], None), Batch(ids[:3, 1:], ids[:3, :-1], None)]
    runs = []
    for used in ((), streams):
        mx.random.seed(0)
        model = GPT(preset("tiny", vocab_size=300))
        step = TrainStep(model, make_optimizer("muon", model), TrainConfig())
        step.streams = used
        runs.append([step(batches[:n], 1.0)[0].item() for n in (1, 2, 1, 2)])
    assert np.allclose(*runs, atol=1e-5) and len(set(runs[0])) == 4


def test_steps_beside_their_plan(tmp_path):
    "The script that measures presets; a preset that fails leaves its error, the others go on."
    tool = Path(__file__).parent.parent / "tools" / "bench_steps.py"
    if not tool.exists():
        pytest.skip("no tools here")
    out = tmp_path / "steps.json"
    specs = "tiny:batch_size=2,seq_len=32,vocab_size=300", "nosuch"
    subprocess.run([sys.executable, tool, *specs, "--steps", "1", "--json", out], check=True, timeout=300)
    good, bad = json.loads(out.read_text())["rows"]
    assert good["measured"]["tokens_per_second"] > 0 and good["plan"]["source"] == "measured"
    assert "nosuch" in bad["measured"]["error"]
    assert llmfs.__version__ == json.loads(out.read_text())["llmfs"]


def record(name):
    return json.loads((Path(__file__).parents[1] / "nbs" / "results" / name).read_text())


def beside(row, need):
    "How far memory as counted now, and time as planned, are from what was measured"
    m = row["measured"]
    return need / m["peak_memory"] - 1, row["plan"]["seconds"] / m["seconds"] - 1


def as_on_that_gpu(monkeypatch, machine):
    kept = lambda *a, **k: memory_bytes(*a, **k | dict(fused=True))
    monkeypatch.setattr(planning, "memory_bytes", kept)
    monkeypatch.setattr(planning, "hardware", lambda: Hardware(**machine))


@pytest.mark.parametrize("name", ["124m", "50m", "500m", "1b", "3b", "tiny"])
def test_memory_and_time_on_a_gpu(monkeypatch, name):
    found = record("presets_gpu.json")
    row = next(r for r in found["rows"] if r["preset"] == name)
    as_on_that_gpu(monkeypatch, found["machine"])
    cfg, train = preset(name, vocab_size=50_304), TrainConfig(**row["plan"]["train"])
    assert count_params(cfg) == row["measured"]["params"]
    memory, seconds = beside(row, planning._memory(cfg, train)["total"])
    assert abs(memory) < 0.15
    if name == "500m":  # the host starts its many kernels while the card still computes
        pytest.xfail(f"time is planned {seconds:+.0%} off") if abs(seconds) > 0.25 else None
    assert abs(seconds) < 0.25


def test_what_fits_is_decided_without_what_is_under_way(monkeypatch):
    "3b ran on 80 GB at a peak above three quarters of it; in half the room it would not."
    found = record("presets_gpu.json")
    row = next(r for r in found["rows"] if r["preset"] == "3b")
    as_on_that_gpu(monkeypatch, found["machine"])
    cfg, train = preset("3b", vocab_size=50_304), TrainConfig(**row["plan"]["train"])
    need, room = planning._memory(cfg, train), 0.75 * found["machine"]["memory_bytes"]
    assert planning._held(need) < room < row["measured"]["peak_memory"]
    as_on_that_gpu(monkeypatch, found["machine"] | dict(memory_bytes=54 << 30))
    short = planning._memory(cfg, train)
    assert short["total"] <= 0.95 * (54 << 30) and planning._held(short) == planning._held(need)
    assert "several machines" in planning._advice(cfg, train, None, 30 << 30)


def test_memory_on_a_gpu_of_steps_that_the_count_was_not_made_with():
    "A mixture and its dense sibling, AdamW, 32 texts of 1,024 tokens"
    found = record("moe_step_gpu.json")
    sizes = {"dense": "124m", "batched": "moe-124m"}
    for part in (p for p in found["parts"] if p["path"] in sizes):
        cfg = preset(sizes[part["path"]], vocab_size=50_304)
        need = memory_bytes(cfg, 32, 1024, activation_bytes=2, fused=True)
        assert abs((need.total + need.under_way) / part["peak_bytes"] - 1) < 0.15


@pytest.mark.parametrize("at", range(4))
def test_memory_and_time_on_two_cores(at):
    row = record("plan_cpu.json")["rows"][at]
    t, V = row["plan"]["train"], int(row["spec"].partition("vocab_size=")[2].partition(",")[0])
    cfg, slots = preset(row["preset"], vocab_size=V), 1 if t["optimizer"] == "muon" else 2
    need = memory_bytes(cfg, t["batch_size"], t["seq_len"], optimizer_slots=slots, fused=False).total
    memory, seconds = beside(row, need)
    assert abs(memory) < 0.15 and abs(seconds) < 0.25


def test_logits_are_counted_as_the_loss_cuts_them():
    assert _PIECE == loss.PIECE_BYTES
    cfg = preset("tiny", vocab_size=50_304)
    few, many = (memory_bytes(cfg, B, 256, fused=True).activations for B in (64, 128))
    assert many - few < 2 * few / 3, "twice the texts, but no more logits at once"


def test_gradients_that_are_added_up_are_float32():
    "Beside activations; in the update, in place of those of one batch"
    cfg, P = preset("tiny"), count_params(preset("tiny"))
    for B, more in ((256, 4 * P), (1, 2 * P)):
        once, sums = (memory_bytes(cfg, B, 256, activation_bytes=2, fused=True, add_up=a) for a in (False, True))
        assert sums.total - once.total == more and (once.gradients, sums.gradients) == (2 * P, 4 * P)


@pytest.mark.parametrize("flops,B,L,least", [(1e6, 16, 256, 2), (45e6, 2, 256, 2), (45e6, 8, 256, 4), (1e9, 16, 1024, 2), (1e9, 1, 64, 2), (1e12, 3, 8, 8)])
def test_a_sample_keeps_all_cores_busy(flops, B, L, least):
    "At least one row a core, or all rows there are; the smaller sample has half as many tokens."
    (b, length), (c, short) = planning._samples(flops, B, L, 1.5e10, least)
    assert min(b, c) >= min(B, least) and b <= B and 1 <= short <= length <= L
    assert c * short <= b * length and (c * short <= 0.75 * b * length or length == 1)
