"""``parallelize`` on plain modules: values and gradients of the original, one all-reduce for what shares an input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from src import Group, Heads, Ledger, parallelize, simulate
from src.checkpoint import load, save
from src.modeling import (
    ColumnParallelLinear,
    KVParallelLinear,
    LMHead,
    ParallelVocabEmbedding,
    vocab_parallel_cross_entropy,
)
from src.modeling.parameters import placements
from src.testing import Ranks
from src.training import clip_grad_norm_

VOCAB, WIDTH, HEADS, KV_HEADS = 21, 16, 8, 2
IDS = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
IDS[0, 3] = 5  # the padding id


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32 // HEADS * KV_HEADS)
        self.v, self.o = nn.Linear(WIDTH, 32 // HEADS * KV_HEADS), nn.Linear(32, WIDTH)
        self.up, self.act, self.down = nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (proj(h).unflatten(-1, (-1, 32 // HEADS)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.o(mixed.transpose(1, 2).flatten(2)) + self.down(self.act(self.up(h)))


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=5)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


PLAN: dict[str, Any] = {
    "embed": "embedding",
    "blocks.*.norm": "replicate",
    "blocks.*.q": Heads(HEADS),
    "blocks.*.[kv]": Heads(HEADS, KV_HEADS),
    "blocks.*.up": "column",
    "blocks.*.act": "elementwise",
    "blocks.*.[od]*": "row",
    "head": "column_gather",
}


def net(tied: bool = False, device: str = "cpu") -> Net:
    torch.manual_seed(0)
    with torch.device(device):
        return Net(tied)


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradients(model: nn.Module, group: Group) -> dict[str, Tensor]:
    return {place.name: place.whole(place.parameter.grad, group) for place in placements(model, group=group)}


def run(group: Group, tied: bool, head: str) -> tuple[Tensor, dict[str, Tensor]]:
    model = parallelize(net(tied), group, PLAN | {"head": head})
    logits = model(IDS)
    if head == "lm_head":
        targets = IDS[:, 1:]
        vocab_parallel_cross_entropy(logits[:, :-1], targets, group=group, vocab_size=VOCAB).backward()
    else:
        loss_of(logits).backward()
    return logits.detach(), gradients(model, group)


@pytest.mark.ranks(1, 2, 4, 8, gloo=2)
@pytest.mark.parametrize("tied, head", [(False, "column_gather"), (True, "column_gather"), (True, "lm_head")])
def test_values_and_gradients(ranks: Ranks, tied: bool, head: str) -> None:
    reference = net(tied)
    want = reference(IDS)
    loss_of(want).backward()
    results = ranks(run, tied, head)
    if head == "lm_head":
        results = [(torch.cat([logits for logits, _ in results], -1)[..., :VOCAB], grads) for _, grads in results]
    for logits, grads in results:
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
        assert grads.keys() == dict(reference.named_parameters()).keys()
        assert not grads["embed.weight"][5].any() or tied
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


def test_same_bits_at_every_size(ranks: Ranks) -> None:
    want_logits, want = ranks.on("simulated", 1)(run, True, "column_gather", num_shards=8)[0]
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        for logits, grads in ranks.on(*place)(run, True, "column_gather", num_shards=8):
            assert torch.equal(logits, want_logits), place
            assert not [name for name in want if not torch.equal(grads[name], want[name])], place


def counted(group: Group, duplicate: bool) -> tuple[int, int]:
    model: Any = parallelize(net(), group, PLAN)
    model = copy.deepcopy(model) if duplicate else model
    with Ledger() as ledger:
        loss_of(model(IDS)).backward()
    assert all(block.q.products.__self__ is block.up.products.__self__ for block in model.blocks)
    assert model.blocks[0].q.products.__self__._last is None, "an input outlives the forward pass"
    return tuple(ledger.count("all_reduce", phase, "blocks.0") for phase in ("forward", "backward"))


@pytest.mark.parametrize("duplicate", [False, True])
def test_what_shares_an_input_shares_an_all_reduce(duplicate: bool) -> None:
    """q, k, v and up have one input here: two all-reduces forward, one backward."""
    assert simulate(counted, 2, duplicate) == [(2, 1)] * 2


class Counting(nn.Module):
    """Attention that views by head counts of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = HEADS, KV_HEADS
        self.q, self.k = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 4 * KV_HEADS)
        self.v, self.o = nn.Linear(WIDTH, 4 * KV_HEADS), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        counts = self.num_heads, self.num_key_value_heads, self.num_key_value_heads
        projected = zip((self.q, self.k, self.v), counts, strict=True)
        q, k, v = (proj(x).view(*x.shape[:-1], heads, 4).transpose(1, 2) for proj, heads in projected)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


