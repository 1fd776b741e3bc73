"""How much memory conversions really take, by the tool that measures it: tensors larger than the whole allowance."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_memory_stays_below_the_cap_and_files_come_back(tmp_path: Path) -> None:
    """Embedding and head have 200 MB each; 170 MB are allowed for two workers, the least that is."""
    command = [sys.executable, str(ROOT / "tools" / "bench_convert.py"), "--folder", str(tmp_path), "--rounds", "1"]
    command += ["--workers", "2", "--max-memory", "170MB", "--json", str(tmp_path / "found.json")]
    command += ["--", "--preset", "tiny", "--dtype", "bf16", "vocab_size=400000", "hidden_size=256"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    for kind in ("from-hf", "to-hf"):
        assert found[kind]["bytes"] > 400e6
        assert 0 < found[kind]["memory"] <= 170e6, (kind, found[kind])
        assert found[kind]["ratio"] > 0
    assert "files that came back are the source's: True" in done.stdout


def test_the_scripts_are_the_command(tmp_path: Path) -> None:
    for script in ("convert_from_hf.py", "convert_to_hf.py"):
        command = [sys.executable, str(ROOT / "tools" / script), str(tmp_path / "nowhere"), str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "nowhere" in done.stderr and done.stderr.startswith("error: ")
