"""Is the curve of an atom that leaves a pair broken, or steep? Its largest jumps in float64, looked at closer and closer.

    python benchmarks/reliability/closer.py POTENTIAL ELEMENT ELEMENT

Where it is smooth, what seems a jump of the third derivative shrinks eightfold each time one looks twice closer; a jump stays. The curve is
that of the judge's smoothness.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

import gossamer
from gossamer.checks.smoothness import along, largest_jump, leaving_atom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("potential")
    parser.add_argument("elements", nargs=2, help="the atom that leaves, and the one it leaves")
    arguments = parser.parse_args()
    calculator = gossamer.Calculator(arguments.potential, dtype="float64", way="plain")
    start, pull, lengths = leaving_atom(*arguments.elements, calculator.potential.cutoff)
    places = lengths
    for _ in range(8):
        spacing = float(places[1] - places[0])
        slopes = along(calculator, start, pull, places - 1.0)[1]
        (stiffness, _), (third, k) = (largest_jump(slopes, spacing, order) for order in (1, 2))
        print(json.dumps({"spacing_A": float(f"{spacing:.3g}"), "stiffness_eV_per_A2": float(f"{stiffness:.3g}"),
                          "third_derivative_eV_per_A3": float(f"{third:.3g}"), "at_A": round(float(places[k]), 4)}))  # fmt: skip
        places = places[k] + np.arange(-24, 25) * spacing / 2


if __name__ == "__main__":
    main()
