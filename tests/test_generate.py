import math

import llmfs
from llmfs.evaluation import generate as G
from llmfs.evaluation.generate import Sampling, generate, generate_batch, stream
from llmfs.model.transformer import GPT, preset
from llmfs.tokenizer.vocab import train_tokenizer

import mlx.core as mx
import numpy as np
import pytest

PROBS = np.array([0.40, 0.30, 0.15, 0.10, 0.04, 0.01])


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(["the cat sat on the mat. " * 20], 300)


@pytest.fixture(scope="module")
def model(tok):
    return make_model(tok.vocab_size)


def make_model(vocab_size, **overrides):
    mx.random.seed(1)
    cfg = dict(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, max_seq_len=48)
    cfg |= dict(tie_embeddings=False, init_std=0.3)  # mass spread, but far from flat
    model = GPT(preset("tiny", vocab_size=vocab_size, **(cfg | overrides)))
    mx.eval(model.parameters())
    return model.eval()


def naive(model, ids, s, row=0, vocab=None):
    "Uncached, one text, NumPy arithmetic: ids and log-probabilities."
    ids, start, logps = list(ids), len(ids), []
    u = G.uniforms(s.seed, row, s.max_tokens)
    for t in range(s.max_tokens):
        z = np.array(model(mx.array([ids]))[0, -1].astype(mx.float32), dtype=np.float64)
        z = z[:vocab]
        logp = z - np.logaddexp.reduce(z)
        if s.repetition_penalty != 1:
            seen = np.isin(np.arange(len(z)), ids)
            bent = np.where(z > 0, z / s.repetition_penalty, z * s.repetition_penalty)
            z = np.where(seen, bent, z)
        p = reference(np.exp(z - z.max()), s)
        v = int(z.argmax()) if s.temperature == 0 else int((np.cumsum(p) <= u[t]).sum())
        ids.append(v)
        logps.append(logp[v])
    return ids[start:], logps


def reference(p, s):
    "Temperature, top-k, top-p, min-p on one distribution, by loops."
    p = np.asarray(p, dtype=np.float64) ** (1 / s.temperature if s.temperature else 1)
    order = np.argsort(-p, kind="stable")
    kept = list(order[: s.top_k] if s.top_k else order)
    nucleus, mass = [], 0.0
    for v in kept:
        if mass >= s.top_p * p[kept].sum():
            break
        nucleus.append(v)
        mass += p[v]
    out = np.zeros_like(p)
    for v in nucleus:
        if p[v] >= s.min_p * p.max() * (1 - 1e-9):
            out[v] = p[v]
    return out / out.sum()


CASES = [
    Sampling(), Sampling(temperature=0.5), Sampling(temperature=2.0), Sampling(top_k=3),
    Sampling(top_p=0.8), Sampling(min_p=0.2), Sampling(top_k=4, top_p=0.75, min_p=0.05),
    Sampling(temperature=1.5, top_k=5, top_p=0.9), Sampling(top_p=1e-9), Sampling(top_k=1),
]  # fmt: skip


@pytest.mark.parametrize("s", CASES, ids=str)
def test_filters_equal_loops(s):
    rng = np.random.default_rng(0)
    for p in [PROBS, *rng.dirichlet(np.full(40, 0.3), 20)]:
        p = p + 1e-12
        got = mx.softmax(G.shape_logits(mx.array(np.log(p).astype(np.float32))[None], s)[0])
        np.testing.assert_allclose(got, reference(p, s), atol=2e-6)


@pytest.mark.parametrize("s", CASES, ids=str)
def test_draws_pass_chi_square(s):
    n, want = 40_000, reference(PROBS, s)
    logits = G.shape_logits(mx.array(np.log(PROBS).astype(np.float32))[None], s)
    got = G.draw(mx.broadcast_to(logits, (n, 6)), mx.array(G.uniforms(7, 0, n)))
    counts = np.bincount(np.array(got), minlength=6)
    if (want > 0).sum() > 1:
        assert chi_square(counts, want) < 4
    else:
        assert counts[want > 0] == n


def chi_square(counts, want):
    "How many standard deviations too large (Wilson-Hilferty: the cube root is nearly normal)."
    alive = want > 0
    assert counts[~alive].sum() == 0
    n, k = counts.sum(), alive.sum() - 1
    chi2 = ((counts - n * want)[alive] ** 2 / (n * want[alive])).sum()
    return ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_penalized_draws_pass_chi_square(penalty):
    z, seen, n = np.array([1.5, 0.5, -0.2, -1.0, 0.0, 2.0]), np.array([1, 0, 1, 1, 0, 0], bool), 40_000
    bent = [v if not s else v / penalty if v > 0 else v * penalty for v, s in zip(z, seen)]
    s = Sampling(temperature=0.8, top_k=5, repetition_penalty=penalty)
    want = reference(np.exp(bent), s)
    logits = G.shape_logits(mx.array(z.astype(np.float32))[None], s, mx.array(seen)[None])
    got = G.draw(mx.broadcast_to(logits, (n, 6)), mx.array(G.uniforms(3, 0, n)))
    assert chi_square(np.bincount(np.array(got), minlength=6), want) < 4


