"""Losses against torch and mlx.nn, errors against the bootstrap, evaluation against loops."""
import json
import math
import pickle
import time

import llmfs  # noqa: F401  (before mlx)
from llmfs.evaluation.metrics import (
    IGNORE,
    EvalResult,
    Measure,
    bits_per_byte,
    evaluate_documents,
    evaluate_loss,
    floor_ratio,
    mfu,
    perplexity,
    ratio,
    token_loss,
    token_nll,
    tokens_per_second,
    validity,
)
from llmfs.model.ngram import NGram
from llmfs.model.transformer import GPT, GPTConfig
from llmfs.tokenizer.vocab import CharTokenizer
from llmfs.training.data_loader import eval_batches

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest


def case(seed, shape=(3, 7), vocab=11, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(*shape, vocab)) * scale).astype(np.float32)
    targets = rng.integers(vocab, size=shape).astype(np.int32)
    targets[rng.random(shape) < 0.3] = IGNORE
    return logits, targets


@pytest.mark.parametrize("scale", [0.1, 3, 100])
def test_loss_and_gradient_equal_torch(scale):
    torch = pytest.importorskip("torch")
    for seed in range(5):
        logits, targets = case(seed, scale=scale)
        t = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(
            t.reshape(-1, 11), torch.tensor(targets).long().reshape(-1),
            ignore_index=-100, reduction="sum")
        loss.backward()
        (value, count), grad = mx.value_and_grad(
            lambda z: token_loss(z, mx.array(targets)))(mx.array(logits))
        assert value.dtype == mx.float32 and count.item() == (targets != IGNORE).sum()
        assert value.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(np.array(grad), t.grad.numpy(), atol=1e-6)


def test_nll_equals_mlx():
    logits, targets = case(1)
    z, y = mx.array(logits), mx.array(targets)
    theirs = nn.losses.cross_entropy(z, mx.maximum(y, 0)) * (y != IGNORE)
    assert mx.allclose(token_nll(z, y), theirs, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    logits, targets = case(2, (64, 32), 50)
    z, y = mx.array(logits).astype(dtype), mx.array(targets)
    exact = token_loss(z.astype(mx.float32), y)[0].item()
    assert token_loss(z, y)[0].item() == pytest.approx(exact, rel=1e-6)
    grad = mx.grad(lambda z: token_loss(z, y)[0])(z)
    assert grad.dtype == dtype


def test_extreme_logits():
    z = mx.array([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]])
    y = mx.array([0, 0])
    nll = token_nll(z, y)
    assert nll.tolist() == [0.0, 2e4]
    grad = mx.grad(lambda z: token_loss(z, y)[0])(z)
    assert mx.allclose(grad, mx.array([[0.0, 0, 0], [-1, 0, 1]]))


def test_ignored_targets_count_for_nothing():
    logits, targets = case(3)
    z, y = mx.array(logits), mx.full(targets.shape, IGNORE)
    total, count = token_loss(z, y)
    assert (total.item(), count.item()) == (0, 0)
    assert not mx.grad(lambda z: token_loss(z, y)[0])(z).any()
    other = mx.where(mx.array(targets)[..., None] == IGNORE, mx.array(1e3), z)
    y = mx.array(targets)
    assert token_loss(z, y)[0].item() == token_loss(other, y)[0].item()


def test_inside_checkpointed_function():
    logits, targets = case(4)
    z, y = mx.array(logits), mx.array(targets)

    def loss(z):
        return token_loss(z, y)[0]

    assert mx.allclose(mx.grad(mx.checkpoint(loss))(z), mx.grad(loss)(z))


def test_measure_is_a_float():
    m = Measure(1.23456, 0.0123)
    assert m == 1.23456 and isinstance(m, float) and repr(m) == str(m) == "1.235 ± 0.012"
    assert f"{m:.2f}" == "1.23" and json.loads(json.dumps({"m": m})) == {"m": 1.23456}
    again = pickle.loads(pickle.dumps(m))
    assert again == m and again.error == m.error
    assert repr(Measure(2)) == "2.0000" and repr(Measure(123.4, 12)) == "123 ± 12"


def test_error_of_a_mean_is_the_classical_one():
    x = np.random.default_rng(0).normal(5, 2, 200)
    m = ratio(x, np.ones(200))
    assert m == pytest.approx(x.mean())
    assert m.error == pytest.approx(x.std(ddof=1) / math.sqrt(200))


@pytest.mark.parametrize("measure", [perplexity, bits_per_byte, floor_ratio])
def test_errors_equal_bootstrap(measure):
    rng = np.random.default_rng(1)
    size = rng.integers(20, 300, 300)
    nll = size * rng.gamma(16, 0.05, 300) + rng.normal(0, 3, 300)
    pick = rng.integers(300, size=(2000, 300))
    scatter = np.std([measure(nll[i].sum(), size[i].sum()) for i in pick])
    assert measure(nll, size).error == pytest.approx(scatter, rel=0.08)


