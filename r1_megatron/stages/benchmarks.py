"""Sampling the benchmarks of an evaluation: in blocks of problems, each graded and kept before the next is drawn.

A sample follows from the checkpoint, the evaluation's seed, its benchmark and the place of its problem, so layouts,
sizes of blocks and interruptions change nothing. Every replica keeps what it has drawn in a file of its own; no
completion crosses between ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from r1_megatron.checkpoint.writer import raise_together
from r1_megatron.config.schema import BenchmarkConfig, SamplingConfig
from r1_megatron.data.prompts import load_prompts
from r1_megatron.data.templates import render
from r1_megatron.data.tokenizers import encode_prompt, token_problem
from r1_megatron.evaluation.completions import PASSES, CompletionsPart, Line, Place, gather_completions, place_of
from r1_megatron.evaluation.formats import BY_REWARD, Problem, groups_of, load_problems, problem_key, seed_of
from r1_megatron.evaluation.grading import Judge, terms_of, verdicts_of
from r1_megatron.evaluation.report import as_text, benchmark_table
from r1_megatron.evaluation.results import build_evaluation, digest_of_checkpoint, metrics_of
from r1_megatron.parallel.rank import stop_requested
from r1_megatron.rewards.base import RewardError
from r1_megatron.rollout.in_flight import RolloutStopped
from r1_megatron.stages.grading import GradingError, grade
from r1_megatron.stages.resume import from_first_rank
from r1_megatron.stages.setup import Run
from r1_megatron.stages.thinking import observe
from r1_megatron.telemetry.metrics import Metrics
from r1_megatron.telemetry.progress import mark, patience
from r1_megatron.telemetry.run_folder import EVALUATION, EVALUATION_PAGE, write_atomic, write_json
from r1_megatron.telemetry.writers import duration
from r1_megatron.types import GradedGroup, Prompt, Rollout

# Of what can be in flight at once, how much a block has: the longest sample of a block is waited for.
WAVES = 4


@dataclass(frozen=True)
class Questions:
    """A benchmark as prompts; ``problems`` says what each of them is."""

    benchmark: BenchmarkConfig
    problems: tuple[Problem, ...]
    prompts: tuple[Prompt, ...]


def ask(run: Run, benchmark: BenchmarkConfig) -> Questions:
    """Read a benchmark and put its questions into words and tokens.

    Raises:
        ValueError: a file or a row is wrong, or a prompt has more than ``data.max_prompt_tokens``.
    """
    if benchmark.format in BY_REWARD:
        held_out = benchmark.format == "held_out"
        prompts = of_sources(run.held_out if held_out else _prompts(run, benchmark), benchmark)
        problems = [
            Problem(p.index, problem_key(p.text, p.label), p.text, p.label, groups_of(p.metadata, p.source), p.metadata)
            for p in prompts
        ]
        return Questions(benchmark, tuple(problems), prompts)
    problems = load_problems(benchmark)
    return Questions(benchmark, tuple(problems), tuple(_in_tokens(run, benchmark, problems)))


def of_sources(prompts: Sequence[Prompt], benchmark: BenchmarkConfig) -> tuple[Prompt, ...]:
    """The prompts that a benchmark asks, numbered anew.

    Raises:
        ValueError: there is none of its sources.
    """
    wanted, found = benchmark.sources, sorted({prompt.source for prompt in prompts})
    asked = tuple(prompt for prompt in prompts if not wanted or prompt.source in wanted)
    if not asked:
        raise ValueError(
            f"evaluate.benchmarks ({benchmark.title}): no prompt is of sources={list(wanted)}. Those there are: "
            f"{', '.join(found)}."
        )
    return tuple(replace(prompt, index=place) for place, prompt in enumerate(asked[: benchmark.num_prompts]))


def _prompts(run: Run, benchmark: BenchmarkConfig) -> Sequence[Prompt]:
    assert benchmark.path is not None, "validated"
    cfg = run.cfg.data
    cfg = replace(cfg, template=benchmark.template or cfg.template, on_long_prompt="error", on_duplicate_prompt="error")
    return load_prompts(benchmark.path, cfg, run.tokenizer, run.cfg.model.vocab_size)


def _in_tokens(run: Run, benchmark: BenchmarkConfig, problems: Sequence[Problem]) -> list[Prompt]:
    limit, template = run.cfg.data.max_prompt_tokens, benchmark.template or run.cfg.data.template
    prompts, too_long, complaints = [], [], []
    for problem in problems:
        text = render(template, problem.question, run.tokenizer)
        tokens = encode_prompt(run.tokenizer, text)
        if wrong := token_problem(tokens, run.tokenizer, run.cfg.model.vocab_size):
            complaints.append(f"problem {problem.index}: {wrong}")
        if len(tokens) > limit:
            too_long.append(len(tokens))
        prompts.append(Prompt(problem.index, text, tuple(tokens), problem.label, problem.metadata))
    if too_long:
        complaints.append(
            f"{len(too_long)} prompts have more than data.max_prompt_tokens({limit}) tokens, the longest "
            f"{max(too_long)}. Set data.max_prompt_tokens={max(too_long)} or more: leaving some out would be another "
            "benchmark"
        )
    if complaints:
        raise ValueError(f"evaluate.benchmarks ({benchmark.title}): {'; '.join(complaints[:20])}.")
    return prompts


def greedy(sampling: SamplingConfig) -> SamplingConfig:
    return replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


def shown_thinking(found: Mapping[str, float]) -> dict[str, float]:
    """Of what responses show of thinking, what an evaluation reports."""
    shown = ("reevaluation_share", "verification_share", "language_mixing")
    return {name: value for name, value in found.items() if name.endswith(shown)}


def sampling_of(run: Run, benchmark: BenchmarkConfig, name: str) -> SamplingConfig:
    """How a pass over a benchmark draws; what the benchmark does not say is the run's own."""
    sampling = run.cfg.sampling
    sampling = replace(sampling, max_new_tokens=benchmark.max_new_tokens or sampling.max_new_tokens)
    if name == "greedy":
        return greedy(sampling)
    return replace(sampling, temperature=benchmark.temperature, top_p=benchmark.top_p)


