"""The referee: real short runs on ``tiny``, tuned and seeded; killed and resumed; what the record then says."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from lora_edu.core import entrants
from lora_edu.core.entrants import PARAGRAPHS, Place, register_entrant, registered_entrants
from lora_edu.core.inject import count_parameters, inject
from lora_edu.course.publish import methods
from lora_edu.files import data_path
from lora_edu.lab.datasets import collate
from lora_edu.lab.recording import pool, referee, shared_card, trials
from lora_edu.lab.recording.records import Spread
from lora_edu.lab.recording.standings import standing, tuned, verdict
from lora_edu.lab.recording.tasks import PLAN, TASKS, Plan, Task, loaded
from lora_edu.lab.recording.trials import entrant_called, prepared, trial

SMALL = Task("tiny", "devils_dictionary", rows=8, batches=(4, 8), timed=True, limit=8)
FEW = Plan(tasks={"small": SMALL}, seeds=(0, 1), rounds=1)
CHILD = """
import sys
from pathlib import Path
from lora_edu.lab.recording.referee import referee
from lora_edu.lab.recording.tasks import Plan, Task

if __name__ == "__main__":
    plan = Plan(tasks={{"small": {task!r}}}, seeds=(0, 1), rounds=1)
    referee(["lora-r2"], Path(sys.argv[1]), processes=1, plan=plan)
