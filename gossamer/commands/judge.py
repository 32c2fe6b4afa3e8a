"""Commands that measure how good and how fast potentials are: evaluate, compare, bench, judge."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys

from gossamer.commands.common import Command, add_json, add_labels, add_way, label_config, print_errors


def _evaluate_parser(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("model", help="saved potential")
    evaluate.add_argument("data", help="labelled structures")
    evaluate.add_argument("--out", help="folder for errors.json, worst.extxyz and uncertainty.png (default: beside the potential)")
    evaluate.add_argument("--worst", type=int, default=20, help="frames with the largest errors to write (default: 20)")
    evaluate.add_argument("--device", default="cpu", help="default: cpu")
    add_way(evaluate)
    evaluate.add_argument("--dispersion", metavar="FUNCTIONAL", help="functional whose D3 is added to the predictions: pbe, r2scan ...")
    evaluate.add_argument("--include-training", action="store_true", help="count the frames that the potential was trained on, too")
    add_labels(evaluate)
    add_json(evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from gossamer.accuracy import evaluate

    out = arguments.out or str(Path(arguments.model).parent / "evaluation")
    evaluation = evaluate(
        arguments.model, arguments.data, label_config(arguments), out, arguments.worst, arguments.device, arguments.way,
        arguments.include_training, arguments.dispersion,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps({**evaluation.summary(), "out": out}))
    else:
        for note in evaluation.notes:
            print(f"  {note}")
        print_errors(evaluation.summary())
        n = min(arguments.worst, len(evaluation.frames))
        print(f"  the {f'{n} worst frames are' if n != 1 else 'worst frame is'} in '{out}/worst.extxyz'")
    return 0


def _compare_parser(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("configs", nargs="+", help="YAML files with the settings of each")
    compare.add_argument("--minutes", type=float, default=10.0, help="time for each (default: 10)")
    compare.add_argument("--out", default="comparison", help="folder of the runs and the table (default: comparison)")
    compare.add_argument("--resume", action="store_true", help="keep the finished runs of the folder, go on with one that was cut")
    add_json(compare)


def _compare(arguments: argparse.Namespace) -> int:
    from gossamer.comparison import compare, table

    records = compare(arguments.configs, arguments.minutes, arguments.out, arguments.resume)
    if arguments.json:
        print(json.dumps(records))
    else:
        print(table(records))
        print(f"table, plot and runs are in '{arguments.out}'")
    return 0


def _bench_parser(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("models", nargs="*", default=[], metavar="[NAME=]POTENTIAL", help="saved potentials")
    bench.add_argument("--calculator", action="append", default=[], metavar="[NAME=]MODULE:FACTORY",
                       help="any ASE calculator, as gossamer judge takes them; can be given several times")  # fmt: skip
    bench.add_argument(
        "--structure",
        help="file whose first frame is repeated (default: one that the potential's file holds, else a simple crystal or molecule)",
    )
    bench.add_argument("--sizes", nargs="+", type=int, default=[100, 300, 1000, 3000, 10_000, 30_000, 100_000], metavar="ATOMS",
                       help="least numbers of atoms, reached by whole supercells; a molecule stays one (default: 100 to 100000)")  # fmt: skip
    bench.add_argument("--seconds", type=float, default=10.0, help="longest single evaluation; larger systems are left out (default: 10)")
    bench.add_argument(
        "--threads", type=int, help="of PyTorch and OpenMP; with 1, CPU time is taken, else wall time (default: as they find)"
    )
    add_way(bench)
    bench.add_argument("--device", default="cpu", help="of our potentials (default: cpu)")
    bench.add_argument("--dtype", choices=["float32", "float64"], help="of our potentials (default: as saved)")
    bench.add_argument("--out", default="bench", help="folder of bench.json, bench.md and bench.png (default: bench)")
    add_json(bench)


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
    add_json(judge)


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


COMMANDS = [
    Command("evaluate", _evaluate_parser, _evaluate, "Errors of a potential on labelled data."),
    Command("compare", _compare_parser, _compare, "Train several models for the same time on the same data; one table and a plot."),
    Command("bench", _bench_parser, _bench, "Time and memory of energy and forces against the number of atoms."),
    Command("judge", _judge_parser, _judge, "Is a potential, ours or anyone's, fit for use? One report; exit status 1 if a check failed."),
]
