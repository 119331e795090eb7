"""The same races on a real PostgreSQL server."""

import pytest

from cpm_jax.scaling.space import values
from cpm_jax.scaling.storage import StorageError, open_storage, patiently, storage_url
from cpm_jax.scaling.study import StudyConfig
from tests.scaling import postgresql_server, test_study


@pytest.fixture(scope="module")
def server():
    with postgresql_server.server() as found:
        yield found


def test_racing_workers_take_each_trial_once_and_a_dead_ones_trial_once(server, tmp_path):
    test_study.check_race(tmp_path, server[0])


def test_machines_without_a_common_folder_take_each_trial_once(server, tmp_path):
    """Row locks alone keep claims apart: each process has a lock file of its own."""
    import psycopg

    with psycopg.connect(server[0], autocommit=True) as connection:
        connection.execute("CREATE DATABASE apart")
    url = server[0].replace("/postgres", "/apart")
    test_study.make(tmp_path, StudyConfig(), test_study.GRID, url=url)
    folders = [tmp_path / str(n) for n in range(3)]
    got = test_study.race(folders, 3, url)
    everything = [bindings for part in got for _, bindings in part]
    assert len(everything) == len({test_study.identify(b) for b in everything}) == 15


def test_machines_without_a_common_folder_propose_different_trials(server, tmp_path):
    import psycopg

    with psycopg.connect(server[0], autocommit=True) as connection:
        connection.execute("CREATE DATABASE proposals")
    url = server[0].replace("/postgres", "/proposals")
    config = {"sampler": "random", "num_trials": 8}
    test_study.make(tmp_path, StudyConfig(**config), test_study.GRID, url=url)
    got = test_study.race([tmp_path / str(n) for n in range(3)], 3, url, config=config)
    everything = [test_study.identify(bindings) for part in got for _, bindings in part]
    assert len(everything) == len(set(everything)) == 8


def test_a_server_that_dies_is_named(server, tmp_path):
    url, stop = server
    study = test_study.make(tmp_path, StudyConfig(), values("A", 1), url=url.replace("/postgres", "/template1"))
    stop()
    with pytest.raises(StorageError, match=r"cannot be used"):
        patiently(study.get_trials, url, 1.0)
    with pytest.raises(StorageError, match=r"cannot be used: .*refused"):
        open_storage(storage_url(url, tmp_path), heartbeat_seconds=1, grace_seconds=2, patience=0.5)
