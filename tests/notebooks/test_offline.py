"""No lesson needs the network: every kernel of the tests refuses sockets beyond loopback, and these tests prove it.

``conftest.py`` at the root puts ``tests/offline`` on PYTHONPATH, so that the comparison of all lessons runs under the
guard, whether pytest is called by ``lora-edu test`` or by hand.
"""

import os
import socket
from pathlib import Path

import nbformat
import pytest

from lora_edu.course.notebooks.execute import execute
from lora_edu.course.notebooks.stored import LESSONS, NotebookError, clear_outputs, find_notebook, read


def run(source, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    return execute(notebook, tmp_path, "guarded")


@pytest.mark.parametrize(
    "source",
    [
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "import urllib.request; urllib.request.urlopen('http://example.invalid')",
        "import socket; socket.getaddrinfo('example.invalid', 443)",
    ],
    ids=["by address", "urllib", "name look-up"],
)
def test_the_guard_refuses_the_network(source, tmp_path):
    with pytest.raises(NotebookError, match="runs without the network"):
        run(source, tmp_path)


def test_the_guard_allows_loopback(tmp_path):
    source = (
        "import socket\nwith socket.create_server(('127.0.0.1', 0)) as s: socket.create_connection(s.getsockname())"
    )
    run(source, tmp_path)


def test_the_guard_is_on_in_the_tests_of_all_notebooks():
    assert str(Path(__file__).parents[1] / "offline") in os.environ["PYTHONPATH"].split(os.pathsep)
    with pytest.raises(ConnectionError, match="runs without the network"):  # and in this process, too
        socket.getaddrinfo("example.invalid", 443)


def test_a_lesson_runs_under_the_guard(tmp_path):
    path = find_notebook("00", LESSONS)
    execute(clear_outputs(read(path)), path.parent, path.stem)
