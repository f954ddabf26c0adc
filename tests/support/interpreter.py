"""Triton's interpreter, made to round as a GPU does."""

from __future__ import annotations

from typing import Any

import torch


def round_to_bfloat16() -> None:
    """Make Triton's interpreter round to bfloat16 as a GPU does; by itself it truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    truncate = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            # Truncation leaves these values as they are.
            data = torch.from_numpy(data).bfloat16().float().numpy()
        return truncate(data, source, target, rounding_mode)

    interpreter._convert_float = convert
