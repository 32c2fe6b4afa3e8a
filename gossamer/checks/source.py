"""Who is judged: saved potentials of ours and ASE calculators named on the command line, as factories of calculators."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import logging
import math
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.abc import GetPropertiesMixin
from ase.data import atomic_numbers, chemical_symbols, covalent_radii

from gossamer.arguments import at_home, said
from gossamer.checks.candidate import SeenFrames
from gossamer.files import checksum

log = logging.getLogger(__name__)
FORM = "Write module:factory, module:factory(key=value) or name=module:factory, for example ase.calculators.emt:EMT or small=mace.calculators:mace_mp(model='small')."  # fmt: skip


@dataclass(frozen=True)
class SavedPotential:
    """Makes the calculator of one of our potentials; can be sent to other processes."""

    path: str
    device: str = "cpu"
    dtype: str | None = None
    way: Any = "auto"
    dispersion: str | None = None

    def __call__(self) -> Any:
        from gossamer.simulation.calculator import Calculator

        return Calculator(self.path, device=self.device, dtype=self.dtype, way=self.way, dispersion=self.dispersion)

    def in_double(self) -> Any:
        """The same in float64, plain: for questions to the function itself, not to its arithmetic."""
        return replace(self, dtype="float64", way="plain")()


@dataclass(frozen=True)
class AnyCalculator:
    """Makes a calculator from module:factory; can be sent to other processes."""

    text: str
    dispersion: str | None = None

    def __call__(self) -> Any:
        calculator = parse_calculator(self.text)[1]()
        if self.dispersion is None:
            return calculator
        from gossamer.simulation.dispersion import with_dispersion

        return with_dispersion(calculator, self.dispersion)


@dataclass(frozen=True)
class PotentialInMemory:
    """Makes calculators of one of our potentials that is no file."""

    potential: Any
    way: Any = "auto"
    dispersion: str | None = None

    def __call__(self) -> Any:
        from gossamer.simulation.calculator import Calculator

        return Calculator(self.potential, way=self.way, dispersion=self.dispersion)

    def in_double(self) -> Any:
        """As `SavedPotential.in_double`."""
        import torch

        return replace(self, potential=deepcopy(self.potential).to(torch.float64), way="plain")()


@dataclass(frozen=True)
class CalculatorInMemory:
    """Gives a calculator that was made elsewhere, without what it found before."""

    calculator: Any
    dispersion: str | None = None

    def __call__(self) -> Any:
        if hasattr(self.calculator, "reset"):
            self.calculator.reset()
        if self.dispersion is None:
            return self.calculator
        from gossamer.simulation.dispersion import with_dispersion

        return with_dispersion(self.calculator, self.dispersion)

    def probed(self, symbols: Sequence[str]) -> dict[str, float]:
        """Energies, eV, of four atoms of each element that it knows, at most `PROBED`: they tell it from another of its class."""
        found: dict[str, float] = {}
        for element in symbols:
            apart = 2 * covalent_radii[atomic_numbers[element]]
            four = Atoms(
                [element] * 4, apart * np.array([[0, 0, 0], [1.1, 0, 0], [0.4, 1.2, 0], [0.5, 0.3, 1.3]]), cell=[20.0] * 3, pbc=True
            )
            try:
                energy = float(self.calculator.get_potential_energy(four))
            except Exception as error:  # it may raise anything
                log.debug("%s: %s", element, error)
                continue
            if np.isfinite(energy):
                found[element] = energy
            if len(found) == PROBED:
                break
        return found

    def alike(self, energies: Mapping[str, float] | None) -> bool:
        """Whether it still has the energies that ``probed`` found."""
        before = energies or {}
        now = self.probed(list(before))
        return now.keys() == before.keys() and all(math.isclose(now[e], x, rel_tol=1e-5, abs_tol=1e-4) for e, x in before.items())

    def settings(self) -> dict[str, str]:
        """What it says of its own settings, as texts: ASE's parameters, of sums those of each part; nothing of calculators that have none."""
        parts = [self.calculator, *getattr(getattr(self.calculator, "mixer", None), "calcs", ())]
        found: dict[str, str] = {}
        for k, part in enumerate(parts):
            where = f"{type(part).__qualname__}-{k} " if k else ""
            found |= {f"{where}{name}": _as_text(value) for name, value in sorted((getattr(part, "parameters", None) or {}).items())}
        return found


