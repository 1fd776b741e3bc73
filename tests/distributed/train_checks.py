"""What a rank measures about training: run by the pool, compared with the references by the tests.

A check builds its own policy on the layout's process groups, and answers plain numbers. ``run`` walks through several
of them in one call, for building the groups costs more than most checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from r1_megatron.checkpoint.hugging_face.weights import load_hugging_face, whole_tensor
from r1_megatron.config.schema import ModelConfig, ParallelConfig, RLConfig, RolloutConfig, RunConfig, TrainConfig
from r1_megatron.kernels.linear_head import linear_policy_loss
from r1_megatron.model.parameters import GlobalParameter, global_parameters
from r1_megatron.model.policy_model import Head
from r1_megatron.model.routing import all_routers, chunk_routers
from r1_megatron.parallel.groups import ProcessGroups, build_process_groups
from r1_megatron.train.objectives import PolicyObjective, SupervisedObjective, cross_entropy
from r1_megatron.train.policy import Policy, build_policy
from r1_megatron.train.schedule import packed_sequences, statistics_pass, train_pass
from r1_megatron.train.step import NonFiniteError, train_step
from r1_megatron.types import MicroBatch, StepBatch, TrainSample
from tests.tiny import TINY, TINY_AUX, TINY_FULL_RANK_QUERY, TINY_MTP, TINY_ROPE, TINY_TIED

# Several microbatches of several sequences each; a few microbatches are not full.
MICRO_BATCH_TOKENS = 90
NORMAL = TrainConfig(use_distributed_optimizer=False, micro_batch_tokens=MICRO_BATCH_TOKENS)
Answer = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """The layout under test and the references."""

    parallel: ParallelConfig
    groups: ProcessGroups
    path: str

    @cached_property
    def references(self) -> dict[str, Any]:
        return torch.load(self.path, weights_only=True, mmap=True)

    def config(self, model: ModelConfig, train: TrainConfig = NORMAL, replay: bool = False, **rl: Any) -> RunConfig:
        return RunConfig(
            stage="grpo",
            model=model,
            parallel=self.parallel,
            train=train,
            rl=RLConfig(**rl),
            rollout=RolloutConfig(router_replay=replay),
        )

    def policy(self, cfg: RunConfig, weights: str = "tiny") -> Policy:
        """A policy with the oracle's weights. Padded rows of the head would be likely tokens if they were counted."""
        policy = build_policy(cfg, self.groups)
        self.load(policy, weights)
        return policy

    def load(self, policy: Policy, weights: str) -> None:
        load_hugging_face(policy.chunks, self.groups, self.references["weights"][weights], policy.cfg.model)
        with torch.no_grad():
            for rows in _padded_head_rows(policy):
                rows.fill_(1.0)
        reload = getattr(policy.optimizer, "reload_model_params", None)
        assert reload is not None
        reload()

    def samples(
        self, routing: list[list[torch.Tensor]] | None = None, columns: Sequence[int] = ()
    ) -> list[TrainSample]:
        """The batch as samples; ``columns``: which MoE layers' experts go with them."""
        batch = self.references["batch"]
        out = []
        for i, (tokens, weights) in enumerate(zip(batch["tokens"], batch["weights"])):
            experts = None
            if routing is not None:
                rows = len(tokens) - 1
                local = [routing[i][column][:rows] for column in columns]
                empty = torch.zeros(rows, 0, TINY.moe_router_topk, dtype=torch.int64)
                experts = (torch.stack(local, dim=1) if local else empty).numpy().astype(np.uint8)
            out.append(
                TrainSample(
                    tokens=tokens.numpy(),
                    loss_mask=(weights != 0).numpy(),
                    advantages=np.zeros(len(tokens), np.float32),
                    weights=weights.numpy(),
                    routed_experts=experts,
                )
            )
        return out

    def mine(self, samples: Sequence[TrainSample]) -> list[TrainSample]:
        """This data-parallel rank's samples, dealt unevenly: rank 0 has twice as many as it should."""
        dp, rank = self.groups.topology.dp, self.groups.dp_rank
        owner = [0 if i % (dp + 1) == dp else i % (dp + 1) for i in range(len(samples))]
        return [sample for sample, r in zip(samples, owner) if r == rank]


