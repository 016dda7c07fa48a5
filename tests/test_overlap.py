"""Collectives beside matrix products: the order of events, the bits of the plain way, gradients against a reference."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from src import Group, Heads, Ledger, SimulationError, parallelize, simulate
from src.distributed import (
    all_reduce,
    barrier,
    collectives,
    overlap,
    reduce_scatter,
    shared_collectives,
    start_all_reduce,
    start_reduce_scatter,
)
from src.distributed.group import ReduceOrder
from src.distributed.shared_collectives import RING_BYTES
from src.kernels import cpu_linear
from src.modeling import (
    Attention,
    ColumnParallelLinear,
    FeedForward,
    KVParallelLinear,
    LMHead,
    ModelArgs,
    RowParallelLinear,
    TransformerBlock,
    columns,
    linear,
    precompute_freqs_cis,
)
from src.testing import Ranks
from tests import test_compile, test_linear, test_same_bits

LOWEST: dict[Any, Any] = {(columns, "MIN_BYTES"): 0, (linear, "MIN_FLOPS"): 0, (collectives, "GATHER_BYTES"): 0}
LOWEST[shared_collectives, "DTYPES"] = ()  # what goes through shared memory is not summed on the side
USUAL = {place: getattr(*place) for place in LOWEST}


def set_sizes(sizes: dict[Any, Any]) -> None:
    for (module, name), size in sizes.items():
        setattr(module, name, size)


def at_any_size(group: Group, program: Callable[..., Any], *args: Any) -> Any:
    """``program(group, *args)`` that overlaps whatever the sizes and the place; simulated ranks share both."""
    barrier(group)
    set_sizes(LOWEST)
    try:
        result = program(group, *args)
        barrier(group)
        return result
    finally:
        set_sizes(USUAL)


def in_memory_up_to(group: Group, ring_bytes: int, program: Callable[..., Any], *args: Any) -> Any:
    """The same on processes that share memory, which sums three or more terms up to this size."""
    with pytest.MonkeyPatch.context() as patch:
        for place, size in LOWEST.items():
            patch.setattr(*place, USUAL[place] if place[0] is shared_collectives else size)
        patch.setattr(shared_collectives, "RING_BYTES", ring_bytes)
        return program(group, *args)


@pytest.fixture(autouse=True)
def sizes_as_found() -> Any:
    yield
    assert {place: getattr(*place) for place in LOWEST} == USUAL


class Products(TorchDispatchMode):
    """Enters the shape of each matrix product among the events of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.events: list[Any] = ledger.events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.events.append(tuple(out.shape))
        return out


def in_order(ledger: Ledger) -> list[Any]:
    return [event if isinstance(event, tuple) else f"{event.kind} {event.record.op}" for event in ledger.events]


def events_of_column(group: Group, layers: int, sequence_parallel: bool) -> list[Any]:
    """Backward of layers ``[12, 16]`` a rank that share 2 x 8 tokens."""
    modules = [ColumnParallelLinear(16, 12 * group.world_size, group=group) for _ in range(layers)]
    x = torch.ones(2, 8 // (group.world_size if sequence_parallel else 1), 16, requires_grad=True)
    place: Any = {"group": group, "sequence_parallel": sequence_parallel}
    total = sum(torch.cat(shards, -1).sum() for shards in columns.column_shards(x, modules, **place))
    with Ledger() as ledger, Products(ledger):
        total.backward()
    return in_order(ledger)


def events_of_parallelized(group: Group, style: str) -> list[Any]:
    model = parallelize(nn.Sequential(nn.Linear(16, 12 * group.world_size)), group, {"0": style})
    y = model(torch.ones(2, 8, 16, requires_grad=True))
    with Ledger() as ledger, Products(ledger):
        y.sum().backward()
    return in_order(ledger)


DX = (16, 16)


def weight_grad(ranks: Ranks, num_shards: int | None) -> tuple[int, int]:
    return (12 * ranks.world_size // (num_shards or ranks.world_size), 16)


@pytest.mark.ranks(2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 4])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_weight_gradients_are_computed_while_the_input_gradient_is_summed(
    ranks: Ranks, layers: int, num_shards: int | None, sequence_parallel: bool
) -> None:
    count = layers * (num_shards or ranks.world_size) // ranks.world_size
    op, dw = "reduce_scatter" if sequence_parallel else "all_reduce", weight_grad(ranks, num_shards)
    want = [DX] * count + [f"started {op}"] + [dw] * count + [f"waited {op}"]
    results = ranks(at_any_size, events_of_column, layers, sequence_parallel, num_shards=num_shards)
    assert results == [want] * ranks.world_size


@pytest.mark.ranks(2, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 4])
@pytest.mark.parametrize("style", ["column", "column_gather", "lm_head"])
def test_so_does_a_parallelized_layer_that_shares_its_input_with_no_other(
    ranks: Ranks, style: str, num_shards: int | None
) -> None:
    count = (num_shards or 2) // 2
    want = [DX] * count + ["started all_reduce"] + [weight_grad(ranks, num_shards)] * count + ["waited all_reduce"]
    assert ranks(at_any_size, events_of_parallelized, style, num_shards=num_shards) == [want] * 2


