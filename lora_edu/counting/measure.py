"""Measure memory and time so that the numbers mean something. Built in lesson 06.

Memory: each measurement in a process of its own, since a process keeps what it once took. Time: in turns, A B A B, and
compared pair by pair, since whatever else the machine does disturbs both alike.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

_CHILD = "from lora_edu.counting.measure import _child; _child()"
_MARK = "measured: "
# Imports only: a process that has computed something may hold threads, and those do not survive a fork.
PRELOAD = "import lora_edu, accelerate; from transformers import AutoTokenizer, LlamaForCausalLM"


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of a process's memory: ``before`` the measured code, and at its ``peak``."""

    before: int
    peak: int

    @property
    def extra(self) -> int:
        """What the code took on top of what was there."""
        return self.peak - self.before


def peak_memory(
    codes: Mapping[str, tuple[str, str]], preload: str = PRELOAD, timeout: float = 120
) -> dict[str, PeakMemory]:
    """Run pieces of Python code, each in a process of its own, and measure the highest memory of each.

    Args:
        codes: name → (setup, body), two pieces of source. Setup runs first and is not measured: the model, the data.
            Body is measured; it sees the names that setup defined.
        preload: source that all pieces share: imports. On Linux it runs once, and the processes are forked from there.
        timeout: seconds for all of it.

    On Linux the high-water mark is reset after setup. Elsewhere, and where the kernel forbids that, the peak is that
    of the whole process; it is then an upper bound.

    Raises:
        RuntimeError: if one of the codes fails; the message carries its last line.
    """
    # Without this, freed memory may or may not go back to the system, and the same code reads up to 45 % apart.
    # One thread: each further one has buffers of its own, and on a busy machine they wait for each other.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    together = [dict(codes)] if sys.platform == "linux" else [{name: code} for name, code in codes.items()]
    results: dict[str, PeakMemory] = {}
    for group in together:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            stdout, stderr = child.communicate(json.dumps([preload, group]), timeout=timeout)
        except BaseException:
            _end(child)
            raise
        found = dict(json.loads(line[len(_MARK) :]) for line in stdout.splitlines() if line.startswith(_MARK))
        if missing := [name for name in group if name not in found]:
            lines = stderr.strip().splitlines() or [f"exit code {child.returncode}"]
            raise RuntimeError(f"the measured code {missing[0]!r} failed: {lines[-1]}")
        results |= {name: PeakMemory(*found[name]) for name in group}
    return results


def _end(child: subprocess.Popen) -> None:
    """End a process and, where there are process groups, what it forked."""
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.communicate()


def _child() -> None:
    """What the measuring process does: load what is shared, then measure each code in a fork of itself."""
    preload, group = json.load(sys.stdin)
    exec(compile(preload, "preload", "exec"), {})
    for name, (setup, body) in group.items():
        if sys.platform == "linux" and (pid := os.fork()):
            if os.waitpid(pid, 0)[1]:
                sys.exit(1)
            continue
        space: dict[str, Any] = {"__name__": "measured"}
        exec(compile(setup, "setup", "exec"), space)
        _reset_high_water()
        before = _resident()
        exec(compile(body, "body", "exec"), space)
        print(_MARK + json.dumps([name, [before, _high_water()]]), flush=True)
        if sys.platform == "linux":
            return


def _status(field: str) -> int | None:
    """A field of Linux's ``/proc/self/status`` in bytes, or None elsewhere."""
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":")), None)
    except OSError:
        return None


def _resident() -> int:
    """Bytes of memory that this process holds now."""
    if (found := _status("VmRSS")) is not None:
        return found
    import psutil  # comes with accelerate

    return psutil.Process().memory_info().rss


def _high_water() -> int:
    """The most that this process has held, since its start or the last reset."""
    if (found := _status("VmHWM")) is not None:
        return found
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, the others KiB


def _reset_high_water() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


@dataclass(frozen=True)
class PairedTimes:
    """Times of several functions that ran in turns, in seconds: ``seconds[name][round]``."""

    seconds: dict[str, list[float]]

    def ratios(self, name: str, against: str) -> list[float]:
        """The ratio of each round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[against], strict=True)]

    def ratio(self, name: str, against: str) -> float:
        """The median of the rounds' ratios."""
        return median(self.ratios(name, against))

    def middle_half(self, name: str, against: str) -> tuple[float, float]:
        """The quartiles between which the middle half of the ratios lies; with one round, that round."""
        found = self.ratios(name, against)
        if len(found) < 2:
            return found[0], found[0]
        low, _, high = quantiles(found, n=4, method="inclusive")
        return low, high

    def verdict(self, name: str, against: str, margin: float = 0.02) -> str:
        """ "faster", "slower" or "no clear difference": clear if the middle half lies beyond 1 by the margin."""
        low, high = self.middle_half(name, against)
        return "faster" if high < 1 - margin else "slower" if low > 1 + margin else "no clear difference"


def paired_times(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> PairedTimes:
    """Time functions in turns, so that a disturbance meets all of them. Lesson 06.

    Args:
        functions: name → what to run once; each round runs every one, in changing order.
        rounds: how often; the first ``warmup`` ones on top are not recorded.
        clock: ``time.process_time`` counts only the processor time of this process, which other programs disturb less.

    Raises:
        ValueError: if there is nothing to run, or rounds is below 1.
    """
    if not functions or rounds < 1:
        raise ValueError(f"{len(functions)} functions, rounds={rounds}: give at least one of each")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(-warmup, rounds):
        order = list(functions)[:: 1 if index % 2 == 0 else -1]
        for name in order:
            start, took, calls = clock(), 0.0, 0
            while took <= 0:  # a process with a limit on its processor time sees that clock move in steps of some ms
                functions[name]()
                took, calls = clock() - start, calls + 1
            if index >= 0:
                seconds[name].append(took / calls)
    return PairedTimes(seconds)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward()``, the model's own weights left out. Lesson 06.

    Each piece of memory counts once, however many operations keep it.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held here, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in kept.values())
