"""Checkpoints that resume bitwise: tensors in safetensors, the rest in its JSON metadata; never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gossamer.files import atomic_path, write_bytes
from gossamer.tensor_files import read_tensors

FORMAT = 1


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write atomically; the checkpoint before is kept as ``*.previous``."""
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps({"format": FORMAT, **state})
    data = safetensors.torch.save(contiguous, {"state": text, "checksum": _checksum(contiguous, text)})
    previous = path.with_name(path.name + ".previous")
    if path.exists():
        _keep(path, previous)
    write_bytes(path, data)


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name, or make a copy where the file system has no hard links."""
    try:
        previous.unlink(missing_ok=True)
        os.link(path, previous)
    except OSError:
        with atomic_path(previous) as temporary:
            shutil.copyfile(path, temporary)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Raises:
        ValueError: unreadable or altered (says where the one before lies), or of a newer format.
    """
    try:
        tensors, metadata = read_tensors(path)
        if metadata.keys() - {"state", "checksum"}:
            raise ValueError(f"it holds {', '.join(sorted(metadata))}, expected state and checksum")
        # those of older versions have no checksum
        if metadata.get("checksum", "") not in ("", _checksum(tensors, metadata["state"])):
            raise ValueError("it was altered after it was written: its checksum does not match")
        state = json.loads(metadata["state"])
        if not isinstance(state, dict) or type(state.get("format")) is not int:
            raise ValueError("it does not say its format")
    except (OSError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"The checkpoint '{path}' cannot be read ({error}). {_advice(path)}") from None
    if state["format"] > FORMAT:
        raise ValueError(f"The checkpoint '{path}' has format {state['format']}; this version reads up to {FORMAT}. Update gossamer.")
    return tensors, state


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """sha256 over names, kinds, shapes and bytes of the tensors, and over the rest."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _advice(path: Path) -> str:
    previous = path.with_name(path.name + ".previous")
    if previous.exists():
        return f"Rename the one before, '{previous}', to '{path.name}' and resume from there."
    return "There is no earlier one: remove it and start again."


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter number and name."""
    return {
        f"optimizer.{number}.{name}": value for number, state in optimizer.state_dict()["state"].items() for name, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
