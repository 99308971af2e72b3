"""AdamW and Muon against mlx.optimizers and torch; schedules at both ends; clipping."""

import math

import llmfs  # noqa: I001
from llmfs.training import optimizer as module
from llmfs.training.optimizer import (
    QUINTIC,
    SCHEDULES,
    AdamW,
    Muon,
    clip_by_global_norm,
    constant,
    decays,
    global_norm,
    is_block_matrix,
    make_optimizer,
    orthogonalize,
    warmup_cosine,
    warmup_linear,
)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(8)
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(24, 8)
        self.experts = mx.random.normal((3, 8, 16))


class Net(nn.Module):
    "Names and shapes like a GPT's, without its cost."

    def __init__(self, seed=0):
        super().__init__()
        mx.random.seed(seed)
        self.embed_tokens = nn.Embedding(20, 8)
        self.layers = [Block() for _ in range(3)]
        self.norm = nn.RMSNorm(8)
        self.lm_head = nn.Linear(8, 20, bias=False)


def flat(tree):
    return dict(tree_flatten(tree))


def grads_of(model, step):
    rng = np.random.default_rng(step)
    return {
        n: mx.array(rng.normal(size=p.shape).astype(np.float32) * 0.1)
        for n, p in flat(model.parameters()).items()
    }


def run(optimizer, model, steps, scale=lambda t: 1.0):
    for t in range(steps):
        grads = tree_unflatten(list(grads_of(model, t).items()))
        optimizer.update(model, grads, scale(t))
        mx.eval(model.parameters(), optimizer.state)
    return flat(model.parameters())


def assert_close(got, want, tolerance):
    assert got.keys() == want.keys()
    for name in got:
        (
            np.testing.assert_allclose(
                np.array(got[name]),
                np.array(want[name]),
                rtol=tolerance,
                atol=tolerance,
            ),
            name,
        )


def split_reference(model, make, chosen, steps, scale):
    "mlx.optimizers on the parameters whose names are in `chosen`, the rest left alone."
    params = {n: p for n, p in flat(model.parameters()).items() if n in chosen}
    lr0, opt = None, make()
    for t in range(steps):
        lr0 = opt.learning_rate if lr0 is None else lr0
        opt.learning_rate = lr0 * scale(t)
        grads = {n: g for n, g in grads_of(model, t).items() if n in chosen}
        params = opt.apply_gradients(grads, params)
        mx.eval(params, opt.state)
    return params


def ramp(t):
    return warmup_cosine(t, 100, 10)


# ---- AdamW


@pytest.mark.parametrize("small", [100, 1 << 18])
def test_adamw_equals_mlx_over_100_steps(small, monkeypatch):
    monkeypatch.setattr(module, "_VECTOR", small)
    model, betas = Net(), [0.9, 0.95]
    names = flat(model.parameters())
    groups = {True: set(), False: set()}
    for n, p in names.items():
        groups[decays(n, p)].add(n)
    want = {}
    for decay, chosen in groups.items():
        wd = 0.1 if decay else 0.0
        want |= split_reference(
            model,
            lambda wd=wd: mlx_optim.AdamW(
                0.01, betas, weight_decay=wd, bias_correction=True
            ),
            chosen,
            100,
            ramp,
        )
    got = run(AdamW(model, lr=0.01, weight_decay=0.1), model, 100, ramp)
    assert_close(got, want, 2e-5)


def test_adamw_equals_torch_over_100_steps():
    torch = pytest.importorskip("torch")
    model = Net()
    start = {n: np.array(p) for n, p in flat(model.parameters()).items()}
    params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in start.items()}
    groups = [
        dict(
            params=[p for n, p in params.items() if decays(n, start[n]) == d],
            weight_decay=w,
        )
        for d, w in ((True, 0.1), (False, 0.0))
    ]
    opt = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    for t in range(100):
        for n, g in grads_of(model, t).items():
            params[n].grad = torch.tensor(np.array(g))
        for group in opt.param_groups:
            group["lr"] = 0.01 * warmup_cosine(t, 100, 10)
        opt.step()
    got = run(
        AdamW(model, lr=0.01, betas=(0.9, 0.999)),
        model,
        100,
        lambda t: warmup_cosine(t, 100, 10),
    )
    assert_close(got, {n: p.detach().numpy() for n, p in params.items()}, 2e-5)


