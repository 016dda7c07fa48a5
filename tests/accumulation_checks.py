"""A table's gradient from the second micro-batch on, by the kernels for GPUs. ``test_kernels.py`` runs this file as it
runs ``kernel_checks.py``; ``test_embedding_gradient.py`` has the same of CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from src import Group
from src.functional import shard_embedding
from src.kernels import embedding, registry
from src.modeling import ParallelVocabEmbedding, vocab_parallel_linear_cross_entropy
from src.testing import Ranks
from tests.kernel_checks import DEVICE, dtypes, numbers

VOCAB, WIDTH = 64, 8


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEVICES", (DEVICE,))


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each backward, whether it added rows."""
    found: list[bool] = []

    def noted(*arguments: Any) -> Tensor:
        found.append(len(arguments) == 5)
        return sums(*arguments)

    sums = embedding._sums
    monkeypatch.setattr(embedding, "_sums", noted)
    yield found


@pytest.fixture
def whole_tables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls something with gradients that are whole tables."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(embedding, "is_added_to_grad", lambda node: False)
            return function(*arguments)

    return call


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Signs of zeros and NaNs included."""
    return one.layout == two.layout == torch.strided and torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def accumulated(group: Group | None, dtype: torch.dtype = torch.float32, way: str = "backward") -> Tensor:
    """Of three batches, of which the last has more tokens than one of eight ranks has rows."""
    registry.DEVICES = (DEVICE,)  # in a process of its own, too
    layer = ParallelVocabEmbedding(VOCAB, WIDTH, process_group=group, dtype=dtype, padding_idx=4).to(DEVICE)
    if way == "hook":
        layer.weight.register_hook(lambda grad: grad * 1)
    for i, tokens in enumerate((4, 6, 12)):
        ids = torch.randint(VOCAB // 4, (2, tokens // 2), generator=torch.Generator().manual_seed(i)) * 4
        out, grad = layer(ids.to(DEVICE)), numbers(i, 2, tokens // 2, WIDTH, dtype=dtype)
        if way == "grad":
            (found,) = torch.autograd.grad(out, layer.weight, grad)
            layer.weight.grad = found if layer.weight.grad is None else layer.weight.grad + found
        else:
            out.backward(grad)
    assert isinstance(layer.weight.grad, Tensor)
    return layer.weight.grad.cpu()


@dtypes
@pytest.mark.parametrize("way, added", [("backward", True), ("hook", False), ("grad", False)])
def test_bits(
    decisions: list[bool], whole_tables: Callable[..., Any], dtype: torch.dtype, way: str, added: bool
) -> None:
    got = accumulated(None, dtype, way)
    assert decisions == [False, added, added]
    assert same_bits(got, whole_tables(accumulated, None, dtype)) and not got[4].any()


@pytest.mark.parametrize("num_shards", [None, 8])
def test_every_size(ranks: Ranks, decisions: list[bool], num_shards: int | None) -> None:
    want = accumulated(None)
    for place in [("simulated", 2), ("simulated", 8), ("gloo", 2)]:
        assert same_bits(torch.cat(ranks.on(*place)(accumulated, num_shards=num_shards)), want)
    assert decisions.count(True) == 2 + 2 * 2 + 8


BATCHES = {
    "none": [],
    "one": [7],
    "all the same": [9] * 11,
    "all different": list(range(5, 16)),
    "of other shards": [-1, 3, 44, 99, 40],
    "first and last of this": [39, 4, 0, 40, 4, 39, 3],
    "all": [*range(4, 38), 38],
    "as many as rows": [4] * 36,
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_batches(name: str, id_dtype: torch.dtype, decisions: list[bool], whole_tables: Callable[..., Any]) -> None:
    """For rows 4 to 39, with infinities, NaNs, zeros and subnormal numbers in ``.grad`` or the batch."""
    ids = torch.tensor(BATCHES[name], dtype=id_dtype, device=DEVICE)
    dy, before = numbers(0, len(ids), WIDTH), numbers(1, 36, WIDTH)
    dy[:, 0], dy[:, 1], dy[:, 2] = -torch.inf, 1e-40, -0.0
    before[:, 1], before[::2, 3], before[1::2, 3] = -3e-40, torch.inf, torch.nan

    def step() -> Tensor:
        table = numbers(2, 36, WIDTH).requires_grad_()
        table.grad = before.clone()
        shard_embedding(ids, table, 4).backward(dy)
        return table.grad

    assert same_bits(step(), whole_tables(step))
    assert decisions == [len(ids) < 36, False]


def test_rows_are_distinct_and_sorted() -> None:
    """Else a GPU would lose numbers: without atomics it adds to each row what it read there."""
    table = numbers(2, 36, WIDTH).requires_grad_()
    table.grad = numbers(3, 36, WIDTH)
    seen: list[Tensor] = []
    node: Any = table.view_as(table).grad_fn
    node.next_functions[0][0].register_prehook(lambda grads: seen.extend(grads))
    shard_embedding(torch.tensor([30, 5, 5, 99, 30, -1, 8, 5], device=DEVICE), table, 0).sum().backward()
    (rows,) = seen
    assert rows.is_coalesced() and rows._indices().tolist() == [[0, 1, 2, 3, 4, 5, 8, 30]]
    assert rows._values()[:, 0].tolist() == [0, 0, 0, 0, 0, 3, 1, 2]


def test_two_lookups_in_one_backward(decisions: list[bool], whole_tables: Callable[..., Any]) -> None:
    """The second is dense: a sum of two sparse tensors would be added in any order. So it is in each backward."""
    ids = torch.tensor([1, 5, 5, 1, 8], device=DEVICE)

    def step() -> Tensor:
        table = numbers(2, 36, WIDTH).requires_grad_()
        table.grad = numbers(3, 36, WIDTH)
        for i in range(2):
            dy = numbers(i, 5, WIDTH)
            rows = shard_embedding(ids, table, 0) * dy + shard_embedding(ids.flip(0), table, 0) * dy.exp()
            (rows + shard_embedding(ids, table, 1)).sum().backward()
        return table.grad

    got = step()
    assert decisions == 2 * [True, False, False]
    assert same_bits(got, whole_tables(step))


def test_a_lookup_in_a_backward_inside_of_another(decisions: list[bool], whole_tables: Callable[..., Any]) -> None:
    ids, dy = torch.tensor([1, 5, 5, 1, 8], device=DEVICE), numbers(0, 5, WIDTH)

    def step() -> Tensor:
        table = numbers(2, 36, WIDTH).requires_grad_()
        table.grad = numbers(3, 36, WIDTH)
        rows = shard_embedding(ids, table, 0) * dy
        rows = checkpoint(lambda x: x * dy + shard_embedding(ids, table, 2), rows, use_reentrant=True)
        (rows + shard_embedding(ids, table, 1)).sum().backward()
        return table.grad

    got = step()
    assert decisions == [True, True, False]
    assert same_bits(got, whole_tables(step))


def test_a_table_that_is_the_head_too(decisions: list[bool], whole_tables: Callable[..., Any]) -> None:
    ids = torch.tensor([[1, 5, 5, 1, 8]], device=DEVICE)

    def step() -> Tensor:
        table = numbers(2, 36, WIDTH).requires_grad_()
        for _ in range(2):
            vocab_parallel_linear_cross_entropy(shard_embedding(ids, table, 0), table, ids, group=None).backward()
        assert table.grad is not None
        return table.grad

    got = step()
    assert decisions == [False, True]
    assert same_bits(got, whole_tables(step))


@pytest.mark.parametrize("layout", ["transposed", "sparse"])
def test_a_gradient_that_takes_no_rows(layout: str, decisions: list[bool]) -> None:
    ids, dy, table = torch.tensor([1, 3], device=DEVICE), numbers(1, 2, WIDTH), numbers(2, 36, WIDTH).requires_grad_()
    before = numbers(0, WIDTH, 36).t()
    table.grad = before.to_sparse(1) if layout == "sparse" else before.clone()
    shard_embedding(ids, table, 0).backward(dy)
    assert decisions == [False] and torch.equal(table.grad, before.index_add(0, ids, dy))


class Watch(TorchDispatchMode):
    """The ops that are called, and the bytes of each tensor that they allocate."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.seen = {t.untyped_storage().data_ptr() for t in known}
        self.ops: set[str] = set()
        self.allocated = [0]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.add(op.overloadpacket.__name__)
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                self.allocated += [storage.nbytes()] * (storage.data_ptr() not in self.seen)
        return out


