"""Prompt tuning: trained vectors in place of a prompt's word embeddings, read before each row. Built in lesson 15.

PEFT's name: ``PROMPT_TUNING``. Source: Lester et al. 2021 (https://arxiv.org/abs/2104.08691), section 2.

Idea: A few trained vectors stand before the text's word embeddings, like words that are in no dictionary. The model
itself is not touched.
Formula: [P; E(x)] instead of E(x), with P (tokens, width) trained
Cost: width numbers for each virtual token, and none in the layers. In use each of them is a token to compute, to cache
and to take from the context.
Merging: none; a plain model has no place for words that are no tokens.
Papers: [Lester et al. 2021](https://arxiv.org/abs/2104.08691) find it far behind full fine-tuning in small models, and
level with it above ten billion numbers. They start from real words, as the entrant here does; from random vectors it is
slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_edu.core.entrants import register_entrant
from lora_edu.core.methods import register
from lora_edu.rivals.virtual import VirtualTokens, VirtualTokensConfig

STARTS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


class Prompt(VirtualTokens):
    """[P; E(x)] instead of E(x), with P trained: soft words before the row's own.

    What the model says of the soft words is cut off again: logits, hidden states and labels have the row's places. A
    head that reads one place of its own choice, as BERT's the first, reads a soft word there, as in PEFT.

    Shapes:
        embeddings: (tokens, hidden width).
    """

    place = "the words before each row"
    put = False  # whether the pass that is under way began with the soft words

    def hooks(self) -> list[Any]:
        return [*super().hooks(), self.backbone.register_forward_hook(self.after)]

    def add(self, inputs: dict[str, Any]) -> dict[str, Any]:
        cache = inputs.get("past_key_values")
        self.put = cache is None or cache.get_seq_length() == 0  # while generating, later steps have them in the cache
        if not self.put:
            return inputs
        ids, embedded = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
        if embedded is None:
            embedded = self.backbone.get_input_embeddings()(ids)
        rows, soft = len(embedded), len(self.embeddings)
        words = self.embeddings.to(embedded.dtype).expand(rows, -1, -1)
        inputs["inputs_embeds"] = torch.cat([words, embedded], dim=1)
        if (positions := inputs.get("position_ids")) is not None:
            first = torch.arange(soft, device=positions.device).expand(len(positions), -1)
            inputs["position_ids"] = torch.cat([first, positions], dim=1)
        if (types := inputs.get("token_type_ids")) is not None:
            inputs["token_type_ids"] = torch.cat([types.new_zeros(rows, soft), types], dim=1)
        return inputs

    def after(self, module: Any, args: tuple[()], output: Any) -> Any:
        """The backbone's output without the places of the soft words."""
        if self.put:
            output.last_hidden_state = output.last_hidden_state[:, len(self.embeddings) :]
            if output.hidden_states is not None:
                output.hidden_states = tuple(each[:, len(self.embeddings) :] for each in output.hidden_states)
        return output


@dataclass
class PromptTuningConfig(VirtualTokensConfig):
    """Settings of prompt tuning. Names, defaults and meaning are PEFT's (``num_virtual_tokens``, there None, is 20).

    Training starts away from the base model: whatever the soft words are, the model reads them.

    Args:
        prompt_tuning_init: ``"RANDOM"`` draws from N(0, 1), ``"SAMPLE_VOCAB"`` copies the embeddings of random words,
            ``"TEXT"`` those of ``prompt_tuning_init_text``, repeated or cut to the number of tokens.
        tokenizer_name_or_path, tokenizer_kwargs: the tokenizer for that text, as transformers loads it.

    Raises:
        ValueError: for another word for ``prompt_tuning_init``, or ``"TEXT"`` without text or tokenizer.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in STARTS:
            raise ValueError(
                f"prompt_tuning_init={self.prompt_tuning_init!r}: expected one of {', '.join(map(repr, STARTS))}"
            )
        if self.prompt_tuning_init == "TEXT":
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, name):
                    raise ValueError(f"prompt_tuning_init='TEXT' needs {name}")
        if self.tokenizer_kwargs and self.prompt_tuning_init != "TEXT":
            raise ValueError("tokenizer_kwargs are for prompt_tuning_init='TEXT' only")

    def start(self, words: Tensor) -> Tensor:
        if self.prompt_tuning_init == "RANDOM":
            return torch.randn(self.num_virtual_tokens, words.shape[1]).to(words.device)
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            return words[torch.randint(0, len(words), (self.num_virtual_tokens,)).to(words.device)].clone()
        from transformers import AutoTokenizer

        settings = {key: value for key, value in (self.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **settings)
        ids = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        repeated = [ids[place % len(ids)] for place in range(self.num_virtual_tokens)]
        return words[torch.tensor(repeated, device=words.device)].clone()

    def tokens(self, backbone: Any, start: Tensor, adapter_name: str) -> Prompt:
        return Prompt(backbone, start, adapter_name)

    @classmethod
    def from_file(cls, fields: Mapping[str, Any]) -> Any:
        # The values are in the file: how they started makes no difference, and its tokenizer may not be here.
        start = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_kwargs": None}
        return super().from_file({**fields, **start})


register("prompt tuning", PromptTuningConfig, {})

register_entrant(
    "prompt-20",
    method="Prompt tuning",
    config=lambda place: PromptTuningConfig(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB"),
    rates={
        "tiny": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1),
        "smollm2-135m": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
        "minilm": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1),
    },
    card=__doc__,
)
