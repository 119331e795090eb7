"""Who trains what: processes that race, workers that die, proposals that were there before, databases that fail."""

import contextlib
import datetime
import json
import random
import socket
import sqlite3
import subprocess
import sys
import time
import wsgiref.util
from pathlib import Path

import optuna
import optuna_dashboard
import pytest

from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.scaling import study as studies
from cpm_jax.scaling.space import chain, log_uniform, pin, product, values
from cpm_jax.scaling.storage import StorageError, open_storage, patiently, shown, storage_url
from cpm_jax.scaling.study import Claim, StudyConfig, next_trial

GRID = product(values("A", *range(5)), values("B", "x", "y", "z"))


def make(folder, config, space, *, url="", grace=60, shared=None):
    storage = open_storage(storage_url(url, folder), heartbeat_seconds=1, grace_seconds=grace, patience=10)
    study = studies.open_study(storage, "s", config, space, min_tokens=10, max_tokens=90, shared=shared or {}, about="")
    if config.sampler == "grid":
        studies.enqueue_grid(study, space, config.num_trials)
    return study


def identify(bindings):
    return json.dumps(bindings, sort_keys=True)


def finish(study, claim, status="done", value=1.0):
    claim.trial.set_user_attr("status", status)
    state = {"pruned": optuna.trial.TrialState.PRUNED, "failed": optuna.trial.TrialState.FAIL}.get(status)
    study.tell(claim.trial, value if state is None else None, state=state)


def drain(study, config, space, folder, value=lambda bindings: 1.0):
    found = []
    while isinstance(claim := next_trial(study, config, space, folder, identify), Claim):
        finish(study, claim, value=value(claim.bindings))
        found.append(claim.bindings)
    return found, claim


def test_a_grid_is_handed_out_in_order_and_is_not_put_in_twice(tmp_path):
    study = make(tmp_path, StudyConfig(), GRID)
    make(tmp_path, StudyConfig(), GRID)
    found, end = drain(study, StudyConfig(), GRID, tmp_path)
    assert found == [{"A": a, "B": b} for a in range(5) for b in "xyz"]
    assert end == "done"
    assert studies.is_over(study, StudyConfig(), GRID, study.get_trials())


_RACER = """
import sys, json, time
from pathlib import Path
from tests.scaling import test_study as t
folder, grace, url, seconds = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
config = t.StudyConfig(**json.loads(sys.argv[5]))
study = t.make(folder, config, t.GRID, url=url, grace=grace)
print("ready", flush=True)
sys.stdin.readline()
while True:
    claim = t.next_trial(study, config, t.GRID, folder, t.identify)
    if claim == "done":
        break
    if claim == "wait":
        time.sleep(0.1)
        continue
    time.sleep(seconds)
    t.finish(study, claim)
    print(json.dumps([claim.trial.number, claim.bindings]), flush=True)
"""


