"""What is compared by the referee and has a card on the book's page *Methods*. Lessons 14 to 18.

Every method's file enters its settings here, below its ``register``; ``lab/recording/referee.py`` measures whatever is
entered, and knows none of it by name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

PARAGRAPHS = ("Idea", "Formula", "Cost", "Merging", "Papers")  # of a card, each begun by its word and a colon
TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS")


@dataclass(frozen=True)
class Place:
    """Where an entrant is to train: one of the referee's tasks, as far as a config may depend on it.

    Attributes:
        base: the base model's name, ``"tiny"``, ``"smollm2-135m"`` or ``"minilm"``.
        task_type: ``"CAUSAL_LM"`` or ``"SEQ_CLS"``, as in PEFT's configs. The referee puts it into the config itself;
            with the second, the new head trains too.
        targets: what a method adapts that has no reason to choose.
    """

    base: str
    task_type: str
    targets: str = "all-linear"


@dataclass(frozen=True)
class Entrant:
    """One way to fine-tune that the referee measures; see ``register_entrant``."""

    name: str
    method: str
    rates: tuple[float, ...] | Mapping[str, tuple[float, ...]]
    card: dict[str, str]
    config: Callable[[Place], Any] | None = None
    unfreeze: Callable[[nn.Module, Place], None] | None = None
    needs: str | None = None
    optimizer: Callable[[nn.Module, float], Optimizer] | None = None

    def enters(self, place: Place) -> bool:
        """Whether it can be used there."""
        return self.needs in (None, place.task_type) and (
            not isinstance(self.rates, Mapping) or place.base in self.rates
        )

    def rates_for(self, base: str) -> tuple[float, ...]:
        """The learning rates to try, rising."""
        return self.rates[base] if isinstance(self.rates, Mapping) else self.rates


_ENTRANTS: dict[str, Entrant] = {}


def register_entrant(
    name: str,
    *,
    method: str,
    rates: tuple[float, ...] | Mapping[str, tuple[float, ...]],
    card: str | None,
    config: Callable[[Place], Any] | None = None,
    unfreeze: Callable[[nn.Module, Place], None] | None = None,
    needs: str | None = None,
    optimizer: Callable[[nn.Module, float], Optimizer] | None = None,
) -> None:
    """Enter a method for the referee's comparison and for the book's page *Methods*. Called in the method's file::

        \"\"\"DoRA: the weight's columns keep a magnitude of their own … (the file's docstring)

        Idea: Two sentences on what is trained, and why this might help.
        Formula: W' = m · (W + s·BA) / ‖W + s·BA‖
        Cost: what it adds to numbers, memory and time.
        Merging: whether and how it ends in a plain weight.
        Papers: what [its paper](https://arxiv.org/abs/2402.09353) reports, and who found otherwise.
        \"\"\"

        register_entrant(
            "dora-r8",
            method="DoRA",
            config=lambda place: DoraConfig(r=8, lora_alpha=16, target_modules=place.targets),
            rates={"tiny": (1e-3, …), "smollm2-135m": (2e-4, …), "minilm": (2e-4, …)},
            card=__doc__,
        )

    Args:
        name: what it is asked for by, ``lora-edu full-run referee --method dora-r8``; new settings, new name: results
            are kept under it.
        method: the heading of its card. Several entrants of one method share the card.
        rates: the learning rates to tune over, rising, five to eight of them; one tuple for all bases, or base →
            tuple, and then it enters on these bases only. The best should lie inside: the referee marks it if it does
            not, and rates that are added then leave what is recorded as it is.
        card: a text with a paragraph for each of ``PARAGRAPHS``, most often the file's docstring. A paragraph ends at
            the next or at an empty line; what else stands in the text is left alone. Links are Markdown's.
        config: function of the place → an adapter config, which is injected. Or else:
        unfreeze: function (model, place) that makes trainable what trains, in a model that is frozen, for what is no
            adapter or needs more than to be injected. It also sees to the new head where there is one.
        needs: ``"CAUSAL_LM"`` or ``"SEQ_CLS"`` for what makes sense on this kind of task only.
        optimizer: function (model, rate) → optimizer of what trains, for what is a way to step; default AdamW with one
            rate for all. ``rates`` are the rates that it is given.

    Raises:
        ValueError: for a name that is taken, not exactly one of ``config`` and ``unfreeze``, rates that are not
            rising, or a card without one of its paragraphs.
    """
    if name in _ENTRANTS:
        raise ValueError(f"there is an entrant {name!r} already, of {_ENTRANTS[name].method}: choose another name")
    if (config is None) == (unfreeze is None):
        raise ValueError(f"entrant {name!r}: give config=, or unfreeze= for what is no adapter, and not both")
    if needs not in (None, *TASK_TYPES):
        raise ValueError(f"entrant {name!r}: needs={needs!r}, expected one of {', '.join(TASK_TYPES)}, or None")
    for each in rates.values() if isinstance(rates, Mapping) else [rates]:
        if not each or list(each) != sorted(set(each)) or each[0] <= 0:
            raise ValueError(f"entrant {name!r}: rates {each}, expected rising learning rates above 0")
    _ENTRANTS[name] = Entrant(name, method, rates, _paragraphs(name, card or ""), config, unfreeze, needs, optimizer)


def registered_entrants() -> list[Entrant]:
    """All that are entered, by the names of their methods, those of one method as they were entered.

    The package's own register when this is first called; which file came first makes no difference.
    """
    importlib.import_module("lora_edu").register_methods()
    return sorted(_ENTRANTS.values(), key=lambda entrant: entrant.method.lower())


def _paragraphs(name: str, card: str) -> dict[str, str]:
    """A card's paragraphs by their first word, each on one line."""
    found: dict[str, str] = {}
    current = None
    for line in inspect.cleandoc(card).splitlines():
        word, colon, rest = line.partition(":")
        if colon and word in PARAGRAPHS:
            current, found[word] = word, rest.strip()
        elif current and line.strip():
            found[current] += f" {line.strip()}"
        else:
            current = None
    if missing := [word for word in PARAGRAPHS if not found.get(word)]:
        raise ValueError(
            f"entrant {name!r}: its card lacks the paragraphs {', '.join(f'{word}: …' for word in missing)}"
        )
    return found