"""
CARD = "\n".join(f"{word}: something." for word in PARAGRAPHS)


def jobs_in(path):
    return [line["job"] for line in json.loads(path.read_text(encoding="utf-8"))["runs"]]


# A whole comparison


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows knows no SIGKILL")
def test_killed_in_the_middle_and_resumed(tmp_path):
    """Nothing is done twice, every run gives what it gives alone, and the record says which rate was best."""
    out, script = tmp_path / "referee.json", tmp_path / "child.py"
    script.write_text(CHILD.format(task=SMALL), encoding="utf-8")
    child = subprocess.Popen([sys.executable, str(script), str(out)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (out.exists() and len(jobs_in(out)) > 2):
        assert child.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    workers = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]
    before = jobs_in(out)
    assert all(job["stage"] in ("base", "tune") for job in before)  # killed while tuning
    assert referee.referee(["lora-r2"], out, processes=2, plan=FEW)
    record = referee.read(out, FEW)
    jobs = [line["job"] for line in record["runs"]]
    assert jobs[: len(before)] == before
    assert max(Counter(map(pool.key, jobs)).values()) == 1
    assert Counter(job["stage"] for job in jobs) == {"base": 1, "tune": 10, "seed": 2, "step": 1}
    assert jobs[-1]["stage"] == "step"  # when nothing else runs
    for line in record["runs"]:
        if line["job"]["stage"] != "step":
            expected = trial(FEW, line["job"])
            for name in expected.keys() - {"seconds"}:
                assert line[name] == pytest.approx(expected[name], abs=2e-3), (line["job"], name)
    check_what_it_says(record)
    bytes_ = out.read_bytes()
    assert referee.referee(["LORA-R2"], out, processes=2, plan=FEW)  # nothing is left to do
    assert out.read_bytes() == bytes_
    assert referee.cost(["lora-r2"], out, FEW) == (1, 12, 12, 0)
    assert sorted(path.name for path in tmp_path.glob("referee*")) == ["referee.json"]


def check_what_it_says(record):
    entrant = entrant_called("lora-r2")
    best = min((line for line in record["runs"] if line["job"]["stage"] == "tune"), key=lambda line: line["validation"])
    assert tuned(FEW, record, entrant, "small") == (best["job"]["rate"], best["job"]["batch"])
    found = standing(FEW, record, entrant, "small")
    seeds = [line for line in record["runs"] if line["job"]["stage"] == "seed"]
    assert {line["job"]["seed"] for line in seeds} == {0, 1}
    assert {line["job"]["rate"] for line in seeds} == {best["job"]["rate"]}
    assert found.score.mean == pytest.approx(sum(line["test"] for line in seeds) / 2)
    assert found.at_edge == (found.rate in (entrant.rates_for("tiny")[0], entrant.rates_for("tiny")[-1]))
    assert found.plain.n == 2
    assert found.trainable == count_parameters(prepared(SMALL, entrant, 0)[0])[0]
    assert 0 < found.file_bytes - 4 * found.trainable < 10_000  # float32, and a header
    assert found.step_ratio > 0
    assert found.peak_bytes is None
    assert standing(FEW, record, entrant_called("full"), "small") is None  # not measured yet


def test_what_is_no_adapter_and_what_classifies():
    """A few steps of full fine-tuning on ``tiny``, and of a probe and of LoRA on ``minilm``."""
    topics = dataclasses.replace(TASKS["minilm-topics"], rows=16, batches=(8,), limit=8)
    plan = Plan(tasks={"small": SMALL, "topics": topics}, seeds=(0,), rounds=1)
    job = {"stage": "seed", "seed": 0, "rate": 1e-3, "batch": 8}
    full = trial(plan, job | {"method": "full", "task": "small"})
    assert full["trainable"] == count_parameters(loaded(SMALL)[0])[1]
    assert full["file_bytes"] == 4 * full["trainable"]
    assert full["plain"] != trial(plan, {"stage": "base", "task": "small"})["plain"]
    probe = trial(plan, job | {"method": "probe", "task": "topics"})
    assert probe["trainable"] == 384 * 10 + 10
    assert {"validation accuracy", "test accuracy"} <= probe.keys()
    assert "plain" not in probe
    model, splits = prepared(topics, entrant_called("lora-qv-r8"), 0)
    adapted = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("lora_A")}
    assert adapted == {"query", "value"}
    assert any("classifier" in name for name, each in model.named_parameters() if each.requires_grad)
    assert splits["train"][0]["input_ids"][0] == 101  # [CLS], which BERT's head reads
    cost = trial(plan, {"stage": "step", "method": "probe", "task": "topics"})
    assert cost["step_ratio"] > 0
    assert cost["peak_bytes"] is None


def test_the_probe_on_the_mean_leaves_padding_out():
    topics = dataclasses.replace(TASKS["minilm-topics"], limit=8)
    model, splits = prepared(topics, entrant_called("probe-mean"), 0)
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]
    rows = sorted(splits["train"], key=lambda row: len(row["input_ids"]))[:: len(splits["train"]) - 1]
    assert len(rows[0]["input_ids"]) < len(rows[1]["input_ids"])
    with torch.no_grad():
        for row, said in zip(rows, model(**collate(rows, 0)).logits, strict=True):
            alone = {name: each for name, each in collate([row], 0).items() if name != "labels"}
            states = model.bert(**alone).last_hidden_state
            torch.testing.assert_close(said, model.classifier(states[0].mean(0)), rtol=1e-4, atol=1e-5)


def test_peak_memory_does_not_depend_on_what_the_process_did_before(monkeypatch):
    """A stand-in for a GPU: a model takes 100 bytes, its step 10 more; a process's first step takes 64 for good."""
    gpu = {"models": 0, "for good": 0}

    class Steps:
        def __init__(self, task, entrant):
            gpu["models"] += 100

        def __call__(self):
            gpu["for good"] = 64

        def __del__(self):
            gpu["models"] -= 100

    monkeypatch.setattr(trials, "_Steps", Steps)
    monkeypatch.setattr(trials, "process_state", lambda: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: sum(gpu.values()))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: sum(gpu.values()) + 10)
    job = {"stage": "step", "method": "lora-r2", "task": "small"}
    assert [trial(FEW, job)["peak_bytes"] for _ in range(2)] == [110, 110]


@pytest.mark.errors
def test_a_classifier_whose_head_does_not_train_is_refused():
    topics = dataclasses.replace(TASKS["minilm-topics"], limit=8)
    query = dataclasses.replace(entrant_called("full"), unfreeze=lambda model, place: model.bert.requires_grad_(True))
    with pytest.raises(ValueError, match=r"entrant 'full' does not train the new head of 'minilm'"):
        prepared(topics, query, 0)


