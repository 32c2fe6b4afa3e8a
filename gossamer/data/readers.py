"""Readers: labelled structures from the formats of the field, in our units and signs, one at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms, units

from gossamer.arguments import FILES, at_home, listed
from gossamer.data.from_atoms import CELLS, from_atoms
from gossamer.data.labels import LabelConfig, as_labels, refuse_unread
from gossamer.data.lmdb_file import check_lmdb
from gossamer.data.npz_file import npz_names, read_npz
from gossamer.data.structure import Structure
from gossamer.data.units import label_scales, units_of_database, units_of_npz, with_stated_units
from gossamer.data.xyz import xyz_frames
from gossamer.files import COMPRESSIONS, InputError, open_text
from gossamer.quantities import QUANTITIES

log = logging.getLogger(__name__)


def read_structures(
    path: Path | str | Sequence[Path | str], labels: LabelConfig | Mapping[str, Any] | None = None, keep_broken: bool = False
) -> Iterator[Structure]:
    """Yield the structures of a file, a folder, or several of them.

    Formats by name: extended XYZ (also .xz .gz .bz2), ASE .db and .aselmdb, ASE .traj, VASP (vasprun.xml, OUTCAR), MD17
    and rMD17 .npz, MPtrj .json, a folder of OC20 S2EF files (extxyz with their txt of reference energies), and whatever
    else ASE reads. Of a folder every such file is read; one line of the log says what is not.

    Args:
        path: File, folder or store, or several.
        labels: Names and units of the labels.
        keep_broken: Also yield frames with a label that is not finite, no numbers or of a wrong size, without that label, which
            ``Structure.faults`` tells; by default the first of them is an error.

    Raises:
        TypeError: something else, such as Atoms.
        FileNotFoundError, ValueError: naming file and frame.
    """
    labels = as_labels(labels)
    if not isinstance(path, str | Path):
        for item in listed("path", path, FILES, "files or folders"):
            yield from read_structures(item, labels, keep_broken)
        return
    path = Path(at_home(path))
    if not path.exists():
        pattern = " Patterns are not looked up: give the files, or the folder." * bool(set("*?[") & set(path.name))
        raise FileNotFoundError(f"There is no data file '{path}'.{pattern}")
    yield from _named_errors(path, (checked(structure, keep_broken) for structure in _labelled(path, labels)))


def checked(structure: Structure, keep_broken: bool) -> Structure:
    """The structure, if shapes and numbers make sense; labels may be broken if asked for, and are then set aside."""
    return structure.validate(labels=False).set_aside() if keep_broken else structure.validate()


def _labelled(path: Path, labels: LabelConfig) -> Iterator[Structure]:
    """What the reader of the file or folder makes of it; settings that it would pass over are refused."""
    reader = _reader(path)
    refuse_unread(labels, f"'{path}'", READ_BY.get(reader))
    yield from reader(path, labels)


def _named_errors(path: Path, structures: Iterator[Structure]) -> Iterator[Structure]:
    """The same structures; whatever a parser makes of a damaged file becomes a ValueError that names the file."""
    try:
        yield from structures
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ValueError(f"'{path}' cannot be read ({reason}). The file may be truncated or damaged: copy it again.") from error


def _reader(path: Path) -> Any:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    if path.is_dir():
        return _read_directory
    if path.suffix in COMPRESSIONS and suffix in (".db", ".aselmdb", ".npz", ".json"):
        raise ValueError(f"'{path}' is compressed, and only text (extended XYZ) is read so. Unpack it.")
    if suffix in (".extxyz", ".xyz"):
        return _read_extxyz
    if suffix in (".db", ".aselmdb"):
        return _read_database
    if suffix == ".npz":
        return _read_npz
    if suffix == ".json":
        with open(path, "rb") as file:  # ASE's own JSON is a database
            return _read_database if re.search(rb'"(unique_id|__ndarray__)"', file.read(2**14)) else _read_mptrj
    if suffix == ".lmdb":
        raise ValueError(
            f"'{path}' looks like a database of pickled graphs, and unpickling runs code. If you trust it, convert it once: "
            f"gossamer data convert --legacy-lmdb {path} --out {path.stem}.store"
        )
    return _read_ase


def is_own_format(path: Path) -> bool:
    """Whether `read_structures` knows a file or folder that ASE does not: a store, a folder, npz in the layout of MD17, MPtrj's JSON."""
    if path.suffix == ".npz" and path.is_file():
        return any(set(layout.values()) <= set(npz_names(path)) for layout in NPZ_LAYOUTS.values())
    return (path.is_dir() and path.suffix != ".bundle") or (path.suffix == ".json" and path.is_file() and _reader(path) is _read_mptrj)


