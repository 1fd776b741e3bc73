"""What a configuration amounts to, in words and numbers: ``r1-megatron explain FILE.yaml``.

Batch arithmetic is where runs of this kind go wrong most often, so every product is written out. Only arithmetic: no
file is read and no GPU is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1_megatron.config.load import Sources
from r1_megatron.config.origins import origin_lines
from r1_megatron.config.presets import count_parameters, layer_parameters, mtp_parameters
from r1_megatron.config.schema import DYNAMIC_TOKENS, BenchmarkConfig, ModelConfig, RunConfig, TrainConfig
from r1_megatron.config.schema.reward import first_step
from r1_megatron.config.value_models import critic_config, reward_model_terms
from r1_megatron.topology import Chunk, Topology, place_layers

Line = tuple[str, str]


def explain(cfg: RunConfig, sources: Sources = ()) -> str:
    """The run in words. The configuration has to be free of problems (``validate.check_config``).

    ``sources``: of `load_with_sources`, to say what of it presets, recipes and those that overrule them have set.
    """
    topology = Topology.from_config(cfg.parallel)
    stages = place_layers(cfg.parallel, cfg.model.num_layers, cfg.model.mtp_num_layers)
    sections: list[tuple[str, list[Line]]] = [
        (f"{cfg.name}: {cfg.stage} on {_count(topology.world_size, 'rank')}", _layout_lines(cfg, topology)),
        ("model", _model_lines(cfg, topology, stages)),
    ]
    if cfg.is_rl:
        sections.append(("rollout, every step", _rollout_lines(cfg, topology, stages) + _grading_lines(cfg)))
        sections.append(("training, every step", _training_lines(cfg, topology)))
    elif cfg.learns_from_rows:
        sections.append(("training", _sft_lines(cfg, topology)))
    elif cfg.stage == "reject":
        sections.append(("rollout, every block", _rollout_lines(cfg, topology, stages) + _grading_lines(cfg)))
        sections.append(("what is kept", _reject_lines(cfg)))
    if cfg.stage != "reject" and (not cfg.learns_from_rows or cfg.evaluate.num_prompts):
        sections.append(("evaluation", _evaluation_lines(cfg)))
    if origins := origin_lines(sources):
        sections.append(("where values are from", origins))
    width = max(len(name) for _, lines in sections for name, _ in lines)
    blocks = ["\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines)]) for title, lines in sections]
    return "\n\n".join(
        [*blocks, "Whether it fits, and how long a step takes: r1-megatron plan, with the same arguments."]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Ranks.


def _layout_lines(cfg: RunConfig, topology: Topology) -> list[Line]:
    t = topology
    lines = [
        ("dense layers", f"tp({t.tp}) * pp({t.pp}) * cp({t.cp}) * dp({t.dp}) = {_count(t.world_size, 'rank')}"),
    ]
    if cfg.model.num_moe_layers:
        text = (
            f"etp({t.etp}) * ep({t.ep}) * edp({t.edp}) = {_count(t.etp * t.ep * t.edp, 'rank')} of each pipeline "
            f"stage, {cfg.model.num_moe_experts // t.ep} of {cfg.model.num_moe_experts} experts a rank"
        )
        lines.append(("experts", text))
    lines.append(("device", f"{cfg.parallel.device}, {'bf16' if cfg.train.bf16 else 'fp32'}"))
    if t.vpp > 1:
        lines.insert(1, ("interleaving", f"vpp({t.vpp}) model chunks on every pipeline rank"))
    if t.cp > 1:
        text = (
            f"in training each sequence lies on cp({t.cp}) ranks, in {2 * t.cp} chunks; sampling takes each rank for a "
            f"replica: cp({t.cp}) * dp({t.dp}) = {t.num_replicas}"
        )
        lines.insert(1, ("context parallel", text))
    if t.tp > 1:
        lines.insert(1, ("sequence parallel", "on, because tp > 1"))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and layers.


def rank_parameters(model: ModelConfig, topology: Topology, chunks: tuple[Chunk, ...]) -> int:
    """Parameters that one rank of a pipeline stage holds: replicated ones whole, the others their shard.

    The vocabulary is padded to a multiple of the tensor parallel size. An MTP module on a stage without the embedding
    brings its own copy of it.
    """
    t = topology
    vocabulary = -(-model.vocab_size // t.tp) * model.hidden_size
    count = 0
    for chunk in chunks:
        layers = [layer_parameters(model, dense=index < model.num_dense_layers) for index in chunk.layers]
        layers += [mtp_parameters(model)] * chunk.mtp
        count += sum(x.replicated + x.tensor // t.tp + x.routed // (t.ep * t.etp) for x in layers)
        count += model.hidden_size * chunk.loss
    has_embedding = any(c.embedding or c.mtp for c in chunks)
    has_head = any(c.loss for c in chunks)
    tied_here = model.share_embeddings_and_output_weights and has_embedding and has_head
    return count + vocabulary * (has_embedding + has_head - tied_here)


@dataclass(frozen=True)
class _Row:
    """A run of pipeline ranks that hold as many layers and parameters as each other."""

    first: int
    last: int
    text: str


def _model_lines(cfg: RunConfig, topology: Topology, stages: tuple[tuple[Chunk, ...], ...]) -> list[Line]:
    m = cfg.model
    total, active = count_parameters(m)
    dense = f" ({m.num_dense_layers} dense)" if m.num_moe_layers else ""
    shape = f"{m.num_layers} layers{dense}, hidden {m.hidden_size}, {m.num_attention_heads} heads"
    if m.is_dense_student:
        shape = f"{m.architecture}, {shape} in {_count(m.query_groups, 'group')}"
    elif m.num_moe_layers:
        shape += f", top {m.moe_router_topk} of {m.num_moe_experts} experts"
    lines = [
        ("shape", f"{m.preset or 'custom'}: {shape}"),
        ("parameters", f"{total:,} ({_short(total)}), of which {_short(active)} work on a token"),
    ]
    if m.mtp_num_layers:
        lines.append(("", f"the total counts {_count(m.mtp_num_layers, 'MTP module')}"))
    for row in _stage_rows(m, topology, stages):
        ranks = f"pp rank {row.first}" if row.first == row.last else f"pp ranks {row.first}-{row.last}"
        lines.append((ranks, row.text))
    return lines


def _stage_rows(model: ModelConfig, topology: Topology, stages: tuple[tuple[Chunk, ...], ...]) -> list[_Row]:
    rows: list[_Row] = []
    previous = None
    for rank, chunks in enumerate(stages):
        count = rank_parameters(model, topology, chunks)
        kind = (count, tuple((len(c.layers), c.embedding, c.mtp, c.loss) for c in chunks))
        if kind == previous:
            rows[-1] = _Row(rows[-1].first, rank, f"{_held(chunks, numbers=False)}; {_short(count)} parameters a rank")
        else:
            rows.append(_Row(rank, rank, f"{_held(chunks, numbers=True)}; {_short(count)} parameters a rank"))
        previous = kind
    return rows


def _held(chunks: tuple[Chunk, ...], numbers: bool) -> str:
    """``embedding, layers 0-3 + 8-11``, or only how many layers."""
    parts = ["embedding"] if any(c.embedding for c in chunks) else []
    runs = [c.layers for c in chunks if c.layers]
    if runs and numbers:
        spans = " + ".join(f"{run[0]}-{run[-1]}" if run[0] < run[-1] else f"{run[0]}" for run in runs)
        parts.append(f"layer{'s' if sum(map(len, runs)) > 1 else ''} {spans}")
    elif runs:
        parts.append(" + ".join(str(len(run)) for run in runs) + " layers each")
    mtp = sum(c.mtp for c in chunks)
    if mtp:
        parts.append(_count(mtp, "MTP module"))
    if any(c.loss for c in chunks):
        parts.append("head and loss")
    return ", ".join(parts) or "nothing"


# ---------------------------------------------------------------------------------------------------------------------
# Batches.


def _rollout_lines(cfg: RunConfig, topology: Topology, stages: tuple[tuple[Chunk, ...], ...]) -> list[Line]:
    r, s, m = cfg.rollout, cfg.sampling, cfg.model
    prompts = r.prompts_per_step + (r.over_sampling_prompts if cfg.is_rl else 0)
    samples = prompts * r.samples_per_prompt
    length = cfg.longest_sequence
    share, replica = _Share(prompts, topology.num_replicas), "dp rank" if topology.cp == 1 else "replica"
    per_rank = share.most * r.samples_per_prompt
    at_once = min(r.max_sequences, per_rank)
    drafting = bool(r.speculative_tokens)
    layers = max(sum(len(c.layers) + (drafting and c.mtp > 0) for c in chunks) for chunks in stages)
    if m.is_dense_student:
        groups = m.query_groups // topology.tp
        width, parts = 2 * groups * m.channels_per_head, f"2 * {groups} heads * {m.channels_per_head}"
    else:
        width, parts = (
            m.kv_lora_rank + m.qk_pos_emb_head_dim,
            f"(kv_lora {m.kv_lora_rank} + rope {m.qk_pos_emb_head_dim})",
        )
    size = 2 if cfg.train.bf16 else 4
    room = f"{at_once:,} sequences * {length:,} tokens"
    held = at_once * length
    if r.cache_tokens is not None and r.cache_tokens < held:
        room, held = f"{r.cache_tokens:,} tokens (rollout.cache_tokens)", r.cache_tokens
    cache = width * size * layers * held
    return [
        ("samples", f"{prompts} prompts * {r.samples_per_prompt} samples = {samples:,}{_learned(cfg)}"),
        (f"per {replica}", f"{share.text('prompt')}, at most {per_rank:,} samples of {per_rank * length:,} tokens"),
        (
            "length",
            f"prompt {cfg.data.max_prompt_tokens:,} + response {s.longest:,} = {length:,} tokens at most"
            + _switches(cfg),
        ),
        ("tokens", f"{samples:,} samples * {length:,} = {samples * length:,} at most"),
        ("in flight", f"{at_once:,} sequences per {replica} (rollout.max_sequences={r.max_sequences})"),
        (
            "cache per rank",
            f"{parts} * {size} bytes * {layers} layers * {room} = {_bytes(cache)} at most",
        ),
    ]


def _switches(cfg: RunConfig) -> str:
    s = cfg.sampling
    if not s.length_switches:
        return ""
    later = ", ".join(f"{x.max_new_tokens:,} from step {x.from_step:,} on" for x in s.length_switches)
    return f" (responses: {s.max_new_tokens:,}, {later})"


def _learned(cfg: RunConfig) -> str:
    r, rl = cfg.rollout, cfg.rl
    if cfg.is_rl and rl.zero_variance_groups == "resample":
        return f"; prompts whose samples are all worth the same are replaced, {rl.max_resamples} times a step at most"
    if not cfg.is_rl or not r.over_sampling_prompts:
        return ""
    rest = "go on in the next step" if r.unfinished == "continue" else "are thrown away"
    return f"; the {r.prompts_per_step} groups that are done first are learned from, the others {rest}"


def _training_lines(cfg: RunConfig, topology: Topology) -> list[Line]:
    r, rl, t = cfg.rollout, cfg.rl, cfg.train
    prompts = r.prompts_per_step // rl.num_minibatches
    sequences = prompts * r.samples_per_prompt
    updates = rl.num_minibatches * rl.inner_epochs
    microbatches = longest_microbatches(cfg, topology)
    lines = [
        (
            "minibatches",
            f"{r.prompts_per_step} prompts / {rl.num_minibatches} = {prompts} prompts, {sequences:,} sequences",
        ),
        (
            "microbatches",
            f"{_budget(t)} each: {microbatches:,} per minibatch if all are longest",
        ),
        ("per dp rank", f"the sequences are dealt to dp({topology.dp}) by their work"),
        (
            "updates",
            f"{_count(rl.num_minibatches, 'minibatch', 'minibatches')} * {_count(rl.inner_epochs, 'epoch')} = "
            f"{_count(updates, 'optimizer step')}; {t.steps:,} steps make {t.steps * updates:,}",
        ),
        ("learning rate", _learning_rate(cfg)),
        ("ratio", _policy_loss(cfg)),
    ]
    if rl.kl_coef:
        refresh = (
            "never replaced"
            if rl.reference_refresh_steps is None
            else f"replaced every {rl.reference_refresh_steps} steps = {rl.reference_refresh_steps * updates:,} updates"
        )
        estimator = "" if rl.kl_estimator == "k3" else f" ({rl.kl_estimator} estimator)"
        where = ", taken off the reward" if rl.kl_in == "reward" else ""
        lines.append(("reference", f"KL {rl.kl_coef:g}{estimator} to the starting policy{where}, {refresh}"))
    if cfg.stage == "ppo":
        lines.append(_critic_line(cfg))
    return lines


def longest_microbatches(cfg: RunConfig, topology: Topology) -> int:
    """Microbatches of an update on each data-parallel rank if all sequences are as long as the configuration allows."""
    together = 1
    if cfg.stage == "reward_model":
        sequences, length = cfg.rows_per_step, cfg.longest_row
        together = 2 if cfg.reward_model.objective == "pairs" else 1
    elif cfg.learns_from_rows:
        sequences, length = cfg.rows_per_step, cfg.longest_row
    else:
        sequences = cfg.rollout.prompts_per_step // cfg.rl.num_minibatches * cfg.rollout.samples_per_prompt
        length = cfg.longest_sequence
    tokens = cfg.train.micro_batch_tokens
    budget = max(length, DYNAMIC_TOKENS) if tokens is None else tokens
    multiple = topology.pp if topology.vpp > 1 else 1
    at_once = max(1, budget // (together * length)) * together * topology.dp * multiple
    return -(-sequences // at_once) * multiple


def _sft_lines(cfg: RunConfig, topology: Topology) -> list[Line]:
    rows, steps = cfg.rows_per_step, cfg.num_steps
    noun, of_step = "rows", f"{rows}"
    if cfg.stage == "reward_model" and cfg.reward_model.objective == "pairs":
        rows, noun = cfg.reward_model.batch_size, "pairs"
        of_step = f"{rows} pairs * 2 sequences = {2 * rows}"
    made = f"{_count(cfg.epochs or 0, 'epoch')}, and the last step takes what is left"
    if steps is not None:
        made = f"{steps:,} steps make {rows * steps:,}" + ("" if noun == "rows" else f" {noun}")
    lines = [
        (noun, f"{of_step} a step, dealt to dp({topology.dp}) ranks by their work; {made}"),
        ("microbatches", f"{_budget(cfg.train)} each"),
        ("learning rate", _learning_rate(cfg)),
    ]
    if cfg.is_supervised and cfg.sft.max_tokens is not None:
        lines.append(("longest row", f"{cfg.longest_row:,} tokens"))
    if cfg.stage == "reward_model":
        load = cfg.checkpoint.load
        start = "random weights" if load is None else f"{load}, under a fresh head where that writes"
        lines.append(("score", f"the value at the last token, of {cfg.longest_row:,} at most; starts from {start}"))
    return lines


def _grading_lines(cfg: RunConfig) -> list[Line]:
    """The reward models among the terms, and where their scores come from."""
    lines: list[Line] = []
    for number, folder in reward_model_terms(cfg).items():
        term = cfg.reward.terms[number]
        text = f"{folder} scores the {term.on} at its last token, in its own template and tokenizer"
        if term.sources:
            text += f", of {', '.join(term.sources)}"
        if (first := first_step(term, cfg.train.steps)) > 1:
            text += f", from step {first:,} on"
        lines.append((f"reward.terms.{number}", text))
    return lines


def _critic_line(cfg: RunConfig) -> Line:
    """Where the values of stage ``ppo`` come from."""
    critic, own = cfg.critic, critic_config(cfg)
    shape = "the policy's shape" if critic.model is None else f"{critic.model.preset or 'critic.model'}"
    start = "random weights" if own.checkpoint.load is None else own.checkpoint.load
    text = f"{shape} under a value head, from {start}; every token's value once a step, before the first update"
    return "critic", f"{text}; learning rate {_learning_rate(own)}" + _alone(critic.warmup_steps)


def _alone(steps: int) -> str:
    return f"; learns alone in the first {_count(steps, 'step')}" if steps else ""


def _reject_lines(cfg: RunConfig) -> list[Line]:
    r, j = cfg.reject, cfg.judge
    rules = [f"{term.function} >= {term.at_least:g}" for term in cfg.reward.terms if term.at_least is not None]
    right = [f"by rule: {' and '.join(rules)}"] if rules else []
    if j.prompt_path is not None:
        whom = f"prompts of {', '.join(j.sources)}" if j.sources else "all prompts"
        right.append(f"{whom} by {_judge_name(cfg)}, {_count(j.votes, 'vote')}")
    most = "all of them" if r.max_per_prompt is None else f"at most {r.max_per_prompt} a prompt ({r.prefer})"
    lines = [
        ("prompts", "all of the data" if r.num_prompts is None else f"the first {r.num_prompts:,} of the data"),
        ("right", "; ".join(right)),
        ("kept", f"what is right, readable (reject.filters) and said once: {most}"),
    ]
    for mix in r.mix:
        rows = f"{mix.count:,} rows" if mix.count is not None else f"{mix.weight:g} rows per kept one"
        lines.append(("mixed in", f"{rows} of {mix.path}"))
    if r.pairs.by is not None:
        how = "rewards" if r.pairs.by == "reward" else f"{_judge_name(cfg)}, {_count(2 * j.votes, 'vote')}"
        lines.append(("pairs", f"{_count(r.pairs.per_prompt, 'pair')} a prompt at most, by {how}"))
    return lines


def _judge_name(cfg: RunConfig) -> str:
    return "the policy itself" if cfg.judge.load is None else f"the judge {cfg.judge.load}"


def _evaluation_lines(cfg: RunConfig) -> list[Line]:
    e = cfg.evaluate
    if cfg.stage == "evaluate" and e.benchmarks:
        return [_benchmark_line(benchmark) for benchmark in e.benchmarks]
    if not e.num_prompts:
        return [("prompts", "none")]
    if cfg.stage == "evaluate":
        when = "once"
    elif cfg.learns_from_rows:
        when = f"every {e.interval} steps and at the end" if e.interval else "at the end"
    else:
        when = f"every {e.interval} steps, at the start and at the end" if e.interval else "at the start and at the end"
    return [
        (
            "prompts",
            f"{e.num_prompts} held out, {when}: {_count(e.samples_per_prompt, 'sample')} each at temperature "
            f"{cfg.sampling.temperature:g}, and greedy",
        )
    ]


def _benchmark_line(b: BenchmarkConfig) -> Line:
    num = "all problems" if b.num_prompts is None else f"the first {b.num_prompts:,} problems"
    where = f"{b.path or 'data'}{' (' + ', '.join(b.sources) + ')' if b.sources else ''}"
    text = f"{num} of {where}: {_count(b.samples_per_prompt, 'sample')} each at temperature "
    return b.title, f"{text}{b.temperature:g}, top-p {b.top_p:g}{', and greedy' if b.greedy else ''}"


def _budget(train: TrainConfig) -> str:
    if train.micro_batch_tokens is None:
        return f"as many packed tokens as the longest sequence of the step ({DYNAMIC_TOKENS:,} at least)"
    return f"up to {train.micro_batch_tokens:,} packed tokens"


def _learning_rate(cfg: RunConfig) -> str:
    t = cfg.train
    text = f"{t.lr:g}"
    if t.lr_warmup_steps:
        text += f" after {t.lr_warmup_steps} warm-up steps"
    if t.lr_decay_style == "constant":
        return f"{text}, constant"
    steps = t.lr_decay_steps or cfg.num_steps
    return f"{text}, {t.lr_decay_style} to {t.min_lr:g} over {'all' if steps is None else steps} steps"


def _policy_loss(cfg: RunConfig) -> str:
    rl = cfg.rl
    low, high = f"{1 - rl.clip_ratio_low:g}", f"{1 + rl.clip_ratio_high:g}"
    if rl.policy_loss == "cispo":
        text = f"CISPO: of every token, weighs it without a gradient, at most {high}"
    else:
        text = "of every token, "
        if rl.policy_loss == "gspo":
            text = "GSPO: of a sequence, "
        elif rl.ratio_level == "sequence":
            text = "of a sequence, the product of its tokens', "
        text += f"clipped to [{low}, {high}]"
        if rl.clip_ratio_low >= 1:
            text += " (the lower limit never binds)"
    baseline = {"group": "mean", "leave_one_out": "mean of the others", "none": ""}[rl.advantage_baseline]
    advantages = f"r - {baseline}" if baseline else "r"
    if rl.advantage_normalization == "std":
        advantages = f"({advantages}) / std"
    elif rl.advantage_normalization == "batch":
        advantages += ", normalised over the step"
    return f"{text}, advantages {advantages}, {rl.aggregation}"


# ---------------------------------------------------------------------------------------------------------------------
# Wording.


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


@dataclass(frozen=True)
class _Share:
    """What one rank gets when ``total`` things are dealt round-robin over ``ranks``."""

    total: int
    ranks: int

    @property
    def most(self) -> int:
        return -(-self.total // self.ranks)

    def text(self, noun: str) -> str:
        """``8 prompts``, or ``2 or 3 prompts`` where the deal does not come out even."""
        least = self.total // self.ranks
        return _count(least, noun) if least == self.most else f"{least} or {self.most} {noun}s"


def _short(count: int) -> str:
    """A parameter count with three significant digits: 671 B, 1.15 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            value = count / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    return str(count)


def _bytes(count: int) -> str:
    """Binary units, as memory is sold."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
