"""The head and its loss in one operator, against a plain projection, ``token_statistics`` and autograd."""

from __future__ import annotations

import pytest
import torch

from r1_megatron.kernels import library, linear_head
from r1_megatron.kernels.linear_head import linear_policy_loss, linear_token_statistics
from r1_megatron.kernels.policy_loss import PolicyOptions, PolicyTokens, policy_surrogate, surrogate
from r1_megatron.kernels.vocab_parallel import token_statistics

T, VOCAB, HIDDEN, PADDED = 50, 37, 9, 41
SEQUENCES = torch.tensor([0, 20, 21, 44, T], dtype=torch.int32)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    set_chunk(monkeypatch, 8)


def set_chunk(monkeypatch, num_rows: int) -> None:
    monkeypatch.setattr(linear_head, "_chunk_rows", lambda hidden, width: num_rows)


def problem(seed=0, dtype=torch.float64):
    """Hidden states, weight with rows of NaN beyond the vocabulary, targets, the tokens' data."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    hidden, weight = randn(T, HIDDEN), randn(PADDED, HIDDEN, scale=0.7)
    weight[VOCAB:] = torch.nan
    targets = torch.randint(0, VOCAB, (T,), generator=generator)
    logprobs = torch.log_softmax(hidden @ weight[:VOCAB].T / 0.8, -1).gather(1, targets[:, None]).squeeze(1)
    mask = torch.rand(T, generator=generator) > 0.3
    tokens = {
        "loss_mask": mask.double(),
        "weights": mask * torch.rand(T, generator=generator, dtype=torch.float64),
        "advantages": randn(T),
        "behaviour_logprobs": logprobs + randn(T, scale=0.5),
        "old_logprobs": logprobs + randn(T, scale=0.5),
        "reference_logprobs": logprobs + randn(T, scale=0.5),
    }
    tokens = {name: array.to(torch.promote_types(dtype, torch.float32)) for name, array in tokens.items()}
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, PolicyTokens(**tokens)


def twin(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()


def with_main_grad(weight: torch.Tensor) -> torch.Tensor:
    """As megatron-core's data parallelism leaves a parameter; something is in the buffer already."""
    weight.main_grad = torch.ones_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    weight.grad_added_to_main_grad = False
    return weight


def plain_statistics(hidden, weight, targets, temperature):
    logp = torch.log_softmax(hidden @ weight[:VOCAB].T / temperature, dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def plain_policy_loss(hidden, weight, targets, tokens, options):
    """The same loss by way of whole logits."""
    logprobs, entropy = token_statistics(hidden @ weight[:VOCAB].T, targets, temperature=0.8)
    return policy_surrogate(logprobs, entropy, tokens, options)


def fused_policy_loss(hidden, weight, targets, tokens, options):
    def token_loss(rows, logprobs, entropy):
        return surrogate(logprobs, entropy, tokens[rows], options)

    return linear_policy_loss(hidden, weight, targets, token_loss, vocab_size=VOCAB, temperature=0.8)


# --- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["logprobs", "entropy", "both", "logprobs without entropy"])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("chunk", [1, 8, 49, 1000])
def test_statistics_equal_autograd(monkeypatch, chunk, kept, wanted):
    set_chunk(monkeypatch, chunk)
    monkeypatch.setitem(linear_head._KEPT_BYTES, "cpu", 1 << 20 if kept else 0)
    hidden, weight, targets, _ = problem()
    g, h = torch.randn(2, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain_hidden, plain_weight = twin(hidden), twin(weight[:VOCAB])

    def objective(logprobs, entropy):
        if wanted == "entropy":
            return (entropy * h).sum()
        return (logprobs * g).sum() + ((entropy * h).sum() if wanted == "both" else 0)

    found = linear_token_statistics(
        hidden, weight, targets, vocab_size=VOCAB, temperature=1.3, need_entropy="without" not in wanted
    )
    expected = plain_statistics(plain_hidden, plain_weight, targets, 1.3)
    assert (found[1] is None) == ("without" in wanted)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    objective(*found).backward()
    objective(*expected).backward()
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad[:VOCAB], plain_weight.grad, rtol=1e-12, atol=1e-12)
    assert (weight.grad[VOCAB:] == 0).all()


def test_statistics_gradcheck_and_second_backward():
    hidden, weight, targets, _ = problem(1)
    assert torch.autograd.gradcheck(
        lambda x, w: linear_token_statistics(x, w, targets, vocab_size=VOCAB, temperature=0.8),
        (hidden, weight[:VOCAB].detach().requires_grad_()),
    )
    logprobs, _ = linear_token_statistics(hidden, weight, targets, vocab_size=VOCAB)
    first = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(logprobs.sum(), hidden)[0], first)


