"""Recorded sweeps: complete, made of the jobs that are listed, and resumed after a kill without losing or doubling."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from statistics import mean, stdev
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lora_edu import files
from lora_edu.counting import lora_parameters
from lora_edu.files import data_path
from lora_edu.lab.bases import list_bases, load_base
from lora_edu.lab.recording import experiments, full_runs, pool, records, sweeps
from lora_edu.lab.recording.records import by, described, pick, read_record, spread, surroundings
from lora_edu.lab.training import evaluate

pytestmark = pytest.mark.recording

ADAPTER = "smollm2-devils-dictionary"


def key(job):
    return json.dumps(job, sort_keys=True)


def raw(name):
    """A record as it stands in its file, where a job names only what differs from the defaults."""
    return json.loads(data_path("runs", f"{name}.json").read_text(encoding="utf-8"))


# What was recorded


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_every_listed_job_is_recorded_once(name):
    listed = [key(job) for job in sweeps.jobs(name)]
    assert len(set(listed)) == len(listed)
    assert sorted(key(line["job"]) for line in raw(name)["runs"]) == sorted(listed)


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_records_hold_together(name):
    record = read_record(name)
    assert experiments.DEFAULTS | record["defaults"] == experiments.DEFAULTS  # older records lack later settings
    # The older ones name the place where the module was at the commit that made them.
    assert re.fullmatch(rf"python -m lora_edu\.lab\.(recording\.)?full_runs {name}", record["command"])
    for machine in record["machines"]:
        assert {"hardware", "precision", "date", "versions"} == machine.keys() - {"world_size", "commit"}  # added later
        assert {"python", "torch", "transformers", "accelerate"} == machine["versions"].keys()
    for line in record["runs"]:
        job = experiments.DEFAULTS | line["job"]
        assert line["machine"] in range(len(record["machines"]))
        if job["part"] == "inside":
            continue
        losses = line.get("train_loss", [])
        assert len(losses) == (job["steps"] if job["every_step"] else 0)
        assert all(math.isfinite(loss) for loss in [*losses, line["validation"], line["test"]])
        assert ("test accuracy" in line) == (job["task"] == "wordnet_topics")
        assert 0 <= line.get("test accuracy", 0.5) <= 1
        assert ("curves" in line) == (job["eval_every"] is not None)
        if "curves" in line:
            assert line["eval_steps"] == list(range(0, job["steps"] + 1, job["eval_every"]))
            assert list(line["curves"]) == ["validation", *(["plain", "punctuated"] if job["forgetting"] else [])]
            assert {len(curve) for curve in line["curves"].values()} == {len(line["eval_steps"])}
            assert line["curves"]["validation"][-1] == pytest.approx(line["validation"], abs=2e-4)


@pytest.mark.parametrize("name", ["tiny_choices", "smollm2_choices"])
def test_what_is_inside_holds_together(name):
    (line,) = pick(read_record(name), part="inside")
    assert list(line["spectra"]) == ["r=8, seed 0", "r=8, seed 1", "r=64, seed 0", "r=64, seed 1", "full"]
    for run, numbers in line["spectra"].items():
        if run != "full":
            assert 1 <= numbers["effective rank"] <= int(run.split(",")[0][2:])
        assert 0 <= numbers["intruders"] <= 10 * numbers["matrices"]
        assert numbers["relative size"] > 0
        assert numbers["amplification"] > 0
    for table in line["overlap"].values():
        assert [len(row) for row in table] == [8] * 8
        assert all(0 <= phi <= 1 for row in table for phi in row)


def test_an_adapter_in_bfloat16_loses_only_at_a_rate_that_is_too_low():
    """Five seeds each: what is lost at 5e-5 is plain, at the best rate nothing can be told apart."""
    record = read_record("smollm2_precision")

    def tests(kind, rate):
        return [line["test"] for line in pick(record, kind=kind, learning_rate=rate)]

    for rate, low, high in ((5e-5, 0.07, 0.09), (7e-4, -0.002, 0.002)):
        lost = [a - b for a, b in zip(tests("bfloat16 adapter", rate), tests("float32 adapter", rate), strict=True)]
        assert low < mean(lost) < high
        assert stdev(lost) < 0.004
    for kind in ("all float32", "float32 adapter", "bfloat16 adapter"):
        assert min((5e-5, 2e-4, 7e-4, 2e-3), key=lambda rate: mean(tests(kind, rate))) == 7e-4


def test_runs_from_one_seed_start_alike():
    """LoRA starts as the base: the loss of the first batch depends on the seed only, not on rank, rate or target."""
    for name, part in product(("tiny_choices", "smollm2_choices"), ("rank", "targets")):
        first = {(line["job"]["seed"], line["train_loss"][0]) for line in pick(read_record(name), part=part)}
        seeds = {seed for seed, _ in first}
        assert seeds == set(range(3 if name == "tiny_choices" else 5))
        for seed in seeds:
            losses = [loss for other, loss in first if other == seed]
            assert max(losses) - min(losses) < 1e-3


def test_the_shipped_adapter_is_the_one_of_its_log():
    log = json.loads(data_path("runs", "smollm2_devils_dictionary.json").read_text(encoding="utf-8"))
    weights = data_path("adapters", ADAPTER, "adapter_model.safetensors")
    config = json.loads(data_path("adapters", ADAPTER, "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(weights)
    assert log["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == log["trainable"]
    assert log["trainable"] == lora_parameters("smollm2-135m", 8, "all-linear")
    assert all(config[name] == log["settings"][name] for name in ("r", "lora_alpha", "target_modules"))
    assert config["base_model_name_or_path"] == "smollm2-135m"
    steps, losses = log["eval_steps"], log["validation"]
    assert steps == list(range(0, log["settings"]["steps"] + 1, 20))
    assert log["lowest_validation_at_step"] == steps[losses.index(min(losses))]
    assert losses[0] == log["base"]["validation"]
    kept = min(losses) if log["settings"].get("patience") else losses[-1]  # the script had no patience at first
    assert log["adapted"]["validation"] == pytest.approx(kept, abs=5e-3)  # stored in bfloat16
    script = data_path("train_smollm2.py").read_text(encoding="utf-8")
    assert f"at step {log['lowest_validation_at_step']} ({min(losses):.2f})" in script
    assert f"risen to {losses[-1]:.2f} by step {steps[-1]}" in script


def test_the_three_rules_agree_at_rank_8():
    for rule in sweeps.RULES.values():
        chosen = rule(8)
        assert chosen["lora_alpha"] / (8**0.5 if chosen.get("use_rslora") else 8) == pytest.approx(2)


@pytest.mark.parametrize(("base", "off"), [("tiny", 0.01), ("smollm2-135m", 0.07)])
def test_sets_of_targets_have_about_the_same_budget(base, off):
    source = data_path("tiny") if base == "tiny" else base
    whole = lora_parameters(source, 8, "all-linear")
    for name, r in sweeps.SAME_BUDGET[base].items():
        assert lora_parameters(source, r, sweeps.TARGETS[name]) == pytest.approx(whole, rel=off)


# Reading


@pytest.fixture
def record():
    runs = [
        {
            "job": {"part": "rank", "r": r, "seed": seed, "targets": ["q", "v"]},
            "test": r + 0.1 * seed,
            "test accuracy": 0.5,
        }
        for r, seed in product((1, 4), range(3))
    ]
    runs.append({"job": {"part": "batch", "batch_size": 4, "rows": None, "seed": 0, "targets": "all"}, "test": 9.0})
    runs.append({"job": {"part": "inside", "seed": 0}, "spectra": {}})
    return {"machines": [], "runs": runs}


def test_pick(record):
    assert len(pick(record)) == 8
    assert [line["test"] for line in pick(record, part="rank", r=4)] == [4.0, 4.1, 4.2]
    assert len(pick(record, rows=None)) == 1  # None is a value: the jobs without rows are not meant
    assert len(pick(record, targets=["q", "v"])) == len(pick(record, targets=("q", "v"))) == 6


def test_by_averages_over_what_is_not_named(record):
    found = by(record, "r", part="rank")
    assert list(found) == [1, 4]
    assert found[4].mean == pytest.approx(mean([4.0, 4.1, 4.2]))
    assert found[4].sd == pytest.approx(stdev([4.0, 4.1, 4.2]))
    assert found[4].n == 3
    both = by(record, "r", "seed", part="rank", metric="test accuracy")
    assert both[4, 2] == (0.5, 0.0, 1)
    assert list(by(record, "targets", part="rank")) == ["q, v"]


def test_spread():
    assert spread([2.0]) == (2.0, 0.0, 1)
    assert spread(iter([1.0, 3.0])) == (2.0, pytest.approx(math.sqrt(2)), 2)


def test_jobs_come_back_complete_and_files_stay_as_they_are():
    (line,) = pick(read_record("tiny_choices"), part="rate", method="full", learning_rate=1e-4, seed=2)
    assert line["job"]["batch_size"] == 8
    assert line["job"]["base"] == "tiny"
    assert "batch_size" not in raw("tiny_choices")["runs"][0]["job"]


def test_described_says_where_and_when():
    assert "NVIDIA H100 80GB HBM3, x86_64, float32, matrix products in TF32, torch 2." in described(raw("tiny_choices"))


def test_surroundings_name_the_commit_and_the_processes(monkeypatch):
    monkeypatch.delenv("LORA_EDU_COMMIT", raising=False)
    found = surroundings("float32", world_size=2)
    assert found["world_size"] == 2
    assert re.fullmatch("[0-9a-f]{40}|unknown", found["commit"])
    monkeypatch.setenv("LORA_EDU_COMMIT", "abc")
    assert surroundings("float32")["commit"] == "abc"
    assert described({"machines": [found]}).startswith(f"2 × {found['hardware']}, float32, ")
    assert described({"machines": [found | {"world_size": 1}]}).startswith(found["hardware"])


def test_without_a_repository_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_EDU_COMMIT", raising=False)
    installed = tmp_path / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(records, "ROOT", installed)
    assert records.commit() == "unknown"
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # that of another project, around this package
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "other"],
                   cwd=tmp_path, check=True)  # fmt: skip
    assert records.commit() == "unknown"


@pytest.mark.errors
@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda r: pick(r, part="rnk"), "{'part': 'rnk'}: part is one of 'batch', 'inside', 'rank'"),
        (lambda r: pick(r, rank=1), "no job has 'rank'"),
        (lambda r: pick(r, part="rank", r=2), "r is one of 1, 4"),
        (lambda r: pick({"runs": []}), "the record is empty"),
        (lambda r: by(r, "rank", part="rank"), "no job here has 'rank'; they have part, r, seed, targets"),
        (lambda r: by(r, "seed"), "a run of part 'inside' has no 'test', it has spectra: name a part"),
        (lambda r: by(r, "r", part="rank", metric="loss"), "has no 'loss', it has test, test accuracy"),
        (lambda r: spread([]), "no values"),
        (lambda r: read_record("tiny_jargon"), "tiny_jargon.json is no record of a sweep, it has command, date"),
    ],
)
def test_what_was_not_recorded_is_said(record, ask, says):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        ask(record)
    assert says in str(error.value)


@pytest.mark.errors
def test_an_unknown_record_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"no record 'tiny'.*smollm2_finetuning.*tiny_adapters, tiny_choices"):
        read_record("tiny")


# One run


@pytest.fixture
def small(monkeypatch):
    """Sixteen rows of each split, so that a run takes a moment."""
    whole = experiments._loaded

    def few(*names):
        base, splits = whole(*names)
        return base, {name: rows[:16] for name, rows in splits.items()}

    monkeypatch.setattr(experiments, "_loaded", few)


def test_a_run_records_what_it_was_asked_for(small):
    job = {"steps": 3, "rows": 16, "eval_every": 2, "forgetting": True, "r": 2, "learning_rate": 1e-3}
    result = experiments.run(job)
    assert list(result) == ["train_loss", "eval_steps", "curves", "validation", "test"]
    assert result["eval_steps"] == [0, 2, 3]
    assert list(result["curves"]) == ["validation", "plain", "punctuated"]
    assert result["curves"]["validation"][-1] == result["validation"] < result["curves"]["validation"][0]
    torch.rand(5)  # what the caller drew before does not matter
    assert experiments.run(job) == result
    assert experiments.run(job | {"seed": 1})["train_loss"] != result["train_loss"]


def test_the_punctuated_definitions_differ_by_a_capital_letter_and_one_full_stop(small):
    plain, done = {"word": "cat", "definition": "an animal"}, {"word": "ox", "definition": "Another."}
    assert experiments.punctuated(plain) == {"word": "cat", "definition": "An animal."}
    assert experiments.punctuated(done) == done
    _, tokenizer = load_base("tiny")
    _, splits = experiments._loaded("tiny", "devils_dictionary")
    capitals = 0
    for one, other in zip(splits["plain"], splits["punctuated"], strict=True):
        text, with_marks = (tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in (one, other))
        assert not text.endswith(".")
        assert with_marks.lower() == f"{text}.".lower()
        capitals += with_marks != f"{text}."
    assert capitals > 0.8 * len(splits["plain"])  # the others begin with a bracket


@pytest.mark.skipif(
    os.environ.get("CI") != "true" and not next(b for b in list_bases() if b.name == "smollm2-135m").present,
    reason="the base smollm2-135m is not here: lora-edu bases fetch",
)
def test_the_recorded_losses_begin_with_the_base_as_it_is_here():
    """The GPU read the same texts, in the same form, as this machine."""
    base, splits = experiments._loaded("smollm2-135m", "devils_dictionary")
    for name in ("plain", "punctuated"):
        recorded = {line["curves"][name][0] for line in read_record("smollm2_finetuning")["runs"]}
        assert len(recorded) == 1
        assert evaluate(base, splits[name]) == pytest.approx(recorded.pop(), abs=5e-3)  # TF32 there


def test_the_other_start_has_a_random_b_and_learns(small):
    """As large as A would be with r inputs; the first update is A's alone."""
    for start, random in (("A", "lora_A"), ("B", "lora_B")):
        model, _ = experiments._prepared(experiments._settings({"start": start, "r": 4, "targets": ["q_proj"]}))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scaled = parameter.detach() * parameter.shape[1] ** 0.5  # 192 of A, 4 of B
                assert scaled.abs().max() <= 1
                assert scaled.std() == pytest.approx(3**-0.5 if name.endswith(random) else 0, abs=0.05)
    job = {"start": "B", "steps": 8, "rows": 16, "r": 2, "learning_rate": 1e-4, "eval_every": 8, "every_step": False}
    result = experiments.run(job)
    assert list(result) == ["eval_steps", "curves", "validation", "test"]
    before, after = result["curves"]["validation"]
    assert after < before
    assert experiments.run(job | {"start": "A"})["curves"]["validation"][0] == before  # the base, either way