# ``sum_t w_t nll_t``, here with weights of either sign.
WEIGHTED_NLL = SupervisedObjective()


# --- measuring -----------------------------------------------------------------------------------------------------


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / (expected.norm() + 1e-12)).item()


def expected_shard(parameter: GlobalParameter, tensors: dict[str, torch.Tensor], model: ModelConfig) -> torch.Tensor:
    return parameter.shard_of(whole_tensor(parameter, tensors, model))


def gradient_error(policy: Policy, gradients: dict[str, torch.Tensor]) -> Answer:
    """The worst relative error of this rank's gradients, and how many there are."""
    worst, name, count = 0.0, "", 0
    for chunk in policy.chunks:
        for parameter in global_parameters(chunk, policy.groups):
            expected = expected_shard(parameter, gradients, policy.cfg.model)
            error = relative_error(parameter.tensor.main_grad, expected)
            count += 1
            if not error <= worst:  # NaN is worst
                worst, name = error, parameter.name
    return {"error": worst, "name": name, "count": count}


def backward(policy: Policy, batch: StepBatch, objective: Any = None, num_sequences: int = 16) -> float:
    """Gradients of the batch into ``main_grad``; answers the loss of the whole step."""
    policy.train_mode()
    for chunk in policy.wrapped:
        chunk.zero_grad_buffer()
    outputs = train_pass(policy.pipeline, batch.microbatches, objective or WEIGHTED_NLL, num_sequences)
    loss = torch.tensor([sum(float(output.loss) for output in outputs)], dtype=torch.float64)
    dist.all_reduce(loss)
    return loss.item() / policy.groups.topology.tp


def gradients_of(policy: Policy, samples: Sequence[TrainSample], expected: Answer, objective: Any = None) -> Answer:
    """Loss and gradients of this rank's samples, against a reference with ``loss`` and ``gradients``."""
    batch = policy.pack(samples, num_tokens=1)
    loss = backward(policy, batch, objective)
    return {
        "loss_error": abs(loss - expected["loss"]),
        "microbatches": len(batch.microbatches),
        **gradient_error(policy, expected["gradients"]),
    }


def _padded_head_rows(policy: Policy) -> list[torch.Tensor]:
    """The rows of the output layer that stand for no token, on the last tensor-parallel rank."""
    if not policy.chunks[-1].post_process:
        return []
    weight = policy.chunks[-1].output_layer.weight
    weight = policy.chunks[-1].shared_embedding_or_output_weight() if weight is None else weight
    first = policy.groups.tp_rank * weight.shape[0]
    real = max(0, min(policy.cfg.model.vocab_size - first, weight.shape[0]))
    return [weight[real:]] if real < weight.shape[0] else []


def _moe_columns(policy: Policy) -> list[int]:
    """Which MoE layers of the model this rank's routers are, in the order of ``Rollout.routed_experts``."""
    dense = policy.cfg.model.first_k_dense_replace
    return [
        layer.layer_number - 1 - dense
        for chunk in policy.chunks
        for layer in chunk.decoder.layers
        if layer.layer_number > dense
    ]


# --- checks --------------------------------------------------------------------------------------------------------


def gradients(bench: Bench) -> Answer:
    """Unevenly dealt, packed sequences in several microbatches."""
    policy = bench.policy(bench.config(TINY))
    answer = gradients_of(policy, bench.mine(bench.samples()), bench.references["tiny"])
    padded = [rows.shape[0] for rows in _padded_head_rows(policy)]
    if padded:
        answer["padded_gradient"] = policy.chunks[-1].output_layer.weight.main_grad[-padded[0] :].abs().max().item()
    return answer


def sequential_experts(bench: Bench) -> Answer:
    """megatron-core's own experts, one module each."""
    train = replace(NORMAL, moe_experts="sequential")
    return gradients_of(bench.policy(bench.config(TINY, train)), bench.mine(bench.samples()), bench.references["tiny"])


def one_rank_has_no_sample(bench: Bench) -> Answer:
    """All samples on data-parallel rank 0: the others run microbatches of nothing but padding."""
    policy = bench.policy(bench.config(TINY))
    return gradients_of(policy, bench.samples() if bench.groups.dp_rank == 0 else [], bench.references["tiny"])


