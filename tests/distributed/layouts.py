"""The parallel layouts that every multi-process test chooses from."""

from __future__ import annotations

from r1_megatron.config.schema import ParallelConfig


def layout(tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1, dp: int = 1, etp: int = 1) -> ParallelConfig:
    """A layout on the CPU. Experts are spread over the tensor- and data-parallel ranks: tp * dp is a multiple of ep."""
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        data_parallel_size=dp,
        device="cpu",
        timeout_s=300.0,
    )


def world_size(parallel: ParallelConfig) -> int:
    p = parallel
    return p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.data_parallel_size


LAYOUTS = {
    "one": layout(),
    "dp2": layout(dp=2),
    "tp2": layout(tp=2),
    "pp2": layout(pp=2),
    "pp2vpp2": layout(pp=2, vpp=2),
    "ep2": layout(ep=2, dp=2),
    "tp2ep2": layout(tp=2, ep=2),
    "tp2etp2": layout(tp=2, etp=2),
    "tp2pp2ep2": layout(tp=2, pp=2, ep=2),
    "eight": layout(tp=2, pp=2, vpp=2, ep=2, dp=2),
}
