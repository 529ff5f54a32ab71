"""Triton as a backend: absent, present without a GPU, interpreted."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from cgpt_kernels import backends, ops


def python(code, **environment):
    """What a fresh interpreter prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton_everything_else_works_and_its_name_says_how_to_get_it():
    out = python("""
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *r: None if name == "triton" else find(name, *r)
        import sys
        sys.modules["triton"] = None  # any import of it raises
        import torch
        import cgpt_kernels as ck
        x, w = torch.randn(2, 8), torch.ones(8)
        assert torch.isfinite(ck.ops.layer_norm(x, w)).all()
        ck.doctor()
        try:
            ck.ops.layer_norm(x, w, backend="triton")
        except ValueError as error:
            print(error)
    """)
    assert "pip install 'cgpt-kernels[triton]'" in out


def test_nothing_imports_triton_before_it_is_asked_for():
    out = python("""
        import sys
        import torch
        import cgpt_kernels as ck
        ck.ops.layer_norm(torch.randn(2, 8), torch.ones(8))
        print("cgpt_kernels.triton_substrate.device" in sys.modules)
    """)
    assert out.strip() == "False"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_error_says_where_the_tensors_are():
    if "triton" in backends.runnable("layer_norm", "cpu"):
        pytest.skip("the interpreter takes CPU tensors")
    with pytest.raises(
        ValueError, match=r"backend 'triton' cannot run: (x is on cpu|triton is not)"
    ):
        ops.layer_norm(torch.ones(2, 4), torch.ones(4), backend="triton")
