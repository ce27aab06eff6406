"""Jobs done by several processes, each result in the record's file at once: what every resumable recording shares.

A record is a dictionary with ``machines`` and ``runs``; a run has its ``job``, which is a plain dictionary, the number
of its ``machine``, and its results.
"""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lora_edu.files import write_atomically
from lora_edu.lab.recording.records import surroundings

Job = dict[str, Any]


def key(job: Job) -> str:
    """A job as it stands in a file, where tuples are lists."""
    return json.dumps(job, sort_keys=True)


def missing(jobs: Iterable[Job], record: dict[str, Any]) -> list[Job]:
    """The jobs that the record has no run of, in their order."""
    done = {key(line["job"]) for line in record["runs"]}
    return [job for job in jobs if key(job) not in done]


def check_limits(processes: int, minutes: float | None) -> None:
    """Refuse numbers that make no sense.

    Raises:
        ValueError: if ``processes`` is below 1, or ``minutes`` is not above 0.
    """
    if processes < 1:
        raise ValueError(f"processes={processes}: at least one is needed")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes={minutes}: expected a time above 0, or none for no limit")


def deadline(minutes: float | None) -> float:
    """The time of ``time.monotonic()`` after which no further job is begun."""
    return time.monotonic() + 60 * minutes if minutes else float("inf")


def work(
    todo: Callable[[], list[Job]],
    do: Callable[[Job], dict[str, Any]],
    record: dict[str, Any],
    path: Path,
    processes: int,
    until: float,
) -> bool:
    """Do the jobs that are to be done, and put each into the record and the file once it is; True if none is left.

    Args:
        todo: the jobs that the record still lacks; asked again after every job, as results may call for more.
        do: from a job to its results; a function that other processes can import.
        until: begin no job after this time, see ``deadline``.

    Raises:
        RuntimeError: if a job failed. Those that had begun are finished and recorded before.
    """
    waiting = todo()
    if not waiting:
        return True
    machine = here(record)
    failed: list[tuple[Job, BaseException]] = []
    running: dict[Future[dict[str, Any]], Job] = {}
    spawn = multiprocessing.get_context("spawn")  # because CUDA does not survive a fork
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=settle, initargs=(spawn.Value("i", 0),))
    with pool, bar(len(waiting), record, path) as shown:
        while True:
            while waiting and not failed and len(running) < processes and time.monotonic() < until:
                job = waiting.pop(0)
                running[pool.submit(do, job)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if error := future.exception():
                    failed.append((job, error))
                    continue
                record["runs"].append({"job": job, "machine": machine} | future.result())
                write(path, record)
                begun = set(map(key, running.values()))
                waiting = [job for job in todo() if key(job) not in begun]
                shown.total = len(record["runs"]) + len(running) + len(waiting)
                shown.update()
    if failed:
        job, error = failed[0]
        raise failure(job, error, path) from error
    return not waiting


def here(record: dict[str, Any], world_size: int = 1) -> int:
    """The number of this machine among the record's, where it is entered if it is new."""
    cuda = torch.cuda.is_available()
    machine = surroundings("float32, matrix products in TF32" if cuda else "float32", world_size)
    if machine not in record["machines"]:
        record["machines"].append(machine)
    return record["machines"].index(machine)


def bar(waiting: int, record: dict[str, Any], path: Path) -> tqdm:
    """A progress bar over all runs; ``LORA_EDU_PROGRESS=0`` hides it."""
    quiet, done = os.environ.get("LORA_EDU_PROGRESS") == "0", len(record["runs"])
    return tqdm(total=done + waiting, initial=done, desc=path.stem, unit="run", disable=quiet)


def failure(job: Job, error: BaseException, path: Path) -> RuntimeError:
    """What to say of a job that raised an error."""
    return RuntimeError(
        f"a run failed with {type(error).__name__}: {error}; its job is {job}. The runs that had finished are in "
        f"{path}; once the cause is mended, the same command goes on"
    )


def settle(started: Any = None) -> None:
    """One thread for each process, and TF32 on a GPU: the runs are compared, ten bits are enough for that.

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


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole or not at all. A run is a line, so that a diff shows what was added."""
    lines = ",\n  ".join(json.dumps(line) for line in record["runs"])
    head = json.dumps({name: value for name, value in record.items() if name != "runs"}, indent=1)
    write_atomically(path, f'{head[:-2]},\n "runs": [\n  {lines}\n ]\n}}\n'.encode())


def ending(complete: bool) -> str:
    """What a command says at its end."""
    return "complete" if complete else "stopped at the time limit; the same command goes on"
