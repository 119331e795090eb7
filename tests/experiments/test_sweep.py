"""The verbs `sweep` and `worker`, on real trainings that take a second each: kills, launchers, the report, errors."""

import ast
import contextlib
import dataclasses
import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.common.files import write_text
from cpm_jax.scaling import study as studies
from cpm_jax.scaling.runs import Run, read_runs, write_runs
from cpm_jax.scaling.storage import StorageError
from cpm_jax.scaling.study import StudyConfig
from experiments import run, sweep, sweep_report, sweep_training, sweep_trials, worker
from tests.experiments.conftest import ROWS, SEQ_LEN, STEPS
from tests.scaling import postgresql_server, slurm_cluster, test_study


def read(workdir):
    """The study of a sweep, its trials as the report sees them, and the page."""
    config = sweep.read_settings((workdir / sweep.SETTINGS_FILE).read_text())
    study, _ = sweep.open_sweep(config, config.base(), workdir)
    view = sweep_report.View(config, config.base(), study, 0.0)
    view.refresh()
    page = workdir / sweep_report.REPORT_FILE
    return study, view.trials, page.read_text() if page.exists() else ""


def set_up(config, workdir):
    """What `sweep` does before it starts workers."""
    write_text(workdir / sweep.SETTINGS_FILE, sweep._settings_text(config))
    study, _ = sweep.open_sweep(config, config.base(), workdir)
    studies.enqueue_grid(study, config.base().space, None)
    return study


