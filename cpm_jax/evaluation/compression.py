"""What general compressors make of the same text: bits per byte to hold a model's beside."""

from collections.abc import Sequence
from dataclasses import dataclass

import zstandard

LEVEL = 19
_MAX_WINDOW_LOG = 27  # 128 MiB, the most that `zstd -d` accepts without being told


@dataclass(frozen=True)
class Compressed:
    """What became of a text.

    Attributes:
        bits_per_byte: compressed bits over bytes of text.
        compressed_bytes: size of the compressed stream.
        text_bytes: size of the text.
        reference_bytes: size of the text that the compressor could refer to.
    """

    bits_per_byte: float
    compressed_bytes: int
    text_bytes: int
    reference_bytes: int = 0


def _join(texts: Sequence[str]) -> bytes:
    return "".join(texts).encode("utf-8", "replace")


def zstd(texts: Sequence[str]) -> Compressed:
    """`zstd -19` of the texts one after another as one stream, as the command line does it.

    Raises:
        ValueError: the texts are empty.
    """
    data = _join(texts)
    if not data:
        raise ValueError("no text to compress")
    size = len(zstandard.ZstdCompressor(level=LEVEL).compress(data))
    return Compressed(8 * size / len(data), size, len(data))


def zstd_with_reference(texts: Sequence[str], reference: Sequence[str]) -> Compressed:
    """`zstd -19 --patch-from`: the same stream, by a compressor that has read the reference text.

    The reference, for example the training text, is a dictionary of raw content that matches may point into, with
    long-distance matching and a window that spans both. Of a reference over 128 MiB less the text only the end is
    used; the result says how much.

    Raises:
        ValueError: the texts are empty.
    """
    data = _join(texts)
    if not data:
        raise ValueError("no text to compress")
    past = _join(reference)[-max(0, (1 << _MAX_WINDOW_LOG) - len(data)) :]
    if len(past) < 8:  # the format has no smaller dictionary
        return zstd(texts)
    window_log = max(20, min(_MAX_WINDOW_LOG, (len(past) + len(data)).bit_length()))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, source_size=len(past) + len(data), window_log=window_log, enable_ldm=True
    )
    content = zstandard.ZstdCompressionDict(past, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    size = len(zstandard.ZstdCompressor(compression_params=parameters, dict_data=content).compress(data))
    return Compressed(8 * size / len(data), size, len(data), len(past))
