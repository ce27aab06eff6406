"""LoRA's rivals equal PEFT's to rounding: outputs, gradients, training, merged weights, counts, files both ways.

Bottleneck adapters, which PEFT has not, equal a formula that is written here from the paper.
"""

import copy
import json
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.utils import constants
from shapes import losses_of_twenty_steps, moved, relative_error, tiny_model
from transformers import AutoTokenizer, LlamaForSequenceClassification

from lora_edu import (
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    count_parameters,
    inject,
    load_adapter,
    load_base,
    merge,
    merge_and_unload,
    save_adapter,
)
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.state import adapter_state
from lora_edu.files import data_path
from lora_edu.rivals.ia3 import DEFAULTS
from lora_edu.rivals.virtual import VirtualTokens

pytestmark = pytest.mark.parity
SHAPES = ["llama", "gpt2", "bert"]
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}
VIRTUAL = {
    "prefix": (PrefixTuningConfig, peft.PrefixTuningConfig),
    "prompt": (PromptTuningConfig, peft.PromptTuningConfig),
}
METHODS = ["ia3", *VIRTUAL]
every_method = pytest.mark.parametrize("method", METHODS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def batch_for(shape, masked=True):
    """Rows of different length; a language model's first label does not count, as in the course's rows."""
    ids = torch.randint(1, 61, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    batch = {"input_ids": ids, "labels": torch.tensor([0, 2, 1]) if shape == "bert" else labels}
    return batch | ({"attention_mask": mask} if masked else {})


def theirs_of(method, shape, base, **settings):
    if method == "ia3":
        config = peft.IA3Config(task_type=TASKS[shape], **settings)
    else:
        config = VIRTUAL[method][1](num_virtual_tokens=4, task_type=TASKS[shape], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config).double().train()


def ours_of(method, shape, base, **settings):
    if method == "ia3":
        config = IA3Config(task_type=TASKS[shape], **settings)
    else:
        config = VIRTUAL[method][0](num_virtual_tokens=4, task_type=TASKS[shape], **settings)
    inject(base, config)
    return base.train()


def pairs(ours, theirs):
    """{name: (our parameter, PEFT's)} for everything that trains."""
    modules = dict(theirs.base_model.named_modules())
    inside = "model." if "model" in dict(theirs.base_model.named_children()) and adapter_layers(ours) else ""
    found = {}
    for name, layer in adapter_layers(ours).items():
        found[name] = layer.ia3_l, modules[f"{inside}{name}"].ia3_l["default"]
    for part in adapter_state(ours).parts["default"]:
        if isinstance(part, VirtualTokens):
            found["tokens"] = part.embeddings, theirs.prompt_encoder["default"].embedding.weight
        else:
            copied = modules[f"{inside}{part.place}"].modules_to_save["default"]
            found |= {f"{part.place}.{key}": (p, getattr(copied, key)) for key, p in part.copy.named_parameters()}
    return found


def twins(method, shape, **settings):
    """(ours, PEFT's) with the same numbers, away from their start."""
    base = tiny_model(shape, pad_token_id=0)
    ours, theirs = ours_of(method, shape, copy.deepcopy(base), **settings), theirs_of(method, shape, base, **settings)
    moved(ours)
    with torch.no_grad():
        for our, their in pairs(ours, theirs).values():
            their.copy_(our)
    return ours, theirs


def answers(model, batch):
    """(logits, loss): PEFT's without the places of soft words in front, and a loss in float64: transformers' is not."""
    output, labels = model(**batch), batch["labels"]
    if output.logits.dim() == 2:
        return output.logits, F.cross_entropy(output.logits, labels)
    logits = output.logits[:, -labels.shape[1] :]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    return logits, loss


@every_shape
@every_method
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_forward_and_gradients(method, shape, masked):
    ours, theirs = twins(method, shape)
    batch = batch_for(shape, masked)
    logits, loss = answers(ours, batch)
    expected, reference = answers(theirs, batch)
    assert logits.shape[1] == (3 if shape == "bert" else 7)
    if masked and shape != "bert":  # what stands in the padding, nobody reads
        counts = batch["attention_mask"].bool()
        logits, expected = logits[counts], expected[counts]
    assert relative_error(logits, expected) < 1e-9
    assert loss.item() == pytest.approx(reference.item(), rel=1e-9)
    loss.backward()
    reference.backward()
    for name, (our, their) in pairs(ours, theirs).items():
        assert relative_error(our.grad, their.grad) < 1e-9, name


@every_shape
@every_method
def test_twenty_steps_of_training(method, shape):
    ours, theirs = twins(method, shape)
    batch = batch_for(shape)
    histories = [losses_of_twenty_steps(model, lambda each: answers(each, batch)[1]) for model in (ours, theirs)]
    assert histories[0] == pytest.approx(histories[1], rel=1e-9)
    assert histories[0][-1] < histories[0][0]
    for name, (our, their) in pairs(ours, theirs).items():
        assert relative_error(our, their) < 1e-9, name


@every_shape
@every_method
def test_counts(method, shape):
    ours, theirs = twins(method, shape)
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()


@every_shape
def test_merged_scales(shape):
    ours, theirs = twins("ia3", shape)
    merge(ours)
    theirs.merge_adapter()
    merged = dict(theirs.base_model.model.named_modules())
    for name, layer in adapter_layers(ours).items():
        assert relative_error(layer.frozen.weight, merged[name].base_layer.weight) < 1e-12, name
        if layer.frozen.bias is not None:
            assert relative_error(layer.frozen.bias, merged[name].base_layer.bias) < 1e-12, name
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a classifier's head over classes was never tied to the embedding
        plain = merge_and_unload(ours)
    state, expected = plain.state_dict(), theirs.merge_and_unload().state_dict()
    assert state.keys() == expected.keys()
    for key in state:
        assert relative_error(state[key], expected[key]) < 1e-12, key


@every_shape
@every_method
def test_peft_reads_our_files(method, shape, tmp_path):
    ours, batch = twins(method, shape)[0], batch_for(shape, masked=False)
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        theirs = peft.PeftModel.from_pretrained(tiny_model(shape, pad_token_id=0), tmp_path).double().eval()
    assert relative_error(answers(ours.eval(), batch)[0], answers(theirs, batch)[0]) < 1e-6  # PEFT reads in float32


@every_shape
@every_method
def test_we_read_pefts_files(method, shape, tmp_path):
    theirs, batch = twins(method, shape)[1], batch_for(shape, masked=False)
    theirs.save_pretrained(tmp_path)
    model = tiny_model(shape, pad_token_id=0)
    load_adapter(model, tmp_path)
    assert relative_error(answers(model.eval(), batch)[0], answers(theirs.eval(), batch)[0]) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_default_layers_of_scales_are_pefts(kind):
    ours, theirs = twins("ia3", kind)
    scaled = {n: m for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.ia3.IA3Layer)}
    assert {name: layer.feedforward for name, layer in adapter_layers(ours).items()} == {
        name: layer.is_feedforward for name, layer in scaled.items()
    }


def test_the_table_of_scales_is_pefts():
    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {kind: (targets[kind], feedforward[kind]) for kind in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("feedforward", [None, [], ["down_proj"], r".*layers\.1\..*down_proj"], ids=str)
def test_which_inputs_are_scaled(feedforward):
    settings = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": feedforward}
    ours, theirs = twins("ia3", "llama", **settings)
    batch = batch_for("llama")
    assert relative_error(ours(**batch).logits, theirs(**batch).logits) < 1e-9


@pytest.mark.parametrize("method", VIRTUAL)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_generates_what_peft_generates(method, shape):
    ours, theirs = twins(method, shape)
    ids = torch.tensor([[0, 0, 5, 9, 8], [7, 3, 5, 2, 4]])  # the first row is padded on the left
    mask = (ids != 0).long()
    settings = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.eval().generate(input_ids=ids, **settings), by_hand(ours, ids, mask))
    if method == "prefix":  # for soft words PEFT drops the positions, which left padding needs
        assert torch.equal(ours.generate(input_ids=ids, **settings), theirs.eval().generate(input_ids=ids, **settings))


def by_hand(model, ids, mask):
    """Greedy words without a cache: the whole row is read anew for each."""
    for _ in range(6):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


def test_positions_given_count_after_the_virtual_tokens():
    for method in VIRTUAL:
        ours, theirs = twins(method, "llama")
        batch = batch_for("llama")
        expected = ours(**batch).logits
        given = ours(**batch, position_ids=torch.arange(7)[None]).logits
        assert torch.allclose(given, expected, atol=1e-12)
        if method == "prefix":
            counts = batch["attention_mask"].bool()
            their = theirs(**batch, position_ids=torch.arange(7)[None]).logits
            assert relative_error(given[counts], their[counts]) < 1e-9


def test_soft_words_in_a_decoder_with_a_head_leave_its_last_word_where_it_is():
    """PEFT hands such a model embeddings only, and it then reads the padding of shorter rows."""
    torch.manual_seed(0)
    config = tiny_model("llama", pad_token_id=0).config
    config.num_labels = 3
    model = LlamaForSequenceClassification(config).double()
    inject(model, PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS"))
    model.eval()
    row = torch.tensor([[5, 9, 8]])
    padded = torch.tensor([[5, 9, 8, 0, 0], [7, 3, 5, 2, 4]])
    alone = model(input_ids=row).logits
    together = model(input_ids=padded, attention_mask=(padded != 0).long()).logits
    assert torch.allclose(together[:1], alone, atol=1e-10)


def test_soft_words_start_as_words_or_as_a_text(tmp_path):
    folder = str(data_path("tiny"))
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a word", "tokenizer_name_or_path": folder}
    model, _ = load_base("tiny")
    inject(model, PromptTuningConfig(num_virtual_tokens=5, **text))
    theirs = peft.get_peft_model(
        load_base("tiny")[0], peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", **text)
    )
    mine = next(part for part in adapter_state(model).parts["default"])
    assert torch.equal(mine.embeddings, theirs.prompt_encoder["default"].embedding.weight)
    ids = AutoTokenizer.from_pretrained(folder)("a word")["input_ids"]
    words = model.get_input_embeddings().weight
    assert torch.equal(mine.embeddings[: len(ids)], words[ids])
    save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    fields["tokenizer_name_or_path"] = "no/such/tokenizer"
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    load_adapter(again := load_base("tiny")[0], tmp_path)  # the values are in the file, the text is not needed
    assert torch.equal(adapter_state(again).parts["default"][0].embeddings, mine.embeddings)
    torch.manual_seed(4)
    inject(other := load_base("tiny")[0], PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"))
    rows = adapter_state(other).parts["default"][0].embeddings
    assert all((words == row).all(1).any() for row in rows)


# Bottleneck adapters and BitFit, which PEFT does not have under these names
FORMULAS = {
    "relu": lambda z: z * (z > 0),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
}


@every_shape
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("f", list(FORMULAS))
def test_bottleneck_adapters_are_the_papers_formula(shape, placement, f):
    """h + U f(D h + d) + u behind the last layers of attention and of the feed-forward network."""
    base = tiny_model(shape)
    model = copy.deepcopy(base)
    report = inject(model, BottleneckConfig(bottleneck_size=5, placement=placement, non_linearity=f))
    ends = {"llama": ("o_proj", "down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj")}
    attention, feedforward = ends.get(shape, ("attention.output.dense", "output.dense"))
    behind_attention = {name for name in report.replaced if name.endswith(attention)}
    assert len(behind_attention) == (2 if placement == "houlsby" else 0)
    assert len(report.replaced) == (4 if placement == "houlsby" else 2)
    assert all(name.endswith(feedforward) for name in set(report.replaced) - behind_attention)
    assert report.trainable == len(report.replaced) * (2 * 5 * 24 + 5 + 24)
    moved(model)
    tensors = {name: [p.detach() for p in layer.adapter_parameters()] for name, layer in adapter_layers(model).items()}

    def behind(name):
        D, d, U, u = tensors[name]

        def hook(module, inputs, h):
            inner = torch.einsum("md,btd->btm", D, h) + d
            return h + torch.einsum("dm,btm->btd", U, FORMULAS[f](inner)) + u

        return hook

    for name in report.replaced:
        base.get_submodule(name).register_forward_hook(behind(name))
    batch = batch_for(shape)
    assert relative_error(model(**batch).logits, base(**batch).logits) < 1e-12


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_bitfit_trains_every_bias_as_lora_with_all_biases_does():
    model, other = tiny_model("bert"), tiny_model("bert")
    inject(model, BitFitConfig(task_type="SEQ_CLS"))
    inject(other, LoraConfig(r=1, bias="all", task_type="SEQ_CLS"))
    mine, with_lora = (
        {name for name, p in each.named_parameters() if p.requires_grad and "lora" not in name}
        for each in (model, other)
    )
    assert {name.replace(".base.", ".") for name in with_lora} == mine
    biases = sum(p.numel() for name, p in tiny_model("bert").named_parameters() if name.endswith("bias"))
    head = 3 * 24 + 3
    assert count_parameters(model)[0] == biases - 3 + head  # the head's own bias trains within its copy


# What is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=["down_proj"]), "feedforward_modules"),
        (lambda: IA3Config(target_modules=["k_proj"], feedforward_modules="("), "feedforward_modules='\\('"),
        (lambda: BottleneckConfig(bottleneck_size=0), "bottleneck_size=0"),
        (lambda: BottleneckConfig(non_linearity="sine"), "non_linearity='sine'.*'relu'"),
        (lambda: BottleneckConfig(placement="here"), "placement='here'.*'pfeiffer'"),
        (lambda: BottleneckConfig(dropout=2), "dropout=2.*probability"),
        (lambda: BitFitConfig(bias="none"), "bias='none'.*bias='all'"),
        (lambda: PrefixTuningConfig(num_virtual_tokens=0), "num_virtual_tokens=0"),
        (lambda: PrefixTuningConfig(prefix_projection=True), "prefix_projection=True.*PEFT"),
        (lambda: PrefixTuningConfig(init_weights="ones"), "init_weights='ones'.*'zero'"),
        (lambda: PromptTuningConfig(num_virtual_tokens=2.5), "num_virtual_tokens=2.5"),
        (lambda: PromptTuningConfig(num_transformer_submodules=2), "num_transformer_submodules=2.*PEFT"),
        (lambda: PromptTuningConfig(prompt_tuning_init="WORDS"), "prompt_tuning_init='WORDS'.*'SAMPLE_VOCAB'"),
        (lambda: PromptTuningConfig(prompt_tuning_init="TEXT"), "needs prompt_tuning_init_text"),
        (lambda: PromptTuningConfig(tokenizer_kwargs={"use_fast": True}), "tokenizer_kwargs"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BitFitConfig(), "no biases to train"),
        (PrefixTuningConfig(token_dim=7), "token_dim=7, but this model has 12"),
        (PromptTuningConfig(num_layers=9), "num_layers=9, but this model has 2"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_leaves_it_alone(config, words):
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            module = model.get_submodule(name.rpartition(".")[0])
            module._parameters["bias"] = None
            del parameter
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        inject(model, config)
    assert all(p.requires_grad and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "adapter_state" not in model.__dict__


def test_models_without_defaults_or_without_words_are_refused():
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3))
    for config, words in [
        (IA3Config(), "model type None"),
        (IA3Config(target_modules=["0"]), "feedforward_modules=None"),
        (BottleneckConfig(), "model type None"),
        (PrefixTuningConfig(), "no transformers model"),
    ]:
        with pytest.raises(ValueError, match=words):
            inject(plain, config)
    inject(plain, IA3Config(target_modules=["0"], feedforward_modules=[]))


def test_a_prefix_and_checkpointing_exclude_each_other():
    model = ours_of("prefix", "llama", tiny_model("llama"))
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(**batch_for("llama"))
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model.eval()(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3))
