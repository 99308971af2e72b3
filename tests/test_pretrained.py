"Folders of Hugging Face: theirs read by us, ours read by mlx-lm and transformers, and bad ones."

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import llmfs  # noqa: I001
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from llmfs.model import files
from llmfs.model.files import safetensors_header, write_safetensors
from llmfs.model.pretrained import (
    export_shape,
    from_config,
    read_pretrained,
    to_config,
    why_no_shape,
    write_pretrained,
)
from llmfs.model.transformer import GPT, PRESETS, GPTConfig, preset
from llmfs.tokenizer.exchange import PretrainedError, from_tokenizer_json, tokenizer_json
from llmfs.tokenizer.vocab import CharTokenizer, train_tokenizer

SMALL = dict(vocab_size=61, n_layers=2, d_model=32, n_heads=4, max_seq_len=96, init_std=0.2)
GPT2 = dict(
    norm="layernorm", norm_eps=1e-5, activation="gelu", positions="learned",
    qk_norm=False, bias=True,
)  # fmt: skip
FAMILIES = {"gpt2": GPT2, "llama": dict(qk_norm=False, rope_theta=5000.0), "qwen3": dict(head_dim=16)}
LAYOUTS = [("gpt2", 4, True)]
LAYOUTS += [(f, G, tied) for f in ("llama", "qwen3") for G in (4, 2, 1) for tied in (True, False)]
TEXT = "The cat sat on the mat; the dog, naïve as ever, did not. 1, 2, 3!\n" * 3
START = [3, 1, 4, 1, 5]


@pytest.fixture(autouse=True)
def no_compilation():
    "mlx-lm compiles small functions, which takes seconds on a CPU."
    mx.disable_compile()
    yield
    mx.enable_compile()


def build(family, seed=0, **overrides):
    "A small model with weights large enough that mistakes show."
    mx.random.seed(seed)
    model = GPT(GPTConfig(**(SMALL | FAMILIES[family] | overrides)))
    noise = lambda w: w + 0.1 * mx.random.normal(w.shape)  # noqa: E731
    model.update(tree_map(noise, model.parameters()))
    return model.eval()


def gap(a, b):
    return np.abs(np.array(a) - np.array(b)).max()


def tokens(length=23, vocab=61):
    return np.random.default_rng(1).integers(0, vocab, (2, length)).astype(np.int32)


def continued(model, ids, n=64):
    "The likeliest continuation, with our cache."
    cache, out, x = model.make_cache(), [], mx.array([ids])
    for _ in range(n):
        out.append(mx.argmax(model(x, cache=cache)[0, -1]).item())
        x = mx.array([out[-1:]])
    return out


def in_transformers(folder, ids):
    "Logits, and the likeliest continuation of START."
    torch, tr = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = tr.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert next(model.parameters()).dtype == torch.float32
    start = torch.tensor([START])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()).logits.numpy()
        more = model.generate(start, do_sample=False, max_new_tokens=64, min_new_tokens=64)
    return logits, more[0, len(START) :].tolist()


def in_mlx_lm(folder, ids):
    "The same in mlx-lm."
    pytest.importorskip("mlx_lm")
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    steps = generate_step(mx.array(START), model, max_tokens=64)
    return model(mx.array(ids)), [int(token) for token, _ in steps]


# ---- ours, read by others


@pytest.mark.parametrize("family, heads, tied", LAYOUTS)
@pytest.mark.parametrize("reader", [in_transformers, in_mlx_lm])
def test_others_read_what_we_write(family, heads, tied, reader, tmp_path):
    model = build(family, n_kv_heads=heads, tie_embeddings=tied)
    assert write_pretrained(tmp_path / "m", model) == family
    logits, more = reader(tmp_path / "m", tokens())
    assert gap(logits, model(mx.array(tokens()))) < 1e-4
    assert more == continued(model, START)
    assert len(set(more)) > 3  # a model that repeats one token would agree by chance


