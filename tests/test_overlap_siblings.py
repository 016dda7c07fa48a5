"""Children of a parallelized module that get one tensor: the sum of its gradient runs during those of their weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src import Group, Heads, Ledger, SimulationError, parallelize, simulate
from src.distributed import overlap
from src.modeling import columns
from src.testing import Ranks
from tests import test_tensor_parallel
from tests.test_overlap import DX, Products, at_any_size, in_order, weight_grad


def mixed(*parts: Tensor) -> Tensor:
    return torch.cat([part.sin() for part in parts], -1)


class Siblings(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return mixed(self.q(x), self.k(x), self.v(x))

    def ready(self) -> None:
        """Called when the layers are parallel."""


class Repeated(Siblings):
    """One child is called twice, one never."""

    def forward(self, x: Tensor) -> Tensor:
        return mixed(self.q(x), self.k(x), self.q(x))


class Replaced(Siblings):
    """A parameter is replaced after the first child was called."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        self.k.weight = nn.Parameter(self.k.weight.detach() * 2)
        return mixed(y, self.k(x), self.v(x))


class Changed(Siblings):
    """A parameter is changed in place after the first child was called."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        with torch.no_grad():
            self.k.bias.mul_(2)
        return mixed(y, self.k(x), self.v(x))


class Precise(Siblings):
    """One child is kept out of autocast, one is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        with torch.autocast("cpu", enabled=False):
            z = self.k(x)
        return mixed(y, z, self.v.requires_grad_(False)(x))


class InPlace(Siblings):
    """The output of a child is modified."""

    def forward(self, x: Tensor) -> Tensor:
        return mixed(self.q(x).relu_(), self.k(x), self.v(x))


class Recomputed(Siblings):
    """Each call of a child is recomputed in backward."""

    def forward(self, x: Tensor) -> Tensor:
        children = self.q, self.k, self.q
        return mixed(*(checkpoint(child, x, use_reentrant=False) for child in children))


class Fetched(Siblings):
    """A weight is there only while its layer runs."""

    def ready(self) -> None:
        kept, self.k.weight.data = self.k.weight.data, torch.empty(0)

        def fetch(layer: nn.Module, _: Any) -> None:
            layer.weight.data = kept

        self.k.register_forward_pre_hook(fetch)


class TwoInputs(Siblings):
    def forward(self, x: Tensor) -> Tensor:
        other = x * 2
        return mixed(self.q(x), self.k(other), self.v(other))


KINDS = [Siblings, Repeated, Replaced, Changed, Precise, InPlace, Recomputed, Fetched, TwoInputs]
PLANS: dict[str, dict[str, Any]] = {
    "columns": {"?": "column"},
    "heads": {"q": Heads(8), "[kv]": Heads(8, 2)},
}


def siblings(kind: type[Siblings], group: Group, plan: str = "columns", width: int = 48) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: Any = parallelize(kind(width), group, PLANS[plan])
    module.ready()
    return module


def events(group: Group) -> list[Any]:
    y = siblings(Siblings, group, width=12 * group.world_size)(torch.ones(2, 8, 16, requires_grad=True))
    with Ledger() as ledger, Products(ledger):
        y.sum().backward()
    return in_order(ledger)


@pytest.mark.ranks(2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 4])
def test_order(ranks: Ranks, num_shards: int | None) -> None:
    count, dw = 3 * (num_shards or ranks.world_size) // ranks.world_size, weight_grad(ranks, num_shards)
    want = [DX] * count + ["started all_reduce"] + [dw] * count + ["waited all_reduce"]
    assert ranks(at_any_size, events, num_shards=num_shards) == [want] * ranks.world_size


def through(group: Group, kind: type[Siblings], plan: str, autocast: bool, asked_before: bool) -> list[Tensor | None]:
    """Output and gradients; with ``asked_before``, those that autograd.grad gives for the same graph as well."""
    module = siblings(kind, group, plan)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    before: list[Tensor] = []
    for inputs in ([x], [module.q.weight, module.q.bias]) if asked_before else ():
        before += torch.autograd.grad(y, inputs, grad, retain_graph=True)
    y.backward(grad)
    return [y.detach(), *before, x.grad, *(p.grad for p in module.parameters())]


