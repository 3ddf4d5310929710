"""A threshold that is selected again and again: every round, for the inner and the outer importance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._ops import ops
from .backend import backend_name
from .checks import check_scores, check_unit, mask_size
from .layout import APPROXIMATE_LIMIT, BINS, LEVELS, ROW, WHOLE_SHIFT
from .segments import Segments


class StreamingThreshold:
    """Thresholds at a density over flat score buffers, found on the device in one or a few streaming passes (Eq. 8).

    On CUDA the first pass can be saved: `importance_ema_` and `adamw_importance_` count the scores they write into
    `histogram(side)`, a window of 512 bit-pattern bins around the last threshold. The selection then reads the scores
    again (4 B/element a pass) only where the answer is not precise enough; passes that are not needed are launched
    and return at once. Nothing waits for the host.

    exact=True: the k-th largest score, k = ceil(density * n), at least 1. exact=False: a threshold with
    | #{x >= threshold} - #{x >= k-th largest} | <= 0.001 * n for every input (and never an empty mask); between the
    edges of the last bin it interpolates linearly, so that the error is far smaller on smooth distributions. On
    devices without the kernels the result is always exact.

    Args:
        density: fraction of elements to keep, in [0, 1]; a 0-d float tensor keeps it on the device (k is then
            ceil(density * n) up to the rounding of the tensor's dtype).
        numel: number of elements that are ranked; zeros beyond it are padding. Ignored with `segments`.
        sides: how many score buffers are ranked at once (2: inner and outer).
        segments: one threshold for each of these parts of the buffers.
        exact: see above.
        device: where the buffers are.

    Raises: ValueError for a density outside [0, 1], no elements, or other sides than 1 and 2.
    """

    def __init__(
        self,
        density: float | Tensor,
        numel: int,
        *,
        sides: int = 1,
        segments: Segments | None = None,
        exact: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if numel < 1:
            raise ValueError(f"cannot rank {numel} elements")
        if sides not in (1, 2):
            raise ValueError(f"sides must be 1 or 2, got {sides}")
        device = torch.device(device)
        self.sides, self.segments, self.exact = sides, segments, exact
        self._numels = (numel,) if segments is None else segments.numels
        groups = len(self._numels)
        self.thresholds = torch.zeros(sides, groups, dtype=torch.float32, device=device)
        self._ranks = torch.empty(groups, dtype=torch.int64, device=device)
        self._limits = torch.zeros(groups, dtype=torch.int64, device=device)
        if not exact and (sizes := self._sizes()) is not None:
            self._limits.copy_((APPROXIMATE_LIMIT * sizes).floor())
        elif not exact:
            self._limits.fill_(math.floor(APPROXIMATE_LIMIT * self._numels[0]))
        self._histograms: Tensor | None = None
        self._state: Tensor | None = None
        if backend_name(device.type) in ("triton", "interpret"):
            self._histograms = torch.zeros(sides, LEVELS, groups, BINS, dtype=torch.int64, device=device)
            self._state = torch.zeros(sides, groups, LEVELS, ROW, dtype=torch.int64, device=device)
        self.set_density(density)
        self.reset()

    def set_density(self, density: float | Tensor) -> None:
        """Use another density from the next selection on. Raises: ValueError for a number outside [0, 1]."""
        n = self._sizes()
        if n is None and not isinstance(density, Tensor):
            self._ranks.fill_(mask_size(density, self._numels[0]))
            return
        if n is None:
            n = torch.full((), self._numels[0], dtype=torch.float64, device=self._ranks.device)
        if isinstance(density, Tensor):
            # float32 0.2 is a little more than 0.2, and 0.2 of 10 is 2
            k = (density.to(torch.float64) * n * (1.0 - torch.finfo(density.dtype).eps)).ceil()
        else:
            check_unit("density", density)
            k = (density * n * (1.0 - 2.0**-52)).ceil()  # as mask_size
        self._ranks.copy_(torch.minimum(k.clamp(min=1.0), n))

    def _sizes(self) -> Tensor | None:
        """float64 [groups] of sizes that differ, kept with the segments: a copy from the host waits for the device."""
        if self.segments is None or len(set(self._numels)) == 1:
            return None
        return self.segments.sizes(self.thresholds.device)

    def set_rank(self, k: int) -> None:
        """Select the k-th largest of every group, whatever the density; k counts from 1."""
        if not 1 <= k <= min(self._numels):
            raise ValueError(f"there is no {k}-th largest of {min(self._numels)} elements")
        self._ranks.fill_(k)

    def reset(self) -> None:
        """Forget the last thresholds: the next window is the whole range. For scores unrelated to those before."""
        if self._state is not None and self._histograms is not None:
            self._histograms.zero_()
            self._state.zero_()
            self._state[:, :, 0, 0] = WHOLE_SHIFT

    def histogram(self, side: int) -> Tensor | None:
        """int64 [512] to hand to the last importance pass of a side; None where a pass of its own is made anyway."""
        if self._histograms is None or self.segments is not None:
            return None
        return self._histograms[side, 0, 0]

    def window(self, side: int) -> Tensor | None:
        """int64 [2] that belongs to `histogram(side)`."""
        if self._state is None or self.segments is not None:
            return None
        return self._state[side, 0, 0, :2]

    @property
    def refinements(self) -> Tensor:
        """int64 [sides, groups], on the device: passes after the first histogram that were needed so far."""
        if self._state is None:
            return torch.zeros(self.thresholds.shape, dtype=torch.int64, device=self.thresholds.device)
        return self._state[:, :, 0, 7]

    def state_dict(self) -> dict[str, Tensor]:
        """What the next selection depends on: windows and counts; empty without the kernels. Live tensors."""
        if self._histograms is None or self._state is None:
            return {}
        return {"histograms": self._histograms, "state": self._state}

    def load_state_dict(self, state: dict[str, Tensor]) -> bool:
        """Continue from `state_dict`. False, and a reset, where it came from a device without the kernels."""
        if self._histograms is None or self._state is None or not state:
            self.reset()
            return self._state is None
        self._histograms.copy_(state["histograms"])
        self._state.copy_(state["state"])
        return True

    def select(
        self,
        scores: tuple[Tensor, ...],
        factors: tuple[Tensor, ...] = (),
        *,
        counted: bool = False,
    ) -> Tensor:
        """The thresholds of one buffer for each side; the mask is score >= threshold.

        Args:
            scores: importances, one buffer a side, not negative and without NaN; float32 or bfloat16.
            factors: uncertainties; where given, importance * uncertainty is ranked (released code).
            counted: `histogram(side)` of every side has just been filled with these scores.

        Returns: float32 [sides, groups], overwritten by the next call.
        Raises: ValueError when buffers do not fit.
        """
        segments, device = self.segments, self.thresholds.device
        check_scores(scores, factors, self.sides, segments, self._numels, device)
        counted = counted and segments is None
        if self._histograms is not None and not counted:
            # counts of a round that was not ended
            self._histograms[:, 0].zero_()
        ops.thresholds_(
            self.thresholds,
            self._histograms,
            self._state,
            self._ranks,
            self._limits,
            list(scores),
            list(factors),
            counted and self._histograms is not None,
            list(segments.starts) if segments else [],
            list(segments.numels) if segments else [],
            segments.chunks(device) if segments else None,
        )
        return self.thresholds
