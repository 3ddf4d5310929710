"""Parts of a flat buffer that have a threshold each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SEGMENT_ALIGNMENT = 16
"""Elements a segment's start is a multiple of, so that vector loads stay aligned."""

SEGMENT_CHUNK = 4096
"""Elements of a segment that one program of a kernel works on."""


@dataclass(frozen=True)
class Segments:
    """Tensors inside a flat buffer: segment i is elements [starts[i], starts[i] + numels[i]).

    Args:
        starts: multiples of `SEGMENT_ALIGNMENT`, ascending.
        numels: at least 1 each; segments do not overlap.

    Raises: ValueError naming the first segment that breaks a rule.
    """

    starts: tuple[int, ...]
    numels: tuple[int, ...]
    _sizes: dict[torch.device, Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)
    _chunks: dict[torch.device, Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.starts or len(self.starts) != len(self.numels):
            raise ValueError(f"{len(self.starts)} starts and {len(self.numels)} sizes of segments")
        end = 0
        for i, (start, numel) in enumerate(zip(self.starts, self.numels, strict=True)):
            if start % SEGMENT_ALIGNMENT or start < end or numel < 1:
                raise ValueError(
                    f"segment {i} (start {start}, {numel} elements) must start at a multiple of "
                    f"{SEGMENT_ALIGNMENT}, behind the one before it, and hold an element"
                )
            end = start + numel

    @classmethod
    def of(cls, segments: Sequence[tuple[int, int]]) -> Segments:
        """From (start, numel) pairs."""
        return cls(tuple(start for start, _ in segments), tuple(numel for _, numel in segments))

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def end(self) -> int:
        """Elements a buffer must have."""
        return self.starts[-1] + self.numels[-1]

    def sizes(self, device: torch.device) -> Tensor:
        """float64 [segments] on `device`: `numels`; cached."""
        if device not in self._sizes:
            self._sizes[device] = torch.tensor(self.numels, dtype=torch.float64, device=device)
        return self._sizes[device]

    def chunks(self, device: torch.device) -> Tensor:
        """int64 [chunks, 3] on `device`: (segment, first element, number of elements) of every chunk; cached."""
        if device not in self._chunks:
            rows = [
                (i, start + offset, min(SEGMENT_CHUNK, numel - offset))
                for i, (start, numel) in enumerate(zip(self.starts, self.numels, strict=True))
                for offset in range(0, numel, SEGMENT_CHUNK)
            ]
            self._chunks[device] = torch.tensor(rows, dtype=torch.int64, device=device)
        return self._chunks[device]
