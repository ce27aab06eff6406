"""Run an exercise notebook and collect what its checks found."""

import json
import tempfile
from pathlib import Path
from typing import Any

from lora_edu.course.notebooks.execute import execute
from lora_edu.course.notebooks.stored import clear_outputs, read


def check_notebook(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Execute a notebook, going on after errors, and return its checks' reports and the errors of other cells.

    Returns:
        one dictionary a check, with the fields of ``checks.report.Report``; and one line for each cell that raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "reports.jsonl"
        notebook = execute(
            clear_outputs(read(path)),
            path.parent,
            path.stem,
            extra_environment={"LORA_EDU_REPORTS": str(records)},
            allow_errors=True,
        )
        lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
    troubles = [
        f"cell {index} raised {output.ename}: {output.evalue}".split("\n")[0]
        for index, cell in enumerate(notebook.cells)
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    return [json.loads(line) for line in lines], troubles
