"""The checks of lesson 00 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import pytest
import torch

from found import each_is_found, each_passes
from lora_edu.course import checks

pytestmark = pytest.mark.graders


def no_exponential(z):
    return z / z.sum(dim=-1, keepdim=True)


def as_in_the_formula(z):
    return torch.exp(z) / torch.exp(z).sum(dim=-1, keepdim=True)


def over_everything(z):
    return torch.exp(z) / torch.exp(z).sum()


def over_columns(z):
    return torch.exp(z) / torch.exp(z).sum(dim=0)


def without_keepdim(z):
    e = torch.exp(z - z.max(dim=-1, keepdim=True).values)
    return e / e.sum(dim=-1)


def patched_for_any_shape(z):
    e = torch.exp(z)
    s = e.sum(dim=-1)
    return e / (s if s.shape[0] == z.shape[1] else s[:, None])


def minus(reference):
    """The formula after subtracting a number of each row that need not be its largest."""

    def answer(z):
        e = torch.exp(z - reference(z))
        return e / e.sum(dim=-1, keepdim=True)

    return answer


def one_maximum_for_all(z):
    e = torch.exp(z - z.max())
    return e / e.sum(dim=-1, keepdim=True)


def temperature_two(z):
    return as_in_the_formula(z / 2)


def logarithm(z):
    return z - torch.logsumexp(z, dim=-1, keepdim=True)


def nothing(z):
    as_in_the_formula(z)


def ready_made(z):
    return torch.softmax(z, dim=-1)


def method(z):
    return z.softmax(-1)


def module(z):
    return torch.nn.Softmax(dim=-1)(z)


def exponential_of_the_logarithm(z):
    return torch.special.log_softmax(z, dim=-1).exp()


SOFTMAX = {
    "torch.softmax": (ready_made, "none below 0", "you call softmax"),
    "its method": (method, "none below 0", "you call softmax"),
    "its module": (module, "none below 0", "you call softmax"),
    "log_softmax": (exponential_of_the_logarithm, "none below 0", "you call log_softmax"),
    "no exponential": (no_exponential, "none below 0", "negative"),
    "the logarithm of it": (logarithm, "none below 0", "negative"),
    "nothing returned": (nothing, "none below 0", "NoneType"),
    "sum over everything": (over_everything, "sums to 1", "all rows together"),
    "sum over columns": (over_columns, "sums to 1", "columns"),
    "keepdim forgotten": (without_keepdim, "none below 0", "RuntimeError"),
    "keepdim patched, wrong for squares": (patched_for_any_shape, "square", "sum of another row"),
    "a temperature": (temperature_two, "square", "differs from torch.softmax"),
    "overflow": (as_in_the_formula, "large logits", "not numbers"),
    "minus the mean of the row": (minus(lambda z: z.mean(dim=-1, keepdim=True)), "large logits", "not numbers"),
    "minus the median": (minus(lambda z: z.median(dim=-1, keepdim=True).values), "large logits", "not numbers"),
    "minus the first logit": (minus(lambda z: z[..., :1]), "large logits", "not numbers"),
    "one maximum for all rows": (one_maximum_for_all, "far apart", "near −1000"),
}


def in_place(z):
    z -= z.max(dim=-1, keepdim=True).values
    z.exp_()
    z /= z.sum(dim=-1, keepdim=True)
    return z


def all_alike(z):
    """Overwrites what it is given, so that a check which compares too late finds what it expects."""
    z.zero_()
    return torch.full_like(z, 1 / z.shape[-1])


SOFTMAX["inputs overwritten"] = (all_alike, "square", "differs from torch.softmax")
RIGHT_SOFTMAX = {
    "in place": in_place,
    "minus the largest": minus(lambda z: z.max(dim=-1, keepdim=True).values),
    "through logsumexp": lambda z: torch.exp(z - torch.logsumexp(z, dim=-1, keepdim=True)),
    "row by row": lambda z: torch.stack([torch.exp(row - row.max()) / torch.exp(row - row.max()).sum() for row in z]),
    "from differences": lambda z: 1 / torch.exp(z[..., None, :] - z[..., None]).sum(dim=-1),
}
test_other_right_softmaxes_pass = each_passes(checks.softmax_by_hand, RIGHT_SOFTMAX)
test_wrong_softmax_is_found = each_is_found(checks.softmax_by_hand, SOFTMAX)


def per_token(z, y):
    """The loss of every token, with a harmless label where there is none."""
    right = z.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return torch.logsumexp(z, dim=-1) - right


def mean_loss(z, y, ignored=-100):
    return per_token(z, y)[y != ignored].mean()


def divided_by_all(z, y, ignored=-100):
    return (per_token(z, y) * (y != ignored)).sum() / y.numel()


def mean_of_row_means(z, y, ignored=-100):
    kept = y != ignored
    return ((per_token(z, y) * kept).sum(dim=1) / kept.sum(dim=1)).mean()


def mask_as_token_zero(z, y, ignored=-100):
    return per_token(z, y).mean()


def counted_from_the_end(z, y, ignored=-100):
    return per_token(z, y % z.shape[-1]).mean()


def index_of_the_mask(z, y, ignored=-100):
    return (torch.logsumexp(z, dim=-1, keepdim=True) - z).gather(-1, y[..., None]).mean()


def summed(z, y, ignored=-100):
    return per_token(z, y)[y != ignored].sum()


def wrong_sign(z, y, ignored=-100):
    return -mean_loss(z, y, ignored)


def in_bits(z, y, ignored=-100):
    return mean_loss(z, y, ignored) / torch.log(torch.tensor(2.0)).double()


def logit_alone(z, y, ignored=-100):
    return -z[y != ignored].gather(-1, y[y != ignored][:, None]).mean()


def hard_coded_mark(z, y, ignored=-100):
    return mean_loss(z, y)


def overflowing(z, y, ignored=-100):
    kept = y != ignored
    p = torch.exp(z[kept]) / torch.exp(z[kept]).sum(dim=-1, keepdim=True)
    return -torch.log(p[torch.arange(len(p)), y[kept]]).mean()


def writes_into_labels(z, y, ignored=-100):
    kept = y != ignored
    y[~kept] = 0
    return per_token(z, y)[kept].mean()


def number(z, y, ignored=-100):
    return mean_loss(z, y, ignored).item()


def pytorchs_own(z, y, ignored=-100):
    return torch.nn.functional.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=ignored)


def pytorchs_module(z, y, ignored=-100):
    return torch.nn.CrossEntropyLoss(ignore_index=ignored)(z.flatten(0, 1), y.flatten())


def of_ready_logarithms(z, y, ignored=-100):
    kept = y != ignored
    return -torch.log_softmax(z[kept], dim=-1)[torch.arange(int(kept.sum())), y[kept]].mean()


def outside_autograd(z, y, ignored=-100):
    return torch.tensor(number(z, y, ignored), dtype=z.dtype)


def half_detached(z, y, ignored=-100):
    kept = y != ignored
    right = z[kept][torch.arange(int(kept.sum())), y[kept]]
    return (torch.logsumexp(z[kept], dim=-1).detach() - right).mean()


CROSS_ENTROPY = {
    "PyTorch's own": (pytorchs_own, "every label counts", "you call cross_entropy"),
    "PyTorch's module": (pytorchs_module, "every label counts", "you call cross_entropy"),
    "a ready-made logarithm": (of_ready_logarithms, "every label counts", "you call log_softmax"),
    "a float": (number, "every label counts", "float"),
    "a sum": (summed, "every label counts", "times as much"),
    "wrong sign": (wrong_sign, "every label counts", "sign"),
    "bits": (in_bits, "every label counts", "bits"),
    "softmax forgotten": (logit_alone, "every label counts", "PyTorch's is"),
    "divided by all labels": (divided_by_all, "−100", "divide by all"),
    "mean of row means": (mean_of_row_means, "−100", "average each row first"),
    "mask counted as token 0": (mask_as_token_zero, "−100", "token were number 0"),
    "mask counted from the end": (counted_from_the_end, "−100", "token were number"),
    "mask used as an index": (index_of_the_mask, "−100", "RuntimeError"),
    "mark written into the code": (hard_coded_mark, "argument ignored", "ignored=-1"),
    "overflow": (overflowing, "large logits", "thousands"),
    "labels overwritten": (writes_into_labels, "as they are", "changes the labels"),
    "outside autograd": (outside_autograd, "gradient", "no gradient flows"),
    "half of it detached": (half_detached, "gradient", "its gradient is not"),
}
test_wrong_cross_entropy_is_found = each_is_found(checks.masked_cross_entropy, CROSS_ENTROPY)


def test_a_sum_that_depends_on_its_order() -> None:
    """What the lesson's self-test says of Python."""
    assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)