# --- ASE and its relatives ----------------------------------------------------------------------------------------


def _read_extxyz(path: Path, labels: LabelConfig) -> Iterator[Structure]:
    with open_text(path) as file:
        yield from _frames(path, xyz_frames(file), labels)


def _read_ase(path: Path, labels: LabelConfig) -> Iterator[Structure]:
    try:
        kind = ase.io.formats.filetype(str(path))
        unfinished, whole = _unfinished(path) if kind in ("vasp-out", "vasp-xml") else (set(), True)
        index = -1
        for index, structure in enumerate(_frames(path, ase.io.iread(path, index=":"), labels)):
            yield replace(structure, remarks=(*structure.remarks, "not converged")) if index in unfinished else structure
        if not whole:
            log.warning("'%s' has no end, as where VASP was stopped: the steps that are complete are read (%d)", path, index + 1)
    except ase.io.formats.UnknownFileTypeError:
        raise ValueError(f"'{path}': ASE does not know this file type. Convert it to extended XYZ.") from None


def _unfinished(path: Path) -> tuple[set[int], bool]:
    """Frames of an OUTCAR or vasprun.xml whose electrons took all NELM iterations and did not converge (VASP goes on all the same), and whether
    the file has its end.

    Raises:
        ValueError: frames of VASP's machine-learned force field among them.
    """
    found: set[int] = set()
    most, iterations, frames, whole = 0, 0, 0, False
    with open_text(path) as file:
        for line in file:
            whole = whole or "</modeling>" in line or "General timing and accounting" in line
            if limit := re.search(r"NELM\s*=\s*(\d+)|name=\"NELM\">\s*(\d+)", line):
                most = int(limit[1] or limit[2])
            elif number := re.search(r"Iteration\s+\d+\(\s*(\d+)\)", line):
                iterations = int(number[1])
            elif "<scstep>" in line:
                iterations += 1
            elif "EDIFF is reached" in line:
                iterations = 0
            elif "ML FREE ENERGIE" in line:
                raise ValueError(
                    f"'{path}' holds steps of VASP's machine-learned force field, whose energies and forces are predictions. Give the ab initio "
                    "steps alone (those of ML_ABN, say, as extended XYZ)."
                )
            elif "FREE ENERGIE OF THE ION-ELECTRON SYSTEM" in line or "</calculation>" in line:
                if 0 < most <= iterations:
                    found.add(frames)
                frames, iterations = frames + 1, 0
    return found, whole


def _frames(path: Path, frames: Iterator[Atoms], labels: LabelConfig) -> Iterator[Structure]:
    index = 0
    while True:
        try:
            atoms = next(frames)
        except StopIteration:
            break
        except (ase.io.formats.UnknownFileTypeError, FileNotFoundError):
            raise
        except InputError as error:
            raise ValueError(f"'{path}' frame {index}: {error}.") from None
        except Exception as error:  # ASE raises whatever its parser meets
            raise ValueError(
                f"'{path}' frame {index} cannot be read ({type(error).__name__}: {error}). The file may be truncated or damaged there."
            ) from error
        yield from_atoms(atoms, labels, f"'{path}' frame {index}")
        index += 1
    if index == 0:
        raise ValueError(f"'{path}' holds no frames.")


