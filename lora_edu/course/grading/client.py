"""nbclient for notebooks that nobody vouches for: outputs are dropped, time is shared, the grader has the verdicts.

It runs in the grader, outside of the sandbox. A verdict is what the grader's own cell published under a number drawn
for this one call; whatever else the notebook prints, displays or sends is none.
"""

import json
import logging
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from queue import Empty
from typing import Any

import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionComplete, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from lora_edu.course.grading import kernel
from lora_edu.course.grading.provisioner import kernel_manager
from lora_edu.course.grading.station import Station
from lora_edu.course.grading.submissions import Check
from lora_edu.course.grading.texts import rounded
from lora_edu.course.grading.watch import Watch

OUT_OF_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory", "MemoryError")
LATE = "took more than half of the time that was left"
LONGEST = 1000  # characters of what a notebook says
MOST_STEPS = 100  # of a check
SILENT = logging.getLogger("lora_edu.grading")
SILENT.addHandler(logging.NullHandler())
SILENT.propagate = False


@dataclass(frozen=True)
class Verdict:
    """What came of one check.

    Attributes:
        status: passed, failed, not done, error, timeout or memory.
        symptom: what is wrong; ``title``, ``question`` and ``fix`` are those of ``checks.Report`` too.
        seconds: since the last check.
        notes: what went wrong in the cells since the last check.
        right: its steps that were right; ``step`` is the one that stopped it, ``waiting`` are those after that.
    """

    status: str
    symptom: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    title: str = ""
    question: str = ""
    fix: str = ""
    right: tuple[str, ...] = ()
    step: str = ""
    waiting: tuple[str, ...] = ()

    def points(self, worth: float) -> float:
        """Of the points for a right answer, the share of the steps that are right: the same as nbgrader's."""
        if self.status == "passed":
            return worth
        return rounded(worth * len(self.right) / (len(self.right) + 1 + len(self.waiting)))