def start_worker(workdir) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.run", "worker", f"--workdir={workdir}"]
    with (workdir / "worker.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def wait_for(condition, seconds=900):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def last_checkpoint(workdir) -> int:
    """Its step; 0 without one. One that is being written has a longer name."""
    return max((int(p.name) for p in workdir.glob("trials/*/checkpoints/*") if p.name.isdigit()), default=0)


def curve(folder) -> list[tuple[int, float]]:
    """Steps and losses, training and held-out."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows for name in ("loss", "eval/loss") if name in row]


def alive(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_sweep_ends_with_report_recommendation_and_runs(make_sweep, tmp_path, capsys):
    config = make_sweep("product(values('PEAK_LR', 0.003, 0.03), values('SEED', 0, 1))", workers=2)
    sweep.run(config, tmp_path)
    said = capsys.readouterr().out
    assert "held-out loss" in said
    assert "Wrong by one step: PEAK_LR" in said
    assert "over 2 seeds" in said
    _, trials, page = read(tmp_path)
    assert [t.status for t in trials] == ["done"] * 4
    lines = read_runs(tmp_path / "runs.jsonl")
    assert {line.id: line.loss for line in lines} == {t.id: t.loss for t in trials}
    assert {line.tokens for line in lines} == {STEPS * ROWS * SEQ_LEN}
    assert {line.config["decay_share"] for line in lines} == {10 / STEPS}
    assert {line.flops for line in lines} == {t.flops for t in trials} == {t.planned_flops for t in trials}
    for title in ("Recommendation", "Curves", "Parallel coordinates", "Importance", "Trials"):
        assert f"<h2>{title}</h2>" in page
    assert "http-equiv" not in page  # it is finished, and no longer loads itself again
    assert "src=" not in page
    assert 'href="http' not in page
    assert all(t.cpu_seconds > 0.5 for t in trials)

    began = time.monotonic()
    other = tmp_path / "other"
    sweep.run(dataclasses.replace(config, reuse=(str(tmp_path),), workers=1), other)  # nothing is left to train
    assert not (other / "trials").exists()
    assert {t.id: t.loss for t in read(other)[1]} == {t.id: t.loss for t in trials}
    assert read_runs(other / "runs.jsonl") == lines
    assert json.loads((other / "summary.json").read_text())["bill"]["flops"] == 0
    assert time.monotonic() - began < 120


@pytest.mark.slow
def test_a_trial_goes_on_once_after_a_stop_and_a_kill_and_ends_as_if_there_had_been_none(make_sweep, tmp_path):
    slow = {"TRAIN_STEPS": 1200, "DECAY_STEPS": 100, "EVAL_EVERY": 200, "CHECKPOINT_EVERY": 50, "LOG_EVERY": 5}
    config = make_sweep("values('PEAK_LR', 0.01)", slow)
    study = set_up(config, tmp_path)
    first = start_worker(tmp_path)
    wait_for(lambda: any(p.stat().st_size for p in tmp_path.glob("trials/*/metrics.jsonl")))
    first.send_signal(signal.SIGTERM)
    assert first.wait(600) == exit_codes.PREEMPTED
    assert [t.state.name for t in study.get_trials()] == ["FAIL", "WAITING"]
    stopped_at = last_checkpoint(tmp_path)
    assert stopped_at > 0

    second = start_worker(tmp_path)
    wait_for(lambda: last_checkpoint(tmp_path) > stopped_at)
    training = children(second.pid)
    second.kill()
    second.wait()
    wait_for(lambda: not any(map(alive, training)), 60)  # a training does not outlive its worker
    (folder,) = tmp_path.glob("trials/*")
    assert sweep_trials.read_trial(folder)["status"] == "running"
    killed_at = last_checkpoint(tmp_path)
    assert killed_at < 1200

    rivals = [start_worker(tmp_path) for _ in range(2)]
    assert [rival.wait(900) for rival in rivals] == [0, 0]
    trials = study.get_trials()
    assert [t.state.name for t in trials] == ["FAIL", "FAIL", "COMPLETE"]
    assert trials[2].system_attrs["retry_history"] == [0, 1]
    log = (folder / sweep_trials.LOG_FILE).read_text()
    assert log.count(": starting") == 1
    assert re.findall(r"going on from step (\d+)", log) == [str(stopped_at), str(killed_at)]
    _, seen, _ = read(tmp_path)
    assert [t.status for t in seen] == ["retried", "retried", "done"]
    assert len(sweep_trials.read_trial(folder)["attempts"]) == 3

    undisturbed = tmp_path / "undisturbed"
    base = config.base()
    job = sweep_trials.resolve(base, {"PEAK_LR": 0.01})
    assert run.main(sweep_trials.pretrain_arguments(base.gin_files, job.flags, undisturbed)) == 0
    assert curve(folder) == curve(undisturbed)
    assert curve(folder)[-1] == (1200, trials[2].value)


@pytest.mark.slow
def test_what_diverges_fails_or_is_pruned_is_marked(make_sweep, tmp_path):
    config = make_sweep(
        "values('PEAK_LR', 0.03, 1e-6, 1e30)",
        {"EVAL_EVERY": 100, "TRAIN_STEPS": 2000, "DECAY_STEPS": 20, "CHECKPOINT_EVERY": 100, "LOG_EVERY": 20},
        study=StudyConfig(pruner="asha", min_share=0.05, reduction_factor=2),
    )
    sweep.run(config, tmp_path)
    _, trials, page = read(tmp_path)
    status = {t.bindings["PEAK_LR"]: t.status for t in trials}
    assert status == {0.03: "done", 1e-6: "pruned", 1e30: "diverged"}
    assert "Failures and marks" in page
    assert "not finite" in page
    pruned = next(t for t in trials if t.status == "pruned")
    assert 0 < pruned.tokens < 2000 * ROWS * SEQ_LEN
    assert list(sweep_trials.trial_folder(tmp_path, pruned.id).glob("checkpoints/[0-9]*"))  # it may be promoted
    assert {line.status for line in read_runs(tmp_path / "runs.jsonl")} == {"done", "stopped", "diverged"}


@pytest.mark.slow
def test_trials_of_one_program_are_those_that_are_trained_alone(make_sweep, tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    space = "product(table([{'D_FF': 64}, {'D_FF': 96}]), values('PEAK_LR', 0.001, 0.002, 1e15))"
    sweep.run(make_sweep(space, trials_per_program=4), together)
    _, trials, _ = read(together)
    assert [t.status for t in trials] == ["done", "done", "diverged"] * 2
    logs = [(sweep_trials.trial_folder(together, t.id) / "log.txt").read_text() for t in trials]
    assert all("3 trials in one program" in log for log in logs)  # the fourth has other sizes
    sweep.run(make_sweep("values('PEAK_LR', 0.001, 0.002)"), alone)
    _, same, _ = read(alone)
    assert [t.id for t in same] == [t.id for t in trials[:2]]
    for ours, theirs in zip(trials[:2], same, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.curve == [(tokens, pytest.approx(loss, rel=1e-5)) for tokens, loss in theirs.curve]
        assert ours.cpu_seconds > 0
    folder = sweep_trials.trial_folder(together, trials[0].id)
    assert last_checkpoint(together) == STEPS
    assert run.main(["pretrain", f"--workdir={folder}"]) == exit_codes.OK  # an ordinary run, which is done
    assert (folder / "report.html").exists()


SWEEP = """
from pathlib import Path; from experiments import sweep
sweep.run(sweep.read_settings(Path({0!r}, sweep.SETTINGS_FILE).read_text()), Path({0!r}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ended", ["worker, SIGTERM", "worker, SIGKILL", "sweep, SIGKILL"])
def test_a_program_that_is_stopped_or_killed_is_ended_by_trials_alone(make_sweep, tmp_path, ended):
    config = make_sweep("values('SEED', 0, 1)", bindings={"TRAIN_STEPS": 100}, trials_per_program=2, grace_seconds=3)
    study = set_up(config, tmp_path)
    if ended.startswith("sweep"):
        process = subprocess.Popen([sys.executable, "-c", SWEEP.format(str(tmp_path))])
    else:
        process = start_worker(tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("trials/*/checkpoints/10"))) == 2)
    family = [pid for child in children(process.pid) for pid in (child, *children(child))]
    process.send_signal(signal.SIGTERM if ended.endswith("SIGTERM") else signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(alive(pid) for pid in family))  # they end with what started them
    begun = last_checkpoint(tmp_path)
    assert 0 < begun < 100
    worker.run(worker.WorkerConfig(), tmp_path)
    _, trials, _ = read(tmp_path)
    done = [t for t in trials if t.status == "done"]
    assert len(done) == 2
    assert len(study.get_trials()) == 4
    for trial in done:
        folder = sweep_trials.trial_folder(tmp_path, trial.id)
        assert "going on from step" in (folder / "log.txt").read_text()
        assert [step for step, _ in curve(folder)] == sorted(step for step, _ in curve(folder))


@pytest.mark.slow
def test_submitit_starts_workers(make_sweep, tmp_path):
    sweep.run(make_sweep("values('PEAK_LR', 0.01)", launcher="local"), tmp_path / "local")
    reuse = (str(tmp_path / "local"),)
    sweep.run(make_sweep("values('PEAK_LR', 0.01)", launcher="debug", reuse=reuse), tmp_path / "debug")
    assert [t.status for name in ("local", "debug") for t in read(tmp_path / name)[1]] == ["done", "done"]
    assert list((tmp_path / "local" / "workers").glob("*_log.out"))


@pytest.mark.slow
def test_slurm_starts_workers(make_sweep, tmp_path, monkeypatch):
    with slurm_cluster.cluster(tmp_path / "slurm") as environment:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, environment[name])
        parameters = {"timeout_min": 10, "slurm_partition": "all"}
        sweep.run(make_sweep(launcher="slurm", workers=2, slurm=parameters), tmp_path / "sweep")
    assert [t.status for t in read(tmp_path / "sweep")[1]] == ["done", "done"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "values('PEEK_LR', 0.01)"}, r"no gin file uses the macro PEEK_LR; did you mean PEAK_LR"),
        ({"space": "values('wsd.peek_lr', 0.01)"}, "has no parameter 'peek_lr'; did you mean peak_lr"),
        ({"space": " "}, "space: empty"),
        ({"space": "values('PEAK_LR')"}, "has no values"),
        ({"space": "values('EVAL_EVERY', 0)"}, "eval_every = 0: trials are compared by their held-out loss"),
        ({"space": "log_uniform('PEAK_LR', 0.1, 1)"}, "PEAK_LR is a range"),
        ({"group_by": "D_MODLE"}, "group_by = 'D_MODLE': accepted is '' or what the space binds: PEAK_LR"),
        ({"grace_seconds": 1}, "grace_seconds = 1: must be at least twice"),
        (
            {"trials_per_program": 2, "study": StudyConfig(pruner="asha")},
            "trials_per_program = 2: a trial that the pruner 'asha' ends would go on",
        ),
        (
            {"space": "values('BATCH_SIZE', 2, 4)", "study": StudyConfig(pruner="asha")},
            "unequal tokens .3840, 7680., which asha would compare",
        ),
        (
            {"space": "values('BATCH_SIZE', 2, 4)", "study": StudyConfig(sampler="tpe", num_trials=2)},
            "unequal tokens .3840, 7680., which tpe would compare",
        ),
        (
            {
                "space": "zip(values('BATCH_SIZE', 2, 4), values('TRAIN_STEPS', 60, 30))",
                "study": StudyConfig(pruner="hyperband"),
            },
            "evaluated at different numbers of tokens, which the pruner 'hyperband' would compare",
        ),
    ],
)
def test_what_cannot_work_is_named_before_anything_is_trained(make_sweep, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        sweep.run(make_sweep(**settings), tmp_path)
    assert not (tmp_path / "trials").exists()


def test_a_database_that_is_locked_or_dead_or_none_is_named(make_sweep, tmp_path):
    set_up(make_sweep(), tmp_path)
    config = make_sweep(patience_seconds=0.2)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match=r"study\.db: locked: another process"):
            sweep.run(config, tmp_path)
        with pytest.raises(StorageError, match=r"study\.db: locked: another process"):
            worker.Worker(config, tmp_path, lambda: False)
    dead = "postgresql://me:secret@127.0.0.1:1/none"
    with pytest.raises(StorageError, match=r"me:\*\*\*@127.0.0.1:1/none: cannot be used: .*refused"):
        sweep.run(dataclasses.replace(config, storage=dead), tmp_path)
    with pytest.raises(StorageError, match="storage = 'somewhere': accepted is"):
        sweep.run(dataclasses.replace(config, storage="somewhere"), tmp_path)