@pytest.mark.parametrize("reader", [in_transformers, in_mlx_lm])
def test_shards_biases_and_odd_widths_are_read_too(reader, tmp_path):
    model = build("llama", bias=True, head_dim=12, d_ff=40, norm_eps=1e-4)
    write_pretrained(tmp_path / "m", model, max_shard_bytes=9000)
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 3
    logits, more = reader(tmp_path / "m", tokens())
    assert gap(logits, model(mx.array(tokens()))) < 1e-4 and more == continued(model, START)


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_agree(kind, family, tmp_path):
    tr = pytest.importorskip("transformers")
    load = pytest.importorskip("mlx_lm").load
    tok = train_tokenizer([TEXT], 300) if kind == "bpe" else CharTokenizer(TEXT)
    model = build(family, vocab_size=tok.vocab_size)
    write_pretrained(tmp_path / "m", model, tok)
    theirs = tr.AutoTokenizer.from_pretrained(tmp_path / "m")
    mlx_model, mlx_tok = load(str(tmp_path / "m"))
    text = " The  dog's mat, naïve\n 12!" + ("日本 \t" if kind == "bpe" else "")
    ids = tok.encode(text)
    for t in (theirs, mlx_tok):
        assert t.encode(text) == [tok.eot_id, *ids]
        assert t.encode(text, add_special_tokens=False) == ids
        assert t.decode(ids) == tok.decode(ids)
        assert t.eos_token_id == t.bos_token_id == tok.eot_id
    assert mlx_tok.eos_token_ids == {tok.eot_id}
    assert gap(mlx_model(mx.array([ids])), model(mx.array([ids]))) < 1e-4
    from llmfs.evaluation.generate import generate

    from mlx_lm import generate as mlx_generate

    ours = generate(model, tok, text, temperature=0, max_tokens=20)
    assert mlx_generate(mlx_model, mlx_tok, text, max_tokens=20) == ours.text


@pytest.mark.parametrize("precision, most", [("float32", 0), ("float16", 4e-3), ("bfloat16", 4e-2)])
def test_precisions(precision, most, tmp_path):
    "Stored in fewer bits: read by mlx-lm as such, and by us rounded."
    model, ids = build("qwen3", init_std=0.02), mx.array(tokens())
    write_pretrained(tmp_path / "m", model, precision=precision)
    held = mx.load(str(tmp_path / "m" / "model.safetensors"))
    assert {w.dtype for w in held.values()} == {getattr(mx, precision)}
    back = read_pretrained(tmp_path / "m").model
    assert {w.dtype for _, w in tree_flatten(back.parameters())} == {mx.float32}
    scale = float(mx.abs(model(ids)).max())
    assert gap(back(ids), model(ids)) <= most * scale


def test_the_file_is_what_the_library_writes(tmp_path):
    st = pytest.importorskip("safetensors")
    model = build("gpt2")
    write_pretrained(tmp_path / "m", model)
    with st.safe_open(tmp_path / "m" / "model.safetensors", "numpy") as f:
        assert f.metadata() == {"format": "pt"}
        table = np.array(model.embed_tokens.weight)
        assert np.array_equal(f.get_tensor("wte.weight"), table)
        assert "lm_head.weight" not in f.keys() and len(f.keys()) == 2 + 2 + 12 * 2
    text = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert (8 + struct.unpack("<Q", text[:8])[0]) % 8 == 0


def test_what_we_write_we_read(tmp_path):
    tok = train_tokenizer([TEXT], 280)
    for family, heads, tied in LAYOUTS:
        out = tmp_path / f"{family}{heads}{tied}"
        model = build(family, n_kv_heads=heads, tie_embeddings=tied, vocab_size=280)
        write_pretrained(out, model, tok, max_shard_bytes=50_000)
        back = read_pretrained(out)
        assert back.notes == [] and back.tokenizer.hash == tok.hash
        assert back.model.cfg == GPTConfig(**(model.cfg.__dict__ | {"init_std": 0.02}))
        ours, theirs = (dict(tree_flatten(m.parameters())) for m in (model, back.model))
        assert all(mx.array_equal(ours[k], theirs[k]) for k in ours | theirs)


# ---- theirs, read by us


