"""Neighbour lists: one contract, a plain reference, and vesin behind it.

Contract of every function here: given positions (n_atoms, 3) in Å, a cell with lattice vectors as rows, and the
periodicity of each axis, return

    edge_index (2, n_edges) int64   sender (neighbour) and receiver (centre)
    edge_shifts (n_edges, 3) int64  so that r_sender + shift · cell - r_receiver is shorter than the cutoff

sorted by receiver, then sender, then shift, so that the same atoms give the same sums to the last bit whatever came before.

Both directions of a pair are present, an atom's own periodic images too, an atom itself (shift 0) never. Positions may
lie outside the cell, the cell may be left-handed, triclinic, or smaller than the cutoff, and axes that are not
periodic may have any (or no) vector.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Edges = tuple[NDArray[np.int64], NDArray[np.int64]]
FARTHEST = 1e8
"""Å from the origin, and length of cell vectors: float64 holds 1e-8 Å there"""
MOST_NEIGHBORS = 100_000
"""of an atom, by the density of a periodic cell: no substance has so many, and a cell in wrong units takes all memory"""

MOST_CELLS, LONG = 1e5, 40
"""cells of vesin's, and how many cutoffs an open side is long before empty stretches are looked for, or times as long as another"""


def company(x: Any) -> Any:
    """How much of a neighbour one at x = distance / cutoff is, (1 - x⁴)⁴ and nothing beyond 1; arrays or tensors."""
    squared = x * x
    return ((1 - squared * squared).clip(0) ** 2) ** 2


def neighbor_list(
    positions: NDArray[np.float64],
    cell: NDArray[np.float64],
    pbc: NDArray[np.bool_],
    cutoff: float,
    max_neighbors: int | None = None,
) -> Edges:
    """Neighbour list by vesin's cell lists, linear in the number of atoms (contract: see the module).

    Raises:
        ValueError: non-finite positions, a cutoff that is not positive, or linearly dependent periodic vectors.
    """
    import vesin  # here, because it imports torch where torch is installed, and the checks must not

    cell = complete_cell(positions, cell, pbc, cutoff)
    calculator = vesin.NeighborList(cutoff=float(cutoff), full_list=True)
    wrapped, crossed = wrap(positions, cell, pbc)
    points, box, periodic = in_cells(wrapped, cell, pbc, cutoff)
    receiver, sender, shifts = calculator.compute(points=points, box=box, periodic=periodic, quantities="ijS")
    receiver, sender = receiver.astype(np.int64), sender.astype(np.int64)
    shifts = shifts.astype(np.int64) - crossed[sender] + crossed[receiver]
    edges = _sorted(sender, receiver, shifts, len(positions))
    return edges if max_neighbors is None else nearest(edges, positions, cell, max_neighbors)


