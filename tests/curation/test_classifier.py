import dataclasses
import gzip
import json

import numpy as np
import pytest

from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.curation import readers
from cpm_jax.curation.classifier import ClassifierConfig, load_classifier, split_pools, train_classifier
from cpm_jax.curation.fasttext_classifier import FastTextConfig
from cpm_jax.curation.pools import Pool, PoolError, SetAside, SourceProgress, position, read_pools, read_usable
from tests.curation.test_fasttext_classifier import SMALL

SCORER = FastTextConfig(**SMALL)


@pytest.fixture(scope="module")
def pools(pool_files):
    return read_pools([pool_files["prose"]], [pool_files["code"]])


@pytest.fixture(scope="module")
def trained(pools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train_classifier(ClassifierConfig(scorer=SCORER), *pools, folder)


def test_tells_prose_from_code_it_has_not_seen(trained, pools):
    folder, result = trained
    assert result["average_precision"] > 0.9
    assert result["held_out"]["positive"] == round(0.1 * len(pools[0].documents))
    assert result["before_quantization"]["average_precision"] > 0.8  # chance is 0.61
    assert json.loads((folder / "classifier.json").read_text()) == result


def test_loads_what_it_trained(trained, pools):
    scorer, threshold = load_classifier(trained[0])
    split = split_pools(ClassifierConfig(scorer=SCORER), *pools)
    kept = scorer([d.text for d in split.held_out]) >= threshold
    assert threshold == 0.5
    assert kept[split.held_out_labels].mean() == pytest.approx(trained[1]["at_threshold"]["recall"])


def test_nothing_held_out_is_trained_on_and_the_order_of_reading_does_not_matter(pools):
    config = ClassifierConfig(scorer=SCORER)
    split = split_pools(config, *pools)
    assert not {d.text for d in split.held_out} & set(split.texts)
    backwards = [Pool(pool.name, pool.documents[::-1]) for pool in pools]
    again = split_pools(config, *backwards)
    assert again.texts == split.texts
    assert split.labels.mean() == 0.5  # balanced
    assert split_pools(ClassifierConfig(scorer=SCORER, balance=False), *pools).labels.mean() != 0.5


def test_positions_are_uniform():
    found = np.array([position(f"text {i}", 0) for i in range(4000)])
    np.testing.assert_allclose(np.histogram(found, 4, (0, 1))[0] / 4000, 0.25, atol=0.03)


def test_thresholds_for_a_keep_rate_and_a_precision(pools, tmp_path):
    rate = train_classifier(ClassifierConfig(scorer=SCORER, keep_rate=0.2), *pools, tmp_path / "rate")
    assert rate["at_threshold"]["keep_rate_of_negatives"] == pytest.approx(0.2, abs=0.03)
    sure = train_classifier(ClassifierConfig(scorer=SCORER, precision=0.9), *pools, tmp_path / "sure")
    assert sure["at_threshold"]["precision"] >= 0.9
    with pytest.raises(ConfigError, match=r"keep_rate = 0\.1 and precision = 0\.9"):
        ClassifierConfig(keep_rate=0.1, precision=0.9)


def test_what_cannot_be_used_is_counted(tmp_path, pool_texts):
    lines = [json.dumps({"text": text}).encode() for text in pool_texts["prose"][:30]]
    lines += [lines[0], b'{"text": "na\xefve text"}', b'{"text": " "}', b'{"txt": "x"}', b'{"text": "\\ud800"}', b"{"]
    lines.append(json.dumps({"text": pool_texts["code"][0]}).encode())
    (tmp_path / "pos.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "neg.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in pool_texts["code"][:30]))
    positive, negative = read_pools([str(tmp_path / "pos.jsonl")], [str(tmp_path / "neg.jsonl")])
    assert positive.set_aside.rejects == {
        "duplicate": 1,
        "invalid UTF-8": 1,
        "empty text": 1,
        "missing field": 1,
        "invalid unicode": 1,
        "malformed JSON": 1,
        "in both pools": 1,
    }
    assert (len(positive.documents), len(negative.documents)) == (30, 29)


