"""What ``lora-edu full-run`` does besides the sweeps' own bases: scripts, a table that grows, and other bases."""

import json
import math
import signal
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lora_edu.counting import lora_parameters
from lora_edu.course.cli import app
from lora_edu.files import data_path
from lora_edu.lab.recording import full_runs, scripts, sweeps

pytestmark = pytest.mark.recording

BENCHMARK = scripts.ROOT / "benchmarks" / "memory_7b.py"


def module(path):
    """A script as a module of its own."""
    spec = spec_from_file_location(path.stem, path)
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


# Scripts


@pytest.mark.parametrize("name", scripts.SCRIPTS)
def test_every_script_is_here_and_takes_what_it_is_called_with(name):
    script = scripts.SCRIPTS[name]
    minutes = None if script.limit is None else 9
    path, *given = scripts.command(name, data_path("runs", "x.json"), minutes)
    done = subprocess.run([sys.executable, path, *given, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for option in [each for each in given if each.startswith("--")]:
        assert option in done.stdout


def test_options_are_translated_and_handed_on(tmp_path):
    out = tmp_path / "x.json"
    _, *given = scripts.command("scaling", out, 9, ("--gpus", "4"))
    assert given == ["--out", str(out), "--seconds", "540", "--gpus", "4"]
    _, *given = scripts.command("memory_7b", None, 1.5, ("--shapes", "13b", "70b"))
    assert given == ["--minutes", "1.5", "--shapes", "13b", "70b"]
    _, *given = scripts.command("tiny_pretraining", out)
    assert given == ["run", "d192-long-decay", "--record", str(out)]


@pytest.mark.errors
def test_a_script_that_is_not_here(monkeypatch, tmp_path):
    monkeypatch.setattr(scripts, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no script benchmarks/memory_7b.py .* needs the course's repository"):
        scripts.command("memory_7b")
    with pytest.raises(ValueError, match="unknown script 'tiny'; there are: tiny_pretraining, memory_7b"):
        scripts.command("tiny")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", scripts.SCRIPTS)
def test_without_a_gpu_a_script_says_so_and_ends_well(name, capfd, tmp_path):
    result = CliRunner().invoke(app, ["full-run", name, "--out", str(tmp_path / "x.json")])
    assert result.exit_code == 0
    said = capfd.readouterr().out
    assert said.startswith(f"{name} needs ")
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# The table of lesson 06


@pytest.fixture
def memory_7b(monkeypatch):
    """Calls memory_7b.py on toys, with the two methods that say most."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = module(BENCHMARK)
    names = ("full, all bf16", "lora q,v r=8", "qlora r=16 (bitsandbytes)")
    monkeypatch.setattr(script, "METHODS", {name: script.METHODS[name] for name in names})
    monkeypatch.setattr(script, "find_spec", lambda name: None)  # no bitsandbytes, unless a test wants it

    def call(out, *options):
        monkeypatch.setattr(
            sys, "argv", ["memory_7b.py", "--toy", "--steps", "1", "--warmup", "0", *options, "--out", str(out)]
        )
        script.main()
        return json.loads(out.read_text(encoding="utf-8"))

    return SimpleNamespace(call=call, script=script)


def keys(memory_7b, lines):
    return list(map(memory_7b.script.key, lines))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows knows no SIGKILL")
def test_killed_in_the_middle_and_resumed(tmp_path):
    script, out = module(BENCHMARK), tmp_path / "toy.json"
    command = [sys.executable, str(BENCHMARK), "--toy", "--steps", "1", "--warmup", "0", "--out", str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, **quiet)
    until = time.monotonic() + 240
    while not (out.exists() and json.loads(out.read_text(encoding="utf-8"))["runs"]):  # valid whenever we look
        assert child.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = json.loads(out.read_text(encoding="utf-8"))
    wanted = [line for line in script.wanted(["7b"], script.TOY_BATCHES) if "shape" not in line]
    assert 1 <= len(before["runs"]) < len(wanted) == 28
    subprocess.run(command, check=True, timeout=170, **quiet)
    after = json.loads(out.read_text(encoding="utf-8"))
    assert after["runs"][: len(before["runs"])] == before["runs"]
    assert list(map(script.key, after["runs"])) == list(map(script.key, wanted))
    assert all(line["continued"] == 0 for line in after["runs"][len(before["runs"]) :])
    (session,) = after["continued"]
    assert session["hardware"] == after["hardware"]
    assert len(session["ceiling_tflops"]) == 2
    bytes_ = out.read_bytes()
    subprocess.run(command, check=True, timeout=170, **quiet)  # nothing is left to do
    assert out.read_bytes() == bytes_
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.json"]


def test_the_time_limit_stops_it_and_the_same_command_goes_on(memory_7b, tmp_path, capsys):
    out = tmp_path / "toy.json"
    for lines in (1, 2):  # one line is measured, however little time there is
        assert len(memory_7b.call(out, "--minutes", "0")["runs"]) == lines
        assert capsys.readouterr().out.endswith("stopped at the time limit; the same command goes on\n")
    assert len(memory_7b.call(out)["runs"]) == 8
    said = capsys.readouterr().out
    assert "its lines are left out" in said
    assert said.endswith("complete\n")


def test_larger_shapes_stand_apart_from_what_lessons_read(memory_7b, tmp_path):
    out = tmp_path / "toy.json"
    record = memory_7b.call(out, "--shapes", "70b", "13b")
    assert record["runs"] == []
    first = record["further_runs"]
    assert [line["shape"] for line in first] == ["13b"] * 8 + ["70b"] * 8
    assert record["shapes"]["13b"]["num_hidden_layers"] == 3
    assert record["shapes"]["13b"]["parameters"] > record["parameters"]
    assert all(line["predicted_bytes"] > 0 and line["left_over_bytes"] == 0 for line in first)
    record = memory_7b.call(out)
    assert record["further_runs"] == first
    assert len(record["runs"]) == 8
    assert not any("shape" in line for line in record["runs"])
    full, lora = record["runs"][0], record["runs"][4]
    assert full["trainable"] == record["parameters"]
    assert lora["trainable"] == 8 * 2 * 2 * (64 + 64)


def test_a_line_that_cannot_fit_is_a_result(memory_7b, tmp_path, monkeypatch):
    """By the prediction it is not tried; what fails all the same is recorded, and the next one is measured."""
    script, out, measure = memory_7b.script, tmp_path / "toy.json", memory_7b.script.measure
    sizes = [script.predicted(script.meta_model(script.LlamaConfig(**script.TOY)), line)
             for line in script.wanted(["7b"], script.TOY_BATCHES)]  # fmt: skip
    assert min(sizes[:4]) > max(sizes[4:8])  # full fine-tuning against LoRA
    monkeypatch.setattr(script, "capacity", lambda: max(sizes[4:8]))

    def too_large(model, method, batch, *others):
        if batch == 2:
            script.prepare(model, method)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(model, method, batch, *others)

    monkeypatch.setattr(script, "measure", too_large)
    lines = memory_7b.call(out)["runs"]
    assert all(line["out_of_memory"] and line["tried"] is False for line in lines[:4])
    assert [line["predicted_bytes"] for line in lines] == sizes[:8]
    assert [line.get("out_of_memory", False) for line in lines[4:]] == [False, False, True, True]
    assert all(line["left_over_bytes"] == 0 and "tried" not in line for line in lines[4:])
    assert memory_7b.call(out)["runs"] == lines  # a result: it is not tried again


def test_a_model_that_cannot_be_built_is_a_result(memory_7b, tmp_path, monkeypatch):
    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory_7b.script, "new_model", full)
    lines = memory_7b.call(tmp_path / "toy.json")["runs"]
    assert len(lines) == 8
    assert all(line["out_of_memory"] for line in lines)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hardware": "another GPU"}, "was recorded with hardware 'another GPU', now "),
        ({"versions": {"torch": "2.0"}}, "was recorded with torch '2.0', now "),
        ({"steps": 7}, "was recorded with steps 7, now 1"),
        ({"runs": None}, "is no record that can be continued"),
        ({"further_runs": [3]}, "is no record that can be continued"),
        ({"continued": None}, "is no record that can be continued"),
        ({"config": {}}, "was recorded with config {}"),
    ],
)
@pytest.mark.errors
def test_lines_of_another_machine_are_left_alone(memory_7b, tmp_path, capsys, monkeypatch, change, says):
    out = tmp_path / "toy.json"
    record = memory_7b.call(out, "--minutes", "0")
    out.write_text(json.dumps(record | change))
    before = out.read_bytes()
    with pytest.raises(SystemExit):
        memory_7b.call(out)
    assert says in capsys.readouterr().err
    monkeypatch.setattr(memory_7b.script, "OUT", out)  # as make bench meets the shipped record
    memory_7b.call(out)
    assert says in capsys.readouterr().out
    assert out.read_bytes() == before


def test_the_shipped_record_can_be_continued(memory_7b):
    """Where it was made: the same keys, so that only what is new is measured."""
    script, path = memory_7b.script, data_path("runs", "memory_7b.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    config = script.load_config(script.SHAPES["7b"])
    new = {name: record[name] for name in ("hardware", "seed", "steps", "warmup", "versions")}
    new["config"] = {name: getattr(config, name) for name in script.CONFIG}
    assert script.resumed(path, new, new.keys() - {"versions"}, script.key) == record
    full = module(BENCHMARK)
    done = {full.key(line) for line in [*record["runs"], *record["further_runs"]]}
    assert done == {full.key(line) for line in full.wanted(list(full.SHAPES), full.BATCHES)}  # nothing is left


def test_qlora_with_bitsandbytes(memory_7b, tmp_path, monkeypatch):
    """Packed weights, PEFT's adapters."""
    pytest.importorskip("bitsandbytes")
    script = memory_7b.script
    monkeypatch.setattr(script, "find_spec", lambda name: True)
    record = memory_7b.call(tmp_path / "toy.json")
    assert len(record["runs"]) == 8
    assert [line["shape"] for line in record["further_runs"]] == ["7b"] * 4
    for line in record["further_runs"]:
        assert line["trainable"] == 2 * 16 * (4 * (64 + 64) + 3 * (64 + 128))
        assert math.isfinite(line["loss"])
        assert "PEFT" in line["adapters"]
        assert line["left_over_bytes"] == 0
    model = script.new_quantised_model(script.LlamaConfig(**script.TOY))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    reference = script.new_model(script.LlamaConfig(**script.TOY))
    assert torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in reference.named_parameters()}


# The base's pretraining


@pytest.fixture
def pretraining(monkeypatch, tmp_path):
    """pretrain_tiny.py with a text of a few words, prepared already, and a folder of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = module(scripts.ROOT / "data" / "pretrain_tiny.py")
    monkeypatch.setattr(script, "WORK", tmp_path / "work")
    monkeypatch.setattr(script, "BLOCKS", 2)
    (tmp_path / "work").mkdir()
    generator = np.random.default_rng(0)
    words = generator.integers(3, 4096, (8, 200))
    words[:, 0] = 1
    held_out = generator.integers(3, 4096, (3, 128)).astype(np.uint16)
    arrays = {f"source {name}": words.flatten().astype(np.uint16) for name in script.ALL}
    np.savez(tmp_path / "work" / "tokens.npz", held_out=held_out, given=np.array([5, 5, 5]), **arrays)
    (tmp_path / "work" / "facts.json").write_text('{"wordnet": {"documents": 8}}')
    return script


def test_pretraining_writes_beside_the_shipped_base(pretraining, tmp_path):
    shipped = [*data_path("tiny").iterdir(), data_path("runs", "tiny_pretraining.json")]
    before = [path.read_bytes() for path in shipped]
    models, record = tmp_path / "models", tmp_path / "runs" / "record.json"
    models.mkdir()
    pretraining.run("d192-long-decay", models, 2, record)
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["chosen"] == "d192-long-decay"
    setting = found["settings"]["d192-long-decay"]
    assert [line["step"] for line in setting["log"]] == [2]
    assert setting["parameters"] == 1_893_696
    real = json.loads(shipped[-1].read_text(encoding="utf-8"))
    assert found.keys() == real.keys()
    assert setting.keys() == real["settings"]["d192-long-decay"].keys()
    assert [path.name for path in models.iterdir()] == ["d192-long-decay.safetensors"]
    assert [path.read_bytes() for path in shipped] == before
    with pytest.raises(SystemExit, match="belongs to the weights in data/tiny"):
        pretraining.run("d192-long-decay", models, 2, shipped[-1])
    assert [path.read_bytes() for path in shipped] == before


# Sweeps of other bases


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_another_base_does_the_same_runs(name):
    own, other = sweeps.jobs(name), sweeps.jobs(name, "qwen3-4b")
    assert {job["base"] for job in other} == {"qwen3-4b"}
    assert len({json.dumps(job, sort_keys=True) for job in other}) == len(other)
    for mine, theirs in zip(own, other, strict=True):
        differ = {key for key in theirs if mine.get(key) != theirs[key]}
        assert differ <= ({"base", "r", "lora_alpha"} if mine["part"] == "targets" else {"base"})


def test_other_bases_get_ranks_of_one_budget():
    ranks = sweeps.same_budget(sweeps._without_weights("qwen3-4b"))
    budget = lora_parameters("qwen3-4b", 8, "all-linear")
    assert ranks["all-linear"] == 8
    for name, r in ranks.items():
        assert lora_parameters("qwen3-4b", r, sweeps.TARGETS[name]) == pytest.approx(budget, rel=0.05)
    assert sweeps.same_budget(sweeps._without_weights("tiny")) == sweeps.SAME_BUDGET["tiny"]
    found = [job for job in sweeps.jobs("tiny_choices", "qwen3-4b") if job["part"] == "targets"]
    assert {job["r"] for job in found} == set(ranks.values())
    assert all(job["lora_alpha"] == 2 * job["r"] for job in found)


def test_a_sweep_of_another_base_is_done_into_a_file_of_its_own(monkeypatch, tmp_path):
    """A copy of tiny in a folder, given by its path."""
    folder, runs = tmp_path / "My Base", tmp_path / "data" / "runs"
    folder.mkdir()
    runs.mkdir(parents=True)
    for path in data_path("tiny").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    few = [("few", {"steps": 1, "rows": 8, "r": 2, "seed": seed}) for seed in range(2)]
    monkeypatch.setitem(sweeps.SWEEPS, "few", lambda: few)
    monkeypatch.setattr(full_runs, "data_path", lambda *parts: tmp_path.joinpath("data", *parts))
    monkeypatch.setattr(full_runs, "work", lambda todo, *given: todo())
    first, second = full_runs.full_run("few", base=str(folder))
    assert first["base"] == second["base"] == str(folder)
    path = runs / "few-my-base.json"
    path.write_text(json.dumps(full_runs._record("few", path, str(folder)) | {"runs": [{"job": first}]}))
    assert full_runs.full_run("few", base=str(folder)) == [second]  # gone on with
    monkeypatch.undo()
    assert full_runs._file_name("few", None) == "few"
    assert full_runs._file_name("few", str(folder)) == "few-my-base"
    assert full_runs._file_name("few", "HuggingFaceTB/SmolLM2-1.7B") == "few-huggingfacetb-smollm2-1.7b"
    job = {"base": str(folder), "steps": 1, "rows": 8, "r": 2, "seed": 0}
    assert full_runs.run(job)["test"] == pytest.approx(full_runs.run(job | {"base": "tiny"})["test"], abs=1e-3)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("name", "base", "says"),
    [
        ("tiny_choices", "gpt2", "a GPT2LMHeadModel without q_proj, .*linear layers are c_attn, .*smollm2_finetuning"),
        ("smollm2_finetuning", "bert-base-cased", "a BertForMaskedLM: smollm2_finetuning trains language models"),
        ("tiny_choices", "nonsense", "no model config named 'nonsense'"),
    ],
)
def test_a_base_that_does_not_fit(name, base, says):
    with pytest.raises(ValueError, match=says):
        sweeps.jobs(name, base)


def test_every_sweep_is_described():
    assert sweeps.WHAT.keys() == sweeps.SWEEPS.keys()