def _read_database(path: Path, labels: LabelConfig) -> Iterator[Structure]:
    if path.suffix == ".aselmdb":
        try:
            import ase_db_backends  # noqa: F401
        except ImportError:
            raise ImportError(f"Reading '{path}' needs ase-db-backends: pip install 'gossamer[lmdb]'") from None
        check_lmdb(path)
    with open(path, "rb") as file:
        sqlite = file.read(15) == b"SQLite format 3"
    if path.suffix == ".db" and not sqlite:  # ASE would make an empty file a database
        raise ValueError(f"'{path}' is not an ASE database (SQLite). It may be truncated: copy it again.")
    with ase.db.connect(str(path), use_lock_file=False) as database:  # type: ignore[no-untyped-call]
        count = 0
        labels = with_stated_units(path, labels, units_of_database(database.metadata, labels))
        for row in database.select():
            extra = {**row.key_value_pairs, **row.data}
            for label in QUANTITIES:
                if label in extra and row.get(label) is not None and not np.array_equal(extra[label], row.get(label)):
                    raise ValueError(
                        f"'{path}' row {row.id} holds {label} twice, of a calculator and among its data, and they differ. Give the one to be read "
                        f"a name of its own, and say it (--{label} NAME)."
                    )
            if "atomic_forces" in extra and labels.forces == "forces" and row.get("forces") is None:
                extra["forces"] = extra["atomic_forces"]  # ISO17 and other databases written by schnetpack
            if "total_energy" in extra and labels.energy == "energy" and row.get("energy") is None:
                extra["energy"] = extra["total_energy"]
            yield from_atoms(row.toatoms(), labels, f"'{path}' row {row.id}", extra)
            count += 1
    if count == 0:
        raise ValueError(f"'{path}' holds no rows.")


def _read_directory(path: Path, labels: LabelConfig) -> Iterator[Structure]:
    if (path / "store.json").exists():
        from gossamer.data.store import Store

        refuse_unread(labels, f"'{path}'", ())
        yield from Store(path)
        return
    there = sorted(path.iterdir())
    files = [p for p in there if _is_data(p)]
    if not files:
        hint = f" What is in folders within is not read: gossamer data convert {path}/*/NAME --out data.store makes one set of it."
        raise ValueError(
            f"Folder '{path}' holds no data files ({', '.join(OURS)}, also .xz, what else ASE reads, or a store)."
            + hint * any(p.is_dir() for p in there)
        )
    twins = {p: _twin(p) for p in files}
    skipped = [p.name for p in there if p not in files and p not in twins.values()]
    if skipped:
        shown = ", ".join(skipped[:8]) + (" ..." if len(skipped) > 8 else "")
        log.warning("'%s': %d files are read as data, %d are not: %s", path, len(files), len(skipped), shown)
    for file, twin in twins.items():
        yield from _named_errors(file, _labelled(file, labels) if twin is None else _read_s2ef(file, twin, labels))


OURS = (".extxyz", ".xyz", ".db", ".aselmdb", ".npz", ".traj")
"""endings that a folder's data has; .json and others are looked into"""
NO_DATA = {".txt", ".md", ".rst", ".yaml", ".yml", ".toml", ".ini", ".py", ".ipynb", ".sh", ".log", ".err", ".csv", ".tsv", ".html", ".pdf", ".png",
           ".jpg", ".svg", ".in", ".inp", ".bak", ".old", ".orig", ".tmp", ".part", ".lock", ".safetensors", ".pt", ".pth"}  # fmt: skip
"""endings of files in a folder that are not read even where ASE would try: notes, inputs, scripts, logs, pictures, spare copies, potentials"""
NO_LABELS = ("POSCAR", "CONTCAR", "XDATCAR", "slurm-")
"""likewise beginnings: VASP's files without labels, output of jobs"""