def _as_text(value: Any) -> str:
    """A setting of a calculator, the same in every process: of objects what they say of themselves, or their class."""
    if isinstance(value, np.ndarray | np.generic):
        return _as_text(value.tolist())
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{key}: {_as_text(item)}" for key, item in value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_as_text, value)) + "]"
    if value is None or isinstance(value, str | bytes | bool | int | float | complex | Path):
        return str(value)
    if hasattr(value, "todict") and not isinstance(value, type):
        return f"{type(value).__qualname__} {_as_text(value.todict())}"
    return str(getattr(value, "__qualname__", type(value).__qualname__))


PROBED = 5
"""elements by which a calculator in memory is known again"""


@dataclass
class Source:
    """Where a candidate comes from, and what is known of it before it is asked."""

    name: str
    make: Callable[[], Any]
    fingerprint: str
    elements: list[str] | None = None
    cutoff: float | None = None
    conservative: bool | None = None
    run: Path | None = None
    """folder of the run that trained it, where its settings still are"""
    n_train: int | None = None
    """frames it was trained on, where it says so"""
    seen: SeenFrames | None = None
    """its training frames, if it remembers them"""
    ours: bool = False
    unverified: str | None = None
    """one line, where another package trained it and nobody compared the two"""
    device: str | None = None
    """where it runs, if it is one of ours"""


def find_sources(
    models: Sequence[Any],
    calculators: Sequence[Any],
    device: str = "cpu",
    dtype: str | None = None,
    way: str = "auto",
    dispersion: str | None = None,
) -> list[Source]:
    """Saved potentials ("[name=]FILE") and calculators ("[name=]module:factory"); or potentials and calculators in memory, (name, it).

    Raises:
        TypeError: a pair of which the second is neither.
        ValueError: nothing to judge, two of one name, a calculator that is not one, or options of potentials where there is none.
        FileNotFoundError: no such potential.
    """
    given = [
        (entry, isinstance(entry[1], GetPropertiesMixin) if isinstance(entry, tuple) else foreign)
        for several, foreign in ((models, False), (calculators, True))
        for entry in several
    ]
    if given and all(foreign for _, foreign in given):
        refuse_options(device, dtype, way)
    found = []
    for entry, foreign in given:
        if isinstance(entry, tuple):
            name, what = entry
            found.append(_in_memory(name, what, device, dtype, way, dispersion))
        elif foreign:
            name, _ = parse_calculator(entry)
            found.append(Source(name, AnyCalculator(entry, dispersion), fingerprint_of(entry) + _also(dispersion)))
        else:
            found.append(_saved(str(entry), device, dtype, way, dispersion))
    if not found:
        raise ValueError("There is nothing to judge: give a saved potential, or --calculator module:factory.")
    for source in found:
        source.name = re.sub(r"[^\w.+-]+", "_", source.name)
        if sum(s.name == source.name for s in found) > 1:
            raise ValueError(f"Two potentials are called '{source.name}'. Give them names: other={source.name} ...")
    return found


def refuse_options(device: str | None, dtype: str | None, way: str) -> None:
    """Raise ValueError for options that nothing would follow: there are only calculators, which run as they are made."""
    given = {"device": None if device == "cpu" else device, "dtype": dtype, "way": None if way == "auto" else way}
    said = [f"{name} {value}" for name, value in given.items() if value is not None]
    if said:
        raise ValueError(
            f"{', '.join(said)} would have no effect: saved potentials follow it, and there is none. A calculator runs as it is made: write "
            "module:factory(device='cuda'), or what its factory calls it."
        )


def _also(dispersion: str | None) -> str:
    """What dispersion adds to the fingerprint of what is judged."""
    return "" if dispersion is None else f" with D3 of {dispersion}"


