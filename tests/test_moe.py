"Mixtures of experts: every way to the experts, the model around them, and other programs that load it."

import os
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import llmfs.training.trainer as tr
from llmfs.model.block import MLP, Block, GPTConfig
from llmfs.model.moe import RUN, Experts, MoE, MoEConfig, pick_dispatch, routing
from llmfs.model.moe_files import MIXTURES
from llmfs.model.pretrained import (
    export_shape,
    read_pretrained,
    to_config,
    why_no_shape,
    write_pretrained,
)
from llmfs.model.router import (
    Choice,
    Router,
    Routing,
    balance_terms,
    best_first,
    expert_load,
)
from llmfs.model.slots import collect, plan_capacity, plan_sorted, room, spread
from llmfs.model.transformer import (
    GPT,
    count_params,
    flops_per_token,
    memory_bytes,
    preset,
)
from llmfs.tokenizer.exchange import PretrainedError
from llmfs.tokenizer.vocab import CharTokenizer
from llmfs.training.checkpoint import load_model
from llmfs.training.data_loader import Batch, TokenFile, write_tokens
from llmfs.training.optimizer import make_optimizer
from llmfs.training.step import TrainConfig, TrainStep

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

SMALL = dict(vocab_size=61, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=96,
             n_experts=4, init_std=0.2)  # fmt: skip


def build(seed=0, **changes):
    mx.random.seed(seed)
    return GPT(MoEConfig(**SMALL | changes))


def close(a, b, atol):
    return (
        float(np.abs(np.array(a, np.float64) - np.array(b, np.float64)).max()) <= atol
    )


def act(name, gate, up):
    if name == "swiglu":
        return gate / (1 + np.exp(-gate)) * up
    if name == "relu2":
        return np.maximum(up, 0) ** 2
    return 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))


def token_by_token(experts, x, choice):
    "One token and one expert after the other, in numpy and float64."
    w = {n: np.array(a, np.float64) for n, a in tree_flatten(experts.parameters())}
    out = np.zeros(x.shape)
    for t, row in enumerate(np.array(x, np.float64)):
        for e, weight in zip(
            np.array(choice.chosen)[t], np.array(choice.weight, np.float64)[t]
        ):
            gate = w["gate_proj.weight"][e] @ row if "gate_proj.weight" in w else None
            h = act(experts.activation, gate, w["up_proj.weight"][e] @ row)
            out[t] += weight * (w["down_proj.weight"][e] @ h)
    return out


def mixture(E, k, T=70, activation="swiglu", **changes):
    mx.random.seed(E + 10 * k)
    cfg = MoEConfig(
        vocab_size=8,
        d_model=16,
        n_heads=2,
        d_ff=8 * k,
        n_experts=E,
        top_k=k,
        activation=activation,
        **changes,
    )
    x = mx.random.normal((T, 16))
    return cfg, Experts(cfg), Router(cfg)(20 * x), x


WAYS = [(8, 2, "swiglu"), (5, 3, "relu2"), (4, 4, "gelu"), (16, 1, "swiglu")]


@pytest.mark.parametrize("way", RUN)
@pytest.mark.parametrize("E,k,activation", WAYS)
def test_every_way_gives_what_one_token_after_the_other_gives(way, E, k, activation):
    cfg, experts, choice, x = mixture(E, k, activation=activation)
    got = RUN[way](experts, x, choice, E / k)
    assert close(got, token_by_token(experts, x, choice), 1e-5)


@pytest.mark.parametrize("way", RUN)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_every_way_knows_half_precision(way, dtype):
    _, experts, choice, x = mixture(8, 2)
    exact = RUN[way](experts, x, choice, 4)
    experts.set_dtype(dtype)
    got = RUN[way](experts, x.astype(dtype), choice, 4)
    size = float(mx.abs(exact).max())
    assert got.dtype == dtype and close(got.astype(mx.float32), exact, 0.02 * size)


