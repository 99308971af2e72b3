"The architecture against independent references, invariants, and bad configs."

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import llmfs  # noqa: I001
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from llmfs.model.attention import (
    Attention,
    KVCache,
    attend,
    causal_mask,
    exp,
    sigmoid,
)
from llmfs.model.embedding import (
    Rope,
    halves_to_pairs,
    pairs_to_halves,
    positions_in,
    sinusoids,
)
from llmfs.model.transformer import (
    GPT,
    PRESETS,
    GPTConfig,
    count_params,
    flops_per_token,
    memory_bytes,
    preset,
)

SMALL = dict(vocab_size=61, n_layers=2, d_model=32, n_heads=4, max_seq_len=64)
GPT2 = dict(
    norm="layernorm", norm_eps=1e-5, activation="gelu", positions="learned",
    qk_norm=False, bias=True,
)  # fmt: skip
LLAMA = dict(qk_norm=False)
SHAPES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": {}}


def build(seed=0, **overrides):
    "A small model with weights large enough that mistakes show."
    mx.random.seed(seed)
    model = GPT(GPTConfig(**(SMALL | dict(init_std=0.2) | overrides)))
    noise = lambda w: w + 0.1 * mx.random.normal(w.shape)  # noqa: E731
    model.update(tree_map(noise, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def ids(*shape, seed=1, vocab=61):
    rng = np.random.default_rng(seed)
    return mx.array(rng.integers(0, vocab, shape).astype(np.int32))


def gap(a, b):
    return float(mx.abs(a - b).max())


# --- against transformers -------------------------------------------------------------


def to_torch(model, kind):
    "Our weights under the names that transformers uses."
    torch = pytest.importorskip("torch")
    out = {}
    rename = {
        "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }  # fmt: skip
    weights = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    if kind == "gpt2":
        for i in range(model.cfg.n_layers):
            for part in ("weight", "bias"):
                qkv = [weights.pop(f"layers.{i}.self_attn.{n}_proj.{part}") for n in "qkv"]
                weights[f"layers.{i}.attn.c_attn.{part}"] = np.concatenate(qkv)
    for name, w in weights.items():
        if kind == "gpt2" and not name.startswith("lm_head"):
            for ours, theirs in rename.items():
                name = name.replace(ours, theirs)
            if name.startswith("layers") and w.ndim == 2:
                w = w.T.copy()
            name = name.replace("layers.", "h.").replace("embed_tokens", "wte")
            name = name.replace("embed_positions", "wpe")
            name = "transformer." + ("ln_f" + name[4:] if name.startswith("norm") else name)
        elif not name.startswith("lm_head"):
            name = "model." + name
        out[name] = torch.from_numpy(w)
    return out


def reference(model, kind):
    "The transformers model of the same shape and weights."
    tr = pytest.importorskip("transformers")
    cfg = model.cfg
    if kind == "gpt2":
        config = tr.GPT2Config(
            vocab_size=cfg.vocab_size, n_positions=cfg.max_seq_len, n_embd=cfg.d_model,
            n_layer=cfg.n_layers, n_head=cfg.n_heads, layer_norm_epsilon=cfg.norm_eps,
            tie_word_embeddings=cfg.tie_embeddings,
        )  # fmt: skip
        theirs = tr.GPT2LMHeadModel(config)
    else:
        Config, Model = {
            "llama": (tr.LlamaConfig, tr.LlamaForCausalLM),
            "qwen3": (tr.Qwen3Config, tr.Qwen3ForCausalLM),
        }[kind]
        theirs = Model(
            Config(
                vocab_size=cfg.vocab_size, hidden_size=cfg.d_model,
                intermediate_size=cfg.d_ff, num_hidden_layers=cfg.n_layers,
                num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads,
                head_dim=cfg.head_dim, rms_norm_eps=cfg.norm_eps,
                max_position_embeddings=cfg.max_seq_len,
                rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
                tie_word_embeddings=cfg.tie_embeddings,
            )
        )  # fmt: skip
    missing, unexpected = theirs.load_state_dict(to_torch(model, kind), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    if cfg.tie_embeddings:
        theirs.tie_weights()
    return theirs.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind, heads", [
    ("gpt2", 4), ("llama", 4), ("llama", 2), ("llama", 1), ("qwen3", 2), ("qwen3", 4),
])  # fmt: skip
def test_transformers_gives_the_same_logits(kind, heads, tied):
    torch = pytest.importorskip("torch")
    extra = dict(head_dim=16) if kind == "qwen3" else {}
    model = build(n_kv_heads=heads, tie_embeddings=tied, **SHAPES[kind], **extra)
    theirs = reference(model, kind)
    tokens = ids(2, 23)
    with torch.no_grad():
        want = theirs(torch.from_numpy(np.array(tokens)).long()).logits.numpy()
    assert np.abs(np.array(model(tokens)) - want).max() < 1e-4


@pytest.mark.parametrize("kind, heads", [("llama", 1), ("llama", 4), ("qwen3", 2)])
def test_mlx_lm_gives_the_same_logits(kind, heads):
    models = pytest.importorskip(f"mlx_lm.models.{kind}")
    model = build(n_kv_heads=heads, **SHAPES[kind])
    cfg = model.cfg
    args = models.ModelArgs.from_dict(dict(
        model_type=kind, hidden_size=cfg.d_model, num_hidden_layers=cfg.n_layers,
        intermediate_size=cfg.d_ff, num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads, head_dim=cfg.head_dim,
        rms_norm_eps=cfg.norm_eps, vocab_size=cfg.vocab_size, rope_theta=cfg.rope_theta,
        max_position_embeddings=cfg.max_seq_len, tie_word_embeddings=True,
    ))  # fmt: skip
    theirs = models.Model(args)
    weights = [("model." + k, v) for k, v in tree_flatten(model.parameters())]
    theirs.load_weights(weights, strict=True)
    tokens = ids(2, 70)
    assert gap(model(tokens), theirs(tokens)) < 1e-4


# --- positions and attention ----------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 3, 1000])
def test_rope_equals_the_kernel(interleaved, offset):
    x = mx.random.normal((2, 3, 9, 12))
    want = mx.fast.rope(
        x, 12, traditional=interleaved, base=500.0, scale=1.0, offset=offset
    )
    assert gap(Rope(12, 500.0, interleaved)(x, offset), want) < 1e-4


def test_rope_layouts_convert_into_each_other():
    w = mx.random.normal((24, 5))
    x = mx.random.normal((7, 5))
    halves = Rope(8)((x @ w.T).reshape(7, 3, 8).swapaxes(0, 1))
    moved = halves_to_pairs(w, 8)
    pairs = Rope(8, interleaved=True)((x @ moved.T).reshape(7, 3, 8).swapaxes(0, 1))
    product = lambda x: x @ x.swapaxes(-1, -2)  # noqa: E731
    assert gap(product(halves), product(pairs)) < 1e-4
    assert gap(pairs_to_halves(moved, 8), w) == 0 < gap(moved, w)


def test_sinusoids_are_the_papers():
    want = np.zeros((9, 6))
    for t in range(9):
        for i in range(3):
            want[t, 2 * i] = np.sin(t / 10_000 ** (2 * i / 6))
            want[t, 2 * i + 1] = np.cos(t / 10_000 ** (2 * i / 6))
    assert np.abs(np.array(sinusoids(9, 6)) - want).max() < 1e-6


def test_positions_start_again_with_each_document():
    segments = mx.array([[7, 7, 3, 3, 3, 7, -1, -1], [0] * 8])
    assert positions_in(segments).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], list(range(8))]