def theirs(family, heads, tied, **more):
    "A random model made by transformers."
    torch, tr = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = dict(bos_token_id=None, eos_token_id=None)
    if family == "gpt2":
        config = tr.GPT2Config(
            vocab_size=61, n_positions=96, n_embd=32, n_layer=2, n_head=4,
            initializer_range=0.2, tie_word_embeddings=tied, **ids, **more,
        )  # fmt: skip
    else:
        kind = tr.LlamaConfig if family == "llama" else tr.Qwen3Config
        config = kind(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=heads, initializer_range=0.2,
            max_position_embeddings=96, tie_word_embeddings=tied, **ids,
            **({"head_dim": 16} if family == "qwen3" else {}) | more,
        )  # fmt: skip
    model = tr.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for w in model.parameters():
            w += 0.1 * torch.randn_like(w)
    return model


@pytest.mark.parametrize("family, heads, tied", [*LAYOUTS, ("gpt2", 4, False)])
def test_we_read_what_transformers_writes(family, heads, tied, tmp_path):
    other = theirs(family, heads, tied)
    other.save_pretrained(tmp_path, **({"max_shard_size": "9KB"} if heads == 2 else {}))
    assert (tmp_path / "model.safetensors").exists() == (heads != 2)
    logits, more = in_transformers(tmp_path, tokens())
    model, tokenizer, notes = read_pretrained(tmp_path)
    assert gap(model(mx.array(tokens())), logits) < 1e-4
    assert continued(model, START) == more
    assert tokenizer is None and "tokenizer.json" in notes[0]
    assert model.cfg.tie_embeddings == tied


@pytest.mark.parametrize("family, more", [
    ("llama", dict(attention_bias=True, mlp_bias=True)),
    ("llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 77.0}, rms_norm_eps=1e-2)),
    ("qwen3", dict(rope_parameters={"rope_type": "default", "rope_theta": 77.0})),
    ("gpt2", dict(n_inner=40, layer_norm_epsilon=1e-2, activation_function="gelu_pytorch_tanh")),
])  # fmt: skip
def test_less_common_settings_are_read(family, more, tmp_path):
    other = theirs(family, 2, True, **more)
    other.save_pretrained(tmp_path)
    logits, _ = in_transformers(tmp_path, tokens())
    assert gap(read_pretrained(tmp_path).model(mx.array(tokens())), logits) < 1e-4


def test_prefixes_constants_and_stored_heads_of_old_files(tmp_path):
    model = build("gpt2")
    write_pretrained(tmp_path / "m", model)
    path = tmp_path / "m" / "model.safetensors"
    held = {f"transformer.{k}": w for k, w in mx.load(str(path)).items()}
    held["transformer.h.0.attn.bias"] = mx.ones((1, 1, 96, 96), mx.uint8)
    held["transformer.h.1.attn.masked_bias"] = mx.array(-1e4)
    held["lm_head.weight"] = held["transformer.wte.weight"]
    mx.save_safetensors(str(path), held, {"format": "pt"})
    ids = mx.array(tokens())
    assert mx.array_equal(read_pretrained(tmp_path / "m").model(ids), model(ids))
    held["lm_head.weight"] = held["lm_head.weight"] + 1
    mx.save_safetensors(str(path), held, {"format": "pt"})
    with pytest.raises(PretrainedError, match="lm_head.weight is not wte.weight"):
        read_pretrained(tmp_path / "m")


@pytest.mark.parametrize("pattern", [None, r"\p{N}{1,3}|[^\s\p{N}]+|\s+"])
def test_tokenizers_trained_elsewhere(pattern):
    tk = pytest.importorskip("tokenizers")
    pre = tk.pre_tokenizers
    other = tk.Tokenizer(tk.models.BPE())
    other.pre_tokenizer, other.decoder = pre.ByteLevel(add_prefix_space=False), tk.decoders.ByteLevel()
    if pattern:
        pytest.importorskip("regex")
        cut = pre.Split(tk.Regex(pattern), "isolated")
        level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        other.pre_tokenizer = pre.Sequence([cut, level])
    trainer = tk.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    other.train_from_iterator([TEXT], trainer)
    ours = from_tokenizer_json(json.loads(other.to_str()))
    text = "The dog isn't on the mat, 12345 naïve 日本.\n\n"
    assert ours.encode(text) == other.encode(text).ids and ours.decode(ours.encode(text)) == text
    assert ours.eot_id == 0


def broken(data, *path, value):
    "A copy of JSON data in which one place is another value."
    data = json.loads(json.dumps(data))
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


@pytest.mark.parametrize("path, value, why", [
    (("model", "type"), "WordPiece", "WordPiece"),
    (("model", "byte_fallback"), True, "byte-level"),
    (("normalizer",), {"type": "Lowercase"}, "Lowercase"),
    (("model", "end_of_word_suffix"), "</w>", "ends of words"),
    (("pre_tokenizer",), {"type": "Metaspace"}, "Metaspace"),
    (("pre_tokenizer", "add_prefix_space"), True, "cuts words"),
    (("model", "merges", 0), ["a", "b"], "merges"),
    (("model", "merges"), [], "merges"),
    (("pre_tokenizer",), None, "cuts words"),
    (("added_tokens", 0, "id"), 1 << 40, "no id"),
    (("model", "vocab", "a"), -1, "no id"),
])  # fmt: skip
def test_tokenizers_that_are_not_ours_say_why(path, value, why, tmp_path):
    data = broken(tokenizer_json(train_tokenizer([TEXT], 280)), *path, value=value)
    with pytest.raises(ValueError, match=why):
        from_tokenizer_json(data)
    write_pretrained(tmp_path / "m", build("llama"))
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(data))
    found = read_pretrained(tmp_path / "m")
    assert found.tokenizer is None and why in found.notes[0]