def by_masks(experts, x, choice):
    "All experts on all tokens: nothing to sort."
    y = 0
    for e in range(experts.up_proj.weight.shape[0]):
        one = MLP(x.shape[1], 1, experts.activation)
        for name, stack in experts.children().items():
            one[name].weight = stack.weight[e]
        y = y + one(x) * (choice.weight * (choice.chosen == e)).sum(-1, keepdims=True)
    return y


@pytest.mark.parametrize("way", RUN)
@pytest.mark.parametrize("E,k,activation", WAYS)
def test_every_way_has_the_gradients_of_the_naive_one(way, E, k, activation):
    cfg, experts, choice, x = mixture(E, k, activation=activation)
    up = mx.random.normal(x.shape, key=mx.random.key(1))

    def grads(run):
        def loss(params, x, weight):
            experts.update(params)
            return (run(experts, x, choice._replace(weight=weight)) * up).sum()

        found = mx.grad(loss, argnums=(0, 1, 2))(
            experts.trainable_parameters(), x, choice.weight
        )
        return dict(tree_flatten(list(found)))

    got, want = grads(lambda *a: RUN[way](*a, E / k)), grads(by_masks)
    assert got.keys() == want.keys() and len(got) >= 4
    for name in want:
        assert close(got[name], want[name], 1e-5), name


@pytest.mark.parametrize("way", RUN)
def test_one_expert_for_all_is_the_dense_layer(way):
    cfg = MoEConfig(**SMALL | dict(n_experts=1, top_k=1, dispatch=way))
    mix, dense = MoE(cfg), MLP(32, 48)
    for name in ("gate_proj", "up_proj", "down_proj"):
        dense[name].weight = mix.experts[name].weight[0]
    x = mx.random.normal((2, 9, 32), key=mx.random.key(2))
    assert close(mix(x), dense(x), 5e-6)
    grad = [mx.grad(lambda x, f=f: f(x).sum())(x) for f in (mix, dense)]
    assert close(*grad, 1e-5)


def test_a_dropped_token_passes_the_block_unchanged():
    cfg = MoEConfig(**SMALL | dict(top_k=1, d_ff=32, capacity=0.5, dispatch="batched"))
    block, x = Block(cfg), mx.broadcast_to(mx.random.normal((1, 1, 32)), (1, 64, 32))
    attended = x + block.self_attn(block.input_layernorm(x), None, None)
    out = block(x, None)
    places = room(64, 1, 4, 0.5) - 1
    changed = mx.abs(out - attended).sum(-1)[0] > 0
    assert 0 < places < 64 and changed.tolist() == [True] * places + [False] * (
        64 - places
    )
    assert mx.array_equal(out[:, places:], attended[:, places:])


def test_which_pairs_are_dropped_and_what_their_gradient_is():
    cfg, experts, choice, x = mixture(4, 2, T=64)
    C = room(64, 2, 4, 0.4)
    wanted, kept = {e: 0 for e in range(4)}, np.zeros((64, 2), bool)
    for t, row in enumerate(choice.chosen.tolist()):  # earlier tokens first
        for j, e in enumerate(row):
            kept[t, j] = wanted[e] < C - 1
            wanted[e] += 1
    assert kept.any() and not kept.all()
    alone = choice._replace(weight=choice.weight * mx.array(kept))
    assert close(
        RUN["batched"](experts, x, choice, 0.4), token_by_token(experts, x, alone), 1e-5
    )
    loss = lambda w: mx.square(
        RUN["batched"](experts, x, choice._replace(weight=w), 0.4)
    ).sum()  # noqa: E731
    grad = np.array(mx.grad(loss)(choice.weight))
    assert (grad[~kept] == 0).all() and (grad[kept] != 0).all()


def test_the_choice_is_a_constant():
    router = Router(MoEConfig(**SMALL))
    x = mx.random.normal((10, 32))
    grad = mx.grad(lambda x: router(x).weight[:, 0].sum())(x)
    assert mx.isfinite(grad).all() and mx.abs(grad).max() > 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(router="sigmoid", balance="bias"),
        dict(n_shared=2, top_k=1),
        dict(activation="relu2"),
    ],
)
def test_counted_as_built(fields):
    model = build(**fields)
    assert sum(w.size for _, w in tree_flatten(model.parameters())) == count_params(
        model.cfg
    )
    names = {n for n, _ in tree_flatten(model.layers[0].mlp.parameters())}
    assert all(n.split(".")[0] in ("router", "experts", "shared_expert") for n in names)