@pytest.mark.parametrize("over", ["rows", "seeds"])
def test_texts_pass_chi_square(over, tok, model):
    "The first token of many texts, by rows of one call and by seeds of many calls."
    n, s = 3000 if over == "rows" else 400, Sampling(max_tokens=1, temperature=0.7, top_p=0.9, top_k=12)
    z = np.array(model(mx.array([[tok.eot_id, *tok.encode("the")]]))[0, -1, : tok.vocab_size])
    want = reference(np.exp(np.float64(z) - z.max()), s)
    if over == "rows":
        outs = generate_batch(model, tok, ["the"] * n, sampling=s, logprobs=True)
    else:
        outs = [generate(model, tok, "the", s, seed=i) for i in range(n)]
    first = [o.ids[0] if o.ids else tok.eot_id for o in outs]
    counts = np.bincount(first, minlength=tok.vocab_size)
    assert (want > 0).sum() > 3 and chi_square(counts, want) < 4


def test_greedy_ignores_what_cannot_matter(tok, model):
    plain = generate(model, tok, "the", max_tokens=20, temperature=0)
    bent = generate(model, tok, "the", max_tokens=20, temperature=0, top_k=3, top_p=0.5, min_p=0.9)
    assert plain.ids == bent.ids
    shown = generate(model, tok, "the", max_tokens=20, temperature=0, logprobs=True)
    assert shown.ids == plain.ids
    penal = generate(model, tok, "the", max_tokens=20, temperature=0, repetition_penalty=1.8)
    assert penal.ids != plain.ids and penal.ids == naive_greedy(model, tok, "the", 20, 1.8)


def naive_greedy(model, tok, prompt, n, penalty):
    s = Sampling(max_tokens=n, temperature=0, repetition_penalty=penalty)
    ids, _ = naive(model, [tok.eot_id, *tok.encode(prompt)], s, vocab=tok.vocab_size)
    return ids[: ids.index(tok.eot_id)] if tok.eot_id in ids else ids


def test_draw_never_leaves_the_support():
    logits = mx.array([[-mx.inf, 0.0, -mx.inf, 0.0, -mx.inf]])
    u = mx.array([0.0, 1e-8, 0.4999999, 0.5, 1 - 2**-22])
    assert G.draw(mx.repeat(logits, 5, axis=0), u).tolist() == [1, 1, 1, 3, 3]
    assert G.uniforms(0, 0, 1_000_000).max() < 1


def test_draw_survives_sums_that_fall(monkeypatch):
    "Parallel sums, as on a GPU, may round so that a forbidden token seems to have a share."
    right = mx.cumsum
    wrong = lambda p, axis: right(p, axis=axis) + mx.array([[0, 1e-6, 0]])
    monkeypatch.setattr(G.mx, "cumsum", wrong)
    logits = mx.array([[0.0, -mx.inf, 0.0]])
    assert G.draw(logits, mx.array([0.5 + 5e-7])).tolist() == [2]


def test_uniforms_are_independent_of_batch_and_length():
    assert (G.uniforms(5, 2, 10) == G.uniforms(5, 2, 100)[:10]).all()
    assert (G.uniforms(5, 2, 10) != G.uniforms(5, 3, 10)).any()
    assert (G.uniforms(5, 2, 10) != G.uniforms(6, 2, 10)).any()


def test_filters_equal_hugging_face():
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(3)
    z = rng.normal(size=(8, 60)).astype(np.float32) * 3
    ids = rng.integers(0, 60, (8, 12))
    s = Sampling(temperature=0.7, top_k=30, top_p=0.85, min_p=0.02, repetition_penalty=1.3)
    want = torch.tensor(z)
    for step in (
        hf.RepetitionPenaltyLogitsProcessor(1.3), hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(30), hf.TopPLogitsWarper(0.85), hf.MinPLogitsWarper(0.02),
    ):  # fmt: skip
        want = step(torch.tensor(ids), want)
    seen = np.zeros((8, 60), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    got = G.shape_logits(mx.array(z), s, mx.array(seen))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5)


def test_top_p_stops_when_the_mass_is_reached_exactly():
    z = mx.array(np.log([[0.5, 0.25, 0.125, 0.125]]).astype(np.float32))
    kept = lambda p: int((G.keep_top_p(z, p) > -mx.inf).sum())
    assert [kept(p) for p in (0.4, 0.5, 0.51, 0.75, 0.76)] == [1, 1, 2, 2, 4]


