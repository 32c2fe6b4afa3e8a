"""Checks of the judge on labelled data and on the Matbench Discovery protocol."""

from __future__ import annotations

import csv
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from broken_calculators import Defect, by_name, candidate_of
from conftest import shared_data

from gossamer.checks import (
    discovery,
    errors,
)

# --- errors ---------------------------------------------------------------------------------------------------------


def labelled(shift: float = 0.0, noise: float = 0.0, n: int = 6) -> list[Atoms]:
    rng = np.random.default_rng(1)
    frames = []
    for k in range(n):
        atoms = bulk("Cu", cubic=True) if k % 2 else bulk("Al", cubic=True)
        atoms.rattle(0.1, seed=k)
        atoms.calc = EMT()
        energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        frame = atoms.copy()
        per_element = {"Cu": 1.0, "Al": 2.0}[atoms.get_chemical_symbols()[0]]
        frame.calc = SinglePointCalculator(
            frame,
            energy=energy + len(atoms) * shift * per_element,
            forces=forces + rng.normal(scale=noise, size=forces.shape) if noise else forces,
            stress=stress,
        )
        frames.append(frame)
    return frames


def test_errors_have_their_size(tmp_path: Path) -> None:
    candidate = candidate_of(EMT, tmp_path, ("Al", "Cu"), labelled=labelled(0.5, 0.02), data="x")
    result = errors.check(candidate)
    assert by_name(result, "energy, mean absolute error").value == pytest.approx(750)
    assert by_name(result, "one constant per element").value == pytest.approx(0, abs=1e-6)
    assert by_name(result, "force, root mean square").value == pytest.approx(20, rel=0.2)
    assert by_name(result, "stress, mean").value == pytest.approx(0, abs=1e-9)
    assert (tmp_path / "worst.extxyz").exists()
    wrong = Defect(EMT(), lambda atoms, r: r.__setitem__("forces", -r["forces"]))
    result = errors.check(candidate_of(lambda: wrong, tmp_path, ("Al", "Cu"), labelled=labelled(), data="x"))
    assert result.status == "failed"
    assert by_name(result, "cosine").value == pytest.approx(-1)


class Remembers:
    """Stands for a potential's memory of its training frames."""

    def __init__(self, frames: list[Atoms]) -> None:
        self.known = {f.positions.tobytes() for f in frames}

    def where(self, frame: Atoms) -> str:
        return "train" if frame.positions.tobytes() in self.known else "new"


def test_training_frames_are_left_out(tmp_path: Path) -> None:
    """Four frames with small errors were trained on; those of the other two are what counts."""
    frames = labelled(noise=0.001)[:4] + labelled(noise=0.05)[4:]
    candidate = candidate_of(EMT, tmp_path, ("Al", "Cu"), labelled=frames, data="x")
    candidate.seen = Remembers(frames[:4])
    result = errors.check(candidate)
    assert by_name(result, "force, root mean square").value == pytest.approx(50, rel=0.25)
    assert "4 of 6 frames were trained on and are left out." in result.notes
    candidate.seen = Remembers(frames)
    result = errors.check(candidate)
    assert result.status == "failed"
    assert "trained on" in result.reason
    assert "nothing of accuracy" in result.consequence


def test_frames_without_an_answer_count(tmp_path: Path) -> None:
    def refuse(atoms: Atoms, r: dict[str, Any]) -> None:
        if "Al" in atoms.symbols:
            raise RuntimeError("no aluminium today")

    result = errors.check(candidate_of(lambda: Defect(EMT(), refuse), tmp_path, ("Al", "Cu"), labelled=labelled(), data="x"))
    assert result.status == "failed"
    assert "50 %" in result.reason
    assert "no aluminium today" in result.reason


def test_uncertainties_are_weighed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def unsure(claimed: float) -> Any:
        def spoil(atoms: Atoms, r: dict[str, Any]) -> None:
            sigma = rng.uniform(0.01, 0.2, size=len(atoms))
            r["forces"] += rng.normal(size=(len(atoms), 3)) * sigma[:, None]
            r["forces_uncertainty"] = claimed * sigma

        return Defect(EMT(), spoil)

    frames = labelled(n=40)
    honest = errors.check(candidate_of(lambda: unsure(1.0), tmp_path, ("Al", "Cu"), labelled=frames, data="x"))
    assert by_name(honest, "error over uncertainty").value == pytest.approx(1, abs=0.15)
    assert by_name(honest, "rank correlation").status == "passed"
    assert by_name(honest, "errors within one").value == pytest.approx(0.68, abs=0.08)
    proud = errors.check(candidate_of(lambda: unsure(0.1), tmp_path, ("Al", "Cu"), labelled=frames, data="x"))
    assert by_name(proud, "error over uncertainty").status == "failed"


