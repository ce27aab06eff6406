"""Bytes, operations and stopwatches of lesson 06: the ledger's figures, autograd's own count, a recorded GPU run."""

import json
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lora_edu import LoraConfig, inject
from lora_edu.counting.activations import INPUT_OF, Training, activation_bytes, block_activations
from lora_edu.counting.flops import cost, rule_flops, step_flops, training_hours
from lora_edu.counting.measure import PairedTimes, paired_times, peak_memory, saved_bytes
from lora_edu.counting.memory import RECIPES, MemoryTable, find_recipe, memory_table, training_memory
from lora_edu.counting.meta import load_config, meta_model
from lora_edu.files import data_path

QV, ALL = ["q_proj", "v_proj"], list(INPUT_OF)
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}


# Memory of the states: the published arithmetic, in GB, to the printed digits.
@pytest.mark.parametrize(
    ("model", "weights", "bf16", "moments", "mixed"),
    [
        ("llama-7b", "13.48", "53.9", "80.9", "107.8"),
        ("llama-13b", "26.03", "104.1", "156.2", "208.3"),
        ("llama-65b", "130.57", "522.3", "783.4", "1044.6"),
        ("llama-2-70b", "137.95", "551.8", "827.7", "1103.6"),
    ],
)
def test_full_fine_tuning(model, weights, bf16, moments, mixed):
    rows = {row.precision: row for row in memory_table(model, ["full"], activations=False).rows}
    assert f"{rows['bf16'].base / 1e9:.2f}" == weights
    assert [f"{rows[name].states / 1e9:.1f}" for name in ("bf16", "fp32-moments", "mixed")] == [bf16, moments, mixed]
    assert rows["fp32"].states == rows["mixed"].states


@pytest.mark.parametrize(
    ("model", "targets", "r", "expected"),
    [
        ("llama-7b", QV, 8, "13.54"),
        ("llama-7b", "all-linear", 64, "16.04"),
        ("llama-65b", QV, 8, "130.91"),
        ("llama-65b", "all-linear", 64, "143.36"),
    ],
)
def test_lora_on_a_bf16_base(model, targets, r, expected):
    estimate = training_memory(model, "lora", "fp32-adapter", r=r, target_modules=targets, activations=False)
    assert f"{estimate.states / 1e9:.2f}" == expected
    assert estimate.states - estimate.base == 16 * estimate.trainable


@pytest.mark.parametrize(("model", "expected"), [("llama-7b", "3.87"), ("llama-13b", "7.20"), ("llama-65b", "34.5")])
def test_four_bit_base(model, expected):
    estimate = training_memory(model, "qlora", "nf4-dq", activations=False)
    assert f"{estimate.base / 1e9:.{len(expected.split('.')[1])}f}" == expected
    assert training_memory(model, "qlora", "nf4", activations=False).base > estimate.base
    assert find_recipe("qlora", "nf4-dq").base_bits == pytest.approx(4.127, abs=5e-4)


def test_a_table_names_its_model_and_every_recipe():
    text = str(memory_table("smollm2-135m"))
    assert text.startswith("smollm2-135m: 134,515,008 parameters")
    assert len(text.splitlines()) == 2 + len(RECIPES)
    assert "peak" in text.splitlines()[1]
    assert str(memory_table("gpt2", activations=False)).splitlines()[1].endswith("sum")
    assert isinstance(memory_table("gpt2", ["lora"], activations=False), MemoryTable)


def test_more_of_anything_never_takes_less():
    def peak(**options):
        settings = {"target_modules": "all-linear", "batch": 2, "tokens": 128} | options
        return training_memory("llama-7b", **settings).peak

    assert peak() < peak(batch=3) < peak(batch=8)
    assert peak() < peak(tokens=129)
    assert peak(r=1) < peak(r=64)
    assert peak(checkpointing=True) < peak()
    assert peak(precision="bf16") < peak(precision="fp32-adapter") < peak(precision="fp32")
    assert peak() < peak(dropout=True)
    assert peak(target_modules=QV) < peak()