def rope(bench: Bench) -> Answer:
    policy = bench.policy(bench.config(TINY_ROPE), "rope")
    return gradients_of(policy, bench.mine(bench.samples()), bench.references["rope"])


def full_rank_query(bench: Bench) -> Answer:
    policy = bench.policy(bench.config(TINY_FULL_RANK_QUERY), "full_rank_query")
    return gradients_of(policy, bench.mine(bench.samples()), bench.references["full_rank_query"])


def tied_embeddings(bench: Bench) -> Answer:
    """One matrix as embedding and head, which pipelining puts on two ranks."""
    policy = bench.policy(bench.config(TINY_TIED), "tied")
    return gradients_of(policy, bench.mine(bench.samples()), bench.references["tied"])


def mtp(bench: Bench) -> Answer:
    policy = bench.policy(bench.config(TINY_MTP), "mtp")
    return gradients_of(policy, bench.mine(bench.samples()), bench.references["mtp"])


def mtp_recomputed(bench: Bench) -> Answer:
    """With every layer recomputed in the backward pass, the MTP layer too."""
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    policy = bench.policy(bench.config(TINY_MTP, replace(NORMAL, **full)), "mtp")
    return gradients_of(policy, bench.mine(bench.samples()), bench.references["mtp"])


def mtp_left_alone(bench: Bench) -> Answer:
    """An objective that does not train the MTP heads: their gradients are zero, the others those without MTP."""
    policy = bench.policy(bench.config(TINY_MTP), "mtp")
    backward(policy, policy.pack(bench.mine(bench.samples()), 1), replace(WEIGHTED_NLL, trains_mtp=False))
    grads = [p.tensor.main_grad.abs().max() for c in policy.chunks for p in global_parameters(c, bench.groups)]
    names = [p.name for c in policy.chunks for p in global_parameters(c, bench.groups)]
    mtp_grads = [float(g) for g, name in zip(grads, names) if name.startswith("mtp.")]
    return {"mtp_gradient": max(mtp_grads, default=0.0)}


def aux_loss(bench: Bench) -> Answer:
    policy = bench.policy(bench.config(TINY_AUX))
    return gradients_of(policy, bench.mine(bench.samples()), bench.references["aux"])


def recompute(bench: Bench) -> Answer:
    """The worst of all ways to recompute activations, with the auxiliary loss inside."""
    answers = {}
    for name, options in {
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ("moe", "mla_up_proj")},
    }.items():
        policy = bench.policy(bench.config(TINY_AUX, replace(NORMAL, **options)))
        answers[name] = gradients_of(policy, bench.mine(bench.samples()), bench.references["aux"])
    return max(answers.values(), key=lambda answer: answer["error"]) | {"ways": len(answers)}


def packing(bench: Bench) -> Answer:
    """Gradients with every sequence alone, against all of them in one microbatch."""
    found = []
    for tokens in (1, 10_000):
        policy = bench.policy(bench.config(TINY, replace(NORMAL, micro_batch_tokens=tokens)))
        batch = policy.pack(bench.mine(bench.samples()), 1)
        loss = backward(policy, batch)
        parameters = [p for c in policy.chunks for p in global_parameters(c, bench.groups)]
        found.append((loss, len(batch.microbatches), {p.name: p.tensor.main_grad.clone() for p in parameters}))
    (alone_loss, alone_count, alone), (packed_loss, packed_count, packed) = found
    return {
        "loss_error": abs(alone_loss - packed_loss),
        "error": max(relative_error(packed[name], alone[name]) for name in alone),
        "microbatches": (alone_count, packed_count),
    }


