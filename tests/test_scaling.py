"Scaling laws: known exponents come back, intervals hold what they promise, bad input is named; tools/sweep.py"

import importlib.util
import json
from pathlib import Path

import llmfs
from llmfs.evaluation.scaling import (
    Interval,
    compute_optimal,
    fit_law,
    frontier,
    optimal_growth,
)

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sweep, scaling_record = tool("sweep"), tool("scaling_record")

N, D = (a.ravel() for a in np.meshgrid([1e5, 4e5, 2e6, 1e7], [1e6, 5e6, 2e7, 1e8]))


def made_up(N, D, E=1.2, A=60.0, a=0.37, B=900.0, b=0.45):
    return E + A / N**a + B / D**b


def disturbed(rng, excess, noise):
    return 1.2 + excess * np.exp(noise * rng.normal(size=np.shape(excess)))


# The fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [None, 1.2])
@pytest.mark.parametrize("a,b", [(0.2, 0.8), (0.37, 0.45), (0.9, 0.3), (1.4, 0.6)])
def test_exact_data_give_back_the_law_that_made_them(floor, a, b):
    A, B = 1.5e5**a, 5e6**b  # each term is 1 in the middle
    law = fit_law(made_up(N, D, 1.2, A, a, B, b), floor, draws=2, params=N, tokens=D)
    assert np.allclose([law.floor, *law.exponent.values()], [1.2, a, b], rtol=2e-3)
    assert np.allclose(list(law.scale.values()), [A, B], rtol=0.03)
    assert law.spread < 1e-3


def test_one_size_and_three_sizes():
    x = np.geomspace(1, 100, 8)
    law = fit_law(0.5 + 3 / x**0.6, flops=x)
    assert np.allclose([law.floor, law.scale["flops"], law.exponent["flops"]], [0.5, 3, 0.6], rtol=1e-3)
    rng = np.random.default_rng(0)
    x, y, z = np.exp(rng.uniform(0, 6, (3, 40)))
    law = fit_law(0.5 + x**-0.3 + y**-0.6 + 2 * z**-0.9, floor=0.5, a=x, b=y, c=z)
    assert np.allclose(list(law.exponent.values()), [0.3, 0.6, 0.9], atol=0.01)


def test_the_unit_of_a_size_and_of_the_loss_change_nothing():
    noisy = disturbed(np.random.default_rng(0), made_up(N, D) - 1.2, 0.02)
    one = fit_law(noisy, 1.2, draws=20, params=N, tokens=D)
    two = fit_law(noisy * 7, 8.4, draws=20, params=N / 1e6, tokens=D / 1e9)
    assert np.allclose(list(one.exponent.values()), list(two.exponent.values()), atol=1e-4)
    assert np.isclose(7 * one(params=1e8, tokens=1e9), two(params=1e2, tokens=1.0), rtol=1e-4)
    assert np.allclose(7 * np.array(one.interval(params=1e8, tokens=1e9)),
                       two.interval(params=1e2, tokens=1.0), rtol=1e-3)  # fmt: skip


def test_no_descent_from_anywhere_finds_a_better_fit():
    "The minimum is a minimum: random restarts by plain coordinate search do not beat it"
    rng = np.random.default_rng(3)
    y = disturbed(rng, made_up(N, D) - 1.2, 0.05)
    law = fit_law(y, draws=2, params=N, tokens=D)
    cost = lambda t: np.square(np.log(y) - np.log(np.exp(t[4]) + np.exp(t[0] - t[2] * np.log(N / 1e6))
                                                  + np.exp(t[1] - t[3] * np.log(D / 1e7)))).sum()  # fmt: skip
    a, b = law.exponent.values()
    A, B = law.scale["params"] / 1e6**a, law.scale["tokens"] / 1e7**b
    here = np.array([np.log(A), np.log(B), a, b, np.log(law.floor)])
    best = cost(here)
    tried = [cost(here + 10 ** rng.uniform(-4, 0) * rng.normal(size=5)) for _ in range(3000)]
    assert min(tried) >= best * (1 - 1e-6)


def test_a_run_that_went_wrong_pulls_with_bounded_force():
    y = disturbed(np.random.default_rng(0), made_up(N, D) - 1.2, 0.02)
    y[-1] = 1.2 + 8 * (y[-1] - 1.2)
    squares, bounded = (fit_law(y, 1.2, 20, delta=d, params=N, tokens=D) for d in (1e9, 0.05))
    off = [abs(np.log((law(params=1e8, tokens=1e9) - 1.2) / (made_up(1e8, 1e9) - 1.2)))
           for law in (squares, bounded)]  # fmt: skip
    assert off[1] < 0.1 < 3 * off[1] + 0.1 < off[0]


