"""The checks of lesson 12: what share is really the author's (A1), contamination (B1), a judge fooled and mended (C1),
which of two adapters to ship (C2); in the lesson itself the bootstrap interval."""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from lora_edu.course.checks.report import Report, Step, Wrong, run_steps
from lora_edu.course.checks.tools import close_number, is_number, known_slip, need_number, need_several, with_note
from lora_edu.lab.datasets import load_dataset
from lora_edu.lab.intervals import bootstrap_interval, paired_interval
from lora_edu.lab.judge import AuthorJudge, corrected_share
from lora_edu.lab.rubric import contamination, first_sentence, longest_copy, words_of

Interval = Callable[[list[float]], Sequence[float]]


def bootstrap(candidate: Interval, hint: int = 1) -> Report:
    """The *Your turn* of lesson 12: ``candidate(values)`` is (low, high), the middle 95 % of the drawn means."""
    draw = "Draw as many values as there are, with replacement, take their mean, 2000 times; then the quantiles."

    def ends(values: list[float]) -> tuple[float, float]:
        got = need_several(
            candidate(list(values)),
            2,
            "two numbers, (low, high)",
            "What are the two ends of an interval?",
            "Return float(low), float(high).",
        )
        low, high = (need_number(end, "What are the two ends of an interval?", "Return numbers.") for end in got)
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise Wrong(
                f"your interval is ({low:.3g}, {high:.3g})",
                "Which end comes first?",
                "np.quantile(means, [0.025, 0.975]) gives the lower end first.",
            )
        return low, high

    def compare(values: list[float], near: float = 0.15, skewed: bool = False) -> None:
        low, high = ends(values)
        right_low, right_high = bootstrap_interval(values, draws=4000)
        width = right_high - right_low
        n, mean, sd = len(values), statistics.fmean(values), statistics.pstdev(values)
        # With 2000 draws an end has an error of about 0.02 of the width, and of a share it moves in steps.
        got = high - low
        if max(abs(low - right_low), abs(high - right_high), abs(got - width)) <= near * width:
            return
        slips = [
            (0.0, "it has no width: were the values drawn with replacement, and as many means as draws taken?"),
            (3.92 * sd, "it is as wide as the values are spread, not as their mean is"),
            (np.subtract(*np.quantile(values, [0.975, 0.025])), "these are quantiles of the values, not of means"),
            (2 * sd / math.sqrt(n), "that is the mean plus and minus one standard error, 68 percent"),
            (3.29 * sd / math.sqrt(n), "that is the middle 90 percent"),
            (5.15 * sd / math.sqrt(n), "that is the middle 99 percent"),
        ]

        def alike(one: float, other: float) -> bool:
            return abs(one - other) <= 0.09 * max(abs(other), 1e-9)

        note = known_slip(got, slips, alike)
        if skewed and not note:
            note = "an end at equal distances from the mean assumes that means lie evenly around it; draw them instead"
        raise Wrong(
            with_note(
                f"{n} values with mean {mean:.3g}: your interval is ({low:.3g}, {high:.3g}), "
                f"expected about ({right_low:.3g}, {right_high:.3g})",
                note,
            ),
            "What is drawn, how many of it, and of what are the two quantiles taken?",
            draw,
        )

    def shares() -> None:
        n = random.randint(80, 120)
        compare([float(random.random() < 0.3) for _ in range(n)])

    def few_and_many() -> None:
        for n in (20, 400):
            compare([random.gauss(5, 2) for _ in range(n)], near=0.1)

    def skewed() -> None:
        # One of 12 values is large: a sample has it 0 to 3 times, once on average.
        compare([random.uniform(0, 0.2) for _ in range(11)] + [random.uniform(7, 9)], skewed=True)

    def again() -> None:
        values = [random.gauss(0, 1) for _ in range(30)]
        mine = list(values)
        first = candidate(mine)
        if mine != values:
            raise Wrong(
                "your function changes the list that it is given",
                "Which operations work in place?",
                "Begin with a copy: values = np.asarray(values, dtype=float).",
            )
        if tuple(first) != tuple(candidate(list(values))):
            raise Wrong(
                "called twice with the same values it gives two intervals",
                "Where does the generator get its seed?",
                "Make the generator inside, from a fixed seed: np.random.default_rng(seed).",
            )

    steps: list[Step] = [
        ("the interval of a share", shares),
        ("few values and many", few_and_many),
        ("values that lie unevenly", skewed),
        ("the same values give the same interval, and stay as they are", again),
    ]
    return run_steps("the bootstrap interval", steps, hint)


