"""What autograd keeps between the forward and the backward pass, tensor by tensor. Built in lesson 06.

For Llama-shaped decoders as transformers runs them in eager mode: RMSNorm computed in float32, fused attention that
never stores the tokens × tokens matrix, a gated MLP with SiLU, cross-entropy in float32. Other kernels keep other
tensors. Against autograd's own list (tests) and a 7B-shaped model on a GPU (lesson 06) the sums are within 3 %; where a
loss in pieces leaves a recomputed block as the most, its backward pass takes up to 12 % more than is counted here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
INPUT_OF = {  # which tensor a linear layer reads, and which of the layers share it
    "q_proj": "input of q, k, v",
    "k_proj": "input of q, k, v",
    "v_proj": "input of q, k, v",
    "o_proj": "attention output",
    "gate_proj": "input of gate, up",
    "up_proj": "input of gate, up",
    "down_proj": "input of down",
}


@dataclass(frozen=True)
class Training:
    """What trains, as far as activations care.

    Args:
        full: every weight trains; ``ranks`` is then empty.
        ranks: for LoRA: the rank of each adapted linear layer of a block, e.g. ``{"q_proj": 8, "v_proj": 8}``.
        compute_bytes: bytes of a number in the forward pass: 2 in bfloat16, 4 in float32.
        adapter_bytes: bytes of a number in A and B; where they are wider than the computation, each adapted layer
            keeps its own widened copy of its input.
        dropout: whether the adapters drop entries of their input; each then keeps the rest and a mask.
    """

    full: bool
    ranks: Mapping[str, int]
    compute_bytes: int = 2
    adapter_bytes: int = 4
    dropout: bool = False


def widths(config: PretrainedConfig) -> dict[str, int]:
    """Width of the input of each linear layer of a block, of its hidden state, and of q, k/v and the MLP.

    Raises:
        ValueError: for a model that is not Llama-shaped.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model type {config.model_type!r}: activations can be estimated for {', '.join(FAMILIES)}; "
            "for other models use activations=False, or measure them with lora_edu.counting.measure.saved_bytes"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * head, (config.num_key_value_heads or config.num_attention_heads) * head
    inputs = dict.fromkeys(INPUT_OF, hidden) | {"o_proj": q, "down_proj": mlp}
    return inputs | {"hidden": hidden, "q": q, "kv": kv, "mlp": mlp}


def block_activations(config: PretrainedConfig, training: Training) -> dict[str, int]:
    """Bytes that one decoder block keeps per token, by tensor; the sum is what a block costs. Lesson 06.

    A frozen linear layer keeps nothing: its input is needed for the gradient of its weight only. What the nonlinear
    steps read (norms, attention, SiLU, the gate's product) is kept whatever trains.
    """
    wide, e = widths(config), training.compute_bytes
    h, q, kv, mlp = wide["hidden"], wide["q"], wide["kv"], wide["mlp"]
    kept = {
        "two norms, in float32": 2 * 4 * h,
        "q, k, v": e * (q + 2 * kv),
        "attention output": e * q + 4 * config.num_attention_heads,  # and one float32 sum a head, for the softmax
        "gate, SiLU(gate), up": 3 * e * mlp,
    }
    if config.model_type == "qwen3":
        kept["norms of q and k, in float32"] = 4 * (q + kv) + (e * (q + kv) if training.full else 0)
    shared = set(INPUT_OF) if training.full else set()
    if not training.full and training.adapter_bytes == e and not training.dropout:
        shared = set(training.ranks)
    if training.full:
        kept["norm outputs, for the norms' weights"] = 2 * e * h
    for name in INPUT_OF:
        if name in shared and INPUT_OF[name] not in kept:
            kept[INPUT_OF[name]] = e * wide[name]
    copies = _adapter_inputs(wide, training, set(training.ranks) - shared)
    if copies:
        kept["the adapters' own copies of their inputs"] = copies
    if training.ranks:
        kept["A x, r numbers a layer"] = training.adapter_bytes * sum(training.ranks.values())
    return kept


def _adapter_inputs(wide: Mapping[str, int], training: Training, names: Collection[str]) -> int:
    """Bytes of what single adapters keep of their inputs: a widened copy, and with dropout also a mask."""
    mask = 1 if training.dropout else 0
    return sum((training.adapter_bytes + mask) * wide[name] for name in names)


def activation_bytes(
    config: PretrainedConfig,
    training: Training,
    batch: int,
    tokens: int,
    checkpointing: bool = False,
    blocks: Sequence[Mapping[str, int]] | None = None,
    loss_rows: int | None = None,
) -> int:
    """Bytes of activations at the moment when they are most: when the loss begins to go backward. Lesson 06.

    Args:
        config: of a Llama-shaped decoder; see ``widths``.
        training: what trains, and in which precision.
        batch, tokens: rows and tokens a row; the loss is taken over all of them.
        checkpointing: keep only the input of each block, and compute one block again at a time when its turn comes.
        blocks: ``training.ranks`` of each block that gradients pass, where they are not the same in all: the lowest
            adapted one and those above it. What lies below that keeps nothing; the lowest is counted whole.
        loss_rows: tokens whose logits are there at a time, with a loss in pieces over a frozen head
            (``lora_edu.fast.loss``); None for the loss of transformers, which has all of them at once.

    Assumes fused attention, a loss in float32 over the whole vocabulary (12 bytes a token and entry at its peak: the
    log-probabilities, their gradient and one temporary), no compilation, nothing offloaded.

    Raises:
        ValueError: for a model that is not Llama-shaped, a batch, length or piece below 1, or pieces where the head
            trains.
    """
    if batch < 1 or tokens < 1:
        raise ValueError(f"batch={batch}, tokens={tokens}: both must be at least 1")
    if loss_rows is not None and (loss_rows < 1 or training.full):
        raise ValueError(
            f"loss_rows={loss_rows}, full={training.full}: a loss in pieces needs at least 1 token at a time and a "
            "frozen head; leave loss_rows out where everything trains"
        )
    widths(config)  # refuses models of another shape
    hidden, e = config.hidden_size, training.compute_bytes
    each = [training.ranks] * config.num_hidden_layers if blocks is None else blocks
    kept = [sum(block_activations(config, replace(training, ranks=ranks)).values()) for ranks in each]
    end = 4 * hidden + (2 * e * hidden if training.full else 0)  # the last norm, and what the head reads
    rows = batch * tokens
    loss = 12 * config.vocab_size * rows
    if loss_rows is not None:  # the logits of one piece, and the finished gradient of all hidden states
        loss = 12 * config.vocab_size * min(loss_rows, rows) + e * hidden * rows
    if not checkpointing:
        return rows * (sum(kept) + end) + loss
    return rows * len(kept) * e * hidden + max([*(rows * each for each in kept), rows * end + loss])
