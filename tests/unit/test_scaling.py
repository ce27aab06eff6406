"""benchmarks/scaling.py runs on any machine, and what was recorded with it is what its raw numbers say."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from lora_edu.files import data_path

pytestmark = pytest.mark.recording

SCRIPT = data_path().parent / "benchmarks" / "scaling.py"
RECORD = data_path("runs", "scaling.json")


@cache
def script():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = [*sys.path]
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def check(record):
    """A record holds together."""
    assert {"command", "date", "commit", "hardware", "seed", "shapes"} <= record.keys()
    assert {"python", "torch", "transformers", "accelerate"} <= record["versions"].keys()
    alone = {(line["shape"], line["rows_per_gpu"]): line for line in record["runs"] if line["way"] == "alone"}
    for line in record["runs"]:
        if line.get("out_of_memory"):
            continue
        every, gpus, moved = line["gpus_measured"], line["gpus"], line["collectives"]
        assert ("link_bytes_per_second" in line) == (gpus > 1)
        assert len(every) == gpus
        assert {len(each["steps_ms"]) for each in every} == {record["steps"]}
        slowest = [max(times) for times in zip(*(each["steps_ms"] for each in every), strict=True)]
        assert line["step_ms"] == pytest.approx(median(slowest), abs=1e-3)
        tokens = gpus * line["rows_per_gpu"] * line["tokens_per_row"]
        assert line["tokens_per_second"] == pytest.approx(1e3 * tokens / line["step_ms"], rel=1e-3)
        one = alone[line["shape"], line["rows_per_gpu"]]["tokens_per_second"]
        assert line["efficiency"] == pytest.approx(line["tokens_per_second"] / gpus / one, abs=1e-3)
        # What was worked out from the sizes is what the collectives were called with.
        factors = {"allreduce": 2, "allgather_base": 1, "reduce_scatter_base": 1}
        counted = sum(factor * (gpus - 1) / gpus * moved.get(name, 0) for name, factor in factors.items())
        assert sum(line["sent_bytes"].values()) == pytest.approx(counted, rel=1e-2)


def test_it_runs_small(tmp_path):
    out = tmp_path / "scaling.json"
    command = [sys.executable, SCRIPT, "--toy", "--steps", "2", "--warmup", "1", "--out", out]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    check(record)
    ways = (("alone", 1), ("ddp", 2), ("fsdp", 2))
    expected = [(way, gpus, rows) for way, gpus in ways for rows in (1, 2)]
    assert [(line["way"], line["gpus"], line["rows_per_gpu"]) for line in record["runs"]] == expected
    losses = [[each["loss"] for each in line["gpus_measured"]] for line in record["runs"]]
    assert losses[2][0] == pytest.approx(losses[0][0], abs=2e-2)  # the first process has the rows of the one alone
    assert losses[2] == pytest.approx(losses[4], abs=2e-2)
    assert losses[2][0] != losses[2][1]
    whole = 2 * record["runs"][4]["parameters"]  # bytes, in bfloat16
    assert record["runs"][4]["sent_bytes"]["all-gather of the weights, forward"] == whole / 2
    assert "fsdp  on 2   2×16" in done.stdout


def test_without_enough_gpus_it_says_so_and_passes(monkeypatch, capsys, tmp_path):
    out = tmp_path / "none.json"
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--gpus", "2", "4", "--out", str(out)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    script().main()
    assert capsys.readouterr().out.startswith("scaling needs 4 GPUs and found 2: nothing was measured")
    assert not out.exists()


@pytest.mark.errors
def test_launches_that_failed_are_made_again_and_the_others_kept(monkeypatch, capsys, tmp_path):
    out, broken = tmp_path / "toy.json", {"ddp"}
    called = []

    def launched(way, gpus, shape, arguments):
        called.append(way)
        if way in broken:
            raise RuntimeError(f"{way} on {gpus}, {shape}, failed")
        line = {"shape": shape, "way": way, "gpus": gpus, "rows_per_gpu": 1, "tokens_per_row": 16, "sent_bytes": {}}
        return [line | {"step_ms": 10.0, "tokens_per_second": 1600.0 * gpus}]

    monkeypatch.setattr(script(), "launched", launched)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--toy", "--out", str(out)])
    with pytest.raises(SystemExit, match="failed: toy, ddp on 2"):
        script().main()
    before = json.loads(out.read_text())
    broken.clear()
    script().main()
    record = json.loads(out.read_text())
    assert called == ["alone", "ddp", "fsdp", "ddp"]
    assert record["runs"][:2] == before["runs"]
    assert [(line["way"], line["efficiency"]) for line in record["runs"]] == [("alone", 1), ("fsdp", 1), ("ddp", 1)]
    (session,) = record["continued"]
    assert session["command"].startswith("python benchmarks/scaling.py --toy")
    assert [line.get("continued") for line in record["runs"]] == [None, None, 0]
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--toy", "--steps", "7", "--out", str(out)])
    with pytest.raises(SystemExit):
        script().main()
    assert "was recorded with steps 20, now 7" in capsys.readouterr().err
    monkeypatch.setattr(script(), "OUT", out)  # as make bench meets the shipped record
    script().main()
    assert "nothing was measured: " in capsys.readouterr().out
    assert json.loads(out.read_text()) == record


@pytest.mark.errors
def test_a_launch_that_fails_is_told(monkeypatch):
    arguments = SimpleNamespace(steps=1, warmup=0, toy=False, timeout=60)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="alone on 1, 7B, failed"):
        script().launched("alone", 1, "7B", arguments)


def test_the_record_holds_together():
    record = json.loads(RECORD.read_text())
    check(record)
    assert hashlib.sha256(RECORD.read_bytes()).hexdigest() in data_path("README.md").read_text(encoding="utf-8")
    assert record["steps"] >= 20
    assert {line["way"] for line in record["runs"]} == {"alone", "ddp", "fsdp"}
    assert {line["gpus"] for line in record["runs"]} >= {1, 2}
