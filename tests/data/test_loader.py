"""Any number of processes, restarts and workers gives the same batches; nothing is lost or read twice."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from cpm_jax.common.config import ConfigError
from cpm_jax.common.files import sha256
from cpm_jax.data.errors import DataError
from cpm_jax.data.loader import make_loader, make_validation_loader, open_datasets
from cpm_jax.data.manifest import Manifest, Shard, Split
from cpm_jax.data.mixture import Component, MixtureConfig, Stage, from_folders
from cpm_jax.data.records import PackedRecord, encode_record

SEQ_LEN = 8
SIZES = {"web": (13, 5), "code": (7, 3), "math": (4, 0)}


def write_dataset(folder, component: int, train: int, validation: int, shards: int = 2, tokenizer: str = "t"):
    """A dataset whose every record can be told from its first tokens: component, split and number."""
    folder.mkdir()
    splits = {}
    for number, (split, records) in enumerate((("train", train), ("validation", validation))):
        if not records:
            continue
        written = []
        for shard, part in enumerate(np.array_split(np.arange(records), shards)):
            path = folder / f"{split}-{shard:05d}-of-{shards:05d}.array_record"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for record in part:
                tokens = np.asarray([component, number, record, *range(3, SEQ_LEN + 1)], np.uint32)
                mask = np.ones(len(tokens), np.bool_)
                writer.write(encode_record(PackedRecord(tokens, np.asarray([0, 5], np.uint32), mask)))
            writer.close()
            size = path.stat().st_size
            written.append(Shard(path.name, sha256(path), size, len(part), len(part) * SEQ_LEN, 1, 1))
        splits[split] = Split(tuple(written))
    Manifest(
        seq_len=SEQ_LEN,
        format="text",
        tokenizer_sha256=tokenizer,
        vocab_size=32,
        splits=splits,
        rejects={},
        duplicates=0,
        truncated=0,
        sources={},
        arguments={},
    ).save(folder)


@pytest.fixture
def mixture(tmp_path):
    for component, (name, (train, validation)) in enumerate(SIZES.items()):
        write_dataset(tmp_path / name, component, train, validation)
    return MixtureConfig(
        components=tuple(Component(name=name, path=str(tmp_path / name)) for name in SIZES),
        stages=(Stage(start_step=0, weights=(0.6, 0.4, 0.0)), Stage(start_step=5, weights=(0.25, 0.25, 0.5))),
    )


def read(config, count, batch_size=8, **options):
    with make_loader(config, batch_size, **{"seed": 1, **options}) as loader:
        return [next(loader) for _ in range(count)]


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def examples(batches):
    """(component, record) of each example, in order."""
    return [tuple(row) for batch in batches for row in batch["tokens"][:, [0, 2]].tolist()]


def test_batches_are_as_documented(mixture):
    batch = read(mixture, 1)[0]
    shapes = {key: (array.dtype.name, array.shape) for key, array in batch.items()}
    assert shapes == {
        **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ("int32", (8, SEQ_LEN))),
        "loss_weights": ("float32", (8, SEQ_LEN)),
        "source_ids": ("int32", (8,)),
    }
    np.testing.assert_array_equal(batch["source_ids"], batch["tokens"][:, 0])
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    np.testing.assert_array_equal(batch["segment_ids"][0], [1, 1, 1, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 3, 4, 0, 1, 2])
    np.testing.assert_array_equal(batch["loss_weights"][0], [1, 1, 1, 1, 0, 1, 1, 1])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_read_slices_of_the_same_global_batches(mixture, process_count):
    parts = [read(mixture, 8, process_index=i, process_count=process_count) for i in range(process_count)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_equal(joined, read(mixture, 8))


@pytest.mark.parametrize("start_step", [1, 4, 5, 7])
def test_a_restart_goes_on_with_the_same_batches(mixture, start_step):
    assert_equal(read(mixture, 9 - start_step, start_step=start_step), read(mixture, 9)[start_step:])


def test_workers_do_not_change_batches(mixture):
    assert_equal(
        read(mixture, 5, num_workers=2, start_step=3, process_index=1, process_count=2),
        read(mixture, 5, start_step=3, process_index=1, process_count=2),
    )


def test_every_record_comes_once_per_epoch_also_across_stages(mixture):
    seen = examples(read(mixture, 20))
    for component, (records, _) in enumerate(SIZES.values()):
        order = [record for c, record in seen if c == component]
        epochs = [order[i : i + records] for i in range(0, len(order), records)]
        assert len(epochs) > 2
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(records))
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1]


def test_stages_change_at_their_step(mixture):
    batches = read(mixture, 10)
    assert all(2 not in batch["source_ids"] for batch in batches[:5])
    counts = np.bincount(np.concatenate([batch["source_ids"] for batch in batches[5:]]))
    np.testing.assert_array_equal(counts, [10, 10, 20])
    assert 2 in batches[5]["source_ids"]


def test_seed_changes_the_order_and_a_further_component_leaves_that_of_others(mixture):
    first = examples(read(mixture, 5))
    assert examples(read(mixture, 5, seed=2)) != first
    assert examples(read(mixture, 5)) == first
    fewer = dataclasses.replace(
        mixture, components=mixture.components[:2], stages=(Stage(start_step=0, weights=(0.6, 0.4)),)
    )
    assert examples(read(fewer, 5)) == first


def test_without_stages_components_mix_by_their_size(mixture):
    paths = [component.path for component in mixture.components]
    seen = examples(read(from_folders(paths), 3))
    assert sorted(seen) == [(c, r) for c, (records, _) in enumerate(SIZES.values()) for r in range(records)]


def test_mixing_by_size_leaves_no_small_component_out(tmp_path):
    write_dataset(tmp_path / "large", 0, 30_000, 0)
    write_dataset(tmp_path / "small", 1, 2, 0)
    batch = read(from_folders([str(tmp_path / "large"), str(tmp_path / "small")]), 1, batch_size=10_000)[0]
    assert np.bincount(batch["source_ids"]).tolist() == [9999, 1]


def test_opening_far_into_a_run_is_as_fast_as_at_its_beginning(mixture):
    begin = time.monotonic()
    far = examples(read(mixture, 1, start_step=10**9))
    assert time.monotonic() - begin < 60  # reading up to there would take hours
    assert len(far) == 8


@pytest.mark.parametrize(("batch_size", "process_count"), [(4, 1), (4, 2), (3, 1), (8, 4), (16, 2)])
def test_validation_is_one_ordered_pass_with_padding(mixture, batch_size, process_count):
    parts = []
    for index in range(process_count):
        with make_validation_loader(mixture, batch_size, process_index=index, process_count=process_count) as loader:
            parts.append(list(loader))
    assert {len(part) for part in parts} == {-(-8 // batch_size)}
    rows = [part[step] for step in range(len(parts[0])) for part in parts]
    whole = {key: np.concatenate([batch[key] for batch in rows]) for key in rows[0]}
    assert whole["tokens"][:8, :3].tolist() == [[0, 1, r] for r in range(5)] + [[1, 1, r] for r in range(3)]
    assert (whole["loss_weights"][:8].sum(axis=1) > 0).all()
    for key in ("loss_weights", "segment_ids", "source_ids"):
        assert not whole[key][8:].any()


def test_validation_pads_from_a_component_that_has_the_split(mixture):
    with make_validation_loader(dataclasses.replace(mixture, components=mixture.components[::-1]), 5) as loader:
        batches = list(loader)
    assert [batch["source_ids"].tolist() for batch in batches] == [[1, 1, 1, 2, 2], [2, 2, 2, 0, 0]]


def test_validation_with_workers(mixture):
    with make_validation_loader(mixture, 3, num_workers=2) as loader, make_validation_loader(mixture, 3) as other:
        assert_equal(list(loader), list(other))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_closed_loader_gives_nothing_more(mixture, num_workers):
    loader = make_loader(mixture, 8, seed=0, num_workers=num_workers)
    assert next(loader)
    loader.close()
    loader.close()
    assert list(loader) == []


def test_no_validation_split_is_an_error(mixture):
    with pytest.raises(DataError, match=r"no validation split in .*math: prepare with a validation_fraction"):
        make_validation_loader(dataclasses.replace(mixture, components=mixture.components[2:], stages=()), 4)


def shard_of(mixture, component):
    return min(mixture_path(mixture, component).glob("train-*"))


def mixture_path(mixture, component):
    return Path(mixture.components[component].path)


def test_a_cut_off_shard_is_named(mixture):
    shard = shard_of(mixture, 1)
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match=rf"{shard.name} has .* bytes"):
        make_loader(mixture, 8, seed=0)


def test_a_missing_shard_is_named(mixture):
    shard = shard_of(mixture, 1)
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name} is missing"):
        make_loader(mixture, 8, seed=0)


def test_a_shard_with_another_number_of_records_is_named(mixture):
    path = mixture_path(mixture, 0) / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["shards"][0]["records"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"train-00000-of-00002.array_record holds 7 records .* manifest says 8"):
        open_datasets(mixture)


def test_a_shard_of_garbage_of_the_right_size_is_named(mixture):
    shard = shard_of(mixture, 0)
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(DataError, match=rf"{shard.name} cannot be read"):
        open_datasets(mixture)


def test_a_record_damaged_in_place_is_an_error_naming_the_dataset(mixture):
    shard = shard_of(mixture, 0)
    content = bytearray(shard.read_bytes())
    # Behind the header of the file the first record's chunk begins; the footer that counts records stays whole.
    content[140:180] = bytes(x ^ 0xFF for x in content[140:180])
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"web: a record cannot be read .* damaged"):
        read(mixture, 5)


def test_components_must_share_tokenizer_and_length(tmp_path, mixture):
    write_dataset(tmp_path / "other", 3, 4, 0, tokenizer="u")
    with pytest.raises(DataError, match=r"web has a tokenizer of sha256 t but .*other has u"):
        open_datasets(from_folders([mixture.components[0].path, str(tmp_path / "other")]))
    path = tmp_path / "other" / "manifest.json"
    path.write_text(path.read_text().replace('"u"', '"t"').replace('"seq_len": 8', '"seq_len": 16'))
    with pytest.raises(DataError, match=r"web has seq_len 8 but .*other has 16"):
        open_datasets(from_folders([mixture.components[0].path, str(tmp_path / "other")]))


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"nothing is not a prepared dataset"):
        make_loader(from_folders(str(tmp_path / "nothing")), 8, seed=0)


def test_batch_size_must_suit_the_processes(mixture):
    with pytest.raises(ConfigError, match=r"batch_size = 8: must be a multiple of the number of processes, 3"):
        make_loader(mixture, 8, seed=0, process_count=3)
