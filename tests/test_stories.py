"The story grammar: exact prices, one derivation, mistakes named."

import math
import random
import re
from itertools import islice

from llmfs.data.stories import CLASSES, KINDS, Mistake, Stories, next_scenes

import pytest


@pytest.fixture(scope="module")
def world():
    return Stories()


def test_price_read_equals_price_drawn():
    for n_facts, n in ((0, 15_000), (50, 5_000)):
        world = Stories(n_facts)
        for text, logprob in islice(world.stream(None, seed=7), n):
            assert abs(world.read(text) - logprob) < 1e-9


def test_entropy_and_length_are_the_averages():
    for n_facts in (0, 3):
        world = Stories(n_facts)
        drawn = list(islice(world.stream(None, seed=1), 8000))
        nats = [-s.logprob for s in drawn]
        mean = sum(nats) / len(nats)
        error = (sum((x - mean) ** 2 for x in nats) / len(nats) ** 2) ** 0.5
        assert abs(mean - world.entropy()) < 4 * error
        per_byte = sum(nats) / math.log(2) / sum(len(s.text.encode()) for s in drawn)
        assert world.bits_per_byte() == pytest.approx(per_byte, rel=0.005)


def test_sizes(world):
    texts = [s.text for s in islice(world.stream(seed=3), 4000)]
    words = [len(t.split()) for t in texts]
    assert 40 <= min(words) and max(words) <= 150
    assert len({w.lower() for t in texts for w in re.findall(r"[A-Za-z]+", t)}) >= 300


def test_scene_probabilities_add_up():
    def walk(told, hidden):
        scenes = next_scenes(told, hidden)
        assert sum(p for _, p in scenes) == pytest.approx(1)
        for scene, _ in scenes:
            if scene != "end":
                after = (hidden or scene == "hide") and scene != "fetch"
                walk(told | {scene}, after)

    walk(frozenset(), False)


def test_same_seed_same_story_and_disjoint_splits(world):
    assert world.sample(5) == world.sample(5) != world.sample(6)
    train = {s.text for s in islice(world.stream("train", 0), 5000)}
    validation = {s.text for s in islice(world.stream("validation", 0), 500)}
    assert not train & validation
    assert all(s.text in train for s in islice(world.stream("train", 0), 10))
    with pytest.raises(ValueError, match="unknown split 'test'"):
        next(world.stream("test"))


def test_no_word_starts_another():
    world = Stories(n_facts=100)
    for words in world.classes.values():
        assert len(set(words)) == len(words)
        assert not [(a, b) for a in words for b in words if b.startswith(a + " ")]
    assert len({s.split()[0] for s in world.starts}) == len(world.starts)


def test_every_foreign_word_is_found(world):
    rng = random.Random(0)
    for text, _ in islice(world.stream(seed=11), 300):
        starts = [m.start() for m in re.finditer(r"[A-Za-z]+", text)]
        at = rng.choice(starts)
        end = at + len(re.match(r"[A-Za-z]+", text[at:])[0])
        mistake = world.explain(text[:at] + "zebra" + text[end:])
        assert mistake.position <= at and world.logprob(text[:at] + "zebra") == -math.inf


def test_every_changed_memory_is_found_at_its_place(world):
    "Replace the last mention of a slot by another word of its class."
    seen = set()
    for text, _ in islice(world.stream(seed=12), 400):
        for slot, kind in (("color", "forgotten object"), ("thing", "forgotten object"),
                           ("animal", "forgotten character"), ("pet", "forgotten character"),
                           ("trait", "forgotten character"), ("home", "forgotten place"),
                           ("landmark", "forgotten place"), ("found", "forgotten place")):  # fmt: skip
            hits = [m for w in CLASSES[slot] for m in re.finditer(rf"\b{w}\b", text)]
            first, last = min(hits, key=lambda m: m.start()), max(hits, key=lambda m: m.start())
            if first[0] != last[0] or first.start() == last.start():
                continue
            other = next(w for w in CLASSES[slot] if w != last[0])
            mistake = world.explain(text[: last.start()] + other + text[last.end() :])
            assert mistake.position == last.start(), (slot, text, mistake)
            assert mistake.kind == kind
            seen.add(slot)
    assert len(seen) == 8


def test_pronouns_states_and_facts():
    world = Stories(n_facts=20)
    for text, _ in islice(world.stream(seed=13), 200):
        wrong = text.replace(". She lived", ". It lived").replace(". He lived", ". It lived")
        assert world.explain(wrong).kind == "agreement"
        food = re.search(r"liked (\w+)\.", text)[1]
        other = next(f for f in CLASSES["food"] if f != food)
        assert world.explain(text.replace(f"liked {food}.", f"liked {other}.")).kind == "wrong fact"
    hidden = next(s.text for s in world.stream(seed=14) if " still " in s.text)
    carried = re.sub(r"The (\w+) was still [^.]*\.", r"She carried the \1.", hidden)
    assert world.explain(carried).kind == "forgotten object"


def test_plots(world):
    text = next(s.text for s in world.stream(seed=1) if " Soon " in s.text)
    meal = re.search(r" Soon .*? ate .*?\.", text)[0]
    assert world.explain(text.replace(meal, meal + meal)).kind == "broken plot"
    assert world.explain(text + " Soon").kind == "broken plot"
    assert world.explain(text.split(" When it")[0]).kind == "broken plot"
    assert world.explain(text) is None


@pytest.mark.parametrize("text", ["", " ", "Once", "é", "\0", "Once upon a time there was a " * 2])
def test_nonsense(world, text):
    mistake = world.explain(text)
    assert isinstance(mistake, Mistake) and mistake.kind in KINDS
    assert "\n" not in str(mistake) and world.logprob(text) == -math.inf


@pytest.mark.parametrize("n", [-1, 3073])
def test_number_of_facts(n):
    with pytest.raises(ValueError, match="n_facts must be between 0 and 3072"):
        Stories(n)


def test_a_hidden_place_that_nobody_chose(world):
    "A story that says where a thing is hidden that was never hidden."
    carried = next(s.text for s in world.stream(seed=14) if " all the way" in s.text)
    told = re.sub(r"(He|She) carried the \w+ (\w+) all the way", r"The \2 was still in a deep hole", carried)
    assert world.explain(told).kind == "forgotten object"


def test_nats_per_token_and_its_error(world):
    class Letters:
        encode = staticmethod(list)

    found = [world.nats_per_token(Letters, n=300, seed=seed) for seed in range(40)]
    means, errors = zip(*found)
    mean = sum(means) / 40
    spread = (sum((m - mean) ** 2 for m in means) / 39) ** 0.5
    assert spread == pytest.approx(sum(errors) / 40, rel=0.4)
    exact = world.bits_per_byte() * math.log(2)  # letters are bytes here, but for the end
    assert mean == pytest.approx(exact, rel=0.005)