def start_racer(folder, grace, url="", seconds=0.0, config=None):
    """A process that is ready to take trials, each of which it holds for some seconds."""
    racer = subprocess.Popen(
        [sys.executable, "-c", _RACER, str(folder), str(grace), url, str(seconds), json.dumps(config or {})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert racer.stdout.readline() == "ready\n"
    return racer


def go(racer):
    racer.stdin.write("go\n")
    racer.stdin.flush()


def race(folder, count, url="", grace=60, config=None):
    """What each of several processes got, all started at the same moment; `folder` may be one for each."""
    folders = folder if isinstance(folder, list) else [folder] * count
    racers = [start_racer(folders[index], grace, url, config=config) for index in range(count)]
    for racer in racers:
        go(racer)
    got = [[json.loads(line) for line in racer.communicate(timeout=120)[0].splitlines()] for racer in racers]
    assert all(racer.returncode == 0 for racer in racers)
    return got


def fall_silent(study):
    """Makes the last heartbeat of all workers an old one."""
    import sqlalchemy

    with study._storage._backend.engine.begin() as connection:
        then = {"then": datetime.datetime(2020, 1, 1)}
        connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = :then"), then)


def check_race(folder, url=""):
    """Three processes share a grid, one trial of which belongs to a worker that is gone."""
    study = make(folder, StudyConfig(), GRID, url=url)
    lost = next_trial(study, StudyConfig(), GRID, folder, identify)
    fall_silent(study)
    got = race(folder, 3, url)
    everything = [bindings for part in got for _, bindings in part]
    assert sorted(map(identify, everything)) == sorted(identify({"A": a, "B": b}) for a in range(5) for b in "xyz")
    trials = study.get_trials()
    again = [t for t in trials if t.system_attrs.get("retry_history") == [lost.trial.number]]
    assert len(again) == 1
    assert again[0].state == optuna.trial.TrialState.COMPLETE
    assert trials[lost.trial.number].state == optuna.trial.TrialState.FAIL


def test_racing_workers_take_each_trial_once_and_a_dead_ones_trial_once(tmp_path):
    check_race(tmp_path)


def test_a_worker_that_dies_while_it_takes_a_trial_loses_none(tmp_path):
    config, space = StudyConfig(), values("A", 1, 2)
    study = make(tmp_path, config, space, grace=60)

    def die(bindings):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next_trial(study, config, space, tmp_path, die)
    time.sleep(1.5)
    found, end = drain(study, config, space, tmp_path)
    assert found == [{"A": 2}, {"A": 1}]
    assert end == "done"


def test_a_worker_that_dies_while_it_gives_a_trial_back_loses_none(tmp_path):
    config, space = StudyConfig(), values("A", 1, 2)
    study = make(tmp_path, config, space)
    lost = next_trial(study, config, space, tmp_path, identify)
    study.tell(lost.trial, state=optuna.trial.TrialState.FAIL)  # and there it ended
    time.sleep(1.5)
    assert drain(study, config, space, tmp_path) == ([{"A": 2}, {"A": 1}], "done")
    states = [t.state.name for t in study.get_trials()]
    assert states == ["FAIL", "COMPLETE", "COMPLETE"]


def test_workers_that_are_killed_at_any_moment_lose_no_trial_and_end_none_twice(tmp_path):
    make(tmp_path, StudyConfig(), GRID, grace=2)
    rng = random.Random(0)
    racers = [start_racer(tmp_path, 2, seconds=0.3) for _ in range(4)]
    for racer in racers:
        go(racer)
    for racer in racers[:3]:
        time.sleep(rng.uniform(0.02, 0.3))
        racer.kill()
        racer.wait()
    assert racers[3].wait(120) == 0
    study = make(tmp_path, StudyConfig(), GRID, grace=2)
    complete = [t for t in study.get_trials() if t.state == optuna.trial.TrialState.COMPLETE]
    assert sorted(t.user_attrs["id"] for t in complete) == sorted(
        identify({"A": a, "B": b}) for a in range(5) for b in "xyz"
    )
    retried = [number for t in study.get_trials() for number in t.system_attrs.get("retry_history", [])[-1:]]
    assert retried
    assert len(retried) == len(set(retried))  # each was put back once


def test_values_that_do_not_go_together_fail_and_the_others_go_on(tmp_path):
    config, space = StudyConfig(), values("A", 1, 2, 3)
    study = make(tmp_path, config, space)

    def refuse(bindings):
        if bindings["A"] == 2:
            raise ConfigError("Model.a = 2: must be odd", field="Model.a")
        return identify(bindings)

    found = []
    while isinstance(claim := next_trial(study, config, space, tmp_path, refuse), Claim):
        finish(study, claim)
        found.append(claim.bindings["A"])
    assert found == [1, 3]
    assert claim == "done"
    bad = study.get_trials()[1]
    assert (bad.state.name, bad.user_attrs["status"], bad.user_attrs["error"]) == (
        "FAIL",
        "failed",
        "Model.a = 2: must be odd",
    )


def test_a_trial_that_is_given_back_goes_on_with_its_history(tmp_path):
    config, space = StudyConfig(), values("A", 1)
    study = make(tmp_path, config, space)
    claim = next_trial(study, config, space, tmp_path, identify)
    claim.trial.report(2.5, 10)
    studies.give_back(study, claim.trial)
    again = next_trial(study, config, space, tmp_path, identify)
    assert again.bindings == claim.bindings
    assert study.get_trials()[again.trial.number].intermediate_values == {10: 2.5}
    assert next_trial(study, config, space, tmp_path, identify) == "wait"
    finish(study, again)
    assert next_trial(study, config, space, tmp_path, identify) == "done"


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_never_train_a_point_twice_and_end_when_all_are_known(tmp_path, sampler):
    config, space = StudyConfig(sampler=sampler, num_trials=50), values("A", 1, 2, 3)
    found, end = drain(make(tmp_path, config, space), config, space, tmp_path, value=lambda b: float(b["A"]))
    assert sorted(b["A"] for b in found) == [1, 2, 3]
    assert end == "done"


def test_trials_that_resolve_to_the_same_are_trained_once(tmp_path):
    config, space = StudyConfig(), chain(values("A", 1, 2), product(pin("A", 2), pin("B", 0)))
    study = make(tmp_path, config, space)
    found = []
    while isinstance(claim := next_trial(study, config, space, tmp_path, lambda b: str(b["A"])), Claim):
        finish(study, claim, value=float(claim.bindings["A"]))
        found.append(claim.bindings)
    assert found == [{"A": 1}, {"A": 2}]
    twin = study.get_trials()[2]
    assert (twin.value, twin.user_attrs["duplicate_of"]) == (2.0, 1)


@pytest.mark.parametrize("sampler", ["tpe", "cma-es"])
def test_samplers_find_the_best_of_a_range(tmp_path, sampler):
    config = StudyConfig(sampler=sampler, num_trials=25, seed=1)
    space = product(log_uniform("LR", 1e-4, 1.0), log_uniform("WD", 1e-4, 1.0))
    study = make(tmp_path, config, space, grace=600)

    def loss(b):
        import math

        return (math.log10(b["LR"]) + 2) ** 2 + 0.1 * (math.log10(b["WD"]) + 1) ** 2

    found, _ = drain(study, config, space, tmp_path, loss)
    assert len(found) == 25
    late = sorted(map(loss, found[15:]))[0]
    assert late < 0.3
    again = make(tmp_path / "again", config, space, grace=600)
    assert drain(again, config, space, tmp_path / "again", loss)[0] == found  # by the seed


def test_asha_ends_what_is_behind_and_the_best_of_them_may_be_promoted(tmp_path):
    config = StudyConfig(pruner="asha", promote=1)
    space = values("A", *range(9))
    study = make(tmp_path, config, space, grace=600)
    ended, promoted = [], []
    while isinstance(claim := next_trial(study, config, space, tmp_path, identify), Claim):
        loss = 1.0 + claim.bindings["A"]
        is_promoted = studies.PROMOTED in claim.trial.user_attrs
        status = "done"
        for tokens in range(10, 100, 10):
            claim.trial.report(loss, tokens)
            if claim.trial.should_prune() and not is_promoted:
                status = "pruned"
                break
        if is_promoted:
            promoted.append(claim.bindings["A"])
        elif status == "pruned":
            ended.append((claim.bindings["A"], tokens))
        finish(study, claim, status, loss)
    assert 0 not in dict(ended)
    assert len(ended) >= 5
    assert set(dict(ended).values()) <= {10, 30, 90}  # rungs at equal tokens
    best = min(ended, key=lambda e: (-e[1], e[0]))[0]
    assert promoted == [best]
    assert studies.is_over(study, config, space, study.get_trials())


def test_optunas_dashboard_reads_the_storage(tmp_path):
    config, space = StudyConfig(), values("A", 1, 2)
    drain(make(tmp_path, config, space), config, space, tmp_path, lambda bindings: 0.5 * bindings["A"])
    app = optuna_dashboard.wsgi(storage_url("", tmp_path))

    def get(path):
        environ = {"PATH_INFO": path, "QUERY_STRING": "after=0"}
        wsgiref.util.setup_testing_defaults(environ)
        return json.loads(b"".join(app(environ, lambda status, headers, *rest: None)))

    (study,) = get("/api/studies")["study_summaries"]
    assert study["study_name"] == "s"
    assert [t["values"] for t in get(f"/api/studies/{study['study_id']}")["trials"]] == [[0.5], [1.0]]


def test_a_study_of_another_space_is_refused_with_what_differs(tmp_path):
    make(tmp_path, StudyConfig(), values("A", 1, 2))
    with pytest.raises(ConfigError, match=r"made with another space: A: \[1, 2\] then, \[1, 2, 3\] now"):
        make(tmp_path, StudyConfig(), values("A", 1, 2, 3))
    with pytest.raises(ConfigError, match="another space: base TRAIN_STEPS: None then, '30' now"):
        make(tmp_path, StudyConfig(), values("A", 1, 2), shared={"TRAIN_STEPS": "30"})
    study = make(tmp_path, StudyConfig(), values("A", 1, 2))
    with pytest.raises(ConfigError, match="another space"):
        studies.open_study(
            study._storage, "s", StudyConfig(), values("A", 3), min_tokens=1, max_tokens=9, shared={}, about="other"
        )
    assert study.user_attrs["about"] == ""  # workers of the first go by it


def test_settings_that_cannot_work_are_named():
    with pytest.raises(ConfigError, match="the sampler 'tpe' has no end of its own"):
        StudyConfig(sampler="tpe")
    with pytest.raises(ConfigError, match="LR is a range, whose points cannot be listed"):
        studies.check_space(StudyConfig(), log_uniform("LR", 1, 2))
    with pytest.raises(ConfigError, match="'cma-es': A has options"):
        studies.check_space(
            StudyConfig(sampler="cma-es", num_trials=3), product(values("A", 1, 2), log_uniform("B", 1, 2))
        )


def test_a_locked_database_is_named_and_one_that_is_let_go_is_waited_for(tmp_path):
    study = make(tmp_path, StudyConfig(), values("A", 1))
    url = storage_url("", tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match=r"study\.db: locked: another process"):
            open_storage(url, heartbeat_seconds=1, grace_seconds=2, patience=0.2)
        other.execute("ROLLBACK")
    open_storage(url, heartbeat_seconds=1, grace_seconds=2, patience=0.2)
    assert len(study.get_trials()) == 1


def test_dead_and_foreign_databases_are_named(tmp_path):
    (tmp_path / "study.db").write_text("no database at all, but a text of some length " * 30)
    with pytest.raises(StorageError, match="no SQLite database"):
        open_storage(storage_url("", tmp_path), heartbeat_seconds=1, grace_seconds=2, patience=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = storage_url(f"postgresql://me:secret@127.0.0.1:{port}/none", tmp_path)
    with pytest.raises(StorageError, match=r"cannot be used: .*refused") as caught:
        open_storage(url, heartbeat_seconds=1, grace_seconds=2, patience=0.5)
    assert "secret" not in str(caught.value)
    assert shown(url) == f"postgresql+psycopg://me:***@127.0.0.1:{port}/none"


def test_what_passes_is_waited_for():
    import sqlalchemy

    calls = []

    def call():
        calls.append(1)
        if len(calls) < 3:
            raise sqlalchemy.exc.OperationalError("x", {}, Exception("server closed the connection"))
        return "answer"

    assert patiently(call, "sqlite://", 5.0) == "answer"
    assert len(calls) == 3


def test_a_study_that_is_not_there(tmp_path):
    storage = open_storage(storage_url("", tmp_path), heartbeat_seconds=1, grace_seconds=2, patience=1)
    with pytest.raises(InputError, match="no study 'x' in this database"):
        studies.load_study(storage, "x")
