"""How Jupyter gets a kernel from a station: a provisioner that has the warm process fork it."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import EntryPoint
from logging import Logger
from typing import Any

import psutil
import zmq
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner
from traitlets import Instance

from lora_edu.course.grading.station import Station

LARGEST_MESSAGE = 16 * 1024**2  # bytes: whoever sends more is disconnected


class ForkedKernel(LocalProvisioner):
    """Has a station fork the kernel that Jupyter asks for, where ``LocalProvisioner`` starts a program."""

    station = Instance(Station)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Fork it; all that Jupyter wants to know about a process, psutil tells."""
        self.pid = self.pgid = self.station.launch(self.connection_info).pid
        self.process: Any = _Process(self.pid)
        return self.connection_info

    async def kill(self, restart: bool = False) -> None:
        """End it, and wait here: Jupyter would look for its end every tenth of a second."""
        await super().kill(restart)
        with suppress(psutil.Error):
            self.process.wait(5)


class _Process(psutil.Process):
    """A process with what ``subprocess.Popen`` has, of which Jupyter makes use."""

    stdin = stdout = stderr = None

    def send_signal(self, signum: int) -> None:
        with suppress(psutil.Error):
            super().send_signal(signum)

    def poll(self) -> int | None:
        return None if self.is_running() and self.status() != psutil.STATUS_ZOMBIE else 0


class _Kernels(KernelSpecManager):
    """The one kind of kernel there is: a station's, or else this Python's."""

    station = Instance(Station)

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        forked = {"kernel_provisioner": {"provisioner_name": "lora-edu", "config": {"station": self.station}}}
        return KernelSpec(argv=command, language="python", metadata=forked if self.station.process else {})


def kernel_manager(station: Station, read: Callable[[bytes], Any], log: Logger) -> AsyncKernelManager:
    """Jupyter's manager for the kernel that this station will start.

    Args:
        station: where. The sockets of a forked kernel are files, which are reached from outside of the sandbox too.
        read: makes an object of a piece of JSON that the kernel sends.
        log: where Jupyter logs to.
    """
    manager = AsyncKernelManager(kernel_spec_manager=_Kernels(station=station), log=log)
    manager.context.setsockopt(zmq.MAXMSGSIZE, LARGEST_MESSAGE)
    manager.session.unpack = read
    manager.connection_file = str(station.folder / "kernel.json")
    if station.process:
        manager.transport, manager.ip = "ipc", os.fspath(station.folder / "sockets" / "k")
    return manager


KernelProvisionerFactory.instance().provisioners["lora-edu"] = EntryPoint(
    "lora-edu", f"{__name__}:{ForkedKernel.__name__}", KernelProvisionerFactory.GROUP_NAME
)
