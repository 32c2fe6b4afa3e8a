"""What LAMMPS with pair_style gossamer should cost on many ranks: a model from the parts measured in lammps.md.

    python benchmarks/speed/lammps_model.py

Nothing here was run on more than two ranks. A step of the slowest rank takes

    t = a + b n + bytes / bandwidth + messages x latency + barrier,      n = N/P (1 + imbalance)

a and b: of one rank with exchange in lammps.md (192 and 1,536 atoms). Halo: b times all atoms within the layers' reach, each layer on what
the next one needs. Bytes: every ghost within cutoff and skin sends its features before each layer but the first, and gets their gradient back
(float32), and LAMMPS its position and force (float64). Messages: 26 neighbours, twice for each of these. Barrier: log2 P latencies, twice. Imbalance: the fullest of P cells
of a liquid, whose number of atoms has the variance S(0) n with the compressibility of water, S(0) = 0.06.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np

HERE = Path(__file__).resolve().parent
DENSITY, CUTOFF, SKIN, LAYERS = 0.1003, 5.0, 0.5, 3
"""atoms/Å³ of water, Å, Å, of NequIP in its default size"""
FEATURES = 32 * (1 + 3 + 5)
"""numbers that an atom carries between layers: 32 channels of degrees 0, 1, 2"""
STRUCTURE_FACTOR = 0.06
LATENCY, NEIGHBOURS = 2e-6, 26
"""seconds of a message, cells that touch one"""
NETWORKS = {"1 GB/s for each rank": 1e9, "0.2 GB/s for each rank": 2e8}
"""25 GB/s of a node among 25 ranks, or among 125"""
MEMORY = 4e9 / 110_000
"""bytes per atom of a large cell (../cost/README.md)"""


def measured() -> dict[int, dict[str, float]]:
    """Milliseconds by number of atoms and column of lammps.md."""
    lines = [line.strip("| ").split(" | ") for line in (HERE / "lammps.md").read_text().splitlines() if line.startswith("|")]
    return {int(row[0]): {name: float(cell.split()[0]) for name, cell in zip(lines[0][1:], row[1:], strict=True)} for row in lines[2:]}


def within(n: float, reach: float) -> float:
    """Atoms in a cube of n atoms and all around it within the reach."""
    return DENSITY * ((n / DENSITY) ** (1 / 3) + 2 * reach) ** 3


def fullest(n: float, ranks: int) -> float:
    """Expected atoms of the fullest of so many cells of n atoms on average."""
    return n + (NormalDist().inv_cdf(1 - 1 / (ranks + 1)) * math.sqrt(STRUCTURE_FACTOR * n) if ranks > 1 else 0.0)


def step(n: float, ranks: int, a: float, b: float, bandwidth: float, halo: bool) -> float:
    """Seconds of a step of the slowest rank, of n atoms on average."""
    own = fullest(n, ranks)
    if ranks == 1:
        return a + b * own
    work = b * float(np.mean([within(own, k * CUTOFF) for k in range(LAYERS)])) if halo else b * own
    rounds = 1 if halo else LAYERS  # positions and forces, and features before all layers but the first
    ghosts = within(own, (LAYERS if halo else 1) * CUTOFF + SKIN) - own
    sent = ghosts * (2 * 24 + (0 if halo else 2 * (LAYERS - 1) * 4 * FEATURES))
    return a + work + sent / bandwidth + LATENCY * (2 * NEIGHBOURS * rounds + 2 * math.log2(ranks))


def main() -> None:
    times = {n: row["LAMMPS, 1 × exchange"] / 1000 for n, row in measured().items()}
    (small, t_small), (large, t_large) = sorted(times.items())
    b = (t_large - t_small) / (large - small)
    a = t_small - b * small
    lines = [
        f"Modelled by lammps_model.py, not run: NequIP in its default size on water, a = {1000 * a:.1f} ms, b = {1000 * b:.3f} ms per atom (lammps.md; a busy "
        f"machine), {1e6 * LATENCY:g} µs a message. Steps of the slowest rank in ms; in brackets, share of the time that is the work of one rank on as many atoms.",
        "",
        f"| atoms per rank | ranks | atoms | memory of a rank | {' | '.join(f'exchange, {k}' for k in NETWORKS)} | halo, 1 GB/s |",
        "|" + "---|" * 7,
    ]
    for n in (100, 1_000, 10_000, 100_000):
        for ranks in (2, 64, 1_000, 10_000):
            alone = step(n, 1, a, b, 1e9, False)
            cells = [step(n, ranks, a, b, w, False) for w in NETWORKS.values()] + [step(n, ranks, a, b, 1e9, True)]
            shown = " | ".join(f"{1000 * t:,.0f} ({alone / t:.2f})" for t in cells)
            lines.append(f"| {n:,} | {ranks:,} | {n * ranks:,} | {MEMORY * within(n, CUTOFF + SKIN) / 1e9:.2f} GB | {shown} |")
    both = [1000 * step(large / 2, 2, a, b, 1e9, halo) for halo in (False, True)]
    found = [measured()[large][f"LAMMPS, 2 × {mode}"] for mode in ("exchange", "halo")]
    lines += ["", f"What it says of the two ranks that were run, {large:,} atoms: exchange {both[0]:.0f} ms, measured {found[0]:.0f} (which waits for the other "
              f"rank on a busy machine too); halo {both[1]:.0f}, measured {found[1]:.0f}."]  # fmt: skip
    (HERE / "lammps_model.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