def test_the_peak_holds_the_larger_of_gradients_and_activations():
    short = training_memory("llama-7b", "full", "bf16", batch=1, tokens=512)
    assert short.activations < short.gradients
    assert short.peak == short.states
    assert "activations" not in short.peak_parts()
    long = training_memory("llama-7b", "full", "bf16", batch=16, tokens=512)
    assert long.peak == pytest.approx(long.states - long.gradients + long.activations)
    assert sum(long.peak_parts().values()) == pytest.approx(long.peak)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("llama-7b", "lora", "int3"), "expected one of these: full: bf16"),
        (("llama-7b", "sgd", "bf16"), "method='sgd'"),
        (("gpt2", "lora", "bf16"), "activations can be estimated for llama"),
    ],
)
def test_bad_settings_name_the_way_out(arguments, words):
    with pytest.raises(ValueError, match=words):
        training_memory(*arguments)
    with pytest.raises(ValueError, match="batch=0"):
        training_memory("llama-7b", batch=0)
    with pytest.raises(ValueError, match="full, lora, qlora"):
        memory_table("llama-7b", ["nothing"])


# Activations: the sum from the config against what autograd keeps, and against the recorded GPU.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("targets", "wide"), [([], False), (QV, True), (QV, False), (ALL, True), (ALL, False)])
def test_activations_agree_with_autograd(dtype, kv_heads, targets, wide):
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=kv_heads, vocab_size=1000)).to(dtype).train()
    check_activations(model, targets, wide, dtype)


def test_activations_of_a_model_with_norms_on_q_and_k():
    config = Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=48, vocab_size=1000)
    for targets in ([], ALL):
        check_activations(Qwen3ForCausalLM(config).train(), targets, True, torch.float32)


