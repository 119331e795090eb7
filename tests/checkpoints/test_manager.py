import dataclasses
import logging
import os
import resource
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cpm_jax.checkpoints import integrity
from cpm_jax.checkpoints.manager import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    find_checkpoint,
    list_steps,
    read_meta,
    restore_params,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    params: Any
    opt_state: Any


def make_state(step: int, width: int = 48) -> State:
    key = jax.random.fold_in(jax.random.key(0), step)
    params = {
        "embed": {"kernel": jax.random.normal(key, (width, 64))},
        "norm": {"scale": jnp.full((64,), step, "bfloat16")},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, opt_state = tx.update(params, tx.init(params), params)
    return State(jnp.int32(step), params, opt_state)


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def write(directory, steps=(1, 2, 3), **config):
    with Checkpointer(directory, CheckpointConfig(**config)) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"step": step, "model": {"d_model": 64}})
            checkpointer.check_for_errors()


def restore(directory, **kwargs):
    with Checkpointer(directory) as checkpointer:
        return checkpointer.restore_latest(abstract(make_state(0)), **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    write(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    """A directory with checkpoints of steps 1, 2, 3 to damage."""
    return shutil.copytree(saved, tmp_path / "run" / "checkpoints")


def test_comes_back_bit_for_bit(saved):
    restored = restore(saved)
    assert restored.step == 3
    assert restored.meta == {"step": 3, "model": {"d_model": 64}}
    assert_same(restored.state, make_state(3))


def test_empty_directory_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "none") is None


@pytest.mark.parametrize("asynchronous", [True, False])
def test_keeps_the_last_and_every_mth(tmp_path, asynchronous):
    write(tmp_path, steps=range(1, 8), keep_last=2, keep_every=3, asynchronous=asynchronous)
    assert list_steps(tmp_path) == [3, 6, 7]


def test_synchronous_save_is_there_at_once(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(5, make_state(5), {"step": 5})
        assert find_checkpoint(tmp_path) == tmp_path / "5"


def files_of_step_3(directory):
    return sorted(
        str(path.relative_to(directory / "3"))
        for path in (directory / "3").rglob("*")
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
    )


DAMAGE = {
    "deleted": lambda path, data: path.unlink(),
    "truncated": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "empty": lambda path, data: path.write_bytes(b""),
    "bit flipped": lambda path, data: path.write_bytes(
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
    ),
    "garbage": lambda path, data: path.write_bytes(np.random.default_rng(0).bytes(len(data))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_to_any_file_is_seen(copy, damage):
    """Reading alone does not see all of it: with the checksums left out, Orbax restores a flipped bit."""
    names = files_of_step_3(copy)
    assert len(names) > 8
    for name in names:
        path = copy / "3" / name
        data = path.read_bytes()
        DAMAGE[damage](path, data)
        assert integrity.find_damage(copy / "3"), name
        path.write_bytes(data)
    assert integrity.find_damage(copy / "3") == ""


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["checksums.json", "meta/metadata", "state/_METADATA", "largest"])
def test_falls_back_to_the_one_before_and_says_so(copy, damage, kind, caplog):
    names = files_of_step_3(copy)
    name = max(names, key=lambda name: (copy / "3" / name).stat().st_size) if kind == "largest" else kind
    path = copy / "3" / name
    DAMAGE[damage](path, path.read_bytes())
    with caplog.at_level(logging.WARNING, "cpm_jax"):
        restored = restore(copy)
    assert restored.step == 2
    assert_same(restored.state, make_state(2))
    assert "checkpoint 3 is unreadable" in caplog.text
    assert (copy / "unreadable" / "3").is_dir()


def test_an_empty_folder_is_no_checkpoint(copy):
    shutil.rmtree(copy / "3")
    (copy / "3").mkdir()
    assert restore(copy).step == 2


def test_after_a_fallback_the_same_step_is_saved_again(copy):
    for _ in range(2):  # the second time, unreadable/3 exists
        (copy / "3" / "meta" / "metadata").write_bytes(b"")
        assert restore(copy).step == 2
        write(copy, steps=[3])
        assert restore(copy).step == 3
    assert len(list((copy / "unreadable").iterdir())) == 2


def test_two_torn_ones_fall_back_two(copy):
    for step in ("3", "2"):
        shutil.rmtree(copy / step / "state")
    assert restore(copy).step == 1


def test_none_readable_is_an_error_and_nothing_is_moved(copy):
    (copy / "1" / "meta" / "metadata").unlink()
    (copy / "2" / "checksums.json").unlink()
    (copy / "3" / "state" / "manifest.ocdbt").write_bytes(b"x")
    with pytest.raises(CheckpointError) as error:
        restore(copy)
    message = str(error.value)
    assert "none is readable" in message
    assert "step 1: meta/metadata is missing" in message
    assert "step 2: checksums.json is missing" in message
    assert "step 3: state/manifest.ocdbt has 1 bytes" in message
    assert list_steps(copy) == [1, 2, 3]


def test_another_model_is_an_error_not_a_fallback(copy):
    other = abstract(make_state(0, width=32))
    with Checkpointer(copy) as checkpointer, pytest.raises(CheckpointError) as error:
        checkpointer.restore_latest(other)
    message = str(error.value)
    assert "params/embed/kernel" in message
    assert "(48, 64)" in message
    assert "(32, 64)" in message
    assert "d_model = 64" in message
    assert list_steps(copy) == [1, 2, 3]


def test_missing_and_additional_parameters_are_named(saved):
    params = abstract(make_state(0).params)
    with pytest.raises(CheckpointError, match="params/lm_head/kernel it has nothing"):
        restore_params(saved, params | {"lm_head": {"kernel": jax.ShapeDtypeStruct((64, 48), jnp.float32)}})
    with pytest.raises(CheckpointError, match="params/norm/scale it has shape"):
        restore_params(saved, {"embed": params["embed"]})


def test_check_meta_refuses_before_the_arrays_are_read(copy):
    def refuse(meta):
        raise KeyError(meta["step"])

    with pytest.raises(KeyError, match="3"):
        restore(copy, check_meta=refuse)


@pytest.mark.parametrize("where", ["run", "run/checkpoints", "run/checkpoints/2"])
def test_params_alone_from_any_folder(copy, where, tmp_path):
    step = 2 if where.endswith("2") else 3
    params, meta = restore_params(tmp_path / where)
    assert meta["step"] == step
    assert_same(params, make_state(step).params)
    params, _ = restore_params(tmp_path / where, abstract(make_state(0).params))
    assert_same(params, make_state(step).params)


def test_params_in_another_dtype(saved):
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), make_state(0).params)
    params, _ = restore_params(saved, wanted)
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(3).params))


