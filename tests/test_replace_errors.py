"""What `replace` and `restore` refuse, and that a refusal changes nothing."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import cgpt_kernels as ck
from cgpt_kernels.replace.swap import Replaced


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8), nn.ReLU())


def untouched(m):
    return not any(isinstance(x, Replaced) or "kernel_backend" in x.__dict__ for x in m.modules())


def one_line(info):
    text = str(info.value)
    assert "\n" not in text
    return text


def test_not_a_module():
    with pytest.raises(TypeError, match=r"replace: model must be a torch\.nn\.Module, got dict"):
        ck.replace({})
    with pytest.raises(TypeError, match=r"restore: model must be a torch\.nn\.Module, got dict"):
        ck.restore({})


def test_unknown_backend_lists_the_known_ones():
    m = model()
    with pytest.raises(ValueError) as info:
        ck.replace(m, backend="gpu")
    text = one_line(info)
    assert "'gpu'" in text and all(name in text for name in ("auto", "eager", "cpu", "triton"))
    assert untouched(m)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_backend_that_cannot_run_changes_nothing():
    m = model()
    with pytest.raises(ValueError) as info:
        ck.replace(m, backend="cuda", dtype=torch.bfloat16)
    text = one_line(info)
    assert "'cuda' cannot run" in text and "eager" in text
    assert untouched(m)
    assert m[1].weight.dtype == torch.float32, "the cast must not come before the check"


def test_a_dtype_the_backend_lacks_changes_nothing():
    m = model().double()
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run"):
        ck.replace(m, backend="cpu")
    assert untouched(m)


def test_an_unknown_way_to_quantize_is_refused():
    m = model()
    with pytest.raises(ValueError, match=r"quantize must be .*'int8'.*'int4'.*got 'fp4'"):
        ck.replace(m, quantize="fp4")
    assert untouched(m)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "bfloat16"])
def test_dtype_is_checked(dtype):
    m = model()
    with pytest.raises(ValueError, match=r"dtype must be None or one of torch\.float32"):
        ck.replace(m, dtype=dtype)
    assert untouched(m)


def test_nothing_to_replace_says_what_is_supported():
    m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(ValueError) as info:
        ck.replace(m)
    text = one_line(info)
    held, supported = ("Sequential", "Conv2d", "BatchNorm2d"), ("GPT-2", "BERT", "nn.Linear")
    assert all(word in text for word in (*held, *supported, "CONTRIBUTING.md, 'Add a model"))


def test_a_single_module_without_a_counterpart():
    with pytest.raises(ValueError, match=r"nothing in ReLU can be replaced, it holds ReLU"):
        ck.replace(nn.ReLU())


def test_restore_without_replace():
    with pytest.raises(ValueError, match=r"nothing in this Sequential is replaced"):
        ck.restore(model())


def test_restore_under_another_librarys_class():
    m = model()
    replacement = ck.replace(m)
    nn.utils.parametrizations.weight_norm(m[1])
    x = torch.randn(3, 16)
    assert torch.isfinite(m(x)).all()
    for undo in (replacement.restore, lambda: ck.restore(m)):
        with pytest.raises(ValueError, match=r"ParametrizedFusedLinear, built by another library"):
            undo()
    assert isinstance(m[0], Replaced), "a refused restore changes nothing"
    nn.utils.parametrize.remove_parametrizations(m[1], "weight")
    ck.restore(m)
    assert untouched(m)


def test_context_manager_restores_on_an_exception():
    m = model()
    with pytest.raises(KeyError), ck.replace(m) as replacement:
        assert isinstance(m[1], Replaced) and len(replacement.table.replaced) == 2
        raise KeyError
    assert untouched(m)
    replacement.restore()  # a second time does nothing
    assert untouched(m)


def test_replacing_twice_changes_nothing_but_the_backend():
    m = model()
    ck.replace(m)
    again = ck.replace(m)
    assert len(again.table.replaced) == 2
    again.restore()
    assert isinstance(m[1], Replaced), "the second call changed nothing, so it undoes nothing"
    with ck.replace(m, backend="eager"):
        assert m[1].kernel_backend == "eager"
    assert m[1].kernel_backend == "auto" and isinstance(m[1], Replaced)
    ck.restore(m)
    assert untouched(m)
    with ck.replace(m), ck.replace(m, backend="eager"):
        ck.restore(m)
    assert untouched(m), "leaving the contexts must not replace again"


def test_replacing_again_picks_up_what_was_added():
    m = model()
    ck.replace(m)
    m.append(nn.Linear(8, 4))
    replacement = ck.replace(m)
    assert isinstance(m[3], Replaced)
    replacement.restore()
    assert not isinstance(m[3], Replaced) and isinstance(m[1], Replaced)


def test_the_table_prints_as_text_and_with_rich():
    replacement = ck.replace(model())
    text = str(replacement)
    assert "FusedLinear" in text and "left alone" in text and text.count("\n") == 4
    rich = pytest.importorskip("rich.console", reason="rich is not installed")
    console = rich.Console(width=120, file=open("/dev/null", "w"), record=True)
    console.print(replacement.table)
    assert "FusedLayerNorm" in console.export_text()


def test_importing_and_replacing_needs_no_transformers():
    code = """
import sys
sys.modules["transformers"] = None  # any import of it raises
sys.modules["peft"] = None
import torch, cgpt_kernels as ck
m = torch.nn.Sequential(torch.nn.Linear(4, 4))
ck.replace(m)
m(torch.zeros(2, 4))
ck.replace(ck.GPT(ck.GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=9, n_positions=4)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
