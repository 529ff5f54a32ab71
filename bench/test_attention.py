"""attention at its benchmark cases."""

from conftest import suite


@suite("attention")
def test_attention(time_case, case, dtype, who):
    time_case(case, dtype, who)