# Intervals --------------------------------------------------------------------------------


def covered(floor, trials, seed, noise=0.04):
    rng, inside, exponents = np.random.default_rng(seed), 0, 0
    for _ in range(trials):
        law = fit_law(disturbed(rng, made_up(N, D) - 1.2, noise), floor, 60, params=N, tokens=D)
        inside += disturbed(rng, made_up(5e7, 5e8) - 1.2, noise) in law.interval(params=5e7, tokens=5e8)
        exponents += 0.45 in law.exponents()["tokens"]
    return inside / trials, exponents / trials


@pytest.mark.parametrize("floor", [None, 1.2])
def test_ninety_percent_intervals_hold_about_ninety(floor):
    for share in covered(floor, 40, 1):
        assert 0.75 <= share <= 1.0


@pytest.mark.stress
@pytest.mark.parametrize("floor", [None, 1.2])
def test_coverage_over_many_sweeps(floor):
    for share in covered(floor, 400, 2):
        assert 0.82 <= share <= 0.97


def test_a_known_floor_narrows_the_interval():
    y = disturbed(np.random.default_rng(0), made_up(N, D) - 1.2, 0.04)
    far = dict(params=1e9, tokens=1e10)
    free, known = (fit_law(y, f, params=N, tokens=D).interval(**far) for f in (None, 1.2))
    assert known.high - known.low < 0.5 * (free.high - free.low)
    assert known.low > 1.2


def test_an_interval_holds_the_scatter_of_single_runs():
    y = disturbed(np.random.default_rng(0), made_up(N, D) - 1.2, 0.04)
    law, inner = fit_law(y, 1.2, params=N, tokens=D), dict(params=1e6, tokens=1e7)
    assert 0.025 < law.spread < 0.06
    where = law.interval(**inner)
    assert where.high - where.low > 2.4 * 0.025 * (law(**inner) - 1.2)


def test_wider_shares_hold_narrower_ones_and_seeds_repeat():
    y = disturbed(np.random.default_rng(0), made_up(N, D) - 1.2, 0.04)
    law = fit_law(y, 1.2, params=N, tokens=D)
    half, most = (law.interval(s, params=1e8, tokens=1e9) for s in (0.5, 0.95))
    assert most.low < half.low < half.middle < half.high < most.high
    again = fit_law(y, 1.2, params=N, tokens=D).interval(0.5, params=1e8, tokens=1e9)
    assert again == half and half.middle in half and 9.0 not in half
    assert str(Interval(1.0, 2.0, 3.0)) == "2 (1 to 3)"


# Budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flops", [1e13, 1e16, 1e19])
def test_the_optimum_is_that_of_a_search(flops):
    law = fit_law(made_up(N, D), 1.2, draws=50, tokens=D, params=N)  # order of names is free
    best = compute_optimal(law, flops)
    sizes = best.params * np.geomspace(0.1, 10, 2001)
    losses = law(params=sizes, tokens=flops / 6 / sizes)
    assert abs(losses.argmin() - 1000) <= 1 and np.isclose(losses.min(), best.loss)
    assert np.isclose(6 * best.params * best.tokens, flops)
    assert np.isclose(optimal_growth(law).middle, 0.45 / 0.82, atol=1e-3)
    quarter = compute_optimal(law, flops / 4)
    assert np.isclose(np.log(best.params / quarter.params) / np.log(4), 0.45 / 0.82, atol=1e-3)


def test_frontier_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        cost, loss = rng.integers(0, 8, (2, 12))
        slow = [i for i in range(12) if not any(
            (cost[j] <= cost[i] and loss[j] < loss[i]) or (cost[j] < cost[i] and loss[j] <= loss[i])
            for j in range(12))]  # fmt: skip
        found = frontier(cost, loss)
        assert {(cost[i], loss[i]) for i in found} == {(cost[i], loss[i]) for i in slow}
        assert (np.diff(cost[found]) > 0).all()


# Errors -----------------------------------------------------------------------------------


def test_bad_runs_are_named():
    y = made_up(N, D)
    bad = y.copy()
    bad[3] = np.nan
    cases = [
        (dict(loss=y[:5], params=N[:5], tokens=D[:5]), "5 runs cannot fix 5 numbers"),
        (dict(loss=bad, params=N, tokens=D), "run 3 is not finite"),
        (dict(loss=y, floor=float(y.min()), params=N, tokens=D), "at or below the floor"),
        (dict(loss=-y, params=N, tokens=D), "at or below the floor"),
        (dict(loss=y, params=N, tokens=0 * D), "tokens must be positive"),
        (dict(loss=y, params=N, tokens=0 * D + 5), "tokens is the same in every run"),
        (dict(loss=y[:4], params=N, tokens=D), "one loss a run"),
    ]
    for kwargs, said in cases:
        with pytest.raises(ValueError, match=said):
            fit_law(kwargs.pop("loss"), **kwargs)
    law = fit_law(y, 1.2, draws=2, params=N, tokens=D)
    with pytest.raises(ValueError, match="law is one of params, tokens"):
        law(params=1e6)
    with pytest.raises(ValueError, match="law of params and tokens"):
        compute_optimal(fit_law(y, 1.2, draws=2, flops=N * D), 1e15)