def test_active_parameters_and_flops_are_those_of_the_dense_sibling():
    for size in ("tiny", "124m", "500m", "1b"):
        dense, sparse = preset(size), preset(f"moe-{size}")
        router = sparse.n_layers * sparse.n_experts * sparse.d_model
        assert count_params(sparse, active=True) == count_params(dense) + router
        assert flops_per_token(sparse) == flops_per_token(dense) + 6 * router


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="fitted on a CPU")
@pytest.mark.parametrize("fields,B,L,recompute", [
    ({}, 8, 256, False), (dict(d_ff=1024), 8, 128, False), (dict(capacity=2.0), 4, 256, False),
    (dict(n_experts=16, top_k=4, activation="relu2"), 8, 256, False), (dict(dispatch="gather"), 8, 256, False),
    (dict(n_shared=1, top_k=1), 16, 128, False), (dict(d_ff=1024), 4, 256, True),
])  # fmt: skip
def test_memory_counts_what_carries_tokens_to_experts(fields, B, L, recompute):
    "Against MLX's peak of a real step; that of the dense sibling is far below it"
    cfg, before = preset("moe-tiny", vocab_size=500, **fields), mx.get_active_memory()
    model, ids = GPT(cfg), np.random.default_rng(0).integers(0, 500, (B, L + 1)).astype(np.int32)
    step = TrainStep(model, make_optimizer("adamw", model),
                     TrainConfig(grad_checkpoint=recompute, precision="float32"))  # fmt: skip
    for _ in range(2):  # the first also holds what set it up
        mx.reset_peak_memory()
        mx.eval(step([Batch(ids[:, :-1], ids[:, 1:], None)], 1.0), model.parameters(), step.optimizer.state)
    need, peak = memory_bytes(cfg, B, L, recompute=recompute).total, mx.get_peak_memory() - before
    assert abs(need / peak - 1) < (0.25 if recompute else 0.15)


@pytest.mark.parametrize("fields,words", [
    (dict(top_k=5), "n_experts=4"), (dict(d_ff=47), "multiple of top_k"), (dict(capacity=0), "above 0"),
    (dict(dispatch="fast"), "loop, gather, batched"), (dict(bias=True), "experts have none"),
    (dict(balance="no"), "aux, bias, none"), (dict(aux_weight=float("nan")), "finite"), (dict(n_experts=True), "whole number"),
])  # fmt: skip
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        MoEConfig(**SMALL | fields)


def test_config_survives_a_file():
    cfg = MoEConfig(**SMALL | dict(n_shared=1, top_k=2))
    assert GPTConfig.from_dict(cfg.to_dict()) == cfg and cfg.to_dict()["kind"] == "moe"


def test_nobody_is_left_out_in_use():
    cfg = MoEConfig(**SMALL | dict(capacity=0.1))
    assert pick_dispatch(cfg, True, 1000) == "batched"
    for dispatch in ("auto", "loop", "gather", "batched"):
        chosen = MoEConfig(**SMALL | dict(dispatch=dispatch))
        assert {pick_dispatch(chosen, False, T) for T in (1, 10_000)} <= {
            "loop",
            "gather",
        }


@pytest.mark.parametrize(
    "fields", [{}, dict(n_shared=1, top_k=1), dict(router="sigmoid", balance="bias")]
)
def test_cached_decoding_is_the_whole_text(fields):
    model = build(**fields).eval()
    x = mx.random.randint(0, 61, (2, 30))
    cache, parts = model.make_cache(), []
    for i, j in [(0, 13), *((t, t + 1) for t in range(13, 30))]:
        parts.append(model(x[:, i:j], cache=cache))
    assert close(mx.concatenate(parts, axis=1), model(x), 1e-4)