def named_path(text: str) -> tuple[str, str]:
    """Name and path of a potential from ``[NAME=]PATH``; the path may hold a "=" of its own.

    Without a name it is that of the file, or of the run's folder where all files have one name.
    """
    name, equals, path = text.partition("=")
    if equals and "/" not in name and not Path(text).exists():
        return name, at_home(path)
    file = Path(text)
    return (file.resolve().parent.name if file.stem == "potential" else file.stem), text


def _saved(entry: str, device: str, dtype: str | None, way: str, dispersion: str | None) -> Source:
    """A saved potential from "[name=]FILE"."""
    name, path = named_path(entry)
    if ":" in path and not Path(path).exists():
        raise ValueError(f"'{path}' is not a file. For a calculator write --calculator {path}.")
    from gossamer.data.fingerprint import read_seen_frames
    from gossamer.potential_file import read_manifest, unverified

    manifest = read_manifest(path)
    file = Path(path)
    return Source(
        name, SavedPotential(path, device, dtype, way, dispersion),
        f"{manifest['checksum']}-{dtype}{'' if way == 'auto' else f'-{way}'}{_also(dispersion)}",
        elements=list(manifest["statistics"]["elements"]), cutoff=manifest["model"].get("cutoff"), conservative=bool(manifest["conservative"]),
        run=file.parent if (file.parent / "config.yaml").exists() else None, n_train=manifest["statistics"].get("n_structures") or None,
        seen=read_seen_frames(path), ours=True, unverified=unverified(manifest), device=device,
    )  # fmt: skip


def _in_memory(name: str, what: Any, device: str, dtype: str | None, way: str, dispersion: str | None) -> Source:
    """A calculator, or a potential, that is no file."""
    if isinstance(what, GetPropertiesMixin):
        kind = f"{type(what).__module__}.{type(what).__qualname__}"
        return Source(name, CalculatorInMemory(what, dispersion), f"{kind} in memory{_also(dispersion)}")
    from gossamer.potential import Potential
    from gossamer.potential_file import as_potential, unverified
    from gossamer.settings import to_dict
    from gossamer.simulation.calculator import digest_of

    if not isinstance(what, Potential):
        raise TypeError(f"{name}: expected a potential or an ASE calculator, found {said(what)}.")
    potential = as_potential(what, device, dtype)
    statistics = potential.statistics
    around = [to_dict(part) for part in (potential.model_config, potential.potential_config, statistics)] + [str(potential.terms)]
    settings = hashlib.sha256(json.dumps(around, sort_keys=True).encode()).hexdigest()[:12]
    return Source(
        name, PotentialInMemory(potential, way, dispersion), f"{digest_of(potential)}-{settings}-{potential.dtype}-{way}{_also(dispersion)}",
        elements=list(statistics.elements), cutoff=potential.cutoff, conservative=potential.conservative, n_train=statistics.n_structures or None,
        seen=potential.seen, ours=True, unverified=unverified({"imported": potential.imported}), device=str(potential.device),
    )  # fmt: skip


def parse_calculator(text: str) -> tuple[str, Callable[[], Any]]:
    """(name, factory) from ``[name=]module:factory`` or ``[name=]module:factory(key=value, ...)``; values are Python literals.

    The module is imported, and the factory is called later, so both are checked first: see `check_factory`.

    Raises:
        ValueError: not of this form, or the factory cannot be found or makes no calculators.
        ImportError: the module is not installed.
    """
    name, module, path, keywords = _parts(text)
    found = _import(text, module, path)
    check_factory(found, text)

    def make() -> Any:
        calculator = found(**keywords)
        if not isinstance(calculator, GetPropertiesMixin):
            raise ValueError(f"'{text}' made a {type(calculator).__name__}, which is not an ASE calculator.")
        return calculator

    return (name or path.split(".")[-1]), make


