"""What the referee has every method learn: a table of small tasks, and how a run of one is sized.

A run sees the same number of rows whatever its batch, so that a larger batch means fewer steps. Each task is one line
of ``TASKS``; texts that ``load_dataset`` does not have are named in ``SOURCES``.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

from torch import nn

from lora_edu.core.entrants import Place
from lora_edu.lab.bases import load_base
from lora_edu.lab.datasets import SPLITS, encode, encode_topics, load_dataset
from lora_edu.lab.word_order import word_order

PLAIN_ROWS = 100

Entries = list[dict[str, Any]]
# Name of a text → function of a split's name; entries have a definition, and a label where the task is to classify.
SOURCES: dict[str, Callable[[str], Entries]] = {
    name: partial(load_dataset, name) for name in ("devils_dictionary", "jargon", "wordnet_topics")
}
SOURCES["word_order"] = word_order


@dataclass(frozen=True)
class Task:
    """One task: a base model, a text, and how much of it a run sees.

    Attributes:
        base: the base model's name.
        data: the text's, one of ``SOURCES``.
        rows: how many rows one run trains on; with a batch of b it takes rows / b steps.
        batches: the batch sizes to tune over.
        classes: how many classes there are to tell apart; None for a language model, which learns to define words.
        timed: steps are timed and memory is measured on this task; one for each base.
        title: for people; the record does not depend on it.
        limit: use no more than so many rows of each split; for tests.
    """

    base: str
    data: str
    rows: int
    batches: tuple[int, ...]
    classes: int | None = None
    timed: bool = False
    title: str = ""
    limit: int | None = None

    @property
    def place(self) -> Place:
        """What an entrant's config may depend on."""
        return Place(self.base, "SEQ_CLS" if self.classes else "CAUSAL_LM")

    @property
    def metric(self) -> str:
        """What is compared, in words."""
        return "accuracy" if self.classes else "loss"

    def steps(self, batch: int) -> int:
        """The steps of a run with this batch size."""
        return max(1, self.rows // batch)


TASKS = {
    "smollm2-bierce": Task("smollm2-135m", "devils_dictionary", 960, (8,), timed=True, title="SmolLM2 on Bierce"),
    "minilm-topics": Task(
        "minilm", "wordnet_topics", 2880, (16, 32), classes=10, timed=True, title="MiniLM on WordNet's topics"
    ),
    "minilm-order": Task(
        "minilm", "word_order", 5760, (16, 32), classes=2, title="MiniLM: were two neighbouring words swapped?"
    ),
    "tiny-bierce": Task("tiny", "devils_dictionary", 960, (4, 8, 16), timed=True, title="tiny on Bierce"),
    "tiny-jargon": Task("tiny", "jargon", 960, (4, 8, 16), title="tiny on the Jargon File"),
}


@dataclass(frozen=True)
class Plan:
    """All that the record's figures depend on besides the methods: the tasks and the seeds.

    Attributes:
        seeds: of the runs that are compared, at the tuned rate and batch.
        tuning_seed: of the runs that tune, none of the others: else the luckiest of them would be chosen and counted.
        rounds: how often a step is timed.
        start_batches: how many of the first training batches, of the task's smallest size and in the rows' order, a
            method gets that computes its start from data; it trains on all rows afterwards, like the others.
    """

    tasks: Mapping[str, Task] = field(default_factory=lambda: TASKS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seed: int = 100
    rounds: int = 30
    warmup: float = 0.05
    schedule: str = "linear"
    start_batches: int = 8

    def settings(self) -> dict[str, Any]:
        """As it stands in the record: all that a result may depend on."""
        own = {name: value for name, value in vars(self).items() if name != "tasks"}
        tasks = {name: asdict(task) for name, task in self.tasks.items()}
        for task in tasks.values():
            del task["title"], task["timed"]
        return own | {"tasks": tasks}


PLAN = Plan()


@cache
def loaded(task: Task) -> tuple[nn.Module, dict[str, Entries]]:
    """The base on the CPU and the encoded splits, once for each process; a language model's also ``plain``.

    These are plain definitions, as WordNet has them: what a model that learns another voice may forget.
    """
    entries = {split: SOURCES[task.data](split)[: task.limit] for split in SPLITS}
    if task.classes:
        model, tokenizer = load_base(task.base, head="classification", num_labels=task.classes)
        return model, {split: encode_topics(rows, tokenizer) for split, rows in entries.items()}
    model, tokenizer = load_base(task.base)
    entries["plain"] = load_dataset("wordnet_glosses", "validation")[: task.limit or PLAIN_ROWS]
    chat = bool(tokenizer.chat_template)
    length = 96 if chat else 64  # the template takes 35
    return model, {split: encode(rows, tokenizer, length, chat) for split, rows in entries.items()}