def true_share(candidate: Callable[[float, float, float], float], hint: int = 1) -> Report:
    """Exercise A1 of lesson 12: ``candidate(called, hits, false_alarms)`` is the share that is really the author's."""
    fix = "Solve called = p · hits + (1 − p) · false_alarms for p, and cut the result to [0, 1] with min and max."

    def need(called: float, hits: float, false_alarms: float) -> None:
        got = need_number(candidate(called, hits, false_alarms), "What is a share?", fix)
        right = corrected_share(called, hits, false_alarms)
        if close_number(got, right):
            return
        raw = (called - false_alarms) / (hits - false_alarms)
        slips = [
            (called, "this is what the judge calls so, not what is so"),
            (called - false_alarms, "the false alarms are taken off, but the misses are not made up for"),
            (called / hits, "the misses are made up for, but the false alarms are not taken off"),
            ((called - false_alarms) / hits, "divided by hits: with p = 1 it would not give 1"),
            ((called - false_alarms) / (1 - false_alarms), "divided as if the judge missed none"),
            (raw, "a share lies between 0 and 1"),
        ]
        note = known_slip(got, slips)
        raise Wrong(
            with_note(
                f"called {called:.2f}, hits {hits:.2f}, false alarms {false_alarms:.2f}: you return {got:.4g}, "
                f"expected {right:.4g}",
                note,
            ),
            "If a share p of the texts is the author's, how many does the judge call so?",
            fix,
        )

    def rates() -> tuple[float, float]:
        return random.uniform(0.7, 0.95), random.uniform(0.05, 0.4)

    def middle() -> None:
        for _ in range(5):
            hits, false_alarms = rates()
            p = random.uniform(0.2, 0.8)
            need(p * hits + (1 - p) * false_alarms, hits, false_alarms)

    def ends() -> None:
        hits, false_alarms = rates()
        need(hits, hits, false_alarms)
        need(false_alarms, hits, false_alarms)

    def beyond() -> None:
        hits, false_alarms = rates()
        need(false_alarms / 2, hits, false_alarms)
        need((1 + hits) / 2, hits, false_alarms)

    steps: list[Step] = [
        ("some of the texts are the author's", middle),
        ("all of them, and none", ends),
        ("fewer than the false alarms, more than the hits: still a share", beyond),
    ]
    return run_steps("the true share", steps, hint)


WORDS = [
    "of", "the", "man", "who", "has", "law", "devil", "money", "virtue", "friend", "war", "love", "house", "hope",
    "age", "time", "art", "fool", "king", "vote",
]  # fmt: skip


def sentence(words: int) -> list[str]:
    """So many words drawn at random; runs of three or more hardly ever repeat."""
    return [random.choice(WORDS) + random.choice(["", "", "s", "ly"]) for _ in range(words)]


def overlaps(candidate: Callable[..., Sequence[float]], hint: int = 1) -> Report:
    """Exercise B1 of lesson 12: ``candidate(held_out, training, n)`` is the largest shared part of each text."""
    by_one = "Compare with one training text at a time, and keep the largest share: max(… for other in training)."

    def need(held_out: list[str], training: list[str], n: int, question: str, fix: str, note: str = "") -> None:
        shares = {each.held_out: each.share for each in contamination(held_out, training, n)}
        right = [shares[text] for text in held_out]
        got = candidate(list(held_out), list(training), n)
        if not isinstance(got, list | tuple) or len(got) != len(right):
            raise Wrong(
                f"for {len(held_out)} held-out texts you return {str(got)[:60]!r}",
                "How many numbers are wanted?",
                "Return a list with one share for each held-out text, in their order.",
            )
        for text, share, mine in zip(held_out, right, got, strict=True):
            if not is_number(mine) or not close_number(mine, share):
                raise Wrong(
                    with_note(f"n={n}, {text[:60]!r}: your share is {mine!r}, expected {share:.3g}", note),
                    question,
                    fix,
                )

    def copies() -> None:
        text, other = sentence(12), sentence(14)
        own = [" ".join(sentence(11)), " ".join(text)]
        n = random.choice([3, 4, 5])
        need(
            own,
            [" ".join(other), " ".join(text)],
            n,
            "Which share does a copy have, and which a text that shares nothing?",
            "The number of its runs that stand in the training text, divided by the number of its runs.",
        )

    def dressed() -> None:
        text = sentence(10)
        dressed = " ".join(text[:4]).capitalize() + ", " + " ".join(text[4:]).upper() + "."
        need(
            [dressed],
            [" ".join(text)],
            4,
            "Is a text new because a comma was added?",
            "Take the words with words_of: lower case, no punctuation.",
            "it differs from its copy by capitals and punctuation alone",
        )

    def of_its_own() -> None:
        text = sentence(9)
        longer = text[:6] + sentence(20)
        need(
            [" ".join(text)],
            [" ".join(longer)],
            3,
            "A share of what: of the runs of the held-out text, or of the training text?",
            "Divide by the number of the held-out text's own runs.",
            "a training text may be much longer",
        )

    def of_one() -> None:
        text = sentence(12)
        parts = [" ".join(text[:6] + sentence(4)), " ".join(sentence(4) + text[5:])]
        need(
            [" ".join(text)],
            parts,
            3,
            "Does any one training text hold all of it?",
            by_one,
            "its halves stand in two different training texts",
        )

    def repeated() -> None:
        loop, rest = sentence(3), sentence(5)
        need(
            [" ".join(loop * 4 + rest)],
            [" ".join(loop * 2)],
            3,
            "Is a run that stands in a text four times four runs, or one?",
            "Count different runs: a set of tuples.",
            "different runs are counted",
        )

    def short() -> None:
        text = sentence(2)
        need(
            [" ".join(text), " ".join(sentence(2))],
            [" ".join(sentence(9)), " ".join(text).upper()],
            5,
            "How many runs of five words has a text of two?",
            "Where a text has fewer than n words, all its words together are its one run.",
            "a text shorter than n words counts as one run",
        )

    steps: list[Step] = [
        ("a copy has the share 1, a new text 0, in order", copies),
        ("capitals and punctuation make no difference", dressed),
        ("a share of the held-out text's own runs", of_its_own),
        ("of one training text, not of all together", of_one),
        ("a run that repeats counts once", repeated),
        ("short texts", short),
    ]
    return run_steps("contamination", steps, hint)


