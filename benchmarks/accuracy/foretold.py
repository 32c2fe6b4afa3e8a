"""How well the error at the end of a run is foretold while it trains (`gossamer.training.progress.expected_error`).

    python benchmarks/accuracy/foretold.py RUN [RUN ...]

RUN: folders of finished runs of a given time. For each validation the force error foretold for the end, over the one that came;
the last lines say how far off they were, by the share of the run that had passed. Written to foretold.json beside the errors it was found from.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from gossamer.config import load_config
from gossamer.training.progress import expected_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    runs, found = [], []
    for folder in parser.parse_args().runs:
        with open(folder / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        seconds, errors = ([float(row[key]) for row in rows] for key in ("seconds", "valid_forces_mae"))
        shares = [t / seconds[-1] for t in seconds]
        foretold = [expected_error(shares[: k + 1], errors[: k + 1]) for k in range(len(rows))]
        ratios = [(s, f / errors[-1]) for s, f in zip(shares, foretold, strict=True) if f is not None]
        found += ratios
        config = load_config(folder / "config.yaml")
        runs.append({
            "network": config.model.name, "data": Path(str(config.data.train)).name, "seconds": round(seconds[-1], 1),
            "shares": [round(s, 3) for s in shares], "forces_mae_meV_per_A": [round(e, 3) for e in errors],
        })  # fmt: skip
        print(f"{runs[-1]['network']}, {runs[-1]['data']}:", "  ".join(f"{s:.2f} {r:.2f}" for s, r in ratios))
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        later = [abs(r - 1) for s, r in found if s >= share]
        print(f"from {share} of the run on: at most {100 * max(later):.0f} % off, {len(later)} times foretold")
    Path(__file__).with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
