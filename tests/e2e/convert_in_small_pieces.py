"""``r1-megatron convert`` with small units and a slow disk, so that a small model has moments for a kill to fall in.

python -m tests.e2e.convert_in_small_pieces from-hf SRC DST ...
"""

from __future__ import annotations

import sys
import time
from typing import Any

from r1_megatron.checkpoint.convert import exporting, importing, work
from r1_megatron.checkpoint.convert.journal import Partial
from r1_megatron.cli import main


def main_in_small_pieces() -> int:
    """The command line's exit code."""
    importing.PART_BYTES = 50_000
    exporting.UNIT_BYTES = 30_000
    work._MAX_ELEMENTS = 2000
    record = Partial.record

    def record_slowly(self: Partial, *unit: Any) -> None:
        time.sleep(0.03)
        record(self, *unit)

    Partial.record = record_slowly  # type: ignore[method-assign]
    return main(["convert", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main_in_small_pieces())
