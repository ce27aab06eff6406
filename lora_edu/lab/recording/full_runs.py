"""The recorded sweeps of lessons 07 and 10, by name, in pieces that resume. A GPU is not required, but wanted.

    lora-edu full-run                                            # what there is, and what it costs
    lora-edu full-run smollm2_finetuning --processes 6 --minutes 9
    lora-edu full-run smollm2_finetuning --base ORGANISATION/MODEL   # another base, into a file of its own
    python -m lora_edu.lab.recording.full_runs smollm2_finetuning --processes 6 --minutes 9

The last form does the same on a machine that has what training needs and no more (no typer, no notebooks): a GPU that
is borrowed for an hour. The records were made with it, and name it.

    accelerate launch --config_file data/accelerate/ddp.yaml --num_processes 2 -m lora_edu.lab.recording.full_runs NAME

With several GPUs, ``--processes`` gives each run to one of them, several runs at a time: the faster way while a run
fits. Under ``accelerate launch`` all of them train each run together.

Every finished run is in ``data/runs/NAME.json`` at once, with the machine it ran on. Killed and started again, the
command does what is missing. The file is replaced as a whole, so it is valid at every moment; one command at a time
writes it.
"""

import argparse
import json
import multiprocessing
import os
import re
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from lora_edu.files import data_path, locked, write_atomically
from lora_edu.lab.distributed import broadcast_from_main, process_state
from lora_edu.lab.recording.experiments import DEFAULTS, look_inside, run
from lora_edu.lab.recording.records import surroundings
from lora_edu.lab.recording.sweeps import SWEEPS, Job, jobs
from lora_edu.quick import full_size

SECONDS_PER_ROW = {"tiny": 0.008, "smollm2-135m": 0.31}  # of one training step, on two idle cores


class Cost(NamedTuple):
    """What a sweep takes: its runs, how many are in data/runs, their training steps, and hours on two cores."""

    runs: int
    recorded: int
    steps: int
    hours: float


def cost(name: str) -> Cost:
    """What a sweep takes. The hours are those of its training steps, as if no GPU helped; evaluations come on top.

    Raises:
        ValueError: for an unknown name.
    """
    wanted = jobs(name)
    path = data_path("runs", f"{name}.json")
    steps, seconds = 0, 0.0
    for job in wanted:
        # Looking inside trains two ranks from two seeds, and everything once.
        here = job.get("steps", DEFAULTS["steps"]) * (5 if job["part"] == "inside" else 1)
        steps += here
        rows = here * job.get("batch_size", DEFAULTS["batch_size"])
        seconds += rows * SECONDS_PER_ROW[job.get("base", DEFAULTS["base"])]
    return Cost(len(wanted), len(_record(name, path)["runs"]), steps, seconds / 3600)


@full_size()  # on a GPU where there is one
def full_run(
    name: str, out: Path | None = None, processes: int = 1, minutes: float | None = None, base: str | None = None
) -> bool:
    """Do what is missing of a sweep; True when nothing is.

    Args:
        name: one of ``SWEEPS``.
        out: the file to write and to resume from; default ``data/runs/NAME.json``, with ``base`` ``NAME-BASE.json``.
        processes: how many runs at a time, each on one thread. One run leaves most of a GPU idle: six share it well.
            Several GPUs take the runs in turn.
        minutes: begin no further run after this long.
        base: another base model than the sweep's own; see ``sweeps.jobs``.

    Under ``accelerate launch`` all processes call this and train each run together; the main one decides which run is
    next, and alone reads and writes the file.

    Raises:
        ValueError: for an unknown name, a number out of range, ``processes`` above 1 under ``accelerate launch``, a
            base that does not fit, or a file that is no record of this sweep.
        FileNotFoundError: if the file's folder does not exist, or the base is not here.
        RuntimeError: if another command writes this file, or a run failed; what had finished is recorded.
    """
    if processes < 1:
        raise ValueError(f"processes={processes}: at least one is needed")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes={minutes}: expected a time above 0, or none for no limit")
    if processes > 1 and process_state().num_processes > 1:
        raise ValueError(
            f"processes={processes} under accelerate launch: its {process_state().num_processes} processes do each run "
            f"together. Leave processes at 1, or start python -m lora_edu.lab.recording.full_runs {name} --processes "
            f"{processes}"
        )
    path = out or data_path("runs", f"{_file_name(name, base)}.json")
    wanted = jobs(name, base)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into: make it, or name another file")
    if not process_state().is_main_process:
        return _follow()
    with locked(path):
        record = _record(name, path, base)
        done = {_key(line["job"]) for line in record["runs"]}
        todo = [job for job in wanted if _key(job) not in done]
        work = _lead if process_state().num_processes > 1 else _work
        return work(todo, record, path, processes, minutes)


def _lead(todo: list[Job], record: dict[str, Any], path: Path, processes: int, minutes: float | None) -> bool:
    """The main process's part under ``accelerate launch``: say which job is next, do it with all, and record it."""
    machine = _here(record, process_state().num_processes) if todo else None
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    bar = _bar(todo, record, path)
    _settle()
    with bar:
        while todo and time.monotonic() < until:
            job = todo.pop(0)
            broadcast_from_main(job)
            try:
                result = _do(job)
            except Exception as error:  # the launcher ends the other processes when this one ends
                raise _failure(job, error, path) from error
            record["runs"].append({"job": job, "machine": machine} | result)
            _write(path, record)
            bar.update()
        return broadcast_from_main(not todo)  # no job, but the answer to whether all is done: the end


