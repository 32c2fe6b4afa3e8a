"""The ASE calculator, molecular dynamics and relaxation."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms, FixBondLengths, FixSymmetry
from conftest import make_potential, often

from gossamer.data.atoms import as_atoms
from gossamer.files import locked
from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.dispersion import with_dispersion
from gossamer.simulation.md import md
from gossamer.simulation.md_files import md_files
from gossamer.simulation.options import MDConfig, RelaxConfig
from gossamer.simulation.relax import relax, relax_files
from gossamer.simulation.several import distinct
from gossamer.simulation.state import without_labels

ELEMENTS = ["H", "C", "O", "Si"]


def argon(repeat: int = 2) -> Atoms:
    atoms = bulk("Ar", cubic=True, a=5.4).repeat(repeat)
    atoms.rattle(0.05, seed=0)
    return atoms


def lj() -> LennardJones:
    return LennardJones(epsilon=0.0103, sigma=3.4, rc=6.5, smooth=True)


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


# --- calculator ---------------------------------------------------------------------------------------------------


def test_calculator_equals_the_potential(crystal: Atoms) -> None:
    from gossamer.data.structure import Structure

    potential = make_potential(ELEMENTS)
    (expected,) = potential.predict(
        [Structure(atomic_numbers=crystal.numbers, positions=crystal.positions, cell=crystal.cell.array, pbc=np.array(crystal.pbc))]
    )
    crystal.calc = Calculator(potential)
    assert crystal.get_potential_energy() == pytest.approx(expected["energy"], abs=1e-11)
    np.testing.assert_allclose(crystal.get_forces(), expected["forces"], atol=1e-11)
    np.testing.assert_allclose(crystal.get_stress(voigt=False), expected["stress"], atol=1e-12)
    assert crystal.get_potential_energies().sum() == pytest.approx(expected["energy"], abs=1e-11)


@pytest.mark.parametrize("name", ["leignn", "nequip"])
def test_stresses_of_atoms_sum_to_the_stress(name: str, crystal: Atoms) -> None:
    """Of the whole, and of each of two slabs that do not see each other; images of an atom have the same virial."""
    potential = make_potential(ELEMENTS, name=name)
    crystal.calc = Calculator(potential)
    stresses = crystal.get_stresses()
    assert stresses.shape == (len(crystal), 6)
    np.testing.assert_allclose(stresses.sum(axis=0), crystal.get_stress(), atol=1e-12)
    twice = crystal.repeat((2, 1, 1))
    twice.calc = crystal.calc
    np.testing.assert_allclose(twice.get_stresses(), np.tile(stresses, (2, 1)) / 2, atol=1e-12)
    slabs = bulk("SiC", "rocksalt", a=4.3, cubic=True)
    slabs.rattle(0.1, seed=0)
    slabs.cell[2, 2] = 40
    both = slabs + slabs
    both.positions[len(slabs) :, 2] += 20
    for atoms in (slabs, both):
        atoms.calc = Calculator(potential)
    np.testing.assert_allclose(both.get_stresses()[len(slabs) :].sum(axis=0), slabs.get_stress(), atol=1e-12)


def test_skin_changes_nothing(crystal: Atoms) -> None:
    """Along a random walk, wrapped now and then, a skinned calculator gives the very numbers of one without."""
    potential = make_potential(ELEMENTS, dtype=torch.float32)
    with_skin, without = Calculator(potential, skin=1.0), Calculator(potential, skin=0.0)
    atoms = crystal.repeat((2, 2, 1))
    rng = np.random.default_rng(0)
    for step in range(20):
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
        if step % 7 == 6:
            atoms.wrap()
        results = []
        for calculator in (with_skin, without):
            copy = atoms.copy()
            copy.calc = calculator
            results.append((copy.get_potential_energy(), copy.get_forces()))
        assert results[0][0] == results[1][0]
        np.testing.assert_array_equal(results[0][1], results[1][1])
    assert with_skin.neighbors.builds < without.neighbors.builds


def test_calculator_says_what_it_cannot_do(ethanol: Atoms, crystal: Atoms) -> None:
    ethanol.calc = Calculator(make_potential(ELEMENTS))
    with pytest.raises(PropertyNotImplementedError, match="periodicity along all three axes"):
        ethanol.get_stress()
    with pytest.raises(PropertyNotImplementedError, match="periodicity along all three axes"):
        ethanol.get_stresses()
    crystal.calc = Calculator(make_potential(ELEMENTS, direct_forces=True))
    with pytest.raises(PropertyNotImplementedError, match="forces directly: it has no stress"):
        crystal.get_stress()
    long_range = make_potential(ELEMENTS)
    long_range.terms.append(torch.nn.Identity())
    with pytest.raises(ValueError, match="has terms of positions and cells has no virials of atoms"):
        long_range.virials(Calculator(make_potential(ELEMENTS)).graph(crystal))
    with pytest.raises(ValueError, match="skin must not be negative"):
        Calculator(make_potential(ELEMENTS), skin=-1)
    gold = bulk("Au")
    gold.calc = Calculator(make_potential(ELEMENTS))
    with pytest.raises(ValueError, match=r"Au \(79\) not among the potential's elements"):
        gold.get_potential_energy()
    twins = Atoms("CC", positions=[[0, 0, 0], [0, 0, 0]])
    twins.calc = Calculator(make_potential(ELEMENTS))
    with pytest.raises(ValueError, match=r"not finite.* 0\.000 Å apart"):
        twins.get_forces()
    lost = Atoms("CC", positions=[[0, 0, 0], [0, 0, np.nan]])
    lost.calc = Calculator(make_potential(ELEMENTS))
    with pytest.raises(ValueError, match="Position of atom 1 is not finite"):
        lost.get_forces()


# --- molecular dynamics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", often(["nve", "langevin", "nose-hoover", "npt", "npt-anisotropic"], ["langevin"]))
def test_resumed_dynamics_are_exact(ensemble: str, tmp_path: Path) -> None:
    """Stopped half way and resumed by a fresh calculator, every later frame is the same to the last bit."""
    options = dict(temperature=40.0, timestep=4.0, ensemble=ensemble, interval=5, seed=3, progress=False)
    save(make_potential(["Ar"], dtype=torch.float32, cutoff=5.0), tmp_path / "p.safetensors")
    for name, stops in (("whole", [40]), ("parts", [15, 40])):
        for k, steps in enumerate(stops):
            result = md(
                tmp_path / "p.safetensors", argon(1), steps=steps, out=tmp_path / name, resume=k > 0, max_temperature=1e9, **options
            )
            assert result["broken"] is None
            assert (result["steps"], result["new_steps"]) == (steps, steps - sum(stops[:k]))
    assert table(tmp_path / "whole") == table(tmp_path / "parts")
    for a, b in zip(*(ase.io.read(tmp_path / n / "trajectory.traj", ":") for n in ("whole", "parts")), strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_array_equal(a.get_momenta(), b.get_momenta())
        np.testing.assert_array_equal(a.cell.array, b.cell.array)


@pytest.mark.thorough
def test_killed_dynamics_resume_exactly(tmp_path: Path) -> None:
    save(make_potential(["Ar"], dtype=torch.float32, cutoff=5.0), tmp_path / "p.safetensors")
    ase.io.write(tmp_path / "argon.extxyz", argon(1))
    options = MDConfig(steps=120, temperature=40, timestep=2, interval=4, max_temperature=1e9, resume=True)
    command = [sys.executable, "-m", "gossamer.cli", "md", str(tmp_path / "p.safetensors"), str(tmp_path / "argon.extxyz"), "--steps", "120",
               "--temperature", "40", "--timestep", "2", "--interval", "4", "--max-temperature", "1e9", "--out", str(tmp_path / "cut")]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    state = tmp_path / "cut" / "state.npz"
    while (not state.exists() or np.load(state)["integrator.nsteps"] < 8) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert int(np.load(state)["integrator.nsteps"]) < 120
    for name in ("cut", "whole"):
        assert md(tmp_path / "p.safetensors", tmp_path / "argon.extxyz", options, out=tmp_path / name, progress=False)["steps"] == 120
    assert table(tmp_path / "cut") == table(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob(".*"))


def test_thermostats_hold_the_temperature(tmp_path: Path) -> None:
    options = MDConfig(temperature=300, steps=400, timestep=5, interval=5, thermostat_time=50, seed=1)
    for ensemble in ("langevin", "nose-hoover"):
        copper = bulk("Cu", cubic=True).repeat((2, 1, 1))
        result = md(EMT(), copper, options, ensemble=ensemble, out=tmp_path / ensemble, progress=False)
        assert result["mean_temperature_K"] == pytest.approx(300, rel=0.2), ensemble
        half = [{k: float(v) for k, v in row.items()} for row in table(tmp_path / ensemble)[40:]]
        assert result["mean_pressure_GPa"] == pytest.approx(np.mean([row["pressure_GPa"] for row in half]))
        grams = copper.get_masses().sum() / 6.02214076e23
        assert result["mean_density_g_per_cm3"] == pytest.approx(grams / (copper.get_volume() * 1e-24), rel=1e-6)
        assert (result["energy_drift_meV_per_atom_per_ps"] is None) == (ensemble == "langevin")
    conserved = np.array([float(r["conserved_energy_eV"]) for r in table(tmp_path / "nose-hoover")])
    assert np.ptp(conserved) / 8 < 1e-3
    meV, ps = 1000 * (conserved - conserved.mean())[40:] / 8, 0.025 * np.arange(41)
    slope = (meV * (ps - ps.mean())).sum() / ((ps - ps.mean()) ** 2).sum()
    assert result["energy_drift_meV_per_atom_per_ps"] == pytest.approx(slope, rel=1e-6)


@pytest.mark.slow
def test_barostat_finds_the_pressure(tmp_path: Path) -> None:
    md(
        EMT(), bulk("Cu", cubic=True).repeat(2), temperature=300, steps=700, timestep=4, ensemble="npt", out=tmp_path / "npt", interval=10,
        pressure=5.0, barostat_time=300, progress=False,
    )  # fmt: skip
    pressures = [float(r["pressure_GPa"]) for r in table(tmp_path / "npt")]
    assert np.mean(pressures[25:]) == pytest.approx(5.0, abs=0.7)


def test_guard_stops_a_hot_run_and_saves_the_frame(tmp_path: Path) -> None:
    atoms = argon()
    atoms.positions[1] = atoms.positions[0] + [1.9, 0, 0]
    result = md(lj(), atoms, temperature=30, steps=500, timestep=2, ensemble="nve", out=tmp_path / "run", interval=5, progress=False)
    assert "temperature" in result["broken"]
    assert result["broken"] is not None
    assert len(ase.io.read(tmp_path / "run" / "broken.extxyz")) == 32
    sound = [float(row["temperature_K"]) for row in table(tmp_path / "run")[:-1]]
    assert result["mean_temperature_K"] == pytest.approx(np.mean(sound[len(sound) // 2 :]), abs=0.01), "without the frame that broke it"


def test_a_run_without_frames_answers_in_json(tmp_path: Path) -> None:
    class Nothing(EMT):  # type: ignore[misc]
        def calculate(self, *args: Any, **kwargs: Any) -> None:
            super().calculate(*args, **kwargs)
            self.results["energy"] = float("nan")

    answer = md(Nothing(), bulk("Cu", cubic=True), steps=5, out=tmp_path / "run", progress=False)
    assert "energy is not finite" in answer["broken"]
    assert answer["mean_temperature_K"] is None
    json.dumps(answer, allow_nan=False)


def test_guard_watches_collapse_and_bonds(tmp_path: Path) -> None:
    close = argon()
    close.positions[1] = close.positions[0] + [0.8, 0, 0]
    options = MDConfig(temperature=30, ensemble="nve", interval=5, max_temperature=1e12)
    assert "Å apart" in md(lj(), close, options, steps=5, timestep=0.01, out=tmp_path / "a", progress=False)["broken"]
    pair = Atoms("H2", positions=[[0, 0, 0], [0.7, 0, 0]])
    pair.set_momenta([[0, 0, 0], [3.0, 0, 0]])
    calculator = LennardJones(epsilon=1e-6, sigma=0.3, rc=2.0)
    result = md(calculator, pair, options, steps=200, out=tmp_path / "b", max_bond_stretch=0.5, progress=False)
    assert "bond 0-1 has changed by" in result["broken"]


@pytest.mark.parametrize("ensemble", ["npt", "npt-anisotropic"])
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_a_cell_that_leaves_sanity_breaks_the_run(ensemble: str, tmp_path: Path) -> None:
    answer = md(lj(), argon(1), steps=40, timestep=500, ensemble=ensemble, out=tmp_path / "run", progress=False)
    assert "the cell has left sanity" in answer["broken"] or "not finite" in answer["broken"]
    assert (tmp_path / "run" / "broken.extxyz").exists()


def test_velocities_of_the_structure_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And that is said, as a warning where no thermostat will bring them to the temperature; unless new ones are asked for."""
    atoms = argon()
    atoms.set_momenta(np.tile([[0.1, 0.0, -0.1], [-0.1, 0.0, 0.1]], (16, 1)))
    md(lj(), atoms, steps=5, timestep=1, ensemble="nve", out=tmp_path / "run", interval=5, max_temperature=1e9, progress=False)
    first = ase.io.read(tmp_path / "run" / "trajectory.traj", 0)
    np.testing.assert_allclose(first.get_momenta(), atoms.get_momenta())
    assert f"velocities of the structure are kept: {atoms.get_temperature():.0f} K, where temperature says 300 K" in caplog.text
    caplog.clear()
    md(lj(), atoms, steps=5, timestep=1, ensemble="nve", new_velocities=True, out=tmp_path / "new", interval=5, progress=False)
    first = ase.io.read(tmp_path / "new" / "trajectory.traj", 0)
    assert first.get_temperature() == pytest.approx(300, rel=0.5)
    assert not np.allclose(first.get_momenta(), atoms.get_momenta())
    assert "are kept" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temperature=-1), r"temperature: Input should be greater than 0 \(found -1\)"),
        (dict(steps=0), r"steps: Input should be greater than 0 \(found 0\)"),
        (dict(timestep=0), "timestep: Input should be greater than 0"),
        (dict(ensemble="nvt"), r"ensemble: Input should be 'nve', 'langevin', .* \(found 'nvt'\)"),
        (dict(temprature=10), r"temprature: unknown setting. Did you mean temperature\?"),
        (dict(compiled=True), "compiled: unknown setting"),
        (dict(way="fast"), "way: Input should be 'auto', 'plain', 'kernels', 'program' or 'graph'"),
        (dict(way="plain"), "way, dtype and device are for potentials: a calculator runs as it was made"),
        (dict(dtype="float32"), "way, dtype and device are for potentials"),
        (dict(device="cuda"), "way, dtype and device are for potentials"),
        (dict(seed=-1), "seed: Input should be greater than or equal to 0"),
        (dict(frame=1), "frame 1 is asked of Atoms, which are one frame"),
        (dict(supercell=(2, 0, 1)), "supercell.1: Input should be greater than or equal to 1"),
        (dict(structure=molecule("H2O"), supercell=(1, 2, 1)), "supercell 1 2 1 repeats along axes that are not periodic"),
        (dict(ensemble="nve", temperature_end=10), "temperature_end 10 K needs a thermostat, and nve has none"),
        (dict(ensemble="nve", thermostat_time=50), "thermostat_time 50 fs needs a thermostat, and nve has none"),
        (dict(barostat_time=500), "barostat_time 500 fs needs a barostat, and langevin has none"),
        (dict(collect_spacing=50), "there is no collect: give both"),
        (dict(pressure=1.5), "pressure 1.5 GPa needs a barostat, and langevin has none. Choose npt or npt-anisotropic"),
        (dict(structure=molecule("H2O"), ensemble="npt-anisotropic"), "npt-anisotropic needs a structure that is periodic"),
        (dict(structure=Atoms("H2", positions=[[0, 0, 0], [1, 0, 0]]), ensemble="npt"), "npt needs a structure that is periodic"),
        (dict(structure="nowhere.xyz"), "There is no structure file 'nowhere.xyz'"),
    ],
)
def test_wrong_use_of_dynamics(change: dict, message: str, tmp_path: Path) -> None:
    arguments = {"model": lj(), "structure": argon(1), "out": tmp_path / "run", "progress": False, **change}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        md(**arguments)


