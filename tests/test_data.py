"""Readers, units, splits, statistics, stores: labels arrive as they were written, or an error says why not."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from ase.stress import full_3x3_to_voigt_6_stress
from conftest import ETHANOL, forked, make_potential
from small_formats import label, write_mptrj, write_oc20

from gossamer import fitting
from gossamer.accuracy import evaluate
from gossamer.cli import main
from gossamer.config import load_config, make_config
from gossamer.data import consistency
from gossamer.data.atoms import as_atoms, count_frames, read_frames
from gossamer.data.batch import collate
from gossamer.data.dataset import (
    DataConfig,
    LoneStresses,
    Subset,
    check_leaks,
    choose_groups,
    load_data,
    open_dataset,
    require_labels,
    sizes,
    without,
)
from gossamer.data.duplicates import without_duplicates
from gossamer.data.from_atoms import from_atoms, suggestion
from gossamer.data.inspection import Inspection, inspect
from gossamer.data.labels import ForceUnit, LabelConfig
from gossamer.data.legacy import _tensor, read_legacy_lmdb, restricted_loads
from gossamer.data.lmdb_file import HEADER, LEAF
from gossamer.data.readers import read_structures
from gossamer.data.statistics import compute_statistics
from gossamer.data.store import Store, write_store
from gossamer.data.structure import Structure
from gossamer.data.units import ENERGY_UNITS, FORCE_UNITS
from gossamer.data.xyz import xyz_frames
from gossamer.engine.cuda_graph import first_of
from gossamer.engine.program import make_program
from gossamer.evaluation import evaluate_potential
from gossamer.fitting import choose_settings
from gossamer.potential import Potential
from gossamer.potential_file import save
from gossamer.quantities import QUANTITIES, Quantity
from gossamer.settings import build
from gossamer.training import loop
from gossamer.training.compiled import CompiledForward
from gossamer.training.loader import Loader, NeighborLists, epoch_batches
from gossamer.training.loop import count_edges
from gossamer.training.losses import LossConfig, loss_counts, loss_sums
from gossamer.training.process_group import start_process_group
from gossamer.training.progress import columns


def labelled(seed: int = 0, periodic: bool = True) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = bulk("SiC", "zincblende", a=4.36, cubic=True) if periodic else molecule("CH3OH")
    atoms.rattle(0.05, seed=seed)
    stress = rng.normal(scale=0.01, size=(3, 3))
    results = {"energy": rng.normal(), "forces": rng.normal(size=(len(atoms), 3))}
    if periodic:
        results["stress"] = full_3x3_to_voigt_6_stress(stress + stress.T)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def assert_same(structure: Structure, atoms: Atoms, digits: float = 1e-7) -> None:
    np.testing.assert_array_equal(structure.atomic_numbers, atoms.numbers)
    np.testing.assert_allclose(structure.positions, atoms.positions, atol=digits)
    np.testing.assert_allclose(structure.cell, atoms.cell.array, atol=digits)
    assert structure.energy == pytest.approx(atoms.calc.results["energy"], abs=1e-6)
    np.testing.assert_allclose(structure.forces, atoms.calc.results["forces"], atol=digits)
    if "stress" in atoms.calc.results:
        np.testing.assert_allclose(structure.stress, atoms.get_stress(voigt=False), atol=digits)


@pytest.mark.parametrize("suffix", [".extxyz", ".extxyz.xz", ".extxyz.gz", ".db", ".aselmdb", ".traj"])
def test_formats_of_ase(tmp_path: Path, suffix: str) -> None:
    frames = [labelled(k) for k in range(3)]
    path = tmp_path / f"data{suffix}"
    if suffix in (".db", ".aselmdb"):
        if suffix == ".aselmdb":
            pytest.importorskip("ase_db_backends")
        with ase.db.connect(str(path)) as database:
            for atoms in frames:
                database.write(atoms)
    elif suffix == ".traj":
        ase.io.write(path, frames)
    else:
        text = io.StringIO()
        ase.io.write(text, frames, format="extxyz")
        data = text.getvalue().encode()
        path.write_bytes({".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, lambda x: x)(data))
    structures = list(read_structures(path))
    assert len(structures) == 3
    for structure, atoms in zip(structures, frames, strict=True):
        assert_same(structure, atoms)


def test_forces_of_fixed_atoms_are_read_unchanged(tmp_path: Path) -> None:
    atoms = labelled()
    atoms.set_constraint(FixAtoms([0, 3]))
    ase.io.write(tmp_path / "fixed.traj", atoms)
    (structure,) = read_structures(tmp_path / "fixed.traj")
    assert np.all(structure.forces[0] != 0)
    assert np.flatnonzero(structure.fixed).tolist() == [0, 3]
    for name in ("again.extxyz", "again.traj"):  # and are fixed in what we write
        ase.io.write(tmp_path / name, structure.to_ase())
        (again,) = read_structures(tmp_path / name)
        assert_same(again, atoms)
        assert again.fixed.tolist() == structure.fixed.tolist()


@pytest.mark.parametrize("suffix", [".extxyz", ".traj"])
def test_atoms_fixed_along_all_axes_are_fixed(suffix: str, tmp_path: Path) -> None:
    """As ASE writes them where others are fixed along one."""
    atoms = labelled()
    atoms.set_constraint([FixCartesian(0), FixCartesian(1, (False, False, True))])
    ase.io.write(tmp_path / f"a{suffix}", atoms)
    (structure,) = read_structures(tmp_path / f"a{suffix}")
    assert np.flatnonzero(structure.fixed).tolist() == [0]


VECTORS = "".join(f"<v>{x} {y} {z}</v>" for x, y, z in np.eye(3) * 5.0)
VASPRUN = f"""<?xml version="1.0" encoding="ISO-8859-1"?><modeling>
<incar><i name="NSW" type="int">0</i></incar><kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1</v></varray></kpoints>
<parameters><separator name="electronic"><i name="NELECT">2.0</i></separator><separator name="electronic exchange-correlation"></separator></parameters>
<atominfo><atoms>2</atoms><types>1</types><array name="atoms"><set><rc><c>H</c><c>1</c></rc><rc><c>H</c><c>1</c></rc></set></array></atominfo>
<structure name="initialpos"><crystal><varray name="basis">{VECTORS}</varray></crystal><varray name="positions"><v>0 0 0</v><v>0.15 0 0</v></varray></structure>
<calculation><scstep><energy><i name="e_fr_energy">-6.7</i><i name="e_wo_entrp">-6.7</i><i name="e_0_energy">-6.7</i></energy></scstep>
<structure><crystal><varray name="basis">{VECTORS}</varray></crystal><varray name="positions"><v>0 0 0</v><v>0.15 0 0</v></varray></structure>
<varray name="forces"><v>0.5 0 0</v><v>-0.5 0 0</v></varray><varray name="stress"><v>10 0 0</v><v>0 20 0</v><v>0 0 30</v></varray>
<energy><i name="e_fr_energy">-6.7</i><i name="e_wo_entrp">-6.7</i><i name="e_0_energy">-6.7</i></energy></calculation>
</modeling>"""


def test_vasp_output_through_ase(tmp_path: Path) -> None:
    """A vasprun.xml in VASP's layout (written here); stress in kbar comes out in eV/Å³ with ASE's sign."""
    (tmp_path / "vasprun.xml").write_text(VASPRUN)
    (structure,) = read_structures(tmp_path / "vasprun.xml")
    assert structure.energy == pytest.approx(-6.7)
    assert structure.forces[0].tolist() == [0.5, 0, 0]
    np.testing.assert_allclose(np.diag(structure.stress), [-10 / 1602.1766, -20 / 1602.1766, -30 / 1602.1766], rtol=1e-4)

    (tmp_path / "vasprun.xml").write_text(VASPRUN.replace('"e_fr_energy">-6.7', '"e_fr_energy">-6.8'))
    (structure,) = read_structures(tmp_path / "vasprun.xml")
    assert (structure.energy, structure.remarks) == (-6.7, ("another free energy",))
    (free,) = read_structures(tmp_path / "vasprun.xml", LabelConfig(energy="free_energy"))
    assert (free.energy, free.remarks) == (-6.8, ())


@pytest.mark.parametrize("suffix", [".extxyz", ".traj", ".db"])
def test_forces_belong_to_the_free_energy(tmp_path: Path, suffix: str) -> None:
    """Where both energies are there and differ, inspection says which to take; that one can be taken from every format of ASE."""
    frames = [labelled(k) for k in range(4)]
    for k, atoms in enumerate(frames):
        atoms.calc.results["free_energy"] = atoms.calc.results["energy"] + (0.1 if k else 1e-4)
    ase.io.write(tmp_path / f"a{suffix}", frames)
    (said,) = [w for w in inspect(tmp_path / f"a{suffix}").warnings if "free_energy" in w]
    assert said.startswith("3 of 4 frames have a free_energy more than 1 meV/atom from the energy.")
    assert "--energy free_energy" in said
    labels = LabelConfig(energy="free_energy")
    energies = [s.energy for s in read_structures(tmp_path / f"a{suffix}", labels)]
    assert energies == pytest.approx([a.calc.results["free_energy"] for a in frames], abs=1e-6)
    assert not any("free_energy" in w for w in inspect(tmp_path / f"a{suffix}", labels).warnings)


@pytest.mark.parametrize("layout", ["md17", "rmd17"])
def test_md17_npz_in_kcal(tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str) -> None:
    rng = np.random.default_rng(0)
    z, r, e, f = np.array([8, 1, 1]), rng.normal(size=(4, 3, 3)), rng.normal(size=4) * 1e4, rng.normal(size=(4, 3, 3))
    arrays = (
        {"z": z, "R": r, "E": e[:, None], "F": f} if layout == "md17" else {"nuclear_charges": z, "coords": r, "energies": e, "forces": f}
    )
    np.savez(tmp_path / "data.npz", **arrays)
    caplog.set_level(logging.INFO, "gossamer")
    structures = list(read_structures(tmp_path / "data.npz"))
    factor = 0.0433641153087705
    assert structures[2].energy == pytest.approx(e[2] * factor, rel=1e-6)
    np.testing.assert_allclose(structures[2].forces, f[2] * factor, rtol=1e-6)
    assert "states no unit of energy: it is read in kcal/mol" in caplog.text
    caplog.clear()
    (in_ev, *_) = read_structures(tmp_path / "data.npz", LabelConfig(energy_unit="eV"))
    assert not caplog.text
    assert in_ev.energy == pytest.approx(e[0])


@pytest.mark.parametrize(("energy_unit", "length_unit"), [("eV", "Ang"), (b"kcal/mol", b"bohr"), (["Ha"], "\u212b"), ("", "")])
def test_units_that_npz_files_state(tmp_path: Path, energy_unit: Any, length_unit: Any) -> None:
    """As sGDML writes them: energies, positions and forces follow."""
    arrays = {"z": np.array([8, 1]), "R": np.ones((2, 2, 3)) * [[[1], [2]]], "E": np.array([1.0, 2.0]), "F": np.ones((2, 2, 3))}
    np.savez(tmp_path / "a.npz", **arrays, e_unit=energy_unit, r_unit=length_unit)
    energy = {"eV": 1.0, "Ha": units.Hartree}.get("".join(map(str, energy_unit)), units.kcal / units.mol)
    length = units.Bohr if length_unit == b"bohr" else 1.0
    first = next(read_structures(tmp_path / "a.npz"))
    assert first.energy == pytest.approx(energy)
    np.testing.assert_allclose(first.positions, length * arrays["R"][0])
    np.testing.assert_allclose(first.forces, np.full((2, 3), energy / length))
    forces = next(read_structures(tmp_path / "a.npz", LabelConfig(force_unit="eV/Angstrom"))).forces
    np.testing.assert_allclose(forces, np.ones((2, 3)))


def test_units_that_npz_files_state_are_not_passed_over(tmp_path: Path) -> None:
    arrays = {"z": np.array([8, 1]), "R": np.ones((2, 2, 3)) * [[[1], [2]]], "E": np.array([1.0, 2.0]), "F": np.ones((2, 2, 3))}
    path = tmp_path / "a.npz"
    np.savez(path, **arrays, e_unit="eV", r_unit="Bohr")
    assert next(read_structures(path, LabelConfig(energy_unit="eV", length_unit="Bohr"))).energy == 1.0
    with pytest.raises(ValueError, match=r"a\.npz' states e_unit 'eV', but data\.labels\.energy_unit is Hartree\. Leave the setting out"):
        list(read_structures(path, LabelConfig(energy_unit="Hartree")))
    with pytest.raises(ValueError, match=r"states r_unit 'Bohr', but data\.labels\.length_unit is Angstrom"):
        list(read_structures(path, LabelConfig(length_unit="Angstrom")))
    np.savez(path, **arrays, e_unit="furlong", r_unit="Ang")
    with pytest.raises(ValueError, match=r"a\.npz' states e_unit 'furlong', expected one of eV, meV, Hartree"):
        list(read_structures(path))


@pytest.mark.parametrize(
    ("name", "labels", "listed"),
    [
        ("a.npz", {"energy": "nonsense"}, r"data\.labels\.energy \(nonsense\) would"),
        ("a.npz", {"group": "traj", "stress_unit": "GPa"}, r"stress_unit \(GPa\), data\.labels\.group \(traj\) would change nothing\. Leave them"),
        ("mptrj.json", {"energy_unit": "Hartree"}, r"energy_unit \(Hartree\)"),
        ("a.store", {"forces": "f"}, r"forces \(f\) would change nothing\. Leave it out"),
        ("s2ef", {"group": "g"}, r"group \(g\)"),
        ("a.extxyz", {"virial": "v", "stress": "s", "stress_unit": "GPa"}, r"a virial, .*: data\.labels\.stress \(s\), data\.labels\.stress_unit"),
    ],
)  # fmt: skip
def test_settings_of_labels_that_would_change_nothing(tmp_path: Path, sound_files: Path, name: str, labels: dict, listed: str) -> None:
    path = sound_files / name
    if name == "a.store":
        path = tmp_path / name
        write_store(read_structures(sound_files / "a.traj"), path)
    elif name == "s2ef":
        path = write_oc20(tmp_path / name)
    for read in (read_structures, open_dataset):
        with pytest.raises(ValueError, match=f"{name}.* (has names and units of its own|is to be read with).*{listed}"):
            list(read(path, LabelConfig(**labels)))
        assert len(list(read(path, LabelConfig(length_unit="Angstrom")))) > 1  # as runs of older versions wrote it down


def test_legacy_conversion_takes_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["data", "convert", "--legacy-lmdb", str(tmp_path / "x.lmdb"), "--out", str(tmp_path / "x.store"), "--energy-unit", "Hartree"]
    assert main(given) == 2
    assert "energy_unit (Hartree) would change nothing" in capsys.readouterr().err


def test_iso17_database(tmp_path: Path) -> None:
    """Databases written by schnetpack keep the energy as a key-value pair and the forces as data."""
    forces = np.random.default_rng(0).normal(size=(3, 3))
    with ase.db.connect(str(tmp_path / "iso17.db")) as database:
        database.write(molecule("H2O"), total_energy=-76.3, data={"atomic_forces": forces})
    (structure,) = read_structures(tmp_path / "iso17.db")
    assert structure.energy == -76.3
    np.testing.assert_allclose(structure.forces, forces)


def test_mptrj_json_is_streamed(tmp_path: Path) -> None:
    site = {"species": [{"element": "Mg", "occu": 1}], "abc": [0, 0, 0], "xyz": [0.1, 0.2, 0.3]}
    frame = {"structure": {"lattice": {"matrix": (np.eye(3) * 3).tolist()}, "sites": [site]}, "uncorrected_total_energy": -1.5,
             "corrected_total_energy": -9.0, "force": [[0.1, 0, 0]], "stress": (np.eye(3) * 100).tolist()}  # fmt: skip
    (tmp_path / "MPtrj.json").write_text(json.dumps({"mp-1": {"mp-1-0-0": frame, "mp-1-0-1": frame}, "mp-2": {"mp-2-0-0": frame}}))
    structures = list(read_structures(tmp_path / "MPtrj.json"))
    assert [s.group for s in structures] == ["mp-1", "mp-1", "mp-2"]
    assert structures[0].energy == -1.5
    assert structures[0].stress[0, 0] == pytest.approx(-100 * 6.2415091e-4, rel=1e-6)


def test_oc20_folder_subtracts_the_reference(tmp_path: Path) -> None:
    for k in range(2):
        atoms = [labelled(k), labelled(k + 5)]
        for a in atoms:
            a.set_constraint(FixAtoms([0]))
        text = io.StringIO()
        ase.io.write(text, atoms, format="extxyz")
        (tmp_path / f"{k}.extxyz.xz").write_bytes(lzma.compress(text.getvalue().encode()))
        (tmp_path / f"{k}.txt.xz").write_bytes(lzma.compress(f"random{k},frame0,-10.5\nrandom{k},frame3,-11.5\n".encode()))
    structures = list(read_structures(tmp_path))
    assert len(structures) == 4
    assert structures[0].energy == pytest.approx(labelled(0).calc.results["energy"] + 10.5, abs=1e-6)
    assert structures[3].energy == pytest.approx(labelled(6).calc.results["energy"] + 11.5, abs=1e-6)
    assert structures[3].group == "random1"
    assert np.flatnonzero(structures[0].fixed).tolist() == [0]
    (tmp_path / "1.txt.xz").write_bytes(lzma.compress(b"random1,frame0,-10.5\n"))
    with pytest.raises(ValueError, match="do not belong together"):
        list(read_structures(tmp_path))


def test_folders_are_read_whole(tmp_path: Path, sound_files: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every file that would be read alone, and no other; what is left out is said in one line."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.extxyz", "a.extxyz.xz", "a.json", "a.npz", "a.traj", "mptrj.json"):
        (folder / name).write_bytes((sound_files / name).read_bytes())
    write_store(read_structures(sound_files / "a.traj"), folder / "a.store")
    (folder / "vasprun.xml").write_text(VASPRUN)
    caplog.clear()
    assert len(list(read_structures(folder))) == 15
    assert caplog.messages == []
    others = [".hidden.extxyz", "INCAR", "POSCAR", "README.md", "a.extxyz.bak", "a.extxyz~", "a.json.bak", "info.json", "notes.txt", "old"]
    for name in others[:-1]:
        (folder / name).write_text('{"made": "today"}')
    (folder / "old").mkdir()
    assert len(list(read_structures(folder))) == 15
    listed = ", ".join(others[:8])
    assert caplog.messages == [f"'{folder}': 8 files are read as data, 10 are not: {listed} ..."]
    (folder / "b.traj").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.traj"):
        list(read_structures(folder))
    with pytest.raises(ValueError, match="holds no data files"):
        list(read_structures(folder / "old"))


class _Graph:
    """Pickled under the name of the graph class of another package."""


def test_legacy_lmdb_of_pickled_graphs(tmp_path: Path) -> None:
    import types

    lmdb = pytest.importorskip("lmdb")
    module = types.ModuleType("torch_geometric.data.data")
    data_class = type("Data", (), {"__module__": "torch_geometric.data.data", "__qualname__": "Data"})
    module.Data = data_class
    sys.modules.update(
        {"torch_geometric": types.ModuleType("torch_geometric"), "torch_geometric.data": types.ModuleType("d"), module.__name__: module}
    )
    try:
        graph = data_class()
        graph.__dict__ |= {"pos": torch.rand(4, 3), "cell": torch.eye(3)[None] * 9, "atomic_numbers": torch.tensor([8.0, 1, 1, 29]), "y": -3.5,
                           "force": torch.rand(4, 3), "fixed": torch.tensor([0.0, 0, 0, 1]), "sid": 17}  # fmt: skip
        good = pickle.dumps(graph)
        graph.y = float("nan")
        broken = pickle.dumps(graph)
    finally:
        for name in ("torch_geometric", "torch_geometric.data", module.__name__):
            del sys.modules[name]

    class Evil:
        def __reduce__(self):
            return (print, ("this must never be printed",))

    for name, content in (("good", good), ("broken", broken), ("evil", pickle.dumps(Evil()))):
        environment = lmdb.open(str(tmp_path / f"{name}.lmdb"), subdir=False, map_size=2**24)
        with environment.begin(write=True) as transaction:
            transaction.put(b"0", content)
            transaction.put(b"length", pickle.dumps(1))
        environment.close()
    (structure,) = read_legacy_lmdb(tmp_path / "good.lmdb")
    assert structure.energy == -3.5
    assert structure.group == "17"
    assert structure.atomic_numbers.tolist() == [8, 1, 1, 29]
    assert structure.fixed.tolist() == [False, False, False, True]
    np.testing.assert_allclose(structure.forces, graph.force.numpy())
    (structure,) = read_legacy_lmdb(tmp_path / "broken.lmdb", keep_broken=True)
    assert (structure.energy, structure.faults["energy"].reason) == (None, "energy not finite")
    with pytest.raises(ValueError, match=r"broken.lmdb' record 0: energy is not finite. Mend it, or leave such frames out"):
        list(read_legacy_lmdb(tmp_path / "broken.lmdb"))
    with pytest.raises(ValueError, match=r"asks for builtins\.print"):
        list(read_legacy_lmdb(tmp_path / "evil.lmdb"))
    with pytest.raises(ValueError, match="gossamer data convert --legacy-lmdb"):
        list(read_structures(tmp_path / "good.lmdb"))


ATTACKS = """
import io, pickle, struct, sys
import numpy as np, torch
from gossamer.data.legacy import restricted_loads

