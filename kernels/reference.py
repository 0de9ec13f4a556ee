"""The operation in plain PyTorch: the ground truth that every fused route is compared with.

    y = x W0^T + b + c (m * x) A^T B^T      c = scale / (1 - p)

for one projection (Hu et al. 2021, equation 3, with dropout on the branch's input). Autograd can
differentiate it any number of times.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels.call import Term
from fastlora.kernels.dropout import keep_mask

Mask = Callable[..., Tensor]  # `keep_mask`, or `philox_keep` to draw a GPU's mask on any device


def add_terms(
    y: Tensor, x: Tensor, terms: Sequence[Term], seed: Tensor | None = None, mask: Mask = keep_mask
) -> Tensor:
    """y [..., N] plus the low-rank terms of x [..., K], as a new tensor in y's dtype.

    Without a seed, PyTorch's own dropout draws the masks.
    """
    for term in terms:
        whole = term.start == 0 and term.stop is None
        branch = x if whole else x.reshape(-1, x.shape[-1])[term.start : term.stop]
        c = term.scale
        if term.dropout_p > 0 and seed is None:
            branch = F.dropout(branch, term.dropout_p)
        elif term.dropout_p > 0:
            rows, c = branch.reshape(-1, x.shape[-1]).shape[0], term.c
            keep = mask(seed, term.stream, rows, x.shape[-1], term.dropout_p, x.dtype)
            branch = branch * keep.view(branch.shape)
        u = F.linear(branch, term.lora_A.to(x.dtype))
        B, after = term.lora_B.to(u.dtype), y.shape[-1] - term.column - term.lora_B.shape[0]
        # One operation replaces three. With autograd the three are faster, backward included.
        scoring = not torch.is_grad_enabled() and not torch.jit.is_tracing()
        alike = y.dtype == u.dtype and y.dim() > 1 and not y.is_nested
        if scoring and alike and whole and term.column == after == 0:
            y = torch.addmm(y.flatten(0, -2), u.flatten(0, -2), B.T, alpha=c).view(y.shape)
            continue
        delta = F.linear(u, B).to(y.dtype)
        if term.column or after:
            delta = F.pad(delta, (term.column, after))
        if not whole:
            rows = y.numel() // y.shape[-1] - term.start - delta.shape[0]
            delta = F.pad(delta, (0, 0, term.start, rows)).view(y.shape)
        y = torch.add(y, delta, alpha=c)
    return y
