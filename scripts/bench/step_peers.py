"""The same Llama built of other libraries' tensor-parallel layers, with the weights of a Hugging Face directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from src.formats import read_model_args
from src.functional import rope_tables, rotate_half
from src.modeling import ModelArgs

from .peers import library

Weights = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Causal attention over this rank's heads; ``qkv`` gives queries, keys and values one after the other."""

    def __init__(self, args: ModelArgs, heads: int, qkv: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.args, self.heads, self.qkv, self.out = args, heads, qkv, out

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.args.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.heads] * 3, dim=1)
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(-2))
        return result


class FeedForward(nn.Module):
    """SwiGLU; ``up`` gives gates and ups one after the other."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        result: Tensor = self.down(F.silu(gate) * up)
        return result


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, args: ModelArgs, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(args.dim, args.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        result: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return result


class Llama(nn.Module):
    """The model: ``ids [b, s]`` to what ``head`` makes of them."""

    def __init__(self, args: ModelArgs, embedding: nn.Module, blocks: list[Block], head: nn.Module) -> None:
        super().__init__()
        self.args, self.embedding, self.blocks, self.head = args, embedding, nn.ModuleList(blocks), head
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = rope_tables(ids.shape[1], self.args.head_dim, self.args.rope_theta)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Joined(nn.Module):
    """Several projections of one input, as one."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def slices(weights: Weights, names: list[str], dim: int) -> Tensor:
    """This rank's slice along ``dim`` of each of the matrices, joined along it."""
    parts = (weights[name].chunk(dist.get_world_size(), dim)[dist.get_rank()] for name in names)
    return torch.cat(list(parts), dim).contiguous()


def layer_names(layer: int) -> dict[str, list[str]]:
    """Hugging Face's names of the weights of one block, by what uses them."""
    attention, mlp = (f"model.layers.{layer}.{part}" for part in ("self_attn", "mlp"))
    return {
        "qkv": [f"{attention}.{name}_proj.weight" for name in "qkv"],
        "out": [f"{attention}.o_proj.weight"],
        "up": [f"{mlp}.{name}_proj.weight" for name in ("gate", "up")],
        "down": [f"{mlp}.down_proj.weight"],
    }


def megatron(directory: Path, weights: Weights) -> tuple[nn.Module, Loss]:
    """Megatron-Core's layers, queries, keys and values in one, gates and ups in one, and its loss."""
    args, size = read_model_args(directory), dist.get_world_size()
    state, layers = library("megatron.core.parallel_state"), library("megatron.core.tensor_parallel")
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel(tensor_model_parallel_size=size)
    config = library("megatron.core.model_parallel_config").ModelParallelConfig(
        tensor_model_parallel_size=size, use_cpu_initialization=True, perform_initialization=False
    )
    options: dict[str, Any] = {"config": config, "init_method": nn.init.zeros_}

    class First(nn.Module):
        """The output without the bias that Megatron's linears return beside it."""

        def __init__(self, linear: nn.Module, weight: Tensor) -> None:
            super().__init__()
            self.linear = linear
            self.linear.weight = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)[0]
            return y

    def column(*names: str) -> nn.Module:
        weight = slices(weights, list(names), 0)
        shape = weight.shape[1], weight.shape[0] * size
        return First(layers.ColumnParallelLinear(*shape, bias=False, gather_output=False, **options), weight)

    def row(name: str) -> nn.Module:
        weight, more = slices(weights, [name], 1), {"bias": False, "input_is_parallel": True, "skip_bias_add": False}
        return First(layers.RowParallelLinear(weight.shape[1] * size, weight.shape[0], **more, **options), weight)

    def block(names: dict[str, list[str]]) -> Block:
        attention = Attention(args, args.n_heads // size, column(*names["qkv"]), row(*names["out"]))
        return Block(args, attention, FeedForward(column(*names["up"]), row(*names["down"])))

    embedding = layers.VocabParallelEmbedding(args.vocab_size, args.dim, **options)
    embedding.weight = nn.Parameter(slices(weights, ["model.embed_tokens.weight"], 0))
    blocks = [block(layer_names(i)) for i in range(args.n_layers)]
    model = Llama(args, embedding, blocks, column("lm_head.weight"))

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        per_token: Tensor = layers.vocab_parallel_cross_entropy(model(ids), targets)
        return per_token.mean()

    return model, loss


def dtensor(directory: Path, weights: Weights) -> tuple[nn.Module, Loss]:
    """A plain model, cut by torch's ``parallelize_module``, with ``loss_parallel``: the loss runs its backward, too."""
    args, tensor = read_model_args(directory), library("torch.distributed.tensor")
    parallel = library("torch.distributed.tensor.parallel")
    mesh = library("torch.distributed.device_mesh").init_device_mesh("cpu", (dist.get_world_size(),))

    def linear(name: str) -> nn.Linear:
        outputs, inputs = weights[name].shape
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        layer.weight = nn.Parameter(weights[name].clone())
        return layer

    def block(names: dict[str, list[str]]) -> Block:
        joined = {part: _Joined(*map(linear, names[part])) for part in ("qkv", "up")}
        attention = Attention(args, args.n_heads // dist.get_world_size(), joined["qkv"], linear(*names["out"]))
        return Block(args, attention, FeedForward(joined["up"], linear(*names["down"])))

    embedding = nn.Embedding.from_pretrained(weights["model.embed_tokens.weight"].clone(), freeze=False)
    model = Llama(args, embedding, [block(layer_names(i)) for i in range(args.n_layers)], linear("lm_head.weight"))
    plan = {
        "embedding": parallel.RowwiseParallel(input_layouts=tensor.Replicate()),
        "blocks.*.*.qkv.parts.*": parallel.ColwiseParallel(),
        "blocks.*.*.up.parts.*": parallel.ColwiseParallel(),
        "blocks.*.*.out": parallel.RowwiseParallel(),
        "blocks.*.*.down": parallel.RowwiseParallel(),
        "head": parallel.ColwiseParallel(output_layouts=tensor.Shard(-1), use_local_output=False),
    }
    parallel.parallelize_module(model, mesh, plan)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        with parallel.loss_parallel():
            value = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
            value.backward()
        detached: Any = value.detach()
        whole: Tensor = detached.full_tensor() if isinstance(detached, tensor.DTensor) else detached
        return whole

    return model, loss


def transformers(directory: Path, weights: Weights) -> tuple[nn.Module, Loss]:
    """Transformers' own model with ``tp_plan="auto"``."""
    library("accelerate")
    model = library("transformers").AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto", dtype=torch.float32)
    model.train()

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), targets.flatten())

    return model, loss
