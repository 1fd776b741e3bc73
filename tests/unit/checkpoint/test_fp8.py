"""Block-quantised FP8 against element-by-element arithmetic in float64 and plain Python loops."""

from __future__ import annotations

import math

import pytest
import torch

from r1_megatron.checkpoint.fp8 import dequantize, dequantize_shard_, quantize
from r1_megatron.checkpoint.matching import scale_shape
from r1_megatron.checkpoint.naming import Entry, Rows

SHAPES = [(128, 128), (1, 1), (127, 257), (300, 130), (129, 384)]


def random_codes(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Any finite code: both zeros, subnormal ones and 448 among them."""
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    return codes.view(torch.float8_e4m3fn)


def random_scales(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Of the released checkpoints' order, with all 24 bits of precision in use."""
    return torch.rand(scale_shape(shape), generator=generator) * 3e-4 + 1e-5


def value_of(code: int) -> float:
    """e4m3 by its definition (OCP 8-bit floating point, 4 exponent bits, bias 7, no infinities)."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def reference_values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 ``[r, c]``: an exact product (4 bits times 24), one element after the other."""
    rows = codes.view(torch.uint8).tolist()
    table = scales.double().tolist()
    values = [[value_of(code) * table[i // 128][j // 128] for j, code in enumerate(row)] for i, row in enumerate(rows)]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize_is_the_rounded_product(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    codes, scales = random_codes(shape, generator), random_scales(shape, generator)
    # The released cast takes the product in fp32, so the reference is rounded to fp32 first.
    expected = reference_values(codes, scales).float().to(dtype)
    assert torch.equal(dequantize(codes, scales, dtype), expected)


def test_every_slice_finds_its_blocks() -> None:
    generator = torch.Generator().manual_seed(2)
    shape = (300, 290)
    codes, scales = random_codes(shape, generator), random_scales(shape, generator)
    whole = dequantize(codes, scales)
    for first_row, rows, first_column, columns in [
        (0, 1, 0, 290),
        (100, 60, 5, 200),
        (127, 2, 127, 2),
        (250, 50, 256, 34),
    ]:
        part = codes[first_row : first_row + rows, first_column : first_column + columns]
        expected = whole[first_row : first_row + rows, first_column : first_column + columns]
        assert torch.equal(dequantize(part, scales, torch.bfloat16, first_row, first_column), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_unchanged_blocks_come_back_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    codes, scales = random_codes(shape, generator), random_scales(shape, generator)
    again, kept = quantize(dequantize(codes, scales, dtype), scales)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(kept, scales)


def test_all_codes_survive_every_kind_of_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 128).clone()
    codes[(codes & 0x7F) == 0x7F] = 0
    codes = codes.view(torch.float8_e4m3fn)
    for scale in (1.0, 2.0**-20, 1 / 3, 0.00123, 7e4, 1.9999999):
        scales = torch.full((2, 1), scale)
        again, kept = quantize(dequantize(codes, scales), scales)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8)) and torch.equal(kept, scales), scale


def test_a_changed_block_gets_its_own_scale_and_its_neighbours_keep_theirs() -> None:
    generator = torch.Generator().manual_seed(4)
    shape = (300, 300)
    codes, scales = random_codes(shape, generator), random_scales(shape, generator)
    values = dequantize(codes, scales)
    values[130, 140] += 0.37  # block (1, 1)
    again, new = quantize(values, scales)
    changed = torch.zeros_like(scales, dtype=torch.bool)
    changed[1, 1] = True
    assert torch.equal(new != scales, changed)
    block = (slice(128, 256), slice(128, 256))
    assert new[1, 1] == values[block].float().abs().max() / 448
    outside = torch.ones(shape, dtype=torch.bool)
    outside[block] = False
    assert torch.equal(again.view(torch.uint8)[outside], codes.view(torch.uint8)[outside])
    error = (dequantize(again, new, torch.float32)[block] - values[block].float()).abs()
    assert (error <= values[block].float().abs() / 16 + new[1, 1] * 2**-10).all()  # half a step of 3 mantissa bits


def test_blocks_of_zeros_and_scales_of_zero() -> None:
    values = torch.zeros(200, 130, dtype=torch.bfloat16)
    codes, scales = quantize(values)
    assert torch.equal(scales, torch.ones(2, 2)) and not codes.float().any()
    codes, scales = quantize(values, torch.zeros(2, 2))
    assert torch.equal(scales, torch.zeros(2, 2)) and not codes.float().any()
    values[0, 0] = 3.0
    _, scales = quantize(values, torch.zeros(2, 2))
    assert scales[0, 0] == torch.tensor(3.0) / 448 and scales[1, 1] == 0


# fc1 of a gated MLP with an odd width, as tensor-parallel rank 1 of 2 holds it.
GATE = (130, 260)
FC1 = Entry("fc1", "fc1", None, (260, 260), (Rows("gate", 0, 130), Rows("up", 0, 130)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shards_of_a_checkpoint_that_keeps_fp8(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    codes = {name: random_codes(GATE, generator) for name in ("gate", "up")}
    scales = {name: random_scales(GATE, generator) for name in ("gate", "up")}
    values = {name: dequantize(codes[name], scales[name], dtype) for name in codes}
    shard = torch.cat([codes["gate"][65:], codes["up"][65:]]).to(dtype)
    dequantize_shard_(shard, FC1, scales, [(65, 130), (195, 260)])
    assert torch.equal(shard, torch.cat([values["gate"][65:], values["up"][65:]]))
    whole = torch.cat([codes["gate"], codes["up"]]).to(dtype)
    columns = whole[:, 100:230].clone()
    assert torch.equal(dequantize_shard_(whole, FC1, scales), torch.cat([values["gate"], values["up"]]))
    assert torch.equal(dequantize_shard_(columns, FC1, scales, first_column=100), whole[:, 100:230])
    norm = torch.ones(3)
    assert dequantize_shard_(norm, Entry("n", "n", None, (3,), (Rows("n", 0, 3),)), scales) is norm


def test_wrong_shards_are_named() -> None:
    with pytest.raises(ValueError, match=r"gate_scale_inv: expected shape \(2, 3\), got \(1, 1\)"):
        dequantize_shard_(torch.zeros(260, 260), FC1, {"gate": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"fc1: row ranges \[\(0, 7\)\] are not the shard's 5 rows"):
        dequantize_shard_(torch.zeros(5, 260), FC1, {"gate": torch.ones(2, 3)}, [(0, 7)])