@pytest.mark.parametrize("ensemble", ["nve", "nose-hoover", "npt"])
def test_the_centre_of_mass_of_a_structure_with_velocities_comes_to_rest(ensemble: str, tmp_path: Path) -> None:
    """As in the last frame of Langevin dynamics: its motion is no heat, and the others would get less for it. Langevin itself goes on with it."""
    atoms = argon()
    internal = np.tile([[0.1, 0.0, -0.1], [-0.1, 0.0, 0.1]], (16, 1))
    atoms.set_momenta(internal + np.array([0.0, 2.0, 0.0]))
    for kind, expected in ((ensemble, internal), ("langevin", atoms.get_momenta())):
        md(lj(), atoms, steps=1, ensemble=kind, out=tmp_path / kind, max_temperature=1e9, progress=False)
        first = ase.io.read(tmp_path / kind / "trajectory.traj", 0)
        np.testing.assert_allclose(first.get_momenta(), expected, atol=1e-12)


def test_a_structure_at_rest_gets_velocities(tmp_path: Path) -> None:
    """VASP's relaxed structures end with velocities of zero: chains would multiply them for ever."""
    atoms = argon()
    ase.io.write(tmp_path / "CONTCAR", atoms, format="vasp")
    with open(tmp_path / "CONTCAR", "a") as file:
        file.write("\n" + "  0.00000000E+00  0.00000000E+00  0.00000000E+00\n" * len(atoms))
    md(lj(), tmp_path / "CONTCAR", steps=1, ensemble="nose-hoover", out=tmp_path / "md", progress=False)
    assert float(table(tmp_path / "md")[0]["temperature_K"]) == pytest.approx(300, rel=0.5)


