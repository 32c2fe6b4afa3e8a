"""Potentials trained with other packages, brought here: `import_potential`. Adding a package means one file and one row of `SOURCES`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gossamer.arguments import as_path, listed
from gossamer.imports.contract import ImportOptions
from gossamer.imports.inert import Tree, open_tree
from gossamer.imports.verify import ask_reference, calmed, compare, predictions, structures
from gossamer.potential import Potential
from gossamer.potential_file import deviates, save
from gossamer.settings import build

log = logging.getLogger(__name__)
SOURCES: dict[str, tuple[str, ...]] = {
    "mace": (), "nequip": (), "sevennet": (), "nequix": (), "schnetpack": ("energy_unit",), "leignn": ("cutoff", "max_neighbors", "update"),
    "geodite": (),
}  # fmt: skip
"""modules of this folder, one for each package whose files are known (`gossamer.imports.contract`); what their files do not say"""


def import_potential(
    path: Path | str,
    out: Path | str = "potential.safetensors",
    modal: str | None = None,
    elements: Sequence[str] | str | None = None,
    head: str | None = None,
    reference: Path | str | None = None,
    given: Mapping[str, str] | Sequence[str] | str = (),
) -> dict[str, Any]:
    """Bring a potential that another package trained; nothing of its file is run here (`gossamer.imports.inert`).

    Args:
        path: File of another package.
        out: Potential to write.
        modal: Which functional or fidelity, of files trained on several.
        elements: Keep only these elements, as a list or "H,O"; by default all of the file.
        head: Which readout, of files that have several.
        reference: Python interpreter of an environment with the other package, which loads and RUNS the file there, as the package
            does: its energies, forces and stresses are compared with ours and stored with the potential. Without it the potential is
            marked as unverified.
        given: What the file does not say, {"energy_unit": "kcal/mol"} or ["energy_unit=kcal/mol"] (docs/import.md).

    Returns:
        What was brought, and how far it is from the reference.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: no such file or interpreter.
        ValueError: a file no source knows, or one with a tensor or a setting that is not known, or predictions that differ from the
            reference.
    """
    chosen = [e.strip() for e in elements.split(",")] if isinstance(elements, str) else elements
    options = build(
        ImportOptions, {"modal": modal, "elements": None if chosen is None else list(chosen), "head": head, "given": _pairs(given)}
    )
    out = as_path("out", out, "the name of a file")
    if out.exists():
        raise FileExistsError(f"'{out}' exists already, and would be written over. Name another file (--out), or move it away.")
    tree = open_tree(path)
    name, potential = read_potential(tree, options)
    known = potential.statistics.elements
    if options.elements is not None and sorted(known) != sorted(options.elements):
        raise ValueError(f"'{path}' gave a potential for {', '.join(known)}, but --elements asks for {', '.join(options.elements)}.")
    found = potential.imported or {}
    options = replace(options, modal=options.modal or found.get("modal"), head=options.head or found.get("head"))
    potential.imported = {
        "source": name,
        "package": import_module(f"gossamer.imports.{name}").PACKAGE,
        "version": None,
        **found,
        "file": tree.path.name,
        "sha256": tree.sha256,
        **{k: getattr(options, k) for k in ("modal", "head", "elements")},
        "verified": None,
    }
    check = calmed(potential, structures(known, potential.cutoff))
    stored = None
    if reference is not None:
        log.info("read; comparing with the package %s on %d structures, in its own environment", potential.imported["package"], len(check))
        answer = ask_reference(reference, name, tree.path, options, check, seconds=3600)
        potential.imported["verified"] = compare(potential, check, answer)
        theirs = predictions(answer, check, "float64" if "float64.energy" in answer else "native")
        stored = [a if deviates(p, _known(a), s.n_atoms, potential.dtype) is None else p  # where its rounding would be taken for a fault
                  for s, p, a in zip(check, potential.predict(check, batch_atoms=1), theirs, strict=True)]  # fmt: skip
    else:
        log.warning("unverified import: nobody compared it with its own package; --reference PYTHON does")
    save(potential, out, check=check if reference is not None else check[::4], stored=stored)
    return {
        "network": potential.model_config.name,
        "parameters": potential.num_parameters,
        "elements": " ".join(known),
        "cutoff_A": potential.cutoff,
        **{k: potential.imported[k] for k in ("package", "version", "file", "sha256")},
        "verified": "no" if reference is None else potential.imported["verified"],
        "out": str(out),
    }


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _pairs(given: Mapping[str, str] | Sequence[str] | str) -> dict[str, str]:
    """NAME=VALUE as a dictionary."""
    if isinstance(given, Mapping):
        return dict(given)
    pairs = listed("given", given, (str,), "NAME=VALUE")
    wrong = [text for text in pairs if "=" not in text]
    if wrong:
        raise ValueError(f"--given {wrong[0]}: expected NAME=VALUE.")
    return dict(text.split("=", 1) for text in pairs)


@torch.random.fork_rng(devices=[])  # as `load`
def read_potential(tree: Tree, options: ImportOptions) -> tuple[str, Potential]:
    """(source, potential) of an opened file.

    Raises:
        ValueError: no source knows it, or as the source's ``potential``.
    """
    for name, known in SOURCES.items():
        source = import_module(f"gossamer.imports.{name}")
        if _of_source(tree, source.recognises, tree):
            strange = [k for k in options.given if k not in known]
            if strange:
                raise ValueError(f"--given {strange[0]}: '{tree.path}' needs {', '.join(known) or 'nothing to be given'}.")
            return name, _of_source(tree, source.potential, tree, options)
    if tree.path.suffix == ".safetensors" and b"gossamer" in tree.head:
        raise ValueError(f"'{tree.path}' is a potential of gossamer's already: use it as it is.")
    packages = ", ".join(import_module(f"gossamer.imports.{name}").PACKAGE for name in SOURCES)
    inside = ", ".join(tree.members[:8]) or repr(tree.head[:24])
    raise ValueError(f"'{tree.path}' is of no kind that is known ({packages}). It holds {inside}.")


def _of_source(tree: Tree, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a source says of a file; where something that it counts on is not there, or is no tensor, the file is damaged or strange."""
    try:
        return function(*arguments)
    except (ImportError, OSError):
        raise
    except Exception as error:
        if type(error) is ValueError and str(tree.path) in str(error):
            raise
        if type(error) is ValueError:
            raise ValueError(f"'{tree.path}': {error}") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"'{tree.path}' is damaged, or of a kind that this gossamer does not know ({reason}). Use another copy."
        ) from error
