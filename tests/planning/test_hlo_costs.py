"""Costs of small programs whose FLOPs, bytes and communication are known."""

import jax
import jax.numpy as jnp
import pytest

from cpm_jax.planning.hlo_costs import Costs, count_costs

A = jax.ShapeDtypeStruct((64, 128), jnp.float32)
B = jax.ShapeDtypeStruct((128, 32), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((96, 96), jnp.float32)


def compiled(function, *args) -> Costs:
    return count_costs(jax.jit(function).lower(*args).compile().as_text())


def test_a_product():
    costs = compiled(jnp.matmul, A, B)
    assert costs.flops == 2 * 64 * 128 * 32
    assert costs.hbm_bytes == 4 * (64 * 128 + 128 * 32 + 64 * 32)
    assert costs.collectives == ()
    assert costs.uncounted == ()


def test_a_product_with_batch_dimensions():
    batched = jax.ShapeDtypeStruct((7, 16, 24), jnp.float32), jax.ShapeDtypeStruct((7, 24, 8), jnp.float32)
    assert compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *batched).flops == 2 * 7 * 16 * 24 * 8


def test_a_loop_counts_as_often_as_it_runs():
    def scanned(x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, length=11)[0]

    assert compiled(scanned, SQUARE).flops == 11 * 2 * 96**3


def test_loops_in_loops_multiply():
    def inner(x):
        return jax.lax.fori_loop(0, 5, lambda _, c: jnp.tanh(c @ c), x)

    def outer(x):
        return jax.lax.scan(lambda c, _: (inner(c), None), x, length=3)[0]

    assert compiled(outer, SQUARE).flops == 15 * 2 * 96**3


def test_gradient_of_a_scanned_layer_is_three_times_its_forward_pass():
    def loss(weights, x):
        return jnp.sum(jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0])

    weights, x = jax.ShapeDtypeStruct((6, 96, 96), jnp.float32), jax.ShapeDtypeStruct((32, 96), jnp.float32)
    assert compiled(jax.grad(loss, argnums=(0, 1)), weights, x).flops == 3 * 6 * 2 * 32 * 96**2


def test_a_loop_without_a_known_end_is_named():
    def until(x):
        return jax.lax.while_loop(lambda c: jnp.sum(c) < 1e6, lambda c: c @ c, x)

    costs = compiled(until, SQUARE)
    assert costs.flops == 2 * 96**3
    assert len(costs.uncounted) == 1
    assert "counted once" in costs.uncounted[0]


def test_a_slice_of_a_stack_costs_the_slice():
    """A scan over parameters reads each layer once, not the stack each time."""

    def run(weights, x):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, weights)[0]

    layers, width = 50, 256
    weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((1, width), jnp.float32)
    stack = 4 * layers * width**2
    assert stack < compiled(run, weights, x).hbm_bytes < 4 * stack


def test_an_update_in_place_costs_what_is_new():
    def run(cache, rows):
        return jax.lax.fori_loop(0, 40, lambda i, c: jax.lax.dynamic_update_index_in_dim(c, rows[i] * 2, i, 0), cache)

    cache = jax.ShapeDtypeStruct((40, 128, 128), jnp.float32)
    costs = count_costs(jax.jit(run, donate_argnums=0).lower(cache, cache).compile().as_text())
    assert costs.hbm_bytes < 6 * 4 * cache.size


def program(body: str, more: str = "") -> str:
    """An HLO module in the form that the compiler for TPU writes, with an entry of these instructions."""
    return (
        f"HloModule m, is_scheduled=true\n\n{more}\nENTRY %main.1 (p0: bf16[16,256]) -> bf16[16,256] {{\n{body}\n}}\n"
    )


def test_convolutions_count_only_taps_that_meet_the_input():
    """A projection to 32 heads of 128, as XLA for TPU writes it: the heads are a window over padding."""
    text = program(
        "  %x = bf16[4096,512,1]{1,0,2:T(8,128)(2,1)} parameter(0)\n"
        "  %w = bf16[32,128,512]{2,1,0:T(8,128)(2,1)} parameter(1)\n"
        "  ROOT %c = bf16[4096,32,128]{0,2,1:T(8,128)(2,1)} convolution(%x, %w), "
        "window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_0oi->b0f"
    )
    assert count_costs(text).flops == 2 * 4096 * 512 * 32 * 128


def test_strided_convolution():
    text = program(
        "  %x = f32[2,3,9]{2,1,0} parameter(0)\n  %w = f32[5,3,3]{2,1,0} parameter(1)\n"
        "  ROOT %c = f32[2,5,4]{2,1,0} convolution(%x, %w), window={size=3 stride=2}, dim_labels=bf0_oi0->bf0"
    )
    assert count_costs(text).flops == 2 * 2 * 5 * 4 * 3 * 3


_GROUPS = "replica_groups=mesh['a'=2,'b'=8], device_ids=([2,8]T(1,0)) {'b'}"


def test_collectives_beside_computation_are_told_from_those_that_wait():
    text = program(
        "  %p = bf16[16,256]{1,0} parameter(0)\n"
        "  %hidden = (bf16[16,256]{1,0}, bf16[128,256]{1,0}) all-gather-start(%p), channel_id=1, dimensions={0}, "
        f"{_GROUPS}\n"
        "  %d = bf16[16,16]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n"
        "  %got = bf16[128,256]{1,0} all-gather-done(%hidden)\n"
        f"  %waits = (bf16[16,256]{{1,0}}, bf16[128,256]{{1,0}}) all-gather-start(%p), channel_id=2, {_GROUPS}\n"
        "  %then = bf16[128,256]{1,0} all-gather-done(%waits)\n"
        "  ROOT %sum = bf16[16,256]{1,0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}"
    )
    costs = count_costs(text)
    gathered = 2 * 128 * 256
    assert [(c.kind, c.num_bytes, c.group_size, c.overlapped) for c in costs.collectives] == [
        ("all-gather", gathered, 8, True),
        ("all-gather", gathered, 8, False),
        ("all-reduce", 2 * 16 * 256, 4, False),
    ]
    assert costs.wire_bytes("all-gather", overlapped=True) == gathered * 7 / 8
    assert costs.wire_bytes("all-reduce") == 2 * (2 * 16 * 256) * 3 / 4


