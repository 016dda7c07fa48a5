"""Checkpoints of the outside world: Hugging Face's directories and Meta's."""

from .hugging_face import load_hugging_face, read_model_args, save_hugging_face
from .meta import load_meta, read_meta_args, save_meta

__all__ = ["load_hugging_face", "load_meta", "read_meta_args", "read_model_args", "save_hugging_face", "save_meta"]
