"""Token files and batches: counts kept exactly, positions restored, errors in one line."""

import json

from llmfs.data import tokens as module
from llmfs.data.tokens import TokenFile, write_tokens
from llmfs.tokenizer.vocab import CharTokenizer
from llmfs.training.data_loader import (
    IGNORE,
    DataLoader,
    best_fit,
    eval_batches,
    permuted,
)

import numpy as np
import pytest


class Chars:
    "A tokenizer of bytes: id = byte + 1, end of text 0."

    vocab_size, eot_id, hash = 257, 0, "chars"

    def encode_array(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64) + 1


class Wide(Chars):
    vocab_size = 70_000


class Other(Chars):
    hash = "other"


def documents(n, seed=0, mean=100):
    rng = np.random.default_rng(seed)
    words = ["cat", "dog", "sun", "été", "a", "\n", "tree.", "  "]
    for _ in range(n):
        size = max(1, int(rng.normal(mean, mean / 4)))
        text = " ".join(rng.choice(words, size))[:size]
        yield text or "x"


@pytest.fixture
def path(tmp_path):
    write_tokens(documents(300), Chars(), tmp_path / "train.npy")
    return tmp_path / "train.npy"


def multiset(pairs):
    values, counts = np.unique(np.concatenate(pairs), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist()))


# ---- token files


def test_layout_counts_and_header(path):
    texts = list(documents(300))
    f, want = TokenFile(path, tokenizer=Chars()), [0]
    for text in texts:
        want += (np.frombuffer(text.encode(), np.uint8).astype(int) + 1).tolist() + [0]
    assert f.ids.tolist() == want and f.ids.dtype == np.uint16 and len(f) == len(want)
    assert f.header["n_documents"] == 300
    assert f.header["n_bytes"] == sum(len(t.encode()) for t in texts) == len(want) - 301
    assert np.array_equal(np.load(path), f.ids)


def test_uint32_for_large_vocabularies(tmp_path):
    write_tokens(["héllo"], Wide(), tmp_path / "a.npy")
    assert TokenFile(tmp_path / "a.npy").ids.dtype == np.uint32


def test_processes_write_the_same_file(tmp_path):
    def texts():
        yield from documents(50)
        yield "\n".join(["a long line of text"] * 200_000)

    tokenizer = CharTokenizer("abcdefghijklmnopqrst.\n ")
    one = write_tokens(texts(), tokenizer, tmp_path / "one.npy")
    two = write_tokens(texts(), tokenizer, tmp_path / "two.npy", n_processes=2)
    assert one == two and one["n_documents"] == 51


def test_long_documents_are_encoded_as_a_whole(tmp_path, monkeypatch):
    from llmfs.tokenizer.vocab import train_tokenizer

    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ab .\n\n'"), 4000)) for _ in range(3)]
    tokenizer = train_tokenizer(texts, 300)
    tasks = module._tasks
    monkeypatch.setattr(module, "_tasks", lambda documents: tasks(documents, 50))
    write_tokens(texts, tokenizer, tmp_path / "a.npy")
    want = [i for t in texts for i in (tokenizer.eot_id, *tokenizer.encode(t))]
    assert TokenFile(tmp_path / "a.npy").ids.tolist() == want + [tokenizer.eot_id]