def test_annotation_is_the_same_and_leaves_nothing_behind():
    hidden, weight, targets, _ = problem(2)
    with_main_grad(weight)
    with_gradient = linear_token_statistics(hidden, weight, targets, vocab_size=VOCAB)
    with torch.no_grad():
        without = linear_token_statistics(hidden, weight, targets, vocab_size=VOCAB)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(with_gradient, without))
    assert (weight.main_grad == 1).all() and not weight.grad_added_to_main_grad


# --- loss ----------------------------------------------------------------------------------------------------------

OPTIONS = [
    PolicyOptions(),
    PolicyOptions(clip_high=0.28, dual_clip=1.5, tis_cap=1.2, kl_coef=0.05, entropy_coef=0.01),
    PolicyOptions(kl_coef=0.05, kl_estimator="unbiased"),
    PolicyOptions("cispo", clip_high=0.28, tis_cap=1.2, kl_coef=0.05, kl_estimator="unbiased", entropy_coef=0.01),
]


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("chunk", [8, 1000])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.variant}-{o.kl_estimator}-{o.entropy_coef}")
def test_loss_equals_autograd(monkeypatch, options, chunk, main_grad):
    set_chunk(monkeypatch, chunk)
    hidden, weight, targets, tokens = problem(3)
    plain_hidden, plain_weight = twin(hidden), twin(weight[:VOCAB])
    if main_grad:
        with_main_grad(weight)
    loss, terms = fused_policy_loss(hidden, weight, targets, tokens, options)
    expected, expected_terms = plain_policy_loss(plain_hidden, plain_weight, targets, tokens, options)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms, expected_terms, rtol=1e-12, atol=1e-12)
    assert not terms.requires_grad
    factor = 1 if main_grad else 3
    (loss * factor).backward()
    (expected.sum() * factor).backward()
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, rtol=1e-12, atol=1e-12)
    found = weight.main_grad - 1 if main_grad else weight.grad
    torch.testing.assert_close(found[:VOCAB], plain_weight.grad, rtol=1e-12, atol=1e-12)
    assert (found[VOCAB:] == 0).all()
    assert getattr(weight, "grad_added_to_main_grad", False) == main_grad


