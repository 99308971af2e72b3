"""Large language models from scratch, on MLX: a book you run, and the package it builds."""

__version__ = "0.1.0"

from .hardware import load_blas as _load_blas

_load_blas()  # must come before anything imports mlx.core (see the hardware chapter)