def test_ties_stay():
    z = mx.zeros((1, 5))
    assert int((G.keep_top_k(z, 2) > -mx.inf).sum()) == 5
    assert int((G.keep_top_p(z, 0.1) > -mx.inf).sum()) == 5


@pytest.mark.parametrize(
    "bad",
    [dict(max_tokens=0), dict(temperature=-1), dict(temperature=math.nan), dict(top_k=-1),
     dict(top_p=0), dict(top_p=1.1), dict(min_p=2), dict(repetition_penalty=0), dict(seed=-1)],
    ids=str,
)  # fmt: skip
def test_bad_settings(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        Sampling(**bad)


PROMPTS = ["the cat", "", "the cat sat on the mat. the", "a"]


@pytest.mark.parametrize(
    "s",
    [Sampling(temperature=0), Sampling(seed=4), Sampling(temperature=0.7, top_k=20, seed=1),
     Sampling(temperature=1.3, top_p=0.9, min_p=0.01, repetition_penalty=1.4, seed=2)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_cached_and_batched_equal_naive(tok, s, positions):
    model = make_model(tok.vocab_size, positions=positions)
    s = Sampling(**{**vars(s), "max_tokens": 16})
    outs = generate_batch(model, tok, PROMPTS, sampling=s, logprobs=True)
    for row, (prompt, out) in enumerate(zip(PROMPTS, outs)):
        want, logps = naive(model, [tok.eot_id, *tok.encode(prompt)], s, row, tok.vocab_size)
        if tok.eot_id in want:
            want = want[: want.index(tok.eot_id)]
        assert out.ids == want
        n = len(out.logprobs)
        assert n == len(want) + (out.finish == "end")
        np.testing.assert_allclose(out.logprobs, logps[:n], atol=1e-4)
        assert out.text == tok.decode(want)


def test_rows_that_finish_do_not_disturb_the_others(tok, model):
    s = Sampling(max_tokens=40, seed=9)
    outs = generate_batch(model, tok, n=40, sampling=s)
    again = generate_batch(model, tok, n=40, sampling=s, batch_size=7)
    assert [o.ids for o in outs] == [o.ids for o in again]
    assert len({o.text for o in outs}) > 30
    assert len({len(o.ids) for o in outs}) > 1, "no row finished early: the test tests nothing"


def test_seeds_reproduce(tok, model):
    a, b, c = (generate(model, tok, "the", max_tokens=20, seed=s).ids for s in (1, 1, 2))
    assert a == b != c


def test_context_slides(tok):
    model = make_model(tok.vocab_size, max_seq_len=16)
    out = generate(model, tok, "the cat", max_tokens=60, temperature=0)
    ids = [tok.eot_id, *tok.encode("the cat")]
    context, want = list(ids), []
    for _ in range(len(out.ids)):
        if len(context) > 16:
            context = (ids + want)[-8:]
        z = model(mx.array([context]))[0, -1, : tok.vocab_size]
        want.append(int(mx.argmax(z)))
        context.append(want[-1])
    assert out.ids == want
    long = generate(model, tok, "the cat sat on the mat. " * 10, max_tokens=3)
    assert long.finish in ("length", "end")


def test_stream_is_whole_and_never_half_a_character():
    text = "naïve 😀 café 😀 "
    tok = train_tokenizer(["naive cafe " * 9], 260)
    model = Parrot(tok.encode(text * 3), tok)
    pieces = list(stream(model, tok, "", max_tokens=len(tok.encode(text * 3))))
    assert "".join(pieces) == text * 3
    assert all("\ufffd" not in p for p in pieces) and len(pieces) > 10
    cut = len(tok.encode("naïve ")) + 2  # ends inside the emoji
    whole = generate(model, tok, "", max_tokens=cut)
    assert "".join(stream(model, tok, "", max_tokens=cut)) == whole.text
    assert whole.text.startswith("naïve ") and whole.finish == "length"


class Parrot:
    "Says fixed tokens, whatever was asked."

    training = False

    def __init__(self, ids, tok):
        self.ids, self.V = ids, tok.vocab_size
        self.cfg = preset("tiny", vocab_size=self.V, max_seq_len=10_000)

    def train(self, mode=True):
        pass

    eval = train

    def make_cache(self, left_padding=None, step=256):
        return [type("C", (), dict(offset=0, left_padding=None, keys=mx.zeros(1), values=mx.zeros(1)))()]

    def __call__(self, tokens, cache=None, last_only=False):
        said = cache[0].offset
        cache[0].offset += 1
        one = mx.arange(self.V) == self.ids[min(said, len(self.ids) - 1)]
        return mx.where(one, 0.0, -mx.inf)[None, None]


@pytest.mark.parametrize("stop", ["END", "D", "xEN", "two words", "é"])
def test_stop_strings(stop):
    tok = train_tokenizer(["ENDING two words "], 258)
    text = "a é bxENDING two words on"
    model = Parrot(tok.encode(text), tok)
    n = len(tok.encode(text))
    out = generate(model, tok, "", max_tokens=n, stop=(stop, "never"))
    assert (out.text, out.finish) == (text[: text.index(stop)], "stop")
    pieces = list(stream(model, tok, "", max_tokens=n, stop=(stop, "never")))
    assert "".join(pieces) == out.text
    late = generate(model, tok, "", max_tokens=n, stop="on!")
    assert (late.text, late.finish) == (text, "length")
    assert "".join(stream(model, tok, "", max_tokens=n, stop="on!")) == text


def test_two_stop_strings_end_at_the_first():
    tok = train_tokenizer(["x"], 257)
    model = Parrot(tok.encode("one two three"), tok)
    assert generate(model, tok, "", max_tokens=13, stop=("three", "two")).text == "one "


def test_log_probabilities_are_the_models_own(tok, model):
    plain = generate(model, tok, "the", max_tokens=8, top_k=1, logprobs=True)
    ids = [tok.eot_id, *tok.encode("the")]
    z = model(mx.array([ids + plain.ids]))[0, len(ids) - 1 : -1]
    logp = np.array(z - mx.logsumexp(z, axis=-1, keepdims=True))
    want = logp[np.arange(len(plain.ids)), plain.ids]
    np.testing.assert_allclose(plain.logprobs[: len(want)], want, atol=1e-4)
    assert generate(model, tok, "the", max_tokens=2).logprobs is None


def test_padded_vocabulary_is_never_drawn(tok):
    wide = make_model(tok.vocab_size + 500)
    outs = generate_batch(wide, tok, n=20, max_tokens=30, temperature=3.0)
    assert max(max(o.ids, default=0) for o in outs) < tok.vocab_size


def test_wrong_tokenizer(tok, model):
    small = make_model(tok.vocab_size - 10)
    with pytest.raises(ValueError, match="tokenizer"):
        generate(small, tok, "the")


def test_nothing_to_do(tok, model):
    assert generate_batch(model, tok, []) == []
    assert generate_batch(model, tok, n=0) == []


def test_dropout_is_off_and_comes_back(tok):
    model = make_model(tok.vocab_size, dropout=0.5).train()
    a, b = (generate(model, tok, "the", max_tokens=10, temperature=0).ids for _ in range(2))
    assert a == b and model.training


# --- decoding in pieces -----------------------------------------------------------------------


KINDS = {
    "preset": dict(),
    "grouped, free head": dict(n_kv_heads=2, tie_embeddings=False),
    "gpt2": dict(norm="layernorm", activation="gelu", positions="learned", qk_norm=False, bias=True),
    "none": dict(positions="none"),
    "mixture": dict(kind="moe", n_experts=4, top_k=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [None, [0, 2]])
def test_compiled_pieces_give_the_logits_of_the_whole_model(kind, padding):
    import llmfs.model.moe  # noqa: F401  makes mixtures known
    from llmfs.evaluation.decoding import Decoder
    from llmfs.hardware import hardware
    from llmfs.model.block import GPTConfig

    if hardware().backend == "cpu" and not hardware().compiler:
        pytest.skip("mx.compile needs a C++ compiler here")
    mx.random.seed(0)
    base = dict(vocab_size=50, n_layers=2, d_model=32, n_heads=4, max_seq_len=400, init_std=0.2)
    model = GPT(GPTConfig.from_dict(base | KINDS[kind]))
    model.eval()
    prompt = mx.random.randint(0, 50, (2, 250))
    whole, mine = (model.make_cache(left_padding=padding) for _ in range(2))
    token = [mx.argmax(model(prompt, cache=c)[:, -1:], axis=-1) for c in (whole, mine)][0]
    step = Decoder(model, compiled=True)
    for _ in range(12):  # past 256, where caches grow
        a, b = model(token, cache=whole)[:, -1], step(token, mine)
        assert mx.allclose(a, b, atol=1e-4)
        token = mx.argmax(a, axis=-1)[:, None]
    for cache in (whole, mine):  # a text is finished: fewer rows
        for layer in cache:
            layer.keep(mx.array([1]))
    assert mx.allclose(model(token[1:], cache=whole)[:, -1], step(token[1:], mine), atol=1e-4)


def test_texts_are_the_same_with_compiled_pieces(model, tok, monkeypatch):
    from llmfs.hardware import hardware

    if hardware().backend == "cpu" and not hardware().compiler:
        pytest.skip("mx.compile needs a C++ compiler here")
    write = lambda: [g.ids for g in generate_batch(model, tok, ["a", "the cat", ""], max_tokens=12, seed=3)]  # noqa: E731
    plain = write()
    monkeypatch.setattr("llmfs.evaluation.decoding.compile_pays", lambda: True)
    assert write() == plain
