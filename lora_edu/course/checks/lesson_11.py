"""The checks of lesson 11's repairs: padding in the loss, the wrong layers, the merge that counts twice."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.course.checks.report import Report, Step, Wrong, run_steps

IGNORED = -100


def labels_without_padding(candidate: Callable[[Tensor, Tensor], Tensor], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(input_ids, attention_mask)`` gives labels in which only the padding is left out."""

    def batch() -> tuple[Tensor, Tensor]:
        rows, longest = random.randint(3, 5), random.randint(9, 12)
        lengths = [random.randint(4, longest - 2) for _ in range(rows)]
        lengths[random.randrange(rows)] = longest
        ids = torch.randint(3, 50, (rows, longest))
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            ids[row, length - 1 :] = 2  # the end of the text, and the padding behind it: one and the same id
            mask[row, :length] = 1
        return ids, mask

    def labels_of(ids: Tensor, mask: Tensor) -> Tensor:
        labels = candidate(ids, mask)
        if not isinstance(labels, Tensor) or labels.shape != ids.shape:
            seen = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise Wrong(
                f"for input_ids of shape {tuple(ids.shape)} your labels are {seen}",
                "The model shifts labels by itself. Which shape does it expect?",
                "Return one label for each token.",
            )
        return labels

    def padding_left_out() -> None:
        ids, mask = batch()
        labels = labels_of(ids, mask)
        counted = int((labels[mask == 0] != IGNORED).sum())
        if counted:
            raise Wrong(
                f"{counted} of {int((mask == 0).sum())} padding positions still count in the loss",
                "Which label does cross-entropy leave out?",
                "-100 wherever attention_mask is 0.",
            )

    def end_counts() -> None:
        ids, mask = batch()
        labels = labels_of(ids, mask)
        last = mask.sum(1) - 1
        lost = int((labels[torch.arange(len(ids)), last] == IGNORED).sum())
        if lost:
            raise Wrong(
                f"in {lost} of {len(ids)} rows the token that ends the text is left out: the model will never stop",
                "Padding and end have the same id here. What else tells them apart?",
                "Decide by attention_mask, not by the id.",
            )

    def text_counts() -> None:
        ids, mask = batch()
        labels = labels_of(ids, mask)
        wrong = (labels != ids) & (mask == 1)
        if wrong.any():
            left_out = int((labels[wrong] == IGNORED).sum())
            raise Wrong(
                f"{int(wrong.sum())} text tokens have another label than themselves ({left_out} are left out)",
                "What is the right label of a token of the text? The model does the shifting.",
                "labels = input_ids.clone(), and only then -100 at the padding.",
            )

    def inputs_untouched() -> None:
        ids, mask = batch()
        before = ids.clone()
        labels_of(ids, mask)
        if not torch.equal(before, ids):
            raise Wrong(
                "your function changes input_ids: the model would be fed -100 as a token",
                "Is your labels tensor a copy?",
                "input_ids.clone(), or torch.where, which makes a new tensor.",
            )

    steps: list[Step] = [
        ("the padding is left out", padding_left_out),
        ("the token that ends the text counts", end_counts),
        ("every text token is its own label", text_counts),
        ("input_ids is as it was", inputs_untouched),
    ]
    return run_steps("labels without padding", steps, hint)