def test_another_end_of_text_is_renamed(tmp_path):
    tok = train_tokenizer([TEXT], 280, ("<|end_of_text|>", "<s>"))
    write_pretrained(tmp_path / "m", build("llama", vocab_size=280), tok)
    path = tmp_path / "m" / "config.json"
    eos = tok.special_tokens["<|end_of_text|>"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [eos, 3]}))
    found = read_pretrained(tmp_path / "m")
    assert found.tokenizer.eot_id == eos and "<|end_of_text|>" in found.notes[0]
    assert found.tokenizer.special_tokens == {"<|endoftext|>": eos, "<s>": eos + 1}


def test_an_end_of_turn_beside_the_end_of_text_is_noted(tmp_path):
    "As in Qwen3, whose added tokens are not in the vocabulary."
    tok = train_tokenizer([TEXT], 280, ("<|endoftext|>", "<|im_end|>"))
    write_pretrained(tmp_path / "m", build("qwen3", vocab_size=280), tok)
    config, path = tmp_path / "m" / "config.json", tmp_path / "m" / "tokenizer.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 279}))
    data = json.loads(path.read_text())
    for name in tok.special_tokens:
        del data["model"]["vocab"][name]
    path.write_text(json.dumps(data | {"normalizer": {"type": "NFC"}}))
    found = read_pretrained(tmp_path / "m")
    assert found.tokenizer.hash == tok.hash
    assert "<|im_end|>" in found.notes[0] and "NFC" in found.notes[1]


def test_every_pair_that_makes_a_token_may_be_listed():
    "As in Llama 3, made from a file of ranks alone."
    tok = train_tokenizer([Path(__file__).read_text()], 800)
    data = tokenizer_json(tok)
    vocab, merges = data["model"]["vocab"], []
    for token in sorted(set(vocab) - set(tok.special_tokens), key=vocab.get):
        cuts = [[token[:i], token[i:]] for i in range(1, len(token))]
        merges += [pair for pair in cuts if set(pair) <= vocab.keys()]
    assert len(merges) > len(data["model"]["merges"])
    data["model"]["merges"] = merges
    assert from_tokenizer_json(data).hash == tok.hash
    data["model"]["merges"] = merges[::-1]
    with pytest.raises(ValueError, match="merges"):
        from_tokenizer_json(data)


# ---- which configs have a shape


def test_whatever_is_trained_by_default_has_a_shape():
    from llmfs.quickstart import Quickstart

    dense = [size for size in PRESETS if not size.startswith("moe-")]  # mixtures: test_moe
    assert [export_shape(preset(size)) for size in dense] == ["qwen3"] * 6
    q = Quickstart()
    assert export_shape(GPTConfig(n_layers=q.n_layers, d_model=q.d_model, n_heads=q.n_heads, d_ff=q.d_ff))


