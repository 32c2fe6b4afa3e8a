"""The published LEIGNN, to rounding, against stored outputs of the authors' code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_data

sys.path.insert(0, str(Path(__file__).parent / "reference"))
from compare import TOLERANCE, compare

SCRIPT = Path(__file__).parent / "reference" / "compare.py"


@pytest.mark.reference
def test_published_leignn() -> None:
    deviations = compare(shared_data("reference", "leignn.npz"))
    assert len(deviations) == 27
    assert max(deviations.values()) < TOLERANCE


@pytest.mark.reference
def test_the_script_fails_on_altered_outputs(tmp_path: Path) -> None:
    data = dict(np.load(shared_data("reference", "leignn.npz")))
    data["vanilla/energy"] = data["vanilla/energy"] * (1 + 1e-8)
    np.savez(tmp_path / "altered.npz", **data)
    result = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "altered.npz")], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "DEVIATES" in result.stdout
