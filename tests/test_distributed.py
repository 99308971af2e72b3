"""Several processes are one run: equal losses and checkpoints, and every way to lose a rank.

Run as a program, this file is one rank: `python tests/test_distributed.py JSON`.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import llmfs
from llmfs.cli import describe
from llmfs.data.tokens import TokenFile, write_tokens
from llmfs.model import moe  # makes mixtures known  # noqa: F401
from llmfs.model.transformer import GPT, GPTConfig
from llmfs.tokenizer.vocab import CharTokenizer
from llmfs.training import distributed, step
from llmfs.training.checkpoint import load_checkpoint, read_log
from llmfs.training.data_loader import Batch
from llmfs.training.distributed import Watch, _my_rows, join_ranks, launch, launched
from llmfs.training.sharding import Shards
from llmfs.training.step import TrainConfig, recipe
from llmfs.training.trainer import Trainer, resume_training

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

WORDS = ["anna", "ben", "sees", "takes", "a", "the", "cat", "hat", "and", "runs"]
SMALL = dict(batch_size=4, seq_len=32, eval_every=25, eval_batches=3, save_every=5,
             log_every=1, warmup=5, precision="float32")  # fmt: skip


# One rank -------------------------------------------------------------------------------


def one_run(ranks, told):
    "Train as told; returns what fit() returns"
    for name, value in told.get("watch", {}).items():
        setattr(ranks.watch, name, value)
    cfg = TrainConfig(**SMALL | told.get("train", {}))
    if told.get("turned"):  # the same rows, added up in another order
        step._arrays = lambda batch: [None if a is None else mx.array(a[::-1].copy()) for a in batch]
    more = dict(train=TokenFile("train.npy"), validation=TokenFile("held.npy"), out=told["out"],
                ranks=ranks, say=str)  # fmt: skip
    mx.random.seed(ranks.rank)  # the ranks' own weights differ: they must take rank 0's
    if told.get("resume"):
        trainer = resume_training(**more, max_steps=cfg.max_steps)
    else:
        shape = dict(vocab_size=32, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_seq_len=32)
        model = GPT(GPTConfig.from_dict(shape | told.get("shape", {})))
        trainer = Trainer(model, cfg, tokenizer=None, overwrite=told.get("overwrite", False), **more)
    if told.get("weigh"):
        mx.eval(trainer.model.parameters(), trainer.optimizer.state)
        held = tree_flatten([trainer.model.parameters(), trainer.optimizer.state])
        print(json.dumps([mx.get_peak_memory(), sum(a.nbytes for _, a in held)]), flush=True)
    advance, write = trainer.advance, trainer.write

    def slowly():
        advance()
        time.sleep(told.get("pause", 0))

    def full(*args):
        if trainer.at.step >= told["full_at"]:
            raise OSError(28, "no space left to write last.npz")
        write(*args)

    trainer.advance = slowly
    trainer.write = full if "full_at" in told else write
    return trainer.fit()


def rank_main(told):
    try:
        ranks = join_ranks(None, told.get("join", 60))
        for run in told["runs"]:
            one_run(Shards(ranks.group) if run.get("shard") else ranks, run)
        print(f"rank {ranks.rank} done", flush=True)
    except (Exception, KeyboardInterrupt) as e:
        code, line = describe(e)
        if not getattr(e, "said", False):
            print(f"llmfs: {line}", file=sys.stderr, flush=True)
        sys.exit(code)


if __name__ == "__main__":
    rank_main(json.loads(sys.argv[1]))


# Starting them --------------------------------------------------------------------------


class Ranks:
    "Several processes, started with the environment of MLX's launcher, but not ended by it"

    def __init__(self, folder, n, commands, only=None):
        held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
        hosts = folder / f"hosts{held[0].getsockname()[1]}.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in held]))
        for s in held:
            s.close()
        self.p = []
        for rank in range(n) if only is None else only:
            env = dict(os.environ, MLX_RANK=str(rank), OMP_NUM_THREADS="1")
            env |= dict(MLX_HOSTFILE=str(hosts)) if n > 1 else {}
            self.p.append(subprocess.Popen(commands[rank % len(commands)], cwd=folder, env=env, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip

    def end(self, seconds=90):
        "Exit codes, and what each printed without MLX's own lines"
        end = time.time() + seconds
        while any(p.poll() is None for p in self.p) and time.time() < end:
            time.sleep(0.02)
        late = [p for p in self.p if p.poll() is None]
        for p in late:
            p.kill()
        said = [p.communicate()[0] for p in self.p]
        assert not late, f"after {seconds} s some ranks still ran: {said}"
        own = [[x for x in s.splitlines() if x and not x.startswith("[ring]")] for s in said]
        return [p.returncode for p in self.p], own


def program(folder, n, *runs, only=None, **told):
    command = [sys.executable, __file__, json.dumps(dict(runs=runs, **told))]
    return Ranks(folder, n, [command], only)


def finished(folder, n, *runs, **told):
    codes, said = program(folder, n, *runs, **told).end(200)
    assert codes == [0] * n, said
    return said


def wait_for(path, seconds=60):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"waited for {path}"
        time.sleep(0.02)


def losses(folder, key="loss"):
    return np.array([line[key] for line in read_log(folder) if key in line])


def same_checkpoint(a, b, atol=1e-4):
    a, b = load_checkpoint(a / "last.npz"), load_checkpoint(b / "last.npz")
    assert (a.step, a.config, a.loader) == (b.step, b.config, b.loader)
    for x, y in ((a.weights, b.weights), (a.optimizer, b.optimizer)):
        assert {k: (v.shape, v.dtype) for k, v in x.items()} == {k: (v.shape, v.dtype) for k, v in y.items()}
        for k in x:
            scale = max(1.0, mx.abs(x[k]).max().item())
            assert mx.abs(x[k] - y[k]).max().item() <= atol * scale, k


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) + "." for _ in range(500)]
    tokenizer = CharTokenizer("".join(texts))
    write_tokens(texts[:450], tokenizer, folder / "train.npy")
    write_tokens(texts[450:], tokenizer, folder / "held.npy")
    return folder


# Equal ----------------------------------------------------------------------------------

# windows: as many targets on each rank; documents: padding, so different numbers of them
MIXTURE = dict(kind="moe", d_ff=48, n_experts=4, aux_weight=0.1, capacity=2.0)  # nobody is left out
KINDS = {
    "windows": dict(train=dict(max_steps=50)),
    "documents": dict(train=dict(max_steps=12, mode="documents", optimizer="adamw", grad_accum=2,
                                 grad_clip=0.3, grad_checkpoint=True, weight_decay=0.1)),  # fmt: skip
    "mixture": dict(train=dict(max_steps=50, optimizer="adamw"), shape=MIXTURE),
    "mixture-documents": dict(train=dict(max_steps=12, mode="documents", grad_accum=2, grad_checkpoint=True),
                              shape=MIXTURE),  # fmt: skip
    "mixture-biases": dict(train=dict(max_steps=30, mode="documents", optimizer="adamw", batch_size=2, lr=0.01),
                           shape=MIXTURE | dict(balance="bias")),  # fmt: skip
}


@pytest.fixture(scope="module")
def runs(data):
    "The same runs on one process, on two, on two again, and on two that share the weights"
    told = lambda kind, **more: [dict(run, out=f"{kind}-{name}", **more) for name, run in KINDS.items()]
    finished(data, 1, *told("one"))
    again = dict(KINDS["documents"], out="again")
    finished(data, 2, *told("two"), *told("shards", shard=True), again)
    return data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["two", "shards"])
def test_two_processes_equal_one(runs, kind, how):
    one, other = runs / f"one-{kind}", runs / f"{how}-{kind}"
    for key in ("loss", "val_loss", "tokens", "grad_norm"):
        a, b = losses(one, key), losses(other, key)
        assert len(a) == len(b) >= 1
        assert np.abs(a - b).max() <= (1e-5 if "loss" in key else 5e-4 * a.max()), key
    same_checkpoint(one, other)


@pytest.mark.parametrize("how", ["two", "shards"])
def test_biases_of_routers_follow_the_load_of_all_ranks(runs, how):
    "Their loss is linear in the load, so a rank's own load does; weighed by its own targets it does not"
    one, other = (load_checkpoint(runs / f"{name}-mixture-biases" / "last.npz").weights for name in ("one", how))
    biases = [k for k in one if k.endswith("router.bias")]
    assert len(biases) == 2
    for k in biases:
        assert mx.abs(one[k]).min().item() > 1e-3, "every bias has moved"
        assert mx.abs(one[k] - other[k]).max().item() < 1e-5, k


def test_the_same_ranks_give_the_same_bits(runs):
    two, again = runs / "two-documents", runs / "again"
    assert (two / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    same_checkpoint(two, again, atol=0)


def test_only_rank_0_writes(runs):
    names = lambda name: sorted(p.name for p in (runs / name).iterdir())
    assert names("two-windows") == names("one-windows") == names("shards-windows")


MANY = dict(shape=dict(d_model=48, n_heads=4, d_ff=96))
STARTS = 0, 60, 120


def many(optimizer, max_steps=180):
    "A run that amplifies what is unequal: 200 times in 25 steps with Muon"
    train = dict(max_steps=max_steps, batch_size=12, optimizer=optimizer, mode="documents",
                 schedule="constant", save_every=10, keep=100)  # fmt: skip
    return dict(MANY, train=train)


@pytest.mark.stress
@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_any_number_takes_the_steps_of_one(data, n, optimizer):
    "Ten steps from anywhere on the way of one process, before rounding has grown"
    one = data / f"many-{optimizer}"
    if not one.exists():
        finished(data, 1, dict(many(optimizer), out=one.name))
    for kind, shard in (("plain", False), ("shards", True)):
        told, names = [], {at: f"{one.name}-{n}-{kind}-{at}" for at in STARTS}
        for at, name in names.items():
            if at:
                (data / name).mkdir()
                shutil.copy(one / f"step_{at:07}.npz", data / name / "last.npz")
                shutil.copy(one / "metrics.jsonl", data / name)
            told.append(dict(many(optimizer, at + 10), out=name, resume=at > 0, shard=shard))
        finished(data, n, *told)
        for at, name in names.items():
            for key in ("loss", "grad_norm"):
                a, b = losses(one, key)[at : at + 10], losses(data / name, key)[at:]
                assert len(a) == len(b) == 10
                assert np.abs(a - b).max() <= (1e-5 if key == "loss" else 1e-3 * a.max()), (at, key)
            a, b = load_checkpoint(one / f"step_{at + 10:07}.npz"), load_checkpoint(data / name / "last.npz")
            assert a.loader == b.loader
            assert all(mx.abs(a.weights[k] - b.weights[k]).max().item() < 1e-4 for k in a.weights)


@pytest.mark.stress
def test_they_part_as_rounding_does(data):
    "Over 180 steps two processes differ from one as one does from itself with its rows turned round"
    names = {"turned": 1, "apart": 2, "whole": 1}
    for name, n in names.items():
        finished(data, n, dict(many("muon"), out=name, turned=name == "turned"))
    far = {name: np.abs(losses(data / name) - losses(data / "whole")) for name in names}
    for at in range(0, 180, 30):
        two, itself = (far[name][at : at + 30].max() for name in ("apart", "turned"))
        assert two < 10 * itself, (at, two, itself)
    assert far["apart"][:10].max() <= 1e-5 and far["turned"].max() > 1e-3


# A rank is lost -------------------------------------------------------------------------


def killed(data, out, victim, **more):
    "Kill one of two ranks after a checkpoint; how long the other lives, its code and its lines"
    run = dict(out=out, train=dict(max_steps=10_000), pause=0.02, watch=dict(patience=15))
    ranks = program(data, 2, run | more)
    wait_for(data / out / "step_0000010.npz")
    ranks.p[victim].kill()
    start = time.time()
    code = ranks.p[1 - victim].wait(40)
    seconds = time.time() - start
    _, said = ranks.end()
    return seconds, code, said[1 - victim]


@pytest.mark.parametrize("victim, shard", [(1, False), (0, True)])
def test_a_killed_rank_ends_the_other_and_the_checkpoint_goes_on(runs, victim, shard):
    out = f"killed-{victim}"
    seconds, code, said = killed(runs, out, victim, shard=shard)
    # at once, as a rule; on a busy machine MLX may wait on, and patience ends it
    assert seconds < 25 and code == 5
    assert said == [f"llmfs: rank {1 - victim} of 2 ends: another rank is gone or silent; "
                    f"go on with --resume --out {out}"]  # fmt: skip
    at = load_checkpoint(runs / out / "last.npz").step
    assert at >= 5
    run = dict(out=out, resume=True, train=dict(max_steps=at + 5), shard=shard)
    finished(runs, 2 if shard else 1, run)
    again = losses(runs / out)
    assert len(again) == at + 5


def test_a_silent_rank_ends_the_other(data):
    run = dict(out="silent", train=dict(max_steps=10_000), pause=0.02, watch=dict(patience=3))
    ranks = program(data, 2, run)
    wait_for(data / "silent/last.npz")
    ranks.p[1].send_signal(signal.SIGSTOP)
    start = time.time()
    assert ranks.p[0].wait(30) == 5 and 2 < time.time() - start < 15
    ranks.p[1].kill()
    assert ranks.end()[1][0][0].startswith("llmfs: rank 0 of 2 ends: another rank is gone or silent")


def test_a_rank_that_waits_for_a_lost_one_can_be_stopped(data):
    "As MLX's launcher does when a rank fails, with a backend that never notices"
    run = dict(out="stuck", train=dict(max_steps=10_000), pause=0.02, watch=dict(grace=2, longest=0))
    ranks = program(data, 2, run)
    wait_for(data / "stuck/last.npz")
    ranks.p[1].send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    ranks.p[0].terminate()
    start = time.time()
    assert ranks.p[0].wait(30) == 5 and 1 < time.time() - start < 15
    ranks.p[1].kill()
    ranks.end()
    load_checkpoint(data / "stuck/last.npz")


def test_a_rank_that_never_comes(data):
    ranks = program(data, 2, only=[0], join=1)
    codes, said = ranks.end(30)
    assert codes == [-9]
    assert said == [["llmfs: rank 0 of 2 ends: the others did not come within 1 s; "
                     "start all of them at once, with mlx.launch"]]  # fmt: skip


def test_a_rank_lost_while_weights_are_given_out_is_a_lost_rank():
    ranks = object.__new__(distributed.Ranks)
    ranks.rank, ranks.size, ranks.folder, ranks.watch = 1, 2, None, Watch(ranks.farewell)
    ranks.same = lambda told: None

    def hold(model, optimizer):
        raise RuntimeError("[ring] connection to a peer was lost")

    ranks.hold = hold
    trainer = SimpleNamespace(cfg=TrainConfig(), at=SimpleNamespace(step=0),
                              train=SimpleNamespace(header=dict(sha256="")))  # fmt: skip
    with pytest.raises(distributed.LostRank, match="start all of them anew"):
        ranks.share(trainer, None, None)


def test_a_full_disk_on_rank_0_ends_all_with_its_line(data):
    run = dict(out="full", train=dict(max_steps=50), full_at=10)
    codes, said = program(data, 2, run).end()
    assert codes[0] == 4 and codes[1] == 5
    assert said == [["llmfs: no space left to write last.npz"], []]
    assert load_checkpoint(data / "full/last.npz").step == 5


def test_stop_asked_of_one_rank_stops_all_and_another_number_goes_on(runs):
    run = dict(out="stopped", train=dict(max_steps=50, batch_size=4), pause=0.05)
    ranks = program(runs, 2, run)
    wait_for(runs / "stopped/last.npz")
    ranks.p[1].send_signal(signal.SIGINT)
    codes, said = ranks.end()
    assert codes == [130, 130] and said[1] == []
    assert "stopped after step" in said[0][0] and "--resume --out stopped" in said[0][0]
    at = load_checkpoint(runs / "stopped/last.npz").step
    assert 5 <= at < 50
    finished(runs, 1, dict(out="stopped", resume=True, train=dict(max_steps=50)))
    assert np.abs(losses(runs / "stopped") - losses(runs / "one-windows")).max() <= 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_run_goes_on_with_no_more_than_its_rows(data, optimizer):
    out, shape = f"heavy-{optimizer}", dict(d_model=256, d_ff=704, n_layers=4)
    run = dict(out=out, shape=shape, train=dict(max_steps=2, optimizer=optimizer, eval_every=100), weigh=True)
    one = finished(data, 1, run)
    run["train"]["max_steps"] = 3
    more = finished(data, 2, dict(run, resume=True, shard=True))
    whole = json.loads(one[0][0])[1]
    for rank in more:
        peak, held = json.loads(rank[0])
        # beside its own rows, those of one stack of matrices for a moment; all would be two of `whole`
        assert held < 0.52 * whole and peak < 1.3 * held, (peak, held, whole)


@pytest.mark.stress
def test_a_run_goes_on_with_any_number_in_any_form(data):
    steps = [(1, False, 10), (4, False, 20), (2, True, 30), (4, True, 40), (1, False, 50)]
    for n, shard, stop in steps:
        train = dict(max_steps=stop, schedule="constant")
        finished(data, n, dict(out="moving", resume=stop > 10, train=train, shard=shard))
    finished(data, 1, dict(out="staying", train=dict(max_steps=50, schedule="constant")))
    assert np.abs(losses(data / "moving") - losses(data / "staying")).max() <= 1e-5


@pytest.mark.stress
def test_killed_at_any_time_it_goes_on_from_a_good_checkpoint(data):
    rng = random.Random(0)
    # sharded, MLX may wait for the lost rank inside a step, which only patience ends
    run = dict(out="often", train=dict(max_steps=100_000, save_every=3), watch=dict(patience=10))
    for i in range(15):
        resume = (data / "often/last.npz").exists()  # not yet, where the first ones were killed at once
        how = dict(resume=resume, overwrite=not resume, shard=rng.random() < 0.5)
        ranks = program(data, rng.choice([2, 4]), run | how, join=20)
        time.sleep(2.5 + 3 * rng.random())
        rng.choice(ranks.p).kill()
        codes, said = ranks.end(60)
        assert sorted(set(codes)) in ([-9], [-9, 5]), said
        if (data / "often/last.npz").exists():
            load_checkpoint(data / "often/last.npz")
    at = load_checkpoint(data / "often/last.npz").step
    finished(data, 2, run | dict(resume=True, train=dict(max_steps=at + 5)))
    assert at > 20 and len(losses(data / "often")) == at + 5


# The command ----------------------------------------------------------------------------

CLI = "import sys; from llmfs.cli import main; sys.exit(main())"
TRAIN = "train --text text.txt --tokenizer char --seq-len 16 --max-steps 4 --eval-every 4".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(2)
    lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def commands(folder, *ranks_args):
    return Ranks(folder, len(ranks_args), [[sys.executable, "-c", CLI, *TRAIN, *args.split()]
                                           for args in ranks_args])  # fmt: skip


def test_train_under_mlx_launch_is_one_run(text):
    args = "--batch-size 4 --out two --shard --json".split()
    said = launch(2, [sys.executable, "-c", CLI, *TRAIN, *args], cwd=text)
    assert said.count('"steps": 4') == said.count("text: ") == 1 and "WARN" not in said, said
    done = subprocess.run([sys.executable, "-c", CLI, *TRAIN, *"--batch-size 4 --out one".split()],
                          cwd=text, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.abs(losses(text / "two", "val_loss") - losses(text / "one", "val_loss")).max() < 1e-5
    same_checkpoint(text / "one", text / "two")


@pytest.mark.parametrize(
    "args, line",
    [
        (["--batch-size 3 --out a"] * 2, "a batch of 3 rows cannot be shared by 2 ranks: give a multiple of 2"),
        (["--lr 0.01 --out b", "--lr 0.02 --out b"],
         "rank 1 was started with lr 0.02, rank 0 with 0.01: start all with the same command"),
        (["--resume --text --out c"] * 2, "c holds no run to go on with: c/run.json is missing"),
        (["--lr -1 --out d"] * 2, "lr is -1.0; it must be 0 or more, and finite"),
    ],
)  # fmt: skip
def test_what_cannot_work_ends_all_with_one_line(text, args, line):
    codes, said = commands(text, *args).end()
    assert sum(said, []) == [f"llmfs: {line}"] or sum(said, [])[1:] == [f"llmfs: {line}"], said
    assert set(codes) <= {2, 5} and 2 in codes
    assert not list(text.glob("[a-d]/*.npz"))


def test_shard_needs_several(text):
    done = subprocess.run([sys.executable, "-c", CLI, *TRAIN, "--shard"], cwd=text, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == ("llmfs: --shard needs several processes: "
                                   "mlx.launch -n 2 -- llmfs train --shard")  # fmt: skip


# Parts ----------------------------------------------------------------------------------


def test_launched_reads_each_launcher(tmp_path):
    assert launched({}) == (0, 1)
    assert launched(dict(MLX_RANK="3", MLX_WORLD_SIZE="4")) == (3, 4)
    assert launched(dict(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2")) == (1, 2)
    assert launched(dict(PMI_RANK="1", PMI_SIZE="2")) == (1, 2)
    hosts = tmp_path / "hosts"
    hosts.write_text("\n")  # mlx.launch -n 1
    assert launched(dict(MLX_RANK="0", MLX_HOSTFILE=str(hosts))) == (0, 1)
    hosts.write_text('[["a:1", "a:2"], ["b:1"], ["c:1"]]')
    assert launched(dict(MLX_RANK="2", MLX_HOSTFILE=str(hosts))) == (2, 3)
    assert launched(dict(MLX_RANK="1", MLX_IBV_DEVICES=str(hosts), MLX_JACCL_COORDINATOR="a:1")) == (1, 3)


def test_watch():
    w = Watch(str, patience=60, grace=5)
    t = w.beat
    assert not w.over(t + 59) and w.over(t + 61)
    w.asked = t
    assert not w.over(t + 4) and w.over(t + 6)
    w.paused = True
    assert w.over(t + 6)
    w.moved(agreed=True)
    assert w.asked is None and not w.over(t + 1000)
    w.paused, w.asked, w.longest = False, w.beat, 4.0
    assert not w.over(w.beat + 11) and w.over(w.beat + 13)


@pytest.mark.parametrize("rows, size", [(4, 2), (3, 2), (1, 3), (7, 4)])
def test_rows_of_a_batch(rows, size):
    x = np.arange(rows * 3, dtype=np.int32).reshape(rows, 3)
    parts = [_my_rows(Batch(x, x, x), r, size) for r in range(size)]
    assert len({p.inputs.shape for p in parts}) == 1
    y = np.concatenate([p.targets for p in parts])
    assert np.array_equal(y[:rows], x) and (y[rows:] == -100).all()
    assert (np.concatenate([p.segments for p in parts])[rows:] == -1).all()
    assert _my_rows(Batch(x, x, None), 0, size).segments is None




@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_recipe_for_little_memory_leaves_every_rank_a_row(size):
    cfg = recipe("124m", memory=1e6, world_size=size)
    assert cfg.batch_size == size and cfg.batch_size * cfg.grad_accum == 256
