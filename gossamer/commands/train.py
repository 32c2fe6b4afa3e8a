"""Commands that train: train, fit, learn."""

from __future__ import annotations

import argparse
from typing import Any

from gossamer.commands.common import Command, add_json, add_labels, label_config, print_errors, show
from gossamer.signals import STOPPED


def _train_parser(train: argparse.ArgumentParser) -> None:
    train.add_argument("config", help="YAML file with the settings")
    train.add_argument("overrides", nargs="*", default=[], metavar="path.to.key=value", help="settings that replace those of the file")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint of the run")
    add_json(train)


def _train(arguments: argparse.Namespace) -> int:
    from gossamer.runs import train

    return _trained(arguments, train(arguments.config, arguments.overrides, arguments.resume))


def _fit_parser(fit: argparse.ArgumentParser) -> None:
    fit.add_argument("data", help="labelled structures")
    fit.add_argument(
        "--model",
        help="network: leignn, nequip, geodite, mace, painn, schnet, sevennet, weft, or a preset such as nequip/M (default: weft, which ends lowest)",
    )
    size = fit.add_mutually_exclusive_group()
    size.add_argument("--speed", action="store_true", help="half of its channels: dynamics of many atoms in 0.7 of the time")
    size.add_argument(
        "--accuracy",
        action="store_true",
        help="features of degree 3 as well: smaller errors (50 frames of ethanol: by a tenth), dynamics of many atoms in 1.8 times the time",
    )
    fit.add_argument("--out", default="fit", help="folder of the run (default: fit)")
    fit.add_argument("--minutes", type=float, help="how long to train (default: 30)")
    fit.add_argument("--resume", action="store_true", help="go on from the checkpoint of the run, with the options that began it")
    fit.add_argument("--force", action="store_true", help="train even if the data looks wrong")
    fit.add_argument(
        "--functional", help="of the labels (pbe, r2scan ...): kept with the potential, asked for by --dispersion of its users"
    )
    fit.add_argument("--dispersion", choices=["none", "included"], help="whether the labels hold a dispersion correction")
    tune = fit.add_argument_group("fine-tuning", "start from a saved potential")
    tune.add_argument("--start", metavar="POTENTIAL", help="saved potential whose weights training starts from")
    tune.add_argument("--weights", nargs="+", metavar="NAME", help="train only these weights (wildcards); the others stay frozen")
    tune.add_argument("--low-rank", type=int, metavar="RANK", help="train low-rank adapters; the weights themselves stay frozen")
    tune.add_argument("--replay", metavar="DATA", help="labelled structures of the old data to mix in, so that they are not forgotten")
    add_labels(fit, weighed=True)
    add_json(fit)


def _fit(arguments: argparse.Namespace) -> int:
    from gossamer.fitting import fit

    answer = fit(
        arguments.data, arguments.model, arguments.out, arguments.minutes, label_config(arguments), arguments.resume, arguments.force,
        arguments.start, arguments.weights, arguments.low_rank, arguments.replay, arguments.speed, accuracy=arguments.accuracy,
        functional=arguments.functional, dispersion=arguments.dispersion,
    )  # fmt: skip
    return _trained(arguments, answer)


def _trained(arguments: argparse.Namespace, answer: dict[str, Any]) -> int:
    if not answer.keys() & {"stopped", "valid"}:  # the first process of the run says it
        return 0
    if arguments.json or "stopped" in answer:
        show(arguments, answer)
        return STOPPED if "stopped" in answer else 0
    print(f"trained {answer['steps']} step{'s' * (answer['steps'] != 1)} in {answer['seconds']:.0f} s; everything is in '{answer['out']}'")
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


def _learn_parser(learn: argparse.ArgumentParser) -> None:
    from gossamer.flags import add_flags
    from gossamer.simulation.options import LearnConfig

    learn.add_argument("start", help="saved potential with an uncertainty")
    learn.add_argument("structures", nargs="+", help="structure files from whose first frames walks start")
    learn.add_argument("--label", required=True, metavar="MODULE:FACTORY", help="ASE calculator that labels, as gossamer judge takes them")
    learn.add_argument("--data", help="labelled frames that the start was trained on, by the same method")
    add_flags(learn, LearnConfig)
    add_json(learn)


def _learn(arguments: argparse.Namespace) -> int:
    from gossamer.flags import from_flags
    from gossamer.learning import labelled_in, learn
    from gossamer.simulation.options import LearnConfig

    answer = learn(arguments.start, arguments.structures, arguments.label, arguments.data, from_flags(LearnConfig, arguments))
    if arguments.json:
        show(arguments, answer)
    else:
        said = "its walks meet hardly anything uncertain" if answer["held"] else "its walks still meet what it does not know: more --rounds"
        print(f"{labelled_in(answer['n_labelled'], answer['rounds'])}; {said}")
        print(f"potential.safetensors and report.html are in '{answer['out']}'")
    return 0 if answer["held"] else 1


COMMANDS = [
    Command("train", _train_parser, _train, "Train a potential from a YAML file."),
    Command("fit", _fit_parser, _fit, "Train a potential on a labelled file; the settings are chosen and written down."),
    Command(
        "learn", _learn_parser, _learn, "Active learning: walk, label what is uncertain, fine-tune, again. Exit status 1 if not enough."
    ),
]
