"""A model card for an adapter, in the hub's format, from its folder and from figures that were measured. Lesson 13.

The hub reads the YAML at the head of ``README.md``: base, library, licence, data. People read what stands below it.
Nothing is made up: where no figure was given the card says "not measured", and elsewhere "not stated".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from lora_edu.core.layer import scale_of
from lora_edu.core.peft_io import CONFIG_FILE, WEIGHTS_FILE, read_config, read_fields, read_tensors
from lora_edu.files import write_atomically

CARD_FILE = "README.md"
NOT_MEASURED, NOT_STATED = "not measured", "not stated"
# What a config says of how the adapter started or was stored is of no use to who loads it.
LEFT_OUT = {"base_model_name_or_path", "inference_mode", "init_lora_weights", "fan_in_fan_out", "auto_mapping"}


@dataclass(frozen=True)
class Figure:
    """One measured number of a card's evaluation.

    Attributes:
        name: what was measured, with its unit, such as "loss per token (nats)".
        data: on what, such as "101 held-out words".
        adapter: the value with the adapter; None where it was not measured.
        interval: from where to where that value is uncertain, such as a bootstrap's 95 %.
        base: the value of the base on the same data.
    """

    name: str
    data: str
    adapter: float | None = None
    interval: tuple[float, float] | None = None
    base: float | None = None


def model_card(
    folder: str | os.PathLike,
    *,
    title: str | None = None,
    about: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    datasets: Sequence[str] = (),
    tags: Iterable[str] = (),
    pipeline_tag: str | None = "text-generation",
    data: str | None = None,
    training: Mapping[str, Any] | None = None,
    evaluation: Iterable[Figure] = (),
    limits: Sequence[str] = (),
) -> str:
    """The text of an adapter's README.md.

    Args:
        folder: the adapter, as ``save_adapter`` or PEFT wrote it; method, settings and sizes are read from it.
        title: the heading. Default: the folder's name.
        about: what the adapter does and is for, in a sentence or two.
        base_model: the base's id on the hub. Default: the one that the adapter's config names; a path of some machine
            is left out.
        license: an identifier that the hub knows, such as ``"apache-2.0"``.
        language: one code such as ``"en"``, or several.
        datasets: ids of data sets on the hub. Other data belong into ``data``.
        tags: further tags.
        pipeline_tag: the task by which the hub sorts models.
        data: where the training data come from, how many there are, and under which licence.
        training: settings of the training run by name, such as a recorded run's ``settings``.
        evaluation: figures; each becomes a row of a table.
        limits: what the adapter cannot do and what was not looked at, a sentence each.

    Raises:
        FileNotFoundError, ValueError: if the folder has no adapter, or one that lora_edu cannot read.
    """
    folder = Path(folder)
    config = read_config(folder)
    named = base_model or read_fields(folder / CONFIG_FILE).get("base_model_name_or_path")
    base = named if isinstance(named, str) and is_hub_id(named) else None
    head = ModelCardData(
        base_model=base,
        library_name="peft",
        license=license,
        language=language if isinstance(language, str) else list(language or ()) or None,
        datasets=list(datasets) or None,
        pipeline_tag=pipeline_tag,
        tags=[config.peft_type.lower(), *tags],
    )
    name = title or folder.resolve().name
    sections = {
        "Base": f"`{base}`" if base else NOT_STATED,
        "Training data": data or NOT_STATED,
        "Settings": table(("setting", "value"), settings_of(folder, config)),
        "Training": table(("setting", "value"), [(key, shown(value)) for key, value in (training or {}).items()]),
        "Evaluation": table(
            ("measure", "data", "base", "adapter", "interval"), [row_of(figure) for figure in evaluation], NOT_MEASURED
        ),
        "Licence": license or NOT_STATED,
        "Limits": "\n".join(f"- {limit}" for limit in limits) or NOT_STATED,
    }
    text = f"---\n{head.to_yaml().strip()}\n---\n\n# {name}\n\n{about or f'What it is for: {NOT_STATED}.'}\n"
    return text + "".join(f"\n## {heading}\n\n{body}\n" for heading, body in sections.items())


def save_card(folder: str | os.PathLike, **fields: Any) -> Path:
    """Write ``model_card(folder, **fields)`` as README.md into the adapter's folder, whole or not at all.

    Returns:
        The path.
    """
    path = Path(folder) / CARD_FILE
    write_atomically(path, model_card(folder, **fields).encode())
    return path


def is_hub_id(name: str) -> bool:
    """Whether this could be a model's id on the hub; a path from the root of some disk is none."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def settings_of(folder: Path, config: Any) -> list[tuple[str, str]]:
    """What the two files say: the settings that are not left empty, the scale as it acts, and the sizes."""
    fields = {key: value for key, value in read_fields(folder / CONFIG_FILE).items() if key not in LEFT_OUT}
    rows = [(key, shown(value)) for key, value in fields.items() if value not in (None, False, [], {}, "none", 0.0)]
    if hasattr(config, "use_rslora"):
        scale = scale_of(config.lora_alpha, config.r, config.use_rslora)
        patterns = "" if not (config.rank_pattern or config.alpha_pattern) else " where no pattern says otherwise"
        rows.append(("scale of B·A as it acts", f"{scale:.4g}{patterns}"))
    tensors = read_tensors(folder)
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    rows.append(("numbers in the file", f"{sum(tensor.numel() for tensor in tensors.values()):,}, {', '.join(kinds)}"))
    rows.append(("size of the file", f"{(folder / WEIGHTS_FILE).stat().st_size / 1e6:.2f} MB"))
    return rows


def row_of(figure: Figure) -> tuple[str, ...]:
    """A figure as a row: what is None was not measured."""
    low_high = None if figure.interval is None else f"{figure.interval[0]:.4g} to {figure.interval[1]:.4g}"
    values = [None if value is None else f"{value:.4g}" for value in (figure.base, figure.adapter)]
    return figure.name, figure.data, *(value or NOT_MEASURED for value in (*values, low_high))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], empty: str = NOT_STATED) -> str:
    """A Markdown table, or the word for having no rows."""
    if not rows:
        return empty
    cells = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def shown(value: Any) -> str:
    """A setting on one line: lists without their brackets."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