def test_nothing_is_left_when_writing_fails(tmp_path):
    def broken():
        yield "fine"
        raise OSError("source gone")

    write_tokens(["good"], Chars(), tmp_path / "a.npy")
    before = (tmp_path / "a.npy").read_bytes()
    with pytest.raises(OSError, match="source gone"):
        write_tokens(broken(), Chars(), tmp_path / "a.npy")
    assert (tmp_path / "a.npy").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npy"]


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text(tmp_path, texts):
    with pytest.raises(ValueError, match="no text"):
        write_tokens(texts, Chars(), tmp_path / "a.npy")
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_named(path, tmp_path):
    raw, header = path.read_bytes(), path.with_suffix(".json").read_text()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TokenFile(tmp_path / "nowhere.npy")
    with pytest.raises(ValueError, match="another tokenizer"):
        TokenFile(path, tokenizer=Other())
    for cut in (0, 5, 64, 127, 129, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(ValueError, match="write it again") as e:
            TokenFile(path)
        assert "\n" not in str(e.value)
    flipped = bytearray(raw)
    flipped[len(raw) // 3] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="does not match"):
        TokenFile(path)
    path.write_bytes(raw)
    for text in ("", "{", "[]", json.dumps({"format": "else"}), header[:-20]):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(ValueError, match="not the header"):
            TokenFile(path)


def test_readers_keep_the_file_they_opened(path):
    old = TokenFile(path)
    ids = np.array(old.ids)
    write_tokens(documents(300, seed=1), Chars(), path)
    assert np.array_equal(old.ids, ids)
    assert not np.array_equal(TokenFile(path).ids, ids)


def test_header_with_a_wrong_count(path):
    header = json.loads(path.with_suffix(".json").read_text())
    header["n_tokens"] += 1
    path.with_suffix(".json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="does not match"):
        TokenFile(path)


def test_spot_check_sees_another_file(path):
    f = TokenFile(path)
    f.verify(full=False)
    ids = np.load(path)
    ids[-1] ^= 1
    np.save(path, ids)
    with pytest.raises(ValueError, match="does not match"):
        TokenFile(path, verify=False)


# ---- order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 1000, 4097])
def test_permuted_is_a_permutation(n):
    for key in range(3):
        assert sorted(permuted(range(n), n, key).tolist()) == list(range(n))


def test_permuted_mixes():
    n = 2000
    a, b = permuted(range(n), n, 1), permuted(range(n), n, 2)
    assert abs(np.corrcoef(a, range(n))[0, 1]) < 0.1
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
    assert (np.diff(a) == 1).mean() < 0.01
    first = [int(permuted(0, 7, key)) for key in range(7000)]
    assert np.bincount(first, minlength=7).min() > 850  # 1000 each, if uniform


# ---- windows


def test_windows_cover_an_epoch_once():
    ids, L = np.arange(1000), 10
    loader = DataLoader(ids, 3, L, seed=4)
    rows = []
    while loader.state()["epoch"] == 0:
        batch = next(loader)
        assert (
            np.array_equal(batch.inputs + 1, batch.targets) and batch.segments is None
        )
        rows += batch.inputs[:, 0].tolist()
    n = (999 - rows[0] % L) // L
    assert n in (98, 99)
    assert sorted(rows[:n]) == list(range(rows[0] % L, rows[0] % L + n * L, L))
    assert rows[:n] != sorted(rows[:n])


def test_windows_differ_between_epochs_and_seeds():
    ids = np.arange(101)
    runs = [
        np.concatenate([next(d).inputs for _ in range(3)])
        for d in (DataLoader(ids, 10, 10, seed=0), DataLoader(ids, 10, 10, seed=1))
    ]
    assert not np.array_equal(runs[0][:10], runs[0][10:20])
    assert not np.array_equal(runs[0], runs[1])


# ---- documents


def epoch_of(loader):
    batches = []
    while loader.state()["epoch"] == 0:
        batches.append(next(loader))
    return batches


@pytest.mark.parametrize("L", [16, 64, 256])
def test_documents_whole_and_never_mixed(path, L):
    f = TokenFile(path)
    loader = DataLoader(f, 1, L, mode="documents")
    seen, text = [], f.ids.tolist()
    begins = {i for i, t in enumerate(text[:-1]) if t == 0}
    whole = {
        tuple(text[a:b])
        for a, b in zip(sorted(begins), sorted(begins)[1:] + [len(text) - 1])
    }
    for x, y, s in epoch_of(loader):
        x, y, s = x[0], y[0], s[0]
        assert ((s == -1) == (y == IGNORE)).all()
        assert (np.diff(s[s >= 0]) >= 0).all() and s.max() + 1 == len(set(s[s >= 0]))
        for k in range(s.max() + 1):
            doc, target = x[s == k], y[s == k]
            assert np.array_equal(doc[1:], target[:-1])
            seen.append(target)
            if L == 256:
                assert doc[0] == 0 and target[-1] == 0 and tuple(doc.tolist()) in whole
            assert (doc[1:] != 0).all()
    assert multiset(seen) == multiset([f.ids[1:]])


def test_documents_fill(path):
    write_tokens(documents(3000), Chars(), path)
    batches = epoch_of(DataLoader(TokenFile(path), 8, 256, mode="documents"))
    fill = np.mean([(b.targets != IGNORE).mean() for b in batches])
    assert fill > 0.95


def test_best_fit():
    assert best_fit([5, 4, 3, 2, 6], 10) == [[4, 1], [0, 2, 3]]
    assert best_fit([], 10) == []
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths = rng.integers(1, 33, 100).tolist()
        rows = best_fit(lengths, 32)
        assert sorted(sum(rows, [])) == list(range(100))
        assert max(sum(lengths[i] for i in r) for r in rows) <= 32


# ---- position, ranks, evaluation


def same(a, b):
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("mode", ["windows", "documents"])
def test_restored_at_any_batch(path, mode):
    def make():
        return DataLoader(TokenFile(path), 7, 64, mode=mode, seed=3)

    loader, states, batches = make(), [], []
    for _ in range(200):
        states.append(loader.state())
        batches.append(next(loader))
    assert states[-1]["epoch"] >= 2
    assert all(type(v) is int for v in states[-1].values())
    for at in (0, 1, 50, 77, 199):
        other = make()
        for _ in range(at % 3):
            next(other)
        other.load_state(json.loads(json.dumps(states[at])))
        assert other.state() == states[at]
        assert all(same(next(other), b) for b in batches[at : at + 20])


@pytest.mark.parametrize("mode", ["windows", "documents"])
def test_ranks_share_one_batch(path, mode):
    one = DataLoader(path, 6, 64, mode=mode, seed=3)
    parts = [
        DataLoader(path, 2, 64, mode=mode, seed=3, rank=r, world_size=3)
        for r in range(3)
    ]
    for _ in range(150):
        whole, split = next(one), [next(p) for p in parts]
        for i in range(3):
            assert same(
                [whole[i]],
                [None if whole[i] is None else np.concatenate([s[i] for s in split])],
            )
        assert all(p.state() == one.state() for p in parts)


@pytest.mark.parametrize("mode", ["windows", "documents"])
def test_eval_sees_each_target_once(path, mode):
    batches = list(eval_batches(TokenFile(path), 5, 48, mode))
    assert {b.inputs.shape for b in batches} == {(5, 48)}
    targets = np.concatenate([b.targets.ravel() for b in batches])
    ids = TokenFile(path).ids
    assert multiset([targets[targets != IGNORE]]) == multiset([ids[1:]])
    if mode == "windows":
        assert np.array_equal(targets[targets != IGNORE], ids[1:])
        assert np.array_equal(batches[0].inputs[0], ids[:48])
    assert all(same(a, b) for a, b in zip(batches, eval_batches(path, 5, 48, mode)))


def test_types(path):
    for mode in ("windows", "documents"):
        batch = next(DataLoader(path, 2, 32, mode=mode))
        arrays = [a for a in batch if a is not None]
        assert {(a.dtype.name, a.shape) for a in arrays} == {("int32", (2, 32))}


@pytest.mark.parametrize("mode", ["windows", "documents"])
def test_errors(path, mode):
    with pytest.raises(ValueError, match="a batch takes 9999"):
        DataLoader(path, 9999, 256, mode=mode)
    with pytest.raises(ValueError, match="gives 0 rows"):
        DataLoader(np.array([0]), 1, 256, mode=mode)
    a, b = DataLoader(path, 2, 32, mode=mode), DataLoader(path, 2, 64, mode=mode)
    with pytest.raises(ValueError, match="seq_len 32, not 64"):
        b.load_state(a.state())
    other = DataLoader(np.array(TokenFile(path).ids)[::-1], 2, 32, mode=mode)
    with pytest.raises(ValueError, match="belongs to text"):
        other.load_state(a.state())
    DataLoader(np.array(TokenFile(path).ids), 4, 32, mode=mode).load_state(a.state())
    with pytest.raises(ValueError, match="unknown mode"):
        DataLoader(path, 2, 32, mode="words")
    with pytest.raises(ValueError, match="rank 2 of 2"):
        DataLoader(path, 2, 32, rank=2, world_size=2)


def test_a_document_longer_than_many_blocks():
    ids = np.concatenate(
        [[0], np.arange(1, 200_000) % 250 + 1, [0], np.full(50, 7), [0]]
    )
    batches = list(eval_batches(ids, 8, 32, "documents"))
    targets = np.concatenate([b.targets.ravel() for b in batches])
    assert multiset([targets[targets != IGNORE]]) == multiset([ids[1:]])


# ---- buckets


def bucket_rows(batch):
    "The documents of a batch, as tuples of inputs."
    for x, y in zip(batch.inputs, batch.targets):
        n = int((y != IGNORE).sum())
        assert (y[:n] != IGNORE).all() and (y[n:] == IGNORE).all()
        yield tuple(x[:n].tolist())


def test_buckets_are_whole_documents_each_at_most_once(path):
    tokens = TokenFile(path)
    whole = {r for b in eval_batches(tokens, 7, 512, "buckets") for r in bucket_rows(b)}
    ends = np.flatnonzero(tokens.ids == tokens.eot_id)
    assert whole == {tuple(tokens.ids[a:b].tolist()) for a, b in zip(ends, ends[1:])}
    loader, rows, filled, places = DataLoader(tokens, 8, 512, "buckets"), [], 0, 0
    while loader.state()["epoch"] == 0:
        batch = next(loader)
        assert batch.segments is None and len(batch.inputs) == 8
        assert batch.inputs.shape[1] % 8 == 0 or batch.inputs.shape[1] == 512
        rows += bucket_rows(batch)
        filled, places = (
            filled + (batch.targets != IGNORE).sum(),
            places + batch.targets.size,
        )
    assert set(rows) <= whole and len(rows) >= len(whole) - 7 * loader.source.n_pools
    assert filled > 0.9 * places


def test_buckets_resume_and_share_between_ranks(path):
    loader = DataLoader(path, 4, 256, "buckets", seed=3)
    for _ in range(30):
        next(loader)
    state, expected = loader.state(), [next(loader) for _ in range(40)]
    again = DataLoader(path, 4, 256, "buckets", seed=3)
    again.load_state(state)
    assert all(np.array_equal(next(again).targets, b.targets) for b in expected)
    with pytest.raises(ValueError, match="rows_a_batch 4, not 8"):
        DataLoader(path, 8, 256, "buckets", seed=3).load_state(state)
    one = DataLoader(path, 4, 256, "buckets")
    ranks = [DataLoader(path, 2, 256, "buckets", rank=r, world_size=2) for r in (0, 1)]
    for _ in range(50):
        parts = [list(bucket_rows(next(rank))) for rank in ranks]
        assert list(bucket_rows(next(one))) == parts[0] + parts[1]


def test_buckets_leave_out_other_documents_each_epoch(tmp_path):
    write_tokens(documents(47, mean=30), Chars(), tmp_path / "few.npy")
    loader, epochs = DataLoader(tmp_path / "few.npy", 8, 64, "buckets"), {}
    while (epoch := loader.state()["epoch"]) < 30:
        epochs.setdefault(epoch, set()).update(bucket_rows(next(loader)))
    assert {len(rows) for rows in epochs.values()} == {40}
    assert len(set.union(*epochs.values())) == 47


def test_buckets_of_long_documents_and_little_text():
    ids = np.array([0, *([1, 2, 3] * 40), 0, 5, 0])
    rows = [r for b in eval_batches(ids, 4, 50, "buckets") for r in bucket_rows(b)]
    assert sorted(map(len, rows)) == [2, 21, 50, 50]
    loader = DataLoader(ids, 4, 50, "buckets")
    assert sorted(len(r) for r in bucket_rows(next(loader))) == [2, 21, 50, 50]
