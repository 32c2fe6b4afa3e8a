"""Three-phonon linewidths by lattice sums: phono3py's numbers, many times faster.

The interaction of three phonons (Togo, Chaput, Tanaka, Phys. Rev. B 91, 094306 (2015), Eq. 8-10) needs the third-order force constants
in reciprocal space,

    Φ(q0, q1, q2) = Σ_{R_i, R_j, R_k} Φ(R_i, R_j, R_k) exp(i (q0 R_i + q1 R_j + q2 R_k)),    q0 + q1 + q2 = G,

summed over lattice vectors R of which one is zero. phono3py goes through all pairs of atoms in the supercell for each triplet of wave vectors.
Since q1 = G - q0 - q2, what varies between the triplets of one grid point is q2 alone:

    Φ(q0, q1, q2) = Σ_B exp(i q2 B) Σ_A exp(i q0 A) Φ(A, B),    A = R_i - R_j,  B = R_k - R_j,

so the sum over A is taken once for a grid point, and that over B is a Fourier transform to the mesh, axis by axis. Weights of the
tetrahedron method, symmetry and the sum over triplets remain phono3py's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
LEGS = ((0, 1, 2), (1, 0, 2), (2, 1, 0))
"""Which of the three atoms is at home and which the other two are: force constants are the mean of the three choices."""


EQUAL = 1e-10
"""THz: corners of a tetrahedron nearer than that are equal, and count nothing between them, as in phonopy."""


class LatticeSum:
    """Third-order force constants of a crystal, ordered for sums over lattice vectors.

    Args:
        interaction: `phono3py.phonon3.interaction.Interaction` with force constants and phonons; its average over the three atoms at
            home (``make_r0_average``) is what is computed.
    """

    def __init__(self, interaction: Any) -> None:
        primitive = interaction.primitive
        self.n_atoms = len(primitive)
        terms = [_terms(interaction, leg, atom) for leg in LEGS for atom in range(self.n_atoms)]
        steps, atoms, constants = (np.concatenate(parts) for parts in zip(*terms, strict=True))
        keys, row = np.unique(np.concatenate([steps, atoms], axis=1), axis=0, return_inverse=True)
        gather = sparse.csr_array((np.ones(len(row)), (row.ravel(), np.arange(len(row)))), shape=(len(keys), len(row)))
        self.constants: Array = gather @ constants  # (n_terms, 27) eV/Å³ of equal A, B and atoms
        self.first = keys[:, :3]  # A
        self.low = keys[:, 3:6].min(axis=0)  # of B
        self.box = tuple((keys[:, 3:6].max(axis=0) - self.low + 1).tolist())
        place = np.ravel_multi_index((*(keys[:, 3:6] - self.low).T, *keys[:, 6:].T), (*self.box, *(self.n_atoms,) * 3))
        order = np.argsort(place, kind="stable")
        self.constants, self.first = self.constants[order], self.first[order]
        self.n_places = int(np.prod(self.box)) * self.n_atoms**3
        self.starts = np.searchsorted(place[order], np.arange(self.n_places + 1))
        self.phases = [np.exp(2j * np.pi * np.outer(np.arange(n), low + np.arange(width)) / n)
                       for n, low, width in zip(interaction.mesh_numbers, self.low, self.box, strict=True)]  # fmt: skip

    def at(self, wave_vector: Array) -> NDArray[np.complex128]:
        """(*box, n_bands, n_bands, n_bands): summed over A for the first of the three wave vectors (in reciprocal lattice vectors)."""
        angle = 2 * np.pi * (self.first @ wave_vector)
        shape = (self.n_places, len(angle))
        columns = np.arange(len(angle))
        real, imaginary = (sparse.csr_array((f(angle), columns, self.starts), shape=shape) @ self.constants for f in (np.cos, np.sin))
        n = self.n_atoms
        summed = (real + 1j * imaginary).reshape(*self.box, n, n, n, 3, 3, 3)
        return summed.transpose(0, 1, 2, 3, 6, 4, 7, 5, 8).reshape(*self.box, 3 * n, 3 * n, 3 * n)

    def on_mesh(self, summed: NDArray[np.complex128]) -> NDArray[np.complex128]:
        """(n_q, ...): summed over B, for the third wave vector at every point of the mesh, the last axis fastest."""
        for phases in self.phases:  # an axis of B goes away in front, one of the mesh comes behind the others
            summed = np.moveaxis(np.tensordot(phases, summed, axes=(1, 0)), 0, 2)
        return summed.reshape(-1, *summed.shape[3:])


def _terms(interaction: Any, leg: tuple[int, int, int], atom: int) -> tuple[Integers, Integers, Array]:
    """Lattice vectors A and B (n, 6), atoms i, j, k (n, 3) and force constants (n, 27) with one atom of the primitive cell at home.

    Vectors to images at equal distance share the force constants. Where all three atoms are nearest images of each other the three
    choices of home are equal, and the first counts for all.
    """
    primitive, fc3, shortest = interaction.primitive, interaction.fc3, interaction.all_shortest[atom] != 0
    vectors, counts = primitive.get_smallest_vectors()
    species = np.array([primitive.p2p_map[s] for s in primitive.s2p_map])
    places = primitive.scaled_positions
    many, start = counts[:, atom, 0], counts[:, atom, 1]
    images = np.repeat(np.arange(len(many)), many)  # atom of the supercell of each vector
    index = np.concatenate([np.arange(s, s + m) for s, m in zip(start, many, strict=True)])
    lattice = np.rint(vectors[index] - places[species[images]] + places[atom]).astype(np.int64)
    factor = np.where(shortest, 3.0 if leg[0] == 0 else 0.0, 1.0) / 3 / np.outer(many, many)
    x, y = (a.ravel() for a in np.meshgrid(np.arange(len(images)), np.arange(len(images)), indexing="ij"))
    used = factor[images[x], images[y]] != 0
    x, y = x[used], y[used]
    row = atom if len(fc3) < fc3.shape[1] else primitive.p2s_map[atom]
    constants = fc3[row][images[x], images[y]] * factor[images[x], images[y]][:, None, None, None]
    axes = np.argsort(leg)
    where = np.zeros((3, len(x), 3), dtype=np.int64)
    where[leg[1]], where[leg[2]] = lattice[x], lattice[y]
    atoms = np.empty((len(x), 3), dtype=np.int64)
    atoms[:, leg[0]], atoms[:, leg[1]], atoms[:, leg[2]] = atom, species[images[x]], species[images[y]]
    steps = np.concatenate([where[0] - where[1], where[2] - where[1]], axis=1)
    return steps, atoms, constants.transpose(0, *(1 + axes)).reshape(-1, 27)


class Strength:
    """|Φ_λλ'λ''|² of all triplets of a grid point, in eV².

    Args:
        interaction: As for `LatticeSum`.
    """

    def __init__(self, interaction: Any) -> None:
        self.interaction = interaction
        self.sum = LatticeSum(interaction)
        primitive, grid, phonons = interaction.primitive, interaction.bz_grid, interaction.phonons
        self.mesh = np.array(interaction.mesh_numbers)
        self.addresses = np.array(grid.addresses)
        # from vectors between atoms, which phono3py's eigenvectors belong to, to lattice vectors
        phase = np.exp(2j * np.pi * (self.addresses / self.mesh) @ primitive.scaled_positions.T) / np.sqrt(primitive.masses)
        vectors = np.repeat(phase, 3, axis=1)[:, :, None] * phonons.eigenvectors
        real = phonons.frequencies > interaction.cutoff_frequency
        scale = np.where(real, 1 / np.sqrt(np.where(real, phonons.frequencies, 1.0)), 0.0)
        self.vectors = vectors * scale[:, None, :]  # (n_grid, 3 n_atoms, n_bands), over √(mass · frequency)

    def __call__(self, triplets: Integers) -> Array:
        """(n_triplets, n_bands, n_bands, n_bands) for triplets of grid points (n_triplets, 3) of which the first is the same."""
        point = triplets[0, 0]
        summed = np.moveaxis(self.sum.at(self.addresses[point] / self.mesh), 3, -1) @ self.vectors[point]
        mesh_point = np.ravel_multi_index(tuple((self.addresses[triplets[:, 2]] % self.mesh).T), tuple(self.mesh))
        second, third = self.vectors[triplets[:, 1]].transpose(0, 2, 1), self.vectors[triplets[:, 2]]
        out = np.empty((len(triplets), *(summed.shape[-1],) * 3))
        for band in range(summed.shape[-1]):
            amplitude = second @ self.sum.on_mesh(summed[..., band])[mesh_point] @ third
            out[:, band] = amplitude.real**2 + amplitude.imag**2
        return out * self.interaction.unit_conversion_factor


def linewidths(interaction: Any, grid_points: Integers, temperature: float) -> Array:
    """(n_points, n_bands) imaginary parts of the self-energy in THz by three phonons (Togo, Chaput, Tanaka, Eq. 11).

        Γ_λ = 18π/ħ² Σ_λ'λ'' |Φ_λλ'λ''|² {(n' + n'' + 1) δ(ω - ω' - ω'') + (n' - n'') [δ(ω + ω' - ω'') - δ(ω - ω' + ω'')]}

    Args:
        interaction: As for `LatticeSum`.
        grid_points: Indices on phono3py's grid.
        temperature: K.
    """
    from phono3py.phonon3.imag_self_energy import ImagSelfEnergy, average_by_degeneracy
    from phono3py.phonon3.triplets import get_triplets_at_q, get_triplets_integration_weights
    from phonopy.physical_units import get_physical_units

    units, grid, phonons = get_physical_units(), interaction.bz_grid, interaction.phonons
    strength, bands = Strength(interaction), np.arange(phonons.frequencies.shape[1])
    energies = phonons.frequencies * units.THzToEv / (units.KB * temperature)
    present = phonons.frequencies > interaction.cutoff_frequency
    occupation = np.where(present, 1 / np.expm1(np.where(present, energies, 1.0)), 0.0)
    out = np.zeros((len(grid_points), len(bands)))
    for row, point in enumerate(grid_points):
        triplets, multiplicity = get_triplets_at_q(point, grid)[:2]
        # what phono3py's function asks of an interaction at a grid point; setting it there goes through all triplets in Python
        here = SimpleNamespace(get_triplets_at_q=lambda t=triplets: (t,), phonons=phonons, bz_grid=grid, symmetrize_tetrahedra=False)
        decay, absorption = get_triplets_integration_weights(here, phonons.frequencies[point].copy(), None)[0]
        second, third = (occupation[triplets[:, k]] for k in (1, 2))
        decay *= (second[:, :, None] + third[:, None, :] + 1)[:, None]
        absorption *= (second[:, :, None] - third[:, None, :])[:, None]
        sums = np.einsum("tijk,tijk->ti", strength(triplets), decay + absorption)
        out[row] = average_by_degeneracy(multiplicity @ sums, bands, phonons.degenerate_ids[point])
    return out * ImagSelfEnergy(interaction).unit_conversion_factor


def isotope_linewidths(interaction: Any, grid_points: Integers) -> Array:
    """(n_points, n_bands) imaginary parts of the self-energy in THz by isotopes of natural abundance (Tamura, Phys. Rev. B 27, 858 (1983)).

        Γ_λ = π ω_λ² / 4N Σ_λ' δ(ω_λ - ω_λ') Σ_κ g_κ |e*_κλ · e_κλ'|²

    Of the tetrahedra only those are visited whose frequencies enclose ω_λ.

    Args:
        interaction: As for `LatticeSum`.
        grid_points: Indices on phono3py's grid.
    """
    from phono3py.other.isotope import get_mass_variances

    grid, phonons, cutoff = interaction.bz_grid, interaction.phonons, interaction.cutoff_frequency
    frequencies, vectors = phonons.frequencies[grid.grg2bzg], phonons.eigenvectors[grid.grg2bzg]
    n_points, n_bands = frequencies.shape
    n_atoms = n_bands // 3
    variances = get_mass_variances(interaction.primitive)
    tetrahedra = Tetrahedra(np.array(grid.addresses[grid.grg2bzg]), frequencies, grid)
    columns = np.ascontiguousarray(vectors.reshape(n_points, n_atoms, 3, n_bands).transpose(1, 2, 0, 3)).reshape(n_atoms, 3, -1)
    columns *= (frequencies > cutoff).ravel()
    out = np.zeros((len(grid_points), n_bands))
    for row, point in enumerate(grid_points):
        own = phonons.eigenvectors[point].reshape(n_atoms, 3, n_bands).conj().transpose(0, 2, 1)
        for band, omega in enumerate(phonons.frequencies[point]):
            if omega > cutoff:
                modes, weights = tetrahedra.weights(omega)
                products = np.abs(own[:, None, band] @ columns[:, :, modes])[:, 0] ** 2
                out[row, band] = np.pi / 4 * omega**2 * (variances @ products @ weights) / n_points
    return out


class Tetrahedra:
    """Weights of the linear tetrahedron method for δ(ω - ω') on a mesh (Blöchl, Jepsen, Andersen, Phys. Rev. B 49, 16223 (1994)).

    Args:
        addresses: (n_points, 3) integer places on the mesh.
        frequencies: (n_points, n_bands).
        grid: phono3py's, which says along which diagonal a cell is cut.
    """

    def __init__(self, addresses: Integers, frequencies: Array, grid: Any) -> None:
        from phonopy.phonon.tetrahedron_method import get_tetrahedra_relative_gr_grid_address

        mesh = np.array(grid.D_diag)
        around = np.array(get_tetrahedra_relative_gr_grid_address(grid))  # (24, 4, 3): all that share a point, translations of six
        shapes = {tuple(map(tuple, sorted((vertices - min(vertices.tolist())).tolist()))) for vertices in around}
        index = np.empty(mesh, dtype=np.int64)
        index[tuple((addresses % mesh).T)] = np.arange(len(addresses))
        corners = np.concatenate([index[tuple(np.moveaxis((addresses[:, None] + np.array(s)) % mesh, -1, 0))] for s in sorted(shapes)])
        n_bands = frequencies.shape[1]
        modes = corners[:, None, :] * n_bands + np.arange(n_bands)[None, :, None]
        values = frequencies.ravel()[modes].reshape(-1, 4)
        order = np.argsort(values, axis=1)
        values = np.take_along_axis(values, order, axis=1)
        by_low = np.argsort(values[:, 0])
        self.values = np.ascontiguousarray(values[by_low].T)  # (4, n_tetrahedra), each ordered, all by the lowest
        self.modes = np.ascontiguousarray(np.take_along_axis(modes.reshape(-1, 4), order, axis=1)[by_low].T)
        self.widest = float((self.values[3] - self.values[0]).max())

    def weights(self, omega: float) -> tuple[Integers, Array]:
        """Modes (index of the point times n_bands plus band) near the frequency, and their weights."""
        start, end = np.searchsorted(self.values[0], (omega - self.widest, omega), side="right")
        chosen = start + np.flatnonzero(omega < self.values[3, start:end])
        v, modes = self.values[:, chosen], self.modes[:, chosen]
        out = np.zeros(v.shape)
        part = (omega >= v[1]).astype(int) + (omega >= v[2])
        for which, formula in enumerate((_below, _between, _above)):
            rows = np.flatnonzero((part == which) & (v[which + 1] - v[which] > EQUAL))
            out[:, rows] = formula(omega, *v[:, rows])
        summed = np.bincount(modes.ravel(), out.ravel()) / 6
        found = np.flatnonzero(summed)
        return found, summed[found]


def _below(w: float, a: Array, b: Array, c: Array, d: Array) -> Array:
    """(4, n) weights of a tetrahedron's corners with frequencies a <= w < b <= c <= d."""
    x, y, z = (w - a) / (b - a), (w - a) / (c - a), (w - a) / (d - a)
    return np.stack([3 - x - y - z, x, y, z]) * (x * y / (d - a))


def _between(w: float, a: Array, b: Array, c: Array, d: Array) -> Array:
    """As `_below`, for b <= w < c."""
    ac, ad, bc, bd = (w - a) / (c - a), (w - a) / (d - a), (w - b) / (c - b), (w - b) / (d - b)
    first, second = (1 - bc) * ac, bc * (1 - bd)  # the two triangles that the section is made of
    both = first + second
    return np.stack([(1 - ad) * both + (1 - ac) * first, (1 - bc) * both + (1 - bd) * second,
                     bc * both + ac * first, ad * both + bd * second]) / (d - a)  # fmt: skip


def _above(w: float, a: Array, b: Array, c: Array, d: Array) -> Array:
    """As `_below`, for c <= w < d."""
    x, y, z = (d - w) / (d - a), (d - w) / (d - b), (d - w) / (d - c)
    return np.stack([x, y, z, 3 - x - y - z]) * (y * z / (d - a))
