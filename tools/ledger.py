"""Who likes what, and nothing else: a text whose facts only weights can hold.

The facts of the built-in stories, at sixteen times as many places: pages of lines such as "The baker of Upper
Albury likes cheese." Somebody who knew them all would still pay for who is named, and for nothing else.
"""

import math
import random
from functools import lru_cache
from itertools import islice

from llmfs.data.stories import CLASSES, Story, all_facts

SIDES = "Old New Upper Lower North South East West Great Little High Low Far Near Long Broad".split()
LINES = 20  # of a page


@lru_cache(1)
def all_lines() -> dict:
    "Owner -> food: 49,152 facts, the same for everybody."
    rng = random.Random("ledger")
    owners = [owner.replace(" of ", f" of {side} ") for side in SIDES for owner in all_facts()]
    rng.shuffle(owners)
    return {owner: rng.choice(CLASSES["food"]) for owner in owners}


class Ledger:
    "Draws pages about the first facts, with what each costs who knows them all."

    def __init__(
        self,
        n_facts: int,  # of those that exist
        often: int = 1,  # half the lines of a training page are about one fact of so many; 1: all alike
    ):
        if not 1 <= n_facts <= len(all_lines()):
            raise ValueError(f"n_facts must be between 1 and {len(all_lines())}, not {n_facts}")
        self.facts = list(islice(all_lines().items(), n_facts))
        self.often = self.facts[: -(-n_facts // often)]

    def stream(self, split: str = "train", seed: int = 0):
        "Pages without end. Held-out pages have the same facts, all alike: there are no others."
        rng, often = random.Random(f"{split} {seed}"), self.often if split == "train" else self.facts
        even = len(self.often) == len(self.facts)
        pick = lambda: rng.choice(self.facts if even or rng.random() >= 0.5 else often)
        while True:
            text = " ".join("The {} likes {}.".format(*pick()) for _ in range(LINES))
            yield Story(text, -LINES * math.log(len(self.facts)))

    def marks(self, text: str) -> list[tuple[int, str, str]]:
        "End, slot and group of each part of a page."
        marks, at = [], 0
        for line in text.removesuffix(".").split(". "):
            who = line.index(" likes ")
            marks += [(at + who, "owner", "choice"), (at + who + len(" likes"), "fixed text", "fixed text"),
                      (at + len(line), "fact", "fact"), (at + len(line) + 1, "fixed text", "fixed text")]  # fmt: skip
            at += len(line) + 2
        return marks
