"""A judge of texts, and how much to believe it: a classifier that tells one author's texts from others. Built in
lesson 12; lessons 20 and 21 use it as judge and as reward.

It sees what its training texts differ in, which need not be what they were chosen for. So it is measured like any
instrument: on texts it has not seen, from every source that it will meet, and from one that it has never met.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from lora_edu.lab.bases import load_base


class Encoder:
    """Texts as vectors of length 1: the mean of ``minilm``'s token vectors. A text is computed once and then kept."""

    def __init__(self, base: str = "minilm", max_length: int = 64):
        self.model, self.tokenizer = load_base(base)
        self.max_length = max_length
        self.kept: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Vectors, (texts, 384) for ``minilm``. Texts of like length share a batch, so that little is padded."""
        new = sorted(set(texts) - self.kept.keys(), key=lambda text: (len(text), text))
        for start in range(0, len(new), batch_size):
            some = new[start : start + batch_size]
            batch = self.tokenizer(some, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
            states = self.model(**batch.to(self.model.device)).last_hidden_state  # (texts, tokens, 384)
            mask = batch["attention_mask"][..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            vectors = torch.nn.functional.normalize(means, dim=-1).cpu().numpy()
            self.kept.update(zip(some, vectors, strict=True))
        return np.stack([self.kept[text] for text in texts])


@cache
def shared_encoder() -> Encoder:
    """One encoder for all judges of a process, so that a text is computed once, whoever asks."""
    return Encoder()


class AuthorJudge:
    """How probable it is that a text is one of the author's: logistic regression on the texts' vectors.

    Args:
        encoder: texts to vectors; by default the one that all judges share.
        C: scikit-learn's: how freely the weights may grow.

    Built in lesson 12.
    """

    def __init__(self, encoder: Encoder | None = None, C: float = 10.0):
        self.encoder = encoder or shared_encoder()
        self.C = C
        self.classifier: Any = None

    def fit(self, positives: Sequence[str], negatives: Sequence[str]) -> "AuthorJudge":
        """Learn to tell the author's texts from the others. Both kinds weigh the same, however many there are.

        Raises:
            ValueError: if either kind has no text, a text is empty, or one stands in both.
        """
        from sklearn.linear_model import LogisticRegression

        _check_texts(positives, "positives")
        _check_texts(negatives, "negatives")
        if both := set(positives) & set(negatives):
            raise ValueError(f"{len(both)} texts are positives and negatives, for example {sorted(both)[0]!r}")
        labels = [True] * len(positives) + [False] * len(negatives)
        self.classifier = LogisticRegression(C=self.C, max_iter=2000, class_weight="balanced")
        self.classifier.fit(self.encoder([*positives, *negatives]), labels)
        return self

    def probability(self, texts: Sequence[str]) -> np.ndarray:
        """The probability for each text, in the given order, shape (texts,).

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: if there is no text, or one is empty.
        """
        if self.classifier is None:
            raise RuntimeError("this judge has seen no texts yet: call fit(positives, negatives) first")
        _check_texts(texts, "texts")
        return self.classifier.predict_proba(self.encoder(texts))[:, 1]

    def calls(self, texts: Sequence[str], threshold: float = 0.5) -> np.ndarray:
        """Which texts it calls the author's: True where the probability is above the threshold, shape (texts,)."""
        return self.probability(texts) > threshold


def corrected_share(called: float, hits: float, false_alarms: float) -> float:
    """The share that is the author's, from the share that a judge calls so and the judge's two known rates.

    Of a share p of the author's texts it would call p · hits + (1 − p) · false_alarms; solved for p, cut to [0, 1].

    Args:
        called: share of the texts in question that it calls the author's.
        hits: share of the author's own held-out texts that it calls so.
        false_alarms: share of others' texts that it calls so. They must be of the kind that is in question: a rate
            measured on dictionaries says little about the answers of a chat model.

    Raises:
        ValueError: if a rate is not between 0 and 1, or ``hits`` is not above ``false_alarms``: then nothing follows.

    Source: Rogan and Gladen 1978. Built in lesson 12.
    """
    for name, rate in (("called", called), ("hits", hits), ("false_alarms", false_alarms)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name}={rate}: expected a share between 0 and 1")
    if hits <= false_alarms:
        raise ValueError(
            f"hits={hits}, false_alarms={false_alarms}: a judge that does not call the author's texts so more often "
            "than others' measures nothing"
        )
    return min(1.0, max(0.0, (called - false_alarms) / (hits - false_alarms)))


def _check_texts(texts: Sequence[str], name: str) -> None:
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"{name}={texts!r}: give a list with at least one text")
    if empty := [place for place, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"{name}: number {empty[0]} is empty; leave empty answers out and count them as failed")
