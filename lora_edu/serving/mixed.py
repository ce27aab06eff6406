"""Several adapters in one batch: each row of the input is answered by the adapter that it names. Built in lesson 09.

The frozen weight is the same for every adapter, so its product is taken once for the whole batch. Only the small
update differs by row, and there are two ways to compute it:

- grouped: for each adapter that occurs, take its rows, one pair of small products, put the result back;
- gathered: stack the factors of all adapters, pick a pair for each row, and multiply all rows at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.core.adapter import AdapterLayer, adapter_layers, adapters_around
from lora_edu.core.matching import named_places
from lora_edu.core.merging import disable_adapter
from lora_edu.core.parts import TrainedCopy
from lora_edu.core.state import adapter_state, injected_model

BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch
WAYS = ("grouped", "gathered")
Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


@contextmanager
def adapter_names(model: nn.Module, names: Sequence[str], way: str = "grouped") -> Iterator[nn.Module]:
    """Inside the block, row i of every batch is answered by the adapter ``names[i]``; afterwards all is as it was.

    >>> with adapter_names(model, ["devil", "jargon", "__base__"]):
    ...     logits = model(**batch_of_three).logits

    Which adapters are active or merged makes no difference inside the block. A module that an adapter does not adapt
    answers that adapter's rows as the base; copies of ``modules_to_save`` answer their own rows.

    Args:
        model: in eval mode.
        names: one name per row of the batch; ``"__base__"`` is the pretrained model.
        way: ``"grouped"`` or ``"gathered"``, see above; they differ in speed only.

    Raises:
        KeyError: if the model has no adapter of that name.
        ValueError: an unknown way, no names, a model in training mode, an adapter that trains biases (there is one
            bias for all rows); and, inside the block, a batch with another number of rows.

    Source: PEFT's argument ``adapter_names``. Built in lesson 09.
    """
    names = list(names)
    model = injected_model(model)
    check_names(model, names, way)
    with disable_adapter(model):
        handles = []
        try:
            for place, layer in adapter_layers(model).items():
                around = {each.adapter_name: each for each in adapters_around(layer) if each.adapter_name in names}
                if around:
                    handles.append(layer.register_forward_hook(layer_hook(place, around, names, way)))
            for place, _, _, module in named_places(model):
                if isinstance(module, TrainedCopy):
                    handles.append(module.register_forward_hook(copy_hook(place, names)))
            yield model
        finally:
            for handle in handles:
                handle.remove()


def check_names(model: nn.Module, names: list[str], way: str = "grouped") -> None:
    """Raise unless this model can answer a batch with these adapters."""
    state = adapter_state(model)
    if way not in WAYS:
        raise ValueError(f"way={way!r}: expected one of {', '.join(map(repr, WAYS))}")
    if not names:
        raise ValueError("names is empty: give the name of an adapter for each row of the batch")
    for name in names:
        if name != BASE and name not in state.configs:
            raise KeyError(f"no adapter named {name!r}; this model has: {', '.join([BASE, *state.configs])}")
        if same := next((part for part in state.parts.get(name, []) if not part.by_row), None):
            raise ValueError(
                f"adapter {name!r} brings a {type(same).__name__} ({same.place}), which is the same for all rows of a "
                f"batch: use set_adapter({name!r}), and answer its rows in a batch of their own"
            )
    for place, layer in adapter_layers(model).items():
        for each in adapters_around(layer):
            if each.adapter_name in names and not each.additive:
                raise ValueError(
                    f"adapter {each.adapter_name!r} is a {type(each).__name__} at {place!r}, whose effect is no update "
                    "that could be added row by row: answer its rows in a batch of their own, with set_adapter"
                )
    if model.training:
        raise ValueError("the model is in training mode, where a batch belongs to one adapter: call model.eval()")


def rows_of(names: Sequence[str]) -> dict[str, Tensor]:
    """{adapter: the numbers of its rows}, in the order of first occurrence, without those of the base.

    >>> rows_of(["b", "a", "__base__", "b"])
    {'b': tensor([0, 3]), 'a': tensor([1])}
    """
    rows = defaultdict(list)
    for row, name in enumerate(names):
        rows[name].append(row)
    return {name: torch.tensor(found) for name, found in rows.items() if name != BASE}


def grouped_update(x: Tensor, layers: Mapping[str, AdapterLayer], names: Sequence[str], like: Tensor) -> Tensor:
    """What the adapters add to the output of one layer: a pair of small products for each adapter that occurs.

    Args:
        x: (rows, ..., in).
        layers: this place's adapters by name; rows of an adapter that is not among them get zero.
        names: one per row.
        like: the base's output (rows, ..., out), for shape and device.
    """
    dtype = torch.promote_types(like.dtype, next(iter(layers.values())).adapter_dtype)
    update = torch.zeros_like(like, dtype=dtype)
    for name, rows in rows_of(names).items():
        if name in layers:
            chosen = rows.to(x.device)
            update[chosen] = layers[name].update(x[chosen]).to(dtype)
    return update


def stack_factors(layers: Mapping[str, AdapterLayer]) -> tuple[Tensor, Tensor]:
    """The factors of n adapters as two tensors: A (n + 1, r, in) and s·B (n + 1, out, r); the last pair is zero.

    Smaller ranks are filled up with zeros to the largest, r: they are stored and multiplied for nothing.
    """
    each: list[Any] = list(layers.values())
    factors = [layer.factors() for layer in each]
    r = max(len(A) for A, _, _, _ in factors)
    first_A, first_B = factors[0][:2]
    a = first_A.new_zeros(len(factors) + 1, r, first_A.shape[1])
    b = first_B.new_zeros(len(factors) + 1, len(first_B), r)
    with torch.no_grad():
        for i, (A, B, scaling, _) in enumerate(factors):
            a[i, : len(A)] = A
            b[i, :, : len(A)] = scaling * B
    return a, b


def gathered_update(x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """The same from stacked factors: row i is multiplied with the pair number ``ids[i]``, all rows at once.

    Shapes:
        x: (rows, ..., in). ``a``: (n, r, in). ``b``: (n, out, r). ``ids``: (rows). Result: (rows, ..., out).
    """
    rows = x.to(a.dtype).flatten(1, -2) if x.dim() > 2 else x.to(a.dtype).unsqueeze(1)  # (rows, T, in)
    h = rows @ a[ids].transpose(1, 2)  # (rows, T, r)
    update = h @ b[ids].transpose(1, 2)  # (rows, T, out)
    return update.reshape(*x.shape[:-1], b.shape[1])


def layer_hook(place: str, layers: Mapping[str, Any], names: list[str], way: str) -> Hook:
    """A hook on an adapted layer, all adapters switched off: adds each row's update to the base's output.

    Only layers with factors can be gathered: an embedding is looked up, not multiplied, so its updates are grouped.
    """
    gathered = way == "gathered" and all(callable(getattr(layer, "factors", None)) for layer in layers.values())
    if gathered:
        a, b = stack_factors(layers)
        number = {name: i for i, name in enumerate(layers)}
        ids = torch.tensor([number.get(name, len(layers)) for name in names], device=a.device)

    def hook(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        x = inputs[0]
        check_rows(place, x, names)
        update = gathered_update(x, a, b, ids) if gathered else grouped_update(x, layers, names, like=y)
        return (y + update).to(y.dtype)

    return hook


def copy_hook(place: str, names: list[str]) -> Hook:
    """A hook on a module of ``modules_to_save``: each adapter's own copy answers its rows."""

    def hook(module: Any, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        check_rows(place, inputs[0], names)
        y = y.clone()
        for name, rows in rows_of(names).items():
            if name in module.copies:
                chosen = rows.to(y.device)
                y[chosen] = module.copies[name](inputs[0][chosen], *inputs[1:])
        return y

    return hook


def check_rows(place: str, x: Tensor, names: list[str]) -> None:
    """Raise unless there is one name per row."""
    if x.shape[0] != len(names):
        raise ValueError(
            f"{place}: the batch has {x.shape[0]} rows (shape {tuple(x.shape)}), but {len(names)} adapter names were "
            "given; give one per row (beam search repeats each row: repeat its name too)"
        )
