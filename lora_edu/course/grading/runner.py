"""One runner for ``grade``, ``check`` and ``progress``: several stations, and in each one notebook after another.

    here: nbclient, clock, verdicts  ──  a station's warm process  ──  kernel: the notebook's cells, the checks

A notebook that crashed, passed a limit or left processes behind costs its station, so that nothing of it reaches the
next one.
"""

import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import psutil

from lora_edu.course.grading.client import GradingClient, Outcome
from lora_edu.course.grading.station import Station, StationError
from lora_edu.course.grading.submissions import Check
from lora_edu.course.grading.watch import Limits, Watch


class Runner:
    """Runs notebooks. Use it in a ``with``: its end, by Ctrl-C too, is the end of all that it started.

    Args:
        jobs: how many run at once.
        isolated: each station in bubblewrap (see ``isolation.decide``).
        own: the notebooks are the learner's own: they see the environment as it is.
        hidden: folders that no notebook may see.
        seed: what the checks draw from, so that a result can be had again; by default a new one.
    """

    def __init__(
        self,
        jobs: int = 1,
        isolated: bool = False,
        own: bool = False,
        hidden: Iterable[Path] = (),
        seed: int | None = None,
    ):
        self.jobs, self.isolated, self.own, self.hidden = jobs, isolated, own, list(hidden)
        self.seed = secrets.randbelow(2**32) if seed is None else seed
        self.pool = ThreadPoolExecutor(jobs, thread_name_prefix="runner")
        self.lock = Lock()
        self.stations: set[Station] = set()
        self.idle: list[Station] = []
        self.closed = self.worked = False
        self.broken = ""  # why no station can be started, once one could not and none had before

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.closed = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for station in list(self.stations):
            station.close()

    def run(
        self,
        cells: list[tuple[int, str]],
        checks: list[Check],
        limits: Limits,
        files: Path | None = None,
        folder: Path | None = None,
    ) -> Outcome:
        """Run one notebook to its end. May be called from several threads at once.

        Args:
            cells: the code cells, each with its place in the notebook.
            checks: what to call, and where.
            limits: what the notebook may take.
            files: a folder whose files lie beside the notebook; copies of them do so where it runs.
            folder: run there instead, in a folder of the learner's own.
        """
        return self.pool.submit(self._run, cells, checks, limits, files, folder).result()

    def _run(
        self, cells: list[tuple[int, str]], checks: list[Check], limits: Limits, files: Path | None, folder: Path | None
    ) -> Outcome:
        try:
            station = self._station()
        except (StationError, psutil.Error, OSError) as error:
            return Outcome(words=str(error))
        watch = Watch(station, limits)
        watch.start()
        try:
            if files:
                station.fill(files)
            place = str(folder or station.inside / "notebook")
            outcome = GradingClient(cells, checks, station, watch, place, self.seed).grade()
        except Exception as error:  # a disk that is full, for example: this notebook's matter, and no other's
            outcome = Outcome(words=str(error))
        watch.stopped.set()
        watch.join()
        if station.reset():
            with self.lock:
                self.idle.append(station)
        else:
            self._end(station)
        return outcome

    def _station(self) -> Station:
        """One that is free, or a new one."""
        while True:
            with self.lock:
                if self.closed or self.broken:
                    raise StationError(self.broken or "the runner was closed")
                if not self.idle:
                    station = Station(self.isolated, self.own, self.hidden)
                    self.stations.add(station)
                    break
                station = self.idle.pop()
            if station.is_ready():
                return station
            self._end(station)
        try:
            station.start()
            self.worked = True
        except (StationError, psutil.Error) as error:
            self.broken = "" if self.worked else str(error)
            self._end(station)
            raise
        return station

    def _end(self, station: Station) -> None:
        station.close()
        self.stations.discard(station)