def test_exp_and_sigmoid_are_accurate_everywhere():
    x = np.concatenate([np.linspace(-87, 87, 40_001), [0.0, -0.0]]).astype(np.float32)
    truth = np.exp(x.astype(np.float64))
    assert np.abs(np.array(exp(mx.array(x))) / truth - 1).max() < 1e-5
    far = mx.array([-1e9, -200.0, 200.0, 1e9])
    assert not mx.isnan(exp(far)).any() and mx.isfinite(sigmoid(far)).all()
    assert exp(far)[0].item() < 1e-37 and sigmoid(far)[0].item() < 1e-37
    assert abs(sigmoid(far)[3].item() - 1) < 1e-6
    slope = mx.grad(lambda x: exp(x).sum())(mx.array(x[:40_001]))
    assert np.abs(np.array(slope) / truth[:40_001] - 1).max() < 1e-5


@pytest.mark.parametrize("length, keys", [(5, 5), (64, 64), (200, 200), (130, 170), (1, 9)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_attend_equals_the_kernel_forward_and_backward(length, keys, heads):
    H, G = heads
    q = mx.random.normal((2, H, length, 8))
    k, v = mx.random.normal((2, 2, G, keys, 8))
    real = causal_mask(length, keys - length, left_padding=mx.array([0, 2]))
    bias = mx.random.normal((H, length, keys))

    def reference(mask):
        return lambda q, k, v: mx.square(
            mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5, mask=mask)
        ).sum()

    for mask, causal in (("causal", False), (None, True), (real, True), (bias, False)):
        ours = lambda q, k, v: mx.square(attend(q, k, v, mask, causal)).sum()  # noqa: B023, E731
        got, grads = mx.value_and_grad(ours, argnums=(0, 1, 2))(q, k, v)
        want, want_grads = mx.value_and_grad(reference(mask), argnums=(0, 1, 2))(q, k, v)
        assert abs(got - want) < 1e-4 * abs(want)
        assert all(gap(a, b) < 1e-3 for a, b in zip(grads, want_grads))


def test_layer_equals_mlx_multi_head_attention():
    theirs, ours = nn.MultiHeadAttention(24, 3, bias=True), Attention(24, 3, bias=True)
    for name in ("query", "key", "value", "out"):
        ours[f"{name[0]}_proj"].update(theirs[f"{name}_proj"].parameters())
    x = mx.random.normal((2, 80, 24))
    mask = nn.MultiHeadAttention.create_additive_causal_mask(80)
    assert gap(ours(x), theirs(x, x, x, mask)) < 1e-5


def test_cache_grows_trims_and_keeps():
    cache, k = KVCache(left_padding=[0, 1, 2], step=4), mx.random.normal((3, 2, 11, 5))
    sizes = []
    for a, b in ((0, 3), (3, 4), (4, 5), (5, 11)):
        keys, values = cache.update(k[:, :, a:b], -k[:, :, a:b])
        sizes.append(cache.keys.shape[2])
        assert gap(keys, k[:, :, :b]) == 0 and gap(values, -k[:, :, :b]) == 0
    assert sizes == [4, 4, 8, 12] and cache.nbytes == 2 * 3 * 2 * 12 * 5 * 4
    assert cache.trim(4) == 4 and cache.offset == 7 and cache.trim(-3) == 0
    keys, _ = cache.update(k[:, :, :1], k[:, :, :1])
    assert gap(keys, mx.concatenate([k[:, :, :7], k[:, :, :1]], axis=2)) == 0
    cache.keep(mx.array([2, 0]))
    assert cache.left_padding.tolist() == [2, 0] and gap(cache.keys[1, :, :7], k[0, :, :7]) == 0
    with pytest.raises(ValueError, match="2 rows, not 3"):
        cache.update(k, k)
    assert cache.trim(99) == 8 and cache.offset == 0


# --- invariants -----------------------------------------------------------------------

VARIANTS = [
    dict(positions=p, n_kv_heads=g, qk_norm=n)
    for p, g, n in [("rope", 4, True), ("rope", 2, False), ("rope", 1, True),
                    ("learned", 4, False), ("sinusoidal", 2, True), ("none", 1, False)]
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_future_does_not_leak(variant):
    model = build(**variant)
    tokens = np.array(ids(1, 12))
    before = model(mx.array(tokens))
    for t in (0, 5, 11):
        changed = tokens.copy()
        changed[0, t] = (changed[0, t] + 1) % 61
        after = model(mx.array(changed))
        assert t == 0 or gap(before[:, :t], after[:, :t]) == 0
        assert gap(before[:, t], after[:, t]) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_the_full_forward(variant):
    model = build(**variant)
    tokens = ids(2, 20)
    want = model(tokens)
    cache = model.make_cache(step=7)
    pieces, start = [], 0
    for n in (6, 1, 1, 5, 7):
        pieces.append(model(tokens[:, start : start + n], cache=cache))
        start += n
    assert gap(mx.concatenate(pieces, axis=1), want) < 1e-4
    for layer in cache:
        layer.trim(8)
    assert gap(model(tokens[:, 12:], cache=cache), want[:, 12:]) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padding_changes_nothing(variant):
    model = build(**variant)
    tokens = np.array(ids(3, 14))
    padding = [0, 3, 7]
    padded = np.zeros((3, 14), np.int32)
    for row, p in enumerate(padding):
        padded[row, p:] = tokens[row, : 14 - p]
    cache = model.make_cache(left_padding=padding, step=5)
    parts = [model(mx.array(padded[:, :10]), cache=cache)]
    parts += [model(mx.array(padded[:, i : i + 1]), cache=cache) for i in range(10, 14)]
    got = mx.concatenate(parts, axis=1)
    assert not mx.isnan(got).any()
    for row, p in enumerate(padding):
        want = model(mx.array(tokens[row : row + 1, : 14 - p]))
        assert gap(got[row : row + 1, p:], want) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_do_not_see_each_other(variant):
    model = build(**variant)
    tokens, lengths = ids(1, 16), (5, 8, 3)
    segments = mx.array(np.repeat([4, 0, -1], lengths)[None].astype(np.int32))
    got, start = model(tokens, segments=segments), 0
    for n in lengths:
        alone = model(tokens[:, start : start + n])
        assert gap(got[:, start : start + n], alone) < 1e-4
        start += n


@pytest.mark.parametrize("variant", [
    {}, dict(n_kv_heads=1), GPT2, dict(activation="relu2", norm="layernorm"),
    dict(positions="sinusoidal", qk_norm=False), dict(tie_embeddings=False),
])  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_agree_with_finite_differences(variant, packed):
    shape = dict(vocab_size=13, d_model=16, n_heads=2, d_ff=24, max_seq_len=8)
    model = build(**(shape | variant))
    tokens, targets = ids(2, 8, vocab=13), ids(2, 8, seed=2, vocab=13)
    segments = mx.array([[0] * 3 + [1] * 5, [0] * 8]) if packed else None

    def loss(params):
        model.update(params)
        return nn.losses.cross_entropy(model(tokens, segments), targets).sum()

    params = model.parameters()
    grads = dict(tree_flatten(mx.grad(loss)(params)))
    rng = np.random.default_rng(0)
    for name, w in tree_flatten(params):
        direction = mx.array(rng.choice([-1.0, 1.0], w.shape).astype(np.float32))
        direction = direction / np.sqrt(w.size)

        def at(step):
            moved = [(k, v + step * direction if k == name else v) for k, v in flat]
            return float(loss(tree_unflatten(moved)))

        flat = tree_flatten(params)
        h = 1e-2
        slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        exact = float((grads[name] * direction).sum())
        assert abs(slope - exact) < 2e-2 * max(1, abs(exact)), name


def test_blocks_can_start_by_adding_nothing():
    model = GPT(GPTConfig(**SMALL, residual_init="zero"))
    x = mx.random.normal((1, 5, 32))
    assert gap(model.layers[0](x), x) == 0
    plain, scaled = (
        GPT(GPTConfig(**SMALL, residual_init=name)).layers[1].mlp.down_proj.weight.std()
        for name in ("plain", "scaled")
    )
    assert abs(plain / scaled - 2) < 0.2  # the root of twice two layers


def test_dropout_acts_in_training_only():
    model = build(dropout=0.5)
    tokens = ids(1, 9)
    assert gap(model(tokens), model(tokens)) == 0
    model.train()
    assert gap(model(tokens), model(tokens)) > 0.1


def test_bad_calls_are_refused():
    model = build(positions="learned")
    with pytest.raises(ValueError, match="65 tokens do not fit max_seq_len=64"):
        model(ids(1, 65))
    cache = model.make_cache()
    model(ids(1, 60), cache=cache)
    with pytest.raises(ValueError, match="66 tokens do not fit"):
        model(ids(1, 6), cache=cache)
    with pytest.raises(ValueError, match="tokens must be"):
        model(ids(5))
    with pytest.raises(ValueError, match="not both"):
        model(ids(1, 2), segments=mx.zeros((1, 2), mx.int32), cache=cache)
    with pytest.raises(ValueError, match="n_kv_heads=3"):
        Attention(16, 4, n_kv_heads=3)
    with pytest.raises(ValueError, match="even width"):
        Rope(7)


def test_last_only_is_the_last_position():
    model, tokens = build(), ids(2, 9)
    assert gap(model(tokens, last_only=True), model(tokens)[:, -1:]) < 1e-5


def test_initial_loss_is_that_of_a_uniform_guess():
    for shape in SHAPES.values():
        mx.random.seed(0)
        model = GPT(GPTConfig(**(SMALL | shape | dict(vocab_size=1000))))
        loss = nn.losses.cross_entropy(model(ids(4, 64, vocab=1000)), ids(4, 64, seed=5))
        assert abs(float(loss.mean()) - np.log(1000)) < 0.1


# --- counting -------------------------------------------------------------------------

COUNTED = [
    {}, GPT2, dict(tie_embeddings=False), dict(n_kv_heads=1, head_dim=6), dict(bias=True),
    dict(activation="relu2", norm="layernorm", positions="learned"),
]  # fmt: skip


@pytest.mark.parametrize("variant", COUNTED)
def test_count_equals_the_built_model(variant):
    cfg = GPTConfig(**(SMALL | variant))
    flat = tree_flatten(GPT(cfg).parameters())
    assert count_params(cfg) == sum(w.size for _, w in flat)
    tables = ("embed_tokens", "embed_positions", "lm_head")
    inner = sum(w.size for k, w in flat if not k.startswith(tables))
    assert count_params(cfg, embeddings=False) == inner


DENSE = [name for name in PRESETS if not name.startswith("moe-")]  # others may have imported mixtures


@pytest.mark.parametrize("name", DENSE)
def test_presets_have_the_size_of_their_name(name):
    cfg = preset(name)
    before = mx.get_active_memory()
    built = sum(w.size for _, w in tree_flatten(GPT(cfg).parameters()))
    assert mx.get_active_memory() - before < 1 << 20, "counting must not allocate"
    assert built == count_params(cfg)
    if name != "tiny":
        size = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert abs(built / size - 1) < 0.03


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="fitted on a CPU")
@pytest.mark.parametrize("variant, batch, length, recompute", [
    ({}, 8, 256, False), ({}, 16, 64, False), (GPT2, 8, 128, False), (LLAMA, 8, 128, False),
    (dict(activation="relu2"), 8, 128, False), (dict(n_heads=4, n_kv_heads=1), 4, 256, False),
    (dict(vocab_size=8000), 4, 128, False), (dict(d_model=256, d_ff=1024), 1, 64, False),
    ({}, 8, 256, True), (dict(n_layers=8), 8, 256, True), (dict(d_ff=1024), 4, 256, True),
    (dict(vocab_size=4000), 4, 256, True),
])  # fmt: skip
def test_memory_of_a_training_step(variant, batch, length, recompute):
    "The second of two real steps: the first also holds what set it up."
    from llmfs.training.data_loader import Batch
    from llmfs.training.optimizer import make_optimizer
    from llmfs.training.step import TrainConfig, TrainStep

    cfg = preset("tiny", **(dict(vocab_size=500) | variant))
    model, before = GPT(cfg), mx.get_active_memory()
    step = TrainStep(model, make_optimizer("adamw", model), TrainConfig(grad_checkpoint=recompute))
    tokens = np.array(ids(batch, length + 1, vocab=500))
    batches = [Batch(tokens[:, :-1], tokens[:, 1:], None)]
    for _ in range(2):
        mx.reset_peak_memory()
        mx.eval(step(batches, 1.0), model.parameters(), step.optimizer.state)
    need = memory_bytes(cfg, batch, length, recompute=recompute).total
    most = 0.25 if recompute else 0.2  # what is under way at once varies from run to run
    assert abs(need / (mx.get_peak_memory() - before) - 1) < most


def test_memory_of_decoding():
    cfg = preset("50m")
    cache = GPT(cfg).make_cache()
    keys = mx.zeros((2, cfg.n_kv_heads, 512, cfg.head_dim))
    for layer in cache:
        layer.update(keys, keys)
    memory = memory_bytes(cfg, 2, 512, training=False)
    assert memory.cache == sum(layer.nbytes for layer in cache)
    assert memory.total == memory.weights + memory.cache == 4 * count_params(cfg) + memory.cache


@pytest.mark.parametrize("variant", [{}, GPT2, dict(n_kv_heads=2, head_dim=16)])
def test_flops_count_every_matrix_product(variant):
    cfg = GPTConfig(**(SMALL | variant))
    flat = tree_flatten(GPT(cfg).parameters())
    skip = ("embed_positions",)
    matrices = sum(w.size for k, w in flat if w.ndim == 2 and not k.startswith(skip))
    scores = cfg.n_layers * 2 * cfg.n_heads * cfg.head_dim * 40
    assert flops_per_token(cfg, 40, training=False) == 2 * (matrices + scores)
    assert flops_per_token(cfg, 40) == 3 * flops_per_token(cfg, 40, training=False)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="tiny, 50m, 124m, 500m, 1b, 3b"):
        preset("7b")


