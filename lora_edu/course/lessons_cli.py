"""``lora-edu lessons …``: list, run, mine, exercises, claims, methods, reset, export."""

from pathlib import Path
from typing import Annotated

import typer

from lora_edu.course.console import console, fail, friendly, progress_bar

MINE_EXAMPLE = """
A line of the file:

{"messages": [{"role": "user", "content": "When do you open?"}, {"role": "assistant", "content": "At nine."}]}

Try it on sample rows:

lora-edu lessons mine data/samples/jargon.jsonl --run --small
"""

lessons = typer.Typer(
    no_args_is_help=True, help="List, run, reset and export the lessons; an adapter for your own rows."
)


@lessons.command("list")
@friendly
def list_() -> None:
    """List the lessons, with the time each took when it last ran here."""
    import json

    from lora_edu.course.notebooks.runs import RAN
    from lora_edu.course.notebooks.stored import EXERCISES, list_notebooks, read, title

    for path in list_notebooks():
        note = RAN / f"{path.stem}.json"
        seconds = f"{json.loads(note.read_text())['seconds']:6.1f} s" if note.exists() else "       –"
        exercise = "exercises" if (EXERCISES / path.name).exists() else ""
        console.print(f"{path.stem:32} {seconds}  {title(read(path))}  {exercise}", markup=False)


@lessons.command("run")
@friendly
def run(
    names: Annotated[list[str] | None, typer.Argument(help="Numbers or names, e.g. 03; all if none is given.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the outputs into lessons/ (for authors).")] = False,
    solutions: Annotated[bool, typer.Option("--solutions", help="Run the solutions instead of the lessons.")] = False,
) -> None:
    """Execute lessons from top to bottom on the CPU.

    Without --update copies run under build/ and lessons/ stays as it is. With --update the outputs are written into
    lessons/, the exercises of the same numbers are generated again from their solutions, and so are the pages of claims
    and of methods.
    """
    from lora_edu.course.notebooks.execute import update as execute_and_write
    from lora_edu.course.notebooks.exercises import generate
    from lora_edu.course.notebooks.runs import RAN
    from lora_edu.course.notebooks.runs import run as run_copies
    from lora_edu.course.notebooks.stored import BUILD, EXERCISES, LESSONS, SOLUTIONS, find_notebook, list_notebooks

    folder = SOLUTIONS if solutions else LESSONS
    sources = [find_notebook(name, folder) for name in names] if names else list_notebooks(folder)
    if not sources:
        fail(f"no notebooks in {folder.name}/")
    with progress_bar("notebooks", len(sources)) as start:
        if update:
            for source in sources:
                execute_and_write(source, source, start(source.stem))
        else:
            target = BUILD / "solutions" if solutions else RAN
            results = run_copies(sources, start, target, force=True)
    if not update:
        for result in results:
            console.print(f"{result.seconds:6.1f} s  {result.name}  {result.error or 'ran'}", markup=False)
        if any(result.error for result in results):
            raise typer.Exit(1)
        console.print(f"the executed copies are in {target}")
        return
    for source in sources:
        if (SOLUTIONS / source.name).exists() and generate(SOLUTIONS / source.name):
            console.print(f"wrote {EXERCISES.name}/{source.name}")
    claims()
    methods()


