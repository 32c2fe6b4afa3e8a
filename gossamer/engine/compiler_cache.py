"""What PyTorch's compiler made for training steps, kept in our folder: the second training of a network compiles in seconds.

By itself the compiler keeps its files under /tmp, where a restart removes them. A graph is found again if it is the same to the last number:
weights and what came from the data are its inputs. `$TORCHINDUCTOR_CACHE_DIR`, where a user has set it, is left alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gossamer import __version__
from gossamer.engine import cache
from gossamer.engine.kernels.cpu import processor
from gossamer.files import cache_folder, checksum, write_text
from gossamer.settings import to_dict

log = logging.getLogger(__name__)
VARIABLE, NAME, DIGESTS = "TORCHINDUCTOR_CACHE_DIR", "compiler", "digests.json"


def step_name(network: Any, n_elements: int, forces: bool, stress: bool, single: bool, dtype: str) -> str:
    """Name of the training steps of all potentials that are one graph on this machine.

    Args:
        network: Settings of the network.
        n_elements: Their number is a size of its tables.
        forces: Whether forces are predicted.
        stress: Whether stress is.
        single: Whether batches hold one structure.
        dtype: Precision.
    """
    machine = [processor(), torch.cuda.is_available(), torch.__version__, __version__]
    graph = [to_dict(network), n_elements, forces, stress, single, dtype.removeprefix("torch."), *machine]
    return hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()[:24]


def is_kept(name: str) -> bool:
    """Whether a training step of this name has been compiled on this machine, and what that made is still there."""
    return (cache_folder() / NAME / f"{name}.compiled").exists()


@contextmanager
def kept_compiler_files(name: str) -> Iterator[None]:
    """Within this the compiler finds what it made before, and keeps what it makes if the block ends well.

    Of files that it is given back, those that are not what was kept are removed before; where the cache cannot be written or trusted, the
    compiler keeps its files where it always does.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # seconds to import: only who compiles pays for it

    own, found = cache_folder() / NAME, os.environ.get(VARIABLE)
    if found not in (None, default_cache_dir()):  # PyTorch sets its default, too
        yield
        return
    try:
        cache.cached(NAME).mkdir(exist_ok=True, mode=0o700)
        cache.check_owner(own)
        remove_altered(own)
    except (OSError, cache.Untrusted) as error:
        log.info("the compiler's files are not kept: %s", error)
        yield
        return
    os.environ[VARIABLE] = str(own)
    try:
        yield
    finally:
        if found is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = found
    try:
        (own / f"{name}.compiled").touch()
        write_text(own / DIGESTS, json.dumps(digests(own)))
        cache.tidy()
    except OSError as error:
        log.info("the compiler's files are not kept: %s", error)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all files in a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != DIGESTS and p.suffix != ".lock")
    return {str(p.relative_to(folder)): checksum(p) for p in files}


def remove_altered(folder: Path) -> None:
    """Remove files that are not what they were when they were kept; all of them if that is not known."""
    kept = folder / DIGESTS
    try:
        known = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
        found = digests(folder)
        altered = [name for name, digest in known.items() if name in found and found[name] != digest]
    except (ValueError, AttributeError):
        log.warning("'%s' was damaged: what the compiler had made is removed", kept)
        shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
        return
    for name in altered:
        log.warning("'%s' was damaged or altered: it is removed, and made again", folder / name)
        (folder / name).unlink()