def test_the_past_does_not_see_the_future():
    model = build().eval()
    x = mx.random.randint(0, 61, (1, 40))
    y = model(x)
    z = model(mx.concatenate([x[:, :25], (x[:, 25:] + 1) % 61], axis=1))
    assert close(y[:, :25], z[:, :25], 1e-5) and not close(y[:, 25:], z[:, 25:], 1e-3)


def test_watching_leaves_the_model_as_it_was():
    model = build()
    model.train()
    routers = [layer.mlp.router for layer in model.layers]
    choices = routing(model, mx.random.randint(0, 61, (2, 20)))
    assert [layer.mlp.router for layer in model.layers] == routers and model.training
    load = expert_load(choices)
    assert (
        load.shape == (2, 4)
        and np.allclose(load.sum(1), 1)
        and choices[0].chosen.shape == (40, 2)
    )


def batch(seed=0, B=4, L=24):
    ids = np.random.default_rng(seed).integers(0, 61, (B, L + 1)).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], None)


def one_step(model, batches, **changes):
    step = TrainStep(
        model,
        make_optimizer("adamw", model, lr=1e-2),
        TrainConfig(compile=False, precision="float32", **changes),
    )
    loss, norm, good, _ = step(batches, 1.0)
    assert good.item()
    return dict(tree_flatten(model.parameters())), loss.item(), norm.item()


@pytest.mark.parametrize(
    "fields", [{}, dict(balance="bias"), dict(n_shared=1, top_k=1)]
)
def test_the_balance_loss_takes_part(fields):
    "The gradient is that of the text's loss and of the terms of all layers."
    b, model = batch(), build(**fields)
    _, loss, norm = one_step(build(**fields), [b], grad_clip=0.0)

    def whole(params):
        model.update(params)
        logits = model(mx.array(b.inputs))
        nll = (
            mx.logsumexp(logits, -1)
            - mx.take_along_axis(logits, mx.array(b.targets)[..., None], -1)[..., 0]
        )
        extra = sum(layer.mlp._extra_loss for layer in model.layers)
        return nll.mean() + extra, nll.mean()

    (_, text), grads = mx.value_and_grad(whole)(model.trainable_parameters())
    length = mx.sqrt(sum(mx.square(g).sum() for _, g in tree_flatten(grads))).item()
    assert abs(loss - text.item()) < 1e-5 and abs(norm - length) < 1e-4


def test_recomputing_layers_changes_nothing():
    plain, *_ = one_step(build(), [batch()])
    again, *_ = one_step(build(), [batch()], grad_checkpoint=True)
    assert all(close(plain[n], again[n], 1e-5) for n in plain)


def test_batches_add_up():
    "Two batches of which the step takes the mean: the weights move as by the mean gradient."
    two, loss, _ = one_step(build(), [batch(1), batch(2)])
    losses = [one_step(build(), [batch(i)])[1] for i in (1, 2)]
    assert abs(loss - np.mean(losses)) < 1e-5 and all(
        mx.isfinite(w).all() for w in two.values()
    )


def test_the_router_stays_in_float32():
    model, seen = build(), []
    step = TrainStep(
        model,
        make_optimizer("adamw", model),
        TrainConfig(compile=False, precision="bfloat16"),
    )
    whole = Router.__call__
    try:
        Router.__call__ = lambda self, x: (
            seen.append((x.dtype, self.weight.dtype)) or whole(self, x)
        )
        step([batch()], 1.0)
    finally:
        Router.__call__ = whole
    assert seen and set(seen) == {(mx.bfloat16, mx.float32)}


@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_balance_brings_the_loads_together(balance):
    "Routers that all lean to expert 0 at the start."
    mx.random.seed(0)
    cfg = MoEConfig(
        **SMALL | dict(n_layers=1, balance=balance, aux_weight=0.1, z_weight=0.0)
    )
    x = mx.random.normal((2000, 32)) + 1
    router = Router(cfg)
    router.weight = 0.05 * router.weight + mx.array([[0.1], [0], [0], [0]])
    busy = lambda: 4 * expert_load([router(x)])[0].max()  # noqa: E731
    first = busy()
    optimizer = make_optimizer("adamw", router, lr=1e-2, weight_decay=0.0)
    for i in range(150):
        loss = lambda p: (
            router.update(p),
            balance_terms(cfg, router(x), router.get("bias")),
        )[1]  # noqa: E731
        optimizer.update(
            router, mx.grad(loss)(router.trainable_parameters()), 1 - i / 150
        )
    assert first > 1.9 and busy() < 1.2


