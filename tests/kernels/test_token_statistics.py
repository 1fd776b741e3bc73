"""Statistics of logit shards and their gradient, compiled, against autograd in float64 and the plain form.

Tolerances: float64 1e-12, float32 1e-5; of bfloat16 logits the results are float32 and held to 1e-5 as well, and only
the gradient is rounded, 1e-2.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1_megatron.kernels import library, reference
from r1_megatron.kernels.ops import ops
from tests.kernels.capabilities import OLDER, results_on

pytestmark = pytest.mark.skipif(not library.load().loaded, reason=library.load().problem)

T = 13
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
GRADIENT_TOLERANCE = {**TOLERANCE, torch.bfloat16: 1e-2}
SHAPES = (1, 7, 16, 1000, 4099)
INT64 = torch.iinfo(torch.int64)


@pytest.fixture(params=TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device == "cuda" and request.param == torch.float64:
        pytest.skip("float64 has no CUDA kernel")
    return request.param


def problem(
    vocab: int, dtype: torch.dtype, device: str = "cpu", *, rows: int = T, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [rows, vocab], targets, and the gradients of log-probability and entropy in the arithmetic's dtype."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (rows,), generator=generator)
    g, h = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return logits.to(device, dtype), targets.to(device), g.to(device, arithmetic), h.to(device, arithmetic)


def evaluate(
    logits: Tensor,
    targets: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    *,
    num_shards: int = 1,
    vocab: int | None = None,
    temperature: float = 1.0,
    need_entropy: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logprobs, entropy, gradient)`` from the operators, the logits cut into ``num_shards`` equal shards."""
    width = -(-logits.shape[1] // num_shards)
    vocab = logits.shape[1] if vocab is None else vocab
    shards = [shard.contiguous() for shard in logits.clone().split(width, dim=1)]
    places = [(k * width, min(max(vocab - k * width, 0), shard.shape[1])) for k, shard in enumerate(shards)]
    stats = [
        ops.shard_statistics(shard, targets, start, num_real, temperature, need_entropy)
        for shard, (start, num_real) in zip(shards, places)
    ]
    logprobs, entropy, maximum, log_sum = ops.combine_statistics(torch.stack(stats))
    for shard, (start, num_real) in zip(shards, places):
        ops.shard_gradient_(shard, targets, g, h, entropy, maximum, log_sum, start, num_real, temperature)
    return logprobs, entropy, torch.cat(shards, dim=1)


def autograd(
    logits: Tensor, targets: Tensor, g: Tensor, h: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, from ``log_softmax``. Logits of -inf have probability zero."""
    leaf = logits.detach().double().requires_grad_()
    log_p = torch.log_softmax(leaf / temperature, dim=1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(dim=1)
    (gradient,) = torch.autograd.grad((g.double() * logprobs + h.double() * entropy).sum(), leaf)
    return logprobs.detach(), entropy.detach(), gradient


def assert_close(actual: Tensor, wanted: Tensor, tolerance: float, scale: Tensor | float = 1.0) -> None:
    """Relative to the value, and to ``scale`` where terms of that size cancel."""
    error, allowed = (actual.double() - wanted).abs(), tolerance * (wanted.abs() + scale)
    assert (error <= allowed).all(), f"{(error / allowed).nan_to_num(torch.inf).max():.1f} x the tolerance {tolerance}"


def assert_agrees(actual, logits, targets, g, h, temperature: float = 1.0) -> None:
    wanted = autograd(logits, targets, g, h, temperature)
    tolerance = TOLERANCE[logits.dtype]
    assert_close(actual[0], wanted[0], tolerance)
    assert_close(actual[1], wanted[1], tolerance)
    assert actual[2].dtype == logits.dtype
    # Within a row, to its largest element; a row can cancel altogether, down to the rounding of g and h.
    scale = wanted[2].abs().amax(dim=1, keepdim=True) + 0.1 * (g.abs() + h.abs())[:, None].double() / temperature
    assert_close(actual[2], wanted[2], GRADIENT_TOLERANCE[logits.dtype], scale)


@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize("vocab", SHAPES)
def test_values_and_gradient_equal_autograd(vocab, temperature, dtype, device):
    logits, targets, g, h = problem(vocab, dtype, device, seed=vocab)
    actual = evaluate(logits, targets, g, h, temperature=temperature)
    assert_agrees(actual, logits, targets, g, h, temperature)


@pytest.mark.parametrize("need_entropy", (True, False))
@pytest.mark.parametrize("vocab", SHAPES)
def test_statistics_equal_the_plain_form(vocab, need_entropy, dtype, device):
    logits, targets, _, _ = problem(vocab, dtype, device, seed=vocab)
    start, num_real = 20, max(vocab - 3, 0)
    targets += start - 2  # some lie before, some behind this shard
    arguments = targets, start, num_real, 1.3, need_entropy
    actual = ops.shard_statistics(logits, *arguments)
    wanted = reference.shard_statistics(logits.double(), *arguments)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(actual[:, 1:], wanted[:, 1:], TOLERANCE[dtype])
    assert_close(actual[:, 0].exp(), wanted[:, 0].exp(), TOLERANCE[dtype])  # -inf where nothing is real
    if not need_entropy:
        assert (actual[:, 2] == 0).all()


@pytest.mark.parametrize("padding", (0, 1, 40))
@pytest.mark.parametrize("num_shards", (1, 2, 3, 4))
def test_shards_and_padding_change_nothing(num_shards, padding, dtype, device):
    """Padding holds NaN, and with 40 columns of it the last of four shards is nothing else."""
    vocab = 4 * 40 - padding
    logits, targets, g, h = problem(160, dtype, device, seed=num_shards)
    logits, targets = logits[:, :vocab], targets % vocab
    padded = torch.nn.functional.pad(logits, (0, padding), value=torch.nan)
    padded = torch.nn.functional.pad(padded, (0, -160 % num_shards), value=torch.nan)
    *actual, gradient = evaluate(padded, targets, g, h, num_shards=num_shards, vocab=vocab, temperature=1.7)
    assert (gradient[:, vocab:] == 0).all()
    assert_agrees([*actual, gradient[:, :vocab]], logits, targets, g, h, 1.7)


def test_combining_equals_the_plain_form(device):
    stats = torch.randn(5, T, 4, device=device)
    stats[..., 1] = stats[..., 1].abs() + 0.1
    stats[2] = torch.tensor([-torch.inf, 0.0, 0.0, 0.0])
    wanted = reference.combine_statistics(stats.double())
    for actual, value in zip(ops.combine_statistics(stats), wanted):
        assert_close(actual, value, 1e-5)


@pytest.mark.parametrize("without", ("logprobs", "entropy", "both"))
def test_a_missing_gradient_is_zero(without, dtype, device):
    logits, targets, g, h = problem(100, dtype, device)
    zeros = torch.zeros_like(g)
    g, h = (None if without != "entropy" else g), (None if without != "logprobs" else h)
    actual = evaluate(logits, targets, g, h)
    assert_agrees(actual, logits, targets, zeros if g is None else g, zeros if h is None else h)


def test_without_the_entropy_nothing_else_changes(dtype, device):
    logits, targets, g, _ = problem(4099, dtype, device)
    with_it = evaluate(logits, targets, g, None)
    without = evaluate(logits, targets, g, None, need_entropy=False)
    assert torch.equal(with_it[0], without[0]) and torch.equal(with_it[2], without[2])


def test_targets_elsewhere_select_nothing(dtype, device):
    logits, _, g, h = problem(50, dtype, device)
    garbage = torch.tensor([-1, -100, 9, 60, 1 << 40, INT64.min, INT64.max, INT64.max - 5], device=device)
    logits, g, h = logits[:8].contiguous(), g[:8], h[:8]
    assert (ops.shard_statistics(logits, garbage, 10, 50, 1.0, True)[:, 3] == 0).all()
    stats = ops.shard_statistics(logits, garbage, 10, 50, 1.0, True)
    _, entropy, maximum, log_sum = ops.combine_statistics(stats[None])
    wanted = logits.double()
    reference.shard_gradient_(
        wanted, garbage, g.double(), h.double(), entropy.double(), maximum.double(), log_sum.double(), 10, 50, 1.0
    )
    ops.shard_gradient_(logits, garbage, g, h, entropy, maximum, log_sum, 10, 50, 1.0)
    assert_close(logits, wanted, GRADIENT_TOLERANCE[dtype], 0.1)


def test_no_rows_and_no_columns(dtype, device):
    logits, targets, g, h = problem(9, dtype, device)
    stats = ops.shard_statistics(logits, targets, 0, 0, 1.0, True)
    assert torch.equal(stats.cpu(), torch.tensor([-torch.inf, 0, 0, 0], dtype=stats.dtype).expand(T, 4))
    ops.shard_gradient_(logits, targets, g, h, g, g, g, 0, 0, 1.0)
    assert (logits == 0).all()
    logprobs, entropy, gradient = evaluate(logits[:0], targets[:0], g[:0], h[:0])
    assert logprobs.shape == entropy.shape == (0,) and gradient.shape == (0, 9)


@pytest.mark.parametrize("num_shards", (1, 4))
def test_forbidden_tokens(num_shards, dtype, device):
    """Logits of -inf have probability zero and no gradient, also where a whole shard, or its first half, holds them."""
    logits, targets, g, h = problem(4096, dtype, device)
    logits[:, :1024] = -torch.inf
    logits[:, ::3] = -torch.inf
    logits[: T // 2, : 3 * 1024] = -torch.inf
    targets = 3 * 1024 + 2 + targets % 300 * 3
    actual = evaluate(logits, targets, g, h, num_shards=num_shards)
    assert (actual[2][logits == -torch.inf] == 0).all()
    assert_agrees(actual, logits, targets, g, h)


# NaN with all bits set is what memory filled with 0xff holds.
@pytest.mark.parametrize("poison", (torch.nan, torch.inf, "bits"))
@pytest.mark.parametrize("column", (0, 5, 2047, 2048, 4098))
def test_nonfinite_logits_stay_visible(column, poison, dtype, device):
    """In the results of their own row, and nowhere else."""
    logits, targets, g, h = problem(4099, dtype, device)
    clean = evaluate(logits, targets, g, h)
    if poison == "bits":
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[logits.element_size()]
        logits.view(integers)[3, column] = -1
    else:
        logits[3, column] = poison
    for before, after in zip(clean, evaluate(logits, targets, g, h)):
        assert after[3].isnan().any()
        others = torch.arange(T, device=device) != 3
        assert torch.equal(before[others], after[others])
    assert evaluate(logits, targets, g, h)[0][3].isnan()


def test_tokens_outside_the_loss_have_no_gradient(dtype, device):
    logits, targets, g, h = problem(100, dtype, device)
    logits[2], logits[4], g[2], h[2], g[4], h[4] = torch.nan, torch.inf, 0, 0, 0, 0
    gradient = evaluate(logits, targets, g, h)[2]
    assert (gradient[2] == 0).all() and (gradient[4] == 0).all() and gradient[3].abs().sum() > 0


def test_an_offset_costs_no_precision(device):
    logits, targets, g, h = problem(1000, torch.float32, device)
    logits = (logits * 256).round() / 256  # so that the sum below is exact
    for before, after in zip(evaluate(logits, targets, g, h), evaluate(logits + 1024, targets, g, h)):
        assert torch.equal(before, after)


@pytest.mark.parametrize("vocab", (1, 77, 4099, 9000))
def test_a_row_has_the_same_bits_whatever_surrounds_it(vocab, dtype, device):
    logits, targets, g, h = problem(vocab, dtype, device)
    whole = evaluate(logits, targets, g, h)
    for row in range(T):
        one = slice(row, row + 1)
        for a, b in zip(whole, evaluate(logits[one], targets[one], g[one], h[one])):
            assert torch.equal(a[one], b)
    noisy = logits.clone()
    noisy[::2] = torch.nan
    for a, b in zip(whole, evaluate(noisy, targets, g, h)):
        assert torch.equal(a[1::2], b[1::2])


@pytest.mark.parametrize("vocab", (77, 4096, 4099))
def test_the_address_changes_no_bits(vocab, dtype, device):
    logits, targets, g, h = problem(vocab, dtype, device)
    whole = evaluate(logits, targets, g, h)
    stats = ops.shard_statistics(logits, targets, 0, vocab, 1.0, True)
    _, entropy, maximum, log_sum = ops.combine_statistics(stats[None])
    for offset in (1, 2, 3, 5, 8):
        room = torch.full((T * vocab + 16,), torch.nan, dtype=dtype, device=device)
        moved = room[offset : offset + T * vocab].view(T, vocab)
        moved.copy_(logits)
        assert torch.equal(ops.shard_statistics(moved, targets, 0, vocab, 1.0, True), stats)
        ops.shard_gradient_(moved, targets, g, h, entropy, maximum, log_sum, 0, vocab, 1.0)
        assert torch.equal(moved, whole[2])
        assert room[:offset].isnan().all() and room[offset + T * vocab :].isnan().all()


def test_threads_change_no_bits(dtype):
    logits, targets, g, h = problem(4099, dtype, rows=64)
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(evaluate(logits, targets, g, h))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results):
        assert torch.equal(one, two)


def test_the_exponential_is_exact_to_two_units(device):
    """With one column, maximum and log_sum zero and a gradient of -1, the result is exp(logit)."""
    x = torch.cat([torch.linspace(-87, 0, 1 << 18), torch.linspace(-1, 0, 1 << 16), torch.linspace(-1e-3, 0, 1 << 10)])
    logits, zeros = x[:, None].clone().to(device), torch.zeros_like(x).to(device)
    targets = torch.full(x.shape, -1, device=device)
    ops.shard_gradient_(logits, targets, zeros - 1, None, zeros, zeros, zeros, 0, 1, 1.0)
    wanted = x.double().exp()
    unit = torch.exp2(wanted.log2().floor() - 23)
    error = (logits.cpu().squeeze(1).double() - wanted).abs() / unit
    # On CUDA the argument is rounded once more on its way to 2^x: half a unit of it, relative to 1.
    limit = 2 if device == "cpu" else 2 + x.double().abs()
    assert (error <= limit).all()
    assert (logits[x.to(device) == 0] == 1).all()


SCRIPT = """
import torch
from tests.kernels.test_token_statistics import evaluate, problem
results = {d: evaluate(*problem(4099, d), temperature=0.7) for d in (torch.float32, torch.bfloat16, torch.float64)}
"""


@pytest.mark.parametrize("capability", OLDER)
def test_older_processors_agree(capability, tmp_path):
    results = results_on(capability, SCRIPT, tmp_path)
    for dtype, others in results.items():
        arguments = problem(4099, dtype)
        assert_agrees(others, *arguments, temperature=0.7)
        ours = evaluate(*arguments, temperature=0.7)
        assert_close(ours[0], others[0].double(), 1e-12 if dtype == torch.float64 else 1e-6)
        assert_close(ours[1], others[1].double(), 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(T, 9, dtype=torch.float16)), r"float64.* got \[13, 9\] float16"),
        (dict(logits=torch.zeros(9)), r"logits must be \[\*, \*\], got \[9\] float32"),
        (dict(logits=torch.zeros(9, T).T), r"\[13, 9\] float32 must be contiguous"),
        (dict(targets=torch.zeros(T, dtype=torch.int32)), r"targets must be int64, got \[13\] int32"),
        (dict(targets=torch.zeros(T + 1, dtype=torch.int64)), r"targets must be \[13\], got \[14\] int64"),
        (dict(num_real=10), r"num_real must be in \[0, 9\], got 10"),
        (dict(num_real=-1), r"num_real must be in \[0, 9\], got -1"),
        (dict(temperature=0.0), r"temperature must be positive, got 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    logits, targets, g, h = problem(9, torch.float32)
    shard = dict(logits=logits, targets=targets, vocab_start=0, num_real=9, temperature=1.0) | change
    with pytest.raises(RuntimeError, match="shard_statistics: .*" + message):
        ops.shard_statistics(**shard, need_entropy=True)
    with pytest.raises(RuntimeError, match="shard_gradient_: .*" + message):
        ops.shard_gradient_(**shard, grad_logprobs=g, grad_entropy=h, entropy=g, max=g, log_sum=g)


def test_wrong_tensors_per_token_are_named():
    logits, targets, g, h = problem(9, torch.float32)
    with pytest.raises(RuntimeError, match=r"grad_entropy must be float32 for logits .* got \[13\] float64"):
        ops.shard_gradient_(logits, targets, g, h.double(), g, g, g, 0, 9, 1.0)
    with pytest.raises(RuntimeError, match=r"log_sum must be \[13\], got \[12\] float32"):
        ops.shard_gradient_(logits, targets, g, h, g, g, g[:-1], 0, 9, 1.0)
    with pytest.raises(RuntimeError, match=r"stats must be \[\*, \*, 4\], got \[13\] float32"):
        ops.combine_statistics(g)
    with pytest.raises(RuntimeError, match=r"at least one shard expected, got \[0, 13, 4\]"):
        ops.combine_statistics(torch.zeros(0, T, 4))


def test_schemas_and_shapes(dtype, device):
    logits, targets, g, h = problem(9, dtype, device)
    torch.library.opcheck(ops.shard_statistics.default, (logits, targets, 0, 8, 0.7, True))
    torch.library.opcheck(ops.combine_statistics.default, (torch.rand(3, T, 4, device=device),))
    torch.library.opcheck(ops.shard_gradient_.default, (logits, targets, g, None, h, h, h, 0, 8, 0.7))