def logprobs(bench: Bench) -> Answer:
    """Annotation at a temperature, by the policy and by a reference policy whose weights are swapped in."""
    policy = bench.policy(bench.config(TINY), "other")
    other = policy.snapshot()
    bench.load(policy, "tiny")
    before = [p.tensor.clone() for c in policy.chunks for p in global_parameters(c, bench.groups, biases=True)]
    samples = bench.mine(bench.samples())
    expected = bench.references["logprobs"]
    position = {sample.tokens.tobytes(): i for i, sample in enumerate(bench.samples())}

    def error(name: str) -> float:
        found = policy.logprobs(samples, temperature=0.7)
        gaps = [
            np.abs(got[:-1] - expected[name][position[s.tokens.tobytes()]].numpy()).max()
            for got, s in zip(found, samples)
        ]
        return float(max(gaps, default=0.0))

    answer = {"error": error("tiny")}
    with policy.using(other):
        answer["reference_error"] = error("other")
    after = [p.tensor for c in policy.chunks for p in global_parameters(c, bench.groups, biases=True)]
    answer["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, after))
    answer["error_afterwards"] = error("tiny")
    return answer


def plain_logits(bench: Bench) -> Answer:
    """Without labels the model answers logits, of the same distributions that annotation speaks about."""
    policy = bench.policy(bench.config(TINY))
    batch = policy.pack(bench.mine(bench.samples()), 1).microbatches[0]
    policy.train_mode()
    with torch.no_grad():
        shard = policy.chunks[0](
            batch.tokens, batch.position_ids, None, packed_seq_params=packed_sequences(batch)
        ).contiguous()
    shards = [torch.empty_like(shard) for _ in range(bench.groups.topology.tp)]
    dist.all_gather(shards, shard, group=bench.groups.tp)
    logp = torch.log_softmax(torch.cat(shards, dim=-1)[..., : TINY.vocab_size], dim=-1)
    (annotated,) = statistics_pass(policy.pipeline, [batch], temperature=1.0)
    gap = logp.gather(2, batch.labels[..., None])[..., 0] - annotated
    return {"error": gap[batch.weights != 0].abs().max().item(), "shape": tuple(shard.shape)}


def router_replay(bench: Bench) -> Answer:
    """Random experts forced upon every MoE layer, without and with recomputation; forward only, too."""
    expected = bench.references["replay"]
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    moe = {"recompute_granularity": "selective", "recompute_modules": ("moe",)}
    answer: Answer = {}
    for name, options in {"plain": {}, "full": full, "moe": moe}.items():
        policy = bench.policy(bench.config(TINY, replace(NORMAL, **options), replay=True))
        samples = bench.mine(bench.samples(expected["routing"], _moe_columns(policy)))
        policy.logprobs(samples, 1.0)  # must leave nothing behind for the backward pass
        answer[name] = gradients_of(policy, samples, expected)
        answer[name]["pending"] = sum(r.router_replay.pending for c in policy.chunks for r in all_routers(c))
        found = policy.logprobs(samples, 1.0)
        position = {sample.tokens.tobytes(): i for i, sample in enumerate(bench.samples())}
        gaps = [
            np.abs(got[:-1] + expected["nll"][position[s.tokens.tobytes()]].numpy()).max()
            for got, s in zip(found, samples)
        ]
        answer[name]["logprob_error"] = float(max(gaps, default=0.0))
    return answer


def grpo(bench: Bench) -> Answer:
    """Every term of the GRPO loss at a temperature."""
    expected = bench.references["grpo"]
    options = dict(
        clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_dual=1.5, kl_coef=0.05, entropy_coef=0.01, tis_cap=1.2
    )
    cfg = bench.config(TINY, **options)
    policy = bench.policy(cfg)
    names = ("advantages", "weights", "old_logprobs", "behaviour_logprobs", "reference_logprobs")
    samples = [
        TrainSample(
            tokens=tokens.numpy(),
            loss_mask=(expected["weights"][i] > 0).numpy(),
            **{name: expected[name][i].numpy() for name in names},
        )
        for i, tokens in enumerate(expected["tokens"])
    ]
    return gradients_of(policy, bench.mine(samples), expected, PolicyObjective(cfg.rl, temperature=0.7))


def optimizer_config(**options: Any) -> TrainConfig:
    """The settings of references.ADAMW."""
    return TrainConfig(
        steps=100,
        lr=1e-3,
        lr_warmup_steps=4,
        weight_decay=0.1,
        clip_grad=0.3,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        **options,
    )


def optimizer_trajectory(
    bench: Bench, train: TrainConfig, model: ModelConfig = TINY, weights: str = "tiny", trajectory: str = "trajectory"
) -> Answer:
    """Five steps on the batch from the named weights, against a trajectory of the references."""
    expected = bench.references[trajectory]
    policy = bench.policy(bench.config(model, train), weights)
    samples = bench.mine(bench.samples())
    losses, norms = [], []
    for _ in expected["losses"]:
        result = train_step(policy, policy.pack(samples, 1), WEIGHTED_NLL, num_sequences=16)
        assert result.updated
        losses.append(result.loss)
        norms.append(result.grad_norm)
    worst, name = 0.0, ""
    start = bench.references["weights"][weights]
    with policy.gathered():
        for chunk in policy.chunks:
            for p in global_parameters(chunk, bench.groups):
                goal, origin = (expected_shard(p, w, model).double() for w in (expected["weights"], start))
                tensor = p.tensor.double()
                if p.name == "output_layer.weight" and _padded_head_rows(policy):
                    real = p.tensor.shape[0] - _padded_head_rows(policy)[0].shape[0]
                    tensor, goal, origin = tensor[:real], goal[:real], origin[:real]
                error = ((tensor - goal).norm() / (goal - origin).norm()).item()
                if not error <= worst:
                    worst, name = error, p.name
    return {
        "loss_error": max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(losses, expected["losses"])),
        "norm_error": max(abs(a - b) / b for a, b in zip(norms, expected["grad_norms"])),
        "weight_error": worst,
        "name": name,
        "steps": len(losses),
    }


