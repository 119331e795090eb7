"""Plans of a small model through the TPU compiler: memory, FLOPs and communication against what is known by hand."""

import dataclasses
import json
from pathlib import Path

import pytest

from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import MeshConfig
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.planning.analytic import attention_flops, guess, train_flops
from cpm_jax.planning.aot import compile_candidate
from cpm_jax.planning.chips import parse_topology
from cpm_jax.planning.hlo_costs import count_costs
from cpm_jax.planning.search import evaluate
from cpm_jax.planning.workload import Candidate, Workload, state_bytes
from experiments import run
from kernels_pallas.sparse_decode_attention.arg_specs import ArgSpec as DecodeSpec
from kernels_pallas.sparse_decode_attention.costs import decode_cost

pytestmark = pytest.mark.aot

MODEL = ModelConfig(vocab_size=4096, num_layers=4, d_model=512, num_heads=4, num_kv_heads=2, d_ff=1536)
SEQ_LEN, ROWS = 2048, 16
TOPOLOGY = parse_topology("v5e:4x4")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def compiled(cache, workload, candidate, topology=TOPOLOGY):
    return compile_candidate(workload, candidate, topology, cache, timeout=300)


@pytest.fixture(scope="module")
def sharded(cache):
    """A train step with fully sharded parameters: its evaluation and the compiler's memory."""
    workload, candidate = Workload("train", MODEL, SEQ_LEN), Candidate(MeshConfig(data=1, fsdp=16), ROWS)
    result = compiled(cache, workload, candidate)
    return evaluate(workload, guess(workload, candidate, TOPOLOGY), result, TOPOLOGY), result.memory


def test_flops_are_those_of_the_formula(sharded):
    """Within 2% of 6·N·tokens, attention, and what full remat repeats."""
    evaluation, _ = sharded
    expected = train_flops(MODEL, SEQ_LEN, ROWS, "full") / 16
    assert evaluation.costs.flops == pytest.approx(expected, rel=0.02)
    assert evaluation.costs.uncounted == ()
    assert 0 < evaluation.mfu < 1


