"""Counting before running: parameters, bytes, operations. Lessons 05 and 06."""

from lora_edu.core.inject import count_parameters
from lora_edu.counting.parameters import (
    LoraCount,
    TargetRow,
    adapter_bytes,
    break_even_rank,
    format_bytes,
    full_parameters,
    layer_shape,
    lora_formula,
    lora_parameters,
    lora_report,
)

__all__ = [
    "LoraCount",
    "TargetRow",
    "adapter_bytes",
    "break_even_rank",
    "count_parameters",
    "format_bytes",
    "full_parameters",
    "layer_shape",
    "lora_formula",
    "lora_parameters",
    "lora_report",
]