def test_full_fine_tuning_trains_every_weight_of_a_fresh_copy(small):
    job = {"steps": 2, "rows": 8, "learning_rate": 1e-3, "method": "full"}
    first = experiments.run(job)
    assert experiments.run(job) == first  # the cached base was not touched
    base, _ = experiments._loaded("tiny", "devils_dictionary")
    model, _ = experiments._prepared(experiments._settings(job))
    assert model is not base
    assert all(parameter.requires_grad for parameter in model.parameters())
    adapted, _ = experiments._prepared(experiments._settings({"r": 4, "targets": ["q_proj"]}))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 4 * (192 + 192) * 3


def test_a_classifier_is_measured_by_its_accuracy(small):
    result = experiments.run({"task": "wordnet_topics", "steps": 2, "rows": 32, "r": 2})
    assert {"validation", "validation accuracy", "test", "test accuracy"} < result.keys()
    assert result["validation"] == pytest.approx(math.log(10), abs=1)
    assert result["test accuracy"] * 16 == pytest.approx(round(result["test accuracy"] * 16), abs=0.01)


def test_look_inside(small):
    job = {"base": "tiny", "task": "devils_dictionary", "steps": 2, "ranks": (2, 4), "seeds": (0, 1)}
    found = experiments.look_inside(job | {"learning_rate": 1e-3, "full_rate": 1e-4})
    assert list(found["spectra"]) == ["r=2, seed 0", "r=2, seed 1", "r=4, seed 0", "r=4, seed 1", "full"]
    assert {numbers["matrices"] for numbers in found["spectra"].values()} == {6}  # q_proj and up_proj of 3 layers
    assert 1 <= found["spectra"]["r=2, seed 0"]["effective rank"] <= 2
    assert found["spectra"]["full"]["effective rank"] > 4
    assert list(found["overlap"]) == ["two ranks", "two seeds, r=2", "two seeds, r=4", "chance"]
    for table in found["overlap"].values():
        assert [len(row) for row in table] == [2, 2]
    assert found["overlap"]["two seeds, r=2"][1][1] < 0.2  # A starts elsewhere, and two steps hardly move it


