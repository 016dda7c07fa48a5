"""GroupRMSNorm and RMSNorm, whole and sharded over hidden, against float64, values and gradients."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src import Group, Ledger
from src.modeling import GroupRMSNorm, RMSNorm
from src.testing import Ranks

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(x: Tensor, weight: Tensor, grad: Tensor, size: int, eps: float = 1e-5) -> dict[str, Tensor]:
    """Output and gradients of the unsharded norm in float64."""
    x, weight = (leaf.detach().double().requires_grad_() for leaf in (x, weight))
    groups = x.unflatten(-1, (-1, size))
    y = (groups / torch.sqrt((groups**2).mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    y.backward(grad.double())
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad}


def check(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], rtol=tolerance, atol=tolerance, msg=name)


def ordinary(size: int | None, dtype: torch.dtype) -> RMSNorm | GroupRMSNorm:
    """RMSNorm with other weights than ones, or, with ``size``, GroupRMSNorm."""
    if size is not None:
        return GroupRMSNorm(12, size, dtype=dtype)
    norm = RMSNorm(12, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(numbers(5, 12))
    return norm


@pytest.mark.parametrize("size", [None, 3, 12])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_dtypes(size: int | None, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    norm = ordinary(size, weight_dtype)
    x, grad = numbers(0, 2, 5, 12, dtype=dtype).requires_grad_(), numbers(1, 2, 5, 12, dtype=dtype)
    y = norm(x)
    y.backward(grad)
    got = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad}
    assert (y.dtype, norm.weight.dtype) == (dtype, weight_dtype)
    coarsest = max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
    check(got, reference(x, norm.weight, grad, size or 12), 8 * coarsest)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 0, 12), (2, 1, 3, 5, 12)])
def test_any_leading_shape(size: int | None, shape: tuple[int, ...]) -> None:
    norm, x, grad = ordinary(size, torch.float32), numbers(0, *shape), numbers(1, *shape)
    want = reference(x, norm.weight, grad, size or 12)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    y = norm(strided)
    y.backward(grad)
    check({"y": y.detach(), "x": strided.grad, "weight": norm.weight.grad}, want)
    assert torch.equal(strided, x)


@pytest.mark.parametrize("size", [None, 3, 12])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_residual(size: int | None, dtype: torch.dtype, residual_dtype: torch.dtype) -> None:
    """Values and gradients have the bits of the sum and the norm, one after the other."""
    norm = ordinary(size, torch.float32)
    x, residual = (numbers(i, 2, 5, 12, dtype=d).requires_grad_() for i, d in ((0, dtype), (2, residual_dtype)))
    grad, total_grad = numbers(1, 2, 5, 12), numbers(3, 2, 5, 12)

    def gradients(y: Tensor, total: Tensor) -> list[Tensor]:
        found = torch.autograd.grad((y, total), (x, residual, norm.weight), (grad.to(y.dtype), total_grad.to(y.dtype)))
        return [y, total, *found]

    got = gradients(*norm(x, residual))
    total = x + residual
    want = gradients(norm(total), total)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))
    expected = reference(got[1], norm.weight, grad.to(got[0].dtype), size or 12)
    check({"y": got[0].detach()}, {"y": expected["y"]}, 8 * torch.finfo(got[0].dtype).eps)


@pytest.mark.parametrize("norm", [RMSNorm(12, 0.5), RMSNorm(12, eps=0.5), GroupRMSNorm(12, 4, 0.5)])
def test_eps(norm: RMSNorm | GroupRMSNorm) -> None:
    x, size = numbers(0, 3, 12), getattr(norm, "group_size", 12)
    torch.testing.assert_close(norm(x).detach().double(), reference(x, norm.weight, x, size, eps=0.5)["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_values(dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        want = nn.init.uniform_(torch.empty(40, dtype=dtype), -0.5, 2.0)
        torch.manual_seed(42)
        default = nn.init.uniform_(torch.empty(40), -1.0, 1.0)
    state = torch.get_rng_state()
    assert torch.equal(GroupRMSNorm(40, 8, 1e-5, (-0.5, 2.0), 3, dtype, "cpu").weight, want)
    assert torch.equal(GroupRMSNorm(40).weight, default)
    assert torch.equal(RMSNorm(40, dtype=dtype).weight, torch.ones(40, dtype=dtype))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("cls", [RMSNorm, GroupRMSNorm])
def test_meta_device(cls: Any) -> None:
    norm = cls(12, device="meta")
    assert norm.weight.is_meta
    norm.to_empty(device="cpu").reset_parameters()
    assert torch.equal(norm.weight, cls(12).weight)


def sharded(
    group: Group, hidden: int, size: int, rows: int = 7, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> dict[str, Any]:
    x, grad = (numbers(seed, 2, rows, hidden) for seed in (0, 1))
    x = (x * scale).clamp(-60000, 60000).to(dtype)
    x, grad = (t.chunk(group.world_size, -1)[group.rank].to(dtype, copy=True) for t in (x, grad))
    norm = GroupRMSNorm(hidden, size, group=group)
    x.requires_grad_()
    with Ledger() as ledger:
        y = norm(x)
        y.backward(grad)
    calls = [(record.op, record.phase) for record in ledger.records]
    parts = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "initial": norm.weight.detach()}
    return {"calls": calls, "shard_dims": norm.shard_dims(), "parts": parts}


def whole(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.cat([result["parts"][name] for result in results], -1) for name in results[0]["parts"]}


@pytest.mark.ranks(1, 2, 4, gloo=(2, 4))
@pytest.mark.parametrize(
    "size, communicating",
    [
        pytest.param(3, (), id="inside"),
        pytest.param(12, (4,), id="two-ranks"),
        pytest.param(24, (2, 4), id="all-ranks"),
        pytest.param(8, (2, 4), id="straddling"),
    ],
)
def test_sharded_over_hidden(ranks: Ranks, size: int, communicating: tuple[int, ...]) -> None:
    results = ranks(sharded, 24, size)
    got, weight = whole(results), GroupRMSNorm(24, size).weight
    assert torch.equal(got.pop("initial"), weight)
    check(got, reference(numbers(0, 2, 7, 24), weight, numbers(1, 2, 7, 24), size))
    once = [("all_reduce", "forward"), ("all_reduce", "backward")]
    assert all(result["calls"] == (once if ranks.world_size in communicating else []) for result in results)
    assert all(result["shard_dims"] == ({"weight": 0} if ranks.world_size > 1 else {}) for result in results)


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharded_statistics_are_wide(ranks: Ranks, size: int, dtype: torch.dtype) -> None:
    got = whole(ranks.on("simulated", 4)(sharded, 24, size, 7, dtype, 30000.0))
    x = (numbers(0, 2, 7, 24) * 30000).clamp(-60000, 60000).to(dtype)
    want = reference(x, GroupRMSNorm(24, size).weight, numbers(1, 2, 7, 24, dtype=dtype), size)
    assert got["y"].dtype == dtype
    for name, tolerance in (("y", torch.finfo(dtype).eps), ("weight", 1e-4)):
        torch.testing.assert_close(got[name].double(), want[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 77])
@pytest.mark.parametrize("hidden, size", [(64, 4), (64, 8), (64, 16), (64, 64), (48, 4), (512, 512)])
def test_same_bits_at_every_size(ranks: Ranks, hidden: int, size: int, rows: int) -> None:
    want = whole(ranks.on("simulated", 1)(sharded, hidden, size, rows, num_shards=8))
    different = []
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        got = whole(ranks.on(*place)(sharded, hidden, size, rows, num_shards=8))
        different += [(*place, name) for name in want if not torch.equal(got[name], want[name])]
    assert not different


def sharded_with_residual(group: Group, size: int, fused: bool) -> dict[str, Any]:
    x, residual, grad = (numbers(i, 2, 7, 24).chunk(group.world_size, -1)[group.rank] for i in range(3))
    norm, leaves = GroupRMSNorm(24, size, group=group), [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    total = leaves[0] + leaves[1]
    y, total = norm(*leaves) if fused else (norm(total), total)
    torch.autograd.backward((y, total), (grad, 2 * grad))
    return {"parts": {"y": y.detach(), "total": total.detach(), "x": leaves[0].grad, "weight": norm.weight.grad}}


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("size", [3, 8, 24])
@pytest.mark.parametrize("num_shards", [None, 4])
def test_residual_of_a_sharded_norm(ranks: Ranks, size: int, num_shards: int | None) -> None:
    got, want = (whole(ranks(sharded_with_residual, size, fused, num_shards=num_shards)) for fused in (True, False))
    assert all(torch.equal(got[name], want[name]) for name in want)


def given_no_group(group: Group) -> tuple[int, dict[str, int]]:
    norm = GroupRMSNorm(8)
    return norm.weight.numel(), norm.shard_dims()


def test_none_is_unsharded_among_ranks(ranks: Ranks) -> None:
    assert ranks.on("simulated", 2)(given_no_group) == [(8, {})] * 2


def copied(group: Group) -> None:
    norm = GroupRMSNorm(16, 16, group=group)
    twin, x = copy.deepcopy(norm), numbers(group.rank, 3, 8)
    assert twin.group is norm.group and twin.weight is not norm.weight
    assert torch.equal(twin(x), norm(x))
    with torch.no_grad():
        norm.weight.zero_()
    assert twin.weight.abs().sum() > 0


def test_deepcopy(ranks: Ranks) -> None:
    ranks.on("simulated", 2)(copied)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((8, 3), "group_size=3 must be positive and divide hidden_size=8"),
        ((8, 16), "group_size=16 must be positive and divide hidden_size=8"),
        ((8, -4), "group_size=-4 must be positive"),
        ((8, 0), "group_size=0 must be positive"),
    ],
)
def test_group_sizes_that_do_not_fit(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupRMSNorm(*arguments)


def too_narrow(group: Group) -> str:
    with pytest.raises(ValueError) as info:
        GroupRMSNorm(6, group=group)
    return str(info.value)


@pytest.mark.parametrize(
    "world_size, options, message",
    [
        (4, {}, "hidden_size=6 cannot be sharded over world_size=4 ranks; choose hidden_size as a multiple of 4"),
        (2, {"num_shards": 4}, "hidden_size=6 cannot be sharded over num_shards=4 logical shards (world_size=2 ranks)"),
    ],
)
def test_hidden_size_that_does_not_divide(ranks: Ranks, world_size: int, options: dict[str, int], message: str) -> None:
    assert all(message in text for text in ranks.on("simulated", world_size)(too_narrow, **options))


@pytest.mark.parametrize("cls", [RMSNorm, GroupRMSNorm])
@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(2, 7), ValueError, r"expects a last dim of 8, got a tensor of shape \[2, 7\]"),
        (torch.tensor(1.0), ValueError, r"expects a last dim of 8, got a tensor of shape \[\]"),
        (torch.zeros(2, 8, dtype=torch.int64), TypeError, r"expects floating-point activations, not torch.int64"),
    ],
)
def test_unfit_activations(cls: Any, x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=cls.__name__ + " " + message):
        cls(8)(x)


@pytest.mark.parametrize("cls", [RMSNorm, GroupRMSNorm])
@pytest.mark.parametrize("shape", [(8,), (2, 1, 8), (2, 3, 1)])
def test_a_residual_is_not_broadcast(cls: Any, shape: tuple[int, ...]) -> None:
    message = rf"{cls.__name__} expects a residual of shape \[2, 3, 8\], like x, got "
    with pytest.raises(ValueError, match=message + re.escape(str(list(shape)))):
        cls(8)(torch.zeros(2, 3, 8), torch.zeros(shape))
