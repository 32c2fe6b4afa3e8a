"""Arrays of an npz file, after a look at what it says of their sizes."""

from __future__ import annotations

import errno
import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.files import most_unpacked


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in the file.

    Raises:
        ValueError: not an npz file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:
        raise unreadable(path, error) from None


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Arrays by name, all or some; nothing is unpickled, and nothing unpacked whose size the file does not bear out.

    Raises:
        FileNotFoundError, PermissionError: as the system says.
        ValueError: not an npz file, truncated or damaged (zip archives have checksums), an array missing, sizes that do not fit the file, or
            far more data than a file of this size can mean.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
            chosen = list(sizes) if names is None else list(names)
            unpacked, packed = sum(sizes[name] for name in chosen), path.stat().st_size
            if unpacked > most_unpacked(packed):
                raise ValueError(f"'{path}' has {packed:.2g} bytes and unpacks to {unpacked:.2g}: real data does not shrink so. Refused.")
            for name in chosen:
                with archive.open(f"{name}.npy") as file:
                    version = np.lib.format.read_magic(file)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(file)
                    if math.prod(shape) * dtype.itemsize != sizes[name] - file.tell():
                        raise ValueError(f"'{path}': the array {name} says it has shape {shape}, which does not fit its size.")
        with np.load(path, allow_pickle=False) as data:
            return {name: np.asarray(data[name]) for name in chosen}
    except Exception as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> Exception:
    """A ValueError that names the file, for whatever parsers make of a damaged one; errors of the system, and our own, as they are."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place before the beginning of the file
        return error
    if type(error) is ValueError and str(path) in str(error):
        return error
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return ValueError(f"'{path}' is not a readable npz file ({reason}). It may be truncated: copy it again.")
