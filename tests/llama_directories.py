"""Tiny random Llama checkpoints as transformers writes them, one for each rule of rotary frequencies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

LENGTH = 48
"""Positions that the models are trained for."""

THETA = {"rope_theta": 10000.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, **THETA}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 500000.0,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 12,
            **THETA,
        }
    },
    "yarn-scales": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.1,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
            **THETA,
        },
    },
    "tied": {"tie_word_embeddings": True},
    "all-heads": {"num_key_value_heads": 8},
    "wide-heads": {"head_dim": 16},
    "odd-vocabulary": {"vocab_size": 101},
}


def reference(variant: str, **changes: Any) -> Any:
    """The transformers model of that variant; its norms are not all ones, nor its logits tiny."""
    transformers = pytest.importorskip("transformers", reason="transformers is the extra hf-test")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 104}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    options = {"max_position_embeddings": LENGTH, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(**{**sizes, **heads, **options, **VARIANTS[variant], **changes})
    generator = torch.Generator().manual_seed(7)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.12 * noise)
    return model


def write(path: Path, variant: str, **options: Any) -> Any:
    """Save the reference as a directory, which is also given back."""
    model = reference(variant)
    model.save_pretrained(path, **options)
    return model


def rewrite_as_version_4(path: Path) -> None:
    """Change ``config.json`` to the layout of transformers 4."""
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope if rope["type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype", "float32")
    (path / "config.json").write_text(json.dumps(config))