def one_hot(z, y, ignored=-100):
    kept = (y != ignored).double()
    right = torch.nn.functional.one_hot(y.clamp(min=0) * (y != ignored), z.shape[-1])
    return (kept * (torch.logsumexp(z, dim=-1) - (z * right).sum(dim=-1))).sum() / kept.sum()


def in_a_loop(z, y, ignored=-100):
    losses = [
        torch.logsumexp(z[row, place], dim=-1) - z[row, place, label]
        for row, labels in enumerate(y.tolist())
        for place, label in enumerate(labels)
        if label != ignored
    ]
    return torch.stack(losses).mean()


def shifted_by_the_largest(z, y, ignored=-100):
    z = z - z.max(dim=-1, keepdim=True).values
    losses = z.exp().sum(dim=-1).log() - z.gather(-1, y.where(y != ignored, 0)[..., None])[..., 0]
    return losses[y != ignored].mean()


RIGHT_CROSS_ENTROPY = {
    "per token, then selected": mean_loss,
    "one-hot": one_hot,
    "in a loop": in_a_loop,
    "without logsumexp": shifted_by_the_largest,
    "in float32": lambda z, y, ignored=-100: mean_loss(z.float(), y, ignored),
}
test_other_right_cross_entropies_pass = each_passes(checks.masked_cross_entropy, RIGHT_CROSS_ENTROPY)
