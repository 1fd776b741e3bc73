"""A measurement on the ranks of a run: started like ``r1-megatron train`` starts them, written down by the first."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1_megatron.config.schema import RunConfig
from r1_megatron.parallel.launch import launch
from r1_megatron.parallel.rank import adopt_rank, run_as_rank
from r1_megatron.topology import Topology


def measure_on_ranks(cfg: RunConfig, result: Path, measure: Callable[[], Any]) -> int:
    """Run ``measure`` on every rank of the configuration and write what rank 0 finds, as JSON. Answers the exit code.

    Called by the program and, again, by each rank, which is the same command in a process of its own.
    """
    if not adopt_rank():
        world_size = Topology.from_config(cfg.parallel).world_size
        ended = launch([sys.executable, *sys.argv], world_size, log_dir=Path(cfg.output_dir) / "logs")
        if ended.failure:
            print(ended.failure.message(), file=sys.stderr)
        return ended.exit_code

    def body() -> None:
        found = measure()
        if os.environ["RANK"] == "0":
            result.write_text(json.dumps(found))

    return run_as_rank(body)
