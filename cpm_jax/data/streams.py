"""Bytes of plain and compressed files, and their lines, in bounded memory; a stream that breaks off is noticed."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import zstandard

MAX_LINE_BYTES = 1 << 27  # of jsonl; a longer one is a broken file rather than a document
COMPRESSIONS = (".gz", ".zst")  # endings, in lower or upper case
_READ_SIZE = 1 << 16


class Truncated(Exception):
    """The compressed stream ends, or is damaged, before its end."""


def _decompressed(path: Path, new_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """Yields the decompressed bytes of a file of one or more gzip members or zstd frames.

    The streams' own file objects are not used: zstandard's does not notice a truncated frame.
    """
    decoder = None
    with path.open("rb") as file:
        while data := file.read(_READ_SIZE):
            while data:
                if decoder is None:
                    decoder = new_decoder()
                try:
                    yield decoder.decompress(data)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise Truncated(f"damaged before byte {file.tell()} of the file: {error}") from None
                data = b""
                if decoder.eof:
                    data = decoder.unused_data.lstrip(b"\0")
                    decoder = None
        if decoder is not None:
            raise Truncated(f"the compressed stream is cut off at byte {file.tell()}, the end of the file")


def file_kind(name: str) -> str:
    """The ending of a file's name that says how it is read: ".jsonl" of "A.JSONL.gz"; "" if it has none."""
    path = PurePath(name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix


def read_chunks(path: Path) -> Iterator[bytes]:
    """The content of a file in pieces, decompressed where its suffix is one of `COMPRESSIONS`.

    Raises:
        Truncated: the compressed stream ends, or is damaged, before its end.
    """
    compression = path.suffix.lower()
    if compression == ".gz":
        yield from _decompressed(path, lambda: zlib.decompressobj(wbits=31))
    elif compression == ".zst":
        yield from _decompressed(path, lambda: zstandard.ZstdDecompressor().decompressobj())
    else:
        with path.open("rb") as file:
            while data := file.read(_READ_SIZE):
                yield data


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes | int]:
    """The lines; in place of one that is longer than MAX_LINE_BYTES, and so never held in memory, its length."""
    pending: list[bytes] = []
    length = 0
    try:
        for chunk in chunks:
            *ended, rest = chunk.split(b"\n")
            for part in ended:
                length += len(part)
                yield b"".join([*pending, part]) if length <= MAX_LINE_BYTES else length
                pending, length = [], 0
            length += len(rest)
            pending.append(rest)
            if length > MAX_LINE_BYTES:
                pending.clear()
    except Truncated as error:
        raise Truncated(f"{error}; {length} bytes of an unfinished line are lost") from None
    if length:
        yield b"".join(pending) if length <= MAX_LINE_BYTES else length