def test_steps_of_one_fused_collective_count_once():
    step = (
        "%async_collective_fusion.{n} (a: bf16[16,256]) -> bf16[128,256] {{\n"
        "  %a.{n} = bf16[16,256]{{1,0}} parameter(0)\n"
        "  ROOT %g.{n} = bf16[128,256]{{1,0}} all-gather(%a.{n}), channel_id=7, dimensions={{0}}, "
        "replica_groups=[2,8]<=[16]\n}}\n"
    )
    body = "  %p = bf16[16,256]{1,0} parameter(0)\n" + "\n".join(
        f"  {'ROOT ' if n == 2 else ''}%f.{n} = bf16[128,256]{{1,0}} fusion(%p), kind=kCustom, "
        f"calls=%async_collective_fusion.{n}"
        for n in range(3)
    )
    (found,) = count_costs(program(body, "".join(step.format(n=n) for n in range(3)))).collectives
    assert (found.kind, found.num_bytes, found.group_size, found.overlapped) == ("all-gather", 2 * 128 * 256, 8, True)


def test_a_sum_that_each_chip_slices_is_a_reduce_scatter():
    more = (
        "%all-reduce-scatter.1 (a: f32[128,256]) -> f32[16,256] {\n"
        "  %a = f32[128,256]{1,0} parameter(0)\n  %i = s32[] constant(0)\n"
        "  %r = f32[128,256]{1,0} all-reduce(%a), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}\n"
        "  ROOT %s = f32[16,256]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={16,256}\n}\n"
    )
    body = (
        "  %p = f32[128,256]{1,0} parameter(0)\n"
        "  ROOT %f = f32[16,256]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    )
    (found,) = count_costs(program(body, more)).collectives
    assert (found.kind, found.num_bytes, found.overlapped) == ("reduce-scatter", 4 * 128 * 256, False)
    assert found.wire_bytes == 4 * 128 * 256 * 7 / 8


def kernel(name: str, heads: str = "2,16") -> str:
    return program(
        "  %mask = s8[1,8,8]{2,1,0} parameter(2)\n"
        f"  %q = bf16[{heads},4096,128]{{3,2,1,0}} parameter(0)\n  %k = bf16[4096,128]{{1,0}} parameter(1)\n"
        f"  ROOT %{name}.1 = bf16[{heads},4096,128]{{3,2,1,0}} custom-call(%mask, %q, %k, %k), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"\n}}'
    )


@pytest.mark.parametrize(
    ("name", "products"), [("splash_mqa_fwd_segmented", 2), ("splash_mqa_dq_segmented", 3), ("splash_mqa_dkv", 4)]
)
def test_attention_kernels_count_the_blocks_that_a_causal_mask_leaves(name, products):
    blocks = 8 * 9 / 2
    for heads in ("2,16", "32", "4,2,4"):
        assert count_costs(kernel(name, heads)).flops == 2 * products * 32 * blocks * 512**2 * 128


def test_a_kernel_costs_what_it_was_declared_to():
    """Less what lies in a small memory: its result here, 2 x 16 x 256 bytes."""
    config = '"cost_estimate":{"flops":"123000","transcendentals":"7","bytes_accessed":"98304"}'
    body = (
        "  %p = bf16[16,256]{1,0} parameter(0)\n"
        "  ROOT %my_kernel.1 = bf16[16,256]{1,0:T(8,128)(2,1)S(1)} custom-call(%p), "
        f'custom_call_target="tpu_custom_call", backend_config={{"custom_call_config":{{"body":"TUz",{config}}}}}'
    )
    costs = count_costs(program(body))
    assert costs.uncounted == ()
    assert costs.flops == 123_000
    assert costs.hbm_bytes == 98_304 - 8192


def test_other_kernels_are_named():
    assert count_costs(kernel("my_kernel")).uncounted == ("kernel my_kernel.1: its FLOPs",)


def test_what_lies_in_small_memories_is_no_traffic():
    text = program(
        "  %p = bf16[16,256]{1,0} parameter(0)\n  %v = bf16[16,256]{1,0:T(8,128)(2,1)S(1)} copy(%p)\n"
        "  ROOT %r = bf16[16,256]{1,0} negate(%v)"
    )
    assert count_costs(text).hbm_bytes == 2 * (2 * 16 * 256)


def test_a_prefetch_costs_what_arrives():
    text = program(
        "  %p = s8[4096]{0} parameter(0)\n"
        "  %s = (s8[4096]{0}, s8[1024]{0:S(1)}, u32[]{:S(2)}) slice-start(%p), slice={[0:1024]}\n"
        "  %c = (s8[4096]{0:S(1)}, s8[4096]{0}, u32[]{:S(2)}) copy-start(%p)\n"
        "  ROOT %d = s8[1024]{0:S(1)} slice-done(%s)"
    )
    costs = count_costs(text)
    assert [o.hbm_bytes for o in costs.operations] == [1024, 4096]
    assert all(o.prefetch for o in costs.operations)


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no HLO module"):
        count_costs("nothing")
