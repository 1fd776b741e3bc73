"""``r1-megatron convert`` with small units, so that a small model has many that a kill can fall between.

python -m tests.e2e.convert_in_small_pieces from-hf SRC DST ...
"""

from __future__ import annotations

import sys

from r1_megatron.checkpoint import convert_export, convert_import, convert_run
from r1_megatron.cli import main

if __name__ == "__main__":
    convert_import.PART_BYTES = 50_000
    convert_export.UNIT_BYTES = 30_000
    convert_run._MAX_ELEMENTS = 2000
    sys.exit(main(["convert", *sys.argv[1:]]))
