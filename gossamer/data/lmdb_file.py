"""Whether an LMDB file is whole: the library maps it into memory and believes it, and reading beyond its end kills the process (SIGBUS).

Layout by LMDB's mdb.c, format 1, 64 bits, little endian. Pages have a header, (number, 2 bytes, flags, end of the table of nodes, start of
the nodes), the table, and from their end on nodes: branches lead to pages, leaves hold a key and a value, or where a large one begins.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

import numpy as np

MAGIC, VERSION = 0xBEEFC0DE, 1
# a page's header, then MDB_meta: magic, version, address, size of the map, two trees (size of a page, flags, depth, four counts, root),
# last page, transaction; the page size stands where the first tree would have its padding
META = struct.Struct("<16x II QQ I44x 4xH2x32xQ QQ")
HEADER, NODE = struct.Struct("<Q2xHHH"), 8
BRANCH, LEAF, LARGE, SEVERAL = 1, 2, 1, 0x74
"""flags of pages; of a leaf's node whose value lies on pages of its own; of a tree whose keys have several values, which nobody here writes"""
NONE = 2**64 - 1
"""root of an empty tree"""
ADVICE = "It may be truncated or damaged: copy it again."


def check_lmdb(path: Path) -> None:
    """
    Args:
        path: The file of the data, not the folder around it.

    Raises:
        ValueError: no LMDB file, shorter than its newest transaction needs, or with pages that point outside of themselves or the file.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        first = _meta(file.read(META.size))
        if first is None:
            raise ValueError(f"'{path}' is not a readable LMDB. {ADVICE}")
        page_size = first[0]
        file.seek(page_size)
        second = _meta(file.read(META.size))
        length = file.seek(0, 2)
        if second is None:
            raise ValueError(f"'{path}' is not a readable LMDB: its second page is missing. {ADVICE}")
        _, flags, root, last_page, _ = max(first, second, key=lambda meta: meta[-1])
        needed = (last_page + 1) * page_size
        if length < needed:
            raise ValueError(f"'{path}' has {length} bytes, but its pages need {needed}. {ADVICE}")
        if flags & SEVERAL:
            raise ValueError(f"'{path}' is an LMDB whose keys have several values, which no format of data here has. {ADVICE}")
        damaged = None if root == NONE else _damaged_page(file, root, page_size, last_page, length)
    if damaged is not None:
        raise ValueError(f"'{path}' is an LMDB with a damaged page, {damaged}. {ADVICE}")


def _meta(page: bytes) -> tuple[int, int, int, int, int] | None:
    """Page size, flags and root of the tree, last page and transaction of a page that describes an LMDB; None if it is no such page."""
    if len(page) < META.size:
        return None
    magic, version, _, _, page_size, *rest = META.unpack(page)
    return (page_size, *rest) if (magic, version) == (MAGIC, VERSION) and page_size > HEADER.size else None


def _damaged_page(file: IO[bytes], root: int, page_size: int, last_page: int, length: int) -> int | None:
    """The first page below a root that LMDB must not be shown; None: all are sound. Reads the tree, not the large values."""
    left, seen = [root], {0, 1}
    while left:
        number = left.pop()
        if number in seen or number > last_page:
            return number
        seen.add(number)
        file.seek(number * page_size)
        found = _below(file.read(page_size), number, length, page_size)
        if found is None:
            return number
        left += found
    return None


def _below(page: bytes, number: int, length: int, page_size: int) -> list[int] | None:
    """Pages that a page of the tree leads to; None if one of its nodes is not where it can be."""
    claimed, flags, lower, upper = HEADER.unpack_from(page)
    n = (lower - HEADER.size) // 2
    if (
        claimed != number
        or flags not in (BRANCH, LEAF)
        or not HEADER.size + 2 * n == lower <= upper <= len(page)
        or n < (2 if flags == BRANCH else 1)
    ):
        return None
    starts = np.frombuffer(page, "<u2", n, HEADER.size).astype(np.int64)
    if starts.min() < upper or starts.max() + NODE > len(page):
        return None
    data = np.frombuffer(page, np.uint8).astype(np.int64)
    low, high, kind, key = (data[starts + k] + 256 * data[starts + k + 1] for k in (0, 2, 4, 6))
    values = starts + NODE + key
    if flags == BRANCH:
        return None if (values > len(page)).any() else (low + (high << 16) + (kind << 32)).tolist()
    large = kind == LARGE
    sizes = low + (high << 16)
    if (kind > LARGE).any() or (values + np.where(large, 8, sizes) > len(page)).any():
        return None
    for start, size in zip(values[large].tolist(), sizes[large].tolist(), strict=True):
        (begin,) = struct.unpack_from("<Q", page, start)
        if begin < 2 or begin * page_size + HEADER.size + size > length:
            return None
    return []
