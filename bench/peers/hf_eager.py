"""Hugging Face transformers with its eager attention, stepped by hand with its dynamic cache."""

TITLE = "Hugging Face eager"
FORMATS = ("fp32", "bf16")
NEEDS = {"transformers": "transformers>=5.0"}
NOTE = "prefill: logits of the last position only; no `generate` loop around the forward"


def load(setup):
    from ._torch import hugging_face

    return _Eager(hugging_face(setup, "eager"))


class _Eager:
    def __init__(self, model):
        self.model = model

    def generate(self, ids, new_tokens, stamp):
        import torch

        feed, cache, chosen = torch.tensor(ids), None, []
        with torch.no_grad():
            for _ in range(new_tokens):
                out = self.model(
                    input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = out.past_key_values
                feed = out.logits[:, -1].argmax(-1, keepdim=True)  # B 1
                chosen.append(feed)
                stamp()
        return torch.cat(chosen, 1).tolist()
