"""Text files to token streams on disk: found, read in pieces, encoded once, memory-mapped after.

Memory does not grow with the text: a document is read, and given to the tokenizer, in pieces of at
most PIECE characters that end at a line's end.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import files as whole_files
from .settings import Settings

END_OF_TEXT = "<|endoftext|>"
PIECE = 1 << 20  # characters; the tokenizer's cost per call is lost in it
VOCABULARY = 4097
_TOGETHER = 16  # pieces per call, which the tokenizer spreads over the cores


@dataclass(frozen=True)
class Document:
    """A text file and the name that decides whether it is held out."""

    name: str
    path: Path


@dataclass(frozen=True)
class Tokens:
    """The streams of a run, memory-mapped; `about` is what about.json says of them."""

    folder: Path
    about: dict

    def stream(self, name: str) -> np.ndarray | None:
        """ "train", "held_out", "replay" or "replay_held_out"; None where there is none."""
        file = self.folder / f"{name}.bin"
        if not file.is_file():
            return None
        return np.memmap(file, dtype=self.about["dtype"], mode="r")


def find(sources: Iterable[str]) -> list[Document]:
    """The files that the sources name, each once, sorted within a folder or pattern.

    Hidden files and folders are passed over. Raises ValueError where a source names nothing.
    """
    found: dict[Path, Document] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
            named = [
                Document(p.as_posix(), path / p)
                for p in inside
                if not any(part.startswith(".") for part in p.parts)
            ]
            if not named:
                raise ValueError(f"train: folder {source!r} holds no files")
        elif path.is_file():
            named = [Document(path.name, path)]
        else:
            matches = sorted(glob.glob(source, recursive=True))
            named = [Document(Path(m).as_posix(), Path(m)) for m in matches if Path(m).is_file()]
            if not named:
                raise ValueError(
                    f"train: {source!r} is no file, no folder and no pattern that matches a file"
                )
        for document in named:
            found.setdefault(document.path.resolve(), document)
    return list(found.values())


def pieces(path: Path) -> Iterator[str]:
    """The file's text in pieces that end at a line's end, or after PIECE characters."""
    with open(path, encoding="utf-8", newline="") as file:
        rest = ""
        while block := file.read(PIECE - len(rest)):
            block = rest + block
            end = block.rfind("\n") + 1 if len(block) >= PIECE else len(block)
            end = end or len(block)
            yield block[:end]
            rest = block[end:]
        if rest:
            yield rest


def is_text(path: Path) -> bool:
    """Whether the file is UTF-8 without NUL characters, and not empty."""
    decoder, size = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            if b"\0" in block:
                return False
            try:
                decoder.decode(block)
            except UnicodeDecodeError:
                return False
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return size > 0


def split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, by the hashes of their names: adding files moves none."""
    train, held_out = [], []
    for document in documents:
        digest = hashlib.sha256(document.name.encode()).digest()
        chosen = int.from_bytes(digest[:8], "big") < share * 2**64
        (held_out if chosen else train).append(document)
    return train, held_out


def read_tokenizer(path: str | os.PathLike, command: str = "train"):
    """From tokenizer.json, a folder with one, or a folder with GPT-2's vocab.json, merges.txt."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    path = Path(path)
    file = path if path.is_file() else path / "tokenizer.json"
    vocab, merges = path / "vocab.json", path / "merges.txt"
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if vocab.is_file() and merges.is_file():
            file = vocab
            return ByteLevelBPETokenizer(str(vocab), str(merges))
    except Exception as error:  # tokenizers has no class of its own for this
        raise ValueError(f"{command}: {file} is not a readable tokenizer: {error}") from None
    raise ValueError(
        f"{command}: {path} has no tokenizer.json (nor vocab.json and merges.txt): copy the "
        "model's tokenizer files there"
    )


def make_tokenizer(texts: Iterable[str], vocab_size: int):
    """GPT-2's kind of tokenizer, byte-level BPE; END_OF_TEXT is token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(
            f"train: vocab_size must be above {len(alphabet)}, the bytes and the end of text, "
            f"got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(
    settings: Settings,
    vocab_size: int | None = None,
    told: Callable[[str], object] = lambda text: None,
) -> Tokens:
    """The run's token streams: those in its folder, or made from its data and put there whole.

    vocab_size: of a tokenizer that is made; None: the settings', or VOCABULARY. Where a
        checkpoint is trained on, the most that its tokenizer may have.
    told: takes what is being done, as a line of text.
    """
    folder = Path(settings.out) / "tokens"
    if not folder.is_dir():
        with whole_files.folder(folder) as unfinished:
            _write(settings, vocab_size or VOCABULARY, unfinished, told)
    return Tokens(folder, json.loads((folder / "about.json").read_text(encoding="utf-8")))


