"""llama.cpp in this process, through the package xllamacpp: ask a GGUF file with adapters beside it. Lesson 13."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any


class LlamaCpp:
    """A base's GGUF file and adapters beside it, which answers greedily.

    Args:
        base_file: the base, for example ``require_gguf("smollm2-135m")``.
        adapters: files of ``save_adapter_gguf``. Each request says how much of each.
        context: tokens of prompt and answer together, at most.
        threads: of the CPU.
        float32: keep the attention's intermediate results in float32, to compare with transformers.

    Raises:
        ImportError: if xllamacpp is not installed.
        RuntimeError: if llama.cpp refuses a file, such as an adapter of another base; its reason is on stderr.
    """

    def __init__(
        self,
        base_file: str | os.PathLike,
        adapters: Sequence[str | os.PathLike] = (),
        context: int = 512,
        threads: int = 2,
        float32: bool = False,
    ):
        if not is_installed():
            raise ImportError("llama.cpp is not installed here: pip install 'lora-edu[serve]'")
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(base_file)
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if float32:
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)
        self.adapters = len(adapters)

    def complete(
        self, prompt: str | list[int], scales: Sequence[float] = (), max_new_tokens: int = 24, **request: Any
    ) -> dict[str, Any]:
        """llama.cpp's own answer, a dictionary, with the adapters at these scales; those not named stay at 0.

        Args:
            prompt: a text, or token ids.
            request: further fields of the request, such as ``n_probs=10``.
        """
        fields: Mapping[str, Any] = {
            "prompt": prompt,
            "n_predict": max_new_tokens,
            "temperature": 0,
            "lora": self._at(scales),
            "cache_prompt": False,
        }
        return self.server.handle_completions({**fields, **request})

    def ask(self, prompt: str | list[int], scales: Sequence[float] = (), max_new_tokens: int = 24) -> str:
        """The greedy answer's text."""
        return self.complete(prompt, scales, max_new_tokens)["choices"][0]["text"].strip()

    def chat(
        self, messages: Sequence[Mapping[str, str]], scales: Sequence[float] = (), max_new_tokens: int = 24
    ) -> str:
        """The greedy answer to a conversation, which the chat template in the base's file turns into a prompt."""
        request = {"messages": list(messages), "max_tokens": max_new_tokens, "temperature": 0, "cache_prompt": False}
        answer = self.server.handle_chat_completions({**request, "lora": self._at(scales)})
        return answer["choices"][0]["message"]["content"].strip()

    def first_logprobs(self, prompt: str | list[int], scales: Sequence[float] = (), most: int = 10) -> dict[int, float]:
        """{token id: logarithm of its probability} of the likeliest first tokens."""
        first = self.complete(prompt, scales, 1, n_probs=most)["choices"][0]["logprobs"]["content"][0]
        return {each["id"]: each["logprob"] for each in first["top_logprobs"]}

    def _at(self, scales: Sequence[float]) -> list[dict[str, float]]:
        """What a request says of the adapters; those not named stay at 0."""
        shares = [*scales, *[0.0] * (self.adapters - len(scales))]
        return [{"id": number, "scale": scale} for number, scale in enumerate(shares)]


def is_installed() -> bool:
    """Whether xllamacpp is here: there are wheels for Linux, Windows, and Apple's own processors."""
    return importlib.util.find_spec("xllamacpp") is not None
