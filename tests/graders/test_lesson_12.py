"""The checks of lesson 12 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from found import assert_random_state_kept, each_is_found, each_passes
from lora_edu.course import checks
from lora_edu.lab.intervals import bootstrap_interval, paired_interval
from lora_edu.lab.rubric import contamination, runs_of, words_of

pytestmark = pytest.mark.graders
NOTEBOOK = "12_evaluate"

# Your turn: the bootstrap


def drawn(values: Sequence[float], draws: int = 2000, size: int | None = None, replace: bool = True) -> np.ndarray:
    """The means of samples."""
    generator, array = np.random.default_rng(1), np.asarray(values, dtype=float)
    return np.array([generator.choice(array, size or len(array), replace=replace).mean() for _ in range(draws)])


def middle(found: np.ndarray, left_out: float = 0.05) -> tuple[float, float]:
    return tuple(np.quantile(found, [left_out / 2, 1 - left_out / 2]))


def normal_interval(values: list[float], times: float = 1.96) -> tuple[float, float]:
    mean, error = np.mean(values), np.std(values) / len(values) ** 0.5
    return mean - times * error, mean + times * error


def unseeded(values: list[float]) -> tuple[float, float]:
    generator = np.random.default_rng()
    means = np.asarray(values)[generator.integers(len(values), size=(2000, len(values)))].mean(1)
    return tuple(np.quantile(means, [0.025, 0.975]))


def sorts_in_place(values: list[float]) -> tuple[float, float]:
    values.sort()
    return middle(drawn(values))


SHARE, SKEWED, AGAIN = "the interval of a share", "values that lie unevenly", "the same values give the same"
BOOTSTRAP = {
    "without replacement": (lambda values: middle(drawn(values, replace=False)), SHARE, "it has no width"),
    "quantiles of the values": (
        lambda values: tuple(np.quantile(values, [0.025, 0.975])),
        f"{SHARE}|few values",
        "quantiles of the values",
    ),
    "half as many drawn": (lambda values: middle(drawn(values, size=len(values) // 4)), SHARE, "how many of it"),
    "the middle 90 percent": (lambda values: middle(drawn(values), 0.1), f"{SHARE}|few values", "90 percent"),
    "one standard error": (lambda values: normal_interval(values, 1), SHARE, "one standard error"),
    "the spread of the values": (
        lambda values: (np.mean(values) - 1.96 * np.std(values), np.mean(values) + 1.96 * np.std(values)),
        SHARE,
        "as wide as the values are spread",
    ),
    "mean and standard error": (normal_interval, SKEWED, "equal distances"),
    "the ends exchanged": (lambda values: middle(drawn(values))[::-1], SHARE, "Which end comes first"),
    "the mean alone": (lambda values: float(np.mean(values)), SHARE, "expected two numbers"),
    "from a new seed each time": (unseeded, AGAIN, "gives two intervals"),
    "sorted in place": (sorts_in_place, AGAIN, "changes the list"),
    "lowest and highest": (lambda values: (min(values), max(values)), SHARE, "how many of it"),
}
RIGHT_INTERVALS = {
    "the library's, by another name": lambda values: bootstrap_interval(values),
    "a loop": lambda values: middle(drawn(values)),
    "Python's own": lambda values: python_only(values),
    "scipy": lambda values: by_scipy(values),
}


def python_only(values: list[float]) -> tuple[float, float]:
    generator = random.Random(4)
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(2000))
    return means[50], means[1949]


def by_scipy(values: list[float]) -> tuple[float, float]:
    from scipy.stats import bootstrap

    found = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
    return tuple(found.confidence_interval)


test_bootstrap_names_the_mistake = each_is_found(checks.bootstrap, BOOTSTRAP)
test_other_intervals_pass = each_passes(checks.bootstrap, RIGHT_INTERVALS)


def test_the_bootstrap_leaves_the_random_state_alone() -> None:
    assert_random_state_kept(checks.bootstrap, lambda values: middle(drawn(values)))


# A1

SOME, ENDS, BEYOND = "some of the texts", "all of them, and none", "still a share"
TRUE_SHARE = {
    "what is called": (lambda called, hits, false: called, SOME, "not what is so"),
    "false alarms taken off only": (lambda called, hits, false: called - false, SOME, "misses are not made up"),
    "misses made up for only": (lambda called, hits, false: called / hits, SOME, "not taken off"),
    "divided by hits": (lambda called, hits, false: (called - false) / hits, SOME, "would not give 1"),
    "as if none were missed": (lambda called, hits, false: (called - false) / (1 - false), SOME, "missed none"),
    "not cut": (lambda called, hits, false: (called - false) / (hits - false), BEYOND, "between 0 and 1"),
    "cut at the bottom only": (
        lambda called, hits, false: max(0, (called - false) / (hits - false)),
        BEYOND,
        "between 0 and 1",
    ),
    "upside down": (lambda called, hits, false: (hits - false) / (called - false), SOME, "expected"),
}
RIGHT_SHARES = {
    "in percent and back": lambda called, hits, false: min(100, max(0, 100 * (called - false) / (hits - false))) / 100,
    "NumPy": lambda called, hits, false: np.clip((false - called) / (false - hits), 0, 1),
}
test_true_share_names_the_mistake = each_is_found(checks.true_share, TRUE_SHARE)
test_other_shares_pass = each_passes(checks.true_share, RIGHT_SHARES)

# B1


def overlaps(
    held_out: list[str],
    training: list[str],
    n: int,
    words: Callable[[str], list[str]] = words_of,
    pooled: bool = False,
    by: str = "own",
    several: bool = False,
    short: bool = True,
) -> list[float]:
    """The function with switches for its mistakes."""

    def runs(text: str) -> list:
        found = words(text)
        made = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)] or ([tuple(found)] if short else [])
        return made if several else sorted(set(made))

    others = [runs(text) for text in training]
    if pooled:
        others = [[run for other in others for run in other]]
    shares = []
    for text in held_out:
        own, best = runs(text), 0.0
        for other in others:
            shared = sum(run in set(other) for run in own)
            count = {"own": len(own), "other": len(other), "both": len(set(own) | set(other))}[by]
            best = max(best, shared / max(1, count))
        shares.append(best)
    return shares


COPIES, DRESSED, ITS_OWN, ONE, ONCE, SHORT = (
    "a copy has the share 1", "capitals and punctuation", "held-out text's own runs", "of one training text",
    "repeats counts once", "short texts",
)  # fmt: skip
OVERLAPS = {
    "split at spaces": (lambda h, t, n: overlaps(h, t, n, words=str.split), DRESSED, "words_of"),
    "capitals only": (lambda h, t, n: overlaps(h, t, n, words=lambda x: x.lower().split()), DRESSED, "words_of"),
    "all training texts together": (lambda h, t, n: overlaps(h, t, n, pooled=True), ONE, "largest share"),
    "a share of the training text": (
        lambda h, t, n: overlaps(h, t, n, by="other"),
        f"{COPIES}|{ITS_OWN}",
        "own runs|number of its runs",
    ),
    "Jaccard": (lambda h, t, n: overlaps(h, t, n, by="both"), f"{COPIES}|{ITS_OWN}", "own runs|number of its runs"),
    "repeated runs": (lambda h, t, n: overlaps(h, t, n, several=True), f"{ONCE}|{COPIES}", "set of tuples|runs"),
    "short texts have none": (lambda h, t, n: overlaps(h, t, n, short=False), SHORT, "one run"),
    "always five": (
        lambda h, t, n: overlaps(h, t, 5),
        f"{COPIES}|{DRESSED}|{ITS_OWN}|{ONE}",
        "runs|words_of|own|share",
    ),
    "words instead of runs": (lambda h, t, n: overlaps(h, t, 1), f"{COPIES}|{ITS_OWN}", "runs"),
    "one number": (lambda h, t, n: max(overlaps(h, t, n)), COPIES, "one share for each"),
    "sorted": (lambda h, t, n: sorted(overlaps(h, t, n), reverse=True), COPIES, "runs"),
}
RIGHT_OVERLAPS = {
    "with switches": overlaps,
    "the library's": lambda h, t, n: [contamination([text], t, n)[0].share for text in h],
    "with strings": lambda h, t, n: with_strings(h, t, n),
}


def with_strings(held_out: list[str], training: list[str], n: int) -> list[float]:
    def runs(text: str) -> set[str]:
        found = re.findall(r"[a-z]+", text.lower())
        return {" ".join(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}

    return [max(len(runs(text) & runs(other)) / len(runs(text)) for other in training) for text in held_out]


test_overlaps_names_the_mistake = each_is_found(checks.overlaps, OVERLAPS)
test_other_overlaps_pass = each_passes(checks.overlaps, RIGHT_OVERLAPS)


def test_runs_of_the_library_are_what_the_exercise_says() -> None:
    assert runs_of("A b, a B a", 2) == {("a", "b"), ("b", "a")}


# C2

CLEAR, NOISE, HARD, RIGHTS = "a clear difference", "is noise", "hard for both", "rights and wrongs"


def unpaired(first: list[float], second: list[float]) -> str:
    one, other = bootstrap_interval(first), bootstrap_interval(second)
    return "first" if one[0] > other[1] else "second" if other[0] > one[1] else "not evidence"


def paired(first: list[float], second: list[float]) -> str:
    low, high = paired_interval(first, second)
    return "first" if low > 0 else "second" if high < 0 else "not evidence"


def t_test(first: list[float], second: list[float]) -> str:
    differences = [a - b for a, b in zip(first, second, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    score = statistics.fmean(differences) / error
    return "first" if score > 2 else "second" if score < -2 else "not evidence"


VERDICT = {
    "the higher mean": (
        lambda a, b: "first" if statistics.fmean(a) > statistics.fmean(b) else "second",
        NOISE,
        "Is any difference evidence",
    ),
    "intervals that overlap": (unpaired, HARD, "their own intervals overlap"),
    "lower is better": (lambda a, b: paired(b, a), CLEAR, "higher is better"),
    "never sure": (lambda a, b: "not evidence", CLEAR, "Which one has the higher values"),
    "always the first": (lambda a, b: "first", CLEAR, "higher is better"),
    "a fixed margin": (
        lambda a, b: "not evidence" if abs(statistics.fmean(a) - statistics.fmean(b)) < 0.35 else paired(a, b),
        f"{CLEAR}|{HARD}",
        "expected",
    ),
    "wrong words": (lambda a, b: paired(a, b).replace("not evidence", "tie"), f"{NOISE}|{RIGHTS}", "'tie'"),
    "sorted before pairing": (lambda a, b: paired(sorted(a), sorted(b)), f"{NOISE}|{HARD}|{RIGHTS}", "expected"),
}
RIGHT_VERDICTS = {"bootstrap of pairs": paired, "a paired t-test": t_test}
test_verdict_names_the_mistake = each_is_found(checks.verdict, VERDICT)
test_other_verdicts_pass = each_passes(checks.verdict, RIGHT_VERDICTS)