# The tool ---------------------------------------------------------------------------------


def tiny(**more):
    shape = dict(n_layers=1, d_model=16, n_heads=1, d_ff=16)
    train = dict(max_steps=4, batch_size=4, seq_len=64, mode="buckets", warmup=1)
    return dict(label="fit", corpus="stories", n_stories=400, vocab_size=300, shape=shape, train=train) | more


def run(tmp_path, runs, **more):
    said = []
    failed = sweep.sweep(json.loads(json.dumps(runs)), tmp_path / "out.jsonl", tmp_path, say=said.append, **more)
    return failed, sweep.read_records(tmp_path / "out.jsonl"), said


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(sweep, "HELD_OUT", 20)


def test_a_sweep_records_what_a_run_was_and_reached(tmp_path):
    from llmfs.model.transformer import GPT, GPTConfig

    from mlx.utils import tree_flatten

    failed, (r,), _ = run(tmp_path, [tiny(positions=96)])
    assert failed == 0 and r["tokens"] > 0 and r["ratio"] > 1 and r["floor"] < r["bits_per_byte"]
    weights = tree_flatten(GPT(GPTConfig(vocab_size=300, **r["run"]["shape"])).parameters())
    assert r["params"] == sum(w.size for _, w in weights)
    assert len(r["by_position"]) == 96 and r["curve"][-1][0] == 4
    assert r["id"] == sweep.name_of(tiny(positions=96, label="other", path="elsewhere"))
    assert r["run"] == tiny(positions=96)


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    runs = [tiny(), tiny(shape=tiny()["shape"] | dict(d_model=32))]
    _, (first,), _ = run(tmp_path, runs[:1])
    path = tmp_path / "out.jsonl"
    path.write_text(path.read_text() + '{"id": "cut sho')  # a crash while writing
    _, records, said = run(tmp_path, runs)
    assert said[0].startswith("2 runs, 1 to do") and len(records) == 2
    assert records[1]["params"] > records[0]["params"] == first["params"]
    assert first["curve"] == records[0]["curve"]
    path.unlink()
    _, again, _ = run(tmp_path, runs)
    assert [r["loss"] for r in again] == [r["loss"] for r in records]  # the same seed, the same run


def test_a_sweep_keeps_to_its_budget_and_survives_a_bad_run(tmp_path):
    assert run(tmp_path, [tiny()], budget=0)[1] == []
    bad = tiny(shape=dict(n_layers=1, d_model=30, n_heads=4))
    failed, records, said = run(tmp_path, [bad, tiny()])
    assert failed == 1 and len(records) == 1 and "ValueError" in said[2]


def test_padding_changes_no_loss(tmp_path):
    _, (a, b), _ = run(tmp_path, [tiny(), tiny(pad=64)])
    assert np.allclose([x for _, x in a["curve"]], [x for _, x in b["curve"]], atol=2e-4)


def test_a_token_file_is_judged_in_bits_per_byte(tmp_path):
    from llmfs.data.tokens import write_tokens
    from llmfs.tokenizer.vocab import CharTokenizer

    text = "the cat sat on the mat. " * 200
    tokenizer = CharTokenizer(set(text))
    for name in ("text", "text-held"):
        write_tokens([text], tokenizer, tmp_path / f"{name}.npy")
    own = tiny(corpus=str(tmp_path / "text.npy"))
    own["train"]["mode"] = "windows"
    _, (r,), _ = run(tmp_path, [own])
    assert "ratio" not in r
    # one token a character, and the text's end besides
    assert np.isclose(r["bits_per_byte"], r["loss"] / np.log(2) * (len(text) + 1) / len(text), rtol=1e-6)


# The record -------------------------------------------------------------------------------


def lines(tmp_path, largest_ratio):
    rng, made = np.random.default_rng(0), []
    for label, n, d in [*[("fit", n, d) for n, d in zip(N, D)], ("largest", 4e7, 4e8)]:
        ratio = disturbed(rng, made_up(n, d) - 1.2, 0.03) - 0.2
        run = dict(label=label, corpus="stories", shape=dict(d_ff=1), train=dict(precision="float32"))
        made.append(dict(run=run, params=n, body_params=n, tokens=d, flops=6 * n * d, seconds=1.0,
                         ratio=largest_ratio if label == "largest" else ratio, curve=[], device="a",
                         versions={}, precision="float32", tokenizer="t"))  # fmt: skip
    path = tmp_path / "sweep.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    return path


