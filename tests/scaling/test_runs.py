"""runs.jsonl: what is written comes back, whatever happened to the writer, and bad lines are named."""

import dataclasses
import json
import multiprocessing

import pytest

from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import count_params, train_flops_per_token
from cpm_jax.scaling.runs import (
    Run,
    append_run,
    check_equal_tokens,
    finished,
    merge_runs,
    read_runs,
    run_id,
    summarise_run,
    write_runs,
)
from cpm_jax.training.schedules import wsd

RUN = Run(
    id="a",
    num_params=1000,
    num_embedding_params=500,
    d_model=32,
    num_layers=2,
    tokens=4096,
    flops=6e3 * 4096,
    batch_tokens=512,
    learning_rate=0.01,
    seed=0,
    loss=3.25,
    config={"train.seed": 0, "shape": "sqrt"},
)
MODEL = ModelConfig(d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=64, vocab_size=128)


def with_id(number: int) -> Run:
    return dataclasses.replace(RUN, id=f"run{number}")


def append_some(path, start):
    for number in range(start, start + 20):
        append_run(path, with_id(number))


def test_what_is_written_comes_back(tmp_path):
    runs = [RUN, dataclasses.replace(RUN, id="b", loss=None, status="diverged", bits_per_byte=None)]
    write_runs(tmp_path / "runs.jsonl", runs)
    append_run(tmp_path / "runs.jsonl", with_id(7))
    assert read_runs(tmp_path / "runs.jsonl") == [*runs, with_id(7)]


def test_the_last_line_of_an_id_counts(tmp_path):
    path = tmp_path / "runs.jsonl"
    write_runs(path, [dataclasses.replace(RUN, loss=None, status="stopped"), with_id(1), RUN])
    assert read_runs(path) == [with_id(1), RUN]


def test_a_line_cut_short_is_left_out_and_repaired(tmp_path):
    path = tmp_path / "runs.jsonl"
    write_runs(path, [RUN, with_id(1)])
    path.write_text(path.read_text()[:-30])
    assert read_runs(path) == [RUN]
    append_run(path, with_id(2))
    assert read_runs(path) == [RUN, with_id(2)]


def test_lines_without_their_end_and_blank_ones_lose_no_run(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(json.dumps(dataclasses.asdict(run)) for run in (RUN, with_id(1))) + "\n\n")
    assert read_runs(path) == [RUN, with_id(1)]
    path.write_text(path.read_text().rstrip("\n"))
    assert read_runs(path) == [RUN, with_id(1)]
    append_run(path, with_id(2))
    assert read_runs(path) == [RUN, with_id(1), with_id(2)]


def test_processes_append_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=append_some, args=(tmp_path / "runs.jsonl", 20 * n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {run.id for run in read_runs(tmp_path / "runs.jsonl")} == {f"run{n}" for n in range(60)}


def test_bad_lines_and_files_are_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    with pytest.raises(InputError, match="no such file"):
        read_runs(path)
    with pytest.raises(InputError, match=r"not a runs\.jsonl: .*Is a directory"):
        read_runs(tmp_path)
    path.write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(InputError, match=r"not a runs\.jsonl: 'utf-8' codec"):
        read_runs(path)
    good = json.dumps(dataclasses.asdict(RUN))
    for bad, message in [
        ("[1]", "line 2: not a run"),
        ("{", "line 2"),
        (json.dumps(dataclasses.asdict(RUN) | {"loss": None}), r"line 2.*Run\.loss = None"),
        (json.dumps(dataclasses.asdict(RUN) | {"num_params": -3}), r"line 2.*Run\.num_params = -3"),
        (json.dumps(dataclasses.asdict(RUN) | {"colour": 1}), r"line 2.*Run\.colour"),
    ]:
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(InputError, match=message):
            read_runs(path)


def test_a_loss_of_nan_is_none_and_no_run_that_is_done(tmp_path):
    path = tmp_path / "runs.jsonl"
    line = json.dumps(dataclasses.asdict(RUN) | {"loss": float("nan"), "status": "diverged"})
    path.write_text(line + "\n")
    (run,) = read_runs(path)
    assert run.loss is None
    selection = finished([run, with_id(1)])
    assert selection.runs == [with_id(1)]
    assert selection.left_out == {"diverged": ["a"]}
    path.write_text(line.replace("diverged", "done") + "\n")
    with pytest.raises(InputError, match="a run that is done has a finite"):
        read_runs(path)


def test_ids_are_those_of_the_content():
    assert run_id({"a": 1, "b": {"c": 2.0, "d": [1]}}) == run_id({"b": {"d": [1], "c": 2.0}, "a": 1})
    assert run_id({"a": 1}) != run_id({"a": 2})
    assert len(run_id({})) == 16
    with pytest.raises(ConfigError, match="finite JSON"):
        run_id({"a": float("nan")})


def test_merging_keeps_what_is_done():
    stopped = dataclasses.replace(RUN, loss=None, status="stopped")
    assert merge_runs([RUN], [stopped, with_id(1)]) == [RUN, with_id(1)]
    assert merge_runs([stopped], [RUN]) == [RUN]


def test_unequal_tokens_are_named():
    check_equal_tokens([RUN, dataclasses.replace(with_id(1), tokens=RUN.tokens + 512)], "x")
    with pytest.raises(InputError, match="the sweep compares runs of unequal token counts: a has 4096, run1 has 8192"):
        check_equal_tokens([dataclasses.replace(with_id(1), tokens=8192), RUN], "the sweep")


def summarise(metrics, **changes):
    return summarise_run(
        metrics,
        **{
            "id": "x",
            "model": MODEL,
            "schedule": wsd(0.02, 100, 10, 10),
            "seq_len": 64,
            "batch_size": 4,
            "steps": 100,
            "seed": 3,
            "config": {"lr": 0.02},
        }
        | changes,
    )


def test_the_line_of_a_training_is_made_from_its_metrics():
    rows = [
        {"step": 50, "loss": 3.0, "seconds_per_step": 0.5},
        {"step": 50, "eval/loss": 3.1},
        {"step": 100, "loss": 2.0, "seconds_per_step": 0.3},
        {"step": 100, "eval/loss": 2.5},
    ]
    run = summarise(rows)
    counts = count_params(MODEL)
    assert (run.num_params, run.num_embedding_params) == (counts.non_embedding, counts.embedding)
    assert (run.tokens, run.batch_tokens) == (100 * 4 * 64, 256)
    assert run.flops == 25600 * train_flops_per_token(MODEL, 64)
    assert (run.loss, run.learning_rate, run.status, run.seed) == (2.5, 0.02, "done", 3)
    assert run.seconds == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("rows", "error", "status"),
    [
        ([{"step": 30, "loss": 3.0}], False, "stopped"),
        ([{"step": 30, "loss": 3.0}], True, "failed"),
        ([{"step": 30, "loss": None}], True, "diverged"),
        ([{"step": 100, "loss": 3.0}, {"step": 100, "eval/loss": None}], False, "diverged"),
        ([{"step": 100, "loss": 3.0}], False, "failed"),
        ([], True, "failed"),
    ],
)
def test_runs_that_did_not_end_well_say_so(rows, error, status):
    run = summarise(rows, error=error)
    assert run.status == status
    assert run.loss is None
