"""One threshold over scores that are spread over several processes: each counts its own, the counts are summed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from ._ops import ops
from .checks import STATE_DTYPES, check_dtype, check_numel, check_same_shape, mask_size
from .layout import BINS, SHARDED_SHIFTS


def sharded_threshold(
    importance: Tensor,
    density: float,
    group: dist.ProcessGroup | None = None,
    *,
    numel: int | None = None,
    total: int | None = None,
    uncertainty: Tensor | None = None,
) -> Tensor:
    """The k-th largest importance over the shards of all processes, k = ceil(density * total) (the delta of Eq. 8).

    Exact, equal on all processes and independent of how the elements are spread. Four passes over the shard; after
    each the processes sum 512 counts of bit patterns (4 KB). Nothing waits for the host if `total` is given.

    Args:
        importance: this process's scores >= 0 without NaN, any shape, float32 or bfloat16. At least one element.
        density: fraction of all elements to keep, in [0, 1].
        group: the processes that hold the shards; default: all. Without torch.distributed this is one shard.
        numel: elements of the shard, where it is less than the tensor's own size because it holds zeros that are
            padding.
        total: elements of all shards; default: summed over the processes, which waits for the host.
        uncertainty: where given, importance * uncertainty is ranked (released code).

    Returns: float32, 0-d, on the shard's device.
    Raises: ValueError for an empty shard, a density outside [0, 1], a numel or an uncertainty that does not fit.
    """
    own = check_numel(importance, numel)
    check_dtype({"importance": importance, "uncertainty": uncertainty}, STATE_DTYPES)
    check_same_shape("importance", importance.shape, importance.device, {"uncertainty": uncertainty})
    device = importance.device
    several = dist.is_available() and dist.is_initialized()
    if total is None:
        sizes = torch.tensor(own, dtype=torch.int64, device=device)
        if several:
            dist.all_reduce(sizes, group=group)
        total = int(sizes)
    rank = mask_size(density, total)

    counts = torch.empty(BINS, dtype=torch.int64, device=device)
    window = torch.zeros(2, dtype=torch.int64, device=device)
    above = torch.zeros((), dtype=torch.int64, device=device)
    inside: Tensor | None = None
    for level, shift in enumerate(SHARDED_SHIFTS):
        counts.zero_()
        window[0] = shift
        ops.histogram_(counts, window, importance.detach(), uncertainty)
        if several:
            dist.all_reduce(counts, group=group)
        # the window spans the bin of the level before; what lies beyond it was counted in the window's end bins
        width = BINS if level == 0 else 1 << (SHARDED_SHIFTS[level - 1] - shift)
        bins = counts[:width].clone()
        if inside is not None:
            if width == BINS:
                bins[-1] -= above
            # not by the sum of counts: kernels may count a score of -0 in any bin, as its bits less the base overflow
            bins[0] -= bins.sum() - inside
        from_top = above + bins.flip(0).cumsum(0)
        chosen = width - 1 - (from_top < rank).sum()
        inside = bins.gather(0, chosen.reshape(1))[0]
        above = from_top.gather(0, (width - 1 - chosen).reshape(1))[0] - inside
        window[1] += chosen
        if level + 1 < len(SHARDED_SHIFTS):
            window[1] <<= shift - SHARDED_SHIFTS[level + 1]
    return window[1].to(torch.int32).view(torch.float32)
