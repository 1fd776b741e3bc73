"""Hugging Face weights into the chunks of this rank: each rank takes its shards, of whatever layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from r1_megatron.checkpoint.naming import fused_expert_name, hugging_face_source
from r1_megatron.model.parameters import GlobalParameter, global_parameters
from r1_megatron.parallel.groups import ProcessGroups


@torch.no_grad()
def load_hugging_face(
    chunks: Iterable[torch.nn.Module], groups: ProcessGroups, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Fill every parameter and selection bias from ``tensors`` (Hugging Face names; per-expert or fused experts).

    Raises:
        ValueError: missing or mis-shaped tensors, all of them named, before anything is written.
    """
    planned, problems = [], []
    for chunk in chunks:
        for parameter in global_parameters(chunk, groups, biases=True):
            try:
                planned.append(
                    (parameter, parameter.shard_of(whole_tensor(parameter, tensors, chunk.config.num_layers)))
                )
            except (KeyError, ValueError) as error:
                problems.append(str(error.args[0]))
    if problems:
        raise ValueError("these weights do not fit the model:\n  " + "\n  ".join(problems))
    for parameter, shard in planned:
        parameter.tensor.copy_(shard)


def whole_tensor(parameter: GlobalParameter, tensors: Mapping[str, torch.Tensor], num_layers: int) -> torch.Tensor:
    """The whole megatron-core tensor, assembled from Hugging Face's. ``KeyError`` names what is missing."""
    source = hugging_face_source(parameter.name, num_layers)
    parts = [_hugging_face_tensor(name, tensors) for name in source.names]
    full = torch.cat(parts) if len(parts) > 1 else parts[0]
    missing_rows = parameter.global_shape[0] - full.shape[0]
    if source.pads_vocabulary and missing_rows > 0:
        full = torch.cat([full, full.new_zeros(missing_rows, *full.shape[1:])])
    return full


def _hugging_face_tensor(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name in tensors:
        return tensors[name]
    fused = fused_expert_name(name)
    if fused is None or fused[0] not in tensors:
        raise KeyError(f"{name} is missing")
    stacked, expert, part = fused
    weight = tensors[stacked][expert]
    if part == "down":
        return weight
    gate, up = weight.chunk(2, 0)
    return gate if part == "gate" else up