def test_dynamics_refuse_to_overwrite_and_to_resume_something_else(tmp_path: Path) -> None:
    md(lj(), argon(1), temperature=40, steps=10, out=tmp_path / "run", progress=False)
    with pytest.raises(FileExistsError, match="holds a simulation already"):
        md(lj(), argon(1), temperature=40, steps=20, out=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"other settings: temperature 40\.0 \(now 50\.0\)"):
        md(lj(), argon(1), temperature=50, steps=20, out=tmp_path / "run", resume=True, progress=False)
    with pytest.raises(ValueError, match="other atoms"):
        md(lj(), argon(2), temperature=40, steps=20, out=tmp_path / "run", resume=True, progress=False)
    (tmp_path / "run" / "state.npz").write_bytes(b"not a state")
    with pytest.raises(ValueError, match="cannot be read"):
        md(lj(), argon(1), temperature=40, steps=20, out=tmp_path / "run", resume=True, progress=False)


@pytest.mark.parametrize("engine", ["ase", "torchsim"])
def test_a_run_goes_on_with_what_it_began_with(engine: str, tmp_path: Path) -> None:
    """Not with another potential, other masses, periodicity or constraints; states of older versions, which do not say, pass."""
    if engine == "torchsim":
        pytest.importorskip("torch_sim")
    potential, other = (make_potential(["Ar"], cutoff=5.0, seed=seed) for seed in (0, 1))
    atoms = argon(1)
    atoms.set_momenta(np.ones((4, 3)))
    heavy, slab, held = atoms.copy(), atoms.copy(), atoms.copy()
    heavy.set_masses([80.0] * 4)
    slab.pbc = False
    held.set_constraint(FixAtoms([0]))

    def run(model: Any, start: Atoms, steps: int, resume: bool = True) -> dict[str, Any]:
        ase.io.write(tmp_path / "ar.traj", start)
        options = MDConfig(steps=steps, way="plain", temperature=40, max_temperature=1e9, engine=engine, out=tmp_path, resume=resume)
        (answer,) = md_files(model, [tmp_path / "ar.traj"], options, progress=False)
        return answer

    assert run(potential, atoms, 5, False)["steps"] == 5
    for model, start, message in (
        (other, atoms, r"belongs to something else: potential [0-9a-f]{12} \(now [0-9a-f]{12}\)"),
        (potential, heavy, r"masses 159.8 \(.*\) \(now 320.0"),
        (potential, slab, r"pbc T T T \(now F F F\)"),
        *([(potential, held, r"constraints none \(now FixAtoms \(")] if engine == "ase" else []),
    ):
        assert re.search(message, run(model, start, 10)["error"])
    assert run(deepcopy(potential).to(torch.float32), atoms, 10)["steps"] == 10, "in another precision it is the same"
    state = tmp_path / "ar" / "state.npz"
    with np.load(state) as data:
        arrays = {k: v for k, v in data.items() if k != "energy"}
    settings = json.loads(str(arrays["settings"]))
    del settings["belonging"]
    np.savez(state, **{**arrays, "settings": np.array(json.dumps(settings))})
    assert run(other, atoms, 12)["steps"] == 12


def test_the_energy_tells_a_calculator_from_another(tmp_path: Path) -> None:
    """Those that are not ours have no weights to compare; one that is wrapped, or differs by rounding, is the same."""

    class Wrapped(LennardJones):
        pass

    options: dict[str, Any] = dict(temperature=40, interval=5, out=tmp_path / "run", progress=False)
    md(lj(), argon(1), steps=5, **options)
    with pytest.raises(ValueError, match=r"state.npz' belongs to another potential: its energy is -0\.\d+ eV there, and now -0\.\d+ eV"):
        md(LennardJones(epsilon=0.012, sigma=3.4, rc=6.5, smooth=True), argon(1), steps=10, resume=True, **options)
    assert md(Wrapped(epsilon=0.0103001, sigma=3.4, rc=6.5, smooth=True), argon(1), steps=10, resume=True, **options)["steps"] == 10


def test_a_relaxation_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    options = dict(out=tmp_path / "r.extxyz", fmax=1e-9)
    atoms = argon(1)
    relax(lj(), atoms, steps=2, **options)
    held = atoms.copy()
    held.set_constraint(FixAtoms([0]))
    pytest.importorskip("dftd3")
    for model, start, message in (
        (LennardJones(epsilon=0.02, sigma=3.4, rc=6.5, smooth=True), atoms, r"another potential: its energy is -0.* eV there, and now -"),
        (with_dispersion(lj(), "pbe"), atoms, "belongs to another potential"),
        (lj(), held, r"constraints none \(now FixAtoms"),
    ):
        with pytest.raises(ValueError, match=message):
            relax(model, start, steps=4, resume=True, **options)
    memory = tmp_path / "r.state.npz"
    with np.load(memory) as data:
        arrays = {k: v for k, v in data.items() if k not in ("belonging", "energy")}
    np.savez(memory, **arrays)
    assert relax(lj(), held, steps=4, resume=True, **options)["steps"] == 4


