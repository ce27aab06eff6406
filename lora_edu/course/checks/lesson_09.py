"""The checks of lesson 09: undo a merge (A1), a mixed batch (B1), a hot-swap (B2), when merging pays (C1);
in the lesson itself the merge that rounds once."""

import contextlib
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.core.layer import LoRALinear
from lora_edu.core.peft_io import PREFIX
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    Operations,
    close,
    dtype_name,
    is_tensor,
    is_whole,
    known_slip,
    need_refusal,
    normal,
    shape_or_type,
    with_note,
)

BASE = "__base__"
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
Adapters = dict[str, tuple[Tensor, Tensor, float]]


def merged_weight(candidate: Callable[[Tensor], Any], hint: int = 1) -> Report:
    """A weight that updates are merged into and taken out of. Exercise A1 of lesson 09."""

    def drawn(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Any]:
        weight = torch.randn(random.randint(20, 30), random.randint(31, 40)).to(dtype)
        delta = 0.03 * torch.randn(weight.shape)
        return weight, delta, candidate(weight)

    def exact() -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            weight, delta, slot = drawn(dtype)
            right = (weight.float() + delta).to(dtype)
            slot.merge(delta)
            if slot.weight.dtype != dtype:
                raise Wrong(
                    f"after merging, a {dtype} weight is {slot.weight.dtype}",
                    "What is the type of a half-precision tensor plus a float32 tensor?",
                    "Add in place, self.weight += delta: that computes in float32 and rounds to the weight's own type.",
                )
            if not torch.equal(slot.weight, right):
                off = (slot.weight != right).float().mean().item()
                raise Wrong(
                    f"{off:.0%} of the merged {dtype} weights are not the exact sum, rounded once",
                    "Is anything rounded before the sum is taken, or is something else than the update added?",
                    "Do not convert delta: self.weight += delta adds in float32 and rounds the sum once.",
                )

    def in_use() -> None:
        weight, delta, slot = drawn()
        slot.merge(delta)
        if slot.weight is not weight:
            raise Wrong(
                "after merging, self.weight is another tensor; the model goes on with the old one",
                "Which operations write into a tensor, and which make a new one?",
                "self.weight += delta and self.weight.copy_(…) write in place; self.weight = … makes a new one.",
            )
        slot.unmerge()
        if slot.weight is not weight:
            raise Wrong(
                "after unmerging, self.weight is another tensor; the model goes on with the merged one",
                "Which operations write into a tensor, and which make a new one?",
                "self.weight.copy_(self.kept) writes the kept values into the tensor that the model uses.",
            )

    def back() -> None:
        weight, delta, slot = drawn()
        before = weight.clone()
        slot.merge(delta)
        merged = weight.clone()
        slot.unmerge()
        if torch.equal(weight, merged):
            raise Wrong(
                "after unmerging, the weight is still the merged one",
                "Did you keep the values of the weight, or a second name for the same tensor?",
                "Keep a copy: self.kept = self.weight.clone(), before anything is added.",
            )
        if not torch.equal(weight, before):
            off = (weight != before).float().mean().item()
            raise Wrong(
                f"after merging and unmerging, {off:.0%} of the weights are not what they were",
                "In bfloat16, is w + d − d equal to w?",
                "Do not subtract: keep a clone of the weight when merging, and copy it back.",
            )

    def several() -> None:
        weight, delta, slot = drawn()
        before, other = weight.clone(), torch.flip(delta, [0])
        slot.merge(delta)
        right = (weight.float() + other).bfloat16()
        slot.merge(other)
        if not torch.equal(weight, right):
            raise Wrong(
                "a second update, merged on top of the first, does not add to it",
                "What does your second merge start from?",
                "Add to self.weight as it is; only the kept copy is older.",
            )
        slot.unmerge()
        if not torch.equal(weight, before):
            raise Wrong(
                "after two merges, unmerge does not bring the pretrained weight back",
                "What does the second merge write over?",
                "Keep a copy only if there is none yet: if self.kept is None: …",
            )

    def again() -> None:
        weight, delta, slot = drawn()
        before = weight.clone()
        slot.unmerge()
        if not torch.equal(weight, before):
            raise Wrong(
                "unmerging a weight that was never merged changes it",
                "What is self.kept then?",
                "Do nothing if self.kept is None.",
            )
        slot.merge(delta)
        slot.unmerge()
        weight.mul_(2)  # another base is loaded into the same tensor
        before = weight.clone()
        slot.unmerge()
        slot.merge(delta)
        slot.unmerge()
        if not torch.equal(weight, before):
            raise Wrong(
                "the weight was changed elsewhere after unmerging, and the next merge and unmerge undo that",
                "What does your object still hold after unmerging?",
                "When unmerging, set self.kept = None.",
            )

    steps = [
        ("merged, the weight is the exact sum, rounded once", exact),
        ("the tensor that the model uses stays in use", in_use),
        ("unmerged, every weight has its old bits", back),
        ("two merges, one unmerge: the pretrained weight", several),
        ("unmerging twice, or first, does no harm", again),
    ]
    return run_steps("undo a merge", steps, hint)


