import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.checkpoints.averaging import average_params, write_average
from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer, CheckpointError, restore_params


@pytest.fixture
def workdir(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {step: rng.normal(size=(8, 4)).astype(np.float32) for step in (10, 20, 30)}
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig()) as checkpointer:
        for step, array in arrays.items():
            params = {"w": jnp.asarray(array), "b": jnp.asarray(array[0], jnp.bfloat16)}
            checkpointer.save(step, {"params": params, "step": jnp.int32(step)}, {"step": step})
    return tmp_path, arrays


def test_average_is_the_mean(workdir):
    path, arrays = workdir
    params, meta = average_params(path, [10, 20, 30])
    np.testing.assert_allclose(params["w"], np.mean(list(arrays.values()), axis=0), rtol=1e-6, atol=1e-7)
    b = np.mean([np.asarray(jnp.asarray(a[0], jnp.bfloat16), np.float32) for a in arrays.values()], axis=0)
    np.testing.assert_array_equal(params["b"], jnp.asarray(b, jnp.bfloat16))
    assert meta == {"step": 30, "averaged_steps": [10, 20, 30]}


def test_written_average_is_a_checkpoint(workdir):
    path, arrays = workdir
    write_average(path, path / "averaged", last=1)
    step_dir = write_average(path, path / "averaged", last=2)  # replaces the one before
    for place in (step_dir, path / "averaged"):
        params, meta = restore_params(place)
        np.testing.assert_allclose(params["w"], (arrays[20] + arrays[30]) / 2, rtol=1e-6)
        assert meta["averaged_steps"] == [20, 30]


def test_what_is_not_there(workdir):
    path, _ = workdir
    with pytest.raises(CheckpointError, match="no checkpoint of step 15; it has: 10, 20, 30"):
        average_params(path, [10, 15])
    with pytest.raises(CheckpointError, match="has 3 checkpoints, 4 are to be averaged"):
        write_average(path, path / "averaged", last=4)
    with pytest.raises(CheckpointError, match="no steps"):
        average_params(path, [])
