"""The converter: Hugging Face folders to distributed checkpoints and back, streamed; and the check of either.

Where to read on: ``checkpoint/naming.py`` (which rows are which), ``from_hf.py`` and ``to_hf.py`` (a conversion from
beginning to end), ``importing.py`` and ``exporting.py`` (what one process does), ``journal.py`` (kills),
``manifest.py`` (audit).
"""

from __future__ import annotations

import argparse

from r1_megatron.checkpoint.convert.from_hf import Converted, ImportOptions, from_hugging_face
from r1_megatron.checkpoint.convert.manifest import Verification, verify
from r1_megatron.checkpoint.convert.to_hf import ExportOptions, to_hugging_face
from r1_megatron.checkpoint.convert.work import Resources, parse_size
from r1_megatron.checkpoint.convert.workers import WorkerError

__all__ = [
    "Converted",
    "ExportOptions",
    "ImportOptions",
    "Resources",
    "Verification",
    "WorkerError",
    "from_hugging_face",
    "to_hugging_face",
    "verify",
]


def run(arguments: argparse.Namespace) -> str:
    """``r1-megatron convert``: what it was asked for, and what to print at the end."""
    resources = Resources(arguments.workers, parse_size(arguments.max_memory), arguments.quiet)
    if arguments.kind == "verify":
        found = verify(arguments.source, resources)
        found.check()
        return found.text()
    common = {"dtype": arguments.dtype, "fp8": arguments.fp8, "verify": arguments.verify, "restart": arguments.restart}
    if arguments.kind == "from-hf":
        done = from_hugging_face(arguments.source, arguments.target, ImportOptions(**common), resources)
    else:
        options = ExportOptions(
            experts=arguments.experts, max_shard_size=parse_size(arguments.max_shard_size), **common
        )
        done = to_hugging_face(arguments.source, arguments.target, options, resources)
    return done.text() + (", verified" if arguments.verify else "")
