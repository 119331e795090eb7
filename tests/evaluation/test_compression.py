import io
import random
import shutil
import subprocess

import pytest
import zstandard

from cpm_jax.evaluation.compression import zstd, zstd_with_reference


def _text(seed, size=200_000):
    source = random.Random(seed)
    words = ["".join(random.Random(i).choices("abcdefgh 中文", k=6)) for i in range(500)]
    return " ".join(source.choices(words, k=size // 7))


def test_size_is_that_of_a_stream_that_decompresses_to_the_text():
    texts = [_text(1), _text(2)]
    data = "".join(texts).encode()
    result = zstd(texts)
    stream = zstandard.ZstdCompressor(level=19).compress(data)
    assert zstandard.ZstdDecompressor().stream_reader(io.BytesIO(stream)).read() == data
    assert (result.compressed_bytes, result.text_bytes) == (len(stream), len(data))
    assert result.bits_per_byte == pytest.approx(8 * len(stream) / len(data))


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the zstd program is not installed")
def test_size_is_that_of_the_program(tmp_path):
    (tmp_path / "text").write_text(_text(1), "utf-8")
    out = subprocess.run(["zstd", "-19", "-c", tmp_path / "text"], capture_output=True, check=True).stdout
    assert zstd([_text(1)]).compressed_bytes == pytest.approx(len(out), abs=16)  # the program adds a checksum


def test_a_reference_helps_as_far_as_it_is_alike():
    held_out = [_text(1)]
    alone = zstd(held_out)
    same = zstd_with_reference(held_out, [_text(5), _text(1)])
    assert same.bits_per_byte < 0.01 * alone.bits_per_byte
    assert same.reference_bytes == len((_text(5) + _text(1)).encode())
    other = zstd_with_reference(held_out, [_text(7)])
    assert other.bits_per_byte < 1.01 * alone.bits_per_byte
    assert zstd_with_reference(held_out, []) == alone


def test_nothing_to_compress_is_an_error():
    with pytest.raises(ValueError, match="no text"):
        zstd([""])
    with pytest.raises(ValueError, match="no text"):
        zstd_with_reference([], ["x"])
