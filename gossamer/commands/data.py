"""Commands on data: data inspect, data convert."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gossamer.commands.common import Command, add_json, add_labels, label_config, show, show_help
from gossamer.quantities import QUANTITIES


def _data_parser(data: argparse.ArgumentParser) -> None:
    actions = data.add_subparsers(dest="action", metavar="ACTION")
    data.set_defaults(parser=data)
    text = "What is in a data file; exit status 1 when training on it would be wrong."
    inspect = actions.add_parser("inspect", help=text, description=text)
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("data", nargs="+", help="labelled structures: files or folders")
    add_labels(inspect, weighed=True)
    add_json(inspect)
    text = "Stream data into a store (a folder of arrays, read from disk by index), or into extended XYZ."
    convert = actions.add_parser("convert", help=text, description=text)
    convert.set_defaults(run=_convert)
    convert.add_argument("data", nargs="+", help="files or folders")
    convert.add_argument("--out", required=True, help="folder to make; or, if it ends with .extxyz or .xyz, a file of extended XYZ")
    convert.add_argument(
        "--legacy-lmdb", action="store_true", help="the files are LMDBs of pickled graphs (read with a restricted unpickler)"
    )
    convert.add_argument(
        "--require",
        nargs="+",
        choices=list(QUANTITIES),
        metavar="LABEL",
        help="leave out frames of which one of these (energy, forces, stress) is missing or broken: not finite, no numbers, of weight 0, forces all "
        "zero, electrons not converged; says how many, and why",
    )
    convert.add_argument(
        "--left-out", metavar="FILE", help="extended XYZ to write what --require leaves out to, each frame with the reason"
    )
    convert.add_argument("--drop-duplicates", action="store_true", help="leave out all but the first of equal structures")
    convert.add_argument(
        "--subtract-dispersion",
        metavar="FUNCTIONAL",
        help="take D3 of this functional (pbe, pbe/zero ...) off energies, forces and stresses",
    )
    add_labels(convert, weighed=True)
    add_json(convert)


def _inspect(arguments: argparse.Namespace) -> int:
    from gossamer.data.inspection import inspect

    report = inspect(arguments.data[0] if len(arguments.data) == 1 else arguments.data, label_config(arguments))
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
    from gossamer.data.store import Store, write_store, write_xyz

    keep_broken = arguments.require is not None
    if arguments.left_out is not None and not keep_broken:
        raise ValueError("--left-out writes what --require leaves out: say which labels (--require energy forces).")
    if arguments.legacy_lmdb:
        from gossamer.data.labels import refuse_unread
        from gossamer.data.legacy import read_legacy_lmdb

        for path in arguments.data:
            refuse_unread(label_config(arguments), f"'{path}'", ())
        structures: Any = (s for path in arguments.data for s in read_legacy_lmdb(path, keep_broken))
    else:
        from gossamer.data.readers import read_structures

        structures = read_structures(arguments.data, label_config(arguments), keep_broken)
    from gossamer.data.duplicates import without_duplicates
    from gossamer.data.inspection import with_remarks_told
    from gossamer.data.sound import LeftOut, with_sound_labels

    left_out = LeftOut()
    if keep_broken:
        structures = with_sound_labels(structures, arguments.require, left_out, arguments.left_out)
    structures = with_remarks_told(structures)
    if arguments.drop_duplicates:
        structures = without_duplicates(structures)
    answer: dict[str, Any] = {}
    if arguments.subtract_dispersion is not None:
        from gossamer.dispersion import subtract_dispersion

        structures = subtract_dispersion(structures, arguments.subtract_dispersion)
        answer |= {"train with": f"data.dispersion=none data.functional={arguments.subtract_dispersion.partition('/')[0]}"}
    if arguments.out.endswith((".xyz", ".extxyz")):
        stores = [Store(path) for path in arguments.data if (Path(path) / "store.json").exists()]
        count = write_xyz(structures, arguments.out, arguments.weight is not None or any(store.weighted for store in stores))
    else:
        count = write_store(structures, arguments.out)
    if keep_broken and arguments.json:
        answer |= {"left_out": left_out.to_dict()}
    elif keep_broken:
        answer |= {"left out": left_out.n_frames}
        answer |= {f"  {reason}": f"{n}; the first: {first}" for reason, (n, first) in left_out.reasons.items()}
    if left_out.n_frames and arguments.left_out is not None:
        answer |= {"left_out_to" if arguments.json else "left out to": arguments.left_out}
    show(arguments, {"structures": count, "out": arguments.out, **answer})
    return 0


COMMANDS = [
    Command("data", _data_parser, show_help, "Look at data, convert data."),
]
