"""``lora-edu lessons mine``: the copy that a person gets for rows of their own, and the whole way on sample rows."""

import ast
import json
import os
import subprocess
import sys

import pytest
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from lora_edu.core.peft_io import CONFIG_FILE, WEIGHTS_FILE
from lora_edu.course.cli import app
from lora_edu.course.notebooks import mine
from lora_edu.course.notebooks.stored import NotebookError, find_notebook, list_notebooks, normalise, read, write
from lora_edu.files import data_path
from lora_edu.lab.bases import BaseMissing, require_gguf

SAMPLE = data_path("samples", "jargon.jsonl")


def settings(notebook):
    """What the copy's cell of settings sets."""
    cell = next(cell for cell in read(notebook).cells if cell["id"] == mine.SETTINGS)
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}


def test_it_is_found_by_its_name_and_is_no_lesson():
    assert find_notebook("my_adapter").name == "my_adapter.ipynb"
    assert "my_adapter.ipynb" not in {path.name for path in list_notebooks()}


def test_a_copy_is_filled_in_and_never_overwritten(tmp_path):
    rows = tmp_path / 'my "rows" \\ of 2026.jsonl'
    rows.write_bytes(SAMPLE.read_bytes())
    first, second = mine.copy_for(rows, target=tmp_path), mine.copy_for(rows, small=True, target=tmp_path)
    assert [first.notebook.stem, second.notebook.stem] == [rows.stem, f"{rows.stem}_2"]
    (tmp_path / f"{rows.stem}_3").mkdir()
    assert mine.copy_for(rows, target=tmp_path).notebook.stem == f"{rows.stem}_4"
    assert (first.rows, sum(first.parts.values())) == (120, 120)
    found = settings(first.notebook)
    assert (found["FILE"], found["FOLDER"], found["SMALL"]) == (str(rows), rows.stem, False)
    assert settings(second.notebook) == {**found, "FOLDER": f"{rows.stem}_2", "SMALL": True}
    assert settings(mine.copy_for(rows, max_length=512, target=tmp_path).notebook)["MAX_LENGTH"] == 512
    assert not any(cell.get("outputs") for cell in read(first.notebook).cells)


@pytest.mark.errors
def test_a_file_with_errors_gets_no_copy(tmp_path):
    rows = tmp_path / "rows.jsonl"
    for text, words in {'{"messages": 3}': "line 1: expected an object", SAMPLE.read_text()[:1000]: "no JSON"}.items():
        rows.write_text(text)
        result = CliRunner().invoke(app, ["lessons", "mine", str(rows), "--to", str(tmp_path / "work")])
        assert result.exit_code == 1
        assert words in result.output
    rows.write_text("\n".join(SAMPLE.read_text().splitlines()[:6]))
    with pytest.raises(ValueError, match="6 rows with 6 different questions: too few"):
        mine.copy_for(rows, target=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.errors
def test_a_run_that_fails_keeps_what_was_printed(tmp_path):
    copy = mine.Copy(tmp_path / "rows.ipynb", tmp_path / "rows", 0, {})
    write(normalise(new_notebook(cells=[new_code_cell("print('so far')"), new_code_cell("1 / 0")])), copy.notebook)
    with pytest.raises(NotebookError, match=r"rows, cell 1.*ZeroDivisionError"):
        mine.run_copy(copy)
    assert read(copy.notebook).cells[0].outputs[0].text == "so far\n"


@pytest.mark.parametrize(
    ("served", "words"),
    [
        ("adapter", "serves the adapter"),
        ("base", "serves base, and not the adapter"),
        (None, "was not asked"),
    ],
)
def test_the_results_in_words(served, words):
    told = mine.told({"loss": {"base": 4.481, "adapter": 4.036}, "rows": {"test": 6}, "served": served})
    assert told.startswith("loss per token on 6 held-out rows: base 4.48, adapter 4.04; llama.cpp ")
    assert words in told


def test_sample_rows_become_an_adapter_that_llama_cpp_serves(tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install -e '.[serve]' -c constraints.txt")
    try:
        require_gguf("smollm2-135m")
    except BaseMissing as missing:
        pytest.skip(str(missing))
    command = [sys.executable, "-m", "lora_edu.course.cli", "lessons", "mine", str(SAMPLE), "--run", "--small"]
    done = subprocess.run(
        [*command, "--to", str(tmp_path)], cwd=tmp_path, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "jargon"
    assert {path.name for path in (folder / "adapter").iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, "README.md"}
    assert (folder / "adapter.gguf").read_bytes()[:4] == b"GGUF"
    assert "| loss per token (nats) | 6 held-out rows |" in (folder / "adapter" / "README.md").read_text(
        encoding="utf-8"
    )
    results = json.loads((folder / "results.json").read_text())
    assert (results["served"], results["wrong"]) == ("adapter", False)
    assert results["loss"]["adapter"] < results["loss"]["base"]
    assert "llama.cpp serves the adapter" in done.stdout
    assert all(cell.execution_count for cell in read(tmp_path / "jargon.ipynb").cells if cell.cell_type == "code")
