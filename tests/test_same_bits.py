"""The claim on the cover: with logical shards fixed, training has the same bits at every number of ranks.

Each run trains a two-layer model for 20 clipped AdamW steps and is compared, tensor by tensor, with that of one rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from src import Group
from src.distributed import gather_from_region
from src.functional import causal_mask
from src.modeling import (
    Attention,
    FeedForward,
    LMHead,
    ModelArgs,
    Transformer,
    TransformerBlock,
    precompute_freqs_cis,
    vocab_parallel_cross_entropy,
)
from src.modeling.parameters import placements
from src.testing import Ranks
from src.training import clip_grad_norm_

SHARDS = 8
STEPS = 20
DENSE = ModelArgs(dim=64, n_layers=2, n_heads=8, vocab_size=96, multiple_of=32, max_seq_len=24)
VARIANTS: dict[str, tuple[ModelArgs, bool]] = {
    "dense": (DENSE, False),
    "gqa": (replace(DENSE, n_kv_heads=2), False),
    "tied": (replace(DENSE, tie_embeddings=True), False),
    "uneven": (replace(DENSE, vocab_size=89, pad_vocab=True), False),
    "sequence": (DENSE, True),
    "dropout": (replace(DENSE, dropout=0.1), False),
    "all": (replace(DENSE, n_kv_heads=1, tie_embeddings=True, vocab_size=89, pad_vocab=True, dropout=0.1), True),
}


def batch(step: int, args: ModelArgs) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, args.vocab_size, (3, 25), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def train(group: Group, args: ModelArgs, sequence_parallel: bool, dtype: torch.dtype) -> dict[str, Any]:
    """This rank's share of everything: losses, norms, first logits and gradients, last weights."""
    model = Transformer(args, group=group, sequence_parallel=sequence_parallel, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        ids, targets = batch(step, args)
        optimizer.zero_grad()
        logits = model(ids)
        loss = vocab_parallel_cross_entropy(logits, targets, group=group, vocab_size=args.vocab_size, z_loss=1e-3)
        loss.backward()
        if step == 0:
            found["logits"] = gather_from_region(logits.detach(), group=group)[..., : args.vocab_size]
            found |= share(model, group, "gradient", lambda p: p.grad)
        found["norms"].append(clip_grad_norm_(model, 1.0, group=group))
        optimizer.step()
        found["losses"].append(loss.detach())
    return found | share(model, group, "weight", lambda p: p.detach())


def share(model: torch.nn.Module, group: Group, kind: str, value: Any) -> dict[str, Any]:
    return {
        f"{kind} of {place.name}": (place.dim, place.offset(group), place.size, value(place.parameter).clone())
        for place in placements(model, group=group)
    }


def whole(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The unsharded tensors. What several ranks hold, they must hold alike."""
    out = {}
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        if isinstance(parts[0], list):
            parts = [torch.stack(part) for part in parts]
        if isinstance(parts[0], tuple) and parts[0][0] is not None:
            dim, _, size, _ = parts[0]
            slices = {offset: [p[3] for p in parts if p[1] == offset] for offset in sorted({p[1] for p in parts})}
            assert all(torch.equal(copy, copies[0]) for copies in slices.values() for copy in copies), name
            out[name] = torch.cat([copies[0] for copies in slices.values()], dim).narrow(dim, 0, size)
        else:
            copies = [part[3] if isinstance(part, tuple) else part for part in parts]
            assert all(torch.equal(copy, copies[0]) for copy in copies), name
            out[name] = copies[0]
    return out


def layer(group: Group, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """This rank's share of one layer's output and gradients."""
    place: dict[str, Any] = {"group": group, "dtype": dtype}
    x = torch.randn(3, 24, 64, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    args = replace(DENSE, n_kv_heads=2)
    if kind == "attention":
        module: torch.nn.Module = Attention(args, **place)
        y = module(x, 0, precompute_freqs_cis(8, 24), causal_mask(24, dtype=dtype, device=x.device))
    elif kind == "block":
        module = TransformerBlock(0, args, **place)
        y = module(x, 0, precompute_freqs_cis(8, 24))
    elif kind == "feed forward":
        module = FeedForward(64, 256, 32, **place)
        y = module(x)
    else:
        module = LMHead(64, 89, pad_vocab=True, **place)
        y = gather_from_region(module(x), group=group)
    y.backward(torch.randn(y.shape, dtype=dtype, generator=torch.Generator().manual_seed(1)))
    return {"y": y.detach(), "x": x.grad, **share(module, group, "gradient", lambda p: p.grad)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["attention", "feed forward", "block", "head"])
def test_layers_have_the_same_bits_at_every_size(ranks: Ranks, kind: str, dtype: torch.dtype) -> None:
    want = whole(ranks.on("simulated", 1)(layer, kind, dtype, num_shards=SHARDS))
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2), ("gloo", 4)]:
        got = whole(ranks.on(*place)(layer, kind, dtype, num_shards=SHARDS))
        assert [name for name in want if not torch.equal(got[name], want[name])] == [], place


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUICK = {"dense-fp32", "all-bf16"}


@pytest.mark.parametrize(
    "variant, dtype",
    [
        pytest.param(variant, DTYPES[dtype], id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for variant in VARIANTS
        for dtype in DTYPES
        for name in [f"{variant}-{dtype}"]
    ],
)
def test_training_has_the_same_bits_at_every_size(ranks: Ranks, variant: str, dtype: torch.dtype) -> None:
    run = (*VARIANTS[variant], dtype)
    want = whole(ranks.on("simulated", 1)(train, *run, num_shards=SHARDS))
    assert want["losses"][-1] != want["losses"][0] and (want["norms"] > 1.0).any()
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2), ("gloo", 4)]:
        got = whole(ranks.on(*place)(train, *run, num_shards=SHARDS))
        assert got.keys() == want.keys()
        different = [name for name in want if not torch.equal(got[name], want[name])]
        assert not different, (place, different)
