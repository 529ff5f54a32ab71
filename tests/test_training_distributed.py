"""DDP and FSDP2 around a replaced model, in two processes over gloo, and Hugging Face's Trainer."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cgpt_kernels as ck

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

WORLD, STEPS = 2, 3


def small_gpt():
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "n_positions": 32, "n_embd": 48, "n_head": 3, "n_layer": 2}
    return ck.GPT(ck.GPTConfig(**shape, initializer_range=0.2)).train()


def ids_of(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(97, (2, 14), generator=generator)


def loss_of(model, step, rank):
    ids = ids_of(step, rank)
    return model(ids[:, :-1], targets=ids[:, 1:])


def optimizer_of(model):
    # Not Adam: it makes steps of full size from gradients that are 0 but for rounding (k's bias).
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def steps_of(model, rank):
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        loss_of(model, step, rank).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def work(rank, folder):
    """Trains a replaced model in each wrapper; rank 0 leaves weights, and logits without gradients,
    which are made from packed copies of the weights."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    ids = ids_of(99, 0)

    model = small_gpt()
    ck.replace(model)
    steps_of(DistributedDataParallel(model), rank)
    with torch.no_grad():
        found = {"ddp": (model.state_dict(), model(ids))}

    model = small_gpt()
    ck.replace(model)
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    with torch.no_grad():
        model(ids)  # packs what the steps then change
    model.reshard()  # the root stays whole after a forward; an optimizer must not see that
    steps_of(model, rank)
    with torch.no_grad():
        logits = model(ids)
    weights = {name: p.full_tensor() for name, p in model.state_dict().items()}
    found["fsdp2"] = weights, logits
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(work, (str(folder),), nprocs=WORLD)
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def wanted():
    """Eager in one process, on the mean over the ranks' batches."""
    model = small_gpt()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        (sum(loss_of(model, step, rank) for rank in range(WORLD)) / WORLD).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model.state_dict(), model(ids_of(99, 0))


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_wrapped_model_trains_as_eager_does_on_the_mean_of_the_batches(wrapper, trained, wanted):
    weights, logits = trained[wrapper]
    assert weights.keys() == wanted[0].keys()
    for name, value in wanted[0].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-5, msg=name)
    torch.testing.assert_close(logits, wanted[1], rtol=1e-3, atol=1e-3)


# ---- Hugging Face's Trainer ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_trainer_logs_the_losses_of_eager(options, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from small_gpt2 import make, tokens

    eager = make(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    ours = copy.deepcopy(eager)
    ck.replace(ours)
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    losses = []
    for model in (eager, ours):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    tolerance = 2e-2 if options.get("bf16") else 1e-3
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