def test_direct_forces_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    potential = make_potential(["Ar"], direct_forces=True)
    md(potential, argon(1), temperature=10, steps=2, out=tmp_path / "run", max_temperature=1e12, progress=False)
    assert "not the gradient of an energy" in caplog.text


def slab_of_copper() -> tuple[Atoms, np.ndarray]:
    """And which of its atoms are free: the upper half."""
    atoms = bulk("Cu", cubic=True).repeat((2, 1, 2))
    atoms.center(vacuum=6.0, axis=2)
    free = atoms.positions[:, 2] > atoms.positions[:, 2].mean()
    atoms.set_constraint(FixAtoms(mask=~free))
    return atoms, free


@pytest.mark.parametrize("ensemble", ["langevin", "nve"])
def test_fixed_atoms_stay_and_the_others_have_the_temperature(ensemble: str, tmp_path: Path) -> None:
    atoms, free = slab_of_copper()
    options = MDConfig(temperature=300, steps=300 if ensemble == "langevin" else 5, timestep=4, interval=5, seed=1)
    md(
        EMT(),
        atoms,
        options,
        ensemble=ensemble,
        out=tmp_path,
        progress=False,
        **({"thermostat_time": 40} if ensemble == "langevin" else {}),
    )
    frames = ase.io.read(tmp_path / "trajectory.traj", ":")
    assert all((frame.positions[~free] == atoms.positions[~free]).all() for frame in frames)
    kinetic = [frame.get_kinetic_energy() for frame in frames]
    logged = np.array([float(row["temperature_K"]) for row in table(tmp_path)])
    np.testing.assert_allclose(logged, 2 * np.array(kinetic) / (3 * free.sum() * units.kB))
    assert np.abs(frames[0].get_momenta().sum(axis=0)).max() > 1.0, "no momentum is taken from atoms that push against fixed ones"
    if ensemble == "langevin":
        assert logged[len(logged) // 4 :].mean() == pytest.approx(300, rel=0.15)


def test_constraints_that_would_not_hold_are_refused(tmp_path: Path) -> None:
    atoms, _ = slab_of_copper()
    atoms.pbc = True
    options: dict[str, Any] = {"steps": 2, "out": tmp_path / "run", "progress": False}
    for ensemble in ("nose-hoover", "npt", "npt-anisotropic"):
        with pytest.raises(ValueError, match=f"{ensemble} does not hold constraints, found FixAtoms: .* Choose ensemble langevin"):
            md(EMT(), atoms, ensemble=ensemble, **options)
    atoms.set_constraint(FixBondLengths([[0, 1]]))
    with pytest.raises(ValueError, match="langevin does not hold FixBondLengths: it knows FixAtoms, .*Choose ensemble nve"):
        md(EMT(), atoms, **options)
    atoms.set_constraint(FixSymmetry(bulk("Cu", cubic=True).repeat((2, 1, 2))))
    with pytest.raises(ValueError, match="does not say how many degrees of freedom FixSymmetry takes"):
        md(EMT(), atoms, ensemble="nve", **options)
    atoms.set_constraint(FixAtoms(range(len(atoms))))
    with pytest.raises(ValueError, match="hold every atom"):
        md(EMT(), atoms, **options)


def test_constraints_are_counted() -> None:
    from gossamer.simulation.guard import degrees_of_freedom

    atoms, free = slab_of_copper()
    assert degrees_of_freedom(atoms, "langevin") == degrees_of_freedom(atoms, "nve") == 3 * free.sum()
    water = molecule("H2O")
    water.set_constraint(FixBondLengths([[0, 1], [0, 2]]))
    assert (degrees_of_freedom(water, "langevin"), degrees_of_freedom(water, "nve")) == (7, 1)
    water.set_momenta([[1, 0, 0], [-1, 0, 0], [0, 0, 0]])
    assert degrees_of_freedom(water, "nve") == 4, "it turns: the centre of mass alone is at rest"


@pytest.mark.thorough
def test_a_ramp_changes_the_temperature_and_resumes(tmp_path: Path) -> None:
    for ensemble in ("langevin", "nose-hoover"):
        options = MDConfig(
            temperature=50, temperature_end=600, steps=120, timestep=4, ensemble=ensemble, interval=6, thermostat_time=30, seed=1
        )
        copper = bulk("Cu", cubic=True).repeat((2, 1, 1))
        whole, folder = tmp_path / f"{ensemble}-whole", tmp_path / f"{ensemble}-parts"
        assert md(EMT(), copper, options, out=whole, progress=False)["broken"] is None
        stop_at(folder, 50, lambda options=options, folder=folder, copper=copper: md(EMT(), copper, options, out=folder, progress=False))
        with pytest.raises(ValueError, match=r"ramp_steps 120 \(now 240\)"):
            md(EMT(), copper, options, steps=240, out=folder, resume=True, progress=False)
        md(EMT(), copper, options, out=folder, resume=True, progress=False)
        first, second = ([float(r["temperature_K"]) for r in table(f)] for f in (whole, folder))
        np.testing.assert_allclose(first, second, rtol=1e-9)  # EMT's sums follow its neighbour list, which a resume builds anew
        assert np.mean(first[-5:]) > np.mean(first[:5]) + 200, ensemble
        assert table(whole)[-1]["conserved_energy_eV"] == "nan"


def stop_at(folder: Path, step: int, run: Callable[[], dict[str, Any]]) -> None:
    """Run, with a SIGTERM that comes while ``step`` is computed; the state is that of this very step."""
    import ase.md.md

    original = ase.md.md.MolecularDynamics.call_observers

    def call_observers(dynamics: Any) -> None:
        original(dynamics)
        if dynamics.nsteps == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ase.md.md.MolecularDynamics, "call_observers", call_observers)
        result = run()
    assert (result["stopped"], result["steps"]) == ("SIGTERM", step)
    assert int(np.load(folder / "state.npz")["integrator.nsteps"]) == step


def test_stopped_dynamics_say_so_and_resume_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = MDConfig(temperature=40, timestep=4, steps=40, interval=10, seed=2)
    assert md(lj(), argon(1), options, out=tmp_path / "whole", progress=False)["stopped"] is None
    folder = tmp_path / "parts"
    stop_at(folder, 17, lambda: md(lj(), argon(1), options, out=folder, progress=False))
    assert "SIGTERM: stopped at step 17 of 40; the state is saved, resume goes on" in caplog.text
    md(lj(), argon(1), options, out=folder, resume=True, progress=False)
    assert table(folder) == table(tmp_path / "whole")


def test_the_end_is_kept_where_no_frame_is_due(tmp_path: Path) -> None:
    """The state is that of the last step, and frames stay at equal distances, as if there had been no end there."""
    options = MDConfig(temperature=40, timestep=4, interval=10, seed=2, resume=True)
    for steps in (25, 25, 40):
        assert md(lj(), argon(1), options, steps=steps, out=tmp_path / "parts", progress=False)["steps"] == steps
        assert int(np.load(tmp_path / "parts" / "state.npz")["integrator.nsteps"]) == steps
    md(lj(), argon(1), options, steps=40, out=tmp_path / "whole", progress=False)
    assert table(tmp_path / "parts") == table(tmp_path / "whole")
    assert len(ase.io.read(tmp_path / "parts" / "trajectory.traj", ":")) == 5