# --- configs --------------------------------------------------------------------------


@pytest.mark.parametrize("field, value, rule", [
    ("n_layers", 0, "at least 1"), ("n_layers", 2.0, "whole number"),
    ("d_model", -32, "at least 1"), ("vocab_size", 0, "at least 1"),
    ("max_seq_len", True, "whole number"), ("n_heads", 0, "at least 1"),
    ("n_heads", "4", "whole number"), ("d_model", 30, "multiple of n_heads=4"),
    ("n_kv_heads", 3, "must divide n_heads=4"), ("n_kv_heads", 0, "at least 1"),
    ("n_kv_heads", 8, "must divide n_heads=4"), ("head_dim", 5, "even for rotary"),
    ("head_dim", -2, "at least 1"), ("d_ff", 0, "at least 1"),
    ("norm", "batch", "rmsnorm, layernorm"), ("activation", "elu", "swiglu, gelu, relu2"),
    ("positions", "alibi", "rope, learned, sinusoidal, none"),
    ("residual_init", 0, "scaled, zero, plain"), ("bias", "no", "True, False"),
    ("norm_eps", 0.0, "positive"), ("norm_eps", float("nan"), "positive"),
    ("rope_theta", -1.0, "positive"), ("init_std", float("inf"), "positive"),
    ("dropout", 1.0, "below 1"), ("dropout", -0.1, "at least 0"),
    ("dropout", float("nan"), "at least 0"), ("qk_norm", None, "True, False"),
])  # fmt: skip
def test_invalid_configs_are_refused_with_field_value_and_rule(field, value, rule):
    with pytest.raises(ValueError) as error:
        GPTConfig(**(SMALL | {field: value}))
    message = str(error.value)
    assert message.startswith(f"{field}={value!r}: ") and rule in message
    assert "\n" not in message


def test_config_round_trip():
    import json

    cfg = GPTConfig(**SMALL, n_kv_heads=2, dropout=0.1)
    assert GPTConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    with pytest.raises(ValueError, match="unknown fields: d_modell"):
        GPTConfig.from_dict(cfg.to_dict() | {"d_modell": 3})
    with pytest.raises(ValueError, match="kind='other'"):
        GPTConfig.from_dict(cfg.to_dict() | {"kind": "other"})