@pytest.mark.ranks(2, gloo=2)
def test_small_gradients_are_summed_after_everything(ranks: Ranks) -> None:
    for events in ranks(events_of_column, 2, False):
        assert sorted(events[:4]) == [(12, 16)] * 2 + [DX] * 2 and events[4:] == ["called all_reduce"]


def events_of_row(group: Group) -> tuple[list[Any], list[Any]]:
    layer, x = RowParallelLinear(12 * group.world_size, 10, group=group), torch.ones(4, 3, 12, requires_grad=True)
    with Ledger() as ledger, Products(ledger):
        y = layer(x)
    with Ledger() as backward, Products(backward):
        y.sum().backward()
    return in_order(ledger), in_order(backward)


GAINS: dict[str, tuple[bool, dict[str, Any]]] = {
    "all gradients": (True, {}),
    "bias alone frozen": (True, {"freeze": ["bias"]}),
    "a part of the sequence": (True, {"length": 4, "sequence_parallel": True}),
    "a world of one": (False, {}),
    "input without gradient": (False, {"with_grad": False}),
    "weight frozen": (False, {"freeze": ["weight"]}),
    "evaluation": (False, {"evaluating": True}),
    "a token too short": (False, {"length": 7}),
    "a part too short": (False, {"length": 3, "sequence_parallel": True}),
}


@pytest.mark.parametrize("situation", GAINS)
def test_where_something_is_gained(monkeypatch: pytest.MonkeyPatch, situation: str) -> None:
    calls, plain = [], columns.EarlySum
    monkeypatch.setattr(columns, "EarlySum", lambda *args, **named: calls.append(1) or plain(*args, **named))
    monkeypatch.setattr(columns, "MIN_BYTES", 2 * 8 * 16 * 4)
    gains, options = GAINS[situation]

    def program(
        group: Group,
        length: int = 8,
        with_grad: bool = True,
        freeze: tuple[str, ...] = (),
        evaluating: bool = False,
        **place: bool,
    ) -> None:
        layer = frozen(ColumnParallelLinear(16, 24, group=group, **place), *freeze)
        x = torch.ones(2, length, 16, requires_grad=with_grad)
        with torch.set_grad_enabled(not evaluating):
            layer(x)

    world_size = 1 if situation == "a world of one" else 2
    simulate(lambda group: program(group, **options), world_size)
    assert len(calls) == (world_size if gains else 0)


def products_of_row(group: Group, x_learns: bool, weight_learns: bool) -> list[Any]:
    layer = RowParallelLinear(12 * group.world_size, 10, group=group)
    layer.weight.requires_grad_(weight_learns)
    y = layer(torch.ones(4, 3, 12, requires_grad=x_learns))
    with Ledger() as ledger, Products(ledger):
        y.sum().backward()
    return in_order(ledger)


@pytest.mark.ranks(2, gloo=2)
def test_chunks_compute_no_gradient_that_nobody_asks_for(ranks: Ranks) -> None:
    assert ranks(at_any_size, products_of_row, True, False) == [[(12, 12)]] * 2
    assert ranks(at_any_size, products_of_row, False, True) == [[(10, 12)]] * 2


