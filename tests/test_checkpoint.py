"Checkpoints: whole or not there, damaged means refused, restored means equal."

import errno
import json
import os
import subprocess
import sys
import textwrap
import zipfile

import llmfs
from llmfs.data import text as data_text
from llmfs.model.transformer import GPT, GPTConfig
from llmfs.tokenizer.vocab import CharTokenizer
from llmfs.training import checkpoint as ck
from llmfs.training.optimizer import make_optimizer

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

TOKENIZER = CharTokenizer("abcdefgh ")


def small_model(seed=0, **changes):
    mx.random.seed(seed)
    shape = dict(vocab_size=12, n_layers=1, d_model=8, n_heads=2, max_seq_len=8)
    return GPT(GPTConfig(**shape | changes))


def trained(seed=0, kind="adamw", steps=3):
    model = small_model(seed)
    optimizer = make_optimizer(kind, model)
    for _ in range(steps):
        params = tree_flatten(model.parameters())
        grads = [(k, mx.random.normal(p.shape)) for k, p in params]
        from mlx.utils import tree_unflatten

        optimizer.update(model, tree_unflatten(grads), 1.0)
    mx.eval(model.parameters(), optimizer.state)
    return model, optimizer


def save(path, model, optimizer=None, **more):
    more = dict(step=3, loader=dict(epoch=1, row=7), extra=dict(note="é")) | more
    return ck.save_checkpoint(
        path, model=model, config=model.cfg, tokenizer=TOKENIZER, optimizer=optimizer, **more
    )


def flat(tree):
    return {k: np.array(v) for k, v in tree_flatten(tree)}


def same(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_everything_comes_back(tmp_path, kind):
    model, optimizer = trained(kind=kind)
    path = save(tmp_path / "a.npz", model, optimizer)
    key = np.array(mx.random.state[0])
    drawn = mx.random.normal((4,))
    other, fresh = trained(seed=5, kind=kind, steps=1)
    c = ck.load_checkpoint(path)
    c.restore(other, fresh)
    assert same(model.parameters(), other.parameters())
    assert same(optimizer.state, fresh.state)
    assert np.array_equal(np.array(mx.random.state[0]), key)
    assert mx.array_equal(mx.random.normal((4,)), drawn)
    assert (c.step, c.loader, c.extra) == (3, dict(epoch=1, row=7), dict(note="é"))


def test_load_model_gives_the_same_logits(tmp_path):
    model, _ = trained()
    again, tokenizer, c = ck.load_model(save(tmp_path / "a.npz", model))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), again(tokens))
    assert tokenizer.hash == TOKENIZER.hash
    assert c.optimizer == {}


def test_bfloat16_weights_keep_type_and_bits(tmp_path):
    model = small_model()
    model.set_dtype(mx.bfloat16)
    again, _, _ = ck.load_model(save(tmp_path / "a.npz", model))
    assert again.embed_tokens.weight.dtype == mx.bfloat16
    assert mx.array_equal(model.embed_tokens.weight, again.embed_tokens.weight)


def test_numpy_and_mlx_read_the_file(tmp_path):
    model, _ = trained()
    path = save(tmp_path / "a.npz", model)
    weight = np.array(model.embed_tokens.weight)
    with np.load(path, allow_pickle=False) as z:
        assert np.array_equal(z["model.embed_tokens.weight"], weight)
        assert json.loads(z["meta"].tobytes())["format"] == 1
    assert np.array_equal(np.array(mx.load(str(path))["model.embed_tokens.weight"]), weight)
    assert zipfile.ZipFile(path).testzip() is None


def test_same_state_same_bytes(tmp_path):
    model, optimizer = trained()
    a, b = (save(tmp_path / n, model, optimizer).read_bytes() for n in ("a.npz", "b.npz"))
    assert a == b


def test_every_cut_is_refused(tmp_path):
    whole = save(tmp_path / "a.npz", small_model()).read_bytes()
    path = tmp_path / "cut.npz"
    rng = np.random.default_rng(0)
    cuts = {0, 1, 4, len(whole) - 1, len(whole) - 64, *rng.integers(0, len(whole), 150).tolist()}
    for n in cuts:
        path.write_bytes(whole[:n])
        with pytest.raises(ck.CheckpointError, match="cut.npz"):
            ck.load_checkpoint(path)


def test_every_flipped_byte_is_refused(tmp_path):
    whole = save(tmp_path / "a.npz", small_model()).read_bytes()
    path = tmp_path / "flipped.npz"
    rng = np.random.default_rng(1)
    ends = [*range(64), *range(len(whole) - 160, len(whole))]
    for i in [*ends, *rng.integers(0, len(whole), 150).tolist()]:
        damaged = bytearray(whole)
        damaged[i] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with pytest.raises(ck.CheckpointError, match="flipped.npz") as e:
            ck.load_checkpoint(path)
        assert "\n" not in str(e.value)


@pytest.mark.stress
def test_every_single_byte(tmp_path):
    whole = save(tmp_path / "a.npz", small_model()).read_bytes()
    path = tmp_path / "flipped.npz"
    for i in range(len(whole)):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(ck.CheckpointError):
                ck.load_checkpoint(path)


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "text.npz").write_text("Once upon a time")
    np.savez(tmp_path / "plain.npz", a=np.ones(3))
    for name, words in [("text.npz", "is not a checkpoint"), ("plain.npz", "not a checkpoint")]:
        with pytest.raises(ck.CheckpointError, match=words):
            ck.load_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.npz"):
        ck.load_checkpoint(tmp_path / "none.npz")
    with pytest.raises(ck.CheckpointError, match="is a folder"):
        ck.load_checkpoint(tmp_path)


