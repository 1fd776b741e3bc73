"""The sources that a run's data comes from: one, or several that are mixed. Each has a configuration of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from r1_megatron.config.schema import DataConfig, DataSourceConfig
from r1_megatron.data.tasks import Task, build_task

_KEYS = ("prompt_key", "label_key", "metadata_key", "response_key", "source_key")


class Source(NamedTuple):
    """``cfg`` speaks of this source alone. ``name``: of its rows, where they do not say it themselves; ``where`` names
    its section for messages."""

    cfg: DataConfig
    name: str
    where: str

    @property
    def task(self) -> Task | None:
        """The procedural task, with its problems drawn; ``None`` for files.

        Raises:
            ValueError: an option is wrong, or there are not so many problems; the section is named.
        """
        cfg = self.cfg
        if cfg.source == "jsonl":
            return None
        try:
            return build_task(cfg.source, cfg.task_options, cfg.num_train, cfg.num_eval, cfg.seed)
        except ValueError as error:
            raise ValueError(str(error).replace("data.", f"{self.where}.")) from error


def sources_of(cfg: DataConfig) -> list[Source]:
    """One per entry of ``data.sources``, or the only one."""
    if cfg.source != "mixture":
        return [Source(cfg, "", "data")]
    return [
        Source(_alone(cfg, source), source.name or source.path or source.kind, f"data.sources.{number}")
        for number, source in enumerate(cfg.sources)
    ]


def weights_of(cfg: DataConfig) -> list[float] | None:
    """Of the sources; ``None``: by their numbers of rows."""
    if cfg.source != "mixture":
        return None
    weights = [source.weight for source in cfg.sources if source.weight is not None]
    return weights if len(weights) == len(cfg.sources) else None


def _alone(cfg: DataConfig, source: DataSourceConfig) -> DataConfig:
    keys = {key: value for key in _KEYS if (value := getattr(source, key)) is not None}
    return replace(
        cfg, source=source.kind, sources=(), path=source.path, eval_path=source.eval_path, num_train=source.num_train,
        num_eval=source.num_eval, task_options=source.task_options, **keys,
    )  # fmt: skip
