"""The weights that fusion gives the two task vectors, by mask."""

from __future__ import annotations

from typing import NamedTuple


class FusionTable(NamedTuple):
    """Weights (w_in, w_out) of the two task vectors, looked up by the two masks (generalises Eq. 9).

    Args:
        both: where the inner and the outer mask are set.
        inner_only: where only the inner mask is set.
        outer_only: where only the outer mask is set.
        neither: where no mask is set.
    """

    both: tuple[float, float]
    inner_only: tuple[float, float]
    outer_only: tuple[float, float]
    neither: tuple[float, float]


PAPER = FusionTable(both=(1.0, 1.0), inner_only=(1.0, 0.0), outer_only=(0.0, 1.0), neither=(0.0, 0.0))
RELEASED_CODE = FusionTable(both=(0.4, 0.6), inner_only=(1.0, 0.0), outer_only=(0.0, 1.0), neither=(0.5, 0.5))
NO_SHARE = FusionTable(both=(0.0, 1.0), inner_only=(1.0, 0.0), outer_only=(0.0, 1.0), neither=(0.0, 0.0))
NO_MASKS = FusionTable(both=(1.0, 1.0), inner_only=(1.0, 1.0), outer_only=(1.0, 1.0), neither=(1.0, 1.0))

FUSION_TABLES: dict[str, FusionTable] = {
    "paper": PAPER,
    "released-code": RELEASED_CODE,
    "no-share": NO_SHARE,
    "no-masks": NO_MASKS,
}
"""Named fusion tables: Eq. 9, the authors' released code, and the rows "- Share" and "- KI" of Table 2."""
