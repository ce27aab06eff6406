"""A learner's copy runs from top to bottom before anything is written into it: lessons go on with the library's."""

import pytest

from lora_edu.course.notebooks.execute import execute
from lora_edu.course.notebooks.stored import LESSONS, find_notebook, read
from lora_edu.course.notebooks.your_turn import TAG, learners_copy


@pytest.mark.parametrize("number", ["01", "03"])
def test_a_learners_copy_runs_with_its_stubs(number):
    path = find_notebook(number, LESSONS)
    turns = sum(TAG in cell.metadata.get("tags", []) for cell in read(path).cells)
    copy = execute(learners_copy(read(path)), path.parent, path.stem)
    said = "".join(output.get("text", "") for cell in copy.cells for output in cell.get("outputs", []))
    assert said.count("not done yet") == said.count("Until yours passes, the lesson goes on with") == turns > 0