def test_a_study_of_another_space_or_base_is_refused(make_sweep, tmp_path):
    set_up(make_sweep(), tmp_path)
    with pytest.raises(
        ConfigError, match=r"another space: PEAK_LR: \[0.01, 0.03\] then, \[0.5\] now.*--workdir or NAME"
    ):
        sweep.run(make_sweep("values('PEAK_LR', 0.5)"), tmp_path)
    with pytest.raises(ConfigError, match="another space: base TRAIN_STEPS: '30' then, '60' now"):
        sweep.run(make_sweep(bindings={"TRAIN_STEPS": 60}), tmp_path)


@pytest.fixture
def train_at_once(monkeypatch):
    """Trainings that take no time, whose loss is what `loss` gives for their bindings."""

    def train_at_once(loss):
        def train(base, jobs, workdir, hooks, max_restarts):
            (job,), (hooks,) = jobs, hooks
            final = loss(job.bindings)
            for part, tokens in enumerate(job.evaluated_at[:-1]):
                hooks.report(tokens, final + 1 / (1 + part))
            hooks.report(job.tokens, final)
            progress = {"tokens": job.tokens, "seconds": 2.0, "cpu_seconds": 3.6}
            return [sweep_training.Outcome("done", final, progress=progress)]

        monkeypatch.setattr(sweep_training, "train_trials", train)

    return train_at_once