def test_first_step_by_hand():
    "After one step bias correction leaves g/|g|: the rate itself, whatever the gradient."
    model = nn.Linear(2, 1, bias=False)
    model.weight = mx.array([[1.0, -2.0]])
    AdamW(model, lr=0.1, weight_decay=0.5).update(
        model, {"weight": mx.array([[3.0, -1e-3]])}
    )
    want = [1 * (1 - 0.05) - 0.1, -2 * (1 - 0.05) + 0.1]
    np.testing.assert_allclose(model.weight[0].tolist(), want, rtol=1e-5)


def test_eps_beside_a_gradient_of_its_size():
    "eps is added to the corrected root: it halves the first step where g = eps"
    model = nn.Linear(3, 1, bias=False)
    model.weight = mx.zeros((1, 3))
    grads = {"weight": mx.array([[1e-8, 1e-7, 0.0]])}
    AdamW(model, lr=1.0, weight_decay=0.0).update(model, grads)
    np.testing.assert_allclose(model.weight[0].tolist(), [-0.5, -10 / 11, 0.0], rtol=1e-3)


def test_groups():
    model = Net()
    selected = {n for n, p in flat(model.parameters()).items() if decays(n, p)}
    assert "lm_head.weight" in selected and "layers.0.experts" in selected
    assert not any(w in n for n in selected for w in ("bias", "norm", "embed"))
    blocks = {n for n, p in flat(model.parameters()).items() if is_block_matrix(n, p)}
    assert blocks == {n for n in selected if n != "lm_head.weight"}
    assert not is_block_matrix("layers.0.mlp.router.weight", mx.zeros((4, 8)))


def test_weights_with_no_gradient_only_decay():
    model = Net()
    before = flat(tree_map(lambda p: p + 0, model.parameters()))
    opt = AdamW(model, lr=0.01, weight_decay=0.5)
    opt.update(model, tree_map(mx.zeros_like, model.parameters()))
    for n, p in flat(model.parameters()).items():
        factor = 1 - 0.005 if decays(n, p) else 1.0
        np.testing.assert_allclose(np.array(p), np.array(before[n]) * factor, rtol=1e-6)


def test_half_precision_parameters_keep_their_type():
    model = Net()
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
    for name in ("adamw", "muon"):
        opt = make_optimizer(name, model)
        opt.update(model, tree_map(mx.ones_like, model.parameters()))
        assert {p.dtype for p in flat(model.parameters()).values()} == {mx.bfloat16}
        assert {p.dtype for p in flat(opt.state).values()} == {mx.float32, mx.int32}


# ---- Muon


def newton_schulz(x, steps=5):
    "In float64, as published."
    a, b, c = QUINTIC
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        g = x @ x.T
        x = a * x + (b * g + c * g @ g) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (8, 40), (12, 8), (40, 8), (1, 6)])
@pytest.mark.parametrize("decades", [0, 3, 6])
def test_orthogonalize_equals_float64(shape, decades):
    rng, k = np.random.default_rng(0), min(shape)
    u, _ = np.linalg.qr(rng.normal(size=(shape[0], k)))
    v, _ = np.linalg.qr(rng.normal(size=(shape[1], k)))
    x = np.stack([s * (u * np.logspace(0, -decades, k)) @ v.T for s in (1, 0.01, 50)])
    want = np.stack([newton_schulz(m if shape[0] <= shape[1] else m.T) for m in x])
    if shape[0] > shape[1]:
        want = want.swapaxes(1, 2)
    got = np.array(orthogonalize(mx.array(x.astype(np.float32))))
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_orthogonalize_gives_equal_singular_values_and_the_right_directions():
    x = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    got = np.array(orthogonalize(mx.array(x)))
    s = np.linalg.svd(got, compute_uv=False)
    assert 0.6 < s.min() and s.max() < 1.25
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    assert np.abs(u.T @ got @ vt.T - np.diag(np.diag(u.T @ got @ vt.T))).max() < 1e-4
    assert not np.isnan(np.array(orthogonalize(mx.zeros((4, 4))))).any()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("stack", [1, 1 << 22])