@lessons.command("mine", epilog=MINE_EXAMPLE)
@friendly
def mine(
    file: Annotated[Path, typer.Argument(help="Your rows: one JSON object a line, with messages.")],
    execute: Annotated[
        bool, typer.Option("--run", help="Also execute the copy, about 30 minutes for a few hundred rows.")
    ] = False,
    small: Annotated[
        bool, typer.Option("--small", help="A few rows and steps, to see whether all of it runs.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(min=16, help="Tokens of a row, by default 256; what is longer is cut.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The folder for the copy and its results; by default work/.")] = None,
) -> None:
    """Your own rows in, your own adapter out: make a copy of my_adapter.ipynb for a file of conversations.

    The file is checked first. The notebook looks for copies and leaks, splits, compares with examples in the prompt,
    trains LoRA on SmolLM2, measures on held-out rows, and writes the adapter, its card and a GGUF file; then it asks
    llama.cpp. An adapter or a notebook that is there is never overwritten.
    """
    from lora_edu.course.notebooks.mine import copy_for, run_copy, told
    from lora_edu.course.notebooks.work import WORK
    from lora_edu.lab.bases import require_base

    if execute:
        require_base("smollm2-135m")
    copy = copy_for(file, small, max_length, to or WORK)
    parts = ", ".join(f"{name} {count}" for name, count in copy.parts.items())
    console.print(f"{copy.rows} rows, without copies: {parts}", markup=False)
    console.print(f"your copy is {copy.notebook}", markup=False)
    if not execute:
        where = "lora-edu lab" if to is None else f"jupyter lab {copy.notebook}"
        console.print(f"Open it with: {where}, and run all cells; the adapter will be in {copy.folder}", markup=False)
        return
    with progress_bar("cells", 1) as start:
        results = run_copy(copy, start(copy.notebook.stem))
    console.print(told(results), markup=False)
    console.print(
        f"The adapter is in {copy.folder / 'adapter'}, as GGUF in {copy.folder / 'adapter.gguf'}", markup=False
    )


@lessons.command("exercises")
@friendly
def exercises(
    names: Annotated[list[str] | None, typer.Argument(help="Numbers or names, e.g. 03; all if none is given.")] = None,
) -> None:
    """Generate lessons/exercises/ from lessons/solutions/ (for authors)."""
    from lora_edu.course.notebooks.exercises import generate
    from lora_edu.course.notebooks.stored import SOLUTIONS, find_notebook, list_notebooks

    for source in [find_notebook(name, SOLUTIONS) for name in names] if names else list_notebooks(SOLUTIONS):
        console.print(f"{'wrote' if generate(source) else 'current'}  exercises/{source.name}")


@lessons.command("claims")
@friendly
def claims() -> None:
    """Fill in which lessons name each claim of data/claims.json, and write book/claims.md from it (for authors)."""
    from lora_edu.course.publish.claims import refresh

    for path in refresh():
        console.print(f"wrote {path.parent.name}/{path.name}")


@lessons.command("methods")
@friendly
def methods() -> None:
    """Write book/methods.md from the referee's record and the methods' own cards (for authors)."""
    from lora_edu.course.publish.methods import refresh

    for path in refresh():
        console.print(f"wrote {path.parent.name}/{path.name}")


@lessons.command("reset")
@friendly
def reset(name: Annotated[str, typer.Argument(help="Number or name of a lesson, e.g. 03, or exercises/03.")]) -> None:
    """Put a fresh copy of one notebook into work/. What was there is kept beside it, as NAME.before-reset.ipynb."""
    from lora_edu.course.notebooks.work import reset as reset_one

    kept, fresh = reset_one(name)
    console.print(f"{fresh} is as new" + (f"; what was there is in {kept}" if kept else ""))


@lessons.command("export")
@friendly
def export(
    name: Annotated[str, typer.Argument(help="Number, name or path of a lesson.")],
    to: Annotated[str, typer.Option(help="html (the whole lesson), slides, or hosted (Colab, Kaggle).")] = "html",
    output: Annotated[Path | None, typer.Option(help="The file to write; by default under build/export/.")] = None,
    repository: Annotated[
        str | None, typer.Option(help="For hosted: the address to clone the course from, if pyproject.toml has none.")
    ] = None,
) -> None:
    """Export a lesson to one file: a page or slides, which need no network, or a notebook for Colab and Kaggle."""
    from lora_edu.course.publish.export import export as export_one

    console.print(f"wrote {export_one(name, to, output, repository)}", markup=False)
