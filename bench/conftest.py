"""Shared by the suites: `pytest bench` times each op's cases, ours and torch's own call in turns.

pytest-benchmark runs one candidate after the other; for ratios that hold on a shared machine use
`cgpt-kernels bench`, which interleaves them.
"""

import pytest
import torch

from cgpt_kernels import timing
from cgpt_kernels.ops import registry

WHO = ["ours", "torch"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def suite(op):
    """The parameters of an op's suite: its benchmark cases, dtypes and candidates."""
    cases = [pytest.param(case, id=case.name) for case in registry.cases("bench", op)]

    def decorate(test):
        for names, values in (("who", WHO), ("dtype", DTYPES), ("case", cases)):
            test = pytest.mark.parametrize(names, values)(test)
        return test

    return decorate


@pytest.fixture
def time_case(benchmark):
    """Time one case; shape, FLOP and bytes go into the report beside it."""

    def run(case, dtype, who):
        dtype = DTYPES[dtype]
        inputs = case.inputs(dtype)
        function = registry.FUNCTIONS[case.op]
        call = case.torch_call(inputs) if who == "torch" else lambda: function(**inputs)
        benchmark.group = f"{case.op} {case.name} {str(dtype).removeprefix('torch.')}"
        benchmark.extra_info.update(
            shape=case.shape, flops=case.flops, bytes=case.bytes(dtype), why=case.why
        )
        with torch.no_grad():
            benchmark(call)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(timing.machine())
