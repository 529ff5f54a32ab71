"""Hugging Face transformers as it comes: SDPA attention, its own `generate`."""

TITLE = "Hugging Face generate"
FORMATS = ("fp32", "bf16")
WORKS = ("512",)  # transformers streams one row only
NEEDS = {"transformers": "transformers>=5.0"}
NOTE = "prefill: logits of the last position only; the time of `generate`'s own loop is in it"


def load(setup):
    from ._torch import HfGenerate, hugging_face

    return HfGenerate(hugging_face(setup, "sdpa"))
