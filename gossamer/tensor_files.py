"""Files of tensors and text (safetensors), read in one look."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata.

    From the same bytes: ``safetensors.safe_open`` opens a file a second time for the tensors, and where a training run has just
    replaced it these are another file's.

    Raises:
        ValueError: no such file, or one cut short.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, KeyError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    return tensors, header.get("__metadata__", {})
