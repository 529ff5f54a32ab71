"""`cgpt-kernels tune` without a GPU: what is tried, what is kept, what is written."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cgpt_kernels import tune
from cgpt_kernels.triton_substrate import launch

if launch.INTERPRETED:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)


@pytest.fixture
def table():
    """The launch table, put back afterwards."""
    before = json.dumps(launch.table())
    yield launch.table()
    launch.table.cache_clear()
    launch.config.cache_clear()
    assert json.dumps(launch.table()) == before  # the file itself was not touched


def test_the_table_is_written_as_it_was_read():
    assert launch.as_text() == launch.TABLE_PATH.read_text()


def test_every_class_has_a_reason_and_values_for_each_capability():
    for kernel, classes in launch.table().items():
        for which, entry in classes.items():
            assert entry["why"], (kernel, which)
            for capability in launch.CAPABILITIES:
                assert entry[capability].keys() == entry["8.0"].keys(), (kernel, which)
            assert "measured" in entry, (kernel, which)


def test_the_fastest_candidate_is_kept_and_the_rest_of_the_table_stays(table, tmp_path):
    before = json.loads(json.dumps(table))
    shown = []

    def time(launches):
        assert {x.kernel.fn.__name__ for x in launches} <= {
            "layer_norm_fwd_kernel",
            "layer_norm_bwd_kernel",
            "add_shares_kernel",
        }
        return 10.0 - launches[0].options["num_warps"] - launches[0].arguments.get("BLOCK_R", 0)

    found = tune.tune(
        "layer_norm C=768", device="meta", time=time, show=shown.append, out=tmp_path / "t.json"
    )
    entry = found["layer_norm_fwd"]["C <= 1024"]
    assert entry["8.0"]["num_warps"] == 8 and entry["8.0"]["BLOCK_R"] == 8
    assert entry["measured"]["8.0"]["us"] == -6.0
    assert entry["9.0"] == before["layer_norm_fwd"]["C <= 1024"]["9.0"]
    assert found["gemm"] == before["gemm"]
    assert json.loads((tmp_path / "t.json").read_text())["kernels"] == found
    assert shown[-1] == f"written to {tmp_path / 't.json'}"


def test_the_standing_values_are_tried_first_and_classes_of_16_stay():
    standing = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "CHUNK": 256}
    tried = tune.candidates(standing)
    assert tried[0] == standing and len(tried) > 10
    assert all(c["BLOCK_M"] == 16 and c["CHUNK"] == 256 for c in tried)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_tune_says_so():
    with pytest.raises(ValueError, match="tune: needs an NVIDIA GPU"):
        tune.tune()
