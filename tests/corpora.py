"""Small texts of the standard library, in every kind of file, and a tokenizer that was trained on them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

from lightning_par.demo.corpus import list_sources

END = "<|endoftext|>"


def texts(count: int, longest: int = 4000) -> list[str]:
    """The beginnings of some sources."""
    return [file.read_text(errors="replace")[:longest] for file in list_sources()[:count]]


def write_lines(path: Path, found: Iterable[str], column: str = "text") -> Path:
    """A .jsonl or .jsonl.gz file with a text in each line."""
    content = "".join(json.dumps({column: text, "number": number}) + "\n" for number, text in enumerate(found)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def train_tokenizer(path: Path, size: int = 400, end: str = END) -> Path:
    """A ``tokenizer.json`` of byte pairs, which would cut and add to texts if it were let."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end, "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(20), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=3)
    tokenizer.save(str(path))
    return path
