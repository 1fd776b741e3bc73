"""The language-model head and its loss in one operator: from hidden states to gradients without a ``[T, V]`` tensor.

Logits are the largest tensor of a training step, and nobody needs them all at once. Here they live for one chunk of
rows: the chunk is projected, boiled down to four numbers per token (``vocab_parallel.py``), turned into its own
gradient in place and multiplied into the gradients of the hidden states and of the weight; then the next one comes.

``linear_policy_loss`` does all of that in the forward pass, three products in total. It can because advantages,
weights, old and reference log-probabilities are data: a token's gradient is known as soon as its log-probability is.
``linear_token_statistics`` is for losses that are not (GSPO sums over a sequence first): backward() projects again,
four products in total.

The products of bf16 operands accumulate in float32, and so does the weight's gradient over the chunks. On CPU a row of
the results has the same bits whatever the chunk is; on CUDA that is up to cuBLAS.

Shapes: T tokens, R of one chunk, H hidden, V rows of this rank's weight, K tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1_megatron.kernels import library
from r1_megatron.kernels.ops import ops
from r1_megatron.kernels.vocab_parallel import combine_shards, contiguous, real_columns
from r1_megatron.kernels.weight_grad import placeholder, weight_gradient

# token_loss(rows, logprobs_R, entropy_R) -> (loss_R, g_R, h_R, terms_NR): the weighted loss of the tokens ``rows``, its
# gradient with respect to their log-probabilities and entropies (None: zero), and whatever else is worth reporting.
TokenLoss = Callable[[slice, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None, Tensor]]

# One chunk of logits: what a core's caches hold, or what keeps a GPU busy for milliseconds.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# The last chunk's logits stay from forward to backward if they are no larger, so that small problems project once.
_KEPT_BYTES = {"cpu": 8 << 20, "cuda": 16 << 20}
# With fewer rows, reading the weight costs more than multiplying by it.
_MIN_ROWS = 64


def linear_token_statistics(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    need_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`~r1_megatron.kernels.vocab_parallel.token_statistics` of ``hidden @ weight.T``, fit for any loss.

    Args:
        hidden_TH: all tokens, on every rank of the group. Its gradient is this rank's part of a sum over the group.
        weight_VH: this rank's rows of the head, in the dtype of ``hidden_TH``. Its gradient goes into ``main_grad``
            where it has one. Rows beyond ``vocab_size`` are never read and get no gradient.
        targets_T, vocab_start, vocab_size, group, temperature, need_entropy: as in ``token_statistics``.

    Returns:
        ``(logprobs_T, entropy_T)``, the latter ``None`` without ``need_entropy``.
    """
    shard = _Shard.of(hidden_TH, weight_VH, targets_T, vocab_start, vocab_size, group, temperature, need_entropy)
    logprobs_T, entropy_T = _LinearTokenStatistics.apply(
        hidden_TH, weight_VH, targets_T, shard, torch.is_grad_enabled()
    )
    return logprobs_T, entropy_T if need_entropy else None


