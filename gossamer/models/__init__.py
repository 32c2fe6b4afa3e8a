"""The networks, in one plain dictionary: name -> (settings, network). Adding a network means adding one file and one row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from gossamer.models.base import DataFacts, ModelOutput, Network, NetworkConfig
from gossamer.models.geodite import Geodite, GeoditeConfig
from gossamer.models.leignn import LEIGNN, LEIGNNConfig
from gossamer.models.mace import MACE, MACEConfig
from gossamer.models.nequip import NequIP, NequIPConfig
from gossamer.models.painn import PaiNN, PaiNNConfig
from gossamer.models.schnet import SchNet, SchNetConfig
from gossamer.models.sevennet import SevenNet, SevenNetConfig
from gossamer.models.weft import Weft, WeftConfig

MODELS: dict[str, tuple[type[Any], type[Network]]] = {
    "leignn": (LEIGNNConfig, LEIGNN),
    "nequip": (NequIPConfig, NequIP),
    "geodite": (GeoditeConfig, Geodite),
    "mace": (MACEConfig, MACE),
    "painn": (PaiNNConfig, PaiNN),
    "schnet": (SchNetConfig, SchNet),
    "sevennet": (SevenNetConfig, SevenNet),
    "weft": (WeftConfig, Weft),
}
DEFAULT = "leignn"
"""the network of a configuration that names none"""
ACCURATE = "weft"
"""the one that ends lowest in the same time of training (benchmarks/accuracy), which `fit` takes"""

if TYPE_CHECKING:
    ModelConfig = NetworkConfig
else:
    ModelConfig = Annotated[Union[tuple(config for config, _ in MODELS.values())], Field(discriminator="name")]  # noqa: UP007
    """settings of any network, told apart by ``name``"""

__all__ = [
    "ACCURATE",
    "DEFAULT",
    "LEIGNN",
    "MACE",
    "MODELS",
    "DataFacts",
    "Geodite",
    "GeoditeConfig",
    "LEIGNNConfig",
    "MACEConfig",
    "ModelConfig",
    "ModelOutput",
    "NequIP",
    "NequIPConfig",
    "Network",
    "PaiNN",
    "PaiNNConfig",
    "SchNet",
    "SchNetConfig",
    "SevenNet",
    "SevenNetConfig",
    "Weft",
    "WeftConfig",
]  # fmt: skip