def test_muon_equals_mlx_over_50_steps(nesterov, stack, monkeypatch):
    """mlx.optimizers.Muon adds weight decay to the gradient and flattens 3-D arrays:
    compared without decay, and on matrices."""
    monkeypatch.setattr(module, "_STACK", stack)
    model = Net()
    for layer in model.layers:
        del layer["experts"]
    params = flat(model.parameters())
    blocks = {n for n, p in params.items() if is_block_matrix(n, p)}
    want = split_reference(
        model,
        lambda: mlx_optim.Muon(0.02, weight_decay=0.0, nesterov=nesterov),
        blocks,
        50,
        ramp,
    )
    want |= split_reference(
        model,
        lambda: mlx_optim.AdamW(
            3e-3, [0.9, 0.95], weight_decay=0, bias_correction=True
        ),
        params.keys() - blocks,
        50,
        ramp,
    )
    got = run(Muon(model, weight_decay=0.0, nesterov=nesterov), model, 50, ramp)
    assert_close(got, want, 2e-4)


def test_muon_equals_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    monkeypatch.setattr(
        torch.Tensor, "bfloat16", torch.Tensor.float
    )  # its own is coarser
    model = Net()
    for layer in model.layers:
        del layer["experts"]
    params = flat(model.parameters())
    blocks = {n for n, p in params.items() if is_block_matrix(n, p)}
    mine = {n: torch.nn.Parameter(torch.tensor(np.array(params[n]))) for n in blocks}
    opt = torch.optim.Muon(list(mine.values()), lr=0.02, weight_decay=0.1, momentum=0.9)
    for t in range(50):
        for n, p in mine.items():
            p.grad = torch.tensor(np.array(grads_of(model, t)[n]))
        opt.step()
    got = run(Muon(model, momentum=0.9), model, 50)
    want = {n: p.detach().numpy() for n, p in mine.items()}
    assert_close({n: got[n] for n in blocks}, want, 2e-4)


def test_experts_are_orthogonalized_one_by_one():
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 16)).astype(np.float32)
    got = np.array(orthogonalize(mx.array(x)))
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(got[i, j], newton_schulz(x[i, j]), atol=2e-4)


# ---- state


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resumed_equals_never_stopped(name):
    a, b = Net(), Net(seed=1)
    opt = make_optimizer(name, a)
    run(opt, a, 7)
    saved = {n: np.array(s) for n, s in flat(opt.state).items()}
    b.update(tree_map(lambda p: p + 0, a.parameters()))
    other = make_optimizer(name, b)
    other.load_state(tree_unflatten([(n, mx.array(s)) for n, s in saved.items()]))
    x, y = run(opt, a, 5), run(other, b, 5)
    assert all(np.array_equal(np.array(x[n]), np.array(y[n])) for n in x)


def test_state_survives_flattening():
    opt = Muon(Net())
    names = set(flat(opt.state))
    assert set(flat(tree_unflatten(tree_flatten(opt.state)))) == names


def test_wrong_state_is_refused():
    opt = AdamW(Net())
    with pytest.raises(ValueError, match="does not fit"):
        opt.load_state(Muon(Net()).state)
    with pytest.raises(ValueError, match="does not fit"):
        opt.load_state({"step": mx.array(0)})


def test_missing_gradient_is_named():
    model = Net()
    opt, grads = AdamW(model), dict(model.parameters())
    del grads["norm"]
    with pytest.raises(ValueError, match="norm.weight"):
        opt.update(model, grads)
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'"):
        make_optimizer("sgd", model)


