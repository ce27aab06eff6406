"""Two processes that train together give what one gives: losses, adapters, records. Over gloo, on the CPU."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import distributed_runs
import pytest
import torch
from safetensors.torch import load_file

from lora_edu.files import data_path
from lora_edu.lab import distributed, training
from lora_edu.lab.distributed import copy_to_shard, count_targets, split_batch
from lora_edu.lab.recording import experiments, full_runs, pool, sweeps

TIMEOUT = 280  # seconds; ten times what it takes on two busy cores


def launched(config, *command):
    """The output of two processes, started as a learner would, on the CPU even where there is a GPU."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", data_path("accelerate", config)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments = list(map(str, [*accelerate, *command]))
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:  # it ends the processes that it started when it is asked to end, not when killed
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


# Who takes what


def rows_of(*labels):
    return [{"input_ids": list(range(len(each))), "labels": each} for each in labels]


def test_what_is_asked():
    assert count_targets(rows_of([7, 8, 9], [-100, -100, 5], [-100, -100])) == 3  # a first token is never predicted
    assert count_targets([{"labels": 3}, {"labels": 0}, {"labels": -100}]) == 2


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_are_disjoint_and_their_factors_give_the_mean_over_all_tokens(processes):
    rows = rows_of([0, 1, 1], [0, 1, 1, 1, 1], [0, 1], [-100, -100, 1])
    shares = [split_batch(rows, index, processes) for index in range(processes)]
    assert sorted(map(id, rows)) == sorted(id(row) for own, _ in shares for row in own)
    losses = {id(row): 10.0**i for i, row in enumerate(rows)}  # of each token in that row
    means = [sum(losses[id(row)] * count_targets([row]) for row in own) / count_targets(own) for own, _ in shares]
    average = sum(mean * factor for mean, (_, factor) in zip(means, shares, strict=True)) / processes
    assert average == pytest.approx(sum(losses[id(row)] * count_targets([row]) for row in rows) / count_targets(rows))


def test_a_share_that_asks_for_nothing_weighs_nothing():
    rows = rows_of([-100, -100], [0, 1, 1], [-100, -100, -100], [-100, 1])
    own, factor = split_batch(rows, 0, 2)
    assert (own, factor) == ([rows[1]], 0)
    assert split_batch(rows, 1, 2) == ([rows[1], rows[3]], 2)
    assert split_batch(rows[:1], 0, 1) == (rows[:1], 1)  # nobody asks for anything: NaN, as it was


@pytest.mark.errors
@pytest.mark.parametrize(("batch_size", "way_out"), [(3, "--num_processes 3"), (1, "--num_processes 1")])
def test_fewer_rows_than_processes(monkeypatch, batch_size, way_out):
    four = SimpleNamespace(process_index=0, num_processes=4)
    monkeypatch.setattr(training, "new_accelerator", lambda: four)
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} for 4 processes.*{way_out}"):
        training.train(torch.nn.Linear(2, 2), rows_of([0, 1]), batch_size=batch_size)


@pytest.mark.errors
def test_the_first_version_of_fsdp_is_refused():
    old = SimpleNamespace(distributed_type=distributed.DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ValueError, match="fsdp_version: 1: train needs 2"):
        distributed.shards(old)


def test_the_copy_to_shard_shares_what_is_frozen():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model.add_module("tied", model[0])
    copy = copy_to_shard(model)
    assert copy[0].weight is not model[0].weight
    assert copy[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert copy[1].weight.data_ptr() != model[1].weight.data_ptr()
    assert copy.tied is copy[0]
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in model.parameters()]


# Which device

CUDA, MPS = torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(
    ("run", "launched", "found", "on_the_cpu"),
    [
        ("quick", False, CUDA, True),  # stored outputs are the CPU's, wherever they are compared
        ("quick", False, MPS, True),
        ("full", False, CUDA, False),
        ("full", False, MPS, False),
        ("full", False, None, False),  # Accelerate finds the CPU by itself
        ("quick", True, CUDA, False),  # whoever launches several processes means the GPUs
        ("quick", True, MPS, True),
        ("full", True, None, True),
    ],
)
def test_a_quick_run_stays_on_the_cpu(monkeypatch, run, launched, found, on_the_cpu):
    told = []
    monkeypatch.setenv("LORA_EDU_RUN", run)
    monkeypatch.setenv("LOCAL_RANK", "0") if launched else monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(distributed, "Accelerator", lambda cpu: told.append(cpu))
    monkeypatch.setattr(distributed, "PartialState", lambda cpu: told.append(cpu))
    distributed.new_accelerator()
    distributed.process_state()
    assert told == [on_the_cpu, on_the_cpu]