@cache
def judge_texts() -> dict[str, list[str]]:
    """First sentences: 200 of Bierce and 200 glosses to train a judge, and 60 of Bierce held out."""
    found = {}
    for name, data, split, count in (
        ("Bierce", "devils_dictionary", "train", 200),
        ("plain", "wordnet_glosses", "train", 200),
        ("held out", "devils_dictionary", "test", 60),
    ):
        rows = random.Random(0).sample(load_dataset(data, split), count)
        found[name] = sorted({first_sentence(row["definition"]) for row in rows})
    found["plain"] = [text for text in found["plain"] if text not in found["Bierce"]]
    return found


@cache
def all_of_bierce() -> list[str]:
    """Every definition, of which a sentence of the learner's own copies nothing."""
    return [row["definition"] for split in ("train", "validation", "test") for row in load_dataset(BIERCE, split)]


BIERCE, COPY = "devils_dictionary", 6


def fooled_judge(fooling: Callable[[], Sequence[str]], mending: Callable[[], Sequence[str]], hint: int = 1) -> Report:
    """Exercise C1 of lesson 12: ten sentences that a naive judge takes for Bierce's, and negatives that mend it."""

    def texts_of(candidate: Callable[[], Sequence[str]], name: str) -> list[str]:
        got = candidate()
        if not isinstance(got, list | tuple) or not all(isinstance(text, str) for text in got):
            raise Wrong(f"{name} returns {str(got)[:60]!r}", "What comes back?", "Return a list of sentences.")
        return [" ".join(text.split()) for text in got]

    def own(texts: list[str], name: str) -> None:
        for text in texts:
            if len(words_of(text)) not in range(4, 31):
                raise Wrong(
                    f"{name}: {text[:70]!r} has {len(words_of(text))} words",
                    "Is it a sentence?",
                    "Write sentences of 4 to 30 words.",
                )
            run = longest_copy(text, all_of_bierce())
            if len(run) >= COPY:
                raise Wrong(
                    f"{name}: {text[:70]!r} has {' '.join(run)!r} from the Dictionary",
                    "Is the judge wrong to call Bierce's words Bierce's?",
                    f"Share no run of {COPY} words with the Devil's Dictionary.",
                )
        if len(set(texts)) < len(texts):
            raise Wrong(f"{name}: two sentences are the same", "How many are there?", "Write each one once.")

    def ten() -> None:
        texts = texts_of(fooling, "fooling()")
        if len(texts) != 10:
            raise Wrong(f"fooling() returns {len(texts)} sentences", "How many were asked for?", "Return ten.")
        own(texts, "fooling()")

    def naive() -> AuthorJudge:
        texts = judge_texts()
        return AuthorJudge().fit(texts["Bierce"], texts["plain"])

    def fools() -> None:
        texts = texts_of(fooling, "fooling()")
        probabilities = naive().probability(texts)
        fooled = int((probabilities > 0.5).sum())
        if fooled < 8:
            worst = min(zip(probabilities, texts, strict=True))
            raise Wrong(
                f"the naive judge calls {fooled} of your ten sentences Bierce's; {worst[1][:60]!r} gets {worst[0]:.2f}",
                "What do Bierce's definitions have that glosses have not, besides wit?",
                "Write whole sentences with a full stop, beginning with A or One who, on people and their affairs.",
            )

    def negatives() -> None:
        texts = texts_of(mending, "mending()")
        if len(texts) not in range(10, 101):
            raise Wrong(
                f"mending() returns {len(texts)} sentences",
                "How many does it take until a judge of 400 texts notices?",
                "Return 10 to 100.",
            )
        own(texts, "mending()")
        for text in texts_of(fooling, "fooling()"):
            run = longest_copy(text, texts)
            if len(run) >= COPY:
                raise Wrong(
                    f"the judge is to be tested with {text[:60]!r}, and mending() has {' '.join(run)!r} of it",
                    "What does a test measure whose sentences were trained on?",
                    f"Write other sentences of the same kind; no run of {COPY} words in both.",
                )

    def mends() -> None:
        texts, ours = judge_texts(), texts_of(mending, "mending()")
        judge = AuthorJudge().fit(texts["Bierce"], texts["plain"] + ours)
        fooled = int(judge.calls(texts_of(fooling, "fooling()")).sum())
        if fooled > 4:
            raise Wrong(
                f"with your {len(ours)} sentences among the negatives, it still calls {fooled} of the ten Bierce's",
                "Do the negatives have what the ten sentences fooled it with?",
                "Write more of the same form and on the same things as the ten, until at most four get through.",
            )

    def keeps() -> None:
        texts = judge_texts()
        judge = AuthorJudge().fit(texts["Bierce"], texts["plain"] + texts_of(mending, "mending()"))
        share = judge.calls(texts["held out"]).mean()
        if share < 0.75:
            raise Wrong(
                f"the mended judge calls {share:.0%} of Bierce's own held-out definitions Bierce's",
                "Are your negatives so much like Bierce that nothing is left to tell them by?",
                "Write negatives that no reader would take for Bierce's.",
            )

    steps: list[Step] = [
        ("ten sentences of your own", ten),
        ("the naive judge takes at least eight for Bierce's", fools),
        ("other sentences to mend it with", negatives),
        ("mended, it takes at most four of the ten for Bierce's", mends),
        ("and still knows at least three quarters of Bierce's own", keeps),
    ]
    return run_steps("a judge fooled and mended", steps, hint)