@dataclass
class Outcome:
    """What came of one notebook: its checks' verdicts by label, what went wrong in its cells, and how it ended."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    ended: str = "error"
    words: str = ""


class GradingClient(NotebookClient):
    """Executes the cells of one notebook, and each check after the last cell that calls it.

    Args:
        cells: the code cells, each with its place in the notebook.
        checks: the checks; ``after`` says where each stands, None at the end.
        station: where to run.
        watch: the thread that holds the limits.
        folder: the kernel's working directory.
        seed: what the checks draw from.
    """

    def __init__(
        self,
        cells: list[tuple[int, str]],
        checks: list[Check],
        station: Station,
        watch: Watch,
        folder: str,
        seed: int,
    ):
        # What each cell is: the preparation (None), a cell of the notebook (its place), or a check.
        self.parts: list[int | Check | None] = [None]
        sources = [f"__import__({kernel.__name__!r}, fromlist=['*']).prepare({folder!r}, {asdict(watch.limits)!r})"]
        for place, source in cells:
            here = [check for check in checks if check.after == place]
            self.parts += [place, *here]
            sources += [source.encode("utf-8", "replace").decode(), *("" for _ in here)]
        self.parts += (check for check in checks if check.after is None)
        sources += [""] * (len(self.parts) - len(sources))
        super().__init__(
            new_notebook(cells=[new_code_cell(source) for source in sources]),
            allow_errors=True,
            interrupt_on_timeout=True,
            iopub_timeout=2,
            shutdown_kernel="immediate",
            timeout_func=lambda _: max(watch.left() / 2, 0.2),
            on_cell_error=self._failed,
            log=SILENT,
        )
        self.station, self.watch, self.seed, self.outcome = station, watch, seed, Outcome()
        self.calling = {check.after for check in checks}  # the places of the cells that call a check
        self.crashed: dict[int | None, tuple[str, str]] = {}  # what came out of each cell that raised something
        self.told, self.since = 0, time.monotonic()
        self.error: tuple[str, str] | None = None
        self.nonce, self.said = "", dict[str, Any]()

    def grade(self) -> Outcome:
        """Run everything, whatever happens. Not in the main thread, where nbclient would take Ctrl-C for itself."""
        outcome = self.outcome
        try:
            self.execute(env=self.station.environment, cwd=str(self.station.folder))
            outcome.ended = outcome.words = "ended"
        except DeadKernelError:
            outcome.words = f"Python ended in {self.watch.step} (by the code itself, by a crash, or for lack of memory)"
        except Exception as error:  # of a kernel that sends what is no message, too
            outcome.words = f"{self.watch.step}: {type(error).__name__}: {error}"[:LONGEST]
        if self.watch.found:
            outcome.ended, outcome.words = self.watch.found
        return outcome

    def create_kernel_manager(self) -> Any:
        """That of the station's kernel."""
        self.km = kernel_manager(self.station, self._read, SILENT)
        return self.km

    async def async_start_new_kernel_client(self) -> Any:
        """Connect, and go on as soon as the kernel answers, which Jupyter would wait longer for."""
        manager: Any = self.km
        self.station.kernel = self.station.kernel or psutil.Process(manager.provisioner.pid)
        self.kc = client = manager.client()
        client.start_channels(stdin=False, hb=False)
        while True:
            client.kernel_info()
            with suppress(Empty):
                await client.get_iopub_msg(timeout=0.2)
                break
            await self._async_check_alive()
        client.allow_stdin = False
        return client

    async def async_execute_cell(
        self, cell: NotebookNode, cell_index: int, execution_count: int | None = None, store_history: bool = True
    ) -> NotebookNode:
        """Execute one cell, and note what came of it."""
        part, student = self.parts[cell_index], isinstance(self.parts[cell_index], int)
        self.error, self.nonce, self.said = None, secrets.token_hex(), {}
        if isinstance(part, Check):
            self.watch.step = part.label
            call = {"name": part.name, "arguments": part.arguments, "nonce": self.nonce, "seed": self.seed}
            cell.source = f"%%{kernel.MAGIC}\n{json.dumps(call)}"
        elif student:
            self.watch.step = f"cell {part}"
        share, began = self.watch.left() / 2, time.monotonic()
        cell = await super().async_execute_cell(cell, cell_index, execution_count, store_history=student)
        late = time.monotonic() - began >= share
        if isinstance(part, Check):
            self.outcome.verdicts[part.label] = self._verdict(part, late)
        elif student and self.error:
            asserted = part in self.calling and self.error[0] == "AssertionError"
            if not asserted:  # ``assert checks.name(…)`` fails here, because the report comes after it
                self.crashed[part] = explain(*self.error, late)
                self.outcome.troubles.append(f"cell {part} {self.crashed[part][1]}")
        elif self.error:
            raise RuntimeError(": ".join(self.error))
        elif part is None:
            self.watch.begin()
            self.since = time.monotonic()
        return cell

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> None:
        """Keep nothing of what comes, but the report under our number."""
        content = msg["content"]
        if msg["msg_type"] == "status" and content["execution_state"] == "idle":
            raise CellExecutionComplete
        if msg["msg_type"] == "display_data" and isinstance(self.parts[cell_index], Check):
            said = json.loads(content["data"].get(kernel.MIMETYPE, "{}"))
            if said.get("nonce") == self.nonce:
                self.said = said

    def _read(self, message: bytes) -> Any:
        self.watch.received += len(message)
        return json.loads(message)

    def _failed(self, cell: NotebookNode, cell_index: int, execute_reply: dict[str, Any]) -> None:
        content = execute_reply["content"]
        self.error = str(content.get("ename", "")), str(content.get("evalue", ""))

    def _verdict(self, check: Check, late: bool) -> Verdict:
        troubles, said = self.outcome.troubles, self.said
        notes, self.told = tuple(troubles[self.told :]), len(troubles)
        status, symptom = str(said.get("status", "error")), str(said.get("symptom", ""))
        if self.error:
            status, symptom = explain(*self.error, late)
        elif "missing" in said:
            reason = troubles[-1] if troubles else "no cell defines it"
            notes, symptom = (), f"{said['missing']} is not there ({reason})"
        elif status not in ("passed", "failed", "not done"):
            status, symptom = "error", "the check did not report"
        elif status == "failed" and any(words in symptom for words in OUT_OF_MEMORY):
            status = "memory"
        elif status == "passed" and check.after in self.crashed:
            status, symptom = self.crashed[check.after][0], "the cell that calls this check crashes"
        began, self.since = self.since, time.monotonic()
        words = {name: str(said.get(name, ""))[:LONGEST] for name in ("title", "question", "fix", "step")}
        right, waiting = _texts(said.get("passed")), _texts(said.get("waiting"))
        seconds = round(self.since - began, 2)
        return Verdict(status, symptom[:LONGEST], seconds, notes, right=right, waiting=waiting, **words)


def _texts(said: Any) -> tuple[str, ...]:
    """The names of steps in a report; a notebook may have had its hands in it."""
    return tuple(str(text)[:LONGEST] for text in said[:MOST_STEPS]) if isinstance(said, list) else ()


def explain(name: str, value: str, late: bool = False) -> tuple[str, str]:
    """The status and the words for an exception that came out of a cell or a check."""
    value = " ".join(value.split())[:LONGEST]
    if late and name == "KeyboardInterrupt":
        return "timeout", LATE
    memory = name == "MemoryError" or any(words in value for words in OUT_OF_MEMORY)
    return "memory" if memory else "error", f"raised {name}" + (f": {value}" if value else "")