@pytest.mark.errors
@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"rank": 8}, r"a job with \['rank'\]: the settings are base, task"),
        ({"method": "ful"}, "method='ful': expected 'lora' or 'full'"),
        ({"start": "C"}, "init_lora_weights='C'"),
        ({"dtype": "bf16"}, "dtype='bf16': expected 'float32' or 'bfloat16' or 'float16'"),
        ({"task": "wordnet_topics", "forgetting": True}, "a classifier has no loss on plain definitions"),
        ({"task": "devil"}, "unknown data set 'devil'"),
    ],
)
def test_a_job_that_makes_no_sense(job, says):
    with pytest.raises(ValueError, match=says):
        experiments.run({"steps": 1} | job)


@pytest.mark.parametrize(
    ("job", "base", "trained"),
    [
        ({}, torch.float32, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16, torch.float32),
        ({"dtype": "bfloat16", "autocast_adapter_dtype": False}, torch.bfloat16, torch.bfloat16),
        ({"dtype": "bfloat16", "method": "full"}, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_job_says_in_what_the_base_and_the_adapter_are_kept(job, base, trained):
    model, _ = experiments._prepared(experiments._settings(job))
    assert model.get_input_embeddings().weight.dtype == base
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {trained}


@pytest.mark.errors
@pytest.mark.parametrize(
    "change", [{"ranks": (64, 8)}, {"ranks": (8,)}, {"seeds": (1, 1)}, {"r": 8}], ids=["falling", "one", "same", "more"]
)
def test_nothing_to_look_inside(change):
    job = {"base": "tiny", "task": "jargon", "steps": 1, "ranks": (2, 4), "seeds": (0, 1)}
    with pytest.raises(ValueError, match=r"two ranks and two seeds|the smaller one first"):
        experiments.look_inside(job | {"learning_rate": 1e-3, "full_rate": 1e-4} | change)


# A whole sweep

JOBS = [("few", {"steps": 4, "rows": 8, "r": 2, "seed": seed, "targets": ["q_proj"]}) for seed in range(4)]
CHILD = """
import sys
from pathlib import Path
from lora_edu.lab.recording import full_runs, sweeps

if __name__ == "__main__":
    sweeps.SWEEPS["few"] = lambda: {jobs!r}
    full_runs.full_run("few", Path(sys.argv[1]), processes=2)
"""


@pytest.fixture
def sweep(monkeypatch):
    """Puts other jobs into the list, under the name "few"."""

    def put(jobs):
        monkeypatch.setitem(sweeps.SWEEPS, "few", lambda: jobs)

    put(JOBS)
    return put


def recorded(path):
    return [line["job"] for line in json.loads(path.read_text(encoding="utf-8"))["runs"]]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows knows no SIGKILL")
def test_killed_in_the_middle_and_resumed(sweep, tmp_path):
    out, script = tmp_path / "few.json", tmp_path / "child.py"
    script.write_text(CHILD.format(jobs=JOBS), encoding="utf-8")
    child = subprocess.Popen([sys.executable, str(script), str(out)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (out.exists() and recorded(out)):  # it is valid JSON whenever we look
        assert child.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    workers = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = json.loads(out.read_text(encoding="utf-8"))
    assert 1 <= len(before["runs"]) < len(JOBS)
    _, left = psutil.wait_procs(workers, timeout=30)
    assert not left  # no worker stays behind, with a GPU's memory
    assert full_runs.full_run("few", out, processes=2)
    after = json.loads(out.read_text(encoding="utf-8"))
    assert after["runs"][: len(before["runs"])] == before["runs"]
    assert Counter(map(key, recorded(out))) == Counter(key({"part": part} | job) for part, job in JOBS)
    assert after["machines"] == before["machines"]
    bytes_ = out.read_bytes()
    assert full_runs.full_run("few", out)  # nothing is left to do
    assert out.read_bytes() == bytes_
    assert sorted(path.name for path in tmp_path.glob("few*")) == ["few.json"]
    expected = experiments.run(JOBS[0][1])
    (line,) = [line for line in after["runs"] if line["job"]["seed"] == 0]
    assert line["test"] == pytest.approx(expected["test"], abs=2e-3)
    assert line["train_loss"] == pytest.approx(expected["train_loss"], abs=2e-3)


def test_part_and_rule_are_notes_not_settings(monkeypatch):
    monkeypatch.setattr(full_runs, "run", lambda job: {"ran": job})
    monkeypatch.setattr(full_runs, "look_inside", lambda job: {"looked": job})
    assert full_runs._do({"part": "rank", "rule": "rsLoRA", "kind": "small", "r": 2}) == {"ran": {"r": 2}}
    assert full_runs._do({"part": "inside", "ranks": (2, 4)}) == {"looked": {"ranks": (2, 4)}}


class Instant:
    """In place of the pool: a run is done the moment it is asked for; without a seed it fails."""

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, do, job):
        future = pool.Future()
        if "seed" in job:
            future.set_result({"test": 1.0})
        else:
            future.set_exception(MemoryError("the GPU is full"))
        return future


def test_a_run_that_fails_keeps_the_others(sweep, tmp_path, monkeypatch):
    out = tmp_path / "few.json"
    monkeypatch.setattr(pool, "ProcessPoolExecutor", Instant)
    sweep([JOBS[0], ("few", {"r": 512}), *JOBS[1:]])
    with pytest.raises(RuntimeError, match=r"MemoryError: the GPU is full; its job is .*512.*the same command goes on"):
        full_runs.full_run("few", out)
    assert recorded(out) == [{"part": "few"} | JOBS[0][1]]  # and nothing more was begun
    sweep(JOBS)
    assert full_runs.full_run("few", out)
    assert [job["seed"] for job in recorded(out)] == [0, 1, 2, 3]


def test_no_run_is_begun_after_the_time_is_up(sweep, tmp_path, monkeypatch):
    out, clock = tmp_path / "few.json", iter([0.0, 1.0, 59.0, 61.0, 62.0])
    monkeypatch.setattr(pool, "ProcessPoolExecutor", Instant)
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert not full_runs.full_run("few", out, minutes=1)
    assert [job["seed"] for job in recorded(out)] == [0, 1]
    monkeypatch.setattr(pool, "time", time)
    assert full_runs.full_run("few", out)
    assert [job["seed"] for job in recorded(out)] == [0, 1, 2, 3]


def test_another_machine_is_added(sweep, tmp_path, monkeypatch):
    out = tmp_path / "few.json"
    monkeypatch.setattr(pool, "ProcessPoolExecutor", Instant)
    for name in ("one", "two", "one"):
        monkeypatch.setattr(pool, "surroundings", lambda *given, name=name: {"hardware": name})
        sweep(JOBS[: 1 + len(recorded(out)) if out.exists() else 1])
        assert full_runs.full_run("few", out)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["machines"] == [{"hardware": "one"}, {"hardware": "two"}]
    assert [line["machine"] for line in record["runs"]] == [0, 1, 0]


@pytest.mark.errors
@pytest.mark.parametrize(
    ("options", "says"),
    [({"processes": 0}, "processes=0"), ({"minutes": 0}, "minutes=0"), ({"minutes": math.nan}, "minutes=nan")],
)
def test_numbers_out_of_range(sweep, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        full_runs.full_run("few", tmp_path / "few.json", **options)


@pytest.mark.errors
def test_unknown_sweeps_and_folders(sweep, tmp_path):
    with pytest.raises(
        ValueError, match="unknown sweep 'tiny'; there are: smollm2_finetuning, smollm2_precision, smol"
    ):
        full_runs.full_run("tiny", tmp_path / "few.json")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        full_runs.full_run("few", tmp_path / "nowhere" / "few.json")


@pytest.mark.errors
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"runs": [', "no record of a sweep"),
        ("[]", "no record of a sweep"),
        ('{"command": "python data/train_jargon.py"}', "no record of a sweep"),
        ({"runs": [{"job": {"part": "other"}}]}, "holds 1 runs that are no jobs of few"),
        ({"defaults": {"base": "another"}}, "recorded under other defaults"),
        ({"defaults": {"momentum": 0.9}}, "recorded under other defaults"),
    ],
)
def test_the_file_of_something_else_is_left_alone(sweep, tmp_path, content, says):
    out = tmp_path / "few.json"
    if isinstance(content, dict):
        content = json.dumps({"machines": [], "runs": [], "defaults": experiments.DEFAULTS} | content)
    out.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        full_runs.full_run("few", out)
    assert out.read_text(encoding="utf-8") == content


@pytest.mark.errors
def test_two_commands_do_not_write_one_file(sweep, tmp_path):
    out = tmp_path / "few.json"
    with files.locked(out), pytest.raises(RuntimeError, match="being written by another command"):
        full_runs.full_run("few", out)
    with files.locked(out):
        pass


def test_it_runs_where_only_what_training_needs_is_installed(tmp_path):
    """A borrowed GPU machine may have neither typer nor the notebooks' packages, nor PEFT."""
    absent = ("typer", "rich", "nbclient", "nbformat", "IPython", "peft", "matplotlib")
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({absent}))\n"
    code += "sys.argv = ['full_runs', '--help']\n"
    code += "runpy.run_module('lora_edu.lab.recording.full_runs', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "smollm2_finetuning" in done.stdout


def test_cost_counts_steps():
    cost = full_runs.cost("smollm2_finetuning")
    assert (cost.runs, cost.recorded, cost.steps) == (55, 55, 55 * 120)
    assert cost.hours == pytest.approx(55 * 120 * 8 * full_runs.SECONDS_PER_ROW["smollm2-135m"] / 3600)
