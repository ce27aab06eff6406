"""The timeline of a step sees memory come and go, operation by operation, and the same each time."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, inject
from lora_edu.counting.measure import saved_bytes
from lora_edu.counting.timeline import Timeline

IDS = torch.arange(64).reshape(2, 32)


def watched(lora):
    """A step of two micro-batches on a small Llama, and what autograd keeps of its forward pass."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=64)).train()
    if lora:
        inject(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=False)

    def forward():
        return model(input_ids=IDS, labels=IDS, use_cache=False).loss

    forward().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = saved_bytes(model, forward)
    with Timeline(model, optimizer) as timeline:
        for _ in range(2):
            timeline.phase("forward")
            loss = forward()
            timeline.phase("backward")
            loss.backward()
            del loss
        timeline.phase("optimizer")
        optimizer.step()
        optimizer.zero_grad()
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    return timeline, kept, trained, sum(4 * p.numel() for p in model.parameters())


@pytest.mark.parametrize("lora", [False, True])
def test_weights_moments_gradients_and_activations_are_told_apart(lora):
    timeline, kept, trained, weights = watched(lora)
    assert timeline.weights == pytest.approx(weights, abs=200)  # and the rotary embedding's few numbers
    assert timeline.moments == pytest.approx(2 * trained, rel=0.1)  # and a counter for each parameter
    assert timeline.gradients[0] == 0
    assert max(timeline.gradients) == trained
    start = dict(reversed(timeline.phases))["backward"]
    logits = 4 * 64 * IDS.numel()  # the result holds them, in what autograd kept they are not
    assert kept <= timeline.others[start - 1] <= kept + 2 * logits
    assert timeline.others[-1] < 0.1 * kept


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_of_the_first_micro_batch_stand_below_the_second(lora):
    timeline, _, trained, _ = watched(lora)
    names, sizes = zip(*timeline.peaks(), strict=True)
    assert names == ("forward", "backward", "forward", "backward", "optimizer")
    assert sizes[2] - sizes[0] == pytest.approx(trained, rel=0.02, abs=100)
    assert sizes[3] - sizes[1] == pytest.approx(trained, rel=0.02, abs=100)
    assert max(sizes) == sizes[3]


def test_a_step_has_the_same_timeline_each_time():
    first, second = watched(True)[0], watched(True)[0]
    assert (first.others, first.gradients, first.phases) == (second.others, second.gradients, second.phases)
