"""The judge of lesson 12: fast and repeatable probabilities, and its two faults as the lesson shows them."""

import numpy as np
import pytest

from lora_edu import load_dataset
from lora_edu.lab.bases import list_bases
from lora_edu.lab.judge import AuthorJudge, Encoder, corrected_share

HERE = {base.name: base.present for base in list_bases()}
needs_minilm = pytest.mark.skipif(not HERE["minilm"], reason="the base minilm is not here")


@pytest.fixture(scope="module")
def encoder():
    return Encoder()


@pytest.fixture(scope="module")
def texts():
    return {
        name: [entry["definition"] for entry in load_dataset(name, "train")[:120]]
        for name in ("devils_dictionary", "wordnet_glosses")
    }


@needs_minilm
def test_vectors_do_not_depend_on_their_company_or_order(encoder):
    some = ["a cat", "A far longer sentence about the manners of a cat.", "law"]
    vectors = encoder(some)
    assert vectors.shape == (3, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(Encoder()(some[::-1])[::-1], vectors, atol=1e-5)
    assert np.array_equal(encoder([some[2], some[0], some[2]]), vectors[[2, 0, 2]])


@needs_minilm
def test_the_judge_tells_held_out_texts_apart(encoder, texts):
    judge = AuthorJudge(encoder)
    bierce, plain = texts["devils_dictionary"], texts["wordnet_glosses"]
    assert judge.fit(bierce[:80], plain[:80]) is judge
    probabilities = judge.probability(bierce[80:] + plain[80:])
    assert probabilities.shape == (80,)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    right = np.concatenate([judge.calls(bierce[80:]), ~judge.calls(plain[80:])])
    assert right.mean() > 0.8
    assert judge.calls(bierce, threshold=1.0).sum() == 0


@needs_minilm
def test_kinds_weigh_the_same_whatever_their_numbers(encoder, texts):
    few, many = texts["devils_dictionary"][:20], texts["wordnet_glosses"][:100]
    judge = AuthorJudge(encoder).fit(few, many)
    assert judge.calls(few).mean() > 0.9


def test_the_corrected_share_undoes_what_the_judge_does():
    for true in (0.0, 0.3, 1.0):
        assert corrected_share(true * 0.9 + (1 - true) * 0.2, hits=0.9, false_alarms=0.2) == pytest.approx(true)
    assert corrected_share(0.1, hits=0.9, false_alarms=0.2) == 0
    assert corrected_share(0.95, hits=0.9, false_alarms=0.2) == 1


@pytest.mark.errors
def test_rates_that_measure_nothing():
    with pytest.raises(ValueError, match="measures nothing"):
        corrected_share(0.5, hits=0.4, false_alarms=0.4)
    with pytest.raises(ValueError, match="called=48"):
        corrected_share(48, 0.9, 0.1)


@needs_minilm
@pytest.mark.errors
def test_texts_that_cannot_be_judged(encoder):
    judge = AuthorJudge(encoder)
    with pytest.raises(RuntimeError, match="call fit"):
        judge.probability(["a"])
    with pytest.raises(ValueError, match=r"negatives=\[\]: give a list"):
        judge.fit(["a"], [])
    with pytest.raises(ValueError, match="positives: number 1 is empty"):
        judge.fit(["a", " "], ["b"])
    with pytest.raises(ValueError, match="1 texts are positives and negatives, for example 'b'"):
        judge.fit(["a", "b"], ["b"])
