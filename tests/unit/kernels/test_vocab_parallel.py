"""Vocabulary-parallel token statistics against plain log-softmax and autograd."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from r1_megatron.kernels.ops import ops
from r1_megatron.kernels.vocab_parallel import token_statistics, vocab_parallel_cross_entropy

T, VOCAB = 13, 37


def problem(seed=0, dtype=torch.float64, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, VOCAB, generator=g, dtype=torch.float64) * scale
    targets = torch.randint(0, VOCAB, (T,), generator=g)
    return (
        logits.to(dtype),
        targets,
        torch.randn(T, generator=g, dtype=torch.float64),
        torch.randn(T, generator=g, dtype=torch.float64),
    )


def plain(logits, targets, temperature):
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def simulated(logits, targets, num_shards, temperature, g, h, fill):
    """What ``num_shards`` ranks compute, one after the other, with the last shards padded by ``fill``."""
    width = -(-VOCAB // num_shards) + 2  # two columns of padding per shard at least: some shards may be all padding
    padded = torch.full((T, width * num_shards), fill, dtype=logits.dtype)
    padded[:, :VOCAB] = logits
    shards = [shard.contiguous() for shard in padded.split(width, dim=1)]
    places = [(k * width, min(max(VOCAB - k * width, 0), width), temperature) for k in range(num_shards)]
    stats = torch.stack([ops.shard_statistics(s, targets, *place, True) for s, place in zip(shards, places)])
    logprobs, entropy, max_T, log_sum = ops.combine_statistics(stats)
    for shard, place in zip(shards, places):
        ops.shard_gradient_(shard, targets, g, h, entropy, max_T, log_sum, *place)
    return logprobs, entropy, torch.cat(shards, dim=1)


@pytest.mark.parametrize("num_shards", [1, 2, 4, 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_simulated_shards_equal_autograd(num_shards, temperature, fill):
    logits, targets, g, h = problem()
    logits.requires_grad_()
    expected = plain(logits, targets, temperature)
    (expected[0] * g + expected[1] * h).sum().backward()

    logprobs, entropy, grad = simulated(logits.detach(), targets, num_shards, temperature, g, h, fill)
    torch.testing.assert_close(logprobs, expected[0].detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy, expected[1].detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad[:, :VOCAB], logits.grad, rtol=1e-13, atol=1e-14)
    assert (grad[:, VOCAB:] == 0).all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("wanted", ["logprobs", "entropy", "both", "logprobs without entropy"])
def test_autograd_function(wanted, in_place):
    logits, targets, g, h = problem(1)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    need_entropy = "without" not in wanted

    def objective(logprobs, entropy):
        if wanted == "entropy":
            return (entropy * h).sum()
        return (logprobs * g).sum() + ((entropy * h).sum() if wanted == "both" else 0)

    written = a * 1
    logprobs, entropy = token_statistics(
        written, targets, temperature=1.3, need_entropy=need_entropy, in_place=in_place
    )
    assert (entropy is not None) == need_entropy
    assert torch.equal(written, logits)
    objective(logprobs, entropy).backward()
    objective(*plain(b, targets, 1.3)).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=1e-14)
    assert torch.equal(written, a.grad if in_place else logits)


def test_in_place_works_once():
    logits, targets, g, _ = problem(1)
    logits.requires_grad_()
    logprobs, _ = token_statistics(logits * 1, targets, in_place=True)
    (logprobs * g).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time through token_statistics"):
        (logprobs * g).sum().backward()


def test_gradcheck():
    logits, targets, _, _ = problem(2, scale=1.0)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: token_statistics(x, targets, vocab_size=VOCAB - 3, temperature=0.8), (logits,)
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype, tolerance):
    """Arithmetic is float32 whatever the input; only the gradient is rounded to the input's dtype."""
    logits, targets, g, h = problem(3, dtype)
    exact = logits.double().requires_grad_()
    expected = plain(exact, targets, 0.9)
    (expected[0] * g + expected[1] * h).sum().backward()
    logits.requires_grad_()
    logprobs, entropy = token_statistics(logits, targets, temperature=0.9)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=2e-6, atol=2e-6)
    (logprobs * g.float() + entropy * h.float()).sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that an operator answers while it is on; ``numel`` of the largest one per dtype."""

    def __init__(self):
        super().__init__()
        self.numel: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel[tensor.dtype] = max(self.numel.get(tensor.dtype, 0), tensor.numel())
        return out


@pytest.mark.parametrize("in_place", [False, True])
def test_no_whole_float32_copy(in_place):
    """bf16 logits: the only tensor of their size is their own gradient, and in place not even that."""
    logits = torch.randn(64, 50, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(64, dtype=torch.int64)
    with LargestTensor() as largest:
        logprobs, entropy = token_statistics(logits, targets, temperature=0.9, in_place=in_place)
        torch.autograd.backward([logprobs, entropy], [torch.ones(64), torch.ones(64)])
    # Leaving autograd, the gradient passes through a detach(), which makes no memory: only its own numel may be seen.
    assert largest.numel.get(torch.bfloat16, 0) <= 64 * 50
    assert largest.numel[torch.float32] == 64 * 4
    assert (logits.grad.data_ptr() == logits.data_ptr()) == in_place


def test_offset_costs_no_precision():
    """Adding 1000 to all logits must not change a float32 log-probability beyond the input's own rounding."""
    logits, targets, _, _ = problem(4, torch.float32)
    logits = (logits * 1024).round() / 1024  # exactly representable next to 1024
    torch.testing.assert_close(
        token_statistics(logits + 1024, targets)[0], token_statistics(logits, targets)[0], rtol=0, atol=0
    )