def check_activations(model, targets, wide, dtype):
    """Within 3 %: block, last norm, head and the log-probabilities."""
    config, size = model.config, dtype.itemsize
    if targets:
        inject(model, LoraConfig(r=8, target_modules=targets), autocast_adapter_dtype=wide)
    ids = torch.zeros(2, 64, dtype=torch.long)
    measured = saved_bytes(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    training = Training(not targets, dict.fromkeys(targets, 8), size, 4 if wide else size)
    computed = activation_bytes(config, training, 2, 64) - 8 * config.vocab_size * ids.numel()
    assert computed == pytest.approx(measured, rel=0.03)


LAYER_1, BOTH = r".*layers\.1\.self_attn\.(q|v)_proj", r".*layers\.(0\.self_attn\.q|2\.mlp\.down)_proj"


@pytest.mark.parametrize("targets", [LAYER_1, BOTH, ["embed_tokens"], ["lm_head"], "all-linear"])
def test_activations_of_some_layers_agree_with_autograd(targets):
    """Below the lowest adapted layer nothing is kept; above it, adapters where there are some."""
    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=1000)
    model = LlamaForCausalLM(config).train()
    ids = torch.zeros(2, 64, dtype=torch.long)
    computed = training_memory(model, "lora", "fp32", r=8, target_modules=targets, batch=2, tokens=64).activations
    inject(model, LoraConfig(r=8, target_modules=targets))
    measured = saved_bytes(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    assert computed - 8 * config.vocab_size * ids.numel() == pytest.approx(measured, rel=0.03)


def test_a_regular_expression_for_one_layer_takes_less():
    settings = {"r": 8, "batch": 4, "tokens": 512}
    every = training_memory("llama-7b", target_modules=["q_proj"], **settings)
    last = training_memory("llama-7b", target_modules=r".*layers\.31\.self_attn\.q_proj", **settings)
    first = training_memory("llama-7b", target_modules=r".*layers\.0\.self_attn\.q_proj", **settings)
    assert last.trainable == first.trainable == every.trainable / 32
    copy = 4 * 4096 + 4 * 8  # the adapter's own input in float32, and A x
    assert every.activations - first.activations == 4 * 512 * 31 * copy
    block = sum(block_activations(load_config("llama-7b"), Training(False, {})).values())
    assert first.activations - last.activations == 4 * 512 * 31 * block
    bare = meta_model("llama-7b", head="base")  # its names begin with layers.
    same = training_memory(bare, target_modules=r"layers\.31\.self_attn\.q_proj", **settings)
    assert same.activations == last.activations


def test_memory_of_an_adapted_model_is_that_of_the_model():
    model = meta_model("smollm2-135m")
    before = memory_table(model, target_modules="all-linear")
    inject(model, LoraConfig(r=4, target_modules="all-linear"))
    assert memory_table(model, target_modules="all-linear").rows == before.rows


def test_a_frozen_layer_keeps_no_input_and_dropout_keeps_a_mask():
    config = load_config("llama-7b")
    plain = Training(False, {"q_proj": 8, "v_proj": 8}, adapter_bytes=2)
    kept = block_activations(config, plain)
    assert "input of gate, up" not in kept
    assert kept["input of q, k, v"] == 2 * 4096
    dropped = block_activations(config, Training(False, plain.ranks, adapter_bytes=2, dropout=True))
    assert dropped["the adapters' own copies of their inputs"] == 2 * 3 * 4096


def test_recorded_runs_agree_with_the_prediction():
    """All 42 peaks of the recorded 7B runs, from the config alone, within 3 %."""
    record = json.loads(data_path("runs", "memory_7b.json").read_text())
    assert len(record["runs"]) == 42
    recipes = {
        "full, all bf16": ("full", "bf16"),
        "full, fp32 moments": ("full", "fp32-moments"),
        "full, fp32 moments and master": ("full", "mixed"),
    }
    for run in record["runs"]:
        name = run["method"]
        method, precision = recipes.get(name, ("lora", "fp32-adapter" if "fp32 adapter" in name else "bf16"))
        lora = {} if method == "full" else {"r": int(name.split("r=")[1].split(",")[0])}
        estimate = training_memory(
            meta_7b(), method, precision, **lora, target_modules=QV if "q,v" in name else "all-linear",
            batch=run["batch"], tokens=run["tokens"], checkpointing=run["checkpointing"],
        )  # fmt: skip
        assert estimate.trainable == run["trainable"]
        assert estimate.peak == pytest.approx(run["peak_bytes"], rel=0.03), name
        assert len(run["steps_ms"]) == record["steps"] >= 5


_META = {}


def meta_7b():
    """LLaMA-7B on the meta device, built once."""
    return _META.setdefault("7b", meta_model("llama-7b"))


def test_the_recorded_loss_in_pieces_agrees_with_the_prediction():
    """Where the loss is the most. Where a recomputed block is, temporaries of its backward pass come on top."""
    ways = json.loads(data_path("runs", "loss_8b.json").read_text())["ways"]
    model = meta_model("llama-3-8b")
    lora = {"r": 16, "target_modules": "all-linear", "batch": 4, "tokens": 2048, "checkpointing": True}
    for name, rows, tolerance in (("whole", None, 0.01), ("pieces of 2048", 2048, 0.01), ("pieces of 512", 512, 0.12)):
        estimate = training_memory(model, "lora", "bf16", loss_rows=rows, **lora)
        assert estimate.activations == pytest.approx(ways[name]["activations_bytes"], rel=tolerance), name


def test_pieces_as_large_as_the_batch_spare_the_second_copy_only():
    config, training = load_config("llama-7b"), Training(False, {"q_proj": 8})
    whole = activation_bytes(config, training, 2, 64)
    assert activation_bytes(config, training, 2, 64, loss_rows=1000) == whole + 2 * 4096 * 128
    assert activation_bytes(config, training, 2, 64, loss_rows=32) < whole


@pytest.mark.errors
@pytest.mark.parametrize(("full", "rows"), [(True, 512), (False, 0)])
def test_pieces_need_a_frozen_head_and_a_token(full, rows):
    with pytest.raises(ValueError, match=f"loss_rows={rows}, full={full}: .* leave loss_rows out"):
        activation_bytes(load_config("llama-7b"), Training(full, {}), 1, 8, loss_rows=rows)


def test_recorded_micro_batches_agree_with_the_prediction():
    """One micro-batch: the larger of gradients and activations; two: both. All without autocast, within 3 %."""
    recipes = {
        "full, all bf16": ("full", "bf16", {}),
        "lora q,v r=8": ("lora", "bf16", {"r": 8, "target_modules": QV}),
        "lora all-linear r=16": ("lora", "bf16", {"r": 16, "target_modules": "all-linear"}),
        "lora all-linear r=16, fp32 adapter": ("lora", "fp32-adapter", {"r": 16, "target_modules": "all-linear"}),
    }
    runs = [
        run for run in json.loads(data_path("runs", "memory_cases.json").read_text())["runs"] if not run["autocast"]
    ]
    assert len(runs) == 8
    for run in runs:
        method, precision, lora = recipes[run["method"]]
        shape = {name: run[name] for name in ("batch", "tokens", "checkpointing")}
        estimate = training_memory(meta_7b(), method, precision, **lora, **shape)
        assert estimate.peak == pytest.approx(run["peak_1"], rel=0.03)
        assert estimate.states + estimate.activations == pytest.approx(run["peak_2"], rel=0.03)


def test_the_benchmark_runs_on_any_machine(tmp_path):
    script = data_path().parent / "benchmarks" / "memory_7b.py"
    out = tmp_path / "toy.json"
    command = [
        sys.executable,
        str(script),
        "--toy",
        "--steps",
        "1",
        "--warmup",
        "0",
        "--seconds",
        "0",
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=170)
    record = json.loads(out.read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["seed"] == 0
    assert len(record["runs"]) == 1  # the limit of time stops it after the first line, not before
    assert record["runs"][0]["trainable"] > 0


# Operations.
def test_flops_of_a_step_follow_the_ledger():
    """TFLOP and ratios to full fine-tuning, LLaMA-7B, 1×512 tokens; a ratio may differ in its last digit."""
    expected = {None: (1, 1), (8, "qv"): (0.671, 0.741), (16, "all"): (0.677, 0.803), (64, "all"): (0.695, 0.822)}
    config = load_config("llama-7b")
    config._attn_implementation = "eager"
    full = {}
    for case, ratios in expected.items():
        model = meta_model(config)
        if case:
            with torch.device("meta"):
                inject(model, LoraConfig(r=case[0], target_modules=QV if case[1] == "qv" else "all-linear"))
        counted = [step_flops(model, tokens=512, checkpointing=checkpointing) for checkpointing in (False, True)]
        if case is None:
            full = dict(enumerate(counted))
            assert [f"{flops / 1e12:.2f}" for flops in counted] == ["20.71", "26.00"]
        for i, ratio in enumerate(ratios):
            assert counted[i] / full[i] == pytest.approx(ratio, abs=1.1e-3)


def test_rule_and_count_agree_up_to_attention():
    model = meta_model(LlamaConfig(**SMALL, vocab_size=500, attn_implementation="eager"))
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - 500 * 128
    assert step_flops(model, tokens=4) == pytest.approx(rule_flops(weights, 4), rel=0.03)
    assert rule_flops(weights, 4, "lora", 10) == 4 * (4 * weights + 60)
    assert rule_flops(10, 1, checkpointing=True) == 80


def test_bad_operations_are_refused():
    with pytest.raises(ValueError, match='expected "full" or "lora"'):
        rule_flops(1, 1, "qlora")
    with pytest.raises(ValueError, match="meta_model"):
        step_flops(LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=50)))
    with pytest.raises(ValueError, match="nothing requires a gradient"):
        step_flops(meta_model(LlamaConfig(**SMALL, vocab_size=50)).requires_grad_(False))
    with pytest.raises(ValueError, match=r"share=1\.5"):
        training_hours(1, 1e12, 1.5)
    with pytest.raises(ValueError, match="ceiling=0"):
        training_hours(1, 0, 0.5)