def fingerprint_of(text: str) -> str:
    """What a calculator depends on: its call, the contents of files that it names, the version of its package, a module of one's own.

    Raises:
        ValueError, ImportError: as `parse_calculator`.
    """
    _, module, path, keywords = _parts(text)
    _import(text, module, path)
    named = [v for value in keywords.values() for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, str)]
    files = [Path(v) for v in named if Path(v).is_file()]
    source = getattr(sys.modules[module], "__file__", None)
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")}
    if source is not None and not installed & set(Path(source).resolve().parents):
        files.append(Path(source))
    version = getattr(sys.modules.get(module.split(".")[0]), "__version__", "")
    call = text.rpartition("=")[2] if "(" not in text else text
    return " ".join([call, str(version), *(checksum(file)[:16] for file in files)])


def _parts(text: str) -> tuple[str, str, str, dict[str, Any]]:
    """Name (or ""), module, path of the factory in it, and keywords of a calculator's text."""
    head, _, rest = text.partition(":")
    name, _, module = head.rpartition("=")
    try:
        node = ast.parse(rest, mode="eval").body
        keywords: dict[str, Any] = {}
        if isinstance(node, ast.Call):
            if node.args or any(k.arg is None for k in node.keywords):
                raise ValueError("only key=value")
            keywords = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            node = node.func
        path = ast.unparse(node)
        if not module or not all(part.isidentifier() for part in (*path.split("."), *module.split("."))):
            raise ValueError("names")
    except (SyntaxError, ValueError):
        raise ValueError(f"'{text}' is not a calculator. {FORM}") from None
    return name, module, path, keywords


def _import(text: str, module: str, path: str) -> Any:
    """The object of a module, which may lie in the current folder."""
    sys.path.insert(0, "")  # as python -m would find it
    try:
        found: Any = import_module(module)
    except ImportError as error:
        raise ImportError(
            f"The module '{module}' of the calculator '{text}' cannot be imported ({error}). Install its package here."
        ) from None
    finally:
        sys.path.remove("")
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ValueError(
                f"'{module}' has no '{path}'. It has: {', '.join(n for n in dir(found) if not n.startswith('_'))[:300]}."
            ) from None
    return found


def check_factory(found: Any, text: str) -> None:
    """Refuse what makes no ASE calculator, before it is called.

    Allowed are classes of ASE calculators, their class methods, and Python functions defined in a module that also holds an
    ASE calculator class (defined or imported there): `mace.calculators:mace_mp` is one. Functions are announced in the log,
    since they are called whatever they do.

    Raises:
        ValueError: anything else, such as os.system.
    """
    if isinstance(found, type):
        if issubclass(found, GetPropertiesMixin):
            return
        raise ValueError(f"'{text}' names the class {found.__name__}, which is not an ASE calculator. {FORM}")
    if inspect.ismethod(found) and isinstance(found.__self__, type) and issubclass(found.__self__, GetPropertiesMixin):
        return
    if inspect.isfunction(found):
        home = sys.modules.get(found.__module__)
        if any(isinstance(v, type) and issubclass(v, GetPropertiesMixin) for v in vars(home or found).values()):
            log.info("calling the function %s of module %s for a calculator", found.__qualname__, found.__module__)
            return
        raise ValueError(
            f"'{text}' names a function of the module '{found.__module__}', which holds no ASE calculator: it is not called. "
            "If it makes one, import its class (or ase.calculators.calculator.Calculator) at the top of that module."
        )
    raise ValueError(f"'{text}' names a {type(found).__name__}, which makes no ASE calculator: it is not called. {FORM}")


def supported_elements(
    calculator: Any, symbols: Sequence[str] = chemical_symbols[1:95], refused: dict[str, str] | None = None
) -> list[str]:
    """The elements whose dimer (3 Å apart, in a box of 12 Å) the calculator evaluates to a finite energy; ``refused`` gets what it says of others."""
    found = []
    refused = {} if refused is None else refused
    for element in symbols:
        try:
            pair = Atoms([element] * 2, [[0, 0, 0], [3.0, 0, 0]], cell=[12.0] * 3, pbc=True)
            pair.calc = calculator
            energy = pair.get_potential_energy()
            if np.isfinite(energy):
                found.append(element)
            else:
                refused[element] = f"an energy of {energy}"
        except Exception as error:
            log.debug("%s: %s", element, error)
            refused[element] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found
