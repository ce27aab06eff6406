"""``lora-edu inspect``: what is in an adapter's file, as findings, a table, JSON or a figure."""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_edu.course.console import console, friendly
from lora_edu.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lora_edu.serving.inspection.factors import Measured
    from lora_edu.serving.inspection.report import Report

MARKS = {"ok": "[green]✓[/]", "note": "[yellow]○[/]", "wrong": "[red]✗[/]"}
LABELS = ("norm of s·BA", "effective rank")
LEGEND_COLUMNS = 4
EXAMPLES = """
Examples:

lora-edu inspect data/adapters/tiny-jargon

lora-edu inspect my_adapter --base smollm2-135m --figure norms.png

lora-edu inspect my_adapter --base llama-7b --json

The last one compares names and shapes only: of llama-7b the course has the config, not the weights.
"""


@friendly
def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder, or one .safetensors file.")],
    base: Annotated[
        str | None, typer.Option(help="Compare with this base: a name of the course, a folder or a hub id.")
    ] = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Of the base use the config alone: names and shapes, no weights.")
    ] = False,
    each: Annotated[
        bool, typer.Option("--each", help="A line of the table for each module, not for each kind.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, for programs.")] = False,
    figure: Annotated[
        Path | None, typer.Option(help="Also draw norms and effective ranks by layer into this PNG file.")
    ] = None,
) -> None:
    """Look into an adapter's file: kind, ranks, scale, norms, and whatever is wrong with it.

    With --base also: whether it fits, what merging in half precision loses, whether the output changes. The exit
    status is 1 where something is wrong (✗). Safetensors and JSON are read; a pickle is named and never opened.
    """
    from lora_edu.course.memory_cli import warnings_in_one_line
    from lora_edu.serving.inspection.report import inspect_adapter

    if config_only and base is None:
        raise ValueError("--config-only says how to use a base: name one with --base")
    with warnings_in_one_line():
        report = inspect_adapter(adapter, base, config_only)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print_report(report, each)
    if figure is not None:
        picture = io.BytesIO()
        draw(report).savefig(picture, dpi=100, format="png")
        write_atomically(figure, picture.getvalue())
        if not as_json:
            console.print(f"wrote {figure}", markup=False)
    if report.wrong:
        raise typer.Exit(1)


def print_report(report: Report, each: bool) -> None:
    """The table of the modules, and the findings below it, what is wrong last: there it is seen."""
    from rich.markup import escape

    from lora_edu.serving.inspection.findings import LEVELS

    if report.modules:
        print_table(report, each)
    for finding in sorted(report.findings, key=lambda finding: LEVELS.index(finding.level)):
        console.print(f"{MARKS[finding.level]} {escape(finding.sentence)} [dim](lesson {finding.lesson})[/]")
        if finding.way_out:
            console.print(f"  {finding.way_out}", markup=False)
    number = sum(finding.level == "wrong" for finding in report.findings)
    console.print(f"{number} wrong" if number else "nothing is wrong")


def print_table(report: Report, each: bool) -> None:
    """One line for each kind of module, or for each module."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    share = any(module.share is not None for module in report.modules)
    table.add_column("module")
    for head in [] if each else ["layers"]:
        table.add_column(head, justify="right")
    for head in ["r", "in → out", "s", "norm of s·BA", *(["/ ‖W‖"] if share else []), "effective rank"]:
        table.add_column(head, justify="right")
    groups = {module.name: [module] for module in report.modules} if each else by_kind(report.modules)
    for name, modules in groups.items():
        numbers = [
            values((module.rank for module in modules), "d"),
            " ".join(dict.fromkeys(f"{shown(m.in_features)} → {shown(m.out_features)}" for m in modules)),
            values((module.scale for module in modules), "g"),
            middle((module.norm for module in modules), ".3g"),
            *([middle((module.share for module in modules), ".1%")] if share else []),
            middle((module.effective_rank for module in modules), ".1f"),
        ]
        table.add_row(name, *([] if each else [str(len(modules))]), *numbers)
    # In a log or a narrow window lines that run on are better than numbers that are cut off.
    Console(highlight=False, width=max(console.width, 140)).print(table)
    if not each and any(len(modules) > 1 for modules in groups.values()):
        console.print("where a kind has several layers: the median, and from the smallest to the largest\n")


def by_kind(modules: Iterable[Measured]) -> dict[str, list[Measured]]:
    """Modules that differ only in the number of their layer, together: what stands behind the last number of a name."""
    groups: dict[str, list[Measured]] = {}
    for module in modules:
        groups.setdefault(re.split(r"[._]\d+[._]", module.name)[-1], []).append(module)
    return groups


def shown(number: int | None) -> str:
    """A number of features, or a question mark."""
    return "?" if number is None else f"{number:,}"


def values(numbers: Iterable[float | None], form: str) -> str:
    """The different values among a few numbers: ``8`` or ``4, 8``."""
    return ", ".join(dict.fromkeys("?" if number is None else format(number, form) for number in numbers))


def middle(numbers: Iterable[float | None], form: str) -> str:
    """``1.4 (1.1–1.9)``: median, smallest and largest; a single number alone."""
    known = [number for number in numbers if number is not None]
    if not known:
        return "?"
    text = format(statistics.median(known), form)
    return text if len(known) == 1 else f"{text} ({format(min(known), form)}–{format(max(known), form)})"


def draw(report: Report) -> Figure:
    """Norms and effective ranks by layer, one curve a kind of module; one without a layer's number stands at −1.

    Where no name has a number of a layer, as in kohya's files, the modules of a kind stand in the file's order.
    """
    from lora_edu.core.matching import layer_index
    from lora_edu.lab import plots

    known = [module for module in report.modules if module.norm is not None]
    if not known:
        raise ValueError("there is nothing to draw: no module has a norm; see the findings without --figure")
    numbers = {module.name: layer_index(module.name) for module in known}
    numbered = any(number is not None for number in numbers.values())
    kinds = by_kind(known)
    fig, panels = plots.figure(ncols=2, size=(12, 4 + 0.3 * -(-len(kinds) // LEGEND_COLUMNS)))
    for axes, attribute, words in zip(panels, ("norm", "effective_rank"), LABELS, strict=True):
        for kind, modules in kinds.items():
            places = [numbers[module.name] if numbered else i for i, module in enumerate(modules)]
            at = [-1 if place is None else place for place in places]
            axes.plot(at, [getattr(module, attribute) for module in modules], label=kind)
        axes.set(xlabel="layer" if numbered else "place in the file", ylabel=words)
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
    fig.suptitle(f"{Path(report.adapter).name}: {len(known)} modules")
    handles = panels[0].get_legend_handles_labels()
    fig.legend(*handles, frameon=False, ncol=LEGEND_COLUMNS, loc="outside lower center")
    return fig
