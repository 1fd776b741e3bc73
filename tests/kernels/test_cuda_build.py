"""What the compiler makes of ``csrc/``: no GPU needed, only nvcc (and cuobjdump for what looks into the machine code).

``pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`` (in the extra ``dev``) brings cuobjdump.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from r1_megatron.kernels import library, ops

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu"))
NVCC = (
    os.environ.get("R1_MEGATRON_NVCC")
    or shutil.which("nvcc")
    or shutil.which(f"{os.environ.get('CUDA_HOME') or '/usr/local/cuda'}/bin/nvcc")
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")


def find_tool(package: str, name: str) -> str | None:
    """On PATH, or in the PyPI package that brings it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    places = [str(file.locate()) for file in files if file.name == name and os.access(file.locate(), os.X_OK)]
    return shutil.which(name) or next(iter(places), None)


CUOBJDUMP = find_tool("nvidia-cuda-cuobjdump", "cuobjdump")
NVDISASM = find_tool("nvidia-cuda-nvdisasm", "nvdisasm")
needs_cuobjdump = pytest.mark.skipif(
    CUOBJDUMP is None or NVDISASM is None,
    reason="no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
)


def cuobjdump(*arguments: str) -> str:
    # It calls nvdisasm by name.
    environment = {**os.environ, "PATH": f"{Path(NVDISASM).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([CUOBJDUMP, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def gencodes() -> list[str]:
    """``GENCODES`` of setup.py, read without running it."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "GENCODES":
            return ast.literal_eval(statement.value)
    raise AssertionError("setup.py has no GENCODES")


@dataclass(frozen=True)
class Compiled:
    object: Path
    messages: str


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    """Every .cu of csrc/ as setup.py compiles it, with what ptxas says."""
    folder = tmp_path_factory.mktemp("cuda_build")

    def compile(source: str) -> Compiled:
        target = folder / (source.replace("/", "_") + ".o")
        flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", "-Icsrc", "-Xptxas=-v"]
        flags += [f"--generate-code={gencode}" for gencode in gencodes()]
        done = subprocess.run([NVCC, *flags, "-c", source, "-o", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Compiled(target, done.stderr)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(SOURCES, pool.map(compile, SOURCES)))


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_no_warnings(compiled, source):
    messages = compiled[source].messages
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", messages)
    kernels = re.findall(r"Compiling entry function '(\w+)'", messages)
    assert len(spills) >= len(kernels)
    assert kernels or "__global__" not in (ROOT / source).read_text()
    assert {spill[1:] for spill in spills} <= {("0", "0")}, messages
    assert "warning" not in messages.lower(), messages
    # ptxas serialises wgmma, or ignores setmaxnreg, with a message only.
    assert not re.search(r"C75\d\d|Potential Performance Loss|setmaxnreg", messages), messages


def functions(sass: str) -> dict[str, list[str]]:
    """The instructions of each kernel, without addresses, predicates and encoding."""
    found = {}
    for part in sass.split("Function : ")[1:]:
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", part, re.MULTILINE)
        found[part.split()[0]] = [line.strip() for line in lines]
    return found


def count(instructions: list[str], name: str) -> int:
    return sum(instruction.startswith(name) for instruction in instructions)


@needs_nvcc
@needs_cuobjdump
def test_hopper_grouped_gemm_uses_hopper(compiled):
    sass = functions(cuobjdump("-sass", "-arch", "sm_90a", str(compiled["csrc/grouped_gemm/hopper.cu"].object)))
    assert len(sass) == 9, "three products, blocks alone or in pairs that share A or B"
    for name, instructions in sass.items():
        products = [line for line in instructions if line.startswith("HGMMA.64x256x16.F32.BF16")]
        assert len(products) == 4, name
        assert count(instructions, "USETMAXREG") == 2, name
        assert count(instructions, "LDL") + count(instructions, "STL") == 0, f"{name} uses local memory"
        # Six boxes a step; a pair loads half of what it shares for each other.
        shared = int(re.search(r"SharedE(\d)", name)[1])
        multicast = count(instructions, "UTMALDG.3D.MULTICAST")
        assert (multicast, count(instructions, "UTMALDG")) == ((0, 6), (1, 5), (2, 4))[shared], name
        # A barrier over the whole GPU belongs to the two waits for the pair, not into the loop.
        assert count(instructions, "MEMBAR.ALL.GPU") == (2 if shared else 0), name
        # Operands that run along M or N are read as they lie: forward none, dgrad B, wgrad both.
        product = int(re.search(r"ProductE(\d)", name)[1])
        assert all((".tnspA" in line, ".tnspB" in line) == (product == 2, product > 0) for line in products), name
        stores = "STG.E.128" if product < 2 else "STG.E.64"
        assert count(instructions, stores) > 0, name


@needs_nvcc
@needs_cuobjdump
def test_portable_grouped_gemm_uses_tensor_cores(compiled):
    for arch in ("sm_80", "sm_90a"):
        path = str(compiled["csrc/grouped_gemm/portable.cu"].object)
        for name, instructions in functions(cuobjdump("-sass", "-arch", arch, path)).items():
            bfloat16 = "bfloat16" in name
            assert (count(instructions, "HMMA.16816.F32.BF16") > 0) == bfloat16, name
            assert (count(instructions, "FFMA") >= 64) == (not bfloat16), name
            assert count(instructions, "LDG.E.128") > 0, name


@needs_nvcc
def test_library_loads_without_a_gpu():
    found = library.load()
    if not library.PATH.exists():
        pytest.skip(f"the library was not built: {found.problem}")
    assert found.loaded, found.problem
    assert ops.ops.compiled_with_cuda() == found.with_cuda
    if not found.with_cuda:
        pytest.skip("the library was built without CUDA, though nvcc is here: reinstall, or R1_MEGATRON_BUILD=require")
    assert found.cpu_capability in library.CPU_CAPABILITIES


@needs_cuobjdump
def test_library_holds_every_architecture():
    if not library.load().with_cuda:
        pytest.skip("the library was built without CUDA")
    machine_code = cuobjdump("-lelf", str(library.PATH))
    # One object of each kind for every .cu: nothing runs on a path that was meant for another GPU.
    assert machine_code.count(".sm_90a.cubin") == machine_code.count(".sm_80.cubin") == len(SOURCES)
    assert cuobjdump("-lptx", str(library.PATH)).count(".sm_80.ptx") == len(SOURCES)
