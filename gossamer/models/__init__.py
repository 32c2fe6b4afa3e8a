"""The networks, in one plain dictionary: name -> (settings, network). Adding a model means adding one file and one row."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gossamer.models.base import DataFacts, ModelOutput
from gossamer.models.geodite import Geodite, GeoditeConfig
from gossamer.models.leignn import LEIGNN, LEIGNNConfig
from gossamer.models.nequip import PRESETS as NEQUIP_PRESETS
from gossamer.models.nequip import NequIP, NequIPConfig
from gossamer.models.painn import PaiNN, PaiNNConfig
from gossamer.models.schnet import SchNet, SchNetConfig

MODELS = {
    "leignn": (LEIGNNConfig, LEIGNN),
    "nequip": (NequIPConfig, NequIP),
    "geodite": (GeoditeConfig, Geodite),
    "painn": (PaiNNConfig, PaiNN),
    "schnet": (SchNetConfig, SchNet),
}

ModelConfig = Annotated[LEIGNNConfig | NequIPConfig | GeoditeConfig | PaiNNConfig | SchNetConfig, Field(discriminator="name")]
"""settings of any model, told apart by ``name``"""

PRESETS = {"nequip": NEQUIP_PRESETS}
"""named sizes: ``model: {name: nequip, preset: M}``"""

__all__ = [
    "LEIGNN", "MODELS", "PRESETS", "DataFacts", "Geodite", "GeoditeConfig", "LEIGNNConfig", "ModelConfig", "ModelOutput", "NequIP",
    "NequIPConfig", "PaiNN", "PaiNNConfig", "SchNet", "SchNetConfig",
]  # fmt: skip
