"""A correct kernel is never rejected: the tile-loop twin, on drawn problems, forward and backward, fp16, bf16, fp8.

`HYPOTHESIS_PROFILE=nightly` draws 100 000 problems instead of some dozens, overflow-prone and tiny ones among them.
"""

from __future__ import annotations

import twin
from hypothesis import given
from twin_cases import Case, Prepared, cases


@given(cases())
def test_a_correct_kernel_is_never_rejected(case: Case) -> None:
    prepared = Prepared(case)
    outputs = prepared.run(twin)
    assert prepared.judge(outputs).broken == ()
    assert prepared.stays_within_bounds(outputs)
