"""Reward models as reward terms: ``function: reward_model`` with a checkpoint of stage ``reward_model``.

    reward:
      terms:
        - {function: reward_model, on: summary, from_step: 1301, options: {checkpoint: runs/helpful/checkpoints/final}}
        - {function: reward_model, from_step: 1301, options: {checkpoint: runs/safe/checkpoints/final}}

The model scores under the run's own layout, all ranks together, whatever its size and architecture, as long as they
divide over that layout. It reads text, not tokens: what the policy wrote is put into the template and the tokenizer
that the reward model was trained with, which its checkpoint holds. A response that spells control tokens, to forge the
end of its turn and another's, is read as the text that it is. With ``train.offload`` its weights lie on the host
and are on the GPU while it scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1_megatron.checkpoint.contents import Contents
from r1_megatron.checkpoint.hugging_face.origin import ORIGIN
from r1_megatron.checkpoint.store import load_checkpoint, read_description
from r1_megatron.config.schema import RewardTermConfig, RunConfig, TokenizerConfig
from r1_megatron.config.value_models import beside, checkpoint_model, reward_model_terms
from r1_megatron.data.templates import render
from r1_megatron.data.tokenizers import Tokenizer, build_tokenizer, encode_as_text, encode_prompt
from r1_megatron.model.build import build_model
from r1_megatron.parallel.groups import ProcessGroups
from r1_megatron.rewards.mixture import concerns, counts_at, seen_part
from r1_megatron.telemetry.phases import phase
from r1_megatron.telemetry.writers import RunLog
from r1_megatron.train.policy import Policy, Weights, build_policy
from r1_megatron.train.value_objectives import scored
from r1_megatron.types import Prompt, TrainSample


@dataclass(frozen=True)
class RewardModel:
    """A value model and how texts become its tokens.

    Attributes:
        max_tokens: longer sequences lose their beginning: the score is read at the end.
        weights: on the host, where they wait there; ``None``: the model holds them.
    """

    policy: Policy
    tokenizer: Tokenizer
    template: str
    max_tokens: int
    weights: Weights | None = None

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Float64 ``[n]``, one score for each of this replica's responses. Collective over all ranks.

        The responses to one prompt should stand together: it is computed once for them.
        """
        samples = [self._sample(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        with self.policy.using(self.weights) if self.weights is not None else contextlib.nullcontext():
            values = self.policy.values(samples)
        return np.array([of_tokens[-1] for of_tokens in values], dtype=np.float64)

    def _sample(self, prompt: str, response: str) -> TrainSample:
        """As the rows that the model learned from: the prompt in its template, the response, the stop token."""
        before = encode_prompt(self.tokenizer, render(self.template, plain(prompt), self.tokenizer))
        tokens = [*before, *encode_as_text(self.tokenizer, plain(response)), self.tokenizer.eos_id]
        cut = max(0, len(tokens) - self.max_tokens)
        return scored(np.array(tokens[cut:]), prompt_len=max(0, len(before) - cut))


def build_reward_models(cfg: RunConfig, groups: ProcessGroups, log: RunLog) -> dict[int, RewardModel]:
    """The reward models of a run by the number of their term; terms of one checkpoint share its weights. Collective."""
    built: dict[str, RewardModel] = {}
    models: dict[int, RewardModel] = {}
    for number, folder in reward_model_terms(cfg).items():
        key = f"{folder} {sorted(cfg.reward.terms[number].options.items())}"
        if key not in built:
            built[key] = _build(cfg, cfg.reward.terms[number], f"reward.terms.{number}", groups)
            log.note(f"reward.terms.{number}: scores by {folder}")
        models[number] = built[key]
    return models


def score_terms(
    cfg: RunConfig,
    models: dict[int, RewardModel],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    step: int,
) -> dict[int, np.ndarray]:
    """What `Grader.grade` is given: by the number of the term, float64 ``[n]``, NaN where the term does not count.
    Collective over all ranks."""
    given = {}
    for number, model in models.items():
        term = cfg.graded_by.terms[number]
        if not counts_at(term, step):  # the same on all ranks
            continue
        places = [i for i, prompt in enumerate(prompts) if concerns(term, prompt, step)]
        texts = [seen_part(term, prompts[i], completions[i]) for i in places]
        given[number] = np.full(len(prompts), np.nan)
        with phase("reward_model"):
            given[number][places] = model.scores([prompts[i].text for i in places], texts)
    return given


def _build(cfg: RunConfig, term: RewardTermConfig, name: str, groups: ProcessGroups) -> RewardModel:
    folder, field = Path(term.options["checkpoint"]), f"{name}.options.checkpoint"
    description = read_description(folder, field)
    model = checkpoint_model(folder)
    assert model is not None
    own = beside(cfg, model)
    chunks = build_model(own, groups, draw_weights=False)
    load_checkpoint(folder, Contents(chunks, groups), own.model, field=field, verify=cfg.checkpoint.verify)
    policy = build_policy(own, groups, chunks)
    if not (folder / ORIGIN).is_dir():
        raise ValueError(
            f"{field}: {folder} holds no tokenizer ({ORIGIN}/), so nobody knows what its tokens mean. Train it from a "
            "checkpoint that can be exported to Hugging Face."
        )
    tokenizer = build_tokenizer(TokenizerConfig("huggingface", str(folder / ORIGIN)))
    return RewardModel(
        policy,
        tokenizer,
        template=_template(term.options, description, field),
        max_tokens=min(term.options.get("max_tokens") or model.max_position_embeddings, model.max_position_embeddings),
        weights=policy.move_to_host() if cfg.train.offload else None,
    )


def _template(options: dict[str, Any], description: dict[str, Any], field: str) -> str:
    template = options.get("template") or description.get("template")
    if template is None:
        raise ValueError(
            f"{field}: the checkpoint does not say which template its prompts had. Name it: options.template."
        )
    return template


def plain(text: str) -> str:
    """The text as UTF-8 can hold it: half a surrogate pair, which a policy may write, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
