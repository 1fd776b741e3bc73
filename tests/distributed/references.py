"""What the ranks compare themselves with: computed once per session by the oracle, read by the ranks from one file.

The file holds plain tensors, so that a rank never imports Transformers. Batches are lists of sequences::

    batch     tokens, weights                    signed weights, most lengths different (oracle.sequences)
    families  tokens, weights, prompt_lens, routing   samples of common prompts (oracle.families)
    grpo      tokens and the arrays of a TrainSample for the GRPO loss
    papers    completions with rewards; of each algorithm loss and gradients; the ratios that count
    <name>    one reference: loss, nll, gradients, routing, for the model and the batch that its maker says
    weights   the float32 weights of each model
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import oracle as o
from tests.paper_oracle import LENGTHS, PAPERS, REWARDS, Output
from tests.tiny import TINY, TINY_AUX, TINY_FULL_RANK_QUERY, TINY_MTP, TINY_ROPE, TINY_TIED

# Everything the GRPO loss can do, at once, and at a temperature.
GRPO = o.GrpoOptions(0.2, 0.28, clip_ratio_dual=1.5, kl_coef=0.05, entropy_coef=0.01, tis_cap=1.2, temperature=0.7)
# Clipping always acts (norms are 6 to 8), decay is strong, the learning rate warms up and stays.
ADAMW = o.AdamWOptions(lrs=(2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3), weight_decay=0.1, clip_grad=0.3)
BIAS_UPDATE_RATE = 1e-3
TEMPERATURE = 0.7
# From this sample of oracle.families on, the prompt of its group has other experts in the last layer.
REROUTED_SAMPLE = 2


def write_references(path: Path) -> None:
    """Compute everything, in seconds, and save it."""
    batch = o.sequences()
    tiny = o.Oracle(TINY)
    natural = o.weighted_nll(tiny, batch)
    routing = o.random_routing(batch, TINY)
    models = {
        "tiny": tiny,
        "other": o.Oracle(TINY, seed=7),
        "rope": o.Oracle(TINY_ROPE),
        "full_rank_query": o.Oracle(TINY_FULL_RANK_QUERY),
        "mtp": o.Oracle(TINY_MTP),
        "tied": o.Oracle(TINY_TIED),
        "papers_old": _near(tiny, seed=7, share=0.05),
        "papers_reference": _near(tiny, seed=8, share=0.1),
    }
    share = TINY_AUX.moe_aux_loss_coeff / len(batch.tokens)
    answers: dict[str, Any] = {
        "tiny": _plain(natural),
        "rope": _plain(o.weighted_nll(models["rope"], batch)),
        "full_rank_query": _plain(o.weighted_nll(models["full_rank_query"], batch)),
        "mtp": _plain(o.weighted_nll(models["mtp"], batch)),
        "tied": _plain(o.weighted_nll(models["tied"], batch)),
        "aux": _plain(o.weighted_nll(tiny, batch, aux_weights=[share] * len(batch.tokens))),
        "replay": _plain(o.weighted_nll(tiny, batch, routing)),
        "grpo": _grpo(tiny),
        "papers": _papers(tiny, models["papers_old"], models["papers_reference"]),
        "trajectory": asdict(o.adamw_trajectory(tiny, batch, ADAMW)),
        "updated_bias": _updated_bias(tiny, natural.routing),
        "logprobs": {name: [_logprobs(models[name], tokens) for tokens in batch.tokens] for name in ("tiny", "other")},
        "batch": {"tokens": batch.tokens, "weights": batch.weights},
        "weights": {name: model.weights() for name, model in models.items()},
    }
    torch.save(answers | _families(tiny, models["mtp"]), path)


def _families(tiny: o.Oracle, mtp: o.Oracle) -> dict[str, Any]:
    """References of samples of common prompts, each computed by itself."""
    batch, prompt_lens = o.families()
    routing = o.random_routing(batch, TINY)
    for i in range(1, len(batch.tokens)):
        same = prompt_lens[i]
        if torch.equal(batch.tokens[i][:same], batch.tokens[i - 1][:same]):
            layers = slice(0, -1 if i == REROUTED_SAMPLE else None)
            routing[i][layers] = [
                torch.cat([b[:same], a[same:]]) for a, b in zip(routing[i][layers], routing[i - 1][layers])
            ]
    share = TINY_AUX.moe_aux_loss_coeff / len(batch.tokens)
    natural = o.weighted_nll(tiny, batch, aux_weights=[share] * len(batch.tokens))
    return {
        "families": {
            "tokens": batch.tokens,
            "weights": batch.weights,
            "prompt_lens": prompt_lens,
            "routing": routing,
        },
        "families_aux": _plain(natural),
        "families_mtp": _plain(o.weighted_nll(mtp, batch)),
        "families_replay": _plain(o.weighted_nll(tiny, batch, routing)),
        "families_bias": _updated_bias(tiny, natural.routing),
    }


def _plain(reference: o.Reference) -> dict[str, Any]:
    names = ("loss", "nll", "gradients", "routing", "mtp_nll")
    return {name: getattr(reference, name) for name in names}


def _logprobs(oracle: o.Oracle, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return o.logprobs(oracle(tokens).logits, tokens, TEMPERATURE)


def _updated_bias(oracle: o.Oracle, routing: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The selection biases after one aux-loss-free update (arXiv 2408.15664): towards the experts with fewer tokens."""
    config = oracle.config
    out = {}
    for i in range(config.num_layers - config.first_k_dense_replace):
        name = f"model.layers.{i + config.first_k_dense_replace}.mlp.gate.e_score_correction_bias"
        chosen = torch.cat([layers[i].flatten() for layers in routing])
        counts = torch.bincount(chosen, minlength=config.num_moe_experts).double()
        out[name] = oracle.weights()[name] + BIAS_UPDATE_RATE * torch.sign(counts.mean() - counts).float()
    return out