def test_the_terms_by_hand():
    "Two tokens, two experts; scores that do not sum to 1 are shares of their sum."
    z = mx.array([[1.0, 0.0], [2.0, 0.0]])
    choice = Choice(mx.array([[0], [0]]), None, mx.array([[0.6, 0.2], [0.4, 0.4]]), z)
    value = lambda **f: balance_terms(Routing(n_experts=2, top_k=1, router="sigmoid", **f), choice).item()  # noqa: E731
    square = np.mean([np.log(np.e + 1) ** 2, np.log(np.e**2 + 1) ** 2])
    assert value(balance="none", z_weight=0.5) == pytest.approx(0.5 * square, rel=1e-5)
    assert value(aux_weight=3.0, z_weight=0.0) == pytest.approx(3 * 2 * (0.75 + 0.5) / 2, rel=1e-5)


def test_noise_is_for_training_only():
    router, x = Router(MoEConfig(**SMALL | dict(router_noise=5.0))), mx.random.normal((50, 32))
    assert not mx.array_equal(router(x).logits, router(x).logits)
    router.eval()
    assert mx.array_equal(router(x).logits, x @ router.weight.T)


TOKENIZER = CharTokenizer("abcdefgh .")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    text = ["".join(rng.choice(list("abcdefgh "), 60)) + "." for _ in range(200)]
    write_tokens(text[:180], TOKENIZER, folder / "train.npy")
    write_tokens(text[180:], TOKENIZER, folder / "validation.npy")
    return folder


def trainer(data, out, resume=False, **fields):
    shape = dict(vocab_size=TOKENIZER.vocab_size, max_seq_len=32) | fields
    cfg = TrainConfig(
        max_steps=12,
        batch_size=4,
        seq_len=32,
        eval_every=6,
        eval_batches=2,
        save_every=4,
        grad_accum=2,
        optimizer="muon",
    )
    t = tr.Trainer(build(seed=3 * resume, **shape), cfg, tokenizer=TOKENIZER, train=TokenFile(data / "train.npy"),
                   validation=TokenFile(data / "validation.npy"), out=out, resume=resume, show=False, say=lambda line: None)  # fmt: skip

    return t


@pytest.mark.parametrize(
    "fields", [dict(router_noise=0.3), dict(balance="bias", router="sigmoid")]
)
def test_stopped_and_resumed_is_the_same_run(data, tmp_path, fields, monkeypatch):
    trainer(data, tmp_path / "whole", **fields).fit()
    t, real, count = (
        trainer(data, tmp_path / "parts", **fields),
        TrainStep.__call__,
        [0],
    )

    def stopping(self, *args):
        count[0] += 1
        if count[0] == 7:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", stopping)
    with pytest.raises(BaseException):
        t.fit()
    monkeypatch.setattr(TrainStep, "__call__", real)
    trainer(data, tmp_path / "parts", resume=True, **fields).fit()
    one, two = (
        load_model(tmp_path / name / "last.npz")[0] for name in ("whole", "parts")
    )
    a, b = dict(tree_flatten(one.parameters())), dict(tree_flatten(two.parameters()))
    assert type(one.cfg) is MoEConfig and a.keys() == b.keys()
    assert all(mx.array_equal(a[n], b[n]) for n in a)


FAMILIES = {
    "qwen3_moe": dict(head_dim=16),
    "mixtral": dict(qk_norm=False, rope_theta=5000.0),
    "granitemoehybrid": dict(qk_norm=False, n_shared=2, top_k=2),
}


def shaped(family):
    model = build(**FAMILIES[family])
    model.update(
        tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape), model.parameters())
    )
    return model.eval()


IDS = np.random.default_rng(1).integers(0, 61, (2, 23)).astype(np.int32)


def in_transformers(folder):
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


