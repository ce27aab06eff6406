"""Blind pairs for human readers: two systems' answers side by side, in an order that nobody knows until the tally.

Built in lesson 12.
"""

import random
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_edu.lab.intervals import bootstrap_interval

LETTERS = ("A", "B")
TIE = "="


class Tally(NamedTuple):
    """What the readings so far say, unblinded.

    ``wins`` has the pairs that each system won; ``ties`` the pairs with no preference; ``left`` those not read yet;
    ``share`` is the first system's part of all readings, a tie counting half, and ``interval`` its 95 percent
    interval, (0, 1) while fewer than two pairs are read.
    """

    wins: dict[str, int]
    ties: int
    left: int
    share: float | None
    interval: tuple[float, float]

    def __str__(self) -> str:
        if self.share is None:
            return f"no pair is read yet, {self.left} are waiting"
        first, low, high = next(iter(self.wins)), *self.interval
        won = ", ".join(f"{name} {count}" for name, count in self.wins.items())
        told = "not evidence" if low <= 0.5 <= high else "evidence"
        return (
            f"{won}, ties {self.ties}, not read {self.left}; {first} is preferred in {self.share:.0%} "
            f"[{low:.0%}, {high:.0%}]: {told} of a preference"
        )


class BlindPairs:
    """Pairs of two systems' answers to the same questions, shuffled twice: the pairs, and who is A in each.

    Pairs whose answers are the same are left out: nobody can prefer one.

    Args:
        questions: what both answered, one text for each pair.
        systems: {name: answers}, two of them, in the order of the questions.
        seed: of both shuffles. Somebody else than the reader should choose it.

    Raises:
        ValueError: if there are not two systems, or not as many answers as questions, or nothing differs.

    Built in lesson 12.
    """

    def __init__(self, questions: Sequence[str], systems: Mapping[str, Sequence[str]], seed: int = 0):
        if len(systems) != 2 or any(len(answers) != len(questions) for answers in systems.values()):
            counts = ", ".join(f"{name}: {len(answers)}" for name, answers in systems.items())
            raise ValueError(f"{len(questions)} questions, answers of {counts}: expected two systems with one for each")
        self.names = tuple(systems)
        one, other = systems.values()
        generator = random.Random(seed)
        rows = [row for row in zip(questions, one, other, strict=True) if row[1] != row[2]]
        if not rows:
            raise ValueError("the two systems give the same answers: there is nothing to prefer")
        generator.shuffle(rows)
        # An even split of who is A, so that a reader who always takes A prefers neither.
        orders = [place % 2 == 0 for place in range(len(rows))]
        generator.shuffle(orders)
        self.questions = [row[0] for row in rows]
        self._first_is_a = orders
        self.shown = [row[1:] if straight else row[:0:-1] for row, straight in zip(rows, orders, strict=True)]
        self.preferred: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.questions)

    def text(self, width: int = 90) -> str:
        """All pairs as plain text, numbered from 1."""
        lines = []
        for number, (question, answers) in enumerate(zip(self.questions, self.shown, strict=True), start=1):
            lines.append(f"{number}  {question}")
            for letter, answer in zip(LETTERS, answers, strict=True):
                lines.append(textwrap.fill(f"   {letter}  {answer}", width, subsequent_indent=6 * " "))
        return "\n".join(lines)

    def prefer(self, number: int, letter: str) -> None:
        """Note a reader's choice: "A", "B", or "=" for no preference. A second choice replaces the first.

        Raises:
            ValueError: for a number or a letter that there is not.
        """
        if number not in range(1, len(self) + 1):
            raise ValueError(f"there is no pair {number}: they are numbered from 1 to {len(self)}")
        if letter.upper() not in (*LETTERS, TIE):
            raise ValueError(f"pair {number}: {letter!r} is no choice; expected 'A', 'B', or '=' for no preference")
        self.preferred[number] = letter.upper()

    def tally(self) -> Tally:
        """Say which system was which, and count. Look only once you have read all the pairs that you mean to read."""
        points = []
        for number, letter in self.preferred.items():
            straight = self._first_is_a[number - 1]
            points.append(0.5 if letter == TIE else float((letter == "A") == straight))
        wins = {name: points.count(value) for name, value in zip(self.names, (1.0, 0.0), strict=True)}
        interval = bootstrap_interval(points) if len(points) > 1 else (0.0, 1.0)
        share = sum(points) / len(points) if points else None
        return Tally(wins, points.count(0.5), len(self) - len(points), share, interval)

    def form(self) -> Any:
        """The pairs with a button for each choice, a widget for a running notebook; a click is ``prefer``.

        Raises:
            ModuleNotFoundError: without ipywidgets, which the extra "lessons" brings.
        """
        import ipywidgets

        options = [("not read", ""), *((letter, letter) for letter in LETTERS), ("no preference", TIE)]
        rows = []
        for number, (question, answers) in enumerate(zip(self.questions, self.shown, strict=True), start=1):
            shown = "\n".join(f"{letter}  {answer}" for letter, answer in zip(LETTERS, answers, strict=True))
            buttons = ipywidgets.ToggleButtons(options=options, value=self.preferred.get(number, ""))

            def noted(change: Any, number: int = number) -> None:
                if change["new"]:
                    self.prefer(number, change["new"])
                else:
                    self.preferred.pop(number, None)

            buttons.observe(noted, names="value")
            text = ipywidgets.Textarea(f"{number}  {question}\n{shown}", disabled=True, rows=5)
            text.layout.width = "95%"
            rows.append(ipywidgets.VBox([text, buttons]))
        return ipywidgets.VBox(rows)
