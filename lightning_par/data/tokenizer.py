"""What makes tokens of text: a file of the `tokenizers` library, or the bytes themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_par.data.extra import need
from lightning_par.data.token_folder import checksum_of
from lightning_par.errors import DataError

NONE = "none"  # the word for no token after documents
# Tokens that end a text in the tokenizers of GPT-2, Qwen, Llama 3, Llama and T5, Gemma, and BERT
KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(ABC):
    """Makes numbers of texts.

    Attributes:
        name: the name of its file, or ``bytes``.
        checksum: of its file; empty for bytes.
        vocabulary: every token is below it.
        end_of_document: the token that stands after a document; None for none.
    """

    name: str
    checksum: str
    vocabulary: int
    end_of_document: int | None

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, 1-dim of any unsigned dtype; nothing is added before or after."""


class Bytes(Tokenizer):
    """UTF-8 as it is. Documents end with byte 0, which text does not have.

    Args:
        has_ends: whether they do.
    """

    name, checksum, vocabulary = "bytes", "", 256

    def __init__(self, has_ends: bool) -> None:
        self.end_of_document = 0 if has_ends else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(errors="replace"), np.uint8) for text in texts]


class TokenizerFile(Tokenizer):
    """A ``tokenizer.json``.

    What it would cut off, pad or add (a token for the beginning, say) is left out, and a text in which a special token is spelt has
    it as text: documents cannot end inside themselves.

    Args:
        path: of the file.
        end_of_document: a token of it, `NONE`, or None for the first of `KNOWN_ENDS` that it has.

    Raises:
        DataError: the file cannot be read, `tokenizers` is not there, or the file has no such token.
    """

    def __init__(self, path: Path, end_of_document: str | None) -> None:
        tokenizers = need("tokenizers", f"--tokenizer {path}")
        if not path.is_file():
            raise DataError(f"--tokenizer {path} is no file: name a tokenizer.json, or leave it out for bytes")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"--tokenizer {path} cannot be read ({error}): it must be a tokenizer.json of `tokenizers`") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.name, self.checksum = path.name, checksum_of(path)
        self.vocabulary = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_document = self._find(path, end_of_document)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.uint32) for each in encoded]

    def _find(self, path: Path, word: str | None) -> int | None:
        if word == NONE:
            return None
        tried = KNOWN_ENDS if word is None else (word,)
        found: list[int] = [token for token in map(self._tokenizer.token_to_id, tried) if token is not None]
        if not found:
            raise DataError(
                f"--tokenizer {path} has no token {' or '.join(tried)} to stand after a document: name one of its tokens with "
                f"--end-of-document TOKEN, or say --end-of-document {NONE}"
            )
        return found[0]


def open_tokenizer(file: str | None, end_of_document: str | None = None) -> Tokenizer:
    """The tokenizer of a file, or of none: bytes.

    Raises:
        DataError: as `TokenizerFile`, or a token is named that bytes do not have.
    """
    if file is not None:
        return TokenizerFile(Path(file), end_of_document)
    if end_of_document not in (None, NONE):
        raise DataError(f"--end-of-document {end_of_document}: bytes have no such token, documents end with byte 0: leave it out")
    return Bytes(has_ends=end_of_document is None)
