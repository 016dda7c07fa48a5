"""Llama checkpoints as Meta publishes them: ``params.json`` and one ``consolidated.NN.pth`` for each rank of theirs.

Names and pairing of neighbours are those of this package, so that nothing is renamed or reordered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Report
from ..distributed import Group
from ..modeling import ModelArgs, Transformer
from ..modeling.mlp import feed_forward_size
from ..rope_scaling import RopeScaling
from ..verification import each_unsharded_weight
from .directory import new_directory, read_json, write_json
from .slices import empty_model, local_slices

PARAMS = "params.json"
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps")
SCALED_ROPE: dict[str, Any] = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TRAINED_LENGTH = 8192
"""Positions of Llama 3 before its frequencies were scaled; Meta's files do not say."""

ALONG_INPUT = ("attention.wo.weight", "feed_forward.w2.weight")


def read_meta_args(path: str | Path) -> ModelArgs:
    """The shape of the model in the directory ``path``; the files do not say how long its sequences may be.

    Raises ValueError for a directory without such a checkpoint.
    """
    path = Path(path)
    files = _open_all(path)
    params = read_json(path / PARAMS)
    given = {name: params[name] for name in SIZES if params.get(name) is not None}
    if given.get("vocab_size", -1) < 1:
        given["vocab_size"] = sum(len(file["output.weight"]) for file in files)
    scaling = None
    if params.get("use_scaled_rope"):
        factor = params.get("rope_scaling_factor") or 8.0
        scaling = RopeScaling(
            **SCALED_ROPE,
            factor=factor,
            max_position_embeddings=int(TRAINED_LENGTH * factor),
            original_max_position_embeddings=TRAINED_LENGTH,
        )
    return ModelArgs(
        **given,
        rope_theta=params.get("rope_theta", 10000.0),
        rope_scaling=scaling,
        tie_embeddings="output.weight" not in files[0],
        pad_vocab=True,
    )


def load_meta(
    path: str | Path,
    model: Transformer | ModelArgs | None = None,
    *,
    group: Group,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    report: Report | None = None,
) -> Transformer:
    """A model with the weights in the directory ``path``; each rank maps the files and copies its own slices.

    ``model`` is one to fill in place, or the shape of one to make, by default what ``read_meta_args`` gives. Called by
    all ranks. Raises ValueError for a directory without such a checkpoint, for tensors that are missing, left over or
    of another size, and for a given model whose heads pair halves.
    """
    path = Path(path)
    files = _open_all(path)
    if not isinstance(model, Transformer):
        model = empty_model(model or read_meta_args(path), group, dtype, device)
    if model.args.rope_pairing != "neighbours":
        raise ValueError(f"{path}: heads of Meta's format pair neighbours; make the model with that rope_pairing")
    slices = {item.name: item for item in local_slices(model, group)}
    for name in sorted((files[0].keys() - {"rope.freqs"}) ^ slices.keys()):
        what = "has no" if name in slices else "holds an unknown"
        raise ValueError(f"{path} is of another model: it {what} {name}")
    for name, item in slices.items():
        whole = _join(name, [file[name] for file in files], item.shape)
        if whole.shape != item.shape:
            raise ValueError(f"{path}: {name} is {list(whole.shape)}, {PARAMS} asks for {list(item.shape)}")
        piece = whole[item.index]
        item.fill(piece)
        if report is not None:
            report(name, piece.nbytes)
    return model


def _open_all(path: Path) -> list[dict[str, Tensor]]:
    files = [_open(file) for file in sorted(path.glob("consolidated.*.pth"))]
    if not files:
        raise ValueError(f"{path} holds no consolidated.*.pth")
    return files


def _open(file: Path) -> dict[str, Tensor]:
    try:
        content: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    return content


def _join(name: str, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Meta's ranks cut like ours; Llama 2's cut the embedding along its features, and norms are whole on each."""
    if parts[0].shape == shape:
        return parts[0]
    along_input = name.endswith(ALONG_INPUT) or (name == "tok_embeddings.weight" and parts[0].shape[0] == shape[0])
    return torch.cat(parts, 1 if along_input else 0)


def save_meta(path: str | Path, model: Transformer, *, group: Group, report: Report | None = None) -> None:
    """Write ``params.json`` and one file of whole tensors, which rank 0 holds all at once. Called by all ranks.

    Raises ValueError where ``path`` exists, and for a model that this format cannot describe: heads that pair halves
    or are not ``dim / n_heads`` wide, scaled frequencies other than Llama 3's.
    """
    params = _params(model.args)
    with new_directory(path, group) as building:
        content = {}
        for name, whole in each_unsharded_weight(model, group=group):
            if group.rank == 0:
                content[name] = whole.cpu().clone()
            if report is not None:
                report(name, whole.nbytes)
        if group.rank == 0:
            torch.save(content, building / "consolidated.00.pth")
            write_json(building / PARAMS, params)


def _params(args: ModelArgs) -> dict[str, Any]:
    ffn_dim = feed_forward_size(4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
    scaling = args.rope_scaling
    if args.rope_pairing != "neighbours":
        raise ValueError("Meta's format has heads that pair neighbours; load the model with rope_pairing='neighbours'")
    if args.head_dim * args.n_heads != args.dim:
        raise ValueError(f"Meta's format has no head_dim={args.head_dim} other than dim / n_heads")
    if scaling is not None and scaling.rope_type == "default":
        scaling = None
    only = SCALED_ROPE | {"original_max_position_embeddings": TRAINED_LENGTH}
    if scaling is not None and any(getattr(scaling, name) != value for name, value in only.items()):
        raise ValueError(f"Meta's format has no rope_type={scaling.rope_type!r} with these settings")
    params = {name: getattr(args, name) for name in SIZES} | {"n_kv_heads": args.kv_heads}
    if args.ffn_dim not in (None, ffn_dim):
        params |= {"multiple_of": args.ffn_dim, "ffn_dim_multiplier": args.ffn_dim / int(8 * args.dim / 3)}
    if scaling is not None:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": scaling.factor}
    return params | {"rope_theta": args.rope_theta}
