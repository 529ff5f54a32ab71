"""Plain PyTorch with SDPA and a static KV cache: the reference GPT as it is, nothing replaced."""

TITLE = "PyTorch + SDPA"
FORMATS = ("fp32", "bf16")
NEEDS = {}
NOTE = "prefill: logits of the last position only; cgpt_kernels.GPT without replace"


def load(setup):
    from ._torch import reference_gpt

    return _Plain(reference_gpt(setup))


class _Plain:
    def __init__(self, model):
        self.model = model

    def generate(self, ids, new_tokens, stamp):
        import torch

        feed, chosen = torch.tensor(ids), []
        cache = self.model.new_cache(len(ids), len(ids[0]) + new_tokens)
        with torch.no_grad():
            for _ in range(new_tokens):
                feed = self.model(feed, cache=cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
                chosen.append(feed)
                stamp()
        return torch.cat(chosen, 1).tolist()
