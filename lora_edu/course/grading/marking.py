"""Inside the sandbox: run the cells of one submission, the course's own checks after them, and report what they say.

Nothing that the submission prints, returns or records counts as a result. Its calls of checks are taken out; the checks
of the course's exercise are called in their place, in the form in which they were imported before the submission ran.
The supervisor loads this module under no name, so that a submission that imports it gets another copy.
"""

import ast
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_edu.course import checks as course_checks

if TYPE_CHECKING:
    from lora_edu.course.grading.integrity import Snapshot

OUT_OF_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory", "MemoryError")
LONGEST = 300  # characters of a symptom


class OutOfTime(BaseException):
    """A cell or a check took more than its share; not an Exception, so that ``except Exception`` lets it pass."""


class Channel:
    """JSON lines to the supervisor and back. A line that it did not ask for ends the marking."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.lines = connection.makefile("r", encoding="utf-8")

    def send(self, **message: Any) -> None:
        """Send one message."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Wait for the answer."""
        return json.loads(self.lines.readline())


class Marker:
    """Runs one submission. ``checks`` and ``snapshot`` were taken before any of its code ran."""

    def __init__(self, channel: Channel, job: dict[str, Any], snapshot: "Snapshot", shell: Any):
        self.channel, self.job, self.snapshot, self.shell = channel, job, snapshot, shell
        self.checks = dict(course_checks.CHECKS)
        self.quiet = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)
        self.troubles: list[tuple[str, str]] = []
        self.told = 0  # how many of the troubles a report has named already
        self.replaced: list[str] = []
        shell.ast_transformers.append(WithoutChecks(set(self.checks)))

    def run(self) -> None:
        """All cells from top to bottom, each check after the last cell that calls it, the others at the end."""
        for index, source in self.job["cells"]:
            self.channel.send(step=f"cell {index}")
            self._cell(index, source)
            for check in self.job["checks"]:
                if check["after"] == index:
                    self._check(check)
        for check in self.job["checks"]:
            if check["after"] is None:
                self._check(check)
        self.channel.send(end=True)

    def _cell(self, index: int, source: str) -> None:
        try:
            with share_of_time(self.job["deadline"]):
                result = self.shell.run_cell(source, store_history=False)
            error = result.error_before_exec or result.error_in_exec
        except BaseException as late:
            error = late
        if error is not None:
            kind, text = explain(error)
            self.troubles.append((kind, f"cell {index} {text}"))

    def _check(self, check: dict[str, Any]) -> None:
        self.channel.send(step=check["exercise"])
        self.replaced += self.snapshot.restore()
        notes = [text for _, text in self.troubles[self.told :]]
        self.told = len(self.troubles)
        status, symptom = self._verdict(check)
        during = self.snapshot.restore()
        if during:
            status, symptom = "error", f"{during[0]} was changed while the check ran: the result does not count"
        elif status == "passed" and self._passes_anything(check):
            status, symptom = "error", "this check also accepts code that does nothing: the grader was tampered with"
        if self.replaced:
            first = min(self.replaced, key=lambda name: (not name.startswith("lora_edu"), name))
            notes.insert(0, f"the notebook replaced {first}; graded with the original")
        symptom = "; ".join([symptom, *notes] if symptom else notes)
        self.channel.send(ask=check["exercise"])
        nonce = self.channel.receive()["nonce"]
        self.channel.send(report=check["exercise"], nonce=nonce, status=status, symptom=symptom[:LONGEST])

    def _verdict(self, check: dict[str, Any]) -> tuple[str, str]:
        arguments = []
        for text in check["arguments"]:
            try:
                arguments.append(eval(compile(text, "<argument>", "eval"), self.shell.user_ns))
            except Exception:
                kind, why = self.troubles[-1] if self.troubles else ("error", "no cell defines it")
                return kind, f"{text} is not there ({why})"
        try:
            with share_of_time(self.job["deadline"]):
                report = self._call(check["name"], arguments)
        except BaseException as error:
            return explain(error)
        if report.status == "failed" and any(words in report.symptom for words in OUT_OF_MEMORY):
            return "memory", report.symptom
        return report.status, report.symptom

    def _call(self, name: str, arguments: list[Any]) -> course_checks.Report:
        for variable in ("LORA_EDU_REPORTS", "LORA_EDU_CHECK_SEED"):
            os.environ.pop(variable, None)
        sys.stdout = sys.stderr = self.quiet
        sys.settrace(None)
        sys.setprofile(None)
        return self.checks[name](*arguments)

    def _passes_anything(self, check: dict[str, Any]) -> bool:
        try:
            return self._call(check["name"], [not_done] * len(check["arguments"])).status == "passed"
        except Exception:
            return False


class WithoutChecks(ast.NodeTransformer):
    """Takes out the statements of a cell that call a check: the course's own call stands in their place."""

    def __init__(self, names: set[str]):
        self.names = names

    def visit_Module(self, node: ast.Module) -> ast.Module:
        """Keep the top-level statements that call no check, and definitions, which call nothing yet."""
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        node.body = [line for line in node.body if isinstance(line, kinds) or not self._calls_a_check(line)]
        return node

    def _calls_a_check(self, line: ast.stmt) -> bool:
        return any(isinstance(node, ast.Call) and check_called(node) in self.names for node in ast.walk(line))


def check_called(node: ast.Call) -> str:
    """The name in a call ``checks.name(…)``, or nothing."""
    function = node.func
    if not isinstance(function, ast.Attribute):
        return ""
    owner = function.value
    return function.attr if "checks" in (getattr(owner, "id", ""), getattr(owner, "attr", "")) else ""


def not_done(*_: Any, **__: Any) -> None:
    """Stands for code that does nothing: a check that accepts it has been tampered with."""
    raise NotImplementedError


def explain(error: BaseException) -> tuple[str, str]:
    """The status and the words for an exception that came out of a cell or a check."""
    if isinstance(error, OutOfTime):
        return "timeout", "took more than half of the time that was left"
    try:
        text = " ".join(str(error).split())
    except Exception:  # an exception of the submission's own, which cannot even say what it is
        text = ""
    words = f"raised {type(error).__name__}" + (f": {text}" if text else "")
    if isinstance(error, MemoryError) or any(part in text for part in OUT_OF_MEMORY):
        return "memory", words
    return "error", words


@contextmanager
def share_of_time(deadline: Callable[[], float]) -> Any:
    """No step may take more than half of what is left, so that what comes after an endless loop is still graded."""

    def late(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(deadline() / 2, 0.2))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def make_shell() -> Any:
    """IPython without its history: cells may use magics and ``display``, as in Jupyter."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    settings = Config({"HistoryManager": {"enabled": False}, "InteractiveShell": {"colors": "nocolor"}})
    shell = InteractiveShell.instance(config=settings)
    # Nobody reads a traceback, and a hostile exception could make it slow. %matplotlib asks for a GUI.
    for name in ("showtraceback", "showsyntaxerror", "enable_gui"):
        setattr(shell, name, lambda *_, **__: None)
    return shell
