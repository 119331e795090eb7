"""How the documents of a quickstart are divided before it trains, and which checkpoint is kept to verify from."""

import dataclasses
import json

import pytest

from cpm_jax.checkpoints.manager import CheckpointConfig
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.document import Document
from cpm_jax.curation.pipeline import PipelineConfig
from cpm_jax.curation.writers import load_rows
from cpm_jax.data.errors import DataError
from cpm_jax.data.prepare import PrepareConfig
from cpm_jax.training.loop import TrainConfig
from cpm_jax.training.schedules import wsd
from experiments import quickstart_curation
from experiments.curate import CurateConfig
from experiments.quickstart import QuickstartConfig
from experiments.quickstart_curation import keep_stable_checkpoint, place, run_curation, sample_end


class DropOdd:
    def __call__(self, document):
        return (
            document.drop("odd") if "odd" in document.text else dataclasses.replace(document, text=document.text + "!")
        )


@pytest.fixture
def config(tmp_path, tiny_config):
    source = tmp_path / "texts.jsonl"
    rows = [{"id": f"d{n}", "text": f"{'odd' if n % 2 else 'even'} document {n} " * 20} for n in range(200)]
    rows.append({"id": "copy", "text": rows[0]["text"]})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    pipeline = PipelineConfig(str(source), (DropOdd(),), DedupConfig(bands=0), num_workers=0)
    return QuickstartConfig(
        prepare=PrepareConfig(sources=str(source), seq_len=32, vocab_size=300, validation_fraction=0.2),
        model=dataclasses.replace(tiny_config, vocab_size=400),
        schedule=wsd(peak_lr=0.01, train_steps=40, warmup_steps=4, decay_steps=10),
        train=TrainConfig(steps=40, batch_size=1),
        prompt_tokens=8,
        sample_tokens=8,
        curate=True,
        verify=True,
        curation=CurateConfig(pipeline),
        verify_steps=4,
    )


def names(path):
    return {row["id"] for row in load_rows(path)}


def test_what_is_held_out_is_in_no_training_text_and_no_candidate(config, tmp_path):
    found = run_curation(dataclasses.replace(config, verify_steps=16), tmp_path)  # samples with some of each kind
    assert found["documents"] == 100
    assert found["drops"] == {"exact duplicate": 1, "odd": 100}
    assert found["rejects"] == {"malformed JSON": 1}
    folder = tmp_path / "divided"
    held_out = {json.loads(line)["id"] for line in (folder / "held_out.jsonl").open()}
    train, curated, raw = (names(folder / f"{name}.jsonl.zst") for name in ("train", "curated", "raw"))
    assert {len(held_out), len(train)} == {found["held_out"], found["train"]}
    assert held_out | train == {f"d{n}" for n in range(0, 200, 2)}
    assert not held_out & (train | curated | raw)
    assert curated < train
    assert curated < raw
    kept_of_raw = {name for name in raw if name != "copy" and int(name[1:]) % 2 == 0}
    assert kept_of_raw == curated  # where both have a document, both samples do
    assert raw - kept_of_raw
    texts = {row["id"]: row["text"] for name in ("curated", "raw") for row in load_rows(folder / f"{name}.jsonl.zst")}
    assert any(not texts[name].endswith("!") for name in raw)


def test_a_sample_has_about_the_bytes_that_are_asked_for(config, tmp_path):
    documents = [Document("x" * 100, str(n), "s") for n in range(100)]
    end = sample_end(documents, 1000)
    assert sum(place(document) < end for document in documents) == 10
    assert sample_end(documents, 10**6) == 1.0


def test_a_document_has_its_place_wherever_its_source_lies():
    at = {place(Document("x", "a.txt", f"{folder}/texts")) for folder in ("/data", "/elsewhere", "s3://bucket")}
    assert len(at) == 1
    assert place(Document("x", "b.txt", "/data/texts")) not in at


def test_too_little_to_hold_out_is_said(config, tmp_path):
    few = dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, validation_fraction=0.001))
    with pytest.raises(DataError, match=r"validation_fraction = 0\.001 .* needed are at least 5"):
        run_curation(few, tmp_path)


def test_a_missing_extra_is_said_before_anything_is_read(config, tmp_path, monkeypatch):
    def missing(module):
        raise DataError(f"{module} is needed here: pip install 'cpm_jax[curate]' (no)")

    monkeypatch.setattr(quickstart_curation, "import_extra", missing)
    with pytest.raises(DataError, match="pip install 'cpm_jax"):
        run_curation(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "every", "saved", "kept"),
    [(2100, 40, 525, 262, 262, 1572), (40, 4, 10, 5, 5, 30), (10, 2, 2, 20, 8, 8), (10, 7, 2, 6, 8, 8)],
)
def test_a_checkpoint_of_the_stable_phase_is_kept(steps, warmup, decay, every, saved, kept):
    @dataclasses.dataclass
    class Job:
        schedule: object
        checkpoint: CheckpointConfig

    job = Job(wsd(0.01, steps, warmup, decay), CheckpointConfig(every=every))
    checkpoint, step = keep_stable_checkpoint(job)
    assert (checkpoint.every, checkpoint.keep_every, step) == (saved, kept, kept)
    assert warmup <= step <= steps - decay
    assert step % checkpoint.every == 0
