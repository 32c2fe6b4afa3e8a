"""The command line: each command parses, calls one public function of the same parameter names, and prints."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from typing import Any

from gossamer import __version__


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 the answer is no (bad data, broken run), 2 wrong use."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        return int(arguments.run(arguments))
    except (ValueError, FileNotFoundError, FileExistsError, ImportError, RuntimeError) as error:
        print(f"gossamer {arguments.command}: {error}", file=sys.stderr)
        if vars(arguments).get("json"):
            print(json.dumps({"error": str(error)}))
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options; importing nothing heavy."""
    parser = argparse.ArgumentParser(prog="gossamer", description="Train, judge and run lightweight equivariant interatomic potentials.")
    parser.add_argument("--version", action="version", version=f"gossamer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, "Train a potential from a YAML file.")
    train.add_argument("config", help="YAML file with the settings")
    train.add_argument("overrides", nargs="*", metavar="path.to.key=value", help="settings that replace those of the file")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint of the run")
    _common(train)

    fit = command("fit", _fit, "Train a potential on a labelled file; the settings are chosen and written down.")
    fit.add_argument("data", help="labelled structures")
    fit.add_argument("--model", help="network: leignn, nequip, geodite, painn, schnet, or a preset such as nequip/M (default: leignn)")
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

    evaluate = command("evaluate", _evaluate, "Errors of a potential on labelled data.")
    evaluate.add_argument("model", help="saved potential")
    evaluate.add_argument("data", help="labelled structures")
    evaluate.add_argument("--out", help="folder for errors.json and worst.extxyz (default: beside the potential)")
    evaluate.add_argument("--worst", type=int, default=20, help="frames with the largest errors to write (default: 20)")
    evaluate.add_argument("--device", default="cpu", help="default: cpu")
    evaluate.add_argument("--include-training", action="store_true", help="count the frames that the potential was trained on, too")
    _labels(evaluate)
    _common(evaluate)

    compare = command("compare", _compare, "Train several models for the same time on the same data; one table and a plot.")
    compare.add_argument("configs", nargs="+", help="YAML files with the settings of each")
    compare.add_argument("--minutes", type=float, default=10.0, help="time for each (default: 10)")
    compare.add_argument("--out", default="comparison", help="folder of the runs and the table (default: comparison)")
    compare.add_argument("--resume", action="store_true", help="keep the finished runs of the folder, go on with one that was cut")
    _common(compare)

    _bench_parser(command("bench", _bench, "Time and memory of energy and forces against the number of atoms."))
    _judge_parser(command("judge", _judge, "Is a potential, ours or anyone's, fit for use? One report; exit status 1 if a check failed."))

    md = command("md", _md, "Molecular dynamics.")
    md.add_argument("model", help="saved potential")
    md.add_argument("structure", help="structure file (first frame)")
    md.add_argument("--temperature", type=float, default=300.0, help="K (default: 300)")
    md.add_argument("--steps", type=int, default=1000, help="time steps in all (default: 1000)")
    md.add_argument("--timestep", type=float, default=0.5, help="fs (default: 0.5)")
    md.add_argument("--ensemble", choices=["nve", "langevin", "nose-hoover", "npt"], default="langevin", help="default: langevin")
    md.add_argument("--out", default="md", help="folder of the results (default: md)")
    md.add_argument("--interval", type=int, default=20, help="steps between frames (default: 20)")
    md.add_argument("--pressure", type=float, default=0.0, help="GPa, for npt (default: 0)")
    md.add_argument("--thermostat-time", type=float, default=100.0, help="fs (default: 100)")
    md.add_argument("--barostat-time", type=float, default=1000.0, help="fs (default: 1000)")
    md.add_argument("--seed", type=int, default=0, help="of velocities and noise (default: 0)")
    md.add_argument("--max-temperature", type=float, help="K at which to stop (default: 5 times the temperature + 500)")
    md.add_argument("--max-bond-stretch", type=float, help="Å by which a bond may change before the run stops (default: not watched)")
    md.add_argument("--device", default="cpu", help="default: cpu")
    md.add_argument("--dtype", choices=["float32", "float64"], help="default: as saved")
    md.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="run a compiled program (default: if one is cached, or the run is long enough to pay for it)",
    )
    md.add_argument("--resume", action="store_true", help="go on where the run stopped, bit for bit")
    _common(md)

    relax = command("relax", _relax, "Relax positions, and the cell with --cell.")
    relax.add_argument("model", help="saved potential")
    relax.add_argument("structure", help="structure file (first frame)")
    relax.add_argument("--fmax", type=float, default=0.01, help="eV/Å (default: 0.01)")
    relax.add_argument("--steps", type=int, default=500, help="most steps (default: 500)")
    relax.add_argument("--cell", action="store_true", help="relax the cell too")
    relax.add_argument("--optimizer", choices=["fire", "lbfgs"], default="fire", help="default: fire")
    relax.add_argument("--resume", action="store_true", help="go on where the relaxation stopped (same structure and options)")
    relax.add_argument("--out", default="relaxed.extxyz", help="relaxed structure (default: relaxed.extxyz)")
    relax.add_argument("--device", default="cpu", help="default: cpu")
    relax.add_argument("--dtype", choices=["float32", "float64"], help="default: as saved")
    _common(relax)

    export = command("export", _export, "Compile a potential into a program that runs without gossamer (.pt2).")
    export.add_argument("model", help="saved potential")
    export.add_argument("out", help="file to make (.pt2)")
    export.add_argument("--structure", help="structure to trace and compare with (default: a small cluster of its elements)")
    export.add_argument("--device", default="cpu", help="kind of device it will run on (default: cpu)")
    export.add_argument("--dtype", choices=["float32", "float64"], help="default: as saved")
    _common(export)

    info = command("info", _info, "The manifest of a saved potential.")
    info.add_argument("model", help="saved potential")
    info.add_argument("--weights", action="store_true", help="also list the weights: names (for fine-tuning) and shapes")
    _common(info)

    data = command("data", _data_help, "Look at data, convert data.")
    actions = data.add_subparsers(dest="action", metavar="ACTION")
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
    _labels(convert)
    _common(convert)
    data.set_defaults(parser=data)
    return parser


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
    bench.add_argument("--way", choices=["auto", "plain", "kernels", "program", "graph"], default="auto",
                       help="how our potentials are evaluated (default: auto)")  # fmt: skip
    bench.add_argument("--device", default="cpu", help="of our potentials (default: cpu)")
    bench.add_argument("--dtype", choices=["float32", "float64"], help="of our potentials (default: as saved)")
    bench.add_argument("--out", default="bench", help="folder of bench.json, bench.md and bench.png (default: bench)")
    _common(bench)