def test_a_start_that_needs_data_gets_batches(monkeypatch):
    seen = []
    monkeypatch.setattr("lora_edu.lab.recording.trials.inject", lambda model, config, batches: seen.extend(batches))
    prepared(dataclasses.replace(SMALL, batches=(2,)), entrant_called("lora-r2"), 0, start_batches=3)
    assert [batch["input_ids"].shape[0] for batch in seen] == [2, 2, 2]
    assert all(batch.keys() == {"input_ids", "attention_mask", "labels"} for batch in seen)


@pytest.mark.parametrize("name", ["eva-r8", "lora-ga-r8", "gora-r8"])
def test_what_starts_from_data_is_trained_on_the_plans_number_of_batches(name, monkeypatch):
    """A real run; the start sees the first batches of the training rows, of the smallest size that is tuned over."""
    seen = []

    def spy(model, config, batches):
        seen.extend(batches)
        return inject(model, config, batches=iter(seen))

    monkeypatch.setattr("lora_edu.lab.recording.trials.inject", spy)
    plan = dataclasses.replace(FEW, tasks={"small": dataclasses.replace(SMALL, batches=(4,))}, start_batches=1)
    job = {"stage": "seed", "method": name, "task": "small", "rate": 1e-3, "batch": 4, "seed": 0}
    found = trial(plan, job)
    assert [batch["input_ids"].shape[0] for batch in seen] == [4]
    assert found["validation"] > 0
    assert found["trainable"] > 0


