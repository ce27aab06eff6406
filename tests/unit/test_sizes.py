"""One notebook, two sizes."""

import pytest

from lora_edu.course.notebooks.stored import LESSONS, read
from lora_edu.lab.sizes import sized


@pytest.mark.parametrize(("run", "size"), [(None, 60), ("quick", 60), ("full", 300)])
def test_the_variable_decides(run, size, monkeypatch):
    monkeypatch.delenv("LORA_EDU_RUN", raising=False)
    if run:
        monkeypatch.setenv("LORA_EDU_RUN", run)
    assert sized(60, 300) == size


@pytest.mark.errors
def test_another_word_is_refused(monkeypatch):
    monkeypatch.setenv("LORA_EDU_RUN", "fast")
    with pytest.raises(ValueError, match="LORA_EDU_RUN='fast': expected 'quick'"):
        sized(1, 2)


@pytest.mark.parametrize("name", ["04_lora_in_a_model", "07_fine_tuning_a_real_model", "10_choosing_hyperparameters"])
def test_the_lessons_that_lesson_00_names_have_two_sizes(name):
    code = [cell.source for cell in read(LESSONS / f"{name}.ipynb").cells if cell.cell_type == "code"]
    assert any(" = sized(" in source or "=sized(" in source for source in code)