def test_trials_of_unequal_tokens_are_marked_and_not_compared(make_sweep, tmp_path, train_at_once, capsys):
    train_at_once(lambda bindings: 3.0 - 0.001 * bindings["TRAIN_STEPS"])
    space = "chain(product(pin('TRAIN_STEPS', 30), values('SEED', 0, 1)), pin('TRAIN_STEPS', 300))"
    config = make_sweep(space, workers=0)
    other = Run("other", 1, 0, 1, 1, 1, 1.0, 1, 0.1, 0, 3.0)  # of another study in this folder
    write_runs(tmp_path / "runs.jsonl", [other])
    set_up(config, tmp_path)
    worker.run(worker.WorkerConfig(), tmp_path)
    sweep.run(config, tmp_path)
    said = capsys.readouterr().out
    assert "trials of unequal tokens (7,680, 76,800): only the most common is compared" in said
    assert "held-out loss 2.9700 ± 0.0000 over 2 seeds at 7,680 tokens" in said
    _, _, page = read(tmp_path)
    assert "Trials of another number of tokens, not compared: 2 (76,800)." in page
    assert page.count("done (other tokens: not compared)") == 1
    assert other in read_runs(tmp_path / "runs.jsonl")


def test_the_parts_of_a_chain_share_their_axes_and_bad_values_are_failures(
    make_sweep, tmp_path, train_at_once, monkeypatch
):
    train_at_once(lambda bindings: 3.0 + bindings["PEAK_LR"])
    drawn, draw = [], sweep_report.parallel_figure
    monkeypatch.setattr(
        sweep_report,
        "parallel_figure",
        lambda columns, *rest, **more: drawn.append(columns) or draw(columns, *rest, **more),
    )
    space = (
        "chain(product(pin('SEED', 0), values('PEAK_LR', 0.01, 0.02)),"
        " product(pin('SEED', 1), values('PEAK_LR', 0.03, 0.04)), product(pin('NUM_HEADS', 3), pin('PEAK_LR', 0.01)))"
    )
    config = make_sweep(space, workers=0)
    set_up(config, tmp_path)
    worker.run(worker.WorkerConfig(), tmp_path)
    _, trials, _ = read(tmp_path)
    assert [t.status for t in trials] == ["done"] * 4 + ["failed"]
    assert "num_heads" in trials[-1].error
    base = config.base()
    view = sweep_report.View(config, base, sweep.open_sweep(config, base, tmp_path)[0], 0.0)
    assert view.refresh()
    page = view.write(tmp_path, finished=True).read_text()
    assert drawn[0]["PEAK_LR"] == [0.01, 0.02, 0.03, 0.04]
    assert "trial 4 failed" in page