def test_an_entrant_may_bring_its_optimizer():
    """In the runs and in the timed step: here one that does not move anything."""
    asked = []

    def still(model, rate):
        asked.append(rate)
        return torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.0)

    entrant = dataclasses.replace(entrant_called("full"), optimizer=still)
    before = trial(FEW, {"stage": "base", "task": "small"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "entrant_called", lambda name: entrant)
        job = {"stage": "tune", "method": "still", "task": "small", "rate": 0.5, "batch": 4, "seed": 0}
        assert trial(FEW, job)["validation"] == before["validation"]
        assert asked == [0.5]
        trials._Steps(SMALL, entrant)()
    assert len(asked) == 2


# What the record says


def invented(losses, seeds=FEW.seeds):
    """A record of lora-r2 on "small" in which the validation loss of each run is given by its rate and batch."""
    entrant = entrant_called("lora-r2")
    rates = entrant.rates_for("tiny")
    own = {"method": "lora-r2", "task": "small"}
    runs = [
        {"job": own | {"stage": "tune", "seed": 100, "rate": r, "batch": b}, "validation": losses[i]}
        for i, (b, r) in enumerate((b, r) for b in SMALL.batches for r in rates)
    ]
    for seed in seeds:
        for b in SMALL.batches:
            for r in rates:
                result = {"test": 4.0 + seed, "plain": 3.0, "trainable": 5, "file_bytes": 20}
                runs.append({"job": own | {"stage": "seed", "seed": seed, "rate": r, "batch": b}} | result)
    return entrant, {"runs": runs}


def test_the_best_rate_and_whether_it_lies_at_the_edge():
    entrant, record = invented([5.0] * 7 + [4.0] + [5.0] * 2)
    rates = entrant.rates_for("tiny")
    assert tuned(FEW, record, entrant, "small") == (rates[2], 8)
    found = standing(FEW, record, entrant, "small")
    assert not found.at_edge
    assert found.score == Spread(4.5, pytest.approx(0.5**0.5), 2)
    assert found.step_ratio is None
    entrant, record = invented([None] * 4 + [4.5] + [None] * 5)  # None: it diverged
    assert tuned(FEW, record, entrant, "small") == (rates[-1], 4)
    assert standing(FEW, record, entrant, "small").at_edge
    record["runs"][-1]["test"] = record["runs"][14]["test"] = None  # one of the chosen runs, and one of another rate
    found = standing(FEW, record, entrant, "small")
    assert (found.score.n, found.diverged) == (1, 1)
    del record["runs"][3]
    assert tuned(FEW, record, entrant, "small") is None
    assert standing(FEW, record, entrant, "small") is None


def test_rates_that_are_added_later_take_no_result_away():
    entrant, record = invented([5.0] * 7 + [4.0] + [5.0] * 2)
    before = standing(FEW, record, entrant, "small")
    rates = entrant.rates_for("tiny")
    wider = dataclasses.replace(entrant, rates=(rates[0] / 2, *rates, 2 * rates[-1]))
    assert tuned(FEW, record, wider, "small") is None  # no seed is begun before the new rates are known
    assert standing(FEW, record, wider, "small") == before
    entrant, record = invented([None] * 4 + [4.5] + [None] * 5)
    assert standing(FEW, record, wider, "small").at_edge  # of what was tried


def test_seeds_are_named_once_the_tuning_is_recorded():
    entrant, record = invented([5.0] * 7 + [4.0] + [5.0] * 2, seeds=())
    seeds = [job for job in referee.runs(FEW, record, [entrant]) if job["stage"] == "seed"]
    assert [(job["rate"], job["batch"], job["seed"]) for job in seeds] == [
        (entrant.rates_for("tiny")[2], 8, 0),
        (entrant.rates_for("tiny")[2], 8, 1),
    ]
    record["runs"].pop()
    assert not [job for job in referee.runs(FEW, record, [entrant]) if job["stage"] == "seed"]


@pytest.mark.parametrize(
    ("one", "other", "loss", "accuracy"),
    [
        (Spread(4.0, 0.1, 5), Spread(4.2, 0.1, 5), "better", "worse"),
        (Spread(4.2, 0.1, 5), Spread(4.0, 0.01, 5), "worse", "better"),
        (Spread(4.0, 0.01, 5), Spread(4.2, 0.3, 5), "not evidence", "not evidence"),
        (Spread(4.0, 0.0, 5), Spread(4.0, 0.0, 5), "not evidence", "not evidence"),
    ],
)
def test_a_difference_below_the_spread_is_not_evidence(one, other, loss, accuracy):
    assert verdict(SMALL, one, other) == loss
    assert verdict(TASKS["minilm-topics"], one, other) == accuracy


# What is refused


@pytest.mark.errors
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"runs": [', "no record of the referee"),
        ("[]", "no record of the referee"),
        ('{"command": "python data/train_jargon.py", "runs": [], "machines": []}', "no record of the referee"),
        ({"settings": {"seeds": [0]}}, "recorded with other settings"),
        ({"tasks": {"small": {"rows": 9}}}, r"recorded with other settings \(small\)"),
        (
            {"runs": [{"job": {"stage": "tune", "method": "magic", "task": "small", "seed": 100}}]},
            "holds 1 runs .*magic",
        ),
        ({"runs": [{"job": {"stage": "seed", "method": "lora-r2", "task": "small", "seed": 7}}]}, "holds 1 runs"),
    ],
)
def test_the_file_of_something_else_is_left_alone(tmp_path, content, says):
    out = tmp_path / "referee.json"
    if isinstance(content, dict):
        settings = json.loads(json.dumps(FEW.settings())) | content.get("settings", {})
        for name, changes in content.get("tasks", {}).items():
            settings["tasks"][name] |= changes
        content = json.dumps({"settings": settings, "machines": [], "runs": content.get("runs", [])})
    out.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        referee.referee(["lora-r2"], out, plan=FEW)
    assert out.read_text(encoding="utf-8") == content


def test_some_tasks_go_into_the_record_of_all(tmp_path, monkeypatch):
    """On a machine that has one base only. The settings in the file are those of the whole plan."""
    asked, out = [], tmp_path / "referee.json"
    plan = dataclasses.replace(FEW, tasks=FEW.tasks | {"jargon": dataclasses.replace(SMALL, data="jargon")})
    monkeypatch.setattr(referee, "work", lambda todo, do, record, *rest: asked.append((todo(), record)) or True)
    assert referee.referee(["lora-r2"], out, 1, tasks=["jargon"], plan=plan)
    assert {job["task"] for jobs, _ in asked for job in jobs} == {"jargon"}
    assert set(asked[0][1]["settings"]["tasks"]) == {"small", "jargon"}