def test_forbidden_tokens():
    """Logits of -inf are tokens of probability zero: no NaN in the entropy or the gradient."""
    logits, targets, g, h = problem(5)
    forbidden = torch.zeros(VOCAB, dtype=torch.bool)
    forbidden[::3] = True
    targets = torch.where(forbidden[targets], 1, targets)
    logits[:, forbidden] = -torch.inf
    logits.requires_grad_()
    logprobs, entropy = token_statistics(logits, targets)
    (logprobs * g + entropy * h).sum().backward()
    kept = logits.detach()[:, ~forbidden].requires_grad_()
    expected = plain(kept, (torch.cumsum(~forbidden, 0) - 1)[targets], 1.0)
    (expected[0] * g + expected[1] * h).sum().backward()
    torch.testing.assert_close(logprobs, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad[:, ~forbidden], kept.grad, rtol=1e-12, atol=1e-13)
    assert (logits.grad[:, forbidden] == 0).all()


def test_nonfinite_logits_stay_visible():
    """A NaN among the real columns must reach the loss, where it is found and named, and only in its own row."""
    logits, targets, _, _ = problem(6)
    logits[3, 5] = torch.nan
    logprobs, entropy = token_statistics(logits, targets)
    assert logprobs[3].isnan() and entropy[3].isnan()
    assert logprobs[:3].isfinite().all() and logprobs[4:].isfinite().all()


def test_rows_do_not_depend_on_their_neighbours():
    logits, targets, _, _ = problem(7, torch.float32)
    whole = token_statistics(logits, targets)
    for row in range(T):
        alone = token_statistics(logits[row : row + 1], targets[row : row + 1])
        assert torch.equal(alone[0][0], whole[0][row]) and torch.equal(alone[1][0], whole[1][row])


def test_cross_entropy_and_no_rows():
    logits, targets, _, _ = problem(8)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(vocab_parallel_cross_entropy(logits, targets), expected, rtol=1e-13, atol=1e-13)
    empty = torch.zeros(0, VOCAB, requires_grad=True)
    vocab_parallel_cross_entropy(empty, targets[:0]).sum().backward()
    assert empty.grad.shape == (0, VOCAB)


def test_shapes_are_checked():
    logits, targets, _, _ = problem()
    with pytest.raises(AssertionError, match=r"\[T, V\]"):
        token_statistics(logits[None], targets)
    with pytest.raises(AssertionError, match="targets"):
        token_statistics(logits, targets[:-1])


def run_rank(rank: int, folder: str) -> None:
    """One of the two ranks of the test below, in a process of its own."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    logits, targets, g, h = problem()
    half = 20
    padded = torch.full((T, 2 * half), torch.nan, dtype=torch.float64)
    padded[:, :VOCAB] = logits
    shard = padded[:, rank * half : (rank + 1) * half].clone().requires_grad_()
    logprobs, entropy = token_statistics(
        shard, targets, vocab_start=rank * half, vocab_size=VOCAB, group=dist.group.WORLD, temperature=0.7
    )
    (logprobs * g + entropy * h).sum().backward()
    torch.save((logprobs.detach(), entropy.detach(), shard.grad), f"{folder}/result.{rank}")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """The real collective, once: two gloo ranks, and both hold the same bits."""
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in range(2)]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors.decode()
    finally:
        for rank in ranks:
            rank.kill()
    (logprobs, entropy, left), (logprobs_1, entropy_1, right) = (
        torch.load(tmp_path / f"result.{rank}") for rank in range(2)
    )
    assert torch.equal(logprobs, logprobs_1) and torch.equal(entropy, entropy_1)
    logits, targets, g, h = problem()
    logits.requires_grad_()
    expected = plain(logits, targets, 0.7)
    (expected[0] * g + expected[1] * h).sum().backward()
    torch.testing.assert_close(logprobs, expected[0].detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy, expected[1].detach(), rtol=1e-13, atol=1e-13)
    grad = torch.cat([left, right], dim=1)
    torch.testing.assert_close(grad[:, :VOCAB], logits.grad, rtol=1e-13, atol=1e-14)
    assert (grad[:, VOCAB:] == 0).all()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
