"""gemm at its benchmark cases."""

from conftest import suite


@suite("gemm")
def test_gemm(time_case, case, dtype, who):
    time_case(case, dtype, who)
