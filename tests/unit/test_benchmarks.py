"""The benchmarks: each runs on any machine, and what was recorded of peft_speed.py is what its raw numbers say."""

import hashlib
import importlib.util
import json
import re
import sys
from functools import cache
from statistics import median, quantiles

import pytest
import torch
import typer
from typer.testing import CliRunner

from lora_edu.counting.meta import meta_model
from lora_edu.files import data_path

RECORD = data_path("runs", "peft_speed.json")


@cache
def script(name):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, data_path().parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytestmark = [
    pytest.mark.recording,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture
def peft_speed(monkeypatch):
    """Calls peft_speed.py's command; what it sets in this process is put back."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("LORA_EDU_PROGRESS", "0")
    threads = torch.get_num_threads()
    app = typer.Typer()
    app.command()(script("peft_speed").main)
    yield lambda *arguments: CliRunner().invoke(app, list(arguments))
    torch.set_num_threads(threads)


def check(record):
    """A record of peft_speed.py holds together."""
    assert {"command", "date", "commit", "hardware", "seed", "environment"} <= record.keys()
    assert {"python", "torch", "transformers", "peft"} <= record["versions"].keys()
    for line in record["comparisons"]:
        assert all(len(seconds) == record["rounds"] for seconds in line["seconds"].values())
        for name, ratio in line["ratios"].items():
            ours, theirs = (line["seconds"][method] for method in name.split(" / "))
            found = [a / b for a, b in zip(ours, theirs, strict=True)]
            assert ratio["median"] == pytest.approx(median(found), rel=1e-2)  # the steps are rounded to 10 µs
            assert ratio["interval_95"][0] <= ratio["median"] <= ratio["interval_95"][1]
        for method, phases in line["phases"].items():
            whole = [sum(parts) for parts in zip(*phases.values(), strict=True)][record["warmup"] :]
            assert sum(whole) == pytest.approx(sum(line["seconds"][method]), rel=0.1)
        assert line["trainable"]["ours"] == line["trainable"]["peft"] == line["trainable"]["fast"]
        if not line["lora_dropout"]:  # both do the same work: equal losses from equal starts
            assert line["losses"]["ours"] == pytest.approx(line["losses"]["peft"], rel=1e-4)
            assert line["losses"]["fast"] == pytest.approx(line["losses"]["peft"], rel=1e-3)
            assert line["losses"]["ours"][-1] < line["losses"]["ours"][0]
        if line.get("use_dora"):  # by other operations than PEFT's
            assert line["operations"]["ours"]["numbers"] < line["operations"]["peft"]["numbers"]
        else:
            assert line["operations"]["ours"] == line["operations"]["peft"]
            assert line["operations"]["fast"]["numbers"] < line["operations"]["ours"]["numbers"]
        assert all(0 < size["before"] < size["peak"] for size in line["peak_memory"].values())


def test_peft_speed_runs_small(peft_speed, tmp_path, monkeypatch):
    out = tmp_path / "speed.json"
    first, *_, last, _ = script("peft_speed").COMPARISONS
    monkeypatch.setattr(script("peft_speed"), "COMPARISONS", [first, last])
    done = peft_speed("--quick", "--only", "bert", "--rounds", "2", "--out", str(out))
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    check(record)
    found = [(line["adapted"], line["lora_dropout"], list(line["seconds"])) for line in record["comparisons"]]
    assert found == [("q,v", 0.0, ["full", "ours", "peft", "fast"]), ("all-linear", 0.1, ["ours", "peft", "fast"])]
    assert "bert     q,v             0.0  ours / peft" in done.stdout
    assert done.stderr == ""
    other = record["comparisons"][0] | {"shape": "smollm2"}
    out.write_text(json.dumps(record | {"comparisons": [record["comparisons"][0], other]}))
    monkeypatch.setattr(script("peft_speed"), "COMPARISONS", [first])
    assert peft_speed("--quick", "--only", "bert", "--rounds", "2", "--out", str(out)).exit_code == 0
    again = json.loads(out.read_text())
    assert [line["shape"] for line in again["comparisons"]] == ["bert", "smollm2"]
    assert again["comparisons"][1] == other
    assert again["other_shapes"]["date"] == record["date"]
    assert again["comparisons"][0]["seconds"] != record["comparisons"][0]["seconds"]
    refused = peft_speed("--quick", "--only", "bert", "--rounds", "3", "--out", str(out))
    assert refused.exit_code == 2
    assert "other versions or settings" in refused.stderr.replace("\n", " ").replace("│", "")


def test_dora_runs_small_beside_lora(peft_speed, tmp_path):
    out = tmp_path / "dora.json"
    done = peft_speed("--dora", "--quick", "--rounds", "2", "--out", str(out))
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    check(record)
    (line,) = record["comparisons"]
    assert list(line["seconds"]) == ["lora", "ours", "peft", "fast"]
    assert line["trainable"]["ours"] - line["trainable"]["lora"] == 2 * (5 * 48 + 96) + 48  # a length for each output
    assert "fast / lora" in done.stdout


def test_different_work_is_refused(peft_speed):
    module = script("peft_speed")
    qv, linear = ({"shape": "bert", "adapted": adapted, "lora_dropout": 0.0} for adapted in ("q,v", "all-linear"))
    ours, theirs = module.Step(qv, "ours", quick=True), module.Step(linear, "peft", quick=True)
    with pytest.raises(ValueError, match="adapt different layers"):
        module.start_alike(ours.model, theirs.model)


@pytest.mark.parametrize("index", range(5))
def test_our_plain_step_does_what_pefts_does(index):
    """As many operations, of the same kinds and sizes: what the clock shows besides is Python and the machine."""
    module = script("peft_speed")
    found = {}
    for method in ("ours", "peft"):
        step = module.Step(module.COMPARISONS[index], method, quick=True)
        step()
        with module.Operations() as counted:
            step()
        found[method] = counted
    assert found["ours"].calls == found["peft"].calls
    assert found["ours"].numbers == found["peft"].numbers
    assert found["ours"].calls.total() > 300


def test_the_interval_of_a_median_holds_it_and_narrows():
    interval = script("peft_speed").interval_of_median
    few, many = [0.9, 1.0, 1.1], [0.9, 1.0, 1.1] * 40
    assert interval(few)[0] <= 1.0 <= interval(few)[1]
    assert interval(many)[1] - interval(many)[0] < interval(few)[1] - interval(few)[0]


def test_targets_are_judged_by_the_median():
    ratios = {"ours / peft": {"median": 1.02, "interval_95": [1.0, 1.05]}}
    ratios["ours / full"] = {"median": 0.9, "interval_95": [0.8, 0.95]}
    line = {"shape": "smollm2", "adapted": "all-linear", "lora_dropout": 0.0, "ratios": ratios, "peak_memory": {}}
    line["targets"] = script("peft_speed").targets(line)
    _, first, second, *_ = script("peft_speed").table({"comparisons": [line]})
    assert first.endswith("1.020  1.000–1.050  ≤ 1.03  met")
    assert second.endswith("0.900  0.800–0.950  ≤ 0.88  not met")


@pytest.mark.errors
def test_peft_speed_names_an_unknown_shape(peft_speed):
    done = peft_speed("--only", "gpt2")
    assert done.exit_code == 2
    assert "bert or smollm2" in done.stderr
    assert "--quick" in peft_speed("--help").stdout


@pytest.mark.parametrize("name", ["memory_7b", "memory_cases", "speed_7b", "loss_8b"])
def test_without_a_gpu_they_say_so_and_pass(name, monkeypatch, capsys, tmp_path):
    out = tmp_path / "none.json"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", str(out)])
    monkeypatch.setattr(script(name), "CUDA", False)
    script(name).main()
    said = capsys.readouterr().out
    assert said.startswith(f"{name} needs a GPU")
    assert len(said.splitlines()) == 1
    assert not out.exists()


def test_speed_7b_runs_on_a_toy_and_adds_to_its_record(monkeypatch, capsys, tmp_path):
    out = tmp_path / "toy.json"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("LORA_EDU_COMMIT", 40 * "a")

    def call(ways, rounds="2"):
        arguments = ["--toy", "--rounds", rounds, "--ways", ways, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["speed_7b.py", *arguments])
        script("speed_7b").main()
        return capsys.readouterr().out

    assert "2×16  fast" in call("full;peft;plain;fast")
    call("full;plain")
    before = out.read_bytes()
    assert call("full;plain") == "2×16 is there already, by this commit\n"
    assert out.read_bytes() == before
    assert "2×16  plain" in call("full;plain", rounds="3")  # measured anew, and in its place
    monkeypatch.setenv("LORA_EDU_COMMIT", 40 * "b")
    assert "2×16  plain" in call("full;plain", rounds="3")
    first, second = json.loads(out.read_text())["shapes"]
    assert (first["failed"], list(second["ways"])) == ({}, ["full", "plain"])
    ways = first["ways"]
    assert (
        ways["full"]["trainable"] > ways["plain"]["trainable"] == ways["fast"]["trainable"] == ways["peft"]["trainable"]
    )
    assert ways["fast"]["losses"] == pytest.approx(ways["plain"]["losses"], rel=1e-2)  # bfloat16
    ratios = [a / b for a, b in zip(ways["fast"]["steps_ms"], ways["full"]["steps_ms"], strict=True)]
    assert ways["fast"]["against_full"] == pytest.approx(median(ratios), rel=1e-2)
    reached = {name: way["share_of_ceiling"] * median(way["steps_ms"]) for name, way in ways.items()}
    assert reached["full"] / 6 == pytest.approx(reached["plain"] / 4, rel=2e-2)  # operations a weight and token
    assert reached["peft"] == pytest.approx(reached["fast"], rel=2e-2)


WORKER = """
import sys
print("a library says something", flush=True)
print('unsloth_step says {"trainable": 5, "peak": 7}', flush=True)
for number, line in enumerate(sys.stdin):
    assert line == "step\\n"
    if number == 2:
        sys.exit(3)
    print('unsloth_step says {"loss": %s}' % ("NaN" if number else 1.5), flush=True)
"""


def test_a_way_in_a_process_of_its_own_steps_when_it_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (worker := tmp_path / "worker.py").write_text(WORKER)
    step = script("unsloth_step").UnslothStep(
        tmp_path, torch.ones(2, 4, dtype=torch.long), r=4, bf16=True, worker=worker
    )
    assert (step.trainable, step.peak) == (5, 7)
    step(), step()
    assert step.losses[0] == 1.5
    assert step.losses[1].isnan()
    assert "a library says something" in capsys.readouterr().out
    for _ in range(2):  # in the step in which it ends, and in every later one
        with pytest.raises(ChildProcessError, match="ended with code 3"):
            step()
    step.close()


def test_a_way_whose_process_ends_fails_alone(toy_7b, monkeypatch, tmp_path):
    """It answers when it is made ready and once more in the warm-up, and ends while the steps are timed."""
    (worker := tmp_path / "worker.py").write_text(WORKER)
    speed_7b, unsloth_step = script("speed_7b"), script("unsloth_step")
    made = lambda folder, ids, r, bf16: unsloth_step.UnslothStep(folder, ids, r, bf16, worker)  # noqa: E731
    monkeypatch.setattr(speed_7b, "UnslothStep", made)
    monkeypatch.setattr(speed_7b, "installed", lambda: "0")
    _, (line,) = toy_7b("plain;unsloth")
    assert list(line["ways"]) == ["plain"]
    assert line["failed"]["unsloth"].startswith("ChildProcessError: Unsloth's process ended with code 3")


def test_unsloth_is_named_where_it_is_missing(toy_7b, monkeypatch, capsys):
    monkeypatch.setattr(script("speed_7b"), "installed", lambda: None)
    _, (line,) = toy_7b("plain;unsloth")
    assert line["failed"] == {"unsloth": "ModuleNotFoundError: unsloth is not installed"}
    assert list(line["ways"]) == ["plain"]
    assert line["machine"]["versions"]["unsloth"] is None


def test_a_line_is_there_only_if_the_same_code_answered_the_same_question_whole(tmp_path):
    speed_7b, out = script("speed_7b"), tmp_path / "record.json"
    machine = {"commit": 40 * "a", "hardware": "a GPU", "versions": {"torch": "2.11"}, "date": "2026-01-01"}
    line = {"batch": 1, "tokens": 512, "asked": ["full"], "rounds": 8, "failed": {}, "machine": machine}
    assert not speed_7b.is_there(line, out)
    speed_7b.add(line, out)
    assert speed_7b.is_there(line | {"machine": machine | {"date": "2026-01-02"}}, out)
    for other in ({"commit": 40 * "b"}, {"hardware": "another"}, {"versions": {"torch": "2.12"}}):
        assert not speed_7b.is_there(line | {"machine": machine | other}, out)
    for other in ({"batch": 4}, {"tokens": 256}, {"asked": ["full", "peft"]}, {"rounds": 9}):
        assert not speed_7b.is_there(line | other, out)
    for other in ({"failed": {"peft": "not installed"}}, {"machine": machine | {"commit": "unknown"}}):
        speed_7b.add(line | other, out)
        assert not speed_7b.is_there(line | other, out)


def test_two_ways_that_train_all_weights_share_their_moments(monkeypatch):
    """As they share the weights; adapters have moments of their own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    speed_7b = script("speed_7b")
    monkeypatch.setattr(speed_7b, "WAYS", {"full": {}, "full again": {}, "plain": {"lora": "ours"}})
    base = speed_7b.new_base(speed_7b.LlamaConfig(**speed_7b.TOY))
    steps, _, _ = speed_7b.prepare(base, list(speed_7b.WAYS), torch.ones(1, 4, dtype=torch.long))
    kept = {name: {state["exp_avg"].data_ptr() for state in step.optimizer.state.values()}
            for name, step in steps.items()}  # fmt: skip
    assert kept["full"] == kept["full again"]
    assert kept["plain"].isdisjoint(kept["full"])


def test_speed_7b_measures_several_shapes_and_outlives_a_way_that_fails(monkeypatch, capsys, tmp_path):
    """With many tokens the ways that keep the most memory are left out, unless they are asked for by name."""
    speed_7b, out = script("speed_7b"), tmp_path / "toy.json"
    large = {"lora": "ours", "fast": True, "capture": True, "large": True}
    ways = {"fast, captured": large, "full": {}, "full again": {}, "peft": {"lora": "peft"}}
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(speed_7b, "WAYS", ways)
    monkeypatch.setattr(speed_7b, "ALL_UP_TO", 16)
    monkeypatch.setattr(speed_7b, "peft", None)  # not installed
    arguments = ["--toy", "--shape", "1x16", "2x16", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["speed_7b.py", *arguments])
    speed_7b.main()
    first, second = json.loads(out.read_text())["shapes"]
    assert [(line["batch"], line["tokens"]) for line in (first, second)] == [(1, 16), (2, 16)]
    assert list(first["ways"]) == ["full", "full again", "fast, captured"]  # captures come last
    assert list(second["ways"]) == ["full", "full again"]
    for line in (first, second):
        assert line["failed"]["peft"].startswith("AttributeError")
        assert all(len(way["steps_ms"]) == 2 and way["compiled_graphs"] == 0 for way in line["ways"].values())
    assert "peft failed" in capsys.readouterr().out
    monkeypatch.setenv("LORA_EDU_COMMIT", 40 * "a")
    for _ in range(2):  # what failed is tried again
        speed_7b.main()
        assert "peft failed" in capsys.readouterr().out


@pytest.fixture
def toy_7b(monkeypatch, tmp_path):
    """Calls speed_7b.py on its toy, with a record of its own; gives (the record, the lines of it that are whole)."""
    out = tmp_path / "toy.json"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(script("speed_7b"), "peft", None)

    def call(ways, *more):
        arguments = ["--toy", "--rounds", "2", "--ways", ways, "--out", str(out), *more]
        monkeypatch.setattr(sys, "argv", ["speed_7b.py", *arguments])
        script("speed_7b").main()
        record = json.loads(out.read_text())
        return record, record["shapes"]

    call.out = out
    return call


def estimates(ways, batch, tokens):
    """speed_7b.py's estimates for the real shape, by way."""
    model = meta_model("llama-7b")
    return {name: script("speed_7b").estimate(model, script("speed_7b").WAYS[name], batch, tokens) for name in ways}


def test_speed_7b_s_estimates_are_those_of_its_record():
    """What each way took alone within 1 % (5 % for full fine-tuning, compiled), what all took within 6 %."""
    for line in json.loads(data_path("runs", "speed_7b.json").read_text(encoding="utf-8"))["shapes"]:
        if "note" in line:
            continue
        found = estimates(line["ways"], line["batch"], line["tokens"])
        for name, way in line["ways"].items():
            margin = 0.05 if name.startswith("full, compiled") else 0.01
            assert found[name].peak == pytest.approx(way["peak_bytes"], rel=margin), name
        together = script("speed_7b").together(found)
        assert 0.94 * line["device_used_bytes"] < together < line["device_used_bytes"]


@pytest.mark.parametrize(
    ("gib", "batch", "left_out"),
    [
        (139.8, 16, {}),
        (79.1, 1, {}),
        (79.1, 4, {}),
        (
            79.1,
            16,
            {
                "full": "needs about 86 GiB of 79",
                "full, compiled": "needs about 83 GiB beside the others of 79",
                "plain, compiled and captured": "needs about 80 GiB beside the others of 79",
                "fast, compiled and captured": "needs about 80 GiB beside the others of 79",
            },
        ),
        (47.5, 4, dict.fromkeys(["full", "full, compiled", "full, compiled and captured"], "needs about 50 GiB of 48")),
    ],
)
def test_speed_7b_leaves_out_what_does_not_fit(gib, batch, left_out, monkeypatch):
    speed_7b = script("speed_7b")
    monkeypatch.setattr(speed_7b, "capacity", lambda: gib * 2**30)
    names = [
        name
        for name, way in speed_7b.WAYS.items()
        if not way.keys() & {"mode", "extra"} and not (batch > 8 and "large" in way)
    ]
    chosen, skipped = speed_7b.that_fit(meta_model("llama-7b"), names, batch, 512)
    assert skipped == left_out
    assert chosen == [name for name in names if name not in left_out]


def test_speed_7b_keeps_full_fine_tuning_where_it_fits(monkeypatch):
    """The others are compared with it: on 95 GiB it stays, and captured ways go."""
    speed_7b = script("speed_7b")
    monkeypatch.setattr(speed_7b, "capacity", lambda: 95 * 2**30)
    names = ["fast, compiled", "fast, compiled and captured", "full"]
    assert speed_7b.that_fit(meta_model("llama-7b"), names, 16, 512)[0] == ["fast, compiled", "full"]


def test_speed_7b_records_what_it_leaves_out_and_keeps_the_rest(toy_7b, monkeypatch, capsys):
    speed_7b = script("speed_7b")
    base = speed_7b.new_base(speed_7b.LlamaConfig(**speed_7b.TOY))
    full, plain = (speed_7b.together({name: speed_7b.estimate(base, way, 2, 16)})
                   for name, way in speed_7b.WAYS.items() if name in ("full", "plain"))  # fmt: skip
    monkeypatch.setattr(speed_7b, "capacity", lambda: (full + plain) / 2)
    monkeypatch.setenv("LORA_EDU_COMMIT", 40 * "a")
    record, (line,) = toy_7b("full;plain")
    assert list(line["ways"]) == ["plain"]
    assert line["asked"] == ["full", "plain"]
    assert line["failed"] == {}
    assert list(line["skipped"]) == ["full"]
    assert line["skipped"]["full"].startswith("needs about 0 GiB of 0")
    assert all(way["against_full"] is None and len(way["steps_ms"]) == 2 for way in line["ways"].values())
    assert "unfinished" not in record
    assert "full left out: needs about" in capsys.readouterr().out
    toy_7b("full;plain")
    assert "is there already" in capsys.readouterr().out  # what does not fit here will not fit next time
    monkeypatch.setattr(speed_7b, "capacity", lambda: 1)
    _, lines = toy_7b("full;plain", "--rounds", "3")
    assert lines[-1]["ways"] == {}
    assert list(lines[-1]["skipped"]) == ["full", "plain"]


@pytest.mark.parametrize("call", [1, 5, 6])
def test_speed_7b_outlives_a_way_that_runs_out_of_memory(call, toy_7b, monkeypatch):
    """While it is made ready (three steps and one more), in the first round, and in the second."""
    speed_7b = script("speed_7b")
    eager, calls = speed_7b.Step.eager, []

    def short(step):
        if step.model.runs_short:
            calls.append(step)
            if len(calls) == call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has 79 GiB")
        return eager(step)

    def marked(base):
        model = copied(base)
        model.runs_short = False
        return model

    def fused(model, *arguments, fast, **options):
        model.runs_short = fast
        return injected(model, *arguments, fast=fast, **options)

    copied, injected = speed_7b.on_the_same_weights, speed_7b.inject
    monkeypatch.setattr(speed_7b, "on_the_same_weights", marked)
    monkeypatch.setattr(speed_7b, "inject", fused)
    monkeypatch.setattr(speed_7b.Step, "eager", short)
    _, (line,) = toy_7b("full;fast;plain")
    assert list(line["ways"]) == ["full", "plain"]
    assert line["failed"] == {"fast": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."}
    assert all(len(way["steps_ms"]) == 2 and way["against_full"] for way in line["ways"].values())


def test_speed_7b_outlives_all_its_ways(toy_7b, monkeypatch):
    def none(step):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(script("speed_7b").Step, "eager", none)
    _, (line,) = toy_7b("full;plain")
    assert line["ways"] == {}
    assert list(line["failed"]) == ["full", "plain"]


def test_speed_7b_writes_after_every_way_how_far_it_has_come(toy_7b, monkeypatch):
    """The lines that are whole stay as they are, whatever ends the run."""
    speed_7b = script("speed_7b")
    _, whole = toy_7b("full;plain")

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    seen = []
    written = speed_7b.add_unfinished
    monkeypatch.setattr(
        speed_7b, "add_unfinished", lambda line, out: (written(line, out), seen.append([*line["ready"]]))
    )
    monkeypatch.setattr(speed_7b, "paired_times", killed)
    with pytest.raises(KeyboardInterrupt):
        toy_7b("full;plain;fast")
    assert seen == [["full"], ["full", "plain"], ["full", "plain", "fast"]]
    record = json.loads(toy_7b.out.read_text())
    assert record["shapes"] == whole
    begun = record["unfinished"]
    assert (begun["asked"], list(begun["ready"]), begun["failed"]) == (["full", "plain", "fast"], seen[-1], {})
    assert {"command", "machine", "rounds", "skipped"} <= begun.keys()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [*sys.path])
    record, lines = toy_7b("full;plain;fast")
    assert "unfinished" not in record
    assert len(lines) == 2


def check_load(record):
    """A record of server_load.py holds together: all is right, and the figures are what the times say."""
    assert {"command", "date", "commit", "hardware", "versions", "seed", "load_average"} <= record.keys()
    assert {"python", "torch", "transformers", "fastapi", "uvicorn"} <= record["versions"].keys()
    assert record["right"] == {"as_alone": record["requests"], "as_generate": record["greedy"]}
    assert record["greedy_that_differ_between_all_models"] >= 0.8 * record["greedy"]  # so a mix-up would show
    assert record["burst"]["right"] == record["burst"]["requests"]
    assert record["burst"]["refused"] > 0
    assert 2 <= record["largest_batch"] <= record["max_batch"]
    rounds = record["rounds"]
    assert sum(sum(each["batches"]) for each in rounds) == record["requests"]
    assert all(each["mixed_batches"] > 0 for each in rounds)
    alone, crowd = ([seconds for each in rounds for seconds in each[name]] for name in ("alone", "together"))
    assert len(alone) == len(crowd) == record["requests"]
    figures, wall = record["figures"], sum(each["wall"] for each in rounds)
    assert figures["requests_per_second"] == pytest.approx(len(crowd) / wall, abs=0.06)
    assert figures["throughput"] == pytest.approx(sum(alone) / wall, abs=0.01)
    assert figures["latency_median"] == pytest.approx(median(crowd) / median(alone), abs=0.01)
    assert figures["latency_95"] == pytest.approx(quantiles(crowd, n=20)[-1] / median(alone), abs=0.01)
    assert figures["first_piece_median"] <= figures["latency_median"] <= figures["latency_95"]


def test_the_server_mixes_nothing_up_under_load(monkeypatch, capsys, tmp_path):
    out = tmp_path / "load.json"
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = ["--requests", "24", "--threads", "12", "--rounds", "2", "--burst", "16", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["server_load.py", *small])
    threads = torch.get_num_threads()
    script("server_load").main()
    torch.set_num_threads(threads)
    check_load(json.loads(out.read_text(encoding="utf-8")))
    assert "24 of 24 answers are those that the same question had alone" in capsys.readouterr().out


def test_the_recorded_load_holds_together():
    path = data_path("runs", "server_load.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    check_load(record)
    assert record["requests"] >= 300
    assert record["largest_batch"] == record["max_batch"]
    assert record["figures"]["throughput"] > 2
    assert hashlib.sha256(path.read_bytes()).hexdigest() in data_path("README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not RECORD.exists(), reason="data/runs/peft_speed.json is not recorded yet")
def test_the_recorded_speeds_hold_together():
    record = json.loads(RECORD.read_text())
    check(record)
    assert record["rounds"] >= 20
    shapes = [(line["shape"], line["adapted"], line["lora_dropout"]) for line in record["comparisons"]]
    bert = [("bert", adapted, dropout) for dropout in (0.0, 0.1) for adapted in ("q,v", "all-linear")]
    assert shapes == [*bert, ("smollm2", "all-linear", 0.0)]
    assert record["comparisons"][-1]["weights"] == "pretrained"
    assert record["comparisons"][-1]["trainable"] == {"full": 134_515_008} | dict.fromkeys(
        ("ours", "peft", "fast"), 2_442_240
    )
    readme = data_path("README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(RECORD.read_bytes()).hexdigest() in re.findall(r"[0-9a-f]{64}", readme)


def test_the_recorded_dora_holds_together():
    path = data_path("runs", "dora_speed.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    check(record)
    assert record["rounds"] >= 20
    (line,) = record["comparisons"]
    assert (line["shape"], line["adapted"], line["lora_dropout"], line["use_dora"]) == ("bert", "all-linear", 0.0, True)
    assert line["targets"] == {"ours / peft": 0.80, "fast / peft": 0.70}
    assert all(line["ratios"][name]["median"] <= limit for name, limit in line["targets"].items())
    assert hashlib.sha256(path.read_bytes()).hexdigest() in data_path("README.md").read_text(encoding="utf-8")


def test_the_recorded_ways_hold_together():
    """What the file concludes follows from its timed steps."""
    path = data_path("runs", "speed_7b.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert hashlib.sha256(path.read_bytes()).hexdigest() in data_path("README.md").read_text(encoding="utf-8")
    now = [line for line in record["shapes"] if "note" not in line]
    assert [(line["batch"], line["tokens"]) for line in now] == [(4, 512), (1, 512), (16, 512), (16, 512)]
    for line in record["shapes"]:
        ways, full = line["ways"], line["ways"]["full"]
        assert line["failed"] == {}
        assert list(ways) == [name for name in line["asked"] if name not in line.get("skipped", {})]
        assert set(ways) <= script("speed_7b").WAYS.keys()
        assert re.fullmatch("[0-9a-f]{40}", line["machine"]["commit"])
        weights = full["trainable"] - 32_000 * 4096  # the input embedding is a look-up, no product
        for name, way in ways.items():
            assert way["trainable"] == (full["trainable"] if "full" in name else 39_976_960)
            ratios = [a / b for a, b in zip(way["steps_ms"], full["steps_ms"], strict=True)]
            assert way["against_full"] == pytest.approx(median(ratios), abs=1e-3)
            flops = (6 if "full" in name else 4) * weights * line["batch"] * line["tokens"]
            share = flops / (1e9 * median(way["steps_ms"]) * max(line["ceiling_tflops"]))
            assert way["share_of_ceiling"] == pytest.approx(share, rel=1e-3)
            if (
                "full" not in name and name != "peft, fp32 adapter"
            ):  # no more than PEFT's, but for 0.2 GiB that a graph keeps
                assert way["peak_bytes"] <= ways["peft"]["peak_bytes"] + 0.2 * 2**30


def test_memory_cases_runs_on_a_toy(monkeypatch, tmp_path):
    out = tmp_path / "toy.json"
    monkeypatch.setattr(sys, "path", [*sys.path, str(data_path().parent / "benchmarks")])
    monkeypatch.setattr(sys, "argv", ["memory_cases.py", "--toy", "--out", str(out)])
    script("memory_cases").main()
    shipped = json.loads(data_path("runs", "memory_cases.json").read_text(encoding="utf-8"))
    same = ("method", "checkpointing", "autocast")
    lines = [[[run[name] for name in same] for run in each["runs"]] for each in (json.loads(out.read_text()), shipped)]
    assert lines[0] == lines[1]


def test_the_recorded_cases_are_those_that_the_readme_names():
    path = data_path("runs", "memory_cases.json")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in data_path("README.md").read_text(encoding="utf-8")
    message = json.loads(path.read_text(encoding="utf-8"))["out_of_memory"]["message"]
    assert message.startswith("CUDA out of memory. Tried to allocate 256.00 MiB.")


def test_loss_8b_runs_on_a_toy(monkeypatch, capsys, tmp_path):
    out = tmp_path / "toy.json"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["loss_8b.py", "--toy", "--rounds", "1", "--out", str(out)])
    loss_8b = script("loss_8b")
    monkeypatch.setattr(loss_8b, "LigerFusedLinearCrossEntropyLoss", None)
    monkeypatch.setattr(loss_8b.torch, "compile", lambda function, **options: function)
    loss_8b.main()
    assert "pieces of 512" in capsys.readouterr().out
    ways = json.loads(out.read_text(encoding="utf-8"))["ways"]
    assert {line["loss"] for line in ways.values()} == {ways["whole"]["loss"]}


def test_the_recorded_loss_in_pieces_needs_a_third_and_no_more_time():
    path = data_path("runs", "loss_8b.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert hashlib.sha256(path.read_bytes()).hexdigest() in data_path("README.md").read_text(encoding="utf-8")
    ways = record["ways"]
    for line in ways.values():
        ratios = [a / b for a, b in zip(line["steps_ms"], ways["whole"]["steps_ms"], strict=True)]
        assert line["against_whole"] == pytest.approx(median(ratios), abs=1e-3)
    assert ways["pieces of 512"]["activations_bytes"] <= 0.35 * ways["whole"]["activations_bytes"]
    assert ways["pieces of 512"]["against_whole"] <= 1.03


def test_recorded_float32_adapters_cost_little_in_the_fused_layer():
    path = data_path("runs", "speed_7b_fp32.json")
    lines = json.loads(path.read_text(encoding="utf-8"))["shapes"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() in data_path("README.md").read_text(encoding="utf-8")
    half, whole = "fast, compiled and captured", "fast, fp32 adapter, compiled and captured"
    found = [line["ways"] for line in lines if whole in line["ways"]]
    assert len(found) == 6
    for ways in found:
        assert median(a / b for a, b in zip(ways[whole]["steps_ms"], ways[half]["steps_ms"], strict=True)) <= 1.10


def test_recorded_unsloth_is_slower_at_every_shape_and_takes_about_our_memory():
    path = data_path("runs", "speed_7b_unsloth.json")
    lines = json.loads(path.read_text(encoding="utf-8"))["shapes"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() in data_path("README.md").read_text(encoding="utf-8")
    ours, seen = "fast, compiled and captured", []
    for line in lines:
        assert (line["failed"], line["skipped"]) == ({}, {})
        for name in [name for name in line["ways"] if name.startswith("unsloth")]:
            steps, theirs = line["ways"][ours]["steps_ms"], line["ways"][name]["steps_ms"]
            seen.append((line["batch"], name))
            assert median(a / b for a, b in zip(steps, theirs, strict=True)) <= 0.95
            assert line["ways"][ours]["peak_bytes"] == pytest.approx(line["ways"][name]["peak_bytes"], rel=0.05)
    assert sorted(seen) == [(batch, name) for batch in (1, 4, 16) for name in ("unsloth", "unsloth, fp32 adapter")]


def test_the_page_on_other_tools_has_the_ratios_to_unsloth_of_the_record():
    lines = json.loads(data_path("runs", "speed_7b_unsloth.json").read_text(encoding="utf-8"))["shapes"]
    page = (data_path().parent / "book" / "other_tools.md").read_text(encoding="utf-8")
    captured, rows, peaks = "fast, compiled and captured", [], []
    for ours, name in (
        (captured, "unsloth"),
        (captured, "unsloth, fp32 adapter"),
        ("fast, compiled", "unsloth"),
    ):
        found = {batch: "not run" for batch in (1, 4, 16)}
        for ways, batch in ((line["ways"], line["batch"]) for line in lines):
            if ours in ways and name in ways:
                steps = zip(ways[ours]["steps_ms"], ways[name]["steps_ms"], strict=True)
                found[batch] = f"{median(a / b for a, b in steps):.2f}"
                peaks.append(ways[ours]["peak_bytes"] / ways[name]["peak_bytes"])
        rows.append(f"| {' | '.join(found.values())} |")
    assert [row for row in rows if row not in page] == []
    assert f"between {min(peaks):.2f} and {max(peaks):.2f} of Unsloth's" in page


# Four bits


@pytest.fixture
def nf4_speed(monkeypatch):
    """Calls nf4_speed.py with tiny shapes; what it compiles is run as it is."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = script("nf4_speed")
    monkeypatch.setattr(module.torch, "compile", lambda function, **options: function)

    def call(out, *more):
        monkeypatch.setattr(sys, "argv", ["nf4_speed.py", "--toy", "--rounds", "2", "--out", str(out), *more])
        module.main()
        return json.loads(out.read_text())

    yield module, call
    torch._dynamo.reset()


def test_nf4_speed_runs_small(nf4_speed, tmp_path, monkeypatch, capsys):
    module, call = nf4_speed
    monkeypatch.setattr(module, "there", lambda: False)
    out = tmp_path / "nf4.json"
    record = call(out, "--ways", "bitsandbytes;ours;16 bits")
    assert "there is nothing to compare with" in capsys.readouterr().out
    assert list(record["dequantise"]["ways"]) == ["copy", "ours", "ours, in the layer"]
    line = record["dequantise"]
    numbers = 4 * 64 * 64 + 3 * 64 * 128
    assert line["numbers"] == numbers
    assert 2.5 < line["bytes"] / numbers < 2.54  # four bits and a little are read, sixteen written
    ours, copy = line["ways"]["ours"], line["ways"]["copy"]
    assert copy["of_limit"] == 1
    expected = line["bytes"] / line["bytes_per_second"] / (1e-3 * median(ours["ms"]))
    assert ours["of_limit"] == pytest.approx(expected, rel=0.02, abs=1e-3)
    (line,) = record["steps"]
    assert list(line["ways"]) == ["ours", "16 bits"]
    assert not line["failed"]
    for way in line["ways"].values():
        assert way["trainable"] == 2 * 16 * (4 * (64 + 64) + 3 * (64 + 128))
        assert len(way["steps_ms"]) == 2
        assert way["losses"][-1] < way["losses"][0] + 0.01
    assert [(each["shape"], each["way"]) for each in record["memory"]] == [(s, "ours") for s in ("7b", "13b", "70b")]
    for part in (record["dequantise"], *record["steps"], *record["memory"]):
        assert {"commit", "hardware", "versions"} <= part["machine"].keys()
        assert part["command"].startswith("python benchmarks/nf4_speed.py --toy")
    again = call(out, "--parts", "memory", "--shapes", "70b")
    assert again["steps"] == record["steps"]
    assert [each["shape"] for each in again["memory"]] == ["7b", "13b", "70b"]
    assert again["memory"][0] == record["memory"][0]
    assert "failed" not in again["memory"][2]


def test_nf4_speed_beside_bitsandbytes(nf4_speed, tmp_path):
    pytest.importorskip("bitsandbytes")
    _, call = nf4_speed
    record = call(tmp_path / "nf4.json", "--ways", "bitsandbytes;bitsandbytes, our adapters;ours", "--shapes", "7b")
    assert record["dequantise"]["largest_difference"]["bitsandbytes"] < 1e-2  # scales that are one level apart
    (line,) = record["steps"]
    assert not line["failed"]
    assert line["ways"]["ours"]["against"]["bitsandbytes"] > 0
    losses = [way["losses"] for way in line["ways"].values()]
    assert losses[0] == pytest.approx(losses[2], abs=0.02)
    assert [each["way"] for each in record["memory"]] == ["ours", "bitsandbytes"]
    assert "failed" not in record["memory"][1]


def test_nf4_speed_needs_a_gpu_and_names_its_ways(nf4_speed, tmp_path, monkeypatch, capsys):
    module, call = nf4_speed
    monkeypatch.setattr(module, "CUDA", False)
    with pytest.raises(SystemExit):
        call(tmp_path / "nf4.json", "--ways", "our")
    assert "no way 'our'; there are: bitsandbytes; " in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["nf4_speed.py"])
    module.main()
    assert "needs a GPU and found none" in capsys.readouterr().out
