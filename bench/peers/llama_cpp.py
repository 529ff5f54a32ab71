"""llama.cpp through llama-cpp-python's C interface, on gguf files of the same weights."""

TITLE = "llama.cpp"
FORMATS = ("fp32", "bf16", "int8", "int4")  # f32, bf16, q8_0, q4_0
NEEDS = {"llama_cpp": "llama-cpp-python>=0.3.36", "gguf": "gguf"}
NOTE = (
    "prefill: logits of the last position only; f32, bf16, q8_0, q4_0 (its own quantiser), fp16 "
    "cache; GELU in its tanh form"
)

# enum llama_ftype
_FTYPES = {"bf16": 32, "int8": 7, "int4": 2}
_UBATCH = 512  # its default: longer prompts are read in pieces


def load(setup):
    import llama_cpp

    full = setup.cache / "llama-fp32.gguf"
    if not full.is_file():
        _write(setup.folder, full)
    file = setup.cache / f"llama-{setup.format}.gguf"
    if not file.is_file():
        _quantize(full, file, _FTYPES[setup.format], setup.threads)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(file).encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {file}")
    return _Session(model, setup.threads)


def _write(source, file):
    """The checkpoint as gguf in fp32, without a tokenizer: ids go in and come out."""
    import gguf

    from cgpt_kernels import GPT

    model = GPT.from_pretrained(source)
    c = model.config
    partial = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "gpt2")
    writer.add_context_length(c.n_positions)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(c.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(c.vocab_size)
    names = {
        "wte": "token_embd",
        "wpe": "position_embd",
        "ln_f": "output_norm",
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    for name, p in model.named_parameters():  # the tied head once, as wte
        path, kind = name.removeprefix("transformer.").rsplit(".", 1)
        block = ""
        if path.startswith("h."):
            _, layer, path = path.split(".", 2)
            block = f"blk.{layer}."
        writer.add_tensor(f"{block}{names[path]}.{kind}", p.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


def _quantize(source, file, ftype, threads):
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, threads
    partial = file.with_suffix(".partial")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), params)
    if code:
        raise RuntimeError(f"llama.cpp cannot quantize {source}: code {code}")
    partial.rename(file)


class _Session:
    def __init__(self, model, threads):
        import llama_cpp

        self.model, self.threads = model, threads
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.shape = self.context = self.batch = None

    def _prepare(self, rows, capacity):
        """A context of this shape, kept until another one is asked for."""
        import llama_cpp

        if self.shape == (rows, capacity):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
            return
        if self.context is not None:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = rows * capacity
        params.n_ubatch = _UBATCH
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = self.threads
        params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {rows} x {capacity} tokens")
        self.batch = llama_cpp.llama_batch_init(rows * capacity, 0, 1)
        self.shape = rows, capacity

    def _feed(self, tokens, first):
        """Read tokens [rows][S] at positions first...; the likeliest token after each row."""
        import llama_cpp
        import numpy as np

        batch, at, asked = self.batch, 0, []
        for row, ids in enumerate(tokens):
            for i, token in enumerate(ids):
                batch.token[at] = token
                batch.pos[at] = first + i
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = row
                batch.logits[at] = i == len(ids) - 1
                at += 1
            asked.append(at - 1)
        batch.n_tokens = at
        code = llama_cpp.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode: code {code}")
        found = []
        for at in asked:
            logits = llama_cpp.llama_get_logits_ith(self.context, at)
            found.append(int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax()))
        return found

    def generate(self, ids, new_tokens, stamp):
        length = len(ids[0])
        self._prepare(len(ids), length + new_tokens)
        chosen = [self._feed(ids, 0)]
        stamp()
        for at in range(length, length + new_tokens - 1):
            chosen.append(self._feed([[token] for token in chosen[-1]], at))
            stamp()
        return [list(row) for row in zip(*chosen, strict=True)]