def test_a_further_task_and_further_rates_leave_what_is_recorded(tmp_path):
    out = tmp_path / "referee.json"
    run = {"job": {"stage": "tune", "method": "lora-r2", "task": "small", "rate": 0.5, "batch": 8, "seed": 100}}
    pool.write(out, referee.read(out, FEW) | {"runs": [run]})
    more = dataclasses.replace(FEW, tasks=FEW.tasks | {"jargon": dataclasses.replace(SMALL, data="jargon")})
    assert referee.read(out, more)["runs"] == [run]


def test_a_record_from_before_there_were_starts_from_data_is_read_on(tmp_path):
    """It does not say on how many batches: none of its runs depends on it. One that does say so is held to it."""
    referee.read(data_path("runs", "referee.json"))
    out = tmp_path / "referee.json"
    record = referee.read(out, FEW)
    pool.write(out, record)
    with pytest.raises(ValueError, match=r"recorded with other settings.*'start_batches': 8"):
        referee.read(out, dataclasses.replace(FEW, start_batches=2))
    del record["settings"]["start_batches"]
    pool.write(out, record)
    assert referee.read(out, FEW)["settings"]["start_batches"] == 8


@pytest.mark.errors
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"processes": 0}, "processes=0"),
        ({"minutes": 0}, "minutes=0"),
        ({"methods": ["magic"]}, r"unknown method 'magic'; entered are .*lora-r8 \(LoRA\)"),
    ],
)
def test_what_makes_no_sense(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        referee.referee(out=tmp_path / "referee.json", plan=FEW, **options)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        referee.referee(out=tmp_path / "nowhere" / "referee.json", plan=FEW)


# The page


def test_the_page_says_what_is_measured_and_what_is_not():
    plan = Plan(tasks={"small": dataclasses.replace(SMALL, title="A small task")}, seeds=(0, 1))
    _, record = invented([5.0] * 7 + [4.0] + [5.0] * 2)
    own = {"task": "small", "stage": "base"}
    record |= {
        "command": "python x",
        "machines": [],
        "runs": [*record["runs"], {"job": own, "test": 6.0, "plain": 2.5}],
    }
    record["runs"].append(
        {"job": own | {"stage": "step", "method": "lora-r2"}, "step_ratio": 1.25, "peak_bytes": 2**21}
    )
    rows = methods.methods_page(record, plan).splitlines()
    assert "### A small task" in rows
    assert (
        "| [lora-r2](#lora) | 4.500 ± 0.707 |  | 3.000 ± 0.000 | 0.005 | 8 | 5 | 0 kB | 1.25 | 2 MiB |" in rows
    )  # nothing to compare with yet
    assert rows.index("| *the base as it comes* | 6.000 |  | 2.500 |  |  |  |  |  |  |") > 0
    assert "| [lora-r8](#lora) | not measured yet |  |  |  |  |  |  |  |  |" in rows
    assert "- `lora-r2`: A small task 4.500 ± 0.707" in rows
    assert "- `lora-r8`: A small task not measured yet" in rows
    for run in [line for line in record["runs"] if line["job"].get("method") == "lora-r2"]:
        worse = {name: run[name] + 2 for name in ("test",) if name in run}
        record["runs"].append(run | worse | {"job": run["job"] | {"method": "lora-r8"}})
    rows = methods.methods_page(record, plan).splitlines()
    assert "- `lora-r2`: A small task 4.500 ± 0.707 (better)" in rows
    assert [row for row in rows if row.startswith("| [lora-r2](#lora) | 4.500 ± 0.707 | better |")]
    ranking = [row.split("]")[0][3:] for row in rows if row.startswith("| [")]
    assert ranking[:2] == ["lora-r2", "lora-r8"]
    for word in PARAGRAPHS:
        assert entrant_called("lora-r8").card[word][1:] in "\n".join(rows)


def test_a_rate_at_the_edge_has_a_star_and_a_classifier_percent():
    _, record = invented([4.0] + [5.0] * 9)
    record |= {"command": "python x", "machines": []}
    plan = Plan(tasks={"small": SMALL}, seeds=(0, 1))
    page = methods.methods_page(record, plan)
    assert [row for row in page.splitlines() if r"| 0.001\* | 4 |" in row]
    assert methods.EDGE in page
    assert "learning rate (5 to 8 values)" in page
    inside = invented([5.0, 4.0] + [5.0] * 8)[1] | {"command": "python x", "machines": []}
    assert methods.EDGE not in methods.methods_page(inside, plan)
    for line in record["runs"]:
        if line["job"]["stage"] == "seed":
            line["test accuracy"] = 0.75
    small = dataclasses.replace(SMALL, classes=2)
    rates = dataclasses.replace(entrant_called("lora-r2"), rates=entrant_called("lora-r2").rates_for("tiny"))
    assert standing(Plan(tasks={"small": small}, seeds=(0, 1)), record, rates, "small").score.mean == 0.75


@pytest.mark.parametrize(
    ("accuracies", "classes", "number", "says"),
    [
        ((0.75, 0.75), 2, 0, "75.0 ± 0.0 % |"),
        ((0.75, 0.5), 2, 1, "%, 1 seed at chance |"),
        ((0.49, 0.51), 2, 2, "%, 2 seeds at chance |"),
        ((0.49, 0.11), 10, 1, "%, 1 seed at chance |"),
    ],
)
def test_seeds_that_learnt_nothing_are_counted(accuracies, classes, number, says):
    _, record = invented([4.0] * 10)
    record |= {"command": "python x", "machines": []}
    for line in record["runs"]:
        line["validation accuracy"] = 0.5
        if line["job"]["stage"] == "seed":
            line["test accuracy"] = accuracies[line["job"]["seed"]]
    plan = Plan(tasks={"small": dataclasses.replace(SMALL, classes=classes)}, seeds=(0, 1))
    assert standing(plan, record, entrant_called("lora-r2"), "small").at_chance == number
    assert [
        row for row in methods.methods_page(record, plan).splitlines() if row.startswith("| [lora-r2]") and says in row
    ]


def test_the_page_says_once_what_its_results_are_and_where_they_come_from():
    """As two pieces on one machine, which differ in their commit alone."""
    machine = {"hardware": "a card", "precision": "float32", "versions": {"torch": "2.11"}, "date": "2026-11-27"}
    record = {"command": "python x", "machines": [machine | {"commit": "a"}, machine | {"commit": "b"}], "runs": []}
    page = methods.methods_page(record, Plan(tasks={"small": SMALL}))
    assert "Recorded by `python x`: a card, float32, torch 2.11, 2026-11-27.\n" in page
    assert page.count("how it compares") == 1
    assert "lora-r8's own ratio is that of one copy of it against another" in page


@pytest.mark.parametrize(
    ("minutes", "says", "not_said"),
    [(0.0, "(9 recorded), complete; needs", "rest"), (0.5, "about 1 min for the rest", "complete")],
)
def test_the_list_of_runs_says_what_is_left(monkeypatch, minutes, says, not_said):
    monkeypatch.setattr(referee, "cost", lambda plan: referee.Cost(2, 9, 9, minutes))
    assert says in referee.line()
    assert not_said not in referee.line()


def test_the_page_is_written_only_if_it_changes(tmp_path):
    page = tmp_path / "methods.md"
    assert methods.refresh(tmp_path / "none.json", page) == [page]
    assert methods.refresh(tmp_path / "none.json", page) == []
    assert "not measured yet" in page.read_text(encoding="utf-8")


# Entering


@pytest.fixture
def empty(monkeypatch):
    registered_entrants()
    monkeypatch.setattr(entrants, "_ENTRANTS", {})


def test_a_method_enters_by_itself(empty):
    def unfreeze(model, place):
        model.requires_grad_(True)

    text = "A file's docstring.\n\n    Not a card: this is.\n" + CARD + "\ngoes on\n\nPapers are not read here."
    register_entrant("mine", method="Mine", unfreeze=unfreeze, rates={"tiny": (1e-3, 1e-2)}, card=text)
    (entrant,) = registered_entrants()
    assert list(entrant.card) == list(PARAGRAPHS)
    assert entrant.card["Idea"] == "something."
    assert entrant.card["Papers"] == "something. goes on"
    assert entrant.enters(Place("tiny", "CAUSAL_LM"))
    assert not entrant.enters(Place("minilm", "SEQ_CLS"))  # no rates for it
    assert entrant.rates_for("tiny") == (1e-3, 1e-2)
    assert [each.name for each in referee.chosen(["MINE"])] == ["mine"]


@pytest.mark.errors
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": lambda place: None}, "config=, or unfreeze="),
        ({"unfreeze": None}, "config=, or unfreeze="),
        ({"rates": (1e-2, 1e-3)}, "expected rising"),
        ({"rates": {"tiny": ()}}, "expected rising"),
        ({"needs": "IMAGE"}, "needs='IMAGE'"),
        ({"card": "Idea: one.\nPapers: two."}, "lacks the paragraphs Formula: …, Cost: …, Merging: …"),
        ({"card": None}, "lacks the paragraphs Idea"),
    ],
)
def test_entrants_that_are_refused(empty, changes, says):
    good = {"method": "Mine", "unfreeze": nn.Module.requires_grad_, "rates": (1e-3, 1e-2), "card": CARD}
    with pytest.raises(ValueError, match=says):
        register_entrant("mine", **good | changes)
    register_entrant("mine", **good)
    with pytest.raises(ValueError, match="there is an entrant 'mine' already, of Mine"):
        register_entrant("mine", **good)