def trajectory(bench: Bench) -> Answer:
    """DistributedOptimizer: warm-up, clipping, decay."""
    return optimizer_trajectory(bench, optimizer_config())


def trajectory_overlapped(bench: Bench) -> Answer:
    """The same with gradient reduction and parameter gathering overlapped with computation."""
    return optimizer_trajectory(bench, optimizer_config(overlap_grad_reduce=True, overlap_param_gather=True))


def trajectory_plain(bench: Bench) -> Answer:
    """The same without DistributedOptimizer."""
    return optimizer_trajectory(bench, optimizer_config(use_distributed_optimizer=False))


def balancing_bias(bench: Bench) -> Answer:
    """One update of the selection biases, which counts the real tokens of the whole step and nothing else."""
    model = replace(TINY, moe_router_bias_update_rate=1e-3)
    policy = bench.policy(bench.config(model, optimizer_config()))
    train_step(policy, policy.pack(bench.mine(bench.samples()), 1), WEIGHTED_NLL, num_sequences=16)
    expected = bench.references["updated_bias"]
    gap = 0.0
    for chunk in policy.chunks:
        for layer in chunk.decoder.layers:
            if hasattr(layer.mlp, "router"):
                name = f"model.layers.{layer.layer_number - 1}.mlp.gate.e_score_correction_bias"
                gap = max(gap, (layer.mlp.router.expert_bias - expected[name]).abs().max().item())
    return {"error": gap, "routers": sum(len(chunk_routers(chunk)) for chunk in policy.chunks)}


def learning_rates(bench: Bench) -> Answer:
    """The learning rate of each of 12 steps, by decay style: 4 of warm-up, then 6 of decay, then the minimum."""
    answer = {}
    for style in ("constant", "linear", "cosine"):
        train = replace(optimizer_config(), lr_decay_style=style, lr_decay_steps=10, min_lr=1e-4)
        policy = bench.policy(bench.config(TINY, train))
        rates = []
        for _ in range(12):
            policy.scheduler.step(increment=1)
            rates.append(float(policy.optimizer.param_groups[0]["lr"]))
        answer[style] = rates
    return answer


@dataclass(frozen=True)
class Spoiled(SupervisedObjective):
    """A finite loss with a NaN gradient (``gradient``), or a NaN loss, in one microbatch of one rank."""

    microbatch_id: int = -1
    gradient: bool = True

    def head(self, batch: MicroBatch) -> Head:
        if id(batch.tokens) != self.microbatch_id:
            return super().head(batch)
        token_loss = cross_entropy(batch.weights[0])

        def spoiled(rows: slice, logprobs: torch.Tensor, entropy: torch.Tensor | None):
            loss, g, h, terms = token_loss(rows, logprobs, entropy)
            return loss if self.gradient else loss * float("nan"), g * float("nan"), h, terms

        def head(*args, **shard):
            loss, nll = linear_policy_loss(*args, spoiled, need_entropy=False, **shard)
            return loss, {"num_tokens": (batch.weights != 0).sum().to(nll.dtype)}

        return head


