"""The detector of races sees one where there is one: what the kernels' tests rely on."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.kernels_pallas.races import DETECT_RACES, races


@pytest.mark.parametrize("early", [False, True])
def test_a_copy_that_is_read_before_it_is_there(capfd, early):
    def kernel(x_hbm, out_ref, buffer, semaphore):
        copy = pltpu.make_async_copy(x_hbm, buffer, semaphore)
        copy.start()
        if not early:
            copy.wait()
        out_ref[...] = buffer[...]
        if early:
            copy.wait()

    x = jnp.zeros((8, 128))
    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=DETECT_RACES,
    )
    assert races(capfd, lambda: call(x)) == early
