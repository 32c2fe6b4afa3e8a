"""The one entrance to energies, forces and stress of a potential: Engine(potential, way)(graph) -> Prediction.

    way         what runs                                                      made in
    "plain"     the network as it is written                                   no time
    "kernels"   its operations done by kernels (`gossamer.engine.kernels`)      seconds, once per machine
    "program"   compiled, kernels inside (`gossamer.engine.program`)            a minute, once per machine, network and number of elements
    "graph"     kernels recorded as a CUDA graph (`gossamer.engine.cuda_graph`) no time; again when sizes change
    "auto"      on a GPU the CUDA graph, once a third structure of the same size comes in a row, and before that kernels;
                on a CPU the program if there is one already, or if `expect` was told of enough evaluations, and else kernels

Each way is compared with the plain one on structures of the potential's own elements before it is used. That is decided when
the engine is made, or by `expect`; no structure that is evaluated later changes it. What "auto" cannot have it does without,
with one line of the log; a way that was asked for by name and cannot be had is an error.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gossamer.dispersion import D3, checked, nothing
from gossamer.engine.agreement import TABLE_TOLERANCE, TOLERANCE, agree, probe, rattled
from gossamer.engine.cuda_graph import CudaGraph
from gossamer.engine.kernels.attach import attach_kernels, sharing_copy
from gossamer.engine.kernels.cpu import Missing
from gossamer.engine.program import Program, cached_program, fits
from gossamer.graph import Graph
from gossamer.potential import DTYPES, Potential, Prediction, undisturbed
from gossamer.timing import fastest

log = logging.getLogger(__name__)
Way = Literal["auto", "plain", "kernels", "program", "graph"]
COMPILATION, SAVED = 60.0, 0.4
"""seconds that compiling may take, and the share of an evaluation that it saves at least"""
IN_A_ROW = 3
"""structures of one size before "auto" records one: recording costs several evaluations"""
MOST_EDGES = 1 << 21
"""up to which "auto" records: beyond, launches are no part of the time, and a recording keeps its memory"""
_on_threads = False
"""whether an engine of this process ran on several threads"""


def _after_fork() -> None:
    """A process that was forked from one with threads has none of them, but waits for them for ever; so it computes on its own."""
    if _on_threads:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Engine:
    """Evaluates one potential in one way."""

    def __init__(self, potential: Potential, way: Way = "auto", weights_change: bool = False, dispersion: str | None = None) -> None:
        """
        Args:
            potential: Left as it is. Its weights must not change later, unless ``weights_change``, and then in place.
            way: How to evaluate; see above.
            weights_change: Kernels that hold nothing of the weights (validation during training); plain and kernels only.
            dispersion: Functional whose D3 is added to energies, forces and stress, but not to the energies of atoms
                (`gossamer.dispersion.D3`).

        Raises:
            TypeError: no potential, but the file of one, say.
            ValueError: no such way, one that this device, precision or ``weights_change`` rules out, or dispersion that the potential has
                already.
            RuntimeError: a way asked for by name that cannot be had here, and why.
            ImportError: dispersion without its package.
        """
        if not isinstance(potential, Potential):
            raise TypeError(f"An engine is made of a potential, found {type(potential).__name__}. Read files beforehand (gossamer.load).")
        if way not in get_args(Way):
            raise ValueError(f"way '{way}' is unknown. Choose one of {', '.join(get_args(Way))}.")
        if way != "plain" and potential.dtype not in DTYPES.values():
            raise ValueError(
                f"way '{way}' needs a potential in {' or '.join(DTYPES)}, found {potential.dtype}: potential.to(torch.float32)."
            )
        if way == "graph" and potential.device.type != "cuda":
            raise ValueError(f"way 'graph' records a CUDA graph and needs a potential on a GPU, found {potential.device}.")
        if weights_change and way in ("program", "graph"):
            raise ValueError(f"way '{way}' holds the weights of a potential, and these are to change. Choose kernels or plain.")
        known = potential.statistics
        self.dispersion: D3 | None = None if dispersion is None else checked(dispersion, known.functional, known.dispersion)
        """what is added to every prediction"""
        with undisturbed(potential.device):
            self.potential = sharing_copy(potential, differentiable=False).eval()
        self.asked, self.weights_change = way, weights_change
        self._weights = () if weights_change else tuple(p for p in self.potential.parameters() if not p.is_inference())
        self._known = self._changes()
        self.quick: Potential | None = None
        """the potential with kernels"""
        self.program: Program | None = None
        self.batch_program: Program | None = None
        """likewise for two structures or more"""
        if potential.long_ranged and way in ("program", "graph"):
            raise RuntimeError(f"way '{way}' cannot be had: the sums over charges (potential.long_range) differ in size from step to step.")
        recordable = not weights_change and not potential.long_ranged
        self._records = way == "graph" or (way == "auto" and potential.device.type == "cuda" and recordable)
        self._recording: CudaGraph | None = None
        self._atoms, self._in_a_row = 0, 0
        self._isolated: Any = None
        self._lock = threading.RLock()
        """tables, programs and recordings answer one at a time"""
        with undisturbed(potential.device):
            with torch.no_grad():
                self._isolated = None if weights_change else self.potential.isolated_outputs()
            if way != "plain":
                self.quick = self._with_kernels()
            if way == "program":
                self.program = self._program(make=True)
            elif way == "auto" and not weights_change and not self._records and not potential.long_ranged:
                self.program = self._program(make=False)

    @property
    def way(self) -> str:
        """What runs: "plain", "kernels", "program" or "graph"."""
        if self._records:
            return "graph"
        return "program" if self.program is not None else "plain" if self.quick is None else "kernels"

    def __call__(self, graph: Graph, stress: bool = True) -> Prediction:
        """Energy, forces and, for conservative forces, stress of a batch on the potential's device; nothing to differentiate further.

        Programs and CUDA graphs leave to the kernels what they cannot take: lone atoms, or batches of which there is no program. So do
        programs of several threads in a forked process.

        Raises:
            RuntimeError: the weights changed since the engine was made, and were not to.
        """
        if self._changes() != self._known:
            raise RuntimeError(
                "The potential's weights changed after this engine (or calculator) was made, which holds what it computed from them: answers "
                "would be half old, half new. Make another one, or an Engine with weights_change=True."
            )
        global _on_threads
        _on_threads = _on_threads or torch.get_num_threads() > 1
        with self._lock, undisturbed(self.potential.device):
            out = self._predict(graph.differentiable(), stress)
        return out if self.dispersion is None else self._dispersed(self.dispersion, out, graph)

    def _changes(self) -> int:
        """How often weights were written in place, by PyTorch's own count, which it keeps for all but tensors of inference mode."""
        return sum([p._version for p in self._weights])

    def _predict(self, graph: Graph, stress: bool) -> Prediction:
        """The potential's own."""
        if self._records and graph.n_graphs == 1 and fits(graph) and self._worth_recording(graph):
            recorded = self._recorded(graph)
            if recorded is not None:
                return recorded
        program = self.program if graph.n_graphs == 1 else self.batch_program
        if program is not None and program.has_threads and fits(graph):
            return program(graph)
        return self._evaluate(self.quick or self.potential, graph, stress)

    def expect(self, n_evaluations: int, graph: Graph) -> str:
        """Say that about so many evaluations of graphs like this one will come; returns the way that they will go.

        With "auto" the potential is compiled if that saves more time than it takes. "program" gets one for batches, if this is one.
        """
        with self._lock, undisturbed(self.potential.device):
            return self._expect(n_evaluations, graph.differentiable())

    def _expect(self, n_evaluations: int, graph: Graph) -> str:
        batch = graph.n_graphs > 1
        if (
            self.asked in ("plain", "kernels", "graph")
            or self.weights_change
            or self.potential.long_ranged
            or not fits(graph)
            or (self._records and not batch)
        ):
            return self.way
        if (self.batch_program if batch else self.program) is not None:
            return self.way
        worth = self.asked == "program"
        if not worth:
            # the processor's time where others keep it busy, the clock's where several threads share the work
            seconds = min(fastest(lambda: self(graph), 2, clock=clock) for clock in (time.perf_counter, time.process_time))
            worth = SAVED * seconds * n_evaluations > COMPILATION
        found = self._program(make=worth, batch=batch)
        if batch:
            self.batch_program = found
        else:
            self.program = found
        return self.way

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self.potential, self.asked, self.weights_change, None if self.dispersion is None else str(self.dispersion))

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return self  # nothing of it belongs to one user; those of several threads take turns

    def _dispersed(self, d3: D3, out: Prediction, graph: Graph) -> Prediction:
        """A prediction with the dispersion of each structure; NaN where the energy is none, as of atoms on one spot.

        Raises:
            ValueError: an element without parameters, or a periodic axis without a vector; says in which structure.
        """
        numbers, positions, index, cells, pbc = (
            t.cpu().numpy() for t in (graph.atomic_numbers, graph.positions, graph.graph_index, graph.cell, graph.periodic)
        )
        found = []
        for k, sound in enumerate(out.energy.isfinite().tolist()):
            own = index == k
            try:
                found.append(d3(numbers[own], positions[own], cells[k], pbc[k]) if sound else nothing(int(own.sum())))
            except ValueError as error:
                raise ValueError(f"{graph.name(k)}: {error}") from None
        volumes = np.abs(np.linalg.det(cells))
        stresses = [d.virial / v if v > 1e-9 else np.full((3, 3), np.nan) for d, v in zip(found, volumes, strict=True)]

        def there(values: Any) -> Tensor:
            return torch.from_numpy(np.asarray(values)).to(out.energy)

        return replace(
            out,
            energy=out.energy + there([d.energy for d in found]),
            forces=None if out.forces is None else out.forces + there(np.concatenate([d.forces for d in found])),
            stress=None if out.stress is None else out.stress + there(np.array(stresses)),
        )

    # --- how each way is made ----------------------------------------------------------------------------------------

    def _evaluate(self, potential: Potential, graph: Graph, stress: bool) -> Prediction:
        return potential(graph, stress=stress and potential.conservative, isolated=self._isolated)

    def _with_kernels(self) -> Potential | None:
        """The potential with kernels, compared."""
        potential = self.potential
        table = not self.weights_change
        try:
            quick = attach_kernels(potential, "inference" if table else "validation")
            graph = probe(potential)
            tolerance = (TABLE_TOLERANCE if table else TOLERANCE)[potential.dtype]
            agree(self._evaluate(potential, graph, True), self._evaluate(quick, graph, True), potential, graph, tolerance)
            return quick
        except (Missing, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            if self.asked == "kernels":
                raise RuntimeError(f"way 'kernels' cannot be had: {reason}") from None
            log.warning("the potential runs without kernels: %s", reason)
            return None

    def _program(self, make: bool, batch: bool = False) -> Program | None:
        """The program of this machine, from the cache, or made now if asked."""
        graph = probe(self.potential, n_structures=3 if batch else 1)
        try:
            return cached_program(self.quick or self.potential, graph, make)
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            if self.asked == "program":
                raise RuntimeError(f"way 'program' cannot be had: {reason}") from error
            log.warning("the potential runs without compilation: %s", reason)
            return None

    def _worth_recording(self, graph: Graph) -> bool:
        """Whether this structure goes by a CUDA graph: asked for, there is one, or others of its size came before."""
        self._in_a_row = self._in_a_row + 1 if graph.n_atoms == self._atoms else 1
        self._atoms = graph.n_atoms
        if self.asked == "graph" or (self._recording is not None and self._recording.fits(graph)):
            return True
        return self._in_a_row >= IN_A_ROW and graph.n_edges <= MOST_EDGES

    def _recorded(self, graph: Graph) -> Prediction | None:
        """The answer of a CUDA graph, recorded now if there is none into which this structure fits; None where "auto" goes without."""
        if self._recording is None or not self._recording.fits(graph):
            potential = self.quick or self.potential

            def run(graph: Graph) -> Prediction:
                return self._evaluate(potential, graph, True)

            self._recording = None  # its memory first
            try:
                recording = CudaGraph(run, graph, potential.cutoff)
                moved = rattled(graph)
                agree(run(moved), recording(moved), potential, moved, TOLERANCE[potential.dtype])
            except RuntimeError as error:
                if self.asked == "graph":
                    raise
                log.warning("the potential runs without a CUDA graph: %s", str(error).splitlines()[0])
                self._records = False
                return None
            self._recording = recording
        return self._recording(graph)
