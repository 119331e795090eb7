"""GGUF headers and values against the gguf package's writer and quants, and against transformers' dequantisation."""

import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers.integrations.gguf import dequant

from cpm_jax.checkpoints.gguf_file import GgufError, GgufFile
from cpm_jax.checkpoints.sources import open_source
from cpm_jax.common.config import ConfigError

KIND = gguf.GGMLQuantizationType
QUANTISED = [
    *(KIND.Q8_0, KIND.Q4_0, KIND.Q4_1, KIND.Q5_0, KIND.Q5_1),
    *(KIND.Q2_K, KIND.Q3_K, KIND.Q4_K, KIND.Q5_K, KIND.Q6_K, KIND.IQ4_NL, KIND.IQ4_XS, KIND.IQ2_XXS, KIND.IQ3_S),
]
PLAIN = [KIND.F32, KIND.F16, KIND.BF16]
VALUES = {
    "a.string": "naïve 世界",
    "a.float": 0.1,
    "an.array_of_strings": ["a", "", "▁the"],
    "an.array_of_numbers": [1, 2, -3],
}


def random_blocks(kind: KIND, rows: int, columns: int, seed: int) -> np.ndarray:
    """Rows of arbitrary blocks; every float16 among their bytes is finite, as in real files."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(seed).integers(0, 256, (rows, columns // block * size), np.uint8)
    return data & 0xBB  # no exponent of all ones, at any offset


def write(path, tensors, metadata=VALUES, arch="llama"):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if kind in (KIND.F32, KIND.F16) else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small_file(tmp_path):
    ones = np.arange(12, dtype=np.float32).reshape(3, 4)
    blocks = random_blocks(KIND.Q4_0, 2, 64, seed=0)
    return write(tmp_path / "small.gguf", {"plain": (ones, KIND.F32), "packed": (blocks, KIND.Q4_0)})


def test_metadata_as_written(small_file):
    read = GgufFile(small_file).metadata
    assert {key: read[key] for key in VALUES} == VALUES
    assert read["general.architecture"] == "llama"


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_quantised_values(tmp_path, kind):
    blocks = random_blocks(kind, 6, 512, seed=kind.value)
    path = write(tmp_path / "model.gguf", {"first": (blocks[:1], kind), "weight": (blocks, kind)})
    read = GgufFile(path).read("weight")
    assert read.dtype == np.float32
    assert read.shape == (6, 512)
    assert len(np.unique(read)) > 8
    np.testing.assert_array_equal(read, gguf.dequantize(blocks, kind))
    if kind not in (KIND.Q5_0, KIND.Q5_1):  # the two that transformers leaves to the package
        theirs = dequant.dequantize(torch.from_numpy(blocks), int(kind)).numpy().reshape(6, 512)
        np.testing.assert_allclose(read, theirs, rtol=2e-6)


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_plain_values(tmp_path, kind):
    values = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float32)
    stored = gguf.quantize(values, kind)
    path = write(tmp_path / "model.gguf", {"weight": (stored, kind), "vector": (stored[0, 0], kind)})
    expected = torch.from_numpy(values).to({KIND.F32: torch.float32, KIND.F16: torch.float16}.get(kind, torch.bfloat16))
    np.testing.assert_array_equal(GgufFile(path).read("weight"), expected.float().numpy())
    np.testing.assert_array_equal(GgufFile(path).read("vector"), expected[0, 0].float().numpy())


def test_large_tensors_are_dequantised_in_parts(tmp_path, monkeypatch):
    from cpm_jax.checkpoints import gguf_file

    monkeypatch.setattr(gguf_file, "_VALUES_AT_A_TIME", 7 * 64)
    blocks = random_blocks(KIND.Q8_0, 50, 64, seed=1)
    path = write(tmp_path / "model.gguf", {"weight": (blocks, KIND.Q8_0)})
    np.testing.assert_array_equal(GgufFile(path).read("weight"), gguf.dequantize(blocks, KIND.Q8_0))
    part = GgufFile(path).read("weight", range(9, 31))
    np.testing.assert_array_equal(part, gguf.dequantize(blocks[9:31], KIND.Q8_0))


def test_a_file_cut_anywhere_is_refused(small_file, tmp_path):
    whole = small_file.read_bytes()
    tensors = GgufFile(small_file).tensors.values()
    end = max(tensor.start + tensor.num_bytes for tensor in tensors)
    cut = tmp_path / "cut.gguf"
    for length in range(end):
        cut.write_bytes(whole[:length])
        with pytest.raises(GgufError, match=r"cut short|not a GGUF file"):
            GgufFile(cut)


def test_the_message_of_a_cut_file_says_what_is_missing(small_file, tmp_path):
    whole = small_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-40])
    with pytest.raises(
        GgufError, match=rf"tensor 'packed' \(Q4_0, shape \(2, 64\)\) ends at byte .* has {len(whole) - 40}"
    ):
        GgufFile(cut)
    cut.write_bytes(whole[: whole.index(b"a.float") + 3])
    with pytest.raises(GgufError, match=r"the name of metadata value \d of \d takes bytes"):
        GgufFile(cut)


def test_damaged_bytes_are_refused_or_read_but_never_crash(small_file, tmp_path):
    whole = bytearray(small_file.read_bytes())
    rng = np.random.default_rng(0)
    damaged, refused = tmp_path / "damaged.gguf", 0
    header = min(tensor.start for tensor in GgufFile(small_file).tensors.values())
    for _ in range(600):
        content = bytearray(whole)
        for place in rng.integers(0, header, 2):
            content[place] = rng.integers(0, 256)
        damaged.write_bytes(content)
        try:
            GgufFile(damaged)
        except GgufError:
            refused += 1
    assert refused > 100


def test_tensors_that_cannot_lie_where_the_table_says(small_file, tmp_path):
    whole, moved = small_file.read_bytes(), tmp_path / "moved.gguf"
    dimensions = whole.index(b"packed") + len(b"packed")  # then their number, each of them, the kind and the offset
    entry = dimensions + 4 + 8 * struct.unpack_from("<I", whole, dimensions)[0] + 4
    for offset, words in ((7, "7 bytes into the data, which is no multiple of the alignment 32"), (0, "overlap")):
        moved.write_bytes(whole[:entry] + struct.pack("<Q", offset) + whole[entry + 8 :])
        with pytest.raises(GgufError, match=words):
            GgufFile(moved)


def test_a_file_that_shrinks_while_it_is_read(small_file):
    opened = GgufFile(small_file)
    small_file.write_bytes(small_file.read_bytes()[:-40])
    with pytest.raises(GgufError, match="ends within tensor 'packed': it has changed"):
        opened.read("packed")


def test_other_files_and_versions(tmp_path, small_file):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    with pytest.raises(GgufError, match=r"not a GGUF file: it begins with b'PK"):
        GgufFile(path)
    whole = small_file.read_bytes()
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(GgufError, match="GGUF version 1; versions 2 and 3"):
        GgufFile(path)
    path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    with pytest.raises(GgufError, match="big-endian"):
        GgufFile(path)
    with pytest.raises(GgufError, match="No such file"):
        GgufFile(tmp_path / "absent.gguf")
    with pytest.raises(GgufError, match="directory"):
        GgufFile(tmp_path)


@pytest.mark.parametrize("number", [9, 24, 4, 99], ids=["Q8_1", "I8", "removed", "unheard of"])
def test_unknown_types_of_tensors(small_file, tmp_path, number):
    whole = small_file.read_bytes()
    # A tensor's entry: name, rank 2, two axes, type.
    place = whole.index(b"packed") + len(b"packed") + 4 + 16
    path = tmp_path / "unknown.gguf"
    path.write_bytes(whole[:place] + struct.pack("<I", number) + whole[place + 4 :])
    with pytest.raises(GgufError, match=rf"tensor 'packed' is stored as type {number}, .* it does BF16, F16, F32"):
        GgufFile(path)


def test_without_the_package_the_message_names_the_extra(monkeypatch, small_file):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for module in ("cpm_jax.checkpoints.gguf", "cpm_jax.checkpoints.gguf_file"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ConfigError, match=r"reading GGUF files needs gguf: pip install -e '\.\[gguf\]'"):
        open_source(small_file)
