"""This project: transformers' GPT2LMHeadModel after `ck.replace`, through `ck.generate`."""

TITLE = "ours, Hugging Face model"
OURS = True
FORMATS = ("fp32", "bf16", "int8", "int4")
NEEDS = {"transformers": "transformers>=5.0"}
NOTE = "prefill: logits of the last position only; keys and values of int8 and int4 in 8 bits"


def load(setup):
    from ._torch import CkGenerate, hugging_face, replaced

    return CkGenerate(replaced(hugging_face(setup, "sdpa"), setup), setup)
