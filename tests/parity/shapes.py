"""Small random models of the three shapes that the parity tests use, and the bridge from PEFT's tensors to ours."""

import copy
import warnings

import peft
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_edu import LoraConfig, inject
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.parts import TrainedBias
from lora_edu.core.state import adapter_state

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value", "intermediate.dense"],
}


def tiny_model(shape, dtype=torch.float64, seed=0, **settings):
    """A random Llama-, GPT-2- or BERT-shaped model with in ≠ out in some layers and no dropout of its own."""
    torch.manual_seed(seed)
    if shape == "llama":
        config = LlamaConfig(
            vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True, mlp_bias=True, **settings,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    elif shape == "gpt2":
        config = GPT2Config(
            vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=32, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
            **settings,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = BertConfig(
            vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3, **settings,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
    for name, parameter in model.named_parameters():  # biases start at zero: make them matter
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).train()


def batch_for(shape, model, seed=1):
    """Embedded inputs (so that a gradient of x exists) and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (3, 7), generator=generator)
    x = model.get_input_embeddings()(ids).detach().clone().requires_grad_(True)
    labels = torch.randint(0, 3, (3,), generator=generator) if shape == "bert" else ids
    return {"inputs_embeds": x, "labels": labels}


def pair(shape, dtype=torch.float64, targets=None, model_settings=None, seed=0, fast=False, **options):
    """(our model, PEFT's model) from one base, with the same random A and B (both away from zero)."""
    targets = TARGETS[shape] if targets is None else targets
    base = tiny_model(shape, dtype, seed, **(model_settings or {}))
    ours, theirs = base, copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            theirs, peft.LoraConfig(target_modules=targets, init_lora_weights=False, **options)
        )
    inject(ours, LoraConfig(target_modules=targets, **options), fast=fast)
    theirs.train()
    ours.train()
    take_values(ours, theirs)
    return ours, theirs


def moved(model):
    """The model with every trained number moved, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def losses_of_twenty_steps(model, loss_of, seed=3):
    """Twenty steps of AdamW on what trains; ``loss_of(model)`` is the loss of a step, ``seed`` fixes dropout."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def their_parameters(ours, theirs):
    """{our parameter's key: (our parameter, PEFT's)} for everything that trains."""
    modules = dict(theirs.base_model.model.named_modules())
    pairs = {}
    for name, layer in adapter_layers(ours).items():
        lora = modules[name]
        if "default" in lora.lora_embedding_A:
            a, b = lora.lora_embedding_A["default"], lora.lora_embedding_B["default"]
        else:
            a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        pairs[f"{name}.lora_A"] = layer.lora_A, a
        pairs[f"{name}.lora_B"] = layer.lora_B, b
        if "default" in lora.lora_magnitude_vector:
            pairs[f"{name}.m"] = layer.lora_magnitude_vector, lora.lora_magnitude_vector["default"].weight
    for bias in (part for part in adapter_state(ours).parts["default"] if isinstance(part, TrainedBias)):
        module = modules[bias.names[0]]
        pairs[f"{bias.names[0]}.bias"] = bias.trained, getattr(module, "base_layer", module).bias
    return pairs


def take_values(ours, theirs):
    """Copy PEFT's adapter values into our layers."""
    with torch.no_grad():
        for our, their in their_parameters(ours, theirs).values():
            our.copy_(their)


def relative_error(value, reference):
    """‖value − reference‖ / ‖reference‖, in float64."""
    value, reference = value.detach().double(), reference.detach().double()
    return (torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference).clamp_min(1e-300)).item()


def step(model, batch, seed=5):
    """One forward and backward pass; the seed fixes the dropout masks."""
    torch.manual_seed(seed)
    batch = batch | {"inputs_embeds": batch["inputs_embeds"].detach().clone().requires_grad_(True)}
    model.zero_grad()
    result = model(**batch)
    result.loss.backward()
    return result, batch["inputs_embeds"].grad


def assert_same_step(ours, theirs, batch, tolerance=1e-9):
    """Outputs, the gradient of x and every trainable gradient agree."""
    result, x_grad = step(ours, batch)
    reference, x_reference = step(theirs, batch)
    assert relative_error(result.logits, reference.logits) <= tolerance, "logits differ"
    assert relative_error(x_grad, x_reference) <= tolerance, "the gradient of x differs"
    for key, (our, their) in their_parameters(ours, theirs).items():
        # BERT's key bias has no gradient but rounding: softmax does not see it.
        same = relative_error(our.grad, their.grad) <= tolerance or their.grad.norm() < 1e-12
        assert same, f"the gradient of {key} differs"