def _spoil(bench: Bench, batch: StepBatch, gradient: bool) -> Spoiled:
    """NaN in microbatch 1 of the last data-parallel rank only."""
    last = bench.groups.dp_rank == bench.groups.topology.dp - 1
    return Spoiled(microbatch_id=id(batch.microbatches[1].tokens) if last else -1, gradient=gradient)


def nonfinite(bench: Bench) -> Answer:
    """A NaN on one rank: skipped everywhere, nothing changed; then the training goes on as if it had not been."""
    model = replace(TINY, moe_router_bias_update_rate=1e-3)
    answer: Answer = {}

    def state(policy: Policy) -> list[torch.Tensor]:
        return [p.tensor.clone() for c in policy.chunks for p in global_parameters(c, bench.groups, biases=True)]

    def run_steps(spoiled: bool) -> tuple[list[torch.Tensor], list[float]]:
        policy = bench.policy(bench.config(model, optimizer_config(on_nonfinite="skip")))
        batch = policy.pack(bench.mine(bench.samples()), 1)
        rates = []
        for step in range(2):
            if spoiled and step == 1:
                before = state(policy)
                for gradient in (True, False):
                    result = train_step(policy, batch, _spoil(bench, batch, gradient), 16)
                    kind = "gradient" if gradient else "loss"
                    answer[f"{kind}_updated"] = result.updated
                    answer[f"{kind}_unchanged"] = all(torch.equal(a, b) for a, b in zip(before, state(policy)))
                    answer[f"{kind}_version"] = policy.version
            result = train_step(policy, batch, WEIGHTED_NLL, 16)
            assert result.updated
            rates.append(result.metrics["actor/lr"])
        return state(policy), rates

    clean, clean_rates = run_steps(spoiled=False)
    spoiled, spoiled_rates = run_steps(spoiled=True)
    answer["same_afterwards"] = all(torch.equal(a, b) for a, b in zip(clean, spoiled))
    answer["same_rates"] = clean_rates == spoiled_rates
    return answer


def nonfinite_stop(bench: Bench) -> Answer:
    """The error message of ``on_nonfinite: stop``, with and without overlapped communication."""
    answer: Answer = {}
    for overlap in (False, True):
        train = optimizer_config(on_nonfinite="stop", overlap_grad_reduce=overlap, overlap_param_gather=overlap)
        for gradient in (True, False):
            policy = bench.policy(bench.config(TINY, train))
            batch = policy.pack(bench.mine(bench.samples()), 1)
            before = [p.tensor.clone() for c in policy.chunks for p in global_parameters(c, bench.groups)]
            try:
                train_step(policy, batch, _spoil(bench, batch, gradient), 16)
                message = "no error"
            except NonFiniteError as error:
                message = str(error)
            after = [p.tensor for c in policy.chunks for p in global_parameters(c, bench.groups)]
            key = ("overlapped " if overlap else "") + ("gradient" if gradient else "loss")
            answer[key] = {"message": message, "unchanged": all(torch.equal(a, b) for a, b in zip(before, after))}
    return answer


def bf16(bench: Bench) -> Answer:
    """Half precision against float64, with the experts that float64 chose (a flipped expert is no rounding error)."""
    expected = bench.references["tiny"]
    policy = bench.policy(bench.config(TINY, replace(NORMAL, bf16=True), replay=True))
    samples = bench.mine(bench.samples(expected["routing"], _moe_columns(policy)))
    answer = gradients_of(policy, samples, expected)
    found = policy.logprobs(samples, 1.0)
    position = {sample.tokens.tobytes(): i for i, sample in enumerate(bench.samples())}
    gaps = [np.abs(got[:-1] + expected["nll"][position[s.tokens.tobytes()]].numpy()) for got, s in zip(found, samples)]
    answer["nll_error_mean"] = float(np.concatenate(gaps).mean()) if gaps else 0.0
    answer["nll_error_max"] = float(np.concatenate(gaps).max()) if gaps else 0.0
    squares, norms = 0.0, 0.0
    for chunk in policy.chunks:
        for p in global_parameters(chunk, bench.groups):
            goal = expected_shard(p, expected["gradients"], TINY).double()
            squares += (p.tensor.main_grad.double() - goal).square().sum().item()
            norms += goal.square().sum().item()
    answer["gradient_error"] = (squares / norms) ** 0.5
    return answer


