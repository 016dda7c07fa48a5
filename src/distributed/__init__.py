"""Groups, collectives, and where ranks run."""

from .checked_messages import CheckError
from .collectives import (
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    reduce_scatter,
    start_all_reduce,
    start_reduce_scatter,
)
from .failure import RankFailure, long_wait
from .group import Group
from .ledger import Ledger
from .lockstep import SimulationError
from .regions import (
    copy_to_region,
    copy_to_shards,
    gather_from_region,
    gather_to_shards,
    join_shards,
    reduce_from_region,
    reduce_from_shards,
    reduce_scatter_from_shards,
    scatter_to_region,
    share_shards,
    split_shards,
)
from .runtime import close, init, local_device
from .simulation import simulate

__all__ = [
    "CheckError",
    "Group",
    "Ledger",
    "RankFailure",
    "SimulationError",
    "all_gather",
    "all_reduce",
    "barrier",
    "broadcast",
    "close",
    "copy_to_region",
    "copy_to_shards",
    "gather_from_region",
    "gather_to_shards",
    "init",
    "join_shards",
    "local_device",
    "long_wait",
    "reduce_from_region",
    "reduce_from_shards",
    "reduce_scatter",
    "reduce_scatter_from_shards",
    "scatter_to_region",
    "share_shards",
    "simulate",
    "split_shards",
    "start_all_reduce",
    "start_reduce_scatter",
]
