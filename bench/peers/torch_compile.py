"""torch.compile with static shapes: one graph for prefill, one for a decode step.

The cache has a fixed capacity and a step attends to all of it under a mask, the form in which a
decode step compiles once. Weights are frozen into the graphs, which lets the compiler pack them.
"""

TITLE = "torch.compile"
FORMATS = ("fp32", "bf16")
NEEDS = {}
NOTE = "prefill: logits of the last position only; static shapes, frozen weights"


def load(setup):
    import os

    import torch

    from ._torch import reference_gpt

    # Compiled code is kept between runs.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(setup.cache / "inductor")
    torch._inductor.config.freezing = True
    return _Compiled(reference_gpt(setup))


class _Compiled:
    def __init__(self, model):
        import torch

        self.model = model
        self.prefill = torch.compile(self._prefill, dynamic=False, fullgraph=True)
        self.step = torch.compile(self._step, dynamic=False, fullgraph=True)

    def generate(self, ids, new_tokens, stamp):
        import torch

        B, S = len(ids), len(ids[0])
        config, like = self.model.config, self.model.lm_head.weight
        shape = (B, config.n_head, S + new_tokens, config.head_dim)
        cache = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.n_layer)]
        with torch.no_grad():
            token = self.prefill(torch.tensor(ids), cache)
            chosen = [token]
            stamp()
            for at in range(S, S + new_tokens - 1):
                token = self.step(token, torch.tensor([at]), cache)
                chosen.append(token)
                stamp()
        return torch.cat(chosen, 1).tolist()

    def _prefill(self, ids, cache):
        import torch

        positions = torch.arange(ids.shape[1])

        def attend(q, k, v, layer):
            keys, values = cache[layer]
            keys[:, :, : k.shape[2]] = k
            values[:, :, : v.shape[2]] = v
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return self._forward(ids, positions, attend)

    def _step(self, token, position, cache):
        import torch

        mask = torch.arange(cache[0][0].shape[2]) <= position  # T

        def attend(q, k, v, layer):
            keys, values = cache[layer]
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            return torch.nn.functional.scaled_dot_product_attention(
                q, keys, values, mask[None, None, None]
            )

        return self._forward(token, position, attend)

    def _forward(self, ids, positions, attend):
        """Greedy token after the last position, int64 [B, 1]; ids [B, S]."""
        parts = self.model.transformer
        x = parts.wte(ids) + parts.wpe(positions)  # B S C
        B, S, C = x.shape
        for layer, block in enumerate(parts.h):
            a = block.attn
            qkv = a.c_attn(block.ln_1(x)).view(B, S, 3, a.n_head, -1).permute(2, 0, 3, 1, 4)
            y = attend(*qkv, layer)  # B H S D
            x = x + a.c_proj(y.transpose(1, 2).reshape(B, S, C))
            x = x + block.mlp(block.ln_2(x))
        return self.model.lm_head(parts.ln_f(x[:, -1:]))[:, -1].argmax(-1, keepdim=True)
