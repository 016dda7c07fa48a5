"""Kernels behind ``functional``, chosen by ``lookup``: one file per operation, in plain torch for CPUs (``cpu_*``), in
Triton for GPUs. Nothing else knows of Triton."""

from .registry import lookup as lookup