def pairs_within(
    positions: NDArray[np.float64], cell: NDArray[np.float64], cutoff: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Each pair of a periodic cell once, in no order: first (n_pairs,), second, and whole cell vectors (n_pairs, 3) from first to second."""
    import vesin

    everywhere = np.ones(3, dtype=bool)
    wrapped, crossed = wrap(positions, cell, everywhere)
    points, box, _ = in_cells(wrapped, cell, everywhere, cutoff)
    calculator = vesin.NeighborList(cutoff=float(cutoff), full_list=False)
    first, second, shifts = calculator.compute(points=points, box=box, periodic=True, quantities="ijS")
    first, second = first.astype(np.int64), second.astype(np.int64)
    return first, second, shifts.astype(np.int64) - crossed[second] + crossed[first]


def wrap(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Atoms inside the cell along periodic axes, as vesin wants them to be exact, and the whole cell vectors that were taken off.

    A shift between wrapped atoms, less those of the sender, plus those of the receiver, is the shift between the atoms themselves.
    """
    crossed = np.where(pbc, np.floor(positions @ np.linalg.inv(cell) + 0.0), 0.0)
    return positions - crossed @ cell, crossed.astype(np.int64)


def in_cells(
    points: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Points, box and periodic axes with the same pairs that vesin's cells can hold, of wrapped points in a completed cell.

    vesin 0.6.2 divides space into at most `MOST_CELLS`, as many along each side as its height suggests (along open axes: as the points do),
    and ends the process where a side gets none. So empty stretches along open axes are cut down to little more than the cutoff, which no
    pair spans, and short open sides become long ones of a periodic box, whose images are out of reach.

    Raises:
        ValueError: a periodic cell too flat or too long for that.
    """
    box, open_axes = cell.copy(), np.flatnonzero(~pbc)
    for axis in open_axes:
        length = float(np.linalg.norm(cell[axis]))
        if length > LONG * cutoff:
            direction = cell[axis] / length
            along = points @ direction
            order = np.argsort(along, kind="stable")
            empty = np.maximum(np.diff(along[order]) - (cutoff + 1.0), 0.0)
            moved = np.zeros(len(points))
            moved[order[1:]] = np.cumsum(empty)
            points = points - moved[:, None] * direction
            box[axis] = direction * (length - empty.sum())
    heights = 1 / np.linalg.norm(np.linalg.inv(box), axis=0)
    if np.prod(np.maximum(heights // cutoff, 1)) <= MOST_CELLS:
        return points, box, np.ascontiguousarray(pbc)
    for axis in open_axes:
        direction = box[axis] / heights[axis]
        points = points - (points @ direction).min() * direction
        box[axis] = direction * max(heights[axis], heights.max() / LONG)
    heights = 1 / np.linalg.norm(np.linalg.inv(box), axis=0)
    cells = np.maximum(heights // cutoff, 1)
    if cells.min() * np.cbrt(MOST_CELLS / cells.prod()) < 1.01:
        raise ValueError(
            f"The periodic cell {cell.tolist()} is too flat or too long for a list of neighbours within {cutoff} Å: its heights are "
            f"{', '.join(f'{h:.4g}' for h in heights)} Å. Repeat it along the short ones."
        )
    return points, box, np.ones(3, dtype=bool)


def neighbor_list_reference(positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float) -> Edges:
    """The definition itself: every pair in every image within reach, n_atoms² work (contract: see the module)."""
    cell = complete_cell(positions, cell, pbc, cutoff)
    fractional = positions @ np.linalg.inv(cell)
    spread = np.ptp(fractional, axis=0)
    heights = 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    reach = [int(np.ceil(cutoff / h + s)) if p else 0 for h, s, p in zip(heights, spread, pbc, strict=True)]
    rows = []
    for shift in itertools.product(*(range(-n, n + 1) for n in reach)):
        vectors = positions[None, :, :] + np.array(shift) @ cell - positions[:, None, :]
        inside = np.linalg.norm(vectors, axis=-1) < cutoff
        if shift == (0, 0, 0):
            np.fill_diagonal(inside, False)
        for centre, neighbour in np.argwhere(inside):
            rows.append((neighbour, centre, *shift))
    table = np.array(sorted(rows, key=lambda row: (row[1], row[0], row[2:])), dtype=np.int64).reshape(-1, 5)
    return np.ascontiguousarray(table[:, :2].T), table[:, 2:]


def _sorted(sender: NDArray[np.int64], receiver: NDArray[np.int64], shifts: NDArray[np.int64], n_atoms: int) -> Edges:
    """Edges in the order of the contract, by one integer key (by several where that would overflow)."""
    if len(sender) == 0:
        return np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3), dtype=np.int64)
    lowest = shifts.min(axis=0)
    sx, sy, sz = (int(n) for n in shifts.max(axis=0) - lowest + 1)
    if n_atoms**2 * sx * sy * sz < 2**62:
        code = ((shifts[:, 0] - lowest[0]) * sy + (shifts[:, 1] - lowest[1])) * sz + (shifts[:, 2] - lowest[2])
        order = np.argsort((receiver * n_atoms + sender) * (sx * sy * sz) + code, kind="stable")
    else:
        order = np.lexsort((*shifts.T[::-1], sender, receiver))
    return np.stack([sender[order], receiver[order]]), shifts[order]


def complete_cell(positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float) -> NDArray[np.float64]:
    """Replace the vectors of non-periodic axes by ones orthogonal to the rest; check what cannot be mended."""
    if not cutoff > 0:
        raise ValueError(f"The cutoff must be positive, found {cutoff} Å.")
    if not np.isfinite(positions).all():
        atom = int(np.argwhere(~np.isfinite(positions))[0, 0])
        raise ValueError(f"Position of atom {atom} is not finite: {positions[atom]}.")
    if not np.isfinite(cell).all():
        raise ValueError(f"The cell holds values that are not finite: {cell.tolist()}.")
    completed = np.array(cell, dtype=np.float64)
    for what, values in (("Positions", positions), ("Cell vectors", completed)):
        if np.abs(values).max(initial=0.0) > FARTHEST:
            raise ValueError(
                f"{what} reach {np.abs(values).max():.1e} Å, where float64 holds no distances. Wrap the atoms, or mend the file."
            )
    periodic = np.flatnonzero(pbc)
    rank = np.linalg.matrix_rank(completed[periodic], tol=1e-6) if len(periodic) else 0
    if rank < len(periodic):
        raise ValueError(
            f"Axes {periodic.tolist()} are periodic, but their lattice vectors {completed[periodic].tolist()} are zero "
            "or linearly dependent. Give a cell with a volume, or switch periodicity off along that axis."
        )
    vectors, ball = completed[periodic], (1.0, 2 * cutoff, np.pi * cutoff**2, 4 / 3 * np.pi * cutoff**3)[len(periodic)]
    neighbors = len(positions) * ball / np.sqrt(np.linalg.det(vectors @ vectors.T)) if len(periodic) else 0
    if neighbors > MOST_NEIGHBORS:
        raise ValueError(
            f"The cell {completed.tolist()} of {len(positions)} atoms would give each atom {neighbors:.1e} neighbours within {cutoff} Å. "
            "It is too small: is it in Å?"
        )
    if len(periodic) == 3:
        return completed
    # an orthonormal basis of what the periodic vectors leave free
    basis = np.linalg.svd(completed[periodic])[2][len(periodic) :] if len(periodic) else np.eye(3)
    for axis, vector in zip(np.flatnonzero(~pbc), basis, strict=True):
        extent = np.ptp(positions @ vector) if len(positions) else 0.0
        completed[axis] = vector * (extent + 2 * cutoff + 1.0)
    return completed


def nearest(edges: Edges, positions: NDArray[np.float64], cell: NDArray[np.float64], max_neighbors: int) -> Edges:
    """Keep the ``max_neighbors`` shortest edges of each receiver."""
    (sender, receiver), shifts = edges
    lengths = np.linalg.norm(positions[sender] + shifts @ cell - positions[receiver], axis=1)
    order = np.lexsort((lengths, receiver))
    counts = np.bincount(receiver, minlength=len(positions))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = np.sort(order[rank < max_neighbors])
    return np.stack([sender[keep], receiver[keep]]), shifts[keep]
