"""Screening: whatever happens to one structure stays with it, the file is written once, kills lose nothing, the block is no part of the answer."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from inspect import signature
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms
from conftest import make_potential

import gossamer
from gossamer.checks.result import Result
from gossamer.checks.source import find_sources
from gossamer.cli import main
from gossamer.data.atoms import as_atoms, count_frames
from gossamer.files import InputError
from gossamer.potential import Potential, PotentialConfig
from gossamer.potential_file import save
from gossamer.screening import database
from gossamer.screening.config import FMAX, MachineConfig, ScreenConfig, load_machine
from gossamer.screening.database import APPLICATION, COLUMNS, Results, Row, export
from gossamer.screening.hull import Reference, add_hull, energy_above_hull, fractions_of, read_references
from gossamer.screening.structures import Item, check_structure, digest_of, read_items
from gossamer.screening.tasks import Asked, make_question, run_block
from gossamer.settings import to_dict

ROOT = Path(__file__).resolve().parents[1]
EMT = "ase.calculators.emt:EMT"


def alloys(n: int, seed: int = 0) -> list[Atoms]:
    """Rattled fcc alloys."""
    generator = np.random.default_rng(seed)
    found = []
    for k in range(n):
        atoms = bulk("Cu", a=3.6 + 0.4 * generator.random(), cubic=True)
        atoms.symbols = generator.choice(["Ni", "Cu", "Pd", "Ag"], size=4)
        atoms.rattle(0.1, seed=k)
        found.append(atoms)
    return found


def ask(model: Path | None = None, task: str = "relax", **options: Any) -> Asked:
    """A question, with EMT where no potential is given."""
    config = ScreenConfig(task=task, **{"engine": "ase", **options})  # type: ignore[arg-type]
    return make_question(model, None if model else EMT, config)


def blocks(asked: Asked, structures: list[Atoms], size: int) -> dict[str, Row]:
    """Rows by number, computed in blocks of this size."""
    named = [(str(k), atoms) for k, atoms in enumerate(structures)]
    return {row.id: row for k in range(0, len(named), size) for row in run_block(asked, named[k : k + size])}


@pytest.fixture
def potential(tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    save(make_potential(["Ni", "Cu", "Pd", "Ag"]), path)
    return path


# --- one block --------------------------------------------------------------------------------------------------------


def broken() -> dict[str, Atoms]:
    """Structures by what their row must say."""
    lost, near, unknown, flat = (bulk("Cu", cubic=True) for _ in range(4))
    lost.positions[2, 1] = np.nan
    near.positions[1] = near.positions[0] + [0.1, 0, 0]
    unknown.symbols[3] = "U"
    flat.set_cell([3.6, 3.6, 0.0])
    return {"position of atom 2 is not finite": lost, "0.100 Å apart": near, "U": unknown, "no volume": flat}


@pytest.mark.parametrize("kind", ["calculator", "potential", "torchsim"])
@pytest.mark.parametrize("task", ["single-point", "relax"])
def test_a_bad_structure_stays_alone(task: str, kind: str, potential: Path) -> None:
    """Its row says why; the others of its block are what they are without it."""
    if kind == "torchsim":
        pytest.importorskip("torch_sim")
    if (task, kind) == ("single-point", "torchsim"):
        pytest.skip("evaluations of a block need no TorchSim")
    options = {"steps": 5, "engine": "torchsim" if kind == "torchsim" else "ase"} if task == "relax" else {}
    asked = ask(None if kind == "calculator" else potential, task, **options)
    good, bad = alloys(3), broken()
    alone = blocks(asked, good, 3)
    mixed = run_block(asked, [("a", good[0]), *bad.items(), ("b", good[1]), ("c", good[2])])
    assert [row.id for row in mixed] == ["a", *bad, "b", "c"]
    for row, number in zip([mixed[0], *mixed[-2:]], "012", strict=True):
        assert row.status == alone[number].status
        assert row.energy == pytest.approx(alone[number].energy, abs=1e-9)
        assert np.isfinite(row.max_force)
        assert len(ase.io.read(StringIO(row.structure), format="extxyz").get_forces()) == 4
    for row in mixed[1:-2]:
        assert row.status == "failed", row
        assert row.id in row.reason, row.reason
        assert row.energy is None


@pytest.mark.parametrize("task", ["single-point", "relax"])
def test_what_refuses_charged_crystals_does_so_in_every_task(task: str, tmp_path: Path) -> None:
    """Blocks that are evaluated at once, too."""
    if task == "relax":
        pytest.importorskip("torch_sim")
    plain = make_potential(["Ni", "Cu", "Pd", "Ag"])
    charged = Potential(plain.model_config, plain.statistics, PotentialConfig(long_range="latent_charges", net_charge="refuse")).eval()
    for name, weights in charged.network.named_parameters():
        if name.startswith("charges"):
            torch.nn.init.normal_(weights)
    save(charged, tmp_path / "q.safetensors")
    rows = blocks(ask(tmp_path / "q.safetensors", task, engine="auto"), alloys(2), 2).values()
    assert [row.status for row in rows] == ["failed"] * 2
    assert all("the potential refuses crystals of more than 0.1" in row.reason for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "single-point", "fmax": 0.1}, "fmax 0.1 has no effect: task single-point relaxes nothing"),
        ({"task": "judge", "steps": 9}, "steps 9 has no effect"),
        ({"task": "single-point", "cell": True}, "cell True has no effect"),
        ({"device": "cuda"}, "device cuda has no effect: a calculator runs as it was made"),
        ({"dtype": "float64"}, "dtype float64 has no effect"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(**options)


def test_slabs_are_relaxed_as_slabs(potential: Path) -> None:
    """TorchSim 0.3 would take them for molecules."""
    pytest.importorskip("torch_sim")
    (slab,) = alloys(1)
    slab.pbc = [True, True, False]
    crystal = alloys(2)[1]
    batch, single = (blocks(ask(potential, engine=engine, steps=3, way="plain"), [slab, crystal], 2) for engine in ("torchsim", "ase"))
    assert batch["0"].energy == pytest.approx(single["0"].energy, abs=1e-4)
    assert np.isfinite(batch["1"].energy)


def test_not_converged_is_a_status_of_its_own() -> None:
    short, long = (blocks(ask(steps=steps), alloys(2), 2) for steps in (2, 200))
    assert [r.status for r in short.values()] == ["not converged"] * 2
    assert short["0"].reason == "forces above 0.05 eV/Å after 2 steps"
    assert [r.status for r in long.values()] == ["converged"] * 2
    assert long["0"].max_force <= FMAX["relax"]
    assert long["0"].energy < short["0"].energy
    assert 2 < long["0"].steps < 200


@pytest.mark.parametrize("engine", ["ase", "torchsim"])
@pytest.mark.thorough
def test_the_ranking_is_the_same_for_any_block(engine: str, potential: Path) -> None:
    """One after the other the last bit is the same; in batches, whose products have other sizes, rounding differs."""
    if engine == "torchsim":
        pytest.importorskip("torch_sim")
    structures = alloys(5)
    asked = ask(potential, engine=engine, steps=6, way="plain")
    energies = [np.array([row.energy / row.n_atoms for row in blocks(asked, structures, size).values()]) for size in (1, 2, 5)]
    for other in energies[1:]:
        np.testing.assert_allclose(other, energies[0], rtol=0, atol=0 if engine == "ase" else 1e-9)
        assert np.array_equal(np.argsort(other), np.argsort(energies[0]))


def test_elastic_constants_and_phonons_are_the_judges() -> None:
    """Of copper by EMT; a structure that does not relax has none."""
    pytest.importorskip("phonopy")
    copper = bulk("Cu", a=3.7, cubic=True)
    (elastic,) = blocks(ask(task="elastic"), [copper], 1).values()
    assert elastic.status == "converged"
    assert elastic.numbers["bulk_modulus"] == pytest.approx(134, rel=0.03)  # GPa; EMT was made to have that of copper
    assert np.array(elastic.numbers["stiffness"]).shape == (6, 6)
    (phonons,) = blocks(ask(task="phonons"), [bulk("Cu", a=3.7)], 1).values()
    assert phonons.numbers["lowest_frequency"] > -0.1
    assert 5 < phonons.numbers["highest_frequency"] < 10
    assert phonons.numbers["heat_capacity"] == pytest.approx(23.4, abs=0.5)  # J/K/mol, below 3R = 24.9
    (short,) = blocks(ask(task="phonons", steps=1), [copper], 1).values()
    assert short.status == "not converged"
    assert not short.numbers


def test_the_judge_says_what_it_thinks_of_the_potential_on_each_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.screening import tasks

    monkeypatch.setattr(tasks, "CHECKS", ("symmetry",))  # the others take seconds
    (row,) = blocks(ask(task="judge"), [bulk("Cu", cubic=True)], 1).values()
    assert row.status == "done", row.reason
    assert row.numbers.keys() == {"verdict", "symmetry"}
    assert row.numbers["symmetry"] == "passed"


def test_the_judge_of_a_screening_leaves_float32_where_the_judge_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair's rounding is no jump of its energy."""
    from gossamer.checks import judge
    from gossamer.screening import tasks

    save(make_potential(["Cu"], dtype=torch.float32), tmp_path / "p.safetensors")
    asked, precisions = ask(tmp_path / "p.safetensors", task="judge"), []

    def look(candidate: Any) -> Result:
        precisions.extend([candidate.calculator.potential.dtype, candidate.exact().potential.dtype])
        return Result("passed", "")

    monkeypatch.setattr(tasks, "CHECKS", ("symmetry",))
    monkeypatch.setitem(judge.CHECKS, "symmetry", SimpleNamespace(run=look))
    (row,) = blocks(asked, [bulk("Cu", cubic=True)], 1).values()
    assert row.status == "done", row.reason
    assert precisions == [torch.float32, torch.float64]


