"""The published networks, to rounding, against stored outputs of their authors' code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_data

sys.path.insert(0, str(Path(__file__).parent / "reference"))
from compare import TOLERANCE, compare

HERE = Path(__file__).parent / "reference"
SCRIPT = HERE / "compare.py"


@pytest.mark.reference
@pytest.mark.parametrize(("name", "count"), [("leignn", 27), ("geodite", 12)])
def test_published_outputs(name: str, count: int) -> None:
    deviations = compare(shared_data("reference", f"{name}.npz"))
    assert len(deviations) == count
    assert max(deviations.values()) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "count"), [("nequip", 40), ("mace", 33), ("schnetpack", 7), ("weft", 3), ("weft_sums", 3), ("weft_decay", 3)]
)
def test_outputs_of_packages(name: str, count: int) -> None:
    """Stored in the repository with the scripts that made them (make_nequip.py, make_mace.py, make_schnetpack.py); Weft, ours: make_weft.py."""
    deviations = compare(HERE / f"{name}.npz")
    assert len(deviations) == count
    assert max(deviations.values()) < 1e-12


@pytest.mark.parametrize(
    ("name", "key"), [("nequip", "l2/forces"), ("mace", "MPA/Default/forces"), ("schnetpack", "painn/energy"), ("weft", "stress")]
)
@pytest.mark.thorough
def test_the_script_fails_on_altered_outputs(name: str, key: str, tmp_path: Path) -> None:
    data = dict(np.load(HERE / f"{name}.npz"))
    data[key] = data[key] * (1 + 1e-8)
    np.savez(tmp_path / "altered.npz", **data)
    result = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "altered.npz")], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "DEVIATES" in result.stdout