def both_ways(group: Group, *args: Any) -> list[bool]:
    want, got = through(group, *args), at_any_size(group, through, *args)
    assert len(got) == len(want)
    return [a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(got, want, strict=True)]


@pytest.mark.ranks(2, gloo=2)
@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_one_after_the_other(
    ranks: Ranks, kind: type[Siblings], autocast: bool, asked_before: bool
) -> None:
    for num_shards in (None, 8):
        plan = "columns" if num_shards is None else "heads"
        for same in ranks(both_ways, kind, plan, autocast, asked_before, num_shards=num_shards):
            assert all(same), (num_shards, same)


@pytest.mark.ranks(2, 4, gloo=2)
def test_values_and_gradients(ranks: Ranks) -> None:
    reference = test_tensor_parallel.net()
    want = reference(test_tensor_parallel.IDS)
    test_tensor_parallel.loss_of(want).backward()
    for logits, grads in ranks(at_any_size, test_tensor_parallel.run, False, "column_gather"):
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


def test_same_bits_at_every_size(ranks: Ranks) -> None:
    run = (test_tensor_parallel.run, True, "column_gather")
    want_logits, want = ranks.on("simulated", 1)(*run, num_shards=8)[0]
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        for logits, grads in ranks.on(*place)(at_any_size, *run, num_shards=8):
            assert torch.equal(logits, want_logits), place
            assert not [name for name in want if not torch.equal(grads[name], want[name])], place


def test_weights_that_are_no_plain_tensors_are_multiplied_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Parameter):
        pass

    def program(group: Group) -> list[Any]:
        module = siblings(Siblings, group)
        module.k.weight.__class__ = Other
        with Ledger() as ledger, Products(ledger):
            module(torch.ones(2, 8, 16, requires_grad=True)).sum().backward()
        return in_order(ledger)

    monkeypatch.setattr(columns, "MIN_BYTES", 0)
    for found in simulate(program, 2):
        assert found.index("started all_reduce") - len(found) == -4  # dW of v, dW of q, waited


@pytest.fixture
def without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_gc")
def test_inputs_are_freed_with_their_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(group: Group) -> list[bool]:
        module, found = siblings(Siblings, group), []
        for backward in (True, False):
            x = torch.ones(2, 8, 16, requires_grad=True)
            y = module(x)
            if backward:
                y.sum().backward()
            reference = weakref.ref(x)
            del x, y
            found.append(reference() is None)
        return found

    monkeypatch.setattr(columns, "MIN_BYTES", 0)
    assert simulate(program, 2) == [[True, True]] * 2


@pytest.mark.usefixtures("without_gc")
def test_weights_are_freed_with_their_module() -> None:
    module = siblings(Siblings, Group.single())
    module(torch.ones(2, 8, 16, requires_grad=True))
    reference = weakref.ref(module.q.weight)
    del module
    assert reference() is None


def test_nothing_is_left_for_gradients_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[list[Any]] = []

    def program(group: Group) -> None:
        x = torch.ones(2, 8, 16, requires_grad=True)
        y = siblings(Siblings, group)(x)
        torch.autograd.grad(y.sum(), [x])

    prepared = overlap.Prepared
    monkeypatch.setattr(overlap, "Prepared", lambda *args: left.append(args[-1]) or prepared(*args))
    monkeypatch.setattr(columns, "MIN_BYTES", 0)
    simulate(program, 2)
    assert left == [[]] * 6


def test_second_derivatives_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(group: Group) -> None:
        x = torch.ones(2, 8, 16, requires_grad=True)
        (grad,) = torch.autograd.grad(siblings(Siblings, group)(x).sum(), [x], create_graph=True)
        grad.sum().backward()

    for size in (0, columns.MIN_BYTES):
        monkeypatch.setattr(columns, "MIN_BYTES", size)
        with pytest.raises(SimulationError, match=r"differentiated? twice"):
            simulate(program, 2)


def test_a_second_input_is_prepared_for_who_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, prepare = [], overlap.EarlySum.prepare
    monkeypatch.setattr(overlap.EarlySum, "prepare", lambda *args: calls.append(1) or prepare(*args))
    monkeypatch.setattr(columns, "MIN_BYTES", 0)
    simulate(lambda group: siblings(TwoInputs, group)(torch.ones(2, 8, 16, requires_grad=True)), 2)
    assert len(calls) == 2 * (3 + 1 + 1)