def test_sequence_loss_takes_the_general_way():
    """GSPO: statistics of all tokens, then one ratio per sequence."""
    options = PolicyOptions("gspo", clip_low=0.05, clip_high=0.1, kl_coef=0.05, entropy_coef=0.01)
    hidden, weight, targets, tokens = problem(4)
    tokens = PolicyTokens(**{**vars(tokens), "cu_seqlens": SEQUENCES})
    plain_hidden, plain_weight = twin(hidden), twin(weight[:VOCAB])
    statistics = linear_token_statistics(hidden, weight, targets, vocab_size=VOCAB, temperature=0.8)
    loss, _ = policy_surrogate(*statistics, tokens, options)
    expected, _ = plain_policy_loss(plain_hidden, plain_weight, targets, tokens, options)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad[:VOCAB], plain_weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype, tolerance):
    """Against the same rounded inputs in float64, by norm. bf16 rounds the logits and their gradient once each."""
    options = OPTIONS[1]
    hidden, weight, targets, tokens = problem(5, dtype)
    exact_hidden, exact_weight = twin(hidden, torch.float64), twin(weight[:VOCAB], torch.float64)
    exact_tokens = PolicyTokens(**{n: a if a is None else a.double() for n, a in vars(tokens).items()})
    with_main_grad(weight)
    loss, _ = fused_policy_loss(hidden, weight, targets, tokens, options)
    expected, _ = plain_policy_loss(exact_hidden, exact_weight, targets, exact_tokens, options)
    loss.backward()
    expected.sum().backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == dtype and weight.main_grad.dtype == torch.float32
    assert abs(loss.item() - expected.sum().item()) <= tolerance * expected.abs().sum().item()
    for found, goal in ((hidden.grad, exact_hidden.grad), (weight.main_grad[:VOCAB] - 1, exact_weight.grad)):
        assert ((found.double() - goal).norm() / goal.norm()).item() <= tolerance


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_garbage_under_the_mask_changes_no_bit(garbage):
    """Data of tokens that carry no weight; the weight's padded rows are NaN in all these tests."""

    def run(spoil):
        hidden, weight, targets, tokens = problem(6)
        masked = tokens.loss_mask == 0
        if spoil:
            arrays = {n: a for n, a in vars(tokens).items() if n not in ("loss_mask", "cu_seqlens") and a is not None}
            soiled = {n: a.masked_fill(masked, garbage) for n, a in arrays.items()}
            tokens = PolicyTokens(loss_mask=tokens.loss_mask, **soiled)
            targets = targets.masked_fill(masked, -100)
        with_main_grad(weight)
        loss, terms = fused_policy_loss(hidden, weight, targets, tokens, OPTIONS[1])
        loss.backward()
        return loss, terms, hidden.grad, weight.main_grad

    for clean, soiled in zip(run(False), run(True)):
        assert torch.equal(clean, soiled) and soiled.isfinite().all()


def test_nan_stays_visible():
    """A NaN in the hidden state of a token that counts reaches loss and gradient, where it is found and named."""
    hidden, weight, targets, tokens = problem(7)
    row = int(tokens.weights.argmax())
    with torch.no_grad():
        hidden[row, 0] = torch.nan
    loss, terms = fused_policy_loss(hidden, weight, targets, tokens, OPTIONS[0])
    loss.backward()
    assert loss.isnan() and terms[:, row].isnan().any()
    others = torch.arange(T) != row
    assert terms[:, others].isfinite().all() and hidden.grad[others].isfinite().all()


# --- main_grad ------------------------------------------------------------------------------------------------------


def test_no_gradient_without_grad_mode():
    hidden, weight, targets, tokens = problem(8)
    with_main_grad(weight)
    with torch.no_grad():
        loss, _ = fused_policy_loss(hidden, weight, targets, tokens, OPTIONS[0])
    assert not loss.requires_grad and (weight.main_grad == 1).all() and not weight.grad_added_to_main_grad


def test_scaled_or_repeated_backward_is_an_error():
    hidden, weight, targets, tokens = problem(9)
    with_main_grad(weight)
    for wrong in (0.5, float("nan")):
        loss, _ = fused_policy_loss(hidden, weight, targets, tokens, OPTIONS[0])
        with pytest.raises(RuntimeError, match=f"must go into backward.. unscaled.* is {wrong}, not 1"):
            (loss * wrong).backward()
    loss, _ = fused_policy_loss(hidden, weight, targets, tokens, OPTIONS[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="main_grad holds its gradient"):
        loss.backward()


@pytest.mark.parametrize("zero_out", [False, True])
def test_two_uses_of_one_weight(zero_out):
    """The main head and a multi-token-prediction head; with ``zero_out_wgrad``, what is answered is zero."""
    hidden, weight, targets, tokens = problem(10)
    plain_hidden, plain_weight = twin(hidden), twin(weight[:VOCAB])
    with_main_grad(weight)
    weight.zero_out_wgrad = zero_out
    main, _ = fused_policy_loss(hidden, weight, targets, tokens, OPTIONS[0])
    extra, _ = linear_token_statistics(hidden * 2, weight, targets, vocab_size=VOCAB, need_entropy=False)
    (main + (extra * tokens.weights).sum()).backward()
    expected, _ = plain_policy_loss(plain_hidden, plain_weight, targets, tokens, OPTIONS[0])
    plain_extra, _ = plain_statistics(plain_hidden * 2, plain_weight, targets, 1.0)
    (expected.sum() + (plain_extra * tokens.weights).sum()).backward()
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.main_grad[:VOCAB] - 1, plain_weight.grad, rtol=1e-12, atol=1e-12)
    assert weight.grad.shape == weight.shape and (not zero_out or (weight.grad == 0).all())


