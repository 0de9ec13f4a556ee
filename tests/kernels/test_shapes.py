"""Every route on random shapes against the fp64 reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import DTYPES, NAMES, check, make

from fastlora.kernels import Term

pytest.importorskip("triton", reason="Triton is for Linux only")

examples = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", NAMES)
@examples
@given(
    M=st.sampled_from([1, 2, 7, 16, 61, 64, 129, 300]),
    K=st.integers(1, 150),
    N=st.integers(1, 150),
    r=st.sampled_from([1, 3, 5, 17, 32, 64, 72]),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    without=st.booleans(),
    need_dx=st.booleans(),
)
def test_one_projection(route, dtype, M, K, N, r, p, without, need_dx):
    if dtype == torch.float32:
        # Tiles are at most 32 wide in this type: more than three would take time and show no more.
        M, K, N = min(M, 70), (K - 1) % 80 + 1, (N - 1) % 80 + 1
    inputs = make(M, K, N, [(r, N)])
    stop = M - without  # a row without a term takes other kernels
    check(route, inputs, lambda f: [Term(*f[0], 0.5, p, 7, 0, stop)], dtype, need_dx)