def record(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["x", *map(str, args), "--corpus", "stories"])
    scaling_record.main()


def test_a_record_predicts_without_the_loss_of_the_largest_run(tmp_path, monkeypatch):
    out, found = tmp_path / "r.json", []
    for ratio in (1.01, 5.0):
        record(monkeypatch, lines(tmp_path, ratio), "--out", out)
        found.append(json.loads(out.read_text()))
        assert "ratio" not in found[-1]["largest"]
    assert found[0] == found[1]  # what is predicted is not read
    p = found[0]["prediction"]
    assert 1 < p["low"] < made_up(4e7, 4e8) - 0.2 < p["high"] and p["runs"] == len(N)
    record(monkeypatch, tmp_path / "sweep.jsonl", "--out", out, "--look")
    assert json.loads(out.read_text())["largest"]["ratio"] == 5.0


def test_a_record_with_another_prediction_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    record(monkeypatch, lines(tmp_path, 1.01), "--out", out)
    r = json.loads(out.read_text())
    r["prediction"]["high"] *= 1.1
    out.write_text(json.dumps(r))
    with pytest.raises(ValueError, match="not the one that its runs give"):
        record(monkeypatch, tmp_path / "sweep.jsonl", "--out", out, "--look")


def test_the_records_of_the_book_hold_the_predictions_that_their_runs_give():
    "Also where the run that is predicted has been made: its loss decides nothing"
    found = sorted((ROOT / "nbs/results").glob("scaling_*.json"))
    records = [json.loads(p.read_text(encoding="utf-8")) for p in found]
    predictions = [(r, r["prediction"]) for r in records if r.get("prediction")]
    assert predictions
    for r, p in predictions:
        given = p["of"] == "ratio", p["params"], p["least_tokens"]
        again = scaling_record.predict(r["runs"], p["size"], *given)
        for k in ("low", "middle", "high"):
            assert abs(again[k] - p[k]) < 1e-4 * p[k]


def test_a_planned_run_has_the_size_that_it_will_have(tmp_path, monkeypatch):
    shape = dict(n_layers=1, d_model=16, n_heads=1, d_ff=16)
    train = dict(max_steps=10, batch_size=4, seq_len=64)
    plan = [dict(label="largest", corpus="stories", vocab_size=300, shape=shape, train=train)]
    (tmp_path / "grid.json").write_text(json.dumps(plan))
    made = [json.loads(x) for x in lines(tmp_path, 1.0).read_text().splitlines()[:-1]]
    for x in made:
        x["run"]["train"] = dict(max_steps=100, batch_size=4)
        x["tokens"] = 20_000
    found = scaling_record.planned(plan[0], made)
    _, (r,), _ = run(tmp_path, [tiny()])
    assert found["tokens"] == 2000
    assert [found[k] for k in ("params", "body_params")] == [r[k] for k in ("params", "body_params")]
    assert np.isclose(found["flops"] / found["tokens"], r["flops"] / r["tokens"])


def test_a_record_of_positions_holds_each_kind(tmp_path, monkeypatch):
    kinds = ["rope", "learned"]
    runs = [tiny(label="positions", positions=96, shape=tiny()["shape"] | dict(positions=k, max_seq_len=96)) for k in kinds]
    for r in runs:
        r["train"]["seed"] = 0
    _, made, _ = run(tmp_path, [*runs, tiny()])
    record(monkeypatch, tmp_path / "out.jsonl", "--out", tmp_path / "r.json", "--positions")
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["trained"], found["length"]) == (64, 96)
    assert [r["kind"] for r in found["runs"]] == kinds
    assert [r["by_position"] for r in found["runs"]] == [r["by_position"] for r in made[:2]]


def test_the_list_of_runs_holds_what_the_records_hold():
    results = ROOT / "nbs/results"
    grid = json.loads((results / "sweep_grid.json").read_text(encoding="utf-8"))
    known = [(Path(r["corpus"]).stem, r["label"], r["shape"], r["train"]) for r in grid]
    assert len({sweep.name_of(r) for r in grid}) == len(grid)
    for name in ("scaling_stories", "scaling_stories_all", "scaling_books"):
        r = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for x in [*r["runs"], r["largest"]]:
            assert (r["corpus"], x["label"], x["shape"], x["train"]) in known
    r = json.loads((results / "positions_books.json").read_text(encoding="utf-8"))
    assert ("books", "positions", r["shape"], r["train"]) in known
