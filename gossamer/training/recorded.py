"""Training steps recorded as CUDA graphs: of a small batch a GPU spends most of a step waiting for the launches of thousands of operations.

Two recordings make a step: loss and gradients of the weights, for batches of one size (`gossamer.engine.cuda_graph` pads them),
and the optimiser's update. What lies between (sums over processes, clipping, the look at whether all is finite) runs as always.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gossamer.engine.agreement import TOLERANCE
from gossamer.engine.cuda_graph import Inputs, record, sizes_for
from gossamer.graph import Graph
from gossamer.timing import fastest
from gossamer.training.matrices import MatrixOptimizer

log = logging.getLogger(__name__)
MOST_EDGES = 1 << 19
"""up to which batches are recorded: beyond, launches are no part of the time, and a recording keeps its memory"""
KEPT = 4
"""recordings, of different numbers of structures"""


class Gradients(NamedTuple):
    """What a training step needs to know of a batch."""

    loss: Tensor
    sums: Tensor
    """(n_quantities,) penalties"""
    gradients: list[Tensor | None]
    """of the loss, for each parameter"""


Run = Callable[[Graph, Tensor], Gradients]
"""from a batch and the number of terms in each sum of penalties"""


class Recording:
    """A run recorded for batches of so many structures, and at most so many atoms and edges."""

    def __init__(self, run: Run, graph: Graph, counts: Tensor, sizes: tuple[int, int], cutoff: float) -> None:
        self.inputs = Inputs(graph, *sizes, cutoff)
        self.counts = counts.clone()
        with torch.cuda.device_of(counts):
            self.recording, self.outputs = record(lambda: run(self.inputs.graph, self.counts))

    def __call__(self, graph: Graph, counts: Tensor) -> Gradients:
        self.inputs.fill(graph)
        self.counts.copy_(counts)
        self.recording.replay()
        outputs: Gradients = self.outputs
        return outputs


class RecordedGradients:
    """Loss and gradients of batches: as CUDA graphs from the second batch of each number of structures on, if they agree."""

    def __init__(self, runs: Sequence[Run], cutoff: float, dtype: torch.dtype) -> None:
        """
        Args:
            runs: Ways to the same numbers; the first runs what is not recorded, the fastest one is recorded.
            cutoff: Å.
            dtype: Of the weights.
        """
        self.runs, self.cutoff, self.tolerance = list(runs), cutoff, TOLERANCE[dtype]
        self.fallback = self.runs[0]
        self.seen: dict[int, int] = {}
        self.recordings: dict[int, Recording] = {}
        self.on = True

    def __call__(self, graph: Graph, counts: Tensor) -> Gradients:
        """Tensors of a recording are overwritten by the next call; structures that do not all count alike are not recorded."""
        if graph.weights is not None:
            return self.fallback(graph, counts)
        seen = self.seen[graph.n_graphs] = self.seen.get(graph.n_graphs, 0) + 1
        recording = self.recordings.get(graph.n_graphs)
        if recording is None or not recording.inputs.fits(graph):
            allowed = self.on and graph.n_edges <= MOST_EDGES and (recording is not None or len(self.recordings) < KEPT)
            if seen < 2 or not allowed:
                return self.fallback(graph, counts)
            recording = self._record(graph, counts, recording)
        return self.fallback(graph, counts) if recording is None else recording(graph, counts)

    def _record(self, graph: Graph, counts: Tensor, before: Recording | None) -> Recording | None:
        """The fastest way, recorded; None where none can be had, now and later."""
        sizes = sizes_for(graph)
        if before is not None:
            sizes = max(sizes[0], before.inputs.n_atoms), max(sizes[1], before.inputs.n_edges)
            self.recordings.pop(graph.n_graphs)
            del before  # its memory
        found: list[tuple[float, Run, Recording]] = []
        reason = ""
        for run in self.runs:
            try:
                made = Recording(run, graph, counts, sizes, self.cutoff)
                self._compare(run(graph, counts), made(graph, counts))
                seconds = fastest(partial(made, graph, counts), 5) if len(self.runs) > 1 else 0.0
                found.append((seconds, run, made))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
        if not found:
            log.warning("training runs without CUDA graphs: %s", reason)
            self.on = False
            self.recordings.clear()
            return None
        _, run, best = min(found, key=lambda f: f[0])
        self.runs, self.recordings[graph.n_graphs] = [run], best
        return best

    def _compare(self, plain: Gradients, other: Gradients) -> None:
        """
        Raises:
            RuntimeError: they differ.
        """
        together = [flat([*g.gradients, g.sums.to(plain.loss)]) for g in (plain, other)]
        deviation = float((together[0] - together[1]).norm() / together[0].norm().clamp(min=1e-12))
        if not deviation < self.tolerance:
            raise RuntimeError(f"gradients of the recorded step differ from those of the plain one by {deviation:.1e} (relative)")


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    """All numbers of all tensors that are there."""
    return torch.cat([t.double().flatten() for t in tensors if t is not None])


class RecordedUpdate:
    """The step of Muon or SOAP as a CUDA graph, from its second step on, if it agrees; AdamW steps as always."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.optimizer, self.parameters, self.tolerance = optimizer, list(parameters), TOLERANCE[dtype]
        self.on = isinstance(optimizer, MatrixOptimizer)
        self.steps = 0
        self.gradients: list[Tensor] = []
        self.recording: Any = None

    def __call__(self) -> None:
        """One step from the gradients as they are."""
        self.steps += 1
        found = [p.grad for p in self.parameters if p.grad is not None]
        if self.recording is not None and len(found) == len(self.gradients):
            torch._foreach_copy_(self.gradients, found)
            self.recording.replay()
            self.optimizer.look_around()  # type: ignore[attr-defined]
        elif self.on and self.recording is None and self.steps > 1:
            self._record(found)
        else:
            self.optimizer.step()

    def _record(self, found: list[Tensor]) -> None:
        """Make this step twice, plainly and as recorded, and keep the recording if both come to the same."""
        assert isinstance(self.optimizer, MatrixOptimizer)
        self.optimizer.allow_recording()
        trained = [p for p in self.parameters if p.grad is not None]
        changing: list[Any] = [*(p.data for p in trained), *(t for p in trained for t in self.optimizer.state[p].values())]
        before = [t.clone() for t in changing]
        self.optimizer.move()
        wanted = [t.clone() for t in changing]
        torch._foreach_copy_(changing, before)
        self.gradients = [g.clone() for g in found]
        for p, g in zip(trained, self.gradients, strict=True):
            p.grad = g
        try:
            self.recording, _ = record(self.optimizer.move, warm_ups=0)
            self.recording.replay()
            deviation = float(flat([a - b for a, b in zip(changing, wanted, strict=True)]).norm() / flat(wanted).norm())
            if not deviation < self.tolerance:
                raise RuntimeError(f"it differs from the plain one by {deviation:.1e} (relative)")
        except RuntimeError as error:
            log.warning("the optimiser's step is not recorded: %s", str(error).splitlines()[0])
            self.recording, self.on = None, False
            torch._foreach_copy_(changing, wanted)
        for p, g in zip(trained, found, strict=True):
            p.grad = g
        self.optimizer.look_around()
