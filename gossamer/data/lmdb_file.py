"""Whether an LMDB file is as long as it says: the library maps it into memory, and reading beyond its end kills the process (SIGBUS)."""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC, VERSION = 0xBEEFC0DE, 1
# a page's header, then MDB_meta of LMDB's mdb.c: magic, version, address, size of the map, two trees, last page, transaction;
# the page size stands where the first tree would have its padding
META = struct.Struct("<16x II QQ I44x 48x QQ")


def check_lmdb(path: Path) -> None:
    """
    Args:
        path: The file of the data, not the folder around it.

    Raises:
        ValueError: no LMDB file, or shorter than its newest transaction needs.
        OSError: it cannot be read.
    """
    advice = "It may be truncated: copy it again."
    with open(path, "rb") as file:
        first = _meta(file.read(META.size))
        if first is None:
            raise ValueError(f"'{path}' is not a readable LMDB. {advice}")
        page_size, *_ = first
        file.seek(page_size)
        second = _meta(file.read(META.size))
        length = file.seek(0, 2)
    if second is None:
        raise ValueError(f"'{path}' is not a readable LMDB: its second page is missing. {advice}")
    _, last_page, _ = max(first, second, key=lambda meta: meta[2])
    needed = (last_page + 1) * page_size
    if length < needed:
        raise ValueError(f"'{path}' has {length} bytes, but its pages need {needed}. {advice}")


def _meta(page: bytes) -> tuple[int, int, int] | None:
    """Page size, last page and transaction of a page that describes an LMDB; None if it is no such page."""
    if len(page) < META.size:
        return None
    magic, version, _, _, page_size, last_page, transaction = META.unpack(page)
    return (page_size, last_page, transaction) if (magic, version) == (MAGIC, VERSION) and page_size > 0 else None
