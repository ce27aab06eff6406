"""The recorded sweeps of lessons 07 and 10, by name, in pieces that resume. A GPU is not required, but wanted.

    lora-edu full-run                                            # what there is, and what it costs
    lora-edu full-run smollm2_finetuning --processes 6 --minutes 9
    python -m lora_edu.lab.full_runs smollm2_finetuning --processes 6 --minutes 9

The second form does the same on a machine that has what training needs and no more (no typer, no notebooks): a GPU that
is borrowed for an hour. The records were made with it, and name it.

Every finished run is in ``data/runs/NAME.json`` at once, with the machine it ran on. Killed and started again, the
command does what is missing. The file is replaced as a whole, so it is valid at every moment; one command at a time
writes it.
"""

import argparse
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from lora_edu.lab.bases import data_path
from lora_edu.lab.experiments import DEFAULTS, look_inside, run
from lora_edu.lab.records import surroundings
from lora_edu.lab.sweeps import SWEEPS, Job, jobs
from lora_edu.peft_io import write_atomically

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


def full_run(name: str, out: Path | None = None, processes: int = 1, minutes: float | None = None) -> bool:
    """Do what is missing of a sweep; True when nothing is.

    Args:
        name: one of ``SWEEPS``.
        out: the file to write and to resume from; default ``data/runs/NAME.json``.
        processes: how many runs at a time, each on one thread. One run leaves most of a GPU idle: six share it well.
        minutes: begin no further run after this long.

    Raises:
        ValueError: for an unknown name, a number out of range, or a file that is no record of this sweep.
        FileNotFoundError: if the file's folder does not exist.
        RuntimeError: if another command writes this file, or a run failed; what had finished is recorded.
    """
    if processes < 1:
        raise ValueError(f"processes={processes}: at least one is needed")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes={minutes}: expected a time above 0, or none for no limit")
    path = out or data_path("runs", f"{name}.json")
    wanted = jobs(name)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into: make it, or name another file")
    with _alone(path):
        record = _record(name, path)
        done = {_key(line["job"]) for line in record["runs"]}
        todo = [job for job in wanted if _key(job) not in done]
        return not todo or _work(todo, record, path, processes, minutes)


def _work(todo: list[Job], record: dict[str, Any], path: Path, processes: int, minutes: float | None) -> bool:
    """Do these jobs, and put each into the record and the file once it is done; True if none is left."""
    machine = surroundings("float32, matrix products in TF32" if torch.cuda.is_available() else "float32")
    if machine not in record["machines"]:
        record["machines"].append(machine)
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    quiet = os.environ.get("LORA_EDU_PROGRESS") == "0"
    done = len(record["runs"])
    failed: list[tuple[Job, BaseException]] = []
    running: dict[Future[dict[str, Any]], Job] = {}
    # Spawned, because CUDA does not survive a fork.
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_settle)
    with pool, tqdm(total=done + len(todo), initial=done, desc=path.stem, unit="run", disable=quiet) as bar:
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
                line = {"job": job, "machine": record["machines"].index(machine)} | future.result()
                record["runs"].append(line)
                _write(path, record)
                bar.update()
    if failed:
        job, error = failed[0]
        raise RuntimeError(
            f"a run failed with {type(error).__name__}: {error}; its job is {job}. The runs that had finished are in "
            f"{path}; once the cause is mended, the same command goes on"
        ) from error
    return not todo


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock beside the file: of two commands that write it, each would undo what the other recorded."""
    try:
        import fcntl
    except ImportError:  # Windows: nobody checks
        yield
        return
    beside = path.with_suffix(".lock")
    with open(beside, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError:
            raise RuntimeError(f"{path} is being written by another command: wait, or name another file") from None
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)


def _settle() -> None:
    """One thread for each process, and TF32 on a GPU: the sweeps compare runs, ten bits are enough for that."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    os.environ["LORA_EDU_PROGRESS"] = "0"
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever, and keep the GPU's memory."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _do(job: Job) -> dict[str, Any]:
    settings = {name: value for name, value in job.items() if name not in ("part", "rule")}
    return look_inside(settings) if job["part"] == "inside" else run(settings)


def _key(job: Job) -> str:
    """A job as it stands in a file, where tuples are lists."""
    return json.dumps(job, sort_keys=True)


def _record(name: str, path: Path) -> dict[str, Any]:
    """The record so far, or an empty one; never a file that something else wrote."""
    command = f"python -m lora_edu.lab.full_runs {name}"
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
    if strange := keys - {_key(job) for job in jobs(name)}:
        raise ValueError(
            f"{path} holds {len(strange)} runs that are no jobs of {name}, one of them {min(strange)}: take them out, "
            "or name another file"
        )
    if defaults != DEFAULTS:
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
    given = parser.parse_args()
    print(ending(full_run(given.name, given.out, given.processes, given.minutes)))


def ending(complete: bool) -> str:
    """What a command says at its end."""
    return "complete" if complete else "stopped at the time limit; the same command goes on"


if __name__ == "__main__":
    main()
