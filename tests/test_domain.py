"""The energy of a part of a structure: own atoms only, what others hold comes by exchange, and the sum is the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import DIRECT, GLOBAL, MODELS, make_potential, often
from test_kernels import needs_compiler

from gossamer.engine.agreement import probe
from gossamer.engine.domain import Domain, compare, images, with_images

pytestmark = needs_compiler
LOCAL = [name for name in MODELS if name not in (*DIRECT, *GLOBAL)]
ELEMENTS = ["H", "C", "O"]


@pytest.mark.parametrize("name", often(LOCAL, ["sound"]))
def test_a_domain_gives_the_numbers_of_the_potential(name: str, kernels: Path) -> None:
    """Alone, and with a fifth of the edges beginning at rows that come by exchange."""
    potential = make_potential(ELEMENTS, **MODELS[name])
    domain = Domain(potential)
    compare(lambda *tensors: domain(*tensors, isolated=domain.isolated), potential, probe(potential))


def test_what_others_hold_counts(kernels: Path) -> None:
    """Rows that come from the wrong atoms change the result: the comparison can fail."""
    potential = make_potential(ELEMENTS, **MODELS["nequip"])
    domain, graph = Domain(potential), probe(potential)

    def wrong(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(tensors[0]) - len(tensors[3])
        with images(torch.zeros(n, dtype=torch.int64)):
            return domain(*tensors, isolated=domain.isolated)

    with pytest.raises(RuntimeError, match="differ from the potential's"):
        compare(wrong, potential, graph)
    tensors, owners = with_images(graph)
    with images(owners[1:]), pytest.raises(RuntimeError, match="belong to other processes"):
        domain(*tensors, isolated=domain.isolated)


@pytest.mark.parametrize("name", LOCAL)
def test_energies_reach_as_many_edges_as_the_network_says(name: str) -> None:
    """On a chain of atoms that see their next neighbours only."""
    potential = make_potential(ELEMENTS, zbl=False, **MODELS[name])
    n, length = 9, 0.55 * potential.cutoff if "pairs" not in name else 1.4
    steps = torch.arange(n - 1)
    index = torch.cat([torch.stack([steps + 1, steps]), torch.stack([steps, steps + 1])], 1)
    index = index[:, index[1].argsort(stable=True)]
    direction = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2, -0.3]], dtype=torch.float64))
    vectors = ((index[0] - index[1])[:, None] * direction * length).requires_grad_()
    species = torch.arange(n) % 3
    energies = potential.network(species, index, vectors, torch.zeros_like(species), 1).node_energies
    (slopes,) = torch.autograd.grad(energies[0], vectors)
    felt = index[:, slopes.abs().amax(dim=1) > 0]
    assert int(felt.max()) == potential.network.num_hops


@pytest.mark.parametrize(
    "options, reason",
    [
        (MODELS["direct"], "predicted directly"), (MODELS["sound-global"], "global context"), (dict(max_neighbors=8), "max_neighbors"),
    ],
)  # fmt: skip
def test_potentials_that_cannot_be_divided_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Domain(make_potential(ELEMENTS, **options))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LOCAL)
def test_a_domain_on_a_gpu_gives_the_numbers_of_the_potential(name: str, kernels: Path) -> None:
    potential = make_potential(ELEMENTS, **MODELS[name]).to("cuda")
    domain = Domain(potential)
    compare(lambda *tensors: domain(*tensors, isolated=domain.isolated), potential, probe(potential))