def compiled(name):
    a, b = Net(), Net()
    plain, traced = make_optimizer(name, a), make_optimizer(name, b)
    state = [b.state, traced.state]

    def step(grads, scale):
        traced.update(b, grads, scale)

    step = mx.compile(step, inputs=state, outputs=state)
    return a, b, plain, traced, step


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_can_be_traced(name):
    "Nothing waits for a value; the kernels themselves (20 s of g++) are never built."
    a, b, _, traced, step = compiled(name)
    before = flat(traced.state)
    step(tree_unflatten(list(grads_of(a, 0).items())), mx.array(0.5))
    assert all(after is not before[n] for n, after in flat(traced.state).items())


@pytest.mark.stress
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_compiled_equals_eager(name):
    a, b, plain, traced, step = compiled(name)
    for t in range(3):
        grads = tree_unflatten(list(grads_of(a, t).items()))
        plain.update(a, grads, mx.array(0.5 / (t + 1)))
        step(grads, mx.array(0.5 / (t + 1)))
    assert_close(flat(b.parameters()), flat(a.parameters()), 1e-4)
    assert traced.state["step"].item() == 3


# ---- schedules


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_linear])
@pytest.mark.parametrize("warmup", [0, 1, 2, 10, 99])
def test_schedule_ends(schedule, warmup):
    rates = [schedule(s, 100, warmup, peak=3.0, final=0.3) for s in range(100)]
    top = max(warmup, 1)
    assert rates[0] == 3.0 / top
    assert rates[top - 1] == 3.0 and max(rates) == 3.0
    assert rates[99] == 0.3
    steps = np.diff(rates)
    assert np.allclose(steps[: top - 1], 3.0 / top)
    assert (steps[top - 1 :] < 0).all()
    assert (
        schedule(100, 100, warmup, 3.0, 0.3)
        == schedule(500, 100, warmup, 3.0, 0.3)
        == 0.3
    )


def test_cosine_against_torch_and_mlx():
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.zeros(1))
    opt = torch.optim.SGD([p], lr=2.0)
    cos = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 90, eta_min=0.2)
    for s in range(9, 100):
        assert math.isclose(
            warmup_cosine(s, 100, 10, 2.0, 0.2), opt.param_groups[0]["lr"], rel_tol=1e-9
        )
        assert math.isclose(
            warmup_cosine(s, 100, 10, 2.0, 0.2),
            mlx_optim.cosine_decay(2.0, 90, 0.2)(mx.array(s - 9)).item(),
            rel_tol=1e-5,
        )
        opt.step()
        cos.step()


def test_linear_holds_the_peak():
    rates = [warmup_linear(s, 100, 10, 1.0, 0.1, decay=0.5) for s in range(100)]
    assert rates[9:55] == [1.0] * 46 and rates[99] == 0.1
    assert np.allclose(np.diff(rates[54:]), -0.9 / 45)
    assert [constant(s, 5, 2) for s in range(5)] == [0.5, 1, 1, 1, 1]
    assert set(SCHEDULES) == {"cosine", "linear", "constant"}


def test_schedule_of_one_step_and_bad_warmup():
    assert warmup_cosine(0, 1, 0) == warmup_linear(0, 1, 1) == 1.0
    with pytest.raises(ValueError, match="warmup 11"):
        warmup_cosine(0, 10, 11)


# ---- clipping


def test_clip_equals_numpy_and_torch():
    torch = pytest.importorskip("torch")
    grads = tree_unflatten(list(grads_of(Net(), 0).items()))
    whole = np.concatenate([np.array(g).ravel() for g in flat(grads).values()])
    for max_norm in (0.1, 1.0, 1e3):
        clipped, norm = clip_by_global_norm(grads, max_norm)
        assert math.isclose(norm.item(), np.linalg.norm(whole), rel_tol=1e-5)
        params = [
            torch.nn.Parameter(torch.tensor(np.array(g))) for g in flat(grads).values()
        ]
        for p in params:
            p.grad = p.data.clone()
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        for p, g in zip(params, flat(clipped).values()):
            np.testing.assert_allclose(
                np.array(g), p.grad.numpy(), rtol=1e-5, atol=1e-9
            )
    assert math.isclose(global_norm(grads).item(), norm.item(), rel_tol=1e-6)