def test_hours_and_cost():
    assert training_hours(3.6e15, 1e12, 0.5) == pytest.approx(2)
    assert cost(2, 1.5) == 3


# Stopwatches and the high-water mark.
def test_times_are_paired_by_round():
    times = PairedTimes({"a": [1.0, 20.0, 3.0, 4.0], "b": [2.0, 40.0, 6.0, 1.0]})
    assert times.ratios("a", "b") == [0.5, 0.5, 0.5, 4.0]
    assert times.ratio("a", "b") == 0.5
    assert times.middle_half("a", "b") == (0.5, 1.375)
    assert times.verdict("a", "b") == "no clear difference"
    assert PairedTimes({"a": [1.0] * 3, "b": [2.0] * 3}).verdict("a", "b") == "faster"
    assert PairedTimes({"a": [1.0], "b": [0.5]}).verdict("a", "b") == "slower"


def test_functions_run_in_turns_and_warm_ups_do_not_count():
    order = []
    times = paired_times({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert all(len(seconds) == 2 for seconds in times.seconds.values())
    slow = paired_times({"slow": lambda: time.sleep(0.03), "quick": lambda: time.sleep(0.001)}, rounds=3)
    assert slow.verdict("slow", "quick") == "slower"
    with pytest.raises(ValueError, match="rounds=0"):
        paired_times({"a": lambda: None}, rounds=0)


def test_peak_memory_sees_what_the_body_takes_and_frees():
    body = "x = bytearray({} * 2**20)\nfor i in range(0, len(x), 4096): x[i] = 1\ndel x"
    codes = {"small": ("", body.format(20)), "large": ("y = bytes(90 * 2**20)", body.format(60))}
    found = peak_memory(codes, preload="")
    assert found["small"].extra == pytest.approx(20 * 2**20, rel=0.2)
    assert found["large"].extra == pytest.approx(60 * 2**20, rel=0.2)


def test_a_failing_measurement_says_why():
    with pytest.raises(RuntimeError, match="'broken' failed: ZeroDivisionError"):
        peak_memory({"broken": ("", "1 / 0")}, preload="")
