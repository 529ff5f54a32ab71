"""The modelled wafer-scale engine: programs on a grid of cores, real values, honest cycles."""

from .collectives import collective
from .report import Report
from .spec import WSE2, WSE3, WaferSpec

__all__ = ["WSE2", "WSE3", "Report", "WaferSpec", "collective"]
