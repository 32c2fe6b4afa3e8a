"""Writes weft.npz: a small Weft with random weights, and its energy, forces and stress from the equations, written out path by path.

    python make_weft.py weft.npz features 0; python make_weft.py weft_sums.npz sums 0; python make_weft.py weft_decay.npz sums 1

Nothing of gossamer's networks or operations is used but the 3j symbols: edges by ASE, harmonics as polynomials, loops over all paths.
"""

from __future__ import annotations

import itertools
import json
import math
import sys

import numpy as np
import torch
from ase.build import bulk
from ase.neighborlist import neighbor_list
from torch import Tensor

from gossamer.nn.spherical import wigner_3j

SETTINGS = {"l_max": 2, "num_features": 3, "num_layers": 3, "num_basis": 4, "radial_width": 5, "cutoff": 4.0, "envelope_power": 6}
ELEMENTS, MEAN_NEIGHBORS = [1, 8, 14], 20.0
L, C, LAYERS, B, WIDTH, CUTOFF, P = SETTINGS.values()
DECAY = float(sys.argv[3])
SCALES = np.arange(1.0, B + 1) ** -DECAY
SCALES /= np.sqrt((SCALES**2).mean())
SILU = 1.6791767923989418
"""c with <(c SiLU(z))²> = 1"""


def paths(l_in: int, wanted: list[int]) -> list[tuple[int, int, int]]:
    """(degree of the feature, of the harmonics, of the result), natural parity."""
    found = itertools.product(range(l_in + 1), range(L + 1), range(2 * L + 1))
    return [(a, b, c) for a, b, c in found if abs(a - b) <= c <= a + b and (a + b + c) % 2 == 0 and c in wanted]


def pairs(l: int) -> list[tuple[int, int]]:
    """Degrees of the factors that couple to l."""
    return [(a, b) for a in range(L + 1) for b in range(a, L + 1) if b - a <= l <= a + b and (a + b + l) % 2 == 0]


