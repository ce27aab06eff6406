"""An exercise notebook runs from top to bottom before anything was written, and every check says "not done yet"."""

import pytest

from lora_edu.course.grading.check import check_notebook
from lora_edu.course.notebooks.stored import EXERCISES, list_notebooks, read


@pytest.mark.parametrize("path", list_notebooks(EXERCISES), ids=lambda path: path.stem)
def test_untouched_exercise(path):
    reports, troubles = check_notebook(path)
    assert troubles == []
    assert [report["title"] for report in reports if report["status"] != "not done"] == []
    checks = [cell for cell in read(path).cells if "check" in cell.metadata.get("tags", [])]
    assert len(reports) >= len(checks) > 0