def cut_off(folder, texts):
    """A compressed file of these texts that breaks off after most of them."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-30])
    return str(folder / "cut.jsonl.gz")


@pytest.mark.parametrize("spooled", [1, 1 << 26])
def test_nothing_of_a_file_that_breaks_off_is_used_and_it_is_named(
    tmp_path, pool_files, pool_texts, monkeypatch, spooled
):
    monkeypatch.setattr(readers, "_SPOOLED_BYTES", spooled)
    cut = cut_off(tmp_path, [f"{text} again" for text in pool_texts["code"]])
    positive, negative = read_pools([pool_files["prose"]], [pool_files["code"], cut])
    assert [document.text for document in negative.documents] == pool_texts["code"]
    (damaged,) = negative.set_aside.quarantined
    assert (damaged.source, damaged.reason) == (cut, "truncated")
    assert damaged.id.startswith("cut.jsonl.gz:")
    assert not negative.set_aside.rejects
    assert not positive.set_aside.quarantined
    result = train_classifier(ClassifierConfig(scorer=SCORER), positive, negative, tmp_path / "classifier")
    assert result["pools"]["negative"]["quarantined"] == [dataclasses.asdict(damaged)]
    with pytest.raises(
        PoolError, match=r"0 usable documents.*set aside: none; damaged: cut\.jsonl\.gz:\d+ \(truncated\)"
    ):
        read_pools([cut], [pool_files["code"]])


def test_documents_are_told_apart_by_their_texts_not_by_their_ids(tmp_path, pool_texts):
    rows = [{"text": text, "id": "the same"} for text in pool_texts["prose"][:30]]
    rows += [{"text": pool_texts["prose"][0], "id": "another"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"text": text, "id": "the same"} for text in pool_texts["code"][:30]]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pools = read_pools([str(tmp_path / "a.jsonl")], [str(tmp_path / "b.jsonl")])
    assert [len(pool.documents) for pool in pools] == [30, 30]
    assert [pool.set_aside.rejects for pool in pools] == [{"duplicate": 1}, {}]
    split = split_pools(ClassifierConfig(scorer=SCORER), *pools)
    assert len({*split.texts, *(document.text for document in split.held_out)}) == 60


@pytest.mark.parametrize(("count", "said"), [(3, "3 usable documents"), (0, "0 usable documents")])
def test_a_pool_that_is_too_small_is_an_error(tmp_path, pool_files, count, said):
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(count)))
    with pytest.raises(PoolError, match=rf"the negative pool \(.*few\.jsonl\) has {said}, needed are at least 20"):
        read_pools([pool_files["prose"]], [str(file)])


def test_one_class_only_is_an_error(pool_files):
    with pytest.raises(PoolError, match=r"the positive pool \(no source\) has 0 usable documents"):
        read_pools([], [pool_files["code"]])


def test_max_documents_chooses_by_content(pool_files):
    few, _ = read_pools([pool_files["prose"]], [pool_files["code"]], max_documents=40)
    assert len(few.documents) == 40


def test_a_folder_without_a_classifier_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no classifier whose training has ended"):
        load_classifier(tmp_path)


def test_the_position_of_reading_goes_by_texts_in_plain_files_and_by_whole_files_else(tmp_path):
    lines = "".join(json.dumps({"text": "x" * 988}) + "\n" for _ in range(4)).encode()  # 1,001 bytes each
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    size = (tmp_path / "b.jsonl.gz").stat().st_size
    progress = SourceProgress()
    documents = read_usable([str(tmp_path)], "text", SetAside(), progress)
    assert (progress.unit, progress.total, progress.done) == ("B", 4004 + size, 0)
    seen = [progress.done for _ in documents]
    assert seen == [988, 2 * 988, 3 * 988, 4 * 988, 4004, 4004, 4004, 4004]
    assert progress.done == progress.total
