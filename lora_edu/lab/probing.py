"""What a frozen encoder knows: embeddings of texts, a linear probe on them, and nearest neighbours. Lesson 15."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lora_edu.lab.datasets import collate

Row = dict[str, Any]


@torch.no_grad()
def embed(encoder: Any, rows: Sequence[Row], batch_size: int = 64) -> Tensor:
    """One vector of length 1 for each encoded row: the mean of its tokens' last hidden states.

    So the sentences of ``minilm`` were compared when it was trained. Rows of like length share a batch.

    Args:
        encoder: an encoder without a head, as ``load_base("minilm")`` gives it.

    Returns:
        (rows, width), in the order of the rows.
    """
    encoder.eval()
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
    found = torch.zeros(len(rows), encoder.config.hidden_size)
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        batch = collate([rows[number] for number in part], encoder.config.pad_token_id)
        mask = batch["attention_mask"][:, :, None]
        hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        found[part] = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(found, dim=1)


def probe(vectors: Tensor, labels: Sequence[int]) -> LogisticRegression:
    """A linear classifier on frozen vectors: logistic regression, which has one best answer and no learning rate."""
    return LogisticRegression(C=10, max_iter=3000).fit(vectors.numpy(), np.array(labels))


def nearest(vectors: Tensor, query: Tensor, number: int) -> list[int]:
    """The places of the vectors that are most like the query by cosine, the most alike last."""
    return (vectors @ query).topk(number).indices.flip(0).tolist()
