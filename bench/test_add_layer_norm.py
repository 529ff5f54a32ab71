"""add_layer_norm at its benchmark cases."""

from conftest import suite


@suite("add_layer_norm")
def test_add_layer_norm(time_case, case, dtype, who):
    time_case(case, dtype, who)