@pytest.mark.parametrize(("home", "warns"), [("cuda:0", True), ("cpu", False), ("meta", False)])
def test_a_model_on_a_gpu_is_told_that_it_trains_on_the_cpu(home, warns):
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device(home))] * 2)
    on_the_cpu, told = SimpleNamespace(device=torch.device("cpu")), pytest.warns(UserWarning, match="LORA_EDU_RUN=full")
    with told if warns else contextlib.nullcontext():
        assert distributed.home_device(model, on_the_cpu) == torch.device(home)


# Two processes and one


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same runs in one process (here), and launched in two: whole models (DDP), and shards of them (FSDP)."""
    there = {name: tmp_path_factory.mktemp(name) for name in ("one", "ddp", "fsdp")}
    launched("fsdp.yaml", distributed_runs.__file__, there["ddp"], there["fsdp"])
    for case in [*distributed_runs.RUNS, "dropout"]:
        distributed_runs.run(case, there["one"])
    return there


def read(folder, case, index):
    history, more = json.loads((folder / f"{case} {index}.json").read_text(encoding="utf-8"))
    return history, more, load_file(folder / f"{case} {index}.safetensors")


@pytest.mark.parametrize("case", distributed_runs.RUNS)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one(folders, how, case):
    history, more, weights = read(folders["one"], case, 0)
    first, second = (read(folders[how], case, index) for index in (0, 1))
    assert first[0] == second[0]  # every process has the same history, and the same weights to the last bit
    assert all(torch.equal(first[2][name], second[2][name]) for name in weights)
    found, seen, theirs = first
    assert found["train_loss"] == pytest.approx(history["train_loss"], rel=1e-5)
    for name, losses in history["eval_loss"].items():
        assert found["eval_loss"][name] == pytest.approx(losses, rel=1e-5)
    for name in ("steps", "eval_steps", "best_step", "stopped_early"):
        assert found[name] == history[name]
    assert theirs.keys() == weights.keys()
    # The losses are computed in float32, the sums in another order, and AdamW divides a gradient by its own size: where
    # it is near zero, its rounding shows. A step is 1e-3 and more, so 2e-5 tells one that was left out or doubled.
    for name, weight in weights.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=2e-5)
    if case == "lora":
        (loss, text), (again,) = more
        assert seen == [[pytest.approx(loss, rel=1e-5), text], [pytest.approx(again, rel=1e-5)]]
    if case == "stopped":
        assert history["stopped_early"]
        assert seen == (more if how == "ddp" else [])  # with FSDP a copy of the module saw them


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_saved_adapter_is_the_one_of_one_process(folders, how):
    files = {name: load_file(folders[name] / "adapter 0" / "adapter_model.safetensors") for name in ("one", how)}
    assert files["one"].keys() == files[how].keys()
    for name, tensor in files["one"].items():
        torch.testing.assert_close(files[how][name], tensor, rtol=1e-4, atol=2e-5)
    configs = [(folders[name] / "adapter 0" / "adapter_config.json").read_bytes() for name in ("one", how)]
    assert configs[0] == configs[1]


def test_each_process_draws_its_own_dropout(folders):
    (_, zeros), (_, others) = (read(folders["ddp"], "dropout", index)[1] for index in (0, 1))
    assert zeros == read(folders["one"], "dropout", 0)[1][1]  # the main process draws what one process would
    assert zeros != others


# Shards of an injected model, looked after by hand


def test_a_sharded_model(tmp_path):
    """In a process of its own, which is a group of one."""
    script = Path(__file__).with_name("sharded_model.py")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["listed", "switched", "disabled", "mixed", "called", "saved", "refused"]


# A sweep

JOBS = [("few", {"steps": 3, "rows": 8, "r": 2, "seed": seed, "targets": ["q_proj"]}) for seed in range(3)]
CHILD = """
import sys
from pathlib import Path
from lora_edu.lab.recording import experiments, full_runs, sweeps