class Sampling:
    """Completions of an evaluation: those that are kept already, and those still to be drawn. All ranks call every
    method together.

    Raises:
        ValueError: what is kept was drawn from another checkpoint, or answers other problems.
    """

    def __init__(self, run: Run, asked: Sequence[Questions]):
        self._run, self._asked = run, asked
        self._step = max(run.loaded.get("step") or 0, 1)  # whose reward terms count
        self._is_first = dist.get_rank() == 0
        load = run.cfg.checkpoint.load
        assert load is not None, "validated"
        self._digest = from_first_rank(digest_of_checkpoint(load) if self._is_first else None)
        self._done = self._what_is_kept()
        writes = run.groups.is_replica_writer
        self._judge = Judge([questions.benchmark for questions in asked], run.cfg.reward) if writes else None
        self._part = CompletionsPart(run.cfg.output_dir, run.groups.replica) if writes else None

    def __enter__(self) -> Sampling:
        return self

    def __exit__(self, *_: object) -> None:
        for closable in (self._judge, self._part):
            if closable is not None:
                closable.close()

    def _what_is_kept(self) -> set[Place]:
        problem, places = None, set()
        if self._is_first:
            keys = {(q.benchmark.title, problem.index): problem.key for q in self._asked for problem in q.problems}
            lines = gather_completions(self._run.cfg.output_dir)
            places = {place_of(line) for line in lines}
            if any(line["checkpoint"] != self._digest for line in lines):
                problem = f"checkpoint.load: {self._run.cfg.checkpoint.load} is not what its completions are from"
            elif any(keys.get((line["benchmark"], line["index"])) != line["key"] for line in lines):
                problem = "evaluate.benchmarks: a file has changed since its completions were drawn"
            if problem:
                problem = f"{problem}, in {self._run.cfg.output_dir}. Choose another output_dir, or bring it back."
            elif lines:
                self._run.log.note(f"going on: {len(lines)} problems have been answered")
        raise_together(problem, ValueError)
        return from_first_rank(places)

    def draw(self, questions: Questions, name: str) -> None:
        """The completions of a pass (``sampled`` or ``greedy``) that are not there yet, block by block.

        Raises:
            RolloutStopped: on all ranks, if any was asked to end; blocks before this one are kept.
        """
        run, benchmark = self._run, questions.benchmark
        num_samples = benchmark.samples_per_prompt if name == "sampled" else 1
        left = [p for p in questions.prompts if (benchmark.title, name, p.index) not in self._done]
        progress = _Progress(f"{benchmark.title}, {name}", len(questions.prompts), len(left))
        size = self._block_size(num_samples)
        for start in range(0, len(left), size):
            block = left[start : start + size]
            mine = block[run.groups.replica :: run.groups.topology.num_replicas]
            self._end_if_asked()
            with run.policy.sampling():
                rollouts = run.engine.generate(
                    mine,
                    num_samples,
                    sampling_of(run, benchmark, name),
                    seed=seed_of(run.cfg, benchmark),
                    policy_version=run.policy.version,
                    stop=stop_requested,
                )
            right, judged = self._keep(questions, name, mine, rollouts)
            run.log.note(progress.line(len(block), right, judged))

    def _end_if_asked(self) -> None:
        """Between blocks; within one the engine asks."""
        asked = torch.tensor(int(stop_requested()), device=self._run.groups.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked:
            raise RolloutStopped([])

    def _block_size(self, num_samples: int) -> int:
        """Problems of a block, of all replicas together."""
        cfg, num_replicas = self._run.cfg, self._run.groups.topology.num_replicas
        if cfg.evaluate.block_prompts is not None:
            return cfg.evaluate.block_prompts
        return max(1, WAVES * cfg.rollout.max_sequences // num_samples) * num_replicas

    def _keep(
        self, questions: Questions, name: str, prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]]
    ) -> tuple[float, float]:
        """Grade and write down; answers how many completions of all ranks are right, of how many.

        Ranks meet at least four times within ``parallel.timeout_s``, for tests of programs may take longer than that.
        """
        run, by_reward = self._run, questions.benchmark.format in BY_REWARD
        pending: list[tuple[Prompt, Sequence[Rollout], GradedGroup | None]] = []
        if by_reward:
            graded = grade(run, prompts, rollouts, self._step).groups
            pending = [(group.prompt, group.rollouts, group) for group in graded]
        else:
            pending = [(prompt, group, None) for prompt, group in zip(prompts, rollouts)]
        if self._part is None:
            pending = []
        right = judged = 0
        failure: Exception | None = None
        while True:
            deadline = time.monotonic() + run.cfg.parallel.timeout_s / 4
            with patience("the grading of completions", run.cfg.parallel.timeout_s):
                try:
                    while pending and time.monotonic() < deadline:
                        line = self._line(questions, name, *pending.pop(0))
                        right += sum(verdict is True for verdict in line["right"])
                        judged += sum(verdict is not None for verdict in line["right"])
                        assert self._part is not None
                        self._part.append([line])
                        mark()
                except (RewardError, OSError) as error:
                    failure = error
            state = torch.tensor([len(pending), int(failure is not None)], device=run.groups.device)
            dist.all_reduce(state, op=dist.ReduceOp.MAX)
            if state[1]:
                _raise_together(failure)
            if not state[0]:
                break
        counts = torch.tensor([float(right), float(judged)], dtype=torch.float64, device=run.groups.device)
        dist.all_reduce(counts)  # of replicas' writers; the other ranks have none
        return counts[0].item(), counts[1].item()

    def _line(
        self, questions: Questions, name: str, prompt: Prompt, group: Sequence[Rollout], graded: GradedGroup | None
    ) -> Line:
        benchmark, texts = questions.benchmark, [rollout.text for rollout in group]
        problem = questions.problems[prompt.index]
        if graded is not None:
            verdicts = verdicts_of(graded.components, texts)
        else:
            assert self._judge is not None
            verdicts = self._judge.grade(benchmark.format, prompt, texts)
        line: Line = {
            "benchmark": benchmark.title,
            "pass": name,
            "index": prompt.index,
            "key": problem.key,
            "checkpoint": self._digest,
            "groups": problem.groups,
            "prompt": prompt.text,
            "texts": texts,
            "num_tokens": [rollout.num_response for rollout in group],
            "finish": [rollout.finish for rollout in group],
            **verdicts._asdict(),
        }
        if graded is not None:
            line |= {"label": prompt.label, "metadata": prompt.metadata, "source": prompt.source}
            line |= {"rewards": graded.rewards.tolist(), "terms": terms_of(graded.components)}
        return line

    def conclude(self) -> None:
        """``evaluation.json`` and ``evaluation.md``, the metrics, and the table on the screen."""
        run, cfg = self._run, self._run.cfg
        dist.barrier()  # every replica has written its last line
        failure = None
        if self._is_first:
            try:
                lines = gather_completions(cfg.output_dir)
                checkpoint = {
                    "path": cfg.checkpoint.load,
                    "stage": run.loaded.get("stage"),
                    "step": run.loaded.get("step") or 0,
                    "sha256": self._digest,
                }
                evaluation = build_evaluation(cfg, [q.benchmark for q in self._asked], lines, checkpoint)
                run.log.evaluation(checkpoint["step"], metrics_of(evaluation, lines) | self._thinking(lines))
                page = as_text(evaluation)
                write_atomic(f"{cfg.output_dir}/{EVALUATION_PAGE}", page)
                write_json(f"{cfg.output_dir}/{EVALUATION}", evaluation)
                run.log.note(f"\n{benchmark_table(evaluation)}\n\nmore in {cfg.output_dir}/{EVALUATION_PAGE}")
            except OSError as error:
                failure = f"the evaluation could not be written: {error}"
        raise_together(failure, OSError)

    def _thinking(self, lines: Sequence[Line]) -> dict[str, float]:
        """Of the held-out prompts, as training reports it."""
        titles = [q.benchmark.title for q in self._asked if q.benchmark.is_as_in_training]
        found = Metrics()
        for name in PASSES:
            texts = [
                text for line in lines if line["benchmark"] in titles and line["pass"] == name for text in line["texts"]
            ]
            if texts:
                observe(found, f"{name}_", texts)
        return shown_thinking(found.reduce(lambda own: [own]).result())


class _Progress:
    """A line per block: how far, how right so far, how long still."""

    def __init__(self, what: str, num_problems: int, num_left: int):
        self._what, self._num_problems, self._left = what, num_problems, num_left
        self._begun, self._num_left = time.monotonic(), num_left
        self._right = self._judged = 0.0

    def line(self, num_drawn: int, right: float, judged: float) -> str:
        self._left -= num_drawn
        self._right, self._judged = self._right + right, self._judged + judged
        parts = [f"{self._what}: {self._num_problems - self._left}/{self._num_problems} problems"]
        if self._judged:
            parts.append(f"right {self._right / self._judged:.1%}")
        seconds = time.monotonic() - self._begun
        parts.append(duration(seconds))
        if self._left:
            parts.append(f"ETA {duration(seconds / (self._num_left - self._left) * self._left)}")
        return " | ".join(parts)


def _raise_together(failure: Exception | None) -> None:
    """The first failure of any rank, on all of them."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if failure is None else str(failure))
    raise GradingError(next(text for text in failures if text is not None))