def text(name): return b"\\x8c" + bytes([len(name)]) + name.encode()
def function(module, name): return text(module) + text(name) + b"\\x93"
forged = (b"\\x80\\x04" + function("numpy.core.multiarray", "_reconstruct") + function("numpy", "ndarray") + b"K\\x00\\x85C\\x01b\\x87R"
    + b"(K\\x01K\\x04\\x85" + function("numpy", "dtype") + text("O8") + b"\\x89\\x88\\x87R"
    + b"(K\\x03" + text("|") + b"NNNJ\\xff\\xff\\xff\\xffJ\\xff\\xff\\xff\\xffK\\x00tb"
    + b"\\x89C\\x20" + b"A" * 32 + b"tb.")
state = (b"\\x80\\x04" + function("torch._utils", "_rebuild_tensor_v2") + b"N}" + text("__defaults__") + b"K\\x07\\x85s\\x86b.")
scalar = b"\\x80\\x04" + function("numpy.core.multiarray", "scalar") + function("numpy", "dtype") + text("O8") + b"\\x89\\x88\\x87R" + b"C\\x08" + b"A" * 8 + b"\\x86R."
memory = b"\\x80\\x04Nr\\xff\\xff\\xff\\x7f."
extension = b"\\x80\\x04\\x82\\x01."
before = torch._utils._rebuild_tensor_v2.__defaults__
for name, data in dict(forged=forged, state=state, scalar=scalar, memory=memory, extension=extension).items():
    try:
        print(name, "gave", repr(restricted_loads(data)), flush=True)
    except ValueError as error:
        print(name, "refused:", error)
assert torch._utils._rebuild_tensor_v2.__defaults__ == before
"""


def test_forged_pickles_build_nothing_but_arrays() -> None:
    """A dtype with false flags reached raw memory, a state changed a function of torch; each in a copy of this process to crash."""
    done = forked(ATTACKS)
    assert done.returncode == 0, (done.returncode, done.stdout)
    answers = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert all(answer.startswith("refused: ") for answer in answers.values()), answers
    assert "type 'O8', expected plain numbers" in answers["forged"]
    assert "a state for a function" in answers["state"]
    assert "type 'O8', expected plain numbers" in answers["scalar"]
    assert "memory is asked for place" in answers["memory"]
    assert "operation EXT1" in answers["extension"]


def test_arrays_of_legacy_pickles_are_what_they_were() -> None:
    """Tensors with offsets and strides, numpy arrays of several kinds and numbers come back; what does not fit is refused."""
    base = torch.arange(24.0).reshape(4, 6)
    values = [
        base[1:, ::2],
        base.T,
        torch.zeros(0, 3),
        torch.tensor(3),
        np.arange(6, dtype=">i4").reshape(2, 3, order="F"),
        np.ones(2, bool),
    ]
    for value in values:
        for protocol in (3, 4):
            back = restricted_loads(pickle.dumps(value, protocol))
            array = back.array if isinstance(value, np.ndarray) else back
            np.testing.assert_array_equal(array, np.asarray(value))
    assert restricted_loads(pickle.dumps(np.float64(2.5))) == 2.5
    for shape, strides, offset in (((5, 6), (6, 1), 0), ((4, 6), (6, 1), 1), ((2,), (10**12,), 0), ((10**12,), (0,), 0), ((-1,), (1,), 0)):
        with pytest.raises(ValueError, match=r"does not fit its storage|a tensor that is not"):
            _tensor(np.arange(24.0), offset, shape, strides)
    for value in (np.array(["text"]), np.array([None]), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "f8")])):
        with pytest.raises(ValueError, match="expected plain numbers|not that of plain numbers"):
            restricted_loads(pickle.dumps(value))


def test_units_and_signs(tmp_path: Path) -> None:
    atoms = labelled()
    ase.io.write(tmp_path / "a.extxyz", atoms)
    labels = LabelConfig(energy_unit="Hartree", length_unit="Bohr", stress_unit="GPa", stress_sign="vasp")
    (s,) = read_structures(tmp_path / "a.extxyz", labels)
    assert s.energy == pytest.approx(atoms.calc.results["energy"] * 27.2114, rel=1e-5)
    np.testing.assert_allclose(s.forces, atoms.calc.results["forces"] * 51.42207, rtol=1e-5)
    np.testing.assert_allclose(s.positions, atoms.positions * 0.529177, rtol=1e-5)
    np.testing.assert_allclose(s.stress, -atoms.get_stress(voigt=False) * units.GPa, rtol=1e-5, atol=1e-9)


def test_virial_becomes_stress(tmp_path: Path) -> None:
    atoms = labelled()
    stress = atoms.get_stress(voigt=False)
    atoms.calc = None
    atoms.info["virial"] = -stress * atoms.get_volume()
    ase.io.write(tmp_path / "a.extxyz", atoms)
    (s,) = read_structures(tmp_path / "a.extxyz", LabelConfig(stress="virial"))
    np.testing.assert_allclose(s.stress, stress, atol=1e-7)


@pytest.mark.parametrize("pbc", [(False, False, False), (True, True, False)])
def test_stress_without_a_volume_is_not_read(tmp_path: Path, pbc: tuple[bool, bool, bool]) -> None:
    """Molecules and slabs: said once, and `fit` learns the stress from the crystals, if there are any."""
    frames = [labelled(k) for k in range(6)]
    for atoms in frames[:4]:
        atoms.pbc = pbc
    ase.io.write(tmp_path / "a.extxyz", frames)
    for atoms in frames:
        atoms.info["virial"] = np.eye(3)
    ase.io.write(tmp_path / "b.extxyz", frames)
    from_file = list(read_structures(tmp_path / "a.extxyz"))
    old = [replace(s, stress=np.eye(3)) for s in from_file]
    write_store(old, tmp_path / "old.store")
    for structures in (
        from_file,
        Store(tmp_path / "old.store"),
        list(read_structures(tmp_path / "b.extxyz", LabelConfig(virial="virial"))),
    ):
        assert [s.stress is None for s in structures] == [True] * 4 + [False] * 2
        said = [w for w in inspect(structures).warnings if "4 of 6 frames have a stress but are not periodic along all axes" in w]
        assert len(said) == 1
        assert "frame 0" in said[0]
        assert choose_settings("none.extxyz", structures[:4]).loss.stress == 0
        assert choose_settings("none.extxyz", structures).loss.stress > 0
        assert choose_settings("none.extxyz", structures[4:]).loss.stress > 0


def test_store_streams_and_reads_back(tmp_path: Path) -> None:
    frames = [labelled(0), labelled(1, periodic=False), labelled(2)]
    ase.io.write(tmp_path / "a.traj", frames)
    assert write_store(read_structures(tmp_path / "a.traj"), tmp_path / "a.store") == 3
    store = open_dataset(tmp_path / "a.store")
    assert isinstance(store, Store)
    for structure, atoms in zip(store, frames, strict=True):
        assert_same(structure, atoms, 1e-12)
    assert store[1].stress is None
    with pytest.raises(FileExistsError, match="exists"):
        write_store([], tmp_path / "a.store")
    (tmp_path / "a.store" / "forces.bin").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="damaged"):
        Store(tmp_path / "a.store")


def test_store_of_format_1_is_read_for_ever() -> None:
    labelled_one, bare = Store(Path(__file__).parent / "data" / "format1" / "store")  # tests/data/make_format1.py
    assert (labelled_one.energy, labelled_one.group, labelled_one.fixed.tolist()) == (-3.5, "first", [True, False])
    np.testing.assert_array_equal(labelled_one.forces, np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(labelled_one.stress, np.diag([0.1, 0.2, 0.3]))
    assert bare.n_atoms == 9
    assert (bare.energy, bare.forces, bare.stress, bare.fixed, bare.group) == (None,) * 5


def test_splits(tmp_path: Path) -> None:
    frames = [labelled(k) for k in range(20)]
    for k, atoms in enumerate(frames):
        atoms.info["material"] = f"m{k // 4}"
    ase.io.write(tmp_path / "a.extxyz", frames)
    path = str(tmp_path / "a.extxyz")
    train, valid, test = load_data(DataConfig(train=path, valid_fraction=0.2))
    assert (len(train), len(valid), test) == (16, 4, None)
    assert {s.name for s in train}.isdisjoint({s.name for s in valid})
    again, _, _ = load_data(DataConfig(train=path, valid_fraction=0.2))
    assert [s.name for s in train] == [s.name for s in again]
    train, valid, _ = load_data(DataConfig(train=path, valid_fraction=0.2, split="group", labels=LabelConfig(group="material")))
    assert {s.group for s in train}.isdisjoint({s.group for s in valid})
    assert len(valid) == 4
    train, _, _ = load_data(DataConfig(train=path, valid_size=3, train_size=5))
    assert len(train) == 5
    with pytest.raises(ValueError, match="is the same structure as"):
        load_data(DataConfig(train=path, valid=path))


@pytest.mark.parametrize(("sizes_of_groups", "asked", "expected"), [([18, 2], 2, 2), ([7, 5, 4, 30], 5, 5), ([10, 10], 2, 10), ([4] * 5, 8, 8),
                                                                     ([1, 9], 9, 9), ([3, 50, 3, 50], 7, 6), ([20], 2, 20)])  # fmt: skip
def test_groups_are_chosen_by_their_frames(sizes_of_groups: list[int], asked: int, expected: int) -> None:
    groups = np.repeat([f"g{k}" for k in range(len(sizes_of_groups))], sizes_of_groups)
    chosen = [choose_groups(groups, asked, np.random.default_rng(seed)).tolist() for seed in range(10)]
    assert [int(np.isin(groups, c).sum()) for c in chosen] == [expected] * 10
    assert chosen == [choose_groups(groups, asked, np.random.default_rng(seed)).tolist() for seed in range(10)]
    if sizes_of_groups in ([10, 10], [4] * 5):  # several ways: the seed decides
        assert len({tuple(sorted(c)) for c in chosen}) > 1


def test_frames_without_a_group_are_named(tmp_path: Path) -> None:
    structures = [replace(from_atoms(labelled(k), LabelConfig(), f"frame {k}"), group=None if k == 2 else "g") for k in range(4)]
    write_store(structures, tmp_path / "store")
    with pytest.raises(ValueError, match=r"store' frame 2 has no group: data.labels.group does not say which"):
        load_data(DataConfig(train=str(tmp_path / "store"), split="group"))


@pytest.mark.parametrize(
    ("elements", "message"),
    [(["H", "Xx"], "'Xx' is not the symbol of an element"), (["X"], "'X' is not"), (["H", "C", "H"], "H is named twice")],
)
def test_elements_that_are_none(elements: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"data.elements: .*{message}"):
        make_config({"data": {"train": "a.extxyz", "elements": elements}})


def test_leaks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rounding of a zero hides no frame, test frames that validate are said, and so is what is not looked for."""
    crystal = bulk("Cu", cubic=True)
    crystal.calc = SinglePointCalculator(crystal, energy=-1.0)
    again = crystal.copy()
    again.positions -= 1e-9
    again.calc = crystal.calc
    files = {name: str(tmp_path / f"{name}.extxyz") for name in ("train", "again", "other")}
    ase.io.write(files["train"], [crystal, labelled(0)])
    ase.io.write(files["again"], [again, labelled(1)])
    ase.io.write(files["other"], [labelled(1), labelled(2)])
    assert "-0.0" in Path(files["again"]).read_text()
    with pytest.raises(ValueError, match=r"again.extxyz' frame 0 \(validation\) is the same structure as '.*train.extxyz' frame 0"):
        load_data(DataConfig(train=files["train"], valid=files["again"]))
    load_data(DataConfig(train=files["train"], valid=files["other"]))
    assert caplog.text == ""
    load_data(DataConfig(train=files["train"], valid=files["other"], test=files["other"]))
    assert "2 of 2 test frames are validation frames too" in caplog.text
    structures = open_dataset(files["train"])
    check_leaks(structures, structures, "validation", limit=3)
    assert "4 frames are too many to look for validation frames among the training frames" in caplog.text


