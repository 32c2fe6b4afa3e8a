"""What OpenMM-ML finds by our entry point, under the name "gossamer". Light: every `import openmmml` makes one."""

from __future__ import annotations

from typing import Any


class PotentialFactory:
    """Makes the implementation of ``MLPotential("gossamer", modelPath=...)``, as openmmml's MLPotentialImplFactory asks.

    Not a subclass of it: openmmml imports this module while it is being imported itself.
    """

    def createImpl(self, name: str, **settings: Any) -> Any:
        """Args: name: "gossamer". settings: of `gossamer.simulation.openmm.PotentialImpl`.

        Raises:
            TypeError: an unknown setting, or no modelPath.
        """
        from gossamer.simulation.openmm import PotentialImpl

        return PotentialImpl(**settings)
