"""Kernels behind ``functional``: chosen by ``lookup``, one file per operation. Nothing else knows of Triton."""

from .registry import lookup as lookup
