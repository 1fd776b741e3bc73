"""What a node is: versions that have to be equal everywhere, memory, limits, and the files that the run reads."""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path

import psutil
import torch
import torch.cuda.nccl

from r1_megatron.config.schema import RunConfig
from r1_megatron.config.validate_data import TASK_TOKENIZERS, data_files
from r1_megatron.kernels.library import PATH as LIBRARY
from r1_megatron.preflight.measurements import HostFacts
from r1_megatron.telemetry.gpu_health import count_devices
from r1_megatron.telemetry.host import available_cores, available_memory_bytes, version_of

_PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGES = ("r1_megatron", "torch", "megatron-core", "transformer-engine", "numpy", "tokenizers")
# Of a file that the run reads: its beginning tells two versions apart, and takes no time.
_FINGERPRINT_BYTES = 1 << 20


def host_facts(config: RunConfig, device: str) -> HostFacts:
    """The machine this process runs on."""
    shm = Path("/dev/shm")
    return HostFacts(
        versions=_versions(device),
        inputs={path: _fingerprint(Path(path)) for path in _inputs(config)},
        memory_total=available_memory_bytes(),
        memory_free=min(psutil.virtual_memory().available, available_memory_bytes()),
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        memlock_bytes=_limit(resource.RLIMIT_MEMLOCK),
        open_files=_limit(resource.RLIMIT_NOFILE),
        cores=available_cores(),
        num_gpus=count_devices() if device == "cuda" else None,
    )


def _versions(device: str) -> dict[str, str]:
    found = {name: version_of(name) or "not installed" for name in _PACKAGES}
    found["python"] = platform.python_version()
    found["torch's CUDA"] = str(torch.version.cuda)
    found["the source of r1_megatron"] = _source_checksum()
    found["the commit of r1_megatron"] = _commit()
    found["libr1_megatron.so"] = _checksum(LIBRARY) if LIBRARY.is_file() else "not built"
    if device == "cuda":
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _source_checksum() -> str:
    """Of all Python files of the package: changes that nobody committed count as well."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str:
    """``git describe`` of the checkout the package runs from; a package that was installed has none."""
    if not (_PACKAGE.parent / ".git").exists():
        return "none"
    command = ["git", "-C", str(_PACKAGE.parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip()[:12] or "unknown"


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:12]


def _inputs(config: RunConfig) -> list[str]:
    """Files and folders that every rank reads. Inputs of a checkpoint that the run goes on from are its own matter."""
    named = [
        *(str(file) for path in data_files(config).values() for file in sorted(glob.glob(path)) or [path]),
        None if config.tokenizer.kind in TASK_TOKENIZERS else config.tokenizer.path,
        config.checkpoint.load,
    ]
    return [path for path in dict.fromkeys(named) if path is not None]


def _fingerprint(path: Path) -> str:
    """Of a file: size and beginning; of a folder: names and sizes of what lies in it. Empty: it is not there."""
    digest = hashlib.sha256()
    if path.is_file():
        with open(path, "rb") as file:
            digest.update(str(path.stat().st_size).encode() + file.read(_FINGERPRINT_BYTES))
    elif path.is_dir():
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            size = entry.stat().st_size if entry.is_file() else 0
            digest.update(f"{entry.name}\0{size}\0".encode())
    else:
        return ""
    return digest.hexdigest()[:12]


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft
