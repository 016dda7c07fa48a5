"""Groups in module globals, as Megatron keeps them."""

import torch.distributed as dist

_TENSOR_GROUP = None
_DATA_GROUP = None
CALLS = 0


def initialize(tensor_parallel_size: int) -> None:
    global _TENSOR_GROUP, _DATA_GROUP
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for start in range(0, world_size, tensor_parallel_size):
        ranks = list(range(start, start + tensor_parallel_size))
        group = dist.new_group(ranks)
        if rank in ranks:
            _TENSOR_GROUP = group
    for start in range(tensor_parallel_size):
        ranks = list(range(start, world_size, tensor_parallel_size))
        group = dist.new_group(ranks)
        if rank in ranks:
            _DATA_GROUP = group


def tensor_group() -> dist.ProcessGroup:
    global CALLS
    CALLS += 1
    assert _TENSOR_GROUP is not None, "groups are not initialized"
    return _TENSOR_GROUP


def data_group() -> dist.ProcessGroup:
    assert _DATA_GROUP is not None, "groups are not initialized"
    return _DATA_GROUP