WAITING = {"_local_scalar_dense", "nonzero", "_unique", "_unique2", "unique_consecutive", "masked_select", "equal"}
WAITING |= {"is_nonzero", "index", "index_put", "_coalesce", "repeat_interleave", "_to_copy", "lift_fresh", "_to_cpu"}


@pytest.fixture
def unwatched_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter calls torch itself."""

    def launch(*arguments: Any, **settings: Any) -> None:
        with _disable_current_modes():
            start(*arguments, **settings)

    start = embedding.launch
    monkeypatch.setattr(embedding, "launch", launch)


@pytest.mark.usefixtures("unwatched_launches")
def test_memory_and_no_waiting(decisions: list[bool], whole_tables: Callable[..., Any]) -> None:
    """No tensor is as large as a quarter of the table, and nothing asks the GPU for a number."""
    table = numbers(2, VOCAB, 64).requires_grad_()
    ids, dy = torch.tensor([1, 5, 5, 130, 1, -8], device=DEVICE), numbers(0, 6, 64)
    table.grad = torch.zeros_like(table)

    def step() -> Watch:
        assert table.grad is not None
        with Watch(table, table.grad) as watch:
            shard_embedding(ids, table, 0).backward(dy)
        return watch

    watch = step()
    assert decisions == [True] and "_sparse_coo_tensor_with_dims_and_tensors" in watch.ops
    assert 0 < max(watch.allocated) < table.nbytes // 4
    assert not watch.ops & WAITING
    assert max(whole_tables(step).allocated) >= table.nbytes


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_memory_and_no_waiting_on_a_gpu(decisions: list[bool]) -> None:
    """As the allocator and the driver see it, in what autograd does, too."""
    table = torch.zeros(2**16, 256, device=DEVICE, requires_grad=True)
    ids, dy = torch.arange(8, device=DEVICE), numbers(0, 8, 256)
    table.grad = torch.zeros_like(table)
    for mode in ("default", "error"):  # what is compiled first may wait
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            shard_embedding(ids, table, 0).backward(dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.max_memory_allocated() - before < table.nbytes // 4
    assert decisions == [True, True] and torch.equal(table.grad[:8], dy + dy)
