"""Text to tokens and back, by the `tokenizers` library."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from export.torch_runtime.config import FolderError, ModelConfig

_BROKEN = "Invalid prefix"  # of the library's message where bytes that are no character change what was said before


class Tokenizer:
    """The tokenizer.json of a folder."""

    def __init__(self, folder: str | Path, config: ModelConfig):
        """Loads it.

        Raises:
            FolderError: there is none, it cannot be read, or it has more tokens than the model.
        """
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise FolderError(f"{folder} has no tokenizer.json: give a folder that `export` wrote")
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise FolderError(f"{file} cannot be read: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if size > config.vocab_size:
            raise FolderError(f"{file} has {size} tokens, and config.json says vocab_size = {config.vocab_size}")
        begins = self._backend.encode("").ids[:1]
        self._before = begins if begins == [config.bos_token_id] else []

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, and no others; special tokens that are spelt out in it are those."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a text that is to be continued, after the token that begins one where the tokenizer says so."""
        return self._before + self.encode(text)

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens piece by piece, without special tokens; a character comes when all its bytes are there.

        Bytes that never become one are U+FFFD.
        """
        stream, waiting = DecodeStream(skip_special_tokens=True), list[int]()
        for token in tokens:
            waiting.append(token)
            try:
                piece = stream.step(self._backend, token)
            except Exception as error:  # the library has no class of its own for it
                if _BROKEN not in str(error):
                    raise
                yield "\ufffd"
                stream, waiting = DecodeStream(skip_special_tokens=True), [token]
                piece = stream.step(self._backend, token)
            if piece:
                yield piece
                waiting.clear()
        rest = self._backend.decode(waiting, skip_special_tokens=True)
        if "\ufffd" in rest:  # else nothing but special tokens, or white space that a piece would have shown
            yield "\ufffd"
