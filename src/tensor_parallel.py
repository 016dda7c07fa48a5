"""An existing single-process module in its tensor-parallel form, by a plan of name patterns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .distributed.group import Group, as_group
from .distributed.regions import join_shards, split_shards
from .modeling import ColumnParallelLinear, KVParallelLinear, LMHead, ParallelVocabEmbedding, RowParallelLinear
from .modeling.columns import SharedCopies, column_products
from .modeling.conversion import take_parameters
from .sharding import shard_size


@dataclass(frozen=True)
class Heads:
    """Style of a column-parallel projection to attention heads, none of which is ever cut.

    ``Heads(32)`` is the projection to the queries, ``Heads(32, 8)`` one to the keys or the values that 32 query heads
    share. Where there are fewer key-value heads than logical shards each is held by several ranks. Counts that the
    attention module keeps as ``num_heads``, ``num_attention_heads``, ``num_key_value_heads`` and
    ``num_key_value_groups`` become those of a rank.
    """

    num_attention_heads: int
    num_key_value_heads: int | None = None

    def style(self) -> tuple[type[nn.Module], Callable[..., nn.Module]]:
        """Its entry in ``STYLES``."""
        return nn.Linear, self.shaped_like

    def shaped_like(self, linear: nn.Linear, *, group: Group) -> nn.Module:
        """The layer for ``linear``, on the meta device. Raises ValueError when the heads do not divide."""
        queries, kv, shards = self.num_attention_heads, self.num_key_value_heads, group.num_shards
        shard_size("num_attention_heads", queries, shards, group.world_size)
        name, heads = ("num_attention_heads", queries) if kv is None else ("num_key_value_heads", kv)
        if queries % heads:
            raise ValueError(f"num_attention_heads={queries} must be a multiple of num_key_value_heads={heads}")
        if linear.out_features % heads:
            raise ValueError(f"out_features={linear.out_features} must be a multiple of {name}={heads}")
        if heads % shards == 0:
            return ColumnParallelLinear.shaped_like(linear, group=group)
        if shards % heads:
            raise ValueError(
                f"num_key_value_heads={heads} must divide num_shards={shards} or be a multiple of it, over "
                f"world_size={group.world_size} ranks; choose a world size that divides it"
            )
        return KVParallelLinear.shaped_like(linear, heads, group=group)

    def adapt(self, attention: Any, group: Group) -> None:
        """Give ``attention`` this rank's counts in place of those of the whole that it keeps as attributes."""
        queries, kv = self.num_attention_heads, self.num_key_value_heads
        here = queries // group.world_size
        counts = {"num_heads": (queries, here), "num_attention_heads": (queries, here)}
        if kv is not None:
            kv_here = max(kv, group.num_shards) // group.world_size
            counts |= {"num_key_value_heads": (kv, kv_here), "num_key_value_groups": (queries // kv, here // kv_here)}
        for name, (whole, local) in counts.items():
            if getattr(attention, name, None) == whole:
                setattr(attention, name, local)


class Elementwise(nn.Module):
    """``module``, applied to each logical shard of its input alone.

    Vectorized functions on the CPU give the last elements of a tensor other bits than those before.
    """

    def __init__(self, module: nn.Module, *, group: Group) -> None:
        super().__init__()
        if next(module.parameters(), None) is not None:
            raise ValueError('"elementwise" is for modules without parameters')
        self.module, self.group = module, group
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., n] -> y [..., n]``, sharded over the last dim."""
        return join_shards([self.module(shard) for shard in split_shards(x, group=self.group)])


Style = Literal["column", "column_gather", "lm_head", "row", "embedding", "elementwise", "replicate"] | Heads

STYLES: dict[str, tuple[type[nn.Module], Callable[..., nn.Module]]] = {
    "column": (nn.Linear, ColumnParallelLinear.shaped_like),
    "column_gather": (nn.Linear, partial(LMHead.shaped_like, pad_vocab=True, gather_output=True)),
    "row": (nn.Linear, RowParallelLinear.shaped_like),
    "embedding": (nn.Embedding, partial(ParallelVocabEmbedding.shaped_like, pad_vocab=True)),
    "lm_head": (nn.Linear, partial(LMHead.shaped_like, pad_vocab=True)),
    "elementwise": (nn.Module, Elementwise),
}


def parallelize(module: nn.Module, group: Any, plan: Mapping[str, Any]) -> nn.Module:
    """Replace submodules of ``module`` by this rank's part of them, in place, and return ``module``.

    All ranks hold ``module`` alike. ``plan`` maps patterns of dotted names to styles; ``*`` and ``?`` match within one
    part of a name, as in ``"layers.*.mlp.up_proj"``, and the last pattern that matches a module decides.

        "column"          nn.Linear      output features sharded, output sharded
        "column_gather"   nn.Linear      the same, output gathered (an lm_head whose caller wants all logits)
        "lm_head"         nn.Linear      the same, output sharded, for ``vocab_parallel_cross_entropy``
        Heads(...)        nn.Linear      "column" by whole attention heads; key-value heads shared where there are few
        "row"             nn.Linear      input features sharded, output summed
        "embedding"       nn.Embedding   rows sharded, output summed
        "elementwise"     any            of a sharded input; only needed for equal bits where ``num_shards`` is fixed
        "replicate"       any            left as it is, like everything that no pattern matches: norms need no entry

    A vocabulary ("embedding", "column_gather", "lm_head") that does not divide is padded; outputs of full width and
    checkpoints do not show it. Tied weights stay tied; names of parameters stay; ``requires_grad``, dtype and device
    stay, the meta device too. Column-parallel children of one module that it gives the same tensor share one all-reduce
    in the backward pass. ``group`` is a Group, a ProcessGroup, a 1-D DeviceMesh, or None: the initialised default
    group, or a world of one. Build the optimizer afterwards: the parameters are new ones.

    Raises, with ``module`` unchanged: ValueError for a pattern that matches nothing, an unknown style, sizes that do
    not divide, tied weights that would be sharded in two ways, hooks that would be lost, and parameters beside
    attention heads that the plan does not mention; TypeError for a module that the style is not for, or whose
    parameters are no plain tensors.
    """
    group = as_group(group)
    styles = _match(module, plan)
    layers = {source: _shaped(path, source, style, group) for path, source, style in _planned(module, styles)}
    _check_attention(module, styles)
    _check_ties(module, layers)
    taken: dict[Tensor, nn.Parameter] = {}
    for source, layer in layers.items():
        take_parameters(layer, source, taken)
    for path, parent in list(module.named_modules()):
        _replace_children(path, parent, layers, styles, group)
    return module


def llama_plan(config: Any) -> dict[str, Style]:
    """The plan for a ``LlamaForCausalLM`` of Hugging Face's transformers, and models built like it, from its config.

    ``config`` needs ``num_attention_heads`` and ``num_key_value_heads``. Every rank gets all logits, so that the
    model's own loss and ``generate`` work; ``llama_plan(config) | {"lm_head": "lm_head"}`` keeps them sharded.
    """
    queries = config.num_attention_heads
    shared = Heads(queries, getattr(config, "num_key_value_heads", None) or queries)
    attention, mlp = "model.layers.*.self_attn", "model.layers.*.mlp"
    return {
        "model.embed_tokens": "embedding",
        f"{attention}.q_proj": Heads(queries),
        f"{attention}.k_proj": shared,
        f"{attention}.v_proj": shared,
        f"{attention}.o_proj": "row",
        f"{mlp}.gate_proj": "column",
        f"{mlp}.up_proj": "column",
        f"{mlp}.act_fn": "elementwise",
        f"{mlp}.down_proj": "row",
        "lm_head": "column_gather",
    }


class SharedInput:
    """One ``SharedCopies`` for all children of a module that it gives the same tensor while its ``forward`` runs.

    Their gradients are added before the sum over ranks: one all-reduce for q, k and v, not three. A single child shares
    with none, and enters as it would anywhere; the hooks alone keep nn.TransformerEncoderLayer off its fast path.
    """

    def __init__(self, parent: nn.Module, children: list[Any]) -> None:
        self._children: list[Any] = []  # while the module runs: they refer to this object
        self._last: tuple[Tensor, int, SharedCopies] | None = None
        for child in children if len(children) > 1 else ():
            child.products = self.products
        parent.register_forward_pre_hook(self._begin)
        parent.register_forward_hook(self._end, always_call=True)

    def _begin(self, parent: nn.Module, _: Any) -> None:
        self._children = [child for child in parent.children() if getattr(child, "products", None) == self.products]

    def _end(self, *_: Any) -> None:
        self._children, self._last = [], None

    def products(self, x: Tensor, layers: Sequence[Any], **place: Any) -> list[list[Tensor]]:
        """As ``column_products``. With the module's first tensor all children are expected, with others who comes."""
        if not (self._children and x.requires_grad and torch.is_grad_enabled()):
            return column_products(x, layers, **place)
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            expected = layers if self._last else self._children
            self._last = (x, x._version, SharedCopies(x, expected, **place))
        return [self._last[2].products(layer) for layer in layers]


def _match(module: nn.Module, plan: Mapping[str, Any]) -> dict[str, Style]:
    """The style of every path that a pattern matches."""
    paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
    styles: dict[str, Style] = {}
    for pattern, style in plan.items():
        if not (isinstance(style, Heads) or style in STYLES or style == "replicate"):
            choice = ", ".join([*STYLES, "replicate"])
            raise ValueError(f"plan: {pattern!r} has the style {style!r}; choose from {choice} and Heads(...)")
        found = [path for path in paths if _fits(path, pattern)]
        if not found:
            raise ValueError(f"plan: {pattern!r} matches no module of {type(module).__name__}; see its named_modules()")
        styles |= dict.fromkeys(found, style)
    return styles


def _fits(path: str, pattern: str) -> bool:
    parts, patterns = path.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _planned(module: nn.Module, styles: dict[str, Style]) -> Iterator[tuple[str, nn.Module, Style]]:
    """Every module to replace once, under its first name."""
    seen: dict[nn.Module, tuple[str, Style]] = {}
    for path, source in module.named_modules(remove_duplicate=False):
        if styles.get(path, "replicate") == "replicate":
            continue
        first, style = seen.setdefault(source, (path, styles[path]))
        if style != styles[path]:
            raise ValueError(f"{first} and {path} are one module, but the plan says {style!r} and {styles[path]!r}")
        if first == path:
            yield path, source, style


def _shaped(path: str, source: nn.Module, style: Style, group: Group) -> nn.Module:
    """The layer that will take the place of ``source``, on the meta device."""
    kind, make = STYLES[style] if isinstance(style, str) else style.style()
    if kind not in (nn.Module, type(source)):
        fused = isinstance(source, nn.MultiheadAttention) or type(source).__name__ == "NonDynamicallyQuantizableLinear"
        why = ": nn.MultiheadAttention keeps q, k and v in one matrix; use a linear for each" if fused else ""
        raise TypeError(f"{path} is a {type(source).__name__}, but {style!r} is for nn.{kind.__name__} alone{why}")
    if source._forward_hooks or source._forward_pre_hooks or source._backward_hooks or source._backward_pre_hooks:
        raise ValueError(f"{path} has hooks, which would be lost; register them after parallelize")
    try:
        return make(source, group=group)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None


def _check_attention(module: nn.Module, styles: dict[str, Style]) -> None:
    """A norm of queries, say, would work on this rank's heads, and get a part of its gradient."""
    for path in [path for path, style in styles.items() if isinstance(style, Heads)]:
        attention = path.rpartition(".")[0]
        for name, _ in module.get_submodule(attention).named_parameters(attention):
            if name.rpartition(".")[0] not in styles:
                raise ValueError(
                    f"{name} is beside projections to heads, but not in the plan; if it is used on heads, its gradient "
                    'would be a part of the whole and parallelize cannot help; if not, add it as "replicate"'
                )


def _check_ties(module: nn.Module, layers: dict[nn.Module, nn.Module]) -> None:
    """Tied weights must be sharded alike."""
    owners: defaultdict[nn.Parameter, list[tuple[str, Any]]] = defaultdict(list)
    for path, source in module.named_modules():
        for name, parameter in source.named_parameters(path, recurse=False):
            layer: Any = layers.get(source)
            local = name.rpartition(".")[2]
            slice_of = layer and (layer.shard_dims().get(local), getattr(layer, local).shape)
            owners[parameter].append((name, slice_of))
    for (first, slice_of), *others in owners.values():
        for name, other in others:
            if other != slice_of:
                raise ValueError(f"{first} and {name} are one parameter; give both a style that shards it alike")


def _replace_children(
    path: str, parent: nn.Module, layers: dict[nn.Module, nn.Module], styles: dict[str, Style], group: Group
) -> None:
    columns = []
    for name, child in list(parent._modules.items()):
        if child is None or child not in layers:
            continue
        layer = layers[child]
        setattr(parent, name, layer)
        if isinstance(layer, ColumnParallelLinear | KVParallelLinear):
            columns.append(layer)
        style = styles.get(f"{path}.{name}" if path else name)
        if isinstance(style, Heads):
            style.adapt(parent, group)
    if columns:
        SharedInput(parent, columns)
