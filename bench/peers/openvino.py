"""OpenVINO on a graph converted from the checkpoint, with its stateful KV cache.

The reference GPT is traced with its past keys and values as inputs and outputs; those pairs then
become states inside the graph, in the pattern that the CPU plugin fuses with its attention: read
state, gather by beam, append, attend. nncf compresses the weights of int8 and int4 (groups of 64).
"""

TITLE = "OpenVINO"
FORMATS = ("fp32", "bf16", "int8", "int4")
NEEDS = {"openvino": "openvino>=2026.0", "nncf": "nncf>=3.0"}
NOTE = (
    "prefill: logits of the last position only; int4 in groups of 64, its embedding and head int8; "
    "cache and activations of int8 and int4 as the plugin chooses"
)


def load(setup):
    import openvino as ov

    core = ov.Core()
    full = setup.cache / "openvino-fp32.xml"
    if not full.is_file():
        _save(_stateful(setup.folder), full)
    file = full
    if setup.format in ("int8", "int4"):
        file = setup.cache / f"openvino-{setup.format}.xml"
        if not file.is_file():
            _save(_compressed(core.read_model(full), setup.format), file)
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": setup.threads,
    }
    if setup.format in ("fp32", "bf16"):
        options["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[setup.format]
    compiled = core.compile_model(str(file), "CPU", options)
    return _Session(compiled.create_infer_request())


def _compressed(model, kind):
    import nncf

    mode = nncf.CompressWeightsMode
    if kind == "int8":
        return nncf.compress_weights(model, mode=mode.INT8_SYM)
    return nncf.compress_weights(model, mode=mode.INT4_SYM, group_size=64, ratio=1.0)


def _save(model, file):
    import openvino as ov

    partial = file.with_name(f"partial-{file.name}")
    ov.save_model(model, partial, compress_to_fp16=False)
    partial.with_suffix(".bin").rename(file.with_suffix(".bin"))
    partial.rename(file)


def _stateful(source):
    """The checkpoint as an OpenVINO model: (input_ids, position_ids, beam_idx) -> logits [B, V]."""
    import numpy as np
    import openvino as ov
    import torch
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    from cgpt_kernels import GPT

    gpt = GPT.from_pretrained(source)
    c = gpt.config
    ids = torch.zeros(2, 3, dtype=torch.long)
    past = [torch.zeros(2, c.n_head, 5, c.head_dim) for _ in range(2 * c.n_layer)]
    example = (ids, ids, torch.arange(2, dtype=torch.int32), *past)
    model = ov.convert_model(_step_of(gpt), example_input=example)

    cached = [f"{part}.{layer}" for layer in range(c.n_layer) for part in ("key", "value")]
    names = ["input_ids", "position_ids", "beam_idx", *(f"past.{n}" for n in cached)]
    shapes = [[-1, -1], [-1, -1], [-1]] + [[-1, c.n_head, -1, c.head_dim]] * len(cached)
    for port, name, shape in zip(model.inputs, names, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    names = ["logits", *(f"present.{n}" for n in cached)]
    for port, name in zip(model.outputs, names, strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {f"past.{n}": f"present.{n}" for n in cached})

    # A fresh state is empty along the tokens and as large as the batch.
    batch = ops.gather(
        ops.shape_of(model.input("input_ids"), "i64"),
        ops.constant([0], np.int64),
        ops.constant(0, np.int64),
    )
    for op in model.get_ops():
        if op.get_type_name() == "ReadValue":
            shape = ops.concat([batch, ops.constant([c.n_head, 0, c.head_dim], np.int64)], 0)
            op.set_arguments([ops.broadcast(ops.constant(0.0, np.float32), shape)])
    model.validate_nodes_and_infer_types()
    return model


def _step_of(gpt):
    """One forward of the GPT with past keys and values as arguments and results."""
    import torch
    import torch.nn.functional as F

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt = gpt

        def forward(self, input_ids, position_ids, beam_idx, *past):
            parts = self.gpt.transformer
            x = parts.wte(input_ids) + parts.wpe(position_ids)  # B S C
            # The plugin's attention is several times slower with a mask of bool than with one that
            # is added.
            T = past[0].shape[2] + input_ids.shape[1]
            hidden = torch.arange(T) > position_ids[:, None, :, None]  # B 1 S T
            mask = torch.where(hidden, torch.tensor(torch.finfo(torch.float32).min), 0.0)
            present = []
            for layer, block in enumerate(parts.h):
                a = block.attn
                B, S, C = x.shape
                heads = a.c_attn(block.ln_1(x)).split(C, -1)
                q, k, v = (t.view(B, S, a.n_head, -1).transpose(1, 2) for t in heads)  # B H S D
                k = torch.cat([past[2 * layer].index_select(0, beam_idx), k], 2)
                v = torch.cat([past[2 * layer + 1].index_select(0, beam_idx), v], 2)
                present += [k, v]
                y = F.scaled_dot_product_attention(q, k, v, mask, scale=a.scale)
                x = x + a.c_proj(y.transpose(1, 2).reshape(B, S, C))
                x = x + block.mlp(block.ln_2(x))
            return (self.gpt.lm_head(parts.ln_f(x[:, -1])), *present)

    return Step().eval()


class _Session:
    def __init__(self, request):
        self.request = request

    def generate(self, ids, new_tokens, stamp):
        import numpy as np

        feed, first, chosen = np.array(ids), 0, []
        rows = np.arange(len(ids), dtype=np.int32)
        self.request.reset_state()
        for _ in range(new_tokens):
            positions = np.arange(first, first + feed.shape[1])[None].repeat(len(ids), 0)
            inputs = {"input_ids": feed, "position_ids": positions, "beam_idx": rows}
            out = self.request.infer(inputs, share_inputs=True, share_outputs=True)
            first += feed.shape[1]
            feed = out["logits"].argmax(-1)[:, None]  # B 1
            chosen.append(feed)
            stamp()
        return np.concatenate(chosen, 1).tolist()
