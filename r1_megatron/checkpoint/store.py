"""Distributed checkpoints of the policy's weights: written by all ranks, read back under any parallel layout.

A checkpoint is a folder in megatron-core's ``torch_dist`` format with a ``checkpoint.json`` beside it. It is written
under another name and renamed when it is whole: a folder with its final name and a ``checkpoint.json`` is complete.

Parallel layouts may differ between writer and reader; the layer implementation may not (Transformer Engine's layers
name norms and experts otherwise than the local ones). Optimizer state is not kept yet: a run goes on from weights.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from r1_megatron.config.schema import ModelConfig
from r1_megatron.parallel.device import cuda_type_names
from r1_megatron.parallel.groups import ProcessGroups

_DESCRIPTION = "checkpoint.json"
# Fields of the model's configuration that training may change; any other one makes the weights another function.
_TRAINING_ONLY = {
    "preset",
    "init_method_std",
    "max_position_embeddings",
    "moe_aux_loss_coeff",
    "moe_router_bias_update_rate",
    "mtp_loss_scaling_factor",
}


def save_weights(
    folder: str | Path, chunks: Sequence[torch.nn.Module], groups: ProcessGroups, description: dict[str, Any]
) -> Path:
    """Write the weights and selection biases of all ranks into ``folder``. Collective.

    ``description`` is what a reader wants to know (step, model shape); it becomes ``checkpoint.json``.

    Raises:
        FileExistsError: ``folder`` is there already; nothing is overwritten.
        OSError: it could not be written (a full disk); nothing is left of it.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    error = None
    if dist.get_rank() == 0:
        if folder.exists():
            error = f"{folder} exists already. Choose another output_dir or remove it."
        else:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
    _raise_together(error, FileExistsError)
    # megatron-core hands results over through a manager process, for writers that work in the background. Ours write
    # here and now: an ordinary queue saves an interpreter (195 MB, 2.5 s) on every rank.
    filesystem_async._results_queue = queue.Queue()
    error = None
    try:
        with cuda_type_names():
            dist_checkpointing.save(
                _sharded_state(chunks, groups), str(partial), TorchDistSaveShardedStrategy("torch_dist", 1)
            )
    except CheckpointException as failure:  # raised on all ranks with what each of them met
        error = _why_not_written(folder, _first_cause(failure))
    if dist.get_rank() == 0:
        try:
            if error is None:
                (partial / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
                _flush(partial / _DESCRIPTION)
                os.replace(partial, folder)
        except OSError as failure:
            error = _why_not_written(folder, failure)
        if error is not None:
            shutil.rmtree(partial, ignore_errors=True)
    _raise_together(error, OSError)
    return folder


def _first_cause(failure: CheckpointException) -> BaseException:
    """What the first rank met; some of megatron-core's carry only their own text and a chain of causes."""
    if failure.failures:
        return next(iter(failure.failures.values()))[0]
    cause: BaseException = failure
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    return cause


def _why_not_written(folder: Path, cause: BaseException) -> str:
    free = shutil.disk_usage(folder.parent).free / 1e9
    return (
        f"the checkpoint {folder} could not be written ({type(cause).__name__}: {cause!s:.300}; {free:.3f} GB are "
        "free there). What was written of it is removed. Make room, or choose another output_dir."
    )


def load_weights(folder: str | Path, chunks: Sequence[torch.nn.Module], groups: ProcessGroups) -> dict[str, Any]:
    """Read a checkpoint of any layout into these chunks; answers its description. Collective.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: it holds another model.
    """
    folder = Path(folder)
    if not (folder / _DESCRIPTION).is_file():
        raise FileNotFoundError(_what_is_missing(folder))
    description = json.loads((folder / _DESCRIPTION).read_text())
    try:
        with cuda_type_names():
            state = dist_checkpointing.load(_sharded_state(chunks, groups), str(folder))
    except (CheckpointingException, KeyError) as error:
        raise ValueError(f"checkpoint.load: {folder} does not hold this model: {error}") from error
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"chunk{index}"])
    return description


def load_checkpoint(
    folder: str | Path, model: ModelConfig, chunks: Sequence[torch.nn.Module], groups: ProcessGroups
) -> dict[str, Any]:
    """The weights of ``checkpoint.load``, written under any layout; answers the checkpoint's description. Collective.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: another model's (every field that differs is named), or damaged.
    """
    try:
        check_same_model(folder, model, read_description(folder).get("model", {}))
        return load_weights(folder, chunks, groups)
    except CheckpointException as error:  # torch's, on all ranks; it is no Exception and holds one of them per rank
        cause = _first_cause(error)
        reason = f"{type(cause).__name__}: {cause}"
    except (json.JSONDecodeError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ValueError(
        f"checkpoint.load: {folder} is damaged or incomplete, it cannot be read ({reason:.500}). "
        "Load an earlier checkpoint, or run the stage that writes it again."
    )


def check_same_model(folder: str | Path, model: ModelConfig, written: dict[str, Any]) -> None:
    """Raises ValueError if the checkpoint's description tells of another model.

    Without this, a model with fewer layers would be filled from the first ones and never say so.
    """
    ours = asdict(model)
    differing = [
        f"model.{name}={json.dumps(ours[name])}, there {json.dumps(written[name])}"
        for name in ours
        if name not in _TRAINING_ONLY and name in written and written[name] != ours[name]
    ]
    if differing:
        raise ValueError(
            f"checkpoint.load: {folder} holds another model: {'; '.join(differing)}. "
            "Give both stages the same model section, or load another checkpoint."
        )


def read_description(folder: str | Path) -> dict[str, Any]:
    """``checkpoint.json`` of a complete checkpoint, without touching any weight."""
    path = Path(folder) / _DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(_what_is_missing(Path(folder)))
    return json.loads(path.read_text())


def _what_is_missing(folder: Path) -> str:
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        return f"checkpoint.load: {folder} was never finished ({partial.name} is all there is). Load an earlier one."
    if not folder.exists():
        return f"checkpoint.load: {folder} does not exist. Run the stage that writes it first."
    return f"checkpoint.load: {folder} has no {_DESCRIPTION}: it is no complete checkpoint."


def _sharded_state(chunks: Sequence[torch.nn.Module], groups: ProcessGroups) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": groups.collection.dp_cp,
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,
    }
    states = [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    return {f"chunk{i}": _without_empty_objects(state) for i, state in enumerate(states)}


def _without_empty_objects(state: dict[str, Any]) -> dict[str, Any]:
    """Only Transformer Engine's modules have an extra state; megatron-core writes None for every other one.

    Left out, a checkpoint does not tell which module held a weight: stacked experts and single ones are exchanged.
    """
    return {
        name: value for name, value in state.items() if not (isinstance(value, ShardedObject) and value.data is None)
    }


def _raise_together(error: str | None, kind: type[Exception]) -> None:
    """Rank 0's error on every rank, so that none waits for the others."""
    box = [error]
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise kind(box[0])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
