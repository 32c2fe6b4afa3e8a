"""Small files of every kind that gossamer reads, for the parts that damage them; and potentials of all networks. Written anew each time."""

from __future__ import annotations

import io
import lzma
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import torch
import yaml
from ase import Atoms
from ase.build import bulk, molecule

# before the tests' helpers, which check types of what is imported after them: here as for users
import gossamer.config
import gossamer.imports
import gossamer.simulation.calculator  # noqa: F401
from gossamer.calibration import measure_uncertainty
from gossamer.config import make_config, save_config
from gossamer.data.fingerprint import SeenFrames
from gossamer.data.from_atoms import from_atoms
from gossamer.data.labels import LabelConfig
from gossamer.data.readers import read_structures
from gossamer.data.store import write_store
from gossamer.potential_file import save
from gossamer.simulation.md import md
from gossamer.simulation.relax import relax
from gossamer.training.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import conftest  # noqa: E402
from conftest import make_potential  # noqa: E402
from small_formats import crystals, label, write_oc20  # noqa: E402

VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?><modeling>
<incar><i name="NSW" type="int">0</i></incar><kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1</v></varray></kpoints>
<parameters><separator name="electronic"><i name="NELECT">2.0</i></separator><separator name="electronic exchange-correlation"></separator></parameters>
<atominfo><atoms>2</atoms><types>1</types><array name="atoms"><set><rc><c>H</c><c>1</c></rc><rc><c>H</c><c>1</c></rc></set></array></atominfo>
<structure name="initialpos"><crystal><varray name="basis">V</varray></crystal><varray name="positions"><v>0 0 0</v><v>0.15 0 0</v></varray></structure>
<calculation><scstep><energy><i name="e_fr_energy">-6.7</i><i name="e_wo_entrp">-6.7</i><i name="e_0_energy">-6.7</i></energy></scstep>
<structure><crystal><varray name="basis">V</varray></crystal><varray name="positions"><v>0 0 0</v><v>0.15 0 0</v></varray></structure>
<varray name="forces"><v>0.5 0 0</v><v>-0.5 0 0</v></varray><varray name="stress"><v>10 0 0</v><v>0 20 0</v><v>0 0 30</v></varray>
<energy><i name="e_fr_energy">-6.7</i><i name="e_wo_entrp">-6.7</i><i name="e_0_energy">-6.7</i></energy></calculation>
</modeling>""".replace("V<", "<v>5 0 0</v><v>0 5 0</v><v>0 0 5</v><")  # fmt: skip


def labelled_molecules(n: int = 3) -> list[Atoms]:
    """Rattled water in a cell, with labels of EMT and one of each further kind."""
    frames = []
    for k in range(n):
        atoms = molecule("H2O")
        atoms.rattle(0.05, seed=k)
        atoms.set_cell(np.eye(3) * 6)
        atoms.pbc = k % 2 == 0
        frames.append(label(atoms))
    return frames


def data_files(folder: Path) -> dict[str, Path]:
    """One file (or folder) of each format that labelled structures are read from."""
    from test_data import small_files

    (folder / "small").mkdir(parents=True)
    found = {path.name: path for path in small_files(folder / "small")}
    text = io.StringIO()
    ase.io.write(text, labelled_molecules() + crystals(2), format="extxyz")
    (folder / "rich.extxyz").write_text(text.getvalue())
    (folder / "plain.xyz").write_text("2\n\nH 0 0 0\nO 0 0 1\nVEC1 5 0 0\nVEC2 0 6 0\nVEC3 0 0 7\n1\ncomment\nHe 1 2 3\n")
    (folder / "vasprun.xml").write_text(VASPRUN)
    z, r, e, f = np.array([8, 1, 1]), np.random.default_rng(0).normal(size=(4, 3, 3)), np.ones(4), np.ones((4, 3, 3))
    np.savez(folder / "rmd17.npz", nuclear_charges=z, coords=r, energies=e, forces=f)
    found |= {name: folder / name for name in ("rich.extxyz", "plain.xyz", "vasprun.xml", "rmd17.npz")}
    found["oc20"] = write_oc20(folder / "oc20")
    write_store(read_structures(folder / "rich.extxyz"), folder / "a.store")
    found["a.store"] = folder / "a.store"
    try:
        import ase_db_backends  # noqa: F401

        with ase.db.connect(str(folder / "a.aselmdb")) as database:
            for k in range(12):
                database.write(label(molecule("H2O")), data={"more": list(range(500 * (k % 3)))})
        found["a.aselmdb"] = folder / "a.aselmdb"
        found["legacy.lmdb"] = legacy_lmdb(folder / "legacy.lmdb")
    except ImportError:
        print("without LMDB, which is not installed")
    return found


def structure_files(folder: Path) -> dict[str, Path]:
    """Files that only the judge, simulations and relaxations read."""
    folder.mkdir(parents=True)
    atoms = bulk("SiC", "zincblende", a=4.36, cubic=True)
    for name, form in (("a.cif", "cif"), ("POSCAR", "vasp"), ("a.gen", "gen"), ("a.xsf", "xsf"), ("a.pdb", "proteindatabank")):  # fmt: skip
        ase.io.write(folder / name, atoms, format=form)
    np.savez(folder / "frames.npz", frac=np.random.default_rng(0).random((3, 2, 3)), cell_A=np.eye(3) * 4, numbers=np.array([14, 6]))
    with lzma.open(folder / "b.xyz.xz", "wb") as file:
        file.write(b"1\n\nHe 1 2 3\n1\n\nHe 1 2 4\n")
    return {path.name: path for path in sorted(folder.iterdir())}


def pickled_graph(k: int) -> bytes:
    """A graph as OC20 was once given out, under the name of a class that is not here."""
    names = ("torch_geometric", "torch_geometric.data", "torch_geometric.data.data")
    modules = {name: types.ModuleType(name) for name in names}
    kind = type("Data", (), {"__module__": names[2], "__qualname__": "Data"})
    modules[names[2]].Data = kind  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        graph: Any = kind()
        graph.__dict__ |= {"pos": torch.rand(4, 3), "cell": torch.eye(3)[None] * 9, "atomic_numbers": torch.tensor([8.0, 1, 1, 29]), "y": -3.5,
                           "force": torch.rand(4, 3), "fixed": torch.tensor([0.0, 0, 0, 1]), "sid": k, "more": np.arange(40.0 * k * k)}  # fmt: skip
        return pickle.dumps(graph)
    finally:
        for name in names:
            del sys.modules[name]


def legacy_lmdb(path: Path, n: int = 6) -> Path:
    """An LMDB of pickled graphs, of which some need pages of their own."""
    import lmdb

    environment = lmdb.open(str(path), subdir=False, map_size=2**24)
    with environment.begin(write=True) as transaction:
        for k in range(n):
            transaction.put(str(k).encode(), pickled_graph(k))
        transaction.put(b"length", pickle.dumps(n))
    environment.close()
    path.with_name(path.name + "-lock").unlink(missing_ok=True)
    return path


def potential_file(path: Path, name: str = "sound", dtype: torch.dtype = torch.float32, uncertainty: bool = True) -> Path:
    """A saved potential with stored structures, fingerprints of frames and tables of uncertainty; weights random."""
    options: dict[str, Any] = dict(conftest.MODELS[name])
    potential = make_potential(["H", "C", "O"], dtype=dtype, **options)
    frames = [from_atoms(atoms, LabelConfig(), f"frame {k}") for k, atoms in enumerate(labelled_molecules(8))]
    potential.seen = SeenFrames.of(frames[:6], frames[6:])
    if uncertainty:
        measure_uncertainty(potential, frames[:6], frames[6:])
    save(potential, path, check=frames[:2], training={"data": {"train": "a.extxyz"}})
    return path


def checkpoint_file(path: Path) -> Path:
    rng = torch.Generator().manual_seed(0)
    tensors = {f"network.{k}": torch.randn(k + 2, 5, generator=rng) for k in range(6)} | {"rng": torch.get_rng_state()}
    save_checkpoint(path, tensors, {"step": 7, "epoch": 1, "config": {"a": [1, 2.5, "x"]}})
    return path


def config_files(folder: Path) -> dict[str, Path]:
    """The recipes, and a configuration with every setting."""
    folder.mkdir(parents=True)
    for path in sorted((ROOT / "recipes").glob("*.yaml"))[::5]:
        (folder / path.name).write_bytes(path.read_bytes())
    full = make_config({"data": {"train": "a.extxyz"}, "model": {"name": "nequip", "pair_cutoffs": {"H": 2.5, "C": {"O": 3.0}}}})
    save_config(full, folder / "full.yaml")
    (folder / "aliases.yaml").write_text(yaml.safe_dump({"data": {"train": "a"}}) + "a: &a [1, 2]\nb: *a\n")
    return {path.name: path for path in sorted(folder.iterdir())}


def foreign_files(folder: Path) -> dict[str, Path]:
    """Potentials of other packages, as far as the tests write some."""
    import test_import_sources as sources

    folder.mkdir(parents=True)
    sources.nequip_checkpoint(folder / "nequip.ckpt", "l1")
    sources.nequip_package(folder / "a.nequip.zip")
    sources.schnetpack_model(folder / "painn.model", "painn")
    torch.save({"a": torch.ones(3, 2), "b": [1, "x", (2.5, None)], "c": np.arange(4)}, folder / "plain.pt")
    return {path.name: path for path in sorted(folder.iterdir())}


def states(folder: Path) -> dict[str, Path]:
    """Folders of a simulation and of a relaxation that can go on."""
    from ase.calculators.emt import EMT

    folder.mkdir(parents=True)
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    ase.io.write(folder / "copper.extxyz", atoms)
    for ensemble in ("langevin", "nose-hoover"):
        md(EMT(), folder / "copper.extxyz", out=folder / ensemble, steps=20, interval=5, ensemble=ensemble, progress=False)
    relax(EMT(), folder / "copper.extxyz", out=folder / "relaxed.extxyz", steps=3, fmax=1e-5)
    return {name: folder / name for name in ("langevin", "nose-hoover", "relaxed.extxyz")}
