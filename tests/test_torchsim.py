"""TorchSim on our potentials: batches equal one structure after the other."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.io import read, write
from conftest import make_potential
from test_kernels import needs_compiler
from test_uncertainty import measured, walk

from gossamer.cli import main
from gossamer.data.structure import as_structure
from gossamer.neighbors import neighbor_list
from gossamer.potential import Potential
from gossamer.potential_file import save
from gossamer.simulation.calculator import UNCERTAINTIES, Calculator
from gossamer.simulation.options import RelaxConfig
from gossamer.simulation.relax import relax, relax_files
from gossamer.simulation.verlet import BatchVerletList

ELEMENTS = ["H", "C", "O", "Mg", "Si", "Fe"]


def crystals() -> list[Atoms]:
    """Small rattled crystals in skewed cells."""
    found = [bulk("Si", cubic=True), bulk("Fe").repeat((2, 1, 1)), bulk("Si")]
    for k, atoms in enumerate(found):
        atoms.rattle(0.1, seed=k)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * np.random.default_rng(k).normal(size=(3, 3))), scale_atoms=True)
    return found


def test_only_structures_that_moved_are_listed_anew() -> None:
    structures = crystals()
    lists = BatchVerletList(4.0, skin=0.5)

    def check() -> None:
        edges, shifts = lists(
            np.concatenate([a.positions for a in structures]), np.array([a.cell.array for a in structures]),
            np.array([a.pbc for a in structures]), np.array([len(a) for a in structures]),
        )  # fmt: skip
        start, wanted_edges, wanted_shifts = 0, [], []
        for atoms in structures:
            pairs, images = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, 4.0)
            wanted_edges.append(pairs + start)
            wanted_shifts.append(images)
            start += len(atoms)
        np.testing.assert_array_equal(edges, np.concatenate(wanted_edges, axis=1))
        np.testing.assert_array_equal(shifts, np.concatenate(wanted_shifts))

    check()
    assert lists.builds == 3
    structures[0].positions[0] += 0.1
    check()
    assert lists.builds == 3
    structures[1].positions[0] += 0.4
    check()
    assert lists.builds == 4
    structures[1], structures[2] = structures[2], structures[1]  # as TorchSim does when a structure is finished
    check()
    del structures[0]
    check()
    structures.append(bulk("Fe"))
    check()


class TestTorchSim:
    @pytest.fixture(autouse=True)
    def torch_sim(self) -> None:
        self.ts = pytest.importorskip("torch_sim", reason="needs torch-sim-atomistic")

    def state(self, structures: list[Atoms]):
        return self.ts.io.atoms_to_state(structures, torch.device("cpu"), torch.float64)

    @pytest.mark.parametrize("way", ["plain", pytest.param("kernels", marks=needs_compiler)])
    def test_states_are_the_calculators(self, way: str, kernels: Path) -> None:
        from torch_sim.models.interface import validate_model_outputs

        from gossamer.simulation.torchsim import TorchSimModel

        potential = make_potential(ELEMENTS)
        model = TorchSimModel(potential, way=way)
        validate_model_outputs(model, torch.device("cpu"), torch.float64)
        structures = crystals()
        out = model(self.state(structures))
        for atoms, energy, stress in zip(structures, out["energy"], out["stress"], strict=True):
            atoms.calc = Calculator(potential, way="plain")
            assert float(energy) == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
            np.testing.assert_allclose(stress.numpy(), atoms.get_stress(voigt=False), atol=1e-9)
        np.testing.assert_allclose(out["forces"].numpy(), np.concatenate([a.get_forces() for a in structures]), atol=1e-7)

    @pytest.mark.parametrize("way", ["plain", pytest.param("kernels", marks=needs_compiler)])
    def test_uncertainties_are_the_calculators(self, way: str, kernels: Path) -> None:
        """Of a potential that has them, for each structure of a batch."""
        from gossamer.simulation.torchsim import TorchSimModel

        potential, structures = measured(), walk(3, 0.1)
        out = TorchSimModel(potential, way=way)(self.state(structures))
        for k, atoms in enumerate(structures):
            atoms.calc = Calculator(potential, way="plain", uncertainty=True)
            atoms.get_potential_energy()
            assert float(out["energy_uncertainty"][k]) == pytest.approx(atoms.calc.results["energy_uncertainty"], rel=1e-6)
            forces = out["forces_uncertainty"][k * len(atoms) : (k + 1) * len(atoms)]
            np.testing.assert_allclose(forces.numpy(), atoms.calc.results["forces_uncertainty"], rtol=1e-6)
        assert set(out) - set(TorchSimModel(make_potential(ELEMENTS), way="plain")(self.state(crystals()))) == set(UNCERTAINTIES)

    def test_what_cannot_be_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        from gossamer.simulation.torchsim import TorchSimModel

        with pytest.raises(ValueError, match="predicts forces directly: it has no stress"):
            TorchSimModel(make_potential(ELEMENTS, direct_forces=True), way="plain")
        model = TorchSimModel(make_potential(ELEMENTS), way="plain")
        with pytest.raises(ValueError, match=r"Structure 1: Cu \(29\) not among"):
            model(self.state([bulk("Si"), bulk("Cu")]))
        lost = crystals()
        lost[1].positions[0] = np.nan
        with pytest.raises(ValueError, match="Structure 1: .*not finite"):
            model(self.state(lost))
        with pytest.raises(ValueError, match="way 'graph' records one structure"):
            TorchSimModel(make_potential(ELEMENTS), way="graph")
        with pytest.raises(ValueError, match="dtype 'half' is unknown"):
            TorchSimModel(make_potential(ELEMENTS), way="plain", dtype="half")
        with pytest.raises(ValueError, match="skin must not be negative"):
            TorchSimModel(make_potential(ELEMENTS), way="plain", skin=-1.0)
        with pytest.raises(TypeError, match="takes the state alone, found positions"):
            model(self.state(crystals()), positions=1)
        structures = crystals()
        alone = model(self.state(structures[1:]))
        structures[0].positions[1] = structures[0].positions[0]
        out = model(self.state(structures))
        assert not bool(torch.isfinite(out["energy"][0]))
        torch.testing.assert_close(out["energy"][1:], alone["energy"])
        torch.testing.assert_close(out["forces"][8:], alone["forces"])
        assert "structures [0] of the batch are not finite" in caplog.text

    def test_states_as_dictionaries(self) -> None:
        from gossamer.simulation.torchsim import TorchSimModel

        model = TorchSimModel(make_potential(ELEMENTS), way="plain")
        state = self.state(crystals()[:1])
        fields = {name: getattr(state, name) for name in ("positions", "cell", "atomic_numbers", "pbc")}
        torch.testing.assert_close(model(fields)["energy"], model(state)["energy"])
        with pytest.raises(ValueError, match="lacks atomic_numbers, pbc"):
            model({name: fields[name] for name in ("positions", "cell")})
        both = {name: torch.cat([value, value]) if name != "pbc" else value for name, value in fields.items()}
        mixed = torch.arange(len(both["positions"])) % 2
        with pytest.raises(ValueError, match="do not stand structure after structure"):  # before, edges of other atoms
            model(both | {"system_idx": mixed})

    def test_dispersion_of_atoms_on_one_another(self) -> None:
        """is none, and that of the others of the batch what it is alone; what has no parameters is named."""
        from gossamer.simulation.torchsim import TorchSimModel

        model = TorchSimModel(make_potential([*ELEMENTS, "Rf"]), way="plain", dispersion="pbe")
        structures = crystals()
        alone = model(self.state(structures[1:]))
        structures[0].positions[1] = structures[0].positions[0]
        out = model(self.state(structures))
        assert out["energy"].isnan().tolist() == [True, *[False] * (len(structures) - 1)]
        torch.testing.assert_close(out["forces"][8:], alone["forces"])
        with pytest.raises(ValueError, match="Structure 0: D3 has no parameters for Rf"):
            model(self.state([bulk("Rf", "fcc", 5.0), bulk("Si")]))

    def test_a_potential_that_is_given_stays_as_it_was(self) -> None:
        """Its training goes on."""
        from gossamer.simulation.torchsim import TorchSimModel

        potential = make_potential(ELEMENTS, name="geodite", dropout=0.5).train()
        model, state = TorchSimModel(potential, way="plain"), self.state(crystals())
        energies = model(state)["energy"]
        torch.testing.assert_close(model.train().to(torch.float32)(state)["energy"], energies, rtol=0, atol=0)
        assert potential.training
        assert all(p.requires_grad for p in potential.parameters())

    def test_dynamics_runs_on_its_forces(self) -> None:
        from gossamer.simulation.torchsim import TorchSimModel

        ts = self.ts
        integrator = ts.Integrator.nve if "Integrator" in dir(ts) else ts.nve  # 0.4 and later, 0.3
        model = TorchSimModel(make_potential(ELEMENTS), way="plain")
        state = self.state([bulk("Si", cubic=True), bulk("Fe").repeat((2, 1, 1))])
        final = ts.integrate(system=state, model=model, integrator=integrator, n_steps=20, temperature=300, timestep=0.0005)
        assert float((final.positions - state.positions).abs().max()) > 1e-3
        out = model(final)
        torch.testing.assert_close(out["energy"], final.energy, rtol=0, atol=1e-9)
        torch.testing.assert_close(out["forces"], final.forces, rtol=0, atol=1e-8)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchSim's imports
    @pytest.mark.parametrize("cell", [pytest.param(cell, marks=pytest.mark.thorough) for cell in (False, True)])
    def test_many_structures_relax_at_once(self, cell: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        potential = make_potential(ELEMENTS, name="schnet")
        save(potential, tmp_path / "p.safetensors", check=[as_structure(bulk("Si"))])
        frames = [*crystals(), bulk("Au"), *([] if cell else [molecule("CH3OH")])]
        write(tmp_path / "a.extxyz", frames)
        write(tmp_path / "b.extxyz", crystals()[0])
        command = ["relax", str(tmp_path / "p.safetensors"), *(str(tmp_path / f"{n}.extxyz") for n in "ab"), "--all-frames", "--fmax", "0.002",
                   "--engine", "torchsim", "--out", str(tmp_path / "out"), "--json", *(["--cell"] if cell else [])]  # fmt: skip
        assert main([*command, "--steps", "3"]) == 1  # nothing converges, and gold is not known
        answers = {Path(a.get("out", "gold")).stem: a for a in json.loads(capsys.readouterr().out)}
        assert set(answers) == {"gold", "a-0", "a-1", "a-2", "b-0", *([] if cell else ["a-4"])}
        assert "Au" in answers["gold"]["error"]
        assert not any(a["converged"] for a in answers.values())
        for path in (tmp_path / "out").glob("a-*.extxyz"):
            path.unlink()
        assert main([*command, "--steps", "2000", "--resume"]) == 1
        answers = {Path(a.get("out", "gold")).stem: a for a in json.loads(capsys.readouterr().out)}
        assert set(answers) == {"gold", "a-0", "a-1", "a-2", "b-0", *([] if cell else ["a-4"])}
        for k, name in enumerate(n for n in sorted(answers) if n.startswith("a-")):
            relaxed, start = read(tmp_path / "out" / f"{name}.extxyz"), frames[min(k + k // 3, 4)].copy()
            stored = relaxed.get_potential_energy()
            relaxed.calc = start.calc = Calculator(potential, way="plain")
            assert answers[name]["converged"]
            assert np.linalg.norm(relaxed.get_forces(), axis=1).max() <= 0.002 + 1e-6
            assert abs(relaxed.get_potential_energy() - stored) < 1e-6
            assert relaxed.get_potential_energy() < start.get_potential_energy()
            if cell:
                assert np.linalg.norm(relaxed.get_stress(voigt=False), axis=1).max() * relaxed.get_volume() / len(relaxed) <= 0.002 + 1e-6
            else:
                assert np.array_equal(relaxed.cell, start.cell)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_answers_of_another_potential_are_not_taken_over(self, tmp_path: Path) -> None:
        """nor those of other atoms, or with the cell as it was."""
        potential, other = (make_potential(ELEMENTS, seed, name="schnet") for seed in (0, 1))
        write(tmp_path / "a.extxyz", bulk("Si"))
        config = RelaxConfig(out=tmp_path / "out", engine="torchsim", way="plain", steps=5)

        def relaxed(potential: Potential, **options: Any) -> dict[str, Any]:
            (answer,) = relax_files(potential, [tmp_path / "a.extxyz"], replace(config, **options))
            return answer

        first = relaxed(potential)
        assert first["converged"]
        assert relaxed(potential, resume=True)["energy_eV"] == pytest.approx(first["energy_eV"])
        assert re.search("relaxed by potential .*; now", relaxed(other, resume=True)["error"])
        assert ", cell. Relax into another" in relaxed(potential, resume=True, cell=True)["error"]
        write(tmp_path / "a.extxyz", bulk("Si", a=5.5))
        assert "relaxed from other positions" in relaxed(potential, resume=True)["error"]
        write(tmp_path / "a.extxyz", bulk("Fe"))
        assert "is Si2 relaxed by" in relaxed(potential, resume=True)["error"]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_what_did_not_converge_is_relaxed_again(self, tmp_path: Path) -> None:
        """What did is answered from its file; asked for smaller forces, it is relaxed again."""
        potential = make_potential(ELEMENTS, name="schnet")
        write(tmp_path / "a.extxyz", crystals()[0])
        config = RelaxConfig(out=tmp_path / "out", engine="torchsim", way="plain", fmax=0.01, steps=1)

        def again(**options: Any) -> dict[str, Any]:
            (answer,) = relax_files(potential, [tmp_path / "a.extxyz"], replace(config, resume=True, **options))
            return answer

        (short,) = relax_files(potential, [tmp_path / "a.extxyz"], config)
        (whole,) = relax_files(potential, [tmp_path / "a.extxyz"], replace(config, out=tmp_path / "whole", steps=500))
        assert (short["converged"], whole["converged"]) == (False, True)
        assert {**again(steps=500), "out": None} == {**whole, "out": None}
        first, written = json.loads(json.dumps(again(steps=1))), (tmp_path / "out" / "a.extxyz").stat().st_mtime_ns
        assert (first["converged"], first["steps"]) == (True, whole["steps"])
        assert first["energy_eV"] == pytest.approx(whole["energy_eV"], abs=1e-6)
        assert written == (tmp_path / "out" / "a.extxyz").stat().st_mtime_ns
        unsure = read(tmp_path / "out" / "a.extxyz")
        unsure.info["converged"] = False  # say, of the cell
        write(tmp_path / "out" / "a.extxyz", unsure)
        assert again(steps=1)["converged"] is False
        assert again(fmax=0.001, steps=2000)["max_force_eV_per_A"] < 0.001
        (answer,) = relax_files(potential, [tmp_path / "a.extxyz"], replace(config, out=tmp_path))
        assert "is the structure that is to be relaxed" in answer["error"]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_each_structure_tells_its_own_steps(self) -> None:
        """In fives, between which TorchSim does not look; that many steps are enough for it alone, and five fewer are not."""
        from gossamer.simulation.batched import BETWEEN, relax_together
        from gossamer.simulation.options import RelaxConfig
        from gossamer.simulation.torchsim import TorchSimModel

        model = TorchSimModel(make_potential(ELEMENTS, name="schnet"), way="plain", compute_stress=False)
        structures = [*crystals(), crystals()[0]]
        structures[-1].rattle(0.2, seed=5)
        config = RelaxConfig(fmax=0.01, steps=500)
        steps = [answer["steps"] for _, answer in relax_together(model, structures, config)]
        assert len(set(steps)) > 1
        for atoms, n in zip(structures, steps, strict=True):
            assert n % BETWEEN == 0
            assert 0 < n < 500
            for most, converged in ((n, True), (n - BETWEEN, False)):
                if most:
                    ((_, answer),) = relax_together(model, [atoms], replace(config, steps=most))
                    assert (answer["converged"], answer["steps"]) == (converged, most)
        short = [answer["steps"] for _, answer in relax_together(model, structures, replace(config, steps=2))]
        assert short == [2] * len(structures)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("cell", [False, True])
    def test_what_cannot_be_relaxed_leaves_the_others(self, cell: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """what they are alone: atoms on one spot, a crystal that becomes charged on its way. Before, either ended the command."""
        from gossamer.simulation.batched import relax_together
        from gossamer.simulation.torchsim import TorchSimModel

        def refuse(self: Potential, prediction: Any, graph: Any) -> None:
            odd = (graph.atoms_per_graph() == 9).nonzero()[:, 0].tolist()
            if model.n_evaluations > 5 and odd:
                raise ValueError(f"{graph.name(odd[0])}: it has become charged")

        spot, charged = (bulk("Si", cubic=True) for _ in range(2))
        spot.positions[1] = spot.positions[0]
        charged.append("H")
        charged.rattle(0.1, seed=1)
        model = TorchSimModel(make_potential(ELEMENTS, name="schnet"), way="plain", compute_stress=cell)
        config, good = RelaxConfig(fmax=0.01, steps=40, cell=cell), crystals()
        alone = relax_together(model, good, config)
        monkeypatch.setattr(Potential, "refuse_charged", refuse)
        model.n_evaluations = 0
        (_, first), (_, second), *others = relax_together(model, [spot, charged, *good], config)
        assert (first["error"], second["error"]) == ("its forces are not finite: atoms lie on one another", "it has become charged")
        for (one, told), (other, answer) in zip(alone, others, strict=True):
            np.testing.assert_allclose(one.positions, other.positions, atol=1e-6)
            assert told["steps"] == answer["steps"]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_what_torchsim_does_not_relax(self, tmp_path: Path) -> None:
        write(tmp_path / "a.extxyz", molecule("CH3OH"))
        options = {"out": tmp_path / "out", "engine": "torchsim"}
        potential = make_potential(ELEMENTS, name="schnet")
        for model, change, message in (
            (EMT(), {}, "found a calculator"), (potential, {"optimizer": "lbfgs"}, "FIRE, not by lbfgs"), (potential, {"frame": 1, "all_frames": True}, "one of them"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                relax_files(model, [tmp_path / "a.extxyz"], RelaxConfig(**options, **change))
        (answer,) = relax_files(potential, [tmp_path / "a.extxyz"], RelaxConfig(**options, cell=True))
        assert "periodicity" in answer["error"]
        slab = bulk("Si", cubic=True)
        slab.pbc = [True, True, False]
        write(tmp_path / "slab.extxyz", slab)
        (answer,) = relax_files(potential, [tmp_path / "slab.extxyz"], RelaxConfig(**options, steps=1))
        assert "error" not in answer or "knows all axes or none" in answer["error"]  # what TorchSim 0.3 would take for a molecule
        with pytest.raises(ValueError, match="several structures"):
            relax(potential, molecule("CH3OH"), engine="torchsim")