def counting(group: Group) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    kv = Heads(HEADS, KV_HEADS)
    model = nn.Sequential(Counting())
    x = torch.randn(2, 5, WIDTH)
    y = parallelize(model, group, {"0.q": Heads(HEADS), "0.k": kv, "0.v": kv, "0.o": "row"})(x)
    y.square().sum().backward()
    return y.detach(), gradients(model, group)


@pytest.mark.ranks(2, 4, 8, gloo=())
@pytest.mark.parametrize("num_shards", [None, 8])
def test_head_counts_of_the_module_become_those_of_a_rank(ranks: Ranks, num_shards: int | None) -> None:
    want, want_gradients = simulate(counting, 1)[0]
    for y, found in ranks(counting, num_shards=num_shards):
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        for name, gradient in want_gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """Two column-parallel layers, called without gradients, with several inputs, and with one that has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        with torch.no_grad():
            self.a(x)
        y = self.a(x + 1) + self.b(x)
        x.mul_(2)
        return y + self.a(x)


def test_only_the_same_input_is_shared() -> None:
    def program(group: Group | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model, x = Twice().requires_grad_(False), torch.ones(3, 4, requires_grad=True)
        y = (model if group is None else parallelize(model, group, {"?": "column_gather"}))(x)
        y.square().sum().backward()
        return y.detach(), x.grad

    want = program(None)
    for got in simulate(program, 4):
        torch.testing.assert_close(got, want)


def test_a_failed_forward_pass_leaves_nothing_behind() -> None:
    model: Any = parallelize(net(), Group.single(2), PLAN)
    model.blocks[0].o = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        model(IDS)
    assert model.blocks[0].q.products.__self__._last is None


def encode(group: Group, grad: bool) -> Tensor:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    model = parallelize(nn.Sequential(layer), group, {"0.linear1": "column", "0.linear2": "row"})
    with torch.set_grad_enabled(grad):
        return model(torch.randn(2, 5, 16)).detach()


def test_the_fast_path_of_an_encoder_layer_is_off(ranks: Ranks) -> None:
    """It reads the weights of linear1 and linear2 and knows nothing of ranks."""
    want = simulate(encode, 1, True)[0]
    for grad in (True, False):
        torch.testing.assert_close(simulate(encode, 2, grad)[1], want, rtol=1e-5, atol=1e-5)


def saved(group: Group, path: Path) -> None:
    save(path, parallelize(net(tied=True), group, PLAN), group=group)


def loaded(group: Group, path: Path) -> Tensor:
    model: Any = parallelize(net(tied=True, device="meta"), group, PLAN)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight is model.embed.weight
    model.to_empty(device="cpu")
    model.head.weight = model.embed.weight
    load(path, model, group=group)
    return model(IDS).detach()


@pytest.mark.ranks(1, 4, 8, gloo=2)
def test_on_the_meta_device_then_loaded(ranks: Ranks, tmp_path: Path) -> None:
    simulate(saved, 2, tmp_path / "c")
    for logits in ranks(loaded, tmp_path / "c"):
        torch.testing.assert_close(logits, net(tied=True)(IDS), rtol=1e-5, atol=1e-5)


def clipped(group: Group) -> Tensor:
    model = parallelize(net(), group, PLAN)
    loss_of(model(IDS)).backward()
    return clip_grad_norm_(model, 0.1, group=group)


def test_the_gradient_norm_is_that_of_the_original() -> None:
    reference = net()
    loss_of(reference(IDS)).backward()
    want = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    for norm in simulate(clipped, 4):
        torch.testing.assert_close(norm, want)


def test_properties_stay() -> None:
    model = net().double().eval()
    model.blocks[0].q.weight.requires_grad_(False)
    names, first, table = list(model.state_dict()), model.blocks[0].q.weight, model.embed.weight.detach().clone()
    assert parallelize(model, Group.single(8), PLAN) is model
    assert torch.equal(model.embed.weight[:VOCAB], table) and not model.embed.weight[VOCAB:].any()
    assert model.blocks[0].q.weight.data_ptr() != first.data_ptr(), "shares memory with the original"
    assert list(model.state_dict()) == names
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["blocks.0.q.weight"]


def test_a_module_in_two_places_stays_one() -> None:
    shared = nn.Linear(8, 8)
    model = parallelize(nn.ModuleDict({"a": shared, "b": shared}), Group.single(2), {"a": "column"})
    assert isinstance(model["a"], ColumnParallelLinear) and model["a"] is model["b"]
    model = nn.ModuleDict({"a": shared, "b": shared})
    with pytest.raises(ValueError, match="a and b are one module, but the plan says 'column' and 'row'"):
        parallelize(model, Group.single(2), {"a": "column", "b": "row"})


def test_the_last_pattern_decides_and_parts_do_not_run_together() -> None:
    model = parallelize(net(), Group.single(2), {"blocks.*.up": "column", "blocks.1.up": "replicate"})
    assert [type(block.up) for block in model.blocks] == [ColumnParallelLinear, nn.Linear]
    with pytest.raises(ValueError, match=r"'\*\.up' matches no module of Net"):
        parallelize(net(), Group.single(2), {"*.up": "column"})


UNTOLD = {key: style for key, style in PLAN.items() if key != "blocks.*.norm"}
HALF = {key: style for key, style in PLAN.items() if key != "head"}


@pytest.mark.parametrize(
    "plan, shards, error, message",
    [
        ({"blocks.*.gate": "column"}, 2, ValueError, r"'blocks\.\*\.gate' matches no module of Net"),
        ({"head": "colwise"}, 2, ValueError, "'head' has the style 'colwise'; choose from column, column_gather"),
        ({"blocks.1.norm": "row"}, 2, TypeError, r"blocks\.1\.norm is a LayerNorm, but 'row' is for nn\.Linear alone"),
        ({"head": "embedding"}, 2, TypeError, r"head is a Linear, but 'embedding' is for nn\.Embedding alone"),
        ({"head": "column"}, 2, ValueError, r"head: out_features=21 cannot be sharded over num_shards=2"),
        ({"blocks.*.down": "row"}, 16, ValueError, r"blocks\.0\.down: in_features=24 cannot be sharded over"),
        ({"blocks.*.q": Heads(HEADS)}, 16, ValueError, r"blocks\.0\.q: num_attention_heads=8 cannot be sharded over"),
        ({"blocks.*.up": Heads(12, 6)}, 4, ValueError, r"num_key_value_heads=6 must divide num_shards=4"),
        ({"blocks.*.q": Heads(12)}, 4, ValueError, r"out_features=32 must be a multiple of num_attention_heads=12"),
        (
            {"blocks.*.k": Heads(8, 3)},
            4,
            ValueError,
            "num_attention_heads=8 must be a multiple of num_key_value_heads=3",
        ),
        ({"blocks.*.norm": "elementwise"}, 2, ValueError, r"blocks\.0\.norm: .* modules without parameters"),
        (PLAN | {"blocks.*.norm": "replicate", "head": "row"}, 2, ValueError, "one parameter"),
        (HALF, 2, ValueError, r"embed\.weight and head\.weight are one parameter"),
        (
            {"embed": "embedding", "head": "column_gather", "blocks.*.q": Heads(8)},
            2,
            ValueError,
            r"blocks\.0\.norm\.weight is beside",
        ),
    ],
)
def test_a_plan_that_cannot_be_followed_changes_nothing(plan: Any, shards: int, error: Any, message: str) -> None:
    model = net(tied=True)
    before = dict(model.named_modules()), dict(model.named_parameters())
    with pytest.raises(error, match=message):
        parallelize(model, Group.single(shards), {"blocks.*.act": "elementwise"} | plan)
    after = dict(model.named_modules()), dict(model.named_parameters())
    assert all(x.keys() == y.keys() and all(x[k] is y[k] for k in x) for x, y in zip(before, after, strict=True))


def test_modules_with_more_to_them_are_refused() -> None:
    class Scaled(nn.Embedding):
        pass

    group = Group.single(2)
    with pytest.raises(TypeError, match=r"0 is a MultiheadAttention, .* in one matrix; use a linear for each"):
        parallelize(nn.Sequential(nn.MultiheadAttention(8, 2)), group, {"0": "column"})
    with pytest.raises(TypeError, match=r"out_proj is a NonDynamic.* in one matrix; use a linear for each"):
        parallelize(nn.Sequential(nn.MultiheadAttention(8, 2)), group, {"0.out_proj": "row"})
    with pytest.raises(TypeError, match=r"0 is a Scaled, but 'embedding' is for nn\.Embedding alone"):
        parallelize(nn.Sequential(Scaled(8, 2)), group, {"0": "embedding"})
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        with pytest.raises(ValueError, match=rf"0: nn\.Embedding with {next(iter(option))}=.* cannot be sharded"):
            parallelize(nn.Sequential(nn.Embedding(8, 2, **option)), group, {"0": "embedding"})
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="0 has hooks, which would be lost"):
        parallelize(nn.Sequential(hooked), group, {"0": "column"})
    done = parallelize(nn.Sequential(nn.Linear(4, 4)), group, {"0": "column"})
    with pytest.raises(TypeError, match="0 is a ColumnParallelLinear"):
        parallelize(done, group, {"0": "column"})


def wrapped(group: Group) -> str:
    linear, mesh = nn.Linear(4, 4), DeviceMesh("cpu", [0])
    linear.weight = nn.Parameter(DTensor.from_local(linear.weight.detach(), mesh))
    with pytest.raises(TypeError) as caught:
        parallelize(nn.Sequential(linear), group, {"0": "column"})
    return str(caught.value)


def test_a_dtensor_is_refused(ranks: Ranks) -> None:
    (message,) = simulate(wrapped, 1)
    assert message.startswith("0: weight is a DTensor: convert plain modules")


def test_layers_from_ordinary_ones() -> None:
    def program(group: Group) -> list[Tensor]:
        torch.manual_seed(0)
        linear, table, x = nn.Linear(8, 10), nn.Embedding(10, 8), torch.randn(3, 8)
        head = LMHead.from_linear(linear, group=group, pad_vocab=True, gather_output=True)
        embedding = ParallelVocabEmbedding.from_embedding(table, group=group, pad_vocab=True)
        tied = LMHead.from_linear(linear, group=group, pad_vocab=True, tied_weight=embedding.weight)
        assert tied.weight is embedding.weight
        heads = KVParallelLinear.from_linear(linear, 2, group=group)(x)
        pairs = [(head(x), linear(x)), (embedding(torch.arange(10)), table.weight)]
        pairs += [(heads, linear(x).chunk(2, -1)[group.rank // 2])]
        for got, want in pairs:
            torch.testing.assert_close(got, want)
        return [got.detach() for got, _ in pairs]

    simulate(program, 4)
    with pytest.raises(ValueError, match=r"vocab_size=10 cannot be sharded .* pass pad_vocab=True to pad it to 12"):
        LMHead.from_linear(nn.Linear(8, 10), group=Group.single(4))
    with pytest.raises(ValueError, match=r"vocab_size=10 cannot be sharded .* pass pad_vocab=True to pad it to 12"):
        ParallelVocabEmbedding.from_embedding(nn.Embedding(10, 8), group=Group.single(4))
    with pytest.raises(ValueError, match="out_features=10 is not a multiple of num_heads=4"):
        KVParallelLinear.from_linear(nn.Linear(8, 10), 4, group=Group.single(4))