def _grpo(oracle: o.Oracle, num: int = 12) -> dict[str, Any]:
    """A batch whose ratios lie on both sides of every clip, and the loss and gradients of all its sequences."""
    generator = torch.Generator().manual_seed(23)
    batch = o.sequences(num=num, seed=29)

    def noise(tokens: torch.Tensor, std: float) -> torch.Tensor:
        return std * torch.randn(len(tokens), generator=generator)

    arrays: dict[str, list[torch.Tensor]] = {name: [] for name in ARRAYS}
    oracle.zero_grad()
    total = 0.0
    for tokens in batch.tokens:
        logits = oracle(tokens).logits
        log_p = torch.cat([o.logprobs(logits.detach(), tokens, GRPO.temperature), torch.zeros(1)]).float()
        old = log_p + noise(tokens, 0.4)
        mask = torch.arange(len(tokens)) >= len(tokens) // 3
        mask[-1] = False
        sequence = {
            "advantages": noise(tokens, 1.0),
            "weights": mask / torch.tensor(100.0),
            "old_logprobs": old,
            "behaviour_logprobs": old + noise(tokens, 0.2),
            "reference_logprobs": log_p + noise(tokens, 0.3),
        }
        for name in ARRAYS:
            arrays[name].append(sequence[name])
        loss = o.grpo_loss(logits, o.GrpoSequence(tokens, **{n: t.double() for n, t in sequence.items()}), GRPO)
        loss.backward()
        total += loss.item()
    return {"tokens": batch.tokens, **arrays, "loss": total, "gradients": oracle.gradients()}


def _near(oracle: o.Oracle, seed: int, share: float) -> o.Oracle:
    """Another policy, so near that its probabilities are."""
    near, other = o.copy_of(oracle), o.Oracle(oracle.config, seed)
    with torch.no_grad():
        for ours, theirs in zip(near.parameters(), other.parameters()):
            ours.copy_(((1 - share) * ours + share * theirs).float())
    return near


def _papers(policy: o.Oracle, old: o.Oracle, reference: o.Oracle) -> dict[str, Any]:
    """A step of every algorithm on the outputs of `tests/paper_oracle.py`, whose tokens are random here."""
    generator = torch.Generator().manual_seed(31)
    batch, questions, margin = [], [], float("inf")
    for prompt_len, lengths, rewards in zip((9, 3, 14), LENGTHS, REWARDS):
        prompt = torch.randint(0, TINY.vocab_size, (prompt_len,), generator=generator)
        outputs = []
        for length, reward in zip(lengths, rewards):
            tokens = torch.cat([prompt, torch.randint(0, TINY.vocab_size, (length,), generator=generator)])
            batch.append({"tokens": tokens, "prompt_len": prompt_len, "reward": reward})
            seen = [policy(tokens)]
            with torch.no_grad():
                seen += [old(tokens), reference(tokens)]
            margin = min(margin, *(forward.margin for forward in seen))
            outputs.append(Output(*(o.logprobs(f.logits, tokens, TEMPERATURE)[prompt_len - 1 :] for f in seen)))
        questions.append(outputs)
    assert margin > 1e-5, "a rounding error could choose another expert"
    answers = {}
    for name, paper in PAPERS.items():
        policy.zero_grad()
        loss = paper(questions, [np.array(rewards) for rewards in REWARDS])
        loss.backward(retain_graph=True)
        answers[name] = {"loss": loss.item(), "gradients": policy.gradients()}
    policy.zero_grad()
    telling = [outputs for outputs, rewards in zip(questions, REWARDS) if len(set(rewards)) > 1]
    log_ratios = [(out.l - out.old).detach() for outputs in telling for out in outputs]
    return {"batch": batch, "answers": answers, "log_ratios": log_ratios, "temperature": TEMPERATURE}


ARRAYS = ("advantages", "weights", "old_logprobs", "behaviour_logprobs", "reference_logprobs")
TINY_WITH_BIAS_UPDATE = replace(TINY, moe_router_bias_update_rate=BIAS_UPDATE_RATE)