def test_labels_of_the_start_are_not_those_of_later_frames(tmp_path: Path) -> None:
    atoms = argon(1)
    atoms.info = {"REF_energy": -99.0, "name": "argon", "charge": 0, "REF_stress": np.zeros(6), "step": 3}
    atoms.set_array("REF_forces", np.ones((4, 3)))
    atoms.set_array("residuenumbers", np.arange(4))
    atoms.set_masses([40.0] * 4)
    md(lj(), atoms, steps=2, interval=1, out=tmp_path / "run", progress=False)
    for frame in ase.io.read(tmp_path / "run" / "trajectory.traj", ":"):
        assert frame.info == {"name": "argon", "charge": 0}
    assert set(without_labels(atoms).arrays) == {"numbers", "positions", "masses", "residuenumbers"}


def test_two_runs_on_one_folder_are_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(RuntimeError, match=rf"in use by process {os.getpid()} on"):
        md(lj(), argon(1), steps=5, out=tmp_path / "run", progress=False)
    md(lj(), argon(1), steps=5, out=tmp_path / "run", progress=False)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["log.csv", "state.npz", "trajectory.traj"]
    with locked(tmp_path, "r.extxyz"), pytest.raises(RuntimeError, match="choose another --out"):
        relax(EMT(), bulk("Cu"), out=tmp_path / "r.extxyz")


def test_dynamics_write_over_nothing_of_others(tmp_path: Path) -> None:
    """Not over the file that is read, and not over a log; a run that could not begin leaves nothing that would stand in the way."""
    frames = [argon(1) for _ in range(3)]
    (run := tmp_path / "run").mkdir()
    ase.io.write(run / "trajectory.traj", frames)
    (run / "log.csv").write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"trajectory.traj and log.csv of no simulation \(there is no state.npz\)"):
        md(lj(), run / "trajectory.traj", steps=5, out=run, resume=True, progress=False)
    assert len(ase.io.read(run / "trajectory.traj", ":")) == 3
    assert (run / "log.csv").read_text() == "mine\n"
    with pytest.raises(NotImplementedError):
        md(EMT(), argon(1), steps=5, ensemble="nve", out=tmp_path / "new", progress=False)
    md(lj(), argon(1), steps=5, out=tmp_path / "new", progress=False)


def test_a_run_that_broke_at_its_start_is_resumed(tmp_path: Path) -> None:
    """With what it had collected; before, there was no state, and the file of collected frames stood in the way."""

    class Unsure(LennardJones):
        def calculate(self, *arguments: Any) -> None:
            super().calculate(*arguments)
            self.results["forces_std"] = np.ones((len(self.atoms), 3))

    close = argon(1)
    close.positions[1] = close.positions[0] + [0.8, 0, 0]
    options = MDConfig(steps=5, out=tmp_path / "run", max_uncertainty=0.1, collect=tmp_path / "run" / "u.extxyz", resume=True)
    for _ in range(2):
        answer = md(Unsure(epsilon=0.0103, sigma=3.4, rc=6.5), close, options, progress=False)
        assert "Å apart" in answer["broken"] or "temperature" in answer["broken"]
        assert (answer["steps"], answer["collected"]) == (0, 1)
        assert len(ase.io.read(tmp_path / "run" / "trajectory.traj", ":")) == len(table(tmp_path / "run")) == 1


@pytest.mark.thorough
def test_runs_of_earlier_versions_resume(tmp_path: Path) -> None:
    """States said "compiled" where they say "way" today, and had no ramps."""
    potential = make_potential(["Ar"], dtype=torch.float32, cutoff=5.0)
    options = MDConfig(temperature=40, timestep=4, interval=5, seed=3, max_temperature=1e9)
    md(potential, argon(1), options, steps=20, out=tmp_path / "whole", way="plain", progress=False)
    for k, compiled in enumerate((False, "plain")):
        folder = tmp_path / f"old-{k}"
        md(potential, argon(1), options, steps=10, out=folder, way="plain", progress=False)
        with np.load(folder / "state.npz") as data:
            arrays = dict(data)
        old = json.loads(str(arrays["settings"]))
        del old["way"], old["temperature_end"], old["ramp_steps"]
        arrays["settings"] = np.array(json.dumps({**old, "compiled": compiled}))
        np.savez(folder / "state.npz", **arrays)
        md(potential, argon(1), options, steps=20, out=folder, resume=True, progress=False)  # auto: as it began, not kernels
        assert table(folder) == table(tmp_path / "whole")


def test_a_calculator_that_is_passed_in_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []
    monkeypatch.setattr(Calculator, "expect", lambda self, steps, atoms: told.append(steps))
    potential = make_potential(["Ar"], dtype=torch.float32, cutoff=5.0)
    options = MDConfig(temperature=40, interval=5, max_temperature=1e9)
    md(potential, argon(1), options, steps=10, way="plain", out=tmp_path / "a", progress=False)
    assert told == [10]
    calculator = Calculator(potential)
    before = calculator.engine
    md(calculator, argon(1), options, steps=20, out=tmp_path / "a", resume=True, progress=False)
    assert told == [10]
    assert calculator.engine is before
    assert before.way == "plain" or f"was made the plain way, and goes on the {before.way} way" in caplog.text


def test_ways_are_those_of_the_engine() -> None:
    from gossamer.engine import engine
    from gossamer.simulation import options

    assert get_args(options.Way) == get_args(engine.Way)


