"""Finding out what kind of checkpoint a directory holds, and opening it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from src.checkpoint import Report, load, read_info, save
from src.distributed import Group
from src.formats import (
    load_hugging_face,
    load_meta,
    read_meta_args,
    read_model_args,
    save_hugging_face,
    save_meta,
)
from src.formats.slices import empty_model
from src.modeling import ModelArgs, Transformer

Format = Literal["hugging-face", "checkpoint", "meta"]
MARKS: dict[str, Format] = {"isoshard.json": "checkpoint", "config.json": "hugging-face", "params.json": "meta"}
GENERATION = "generation_config.json"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", GENERATION)
"""Files beside the weights that do not depend on their format."""


def format_of(path: Path) -> Format:
    """What the directory ``path`` holds.

    Raises ValueError when it is none of these.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; names on the Hub are not downloaded")
    if (path / "checkpoints").is_dir():
        raise ValueError(f"{path} is a run; give one of its checkpoints, {path / 'checkpoints' / 'step-...'}")
    for mark, found in MARKS.items():
        if (path / mark).exists():
            return found
    raise ValueError(f"{path} is no directory of a model: it has none of {', '.join(MARKS)}")


def open_model(
    path: Path,
    group: Group,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    changes: dict[str, Any] | None = None,
    report: Report | None = None,
) -> Transformer:
    """The model in the directory ``path``, each rank holding its part, with ``changes`` of its ModelArgs.

    Raises ValueError for what is no complete checkpoint.
    """
    model = empty_model(replace(args_of(path), **(changes or {})), group, dtype, device)
    fill_model(path, model, group, report)
    return model


def fill_model(path: Path, model: Transformer, group: Group, report: Report | None = None) -> None:
    """Load the weights in ``path`` into ``model``, whose shape is ``args_of(path)``."""
    kind = format_of(path)
    if kind == "checkpoint":
        load(path, model, group=group, report=report)
    else:
        {"meta": load_meta, "hugging-face": load_hugging_face}[kind](path, model, group=group, report=report)


def args_of(path: Path) -> ModelArgs:
    """The shape of the model in the directory ``path``."""
    kind = format_of(path)
    return {"meta": read_meta_args, "hugging-face": read_model_args, "checkpoint": checkpoint_args}[kind](path)


def checkpoint_args(path: Path) -> ModelArgs:
    """The shape of the model in a checkpoint of ``scripts.train`` or ``scripts.convert``."""
    info = read_info(path)
    settings = info.get("model") or info.get("run") or {}
    known = {field.name for field in fields(ModelArgs)}
    if not settings:
        raise ValueError(f"checkpoint {path} does not say what shape its model has")
    return ModelArgs(**{name: value for name, value in settings.items() if name in known})


def write_model(path: Path, model: Transformer, kind: Format, group: Group, report: Report, max_file_size: int) -> None:
    """Write ``model`` as a new directory ``path``. Raises ValueError where it exists."""
    if kind == "hugging-face":
        save_hugging_face(path, model, group=group, max_file_size=max_file_size, report=report)
    elif kind == "meta":
        save_meta(path, model, group=group, report=report)
    elif path.exists():
        raise ValueError(f"{path} exists; choose another path, or remove it first")
    else:
        save(path, model, info={"model": asdict(model.args)}, group=group, report=report)


def companion(path: Path, name: str) -> Path | None:
    """A file that belongs to the model in ``path``: beside its weights, or where the run of a checkpoint keeps it."""
    places = [path / name, *(parent / name for parent in path.resolve().parents[:2])]
    return next((place for place in places[: 3 if format_of(path) == "checkpoint" else 1] if place.exists()), None)


def end_tokens(path: Path) -> list[int]:
    """Ids at which the model in ``path`` ends a text; none where nothing names them."""
    for name in (GENERATION, "config.json"):
        file = companion(path, name)
        ends = json.loads(file.read_text()).get("eos_token_id") if file else None
        if ends is not None:
            return ends if isinstance(ends, list) else [ends]
    return []


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer and generation settings; the names of what is in ``target`` then.

    Ends of text that only the source's ``config.json`` names get a ``generation_config.json``.
    """
    found = {name: file for name in COMPANIONS if (file := companion(source, name)) is not None}
    for name, file in found.items():
        shutil.copyfile(file, target / name)
    names, config = list(found), companion(source, "config.json")
    if GENERATION not in found and config is not None:
        settings = json.loads(config.read_text())
        ends = {name: settings[name] for name in ("bos_token_id", "eos_token_id") if settings.get(name) is not None}
        if ends:
            (target / GENERATION).write_text(json.dumps(ends, indent=2) + "\n")
            names.append(GENERATION)
    return names
