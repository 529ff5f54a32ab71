"""This project: the reference GPT after `ck.replace`, through `ck.generate`."""

TITLE = "ours, reference GPT"
OURS = True
FORMATS = ("fp32", "bf16", "int8", "int4")
NEEDS = {}
NOTE = "prefill: logits of the last position only; keys and values of int8 and int4 in 8 bits"


def load(setup):
    from ._torch import CkGenerate, reference_gpt, replaced

    return CkGenerate(replaced(reference_gpt(setup), setup), setup)