whole = experiments._loaded
experiments._loaded = lambda *names: (whole(*names)[0], {{name: rows[:16] for name, rows in whole(*names)[1].items()}})
sweeps.SWEEPS["few"] = lambda: {jobs!r}
sys.argv[1:1] = ["few", "--out"]
full_runs.main()
"""


def test_two_processes_go_on_with_what_one_began(tmp_path, monkeypatch):
    """The record of a command that was killed after one run, in one process."""
    base, splits = experiments._loaded("tiny", "devils_dictionary")
    few = base, {name: rows[:16] for name, rows in splits.items()}
    monkeypatch.setattr(experiments, "_loaded", lambda *names: few)
    monkeypatch.setitem(sweeps.SWEEPS, "few", lambda: JOBS)
    alone = [{"job": {"part": part} | job, "machine": 0} | experiments.run(job) for part, job in JOBS]
    out, script = tmp_path / "few.json", tmp_path / "child.py"
    record = full_runs._record("few", out)
    pool.here(record)
    pool.write(out, record | {"runs": alone[:1]})
    script.write_text(CHILD.format(jobs=JOBS), encoding="utf-8")
    output = launched("ddp.yaml", script, out)
    assert output.count("complete") == 1  # only the main process speaks
    after = json.loads(out.read_text(encoding="utf-8"))
    assert after["runs"][0] == alone[0]
    assert list(map(key, after["runs"])) == list(map(key, alone))
    assert [line["machine"] for line in after["runs"]] == [0, 1, 1]
    assert [machine["world_size"] for machine in after["machines"]] == [1, 2]
    for line, expected in zip(after["runs"], alone, strict=True):
        assert line["train_loss"] == pytest.approx(expected["train_loss"], abs=2e-4)  # rounded to four decimals
        assert line["test"] == pytest.approx(expected["test"], abs=2e-4)
    assert [path.name for path in tmp_path.glob("few*")] == ["few.json"]


def key(line):
    return json.dumps(line["job"], sort_keys=True)


@pytest.fixture
def led(monkeypatch, tmp_path):
    """The main process's part, alone: what it tells the others is noted."""
    said = []
    monkeypatch.setattr(full_runs, "process_state", lambda: SimpleNamespace(num_processes=2, is_main_process=True))
    monkeypatch.setattr(full_runs, "broadcast_from_main", lambda value: said.append(value) or value)
    monkeypatch.setattr(full_runs, "settle", lambda: None)
    monkeypatch.setattr(full_runs, "_do", lambda job: {"test": 1.0})
    monkeypatch.setitem(sweeps.SWEEPS, "few", lambda: JOBS)
    return SimpleNamespace(said=said, out=tmp_path / "few.json")


def test_the_main_process_says_which_run_is_next_and_when_time_is_up(led, monkeypatch):
    clock = iter([0.0, 1.0, 61.0])
    for module in (pool, full_runs):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert not full_runs.full_run("few", led.out, minutes=1)
    jobs = [{"part": part} | job for part, job in JOBS]
    assert led.said == [jobs[0], False]
    for module in (pool, full_runs):
        monkeypatch.setattr(module, "time", time)
    led.said.clear()
    assert full_runs.full_run("few", led.out)
    assert led.said == [*jobs[1:], True]
    led.said.clear()
    assert full_runs.full_run("few", led.out)  # the others wait to hear that nothing is left
    assert led.said == [True]


@pytest.mark.errors
def test_a_run_that_fails_is_named(led, monkeypatch):
    def fail(job):
        raise MemoryError("the GPU is full")

    monkeypatch.setattr(full_runs, "_do", fail)
    with pytest.raises(RuntimeError, match=r"MemoryError: the GPU is full; its job is .*the same command goes on"):
        full_runs.full_run("few", led.out)


@pytest.mark.errors
def test_processes_and_launch_exclude_each_other(led):
    with pytest.raises(ValueError, match=r"processes=3 under accelerate launch: its 2 processes do each run together"):
        full_runs.full_run("few", led.out, processes=3)


def test_workers_take_the_gpus_in_turn(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("LORA_EDU_PROGRESS", "0")
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
    started = pool.multiprocessing.Value("i", 0)
    for _ in range(3):
        pool.settle(started)
    pool.settle()  # a process of accelerate launch keeps its own
    assert taken == [0, 1, 0]