def _follow() -> bool:
    """The other processes' part: do what the main one says, until it says how it ended."""
    _settle()
    said: Any = broadcast_from_main(None)
    while not isinstance(said, bool):
        _do(said)
        said = broadcast_from_main(None)
    return said


def _here(record: dict[str, Any], world_size: int = 1) -> int:
    """The number of this machine among the record's, where it is entered if it is new."""
    cuda = torch.cuda.is_available()
    machine = surroundings("float32, matrix products in TF32" if cuda else "float32", world_size)
    if machine not in record["machines"]:
        record["machines"].append(machine)
    return record["machines"].index(machine)


def _bar(todo: list[Job], record: dict[str, Any], path: Path) -> tqdm:
    quiet, done = os.environ.get("LORA_EDU_PROGRESS") == "0", len(record["runs"])
    return tqdm(total=done + len(todo), initial=done, desc=path.stem, unit="run", disable=quiet)


def _failure(job: Job, error: BaseException, path: Path) -> RuntimeError:
    return RuntimeError(
        f"a run failed with {type(error).__name__}: {error}; its job is {job}. The runs that had finished are in "
        f"{path}; once the cause is mended, the same command goes on"
    )


def _work(todo: list[Job], record: dict[str, Any], path: Path, processes: int, minutes: float | None) -> bool:
    """Do these jobs, and put each into the record and the file once it is done; True if none is left."""
    if not todo:
        return True
    machine = _here(record)
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    failed: list[tuple[Job, BaseException]] = []
    running: dict[Future[dict[str, Any]], Job] = {}
    spawn = multiprocessing.get_context("spawn")  # because CUDA does not survive a fork
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_settle, initargs=(spawn.Value("i", 0),))
    with pool, _bar(todo, record, path) as bar:
        while True:
            while todo and not failed and len(running) < processes and time.monotonic() < until:
                job = todo.pop(0)
                running[pool.submit(_do, job)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if error := future.exception():
                    failed.append((job, error))
                    continue
                line = {"job": job, "machine": machine} | future.result()
                record["runs"].append(line)
                _write(path, record)
                bar.update()
    if failed:
        job, error = failed[0]
        raise _failure(job, error, path) from error
    return not todo


def _settle(started: Any = None) -> None:
    """One thread for each process, and TF32 on a GPU: the sweeps compare runs, ten bits are enough for that.

    ``started`` counts the workers of ``--processes``, which take several GPUs in turn. Launched processes have theirs.
    """
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    os.environ["LORA_EDU_PROGRESS"] = "0"
    if started is not None and torch.cuda.device_count() > 1:
        with started.get_lock():
            torch.cuda.set_device(started.value % torch.cuda.device_count())
            started.value += 1
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever, and keep the GPU's memory."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _do(job: Job) -> dict[str, Any]:
    settings = {name: value for name, value in job.items() if name not in ("part", "rule", "kind")}
    return look_inside(settings) if job["part"] == "inside" else run(settings)


def _key(job: Job) -> str:
    """A job as it stands in a file, where tuples are lists."""
    return json.dumps(job, sort_keys=True)


def _file_name(name: str, base: str | None) -> str:
    """NAME, or NAME-BASE for another base: the shipped records hold the sweeps' own bases."""
    if base is None:
        return name
    called = Path(base).resolve().name if Path(base).is_dir() else base
    return f"{name}-{re.sub('[^a-z0-9.]+', '-', called.lower()).strip('-.')}"


def _record(name: str, path: Path, base: str | None = None) -> dict[str, Any]:
    """The record so far, or an empty one; never a file that something else wrote."""
    command = f"python -m lora_edu.lab.recording.full_runs {name}" + (f" --base {base}" if base else "")
    record: dict[str, Any] = {"command": command, "defaults": DEFAULTS, "machines": [], "runs": []}
    if not path.exists():
        return record
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        record |= {"machines": found["machines"], "runs": found["runs"]}
        keys = {_key(line["job"]) for line in found["runs"]}
        defaults = found["defaults"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no record of a sweep ({type(error).__name__}: {error}): name another file"
        ) from None
    if strange := keys - {_key(job) for job in jobs(name, base)}:
        raise ValueError(
            f"{path} holds {len(strange)} runs that are no jobs of {name}, one of them {min(strange)}: take them out, "
            "or name another file"
        )
    if DEFAULTS | defaults != DEFAULTS:  # a setting that came later had its default's value before
        raise ValueError(f"{path} was recorded under other defaults ({defaults}): its jobs now mean something else")
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    """A run is a line, so that a diff shows what was added."""
    lines = ",\n  ".join(json.dumps(line) for line in record["runs"])
    head = json.dumps({key: value for key, value in record.items() if key != "runs"}, indent=1)
    write_atomically(path, f'{head[:-2]},\n "runs": [\n  {lines}\n ]\n}}\n'.encode())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SWEEPS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--base", help="any base model instead of the sweep's own")
    given = parser.parse_args()
    complete = full_run(given.name, given.out, given.processes, given.minutes, given.base)
    if process_state().is_main_process:
        print(ending(complete))
    process_state().wait_for_everyone()
    process_state().destroy_process_group()


def ending(complete: bool) -> str:
    """What a command says at its end."""
    return "complete" if complete else "stopped at the time limit; the same command goes on"


if __name__ == "__main__":
    main()