def linear_policy_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    token_loss: TokenLoss,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    need_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sum of a loss that each token has by itself; the gradients are computed on the way.

    The weight's gradient is in ``main_grad`` when this returns, where there is one: the result must then go into
    backward() as it is, exactly once. Any factor has to be in the tokens' weights (backward() raises otherwise).

    Args:
        token_loss: called for one chunk of tokens after the other, with results that carry no gradient of their own.
        others: as in :func:`linear_token_statistics`.

    Returns:
        ``(loss, terms_NT)``: the sum over all tokens, and what ``token_loss`` reported, without gradient.
    """
    shard = _Shard.of(hidden_TH, weight_VH, targets_T, vocab_start, vocab_size, group, temperature, need_entropy)
    return _LinearPolicyLoss.apply(hidden_TH, weight_VH, targets_T, token_loss, shard, torch.is_grad_enabled())


@dataclass(frozen=True)
class _Shard:
    """This rank's part of the vocabulary, and what is asked about it."""

    start: int
    width: int
    num_real: int
    group: dist.ProcessGroup | None
    temperature: float
    need_entropy: bool

    @staticmethod
    def of(
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        vocab_start: int,
        vocab_size: int | None,
        group: dist.ProcessGroup | None,
        temperature: float,
        need_entropy: bool,
    ) -> _Shard:
        shapes = f"hidden {tuple(hidden_TH.shape)}, weight {tuple(weight_VH.shape)}, targets {tuple(targets_T.shape)}"
        assert hidden_TH.dim() == 2 and weight_VH.dim() == 2, f"hidden must be [T, H], weight [V, H], got {shapes}"
        assert hidden_TH.shape[1] == weight_VH.shape[1], f"hidden and weight differ in H: {shapes}"
        assert targets_T.shape == hidden_TH.shape[:1], f"targets must be [T]: {shapes}"
        assert hidden_TH.dtype == weight_VH.dtype, f"hidden is {hidden_TH.dtype}, weight is {weight_VH.dtype}"
        assert temperature > 0, f"temperature must be positive, got {temperature}"
        width = len(weight_VH)
        num_real = real_columns(width, vocab_start, vocab_size, group)
        return _Shard(vocab_start, width, num_real, group, temperature, need_entropy)

    def chunks(self, hidden_TH: Tensor) -> list[slice]:
        """All rows, in runs of nearly equal length; at least one run.

        The ranks of a group meet in every chunk, so nothing here may depend on how many columns of a shard are real.
        """
        num_rows = len(hidden_TH)
        count = max(1, -(-num_rows // _chunk_rows(hidden_TH, self.width)))
        step = max(1, -(-num_rows // count))
        return [slice(start, min(start + step, num_rows)) for start in range(0, max(num_rows, 1), step)]

    def statistics(self, logits_RV: Tensor, targets_R: Tensor) -> Tensor:
        return ops.shard_statistics(
            logits_RV, targets_R, self.start, self.num_real, self.temperature, self.need_entropy
        )

    def to_gradient(
        self,
        logits_RV: Tensor,
        targets_R: Tensor,
        g_R: Tensor | None,
        h_R: Tensor | None,
        entropy_R: Tensor,
        max_R: Tensor,
        log_sum_R: Tensor,
    ) -> Tensor:
        ops.shard_gradient_(
            logits_RV, targets_R, g_R, h_R, entropy_R, max_R, log_sum_R, self.start, self.num_real, self.temperature
        )
        return logits_RV


class _LinearTokenStatistics(torch.autograd.Function):
    """Saves the hidden states and a few numbers per token."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, targets_T, shard, for_backward):
        hidden_TH = hidden_TH.contiguous()
        real_VH = weight_VH[: shard.num_real]
        chunks, stats = shard.chunks(hidden_TH), []
        ctx.shard, ctx.last_logits_RV = shard, None
        for rows in chunks:
            logits_RV = _project(hidden_TH[rows], real_VH)
            stats.append(shard.statistics(logits_RV, targets_T[rows]))
            if for_backward and rows is chunks[-1] and logits_RV.nbytes <= _KEPT_BYTES[logits_RV.device.type]:
                ctx.last_logits_RV = logits_RV
            del logits_RV  # before the next chunk's are there
        logprobs_T, entropy_T, max_T, log_sum_T = combine_shards(torch.cat(stats), shard.group)
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, entropy_T, max_T, log_sum_T)
        ctx.set_materialize_grads(False)
        if not shard.need_entropy:
            ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        if grad_logprobs_T is None and grad_entropy_T is None:
            return (None,) * 5
        hidden_TH, weight_VH, targets_T, entropy_T, max_T, log_sum_T = ctx.saved_tensors
        shard, last_logits_RV = ctx.shard, ctx.last_logits_RV
        ctx.last_logits_RV = None  # about to be overwritten: a second backward projects again
        g_T, h_T = contiguous(grad_logprobs_T), contiguous(grad_entropy_T)
        real_VH = weight_VH[: shard.num_real]
        grad_hidden_TH = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None

        def add_products(grad_VH: Tensor | None) -> None:
            nonlocal last_logits_RV
            for rows in reversed(shard.chunks(hidden_TH)):
                logits_RV = _project(hidden_TH[rows], real_VH) if last_logits_RV is None else last_logits_RV
                last_logits_RV = None
                g_R, h_R = (None if grad is None else grad[rows] for grad in (g_T, h_T))
                grad_RV = shard.to_gradient(
                    logits_RV, targets_T[rows], g_R, h_R, entropy_T[rows], max_T[rows], log_sum_T[rows]
                )
                _add_gradients(grad_RV, hidden_TH[rows], real_VH, rows, grad_hidden_TH, grad_VH)
                del logits_RV, grad_RV  # before the next chunk's are there

        grad_VH = _run(add_products, weight_VH if ctx.needs_input_grad[1] else None, shard)
        return grad_hidden_TH, grad_VH, None, None, None


class _LinearPolicyLoss(torch.autograd.Function):
    """Saves the gradients instead of what it would take to compute them."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, targets_T, token_loss, shard, for_backward):
        hidden_TH = hidden_TH.contiguous()
        real_VH = weight_VH[: shard.num_real]
        for_hidden, for_weight = (for_backward and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden_TH = torch.empty_like(hidden_TH) if for_hidden else None
        losses, terms = [], []

        def add_products(grad_VH: Tensor | None) -> None:
            for rows in shard.chunks(hidden_TH):
                logits_RV = _project(hidden_TH[rows], real_VH)
                stats_R4 = shard.statistics(logits_RV, targets_T[rows])
                logprobs_R, entropy_R, max_R, log_sum_R = combine_shards(stats_R4, shard.group)
                loss_R, g_R, h_R, terms_NR = token_loss(rows, logprobs_R, entropy_R if shard.need_entropy else None)
                losses.append(loss_R)
                terms.append(terms_NR)
                if for_hidden or for_weight:
                    grad_RV = shard.to_gradient(logits_RV, targets_T[rows], g_R, h_R, entropy_R, max_R, log_sum_R)
                    _add_gradients(grad_RV, hidden_TH[rows], real_VH, rows, grad_hidden_TH, grad_VH)
                    del grad_RV
                del logits_RV  # before the next chunk's are there

        grad_VH = _run(add_products, weight_VH if for_weight else None, shard)
        ctx.in_main_grad = for_weight and getattr(weight_VH, "main_grad", None) is not None
        ctx.finished = False
        ctx.save_for_backward(weight_VH, grad_hidden_TH, None if ctx.in_main_grad else grad_VH)
        terms_NT = torch.cat(terms, dim=1)
        ctx.mark_non_differentiable(terms_NT)
        return torch.cat(losses).sum(), terms_NT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        weight_VH, grad_hidden_TH, grad_VH = ctx.saved_tensors
        if not ctx.in_main_grad:
            scaled = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in (grad_hidden_TH, grad_VH))
            return *scaled, None, None, None, None
        if ctx.finished:
            raise RuntimeError("backward() a second time through linear_policy_loss: main_grad holds its gradient")
        ctx.finished = True
        _require_one(grad_loss)
        return grad_hidden_TH, placeholder(weight_VH), None, None, None, None


def _require_one(grad_loss: Tensor) -> None:
    """Nothing can scale the weight's gradient any more."""
    message = (
        "linear_policy_loss has added the weight's gradient to main_grad in the forward pass, so its result must go "
        "into backward() unscaled. Put every factor into the tokens' weights."
    )
    if grad_loss.is_cuda:
        torch._assert_async((grad_loss == 1).all(), message)  # without waiting for the device
    elif grad_loss != 1:
        raise RuntimeError(f"{message} The gradient of the result is {grad_loss.item()}, not 1.")


def _run(add_products: Callable[[Tensor | None], None], weight_VH: Tensor | None, shard: _Shard) -> Tensor | None:
    """Run the loop over all chunks with the place where the weight's products belong: ``main_grad``, or a new tensor.

    Answers what backward() must return for the weight; ``None`` without one.
    """
    if weight_VH is None:
        add_products(None)
        return None

    def add_to(out_VH: Tensor, accumulate: bool) -> None:
        if accumulate:
            add_products(out_VH[: shard.num_real])
            return
        sum_VH = torch.zeros_like(out_VH, dtype=torch.promote_types(out_VH.dtype, torch.float32))
        add_products(sum_VH[: shard.num_real])
        out_VH.copy_(sum_VH)

    return weight_gradient(weight_VH, add_to)


def _add_gradients(
    grad_RV: Tensor,
    hidden_RH: Tensor,
    weight_VH: Tensor,
    rows: slice,
    grad_hidden_TH: Tensor | None,
    grad_VH: Tensor | None,
) -> None:
    if grad_hidden_TH is not None:
        _project_back(grad_RV, weight_VH, grad_hidden_TH[rows])
    if grad_VH is not None:
        _add_outer_product(grad_VH, grad_RV, hidden_RH)


# The three products. One dense GEMM is grouped_mm with a single expert: its CPU kernel promises every row the same bits
# in any chunk. Where it was not built, torch's own product is faster than the plain form of grouped_mm.


def _project(hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
    if _torch_multiplies(hidden_RH):
        return torch.mm(hidden_RH, weight_VH.T)
    return ops.grouped_mm(hidden_RH, weight_VH[None], _all_rows(hidden_RH))


def _project_back(grad_RV: Tensor, weight_VH: Tensor, out_RH: Tensor) -> None:
    if _torch_multiplies(grad_RV):
        torch.mm(grad_RV, weight_VH, out=out_RH)
    else:
        out_RH.copy_(ops.grouped_mm_dgrad(grad_RV, weight_VH[None], _all_rows(grad_RV)))


def _add_outer_product(out_VH: Tensor, grad_RV: Tensor, hidden_RH: Tensor) -> None:
    if _torch_multiplies(grad_RV) and out_VH.dtype == grad_RV.dtype:
        out_VH.addmm_(grad_RV.T, hidden_RH)
    elif grad_RV.is_cuda:
        torch.addmm(out_VH, grad_RV.T, hidden_RH, out_dtype=out_VH.dtype, out=out_VH)
    else:
        ops.grouped_mm_wgrad(grad_RV, hidden_RH, _all_rows(grad_RV), out_VH[None], True)


def _torch_multiplies(tensor: Tensor) -> bool:
    return tensor.is_cuda or not library.load().loaded


def _all_rows(rows: Tensor) -> Tensor:
    return torch.tensor([len(rows)])


def _chunk_rows(hidden_TH: Tensor, width: int) -> int:
    row_bytes = width * hidden_TH.element_size()
    return max(_CHUNK_BYTES[hidden_TH.device.type] // row_bytes, _MIN_ROWS)
