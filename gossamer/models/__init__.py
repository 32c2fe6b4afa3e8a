"""The networks, in one plain dictionary: name -> (settings, network). Adding a model means adding one file and one row."""

from __future__ import annotations

from gossamer.models.leignn import LEIGNN, LEIGNNConfig
from gossamer.models.output import ModelOutput

MODELS = {"leignn": (LEIGNNConfig, LEIGNN)}

ModelConfig = LEIGNNConfig
"""settings of any model; with more models a union told apart by ``name``"""

__all__ = ["LEIGNN", "MODELS", "LEIGNNConfig", "ModelConfig", "ModelOutput"]
