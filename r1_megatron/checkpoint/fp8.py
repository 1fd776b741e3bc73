"""Block-quantised FP8 weights: one fp32 scale for every 128 x 128 block of an e4m3 matrix.

DeepSeek-V3's layout: ``X.weight`` is float8_e4m3fn ``[rows, columns]`` and ``X.weight_scale_inv`` fp32
``[ceil(rows / 128), ceil(columns / 128)]``; a weight's value is code times scale. The released cast
(``inference/fp8_cast_bf16.py`` of github.com/deepseek-ai/DeepSeek-V3) multiplies in fp32 and rounds once, and so do we.

Casting back with the same scale is exact: a bf16 product is within 2^-9 of code times scale, e4m3 codes lie at least
2^-4 apart (relative; subnormal ones 2^-9 absolute), so the nearest code is the one it came from. Export relies on it:
a block that still is what its old scale can express keeps code and scale bit for bit, and only a block that training
changed gets a new scale, ``amax / 448``.

Matrices arrive in slices of rows, in the row numbers of the Hugging Face tensor; ``first_row`` and ``first_column``
say where a slice begins, so that blocks are found whatever the cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from r1_megatron.checkpoint.matching import FP8_BLOCK as BLOCK
from r1_megatron.checkpoint.matching import SCALE_SUFFIX, scale_shape
from r1_megatron.checkpoint.naming import Entry

E4M3_MAX = 448.0


def multiply_blocks_(
    values: torch.Tensor, scales: torch.Tensor, first_row: int = 0, first_column: int = 0
) -> torch.Tensor:
    """Multiply every element of ``values [r, c]`` (fp32) by its block's scale, in place.

    Args:
        values: rows ``first_row ...`` and columns ``first_column ...`` of a matrix.
        scales: fp32, those of the whole matrix.
    """
    num_rows, num_columns = values.shape
    start = 0
    while start < num_rows:
        block = (first_row + start) // BLOCK
        stop = min((block + 1) * BLOCK - first_row, num_rows)
        columns = scales[block].repeat_interleave(BLOCK)[first_column : first_column + num_columns]
        values[start:stop].mul_(columns)
        start = stop
    return values


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    first_row: int = 0,
    first_column: int = 0,
) -> torch.Tensor:
    """Values ``[r, c]`` of e4m3 ``codes [r, c]``: the fp32 product, rounded once to ``dtype``."""
    return multiply_blocks_(codes.float(), scales, first_row, first_column).to(dtype)


def quantize(values: torch.Tensor, old_scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes ``[r, c]`` and fp32 scales of ``values [r, c]`` (any float dtype, finite).

    Rows have to begin at a block's first row. With ``old_scales`` (those of these rows), a block whose codes under its
    old scale dequantise to the very same values keeps that scale. Every other block is scaled to use e4m3's range; a
    block of zeros gets scale 1.
    """
    rows, columns = values.shape
    blocks_OIPJ = _blocks(values.float())
    scales = (blocks_OIPJ.abs().amax((1, 3)) / E4M3_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))
    codes_OIPJ = _codes(blocks_OIPJ, scales)
    if old_scales is not None:
        old_codes = _codes(blocks_OIPJ, torch.where(old_scales == 0, torch.ones_like(old_scales), old_scales))
        back = (old_codes.float() * old_scales[:, None, :, None]).to(values.dtype).float()
        unchanged = (back == blocks_OIPJ).all(3).all(1)
        scales = torch.where(unchanged, old_scales, scales)
        # float8 has no torch.where; its bytes do.
        codes_OIPJ = torch.where(
            unchanged[:, None, :, None], old_codes.view(torch.uint8), codes_OIPJ.view(torch.uint8)
        ).view(torch.float8_e4m3fn)
    return codes_OIPJ.reshape(-1, codes_OIPJ.shape[2] * BLOCK)[:rows, :columns].contiguous(), scales


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """``[r, c]`` as ``[block rows, 128, block columns, 128]``, filled up with zeros."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def _codes(blocks_OIPJ: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Nearest e4m3 codes. Clamped first: torch's cast makes NaN of what rounds beyond 448."""
    return (blocks_OIPJ / scales[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


@torch.no_grad()
def dequantize_shard_(
    shard: torch.Tensor,
    entry: Entry,
    scales: Mapping[str, torch.Tensor],
    row_ranges: Sequence[tuple[int, int]] | None = None,
    first_column: int = 0,
) -> torch.Tensor:
    """Turn a shard of e4m3 codes, already copied into the model's dtype, into values, in place.

    For checkpoints that keep FP8: codes are exact in every dtype of a model, the product is taken in fp32 and rounded
    once. Tensors without scales stay as they are.

    Args:
        shard: ``[r, c]``, a part of the tensor of ``entry``, in any float dtype.
        scales: by Hugging Face name (``model.layers.3.mlp.down_proj.weight``), fp32, whole.
        row_ranges: the rows ``[start, stop)`` of the whole tensor that the shard's rows are, in their order; a
            tensor-parallel part of fc1 has two ranges, of the gate and of the up projection. ``None``: all rows.
        first_column: where the shard begins along the columns.

    Raises:
        ValueError: a scale of another shape than the matrix has blocks.
    """
    if not any(rows.name in scales for rows in entry.rows):
        return shard
    row_ranges = [(0, entry.shape[0])] if row_ranges is None else row_ranges
    if sum(stop - start for start, stop in row_ranges) != shard.shape[0]:
        raise ValueError(f"{entry.name}: row ranges {list(row_ranges)} are not the shard's {shard.shape[0]} rows")
    heights: dict[str, int] = {}
    for rows in entry.rows:
        heights[rows.name] = max(heights.get(rows.name, 0), rows.stop)
    for name, height in heights.items():
        if name in scales and tuple(scales[name].shape) != scale_shape((height, entry.shape[1])):
            expected, got = scale_shape((height, entry.shape[1])), tuple(scales[name].shape)
            raise ValueError(f"{name}{SCALE_SUFFIX}: expected shape {expected}, got {got}")
    done = 0
    for start, stop in row_ranges:
        position = 0  # of the piece within the whole tensor
        for rows in entry.rows:
            low, high = max(start, position), min(stop, position + rows.stop - rows.start)
            if low < high and rows.name in scales:
                assert not rows.halves, "FP8 is not kept where rotary rows are reordered"
                part = shard[done + low - start : done + high - start]
                _multiply_part_(part, scales[rows.name], rows.start + low - position, first_column)
            position += rows.stop - rows.start
        done += stop - start
    return shard


def _multiply_part_(part: torch.Tensor, scales: torch.Tensor, first_row: int, first_column: int) -> None:
    """One block row at a time, so that little fp32 is alive at once."""
    start = 0
    while start < part.shape[0]:
        stop = min(part.shape[0], start + BLOCK - (first_row + start) % BLOCK)
        values = multiply_blocks_(part[start:stop].float(), scales, first_row + start, first_column)
        part[start:stop].copy_(values)
        start = stop
