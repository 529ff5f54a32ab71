"""Train the reference GPT: text in, a Hugging Face checkpoint out, killed and resumed at will.

    from cgpt_kernels.train import Settings, run

    run(Settings(data=("texts/",), out="run", width=256, layers=4, steps=1000))

A run is its settings, its tokens and its last whole checkpoint, all in one folder:

    run/run.json             what was asked for; `resume` goes on with it
    run/tokens/              the token streams, memory-mapped, and the tokenizer
    run/step-00001000/       a checkpoint: config.json, model.safetensors, tokenizer.json, and the
                             optimizer's moments; the last few and the best are kept
    run/last, run/best       links to two of them
    run/log.jsonl            loss, learning rate, gradient norm, speed

Whatever happens at a step is a function of (settings, tokens, weights, moments, step): the order of
the data and the dropout masks are drawn from (seed, position), never from a generator that has run
on. So a run killed at any moment and resumed gives the weights of a run that was left alone, bit
for bit, with the same number of threads on the same machine.
"""

from .evaluate import loss_of
from .loop import Result, run
from .settings import Settings

__all__ = ["Result", "Settings", "loss_of", "run"]