def test_constraints_hold_on_ase_and_are_refused_elsewhere(potential: Path) -> None:
    atoms = alloys(1)[0]
    atoms.set_constraint(FixAtoms([0]))
    (row,) = blocks(ask(steps=20), [atoms], 1).values()
    relaxed = ase.io.read(StringIO(row.structure), format="extxyz")
    np.testing.assert_allclose(relaxed.positions[0], atoms.positions[0], atol=1e-7)
    stored = relaxed.get_forces(apply_constraint=False)
    relaxed.set_constraint()
    relaxed.calc = find_sources([], [EMT])[0].make()
    forces = relaxed.get_forces()
    assert np.linalg.norm(forces[0]) > 1e-3
    np.testing.assert_allclose(stored, forces, atol=1e-5)  # of the fixed atom too: it is no label of zero
    assert row.max_force == pytest.approx(np.linalg.norm(forces[1:], axis=1).max(), abs=1e-5)
    (refused,) = blocks(ask(task="elastic"), [atoms], 1).values()
    assert "Constraints" in refused.reason


def test_a_potential_that_changed_meanwhile_is_refused(potential: Path) -> None:
    asked = ask(potential, "single-point")
    save(make_potential(["Ni", "Cu", "Pd", "Ag"], seed=1), potential)
    from gossamer.screening import tasks

    tasks._calculator.cache_clear()
    with pytest.raises(ValueError, match="has changed meanwhile"):
        run_block(asked, [("0", alloys(1)[0])])


