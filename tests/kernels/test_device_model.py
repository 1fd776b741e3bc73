"""The CUDA kernels of the grouped GEMM, run on the host.

``device_model/`` stands for the GPU: its threads, TMA with 128-byte swizzle, wgmma's descriptors and fragments,
barriers, clusters. The kernels are compiled against it as they are, so what is tested is their own index arithmetic
and their own protocol of barriers. What PTX the thin wrappers hold is not tested here, nor is any timing.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels.grouped_cases import PRODUCTS, Case, Operands, check, check_guards, expected, operands

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
MODEL = ROOT / "tests" / "kernels" / "device_model"
CXX = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler to build the device model with")

BF16, FP32 = torch.bfloat16, torch.float32


class Problem(ctypes.Structure):
    """csrc/grouped_gemm/cuda.h"""

    _fields_ = [
        ("product", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("rows", "experts", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("left", "right", "offsets", "out")),
        *((name, ctypes.c_bool) for name in ("bfloat16_operands", "bfloat16_out", "wide_offsets", "accumulate")),
    ]


def build(target: Path, csrc: Path) -> ctypes.CDLL:
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-D__CUDACC__", "-D__CUDA_ARCH_FEAT_SM90_ALL"]
    kernels = [csrc / "grouped_gemm" / name for name in ("hopper.cu", "portable.cu")]
    sources = ["-x", "c++", *map(str, kernels), str(MODEL / "model.cpp")]
    subprocess.run([CXX, *flags, f"-I{MODEL}", f"-I{csrc}", *sources, "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.model_problem.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("device_model") / "model.so", CSRC)


def run(model: ctypes.CDLL, kernel: str, product: str, given: Operands, accumulate: bool = False, seed: int = 0):
    """An even seed runs all blocks in turn, an odd one lets each run ahead of the others."""
    (rows, k), (experts, n, _) = given.x.shape, given.weight.shape
    left = given.x if product == "grouped_mm" else given.dy
    right = given.x if product == "grouped_mm_wgrad" else given.weight
    columns = n if product == "grouped_mm" else k
    out = given.out if product == "grouped_mm_wgrad" else given.x.new_full((rows, columns), torch.nan)
    pointers = (tensor.data_ptr() for tensor in (left, right, given.offsets, out))
    wide = given.offsets.dtype == torch.int64
    flags = (given.x.dtype == BF16, out.dtype == BF16, wide, accumulate)
    problem = Problem(PRODUCTS.index(product), rows, experts, n, k, *pointers, *flags)
    model.model_configure(seed)
    code = getattr(model, f"r1_grouped_gemm_{kernel}")(ctypes.byref(problem), None)
    assert code == 0, f"error {code}: {model.model_problem().decode()}"
    return out


# Unaligned starts, empty experts (first, last, all), several tiles of rows, blocks alone and in pairs that share A or B
# (odd or even tile columns, many rows), tails of N, K and of the rows, steps beyond the ring's four stages.
HOPPER_CASES = [
    Case((5, 0, 130, 33), 32, 256, 72),
    Case((5, 0, 130, 33), 32, 72, 256, offsets_dtype=torch.int64),
    Case((0, 300, 1, 0), 0, 512, 200),
    Case((64, 64), 128, 200, 512, out_dtype=FP32),
    Case((0, 0), 7, 64, 512, out_dtype=FP32),
    Case((70, 0, 129), 1, 136, 264, out_dtype=FP32, accumulate=True),
    Case((70, 0, 129), 1, 264, 520, accumulate=True),
    Case((1,) * 40, 3, 8, 16),
    Case((1094, 970), 3, 72, 264, out_dtype=FP32),
]
PORTABLE_CASES = [
    Case((5, 0, 130, 33), 32, 136, 72),
    Case((5, 0, 130, 33), 32, 71, 133, out_dtype=FP32, accumulate=True),
    Case((5, 0, 130, 33), 32, 136, 72, dtype=FP32, offsets_dtype=torch.int64),
    Case((0, 70, 1, 0), 2, 71, 133, dtype=FP32, accumulate=True),
    Case((0, 0), 0, 8, 16),
]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("kernel", "case"),
    [("hopper", case) for case in HOPPER_CASES] + [("portable", case) for case in PORTABLE_CASES],
    ids=lambda value: str(value),
)
def test_float64_reference(model, kernel, case, product):
    accumulate = case.accumulate and product == "grouped_mm_wgrad"
    for seed in range(3):
        given = operands(case)
        wanted = expected(product, given, accumulate)
        check(run(model, kernel, product, given, accumulate, seed), wanted, case.dtype)
        check_guards(given)


@pytest.mark.parametrize("kernel", ["hopper", "portable"])
def test_wgrad_neighbours_do_not_leak(model, kernel):
    case = Case((37, 90, 64, 5), 0, 136, 256, out_dtype=FP32)
    given = operands(case)
    wanted = expected("grouped_mm_wgrad", given)
    given.dy[37:127], given.x[191:] = torch.nan, torch.inf  # experts 1 and 3
    out = run(model, kernel, "grouped_mm_wgrad", given)
    check(out[[0, 2]], wanted[[0, 2]], case.dtype)
    assert out[1].isnan().all() and not out[3].isfinite().any()


@pytest.mark.parametrize("product", PRODUCTS[:2])
@pytest.mark.parametrize("kernel", ["hopper", "portable"])
def test_rows_do_not_depend_on_their_neighbours(model, kernel, product):
    given = operands(Case((50, 7, 140), 0, 264, 136))
    whole = run(model, kernel, product, given)
    kept = torch.cat([torch.arange(20, 50), torch.arange(57, 180)])
    fewer = Operands(given.x[kept], given.dy[kept], given.weight, torch.tensor([30, 30, 150]), given.out, given.guarded)
    assert torch.equal(run(model, kernel, product, fewer)[:150], whole[kept][:150])


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("kernel", ["hopper", "portable"])
def test_wrong_offsets_stay_inside(model, kernel, product):
    given = operands(Case((50, 30, 20), 0, 136, 256, out_dtype=FP32))
    given.offsets = torch.tensor([50, 1 << 20, -3], dtype=torch.int32)
    run(model, kernel, product, given)
    check_guards(given)


@pytest.mark.parametrize(
    ("file", "line", "instead", "product"),
    [
        ("hopper.cu", "  fence_async_proxy();\n", "", "grouped_mm_wgrad"),
        ("hopper.cu", "      wgmma_wait<1>();\n", "", "grouped_mm"),
        ("hopper.cu", "kConsumerWarps * kCluster);", "kConsumerWarps);", "grouped_mm"),
        ("layout.h", "k_major ? 16 : kBoxBytes", "k_major ? 16 : 1024", "grouped_mm_dgrad"),
    ],
)
def test_the_model_notices(tmp_path, file, line, instead, product):
    """Breaks the kernel on purpose: a model that misses it would prove nothing."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc" / "grouped_gemm" / file
    assert line in source.read_text()
    source.write_text(source.read_text().replace(line, instead, 1))
    broken = build(tmp_path / "broken.so", tmp_path / "csrc")
    given = operands(Case((70, 0, 300), 1, 512, 512, out_dtype=FP32))
    wanted = expected(product, given)
    with pytest.raises(AssertionError):
        for seed in range(4):
            check(run(broken, "hopper", product, given, seed=seed), wanted, BF16)