def _is_data(path: Path) -> bool:
    """Whether a file in a folder is to be read: one that would be read alone, unless its name says that it is something else."""
    if path.is_dir():
        return not path.name.startswith(".") and (path / "store.json").exists()
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    if path.name == "OUTCAR" and path.with_name("vasprun.xml").exists():
        return False  # the same frames, in fewer digits
    if path.name.startswith((".", *NO_LABELS)) or path.name.endswith(("~", "-lock")) or suffix.lower() in NO_DATA:
        return False
    if suffix == ".npz":  # beside data there may be others, such as the metadata.npz of OMat24
        try:
            names = set(npz_names(path))
        except ValueError:
            return True  # damaged, which the reader says
        return any(set(layout.values()) <= names for layout in NPZ_LAYOUTS.values())
    if suffix in (*OURS, ".lmdb"):  # of the last, the reader says what to do
        return True
    if suffix == ".json":
        with open(path, "rb") as file:
            head = file.read(2**14)
        return not head or re.search(rb'"(unique_id|__ndarray__|structure|uncorrected_total_energy)"', head) is not None
    try:
        return ase.io.formats.filetype(str(path)) in ase.io.formats.ioformats
    except ase.io.formats.UnknownFileTypeError:
        return False


def _twin(path: Path) -> Path | None:
    """The txt of reference energies that belongs to a file of OC20's S2EF."""
    stem = path.name.split(".")[0]
    for twin in (path.with_name(f"{stem}.txt"), path.with_name(f"{stem}.txt.xz")):
        if twin.exists() and {".extxyz", ".xyz"} & set(path.suffixes):
            with open_text(twin) as file:  # a note beside data is none
                return twin if re.fullmatch(r"[^,]+,[^,]+,[-+\s\d.eE]+", file.readline()) else None
    return None


def _read_s2ef(path: Path, twin: Path, labels: LabelConfig) -> Iterator[Structure]:
    """OC20 S2EF: the txt holds "system id, frame, reference energy"; the label is the adsorption energy."""
    refuse_unread(labels, f"'{path}'", labels.given().keys() - {"group"})
    with open_text(twin) as file:
        rows = [line.strip().split(",") for line in file if line.strip()]
    count = 0
    for structure in _read_extxyz(path, labels):
        if count >= len(rows):
            raise ValueError(f"'{path}' holds more frames than '{twin}' has lines ({len(rows)}). They do not belong together.")
        system, _frame, reference = rows[count]
        energy = None if structure.energy is None else structure.energy - float(reference)
        count += 1
        yield Structure(**{**vars(structure), "energy": energy, "group": system})
    if count != len(rows):
        raise ValueError(f"'{path}' holds {count} frames, but '{twin}' has {len(rows)} lines. They do not belong together.")


# --- arrays and JSON ----------------------------------------------------------------------------------------------

NPZ_LAYOUTS = {
    "rMD17": {"numbers": "nuclear_charges", "positions": "coords", "energy": "energies", "forces": "forces"},
    "MD17": {"numbers": "z", "positions": "R", "energy": "E", "forces": "F"},
}


