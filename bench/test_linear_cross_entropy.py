"""linear_cross_entropy at its benchmark cases."""

from conftest import suite


@suite("linear_cross_entropy")
def test_linear_cross_entropy(time_case, case, dtype, who):
    time_case(case, dtype, who)