@pytest.mark.parametrize("split", ["random", "group"])
def test_isolated_atoms_are_trained_on(split: str, tmp_path: Path) -> None:
    """Bare or in a large periodic box, whatever the seed; single atoms of a crystal are split like all others."""

    def single(name: str, edge: float | None) -> Atoms:
        atoms = Atoms(name) if edge is None else Atoms(name, cell=np.eye(3) * edge, pbc=True)
        atoms.calc = SinglePointCalculator(atoms, energy=-float(atoms.numbers[0]), forces=np.zeros((1, 3)))
        return atoms

    frames = [labelled(k) for k in range(10)] + [single("H", None), single("Si", 12.0), single("O", 15.0), single("C", 9.0)]
    frames += [single("C", 2.5 + 0.01 * k) for k in range(10)]
    for k, atoms in enumerate(frames):
        atoms.info["material"] = f"m{k // 2}"
    ase.io.write(tmp_path / "a.extxyz", frames)
    for seed in range(5):
        config = DataConfig(
            train=str(tmp_path / "a.extxyz"), valid_fraction=0.5, split=split, seed=seed, labels=LabelConfig(group="material")
        )
        train, valid, _ = load_data(config, 4.0)
        assert sum(s.is_isolated(4.0) for s in train) == 4
        assert any(s.n_atoms == 1 for s in valid)
        assert compute_statistics(train, 4.0, "isolated").reference_energies == {"H": -1.0, "C": -6.0, "O": -8.0, "Si": -14.0}
    if split == "random":
        train, _, _ = load_data(replace(config, train_size=5), 4.0)
        assert (len(train), sum(s.is_isolated(4.0) for s in train)) == (5, 4)
    assert inspect(tmp_path / "a.extxyz").facts["isolated atoms"] == "C, H, O, Si"
    ase.io.write(tmp_path / "b.extxyz", frames[10:13])
    with pytest.raises(ValueError, match=r"3 structures in '.*b\.extxyz' cannot be split: 3 are isolated atoms"):
        load_data(DataConfig(train=str(tmp_path / "b.extxyz")))