def test_frames_and_supercells(tmp_path: Path) -> None:
    frames = [bulk("Cu", a=a) for a in (3.5, 3.7)]
    frames[1].set_momenta(np.ones((1, 3)))
    ase.io.write(tmp_path / "two.extxyz", frames)
    assert as_atoms(tmp_path / "two.extxyz", frame=-1).cell.volume == pytest.approx(3.7**3 / 4)
    repeated = as_atoms(tmp_path / "two.extxyz", 1, (2, 1, 3))
    assert len(repeated) == 6
    assert not repeated.has("momenta")  # copies with equal velocities would move in step for ever
    result = md(EMT(), tmp_path / "two.extxyz", steps=2, frame=1, supercell=(2, 2, 2), interval=1, out=tmp_path / "md", progress=False)
    assert result["broken"] is None
    assert len(ase.io.read(tmp_path / "md" / "trajectory.traj")) == 8
    assert relax(EMT(), tmp_path / "two.extxyz", frame=1, supercell=(2, 1, 1))["volume_A3"] == pytest.approx(3.7**3 / 2)
    (tmp_path / "damaged.vasp").write_text("what?\n")
    (tmp_path / "empty.extxyz").touch()
    for name, frame, message in (
        ("two.extxyz", 2, "has no frame 2"), ("none.extxyz", 0, "There is no structure file"), ("", 0, "is a folder; a structure file is expected"),
        ("damaged.vasp", 0, "cannot be read as structures"), ("empty.extxyz", 0, "has no frame 0"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            as_atoms(tmp_path / name, frame)


def test_the_cell_of_an_anisotropic_run_changes_its_shape(tmp_path: Path) -> None:
    """A crystal that is squeezed along one axis relaxes along it; the isotropic barostat keeps the ratio of the axes."""
    squeezed = bulk("Cu", cubic=True).repeat((2, 1, 1))
    squeezed.set_cell(squeezed.cell.array @ np.diag([1.0, 1.0, 0.96]), scale_atoms=True)
    options = MDConfig(temperature=300, steps=100, timestep=4, interval=5, barostat_time=400)
    ratios = {}
    for ensemble in ("npt", "npt-anisotropic"):
        md(EMT(), squeezed, options, ensemble=ensemble, out=tmp_path / ensemble, progress=False)
        cells = np.array([frame.cell.lengths() for frame in ase.io.read(tmp_path / ensemble / "trajectory.traj", ":")])
        ratios[ensemble] = cells[:, 2] / cells[:, 1]
    np.testing.assert_allclose(ratios["npt"], 0.96, atol=1e-6)
    assert np.mean(ratios["npt-anisotropic"][10:]) > 0.98


# --- relaxation ---------------------------------------------------------------------------------------------------


def test_relax_positions_and_cell(tmp_path: Path) -> None:
    atoms = bulk("Cu", cubic=True, a=3.8)
    atoms.rattle(0.1, seed=0)
    result = relax(EMT(), atoms, fmax=0.002, cell=True, out=tmp_path / "relaxed.extxyz")
    assert result["converged"]
    assert (result["volume_A3"] / 4) ** (1 / 3) * 4 ** (1 / 3) == pytest.approx(3.59, abs=0.01)  # EMT's lattice constant
    assert np.abs(result["atoms"].get_stress()).max() < 1e-3
    again = ase.io.read(tmp_path / "relaxed.extxyz")
    assert again.get_potential_energy() == pytest.approx(result["energy_eV"], abs=1e-6)
    assert np.abs(atoms.cell.lengths() - 3.8).max() < 1e-12  # the input is left alone
    assert not relax(EMT(), atoms, fmax=1e-6, steps=2)["converged"]


@pytest.mark.parametrize("optimizer", often(["fire", "lbfgs"], ["fire"]))
@pytest.mark.parametrize("cell", often([False, True], [True]))
def test_resumed_relaxation_is_exact(optimizer: str, cell: bool, tmp_path: Path) -> None:
    atoms = bulk("Cu", cubic=True, a=3.75)
    atoms.rattle(0.1, seed=0)
    options = dict(fmax=1e-8, cell=cell, optimizer=optimizer)
    save(make_potential(["Cu"], cutoff=3.5), model := tmp_path / "p.safetensors")
    whole = relax(model, atoms, steps=12, out=tmp_path / "whole.extxyz", **options)
    relax(model, atoms, steps=5, out=tmp_path / "parts.extxyz", **options)
    parts = relax(model, atoms, steps=12, out=tmp_path / "parts.extxyz", resume=True, **options)
    assert whole["steps"] == parts["steps"] == 12
    tolerance = 1e-12 if cell else 0.0  # the cell filter takes logarithms of the strain again
    np.testing.assert_allclose(whole["atoms"].positions, parts["atoms"].positions, rtol=0, atol=tolerance)
    np.testing.assert_allclose(whole["atoms"].cell.array, parts["atoms"].cell.array, rtol=0, atol=tolerance)
    assert np.abs(whole["atoms"].positions - atoms.positions).max() > 1e-3
    with pytest.raises(ValueError, match="nothing to resume"):
        relax(EMT(), atoms, out=tmp_path / "none.extxyz", resume=True)
    with pytest.raises(ValueError, match="Resume with the same options"):
        relax(model, atoms, out=tmp_path / "parts.extxyz", resume=True, **{**options, "cell": not cell})
    with pytest.raises(ValueError, match="other atoms"):
        relax(EMT(), bulk("Cu"), out=tmp_path / "parts.extxyz", resume=True)
    other = atoms.copy()
    other.rattle(0.01, seed=1)
    with pytest.raises(ValueError, match=r"belongs to something else: start \w+ \(now \w+\)"):
        relax(model, other, out=tmp_path / "parts.extxyz", resume=True, **options)


def test_a_resumed_cell_takes_fixed_atoms_along(tmp_path: Path) -> None:
    """They move with the cell, and resuming puts them where they were then."""
    atoms = bulk("Cu", cubic=True, a=3.7)
    atoms.rattle(0.08, seed=1)
    atoms.set_constraint(FixAtoms([0, 2]))
    options = dict(fmax=1e-8, cell=True)
    whole = relax(EMT(), atoms, steps=12, out=tmp_path / "whole.extxyz", **options)
    relax(EMT(), atoms, steps=5, out=tmp_path / "parts.extxyz", **options)
    parts = relax(EMT(), atoms, steps=12, out=tmp_path / "parts.extxyz", resume=True, **options)
    assert np.abs(whole["atoms"].positions - atoms.positions)[2].max() > 1e-3
    np.testing.assert_allclose(whole["atoms"].positions, parts["atoms"].positions, rtol=0, atol=1e-10)


def test_stopped_relaxation_says_so_and_resumes_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.2, seed=0)
    options = dict(fmax=1e-4, steps=40)
    whole = relax(EMT(), atoms, out=tmp_path / "whole.extxyz", **options)

    class Stopping(EMT):
        armed = True

        def calculate(self, *arguments: Any) -> None:
            super().calculate(*arguments)
            self.n = getattr(self, "n", 0) + 1
            if self.n == 4 and self.armed:
                signal.raise_signal(signal.SIGTERM)

    stopped = relax_files(Stopping(), [write(tmp_path / n, atoms) for n in ("a.xyz", "b.xyz")], RelaxConfig(out=tmp_path / "r", **options))
    assert [(a["stopped"], a["converged"], a["steps"]) for a in stopped] == [("SIGTERM", False, 3)]
    assert "SIGTERM: stopped at step 3; --resume goes on from" in caplog.text
    assert not (tmp_path / "r" / "a.extxyz").exists()
    with pytest.raises(FileExistsError, match=r"of a relaxation that was stopped before it wrote '.*'. Go on with it \(--resume\)"):
        relax(EMT(), atoms, out=tmp_path / "r" / "a.extxyz", **options)
    Stopping.armed = False
    first, second = relax_files(
        Stopping(), [tmp_path / n for n in ("a.xyz", "b.xyz")], RelaxConfig(out=tmp_path / "r", resume=True, **options)
    )
    for answer in (first, second):
        assert (answer["stopped"], answer["steps"], answer["energy_eV"]) == (
            None,
            whole["steps"],
            pytest.approx(whole["energy_eV"], rel=1e-12),
        )


def test_relaxation_writes_over_nothing_of_others(tmp_path: Path) -> None:
    frames = [bulk("Cu", a=a) for a in (3.5, 3.6, 3.7)]
    for name in ("relaxed.traj", "others.traj", "start.extxyz"):
        ase.io.write(tmp_path / name, frames)
    for structure, out, message in (
        ("relaxed.traj", "relaxed.extxyz", "'.*relaxed.traj' is read, and the path to '.*relaxed.extxyz' would be written over it"),
        ("start.extxyz", "others.extxyz", "others.traj' is of no relaxation .there is no 'others.state.npz' beside it"),
        ("start.extxyz", "start.extxyz", "start.extxyz' is the structure that is to be relaxed"),
    ):
        with pytest.raises(FileExistsError, match=message):
            relax(EMT(), tmp_path / structure, frame=1, out=tmp_path / out)
    (answer,) = relax_files(EMT(), [tmp_path / "others.traj"], RelaxConfig(out=tmp_path))
    assert "would be written over it" in answer["error"]
    assert all(len(ase.io.read(tmp_path / name, ":")) == 3 for name in ("relaxed.traj", "others.traj", "start.extxyz"))

    class Starting(EMT):
        ready = False

        def calculate(self, *arguments: Any) -> None:
            if not self.ready:
                raise RuntimeError("not yet")
            super().calculate(*arguments)

    options = dict(out=tmp_path / "new.extxyz", cell=True, fmax=0.002)
    with pytest.raises(RuntimeError, match="not yet"):
        relax(Starting(), atoms := bulk("Cu", a=3.5, cubic=True), **options)
    Starting.ready = True
    steps = {resume: relax(Starting(), atoms, resume=resume, **options)["steps"] for resume in (True, False)}
    assert steps[True] == steps[False] == len(ase.io.read(tmp_path / "new.traj", ":")) - 1, "what did not come to its first step is begun"


def write(path: Path, atoms: Atoms) -> Path:
    ase.io.write(path, atoms, format="extxyz")
    return path


def test_wrong_use_of_relax(crystal: Atoms) -> None:
    with pytest.raises(ValueError, match=r"optimizer: Input should be 'fire' or 'lbfgs' \(found 'newton'\)"):
        relax(EMT(), crystal, optimizer="newton")
    with pytest.raises(ValueError, match="needs periodicity along all axes"):
        relax(EMT(), molecule("H2O"), cell=True)
    with pytest.raises(ValueError, match="needs stress"):
        relax(make_potential(ELEMENTS, direct_forces=True), crystal, cell=True)
    with pytest.raises(ValueError, match="fmax: Input should be greater than 0"):
        relax(EMT(), crystal, fmax=0)


def test_relaxed_files_have_the_format_of_their_name_and_nothing_stale(tmp_path: Path) -> None:
    atoms = bulk("Cu", cubic=True, a=3.7)
    atoms.info = {"time_fs": 20.0, "energy_dft": -1.0, "material_id": "mp-30", "charge": 0}
    atoms.set_momenta(np.ones((4, 3)))
    atoms.set_array("forces_dft", np.ones((4, 3)))
    for name, start in (("r.extxyz", "4\nLattice="), ("r.cif", "data_"), ("POSCAR", "Cu")):
        result = relax(EMT(), atoms, fmax=0.01, out=tmp_path / name)
        assert (tmp_path / name).read_text().startswith(start), name
        assert ase.io.read(tmp_path / name).cell.volume == pytest.approx(result["volume_A3"])
    relaxed = ase.io.read(tmp_path / "r.extxyz")
    assert relaxed.info == {"material_id": "mp-30", "charge": 0}
    assert set(relaxed.arrays) == {"numbers", "positions"}
    assert relaxed.get_potential_energy() == pytest.approx(result["energy_eV"])
    for name, message in (("r.traj", "the path of the relaxation lies"), ("r.foo", "ASE writes no file format of this name"),
                          ("noname", "ASE writes no file format of this name"), ("", "is a folder")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            relax(EMT(), atoms, out=tmp_path / name)
    with pytest.raises(ValueError, match="CONTCAR': VASP's format needs a cell, and the structure has none along 3 of its axes"):
        relax(EMT(), molecule("N2"), out=tmp_path / "CONTCAR")


def test_fixed_atoms_keep_their_forces_in_the_file(tmp_path: Path) -> None:
    """Zero would be read as a label; what must vanish are those of the others."""
    atoms = bulk("Cu", cubic=True, a=3.6)
    atoms.rattle(0.1, seed=0)
    atoms.set_constraint(FixAtoms([0]))
    answer = relax(EMT(), atoms, fmax=0.01, out=tmp_path / "r.extxyz")
    relaxed = ase.io.read(tmp_path / "r.extxyz")
    stored = relaxed.get_forces(apply_constraint=False)
    relaxed.set_constraint()
    relaxed.calc = EMT()
    np.testing.assert_allclose(stored, relaxed.get_forces(), atol=1e-6)
    assert answer["converged"]
    assert answer["max_force_eV_per_A"] <= 0.01


@pytest.mark.thorough
def test_several_files_are_relaxed_into_a_folder(tmp_path: Path) -> None:
    for name, atoms in (("a.extxyz", bulk("Cu", a=3.5)), ("b.cif", bulk("Cu", a=3.7)), ("fe.extxyz", bulk("Fe"))):
        ase.io.write(tmp_path / name, atoms)
    files = [tmp_path / n for n in ("a.extxyz", "b.cif", "fe.extxyz", "gone.extxyz")]
    options = RelaxConfig(cell=True, out=tmp_path / "relaxed")
    answers = relax_files(EMT(), files, options)
    assert [a["converged"] for a in answers] == [True, True, False, False]
    assert "no structure file" in answers[3]["error"]
    volumes = [ase.io.read(a["out"]).cell.volume for a in answers[:2]]
    assert volumes[0] == pytest.approx(volumes[1], rel=1e-3) == pytest.approx(answers[0]["volume_A3"], rel=1e-3)
    again = relax_files(EMT(), files[:2], replace(options, resume=True))
    assert [a["steps"] for a in again] == [a["steps"] for a in answers[:2]]
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    assert distinct([files[0], tmp_path / "other" / "a.cif", tmp_path / "b.cif"]) == [f"{tmp_path.name}-a", "other-a", "b"]
    for given, out, message in (([files[0], files[0]], tmp_path / "x", "Several structures are called .*-a, folder and all"),
                                (files, None, "need out: the folder"), (files, tmp_path / "file", "is a file; several structures")):  # fmt: skip
        with pytest.raises((ValueError, FileExistsError), match=message):
            relax_files(EMT(), given, RelaxConfig(out=out))


def test_one_calculator_is_told_of_all_relaxations_that_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that compiling may pay: by what is usual before any is done, then by the steps that those before took. One that is resumed goes on in
    the way it began."""
    told: list[int] = []
    calculators: list[Calculator] = []

    def expect(calculator: Calculator, n_evaluations: int, atoms: Atoms) -> None:
        told.append(n_evaluations)
        calculators.append(calculator)

    monkeypatch.setattr(Calculator, "expect", expect)
    for k in range(6):
        ase.io.write(tmp_path / f"{k}.extxyz", argon(1))
    files = [tmp_path / f"{k}.extxyz" for k in range(6)]
    potential, options = make_potential(["Ar"], cutoff=5.0), RelaxConfig(steps=5, fmax=1e-9, out=tmp_path / "relaxed")
    relax_files(potential, files, replace(options, steps=200, fmax=1e9))
    assert told == [60 * 6, 0, 0, 0], "all were relaxed as they came: 0 steps"
    told.clear()
    relax_files(potential, files, replace(options, way="plain"))
    assert told == [5 * 6, 5 * 5, 5 * 4, 5 * 2]
    assert {c.engine.asked for c in calculators} == {"auto", "plain"}
    told.clear()
    for name in ("4", "5"):
        (tmp_path / "relaxed" / f"{name}.extxyz").unlink()
    (tmp_path / "relaxed" / "5.state.npz").unlink()
    ways: list[str] = []
    monkeypatch.setattr(
        "gossamer.simulation.relax.relax",
        lambda calculator, path, one: ways.append(calculator.engine.asked) or {"stopped": None, "steps": 0},
    )
    relax_files(potential, files, replace(options, resume=True, all_frames=False))
    assert ways == ["plain"] * 5 + ["auto"]


def test_freed_memory_is_kept_where_glibc_is() -> None:
    """Two large tensors in turn: the second reuses the pages of the first."""
    script = """
import platform, resource, sys
import numpy as np
from gossamer.engine.memory import keep_freed_memory
if platform.libc_ver()[0] != "glibc":
    sys.exit(77)
assert keep_freed_memory() and keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(40_000_000, dtype=np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
assert second < 0.1 * max(first, 100), (first, second)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip("needs glibc")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_chains_hold_the_temperature_asked_for(tmp_path: Path) -> None:
    """ASE's chains count 3 N degrees of freedom; with the centre of mass at rest 3 N - 3 move, which is 25 % for four atoms."""
    from ase.build import bulk
    from ase.calculators.emt import EMT

    from gossamer.simulation.guard import degrees_of_freedom

    atoms = bulk("Cu", cubic=True)
    assert (degrees_of_freedom(atoms, "langevin"), degrees_of_freedom(atoms, "nose-hoover")) == (12, 9)
    means = {}
    for ensemble, tau in (("nose-hoover", 20.0), ("langevin", 50.0)):
        answer = md(
            EMT(),
            atoms,
            temperature=200,
            steps=3000,
            timestep=4.0,
            ensemble=ensemble,
            thermostat_time=tau,
            out=tmp_path / ensemble,
            interval=2,
            progress=False,
        )
        means[ensemble] = answer["mean_temperature_K"]
    assert means["nose-hoover"] == pytest.approx(200, rel=0.08)
    assert means["langevin"] == pytest.approx(200, rel=0.12)


@pytest.mark.parametrize("ensemble", ["nose-hoover", "npt", "npt-anisotropic"])
def test_chains_and_barostats_count_what_moves(ensemble: str, tmp_path: Path) -> None:
    """Cell and chains are at the temperature asked for, not at one that makes up for atoms counted in vain; of runs of older versions too."""
    from gossamer.simulation.md import _prepare
    from gossamer.simulation.recorder import STATE
    from gossamer.simulation.state import numbers_of

    atoms, config = argon(1), MDConfig(ensemble=ensemble, temperature=50, steps=20, out=tmp_path / "md")
    atoms.set_momenta(np.zeros((len(atoms), 3)))
    run = _prepare(lj(), atoms, config)
    run.recorder.close()
    numbers = numbers_of(run.dynamics)
    heats = {name: float(value) for name, value in numbers.items() if name.endswith("_kT")}
    assert len(heats) == (1 if ensemble == "nose-hoover" else 3)
    assert set(heats.values()) == {50 * units.kB}
    counted = {float(value) for name, value in numbers.items() if name in ("_num_atoms_global", "_thermostat._num_atoms_global")}
    assert counted == {len(atoms) - 1}
    assert numbers.get("_barostat._cell_dof", 6) == 6, "of a symmetric matrix"
    md(lj(), atoms, replace(config, steps=20, out=tmp_path / "older"), progress=False)
    with np.load(tmp_path / "older" / STATE) as stored:
        state = dict(stored)
    for name in state:
        state[name] = state[name] * 0.75 if name.endswith("_kT") else np.array(4) if name.endswith("_num_atoms_global") else state[name]
    np.savez(tmp_path / "older" / STATE, **state)
    resumed = _prepare(lj(), atoms, replace(config, steps=40, out=tmp_path / "older", resume=True))
    resumed.recorder.close()
    assert {float(v) for k, v in numbers_of(resumed.dynamics).items() if k.endswith("_kT")} == {50 * units.kB}


def test_calculators_without_a_free_energy_can_be_simulated(tmp_path: Path) -> None:
    from ase.build import bulk
    from ase.calculators.emt import EMT

    class Plain(EMT):
        implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

        def calculate(self, *args, **kwargs) -> None:
            super().calculate(*args, **kwargs)
            self.results.pop("free_energy", None)

    answer = md(Plain(), bulk("Cu", cubic=True), steps=10, interval=5, ensemble="nose-hoover", out=tmp_path / "md", progress=False)
    assert answer["broken"] is None


def test_what_is_conserved_belongs_to_the_forces(tmp_path: Path) -> None:
    """Density functional codes with smeared electrons give two energies, and forces of the free one."""

    class Smeared(LennardJones):  # type: ignore[misc]
        def calculate(self, *args: Any, **kwargs: Any) -> None:
            super().calculate(*args, **kwargs)
            self.results["energy"] *= 0.9

    for ensemble in ("nve", "nose-hoover"):
        answer = md(
            Smeared(epsilon=0.0103, sigma=3.4, rc=5.0, smooth=True), argon(1), ensemble=ensemble, temperature=20, steps=40, timestep=5.0,
            interval=5, out=tmp_path / ensemble, progress=False,
        )  # fmt: skip
        assert answer["broken"] is None
        rows = table(tmp_path / ensemble)
        conserved, total = (np.array([float(row[f"{name}_energy_eV"]) for row in rows]) for name in ("conserved", "total"))
        assert np.ptp(conserved) < 0.1 * np.ptp(total)


def test_a_molecule_in_nose_hoover_chains_does_not_rotate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Chains keep the direction of its angular momentum: rotation would never have its temperature. 3 N - 6 numbers share the heat instead."""
    from ase.cluster import Octahedron

    from gossamer.simulation.guard import degrees_of_freedom, rotates
    from gossamer.simulation.md import draw_momenta

    start = Octahedron("Cu", 2)
    settings: dict[str, Any] = {"temperature": 300, "steps": 100, "timestep": 2.0, "interval": 10, "progress": False}
    for ensemble, freedom in (("nose-hoover", 12), ("langevin", 18), ("nve", 15)):
        md(EMT(), start, ensemble=ensemble, out=tmp_path / ensemble, **settings)
        first, last = (ase.io.read(tmp_path / ensemble / "trajectory.traj", k) for k in (0, -1))
        assert rotates(first) is rotates(last) is (ensemble != "nose-hoover")
        assert degrees_of_freedom(first, ensemble) == freedom
    assert not caplog.records
    draw_momenta(start, 300.0, np.random.default_rng(0))
    md(EMT(), start, ensemble="nose-hoover", out=tmp_path / "turning", **settings)
    assert "angular momentum" in caplog.text


def test_a_wire_in_nose_hoover_chains_does_not_turn_about_its_axis(tmp_path: Path) -> None:
    """Its rotation had 200 to 300 K where the rest had 93 of 100 K: it stands still, and 3 N - 4 numbers share the heat."""
    from gossamer.simulation.guard import degrees_of_freedom, rotates

    start = bulk("Cu", cubic=True)
    start.pbc = [False, False, True]
    start.rotate(30, "x", rotate_cell=True)
    settings: dict[str, Any] = {"temperature": 300, "steps": 40, "timestep": 2.0, "interval": 10, "progress": False}
    for ensemble, freedom in (("nose-hoover", 8), ("langevin", 12), ("nve", 9)):
        md(EMT(), start, ensemble=ensemble, out=tmp_path / ensemble, **settings)
        first, last = (ase.io.read(tmp_path / ensemble / "trajectory.traj", k) for k in (0, -1))
        assert rotates(first) is rotates(last) is (ensemble != "nose-hoover")
        assert degrees_of_freedom(first, ensemble) == freedom
        assert first.get_momenta().sum(axis=0) == pytest.approx(0, abs=1e-9)
    start.pbc = [False, True, True]
    assert degrees_of_freedom(start, "nose-hoover") == 9


def test_first_velocities_have_the_temperature(tmp_path: Path) -> None:
    """Of what moves: the centre of mass is at rest, and its share of the heat is not given to the rest."""
    means = []
    for seed in range(40):
        out = tmp_path / str(seed)
        md(EMT(), bulk("Cu", cubic=True), ensemble="nve", temperature=300, steps=1, out=out, seed=seed, interval=1, progress=False)
        with open(out / "log.csv", newline="") as file:
            means.append(float(next(csv.DictReader(file))["temperature_K"]))
    assert np.mean(means) == pytest.approx(300, rel=3 * np.sqrt(2 / 9 / 40))
