"""The n-gram model against brute force, and against weaker smoothing."""
import subprocess
import sys
import time
from collections import Counter, defaultdict
from itertools import product

from llmfs.model.ngram import NGram, discounts

import numpy as np
import pytest


def random_ids(seed, size=300, vocab=6, eot=None):
    "Tokens with structure: each depends on the one before; EOT = 0 now and then."
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(vocab, 0.4), size=vocab)
    ids = [0 if eot == 0 else 1]
    for _ in range(size):
        ids.append(int(rng.choice(vocab, p=table[ids[-1]])))
    return np.array(ids)


class Brute:
    "Kneser-Ney from its definition, with sets of left neighbours."

    def __init__(self, ids, order, vocab, eot):
        self.order, self.vocab, self.eot = order, vocab, eot
        ids = list(map(int, ids))
        if eot is not None and ids[:1] != [eot]:
            ids = [eot] + ids
        self.own, self.left = defaultdict(Counter), defaultdict(set)
        for i in range(0 if eot is None else 1, len(ids)):
            c = self.context(ids, i)
            self.own[c][ids[i]] += 1
            for k in range(len(c)):  # every suffix of the context has a left neighbour
                self.left[c[k + 1:], ids[i]].add(c[k])
        self.rows = defaultdict(dict)
        for c, row in self.own.items():
            self.rows[c].update(row)
        for (c, w), before in self.left.items():
            self.rows[c][w] = self.own[c][w] + len(before)
        self.off = [discounts(np.array([a for c, row in self.rows.items() if len(c) == n
                                        for a in row.values()] or [1])) for n in range(order)]

    def context(self, ids, i):
        c = ()
        while len(c) < self.order - 1 and i - len(c) > 0:
            c = (ids[i - len(c) - 1],) + c
            if c[0] == self.eot:
                break
        return c

    def p(self, c, w):
        below = self.p(c[1:], w) if c else 1 / self.vocab
        row = self.rows.get(c)
        if not row:
            return below
        total = sum(row.values())
        off = {v: self.off[len(c)][min(a, 3)] for v, a in row.items()}
        return (row.get(w, 0) - off.get(w, 0)) / total + sum(off.values()) / total * below

    def logprobs(self, ids):
        ids = list(map(int, ids))
        skip = self.eot is not None and ids[:1] != [self.eot]
        full = [self.eot] * skip + ids
        out = [np.log(self.p(self.context(full, i), full[i])) for i in range(len(full))]
        if self.eot is not None:
            out[0] = 0.0
        return np.array(out[skip:])


@pytest.mark.parametrize("order,eot", list(product([1, 2, 3, 5], [None, 0])))
def test_equals_brute_force(order, eot):
    for seed in range(4):
        train, query = random_ids(seed, eot=eot), random_ids(seed + 99, 80, 7, eot=eot)
        model = NGram(order, 7, eot_id=eot).fit(train)
        brute = Brute(train, order, 7, eot)
        np.testing.assert_allclose(model.logprobs(query), brute.logprobs(query), rtol=1e-10)
        np.testing.assert_allclose(  # no opening EOT: it is put there
            model.logprobs(query[3:]), brute.logprobs(query[3:]), rtol=1e-10)


@pytest.mark.parametrize("eot", [None, 0])
def test_sums_to_one(eot):
    rng = np.random.default_rng(0)
    model = NGram(4, 9, eot_id=eot).fit(random_ids(1, eot=eot))
    for n in range(6):
        for _ in range(10):
            context = rng.integers(9, size=n).tolist()  # ids 6..8 were never seen
            p = np.exp([model.logprobs(context + [w])[-1] for w in range(9)])
            if eot is not None and not context:
                p[eot] = 1 - np.exp([model.logprobs([w])[-1] for w in range(1, 9)]).sum()
                assert p[eot] == pytest.approx(np.exp(model.logprobs([0, 0])[-1]))
            assert (p > 0).all() and p.sum() == pytest.approx(1, abs=1e-12)


def split(ids):
    "Documents of a stream EOT doc EOT doc EOT."
    cuts = np.flatnonzero(np.append(ids, 0) == 0)
    return [ids[a + 1:b].tolist() for a, b in zip(cuts, cuts[1:])]


def join(docs):
    return np.array([0] + [i for d in docs for i in d + [0]])


def test_contexts_stay_inside_documents():
    docs = split(random_ids(3, 600, eot=0))
    a, b = NGram(4, 6, eot_id=0).fit(join(docs)), NGram(4, 6, eot_id=0).fit(join(docs[::-1]))
    query = random_ids(4, 200, eot=0)
    np.testing.assert_array_equal(a.logprobs(query), b.logprobs(query))
    one_by_one = [a.logprobs([0] + d + [0])[1:] for d in split(query)]
    np.testing.assert_allclose(np.concatenate([[0.0], *one_by_one]),
                               a.logprobs(join(split(query))), rtol=1e-12)