def initial_weights(parallel: ParallelConfig, path: str) -> Answer:
    """Random initial weights: one rank alone writes them to ``path``, the ranks of a layout compare theirs with them.

    The vocabulary is padded by some layouts only: padded rows are nobody's.
    """
    groups = build_process_groups(parallel)
    policy = build_policy(RunConfig(model=TINY_MTP, parallel=parallel, train=NORMAL, seed=77), groups)
    parameters = [p for chunk in policy.chunks for p in global_parameters(chunk, groups, biases=True)]
    if dist.get_world_size() == 1:
        torch.save({p.name: p.tensor.detach() for p in parameters}, path)
    whole = torch.load(path, weights_only=True)
    different = []
    for p in parameters:
        expected = whole[p.name]
        padding = p.global_shape[0] - expected.shape[0]
        if padding:
            expected = torch.cat([expected, expected.new_zeros(padding, *expected.shape[1:])])
        rows = p.tensor.shape[0] - (padding if p.shard == p.shards - 1 else 0)
        if not torch.equal(p.tensor[:rows], p.shard_of(expected)[:rows]):
            different.append(p.name)
    return {"different": different, "names": [p.name for p in parameters]}


def nonfinite_written(bench: Bench) -> Answer:
    """One step with a NaN gradient on one rank: was it taken, and are the parameters still finite?"""
    policy = bench.policy(bench.config(TINY, optimizer_config(on_nonfinite="skip")))
    batch = policy.pack(bench.mine(bench.samples()), 1)
    result = train_step(policy, batch, _spoil(bench, batch, gradient=True), 16)
    parameters = [p.tensor for c in policy.chunks for p in global_parameters(c, bench.groups)]
    return {"updated": result.updated, "finite": all(bool(torch.isfinite(p).all()) for p in parameters)}


def balancing_counts(bench: Bench) -> Answer:
    """How many (token, expert) choices this rank's routers counted in a step; three MoE layers, topk 4."""
    policy = bench.policy(bench.config(replace(TINY, moe_router_bias_update_rate=1e-3)))
    for chunk in policy.chunks:
        chunk.config.finalize_model_grads_func = None  # it would reset the counts
    batch = policy.pack(bench.mine(bench.samples()), 1)
    backward(policy, batch)
    routers = [router for chunk in policy.chunks for router in all_routers(chunk)]
    counted = torch.tensor([float(sum(router.local_tokens_per_expert.sum() for router in routers))])
    dist.all_reduce(counted)
    real = sum(len(sample.tokens) for sample in bench.samples())
    padding = sum(m.tokens.shape[1] - m.num_tokens for m in batch.microbatches)
    return {"counted": int(counted), "expected": real * TINY.moe_router_topk * 3, "padding": padding}


CHECKS: dict[str, Callable[[Bench], Answer]] = {
    check.__name__: check
    for check in (
        gradients,
        one_rank_has_no_sample,
        rope,
        full_rank_query,
        sequential_experts,
        tied_embeddings,
        mtp,
        mtp_recomputed,
        learning_rates,
        mtp_left_alone,
        aux_loss,
        recompute,
        packing,
        logprobs,
        plain_logits,
        router_replay,
        grpo,
        trajectory,
        trajectory_overlapped,
        trajectory_plain,
        balancing_bias,
        nonfinite,
        nonfinite_stop,
        nonfinite_written,
        balancing_counts,
        bf16,
    )
}


def run(parallel: ParallelConfig, path: str, names: Sequence[str]) -> dict[str, Answer]:
    """Walk through the checks ``names`` on one layout."""
    bench = Bench(parallel, build_process_groups(parallel), path)
    answers = {}
    for name in names:
        print(f"check {name}", flush=True)
        answers[name] = CHECKS[name](bench)
    return answers
