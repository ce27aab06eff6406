"""The referee's entrants that are no adapters: full fine-tuning, and a probe that trains the new head alone."""

from typing import Any

from torch import nn

from lora_edu.core.entrants import Place, register_entrant
from lora_edu.core.parts import TASK_HEADS

FULL = """
Idea: Every weight of the pretrained model is trained on. It is what the other methods save memory against, and the
quality that they are measured by.
Formula: W' = W + ΔW, with any ΔW
Cost: in float32 with AdamW, 16 bytes for each weight: the weight, its gradient and two moments. A file of a fine-tuned
model is as large as the base.
Merging: there is nothing to merge; switching tasks means another whole model.
Papers: [Howard and Ruder 2018](https://arxiv.org/abs/1801.06146) and [Devlin et al.
2019](https://arxiv.org/abs/1810.04805) made it the usual way. Whether others reach it depends on task, size of the data
and tuning: compare [Hu et al. 2021](https://arxiv.org/abs/2106.09685) with [Biderman et al.
2024](https://arxiv.org/abs/2405.09673).
"""
PROBE = """
Idea: The pretrained model stays as it is, and a linear classifier is trained on what it gives out. It shows how much of
a task the base can already do.
Formula: logits = V h(x) + c, with h frozen
Cost: classes · (width + 1) numbers; no gradient flows into the base, so that a step needs little more than its forward
pass.
Merging: there is nothing to merge; the head is a layer of its own.
Papers: [Peters et al. 2019](https://arxiv.org/abs/1903.05987) find probing and fine-tuning close when the task is like
the pretraining, and apart when it is not. What h is matters: for `probe` the head reads BERT's pooler, as it does for
all other methods here; for `probe-mean` it reads the mean of the tokens' last hidden states, by which [Sentence-BERT's
models](https://arxiv.org/abs/1908.10084), of which this base is one, compare texts.
"""


def _all(model: nn.Module, place: Place) -> None:
    model.requires_grad_(True)


def _head(model: nn.Module, place: Place) -> None:
    for name, module in model.named_children():
        if name in TASK_HEADS[place.task_type]:
            module.requires_grad_(True)


def _head_on_the_mean(model: nn.Module, place: Place) -> None:
    """Let the head read the mean of the tokens' last hidden states, and train it."""
    model.get_submodule("bert").register_forward_hook(_pool_by_mean, with_kwargs=True)
    _head(model, place)


def _pool_by_mean(bert: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
    mask = given["attention_mask"][:, :, None]
    output.pooler_output = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    return output


register_entrant(
    "full",
    method="Full fine-tuning",
    unfreeze=_all,
    rates={
        "tiny": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
        "smollm2-135m": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
        "minilm": (2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    },
    card=FULL,
)
for _name, _unfreeze in (("probe", _head), ("probe-mean", _head_on_the_mean)):
    register_entrant(
        _name,
        method="Linear probe",
        unfreeze=_unfreeze,
        rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        needs="SEQ_CLS",
        card=PROBE,
    )
