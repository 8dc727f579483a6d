"""For the test suites of attention kernels: Hypothesis strategies of problems and inputs, and what accepts a result.

    from flashsim.testing import assert_attention_close, attention_cases
    from hypothesis import given

    @given(attention_cases())
    def test_my_attention(case):
        assert_attention_close(my_attention(*case.numpy(), causal=case.causal), case)

Needs NumPy, ml_dtypes and Hypothesis, and no pytest, torch or GPU.
"""

from flashsim.testing.assertions import assert_attention_close, assert_gradients_close
from flashsim.testing.cases import AttentionCase, attention_cases, attention_inputs
from flashsim.testing.layouts import LAYOUTS, Layout, Strided, layouts, nan_padded, with_layout
from flashsim.testing.problems import attention_problems
from flashsim.testing.values import KINDS

__all__ = [
    "KINDS",
    "LAYOUTS",
    "AttentionCase",
    "Layout",
    "Strided",
    "assert_attention_close",
    "assert_gradients_close",
    "attention_cases",
    "attention_inputs",
    "attention_problems",
    "layouts",
    "nan_padded",
    "with_layout",
]