def count_products(operations: Operations, weight: Tensor) -> tuple[int, int]:
    """How many matrix products have a factor of the frozen weight's size, and how many do not."""
    sizes = set(weight.shape)
    factors = [[x for x in given if isinstance(x, Tensor)] for name, given, _ in operations.seen if name in PRODUCTS]
    large = sum(any(set(x.shape[-2:]) == sizes for x in each) for each in factors)
    return large, len(factors) - large


def draw(rows: int = 6, *shape: int) -> tuple[Tensor, Tensor, Adapters]:
    """(x, weight, adapters): three adapters of different ranks and scales, in ≠ out."""
    inputs, outputs = random.randint(9, 12), random.randint(13, 17)
    x = normal(rows, *shape, inputs)
    weight = normal(outputs, inputs)
    adapters = {}
    for name, r in zip(("tax", "law", "code"), random.sample([2, 3, 4, 5], 3), strict=True):
        adapters[name] = (normal(r, inputs), normal(outputs, r), random.choice([0.5, 1.5, 3.0]))
    return x, weight, adapters


def row_by_row(x: Tensor, weight: Tensor, adapters: Adapters, names: list[str]) -> Tensor:
    """What is right: every row with its own dense weight."""
    found = []
    for row, name in zip(x, names, strict=True):
        dense = weight
        if name != BASE:
            a, b, scaling = adapters[name]
            dense = weight + scaling * b @ a
        found.append(row @ dense.T)
    return torch.stack(found)


