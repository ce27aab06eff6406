"""EVA starts where PEFT's ``initialize_lora_eva_weights`` does: the same directions, ranks and alphas, files both ways.

PEFT decomposes step by step and drops what does not fit into r · ρ directions: with one batch, and as many directions
as the layers have inputs, nothing is dropped and the numbers agree. With several batches PEFT's are the worse ones.
"""

import copy
import warnings

import peft
import pytest
import torch
from peft.tuners.lora import initialize_lora_eva_weights
from shapes import losses_of_twenty_steps, relative_error, tiny_model

from lora_edu import EvaConfig, LoraConfig, count_parameters, inject, load_adapter, merge, save_adapter
from lora_edu.core.adapter import adapter_layers
from lora_edu.variants.from_data import counted_positions, inputs_of, rows_that_count

pytestmark = pytest.mark.parity
# Layers that read 24 numbers: r · ρ = 12 directions, of which PEFT computes twice as many, so all.
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
    "bert": ["query", "value", "intermediate.dense"],
}
SETTINGS = {
    "plain": {},
    "ranks as they are": {"rho": 1.0},
    "all labels, alphas as they are": {"use_label_mask": False, "adjust_scaling_factors": False},
}


def batches_for(shape, number=1):
    """Rows of different length, in which some labels do not count."""
    batches = []
    for seed in range(number):
        ids = torch.randint(1, 61, (8, 9), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        batches.append({"input_ids": ids, "attention_mask": mask} | ({} if shape == "bert" else {"labels": labels}))
    return batches


def eva_pair(shape, batches, eva=None, **options):
    """(our model, PEFT's), each started by its own code from the same batches, with r · ρ = 12."""
    base = tiny_model(shape)
    ours, theirs = base, copy.deepcopy(base)
    eva = eva or {}
    r = 12 if eva.get("rho") == 1 else 6
    options = {"r": r, "lora_alpha": 9, "target_modules": TARGETS[shape], **options}
    config = peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(**eva), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, config)
        initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    inject(ours, LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(**eva), **options), batches=batches)
    return ours, theirs.train()


def their_layers(theirs):
    modules = theirs.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize("shape", TARGETS)
@pytest.mark.parametrize("eva", SETTINGS.values(), ids=SETTINGS)
def test_directions_ranks_and_alphas(shape, eva):
    """Among layers that read the same, PEFT leaves open which gets a rank more: these are compared as a whole."""
    batches = batches_for(shape)
    ours, theirs = eva_pair(shape, batches, eva)
    layers, references = adapter_layers(ours), their_layers(theirs)
    assert layers.keys() == references.keys()
    groups = {}
    for name, layer in layers.items():
        A, reference = layer.lora_A, references[name]
        shared = min(layer.r, reference.r["default"])
        assert relative_error(A[:shared], reference.lora_A["default"].weight[:shared]) <= 1e-4, name
        assert not layer.lora_B.any()
        group = groups.setdefault(name.replace("k_proj", "q_proj").replace("v_proj", "q_proj"), [[], []])
        group[0].append((layer.r, round(layer.scaling, 9)))
        group[1].append((reference.r["default"], round(reference.scaling["default"], 9)))
    assert all(sorted(own) == sorted(their) for own, their in groups.values())
    ranks, r = [layer.r for layer in layers.values()], theirs.peft_config["default"].r
    assert sum(ranks) == r * len(ranks)
    if shape == "llama":  # elsewhere layers' inputs vary much alike
        assert (set(ranks) != {r}) == (r == 6)


def test_whitened_directions_have_the_length_of_the_formula():
    """PEFT's σ grows with the number of times that it read the batch, so that its length is another.

    Where several layers read the same, PEFT divides their directions, which are one tensor, once for each of them.
    """
    batches = batches_for("llama")
    ours, theirs = eva_pair("llama", batches, {"rho": 1.0, "whiten": True})
    plain = tiny_model("llama")
    name = "model.layers.1.self_attn.o_proj"
    x = inputs_of(plain, {name: plain.get_submodule(name)}, batches[0])[name][0]
    rows = x[batches[0]["attention_mask"].bool() & (batches[0]["labels"] != -100)]
    S, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[1:]
    A = adapter_layers(ours)[name].lora_A
    assert relative_error(A.abs(), (Vh[:12] / S[:12, None].sqrt()).abs()) <= 1e-9
    reference = their_layers(theirs)[name].lora_A["default"].weight
    ratio = A.norm(dim=1) / reference.norm(dim=1)
    assert torch.allclose(ratio, ratio[:1], rtol=1e-3)
    assert relative_error(A / A.norm(dim=1, keepdim=True), reference / reference.norm(dim=1, keepdim=True)) <= 1e-4


def test_with_several_batches_more_variance_is_explained_than_by_peft():
    batches = batches_for("llama", 4)
    ours, theirs = eva_pair("llama", batches, {"rho": 1.0}, target_modules=["q_proj", "o_proj", "down_proj"])
    plain = tiny_model("llama")
    targets = {name: plain.get_submodule(name) for name in adapter_layers(ours)}
    rows = {name: [] for name in targets}
    for batch in batches:
        for name, inputs in inputs_of(plain, targets, batch).items():
            rows[name].append(rows_that_count(inputs[0], counted_positions(batch, -100)))
    for name, layer in adapter_layers(ours).items():
        x = torch.cat(rows[name])
        x = x - x.mean(0)
        own, their = layer.lora_A, their_layers(theirs)[name].lora_A["default"].weight
        explained = [(x @ A.T).square().sum().item() for A in (own, their)]
        best = torch.linalg.svdvals(x)[: layer.r].square().sum().item()
        assert explained[0] == pytest.approx(best, rel=1e-9)
        assert 0.8 * best < explained[1] < best


@pytest.mark.parametrize("shape", TARGETS)
def test_forward_training_counts_and_merged_weights(shape):
    """From PEFT's A, which has seven right digits: whatever else differs would show in the ninth."""
    batches = batches_for(shape)
    ours, theirs = eva_pair(shape, batches, {"rho": 1.0})
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()
    for name, layer in adapter_layers(ours).items():
        layer.lora_A.data.copy_(their_layers(theirs)[name].lora_A["default"].weight)
    batch = batches[0] | {"labels": torch.arange(8) % 3 if shape == "bert" else batches[0]["labels"]}
    base = tiny_model(shape)(**batch).logits
    assert relative_error(ours(**batch).logits, base) <= 1e-12
    losses = [losses_of_twenty_steps(model, lambda each: each(**batch).loss) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    merge(ours)
    theirs.merge_adapter()
    for name, layer in adapter_layers(ours).items():
        assert relative_error(layer.frozen.weight, their_layers(theirs)[name].base_layer.weight) <= 1e-9


@pytest.mark.parametrize("shape", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_files_both_ways(shape, rslora, tmp_path):
    """With ranks that differ between layers: they are in the file."""
    batches = batches_for(shape)
    ours, theirs = eva_pair(shape, batches, use_rslora=rslora)
    generator = torch.Generator().manual_seed(2)
    for model in (ours, theirs):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read = peft.PeftModel.from_pretrained(tiny_model(shape), tmp_path / "ours").eval()
    load_adapter(mine := tiny_model(shape).eval(), tmp_path / "theirs")
    with torch.no_grad():
        for model, reference in [(read, ours.eval()), (mine, theirs.eval())]:
            assert relative_error(model(**batches[0]).logits, reference(**batches[0]).logits) <= 1e-5