def test_known_numbers():
    assert perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8)
    assert floor_ratio([1.0, 2], [1.0, 2]) == 1 and floor_ratio([1.0, 2], [1.0, 2]).error == 0
    assert math.isnan(bits_per_byte(3.0, 2).error)
    assert mfu(1000, 6e9, 12e12) == 0.5
    for bad in (lambda: bits_per_byte(1.0, 0), lambda: ratio([], []), lambda: mfu(1, 1, 0)):
        with pytest.raises(ValueError):
            bad()


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc. é"), n)) for n in rng.integers(1, 60, 30)]
    tok = CharTokenizer("abc. é")
    mx.random.seed(0)
    cfg = GPTConfig(vocab_size=tok.vocab_size, n_layers=2, d_model=32, n_heads=2,
                    max_seq_len=64, dropout=0.3)
    return texts, tok, GPT(cfg)


def ids_of(tok, text):
    return np.concatenate([[tok.eot_id], tok.encode_array(text), [tok.eot_id]])


def stream(tok, texts):
    return np.concatenate([[tok.eot_id]] + [ids_of(tok, t)[1:] for t in texts])


def by_loop(model, ids):
    "Loss of one document, from log-softmax and nothing of ours."
    x = mx.array(ids[None])
    model.eval()
    logits = model(x[:, :-1])[0].astype(mx.float32)
    logp = nn.log_softmax(logits, axis=-1)
    model.train()
    return -mx.take_along_axis(logp, x[0, 1:, None], axis=-1).sum().item()


def test_documents_equal_a_loop(world):
    texts, tok, model = world
    model.train()
    r = evaluate_documents(model, tok, texts, batch_size=7)
    assert model.training and model.layers[0].dropout.training
    for i, t in enumerate(texts):
        assert r.nll[i] == pytest.approx(by_loop(model, ids_of(tok, t)), rel=1e-5)
        assert r.n_bytes[i] == len(t.encode()) and r.tokens[i] == len(t) + 1
    again = evaluate_documents(model, tok, texts, batch_size=3)
    np.testing.assert_allclose(again.nll, r.nll, rtol=1e-5)


def test_batches_equal_documents(world):
    texts, tok, model = world
    alone = evaluate_documents(model, tok, texts)
    packed = evaluate_loss(model, eval_batches(stream(tok, texts), 3, 64, "documents"))
    assert packed.n_tokens == alone.n_tokens and packed.loss == pytest.approx(alone.loss)
    assert packed.nll_nats == pytest.approx(alone.nll_nats, rel=1e-5)
    assert packed.tokens_per_second > 0
    model.eval()
    windows = evaluate_loss(model, eval_batches(stream(tok, texts), 3, 64))
    assert windows.n_tokens == alone.n_tokens and not model.training
    model.train()


def test_long_documents_are_cut(world):
    texts, tok, model = world
    r = evaluate_documents(model, tok, texts[:5], seq_len=10)
    for i, t in enumerate(texts[:5]):
        ids = ids_of(tok, t)
        pieces = [ids[a:a + 11] for a in range(0, len(ids) - 1, 10)]
        assert r.nll[i] == pytest.approx(sum(by_loop(model, p) for p in pieces), rel=1e-5)


def test_ngram_is_measured_alike(world):
    texts, tok, _ = world
    model = NGram(3, tok.vocab_size, tok.eot_id).fit(stream(tok, texts[:20]))
    r = evaluate_documents(model, tok, texts[20:])
    assert r.nll_nats == pytest.approx(-model.logprobs(stream(tok, texts[20:])).sum())
    assert r.n_tokens == sum(len(t) + 1 for t in texts[20:])


def test_nothing_to_evaluate(world):
    texts, tok, model = world
    with pytest.raises(ValueError, match="no batch"):
        evaluate_loss(model, [])
    with pytest.raises(ValueError, match="no documents"):
        evaluate_documents(model, tok, [])


class Grammar:
    "Accepts texts of a's; the first other letter is the kind of mistake."

    def explain(self, text):
        wrong = text.strip("a")
        return type("Mistake", (), {"kind": wrong[0]}) if wrong else None


def test_validity():
    v = validity(["a", "aa", "ab", "b", "ac", "a"], Grammar(), seen={"a"})
    assert (v.n, v.valid, v.novel) == (6, 3, 1)
    assert list(v.mistakes.items()) == [("b", 2), ("c", 1)]
    assert v.share == 0.5 and v.novel_share == pytest.approx(1 / 3)
    none = validity(["b"] * 100, Grammar())
    assert none.share == 0 and 0 < none.share.error < 0.03 and math.isnan(none.novel_share)
    share = validity(["a"] * 300 + ["b"] * 100, Grammar()).share
    assert share.error == pytest.approx(math.sqrt(0.75 * 0.25 / 400), rel=0.02)


def test_validity_of_real_stories():
    from itertools import islice

    from llmfs.data.stories import Stories
    stories = Stories()
    texts = [s.text for s in islice(stories.stream("validation", seed=1), 20)]
    assert validity(texts, stories).valid == 20
    spoiled = validity([t[:-20] for t in texts], stories)
    assert spoiled.valid == 0 and sum(spoiled.mistakes.values()) == 20


def test_speed_waits_for_the_result():
    calls = []

    def step():
        calls.append(1)
        time.sleep(0.02)
        return mx.zeros(3) + 1

    assert 30 < tokens_per_second(step, 1, repeats=3) <= 50 and len(calls) == 4


def test_result_totals():
    r = EvalResult(np.array([1.0, 3]), np.array([2, 2]), None, 0.5)
    assert (r.nll_nats, r.n_tokens, r.loss, r.tokens_per_second) == (4, 4, 1, 8)
