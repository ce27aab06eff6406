"""The referee's entrants that are no adapters: full fine-tuning, and a probe that trains the new head alone."""

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
the pretraining, and apart when it is not. Here the head reads BERT's pooler, as transformers' classifier does; a probe
on the mean of all tokens, for which this base was trained, knows more.
"""


def _all(model: nn.Module, place: Place) -> None:
    model.requires_grad_(True)


def _head(model: nn.Module, place: Place) -> None:
    for name, module in model.named_children():
        if name in TASK_HEADS[place.task_type]:
            module.requires_grad_(True)


register_entrant(
    "full",
    method="Full fine-tuning",
    unfreeze=_all,
    rates={
        "tiny": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
        "smollm2-135m": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
        "minilm": (2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    },
    card=FULL,
)
register_entrant(
    "probe",
    method="Linear probe",
    unfreeze=_head,
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    needs="SEQ_CLS",
    card=PROBE,
)