def test_a_worker_is_told_of_its_share_of_the_work(tmp_path: Path, potential: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it compiles only what pays for itself there."""
    pytest.importorskip("parsl")
    from gossamer.screening import screen as loop
    from gossamer.screening import tasks
    from gossamer.simulation.calculator import Calculator

    told: list[int] = []
    monkeypatch.setattr(Calculator, "expect", lambda self, n, atoms: told.append(n))
    for steps, most in ((500, 60), (7, 7)):
        tasks.get_ready(dataclasses.replace(ask(potential, way="plain", steps=steps), n_expected=5), [("a", alloys(1)[0])])
        assert told.pop() == 5 * most
    asked: list[Asked] = []
    monkeypatch.setattr(loop.Screening, "run", lambda self, items, workers: asked.append(self.asked))
    ase.io.write(tmp_path / "alloys.extxyz", alloys(10))
    loop.screen(tmp_path / "alloys.extxyz", calculator=EMT, machine=MachineConfig(workers=4), out=tmp_path / "r.sqlite")
    assert [a.n_expected for a in asked] == [3]


# --- the time limit ---------------------------------------------------------------------------------------------------


def test_a_structure_that_takes_too_long_is_ended_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it hangs in native code that holds Python's lock: its process and the program it started end, the others have their answers."""
    from gossamer.screening import limited

    mark = f"limited-{os.getpid()}"
    monkeypatch.setenv("GOSSAMER_SCREENING", mark)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.syspath_prepend(ROOT / "tests")
    asked = make_question(None, "fragile:Fragile", ScreenConfig(task="single-point", time_limit=4.0))
    structures = alloys(3)
    structures[1].symbols[0] = "Pt"
    try:
        rows = run_block(asked, [(str(k), atoms) for k, atoms in enumerate(structures)])
        assert [row.status for row in rows] == ["done", "timed out", "done"]
        assert rows[1].reason == "took longer than 4 s (--time-limit)"
        assert rows[1].formula == structures[1].get_chemical_formula()
        structures[2].symbols[0] = "Au"
        with pytest.raises(limited.Died):
            run_block(asked, [("2", structures[2])])
        assert limited._process is not None
        assert not limited._process.alive
    finally:
        if limited._process is not None:
            limited._process.end()
    until = time.monotonic() + 10  # what was killed may not have ended yet
    while running({mark}) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running({mark})


@pytest.mark.parametrize(("seconds", "asked_for"), [((1, 1, 1), [3]), ((0.1, 2.5, 0.1), [3]), ((1, 9, 1), [3, 1, 1, 1])])
def test_only_a_structure_that_was_alone_is_timed_out(
    seconds: tuple[float, ...], asked_for: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch may take the time of all its structures."""
    from gossamer.screening import limited

    sizes = []

    def answer(asked: Asked, unit: Any, limit: float) -> list[Row]:
        sizes.append(len(unit))
        if sum(seconds[int(name)] for name, _ in unit) > limit:
            raise limited.OutOfTime
        return [Row(name, "done") for name, _ in unit]

    monkeypatch.setattr(limited, "_ask", answer)
    rows = limited.answer_in_time(ask(), [[(str(k), atoms) for k, atoms in enumerate(alloys(3))]], 1.0)
    assert [(row.id, row.status) for row in rows] == [(str(k), "timed out" if s > 3 else "done") for k, s in enumerate(seconds)]
    assert sizes == asked_for


# --- structures and their ids -----------------------------------------------------------------------------------------


def test_ids_say_file_frame_and_content(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.extxyz", alloys(3))
    (tmp_path / "b.cif").write_text("no crystal")
    items = list(read_items([tmp_path / "a.extxyz", tmp_path / "b.cif"]))
    assert [i.frame for i in items] == [0, 1, 2, 0]
    assert len({i.id for i in items}) == 4
    assert items[-1].atoms is None
    assert "cannot be read" in items[-1].problem
    moved = items[0].atoms.copy()
    moved.positions[0, 0] += 1e-6
    assert digest_of(moved) != items[0].digest
    assert digest_of(items[0].atoms) == items[0].digest
    with pytest.raises(FileNotFoundError):
        list(read_items([tmp_path / "c.cif"]))
    ordinary, isotope = items[0].atoms.copy(), items[0].atoms.copy()
    ordinary.set_masses(ordinary.get_masses())
    isotope.set_masses([65.0, *isotope.get_masses()[1:]])
    assert digest_of(ordinary) == items[0].digest != digest_of(isotope)
    ions = [ordinary.copy() for _ in range(3)]
    for ion, charge in zip(ions[1:], (1, -1), strict=True):
        ion.info["charge"] = charge
    assert len({digest_of(ion) for ion in ions}) == 3
    ase.io.write(tmp_path / "isotope.extxyz", isotope)
    (read,) = read_items([tmp_path / "isotope.extxyz"])
    assert read.atoms.get_masses()[0] == 65.0


CIF = """data_{name}
_cell_length_a 5.6
_cell_length_b 5.6
_cell_length_c 5.6
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'F m -3 m'
loop_
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Cl 0.5 0.5 0.5 1.0
{sites}

"""


def test_disordered_crystals_are_not_taken_for_ordered_ones(tmp_path: Path) -> None:
    """ASE puts one atom of the most frequent element on a site that is shared or half empty."""
    sites = {"mixed": "Na 0 0 0 0.6\nK 0 0 0 0.4", "half": "Na 0 0 0 0.5", "whole": "Na 0 0 0 0.998"}
    (tmp_path / "a.cif").write_text("".join(CIF.format(name=name, sites=text) for name, text in sites.items()))
    items = list(read_items([tmp_path / "a.cif"]))
    assert [item.atoms is None for item in items] == [True, True, False]
    assert "a site holds 0.6 Na, 0.4 K: no calculator knows disordered crystals" in items[0].problem
    assert "a site holds 0.5 Na" in items[1].problem
    with pytest.raises(InputError, match=r"a\.cif': a site holds 0\.6 Na, 0\.4 K"):
        as_atoms(tmp_path / "a.cif")
    with pytest.raises(InputError, match=r"a\.cif', frame 0: a site holds 0\.6 Na, 0\.4 K"):
        gossamer.predict(make_potential(["Na", "Cl", "K"]), tmp_path / "a.cif", tmp_path / "p.extxyz", progress=False)
    assert len(as_atoms(tmp_path / "a.cif", frame=2)) == 8


def test_a_file_that_breaks_off_is_screened_up_to_there(tmp_path: Path) -> None:
    """A file given twice is read once; what follows a broken frame is one item that says from which frame on."""
    path = tmp_path / "a.extxyz"
    ase.io.write(path, alloys(3))
    path.write_text(path.read_text().rsplit("\n", 2)[0])
    ase.io.write(tmp_path / "b.traj", alloys(2))
    (tmp_path / "link.extxyz").symlink_to(path)
    items = list(read_items([path, tmp_path / "b.traj", f"{tmp_path}/./a.extxyz", tmp_path / "link.extxyz"]))
    assert [Path(i.source).name[0] + str(i.frame) for i in items] == ["a0", "a1", "a2", "b0", "b1"]
    assert [i.atoms is None for i in items] == [False, False, True, False, False]
    assert "cannot be read from frame 2 on" in items[2].problem
    assert [count_frames(p) for p in (path, tmp_path / "b.traj")] == [2, 2]


class Inline:
    """Workers that answer at once, in this process."""

    slots = 2

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def start(self) -> None: ...

    def alive(self) -> bool:
        return True

    def submit(self, function: Any, asked: Asked, block: list[tuple[str, Atoms]]) -> Future:
        self.sizes.append(len(block))
        future: Future = Future()
        future.set_result([Row(name, "failed" if "0@" in name else "done") for name, _ in block])
        return future


def test_structures_are_read_as_they_are_needed(tmp_path: Path) -> None:
    """In hand is what workers have; going on skips what is there, and --again does of it what failed."""
    pytest.importorskip("parsl")
    from gossamer.screening.screen import AHEAD, REPEATED, Screening

    (copper,) = alloys(1)
    read: list[int] = []

    def items(n: int) -> Iterator[Item]:
        for k in range(n):
            read.append(k)
            yield Item("a.xyz", k, "", copper)

    with Results(tmp_path / "r.sqlite", {}) as results:

        def go(n: int, repeated: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[int], int]:
            workers, most, read[:] = Inline(), 0, []
            screening = Screening(results, 7, ask(), 5, repeated, progress=False)
            write = screening._write

            def watched(rows: list[Row]) -> None:
                nonlocal most
                most = max(most, len(screening.items))
                assert len(read) - screening.n_before - screening.n_done <= (AHEAD + 1) * workers.slots * 5
                write(rows)

            screening._write = watched  # type: ignore[method-assign]
            screening.run(items(n), workers)  # type: ignore[arg-type]
            assert not screening.items
            return screening.summary(None), workers.sizes, most

        answer, sizes, most = go(200)
        assert (answer["structures"], answer["done"], answer["statuses"]) == (200, 200, {"done": 180, "failed": 20})
        assert set(sizes) == {5}
        assert most <= (AHEAD + 1) * Inline.slots * 5
        answer, sizes, _ = go(206)
        assert (answer["done_before"], answer["done"], sizes) == (200, 6, [3, 3]), "every worker gets a share"
        answer, sizes, _ = go(206, REPEATED)
        assert (answer["done_before"], answer["done"], sum(sizes)) == (185, 21, 21)


class Lost(Inline):
    """Workers on one node that is lost, again and again, under blocks of more than ``size`` structures."""

    slots = 40

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.node = size, 0

    def submit(self, function: Any, asked: Asked, block: list[tuple[str, Atoms]]) -> Future:
        from gossamer.screening.executor import ManagerLost

        if len(block) <= self.size:
            return super().submit(function, asked, block)
        self.sizes.append(len(block))
        future: Future = Future()
        future.set_exception(ManagerLost(str(self.node).encode(), "node"))
        self.node += len(self.sizes) % self.slots == 0
        return future


def test_what_a_lost_node_had_in_hand_is_done_again_in_parts(tmp_path: Path) -> None:
    """A node that ends with all its workers is one setback, not one for each block; what takes longer than jobs last has failed in the end."""
    pytest.importorskip("parsl")
    from gossamer.screening.screen import NODES_LOST, Screening

    (copper,) = alloys(1)

    def go(n: int, size: int) -> tuple[dict[str, Any], list[int]]:
        workers = Lost(size)
        with Results(tmp_path / f"{size}.sqlite", {}) as results:
            screening = Screening(results, n, ask(), 16, (), progress=False)
            screening.run((Item("a.xyz", k, str(k), copper) for k in range(n)), workers)  # type: ignore[arg-type]
            return screening.summary(None), workers.sizes

    answer, sizes = go(40 * 16, 4)
    assert answer["statuses"] == {"done": 640 - 64, "failed": 64}, "those of Inline"
    assert set(sizes) == {16, 4}
    answer, sizes = go(3, 0)
    assert answer["statuses"] == {"failed": 3}
    assert sizes == [1] * 3 * NODES_LOST
    (reason,) = {r for (r,) in read(tmp_path / "0.sqlite", "select reason from result")}
    assert reason == "its job ended 5 times while it was computed (walltime too short for it, or jobs cancelled)"


def test_rates_are_said_in_a_unit_that_reads_well() -> None:
    pytest.importorskip("parsl")
    from gossamer.screening.screen import pace

    said = ["12.3 per second", "1 per second", "2.4 per minute", "1 per minute", "36 per hour", "0.18 per hour", "0 per second"]
    assert [pace(r) for r in (12.345, 1.0, 0.04, 1 / 60, 0.01, 0.00005, 0.0)] == said


def test_slow_tasks_say_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Four of ten after the first, one in 25 s: 2.4 per minute, and 5 times 25 s for those that are left."""
    pytest.importorskip("parsl")
    from gossamer.screening.screen import Screening

    caplog.set_level("INFO")
    with Results(tmp_path / "r.sqlite", {}) as results:
        screening = Screening(results, 10, ask(), 1, (), progress=True)
        screening.began, screening.said, screening.first, screening.n_done = -120.0, 0.0, (0.0, 1), 5
        monkeypatch.setattr(time, "monotonic", lambda: 100.0)
        screening._tell(SimpleNamespace(update=lambda n: None, set_postfix=lambda *a, **k: None, n=0, disable=True))
    assert "5 of 10 structures, 2.4 per minute, 02:05 left" in caplog.text


def test_near_atoms_are_found_across_the_cell() -> None:
    check_structure(Atoms("H2", [[0, 0, 0], [0.74, 0, 0]]))
    with pytest.raises(ValueError, match=r"Atoms \d and \d are 0\.200 Å apart"):
        check_structure(Atoms("H2", [[0.1, 0, 0], [4.9, 0, 0]], cell=[5, 5, 5], pbc=True))


# --- the file ---------------------------------------------------------------------------------------------------------


def written(path: Path, energies: list[float | None], **question: Any) -> Path:
    """Results of copper and gold, by hand."""
    with Results(path, {"task": "relax", "fingerprint": "abc-None", **question}) as results:
        rows = [Row(str(k), "failed" if e is None else "converged", "", "CuAu" if k % 2 else "Cu2", 2, e and 2 * e, numbers={"hardness": -k})
                for k, e in enumerate(energies)]  # fmt: skip
        results.write([row.columns("a.xyz", k, "potential") for k, row in enumerate(rows)])
    return path


def test_results_of_version_1_go_on(tmp_path: Path) -> None:
    """Whose table refuses "timed out"; reading alone leaves them as they are."""
    path = written(tmp_path / "r.sqlite", [-1.0, None])
    with closing(sqlite3.connect(path)) as connection:
        (made,) = connection.execute("select sql from sqlite_master where name='result'").fetchone()
        connection.execute("alter table result rename to new")
        connection.execute(made.replace("'timed out', ", ""))
        connection.execute("insert into result select * from new")
        connection.execute("drop table new")
        connection.execute("pragma user_version=1")
        connection.commit()
    with Results(path) as results:
        before = results.rows()
    late = Row("2", "timed out").columns("a.xyz", 2, "potential")
    with Results(path) as results, pytest.raises(sqlite3.IntegrityError):
        results.write([late])
    with Results(path, {"task": "relax", "fingerprint": "abc-None"}) as results:
        assert results.rows() == before
        results.write([late])
        assert results.counts() == {"converged": 1, "failed": 1, "timed out": 1}


def test_results_are_sorted_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "r.sqlite", [-1.0, None, -3.0, -2.0])
    with Results(path) as results:
        assert [r["id"] for r in results.rows("energy_per_atom")] == ["2", "3", "0", "1"]
        assert [r["id"] for r in results.rows("hardness", top=2, descending=True)] == ["0", "1"]
        assert results.counts() == {"converged": 3, "failed": 1}
        with pytest.raises(ValueError, match="There is no 'hardnes'.*hardness"):
            results.rows("hardnes")
    assert main(["screen", "show", str(path), "--sort", "energy_per_atom", "--top", "1"]) == 0
    shown = capsys.readouterr().out
    assert "-3" in shown
    assert shown.splitlines()[1].split() == ["eV"]
    assert "3 converged, 1 failed" in shown
    assert main(["screen", "show", str(path), "--status", "converged", "--top", "2", "--json"]) == 0
    assert [r["id"] for r in json.loads(capsys.readouterr().out)] == ["0", "2"]
    assert main(["screen", "show", str(path), "--top", "-1"]) == 2
    assert "top must not be negative, found -1" in capsys.readouterr().err
    for name in ("r.csv", "r.json"):
        assert export(path, tmp_path / name) == 4
    assert len(json.loads((tmp_path / "r.json").read_text())) == 4
    assert (tmp_path / "r.csv").read_text().count("\n") == 5
    with pytest.raises(ValueError, match="parquet"):
        export(path, tmp_path / "r.doc")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'a\.xyz' holds structures that were screened"):
        export(path, "a.xyz")  # as its rows call it


@pytest.mark.parametrize(
    ("statuses", "stopped", "status"),
    [
        ({"converged": 3, "done": 1}, None, 0),
        ({}, None, 0),
        ({"failed": 2}, None, 1),
        ({"done": 8, "timed out": 1}, None, 1),
        ({"converged": 8, "not converged": 1}, None, 1),
        ({"failed": 2}, "SIGTERM", 143),
    ],
)
def test_the_exit_status_says_whether_all_have_an_answer(
    statuses: dict[str, int], stopped: str | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("parsl")
    from gossamer.screening import screen as loop

    answer = {"done": 9, "done_before": 0, "seconds": 1.0, "per_second": 9.0, "statuses": statuses, "out": "r.sqlite", "stopped": stopped}
    monkeypatch.setattr(loop, "screen", lambda *_, **__: answer)
    assert main(["screen", "a.xyz", "--calculator", "ase.calculators.emt:EMT"]) == status


def test_an_export_that_cannot_be_is_refused_before_the_screening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("parsl")
    monkeypatch.chdir(tmp_path)
    ase.io.write("a.xyz", alloys(1))
    command = ["screen", "a.xyz", "--calculator", "ase.calculators.emt:EMT", "--export"]
    assert main([*command, "results.doc"]) == 2
    assert "'results.doc': results are written as .parquet, .csv, .json or .extxyz" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "a.xyz")]) == 2
    assert "a.xyz' holds structures that were screened, and would be written over" in capsys.readouterr().err
    monkeypatch.setattr(database, "find_spec", lambda name: None)
    assert main([*command, "results.parquet"]) == 2
    assert "pip install pyarrow" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.xyz"]