# --- size and determinism -------------------------------------------------------------------------------------------


def test_chunks_are_even_and_within_their_budget(monkeypatch):
    monkeypatch.undo()
    shard = linear_head._Shard(0, 8192, 8192, None, 1.0, False)
    chunks = shard.chunks(torch.empty(2060, 4))
    assert [c.start for c in chunks] == [0, *(c.stop for c in chunks[:-1])] and chunks[-1].stop == 2060
    sizes = [c.stop - c.start for c in chunks]
    assert len(sizes) == 9 and max(sizes) * 8192 * 4 <= linear_head._CHUNK_BYTES["cpu"] and min(sizes) >= max(sizes) - 9
    assert [len(range(T)[c]) for c in shard.chunks(torch.empty(0, 4))] == [0]
    padded = linear_head._Shard(8192, 8192, 0, None, 1.0, False)  # a rank without a token has as many chunks
    assert padded.chunks(torch.empty(2060, 4)) == chunks


@pytest.mark.parametrize("operator", ["statistics", "loss"])
def test_no_rows(operator):
    _, weight, _, _ = problem(11)
    hidden, targets = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    if operator == "statistics":
        linear_token_statistics(hidden, weight, targets, vocab_size=VOCAB)[0].sum().backward()
    else:
        loss, _ = linear_policy_loss(
            hidden, weight, targets, lambda rows, l, h: (-l, torch.ones_like(l), None, l[None]), vocab_size=VOCAB
        )
        loss.backward()
    assert hidden.grad.shape == (0, HIDDEN) and (weight.grad == 0).all()


def test_rows_do_not_depend_on_the_chunks(monkeypatch):
    """Bit for bit where the library's product runs; the plain form leaves the order of sums to ``torch.mm``."""
    hidden, weight, targets, tokens = problem(12, torch.float32)
    exact = library.load().loaded
    results = []
    for chunk in (1, 7, 8, 50):
        set_chunk(monkeypatch, chunk)
        x, w = twin(hidden), with_main_grad(twin(weight))
        loss, terms = fused_policy_loss(x, w, targets, tokens, OPTIONS[1])
        loss.backward()
        logprobs, entropy = linear_token_statistics(x, w, targets, vocab_size=VOCAB, temperature=0.8)
        results.append((loss, terms, x.grad, logprobs, entropy))
        again = fused_policy_loss(x, with_main_grad(twin(weight)), targets, tokens, OPTIONS[1])
        assert torch.equal(again[0], loss) and torch.equal(again[1], terms)
    for result in results[1:]:
        for found, expected in zip(result, results[0]):
            if exact:
                assert torch.equal(found, expected)
            else:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def peak_bytes(run) -> int:
    """The most memory that was in use at once, over what was before, by torch's own book-keeping."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("operator", ["statistics", "loss"])
def test_memory_does_not_grow_with_logits(monkeypatch, operator):
    """From 512 to 4096 tokens, what is added is a few hidden states, never logits."""
    set_chunk(monkeypatch, 64)
    vocab, width = 2000, 16

    def measure(num_tokens: int) -> int:
        hidden = torch.randn(num_tokens, width, requires_grad=True)
        weight = with_main_grad(torch.randn(vocab, width, requires_grad=True))
        targets = torch.zeros(num_tokens, dtype=torch.int64)

        def run():
            if operator == "statistics":
                logprobs, entropy = linear_token_statistics(hidden, weight, targets)
                (logprobs.sum() + entropy.sum()).backward()
            else:
                token_loss = lambda rows, l, h: (-l, torch.full_like(l, -1.0), None, l[None])  # noqa: E731
                linear_policy_loss(hidden, weight, targets, token_loss)[0].backward()

        run()
        return peak_bytes(run)

    few, many = measure(512), measure(4096)
    assert few >= 64 * vocab * 4  # the measure sees a chunk
    assert many - few <= (4096 - 512) * 4 * (2 * width + 32)
    assert many < 4096 * vocab * 4 / 4