@pytest.mark.parametrize("split", ["random", "group"])
def test_elements_of_one_frame_are_trained_on(split: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Or no potential could validate on it; with its group, where groups are split."""
    frames = [labelled(k) for k in range(20)]
    for k, atoms in enumerate(frames):
        atoms.info["material"] = f"m{k // 2}"
        if k % 5 == 0:
            atoms.numbers[0] = 40 + k
    ase.io.write(tmp_path / "a.extxyz", frames)
    for seed in range(5):
        config = DataConfig(
            train=str(tmp_path / "a.extxyz"), valid_fraction=0.4, split=split, seed=seed, labels=LabelConfig(group="material")
        )
        train, valid, _ = load_data(config)
        assert len(train) + len(valid) == 20
        assert {z for s in valid for z in s.atomic_numbers} <= {z for s in train for z in s.atomic_numbers}
        assert split == "random" or {s.group for s in train}.isdisjoint({s.group for s in valid})
    ase.io.write(tmp_path / "b.extxyz", [frames[0], frames[5]])
    with pytest.raises(ValueError, match="leaves no validation frames"):
        load_data(DataConfig(train=str(tmp_path / "b.extxyz")))
    ase.io.write(tmp_path / "c.extxyz", frames[1:3])


@pytest.mark.parametrize("edge", [None, 20.0])
def test_isolated_atoms_need_no_stress(edge: float | None, tmp_path: Path) -> None:
    """As in files for MACE: crystals with a stress, and an atom alone, bare or in a box, with an energy only."""
    frames = [labelled(k) for k in range(8)]
    for atoms in frames:
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = atoms.calc.results["energy"], atoms.calc.results["forces"]
        atoms.info["REF_stress"] = atoms.get_stress(voigt=False)
        atoms.calc = None
    lone = Atoms("Si") if edge is None else Atoms("Si", cell=np.eye(3) * edge, pbc=True)
    lone.info["REF_energy"] = -1.0
    ase.io.write(tmp_path / "a.extxyz", [lone, *frames])
    found = inspect(tmp_path / "a.extxyz")
    assert [f"found REF_{label}" in message for label, message in zip(("energy", "forces"), found.errors, strict=True)] == [True, True]
    labels = LabelConfig(energy="REF_energy", forces="REF_forces", stress="REF_stress")
    structures = list(read_structures(tmp_path / "a.extxyz", labels))
    report = inspect(structures)
    assert (report.errors, [w for w in report.warnings if "stress" in w]) == ([], [])
    assert choose_settings("none.extxyz", structures).loss.stress > 0
    require_labels(structures, ["stress"], "", 4.0)
    assert structures[0].stress is None
    first, second = LoneStresses(structures, 4.0)[:2]
    assert first.volume == pytest.approx(12.0**3 if edge is None else edge**3)
    assert (first.is_isolated(4.0), first.pbc.all(), np.abs(first.stress).max()) == (True, True, 0.0)
    assert second is structures[1]
    with_forces_alone = [replace(s, stress=None) for s in structures]
    assert [m for m in (*inspect(with_forces_alone).errors, *inspect(with_forces_alone).warnings) if "have no stress" in m] == []
    with pytest.raises(ValueError, match="frame 1 has no stress"):
        require_labels(with_forces_alone, ["stress"], "loss.{label} is above 0", 4.0)


def test_isolated_atoms_are_no_outliers() -> None:
    crystals = [replace(from_atoms(labelled(k % 10), LabelConfig(), f"frame {k}"), energy=-16.0 - 0.01 * (k % 10)) for k in range(80)]
    alone = replace(from_atoms(Atoms("Cu"), LabelConfig(), "alone"), energy=3.5)
    with_it, without = inspect([alone, *crystals]), inspect(crystals)
    assert not any("outlier" in w for w in with_it.warnings)
    assert with_it.facts["energy spread"] == without.facts["energy spread"]
    far = replace(crystals[0], energy=-10.0, name="far")
    assert any("1 energy outliers" in w and w.endswith("far") for w in inspect([alone, far, *crystals]).warnings)


def test_isolated_atoms_of_unlike_energies_are_told() -> None:
    """Two spin states, say: the reference is one of them. Energies given by number have no symbol."""
    found = [replace(from_atoms(Atoms("O", cell=[10.0 + k] * 3, pbc=True), LabelConfig(), "x"), energy=-1.5 - 0.4 * k) for k in range(3)]
    said = inspect([*found, from_atoms(labelled(), LabelConfig(), "y")]).warnings
    assert any("isolated atoms of O have energies of -2.3 to -1.5 eV" in w and "the first, -1.5 eV" in w for w in said), said
    assert not any("have energies of" in w for w in inspect([found[0], found[0]]).warnings)
    with pytest.raises(ValueError, match=r"has no value for O; it has some for 8\. Give one in eV for each element, by its symbol"):
        compute_statistics(found, 4.0, {"8": -1.5})


def test_sizes_of_structures(tmp_path: Path) -> None:
    structures = [from_atoms(molecule(name), LabelConfig(), name) for name in ("CO", "CH4", "H2O")]
    write_store(structures, tmp_path / "store")
    for found in (structures, Store(tmp_path / "store")):
        assert sizes(found).tolist() == [2, 5, 3]
        assert sizes(Subset(found, [2, 0])).tolist() == [3, 2]


def test_statistics() -> None:
    """Least squares finds the energies that made the labels; isolated atoms take precedence."""
    references = {"H": -3.0, "C": -7.0, "O": -9.0}
    structures = []
    for name in ("CH4", "H2O", "CO2", "CH3OH", "H2"):
        atoms = molecule(name)
        energy = sum(references[s] for s in atoms.get_chemical_symbols())
        structures.append(
            Structure(atomic_numbers=atoms.numbers, positions=atoms.positions, energy=energy, forces=np.full((len(atoms), 3), 0.5))
        )
    statistics = compute_statistics(structures, cutoff=3.0)
    assert statistics.reference_energies == pytest.approx(references)
    assert statistics.energy_scale == pytest.approx(0.5)
    assert statistics.mean_neighbors > 1
    lone = [Structure(atomic_numbers=np.array([z]), positions=np.zeros((1, 3)), energy=e) for z, e in ((1, -1.0), (6, -2.0), (8, -4.0))]
    assert compute_statistics([*structures, *lone], 3.0).reference_energies == {"H": -1.0, "C": -2.0, "O": -4.0}
    assert compute_statistics(structures, 3.0, {"H": 1, "C": 2, "O": 3}).reference_energies["O"] == 3
    with pytest.raises(ValueError, match="no value for O"):
        compute_statistics(structures, 3.0, {"H": 1, "C": 2})
    with pytest.raises(ValueError, match="no frame holds a single atom of"):
        compute_statistics(structures, 3.0, "isolated")
    with pytest.raises(ValueError, match="The data holds O"):
        compute_statistics(structures, 3.0, elements=["H", "C"])


def test_batches_cover_an_epoch_once_and_repeat_exactly() -> None:
    atoms = np.random.default_rng(0).integers(1, 40, 50)
    edges = atoms**2
    limits = [(atoms, 100), (edges, 900)]
    batches = epoch_batches(50, 8, seed=3, epoch=2, limits=limits)
    assert sorted(k for b in batches for k in b) == list(range(50))
    assert all(len(b) <= 8 and (len(b) == 1 or (atoms[b].sum() <= 100 and edges[b].sum() <= 900)) for b in batches)
    assert any(len(b) == 1 and edges[b].sum() > 900 for b in batches)
    assert batches == epoch_batches(50, 8, seed=3, epoch=2, limits=limits)
    assert batches != epoch_batches(50, 8, seed=3, epoch=3, limits=limits)
    for limit in limits:  # each limit counts
        assert len(epoch_batches(50, 8, seed=3, epoch=2, limits=[limit])) > len(epoch_batches(50, 8, seed=3, epoch=2)) == 7


IDENTITY = {"data": "abc", "model": {"cutoff": 4.0}}


def test_edges_are_counted_as_they_are_collated(tmp_path: Path) -> None:
    structures = [from_atoms(labelled(k, periodic=k % 2 == 0), LabelConfig(), "frame") for k in range(4)]
    group = start_process_group("cpu")
    for nearest in (None, 3):
        loader = Loader(SimpleNamespace(cutoff=4.0, max_neighbors=nearest), structures)
        assert count_edges(loader, group, tmp_path, IDENTITY).tolist() == [collate([s], 4.0, nearest).n_edges for s in structures]
        lists = NeighborLists(loader.potential)
        kept, made = collate(structures, 4.0, lists=[lists.of(k, s) for k, s in enumerate(structures)]), collate(structures, 4.0, nearest)
        assert torch.equal(kept.edge_index, made.edge_index)
        assert torch.equal(kept.edge_vectors(), made.edge_vectors())


def test_numbers_of_edges_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structures = [from_atoms(labelled(k, periodic=k % 2 == 0), LabelConfig(), "frame") for k in range(4)]
    monkeypatch.setattr(loop, "MANY", 4)
    group, asked = start_process_group("cpu"), []

    class Counting(Loader):
        def edge_counts(self, indices: Sequence[int]) -> np.ndarray:
            asked.append(len(indices))
            return super().edge_counts(indices)

    loader = Counting(SimpleNamespace(cutoff=4.0, max_neighbors=None), structures)
    first = count_edges(loader, group, tmp_path, IDENTITY).tolist()
    assert count_edges(loader, group, tmp_path, IDENTITY).tolist() == first
    assert asked == [4]
    count_edges(loader, group, tmp_path, {**IDENTITY, "data": "other"})
    count_edges(Counting(loader.potential, structures[:3]), group, tmp_path, IDENTITY)
    count_edges(loader, group, tmp_path, IDENTITY)
    (tmp_path / "edges.npz").write_bytes((tmp_path / "edges.npz").read_bytes()[:-9])
    count_edges(loader, group, tmp_path, IDENTITY)
    assert asked == [4, 4, 3, 4, 4]


@pytest.mark.thorough
def test_processes_prepare_the_same_batches(tmp_path: Path) -> None:
    """From a store, which they open themselves, and from structures in memory; in order, epoch after epoch, left and taken up again."""
    structures = [from_atoms(labelled(k, periodic=k % 2 == 0), LabelConfig(), f"frame {k}") for k in range(8)]
    write_store(structures, tmp_path / "store")
    potential = make_potential(["H", "C", "O", "Si"])
    batches = [[3, 1], [0], [7, 2, 5], [4, 6]]
    for data in (Store(tmp_path / "store"), structures):
        loader, plain = Loader(potential, data, num_workers=2), Loader(potential, data)
        assert loader.edge_counts(range(8)).tolist() == plain.edge_counts(range(8)).tolist()
        assert next(loader.graphs(batches)).names == next(plain.graphs(batches)).names  # left in the middle
        for order in (batches, batches[::-1]):
            for graph, expected in zip(loader.graphs(order), plain.graphs(order), strict=True):
                assert graph.names == expected.names
                torch.testing.assert_close(graph.labels, expected.labels, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(graph.edge_index, expected.edge_index)
                assert torch.equal(graph.edge_vectors(), expected.edge_vectors())
        loader.potential = make_potential(["H", "C", "O"])
        with pytest.raises(ValueError, match=r"a batch with .*frame 0: Si \(14\) not among the potential's elements"):
            next(loader.graphs([[0, 1]]))
        loader.close()


def test_a_new_quantity_is_an_entry_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Charges and dipoles go from a file through store, batch, loss, errors and back to ASE, once the table has them."""
    charges = Quantity(name="charges", per="atom", unit="e", error_unit="me")
    dipole = Quantity(name="dipole", per="structure", shape=(3,), parity=-1, unit="e Å", error_unit="me Å/atom", error_per_atom=True)
    monkeypatch.setitem(QUANTITIES, "charges", charges)
    monkeypatch.setitem(QUANTITIES, "dipole", dipole)
    frames = [labelled(k, periodic=False) for k in range(3)]
    for k, atoms in enumerate(frames):
        atoms.arrays["bader"] = np.arange(len(atoms)) / 100
        if k < 2:
            atoms.info["dipole"] = np.array([1.0, 2.0, k])
    ase.io.write(tmp_path / "a.extxyz", frames)
    labels = LabelConfig(extras={"charges": "bader"})
    write_store(read_structures(tmp_path / "a.extxyz", labels), tmp_path / "a.store")
    structures = list(Store(tmp_path / "a.store"))
    np.testing.assert_array_equal(structures[1].extras["charges"], frames[1].arrays["bader"])
    assert structures[1].extras["dipole"].tolist() == [1, 2, 1]
    assert "dipole" not in structures[2].labels
    np.testing.assert_array_equal(structures[1].to_ase().arrays["charges"], frames[1].arrays["bader"])
    graph = collate(structures, 4.0).to("cpu")
    assert graph.extras["charges"].shape == (18,)
    assert torch.isnan(graph.extras["dipole"]).all(dim=1).tolist() == [False, False, True]

    class WithHeads(Potential):
        def forward(self, graph, **options):
            mean = graph.positions.new_full((graph.n_atoms,), 0.02)
            out = super().forward(graph, **options)
            return replace(out, extras={"charges": mean, "dipole": out.energy.new_zeros(graph.n_graphs, 3)})

    made = make_potential(["H", "C", "O"])
    potential = WithHeads(made.model_config, made.statistics, made.potential_config).eval()
    loss = LossConfig(kind="l1", energy=0, forces=0, extras={"charges": 1.0})
    sums = loss_sums(potential(graph), graph, loss)
    expected = np.abs(np.arange(6) / 100 - 0.02).mean()
    assert float(sums["charges"]) / loss_counts(graph, loss)["charges"] == pytest.approx(expected)
    first_two = collate(structures[:2], 4.0)
    sums = loss_sums(potential(first_two), first_two, LossConfig(kind="l1", energy=0, forces=0, extras={"dipole": 1.0}))
    assert float(sums["dipole"]) == pytest.approx((3 + 4) / 6)  # per atom
    summary = evaluate_potential(potential, structures).summary()
    assert summary["charges_mae_me"] == pytest.approx(1000 * expected)
    assert summary["dipole_mae_me_A_per_atom"] == pytest.approx(1000 * 7 / 6 / 6)
    assert "valid_charges_rmse" in columns()
    compiled = CompiledForward(potential.train(), forces=True, stress=False)
    assert compiled(graph).extras.keys() == {"charges", "dipole"}  # compiled, it would lose them
    assert (
        "training is not compiled: a compiled graph returns energy, node_energies, forces, and this potential also predicts charges"
        in caplog.text
    )
    with pytest.raises(RuntimeError, match="a compiled graph returns .* also predicts charges, dipole"):
        make_program(potential.eval(), graph, tmp_path / "p.pt2")
    assert first_of(potential(graph), 6).extras["charges"].shape == (6,)
    spreads = compute_statistics(structures, 4.0).spreads
    assert spreads is not None
    assert spreads["charges"] == pytest.approx(np.std(np.arange(6) / 100))
    require_labels(structures, ["charges"], "")
    with pytest.raises(ValueError, match="frame 2 has no dipole"):
        require_labels(structures, ["dipole"], "")
    save(potential, tmp_path / "p.safetensors", structures[:1])
    with pytest.raises(ValueError, match="found spin, expected one of charges, dipole"):
        build(LossConfig, {"extras": {"spin": 1.0}})
    with pytest.raises(ValueError, match=r"'bader' holds 6 numbers, expected \[3\] \(dipole"):
        list(read_structures(tmp_path / "a.extxyz", LabelConfig(extras={"dipole": "bader"})))


def test_missing_label_names_file_and_frame(tmp_path: Path) -> None:
    frames = [labelled(k) for k in range(3)]
    del frames[2].calc.results["stress"]
    ase.io.write(tmp_path / "a.extxyz", frames)
    with pytest.raises(ValueError, match=r"a\.extxyz' frame 2 has no stress, but loss\.stress is above 0: 1 of 3 frames have none"):
        require_labels(list(read_structures(tmp_path / "a.extxyz")), ["energy", "stress"], "loss.{label} is above 0")


@pytest.mark.parametrize(
    ("entries", "remark", "said"),
    [
        ("REF_energy=-2.5", "another label", "under a second name"),
        ('stress="5 0 0 0 5 0 0 0 5" virial="1 0 0 0 1 0 0 0 1"', "another label", "virial ..."),
        ('stress="1 0 0 0 1 0 0 0 1" virials="-120 0 0 0 -120 0 0 0 -120" REF_energy=-1.5', None, ""),
        ('stress="1 9 5 6 2 4 5 4 3"', "a stress that is not symmetric", "another order"),
        ('stress="1 6 5 6.0001 2 4 5 4 3"', None, ""),
        ("weight=2", "a weight of its own", "weight of their own"),
    ],
)
def test_entries_that_contradict_labels_are_told(entries: str, remark: str | None, said: str, tmp_path: Path) -> None:
    path = xyz_file(tmp_path, f"{HEAD} {entries}")
    (s,) = read_structures(path)
    assert s.remarks == (() if remark is None else (remark,))
    assert (remark is not None) == any(said in w for w in inspect(path).warnings if "1 of 1 frames" in w)


def test_forces_of_a_second_name_are_told(tmp_path: Path) -> None:
    """As in files that hold those of a reference and of another method."""
    frames = [labelled(k) for k in range(2)]
    for k, atoms in enumerate(frames):
        atoms.arrays["dft_forces"] = atoms.calc.results["forces"] + 0.1 * k
    ase.io.write(tmp_path / "a.extxyz", frames)
    assert [s.remarks for s in read_structures(tmp_path / "a.extxyz")] == [(), ("another label",)]
    assert all(s.remarks == () for s in read_structures(tmp_path / "a.extxyz", LabelConfig(forces="dft_forces")))


def test_cells_and_isolated_atoms_that_are_none(tmp_path: Path) -> None:
    (s,) = read_structures(xyz_file(tmp_path, HEAD.replace("Lattice", "cell")))
    assert (s.remarks, s.pbc.any()) == (("a cell under another name",), False)
    head = 'Lattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3 energy=-1.5 config_type=IsolatedAtom'
    (s,) = read_structures(xyz_file(tmp_path, head, "H 0 0 0\n"))
    assert (s.remarks, s.is_isolated()) == (("isolated in name",), False)
    (s,) = read_structures(xyz_file(tmp_path, head.replace("5 0 0 0 5 0 0 0 5", "9 0 0 0 9 0 0 0 9"), "H 0 0 0\n"))
    assert (s.remarks, s.is_isolated()) == ((), True)
    with pytest.raises(ValueError, match=r"a.xyz' frame 0: positions\[0, 1\] is not finite\. Remove the frame, or mend it\."):
        list(read_structures(xyz_file(tmp_path, head, "H 0 nan 0\n")))


def test_structures_of_several_spins_are_told(tmp_path: Path) -> None:
    frames = [labelled(k) for k in range(4)]
    for k, atoms in enumerate(frames):
        atoms.info["spin"] = 1 + 2 * (k == 3)
    ase.io.write(tmp_path / "a.extxyz", frames)
    assert any("structures have several spins (1: 3, 3: 1)" in w for w in inspect(tmp_path / "a.extxyz").warnings)
    ase.io.write(tmp_path / "a.extxyz", frames[:3])
    assert not any("spin" in w for w in inspect(tmp_path / "a.extxyz").warnings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lattice": 5 * np.eye(3)}, "holds lattice: its frames lie in a cell, and files of this layout are read as molecules"),
        ({"z": np.array([6.4, 1, 1])}, "the atomic numbers are no whole numbers"),
        ({"z": np.ones((2, 3))}, "4 frames of positions, but 2 of atomic numbers"),
        ({"R": np.zeros((3, 3))}, r"positions have shape \(3, 3\), expected \(n_frames, n_atoms, 3\)"),
    ],
)
def test_arrays_that_are_not_what_md17_has(changes: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    """A cell was passed over, fractions of atomic numbers cut off, without a word."""
    rng = np.random.default_rng(0)
    arrays = {"z": np.array([6, 1, 1]), "R": rng.normal(size=(4, 3, 3)), "E": np.arange(4.0), "F": rng.normal(size=(4, 3, 3))}
    np.savez(tmp_path / "a.npz", **(arrays | changes))
    with pytest.raises(ValueError, match=message):
        list(read_structures(tmp_path / "a.npz"))
    each = np.array([[6, 1, 1], [1, 6, 1], [1, 1, 6], [1, 1, 1]])
    np.savez(tmp_path / "a.npz", **(arrays | {"z": each, "lattice": np.zeros((3, 3))}))
    assert [s.atomic_numbers.tolist() for s in read_structures(tmp_path / "a.npz")] == each.tolist()


def test_what_lies_beside_data_in_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The metadata.npz of OMat24's folders, and a note that is called as a file is, are no data."""
    ase.io.write(tmp_path / "a.extxyz", [labelled()])
    np.savez(tmp_path / "metadata.npz", natoms=np.array([8]))
    (tmp_path / "a.txt").write_text("PBE, 520 eV, spin-polarised, made in May\n")
    assert len(list(read_structures(tmp_path))) == 1
    assert "1 files are read as data, 2 are not: a.txt, metadata.npz" in caplog.text


@pytest.mark.parametrize("name", ["a.db", "a.npz", "a.json"])
def test_compressed_files_that_are_no_text(name: str, tmp_path: Path) -> None:
    """They were called truncated."""
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match=rf"{name}\.gz' is compressed, and only text \(extended XYZ\) is read so\. Unpack it\."):
        list(read_structures(tmp_path / f"{name}.gz"))


def test_a_row_with_two_values_of_a_label(tmp_path: Path) -> None:
    """The one among its data was taken, without a word."""
    with ase.db.connect(str(tmp_path / "a.db")) as database:
        database.write(labelled(), data={"forces": labelled().get_forces()})
        database.write(labelled(), data={"forces": np.zeros((8, 3))})
    with pytest.raises(ValueError, match="row 2 holds forces twice, of a calculator and among its data, and they differ"):
        list(read_structures(tmp_path / "a.db"))


def test_groups_of_long_names_stay_apart(tmp_path: Path) -> None:
    """A store cut their names, so that a split by group took all of them for one."""
    groups = ["materials/" * 5 + str(k) for k in range(3)] + ["ü" * 40, "short"]
    write_store([replace(s, group=group) for s, group in zip(morse_frames(5), groups, strict=True)], tmp_path / "a.store")
    found = [s.group for s in Store(tmp_path / "a.store")]
    assert len(set(found)) == 5
    assert found[-1] == "short"
    assert found[0].startswith("materials/materials/materials/m~")


def broken_frames() -> list[Atoms]:
    """Frames whose labels have other names, and the first eight something wrong with them each."""
    frames = [labelled(k) for k in range(12)]
    for atoms in frames:
        atoms.info |= {"REF_energy": atoms.calc.results["energy"], "REF_stress": atoms.get_stress()}
        atoms.arrays["REF_forces"] = atoms.calc.results["forces"]
        atoms.calc = None
    del frames[0].info["REF_energy"]
    frames[1].arrays["REF_forces"][3, 1] = np.nan
    frames[2].arrays["REF_forces"][:] = 0
    frames[3].info["config_energy_weight"] = 0.0
    frames[4].info["REF_energy"] = None  # ASE writes the name alone, and reads it as True: it was 1 eV
    frames[5].info["REF_stress"] = np.full(6, np.nan)
    frames[6].info["REF_stress"] = np.zeros(4)
    frames[7].info["config_stress_weight"] = 0.0
    return frames