def _write(settings: Settings, vocab_size: int, folder: Path, told: Callable) -> None:
    train, held_out, skipped = _documents(settings.data, settings.held_out, settings.held_out_share)
    source = settings.tokenizer
    if source is None and settings.fine_tunes:
        source = settings.model
    if source is not None:
        tokenizer = read_tokenizer(source)
        if Path(source).is_dir() and not (Path(source) / "tokenizer.json").is_file():
            for name in ("vocab.json", "merges.txt"):
                shutil.copyfile(Path(source) / name, folder / name)
    else:
        told(f"a tokenizer of {settings.vocab_size or vocab_size} tokens from {len(train)} files")
        texts = itertools.chain.from_iterable(pieces(d.path) for d in train)
        tokenizer = make_tokenizer(texts, settings.vocab_size or vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    size = max(tokenizer.get_vocab().values()) + 1
    if settings.fine_tunes and size > vocab_size:
        raise ValueError(
            f"train: the tokenizer has {size} tokens, {settings.model} knows {vocab_size}: leave "
            "out --tokenizer to take the model's own"
        )
    end = tokenizer.token_to_id(END_OF_TEXT)
    dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
    about = {"dtype": dtype.name, "vocab_size": size, "end_of_text": end, "skipped": skipped}

    def encode(name: str, documents: list[Document]) -> int:
        told(f"{name}: {len(documents)} files to tokens")
        about[f"{name}_documents"] = len(documents)
        with open(folder / f"{name}.bin", "wb") as file:
            for ids in _encoded(tokenizer, documents, end):
                np.array(ids, dtype=dtype).tofile(file)
            about[f"{name}_tokens"] = file.tell() // dtype.itemsize
        return about[f"{name}_tokens"]

    def encode_both(name: str, held_out_name: str, train, held_out) -> None:
        count = encode(name, train)
        if held_out:
            encode(held_out_name, held_out)
        elif cut := int(count * settings.held_out_share):  # too few files: the end of the stream
            with open(folder / f"{name}.bin", "r+b") as file:
                file.seek((count - cut) * dtype.itemsize)
                (folder / f"{held_out_name}.bin").write_bytes(file.read())
                file.truncate((count - cut) * dtype.itemsize)
            about.update({f"{name}_tokens": count - cut, f"{held_out_name}_tokens": cut})

    encode_both("train", "held_out", train, held_out)
    if settings.replay:
        train, held_out, _ = _documents(settings.replay, (), settings.held_out_share)
        encode_both("replay", "replay_held_out", train, held_out)
    text = json.dumps(about, indent=2) + "\n"
    (folder / "about.json").write_text(text, encoding="utf-8")


def _documents(data, held_out, share) -> tuple[list[Document], list[Document], list[str]]:
    """(training, held-out, names of files that are no text)."""
    found = find(data)
    texts = [d for d in found if is_text(d.path)]
    if not texts:
        raise ValueError(
            f"train: no text in {', '.join(data)}: {len(found)} files, all empty or not UTF-8"
        )
    skipped = sorted({d.name for d in found} - {d.name for d in texts})
    if held_out:
        kept = [d for d in find(held_out) if is_text(d.path)]
        if not kept:
            raise ValueError(f"train: no text in the held-out {', '.join(held_out)}")
        paths = {d.path.resolve() for d in kept}
        train = [d for d in texts if d.path.resolve() not in paths]
        if not train:
            raise ValueError("train: every file of the data is held out")
        return train, kept, skipped
    train, kept = split(texts, share)
    if not train or len(kept) < 2:  # one file is too much chance to measure a loss on
        train, kept = texts, []
    return train, kept, skipped


def _encoded(tokenizer, documents: list[Document], end: int | None) -> Iterator[list[int]]:
    """Tokens of all documents in turn, each document ended by `end`."""
    parts = (
        (piece, last) for document in documents for piece, last in _with_last(pieces(document.path))
    )
    while together := list(itertools.islice(parts, _TOGETHER)):
        encoded = tokenizer.encode_batch([piece for piece, _ in together])
        for (_, last), one in zip(together, encoded, strict=True):
            yield [*one.ids, end] if last and end is not None else one.ids


def _with_last(items: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(item, whether it is the last one)."""
    items = iter(items)
    before = next(items, None)
    for item in items:
        yield before, False
        before = item
    if before is not None:
        yield before, True
