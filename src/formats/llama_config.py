"""The shape of a Llama model as Hugging Face's ``config.json`` has it, in the layouts of transformers 4 and 5."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import torch

from ..modeling import ModelArgs
from ..modeling.mlp import feed_forward_size
from ..rope_scaling import RopeScaling

FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}
"""What a Llama of ours cannot have otherwise."""

WITH_OWN_LENGTH = ("llama3", "yarn")
"""Rules for which a missing ``original_max_position_embeddings`` means the model's length."""


def args_from_config(config: dict[str, Any]) -> ModelArgs:
    """The model that a ``config.json`` describes; its vocabulary may be padded, its heads pair halves.

    Raises ValueError for what is missing, and for what a Llama of ours cannot have.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    for name, only in FIXED.items():
        value = config.get(name, rope.get(name, only))
        if value not in (only, None):
            raise ValueError(f"{name}={value!r} of this config.json is not supported, only {only!r} is")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    missing = [name for name in sizes if name not in config]
    if missing:
        raise ValueError(f"this config.json has no {', '.join(missing)}")
    length = config.get("max_position_embeddings", 2048)
    return ModelArgs(
        dim=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config.get("num_key_value_heads"),
        vocab_size=config["vocab_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        max_seq_len=length,
        pad_vocab=True,
        tie_embeddings=config.get("tie_word_embeddings", False),
        head_dim=config.get("head_dim") or 0,
        ffn_dim=config["intermediate_size"],
        rope_pairing="halves",
        rope_scaling=_scaling(rope, length),
    )


def _scaling(rope: dict[str, Any], length: int) -> RopeScaling:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    known = {field.name for field in fields(RopeScaling)}
    given = {name: value for name, value in rope.items() if name in known and (value is not None or name == "factor")}
    if rope_type in WITH_OWN_LENGTH:
        given.setdefault("original_max_position_embeddings", length)
    return RopeScaling(**{**given, "rope_type": rope_type, "max_position_embeddings": length})


def config_from_args(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` of a model, for transformers 5, with the rotary settings where transformers 4 looks, too.

    Ends of text are the tokenizer's affair: they are written as None, lest transformers take its defaults.
    """
    rope = _rope_parameters(args)
    length = args.max_seq_len if args.rope_scaling is None else args.rope_scaling.max_position_embeddings
    ffn_dim = args.ffn_dim or feed_forward_size(4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        **{key: value for key, value in FIXED.items() if key != "partial_rotary_factor"},
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": ffn_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": length,
        "tie_word_embeddings": args.tie_embeddings,
        "rope_parameters": rope,
        "rope_theta": args.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "dtype": name,
        "torch_dtype": name,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _rope_parameters(args: ModelArgs) -> dict[str, Any]:
    if args.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": args.rope_theta}
    given = {name: value for name, value in asdict(args.rope_scaling).items() if value is not None}
    del given["max_position_embeddings"]
    if args.rope_scaling.rope_type == "default":
        del given["factor"]
    if given.get("truncate"):
        del given["truncate"]
    if args.rope_scaling.rope_type == "yarn":
        given.setdefault("factor", None)
    return {"rope_theta": args.rope_theta, **given}
