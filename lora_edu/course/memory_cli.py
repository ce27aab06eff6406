"""``lora-edu memory``: what training a model takes, as a table and as bars, from its config alone."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_edu.course.console import console, errors, friendly

if TYPE_CHECKING:
    from lora_edu.counting.memory import MemoryTable

BAR = 64  # characters of the longest bar
SHADES = {  # part: how it is drawn in a terminal, and its colour in a figure
    "base": ("█", "blue", "blue"),
    "adapter": ("▓", "magenta", "purple"),
    "moments": ("▒", "yellow", "orange"),
    "master": ("░", "bright_black", "sky"),
    "gradients": ("▞", "red", "vermilion"),
    "activations": ("╱", "green", "green"),
}
CONTEXT_GIB = 1.0  # the CUDA context and rounding; 0.8 GiB on the GPU of lesson 06


@friendly
def memory(
    model: Annotated[str, typer.Argument(help="A shipped config (llama-7b, …), a folder, or a hub id.")],
    r: Annotated[int, typer.Option("--r", help="The rank of LoRA and QLoRA.")] = 8,
    targets: Annotated[
        str | None, typer.Option(help="Names separated by commas, a regular expression, or all-linear.")
    ] = None,
    method: Annotated[str, typer.Option(help="full, lora, qlora or all.")] = "all",
    precision: Annotated[str, typer.Option(help="One recipe of the method, such as bf16 or nf4-dq; or all.")] = "all",
    batch: Annotated[int, typer.Option(help="Rows in a batch.")] = 1,
    seq: Annotated[int, typer.Option(help="Tokens in a row.")] = 512,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="With gradient checkpointing.")] = False,
    gpu_memory: Annotated[
        float | None, typer.Option(help="Your card's memory in GiB (a 24 GB card has 24): says what fits.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the bars to this PNG file.")] = None,
) -> None:
    """Estimate the memory of training: weights, gradients, optimizer, activations, for each usual precision."""
    from lora_edu.counting.activations import FAMILIES
    from lora_edu.counting.memory import RECIPES, MemoryTable, find_recipe, memory_table
    from lora_edu.counting.meta import load_config

    if gpu_memory is not None and gpu_memory <= 0:
        raise ValueError(f"--gpu-memory {gpu_memory}: expected the card's memory in GiB, such as 24")
    if method != "all" and method not in {recipe.method for recipe in RECIPES}:
        raise ValueError(f"--method {method}: expected full, lora, qlora or all")
    if method != "all" and precision != "all":
        find_recipe(method, precision)
    estimated = load_config(model).model_type in FAMILIES
    with warnings_in_one_line():
        table = memory_table(
            model,
            None if method == "all" else [method],
            r=r,
            target_modules=parse_targets(targets),
            batch=batch,
            tokens=seq,
            checkpointing=checkpointing,
            activations=estimated,
        )
    rows = [row for row in table.rows if precision in ("all", row.precision)]
    if not rows:
        raise ValueError(
            f"--precision {precision}: expected all or one of {', '.join(r.precision for r in table.rows)}"
        )
    table = MemoryTable(table.title, rows)
    console.print(str(table), markup=False)
    if estimated:
        kept = "with" if checkpointing else "without"
        console.print(
            f"activations: {batch} × {seq} tokens, {kept} checkpointing. Peak: they shrink while gradients grow,"
        )
        console.print("so of these two the larger counts.")
    else:
        console.print(f"activations are estimated for {', '.join(FAMILIES)} only: this is the sum without them")
    _bars(table, gpu_memory)
    if png is not None:
        figure(table).savefig(png, dpi=100, format="png")
        console.print(f"wrote {png}", markup=False)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print each warning once and without the line that led to it; what a table says below itself is not repeated."""
    from lora_edu.core.experts import LeftOutWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for text in dict.fromkeys(str(each.message) for each in caught if each.category is not LeftOutWarning):
        errors.print(f"lora-edu: {text}", markup=False, style="yellow")


def parse_targets(targets: str | None) -> list[str] | str | None:
    """Names with commas between them become a list; a regular expression and ``all-linear`` stay as they are."""
    if targets and targets != "all-linear" and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", targets):
        return re.split(r"\s*,\s*", targets)
    return targets


def _bars(table: "MemoryTable", gpu_memory: float | None) -> None:
    from rich.text import Text

    longest = max(row.peak for row in table.rows)
    used = {part for row in table.rows for part, size in row.peak_parts().items() if size}
    legend = Text("\n")
    for part, (shade, colour, _) in SHADES.items():
        if part in used:
            legend.append(f"{shade * 2} ", style=colour).append(f"{part}   ")
    console.print(legend)
    for row in table.rows:
        line = Text(f"{row.method:5} {row.precision:12} ")
        start = total = 0.0
        for part, size in row.peak_parts().items():
            total += size
            length = round(BAR * total / longest) - round(BAR * start / longest)
            line.append(SHADES[part][0] * length, style=SHADES[part][1])
            start = total
        line.append(f" {row.peak / 1e9:.1f} GB")
        if gpu_memory is not None:
            fits = row.peak / 2**30 + CONTEXT_GIB <= gpu_memory
            line.append("  fits" if fits else "  does not fit", style="green" if fits else "red")
        console.print(line)
    if gpu_memory is not None:
        console.print(
            f"fits: peak + {CONTEXT_GIB:.0f} GiB for the CUDA context ≤ {gpu_memory:g} GiB; PyTorch's cache can"
        )
        console.print("need some GiB more")


def figure(table: "MemoryTable"):  # type: ignore[no-untyped-def]
    """The same bars as a Matplotlib figure."""
    from lora_edu.lab import plots

    fig, axes = plots.figure(size=(9, 1.5 + 0.45 * len(table.rows)))
    names = [f"{row.method} {row.precision}" for row in table.rows]
    left = [0.0] * len(names)
    for i, (part, (_, _, colour)) in enumerate(SHADES.items()):
        sizes = [row.peak_parts().get(part, 0.0) / 1e9 for row in table.rows]
        if any(sizes):
            hatch, shown = plots.HATCHES[i], plots.COLORS[colour]
            axes.barh(names, sizes, left=left, label=part, color=shown, hatch=hatch, edgecolor="white")
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    for name, end in zip(names, left, strict=True):
        axes.text(end, name, f" {end:.1f}", va="center", fontsize=12)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.1)
    axes.set(xlabel="GB at the peak of a step", title=table.title.split(";")[0])
    axes.legend(frameon=False, ncol=3, loc="upper center", bbox_to_anchor=(0.45, -0.2))
    return fig