def test_memory_is_that_of_a_hand_count(sharded):
    """float32 parameters and two moments over 16 chips, norms on each, and the batch are all the arguments."""
    evaluation, memory = sharded
    layer = 512 * 512 * 2 + 2 * 512 * 256 + 3 * 512 * 1536
    parameters = 4 * ((4 * layer + 2 * 4096 * 512) // 16 + (2 * 4 + 1) * 512)
    batch = (5 * SEQ_LEN + 1) * 4 * ROWS // 16
    assert evaluation.memory["parameters"] == parameters
    assert evaluation.memory["optimizer"] == 2 * parameters + 4
    # Small arrays are padded to tiles of 4 kB or less.
    assert memory["argument"] == pytest.approx(3 * parameters + batch, rel=0.05)
    assert evaluation.memory["activations"] >= 4 * SEQ_LEN * 512 * 2  # the residual stream of each layer
    assert evaluation.fits


def test_weights_are_gathered_where_they_are_used(sharded):
    """Each matrix of a layer is gathered in the forward and the backward pass, the head once, however many chunks."""
    evaluation, _ = sharded
    collectives = evaluation.costs.collectives
    matrix = 2 * 512 * 1536
    gathers = [c for c in collectives if c.kind == "all-gather" and c.num_bytes == matrix]
    assert sum(c.executions for c in gathers) >= 2 * 3 * MODEL.num_layers
    assert any(c.overlapped for c in gathers)
    assert not [c for c in collectives if c.kind == "all-to-all"]
    head = [c for c in collectives if c.num_bytes >= 2 * 512 * 4096]
    assert head
    assert all(c.executions == 1 for c in head)


def test_tensor_parallel_activations_are_summed_over_their_group_only(cache):
    workload, candidate = Workload("train", MODEL, SEQ_LEN), Candidate(MeshConfig(data=2, fsdp=4, tensor=2), ROWS)
    costs = count_costs(compiled(cache, workload, candidate).program)
    stream = 2 * SEQ_LEN * 512 * ROWS // 8
    sums = [c for c in costs.collectives if c.kind == "all-reduce" and c.num_bytes >= stream]
    assert {c.group_size for c in sums} == {2}
    assert sum(c.executions for c in sums) >= 4 * MODEL.num_layers
    assert costs.flops == pytest.approx(train_flops(MODEL, SEQ_LEN, ROWS, "full") / 16, rel=0.02)


def test_sparse_attention_of_divided_rows_costs_what_its_kernels_declare(cache):
    """Every call of every kernel is counted, as often as layers and spans of queries have it run."""
    sparse = SparseConfig(topk=8, window_size=512, dense_len=-1)
    model = dataclasses.replace(MODEL, sparse_config=sparse, max_position_embeddings=4096)
    workload, candidate = Workload("train", model, 4096), Candidate(MeshConfig(data=1, fsdp=8, context=2), 8)
    costs = count_costs(compiled(cache, workload, candidate).program)
    assert costs.uncounted == ()
    assert costs.flops == pytest.approx(train_flops(model, 4096, 8, "full") / 16, rel=0.02)
    attention = attention_flops(model, 4096)
    assert attention.forward + attention.backward + attention.selection > 0.1 * train_flops(model, 4096, 1, "none")


def test_decoding(cache):
    workload, candidate = Workload("decode", MODEL, SEQ_LEN), Candidate(MeshConfig(data=8, fsdp=1, tensor=2), 64)
    result = compiled(cache, workload, candidate)
    evaluation = evaluate(workload, guess(workload, candidate, TOPOLOGY), result, TOPOLOGY)
    held = state_bytes(workload, candidate)
    assert result.memory["argument"] == pytest.approx(sum(held.values()), rel=0.05)
    assert evaluation.costs.uncounted == ()
    least = sum(held.values()) / TOPOLOGY.chip.hbm_bandwidth
    assert least * 0.5 < evaluation.time.total < least * 20
    assert evaluation.tokens_per_step == 64


def test_sparse_decoding_costs_what_its_kernel_declares(cache):
    """In every layer and step each sequence and key head reads its blocks: no kernel is left uncounted."""
    sparse = SparseConfig(topk=8, window_size=512, dense_len=-1)
    model = dataclasses.replace(MODEL, head_dim=128, sparse_config=sparse, max_position_embeddings=8192)
    workload, candidate = Workload("decode", model, 8192), Candidate(MeshConfig(data=8, fsdp=1, tensor=2), 64)
    result = compiled(cache, workload, candidate)
    costs = count_costs(result.program)
    assert costs.uncounted == ()
    held = state_bytes(workload, candidate)
    assert result.memory["argument"] == pytest.approx(sum(held.values()), rel=0.05)
    # A chip has 8 sequences and one of two key heads: the cache is not read whole.
    attending = decode_cost(DecodeSpec(8, 8192, 2, 1, 128, num_selected=16))
    kernels = [o for o in costs.operations if o.flops == attending.flops]
    assert sum(o.executions for o in kernels) == workload.steps_per_call * model.num_layers
    assert costs.hbm_bytes / workload.steps_per_call < sum(held.values())


def test_a_program_that_is_too_large_is_told_with_the_compilers_figure(cache):
    large = ModelConfig(vocab_size=4096, num_layers=4, d_model=8192, num_heads=64, num_kv_heads=8, d_ff=32768)
    workload, candidate = Workload("train", large, 2048), Candidate(MeshConfig(data=4, fsdp=1), 4, remat="none")
    topology = parse_topology("v5e:2x2")
    result = compiled(cache, workload, candidate, topology)
    assert "out of memory" in result.refusal
    assert result.used_bytes > topology.chip.hbm_bytes
    assert not evaluate(workload, guess(workload, candidate, topology), result, topology).fits


def test_a_topology_that_libtpu_does_not_know_is_named(cache):
    workload, candidate = Workload("train", MODEL, SEQ_LEN), Candidate(MeshConfig(data=9, fsdp=1), 9)
    with pytest.raises(ConfigError, match=r"'v5e:3x3': libtpu does not know it.*v5e:4x4"):
        compiled(cache, workload, candidate, parse_topology("v5e:3x3"))


def test_a_mesh_that_does_not_divide_is_named(cache):
    workload = Workload("train", MODEL, SEQ_LEN)
    with pytest.raises(ConfigError, match="batch_size = 24: must be a multiple"):
        compiled(cache, workload, Candidate(MeshConfig(data=16, fsdp=1), 24))
    with pytest.raises(ConfigError, match="does not fit 16 devices"):
        compiled(cache, workload, Candidate(MeshConfig(data=4, fsdp=2), ROWS))


def test_the_verb_end_to_end_and_again(tmp_path, capsys):
    sizes = {"VOCAB_SIZE": 1024, "NUM_LAYERS": 2, "D_MODEL": 256, "NUM_HEADS": 2, "NUM_KV_HEADS": 2, "D_FF": 512}
    flags = [f"--gin.{name}={value}" for name, value in (sizes | {"MAX_POSITION_EMBEDDINGS": 1024}).items()]
    command = [
        *("plan", f"--workdir={tmp_path}", "--gin_file=arch/llama.gin", "--gin_file=runs/plan.gin", *flags),
        *("--gin.TOPOLOGY=v5p:2x2x1", "--gin.SEQ_LEN=512", "--gin.BATCH_SIZES=(4, 8)", "--gin.PRICE=4.2"),
        "--gin.NUM_COMPILES=1",
    ]
    assert run.main(command) == exit_codes.OK
    said = capsys.readouterr().out
    assert "recommended" in said
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["recommended"] in said
    assert len(plan["evaluations"]) == 1
    assert "LIBTPU_INIT_ARGS" in (tmp_path / "report.html").read_text()
    before = sorted((tmp_path / "compiled").iterdir())
    assert run.main(command) == exit_codes.OK
    assert sorted((tmp_path / "compiled").iterdir()) == before
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
