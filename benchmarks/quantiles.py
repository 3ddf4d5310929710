"""The threshold alone: the usual ways to select from a flat score buffer, as contenders, and a check by counting."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

import kif_kernels
from benchmarks.workload import DENSITY, KERNEL_BACKENDS, Contender, Phase, Unavailable, run_phases
from kif_kernels import StreamingThreshold, mask_size
from kif_kernels.layout import APPROXIMATE_LIMIT


def interpolated_quantile(scores: Tensor, density: float) -> tuple[Tensor, str]:
    """torch.quantile(scores, 1 - density), and a note where it refused (above 2**24 elements) and a sort was used."""
    try:
        return torch.quantile(scores, 1.0 - density), ""
    except RuntimeError as error:
        if "too large" not in str(error):
            raise
    ordered = scores.sort().values
    place = (1.0 - density) * (scores.numel() - 1)
    below = math.floor(place)
    above = min(below + 1, scores.numel() - 1)
    return torch.lerp(ordered[below], ordered[above], place - below), "torch.quantile refuses this size: sort"


def by_kthvalue(scores: Tensor, density: float) -> Tensor:
    """The k-th largest by torch.kthvalue."""
    n = scores.numel()
    return scores.kthvalue(n - mask_size(density, n) + 1).values


def by_topk(scores: Tensor, density: float) -> Tensor:
    """The k-th largest by torch.topk."""
    return scores.topk(mask_size(density, scores.numel()), sorted=False).values.min()


def by_sort(scores: Tensor, density: float) -> Tensor:
    """The k-th largest by torch.sort (on CUDA: CUB's radix sort)."""
    n = scores.numel()
    return scores.sort().values[n - mask_size(density, n)]


def rank_error(scores: Tensor, threshold: Tensor, density: float) -> int:
    """How many elements the mask scores >= threshold holds too many (positive) or too few (negative).

    0 for the k-th largest, by definition: at least k elements reach it, fewer than k exceed it.
    """
    k = mask_size(density, scores.numel())
    reach = int((scores >= threshold).sum())
    if reach >= k > int((scores > threshold).sum()):
        return 0
    return reach - k


class Selector(Contender):
    """A contender for the threshold alone, over the buffer `importance_in`.

    Attributes:
        result: the threshold that was found last.
        slack: how many elements more or fewer than k it may keep.
    """

    slack = 0

    def setup(self) -> None:
        self.scores = self.flat["importance_in"]
        self.result = torch.full((), math.nan, device=self.problem.device)

    def phases(self) -> list[Phase]:
        """The selection; untimed phases before it put it into its starting state."""
        return [Phase("select", self.run)]

    def run(self) -> None:
        self.result = self.select()

    def select(self) -> Tensor:
        raise NotImplementedError


class TorchQuantile(Selector):
    name = "torch.quantile"
    about = "torch.quantile (interpolated); a sort above 2**24 elements"
    slack = 1

    def select(self) -> Tensor:
        delta, self.note = interpolated_quantile(self.scores, DENSITY)
        return delta


class TorchKthvalue(Selector):
    name = "torch.kthvalue"
    about = "torch.kthvalue"

    def select(self) -> Tensor:
        return by_kthvalue(self.scores, DENSITY)


class TorchTopk(Selector):
    name = "torch.topk"
    about = "torch.topk, unsorted, and the least of it"

    def select(self) -> Tensor:
        return by_topk(self.scores, DENSITY)


class TorchSort(Selector):
    name = "torch.sort"
    about = "torch.sort (on CUDA: CUB's radix sort)"

    def select(self) -> Tensor:
        return by_sort(self.scores, DENSITY)


class CupyPartition(Selector):
    name = "cupy.partition"
    about = "cupy.partition on the same memory"

    def setup(self) -> None:
        super().setup()
        if self.problem.device.type != "cuda":
            raise Unavailable("cupy needs a GPU")
        try:
            import cupy
        except ImportError as error:
            raise Unavailable(f"cupy: {error}") from error
        self.cupy = cupy
        self.view = cupy.from_dlpack(self.scores)

    def select(self) -> Tensor:
        place = self.scores.numel() - mask_size(DENSITY, self.scores.numel())
        with self.cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            return torch.from_dlpack(self.cupy.partition(self.view, place)[place])


class KifSelect(Selector):
    """A first selection: nothing is known of the scores, and every pass over them is the selection's own."""

    name = "kif"
    about = "StreamingThreshold, exact, from scratch"
    exact = True

    def setup(self) -> None:
        super().setup()
        try:
            backend = kif_kernels.backend_name(self.problem.device.type)
        except ValueError as error:
            raise Unavailable(str(error)) from error
        self.note = f"backend {backend}"
        self.bytes_known = backend in KERNEL_BACKENDS
        n = self.problem.numel
        self.selection = StreamingThreshold(DENSITY, n, exact=self.exact, device=self.problem.device)
        self.selections = [self.selection]

    def phases(self) -> list[Phase]:
        return [Phase("reset", self.selection.reset, timed=False), *super().phases()]

    def count_passes(self, phases: Iterable[Phase]) -> int:
        # the phases begin with a reset, which forgets the count, and a first pass is not counted
        run_phases(phases)
        return 1 + self._passes()

    def select(self) -> Tensor:
        return self.selection.select((self.scores,))[0, 0]


class KifSelectApproximate(KifSelect):
    name = "kif-approximate"
    about = "StreamingThreshold, within 0.001 of the elements, from scratch"
    exact = False

    def setup(self) -> None:
        super().setup()
        self.slack = int(APPROXIMATE_LIMIT * self.problem.numel)


class KifSelectCounted(KifSelect):
    """What a round pays: the histogram around the last threshold was counted by the importance pass."""

    name = "kif-counted"
    about = "StreamingThreshold, exact, histogram already counted"

    def setup(self) -> None:
        super().setup()
        if self.selection.histogram(0) is None:
            raise Unavailable("this backend counts nothing in the importance pass")
        self.selection.select((self.scores,))

    def phases(self) -> list[Phase]:
        return [Phase("count", self.count, timed=False), Phase("select", self.run)]

    def count_passes(self, phases: Iterable[Phase]) -> int:
        return Selector.count_passes(self, phases)

    def count(self) -> None:
        """The histogram that an importance pass would have left."""
        torch.ops.kif.histogram_(self.selection.histogram(0), self.selection.window(0), self.scores, None)

    def select(self) -> Tensor:
        return self.selection.select((self.scores,), counted=True)[0, 0]


SELECTORS: dict[str, type[Selector]] = {
    selector.name: selector
    for selector in (
        KifSelect, KifSelectCounted, TorchSort, TorchTopk, TorchKthvalue, TorchQuantile, KifSelectApproximate,
        CupyPartition,
    )
}  # fmt: skip
"""By name, the most telling first."""
