"""isoshard: tensor parallelism that gives the same bits at every size."""

from .distributed import Group, Ledger, SimulationError, close, init, simulate

__version__ = "0.1.0"
__all__ = ["Group", "Ledger", "SimulationError", "close", "init", "simulate"]
