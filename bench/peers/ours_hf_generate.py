"""This project: transformers' GPT2LMHeadModel after `ck.replace`, through its own `generate`."""

TITLE = "ours, Hugging Face generate"
OURS = True
FORMATS = ("fp32", "bf16", "int8", "int4")
WORKS = ("512",)  # transformers streams one row only
NEEDS = {"transformers": "transformers>=5.0"}
NOTE = "prefill: logits of the last position only; the time of `generate`'s own loop is in it"


def load(setup):
    from ._torch import HfGenerate, hugging_face, replaced

    return HfGenerate(replaced(hugging_face(setup, "sdpa"), setup))