def mixed_linear(candidate: Callable[[Tensor, Tensor, Adapters, list[str]], Tensor], hint: int = 1) -> Report:
    """One layer, one batch, several adapters. Exercise B1 of lesson 09."""

    def compare(x: Tensor, weight: Tensor, adapters: Adapters, names: list[str], question: str, fix: str) -> None:
        untouched, right = x.clone(), row_by_row(x, weight, adapters, names)
        theirs = {name: (a.clone(), b.clone(), scaling) for name, (a, b, scaling) in adapters.items()}
        found = candidate(x, weight.clone(), theirs, list(names))
        if not is_tensor(found, right.shape):
            seen = shape_or_type(found)
            raise Wrong(f"for x {tuple(x.shape)} you return {seen}, expected {tuple(right.shape)}", question, fix)
        if not torch.equal(x, untouched):
            raise Wrong("your function changes x, which the caller still needs", question, "Write into new tensors.")
        for row, (name, ours, theirs) in enumerate(zip(names, right, found, strict=True)):
            if not close(theirs, ours):
                answers = [(row_by_row(untouched, weight, adapters, [n] * len(names))[row], n) for n in {*names, BASE}]
                who = known_slip(theirs, answers, close)
                instead = f"the answer of {who!r}" if who else "the answer of no adapter"
                raise Wrong(f"names = {names}: row {row} should be {name!r} and is {instead}", question, fix)

    def one() -> None:
        for name in ("tax", "law", "code"):
            x, weight, adapters = draw(3, 4)
            compare(
                x, weight, adapters, [name] * 3,
                "With one adapter, what is added to x Wᵀ? Does the scale stand before it?",
                "x @ W.T + scaling * (x @ A.T @ B.T)",
            )  # fmt: skip

    def mixed() -> None:
        for names in (["law", "tax", "law", "code", "tax", "law"], ["tax", "code", "code", "tax", "law", "code"]):
            x, weight, adapters = draw(6, 4)
            compare(
                x, weight, adapters, names,
                "Where do the rows of an adapter go when its products are done?",
                "Remember the rows' numbers: y[rows] += scaling * (x[rows] @ A.T @ B.T).",
            )  # fmt: skip

    def base() -> None:
        x, weight, adapters = draw(4, 3)
        question, fix = "Which rows get no update?", f"Leave the rows named {BASE!r} at x @ W.T; all may be such rows."
        compare(x, weight, adapters, [BASE, "law", BASE, "tax"], question, fix)
        compare(x, weight, adapters, [BASE] * 4, question, fix)

    def shapes() -> None:
        names = ["law", BASE, "code", "law"]
        for shape in ((), (1,), (2, 3)):
            x, weight, adapters = draw(4, *shape)
            compare(
                x, weight, adapters, names,
                "Rows are the first dimension, features the last. Does your code count on exactly one between them?",
                "x[rows] @ A.T @ B.T works for any number of dimensions in between.",
            )  # fmt: skip

    def unknown() -> None:
        x, weight, adapters = draw(2, 3)
        for names in (["law", "pirate"], ["pirate", BASE]):
            need_refusal(
                partial(candidate, x, weight, adapters, names),
                f"names = {names}: 'pirate' is no adapter, and your function answers all the same",
                "Whose answer does the caller get, and how would they find out?",
                f"Raise KeyError for a name that is neither {BASE!r} nor in adapters.",
                KeyError,
            )

    def products() -> None:
        x, weight, adapters = draw(9, 5)  # no group's rows × 5 is one of the weight's sizes, by which it is recognised
        names = ["law", "tax", BASE, "law", "tax", "law", "tax", "tax", "law"]
        with Operations() as operations:
            candidate(x, weight, adapters, names)
        large, small = count_products(operations, weight)
        if large > 1:
            raise Wrong(
                f"x is multiplied with the large weight {large} times",
                "Which product is the same for all rows?",
                "Compute x @ W.T once for the whole batch, before the adapters.",
            )
        if small > 4:
            raise Wrong(
                f"two of three adapters occur, and there are {small} small products instead of 4",
                "How many products does a group of rows need? Does code occur at all?",
                "Two products for each adapter that occurs: loop over the names in the batch, not over rows.",
            )

    steps = [
        ("one adapter for all rows", one),
        ("each row has its own adapter, in the order of the batch", mixed),
        ("rows of the base get no update", base),
        ("any number of dimensions between row and feature", shapes),
        ("an unknown name raises KeyError", unknown),
        ("the base once, a pair of small products per adapter that occurs", products),
    ]
    return run_steps("mixed batch", steps, hint)


def adapted_layers() -> tuple[dict[str, LoRALinear], dict[str, Tensor]]:
    """Layers of different shapes and ranks by place, and tensors under PEFT's keys that fit them."""
    layers, tensors = {}, {}
    for place, r in (("model.layers.0.q_proj", 3), ("model.layers.0.up_proj", 4), ("model.layers.1.q_proj", 2)):
        base = nn.Linear(random.randint(8, 11), random.randint(12, 15))
        layers[place] = LoRALinear(base, r=r, lora_alpha=5, init_lora_weights=False)
        for key, parameter in (("lora_A", layers[place].lora_A), ("lora_B", layers[place].lora_B)):
            tensors[f"{PREFIX}{place}.{key}.weight"] = torch.randn_like(parameter)
    return layers, tensors


def state_of(layers: Mapping[str, LoRALinear]) -> list[Any]:
    """Values and scales, to compare before and after."""
    return [(la.lora_A.detach().clone(), la.lora_B.detach().clone(), la.scaling) for la in layers.values()]