def random_weights(normalize: str) -> dict[str, Tensor]:
    rng = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (len(ELEMENTS), C), "readout.weight": (1, C)}
    for k in range(LAYERS):
        l_in, l_out, p = (0 if k == 0 else L), (0 if k == LAYERS - 1 else L), f"layers.{k}."
        ways = paths(l_in, list(range(l_out + 1)))
        outputs = [C * (1 + l_out), *[C] * l_out]
        shapes |= {f"{p}linear_in.{l}.weight": (C, C) for l in range(l_in + 1)}
        shapes |= {f"{p}convolution.radial.0.weight": (WIDTH, B), f"{p}convolution.radial.2.weight": (C * len(ways), WIDTH)}
        shapes |= {f"{p}linear_out.{l}.weight": (n, C * sum(w[2] == l for w in ways)) for l, n in enumerate(outputs)}
        if normalize == "sums" and l_out:
            shapes |= {f"{p}sum_norm.gamma.{l}": (n,) for l, n in enumerate(outputs)}
        if k:
            if normalize == "features":
                shapes |= {f"{p}norm.gamma.{l}": (C,) for l in range(l_in + 1)}
            shapes |= {f"{p}self_connection.{l}.weight": (outputs[l], C) for l in range(l_out + 1)}
            shapes[f"{p}elements.weight"] = (len(ELEMENTS), C)
        if l_out:
            shapes |= {f"{p}products.linear.{l}.weight": (n, C * len(pairs(l))) for l, n in enumerate(outputs)}
    return {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def symbols(a: int, b: int, c: int) -> Tensor:
    return torch.from_numpy(wigner_3j(a, b, c)) * math.sqrt(2 * c + 1)


def envelope(x: Tensor) -> Tensor:
    return 1 - (P + 1) * (P + 2) / 2 * x**P + P * (P + 2) * x ** (P + 1) - P * (P + 1) / 2 * x ** (P + 2)


def basis(x: Tensor) -> Tensor:
    return torch.stack([torch.sin(n * math.pi * x) / x * envelope(x) for n in range(1, B + 1)], -1)


def energy(vectors: Tensor, centre: Tensor, neighbour: Tensor, species: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Sum of the atoms' energies in the network's own units."""
    lengths = vectors.norm(dim=1)
    x, y, z = (vectors / lengths[:, None]).T
    s = math.sqrt(15)
    second = [s * x * z, s * x * y, math.sqrt(5) * (y**2 - (x**2 + z**2) / 2), s * y * z, s / 2 * (z**2 - x**2)]
    harmonics = [torch.ones_like(x)[:, None], math.sqrt(3) * torch.stack([x, y, z], 1), torch.stack(second, 1)]
    grid = torch.linspace(0.2, 1, 400, dtype=torch.float64)
    scale = float(((basis(grid) ** 2).mean(1) * grid**2).sum() / (grid**2).sum()) ** -0.5
    radial_basis = scale * basis(lengths / CUTOFF) * torch.from_numpy(SCALES)
    h = [w["embedding.weight"][species][:, None]]
    for k in range(LAYERS):
        p, l_out = f"layers.{k}.", 0 if k == LAYERS - 1 else L
        if f"{p}norm.gamma.0" in w:
            squares = sum((part**2).mean(dim=(1, 2)) for part in h) / len(h)
            h = [part * w[f"{p}norm.gamma.{l}"] / torch.sqrt(squares + 0.01)[:, None, None] for l, part in enumerate(h)]
        mixed = [part @ w[f"{p}linear_in.{l}.weight"].T / math.sqrt(C) for l, part in enumerate(h)]
        hidden = silu(radial_basis @ w[f"{p}convolution.radial.0.weight"].T / math.sqrt(B))
        radial = hidden @ w[f"{p}convolution.radial.2.weight"].T * SILU / math.sqrt(WIDTH)
        sums: list[list[Tensor]] = [[] for _ in range(l_out + 1)]
        for number, (a, b, c) in enumerate(paths(len(h) - 1, list(range(l_out + 1)))):
            own = radial[:, number * C : (number + 1) * C]
            messages = torch.einsum("ijk,eiu,ej,eu->eku", symbols(a, b, c), mixed[a][neighbour], harmonics[b], own)
            sums[c].append(torch.zeros(len(species), 2 * c + 1, C, dtype=torch.float64).index_add(0, centre, messages))
        out = []
        for l in range(l_out + 1):
            result = torch.cat(sums[l], 2) @ w[f"{p}linear_out.{l}.weight"].T / math.sqrt(C * len(sums[l]) * MEAN_NEIGHBORS)
            if k:
                scaled = h[l] * w[f"{p}elements.weight"][species][:, None]
                result = (result + scaled @ w[f"{p}self_connection.{l}.weight"].T / math.sqrt(C)) / math.sqrt(2)
            out.append(result)
        if f"{p}sum_norm.gamma.0" in w:  # the mean square over all channels
            squares = sum((part**2).mean(dim=1).sum(dim=1) for part in out) / sum(part.shape[2] for part in out)
            out = [part * w[f"{p}sum_norm.gamma.{l}"] / torch.sqrt(squares + 0.01)[:, None, None] for l, part in enumerate(out)]
        if l_out:
            a_of = [part[..., :C] for part in out]
            for l in range(l_out + 1):
                products = [torch.einsum("ijk,niu,nju->nku", symbols(a, b, l), a_of[a], a_of[b]) for a, b in pairs(l)]
                map_ = w[f"{p}products.linear.{l}.weight"] / math.sqrt(C * len(products))
                out[l] = (out[l] + torch.cat(products, 2) @ map_.T) / math.sqrt(2)
        gates = SILU * silu(out[0])
        h = [gates[..., :C], *(part * gates[..., l * C : (l + 1) * C] for l, part in enumerate(out[1:], 1))]
    return (h[0][:, 0] @ w["readout.weight"].T / math.sqrt(C)).sum()


def main() -> None:
    atoms = bulk("SiC", "zincblende", a=4.36, cubic=True)
    atoms.numbers[:] = [14, 8, 14, 8, 1, 8, 14, 1]
    atoms.rattle(0.1, seed=1)
    centre, neighbour, shifts = neighbor_list("ijS", atoms, CUTOFF)
    w, species = random_weights(sys.argv[2]), torch.tensor([ELEMENTS.index(n) for n in atoms.numbers])
    positions = torch.from_numpy(atoms.positions).requires_grad_()
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    moved = torch.eye(3, dtype=torch.float64) + (strain + strain.T) / 2
    i, j = torch.from_numpy(centre), torch.from_numpy(neighbour)
    vectors = (positions[j] + torch.from_numpy(shifts @ atoms.cell.array) - positions[i]) @ moved
    total = energy(vectors, i, j, species, w)
    gradient, virial = torch.autograd.grad(total, (positions, strain))
    np.savez_compressed(
        sys.argv[1], settings=np.array(json.dumps({**SETTINGS, "normalize": sys.argv[2], "basis_decay": DECAY})), elements=np.array(ELEMENTS), mean_neighbors=np.array(MEAN_NEIGHBORS),
        numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, energy=total.detach().numpy(), forces=-gradient.numpy(),
        stress=virial.numpy() / atoms.get_volume(), **{f"weights/{name}": value.numpy() for name, value in w.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