def _read_npz(path: Path, labels: LabelConfig) -> Iterator[Structure]:
    arrays = _npz_arrays(path)
    labels = with_stated_units(path, labels, units_of_npz(path))
    if labels.energy_unit is None:
        log.info("'%s' states no unit of energy: it is read in kcal/mol, as MD17 is (--energy-unit says otherwise)", path)
    energy_scale, length_scale, force_scale, _ = label_scales(labels, "kcal/mol")
    if arrays["positions"].ndim != 3:
        raise ValueError(f"'{path}': positions have shape {arrays['positions'].shape}, expected (n_frames, n_atoms, 3).")
    n_frames = len(arrays["positions"])
    numbers = arrays["numbers"]
    if not np.array_equal(numbers, numbers.astype(np.int64)):
        raise ValueError(f"'{path}': the atomic numbers are no whole numbers.")
    if numbers.ndim == 2 and len(numbers) != n_frames:
        raise ValueError(f"'{path}': {n_frames} frames of positions, but {len(numbers)} of atomic numbers.")
    for name in ("energy", "forces"):
        if len(arrays[name]) != n_frames:
            raise ValueError(f"'{path}': {n_frames} frames of positions, but {len(arrays[name])} of {name}.")
    for k in range(n_frames):
        yield Structure(
            atomic_numbers=(numbers[k] if numbers.ndim == 2 else numbers).astype(np.int64),
            positions=arrays["positions"][k].astype(np.float64) * length_scale,
            energy=float(np.reshape(arrays["energy"][k], ())) * energy_scale,
            forces=arrays["forces"][k].astype(np.float64) * force_scale,
            name=f"'{path}' frame {k}",
        )


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of an npz file in one of the known layouts.

    Raises:
        ValueError: another layout, or as `read_npz`.
    """
    names = npz_names(path)
    layout = next((v for v in NPZ_LAYOUTS.values() if set(v.values()) <= set(names)), None)
    if layout is None:
        expected = "; ".join(f"{name}: {', '.join(v.values())}" for name, v in NPZ_LAYOUTS.items())
        raise ValueError(f"'{path}' holds {', '.join(sorted(names))}, which is neither layout known ({expected}).")
    periodic = [name for name in names if name.lower() in (*CELLS, "cells", "pbc")]
    if any(array.any() for array in read_npz(path, periodic).values()):
        raise ValueError(
            f"'{path}' holds {', '.join(periodic)}: its frames lie in a cell, and files of this layout are read as molecules. Convert it to extended XYZ."
        )
    arrays = read_npz(path, layout.values())
    return {name: arrays[key] for name, key in layout.items()}


def _read_mptrj(path: Path, labels: LabelConfig) -> Iterator[Structure]:
    """MPtrj JSON (Deng et al. 2023): {mp id: {frame id: {...}}}, parsed one material at a time.

    Energies are the uncorrected totals; its stress is in kbar with VASP's sign.
    """
    try:
        import ijson
    except ImportError:
        raise ImportError(f"Reading '{path}' needs ijson: pip install 'gossamer[mptrj]'") from None

    other = f"'{path}' is not in the layout of MPtrj ({{material: {{frame: {{structure, force, ...}}}}}}). Convert it to extended XYZ."
    found = False
    with open(path, "rb") as file:
        try:
            for material, frames in ijson.kvitems(file, "", use_float=True):
                found = True
                if not isinstance(frames, dict):
                    raise ValueError(other)
                for frame_id, frame in frames.items():
                    name = f"'{path}' {material}/{frame_id}"
                    try:
                        crystal = frame["structure"]
                        yield Structure(
                            atomic_numbers=np.array([_element(site) for site in crystal["sites"]], dtype=np.int64),
                            positions=np.array([site["xyz"] for site in crystal["sites"]], dtype=np.float64),
                            cell=np.array(crystal["lattice"]["matrix"], dtype=np.float64),
                            pbc=np.ones(3, dtype=bool),
                            energy=float(frame["uncorrected_total_energy"]),
                            forces=np.array(frame["force"], dtype=np.float64),
                            stress=None if frame.get("stress") is None else np.array(frame["stress"]) * -0.1 * units.GPa,
                            group=material,
                            name=name,
                        )
                    except (KeyError, TypeError) as error:
                        raise ValueError(f"{name} is not in the layout of MPtrj ({type(error).__name__}: {error}).") from None
        except ijson.JSONError as error:
            raise ValueError(f"'{path}' is not complete JSON ({error}). It may be truncated: copy it again.") from None
    if not found:
        raise ValueError(other)


def _element(site: dict[str, Any]) -> int:
    from ase.data import atomic_numbers

    return atomic_numbers[site["species"][0]["element"]]


READ_BY: dict[Any, set[str]] = {_read_npz: {"energy_unit", "length_unit", "force_unit"}, _read_mptrj: set()}
"""settings of labels that a reader uses; those that are not here use all"""
