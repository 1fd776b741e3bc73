"""Arithmetic that is worth an operator of its own: a written contract, a plain PyTorch form, compiled forms in csrc/.

``ops.py`` is the table of contents: schemas, shapes, meaning. ``reference.py`` holds the plain forms, which run on
every machine and in float64 and are the oracle of the tests; ``library.py`` loads the compiled ones. What training
calls are the differentiable functions over them. Nothing here knows a model, a schedule or a configuration; the only
communication is what an operator's formula needs, over the process group it is given.
"""

from r1_megatron.kernels.decode import (
    draw_tokens,
    latent_query,
    latent_values,
    linear_rows,
    mixture_of_experts,
    paged_attention,
    rms_norm,
    route_tokens,
)

__all__ = [
    "draw_tokens",
    "latent_query",
    "latent_values",
    "linear_rows",
    "mixture_of_experts",
    "paged_attention",
    "rms_norm",
    "route_tokens",
]