def in_mlx_lm(folder):
    pytest.importorskip("mlx_lm")
    from mlx_lm.utils import load_model as load

    mx.disable_compile()
    try:
        return np.array(load(folder)[0](mx.array(IDS)))
    finally:
        mx.enable_compile()


@pytest.mark.parametrize("reader", [in_transformers, in_mlx_lm])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_programs_compute_the_same(family, reader, tmp_path):
    model = shaped(family)
    assert write_pretrained(tmp_path / "m", model) == family
    assert close(reader(tmp_path / "m"), model(mx.array(IDS)), 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_read_back(family, tmp_path):
    model = shaped(family)
    write_pretrained(tmp_path / "m", model)
    back = read_pretrained(tmp_path / "m").model
    assert (
        mx.array_equal(back(mx.array(IDS)), model(mx.array(IDS)))
        and replace(back.cfg, init_std=0.2) == model.cfg
    )
    assert set(MIXTURES) == set(FAMILIES)


def test_we_read_a_mixtral_of_transformers(tmp_path):
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = tf.MixtralForCausalLM(tf.MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        rope_theta=10_000.0, sliding_window=None,
    )).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "m")
    with torch.no_grad():
        logits = theirs(torch.from_numpy(IDS).long()).logits.numpy()
    model = read_pretrained(tmp_path / "m").model
    assert model.cfg.d_ff == 48 and close(model(mx.array(IDS)), logits, 2e-5)


@pytest.mark.parametrize("family,changes,words", [
    ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2"),
    ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers"),
    ("qwen3_moe", dict(num_experts=None), "num_experts is missing"),
    ("mixtral", dict(sliding_window=128), "sliding_window"),
    ("mixtral", dict(num_experts_per_tok="two"), "num_experts_per_tok"),
    ("granitemoehybrid", dict(attention_multiplier=1.0), "attention_multiplier"),
    ("granitemoehybrid", dict(residual_multiplier=0.2), "residual_multiplier"),
    ("granitemoehybrid", dict(layer_types=["mamba", "attention"]), "mamba"),
])  # fmt: skip
def test_what_is_not_ours_is_refused_by_name(family, changes, words, tmp_path):
    import json

    write_pretrained(tmp_path / "m", shaped(family))
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(PretrainedError, match=words):
        read_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(balance="bias"), "balance"),
        (dict(router="sigmoid"), "router"),
        (dict(n_shared=2), "n_shared"),
    ],
)
def test_a_model_without_a_shape_says_why(fields, words):
    cfg = MoEConfig(**SMALL | fields)
    assert export_shape(cfg) is None and words in why_no_shape(cfg)
    with pytest.raises(ValueError, match=words):
        to_config(cfg)


def test_biases_choose_and_do_not_weigh():
    mx.random.seed(0)
    router = Router(MoEConfig(**SMALL, balance="bias", router="sigmoid", renormalize=False))
    x = mx.random.normal((20, 32))
    before = router(x)
    router.bias = mx.array([9.0, 0.0, 0.0, 0.0])
    after = router(x)
    assert np.all(np.array(after.chosen)[:, 0] == 0) and np.any(np.array(before.chosen)[:, 0] != 0)
    assert close(after.weight, mx.take_along_axis(after.score, after.chosen, axis=1), 0)
    assert close(after.score, before.score, 0)


def test_a_shared_expert_adds_what_it_says():
    mx.random.seed(0)
    layer, x = MoE(MoEConfig(**SMALL, n_shared=1)), mx.random.normal((2, 5, 32))
    whole = layer(x)
    layer.shared_expert.update(tree_map(mx.zeros_like, layer.shared_expert.parameters()))
    assert float(mx.abs(whole - layer(x)).max()) > 0.01
    shared = MoE(MoEConfig(**SMALL, n_shared=1)).shared_expert
    without, layer.shared_expert = layer(x), shared
    assert close(layer(x) - without, shared(x), 1e-5)


