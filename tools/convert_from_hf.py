"""A Hugging Face folder to a checkpoint that loads under every layout: ``r1-megatron convert from-hf``.

python tools/convert_from_hf.py DeepSeek-V3 checkpoints/deepseek-v3
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

from r1_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "from-hf", *sys.argv[1:]]))