@pytest.mark.parametrize("family, field, value", [
    ("qwen3", "activation", "relu2"), ("qwen3", "positions", "sinusoidal"),
    ("llama", "positions", "none"), ("llama", "norm", "layernorm"), ("qwen3", "bias", True),
    ("gpt2", "tie_embeddings", False), ("gpt2", "n_kv_heads", 2), ("gpt2", "d_ff", 96),
    ("gpt2", "head_dim", 16), ("gpt2", "bias", False), ("gpt2", "activation", "swiglu"),
])  # fmt: skip
def test_a_config_without_a_shape_is_refused_by_name(family, field, value, tmp_path):
    model = build(family, **{field: value})
    assert export_shape(model.cfg) is None
    assert f"{field}={value!r}" in why_no_shape(model.cfg)
    with pytest.raises(ValueError, match=field):
        write_pretrained(tmp_path / "m", model)
    assert not list(tmp_path.iterdir())


def test_another_kind_of_config_has_no_shape():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Odd(GPTConfig):
        kind = "odd"

    assert export_shape(Odd()) is None and "kind='odd'" in why_no_shape(Odd())


def test_config_says_everything_that_loaders_disagree_about():
    config = to_config(GPTConfig(**SMALL, qk_norm=False, tie_embeddings=False, rope_theta=77.0))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 77.0
    assert config["tie_word_embeddings"] is False and config["eos_token_id"] is None


@pytest.mark.parametrize("family, change, why", [
    ("llama", {"model_type": "mamba"}, "mamba"), ("llama", {"model_type": None}, "model_type"),
    ("llama", {"model_type": ["llama"]}, "model_type"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"hidden_size": "32"}, "d_model='32'"),
    ("llama", {"num_attention_heads": 0}, "n_heads=0"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_heads=3"),
    ("llama", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("llama", {"rope_theta": 1.0}, "rope_theta"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0}}, "llama3"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_embeddings='yes'"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3", {"layer_types": ["sliding_attention"]}, "sliding_attention"),
    ("qwen3", {"rope_theta": None, "rope_parameters": None}, "rope_theta is missing"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function='gelu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ("gpt2", {"n_embd": 33}, "d_model=33"),
])  # fmt: skip
def test_foreign_configs_are_refused_by_name(family, change, why, tmp_path):
    write_pretrained(tmp_path / "m", build(family))
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PretrainedError, match=why) as e:
        read_pretrained(tmp_path / "m")
    assert str(tmp_path / "m") in str(e.value) and "\n" not in str(e.value)


def test_ties_that_are_not_stated_follow_the_weights():
    config = to_config(GPTConfig(**SMALL))
    del config["tie_word_embeddings"]
    assert from_config(config)[1].tie_embeddings
    assert not from_config(config, has_head=True)[1].tie_embeddings


# ---- bad folders


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_pretrained(folder / "one", build("llama"), CharTokenizer("abc"))
    write_pretrained(folder / "many", build("llama"), max_shard_bytes=9000)
    return folder


def edit(change):
    "A breaker of model.safetensors: change a dict of its arrays."

    def run(m):
        path = str(m / "model.safetensors")
        held = dict(mx.load(path))
        mx.eval(held)
        change(held)
        mx.save_safetensors(path, held)

    return run


def header(change):
    "A breaker of the header of model.safetensors."

    def run(m):
        path = m / "model.safetensors"
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        h = json.loads(data[8:end])
        change(h)
        text = json.dumps(h).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return run


def index(change):
    "A breaker of the index."

    def run(m):
        path = m / "model.safetensors.index.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return run


def cut(name, n):
    return lambda m: (m / name).write_bytes((m / name).read_bytes()[:n])


