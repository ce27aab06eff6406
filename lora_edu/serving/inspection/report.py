"""One inspection from path to report, which a terminal, a program and a figure can show. Lessons 08 to 13."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lora_edu.counting.meta import meta_model, shipped_configs
from lora_edu.lab.bases import list_bases, load_base, require_base
from lora_edu.serving.inspection.effect import Effect, check_effect
from lora_edu.serving.inspection.factors import Measured, check_factors, measure
from lora_edu.serving.inspection.findings import Finding
from lora_edu.serving.inspection.fit import check_fit, saved_labels
from lora_edu.serving.inspection.formats import UNKNOWN, Adapter, sort_tensors
from lora_edu.serving.inspection.reading import read_source
from lora_edu.serving.inspection.settings import check_settings

# Fields of adapter_config.json that a report repeats where they are set.
SETTINGS = (
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights",
    "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "bias", "task_type", "fine_tune_type",
    "model", "num_layers", "lora_parameters",
)  # fmt: skip


@dataclass
class Report:
    """What ``inspect_adapter`` found.

    Attributes:
        format: whose file it is: "PEFT", "kohya", "diffusers", "mlx-lm" or "unknown".
        settings: what the config says.
        findings: in the order in which they were looked for.
        modules: each adapted module in numbers.
        base: the base it was compared with, and whether its weights were there.
        effect: what merging loses and how the output changes, with the base's weights.
    """

    adapter: str
    format: str
    settings: dict[str, Any]
    findings: list[Finding]
    modules: list[Measured]
    base: str | None = None
    with_weights: bool = False
    effect: Effect = field(default_factory=lambda: Effect({}))

    @property
    def wrong(self) -> bool:
        """Whether anything is wrong: then ``lora-edu inspect`` ends with status 1."""
        return any(finding.level == "wrong" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, numbers and strings."""
        return {**dataclasses.asdict(self), "wrong": self.wrong}


def inspect_adapter(path: str | Path, base: str | None = None, config_only: bool = False) -> Report:
    """Look at an adapter's files, and, with a base, whether they fit it and what they change.

    Args:
        path: a folder, or one ``.safetensors`` file. Nothing but safetensors and JSON is ever opened.
        base: a name of ``lora-edu bases list``, a folder or a hub id; of a model that is known by its config alone
            (``llama-7b``) names and shapes are compared.
        config_only: do not load the base's weights.

    Raises:
        FileNotFoundError: if there is nothing at the path, or no such base on this machine.
        ValueError: for an unknown base.
    """
    source = read_source(path)
    adapter = sort_tensors(source)
    findings = [*check_settings(adapter), *check_factors(adapter)]
    modules = [measure(name, factors) for name, factors in adapter.modules.items()]
    fields = source.fields or {}
    settings = {name: fields[name] for name in SETTINGS if fields.get(name) not in (None, [], {}, False)}
    settings = json.loads(json.dumps(settings), parse_constant=str)  # a NaN in a config would be no JSON in ours
    report = Report(str(path), adapter.format, settings, [*source.findings, *findings], modules, base)
    if base is not None and source.tensors and adapter.format != UNKNOWN:
        compare(report, adapter, base, config_only)
    return report


def compare(report: Report, adapter: Adapter, base: str, config_only: bool) -> None:
    """Add what a base can tell."""
    if (task := (adapter.source.fields or {}).get("task_type")) in ("TOKEN_CLS", "QUESTION_ANS"):
        said = f"A base with a head for {task} is not built here, so that nothing was compared with {base!r}."
        report.findings.append(Finding("note", "no-head", said, "08"))
        return
    options: dict[str, Any] = {}
    if task == "SEQ_CLS":
        options = {"head": "classification", "num_labels": saved_labels(adapter.source.tensors) or 2}
    report.with_weights = not config_only and has_weights(base)
    tokenizer = None
    model: nn.Module
    if report.with_weights:
        model, tokenizer = load_base(base, **options)
    else:
        model = meta_model(base, **options)
    fit = list(check_fit(adapter, model, base))
    report.findings += fit
    if not report.with_weights:
        said = f"Only the config of {base!r} was used: its values were not looked at."
        report.findings.append(Finding("note", "config-only", said, "05"))
    elif not adapter.source.is_peft_folder or any(finding.code == "unsupported" for finding in report.findings):
        said = "lora_edu cannot load this adapter, so that nothing was merged and no output compared."
        report.findings.append(Finding("note", "not-loaded", said, "08"))
    elif not any(finding.level == "wrong" for finding in fit):
        report.findings += check_effect(adapter, model, tokenizer, report.modules, report.effect)


def has_weights(base: str) -> bool:
    """Whether a base's weights are on this machine; of a hub id that is not known before it is loaded.

    Raises:
        FileNotFoundError: for a base of the course that has to be fetched, and of which no config is shipped.
    """
    for named in list_bases():
        if named.name == base:
            return named.present or (base not in shipped_configs() and require_base(base).is_dir())
    if Path(base).exists():
        return any(Path(base).glob("*.safetensors"))
    return base not in shipped_configs()
