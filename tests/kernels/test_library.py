"""The library is built, found and loaded; and what happens where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1_megatron.kernels import cuda, library
from r1_megatron.kernels.ops import CPU_ONLY, NAMES

ROOT = Path(__file__).parents[2]
# Sees to it that an operator answers, and says where the library stands.
REPORT = """
import torch
from r1_megatron.kernels import cuda, library
from r1_megatron.kernels.ops import ops
x, w = torch.arange(6.0).view(3, 2), torch.ones(1, 4, 2)
assert torch.equal(ops.grouped_mm(x, w, torch.tensor([3])), x @ w[0].T)
print(library.load())
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("setup.py", "build_ext", "--build-lib", str(folder), **environment)


def test_what_can_be_built_is_loaded() -> None:
    found = library.load()
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        assert not found.loaded and "was not built" in found.problem
        pytest.skip("no C++ compiler on this machine: the operators run in plain PyTorch")
    assert found.loaded, found.problem
    assert found.problem == ""
    assert found.cpu_capability in library.CPU_CAPABILITIES
    assert found.with_cuda == (shutil.which("nvcc") is not None)
    for name in NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"r1_megatron::{name}", "CPU"), name
        on_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"r1_megatron::{name}", "CUDA")
        in_pytorch = name in CPU_ONLY and hasattr(cuda, name)
        assert on_cuda == (in_pytorch or (found.with_cuda and name not in CPU_ONLY)), name


def test_without_the_library_the_operators_run_in_pytorch() -> None:
    done = python("-c", REPORT, R1_MEGATRON_LIBRARY="off")
    assert done.returncode == 0, done.stderr
    assert "loaded=False" in done.stdout and "R1_MEGATRON_LIBRARY=off" in done.stdout


def test_a_library_that_is_missing_or_broken_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for content, said in ((None, "was not built"), (b"no library", "cannot be loaded")):
        path = tmp_path / "libr1_megatron.so"
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setattr(library, "PATH", path)
        found = library.load.__wrapped__()
        assert not found.loaded and said in found.problem and str(path.name) in found.problem


def test_off_builds_nothing(tmp_path: Path) -> None:
    done = build(tmp_path, R1_MEGATRON_BUILD="off")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_a_compiler_the_installation_goes_on_and_says_so(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/nowhere/c++", R1_MEGATRON_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert "were not built, plain PyTorch is used instead" in done.stdout and "/nowhere/c++" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_without_a_compiler_it_fails_where_the_operators_are_required(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/nowhere/c++", R1_MEGATRON_BUILD="require")
    assert done.returncode != 0
    assert "the operators of csrc/ were not built" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_an_unknown_way_to_build_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, R1_MEGATRON_BUILD="sometimes")
    assert done.returncode != 0
    assert "R1_MEGATRON_BUILD='sometimes': use auto, cpu, require or off" in done.stderr
