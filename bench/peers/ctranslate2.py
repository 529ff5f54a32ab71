"""CTranslate2 on weights converted from the checkpoint."""

TITLE = "CTranslate2"
FORMATS = ("fp32", "int8")  # no bf16 and no int4 on a CPU
NEEDS = {"ctranslate2": "ctranslate2>=4.8", "transformers": "transformers>=5.0"}
NOTE = "prefill: the prompt less one token without logits, then a step; own greedy search"


def load(setup):
    import ctranslate2

    folder = setup.cache / "ctranslate2"
    if not (folder / "model.bin").is_file():
        _convert(setup.folder, folder)
    kind = {"fp32": "float32", "int8": "int8"}[setup.format]
    generator = ctranslate2.Generator(
        str(folder), compute_type=kind, inter_threads=1, intra_threads=setup.threads
    )
    return _Session(generator)


def _convert(source, folder):
    """One converted copy in fp32; CTranslate2 quantises as it loads."""
    import shutil

    from ctranslate2.converters.transformers import GPT2Loader
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(source)
    loader = GPT2Loader()
    spec = loader.get_model_spec(model)
    spec.register_vocabulary([str(i) for i in range(model.config.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "0"
    spec.validate()
    spec.optimize()
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    spec.save(str(partial))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


class _Session:
    def __init__(self, generator):
        self.generator = generator

    def generate(self, ids, new_tokens, stamp):
        last = len(ids) - 1

        def seen(step):
            if step.batch_id == last:
                stamp()
            return False

        results = self.generator.generate_batch(
            [[str(i) for i in row] for row in ids],
            max_batch_size=len(ids),
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            callback=seen,
        )
        return [row.sequences_ids[0] for row in results]