def bytes_of_a_sum(group: Group) -> int:
    """A half-precision input under autocast to another, and no gradient in one of two logical shards."""
    layer = ColumnParallelLinear(8, 16, group=group, dtype=torch.float16)
    x = torch.ones(3, 8, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (shards,) = columns.column_shards(x, [layer], group=group)
    with Ledger() as ledger:
        shards[0].sum().backward()
    return ledger.records[0].payload_bytes


@pytest.mark.ranks(2, gloo=2)
def test_a_shard_that_is_not_used_changes_no_dtype(ranks: Ranks) -> None:
    for program in ((bytes_of_a_sum,), (at_any_size, bytes_of_a_sum)):
        assert ranks(*program, num_shards=4) == [3 * 8 * 2] * 2


@pytest.mark.ranks(2, 4, gloo=2)
def test_a_chunk_is_summed_while_the_next_one_is_multiplied(ranks: Ranks) -> None:
    started = [(3, 10), "started all_reduce"] * overlap.CHUNKS
    want = started + ["waited all_reduce"] * overlap.CHUNKS, [(12, 12), (10, 12)]
    for found in ranks(at_any_size, events_of_row):
        assert found[0] == want[0] and sorted(found[1]) == sorted(want[1])


@pytest.mark.ranks(2, gloo=2)
@pytest.mark.parametrize("order", [{"num_shards": 2}, {"num_shards": 4}, {"reduce_order": "tree"}], ids=str)
def test_chunks_are_barred_where_bits_are_promised(ranks: Ranks, order: dict[str, Any]) -> None:
    for forward, _ in ranks(at_any_size, events_of_row, **order):
        assert forward[-1] == "called all_reduce" and forward.count("called all_reduce") == 1


def test_chunks_are_for_large_products() -> None:
    for forward, _ in simulate(events_of_row, 2):
        assert forward == [(12, 10), "called all_reduce"]


@pytest.mark.ranks(gloo=(2, 3), simulated=())
@pytest.mark.parametrize("ring_bytes", [120, 479, 480])
def test_chunks_are_barred_where_memory_has_the_whole_sum(ranks: Ranks, ring_bytes: int) -> None:
    """A sum of 480 bytes, in chunks of 120."""
    if ranks.world_size == 2 or ring_bytes == 480:
        want: list[Any] = [(12, 10), "called all_reduce"]
    else:
        want = [(3, 10), "called all_reduce"] * overlap.CHUNKS
    for forward, backward in ranks(in_memory_up_to, ring_bytes, events_of_row):
        assert forward == want and sorted(backward) == [(10, 12), (12, 12)]


@pytest.mark.ranks(gloo=3, simulated=())
def test_chunks_that_memory_does_not_sum_are_started(ranks: Ranks) -> None:
    want = [(3, 10), "started all_reduce"] * overlap.CHUNKS + ["waited all_reduce"] * overlap.CHUNKS
    assert [forward for forward, _ in ranks(in_memory_up_to, 119, events_of_row)] == [want] * 3


def events_of_sums(group: Group, order: ReduceOrder) -> tuple[list[Any], bool, bool]:
    """A sum of 480 bytes both ways: events, whether the bits and the records are those of the plain one."""
    group = Group(group.pg, reduce_order=order)
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(group.rank)) * 3**group.rank
    with Ledger() as plain:
        want = all_reduce(x, group=group), reduce_scatter(x, group=group)
    with Ledger() as ledger:
        got = start_all_reduce(x, group=group)(), start_reduce_scatter(x, group=group)()
    sent = [[(r.op, r.payload_bytes, r.wire_bytes) for r in found.records] for found in (plain, ledger)]
    return in_order(ledger), all(map(torch.equal, got, want)), sent[0] == sent[1]


@pytest.mark.ranks(gloo=(2, 3), simulated=())
@pytest.mark.parametrize("order", ["backend", "tree"])
@pytest.mark.parametrize("ring_bytes", [479, 480])
def test_sums_that_memory_leaves_to_the_backend_are_started(ranks: Ranks, ring_bytes: int, order: ReduceOrder) -> None:
    beside = ranks.world_size > 2 and ring_bytes < 480 and order == "backend"
    kinds = ["started", "waited"] if beside else ["called"]
    want = [f"{kind} {op}" for op in ("all_reduce", "reduce_scatter") for kind in kinds], True, True
    assert ranks(in_memory_up_to, ring_bytes, events_of_sums, order) == [want] * ranks.world_size


@pytest.mark.ranks(gloo=4, simulated=())
@pytest.mark.parametrize("ring_bytes", [0, RING_BYTES])
def test_layers_whose_sums_memory_leaves_to_the_backend(ranks: Ranks, ring_bytes: int) -> None:
    want = test_linear.reference()
    got = ranks(in_memory_up_to, ring_bytes, test_linear.column, False)
    test_linear.check(test_linear.whole(got, PARTS), want)
    got = ranks(in_memory_up_to, ring_bytes, test_linear.row, True)
    test_linear.check(test_linear.whole(got, {"weight": 1, "x": -1}), want)


PARTS = {"y": -1, "weight": 0, "bias": 0}


@pytest.mark.ranks(2, 4, gloo=(2, 4))
@pytest.mark.parametrize("num_shards", [None, 8])
def test_column_against_the_reference(ranks: Ranks, num_shards: int | None) -> None:
    got = ranks(at_any_size, test_linear.column, False, num_shards=num_shards)
    test_linear.check(test_linear.whole(got, PARTS), test_linear.reference())


