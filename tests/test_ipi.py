"""i-PI and ASE's sockets on our potentials: what they are told is what the ASE calculator says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import uuid
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.socketio import SocketClient, SocketIOCalculator
from ase.io import read, write
from ase.stress import voigt_6_to_full_3x3_stress
from conftest import make_potential

from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator

ROOT = Path(__file__).resolve().parents[1]
needs_ipi = pytest.mark.skipif(find_spec("ipi") is None, reason="needs pip install 'gossamer[ipi]'")


def silicon() -> Atoms:
    """A rattled crystal in a skewed cell."""
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * np.random.default_rng(2).normal(size=(3, 3))), scale_atoms=True)
    return atoms


@pytest.mark.parametrize("periodic", [True, False], ids=["crystal", "molecule"])
def test_an_optimiser_of_ase_over_a_socket(periodic: bool) -> None:
    atoms = silicon() if periodic else molecule("CH3CH2OH")
    potential = make_potential(["H", "C", "O", "Si"], name="painn")
    there, name = atoms.copy(), f"gossamer-{uuid.uuid4().hex[:8]}"
    there.calc = Calculator(potential)
    with SocketIOCalculator(unixsocket=name, timeout=60) as calculator:
        client = threading.Thread(target=lambda: SocketClient(unixsocket=name).run(there, use_stress=periodic))
        client.start()
        atoms.calc = calculator
        direct = atoms.copy()
        direct.calc = Calculator(potential)
        for _ in range(2):
            assert atoms.get_potential_energy() == pytest.approx(direct.get_potential_energy(), abs=1e-9)
            np.testing.assert_allclose(atoms.get_forces(), direct.get_forces(), atol=1e-9)
            if periodic:
                np.testing.assert_allclose(atoms.get_stress(), direct.get_stress(), atol=1e-10)
                for one in (atoms, direct):
                    one.set_cell(1.01 * one.cell.array, scale_atoms=True)
            for one in (atoms, direct):
                one.rattle(0.01, seed=3)
    client.join(timeout=60)
    assert not client.is_alive()


@needs_ipi
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
class TestIPI:
    def test_the_driver_speaks_atomic_units_and_batches(self, tmp_path: Path) -> None:
        from gossamer.simulation.ipi_driver import Driver

        frames = [silicon() for _ in range(3)]
        for k, atoms in enumerate(frames):
            atoms.rattle(0.05 * k, seed=k)
            atoms.set_cell((1 + 0.01 * k) * atoms.cell.array, scale_atoms=True)
        write(tmp_path / "template.xyz", frames[0], format="extxyz")
        potential = make_potential(["Si"]).train()
        driver = Driver(potential, tmp_path / "template.xyz")
        assert potential.training  # and may go on
        assert all(p.requires_grad for p in potential.parameters())
        cells = [atoms.cell.array.T / units.Bohr for atoms in frames]
        together = driver(cells, [atoms.positions / units.Bohr for atoms in frames])
        for atoms, cell, answer in zip(frames, cells, together, strict=True):
            alone = driver(cell, atoms.positions / units.Bohr)
            atoms.calc = Calculator(potential)
            stress = voigt_6_to_full_3x3_stress(atoms.get_stress())
            for energy, forces, virial, extras in (answer, alone):
                assert energy * units.Hartree == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
                np.testing.assert_allclose(forces * units.Hartree / units.Bohr, atoms.get_forces(), atol=1e-9)
                np.testing.assert_allclose(virial * units.Hartree, -stress * atoms.get_volume(), atol=1e-8)
                assert extras == ""

    def test_what_cannot_be_is_refused(self, tmp_path: Path) -> None:
        from gossamer.simulation.ipi_driver import Driver

        write(tmp_path / "si.xyz", silicon(), format="extxyz")
        write(tmp_path / "slab.xyz", Atoms("Si", cell=[5, 5, 5], pbc=[1, 1, 0]), format="extxyz")
        with pytest.raises(ValueError, match=r"si.xyz': Si \(14\) not among"):
            Driver(make_potential(["H"]), tmp_path / "si.xyz")
        with pytest.raises(ValueError, match="along all axes, or none"):
            Driver(make_potential(["Si"]), tmp_path / "slab.xyz")
        with pytest.raises(ValueError, match="has no virial"):
            Driver(make_potential(["Si"], direct_forces=True), tmp_path / "si.xyz")
        with pytest.raises(ValueError, match="records one structure"):
            Driver(make_potential(["Si"]), tmp_path / "si.xyz", way="graph")
        driver = Driver(make_potential(["Si"]), tmp_path / "si.xyz")
        with pytest.raises(ValueError, match="sent 2 atoms, and the template has 8"):
            driver(np.eye(3), np.zeros((2, 3)))
        with pytest.raises(ValueError, match="not finite"):
            driver(10 * np.eye(3), np.zeros((8, 3)))

    @pytest.mark.thorough
    def test_path_integrals_of_the_example(self, tmp_path: Path) -> None:
        """examples/ipi as it stands but for its length: i-PI's mean energy of the beads is that of the beads that it wrote."""
        for file in (ROOT / "examples" / "ipi").iterdir():
            shutil.copy(file, tmp_path)
        text = (tmp_path / "input.xml").read_text()
        assert "<total_steps>200<" in text
        (tmp_path / "input.xml").write_text(text.replace("<total_steps>200<", "<total_steps>10<"))
        potential = make_potential(["H", "C", "O"], name="painn")
        save(potential, tmp_path / "potential.safetensors")
        ethanol = molecule("CH3CH2OH")
        ethanol.center(vacuum=5)
        write(tmp_path / "start.xyz", ethanol, format="extxyz")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        done = subprocess.run([str(Path(sys.executable).parent / "i-pi"), "input.xml"], cwd=tmp_path, env=environment, capture_output=True,
                              text=True, timeout=200, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        column = np.loadtxt(tmp_path / "run.out")[:, 4]
        assert len(column) == 2
        beads = [read(tmp_path / f"run.pos_{k:02d}.extxyz", ":") for k in range(16)]
        for step in (0, 1):
            frames = [Atoms(one[step].numbers, one[step].positions) for one in beads]
            energies = [answer["energy"] for answer in potential.predict(frames)]
            assert column[step] == pytest.approx(np.mean(energies), abs=1e-5)
        assert np.ptp([one[1].positions for one in beads], axis=0).max() > 0.05  # quantum nuclei are smeared out