def test_parquet_or_which_package_writes_it(tmp_path: Path) -> None:
    path = written(tmp_path / "r.sqlite", [-1.0, None])
    try:
        from pyarrow import parquet
    except ImportError:
        with pytest.raises(ImportError, match="pip install pyarrow"):
            export(path, tmp_path / "r.parquet")
        return
    export(path, tmp_path / "r.parquet")
    assert parquet.read_table(tmp_path / "r.parquet").column("energy").to_pylist() == [-2.0, None]


def test_a_row_is_replaced_and_never_doubled(tmp_path: Path) -> None:
    path = written(tmp_path / "r.sqlite", [-1.0, None])
    written(path, [-1.0, -2.0])
    with Results(path) as results:
        assert results.counts() == {"converged": 2}
        assert results.connection.execute("pragma journal_mode").fetchone()[0] == "wal"
        with pytest.raises(sqlite3.IntegrityError):
            results.write([Row("x", "converged").columns("a", 0, "p"), {**Row("y", "perhaps").columns("a", 1, "p")}])
        assert len(results.rows()) == 2, "a transaction is all or nothing"


@pytest.mark.parametrize("kind", ["question", "text", "foreign", "newer", "missing"])
def test_files_that_are_not_these_results(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    expected: type[Exception] = InputError
    if kind == "question":
        written(path, [-1.0], fmax=0.05)
        message = r"fmax 0\.05 \(now 0\.01\).*choose another --out"
    elif kind == "text":
        path.write_text("once upon a time " * 50)
        message = "not a file of results"
    elif kind == "missing":
        expected, message = FileNotFoundError, "There are no results"
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("create table other (x)")
            if kind == "newer":
                connection.execute(f"pragma application_id={APPLICATION}")
                connection.execute("pragma user_version=99")
        connection.close()
        message = "version 99" if kind == "newer" else "not of gossamer's results"
    with pytest.raises(expected, match=message):
        Results(path, None if kind == "missing" else {"task": "relax", "fmax": 0.01})


def test_the_table_has_a_column_for_each_value() -> None:
    assert set(Row("a", "done").columns("s", 0, "p")) == set(COLUMNS)


# --- energy above hull ------------------------------------------------------------------------------------------------


def test_energies_above_the_hull() -> None:
    """Of a binary: the tie line between its neighbours; of a ternary against pymatgen, where that is installed."""
    binary = [Reference(fractions_of(f), e) for f, e in (("Cu", -1.0), ("Au", -2.0), ("CuAu", -2.5), ("Cu3Au", -1.2))]
    assert energy_above_hull(fractions_of("CuAu"), -2.4, binary) == pytest.approx(0.1)
    assert energy_above_hull(fractions_of("Cu3Au"), -1.2, binary) == pytest.approx(-1.2 + 0.5 * (1.0 + 2.5))  # itself above the tie line
    assert energy_above_hull(fractions_of("CuAu"), -2.6, binary) == pytest.approx(-0.1)
    assert energy_above_hull(fractions_of("CuAg"), -2.6, binary) is None


def test_the_hull_is_pymatgens() -> None:
    diagrams = pytest.importorskip("pymatgen.analysis.phase_diagram")
    from pymatgen.core import Composition

    generator = np.random.default_rng(0)
    formulas = ["Li", "P", "S", *(f"Li{a}P{b}S{c}" for a, b, c in generator.integers(1, 6, size=(20, 3)))]
    energies = generator.normal(size=len(formulas))
    references = [Reference(fractions_of(f), e) for f, e in zip(formulas, energies, strict=True)]
    entries = [diagrams.PDEntry(Composition(f), e * Composition(f).num_atoms) for f, e in zip(formulas, energies, strict=True)]
    diagram = diagrams.PhaseDiagram(entries)
    for entry, formula, energy in zip(entries, formulas, energies, strict=True):
        assert energy_above_hull(fractions_of(formula), energy, references) == pytest.approx(diagram.get_e_above_hull(entry), abs=1e-9)


def test_the_hull_goes_into_the_results(tmp_path: Path) -> None:
    path = written(tmp_path / "r.sqlite", [-1.0, -2.0, None, -1.5])
    frames = [bulk("Cu"), bulk("Au")]
    for atoms in frames:
        from ase.calculators.singlepoint import SinglePointCalculator

        atoms.calc = SinglePointCalculator(atoms, energy=-1.2)
    ase.io.write(tmp_path / "reference.extxyz", frames)
    assert add_hull(path, tmp_path / "reference.extxyz") == {"references": 2, "placed": 3, "not_placed": 1}
    with Results(path) as results:
        found = {r["id"]: r["energy_above_hull"] for r in results.rows("energy_above_hull")}
    assert list(found) == ["1", "3", "0", "2"]
    assert found["1"] == pytest.approx(-0.8)
    assert len(read_references(path)) == 3
    ase.io.write(tmp_path / "none.extxyz", [bulk("Cu")])
    with pytest.raises(InputError, match="frame 0: no energy"):
        read_references(tmp_path / "none.extxyz")
    (tmp_path / "nan.extxyz").write_text('1\nProperties=species:S:1:pos:R:3 energy=nan pbc="F F F"\nCu 0 0 0\n')
    with pytest.raises(InputError, match="frame 0: the energy is nan"):
        read_references(tmp_path / "nan.extxyz")


def test_the_hull_of_another_potential_is_none(tmp_path: Path) -> None:
    path = written(tmp_path / "r.sqlite", [-1.0, -2.0])
    same = written(tmp_path / "same.sqlite", [-1.5, -2.5], fingerprint="abc-float64-plain")
    assert add_hull(path, same)["placed"] == 2
    other = written(tmp_path / "other.sqlite", [-1.5, -2.5], fingerprint="def-None")
    dispersed = written(tmp_path / "d3.sqlite", [-1.5, -2.5], fingerprint="abc-None with D3 of pbe", dispersion="pbe")
    for reference in (other, dispersed):
        with pytest.raises(InputError, match="was screened by another potential"):
            add_hull(path, reference)


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workrs: 2", "workrs: unknown setting. Did you mean workers?"),
        ("walltime: 90", "walltime"),
        ("walltime: '01:99:00'", "walltime"),
        ("scheduler: pbs", "scheduler"),
        ("- 1", "holds a list"),
        ("{", "not YAML"),
        ("options: [gres=1]", "options"),
    ],
)
def test_wrong_machines(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_machine(tmp_path / "m.yaml")
    assert "m.yaml" in str(caught.value)


def test_workers_are_counted() -> None:
    assert load_machine(None, 3).workers_per_node() == 3
    assert MachineConfig().workers_per_node() == len(os.sched_getaffinity(0))
    assert MachineConfig(scheduler="slurm", cores=64, threads=4).workers_per_node() == 16
    assert MachineConfig(gpus=4).workers_per_node() == 4
    assert MachineConfig(scheduler="slurm", workers=32, nodes=4, jobs=2).slots() == 256
    assert MachineConfig(workers=3, nodes=4, jobs=2).slots() == 3
    with pytest.raises(ValueError, match="workers: say how many"):
        MachineConfig(scheduler="slurm").workers_per_node()


SLURM = """
scheduler: slurm
workers: 32
threads: 2
nodes: 4
jobs: 3
cores: 64
memory: 200
partition: standard
account: chem
address: 10.0.0.1
walltime: "04:00:00"
options: [--mail-type=END, --reservation=night]
setup: |
  module load gcc
  source env/bin/activate
"""


def test_the_script_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is submitted, as text."""
    pytest.importorskip("parsl")
    from gossamer.screening.executor import parsl_config

    (tmp_path / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 42\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "m.yaml").write_text(SLURM)
    (executor,) = parsl_config(load_machine(tmp_path / "m.yaml"), tmp_path / "parsl", "abc").executors
    executor.provider.script_dir = str(tmp_path)
    assert executor.provider.submit("the workers' command", 1, "it") == "42"
    (script,) = (p.read_text() for p in tmp_path.glob("it.*"))
    for line in ("--nodes=4", "--time=240", "--partition=standard", "--account=chem", "--mem=200g", "--cpus-per-task=64",
                 "--mail-type=END", "--reservation=night", "--ntasks-per-node=1"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script, script
    assert "--exclusive" not in script
    assert script.index("module load gcc\nsource env/bin/activate") < script.index("export GOSSAMER_SCREENING=abc") < script.index("srun")
    assert "OMP_NUM_THREADS=2" in script
    for walltime, minutes in (
        ("00:00:30", 1),
        ("00:01:30", 2),
        ("100:00:00", 6000),
    ):  # of Slurm 0 minutes are no limit, and parts are whole ones
        (other,) = parsl_config(
            MachineConfig(scheduler="slurm", workers=1, walltime=walltime, address="127.0.0.1"), tmp_path / "parsl", "abc"
        ).executors
        other.provider.script_dir = str(tmp_path)
        other.provider.submit("the workers' command", 1, f"short-{minutes}")
        (text,) = (p.read_text() for p in tmp_path.glob(f"short-{minutes}.*"))
        assert f"#SBATCH --time={minutes}\n" in text
    assert (executor.provider.init_blocks, executor.provider.max_blocks) == (3, 3)
    assert executor.max_workers_per_node == 32
    assert executor.drain_period == 4 * 3600 * 0.9
    assert executor.encrypted
    assert "-m gossamer.screening.pool" in executor.launch_cmd


def test_slurm_needs_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("parsl")
    from gossamer.screening.executor import Workers

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no sbatch on this machine"):
        Workers(MachineConfig(scheduler="slurm", workers=1), tmp_path, "abc").start()


def job(state: str, said: str = "", folder: Path | None = None) -> Any:
    from parsl.jobs.states import JobState, JobStatus

    path = None
    if folder is not None:
        path = folder / "job.stderr"
        path.write_text(said)
    return JobStatus(JobState[state], stderr_path=None if path is None else str(path))


def test_jobs_that_cannot_be_had_end_the_screening_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs goes on in any case; sbatch's refusals are final at once, if it never took one, and else after half an hour."""
    pytest.importorskip("parsl")
    from gossamer.screening import executor as module

    def look(states: list[str], refused: list[float] = [], taken: bool = True, said: str = "") -> str | None:  # noqa: B006
        found: list[Exception] = []
        status = {str(k): job(state, said, tmp_path) for k, state in enumerate(states)}
        provider = SimpleNamespace(refused_at=refused, ever_taken=taken, refusal="sbatch: error: invalid account")
        fake = SimpleNamespace(provider=provider, blocks_to_job_id=status, set_bad_state_and_fail_all=found.append)
        module._look_at_jobs(fake, {**status, "99": job("FAILED")} if refused else status)
        return str(found[0]) if found else None

    assert look(["MISSING"] * 2) is None
    assert look(["RUNNING", *["MISSING"] * 3]) is None
    assert look(["MISSING", "COMPLETED", "MISSING"]) is None
    message = look(["COMPLETED", *["MISSING"] * 3], said="a\nb\nModuleNotFoundError: No module named 'gossamer'\n")
    assert message == (
        "3 jobs in a row ended before their workers came. The last one said:\n    a\n    b\n    ModuleNotFoundError: No module named 'gossamer'"
    )
    assert look(["MISSING", "FAILED", "MISSING"]) == "3 jobs in a row failed. The last one said nothing."
    assert look([], [0.0], taken=False) == "sbatch refuses the job: sbatch: error: invalid account"
    assert look(["COMPLETED"], [0.0, 60.0]) is None
    assert look(["RUNNING"], [0.0, 6000.0]) is None
    assert look(["COMPLETED"], [0.0, 1860.0]) == "sbatch refuses the job: sbatch: error: invalid account"


def test_a_refused_job_is_offered_again_after_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("parsl")
    from parsl.providers.errors import SubmitException

    from gossamer.screening.executor import parsl_config

    asked = tmp_path / "asked"
    commands(tmp_path, monkeypatch, sbatch=f"echo x >> {asked}; echo sbatch: error: invalid account >&2; exit 1")
    (executor,) = parsl_config(MachineConfig(scheduler="slurm", workers=1, address="127.0.0.1"), tmp_path / "parsl", "abc").executors
    provider = executor.provider
    provider.script_dir = str(tmp_path)
    for _ in range(3):
        with pytest.raises(SubmitException):
            provider.submit("command", 1, "it")
    assert asked.read_text() == "x\n"
    assert provider.refusal == "sbatch: error: invalid account"
    provider.refused_at[:] = [time.monotonic() - 61]
    commands(tmp_path, monkeypatch, sbatch="echo Submitted batch job 42")
    assert provider.submit("command", 1, "it") == "42"
    assert (provider.refused_at, provider.refusal, provider.ever_taken) == ([], "", True)
    commands(tmp_path, monkeypatch, sacct="true", squeue="true")  # neither knows it yet
    assert [status.state.name for status in provider.status(["42"])] == ["PENDING"]
    provider._taken_at["42"] -= 16
    assert [status.state.name for status in provider.status(["42"])] == ["COMPLETED"]


def test_jobs_that_a_killed_screening_left_are_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose script lies in its folder, and no others; without Slurm none."""
    pytest.importorskip("parsl")
    from gossamer.screening.executor import cancel_jobs

    folder, called = tmp_path / "my results" / ".r.sqlite.parsl", tmp_path / "called"
    listed = f"7|{folder}/000/submit_scripts/a\n8|{folder}2/000/submit_scripts/b\n9|(null)\n10|{folder}/001/submit_scripts/c"
    (tmp_path / "listed").write_text(listed)
    monkeypatch.setenv("PATH", "/nowhere")
    assert cancel_jobs(folder) == []
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    commands(tmp_path, monkeypatch, squeue=f"cat {tmp_path / 'listed'}", scancel=f"echo $* > {called}")
    assert cancel_jobs(folder) == ["7", "10"]
    assert called.read_text() == "7 10\n"
    commands(tmp_path, monkeypatch, squeue="exit 1")
    assert cancel_jobs(folder) == []


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **lines: str) -> None:
    """Programs of these names, each a line of shell, before all others."""
    for name, line in lines.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


STAND_IN = {
    "sbatch": "SLURM_CPUS_ON_NODE=2 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NAME=it setsid bash $1 > $1.stdout 2> $1.stderr & echo Submitted batch job $!",
    "sacct": 'for job in $(echo "$*" | grep -o "[0-9]*$"); do kill -0 $job 2>/dev/null && echo $job RUNNING || echo $job COMPLETED; done',
    "scancel": "kill -- -$1",
    "squeue": "true",
    "srun": 'echo "$@" > $0.called; while [ $1 != bash ]; do shift; done; exec "$@"',
}
"""Slurm for one node: each command as a line of shell"""


@pytest.mark.slow
def test_jobs_of_a_stand_in_for_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path but for Slurm itself: submitted, started by srun, answered, cancelled."""
    pytest.importorskip("parsl")
    from gossamer.screening.screen import screen

    commands(tmp_path, monkeypatch, **STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ase.io.write(tmp_path / "alloys.extxyz", alloys(6))
    machine = MachineConfig(scheduler="slurm", workers=2, address="127.0.0.1", options=("--mail-type=END",))
    answer = screen(tmp_path / "alloys.extxyz", calculator=EMT, machine=machine, block=2, out=tmp_path / "results.sqlite")
    assert answer["statuses"] == {"converged": 6}
    assert "--cpus-per-task=2" in (tmp_path / "srun.called").read_text()
    assert not left_over(tmp_path / "results.sqlite")


@pytest.mark.slow
def test_jobs_of_a_real_slurm(tmp_path: Path) -> None:
    """Of one node, started for it: the submitter is killed and goes on, a job is cancelled, a partition is not there (benchmarks/screening/slurm.py)."""
    pytest.importorskip("parsl")
    sys.path.insert(0, str(ROOT / "benchmarks" / "screening"))
    try:
        from slurm import missing
    finally:
        sys.path.pop(0)
    if missing():
        pytest.skip(f"there is no Slurm here ({', '.join(missing())}): apt-get install slurmctld slurmd slurm-client munge")
    command = [sys.executable, str(ROOT / "benchmarks" / "screening" / "slurm.py"), "--short"]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["failed"] == []


# --- the whole ----------------------------------------------------------------------------------------------------------


def read(path: Path, question: str) -> list[tuple[Any, ...]]:
    """Rows of a file of results; none while it is not there."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return connection.execute(question).fetchall()
    except sqlite3.OperationalError:
        return []


def left_over(path: Path) -> list[int]:
    """Processes of the screenings that wrote a file."""
    return running({mark for (mark,) in read(path, "select mark from run")})


def running(marks: set[str]) -> list[int]:
    """Processes with one of these marks; not those that have ended and that nobody has waited for (a container's first process may not)."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GOSSAMER_SCREENING") in marks and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def rows_of(path: Path) -> dict[str, tuple[Any, ...]]:
    return {row[0]: row for row in read(path, "select id, status, energy, seconds, finished, reason from result")}


@pytest.mark.thorough
def test_one_kill_loses_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The submitter is killed; the same command ends what it left, goes on, and a structure that crashes its worker is a failed row."""
    pytest.importorskip("parsl")
    from gossamer.screening import screen as loop

    monkeypatch.setattr(loop, "TRIES", 1)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.chdir(tmp_path)
    frames = alloys(24)
    frames[20].symbols[0] = "Au"  # kills its worker
    ase.io.write("alloys.extxyz", frames)
    command = ["screen", "alloys.extxyz", "--calculator", "fragile:Fragile", "--block", "2", "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", "gossamer.cli", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not rows_of(tmp_path / "results.sqlite") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = rows_of(tmp_path / "results.sqlite")
    assert 0 < len(before) < 24
    assert left_over(tmp_path / "results.sqlite"), "there is something to clean up"
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        assert main([*command, "--json"]) == 1  # one failed
    finally:
        sys.path.pop(0)
    answer = json.loads(capsys.readouterr().out)
    after = rows_of(tmp_path / "results.sqlite")
    assert answer["done_before"] == len(before)
    assert answer["done"] == 24 - len(before)
    assert len(after) == 24
    assert {k: after[k] for k in before} == before, "nothing is done twice"
    failed = [row for row in after.values() if row[1] == "failed"]
    assert len(failed) == 1
    assert "#20@" in failed[0][0]
    assert "process died" in failed[0][-1]
    assert not left_over(tmp_path / "results.sqlite")
    assert main([*command, "--fmax", "0.2"]) == 2
    assert "fmax 0.05 (now 0.2)" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.thorough
def test_workers_go_on_after_a_structure_that_never_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Real workers: it is timed out, done again when asked, crashes beside it are failures as ever, and nothing is left over."""
    pytest.importorskip("parsl")
    from gossamer.screening import screen as loop

    monkeypatch.setattr(loop, "TRIES", 1)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.syspath_prepend(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    frames = alloys(12)
    frames[2].symbols[0], frames[7].symbols[0] = "Pt", "Au"
    ase.io.write("alloys.extxyz", frames)
    command = ["screen", "alloys.extxyz", "--calculator", "fragile:Fragile", "--task", "single-point", "--workers", "1", "--json"]
    assert main([*command, "--time-limit", "1"]) == 1
    assert json.loads(capsys.readouterr().out)["statuses"] == {"done": 10, "failed": 1, "timed out": 1}
    before = rows_of(tmp_path / "results.sqlite")
    assert [key.split("@")[0] for key, row in before.items() if row[1] == "timed out"] == ["alloys.extxyz#2"]
    assert main([*command, "--time-limit", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["done"] == 0
    assert rows_of(tmp_path / "results.sqlite") == before
    assert main([*command, "--time-limit", "2", "--again"]) == 1
    assert json.loads(capsys.readouterr().out)["done"] == 2
    assert {row[-1] for row in rows_of(tmp_path / "results.sqlite").values() if row[1] == "timed out"} == {
        "took longer than 2 s (--time-limit)"
    }
    assert not left_over(tmp_path / "results.sqlite")


@pytest.mark.slow
def test_twenty_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """Of submitter, interchange, pool and workers at random (minutes)."""
    pytest.importorskip("parsl")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "screening" / "kills.py"), "--folder", str(tmp_path), "--structures", "200"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert sum(answer["killed"].values()) >= 10
    assert answer["agree"]


def test_flags_are_the_settings() -> None:
    from gossamer.cli import build_parser
    from gossamer.flags import from_flags
    from gossamer.screening.command import spelled_out

    assert spelled_out(["screen", "a.cif", "--model", "m"]) == ["screen", "run", "a.cif", "--model", "m"]
    assert spelled_out(["screen", "show", "r.sqlite"]) == ["screen", "show", "r.sqlite"]
    given = build_parser().parse_args(["screen", "run", "a.cif", "--model", "m", "--task", "phonons", "--steps", "7"])
    config = from_flags(ScreenConfig, given)
    assert (config.task, config.steps) == ("phonons", 7)
    assert to_dict(config)["block"] == ScreenConfig().block
    pytest.importorskip("parsl")
    assert set(signature(gossamer.screen).parameters) - {"progress", "config", "options"} <= vars(given).keys()


def test_results_in_a_path_with_spaces_are_refused(tmp_path: Path) -> None:
    """Parsl quotes no path: workers never came, and the screening waited for ever."""
    from gossamer.screening.executor import parsl_config

    with pytest.raises(ValueError, match="path has spaces"):
        parsl_config(MachineConfig(), tmp_path / "my results", "mark")
