"""The workspace of the streaming selection: sizes and places that the kernels and their callers agree on.

Scores are not negative, so the 31 bits of their float32 are ordered as they are. Selection narrows an interval of
bit patterns: level 0 is a histogram over a window (taken inside the last importance pass, or by a pass of its own),
each further level a histogram of the one bin that holds the wanted rank, down to single values.

histograms: int64 [sides, LEVELS, groups, BINS], all 0 between uses.
state: int64 [sides, groups, LEVELS, ROW]. Row l: (shift, base, parent shift, rank) of the histogram of level l, whose
bin is (bits >> shift) - base, of elements whose bits >> parent shift equal base >> (parent shift - shift), or, at
level 0, clamped; then (done, threshold bits) where an earlier level had the answer, and how many levels after the
first have counted; in row 0, last, how many have counted in all uses. A launch reads one row and writes the next,
never the same: the warps of a program read at different times, and must not disagree.
"""

BINS = 512
"""Of level 0, and the room for each further level."""

STEP = 8
"""Bits that a further level resolves, in 2**STEP bins: more cost more where triton counts by votes, before 3.9."""

LEVELS = 5
ROW = 8

WHOLE_SHIFT = 22
"""Window over every float32: half an octave a bin, base 0. After a miss the next one has an octave a bin."""

WINDOW_SHIFT = 15
"""Window around the last threshold: 1/256 octave a bin, one octave to each side."""

SHARDED_SHIFTS = (22, 13, 4, 0)
"""Windows of a selection without state: every float32, then one bin of the window before."""

APPROXIMATE_LIMIT = 1e-3
"""Approximate selection stops at a bin that holds at most this fraction of the elements."""
