"""Commands that run a potential: predict, md, relax, screen."""

from __future__ import annotations

import argparse
import json

from gossamer.commands.common import Command, add_json, add_way, show, show_help
from gossamer.screening import command as screening
from gossamer.signals import STOPPED


def _predict_parser(predict: argparse.ArgumentParser) -> None:
    predict.add_argument("model", help="saved potential")
    predict.add_argument("structures", nargs="+", help="structure files (or folders, stores); all of their frames")
    predict.add_argument("--out", default="predicted.extxyz", help="extended XYZ file to write (default: predicted.extxyz)")
    predict.add_argument("--device", default="cpu", help="default: cpu")
    predict.add_argument("--dtype", choices=["float32", "float64"], help="default: as saved")
    add_way(predict)
    predict.add_argument("--dispersion", metavar="FUNCTIONAL", help="functional whose D3 is added: pbe, r2scan ...")
    predict.add_argument(
        "--features", action="store_true", help="also write the last features of every atom, by which environments can be told apart"
    )
    predict.add_argument("--batch-atoms", type=int, default=2048, help="atoms evaluated at once (default: 2048)")
    add_json(predict)


def _predict(arguments: argparse.Namespace) -> int:
    from gossamer.predicting import predict

    answer = predict(
        arguments.model, arguments.structures, arguments.out, arguments.device, arguments.dtype, arguments.way, arguments.dispersion,
        arguments.features, arguments.batch_atoms,
    )  # fmt: skip
    show(arguments, answer)
    return 0


def _md_parser(md: argparse.ArgumentParser) -> None:
    from gossamer.flags import add_flags
    from gossamer.simulation.options import MDConfig

    md.add_argument("model", help="saved potential")
    md.add_argument("structure", nargs="+", help="structure files; several each get a folder within the folder --out")
    add_flags(md, MDConfig)
    add_json(md)


def _md(arguments: argparse.Namespace) -> int:
    from gossamer.flags import from_flags
    from gossamer.simulation.md import md
    from gossamer.simulation.md_files import md_files
    from gossamer.simulation.options import MDConfig

    config = from_flags(MDConfig, arguments)
    if len(arguments.structure) == 1 and not config.all_frames and config.engine == "ase":
        answer = md(arguments.model, arguments.structure[0], config)
        show(arguments, answer)
        return STOPPED if answer["stopped"] else 1 if answer["broken"] or answer["uncertain"] else 0
    answers = md_files(arguments.model, arguments.structure, config)
    if arguments.json:
        print(json.dumps(answers))
    else:
        for found in answers:
            said = (
                found.get("error")
                or found["broken"]
                or found["uncertain"]
                or f"{_kelvin(found['mean_temperature_K'])} over {found['time_ps']:g} ps"
            )
            print(f"{found['structure']}: {said}")
        print(f"everything is in '{config.out}'")
    if any(found.get("stopped") for found in answers):
        return STOPPED
    return 1 if any(found.get("error") or found["broken"] or found["uncertain"] for found in answers) else 0


def _kelvin(mean: float | None) -> str:
    """A run whose log was lost, and which has nothing left to do, has no mean."""
    return "no frames" if mean is None else f"{mean:.4g} K"


def _relax_parser(relax: argparse.ArgumentParser) -> None:
    from gossamer.flags import add_flags
    from gossamer.simulation.options import RelaxConfig

    relax.add_argument("model", help="saved potential")
    relax.add_argument("structure", nargs="+", help="structure files; several are relaxed one after the other into the folder --out")
    add_flags(relax, RelaxConfig)
    add_json(relax)


def _relax(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from gossamer.flags import from_flags
    from gossamer.simulation.options import RelaxConfig
    from gossamer.simulation.relax import relax, relax_files

    several = len(arguments.structure) > 1 or bool(arguments.all_frames) or arguments.engine == "torchsim"
    out = arguments.out or Path("relaxed" if several else "relaxed.extxyz")
    config = from_flags(RelaxConfig, arguments, out=out)
    if not several:
        answer = relax(arguments.model, arguments.structure[0], config)
        del answer["atoms"]
        show(arguments, {**answer, "out": str(out)})
        return STOPPED if answer["stopped"] else 0 if answer["converged"] else 1
    answers = relax_files(arguments.model, arguments.structure, config)
    if arguments.json:
        print(json.dumps(answers))
    else:
        for found in answers:
            steps = f" in {found['steps']} step{'s' * (found['steps'] != 1)}" if "steps" in found else ""
            said = found.get("error") or (f"{'converged' if found['converged'] else 'NOT converged'}{steps}, "
                                          f"{found['energy_eV']:.6f} eV, largest force {found['max_force_eV_per_A']:.3g} eV/Å")  # fmt: skip
            print(f"{found['structure']}: {said}")
        print(f"everything is in '{out}'")
    if any(found.get("stopped") for found in answers):
        return STOPPED
    return 0 if all(found["converged"] for found in answers) else 1


COMMANDS = [
    Command("predict", _predict_parser, _predict, "Energies, forces, stresses and uncertainties of structures, into one file."),
    Command("md", _md_parser, _md, "Molecular dynamics."),
    Command("relax", _relax_parser, _relax, "Relax positions, and the cell with --cell, of one structure or several."),
    Command("screen", screening.add_options, show_help, "One task on thousands of structures, on this machine or on Slurm; restartable."),
]
