"""Fixtures for all tests: fixed seeds, instruction-set tiers, NaN in fresh memory."""

import random

import pytest
import torch
from hypothesis import HealthCheck, settings

from cgpt_kernels import backends

# A shared or slow machine must not fail a property; examples are the same on every run.
settings.register_profile(
    "cgpt",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("cgpt")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The same random numbers in every run and every order of the tests."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=backends._C.cpu_isas() if backends._C else [])
def tier(request):
    """Each instruction-set tier in turn, or those of an indirect parametrization; the best one
    afterwards."""
    backends._C.set_cpu_isa(request.param)
    yield request.param
    backends._C.set_cpu_isa("auto")


@pytest.fixture
def nan_filled_memory():
    """torch.empty returns NaN (or the largest integer): reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
