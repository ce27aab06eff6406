"""A task that needs the order of words: were two neighbouring words of this gloss swapped? Built in lesson 15.

Which words a text has says nothing here. Half of the glosses are as WordNet has them, half have two neighbours
exchanged, so that guessing is right half of the time.
"""

from __future__ import annotations

import random
import re
from typing import Any

from lora_edu.lab.datasets import load_dataset

SHORTEST, LONGEST = 6, 14  # words of a gloss
SIZES = {"train": 6000, "validation": 500, "test": 1000}
SEED = 15
PLAIN_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


def word_order(split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of one fixed split: ``word``, ``definition`` (perhaps with a swap) and ``label``, 1 where two were swapped.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``; the glosses come from the split of ``wordnet_glosses`` that
            has the same name, so that none is in two of them, and each stands here once.
        limit: no more than so many rows, from the first.

    Glosses of 6 to 14 words without punctuation, which would give a swap away. Labels alternate, so that the first
    rows are as balanced as all of them.

    Raises:
        ValueError: for an unknown split.
    """
    rows = {row["definition"]: row for row in load_dataset("wordnet_glosses", split)}
    chosen = [row for definition, row in rows.items() if is_plain(definition)]
    draw = random.Random(f"{SEED} {split}")
    draw.shuffle(chosen)
    found = []
    for number, row in enumerate(chosen[: SIZES[split]][:limit]):
        words, label = row["definition"].split(), number % 2
        text = " ".join(swapped(words, draw)) if label else row["definition"]
        found.append({"word": row["word"], "definition": text, "label": label})
    return found


def is_plain(definition: str) -> bool:
    """Whether a gloss has 6 to 14 words, of letters only, and two neighbours that differ."""
    words = definition.split()
    plain = all(PLAIN_WORD.fullmatch(word) for word in words)
    return SHORTEST <= len(words) <= LONGEST and plain and len({word.lower() for word in words}) > 1


def swapped(words: list[str], draw: random.Random) -> list[str]:
    """The words with two neighbours exchanged, two that are not the same word."""
    places = [i for i in range(len(words) - 1) if words[i].lower() != words[i + 1].lower()]
    place = draw.choice(places)
    return [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
