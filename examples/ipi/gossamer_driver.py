"""What i-PI reads as ``pes_path``: our driver under its name."""

from gossamer.simulation.ipi_driver import Driver

__DRIVER_NAME__, __DRIVER_CLASS__ = "gossamer", "Driver"
__all__ = ["Driver"]
