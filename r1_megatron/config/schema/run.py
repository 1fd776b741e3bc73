"""The whole tree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from r1_megatron.config.schema.data import DataConfig, TokenizerConfig
from r1_megatron.config.schema.evaluate import EvaluateConfig
from r1_megatron.config.schema.job import (
    CheckpointConfig,
    PreflightConfig,
    ProfileConfig,
    ResilienceConfig,
    TelemetryConfig,
)
from r1_megatron.config.schema.learning import CriticConfig, PPOConfig, RLConfig
from r1_megatron.config.schema.model import ModelConfig, ParallelConfig
from r1_megatron.config.schema.reject import JudgeConfig, RejectConfig
from r1_megatron.config.schema.reward import RewardConfig
from r1_megatron.config.schema.rollout import RolloutConfig, SamplingConfig
from r1_megatron.config.schema.supervised import DistillConfig, RewardModelConfig, SFTConfig
from r1_megatron.config.schema.train import TrainConfig

Stage = Literal["grpo", "ppo", "sft", "reject", "distill", "reward_model", "evaluate"]


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of one run."""

    stage: Stage = "grpo"
    name: str = "run"
    # Never written into when another run is in it.
    output_dir: str = "runs/run"
    seed: int = 1234
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    reject: RejectConfig = field(default_factory=RejectConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    @property
    def is_supervised(self) -> bool:
        """Whether the stage learns from responses that it is given."""
        return self.stage in ("sft", "distill")

    @property
    def is_rl(self) -> bool:
        """Whether the stage learns from what it samples."""
        return self.stage in ("grpo", "ppo")

    @property
    def learns_from_rows(self) -> bool:
        """Whether the stage learns from rows of a file or a task, and samples at most to evaluate itself."""
        return self.is_supervised or self.stage == "reward_model"

    @property
    def rows_section(self) -> str:
        """The section that says how many rows a step of such a stage takes, and how often each is taken."""
        return "reward_model" if self.stage == "reward_model" else "sft"

    @property
    def epochs(self) -> int | None:
        """Passes over the rows of such a stage; ``None``: ``train.steps`` decides."""
        section = self.reward_model if self.stage == "reward_model" else self.sft
        return section.epochs if self.learns_from_rows else None

    @property
    def num_steps(self) -> int | None:
        """Steps of the run; ``None``: as many as ``epochs`` makes of the rows, which the run counts."""
        return self.train.steps if self.epochs is None else None

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row, or sequence of a pair, that such a stage takes."""
        asked = (self.reward_model if self.stage == "reward_model" else self.sft).max_tokens
        return min(asked or self.model.max_position_embeddings, self.model.max_position_embeddings)

    @property
    def graded_by(self) -> RewardConfig:
        """``reward`` as it is asked about a step: ``last_steps`` of its terms are counted back from the configuration's
        own ``train.steps``, in an evaluation too."""
        return self.reward.over(self.train.steps)

    @property
    def rows_per_step(self) -> int:
        """Sequences that such a stage learns from in a step."""
        if self.stage == "reward_model":
            return self.reward_model.batch_size * (2 if self.reward_model.objective == "pairs" else 1)
        return self.sft.batch_size

    @property
    def replays_experts(self) -> bool:
        """Whether training takes the experts that the rollout chose."""
        replay = self.rollout.router_replay
        return self.is_rl and (self.model.num_moe_layers > 0 if replay is None else replay)

    @property
    def longest_sequence(self) -> int:
        """Tokens of a prompt and its response at most, in any step."""
        return self.data.max_prompt_tokens + self.sampling.longest

    @property
    def asks_held_out(self) -> bool:
        """Whether it needs the held-out prompts of `data`: an evaluation of other benchmarks, and a reward model, whose
        rows are no prompts, need nothing of it."""
        asked = self.evaluate.benchmarks
        if self.stage == "reward_model":
            return False
        return self.stage != "evaluate" or not asked or any(benchmark.format == "held_out" for benchmark in asked)

    @property
    def trains(self) -> bool:
        """Whether the stage changes weights: it has an optimizer, and checkpoints to go on from."""
        return self.stage not in ("evaluate", "reject")

    @property
    def asks_judge(self) -> bool:
        """Whether a judge reads what stage ``reject`` has sampled."""
        return self.stage == "reject" and (self.judge.prompt_path is not None or self.reject.pairs.by == "judge")

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest sequence that is sampled: of the policy, or of the judge."""
        judge = self.judge.max_prompt_tokens + self.judge.sampling.longest
        return max(self.longest_sequence, judge) if self.asks_judge else self.longest_sequence

    @property
    def hang_after_s(self) -> float:
        """Seconds without progress that are a hang; 0: nobody watches."""
        given = self.resilience.hang_after_s
        return self.parallel.timeout_s / 3 if given is None else given
