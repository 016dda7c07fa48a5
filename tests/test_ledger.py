"""What the ledger records, to the byte and to the module, and the table it prints."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from src import Group, Ledger, simulate
from src.distributed import (
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    copy_to_region,
    gather_from_region,
    reduce_from_region,
    reduce_scatter,
    scatter_to_region,
)
from src.distributed.ledger_table import Row, human_bytes, text_table
from src.modeling import (
    ColumnParallelLinear,
    ModelArgs,
    RowParallelLinear,
    Transformer,
    vocab_parallel_cross_entropy,
)
from src.testing import Ranks


def counted(group: Group) -> Any:
    x = torch.ones(2, 6, dtype=torch.bfloat16, requires_grad=True)
    with Ledger() as outer:
        with Ledger() as inner:
            y = reduce_from_region(copy_to_region(x, group=group) * group.rank, group=group)
        y = y + gather_from_region(scatter_to_region(x, group=group), group=group)
        y.sum().backward()
        all_reduce(x.detach(), group=group)
        barrier(group)
    broadcast(x.detach(), group=group)
    records = [(r.op, r.phase, r.shape, r.dtype, r.payload_bytes, r.world_size) for r in outer.records]
    return records, inner.count(), outer.count("all_reduce"), outer.count(phase="backward"), outer.count()


@pytest.mark.ranks(2)
def test_every_collective_forward_and_backward(ranks: Ranks) -> None:
    whole, half = ((2, 6), torch.bfloat16, 24, 2), ((2, 3), torch.bfloat16, 12, 2)
    forward = [("all_reduce", "forward", *whole), ("all_gather", "forward", *half)]
    backward = [("all_gather", "backward", *half), ("all_reduce", "backward", *whole)]
    for records, inner, reductions, in_backward, everything in ranks(counted):
        assert records[:2] == forward and sorted(records[2:4]) == sorted(backward)
        assert records[4:] == [
            ("all_reduce", "forward", *whole),
            ("barrier", "forward", (0,), torch.float32, 0, 2),
        ]
        assert (inner, reductions, in_backward, everything) == (1, 3, 2, 6)


def test_it_belongs_to_its_rank_and_a_world_of_one_sends_nothing() -> None:
    def program(group: Group) -> int:
        with Ledger() as ledger:
            for _ in range(3):
                all_reduce(torch.ones(1), group=group)
        return ledger.count() if group.rank else -1

    assert simulate(program, 3) == [-1, 3, 3]
    assert simulate(counted, 1)[0][-1] == 0


def sent(group: Group, elements: int) -> dict[str, tuple[int, int]]:
    """Payload and bytes on the wire of each operation on float32 values."""
    x = torch.ones(elements)
    with Ledger() as ledger:
        all_reduce(x, group=group)
        all_reduce(x, group=group, op=dist.ReduceOp.MAX)
        all_gather(x, group=group)
        reduce_scatter(x, group=group)
        broadcast(x, group=group, src=1)
        barrier(group)
    names = ["all_reduce", "maximum", "all_gather", "reduce_scatter", "broadcast", "barrier"]
    return {name: (r.payload_bytes, r.wire_bytes) for name, r in zip(names, ledger.records, strict=True)}


@pytest.mark.ranks(2, 4, gloo=2)
@pytest.mark.parametrize("order", ["backend", "tree"])
def test_bytes_on_the_wire(ranks: Ranks, order: str) -> None:
    two = {"all_reduce": 96, "maximum": 96, "all_gather": 96, "reduce_scatter": 48, "broadcast": 48, "barrier": 0}
    four = {"all_reduce": 144, "maximum": 144, "all_gather": 288, "reduce_scatter": 72, "broadcast": 72, "barrier": 0}
    want = two if ranks.world_size == 2 else four | {"all_reduce": 288 if order == "tree" else 144}
    for got in ranks(sent, 24, reduce_order=order):
        assert got == {name: (96 if name != "barrier" else 0, wire) for name, wire in want.items()}


@pytest.mark.parametrize(
    "elements, order, wire",
    [
        (65536, "backend", 393216),
        (65536, "tree", 786432),  # 256 KiB: all terms are gathered, 3 times the payload
        (65540, "backend", 393240),
        (65540, "tree", 393240),  # above, as many bytes as in a ring
    ],
)
def test_a_large_tree_sum_sends_what_a_ring_sends(elements: int, order: str, wire: int) -> None:
    for got in simulate(sent, 4, elements, reduce_order=order):
        assert got["all_reduce"] == (4 * elements, wire)


class Pair(nn.Module):
    """Two columns of which the second one's gradient is sent first, and a row between."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(8, 16, group=group)
        self.down = RowParallelLinear(16, 8, group=group)
        self.again = nn.Sequential(ColumnParallelLinear(8, 4, group=group, gather_output=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.down(self.up(x)))


def modules_and_sites(group: Group) -> Any:
    model, x = Pair(group), torch.ones(3, 8, requires_grad=True)
    with Ledger() as ledger:
        line = inspect.currentframe().f_lineno + 1
        model(x).sum().backward()
    records = [(r.op, r.phase, r.module, r.site) for r in ledger.records]
    return records, [ledger.count(module=name) for name in ("up", "again", "again.0", "aga", "down")], line


@pytest.mark.ranks(2)
def test_modules_and_lines(ranks: Ranks) -> None:
    for records, counts, line in ranks(modules_and_sites):
        forward, backward = f"{__file__}:{inspect.getsourcelines(Pair.forward)[1] + 1}", f"{__file__}:{line}"
        assert records == [
            ("all_reduce", "forward", "down", forward),
            ("all_gather", "forward", "again.0", forward),
            ("all_reduce", "backward", "again.0", backward),
            ("all_reduce", "backward", "up", backward),
        ]
        assert counts == [1, 2, 2, 0, 1]


def test_nested_ledgers_and_an_error_inside() -> None:
    def program(group: Group) -> list[list[str]]:
        x, outer, inner = torch.ones(4), Ledger(), Ledger()
        with outer:
            all_reduce(x, group=group)
            with pytest.raises(KeyError), inner:
                all_gather(x, group=group)
                raise KeyError
            broadcast(x, group=group)
        barrier(group)
        return [[r.op for r in ledger.records] for ledger in (outer, inner)]

    assert simulate(program, 2) == [[["all_reduce", "all_gather", "broadcast"], ["all_gather"]]] * 2


ARGS = ModelArgs(dim=16, n_layers=3, n_heads=4, vocab_size=32, multiple_of=8, max_seq_len=4)
# Activations are 2 x 4 x 16 float32 values: 512 bytes, sent once between two ranks, 1.5 times between four; the loss
# gathers two float32 values per token: 64 bytes.
TWO = """\
module                   phase     op          count  payload  on the wire
tok_embeddings           forward   all_reduce      1    512 B        512 B
layers.0-2.attention     forward   all_reduce      3  1.5 KiB      1.5 KiB
layers.0-2.attention     backward  all_reduce      3  1.5 KiB      1.5 KiB
layers.0-2.feed_forward  forward   all_reduce      3  1.5 KiB      1.5 KiB
layers.0-2.feed_forward  backward  all_reduce      3  1.5 KiB      1.5 KiB
(no module)              forward   all_gather      1     64 B         64 B
output                   backward  all_reduce      1    512 B        512 B
total                    forward                   8  3.6 KiB      3.6 KiB
total                    backward                  7  3.5 KiB      3.5 KiB
total                                             15  7.1 KiB      7.1 KiB"""
FOUR = """\
module                   phase     op          count  payload  on the wire
tok_embeddings           forward   all_reduce      1    512 B        768 B
layers.0-2.attention     forward   all_reduce      3  1.5 KiB      2.2 KiB
layers.0-2.attention     backward  all_reduce      3  1.5 KiB      2.2 KiB
layers.0-2.feed_forward  forward   all_reduce      3  1.5 KiB      2.2 KiB
layers.0-2.feed_forward  backward  all_reduce      3  1.5 KiB      2.2 KiB
(no module)              forward   all_gather      1     64 B        192 B
output                   backward  all_reduce      1    512 B        768 B
total                    forward                   8  3.6 KiB      5.4 KiB
total                    backward                  7  3.5 KiB      5.2 KiB
total                                             15  7.1 KiB     10.7 KiB"""


def table(group: Group) -> tuple[str, str]:
    model, ids = Transformer(ARGS, group=group), torch.arange(8).view(2, 4)
    with Ledger() as ledger:
        vocab_parallel_cross_entropy(model(ids), ids, group=group).backward()
    return ledger.table(), str(ledger)


@pytest.mark.ranks(2, 4, gloo=2)
def test_table_of_a_model(ranks: Ranks) -> None:
    for tables in ranks(table):
        assert tables == ({2: TWO, 4: FOUR}[ranks.world_size],) * 2


def names(*rows: Row) -> list[str]:
    return [line.split("  ")[0] for line in text_table(rows).splitlines()[1:-3]]


def row(module: str, payload: int = 8, op: str = "all_reduce") -> Row:
    return Row(module, "forward", op, 1, payload, payload)


def test_only_neighbours_with_the_same_amounts_are_folded() -> None:
    assert names(*(row(f"a.{i}.b") for i in (0, 1, 2, 4, 5, 7))) == ["a.0-2.b", "a.4-5.b", "a.7.b"]
    assert names(*(row(f"a.{i}", payload=8 + (i == 2)) for i in range(5))) == ["a.0-1", "a.2", "a.3-4"]
    assert names(*(row(f"{i}") for i in (3, 2, 1))) == ["1-3"]
    assert names(row("a.0.b"), row("a.1.c"), row("b.1.b")) == ["a.0.b", "a.1.c", "b.1.b"]
    assert names(row("a.0"), row("a.1"), row("a.1")) == ["a.0", "a.1"]
    assert names(row("a.0"), row("a.1", op="broadcast")) == ["a.0", "a.1"]
    assert names(row("p.0.q.0"), row("p.0.q.1"), row("p.1.q.0"), row("p.1.q.1")) == ["p.0.q.0-1", "p.1.q.0-1"]
    assert names(row("layer1"), row("layer2"), row("")) == ["layer1", "layer2", "(no module)"]


def test_an_empty_ledger_has_totals_of_zero() -> None:
    header, *totals = str(Ledger()).splitlines()
    assert header.split() == ["module", "phase", "op", "count", "payload", "on", "the", "wire"]
    assert [line.split()[-5:] for line in totals] == [["0", "0", "B", "0", "B"] for _ in range(3)]


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**50, "3072.0 TiB"),
    ],
)
def test_human_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text