@pytest.mark.ranks(2, 4, gloo=(2, 4))
@pytest.mark.parametrize("parallel_input", [False, True])
def test_row_against_the_reference(ranks: Ranks, parallel_input: bool) -> None:
    dims = {"weight": 1} | ({"x": -1} if parallel_input else {})
    got = ranks(at_any_size, test_linear.row, parallel_input)
    test_linear.check(test_linear.whole(got, dims), test_linear.reference())


def parallelized(style: Any, *, group: Group, dtype: torch.dtype) -> nn.Module:
    """A linear to the given style, alone in its module."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return parallelize(nn.Sequential(nn.Linear(32, 48, dtype=dtype)), group, {"0": style})


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in names)
    return module


ARGS = ModelArgs(dim=32, n_heads=8, n_kv_heads=2, vocab_size=51, multiple_of=32, max_seq_len=8)
MODULES: dict[str, Callable[..., nn.Module]] = {
    "column": lambda **place: ColumnParallelLinear(32, 48, **place),
    "column, weight frozen": lambda **place: frozen(ColumnParallelLinear(32, 48, **place), "weight"),
    "column, all frozen": lambda **place: frozen(ColumnParallelLinear(32, 48, **place), "weight", "bias"),
    "gathered": lambda **place: ColumnParallelLinear(32, 48, gather_output=True, **place),
    "kv heads": lambda **place: KVParallelLinear(32, 2, 6, bias=True, **place),
    "head": lambda **place: LMHead(32, 51, pad_vocab=True, **place),
    "feed forward": lambda **place: FeedForward(32, 128, 32, **place),
    "feed forward, w1 frozen": lambda **place: frozen(FeedForward(32, 128, 32, **place), "w1.weight"),
    "attention": lambda **place: Attention(ARGS, **place),
    "block": lambda **place: TransformerBlock(0, ARGS, **place),
    "recomputed block": lambda **place: TransformerBlock(0, ARGS, **place),
    "block [s]": lambda **place: TransformerBlock(0, ARGS, sequence_parallel=True, **place),
    "parallelized column": lambda **place: parallelized("column", **place),
    "parallelized column, gathered": lambda **place: parallelized("column_gather", **place),
    "parallelized kv heads": lambda **place: parallelized(Heads(8, 2), **place),
    "head [s]": lambda **place: LMHead(32, 51, pad_vocab=True, sequence_parallel=True, **place),
}


def through(group: Group, kind: str, dtype: torch.dtype, autocast: bool, with_grad: bool = True) -> list[Tensor | None]:
    """Output and gradients of a module used twice, on gradients that differ between ranks where y is sharded."""
    module = MODULES[kind](group=group, dtype=dtype)
    shape = (3, 8 // (group.world_size if "[s]" in kind else 1), 32)
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_(with_grad)
    rotation = (0, precompute_freqs_cis(4, 8)) if isinstance(module, Attention | TransformerBlock) else ()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if "recomputed" in kind:
            ys = [checkpoint(module, x * scale, *rotation, use_reentrant=False) for scale in (1, 2)]
        else:
            ys = [module(x * scale, *rotation) for scale in (1, 2)]
    for i, y in enumerate(ys):
        if y.requires_grad:
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2 + i)).to(y.dtype))
    return [*(y.detach() for y in ys), x.grad, *(p.grad for p in module.parameters())]


def both_ways(group: Group, *args: Any) -> list[bool]:
    """Whether all bits are those of the plain way. Chunks are left out: they may change bits."""
    want = through(group, *args)
    usual, LOWEST[linear, "MIN_FLOPS"] = LOWEST[linear, "MIN_FLOPS"], USUAL[linear, "MIN_FLOPS"]
    try:
        got = at_any_size(group, through, *args)
    finally:
        LOWEST[linear, "MIN_FLOPS"] = usual
    assert len(got) == len(want)
    return [a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(got, want, strict=True)]


NUMBERS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


@pytest.mark.ranks(2, gloo=2)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("kind", MODULES)
def test_same_bits_as_the_plain_way(ranks: Ranks, kind: str, numbers: str) -> None:
    for num_shards in (None, 8):
        for same in ranks(both_ways, kind, *NUMBERS[numbers], num_shards=num_shards):
            assert all(same), (num_shards, same)


def unneeded_parts(group: Group) -> list[bool]:
    """An input without gradient, no gradients at all, and outputs of which one is not used."""
    with torch.no_grad():
        without = both_ways(group, "block", torch.float32, False, False)
    return without + both_ways(group, "block", torch.float32, False, False) + unused(group)


def unused(group: Group) -> list[bool]:
    layers = [ColumnParallelLinear(8, 16, group=group, init_base_seed=i) for i in range(2)]
    found = []
    for sizes in (USUAL, LOWEST):
        barrier(group)
        set_sizes(sizes)
        x = torch.ones(2, 4, 8, requires_grad=True)
        (first, *_), _ = columns.column_shards(x, layers, group=group)
        first.square().sum().backward()
        found.append([x.grad, layers[0].weight.grad, layers[0].bias.grad])
        layers[0].weight.grad = layers[0].bias.grad = None
        assert layers[1].weight.grad is None and layers[1].bias.grad is None
    barrier(group)
    set_sizes(USUAL)
    return [torch.equal(a, b) for a, b in zip(*found, strict=True)]


@pytest.mark.ranks(2, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 4])
def test_parts_that_nobody_asks_for(ranks: Ranks, num_shards: int | None) -> None:
    for same in ranks(unneeded_parts, num_shards=num_shards):
        assert all(same)


@pytest.mark.parametrize("variant", ["dense", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_training_has_the_same_bits_at_every_size(ranks: Ranks, variant: str, dtype: torch.dtype) -> None:
    run = (test_same_bits.train, *test_same_bits.VARIANTS[variant], dtype)
    want = test_same_bits.whole(ranks.on("simulated", 1)(*run, num_shards=8))
    for place in [("simulated", 2), ("simulated", 4), ("gloo", 2)]:
        got = test_same_bits.whole(ranks.on(*place)(at_any_size, *run, num_shards=8))
        assert [name for name in want if not torch.equal(got[name], want[name])] == [], place


def compiled(group: Group) -> Any:
    return test_compile.compiled_and_eager(group, test_compile.ARGS, False, "aot_eager")


def test_a_compiled_graph_orders_its_work_by_itself(ranks: Ranks) -> None:
    for got, want, graphs in ranks.on("gloo", 2)(at_any_size, compiled):
        assert graphs == 1
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def started(group: Group, dtype: torch.dtype) -> list[bool]:
    """Whether started sums have the bits of those that are waited for at once, whatever becomes of their input."""
    x = torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(group.rank)).to(dtype)
    found = []
    for view in (lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x[:, :, 0]):
        tensor = view(x.clone())
        before = tensor.clone()
        finish, scattered = start_all_reduce(tensor, group=group), start_reduce_scatter(tensor, group=group, dim=1)
        untouched = torch.equal(tensor, before)
        tensor.zero_()
        got = finish(), scattered()
        want = all_reduce(before, group=group), reduce_scatter(before, group=group, dim=1)
        found += [untouched, *map(torch.equal, got, want)]
    return found


@pytest.mark.ranks(2, 4, gloo=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["backend", "tree"])
def test_started_sums(ranks: Ranks, order: str, dtype: torch.dtype) -> None:
    for program in (started, at_any_size):
        args = (dtype,) if program is started else (started, dtype)
        for same in ranks(program, *args, reduce_order=order):
            assert all(same), same


def test_a_started_sum_is_in_every_ledger_that_saw_it() -> None:
    def program(group: Group) -> list[list[str]]:
        with Ledger() as outer:
            with Ledger() as inner:
                finish = start_all_reduce(torch.ones(3), group=group)
            all_reduce(torch.ones(1), group=group)
            finish()
        assert [outer.records[0], outer.count()] == [inner.records[0], 2]
        return [in_order(ledger) for ledger in (outer, inner)]

    started_and_waited = ["started all_reduce", "waited all_reduce"]
    want = [["started all_reduce", "called all_reduce", "waited all_reduce"], started_and_waited]
    assert simulate(program, 2) == [want] * 2


def leaves_early(group: Group) -> None:
    y = ColumnParallelLinear(8, 4, group=group)(torch.ones(2, 8, requires_grad=True))
    if group.rank == 0:
        y.sum().backward()


def test_faults_name_the_collective_that_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MIN_BYTES", 0)
    line = inspect.getsourcelines(leaves_early)[1] + 3
    call = rf"all_reduce\(SUM, float32\[2, 8\]\) in ColumnParallelLinear, backward, at {re.escape(__file__)}:{line}"
    with pytest.raises(SimulationError, match=call) as caught:
        simulate(leaves_early, 2)
    assert "rank 1" in str(caught.value)


def test_wide_products_are_those_of_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "has_bfloat16_units", lambda: False)
    monkeypatch.setattr(cpu_linear, "WEIGHT_ELEMENTS", 200)
    for numbers in ("bf16", "autocast"):
        for same in simulate(both_ways, 2, "block", *NUMBERS[numbers], num_shards=4):
            assert all(same), numbers
