import numpy as np
import pytest

from cpm_jax.common.metrics import JsonlWriter, make_metric_writer, read_metrics


def test_floats_come_back_exactly(tmp_path):
    value = float(np.float32(0.1))
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"loss": value})
    writer.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": value}]


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    for step in range(1, 6):
        writer.write(step, {"loss": step / 2})
    writer.write(3, {"eval/loss": 9.0})
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    writer = JsonlWriter(path, resume_step=3)
    writer.write(4, {"loss": 2.5})
    writer.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 3, 4]
    assert read_metrics(path)[-1]["loss"] == 2.5


def test_new_run_drops_everything(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    JsonlWriter(path).close()
    assert read_metrics(path) == []


def test_non_finite_is_null(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"loss": float("nan"), "grad_norm": float("inf")})
    writer.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": None, "grad_norm": None}]
    assert "NaN" not in (tmp_path / "m.jsonl").read_text()


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n[]\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_only_process_0_writes(tmp_path):
    writer = make_metric_writer(tmp_path / "other", process_index=1)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "other").exists()
    writer = make_metric_writer(tmp_path / "first")
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert read_metrics(tmp_path / "first" / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    (events,) = (tmp_path / "first" / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