def _judge_parser(judge: argparse.ArgumentParser) -> None:
    from gossamer.checks.config import GROUPS, JudgeConfig
    from gossamer.settings import add_flags, describe

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


def _labels(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labels", "names and units in the data")
    for name in ("energy", "forces", "stress"):
        group.add_argument(f"--{name}", metavar="NAME", help=f"name of the {name} (default: {name})")
    group.add_argument("--virial", metavar="NAME", help="name of a virial to read instead of a stress (stress = -virial / volume)")
    group.add_argument("--energy-unit", help="eV, meV, Hartree, Ry, kcal/mol, kJ/mol (of energies and virials)")
    group.add_argument("--length-unit", help="Angstrom, Bohr, nm (of positions and cell)")
    group.add_argument("--force-unit", help="eV/Angstrom, Hartree/Bohr, kcal/mol/Angstrom ... (default: energy unit / length unit)")
    group.add_argument("--stress-unit", help="eV/Angstrom^3, Hartree/Bohr^3, Ry/Bohr^3, GPa, kbar, bar")
    group.add_argument("--stress-sign", help="ase (tension positive) or vasp")
    group.add_argument("--group", help="entry that says which frames belong together")


def _label_config(arguments: argparse.Namespace) -> Any:
    from gossamer.data.readers import LabelConfig
    from gossamer.settings import build

    names = ("energy", "forces", "stress", "virial", "energy_unit", "length_unit", "force_unit", "stress_unit", "stress_sign", "group")
    return build(LabelConfig, {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}, "labels")


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
    from gossamer.runs import fit

    answer = fit(
        arguments.data, arguments.model, arguments.out, arguments.minutes, _label_config(arguments), arguments.resume, arguments.force,
        arguments.start, arguments.weights, arguments.low_rank, arguments.replay,
    )  # fmt: skip
    return _trained(arguments, answer)


def _trained(arguments: argparse.Namespace, answer: dict[str, Any]) -> int:
    if arguments.json or "stopped_at_step" in answer:
        _show(arguments, answer)
        return 0
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
        arguments.model, arguments.data, _label_config(arguments), out, arguments.worst, arguments.device,
        include_training=arguments.include_training,
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
    from gossamer.settings import from_flags

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
    from gossamer.simulation.md import md

    names = ("temperature", "steps", "timestep", "ensemble", "out", "interval", "pressure", "thermostat_time", "barostat_time", "seed",
             "resume", "max_temperature", "max_bond_stretch", "device", "dtype", "compiled")  # fmt: skip
    answer = md(arguments.model, arguments.structure, **{n: getattr(arguments, n) for n in names})
    _show(arguments, answer)
    return 1 if answer["broken"] else 0


def _relax(arguments: argparse.Namespace) -> int:
    from gossamer.simulation.relax import relax

    names = ("fmax", "steps", "cell", "optimizer", "out", "resume", "device", "dtype")
    answer = relax(arguments.model, arguments.structure, **{n: getattr(arguments, n) for n in names})
    del answer["atoms"]
    _show(arguments, {**answer, "out": arguments.out})
    return 0 if answer["converged"] else 1


def _export(arguments: argparse.Namespace) -> int:
    from gossamer.engine.program import export

    answer = export(arguments.model, arguments.out, arguments.structure, arguments.device, arguments.dtype)
    if not arguments.json:
        print("A compiled potential is a program: load only those you trust. It runs on this kind of machine and this PyTorch only.")
    _show(arguments, answer)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from gossamer.potential_file import read_manifest, weight_shapes

    manifest = read_manifest(arguments.model)
    if arguments.weights:
        manifest["weights"] = weight_shapes(arguments.model)
    if arguments.json:
        print(json.dumps(manifest))
        return 0
    import yaml

    if not manifest["conservative"]:
        print("# forces are predicted directly: they are NOT the gradient of the energy")
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
    count = write_store(structures, arguments.out)
    _show(arguments, {"structures": count, "out": arguments.out})
    return 0


def _data_help(arguments: argparse.Namespace) -> int:
    arguments.parser.print_help()
    return 2


if __name__ == "__main__":
    sys.exit(main())