REF_LABELS = ["--energy", "REF_energy", "--forces", "REF_forces", "--stress", "REF_stress"]
OF_ENERGY_AND_FORCES = {"no energy": 0, "forces not finite": 1, "forces all zero": 2, "energy of weight 0": 3, "energy is no number": 4}
OF_STRESS = {"stress not finite": 5, "stress of another size": 6, "stress of weight 0": 7}


@pytest.mark.parametrize(
    ("required", "reasons"),
    [(["energy", "forces"], OF_ENERGY_AND_FORCES), (["energy", "forces", "stress"], OF_ENERGY_AND_FORCES | OF_STRESS)],
)
def test_frames_with_missing_or_broken_labels_are_left_out(
    required: list[str], reasons: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """By name of the labels that are needed; each with the reason, and written apart if asked for."""
    ase.io.write(tmp_path / "a.extxyz", broken_frames())
    command = ["data", "convert", str(tmp_path / "a.extxyz"), *REF_LABELS, "--require", *required]
    assert main([*command, "--out", str(tmp_path / "a.store"), "--left-out", str(tmp_path / "rest.extxyz"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["structures"], answer["left_out"]["frames"], answer["left_out_to"]) == (
        12 - len(reasons),
        len(reasons),
        str(tmp_path / "rest.extxyz"),
    )
    assert {reason: found["frames"] for reason, found in answer["left_out"]["reasons"].items()} == dict.fromkeys(reasons, 1)
    for reason, frame in reasons.items():
        assert f"a.extxyz' frame {frame}" in answer["left_out"]["reasons"][reason]["first"]
    kept = [labelled(k) for k in range(12) if k not in reasons.values()]
    for structure, atoms in zip(Store(tmp_path / "a.store"), kept, strict=True):
        np.testing.assert_allclose(structure.positions, atoms.positions, atol=1e-7)
        assert structure.energy == pytest.approx(atoms.calc.results["energy"])
        assert all(label in structure.labels for label in required)
    assert ("stress not finite in 1 of the frames that are kept: they are kept without" in caplog.text) == ("stress" not in required)
    apart = ase.io.read(tmp_path / "rest.extxyz", ":")
    assert [(a.info["left_out"], a.info["source"].rpartition("/")[2]) for a in apart] == [
        (r, f"a.extxyz frame {k}") for r, k in reasons.items()
    ]

    assert main([*command, "--out", str(tmp_path / "b.store")]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"left out +{len(reasons)}\n  no energy +1; the first: '.*a.extxyz' frame 0: no entry 'REF_energy'", said), said
    assert main([*command, "--out", str(tmp_path / "c.store"), "--left-out", str(tmp_path / "rest.extxyz")]) == 2
    assert not (tmp_path / "c.store").exists()
    assert "rest.extxyz' exists" in capsys.readouterr().err


def test_frames_of_which_none_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ase.io.write(tmp_path / "a.extxyz", broken_frames())
    command = [
        "data",
        "convert",
        str(tmp_path / "a.extxyz"),
        "--out",
        str(tmp_path / "a.store"),
        "--left-out",
        str(tmp_path / "rest.extxyz"),
    ]
    assert main([*command, "--require", "energy", "--energy", "E"]) == 2
    assert re.search(r"No frame has sound labels of energy; of the first, .* no entry 'E' .*Found: REF_forces", capsys.readouterr().err)
    assert main(command) == 2
    assert "--left-out writes what --require leaves out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.extxyz"]


def test_data_is_converted_to_extended_xyz(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In our units and names, with groups and fixed atoms, whole or not at all; before, a store of that name was made."""
    frames = [labelled(k) for k in range(3)]
    for k, atoms in enumerate(frames):
        atoms.info["run"] = f"r {k}"
        atoms.set_constraint(FixAtoms([k]))
    ase.io.write(tmp_path / "a.traj", frames)
    command = ["data", "convert", str(tmp_path / "a.traj"), "--group", "run"]
    assert main([*command, "--energy-unit", "Hartree", "--out", str(tmp_path / "b.extxyz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["structures"] == 3
    asked = LabelConfig(energy_unit="Hartree", group="run")
    for mine, theirs in zip(
        read_structures(tmp_path / "b.extxyz", LabelConfig(group="group")), read_structures(tmp_path / "a.traj", asked), strict=True
    ):
        assert mine.group == theirs.group
        assert mine.energy == pytest.approx(theirs.energy, abs=1e-9)
        for name in ("positions", "cell", "forces", "stress", "fixed"):
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), atol=1e-7)
    assert main([*command, "--out", str(tmp_path / "b.extxyz")]) == 2
    assert "b.extxyz' exists" in capsys.readouterr().err
    frames[2].calc.results["energy"] = np.nan
    ase.io.write(tmp_path / "a.traj", frames)
    assert main([*command, "--out", str(tmp_path / "c.xyz")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.traj", "b.extxyz"]


def test_sound_frames_are_all_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also isolated atoms, whose stress is known, and crystals whose forces are zero by symmetry."""
    perfect = bulk("Cu", cubic=True)
    perfect.calc = SinglePointCalculator(perfect, energy=-1.0, forces=np.zeros((4, 3)), stress=np.zeros(6))
    alone = Atoms("Cu", cell=20 * np.eye(3), pbc=True)
    alone.calc = SinglePointCalculator(alone, energy=-1.0)
    ase.io.write(tmp_path / "a.extxyz", [labelled(), perfect, alone])
    command = [
        "data",
        "convert",
        str(tmp_path / "a.extxyz"),
        "--require",
        "energy",
        "forces",
        "stress",
        "--left-out",
        str(tmp_path / "rest.xyz"),
    ]
    assert main([*command, "--out", str(tmp_path / "a.store"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["structures"], answer["left_out"]) == (3, {"frames": 0, "reasons": {}})
    assert not (tmp_path / "rest.xyz").exists()
    assert "left_out_to" not in answer


def test_steps_that_did_not_converge_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    steps = [(2, "because EDIFF is reached"), (3, "EDIFF was not reached (unconverged)"), (2, "because EDIFF is reached")]
    (tmp_path / "OUTCAR").write_text(OUTCAR_HEAD + "".join(outcar_step(k + 1, n, said, -6.7 - k) for k, (n, said) in enumerate(steps)))
    assert main(["data", "convert", str(tmp_path / "OUTCAR"), "--out", str(tmp_path / "a.store"), "--require", "energy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"]["reasons"].keys() == {"not converged"}
    assert [s.energy for s in Store(tmp_path / "a.store")] == [-6.7, -8.7]


def test_broken_labels_are_counted_by_inspection_and_refused_by_training(tmp_path: Path) -> None:
    """With the command that leaves such frames out."""
    ase.io.write(tmp_path / "a.extxyz", broken_frames())
    labels = LabelConfig(energy="REF_energy", forces="REF_forces", stress="REF_stress")
    errors = inspect(tmp_path / "a.extxyz", labels).errors
    found = [
        e
        for e in errors
        if re.match(r"2 of 12 frames have no energy, .* it cannot be read of 2 frames \(.* frame 0: no entry 'REF_energy'", e)
    ]
    assert found[0].endswith("Leave such frames out: gossamer data convert DATA --out NAME.store --require energy forces"), errors
    assert any("1 of 12 frames have no forces" in e and "forces[3, 1] is not finite" in e for e in errors), errors
    with pytest.raises(
        ValueError, match=r"frame 0: no entry 'REF_energy' .*out: gossamer data convert DATA --out NAME.store --require energy forces$"
    ):
        list(read_structures(tmp_path / "a.extxyz", labels))
    kept = list(read_structures(tmp_path / "a.extxyz", labels, keep_broken=True))
    assert [sorted(s.faults) for s in kept] == [["energy"], ["forces"], [], [], ["energy"], ["stress"], ["stress"], *[[]] * 5]
    with pytest.raises(
        ValueError, match=r"has no energy, .*or leave out frames without: gossamer data convert .* --require energy forces\.$"
    ):
        require_labels(kept, ["energy", "forces"], "loss.{label} is above 0")


# --- files that are damaged, forged, or named otherwise -------------------------------------------------------------


def write_xyz(path: Path, n: int = 3, names: dict[str, str] | None = None, **info: float) -> Path:
    """Frames with energy and forces under names of one's own."""
    names = {"energy": "REF_energy", "forces": "REF_forces"} if names is None else names
    frames = [labelled(k) for k in range(n)]
    for atoms in frames:
        atoms.info |= {names["energy"]: atoms.calc.results["energy"], **info}
        atoms.arrays[names["forces"]] = atoms.calc.results["forces"]
        atoms.calc = None
    ase.io.write(path, frames)
    return path


def test_labels_under_other_names_are_suggested(tmp_path: Path) -> None:
    path = write_xyz(tmp_path / "a.extxyz", DFT_kinetic_energy=1.0)
    errors = inspect(path).errors
    assert any("found REF_energy, DFT_kinetic_energy: if REF_energy is it, say --energy REF_energy" in e for e in errors), errors
    assert any("--forces REF_forces (data.labels.forces: REF_forces)" in e for e in errors)
    with pytest.raises(ValueError, match=r"frame 0 has no energy.* In the file: found REF_energy, .*--energy REF_energy"):
        require_labels(list(read_structures(path)), ["energy"], "loss.{label} is above 0")
    (s, *_) = read_structures(path, LabelConfig(energy="REF_energy", forces="REF_forces"))
    assert s.energy == pytest.approx(labelled(0).calc.results["energy"])
    assert suggestion("energy", ("volume", "name")) == ""
    assert "say --energy E (" in suggestion("energy", ("E", "name", "free_energy"))
    assert "found virial: if virial is it, say --virial virial (data.labels.virial: virial)" in suggestion("stress", ("virial",))


def test_labels_that_a_store_loses_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As those of files for GPUMD (force, virial): a conversion without their names made a store of energies, without a word."""
    frames = [labelled(k) for k in range(3)]
    for atoms in frames:
        atoms.arrays["force"] = atoms.calc.results.pop("forces")
        atoms.info["virial"] = -atoms.get_volume() * atoms.get_stress(voigt=False)
        del atoms.calc.results["stress"]
    ase.io.write(tmp_path / "a.extxyz", frames)
    assert main(["data", "convert", str(tmp_path / "a.extxyz"), "--out", str(tmp_path / "a.store")]) == 0
    assert "3 of 3 frames have no forces: found force: if force is it, say --forces force (data.labels.forces: force)" in caplog.text
    assert "3 of 3 frames have no stress: found virial: if virial is it, say --virial virial" in caplog.text
    notes = evaluate(make_potential(["C", "Si"], name="painn"), tmp_path / "a.extxyz").notes
    assert [note.partition(": ")[0] for note in notes] == ["no frame has forces", "no frame has stress"]
    caplog.clear()
    names = ["--forces", "force", "--virial", "virial"]
    assert main(["data", "convert", str(tmp_path / "a.extxyz"), "--out", str(tmp_path / "b.store"), *names]) == 0
    assert not caplog.text


@pytest.mark.parametrize("name", ["virial", "REF_virial"])
def test_virials_are_found_and_read(tmp_path: Path, name: str) -> None:
    atoms = labelled()
    stress = atoms.get_stress(voigt=False)
    del atoms.calc.results["stress"]
    lone = Atoms("Si", calculator=None)
    lone.info["energy"] = -1.0
    atoms.info[name] = -stress * atoms.get_volume() / units.Hartree
    ase.io.write(tmp_path / "a.extxyz", [atoms, lone])
    report = inspect(tmp_path / "a.extxyz")
    assert any(f"say --virial {name} (data.labels.virial: {name})" in w for w in report.warnings), report.warnings
    first, last = read_structures(tmp_path / "a.extxyz", LabelConfig(virial=name, energy_unit="Hartree"))
    np.testing.assert_allclose(first.stress, stress, atol=1e-7)
    assert last.stress is None


def test_databases_of_schnetpack_state_their_units(tmp_path: Path) -> None:
    atoms = labelled()
    results, atoms.calc = atoms.calc.results, None
    forces = results["forces"] / units.Hartree * units.Bohr
    path = tmp_path / "a.db"
    with ase.db.connect(path) as database:
        database.metadata = {
            "_property_unit_dict": {"energy": "Hartree", "forces": "Hartree/Bohr", "mu": "Debye"}, "_distance_unit": "Ang", "atomrefs": {},
        }  # fmt: skip
        database.write(atoms, data={"energy": np.array([results["energy"] / units.Hartree]), "forces": forces})
    for labels in (LabelConfig(), LabelConfig(energy_unit="Hartree", length_unit="Angstrom")):
        (s,) = read_structures(path, labels)
        assert s.energy == pytest.approx(results["energy"])
        np.testing.assert_allclose(s.forces, results["forces"], atol=1e-9)
        np.testing.assert_allclose(s.positions, atoms.positions)
    with pytest.raises(ValueError, match=r"states the unit of energy 'Hartree', but data\.labels\.energy_unit is eV"):
        list(read_structures(path, LabelConfig(energy_unit="eV")))
    with ase.db.connect(path) as database:
        database.metadata = {"_property_unit_dict": {"energy": "a.u.", "forces": 1.0}, "_distance_unit": "Bohr"}
    with pytest.raises(ValueError, match=r"states the unit of energy 'a\.u\.', expected one of eV, meV, Hartree"):
        list(read_structures(path))
    with ase.db.connect(path) as database:
        database.metadata = {"_property_unit_dict": {"energy": "1", "forces": 1.0}, "_distance_unit": "Bohr"}
    (s,) = read_structures(path, LabelConfig(energy_unit="Hartree"))
    np.testing.assert_allclose(s.positions, atoms.positions * units.Bohr)
    np.testing.assert_allclose(s.forces, results["forces"], atol=1e-9)


def test_lengths_in_bohr_are_seen_where_all_is_in_atomic_units() -> None:
    """Energies, forces and positions in Hartree and Bohr agree with each other."""
    found = [from_atoms(a, LabelConfig(), "x") for a in (bulk("W"), bulk("Cu", cubic=True), molecule("CH3CH2OH"), molecule("CH4"))]
    in_bohr = [replace(s, positions=s.positions / units.Bohr, cell=s.cell / units.Bohr) for s in found]
    apart = [from_atoms(a, LabelConfig(), "x") for a in (bulk("Ar"), Atoms("O2", [[0, 0, 0], [0, 0, 3.0]]), Atoms("O"))]
    for structures, expected in ((found, False), (in_bohr, True), (in_bohr[:1] * 3, True), (apart, False)):
        assert any("lengths in Bohr?" in w for w in inspect(structures).warnings) == expected


@pytest.mark.parametrize(("charges", "told"), [((0, 1, 0, -1), True), ((1, 1, 1, 1), False), ((0, 0.0, 0, 0), False)])
def test_structures_of_several_charges_are_told(charges: tuple[float, ...], told: bool, tmp_path: Path) -> None:
    """No potential here is told the charge; OMol25 and SPICE have it beside each frame."""
    frames = [labelled(k) for k in range(4)]
    for atoms, charge in zip(frames, charges, strict=True):
        atoms.info |= {"charge": charge, "spin": 1}
    ase.io.write(tmp_path / "a.extxyz", frames)
    said = [w for w in inspect(tmp_path / "a.extxyz").warnings if "several charges" in w]
    assert bool(said) == told
    assert not told or "(+1: 1, -1: 1, 0: 2)" in said[0]


@pytest.mark.parametrize("text", ['[{"structure": {}, "energy": -1.0}]', '{"energy": [1.0, 2.0]}', "[]"])
def test_json_of_another_layout_is_no_damaged_file(text: str, tmp_path: Path) -> None:
    pytest.importorskip("ijson")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json' is not in the layout of MPtrj .* Convert it"):
        list(read_structures(tmp_path / "a.json"))


def test_the_folder_of_a_vasp_run_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """vasprun.xml and OUTCAR hold the same frames."""
    (tmp_path / "vasprun.xml").write_text(VASPRUN)
    (tmp_path / "OUTCAR").write_text(OUTCAR_HEAD + outcar_step(1, 2, "because EDIFF is reached", -6.7))
    (structure,) = read_structures(tmp_path)
    assert "vasprun.xml" in structure.name
    assert "1 files are read as data, 1 are not: OUTCAR" in caplog.text
    (tmp_path / "vasprun.xml").unlink()
    (structure,) = read_structures(tmp_path)
    assert "OUTCAR" in structure.name
    with pytest.raises(
        ValueError, match=r"holds no data files .*folders within is not read: gossamer data convert .*/\*/NAME --out data\.store"
    ):
        list(read_structures(tmp_path.parent))


@pytest.mark.parametrize("periodic", [True, False])
def test_copies_of_other_digits_are_found(periodic: bool) -> None:
    """Test frames in a text file beside training frames in a trajectory, or in single precision; nearly equal frames are none."""
    crystal = bulk("Cu", cubic=True).repeat(4)
    frames = []
    for k in range(12):
        atoms = crystal.copy()
        atoms.rattle(0.1, seed=k)
        atoms.set_cell(atoms.cell * (1 + 1e-3 * k / 7), scale_atoms=True)
        atoms.pbc = periodic
        frames.append(from_atoms(atoms, LabelConfig(), f"frame {k}"))

    def through(change: Any) -> list[Structure]:
        return [replace(s, positions=change(s.positions), cell=change(s.cell), energy=0.0) for s in frames]

    for change in (lambda x: x.round(8), lambda x: x.round(5), lambda x: x.astype(np.float32).astype(float)):
        assert len(without(through(change), frames)) == 0
        assert inspect([*frames, *through(change)]).numbers["duplicates"] == 12
        assert len(list(without_duplicates([*frames, *through(change)]))) == 12
        with pytest.raises(ValueError, match=r"frame 0 \(test\) is the same structure as frame 0 \(training\)"):
            check_leaks(frames, through(change), "test")
    moved = []
    for k in range(3 * len(crystal)):
        step = np.zeros(3 * len(crystal))
        step[k] = 1e-3
        moved.append(replace(frames[0], positions=frames[0].positions + step.reshape(-1, 3)))
    assert len(list(without_duplicates([frames[0], *moved]))) == 1 + len(moved)


@pytest.mark.parametrize(("shuffled", "grouped", "told"), [(False, False, True), (True, False, False), (False, True, False)])
def test_frames_that_follow_each_other_are_told(shuffled: bool, grouped: bool, told: bool) -> None:
    """Atoms that swing by 0.3 Å, a hundredth of a period between frames, over the cell's border, too."""
    crystal = bulk("Cu", cubic=True)
    phases = np.random.default_rng(0).uniform(0, 6.3, crystal.positions.shape)
    order = np.random.default_rng(1).permutation(100) if shuffled else np.arange(100)
    frames = []
    for k in order.tolist():
        atoms = crystal.copy()
        atoms.positions += 0.3 * np.sin(phases + 2 * np.pi * k / 100 * (1 + phases))
        atoms.wrap()
        frames.append(replace(from_atoms(atoms, LabelConfig(), f"frame {k}"), group=str(k // 50) if grouped else None))
    assert any("frames follow each other in steps of" in w for w in inspect(frames).warnings) == told


def test_weights_and_heads_of_mace_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are not read, so inspection says so where they mean something."""
    frames = [labelled(k) for k in range(10)]
    for atoms in frames:
        atoms.info |= {"head": "Default", "config_weight": 1.0, "config_type": "bulk"}
    ase.io.write(tmp_path / "plain.extxyz", frames)
    assert not [w for w in inspect(tmp_path / "plain.extxyz").warnings if "weight" in w or "head" in w]
    for k, atoms in enumerate(frames):
        atoms.info |= {"head": "pbe" if k % 2 else "r2scan", "config_forces_weight": 0.0 if k < 3 else 1.0}
    ase.io.write(tmp_path / "a.extxyz", frames)
    assert main(["data", "convert", str(tmp_path / "a.extxyz"), "--out", str(tmp_path / "a.store")]) == 0  # which keeps none of it
    assert "3 of 10 frames have a weight of their own" in caplog.text
    assert "several heads (r2scan: 5, pbe: 5)" in caplog.text
    said = inspect(tmp_path / "a.extxyz").warnings
    assert any("3 of 10 frames have a weight of their own (config_weight" in w for w in said), said
    assert any("several heads (r2scan: 5, pbe: 5)" in w for w in said), said


OUTCAR_HEAD = """ vasp.6.4.2
 POTCAR:    PAW_PBE H 15Jun2001
 POTCAR:    PAW_PBE H 15Jun2001
   k-points           NKPTS =      1   k-points in BZ     NKDIM =      1   number of bands    NBANDS=      4
   NELM   =      3;   NELMIN=  2; NELMDL= -5     # of ELM steps
   ions per type =               2
 k-points in reciprocal lattice and weights: Gamma
   0.00000000  0.00000000  0.00000000       1.000
"""


def outcar_step(step: int, iterations: int, verdict: str, energy: float) -> str:
    """One ionic step in VASP's layout."""
    loops = "".join(f"--------------- Iteration {step:6d}({k:4d})  ---------------\n" for k in range(1, iterations + 1))
    return f"""{loops}------------------------ aborting loop {verdict} ----------------------------------------
  in kB      10.00000    20.00000    30.00000     4.00000     5.00000     6.00000
      direct lattice vectors                 reciprocal lattice vectors
     5.000000000  0.000000000  0.000000000     0.200000000  0.000000000  0.000000000
     0.000000000  5.000000000  0.000000000     0.000000000  0.200000000  0.000000000
     0.000000000  0.000000000  5.000000000     0.000000000  0.000000000  0.200000000
 POSITION                                       TOTAL-FORCE (eV/Angst)
 -----------------------------------------------------------------------------------
      0.00000      0.00000      0.00000         0.500000      0.000000      0.000000
      0.75000      0.00000      0.00000        -0.500000      0.000000      0.000000
  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)
  ---------------------------------------------------
  free  energy   TOTEN  = {energy:18.8f} eV

  energy  without entropy= {energy:17.8f}  energy(sigma->0) = {energy:17.8f}
"""


def test_vasp_steps_that_are_no_labels(tmp_path: Path) -> None:
    """Electrons that ran out of iterations are told frame by frame; steps of a machine-learned force field are refused in plain words."""
    reached, not_reached = "because EDIFF is reached", "EDIFF was not reached (unconverged)"
    steps = [(2, reached), (3, reached), (3, not_reached), (2, reached)]
    text = OUTCAR_HEAD + "".join(outcar_step(k + 1, n, verdict, -6.7 - k) for k, (n, verdict) in enumerate(steps))
    (tmp_path / "OUTCAR").write_text(text)
    frames = list(read_structures(tmp_path / "OUTCAR"))
    assert [(s.energy, s.remarks) for s in frames] == [(-6.7, ()), (-7.7, ()), (-8.7, ("not converged",)), (-9.7, ())]
    np.testing.assert_allclose(frames[0].stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], -0.1 * units.GPa * np.array([10, 20, 30, 5, 6, 4]))
    assert any("1 of 4 frames of VASP took all iterations" in w for w in inspect(frames).warnings)
    (tmp_path / "OUTCAR").write_text(text.replace("FREE ENERGIE", "ML FREE ENERGIE").replace("energy   TOTEN", "energy ML TOTEN"))
    with pytest.raises(ValueError, match=r"OUTCAR' holds steps of VASP's machine-learned force field"):
        list(read_structures(tmp_path / "OUTCAR"))
    limited = VASPRUN.replace("<incar>", '<incar>\n<i type="int" name="NELM">     2</i>\n')
    (tmp_path / "vasprun.xml").write_text(limited)
    assert next(read_structures(tmp_path / "vasprun.xml")).remarks == ()
    again = VASPRUN[VASPRUN.index("<scstep>") : VASPRUN.index("</scstep>")] + "</scstep>\n"
    (tmp_path / "vasprun.xml").write_text(limited.replace("<scstep>", again + "<scstep>"))
    assert next(read_structures(tmp_path / "vasprun.xml")).remarks == ("not converged",)


def test_vasp_that_was_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As by a batch system: the steps that are complete are read, and the log says so."""
    text = OUTCAR_HEAD + "".join(outcar_step(k + 1, 2, "because EDIFF is reached", -6.7 - k) for k in range(3))
    (tmp_path / "OUTCAR").write_text(text[: text.rindex("FREE ENERGIE")])
    assert len(list(read_structures(tmp_path / "OUTCAR"))) == 2
    assert "OUTCAR' has no end, as where VASP was stopped: the steps that are complete are read (2)" in caplog.text
    (tmp_path / "vasprun.xml").write_text(VASPRUN.replace("</modeling>", "<calculation><scstep>"))
    assert len(list(read_structures(tmp_path / "vasprun.xml"))) == 1
    assert "vasprun.xml' has no end" in caplog.text
    caplog.clear()
    (tmp_path / "OUTCAR").write_text(text + " General timing and accounting informations for this job:\n")
    (tmp_path / "vasprun.xml").write_text(VASPRUN)
    assert [len(list(read_structures(tmp_path / name))) for name in ("OUTCAR", "vasprun.xml")] == [3, 1]
    assert not caplog.text


def test_several_files_are_inspected_as_one_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As a shell spells a pattern out; a pattern itself is not looked up."""
    for k in range(2):
        ase.io.write(tmp_path / f"{k}.extxyz", [labelled(2 * k), labelled(2 * k + 1)])
    assert main(["data", "inspect", str(tmp_path / "0.extxyz"), str(tmp_path / "1.extxyz"), "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["numbers"]["frames"] == 4
    with pytest.raises(
        FileNotFoundError, match=r"no data file '.*\*\.extxyz'\. Patterns are not looked up: give the files, or the folder\."
    ):
        list(read_structures(tmp_path / "*.extxyz"))


@pytest.mark.parametrize("key", ["stress", "virial"])
def test_a_stress_of_six_numbers_in_xyz(key: str, tmp_path: Path) -> None:
    atoms = labelled()
    stress, factor = atoms.get_stress(), 1.0 if key == "stress" else -atoms.get_volume()
    assert len(set(np.round(stress, 4))) == 6
    atoms.calc = None
    ase.io.write(tmp_path / "a.extxyz", [atoms])
    head = f'{key}="{" ".join(f"{factor * x:.8f}" for x in stress)}" pbc='
    (tmp_path / "a.extxyz").write_text((tmp_path / "a.extxyz").read_text().replace("pbc=", head))
    (s,) = read_structures(tmp_path / "a.extxyz", LabelConfig(stress=key))
    np.testing.assert_allclose(s.stress, labelled().get_stress(voigt=False), atol=1e-7)


@pytest.mark.parametrize("name", ["dft_virial", "REF_virials", "virial_stress"])
def test_names_of_virials_and_stresses(tmp_path: Path, name: str) -> None:
    """What is called a virial is read as one wherever the word stands; a virial_stress (maml's) is a stress, with a unit."""
    atoms = labelled()
    stress = atoms.get_stress(voigt=False)
    del atoms.calc.results["stress"]
    is_stress = name.endswith("stress")
    atoms.info[name] = -stress / units.GPa * 10 if is_stress else -stress * atoms.get_volume()
    ase.io.write(tmp_path / "a.extxyz", [atoms])
    labels = LabelConfig(stress=name, stress_unit="kbar", stress_sign="vasp") if is_stress else LabelConfig(stress=name)
    (s,) = read_structures(tmp_path / "a.extxyz", labels)
    np.testing.assert_allclose(s.stress, stress, rtol=1e-5, atol=1e-7)
    assert f"--{'stress' if is_stress else 'virial'} {name} " in inspect(tmp_path / "a.extxyz").warnings[0]


def test_units_of_forces_alone(tmp_path: Path) -> None:
    """Positions in Å beside energies in Hartree and forces in Hartree/Bohr; stress in atomic units."""
    atoms = labelled()
    ase.io.write(tmp_path / "a.extxyz", atoms)
    (s,) = read_structures(
        tmp_path / "a.extxyz", LabelConfig(energy_unit="Hartree", force_unit="Hartree/Bohr", stress_unit="Hartree/Bohr^3")
    )
    np.testing.assert_allclose(s.positions, atoms.positions, atol=1e-7)
    assert s.energy == pytest.approx(atoms.calc.results["energy"] * 27.211386, rel=1e-6)
    np.testing.assert_allclose(s.forces, atoms.calc.results["forces"] * 51.422067, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(s.stress, atoms.get_stress(voigt=False) * 183.63154, rtol=1e-6, atol=1e-6)
    assert get_args(ForceUnit) == tuple(FORCE_UNITS)
    (s,) = read_structures(tmp_path / "a.extxyz", LabelConfig(force_unit="kcal/mol/Angstrom"))
    np.testing.assert_allclose(s.forces, atoms.calc.results["forces"] * 0.0433641153, rtol=1e-6, atol=1e-6)


def small_files(folder: Path) -> list[Path]:
    """A small file of every format."""
    frames = [labelled(k) for k in range(2)]
    ase.io.write(folder / "a.traj", frames)
    for name in ("a.db", "a.json"):
        with ase.db.connect(str(folder / name)) as database:
            for atoms in frames:
                database.write(atoms)
    text = io.StringIO()
    ase.io.write(text, frames, format="extxyz")
    (folder / "a.extxyz").write_text(text.getvalue())
    for suffix, compress in ((".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress)):
        (folder / f"a.extxyz{suffix}").write_bytes(compress(text.getvalue().encode()))
    np.savez(folder / "a.npz", z=np.array([8, 1]), R=np.ones((2, 2, 3)) * [[[1], [2]]], E=np.ones(2), F=np.ones((2, 2, 3)))
    np.savez_compressed(folder / "b.npz", z=np.array([8, 1]), R=np.ones((2, 2, 3)) * [[[1], [2]]], E=np.ones(2), F=np.ones((2, 2, 3)))
    write_mptrj(folder / "mptrj.json", 2)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    small_files(folder)
    return folder


FORMATS = ["a.db", "a.extxyz", "a.extxyz.bz2", "a.extxyz.gz", "a.extxyz.xz", "a.json", "a.npz", "a.traj", "b.npz", "mptrj.json"]


def test_every_format_is_damaged(sound_files: Path) -> None:
    assert [path.name for path in sorted(sound_files.iterdir())] == FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_cut_and_scrambled_files_are_clear_errors(name: str, sound_files: Path, tmp_path: Path) -> None:
    """Cut at several places, and with eight bytes changed: a ValueError with the file's name, or structures that are sound."""
    rng = np.random.default_rng(0)
    data = (sound_files / name).read_bytes()
    assert len(list(read_structures(sound_files / name))) == 2
    damaged = [data[: int(len(data) * part)] for part in (0.0, 0.01, 0.3, 0.6, 0.9, 0.99)]
    for _ in range(6):
        changed = np.frombuffer(data, np.uint8).copy()
        changed[rng.integers(len(changed), size=8)] = rng.integers(256, size=8)
        damaged.append(changed.tobytes())
    bad = tmp_path / name
    messages = []
    for content in damaged:
        bad.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                list(read_structures(bad))
        except ValueError as error:
            messages.append(str(error))
    assert all(str(bad) in message for message in messages), messages
    assert len(messages) >= (7 if name == "a.db" else 10)  # a database has pages whose loss does not show


def test_forged_sizes_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.xyz").write_text("99999999999\n\nH 0 0 0\n")
    with pytest.raises(ValueError, match=r"a\.xyz' frame 0 .* a frame of 99999999999 atoms is announced, but the file ends after 1"):
        list(read_structures(tmp_path / "a.xyz"))
    with pytest.raises(ValueError, match="99999999999 atoms is announced"):
        as_atoms(tmp_path / "a.xyz")
    good = {"z": np.array([8]), "E": np.ones(1), "F": np.ones((1, 1, 3))}
    np.savez_compressed(tmp_path / "bomb.npz", **good, R=np.zeros((400_000, 1, 1), np.int64))
    monkeypatch.setattr("gossamer.files.UNPACKED", 2**20)
    with pytest.raises(ValueError, match=r"bomb\.npz' has .* bytes and unpacks to 3\.2e\+06: real data does not shrink so"):
        list(read_structures(tmp_path / "bomb.npz"))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 1, 3)})
    np.savez(tmp_path / "header.npz", **good)
    with zipfile.ZipFile(tmp_path / "header.npz", "a") as archive:
        archive.writestr("R.npy", header.getvalue() + bytes(24))
    with pytest.raises(ValueError, match=r"header\.npz': the array R says it has shape \(1000000000000, 1, 3\)"):
        list(read_structures(tmp_path / "header.npz"))


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".bz2"])
def test_text_that_unpacks_to_far_more_than_real_data_is_refused(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.files.UNPACKED", 2**20)
    packed = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}[suffix]
    path = tmp_path / f"bomb.extxyz{suffix}"
    path.write_bytes(packed(b"3\n\n" + b"H 0 0 0\n" * 2**19))
    with pytest.raises(
        ValueError, match=r"unpacks to more than 1e\+06: real data does not shrink so\. Refused\. If you trust it, unpack it"
    ):
        list(read_structures(path))
    monkeypatch.setattr("gossamer.files.SHRINKS", 10**5)  # a larger file may unpack to more
    with pytest.raises(ValueError, match="frame 1 cannot be read"):
        list(read_structures(path))


READ_LMDB = """
import sys
from pathlib import Path
from gossamer.data.readers import read_structures
from gossamer.data.legacy import read_legacy_lmdb
folder = Path(sys.argv[1])
whole = (folder / "whole.aselmdb").read_bytes()
for size in range(0, len(whole), 1024):
    for read, path in ((read_structures, folder / "cut.aselmdb"), (read_legacy_lmdb, folder / "cut.lmdb")):
        path.write_bytes(whole[:size])
        try:
            list(read(path))
        except ValueError as error:
            assert str(path) in str(error) and "copy it again" in str(error), error
        else:
            raise AssertionError(f"{size} of {len(whole)} bytes were read")
print("alive", len(whole))
"""


def test_truncated_lmdb_files_are_refused_before_they_are_mapped(tmp_path: Path) -> None:
    """LMDB maps a file into memory: what lies beyond its end would be a SIGBUS."""
    pytest.importorskip("ase_db_backends")
    with ase.db.connect(str(tmp_path / "whole.aselmdb")) as database:
        for k in range(8):
            database.write(labelled(k), data={"more": list(range(2000))})
    assert len(list(read_structures(tmp_path / "whole.aselmdb"))) == 8
    result = forked(READ_LMDB, str(tmp_path))
    assert (result.returncode, result.stdout[:5]) == (0, "alive"), result.stdout[-2000:]


DAMAGED_LMDB = """
import sys
from pathlib import Path
import numpy as np
from gossamer.data.legacy import read_legacy_lmdb
folder, rng = Path(sys.argv[1]), np.random.default_rng(0)
whole = np.frombuffer((folder / "whole.aselmdb").read_bytes(), np.uint8)
refused = 0
for k in range(400):
    damaged = whole.copy()
    page = rng.integers(0, len(whole) // 4096) * 4096
    damaged[page + rng.integers(0, 16 if k % 2 else 4096, size=3)] = rng.integers(0, 256, size=3)
    (folder / "damaged.lmdb").write_bytes(damaged.tobytes())
    try:
        list(read_legacy_lmdb(folder / "damaged.lmdb"))
    except ValueError as error:
        assert "damaged.lmdb" in str(error), error
        refused += "damaged page" in str(error)
print("alive", refused)
"""


def test_damaged_pages_of_lmdb_files_are_refused_before_they_are_mapped(tmp_path: Path) -> None:
    """LMDB believes what its pages say: a value that is longer than the file, too, would be a SIGBUS."""
    pytest.importorskip("ase_db_backends")
    path = tmp_path / "whole.aselmdb"
    with ase.db.connect(str(path)) as database:
        for k in range(60):
            database.write(labelled(k), data={"more": list(range(2000 * (k % 2)))})
    assert len(list(read_structures(path))) == 60
    result = forked(DAMAGED_LMDB, str(tmp_path))
    assert result.returncode == 0, result.stdout[-2000:]
    assert int(result.stdout.split()[1]) > 20
    whole = bytearray(path.read_bytes())
    for page in range(0, len(whole), 4096):
        number, flags, *_ = HEADER.unpack_from(whole, page)
        if (number, flags) == (page // 4096, LEAF):
            (start,) = struct.unpack_from("<H", whole, page + HEADER.size)
            struct.pack_into("<H", whole, page + start + 2, 0x7FFF)  # the upper half of a value's size: 2 GB
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"whole.aselmdb' is an LMDB with a damaged page, \d+"):
        list(read_structures(path))


def test_configurations_that_blow_up_or_break(tmp_path: Path) -> None:
    """Nine aliases of nine aliases of nine ... are 10^9 settings; one that holds itself has no end."""
    path = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"] + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 10)]
    for text in ("\n".join(lines), "a: &a [*a]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"bomb\.yaml' holds more than 100000 settings once its aliases"):
            load_config(path)
    good: dict[str, Any] = {"data": {"train": "a.extxyz"}}
    for values, overrides, message in (
        (good, ["training.steps=["], r"'training\.steps=\[': the value is not valid YAML"),
        (good, ["loss.energy=@"], r"'loss\.energy=@': the value is not valid YAML"),
        ({**good, "finetune": "x"}, [], "finetune: "),
        ({**good, "model": {"preset": [1]}}, [], r"model\.preset: found \[1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(values, overrides)


def test_xyz_frames_are_those_of_ase(tmp_path: Path) -> None:
    """Also plain ones, with cell vectors on lines of their own, and with blank lines between frames (where ASE stops)."""
    text = "2\n\nH 0 0 0\nO 0 0 1\nVEC1 5 0 0\nVEC2 0 6 0\nVEC3 0 0 7\n1\ncomment\nHe 1 2 3\n"
    (tmp_path / "a.xyz").write_text(text)
    for mine, theirs in zip(xyz_frames(io.StringIO(text)), ase.io.read(tmp_path / "a.xyz", ":"), strict=True):
        assert mine == theirs
    assert len(list(xyz_frames(io.StringIO("1\n\nHe 1 2 3\n\n1\n\nHe 1 2 4\n\n")))) == 2
    for frame in (0, 1, -1, -2):
        assert read_frames(tmp_path / "a.xyz", frame) == [ase.io.read(tmp_path / "a.xyz", frame)]
    for frame in (2, -3):
        with pytest.raises(ValueError, match=f"has no frame {frame}"):
            read_frames(tmp_path / "a.xyz", frame)
    with pytest.raises(ValueError, match="expected the number of atoms, found 'H 0 0 0'"):
        list(xyz_frames(io.StringIO("1\n\nHe 1 2 3\nH 0 0 0\n")))


HEAD = 'Lattice="4 0 0 0 5 0 0 0 6" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.5'
ROWS = "H 0 0 0 0.1 0.2 0.3\nO 0 0 1 -0.1 -0.2 -0.3\n"


def xyz_file(folder: Path, head: str, rows: str = ROWS) -> Path:
    """A file of one frame, by hand."""
    path = folder / "a.xyz"
    path.write_text(f"{rows.count(chr(10))}\n{head}\n{rows}")
    return path


@pytest.mark.parametrize(
    ("head", "pbc", "stress"),
    [
        (HEAD + " pbc=FFF", "000", None),  # ASE takes FFF, f f f and PBC for periodic along all axes
        (HEAD + ' pbc="f f f"', "000", None),
        (HEAD + ' PBC = "F T F"', "010", None),
        (HEAD + ' pbc="TTF"', "110", None),
        (HEAD + " pbc=[T, T, F] tags=[1, 2]", "110", None),
        (HEAD + " pbc=[1,1,0]", "110", None),
        (HEAD + " pbc=0", "000", None),
        (HEAD + ' note="energy=3 pbc=F"', "111", None),
        (HEAD.replace("Lattice", "lattice").replace("Properties", "properties"), "111", None),  # ASE: a molecule without forces
        (HEAD.replace('"4 0 0 0 5 0 0 0 6"', "[[4, 0, 0], [0, 5, 0], [0, 0, 6]]"), "111", None),
        (HEAD + " stress=[1,2,3,4,5,6]", "111", [1, 2, 3, 4, 5, 6]),
        (HEAD + ' stress="1, 2, 3, 4, 5, 6"', "111", [1, 2, 3, 4, 5, 6]),
        (HEAD + " stress=[[1, 6, 5], [6, 2, 4], [5, 4, 3]]", "111", [1, 2, 3, 4, 5, 6]),
    ],
)
def test_entries_of_xyz_that_ase_passes_over(head: str, pbc: str, stress: list[float] | None, tmp_path: Path) -> None:
    """Other letters, brackets and commas, as other programs write them: before, crystals were molecules and molecules crystals, without a word."""
    (s,) = read_structures(xyz_file(tmp_path, head))
    assert (s.energy, s.forces[0].tolist(), np.diag(s.cell).tolist()) == (-1.5, [0.1, 0.2, 0.3], [4, 5, 6])
    assert "".join(str(int(periodic)) for periodic in s.pbc) == pbc
    assert s.stress is None if stress is None else full_3x3_to_voigt_6_stress(s.stress).tolist() == stress


@pytest.mark.parametrize(
    ("head", "rows", "message"),
    [
        (HEAD + ' pbc="no no no"', ROWS, r"""a\.xyz' frame 0: pbc is "no no no", expected T or F for each axis, as in pbc="T T F"\.$"""),
        (HEAD + " energy=-2.5", ROWS, r"a\.xyz' frame 0: the entry energy stands twice, as -1\.5 and as -2\.5\. Take the wrong one out\.$"),
        (HEAD, ROWS.replace("0.3", "0.3 9"), "Properties announces 7 columns, but the first atom has 8"),
        (HEAD.replace("pos:", "frac:"), ROWS, r"Properties names no positions \(pos:R:3\), but species, frac, forces"),
        (HEAD, ROWS.replace("O", "O2"), "'O2' is not the symbol of an element"),
        (HEAD + " stress=None", ROWS, r"'stress' holds 'None', expected numbers \(stress\)"),
        (HEAD + ' stress="a b c d e f"', ROWS, r"'stress' holds .*, expected numbers \(stress\)"),
        (HEAD + ' stress="1e400 0 0 0 1 0 0 0 1"', ROWS, r"stress\[0, 0\] is not finite"),
        (HEAD + ' stress="1 2 3"', ROWS, "'stress' holds 3 numbers, expected 9"),
        (HEAD.replace("-1.5", "T"), ROWS, r"'energy' holds 'True', expected numbers \(energy\)"),
    ],
)
def test_entries_of_xyz_that_are_wrong(head: str, rows: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_structures(xyz_file(tmp_path, head, rows)))
    if not re.search("holds|finite", message):  # of labels, structures alone know nothing
        with pytest.raises(ValueError, match=message):
            read_frames(tmp_path / "a.xyz")


def test_xyz_of_editors_that_begin_files_with_a_mark(tmp_path: Path) -> None:
    text = xyz_file(tmp_path, HEAD).read_text()
    (tmp_path / "a.xyz").write_text("\ufeff" + text, "utf-8")
    assert next(read_structures(tmp_path / "a.xyz")).energy == -1.5
    assert count_frames(tmp_path / "a.xyz") == 1


# --- inspection ---------------------------------------------------------------------------------------------------


def morse_frames(n: int = 60, energy_factor: float = 1.0, sign: float = 1.0) -> list[Structure]:
    """Frames of a real potential energy surface (ASE's Morse), near one another."""
    from ase.calculators.morse import MorsePotential

    atoms = bulk("Cu", cubic=True, a=3.0)
    rng = np.random.default_rng(0)
    structures = []
    for k in range(n):
        moved = atoms.copy()
        moved.positions += rng.normal(scale=0.02, size=(4, 3))
        moved.calc = MorsePotential(rcut1=4.0, rcut2=5.0)
        structures.append(
            Structure(atomic_numbers=moved.numbers, positions=moved.positions, cell=moved.cell.array, pbc=np.array(moved.pbc),
                      energy=moved.get_potential_energy() * energy_factor, forces=sign * moved.get_forces(), name=f"frame {k}")
        )  # fmt: skip
    return structures


def test_inspection_passes_good_data() -> None:
    report = inspect(morse_frames())
    assert report.ok, report.errors
    assert "slope 1" in report.facts["energy against forces"] or "slope 0.9" in report.facts["energy against forces"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(energy_factor=1 / 27.2114), "disagree by a factor of .* Hartree"),
        (dict(energy_factor=23.06), "disagree by a factor of .* kcal/mol"),
        (dict(sign=-1.0), "wrong sign"),
        (dict(sign=1.2), r"disagree by a factor of 0\.83. ± 0.00"),
        (dict(sign=0.8), r"disagree by a factor of 1\.25 ± 0.00"),
    ],
)
def test_inspection_finds_units_and_signs(change: dict, message: str) -> None:
    report = inspect(morse_frames(**change))
    assert not report.ok
    assert any(re.search(message, e) for e in report.errors), report.errors


def test_one_pair_of_frames_shows_nothing() -> None:
    """Unlike frames of one cell, whose energies have nothing to do with the forces between them, one with large ones: a sign was said to be wrong."""
    rng = np.random.default_rng(3)
    frames = [replace(s, positions=s.positions + rng.normal(scale=0.8, size=(4, 3)), energy=float(rng.normal())) for s in morse_frames(20)]
    step = frames[1].positions - frames[0].positions
    frames[:2] = [replace(s, forces=1e3 * step, energy=1e3 * k) for k, s in enumerate(frames[:2])]
    report = inspect([replace(frames[0], positions=frames[1].positions - 0.9 * step), *frames[1:]])
    assert not any("sign" in e or "disagree" in e for e in report.errors), report.errors


def test_inspection_finds_what_is_wrong() -> None:
    frames = morse_frames()

    def altered(index: int, **values) -> list[Structure]:
        return [Structure(**{**vars(s), **(values if k == index else {})}) for k, s in enumerate(frames)]

    def found(structures: list[Structure], word: str) -> bool:
        report = inspect(structures)
        return any(word in message for message in (*report.errors, *report.warnings))

    assert found(altered(3, forces=np.zeros((4, 3))), "all zero")
    assert found(altered(3, forces=None), "have no forces, the first is frame 3")
    assert found(altered(3, energy=frames[3].energy + 40), "energy outliers")
    assert found(altered(3, positions=frames[4].positions, energy=frames[4].energy), "duplicate frames")
    assert found(altered(3, positions=frames[4].positions, energy=frames[4].energy + 1), "different energies")
    assert found(altered(3, positions=np.tile(frames[3].positions[:1], (4, 1)) + np.arange(4)[:, None] * 0.05), "overlapping")
    strained = []
    for factor in np.linspace(0.97, 1.03, 9):
        s = frames[0]
        strained.append(
            Structure(
                **{
                    **vars(s),
                    "cell": s.cell * factor,
                    "positions": s.positions * factor,
                    "stress": -np.eye(3) * (factor - 1),
                    "name": str(factor),
                }
            )
        )
    assert found(strained, "stress has the opposite sign, that of VASP")
    assert inspect([]).errors == ["there are no frames"]
    assert inspect(frames[:1]).errors == ["there is one frame: training needs at least one more, to validate on"]


def emt_structures(n: int = 40, rattle: float = 0.02, strain: float = 0.02) -> list[Structure]:
    """Copper, strained by a few per cent and shaken a little, labelled by ASE's effective medium theory."""
    rng = np.random.default_rng(0)
    structures = []
    for k in range(n):
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(scale=strain, size=(3, 3))), scale_atoms=True)
        atoms.rattle(rattle, seed=k)
        structures.append(from_atoms(label(atoms), LabelConfig(), f"frame {k}"))
    return structures


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (-1.0, "stress has the opposite sign, .*--stress-sign vasp"),
        (160.2, "disagree by a factor of 0.00.*--stress-unit GPa"),
        (1.0, None),
    ],
)
def test_inspection_finds_the_sign_and_unit_of_stress(factor: float, message: str | None) -> None:
    """Strained crystals at many volumes: energies against stress, and stress against volume."""
    report = inspect([replace(s, stress=factor * s.stress) for s in emt_structures()])
    found = [e for e in report.errors if "stress" in e]
    if message is None:
        assert found == []
        assert report.numbers["energy_against_stress"]["conclusive"]
    else:
        assert len(found) == 1, report.errors
        assert re.search(message, found[0]), found


@pytest.mark.parametrize(("factor", "said"), [(2.0, "0.5"), (0.5, "2.0"), (1.0, None)])
def test_inspection_finds_a_factor_of_two_in_the_stress(factor: float, said: str | None) -> None:
    """By frames near enough to show it."""
    report = inspect([replace(s, stress=factor * s.stress) for s in emt_structures(90, rattle=0.005, strain=0.01)])
    assert report.numbers["energy_against_stress"]["factor"] == pytest.approx(1 / factor, rel=0.03)
    assert report.ok is (said is None)
    if said is not None:
        assert re.search(f"energies and stress disagree by a factor of {said}.* ± .*check its unit", report.errors[0])


@pytest.mark.parametrize("offset", [0.0, 0.01, -0.01])
def test_inspection_finds_a_constant_in_the_stress(offset: float, caplog: pytest.LogCaptureFixture) -> None:
    """Pulay stress: a pressure that the energies do not have. It is measured to 10 %, said, and `fit` does not train on such stress."""
    structures = [replace(s, stress=s.stress + offset * np.eye(3)) for s in emt_structures(40, rattle=0.0, strain=0.01)]
    report = inspect(structures)
    assert report.ok, report.errors
    assert report.numbers["stress_offset"]["offset"] == pytest.approx(offset, abs=1e-3), report.numbers
    assert sum("that the energies lack" in w for w in report.warnings) == (offset != 0), report.warnings
    assert (report.stress_offset is None) is (offset == 0)
    config = choose_settings("none.extxyz", structures)
    assert (config.loss.stress == 0) is (offset != 0)
    assert len([line for line in caplog.messages if "stress" in line]) == (offset != 0)
    assert ("the stress is not trained on: its labels hold a constant" in caplog.text) is (offset != 0)


def test_a_weakly_negative_correlation_is_an_error_where_frames_are_many() -> None:
    """-0.3 over 120 frames is no chance; over 8 frames it may be."""
    rng = np.random.default_rng(0)
    base = emt_structures(1)[0]

    def stressed(n: int, noise: float) -> list[Structure]:
        made = []
        for factor in np.linspace(0.97, 1.03, n):
            pressure = -0.3 * (factor - 1) + rng.normal(scale=noise)
            made.append(replace(base, cell=base.cell * factor, positions=base.positions * factor, forces=None, stress=pressure * np.eye(3)))
        return made

    report = inspect(stressed(120, 0.012))
    assert -0.6 < report.numbers["stress_against_volume"]["correlation"] < -0.2
    assert any("stress has the opposite sign" in e and "falls as the volume grows" in e for e in report.errors)
    few = inspect(stressed(8, 0.03))
    assert few.numbers["stress_against_volume"]["correlation"] < 0
    assert not any("opposite sign" in e for e in few.errors), few.errors
    assert any("is its sign right?" in w for w in few.warnings)


def test_repeated_frames_are_reported_as_such_alone() -> None:
    frames = morse_frames(100)
    report = inspect([*frames, *([frames[7]] * 20)])
    assert [e for e in report.errors if "20 duplicate frames: frame 7 and frame 7 ...; a split would" in e] == report.errors
    assert len(report.errors) == 1
    assert report.warnings == []
    grouped = [replace(s, group=str(k // 10)) for k, s in enumerate(frames)]
    report = inspect([*grouped, *([grouped[7]] * 20)])
    assert report.ok, report.errors
    assert [w for w in report.warnings if "20 duplicate frames" in w] == report.warnings
    (error,) = inspect([*grouped, replace(grouped[7], group="9")]).errors
    assert "1 duplicate frames" in error
    assert "--group" not in error


def test_inspection_and_fit_agree_on_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both refuse; what they advise works."""
    monkeypatch.setattr(fitting, "train", lambda config, **_: load_data(config.data))
    frames = [s.to_ase() for s in morse_frames(30)]
    path, store = tmp_path / "a.extxyz", tmp_path / "a.store"
    ase.io.write(path, [*frames, *frames[:20]])
    assert main(["data", "inspect", str(path)]) == 1
    with pytest.raises(ValueError, match="20 duplicate frames.*--drop-duplicates"):
        fitting.fit(path, out=tmp_path / "fit")
    with pytest.raises(ValueError, match="is the same structure as.*--drop-duplicates"):
        fitting.fit(path, out=tmp_path / "fit", force=True)
    assert main(["data", "convert", str(path), "--out", str(store), "--drop-duplicates"]) == 0
    assert main(["data", "inspect", str(store)]) == 0
    train_set, valid_set, _ = fitting.fit(store, out=tmp_path / "fit")
    assert len(train_set) + len(valid_set) == 30
    for k, atoms in enumerate(frames):
        atoms.info["trajectory"] = f"t{k // 5}"
    ase.io.write(path, [*frames, *frames[:20]])
    assert main(["data", "inspect", str(path), "--group", "trajectory"]) == 0
    fitting.fit(path, out=tmp_path / "fit", labels=LabelConfig(group="trajectory"))
    frames[3].calc.results["energy"] += 1
    ase.io.write(path, [morse_frames(30)[3].to_ase(), frames[3]])
    with pytest.raises(ValueError, match="frame 1 is the same structure as .* frame 0, with another energy"):
        list(without_duplicates(read_structures(path)))


def test_pairs_that_are_too_far_are_not_conclusive() -> None:
    """Liquid-like frames: energies and forces say nothing of one another, and the report says so."""
    rng = np.random.default_rng(1)
    frames = [replace(s, forces=rng.normal(size=(4, 3)), energy=float(rng.normal())) for s in morse_frames(30)]
    report = inspect([replace(s, positions=s.positions + (k % 2) * s.cell[0]) for k, s in enumerate(morse_frames(30))])
    assert report.numbers["energy_against_forces"]["slope"] == pytest.approx(1, abs=0.1)  # whole cells apart is not far
    report = inspect(frames)
    assert report.facts["energy against forces"].startswith("not conclusive: correlation ")
    assert report.numbers["energy_against_forces"]["conclusive"] is False
    assert not any("disagree" in e for e in report.errors)
    assert inspect(frames[:3]).facts["energy against forces"].startswith("not tested (")


def test_few_scattered_pairs_are_no_wrong_unit() -> None:
    """Where the work scatters as much as the energies, a regression is too flat: 60 frames of aspirin would be refused as in Bohr."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=400)
    work, difference = true + 0.45 * rng.normal(size=400), true + 0.45 * rng.normal(size=400)
    report = Inspection()
    assert consistency._slope("energy against forces", list(work), list(difference), [1.0] * 400, report) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (0.529177, True)])
def test_a_factor_of_bohr_is_not_passed_in_silence(factor: float, warned: bool) -> None:
    """60 frames of ethanol give 10 pairs, too few to tell a factor of 1.9 for sure."""
    frames = [s for s, _ in zip(read_structures(ETHANOL), range(60), strict=False)]
    report = inspect([replace(s, forces=s.forces * factor) for s in frames])
    assert report.ok
    assert any("lengths or forces in Bohr" in w for w in report.warnings) == warned


def test_cells_of_one_atom_have_no_forces_and_no_warning() -> None:
    from ase.calculators.emt import EMT

    frames = []
    for k in range(4):
        atoms = bulk("Cu", a=3.5 + 0.05 * k)
        atoms.calc = EMT()
        frames.append(Structure(atomic_numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, pbc=np.array([True] * 3),
                                energy=atoms.get_potential_energy(), forces=-np.zeros((1, 3)), name=str(k)))  # fmt: skip
    report = inspect(frames)
    assert not any("RMS force" in w for w in report.warnings)
    assert "range 0 to 0" in report.facts["forces"]


@pytest.mark.parametrize(("unit", "kind"), [("kcal/mol", "errors"), ("Hartree", "warnings"), ("eV", None)])
def test_units_show_in_all_electron_energies(unit: str, kind: str | None) -> None:
    """Ethanol at -154.9 Hartree; with energies and forces in the same wrong unit their slope is 1."""
    energy = -154.9 * 27.2114 / ENERGY_UNITS[unit]
    atoms = molecule("CH3CH2OH")
    frames = [Structure(atomic_numbers=atoms.numbers, positions=atoms.positions + 0.01 * k, energy=energy, name=str(k)) for k in range(2)]
    report = inspect(frames)
    found = {name: [m for m in getattr(report, name) if "--energy-unit" in m] for name in ("errors", "warnings")}
    assert {name for name, messages in found.items() if messages} == ({kind} if kind else set())
    assert kind is None or f"as if they were in {unit}: set --energy-unit {unit}" in found[kind][0]


def test_inspection_gives_numbers_for_programs() -> None:
    answer = json.loads(json.dumps(inspect(emt_structures(12)).to_dict()))
    assert answer["numbers"]["frames"] == 12
    assert answer["numbers"]["atoms"] == {"fewest": 4, "most": 4, "total": 48}
    assert answer["numbers"]["stress"]["rms"] > 0
    assert answer["ok"] is True


def test_the_force_on_an_only_atom_is_zero(tmp_path: Path) -> None:
    """Files of isolated atoms often hold energies alone; they stand in the way of no training on forces."""
    path = tmp_path / "lone.extxyz"
    path.write_text(
        '1\nProperties=species:S:1:pos:R:3 REF_energy=-1.0 pbc="F F F"\nO 0 0 0\n'
        '2\nProperties=species:S:1:pos:R:3:REF_forces:R:3 REF_energy=-3.0 pbc="F F F"\nO 0 0 0 0 0 1\nO 0 0 1.2 0 0 -1\n'
    )
    lone, pair = read_structures(path, LabelConfig(energy="REF_energy", forces="REF_forces"))
    assert lone.forces.tolist() == [[0.0, 0.0, 0.0]]
    assert pair.forces[0, 2] == 1.0
