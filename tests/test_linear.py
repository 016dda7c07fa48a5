"""Column- and row-parallel linears against ``F.linear``, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from src import Group
from src.modeling import ColumnParallelLinear, RowParallelLinear
from src.testing import Ranks


def inputs(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(16, 24, dtype=dtype)
    return linear, torch.randn(3, 5, 16, dtype=dtype), torch.randn(3, 5, 24, dtype=dtype)


def column(group: Group, gather: bool) -> dict[str, Tensor]:
    linear, x, grad = inputs()
    x.requires_grad_()
    layer = ColumnParallelLinear.from_linear(linear, group=group, gather_output=gather)
    y = layer(x)
    y.backward(grad if gather else grad.chunk(group.world_size, -1)[group.rank])
    return {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


def row(group: Group, parallel_input: bool) -> dict[str, Tensor]:
    linear, x, grad = inputs()
    x = (x.chunk(group.world_size, -1)[group.rank].contiguous() if parallel_input else x).requires_grad_()
    layer = RowParallelLinear.from_linear(linear, group=group, input_is_parallel=parallel_input)
    y = layer(x)
    y.backward(grad)
    return {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


def reference() -> dict[str, Tensor]:
    linear, x, grad = inputs()
    linear, x, grad = linear.double(), x.double().requires_grad_(), grad.double()
    y = F.linear(x, linear.weight, linear.bias)
    y.backward(grad)
    return {"y": y.detach(), "x": x.grad, "weight": linear.weight.grad, "bias": linear.bias.grad}


def whole(results: list[dict[str, Tensor]], dims: dict[str, int]) -> dict[str, Tensor]:
    """Concatenate what is sharded; what is replicated must be equal on all ranks."""
    out = {}
    for name, first in results[0].items():
        parts = [result[name] for result in results]
        if name not in dims:
            assert all(torch.equal(part, first) for part in parts), name
        out[name] = torch.cat(parts, dims[name]) if name in dims else first
    return out


def check(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.ranks(1, 2, 4, gloo=(2, 4))
@pytest.mark.parametrize("gather", [False, True])
def test_column(ranks: Ranks, gather: bool) -> None:
    dims = {"weight": 0, "bias": 0} | ({} if gather else {"y": -1})
    check(whole(ranks(column, gather), dims), reference())


@pytest.mark.ranks(1, 2, 4, gloo=(2, 4))
@pytest.mark.parametrize("parallel_input", [False, True])
def test_row(ranks: Ranks, parallel_input: bool) -> None:
    dims = {"weight": 1} | ({"x": -1} if parallel_input else {})
    check(whole(ranks(row, parallel_input), dims), reference())


@pytest.mark.parametrize("body, dims", [(column, {"y": -1, "weight": 0, "bias": 0}), (row, {"weight": 1, "x": -1})])
def test_same_bits_at_every_size(ranks: Ranks, body: Any, dims: dict[str, int]) -> None:
    flag = body is row
    want = whole(ranks.on("simulated", 1)(body, flag, num_shards=8), dims)
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        got = whole(ranks.on(*place)(body, flag, num_shards=8), dims)
        for name in want:
            assert torch.equal(got[name], want[name]), (place, name)


def initial(group: Group, kind: str) -> tuple[Tensor, Tensor]:
    cls = ColumnParallelLinear if kind == "column" else RowParallelLinear
    layer = cls(16, 24, group=group, init_base_seed=7)
    return layer.weight.detach(), layer.bias.detach()


@pytest.mark.parametrize("kind, dim", [("column", 0), ("row", 1)])
def test_initial_values_belong_to_logical_shards(ranks: Ranks, kind: str, dim: int) -> None:
    whole_at = {}
    for n in (1, 2, 4, 8):
        results = ranks.on("simulated", n)(initial, kind, num_shards=8)
        whole_at[n] = torch.cat([weight for weight, _ in results], dim)
    assert all(torch.equal(whole_at[1], other) for other in whole_at.values())
    shard = torch.empty(whole_at[1].chunk(8, dim)[3].shape)
    shard.uniform_(-0.25, 0.25, generator=torch.Generator().manual_seed(7 + 3))
    assert torch.equal(whole_at[1].chunk(8, dim)[3], shard)


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"out_features=6 cannot be sharded over num_shards=4 logical shards"):
        ColumnParallelLinear(8, 6, group=Group.single(4))
    with pytest.raises(ValueError, match="in_features=6 cannot be sharded"):
        RowParallelLinear(6, 8, group=Group.single(4))
    with pytest.raises(ValueError, match="last dim of 8"):
        ColumnParallelLinear(8, 6, group=Group.single())(torch.zeros(2, 7))
    with pytest.raises(TypeError, match="floating-point"):
        RowParallelLinear(8, 6, group=Group.single())(torch.zeros(2, 8, dtype=torch.int64))


def used_often(group: Group) -> dict[str, Any]:
    layer = ColumnParallelLinear(16, 32, group=group)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x) + layer(2 * x) + layer(3 * x)
    y.float().sin().sum().backward()
    return {"y": y.detach(), "weight": layer.weight.grad, "bias": layer.bias.grad, "x": x.grad}


def test_autocast_of_a_layer_that_is_used_often_has_the_same_bits_at_every_size(ranks: Ranks) -> None:
    want = whole(ranks.on("simulated", 1)(used_often, num_shards=8), {"y": -1, "weight": 0, "bias": 0})
    for place in [("simulated", 2), ("simulated", 8), ("gloo", 2)]:
        got = whole(ranks.on(*place)(used_often, num_shards=8), {"y": -1, "weight": 0, "bias": 0})
        assert not [name for name in want if not torch.equal(got[name], want[name])], place


class Casts(TorchDispatchMode):
    """Counts the copies of a shape to another dtype."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def test_autocast_without_gradients_casts_a_weight_once() -> None:
    layer, x = ColumnParallelLinear(16, 32), torch.ones(5, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts((32, 16)) as casts:
        layer(x), layer(x)
    assert casts.count == 1