def hot_swap(candidate: Callable[[dict[str, LoRALinear], dict[str, Tensor], float], None], hint: int = 1) -> Report:
    """Other values into the layers that are there. Exercise B2 of lesson 09."""

    def values() -> None:
        layers, tensors = adapted_layers()
        candidate(layers, {key: tensor.clone() for key, tensor in tensors.items()}, 12)
        for place, layer in layers.items():
            for key in ("lora_A", "lora_B"):
                if not torch.equal(getattr(layer, key), tensors[f"{PREFIX}{place}.{key}.weight"]):
                    raise Wrong(
                        f"{key} of {place} does not hold the new values",
                        "Which key of the file belongs to which tensor of the layer?",
                        'layer.lora_A.copy_(tensors[f"base_model.model.{place}.lora_A.weight"]), and so for lora_B.',
                    )

    def same_objects() -> None:
        layers, tensors = adapted_layers()
        before = {
            place: (la.lora_A, la.lora_B, la.lora_A.data_ptr(), la.lora_B.data_ptr()) for place, la in layers.items()
        }
        candidate(layers, tensors, 12)
        for place, layer in layers.items():
            a, b, place_a, place_b = before[place]
            if layer.lora_A is not a or layer.lora_B is not b:
                raise Wrong(
                    f"{place} has new parameters; an optimizer or a compiled model still holds the old ones",
                    "Which operation writes values into a tensor that exists?",
                    "Inside torch.no_grad(): layer.lora_A.copy_(values).",
                )
            if (layer.lora_A.data_ptr(), layer.lora_B.data_ptr()) != (place_a, place_b):
                raise Wrong(
                    f"the parameters of {place} point to other memory; a captured graph reads the old one",
                    "Does assigning to .data write values, or exchange the memory behind the parameter?",
                    "Inside torch.no_grad(): layer.lora_A.copy_(values).",
                )
            if not layer.lora_A.requires_grad:
                raise Wrong(
                    f"lora_A of {place} no longer requires a gradient",
                    "Is that for a swap to decide?",
                    "Leave requires_grad alone; torch.no_grad() is enough for copying.",
                )

    def scale() -> None:
        layers, tensors = adapted_layers()
        alpha = random.choice([7, 11, 13])
        candidate(layers, tensors, alpha)
        for place, layer in layers.items():
            if layer.scaling != alpha / layer.r:
                raise Wrong(
                    f"with lora_alpha={alpha}, {place} (r={layer.r}) has the scale {layer.scaling:.3f}; "
                    f"expected {alpha / layer.r:.3f}",
                    "What belongs to an adapter besides its tensors? Is the rank the same in every layer?",
                    "layer.scaling = lora_alpha / layer.r, for each layer.",
                )

    def damaged(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        last = list(tensors)[-1]
        longer = torch.cat([tensors[last], tensors[last]], dim=1)
        less = {key: value for key, value in tensors.items() if key != last}
        return {
            "a tensor of another rank": {**tensors, last: longer},
            "a missing tensor": less,
            "a tensor for a layer that is not there": {**tensors, last.replace("layers.1", "layers.7"): longer},
            "transposed tensors": {key: value.T.contiguous() for key, value in tensors.items()},
            "one row, which copy_ would spread over all": {**tensors, last: tensors[last][:1]},
        }  # fmt: skip

    def refuses() -> None:
        for words in damaged(adapted_layers()[1]):
            layers, tensors = adapted_layers()
            try:
                candidate(layers, damaged(tensors)[words], 12)
            except ValueError:
                continue
            except Exception as error:
                raise Wrong(
                    f"{words}: your function raises {type(error).__name__}, expected ValueError",
                    "Do you compare names and shapes yourself, before PyTorch stumbles over them?",
                    "Check that the keys are exactly the expected ones and each shape fits; else raise ValueError.",
                ) from None
            raise Wrong(
                f"{words}: your function accepts the file",
                "Which two sets of keys must be equal, and which shapes?",
                "Expected keys: two for each layer. Compare with set(tensors), then each shape; else raise ValueError.",
            )

    def untouched() -> None:
        for words in damaged(adapted_layers()[1]):
            layers, tensors = adapted_layers()
            before = state_of(layers)
            with contextlib.suppress(ValueError):
                candidate(layers, damaged(tensors)[words], 12)
            for place, (a, b, scaling), (a2, b2, scaling2) in zip(layers, before, state_of(layers), strict=True):
                if not (torch.equal(a, a2) and torch.equal(b, b2) and scaling == scaling2):
                    raise Wrong(
                        f"{words}: the file is refused, but {place} has changed already",
                        "In which order do you check and write?",
                        "Two loops: first check everything, then copy everything.",
                    )

    steps = [
        ("every tensor has its new values", values),
        ("in the same parameters", same_objects),
        ("with the new scale", scale),
        ("a file that does not fit is refused with ValueError", refuses),
        ("and then nothing has changed", untouched),
    ]
    return run_steps("hot-swap", steps, hint)


def merging_pays(candidate: Callable[[float, float, float], Any], hint: int = 1) -> Report:
    """After how many forward passes merging is the quicker way. Exercise C1 of lesson 09."""

    def ask(unmerged: float, merged: float, change: float, right: int | None) -> None:
        answer = candidate(unmerged, merged, change)
        given = f"unmerged {unmerged}, merged {merged}, merging and unmerging {change}"
        if right is None and answer is not None:
            raise Wrong(
                f"{given}: you answer {answer!r}; merging never gets quicker there",
                "What does one pass gain by merging, and can the gain be zero or less?",
                "If unmerged <= merged, return None.",
            )
        if right is not None and not is_whole(answer):
            raise Wrong(
                f"{given}: you answer {answer!r}, a {type(answer).__name__}; expected the whole number {right}",
                "What type does your function return?",
                "Passes are counted: return an int (math.floor gives one).",
            )
        if answer != right:
            raise Wrong(
                f"{given}: you answer {answer}; with {right} passes merging takes {change + (right or 0) * merged}, "
                f"not merging {(right or 0) * unmerged}, and with one pass less it is not quicker",
                "Write down both times for n passes. For which n is the one below the other?",
                "change + n · merged < n · unmerged: the first whole n above change / (unmerged − merged).",
            )

    def plain() -> None:
        for _ in range(20):
            merged, gain = random.randint(3, 40), random.randint(2, 30)
            change = gain * random.randint(1, 30) + random.randint(1, gain - 1)
            ask(merged + gain, merged, change, change // gain + 1)

    def ties() -> None:
        for _ in range(20):
            merged, gain, passes = random.randint(3, 40), random.randint(1, 30), random.randint(1, 30)
            ask(merged + gain, merged, gain * passes, passes + 1)

    def never() -> None:
        unmerged = random.randint(3, 40)
        ask(unmerged, unmerged, 7, None)
        ask(unmerged, unmerged + 2, 7, None)
        ask(unmerged, unmerged + 2, 0, None)

    def free() -> None:
        ask(random.randint(8, 20), random.randint(3, 7), 0, 1)

    def seconds() -> None:
        ask(0.75, 0.5, 0.625, 3)
        ask(0.0078125, 0.0068359375, 3.5, 3585)

    steps = [
        ("the first number of passes at which merging is quicker", plain),
        ("equal times are not quicker", ties),
        ("None where it never is", never),
        ("a merge that costs nothing pays at once", free),
        ("seconds with fractions", seconds),
    ]
    return run_steps("when merging pays", steps, hint)


def merge_once(candidate: Callable[[Tensor, Tensor, Tensor, float], Any], hint: int = 1) -> Report:
    """*Your turn* in lesson 09: ``candidate(weight, lora_A, lora_B, scaling)`` is W + s·BA, rounded once."""
    whole = "(weight.float() + scaling * (lora_B.float() @ lora_A.float())).to(weight.dtype)"

    def drawn(dtype: torch.dtype, factors: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, float]:
        inputs, outputs = random.sample(range(24, 33), 2)
        r, scaling = random.randint(2, 4), random.choice([0.5, 1.5, 3.0])
        weight, a, b = torch.randn(outputs, inputs), torch.randn(r, inputs), 0.1 * torch.randn(outputs, r)
        return weight.to(dtype), a.to(factors), b.to(factors), scaling

    def ask(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        got = candidate(weight.clone(), a.clone(), b.clone(), scaling)
        if not is_tensor(got, weight.shape):
            raise Wrong(
                f"for a weight {tuple(weight.shape)} you return {shape_or_type(got)}",
                "What are the shapes of A and of B, and in which order does their product have the weight's shape?",
                "B is (out, r) and A is (r, in), so lora_B @ lora_A is (out, in), like the weight.",
            )
        return got

    def need_nearest(dtype: torch.dtype, factors: torch.dtype = torch.float32) -> None:
        weight, a, b, scaling = drawn(dtype, factors)
        got = ask(weight, a, b, scaling)
        right = weight.double() + scaling * (b.double() @ a.double())
        # As near as this type allows; an answer in float32 may fall to either side of a tie.
        off = (got.double() - right).abs() > (right.to(dtype).double() - right).abs() + 3e-6
        if not off.any():
            return
        update = scaling * (b.float() @ a.float())
        slips = [
            (weight + scaling * (b @ a).float(), f"the update was computed in {dtype_name(a)}"),
            (weight + (scaling * (b @ a)).float(), f"the update was computed in {dtype_name(a)}"),
            (weight + update.to(dtype), "the update was rounded before it was added, and the sum once more"),
            (weight + scaling * (b.to(dtype) @ a.to(dtype)), f"the whole merge was computed in {dtype_name(weight)}"),
        ]
        note = known_slip(got, [(wrong.to(dtype), words) for wrong, words in slips], torch.equal)
        share = f"{off.float().mean().item():.0%} of the merged {dtype_name(weight)} weights are not those nearest to"
        raise Wrong(
            with_note(f"{share} W + s·BA ({dtype_name(a)} factors)", note),
            "At which steps of your merge does a number become a half-precision one?",
            f"Take everything to float32 first, and convert the sum: {whole}",
        )

    def plain() -> None:
        weight, a, b, scaling = drawn(torch.float32)
        got, update = ask(weight, a, b, scaling), b @ a
        if close(got, weight + scaling * update, rtol=1e-5, atol=1e-5):
            return
        slips = [
            (weight + update, "the scale is missing"),
            (weight + scaling**2 * update, "the scale is in it twice"),
            (weight + update / scaling, "the scale divides instead of multiplying"),
            (scaling * update, "this is the update alone, without the weight"),
            (weight - scaling * update, "the update is subtracted"),
            (weight, "this is the weight as it was"),
        ]
        note = known_slip(got, slips, lambda ours, wrong: close(ours, wrong, rtol=1e-5, atol=1e-5))
        raise Wrong(
            with_note("a float32 weight does not become W + s·BA", note),
            "What does the unmerged layer add to W x?",
            whole,
        )

    def own_type() -> None:
        for dtype in (torch.bfloat16, torch.float16):
            weight, a, b, scaling = drawn(dtype)
            got = ask(weight, a, b, scaling)
            if got.dtype != dtype:
                raise Wrong(
                    f"the merged {dtype_name(weight)} weight is {dtype_name(got)}: a model that took it would grow",
                    "In which type are the model's other weights?",
                    "End with .to(weight.dtype).",
                )

    def once() -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            need_nearest(dtype)

    def half_factors() -> None:
        for dtype in (torch.bfloat16, torch.float16):
            need_nearest(dtype, dtype)

    def untouched() -> None:
        for dtype in (torch.bfloat16, torch.float32):
            weight, a, b, scaling = drawn(dtype)
            given = weight.clone(), a.clone(), b.clone()
            got = candidate(*given, scaling)
            for name, before, after in zip(("weight", "lora_A", "lora_B"), (weight, a, b), given, strict=True):
                if not torch.equal(before, after):
                    raise Wrong(
                        f"your function writes into {name} (here {dtype_name(before)}), and the caller still needs it",
                        "Which of your operations work in place? Does .float() copy a tensor that is float32 already?",
                        "Use + and *, not += and *=: these make new tensors.",
                    )
            if isinstance(got, Tensor) and got.data_ptr() in {tensor.data_ptr() for tensor in given}:
                raise Wrong(
                    "what you return lies in the memory of what you were given",
                    "Which of your operations make a new tensor?",
                    "Use +, which makes one.",
                )

    steps = [
        ("a float32 weight becomes W + s·BA", plain),
        ("a half-precision weight keeps its type", own_type),
        ("computed in float32 and rounded once", once),
        ("also where A and B are in half precision", half_factors),
        ("weight, A and B stay as they were", untouched),
    ]
    return run_steps("merge, rounded once", steps, hint)
