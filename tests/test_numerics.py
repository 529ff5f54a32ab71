"""docs/numerics.md is current: its tables come from the rule, the cases and the tests themselves.

`python tests/test_numerics.py` writes them anew.
"""

import re
from pathlib import Path

import torch

from cgpt_kernels import testing
from cgpt_kernels.ops import registry

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "numerics.md"
MARK = "<!-- written by `python tests/test_numerics.py` from here on -->\n"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def current():
    written, _, _ = DOCUMENT.read_text().partition(MARK)
    return written + MARK + "\n" + testing.rule_table(registry.cases("test"), DTYPES)


def test_the_numerics_document_is_current():
    assert DOCUMENT.read_text() == current(), "run `python tests/test_numerics.py`"


def test_every_promise_names_tests_that_exist():
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for _, tests in testing.PROMISES:
        for test in tests:
            assert re.search(rf"^def {test}\(", sources, re.MULTILINE), test


def test_the_rule_measures_against_eager_and_lets_a_correct_rounding_pass():
    truth = torch.tensor([1.0, 3.0], dtype=torch.float64)
    eager = truth.float() + torch.tensor([0.0, 1e-3])
    inside = testing.compare("y", truth.float() + 1.9e-3, eager, truth, 2.0)
    beyond = testing.compare("y", truth.float() + 2.1e-3, eager, truth, 2.0)
    assert inside.ok and not beyond.ok
    lucky = torch.tensor([1 + 2**-9], dtype=torch.float64)  # a tie of bf16
    rounded = lucky.bfloat16()
    assert testing.compare("y", rounded, rounded, lucky, 0.0).ok


def test_nan_counts_as_an_error_unless_it_is_the_truth():
    nan, one = torch.tensor([float("nan")]), torch.tensor([1.0])
    assert not testing.compare("y", nan, one, one.double(), 2.0).ok
    assert testing.compare("y", nan, nan, nan.double(), 2.0).ok
    assert not testing.compare("y", one, nan, nan.double(), 2.0).ok


if __name__ == "__main__":
    DOCUMENT.write_text(current())