def test_samples_follow_logprobs():
    model = NGram(3, 4, eot_id=0).fit(random_ids(5, 200, vocab=4, eot=0))
    n = 40_000
    drawn = Counter(map(tuple, model.sample(n, max_len=30, seed=0)))
    for doc, seen in drawn.most_common(25):
        expected = n * np.exp(model.logprobs([0, *doc, 0]).sum())
        assert abs(seen - expected) < 5 * np.sqrt(expected), doc


def test_sample_form():
    model = NGram(3, 6, eot_id=0).fit(random_ids(2, 400, eot=0))
    a, b, c = (model.sample(50, max_len=7, seed=s) for s in (1, 1, 2))
    assert a == b != c and len(a) == 50
    assert max(map(len, a)) == 7 and all(0 not in d for d in a)
    assert model.sample(0) == []
    plain = NGram(3, 6).fit(random_ids(2, 400, eot=0))
    assert all(0 not in d for d in plain.sample(20, eot_id=0))
    with pytest.raises(ValueError, match="eot_id"):
        plain.sample(3)


def test_discounts():
    assert discounts(np.array([1] * 8 + [2] * 4 + [3] * 2 + [4])) == pytest.approx(
        [0, 0.5, 1.25, 2])
    assert discounts(np.array([7, 9])) == pytest.approx([0, 0.5, 1, 1.5])
    rng = np.random.default_rng(0)
    for _ in range(200):
        off = discounts(rng.geometric(rng.uniform(0.05, 0.95), rng.integers(1, 60)))
        assert (off <= [0, 1, 2, 3]).all() and (np.diff(off) >= 0).all() and off[1] > 0


def add_one(train, test, order, vocab):
    def grams(ids, n):
        return list(zip(*(ids[i:].tolist() for i in range(n))))

    full, ctx = Counter(grams(train, order)), Counter(grams(train, order - 1))
    return -np.mean([np.log((full[g] + 1) / (ctx[g[:-1]] + vocab)) for g in grams(test, order)])


def witten_bell(train, test, order, vocab):
    "Interpolated Witten-Bell: a context keeps total / (total + kinds)."
    rows = defaultdict(Counter)
    for i in range(len(train)):
        for n in range(min(i, order - 1) + 1):
            rows[tuple(train[i - n:i].tolist())][int(train[i])] += 1
    total = {c: sum(r.values()) for c, r in rows.items()}
    loss = 0
    for i in range(len(test)):
        p = 1 / vocab
        for n in range(min(i, order - 1) + 1):
            c = tuple(test[i - n:i].tolist())
            if c in rows:
                p = (rows[c][int(test[i])] + len(rows[c]) * p) / (total[c] + len(rows[c]))
        loss -= np.log(p)
    return loss / len(test)


@pytest.mark.parametrize("order", [3, 5])
def test_stronger_than_the_textbook(order):
    "On English text, words as tokens: Python's own documentation strings."
    import re

    import numpy
    docs = [v.__doc__ for m in (numpy, re, subprocess) for _, v in sorted(vars(m).items())
            if isinstance(getattr(v, "__doc__", None), str)]
    words = re.findall(r"\w+|[^\w\s]", "\n".join(dict.fromkeys(docs)))[:60_000]
    common = {w: i for i, (w, _) in enumerate(Counter(words).most_common(2000))}
    ids = np.array([common.get(w, 2000) for w in words])
    cut = len(ids) * 9 // 10
    train, test = ids[:cut], ids[cut:]
    ours = -NGram(order, 2001).fit(train).logprobs(test).mean()
    assert ours < witten_bell(train, test, order, 2001) - 0.02
    assert ours < add_one(train, test, order, 2001) - 0.5


def test_fast_enough():
    "A tenth of 3M tokens in a tenth of 20 s, with room to spare."
    rng = np.random.default_rng(0)
    ids = (rng.pareto(1.0, 300_000) * 20).astype(np.int64) % 10_000
    start = time.perf_counter()
    model = NGram(5, 10_000, eot_id=0).fit(ids)
    model.sample(200, max_len=250)
    assert time.perf_counter() - start < 3


def test_errors():
    with pytest.raises(ValueError, match="fit"):
        NGram(3, 5).logprobs([1])
    with pytest.raises(ValueError, match="0 ... 4"):
        NGram(3, 5).fit([1, 5])
    with pytest.raises(ValueError, match="no training tokens"):
        NGram(3, 5, eot_id=0).fit([0])
    with pytest.raises(ValueError, match="order"):
        NGram(0, 5)
    model = NGram(3, 5).fit([1, 2, 3])
    assert model.logprobs([]).shape == (0,)
    with pytest.raises(ValueError, match="0 ... 4"):
        model.logprobs([-1])


def test_edges():
    "Texts shorter than the order, one token, ids as uint16."
    for ids in ([1], [1, 2], [1, 1, 1, 1]):
        p = np.exp(NGram(5, 3).fit(ids).logprobs([1]))
        assert 1 / 3 < p[0] < 1
    a = np.array([0, 1, 2, 0, 2, 2, 0], np.uint16)
    assert np.isfinite(NGram(5, 50_257, eot_id=0).fit(a).logprobs(a)).all()


def test_needs_no_mlx():
    code = "import llmfs.model.ngram, sys; assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