def verdict(candidate: Callable[[list[float], list[float]], str], hint: int = 1) -> Report:
    """Exercise C2 of lesson 12: ``candidate(first, second)`` is "first", "second" or "not evidence"."""
    fix = 'low, high = paired_interval(first, second); "first" if low > 0, "second" if high < 0, else "not evidence".'

    def need(first: list[float], second: list[float], question: str, note: str) -> None:
        low, high = paired_interval(first, second)
        right = "first" if low > 0 else "second" if high < 0 else "not evidence"
        got = candidate(list(first), list(second))
        if got != right:
            means = statistics.fmean(first), statistics.fmean(second)
            raise Wrong(
                with_note(
                    f"{len(first)} rows with means {means[0]:.2f} and {means[1]:.2f}, whose difference lies in "
                    f"[{low:.2f}, {high:.2f}]: you say {got!r}, expected {right!r}",
                    note,
                ),
                question,
                fix,
            )

    def noise(n: int, size: float) -> list[float]:
        return [random.gauss(0, size) for _ in range(n)]

    def clear() -> None:
        one, other = [0.8 + x for x in noise(60, 0.1)], [0.5 + x for x in noise(60, 0.1)]
        need(one, other, "Which one has the higher values?", "higher is better")
        need(other, one, "Which one has the higher values?", "higher is better")

    def nothing() -> None:
        values = noise(40, 1.0)
        mean = statistics.fmean(values)
        centred = [0.3 * (value - mean) for value in values]  # a difference of 0.02, far below its error
        need([5.02 + x for x in centred], [5.0] * 40, "Is any difference evidence?", "0 lies well inside")
        other = random.sample(values, len(values))
        need([x + 0.1 for x in values], other, "Which value belongs to which?", "the rows keep their order")

    def paired() -> None:
        hard = noise(50, 3.0)
        one = [x + 0.3 + e for x, e in zip(hard, noise(50, 0.1), strict=True)]
        question = "What do both systems have in common on each row?"
        need(one, hard, question, "their own intervals overlap; the pairs do not")
        need(hard, one, question, "their own intervals overlap; the pairs do not")

    def shares() -> None:
        # The same 100 words: 30 only the first gets right, 4 only the second.
        one, other = [1.0] * 60 + [0.0] * 40, [1.0] * 30 + [0.0] * 30 + [1.0] * 4 + [0.0] * 36
        need(one, other, "Are rights and wrongs values too?", "")
        need([1.0] * 20 + [0.0] * 20, [1.0] * 18 + [0.0] * 20 + [1.0] * 2, "Do the two differ at all?", "")

    steps: list[Step] = [
        ("a clear difference, either way", clear),
        ("a difference that is noise", nothing),
        ("rows that are hard for both", paired),
        ("rights and wrongs", shares),
    ]
    return run_steps("which one to ship", steps, hint)
