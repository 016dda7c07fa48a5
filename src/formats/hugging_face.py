"""Llama checkpoints as Hugging Face has them: ``config.json`` and one or many safetensors files.

Read with torch and safetensors alone, each rank only its own slices. Their heads pair halves, ``(i, i + hd/2)``; a
model whose heads pair neighbours, as Meta's and by default ours, gets the rows of its query and key projections
reordered on the way, which computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Report
from ..distributed import Group
from ..functional import halves_to_neighbours, neighbours_to_halves
from ..modeling import ModelArgs, Transformer
from ..modeling.parameters import placements
from .directory import new_directory, read_json, write_json
from .llama_config import args_from_config, config_from_args
from .safetensors_files import INDEX, SafetensorsFiles, file_names, save_file
from .slices import empty_model, local_slices

OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INNER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
ROTATED = re.compile(r"attention\.w[qk]\.weight$")


def hugging_face_name(name: str) -> str:
    """``layers.3.attention.wq.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    module, _, parameter = name.rpartition(".")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    theirs = f"model.layers.{match[1]}.{INNER[match[2]]}" if match else OUTER[module]
    return f"{theirs}.{parameter}"


def read_model_args(path: str | Path) -> ModelArgs:
    """The shape of the model in the directory ``path``.

    Raises ValueError when there is no ``config.json`` or it describes a model that is no Llama of ours.
    """
    try:
        return args_from_config(read_json(Path(path) / "config.json"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_hugging_face(
    path: str | Path,
    model: Transformer | ModelArgs | None = None,
    *,
    group: Group,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    report: Report | None = None,
) -> Transformer:
    """A model with the weights in the directory ``path``, each rank reading its own slices. Called by all ranks.

    ``model`` is one to fill in place, or the shape of one to make; None is the shape that ``read_model_args`` gives,
    whose ``max_seq_len`` and ``max_batch_size`` bound the KV cache. Weights are cast to the parameters' dtype.

    Raises ValueError for a directory without such a checkpoint, and for tensors that are missing, left over or of
    another size; a given model has not been changed then.
    """
    if not isinstance(model, Transformer):
        model = empty_model(model or read_model_args(path), group, dtype, device)
    files = SafetensorsFiles(Path(path))
    slices = {hugging_face_name(item.name): item for item in local_slices(model, group)}
    _check_tensors(files, {name: item.shape for name, item in slices.items()}, model.args.tie_embeddings)
    for name, item in slices.items():
        piece = files.read(name, item)
        if report is not None:
            report(name, piece.nbytes)
        if model.args.rope_pairing == "neighbours" and ROTATED.search(item.name):
            piece = halves_to_neighbours(piece, len(piece) // model.args.head_dim)
        item.fill(piece)
    return model


def _check_tensors(files: SafetensorsFiles, wanted: dict[str, tuple[int, ...]], tied: bool) -> None:
    ignored = re.compile(r"rotary_emb\.inv_freq$" + (r"|^lm_head\.weight$" if tied else ""))
    found = {name for name in files.names() if not ignored.search(name)}
    for name in sorted(found ^ wanted.keys()):
        what = "has no" if name in wanted else "holds an unknown"
        raise ValueError(f"{files.path} is of another model: it {what} {name}")
    for name, shape in wanted.items():
        if files.shape(name) != shape:
            sizes = f"{list(files.shape(name))} there and {list(shape)} here"
            raise ValueError(f"{files.path} is of another model: {name} is {sizes}")


def save_hugging_face(
    path: str | Path,
    model: Transformer,
    *,
    group: Group,
    max_file_size: int = 5 * 2**30,
    report: Report | None = None,
) -> None:
    """Write a directory that transformers loads: ``config.json`` and files of at most ``max_file_size`` bytes.

    Whole tensors pass through rank 0, which holds one file's worth of them; the directory appears when it is complete.
    Called by all ranks. Raises ValueError where ``path`` exists, and for a ``max_file_size`` below 1.
    """
    sizes = _whole_sizes(model, group)
    plan = file_names(sizes, max_file_size)
    with new_directory(path, group) as building:
        weights = _whole_weights(model, group, report)
        for file, names in plan.items():
            content = {name: tensor for name, tensor in (next(weights) for _ in names) if group.rank == 0}
            if group.rank == 0:
                save_file(building / file, content)
        if group.rank == 0:
            write_json(building / "config.json", config_from_args(model.args, next(model.parameters()).dtype))
            if len(plan) > 1:
                homes = {name: file for file, names in plan.items() for name in names}
                total = {"total_size": sum(sizes.values())}
                write_json(building / INDEX, {"metadata": total, "weight_map": homes})


def _whole_sizes(model: Transformer, group: Group) -> dict[str, int]:
    """Bytes of each tensor under its outer name, in the model's order."""
    return {
        hugging_face_name(item.name): torch.Size(item.shape).numel() * item.parameter.element_size()
        for item in local_slices(model, group)
    }


def _whole_weights(model: Transformer, group: Group, report: Report | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, whole, under its outer name and in the outer pairing, one at a time."""
    for place in placements(model, group=group):
        whole = place.whole(place.parameter.detach(), group)
        if model.args.rope_pairing == "neighbours" and ROTATED.search(place.name):
            whole = neighbours_to_halves(whole, len(whole) // model.args.head_dim)
        name = hugging_face_name(place.name)
        if report is not None:
            report(name, whole.nbytes)
        yield name, whole.cpu().contiguous()
