"""Inside a kernel: the limits on its process, and the magic that calls a check when the grader asks for it.

The checks are those that were imported before the notebook's first cell ran. They run in the same process as the
notebook, so that a notebook which is written to do so can make Python lie to them.
"""

import ast
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_edu.course.grading.setup_lines import SetUpLines
from lora_edu.course.grading.submissions import called_check

MIMETYPE = "application/vnd.lora-edu.report"
MAGIC = "lora_edu_check"


def prepare(folder: str, limits: dict[str, Any]) -> None:
    """Go to the notebook's folder, keep hold of the checks, and set the kernel's own limits.

    Args:
        folder: the working directory.
        limits: the fields of ``watch.Limits``.
    """
    from IPython import get_ipython

    from lora_edu.course.checks import CHECKS
    from lora_edu.course.checks.report import drawn_from

    os.chdir(folder)
    if "" not in sys.path:  # modules beside the notebook
        sys.path.append("")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (nobody reads it, and nobody can be flooded by it)
    shell = get_ipython()
    checks, publish, names = dict(CHECKS), shell.display_pub.publish, shell.user_ns

    def check(_: str, cell: str) -> None:
        """Call one check, and publish its report under the number that the grader gave for it."""
        wanted = json.loads(cell)
        report, arguments = {"nonce": wanted["nonce"]}, []
        os.environ.pop("LORA_EDU_CHECK_SEED", None)  # nobody chooses the draws
        for text in wanted["arguments"]:
            try:
                arguments.append(eval(compile(text, "<argument>", "eval"), names))
            except Exception:
                publish({MIMETYPE: json.dumps(report | {"missing": text})})
                return
        with drawn_from(wanted["seed"]):
            publish({MIMETYPE: json.dumps(report | asdict(checks[wanted["name"]](*arguments)))})

    shell.register_magic_function(check, "cell", MAGIC)
    shell.ast_transformers += [SetUpLines(shell.find_line_magic), _WithoutChecks(set(checks))]
    _set_limits(limits)


class _WithoutChecks(ast.NodeTransformer):
    """Puts a report that says "not done" in place of the notebook's own calls of checks: the grader makes them."""

    def __init__(self, names: set[str]):
        self.names = names

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = called_check(node)
        if name not in self.names or not isinstance(node.func, ast.Attribute):
            return node
        report = ast.Attribute(node.func.value, "Report", ast.Load())
        call = ast.Call(report, [ast.Constant(name), ast.Constant("not done")], [])
        return ast.fix_missing_locations(ast.copy_location(call, node))


def _set_limits(limits: dict[str, Any]) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    wanted = {"CORE": 0, "CPU": int(2 * limits["seconds"]) + 10, "FSIZE": limits["file_bytes"]}
    if sys.platform == "linux":  # elsewhere address space is reserved without end, or not counted
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        wanted["AS"] = pages * resource.getpagesize() + limits["memory"]
    for name, value in wanted.items():
        with suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
