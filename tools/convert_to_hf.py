"""A checkpoint, of a conversion or of training, to a Hugging Face folder: ``r1-megatron convert to-hf``.

python tools/convert_to_hf.py runs/zero/checkpoints/final exported
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

from r1_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
