"""The reference is Transformers' model, and nothing in it is decided by rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import oracle as o
from tests.tiny import TINY, TINY_FULL_RANK_QUERY, TINY_MTP, TINY_ROPE

MODELS = {
    "yarn": TINY,
    "rope": TINY_ROPE,
    "full_rank_query": TINY_FULL_RANK_QUERY,
    "mtp": TINY_MTP,
}


@pytest.mark.parametrize("name", MODELS)
def test_is_transformers_model(name: str) -> None:
    """The float64 norms, router and angles change nothing beyond what float32 rounds."""
    oracle = o.Oracle(MODELS[name])
    plain = o.hf_model(MODELS[name]).double().eval()
    plain.load_state_dict(oracle.causal_lm.state_dict())
    tokens = o.sequences().tokens[0]
    with torch.no_grad():
        assert (plain(tokens[None]).logits[0] - oracle(tokens).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_routing_is_not_a_matter_of_rounding(name: str) -> None:
    assert o.weighted_nll(o.Oracle(MODELS[name]), o.sequences()).margin > 2e-5


def test_forcing_the_natural_routing_changes_nothing() -> None:
    oracle, batch = o.Oracle(TINY), o.sequences(num=3)
    natural = o.weighted_nll(oracle, batch)
    forced = o.weighted_nll(oracle, batch, natural.routing)
    assert forced.loss == natural.loss
    assert all(torch.equal(forced.gradients[name], natural.gradients[name]) for name in natural.gradients)
    random = o.weighted_nll(oracle, batch, o.random_routing(batch, TINY))
    assert abs(random.loss - natural.loss) > 1e-3


def test_balance_loss_of_equal_loads_is_one() -> None:
    """Every expert is chosen by half of the tokens and has the same mean share: f_i = 1, P_i = 1 / E, the loss 1."""
    likes = torch.stack([(torch.arange(8) - t) % 8 < 4 for t in range(8)])
    scores = torch.where(likes, 0.6, 0.2).double()
    assert o.sequence_balance_loss(scores, num_chosen=4).item() == pytest.approx(1.0)
    assert o.sequence_balance_loss(scores[:2], num_chosen=4).item() > 1.1


def test_multi_token_prediction_looks_two_ahead() -> None:
    """Changing token t + 2 changes no MTP prediction up to t, changing token t + 1 changes the one at t."""
    oracle = o.Oracle(replace(TINY_MTP, num_layers=2))
    tokens = o.sequences().tokens[0].clone()
    t = len(tokens) - 3
    with torch.no_grad():
        before = oracle(tokens).mtp_logits
        tokens[t + 2] = (tokens[t + 2] + 1) % 259
        torch.testing.assert_close(oracle(tokens).mtp_logits[: t + 1], before[: t + 1], rtol=0, atol=1e-12)
        tokens[t + 1] = (tokens[t + 1] + 1) % 259
        assert (oracle(tokens).mtp_logits[t] - before[t]).abs().max() > 1e-3