def test_everything_that_is_entered_has_five_to_eight_rates_and_a_place():
    for entrant in registered_entrants():
        places = [task.place for task in TASKS.values() if entrant.enters(task.place)]
        assert places, entrant.name
        for place in places:
            assert 5 <= len(entrant.rates_for(place.base)) <= 8, entrant.name


def test_their_order_does_not_depend_on_which_file_was_imported_first(monkeypatch):
    before = registered_entrants()
    last_first = sorted(before, key=lambda each: each.method.lower(), reverse=True)  # those of one method as they came
    monkeypatch.setattr(entrants, "_ENTRANTS", {each.name: each for each in last_first})
    assert registered_entrants() == before


def test_one_task_of_each_base_is_timed():
    bases = Counter(task.base for task in PLAN.tasks.values() if task.timed)
    assert bases == dict.fromkeys({task.base for task in PLAN.tasks.values()}, 1)


# The card


def test_the_service_that_shares_a_card_ends_with_its_block(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shared_card.shutil, "which", lambda name: name)
    monkeypatch.setattr(shared_card, "_succeeds", lambda *command, words="": said.append((command[0], words)) or True)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    with shared_card.shared_card(8) as works:
        assert works
        assert "CUDA_MPS_PIPE_DIRECTORY" in shared_card.os.environ
    assert said == [(shared_card.CONTROL, ""), (sys.executable, ""), (shared_card.CONTROL, "quit\n")]
    assert "CUDA_MPS_PIPE_DIRECTORY" not in shared_card.os.environ
    said.clear()
    monkeypatch.setattr(
        shared_card, "_succeeds", lambda *command, words="": said.append(command[0]) or "-c" not in command
    )
    with shared_card.shared_card(8) as works:  # a first process could not use it
        assert not works
        assert "CUDA_MPS_PIPE_DIRECTORY" not in shared_card.os.environ
    assert said == [shared_card.CONTROL, sys.executable, shared_card.CONTROL]
    with shared_card.shared_card(1) as works:
        assert not works


def test_it_runs_where_only_what_training_needs_is_installed():
    absent = ("typer", "rich", "nbclient", "nbformat", "IPython", "peft", "matplotlib")
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({absent}))\n"
    code += "sys.argv = ['referee', '--help']\n"
    code += "runpy.run_module('lora_edu.lab.recording.referee', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--method" in done.stdout


def test_cards_of_the_same_letters_have_anchors_of_their_own():
    methods_of_all = {each.method for each in registered_entrants()}
    assert len({methods.anchor(method) for method in methods_of_all}) == len(methods_of_all)
    assert methods.anchor("LoRA+") == "lora-1"
