"""LoRA-GA starts where PEFT's does, trains alike, and its files cross; in float64 it equals its formula.

PEFT decomposes gradients by random projections, exactly only where 4r reaches the smaller side: r = 6 of 24 here.
"""

import warnings

import peft
import pytest
import torch
from peft.tuners.lora import preprocess_loraga
from shapes import losses_of_twenty_steps, moved, relative_error, tiny_model
from transformers.pytorch_utils import Conv1D

from lora_edu import LoraConfig, LoraGAConfig, count_parameters, inject, load_adapter, merge, save_adapter
from lora_edu.core.adapter import adapter_layers

pytestmark = pytest.mark.parity
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["attn.c_proj", "c_fc"],
    "bert": ["query", "intermediate.dense"],
}
STARTS = [("ArB2r", "stable"), ("ArBr", "unit"), ("A2rBr", "unit"), ("ArB2r", "weight_svd"), ("ArB2r", "gd_scale")]
OPTIONS = {"r": 6, "lora_alpha": 9}
every_shape = pytest.mark.parametrize("shape", TARGETS)


def base_model(shape, dtype=torch.float64):
    """With weights large enough that no layer's gradient is lost in rounding."""
    model = tiny_model(shape, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model.to(dtype)


def batches_for(shape, number=3):
    batches = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 61, (12, 7), generator=generator)
        labels = torch.randint(0, 3, (12,), generator=generator) if shape == "bert" else ids
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def ours_started(shape, dtype, settings, **options):
    model = base_model(shape, dtype)
    config = LoraConfig(
        init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**settings), target_modules=TARGETS[shape],
        **(OPTIONS | options),
    )  # fmt: skip
    torch.manual_seed(4)  # for "random"
    inject(model, config, batches=batches_for(shape))
    return model.train()


def theirs_started(shape, dtype, settings, **options):
    model, batches = base_model(shape, dtype), batches_for(shape)
    config = peft.LoraConfig(
        init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(**settings), target_modules=TARGETS[shape],
        **(OPTIONS | options),
    )  # fmt: skip

    def train_step():
        for batch in batches:
            model(**batch).loss.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_loraga(model, config, train_step)
        return peft.get_peft_model(model, config).train()


def their_layers(theirs):
    modules = theirs.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, peft.tuners.lora.LoraLayer)}


def started_pair(shape, dtype=torch.float32, settings=None, **options):
    """(our model, PEFT's) at PEFT's start, whose signs are other ones than ours."""
    ours, theirs = (started(shape, dtype, settings or {}, **options) for started in (ours_started, theirs_started))
    for name, layer in adapter_layers(ours).items():
        reference = their_layers(theirs)[name]
        with torch.no_grad():
            for own in (layer.lora_A, layer.start_A):
                own.copy_(reference.lora_A["default"].weight)
            for own in (layer.lora_B, layer.start_B):
                own.copy_(reference.lora_B["default"].weight)
    return ours, theirs


def gradients_by_hand(shape, names):
    """The mean over the batches of each weight's gradient, as (out, in)."""
    model = base_model(shape).eval()
    for batch in batches_for(shape):
        model(**batch).loss.backward()
    layers = {name: model.get_submodule(name) for name in names}
    return {
        name: ((layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad) / 3, layer)
        for name, layer in layers.items()
    }


@every_shape
@pytest.mark.parametrize(("direction", "scale"), STARTS)
def test_the_start_is_pefts_up_to_signs(shape, direction, scale):
    settings = {"direction": direction, "scale": scale}
    ours, theirs = ours_started(shape, torch.float32, settings), theirs_started(shape, torch.float32, settings)
    for name, layer in adapter_layers(ours).items():
        reference = their_layers(theirs)[name]
        A, B = reference.lora_A["default"].weight, reference.lora_B["default"].weight
        if scale == "stable" and isinstance(layer.frozen, Conv1D):
            B = B * (layer.out_features / layer.in_features) ** 0.25  # PEFT takes a Conv1D's inputs for its outputs
        assert relative_error(layer.lora_A.abs(), A.abs()) <= 1e-4, name
        # PEFT estimates the weight's largest singular value, too.
        assert relative_error(layer.lora_B.abs(), B.abs()) <= (2e-2 if scale == "weight_svd" else 1e-4), name