def only_a_pickle(m):
    (m / "model.safetensors").unlink()
    (m / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/llmfs-test-bomb",)


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
BAD = {
    "missing tensor": ("one", edit(lambda h: h.pop(UP)), f"lacks {UP}"),
    "extra tensor": ("one", edit(lambda h: h.update(extra=h[NORM])), "holds extra"),
    "a third layer": ("one", edit(lambda h: h.update({"model.layers.2.mlp.up_proj.weight": h[UP]})),
                      "model.layers.2.mlp"),
    "transposed": ("one", edit(lambda h: h.update({UP: h[UP].T})), f"{UP} has shape"),
    "one dimension more": ("one", edit(lambda h: h.update({NORM: h[NORM][None]})), f"{NORM} has"),
    "whole numbers": ("one", edit(lambda h: h.update({UP: h[UP].astype(mx.int32)})), f"{UP} holds I32"),
    "not finite": ("one", edit(lambda h: h.update({UP: h[UP] / 0})), f"{UP} holds numbers"),
    "stored head": ("one", edit(lambda h: h.update({"lm_head.weight": h[UP]})), "lm_head.weight has"),
    "cut off": ("one", cut("model.safetensors", -1), "is cut off: "),
    "cut in the header": ("one", cut("model.safetensors", 100), "cut off"),
    "five bytes": ("one", cut("model.safetensors", 5), "cut off"),
    "empty": ("one", cut("model.safetensors", 0), "cut off"),
    "a huge header": ("one", lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 100), "cut off"),
    "a header that is no JSON": ("one", lambda m: (m / "model.safetensors").write_bytes(
        (5).to_bytes(8, "little") + b"hello"), "damaged header"),
    "a deep header": ("one", lambda m: (m / "model.safetensors").write_bytes(
        (200_000).to_bytes(8, "little") + b"[" * 200_000), "damaged header"),
    "wrong place": ("one", header(lambda h: h[UP].update(data_offsets=[0, 8])), f"{UP} of shape"),
    "negative place": ("one", header(lambda h: h[UP].update(data_offsets=[-8, 8])), f"{UP} has an"),
    "place beyond the end": ("one", header(lambda h: h[NORM].update(
        data_offsets=[1 << 40, (1 << 40) + 128])), f"cut off: {NORM}"),
    "negative shape": ("one", header(lambda h: h[NORM].update(shape=[-4, -8])), f"{NORM} has an"),
    "no place": ("one", header(lambda h: h[NORM].pop("data_offsets")), "damaged header"),
    "unknown type": ("one", header(lambda h: h[NORM].update(dtype="F8_E4M3")), f"{NORM} holds F8"),
    "no weights": ("one", lambda m: (m / "model.safetensors").unlink(), "model.safetensors"),
    "only a pickle": ("one", only_a_pickle, "could run code"),
    "no config": ("one", lambda m: (m / "config.json").unlink(), "config.json"),
    "config is no JSON": ("one", cut("config.json", 30), "not JSON"),
    "config is a list": ("one", lambda m: (m / "config.json").write_text("[]"), "object"),
    "tokenizer is no JSON": ("one", cut("tokenizer.json", 30), "tokenizer.json is damaged"),
    "tokenizer without a model": ("one", lambda m: (m / "tokenizer.json").write_text("{}"), "damaged"),
    "a million layers": ("one", lambda m: (m / "config.json").write_text(
        (m / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1000000')),
        "asks for"),
    "a shard is missing": ("many", lambda m: (m / "model-00002-of-00012.safetensors").unlink(),
                           "model-00002"),
    "a shard is cut": ("many", cut("model-00002-of-00012.safetensors", 3000), "cut off"),
    "a name twice": ("many", lambda m: shutil.copy(m / "model-00001-of-00012.safetensors",
                                                   m / "model-00002-of-00012.safetensors"), "too"),
    "index leaves the folder": ("many", index(lambda d: d["weight_map"].update(
        {NORM: "../one/model.safetensors"})), "no file of this folder"),
    "index names an absolute path": ("many", index(lambda d: d["weight_map"].update(
        {NORM: "/etc/passwd"})), "/etc/passwd"),
    "index names a pickle": ("many", index(lambda d: d["weight_map"].update({NORM: "x.bin"})), "x.bin"),
    "index names a number": ("many", index(lambda d: d["weight_map"].update({NORM: 3})), NORM),
    "index without a map": ("many", index(dict.clear), "weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_named_in_one_line(name, good, tmp_path):
    kind, breaks, why = BAD[name]
    m = tmp_path / "m"
    shutil.copytree(good / kind, m)
    read_pretrained(m)
    breaks(m)
    with pytest.raises((PretrainedError, FileNotFoundError)) as e:
        read_pretrained(m)
    assert why in str(e.value) and str(m) in str(e.value) and "\n" not in str(e.value)
    assert not os.path.exists("/tmp/llmfs-test-bomb")


def test_folders_that_are_none(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="config.json"):
            read_pretrained(path)
    (tmp_path / "file").write_text("hello")
    with pytest.raises(FileNotFoundError, match="Hugging Face folder"):
        read_pretrained(tmp_path / "file")


def test_any_damage_is_an_error_or_harmless(good, tmp_path):
    "Bytes changed at random: another model perhaps, but no other exception and no other shape."
    shutil.copytree(good / "one", tmp_path / "m")
    rng = np.random.default_rng(0)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        path = tmp_path / "m" / name
        data, refused = path.read_bytes(), 0
        for _ in range(60):
            bad = bytearray(data)
            at = rng.integers(0, min(len(bad), 2500), 2)
            bad[at[0]], bad[at[1]] = rng.integers(0, 256, 2)
            path.write_bytes(bad if rng.random() < 0.8 else bad[: at[0]])
            try:
                read_pretrained(tmp_path / "m")
            except (PretrainedError, FileNotFoundError) as e:
                assert "\n" not in str(e)
                refused += 1
        path.write_bytes(data)
        assert refused > 10


# ---- writing is safe


def test_an_older_model_is_replaced_only_if_asked(tmp_path):
    out = tmp_path / "a" / "m"
    a, b = build("llama"), build("qwen3")
    write_pretrained(out, a, max_shard_bytes=9000)
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_pretrained(out, b)
    assert read_pretrained(out).model.cfg.qk_norm is False
    write_pretrained(out, b, overwrite=True)
    assert read_pretrained(out).model.cfg.qk_norm is True
    assert len(list(out.iterdir())) == 3 and [p.name for p in out.parent.iterdir()] == ["m"]


def test_other_peoples_files_are_never_replaced(tmp_path):
    model = build("llama")
    write_pretrained(tmp_path / "m", model)
    (tmp_path / "m" / "thesis.txt").write_text("three years")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        write_pretrained(tmp_path / "m", model, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        write_pretrained(tmp_path / "m" / "thesis.txt", model, overwrite=True)
    (tmp_path / "empty").mkdir()
    write_pretrained(tmp_path / "empty", model)
    assert read_pretrained(tmp_path / "empty")


@pytest.mark.parametrize("when", ["write_json", "to_disk", "folder_to_disk", "_move"])
def test_a_write_that_breaks_off_leaves_the_old_model(when, tmp_path, monkeypatch):
    model = build("llama")
    write_pretrained(tmp_path / "m", model)

    def fail(*args):
        raise OSError(28, "No space left on device")

    from llmfs.model import pretrained

    for module in (files, pretrained):
        if hasattr(module, when):
            monkeypatch.setattr(module, when, fail)
    with pytest.raises(OSError, match="No space"):
        write_pretrained(tmp_path / "m", build("qwen3"), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert read_pretrained(tmp_path / "m").model.cfg.qk_norm is False


def test_a_rename_that_fails_brings_the_old_model_back(tmp_path, monkeypatch):
    write_pretrained(tmp_path / "m", build("llama"))
    real = os.rename

    def rename(a, b):
        if str(a).endswith(".part"):
            raise OSError(5, "Input/output error")
        real(a, b)

    monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        write_pretrained(tmp_path / "m", build("qwen3"), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert read_pretrained(tmp_path / "m").model.cfg.qk_norm is False


def test_bad_requests_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="precision='int8'"):
        write_pretrained(tmp_path / "m", build("llama"), precision="int8")
    with pytest.raises(ValueError, match="another model's"):
        write_pretrained(tmp_path / "m", build("llama"), train_tokenizer([TEXT], 280))
    assert not list(tmp_path.iterdir())


def test_large_tensors_stand_alone_and_order_is_kept(tmp_path):
    tensors = {f"t{i}": mx.arange(n, dtype=mx.float32) for i, n in enumerate([1, 100, 1, 1, 2])}
    files.write_shards(tmp_path, tensors, mx.float32, 8)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert [where["weight_map"][f"t{i}"][6:11] for i in range(5)] == "00001 00002 00003 00003 00004".split()
    assert where["metadata"]["total_size"] == 4 * 105
    write_safetensors(tmp_path / "e.safetensors", {"e": mx.zeros((0, 3))})
    assert safetensors_header(tmp_path / "e.safetensors")["e"].shape == (0, 3)
