"""Copies among rows of conversations, and a split that keeps what belongs together on one side. See my_adapter.ipynb.

If a question that is trained on is also in the test, the test measures memory. Lesson 07 looks for such pairs by hand.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lora_edu.lab.chat_rows import ChatRow

Key = Callable[[ChatRow], str]
RUN = 5  # words in a row that two texts share


def prompt_key(row: ChatRow) -> str:
    """What the user says in a row, without capitals and punctuation: two rows that share it ask the same."""
    return " ".join(words_of(" ".join(each["content"] for each in row["messages"] if each["role"] == "user")))


def answer_key(row: ChatRow) -> str:
    """The last answer in the same form."""
    return " ".join(words_of(row["messages"][-1]["content"]))


def row_key(row: ChatRow) -> str:
    """Question and answer: two rows that share both are copies."""
    return f"{prompt_key(row)}\n{answer_key(row)}"


def words_of(text: str) -> list[str]:
    """The words of a text in lower case. Where there is no letter and no digit, the text itself."""
    return re.findall(r"\w+", text.casefold()) or text.split()


def same(rows: Sequence[ChatRow], key: Key) -> list[list[int]]:
    """Groups of places of rows that share a key; each group has at least two, in the order of the rows."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        places[key(row)].append(place)
    return [group for group in places.values() if len(group) > 1]


def without_copies(rows: Sequence[ChatRow]) -> list[ChatRow]:
    """The rows without later copies of a question with the same answer."""
    copies = {place for group in same(rows, row_key) for place in group[1:]}
    return [row for place, row in enumerate(rows) if place not in copies]


def near_duplicates(rows: Sequence[ChatRow], share: float = 0.5) -> list[tuple[int, int, float]]:
    """Pairs of rows whose questions and answers are nearly the same.

    Compared are the runs of five words. What stands in more than a tenth of the rows (and in more than ten) belongs to
    the form of the questions, and does not count.

    Returns:
        (place, place, share) of each pair that shares at least ``share`` of the runs of the one that has fewer, the
        largest share first.
    """
    runs = [runs_of(row) for row in rows]
    holders: dict[str, list[int]] = defaultdict(list)
    for place, each in enumerate(runs):
        for run in each:
            holders[run].append(place)
    common = {run for run, places in holders.items() if len(places) > max(10, len(rows) // 10)}
    own = [len(each - common) for each in runs]
    shared: Counter[tuple[int, int]] = Counter()
    for run, places in holders.items():
        if run not in common:
            shared.update((first, other) for i, first in enumerate(places) for other in places[i + 1 :])
    pairs = [(first, other, count / min(own[first], own[other])) for (first, other), count in shared.items()]
    return sorted((pair for pair in pairs if pair[2] >= share), key=lambda pair: (-pair[2], pair))


def runs_of(row: ChatRow) -> set[str]:
    """All runs of five words in a row's messages."""
    found = (words_of(each["content"]) for each in row["messages"] if each["role"] != "system")
    return {" ".join(words[i : i + RUN]) for words in found for i in range(len(words) - RUN + 1)}


def split_rows(rows: Sequence[ChatRow], share: float = 0.15, most: int = 60, seed: int = 0) -> dict[str, list[ChatRow]]:
    """Split into "train", "validation" (to choose by) and "test" (to report), at random by question.

    All rows of one question, and rows that are nearly the same, stay on one side. A group of them that is larger than
    what is left to hold out is trained on.

    Args:
        share: of the rows, for each of the two parts that are held out.
        most: rows in each of them, however many there are: a rival with long prompts is measured on them, too.

    Raises:
        ValueError: if there are so few different questions that nothing would be held out.
    """
    pairs = [(group[0], other) for group in same(rows, prompt_key) for other in group[1:]]
    pairs += [(first, other) for first, other, _ in near_duplicates(rows)]
    first, other = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(pairs)), (first, other)), shape=(len(rows), len(rows)))
    count, labels = connected_components(graph, directed=False)
    groups: list[list[int]] = [[] for _ in range(count)]
    for place, label in enumerate(labels):
        groups[label].append(place)
    random.Random(seed).shuffle(groups)
    room = dict.fromkeys(("validation", "test"), min(most, round(share * len(rows))))
    split: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for group in groups:
        name = next((name for name, left in room.items() if len(group) <= left), "train")
        split[name] += group
        if name in room:
            room[name] -= len(group)
    if min(map(len, split.values())) < 2:
        raise ValueError(
            f"{len(rows)} rows with {count} different questions: too few to hold some out to choose by, and others to "
            "report; expected at least 20, and some hundreds to learn from"
        )
    return {name: [rows[place] for place in sorted(places)] for name, places in split.items()}


def leaks(split: Mapping[str, Sequence[ChatRow]], key: Key) -> dict[str, int]:
    """How many rows of each other part share a key with a row of "train"."""
    known = set(map(key, split["train"]))
    return {name: sum(key(row) in known for row in rows) for name, rows in split.items() if name != "train"}
