"""TFDS data sets in ArrayRecord format are written and read without TensorFlow."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cpm_jax.data.errors import DataError
from cpm_jax.data.sources import Reject, read_documents

TEXTS = [f"text {i} é 数" for i in range(6)]


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """Six texts."""

    # TFDS looks for files beside the module; this one is part of a namespace package, for which it would need
    # importlib_resources, a package that it does not list among its requirements.
    __module__ = "__main__"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
        return {"train": self._generate_examples(TEXTS[:4]), "test": self._generate_examples(TEXTS[4:])}

    def _generate_examples(self, texts):
        for i, text in enumerate(texts):
            yield i, {"text": text, "label": i}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    TinyTexts(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def read(source, data_dir, **options):
    return list(read_documents(source, tfds_data_dir=data_dir, **options))


def test_splits(data_dir):
    items = read("tfds:tiny_texts", data_dir)
    assert sorted(item.text for item in items) == TEXTS[:4]
    assert [item.id for item in items] == [f"tiny_texts:train:{i}" for i in (1, 2, 3, 4)]
    assert sorted(item.text for item in read("tfds:tiny_texts:test", data_dir)) == TEXTS[4:]
    assert len(read("tfds:tiny_texts:train[:50%]", data_dir)) == 2
    assert "tensorflow" not in sys.modules


def test_rejects(data_dir):
    assert [item.reason for item in read("tfds:tiny_texts:test", data_dir, text_field="label")] == [
        "field is not text"
    ] * 2
    assert [item.reason for item in read("tfds:tiny_texts:test", data_dir, text_field="body")] == ["missing field"] * 2


def test_unknown_names(data_dir):
    for source in ("tfds:no_such_set", "tfds:tiny_texts:validation"):
        with pytest.raises(DataError, match=f"{source}: cannot open split"):
            read(source, data_dir)


def test_truncated_shard(data_dir):
    (path,) = Path(data_dir).rglob("*-train.array_record*")
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        items = read("tfds:tiny_texts", data_dir)
        assert [type(item) for item in items] == [Reject] * 4
    finally:
        path.write_bytes(whole)