# --- discovery ------------------------------------------------------------------------------------------------------


def test_stability_metrics_are_those_of_the_package() -> None:
    """Numbers printed by `matbench_discovery.metrics.stable_metrics` 1.3.1 on the same predictions (made 2026-11-21)."""
    rng = np.random.default_rng(0)
    true = rng.normal(0.05, 0.1, 500)
    predicted = true + rng.normal(0, 0.05, 500)
    predicted[::50] = np.nan
    expected = {"F1": 0.8181818181818182, "DAF": 2.4816176470588234, "Precision": 0.7941176470588235, "Recall": 0.84375, "Accuracy": 0.8979591836734694,
                "TPR": 0.84375, "FPR": 0.10294117647058823, "TNR": 0.8970588235294118, "FNR": 0.15625, "TP": 135.0, "FP": 35.0, "TN": 305.0, "FN": 25.0,
                "MAE": 0.037175415365023, "RMSE": 0.04705602389427713, "R2": 0.7867233410388292}  # fmt: skip
    assert discovery.stability_metrics(true, predicted) == pytest.approx(expected, rel=1e-12)
    expected = {"F1": 0.8745098039215685, "DAF": 1.71601822211278, "Accuracy": 0.872, "MAE": 0.041461754473590885, "R2": 0.6559943852264909}
    found = discovery.stability_metrics(true, np.nan_to_num(predicted, nan=0.3), threshold=0.05)
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="two lists of one length"):
        discovery.stability_metrics(true, predicted[:3])


@pytest.mark.reference
def test_combined_score_is_that_of_the_leaderboard() -> None:
    with open(shared_data("data", "leaderboard", "matbench_discovery_2026-07-16.csv"), newline="") as file:
        rows = [
            r
            for r in csv.DictReader(file)
            if r["CPS_recomputed"] and r["kappa_SRME"] and r["geo_opt_rmsd_symprec1e-2"] and r["F1_unique_prototypes"]
        ]
    assert len(rows) > 40
    for r in rows:
        score = discovery.combined_score(float(r["F1_unique_prototypes"]), float(r["kappa_SRME"]), float(r["geo_opt_rmsd_symprec1e-2"]))
        assert score == pytest.approx(float(r["CPS_recomputed"]), abs=2e-4), r["model_key"]


def test_structures_have_a_distance() -> None:
    """pymatgen's StructureMatcher: root mean square displacement over (V/N)^(1/3); 1 where nothing matches."""
    pytest.importorskip("pymatgen")
    first = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    assert discovery.structure_distance(first, first) == pytest.approx(0, abs=1e-6)
    moved = first.copy()
    moved.positions[0] += [0.2, 0, 0]
    expected = np.sqrt(0.2**2 * (1 / 8) * (7 / 8)) / (first.get_volume() / 8) ** (1 / 3)  # the mean shift is taken out
    assert discovery.structure_distance(first, moved) == pytest.approx(expected, rel=0.02)
    assert discovery.structure_distance(first, bulk("NaCl", "cesiumchloride", a=3.4, cubic=True)) == 1.0


def hull_set(folder: Path, n: int = 6) -> tuple[Path, Path]:
    """Alloys of copper and gold with a made-up hull; EMT is its own reference."""
    frames, rows = [], []
    for k in range(n):
        atoms = bulk("Cu", cubic=True)
        atoms.set_chemical_symbols(["Cu"] * (4 - k % 4) + ["Au"] * (k % 4))
        atoms.set_cell([3.59 + 0.12 * (k % 4)] * 3, scale_atoms=True)  # near where it relaxes to, so that it does so quickly
        atoms.rattle(0.01, seed=k)
        result = discovery.relax_one(EMT(), atoms)
        atoms.info["material_id"] = f"m-{k}"
        frames.append(atoms)
        rows.append(
            {
                "material_id": f"m-{k}",
                "n_sites": 4,
                "uncorrected_energy": result["energy"],
                "e_above_hull_mp2020_corrected_ppd_mp": 0.05 * (k - 2.5),
                "unique_prototype": k % 2 == 0,
            }
        )
    ase.io.write(folder / "initial.extxyz", frames)
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "initial.extxyz", folder / "table.csv"