def test_a_worker_that_was_silent_for_too_long_leaves_its_trial_to_the_next(
    make_sweep, tmp_path, train_at_once, capsys
):
    train_at_once(lambda bindings: 3.0)
    config = make_sweep("values('PEAK_LR', 0.01)")
    study = set_up(config, tmp_path)
    first, second = (worker.Worker(config, tmp_path, lambda: False) for _ in range(2))
    (claim,) = first.claim()
    test_study.fall_silent(study)
    (again,) = second.claim()
    assert again.bindings == claim.bindings
    first.train([claim])  # it wakes up
    assert "trial 0: given to another worker, as this one was silent for too long" in capsys.readouterr().out
    second.train([again])
    assert [t.state.name for t in study.get_trials()] == ["FAIL", "COMPLETE"]


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_sweeps_folder_needs_its_database_alone(make_sweep, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    with postgresql_server.server() as (url, _):
        config = make_sweep("values('PEAK_LR', 0.01)", storage=url, workers=0)
        set_up(config, here)
        worker.run(worker.WorkerConfig(storage=url), there)
        sweep.run(config, here)
        _, (trial,), page = read(here)
    assert trial.status == "done"
    assert [tokens for tokens, _ in trial.curve] == [10 * ROWS * SEQ_LEN, 20 * ROWS * SEQ_LEN, 30 * ROWS * SEQ_LEN]
    assert trial.cpu_seconds > 0.5
    assert not (here / "trials").exists()
    (line,) = read_runs(here / "runs.jsonl")
    assert (line.id, line.loss, line.flops) == (trial.id, trial.loss, trial.flops)
    assert "<h2>Curves</h2>" in page


def test_a_worker_goes_by_the_address_that_it_was_given(make_sweep, tmp_path, train_at_once):
    train_at_once(lambda bindings: 3.0)
    here, there = tmp_path / "here", tmp_path / "there"
    study = set_up(make_sweep(), here)  # whose own address of the database, "", means another one elsewhere
    worker.run(worker.WorkerConfig(storage=f"sqlite:///{here / 'study.db'}"), there)
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE"] * 2
    assert not (there / "study.db").exists()


def test_a_worker_needs_a_sweep(tmp_path):
    with pytest.raises(InputError, match=r"no sweep there; start it first"):
        worker.run(worker.WorkerConfig(), tmp_path)


def test_settings_survive_their_file(make_sweep):
    config = make_sweep(bindings={"DATA": ("a", "b"), "SPARSE_CONFIG": None}, slurm={"timeout_min": 5}, reuse=("x",))
    assert sweep.read_settings(sweep._settings_text(config)) == config
    assert ast.literal_eval(sweep._settings_text(config))["bindings"]["DATA"] == ("a", "b")


def test_the_terminals_line_and_the_page_before_a_trial_has_ended(make_sweep, tmp_path):
    config = make_sweep()
    study = set_up(config, tmp_path)
    view = sweep_report.View(config, config.base(), study, 0.0)
    assert not view.refresh()
    assert view.line() == "2 waiting; 0 FLOPs, 0.000 core-hours"
    page = view.write(tmp_path, finished=False).read_text()
    assert '<meta http-equiv="refresh" content="5">' in page
    assert "nothing to recommend" in page


def test_a_folder_that_another_process_trains_in_is_waited_for(make_sweep, tmp_path):
    base = make_sweep().base()
    job = sweep_trials.resolve(base, {"PEAK_LR": 0.01})
    folder = sweep_trials.trial_folder(tmp_path, job.id)
    beats = []
    with studies.locked(folder / sweep_training.LOCK_FILE):
        hooks = sweep_training.Hooks(lambda tokens, loss: False, alive=beats.append, stopping=lambda: len(beats) >= 2)
        (outcome,) = sweep_training.train_trials(base, [job], tmp_path, [hooks])
    assert outcome.status == "stopped"
    assert not (folder / sweep_trials.TRIAL_FILE).exists()