def sealed(path, **arrays):
    with ck.atomic_write(path) as f:
        np.savez(f, **arrays)
        ck._seal(f)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sealed("bomb.npz", meta=np.array([Bomb()], dtype=object))
    with pytest.raises(ck.CheckpointError, match="bomb.npz"):
        ck.load_checkpoint("bomb.npz")
    assert not (tmp_path / "exploded").exists()


def test_sealed_but_not_ours(tmp_path):
    newer = np.frombuffer(json.dumps(dict(format=2)).encode(), np.uint8)
    for arrays, words in [({"a": np.ones(2)}, "cannot be read"), ({"meta": newer}, "newer llmfs")]:
        sealed(tmp_path / "odd.npz", **arrays)
        with pytest.raises(ck.CheckpointError, match=words):
            ck.load_checkpoint(tmp_path / "odd.npz")


def test_left_on_the_disk_it_is_the_same(tmp_path):
    model, optimizer = trained()
    model.embed_tokens.weight = model.embed_tokens.weight.astype(mx.bfloat16)
    path = save(tmp_path / "a.npz", model, optimizer)
    here, there = ck.load_checkpoint(path), ck.load_checkpoint(path, on_disk=True, sealed=False)
    for mine, left in ((here.weights, there.weights), (here.optimizer, there.optimizer)):
        assert mine.keys() == left.keys()
        for k, a in left.items():
            assert a.dtype == mx.bfloat16 or (isinstance(a, np.ndarray) and not a.flags.owndata)
            assert mx.array_equal(mine[k], mx.array(a)) and a.shape == mine[k].shape, k
    with np.load(path) as z:  # read in another way
        assert all(np.array_equal(z[f"model.{k}"], a) for k, a in there.weights.items()
                   if isinstance(a, np.ndarray))  # fmt: skip


def test_weights_that_do_not_fit(tmp_path):
    c = ck.load_checkpoint(save(tmp_path / "a.npz", *trained()))
    with pytest.raises(ck.CheckpointError, match="do not fit .* embed_tokens"):
        c.restore(small_model(vocab_size=13))
    with pytest.raises(ck.CheckpointError, match="do not fit"):
        c.restore(small_model(n_layers=2))
    with pytest.raises(ck.CheckpointError, match="optimizer state"):
        c.restore(optimizer=make_optimizer("muon", small_model()))


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.npz", small_model())
    before = path.read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data_text, "to_disk", full)
    with pytest.raises(ck.DiskFull, match="no space left to write .*a.npz.*untouched") as e:
        save(path, small_model(seed=1))
    assert e.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.npz"]


def test_a_real_limit_on_file_size(tmp_path):
    code = """
        import resource, signal, llmfs, numpy as np
        from llmfs.training.checkpoint import atomic_write, DiskFull
        with atomic_write("a.bin") as f: f.write(b"old")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            with atomic_write("a.bin") as f: np.savez(f, a=np.zeros(100_000))
        except DiskFull as e:
            print(e)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.startswith("no space left to write a.bin"), done.stderr
    assert (tmp_path / "a.bin").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ck.SaveError, match="cannot write") as e:
        save(tmp_path / "file" / "a.npz", small_model())
    assert "\n" not in str(e.value)


def test_vanished_folder_is_made_again(tmp_path):
    path = save(tmp_path / "run" / "a.npz", small_model())
    path.unlink()
    path.parent.rmdir()
    assert ck.load_checkpoint(save(path, small_model())).step == 3


def test_interrupted_write_leaves_nothing(tmp_path):
    path = save(tmp_path / "a.npz", small_model())
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with ck.atomic_write(path) as f:
            f.write(b"half")
            raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.npz"]


def test_the_one_before_is_used(tmp_path):
    for step in (10, 20, 30):
        path = save(tmp_path / f"step_{step:07}.npz", small_model(), step=step)
        ck.link_checkpoint(path, "last.npz")
        ck.prune_checkpoints(tmp_path, keep=2)
    names = [p.name for p in ck.checkpoints(tmp_path)]
    assert names == ["last.npz", "step_0000030.npz", "step_0000020.npz"]
    assert ck.latest_checkpoint(tmp_path).step == 30
    with open(tmp_path / "last.npz", "r+b") as f:
        f.truncate(1000)
    said = []
    assert ck.latest_checkpoint(tmp_path, said.append).step == 20
    assert "last.npz" in said[0] and "the one before" in said[0]
    (tmp_path / "step_0000020.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ck.CheckpointError, match="no checkpoint in"):
        ck.latest_checkpoint(tmp_path, said.append)
    with pytest.raises(FileNotFoundError):
        ck.latest_checkpoint(tmp_path / "elsewhere")


def test_link_without_hard_links(tmp_path, monkeypatch):
    path = save(tmp_path / "step_0000001.npz", small_model())

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert ck.link_checkpoint(path, "last.npz").read_bytes() == path.read_bytes()