@every_shape
@pytest.mark.parametrize(("direction", "scale"), [*STARTS, ("random", "stable"), ("random", "weight_svd")])
def test_the_start_is_the_formulas_in_float64(shape, direction, scale):
    layers = adapter_layers(
        ours_started(shape, torch.float64, {"direction": direction, "scale": scale, "stable_gamma": 9})
    )
    for name, (gradient, layer) in gradients_by_hand(shape, layers).items():
        U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
        chosen = (Vh[:12] @ layers[name].lora_A.T).abs().argmax(0).tolist()  # for "random"
        assert len(set(chosen)) == 6
        A = {"ArBr": Vh[1:12:2], "A2rBr": Vh[6:12], "ArB2r": Vh[:6], "random": Vh[chosen]}[direction]
        US = U * S
        B = {"ArBr": US[:, 0:12:2], "A2rBr": US[:, :6], "ArB2r": US[:, 6:12], "random": US[:, chosen]}[direction]
        first = {"ArBr": S[0], "A2rBr": S[0], "ArB2r": S[6], "random": S[chosen][0]}[direction]
        if scale == "stable":
            B = B * len(U) ** 0.25 / 3
        elif scale == "weight_svd":
            B = B * torch.linalg.svdvals(layer.weight)[0] / first
        elif scale == "gd_scale":
            A, B = A / 1.5, B / 1.5
        own = layers[name]
        assert relative_error(own.lora_A.abs(), A.abs()) <= 1e-9, name
        assert relative_error(own.lora_B.abs(), B.abs()) <= 1e-9, name
        assert own.delta_weight().abs().max() <= 1e-12
        assert torch.equal(own.start_A, own.lora_A)
        assert torch.equal(own.start_B, own.lora_B)
        assert torch.equal(own.frozen.weight, layer.weight)


@every_shape
def test_forward_gradients_training_counts_and_merged_weights(shape):
    ours, theirs = started_pair(shape)
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()
    batch = batches_for(shape)[0]
    assert relative_error(ours(**batch).logits, base_model(shape, torch.float32)(**batch).logits) <= 1e-6
    results = [model(**batch) for model in (ours, theirs)]
    assert relative_error(results[0].logits, results[1].logits) <= 1e-5
    for result in results:
        result.loss.backward()
    for name, layer in adapter_layers(ours).items():
        reference = their_layers(theirs)[name]
        assert relative_error(layer.lora_A.grad, reference.lora_A["default"].weight.grad) <= 1e-5
        assert relative_error(layer.lora_B.grad, reference.lora_B["default"].weight.grad) <= 1e-5
    losses = [losses_of_twenty_steps(model, lambda each: each(**batch).loss) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    merge(ours)
    theirs.merge_adapter()
    for name, layer in adapter_layers(ours).items():
        assert relative_error(layer.frozen.weight, their_layers(theirs)[name].base_layer.weight) <= 1e-3


@every_shape
def test_in_bfloat16_the_weight_is_nearer_to_the_formulas_than_pefts(shape):
    """PEFT rounds the shifted weight to bfloat16; here the weight is not touched."""
    ours, theirs = started_pair(shape, torch.bfloat16)
    starts = {name: layer.lora_B.double() @ layer.lora_A.double() for name, layer in adapter_layers(ours).items()}
    moved(ours)
    moved(theirs)
    for name, layer in adapter_layers(ours).items():
        reference = their_layers(theirs)[name]
        weight = layer.oriented(layer.frozen.weight).double()
        exact = weight + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double() - starts[name])
        shifted = layer.oriented(reference.base_layer.weight).double()
        their = shifted + layer.oriented(reference.get_delta_weight("default")).double()
        own = layer.oriented(layer.effective_weight())
        assert relative_error(own, exact) <= 1e-6 < relative_error(their, exact), name


@every_shape
def test_peft_reads_our_files(shape, tmp_path):
    ours = moved(ours_started(shape, torch.float32, {}, use_rslora=True)).eval()
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_model(shape, torch.float32), tmp_path).eval()
    batch = batches_for(shape)[0]
    assert relative_error(theirs(**batch).logits, ours(**batch).logits) <= 1e-5


@every_shape
def test_we_read_what_peft_has_converted_and_refuse_what_it_has_not(shape, tmp_path):
    theirs = theirs_started(shape, torch.float32, {})
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "lora_ga"
    moved(theirs).eval()
    theirs.save_pretrained(tmp_path / "as it trained")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = base_model(shape, torch.float32).eval()
    with pytest.raises(ValueError, match=r"holds LoRA-GA as it trained.*path_initial_model_for_weight_conversion"):
        load_adapter(ours, tmp_path / "as it trained")
    load_adapter(ours, tmp_path / "converted")
    batch = batches_for(shape)[0]
    assert relative_error(ours(**batch).logits, theirs(**batch).logits) <= 1e-5