def test_the_tokens_that_the_router_hands_on_carry_both_gradients():
    mx.random.seed(0)
    layer, x = Router(MoEConfig(**SMALL)), mx.random.normal((9, 32))

    def size(x, weight, handed_on):
        logits, rows = x @ weight.T, x
        if handed_on:
            layer.weight = weight
            choice = layer(x)
            logits, rows = choice.logits, choice.rows
        return (mx.sin(logits).sum() + (mx.cos(rows) * mx.arange(32)).sum()).sum()

    want, got = (mx.grad(size, (0, 1))(x, layer.weight + 0, how) for how in (False, True))
    assert all(close(a, b, 1e-5) for a, b in zip(want, got))
    only = mx.grad(lambda x: mx.sin(layer(x).logits).sum())(x)
    assert close(only, mx.cos(x @ layer.weight.T) @ layer.weight, 1e-5)


@pytest.mark.parametrize("E,k", [(1, 1), (4, 1), (8, 2), (8, 8), (60, 6)])
def test_the_best_are_those_of_a_stable_sort(E, k):
    rng = np.random.default_rng(E + k)
    score = rng.integers(0, 4, (500, E)).astype(np.float32)  # many are equal
    want = np.argsort(-score, axis=1, kind="stable")[:, :k]
    assert np.array_equal(np.array(best_first(mx.array(score), k)), want)


def test_room_for_all_is_room_for_all():
    for T, k, E in [(1, 2, 8), (64, 1, 4), (33, 3, 6), (4096, 2, 8)]:
        assert room(T, k, E, E / k) == T + 1
        assert room(T, k, E, 2 * E / k) == T + 1
        C = room(T, k, E, 1.0)
        assert C * E >= T * k and (C == T + 1 or C % 16 == 0)


@pytest.mark.parametrize("capacity", [0.5, 1.0, 4.0])
def test_a_plan_says_the_same_from_both_sides(capacity):
    "Each pair that counts stands in its expert's room, earlier pairs first; nobody else counts."
    E, k, T = 4, 2, 50
    choice = mixture(E, k, T=T)[2]
    C = room(T, k, E, capacity)
    plan = plan_capacity(choice, E, C)
    pair, slots, held = (np.array(a) for a in (plan.pair, plan.slots, plan.held))
    kept = np.array(plan.weight).reshape(-1) > 0
    where, chosen = slots.reshape(-1), np.array(choice.chosen).reshape(-1)
    assert (pair[where[kept]] == np.flatnonzero(kept)).all() and (where[kept] // C == chosen[kept]).all()
    assert (held > 0).sum() == kept.sum() and np.allclose(held[where[kept]], np.array(plan.weight).reshape(-1)[kept])
    for e in range(E):
        mine = np.flatnonzero(chosen == e)
        assert (kept[mine] == (np.arange(len(mine)) < C - 1)).all()


def test_rows_come_back_weighed_and_so_do_gradients():
    "Against sums over pairs, in float64."
    _, _, choice, x = mixture(6, 3, T=40)
    for plan in (plan_sorted(choice, 6)[0], plan_capacity(choice, 6, 16)):
        S, up = len(plan.pair), mx.random.normal(x.shape, key=mx.random.key(4))
        y = mx.random.normal((S, 16), key=mx.random.key(3))
        size = lambda y, w, p=plan: (collect(y, p._replace(weight=w)) * up).sum()  # noqa: E731
        dy, dw = mx.grad(size, argnums=(0, 1))(y, plan.weight)
        Y, U, W = (np.array(a, np.float64) for a in (y, up, plan.weight))
        slots, want_y, want_w = np.array(plan.slots), np.zeros(Y.shape), np.zeros(W.shape)
        for t in range(40):
            for j in range(3):
                want_y[slots[t, j]] += W[t, j] * U[t] if W[t, j] else 0
                want_w[t, j] = U[t] @ Y[slots[t, j]]
        assert close(dy, want_y, 1e-5)
        alive = W > 0
        assert np.allclose(np.array(dw)[alive], want_w[alive], atol=1e-4)
        want = sum(W[:, j, None] * Y[slots[:, j]] for j in range(3))
        assert close(collect(y, plan), want, 1e-5) and close(spread(x, plan), np.array(x)[np.array(plan.pair) // 3], 0)