def test_readers_skip_torn_ones_and_move_nothing(copy):
    (copy / "3" / "meta" / "metadata").unlink()
    assert find_checkpoint(copy.parent) == copy / "2"
    assert list_steps(copy) == [1, 2, 3]
    with pytest.raises(CheckpointError, match="meta/metadata is missing"):
        find_checkpoint(copy / "3")


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint: give a workdir"):
        restore_params(tmp_path)


def test_a_step_is_saved_once(copy):
    with Checkpointer(copy) as checkpointer, pytest.raises(CheckpointError, match=r"step 2 .*already exists"):
        checkpointer.save(2, make_state(2), {})


def test_unfinished_saves_of_a_killed_process_are_removed(copy):
    (copy / "4.orbax-checkpoint-tmp").mkdir()
    (copy / "4.orbax-checkpoint-tmp" / "state").mkdir()
    assert restore(copy).step == 3
    assert not list(copy.glob("*tmp*"))


def save_and_poll(checkpointer, step, state):
    checkpointer.save(step, state, {"step": step})
    while step not in list_steps(checkpointer._directory):
        checkpointer.check_for_errors()


# TensorStore may report a refused write to an event loop that Orbax has closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk_is_reported_and_harms_no_other_checkpoint(tmp_path, asynchronous):
    """The limit on the size of a file makes the operating system refuse the write, as a full disk does."""
    state = State(jnp.int32(1), {"w": jax.random.normal(jax.random.key(0), (512, 512))}, ())
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(asynchronous=asynchronous))
    checkpointer.save(1, state, {"step": 1})
    checkpointer.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 .*failed(.|\n)*steps: 1"):
            save_and_poll(checkpointer, 2, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Checkpointer(tmp_path) as again:
        restored = again.restore_latest(abstract(state))
        assert restored.step == 1
        assert_same(restored.state, state)
        again.save(2, state, {"step": 2})
    assert list_steps(tmp_path) == [1, 2]


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_meta_is_plain_json(saved):
    assert read_meta(find_checkpoint(saved)) == {"step": 3, "model": {"d_model": 64}}
    assert os.path.getsize(saved / "3" / "meta" / "metadata") < 200