def linear_layers_of_block(candidate: Callable[[nn.Module, int], list[str]], hint: int = 1) -> Report:
    """Exercise A2: ``candidate(model, index)`` names the linear layers of one block, and of no other."""

    def compare(model: nn.Module, index: int, container: str) -> None:
        names = sorted(candidate(model, index))
        modules = dict(model.named_modules())
        if unknown := [name for name in names if name not in modules]:
            raise Wrong(
                f"{unknown[0]!r} is no module of the model", "Where do names come from?", "model.named_modules()"
            )
        if other := [name for name in names if not isinstance(modules[name], nn.Linear)]:
            raise Wrong(
                f"{other[0]!r} is a {type(modules[other[0]]).__name__}: LoRA needs a weight matrix",
                "Which class do the layers have that you want?",
                "Ask for isinstance(module, nn.Linear) as well.",
            )
        wanted = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n.startswith(f"{container}.{index}.")]
        if foreign := [name for name in names if name not in wanted]:
            raise Wrong(
                f"asked for block {index}, you also return {foreign[0]!r} ({len(foreign)} layers too many)",
                "Of which longer names is yours a part?",
                'Compare whole segments: "layers" and the number in name.split("."), one after the other.',
            )
        if missing := [name for name in wanted if name not in names]:
            raise Wrong(
                f"block {index} has {len(wanted)} linear layers; {missing[0]!r} is not among yours",
                "How deep may a layer lie inside its block?",
                "Everything whose name continues after the block's own name belongs to it.",
            )

    def block() -> nn.Module:
        inner = nn.ModuleDict({"q_proj": nn.Linear(4, 6), "norm": nn.LayerNorm(6)})
        return nn.ModuleDict({"attention": inner, "up_proj": nn.Linear(6, 4), "post_attention_norm": nn.LayerNorm(4)})

    def tower(count: int) -> nn.ModuleList:
        return nn.ModuleList([block() for _ in range(count)])

    def few() -> None:
        model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "layers": tower(random.randint(3, 9))})
        compare(model, random.randrange(1, 3), "layers")

    def many() -> None:
        model = nn.ModuleDict({"model": nn.ModuleDict({"layers": tower(random.randint(12, 25))})})
        compare(model, 1, "model.layers")

    def other_numbers() -> None:
        experts = nn.ModuleDict({"layers": tower(4), "experts": tower(5)})
        compare(nn.ModuleDict({"model": experts, "head": nn.Linear(4, 3)}), random.randrange(1, 4), "model.layers")

    steps: list[Step] = [
        ("a model with fewer than ten blocks", few),
        ("a model with more than ten blocks", many),
        ("a model with other numbered parts", other_numbers),
    ]
    return run_steps("linear layers of one block", steps, hint)


def merging_layer(candidate: Callable[[nn.Linear, Tensor, Tensor, float], Any], hint: int = 1) -> Report:
    """Exercise B1: ``candidate(linear, lora_A, lora_B, scaling)``, which merges without counting twice."""

    def build() -> tuple[Any, Tensor, Tensor, Tensor]:
        outputs, inputs, r, scaling = random.randint(5, 8), random.randint(9, 12), random.randint(2, 4), 1.5
        linear = nn.Linear(inputs, outputs).double()
        a, b = torch.randn(r, inputs).double(), torch.randn(outputs, r).double()
        base, update = linear.weight.detach().clone(), scaling * b @ a
        return candidate(linear, a, b, scaling), torch.randn(3, 2, inputs).double(), base, update

    def expect(layer: Any, x: Tensor, base: Tensor, update: Tensor, when: str) -> None:
        with torch.no_grad():
            got = layer(x) - x @ base.T - layer.linear.bias
            right = x @ update.T
        times = ((got * right).sum() / (right * right).sum()).item()
        shown = f"{round(times, 1) + 0.0:.1f}"  # adding zero turns "-0.0" into "0.0"
        if not torch.allclose(got, right, rtol=0, atol=1e-9):
            exact = torch.allclose(got, times * right, rtol=0, atol=1e-9)
            raise Wrong(
                f"{when} the layer adds {shown} × the update" if exact else f"{when} the output is no base + update",
                "Which places add the update? At which of them is it added already?",
                "Keep a flag self.merged: forward adds s·BAx only without it, merge adds s·BA only without it.",
            )

    def before() -> None:
        expect(*build(), "before any merge")

    def once() -> None:
        layer, x, base, update = build()
        layer.merge()
        expect(layer, x, base, update, "after one merge")

    def in_weight() -> None:
        layer, _, base, update = build()
        layer.merge()
        if not torch.allclose(layer.linear.weight.detach(), base + update, rtol=0, atol=1e-9):
            raise Wrong(
                "after merge, linear.weight is not W + s·BA: somebody who saves the weight saves something else",
                "What should a merged weight be worth without the adapter?",
                "self.linear.weight.data += self.scaling * self.lora_B @ self.lora_A",
            )

    def twice() -> None:
        layer, x, base, update = build()
        layer.merge()
        layer.merge()
        expect(layer, x, base, update, "after two merges")

    def back() -> None:
        layer, x, base, update = build()
        layer.unmerge()
        expect(layer, x, base, update, "after unmerge without a merge")
        layer.merge()
        layer.unmerge()
        expect(layer, x, base, update, "after merge and unmerge")
        if not torch.allclose(layer.linear.weight.detach(), base, rtol=0, atol=1e-9):
            raise Wrong(
                "after unmerge the pretrained weight is not back",
                "What does merge add? Does your unmerge take away the same, and only when it is there?",
                "The mirror image of merge, and self.merged = False.",
            )

    steps: list[Step] = [
        ("unmerged, the update counts once", before),
        ("merged, it counts once", once),
        ("the merged weight is W + s·BA", in_weight),
        ("merging again changes nothing", twice),
        ("unmerge brings the weight back", back),
    ]
    return run_steps("merging layer", steps, hint)