@pytest.mark.thorough
def test_discovery_of_the_reference_itself_is_perfect(tmp_path: Path) -> None:
    initial, table = hull_set(tmp_path)
    candidate = candidate_of(EMT, tmp_path / "a", discovery=str(initial), discovery_table=str(table))
    result = discovery.check(candidate)
    assert result.status == "passed", result.reason
    assert by_name(result, "F1").value == 1
    assert by_name(result, "MAE").value == pytest.approx(0, abs=1e-6)
    # a crash in the middle of a line: that one is done again, the others are not
    path = tmp_path / "a" / "discovery.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:30])
    asked: list[int] = []

    def count() -> Any:
        asked.append(1)
        return EMT()

    candidate.make = count
    assert discovery.check(candidate).status == "passed"
    assert asked == [1]
    assert len(path.read_text().splitlines()) == 6
    # a potential that is 0.2 eV/atom too low calls everything stable
    low = candidate_of(
        lambda: Defect(EMT(), lambda a, r: r.__setitem__("energy", r["energy"] - 0.2 * len(a))),
        tmp_path / "b",
        discovery=str(initial),
        discovery_table=str(table),
    )
    result = discovery.check(low)
    assert result.status == "weak"
    assert by_name(result, "F1").value == pytest.approx(2 / 3)
    assert by_name(result, "MAE").value == pytest.approx(0.2, abs=1e-6)


@pytest.mark.slow
def test_discovery_on_several_processes(tmp_path: Path) -> None:
    initial, _ = hull_set(tmp_path)
    found = discovery.relax_many(EMT, discovery.read_initial(initial), tmp_path / "r.jsonl", processes=2, progress=False)
    alone = discovery.relax_many(EMT, discovery.read_initial(initial), tmp_path / "s.jsonl", processes=1, progress=False)
    assert {k: v["energy"] for k, v in found.items()} == {k: v["energy"] for k, v in alone.items()}
    with pytest.raises(RuntimeError, match="One of 2 processes ended by itself: .* the same call goes on"):
        discovery.relax_many(partial(os._exit, 1), discovery.read_initial(initial), tmp_path / "t.jsonl", processes=2, progress=False)


@pytest.mark.parametrize(("worker", "device"), [(1, "4"), (2, "7"), (3, "4")])
def test_workers_take_the_gpus_in_turn(worker: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(discovery.multiprocessing, "current_process", lambda: type("Worker", (), {"_identity": (worker,)}))
    monkeypatch.setattr(discovery, "_CALCULATOR", None)
    seen: list[str] = []
    discovery._start(lambda: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    assert seen == [device]


def test_combined_score_needs_its_three_parts() -> None:
    from gossamer.checks.judge import combined

    parts = {
        "discovery": {"metrics": [{"name": "F1", "value": 0.8}, {"name": "RMSD of relaxed structures", "value": 0.075}]},
        "conductivity": {"metrics": [{"name": "κ_SRME", "value": 0.5}]},
    }
    assert combined(parts) == pytest.approx(0.5 * 0.8 + 0.4 * 0.75 + 0.1 * 0.5)
    assert combined({"discovery": parts["discovery"]}) is None


def test_discovery_says_what_is_missing(tmp_path: Path) -> None:
    initial, table = hull_set(tmp_path, 2)
    assert discovery.check(candidate_of(EMT, tmp_path)).status == "skipped"
    with pytest.raises(ValueError, match="needs --discovery-table"):
        discovery.check(candidate_of(EMT, tmp_path, discovery=str(initial)))
    short = tmp_path / "short.csv"
    short.write_text("material_id,n_sites\nm-0,4\n")
    with pytest.raises(ValueError, match="lacks e_above_hull"):
        discovery.read_table(short)
    short.write_text(table.read_text().replace("m-1", "other"))
    with pytest.raises(ValueError, match="1 structures .* not in"):
        discovery.check(candidate_of(EMT, tmp_path, discovery=str(initial), discovery_table=str(short)))
    short.write_text(table.read_text().replace("m-1,4", "m-1,2"))
    with pytest.raises(ValueError, match="'m-1' has 4 atoms in .* and n_sites 2 in"):
        discovery.check(candidate_of(EMT, tmp_path, discovery=str(initial), discovery_table=str(short)))
    short.write_text(re.sub(r"(m-1,4,)[^,]*", r"\1", table.read_text()))
    with pytest.raises(ValueError, match="has '' as uncorrected_energy of 'm-1', where a number is expected"):
        discovery.check(candidate_of(EMT, tmp_path, discovery=str(initial), discovery_table=str(short)))
    failing = discovery.relax_one(Defect(EMT(), lambda a, r: 1 / 0), bulk("Cu"))
    assert failing["energy"] is None
    assert "ZeroDivisionError" in failing["error"]
