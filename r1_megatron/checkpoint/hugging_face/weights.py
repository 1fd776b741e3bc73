"""Hugging Face weights into the chunks of this rank: each rank takes its shards, of whatever layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from r1_megatron.checkpoint.naming import (
    VOCABULARY,
    Entry,
    entries_by_name,
    fused_expert_name,
    halves_to_pairs,
    hugging_face_shapes,
)
from r1_megatron.config.schema import ModelConfig
from r1_megatron.model.parameters import GlobalParameter, global_parameters
from r1_megatron.parallel.groups import ProcessGroups


@torch.no_grad()
def load_hugging_face(
    chunks: Iterable[torch.nn.Module],
    groups: ProcessGroups,
    tensors: Mapping[str, torch.Tensor],
    model: ModelConfig,
    rope_interleave: bool = True,
) -> None:
    """Fill every parameter and selection bias from ``tensors`` (Hugging Face names; per-expert or fused experts).

    Raises:
        ValueError: missing or mis-shaped tensors, all of them named, before anything is written.
    """
    planned, problems = [], []
    for chunk in chunks:
        for parameter in global_parameters(chunk, groups, biases=True):
            try:
                whole = whole_tensor(parameter, tensors, model, rope_interleave)
                planned.append((parameter, parameter.shard_of(whole)))
            except (KeyError, ValueError) as error:
                problems.append(str(error.args[0]))
    if problems:
        raise ValueError("these weights do not fit the model:\n  " + "\n  ".join(problems))
    for parameter, shard in planned:
        parameter.tensor.copy_(shard)


def whole_tensor(
    parameter: GlobalParameter,
    tensors: Mapping[str, torch.Tensor],
    model: ModelConfig,
    rope_interleave: bool = True,
) -> torch.Tensor:
    """The whole megatron-core tensor, assembled from Hugging Face's, a padded vocabulary's added rows zero.

    Raises:
        KeyError: names what is missing, or the parameter that the table does not have.
        ValueError: names what has another shape.
    """
    table = entries_by_name(model, rope_interleave)
    if parameter.name not in table:
        raise KeyError(f"no Hugging Face name is known for {parameter.name!r}")
    full = assemble(table[parameter.name], tensors)
    missing_rows = parameter.global_shape[0] - full.shape[0]
    if parameter.name in VOCABULARY and missing_rows > 0:
        full = torch.cat([full, full.new_zeros(missing_rows, *full.shape[1:])])
    return full


def assemble(entry: Entry, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One tensor of the table from Hugging Face's. ``KeyError``, ``ValueError``: missing, of another shape."""
    shapes = hugging_face_shapes([entry])
    parts = {name: _tensor_of(name, tensors) for name in shapes}
    for name, part in parts.items():
        if tuple(part.shape) != shapes[name]:
            raise ValueError(f"{name}: expected shape {shapes[name]}, got {tuple(part.shape)}")
    pieces = [parts[rows.name][rows.start : rows.stop] for rows in entry.rows]
    pieces = [halves_to_pairs(piece) if rows.halves else piece for rows, piece in zip(entry.rows, pieces)]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _tensor_of(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
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
