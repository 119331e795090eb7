"""The choice among compiled candidates, with programs whose costs are known in place of compiled ones."""

import dataclasses
import json

import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import MeshConfig
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.model_size import train_flops_per_token
from cpm_jax.planning import plan_report, search
from cpm_jax.planning.analytic import candidates
from cpm_jax.planning.aot import Compiled
from cpm_jax.planning.chips import parse_topology
from cpm_jax.planning.workload import Candidate, Workload, state_bytes

MODEL = ModelConfig(vocab_size=512, num_layers=2, d_model=128, num_heads=4, num_kv_heads=2, d_ff=256)
TRAIN = Workload("train", MODEL, 256)
TOPOLOGY = parse_topology("v5e:2x2")
# One product of 2 · 4,096³ FLOPs in bfloat16.
PROGRAM = (
    "HloModule m\n\nENTRY %main (p: bf16[4096,4096]) -> bf16[4096,4096] {\n"
    "  %p = bf16[4096,4096]{1,0} parameter(0)\n"
    "  ROOT %d = bf16[4096,4096]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
)
MEMORY = {"argument": 10 * 2**20, "output": 10 * 2**20, "alias": 10 * 2**20, "temp": 2**20, "generated_code": 1024}


def compiled(**changes):
    return dataclasses.replace(Compiled(12.0, MEMORY, PROGRAM), **changes)


def plan(monkeypatch, results, **changes):
    """A plan for which the compiler gives `results(candidate)`; also the candidates that it was asked for."""
    asked = []

    def compile_candidate(workload, candidate, topology, cache, timeout):
        asked.append(candidate)
        return results(candidate)

    monkeypatch.setattr(search, "compile_candidate", compile_candidate)
    arguments = {"batch_sizes": (8, 16), "remats": ("full", "none"), "mesh_choices": (), "num_compiles": 3}
    found = search.make_plan(TRAIN, TOPOLOGY, **(arguments | changes), timeout=1.0, cache=None)
    return found, asked


def test_the_best_that_fits_is_recommended(monkeypatch):
    huge = MEMORY | {"temp": 2**40}
    found, asked = plan(monkeypatch, lambda c: compiled(memory=huge) if c.remat == "none" else compiled())
    assert len(asked) == len(found.evaluations) == 3
    assert found.best is not None
    assert found.best.candidate.remat == "full"
    assert found.best.tokens_per_second == max(e.tokens_per_second for e in found.evaluations)
    assert not any(e.fits for e in found.evaluations if e.candidate.remat == "none")


def test_what_the_compiler_refuses_does_not_fit(monkeypatch):
    refused = compiled(memory={}, program="", refusal="Ran out of memory", used_bytes=30 * 2**30)
    found, asked = plan(monkeypatch, lambda c: refused, num_compiles=2)
    assert found.best is None
    assert len(asked) == len(set(asked)) == 4  # two that promised most, then two that need least
    assert found.evaluations[0].memory_total == 30 * 2**30
    said = plan_report.describe(found, 1e9, 1.0)
    assert "does not fit" in said
    assert "no candidate fits" in said
    assert search.to_json(found, 1e9, 1.0)["recommended"] is None


def test_time_and_utilisation_follow_from_the_program(monkeypatch):
    found, _ = plan(monkeypatch, lambda c: compiled(), num_compiles=1)
    best = found.best
    seconds = 2 * 4096**3 / 197e12
    assert best.time.total == pytest.approx(seconds)
    tokens = best.candidate.batch_size * 256
    assert best.mfu == pytest.approx(train_flops_per_token(MODEL, 256) * tokens / 4 / 197e12 / seconds)
    assert best.tokens_per_second == pytest.approx(tokens / seconds)


def test_a_sparse_decoder_reads_its_blocks_only():
    """Of 32K tokens 6,144, and a semantic kernel every 16 and every 64 tokens to choose them by."""
    model = dataclasses.replace(MODEL, max_position_embeddings=32_768)
    dense, sparse = (
        search.model_flops(Workload("decode", m, 32_768), Candidate(MeshConfig(data=4, fsdp=1), 4))
        for m in (model, dataclasses.replace(model, sparse_config=SparseConfig()))
    )
    saved = 4 * (32_768 - 6144) - 2 * 32_768 * (1 / 16 + 1 / 64)
    assert dense - sparse == pytest.approx(4 * 2 * 128 * saved)


def test_the_bill_by_hand(monkeypatch):
    found, _ = plan(monkeypatch, lambda c: compiled(), num_compiles=1)
    rate = found.best.tokens_per_second
    costs = search.bill(found.best, 4, tokens=rate * 86_400 * 10, price_per_chip_hour=1.5)
    assert costs.tokens_per_day == pytest.approx(rate * 86_400)
    assert (costs.days, costs.chip_hours, costs.cost) == pytest.approx((10.0, 960.0, 1440.0))


def test_memory_sums_to_what_the_compiler_reserves(monkeypatch):
    found, _ = plan(monkeypatch, lambda c: compiled(), num_compiles=1)
    memory = found.best.memory
    held = state_bytes(TRAIN, found.best.candidate)
    assert memory["parameters"] == held["parameters"]
    assert memory["optimizer"] == held["optimizer"]
    assert sum(memory.values()) == sum(MEMORY.values()) - 2 * MEMORY["alias"]


def test_different_meshes_and_policies_are_compiled():
    guesses = candidates(TRAIN, TOPOLOGY, (8, 16), ("full", "dots", "none"))
    chosen = [g.candidate for g in search.choose(guesses, 4)]
    assert chosen[0] == guesses[0].candidate
    assert len({(c.mesh, c.remat) for c in chosen}) == 4
    assert len({c.mesh for c in chosen}) > 1
    assert len({c.remat for c in chosen}) > 1
    assert search.choose([], 3) == []
    assert len(search.choose(guesses, 1000)) == len({(g.candidate.mesh, g.candidate.remat) for g in guesses})


def test_batches_that_fit_no_mesh_are_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"batch_sizes = \(3,\).*4 chips.*; choose multiples of 4$"):
        plan(monkeypatch, lambda c: compiled(), batch_sizes=(3,), mesh_choices=(MeshConfig(data=4, fsdp=1),))


def test_batches_that_fit_meshes_of_an_odd_number_of_chips_are_told():
    with pytest.raises(ConfigError, match=r"15 chips of v5e:3x5 .*; choose multiples of 15$"):
        search.find_guesses(TRAIN, parse_topology("v5e:3x5"), (8,), ("full",))
    assert search.find_guesses(TRAIN, parse_topology("v5e:3x5"), (8, 30), ("full",))


def test_report_and_json_say_the_same(monkeypatch, tmp_path):
    found, _ = plan(monkeypatch, lambda c: compiled())
    said = json.loads(json.dumps(search.to_json(found, 1e9, 2.0)))
    page = plan_report.build_page(found, "title", 1e9, 2.0)
    text = plan_report.describe(found, 1e9, 2.0)
    for part in (page.sections[0].blocks[1].rows[0][0], text):
        assert said["recommended"] in part
    assert said["evaluations"][0]["estimated"]["mfu"] == found.best.mfu
    assert [h.label for h in page.headlines][:3] == ["estimated step", "estimated MFU", "memory per chip"]


def test_a_divided_row_says_what_it_exchanges(monkeypatch):
    found, _ = plan(monkeypatch, lambda c: compiled(), mesh_choices=(MeshConfig(data=1, fsdp=2, context=2),))
    exchanged = search.to_json(found, 1e9, 2.0)["evaluations"][0]["context_exchange_bytes_per_layer"]
    assert exchanged["as_it_is"] == exchanged["tokens_for_heads"] + exchanged["heads_whole"]
    assert "chosen_blocks" not in exchanged
    assert "context axis" in plan_report.describe(found, 1e9, 2.0)
    plan_report.build_page(found, "title", 1e9, 2.0)
    whole, _ = plan(monkeypatch, lambda c: compiled())
    assert "context_exchange_bytes_per_layer" not in search.to_json(whole, 1e9, 2.0)["evaluations"][0]
    assert "context axis" not in plan_report.describe(whole, 1e9, 2.0)


def test_state_by_hand():
    """Parameters and moments in float32 over 4 chips; norms are whole on each."""
    held = state_bytes(TRAIN, Candidate(MeshConfig(data=1, fsdp=4), 8))
    layer = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256
    matrices, norms = 2 * layer + 2 * 512 * 128, (2 * 2 + 1) * 128
    assert held["parameters"] == 4 * (matrices // 4 + norms)
    assert held["optimizer"] == 2 * held["parameters"] + 4  # and Adam's count of steps


def test_decoding_state_by_hand():
    held = state_bytes(Workload("decode", MODEL, 256), Candidate(MeshConfig(data=2, fsdp=1, tensor=2), 8))
    assert held["cache"] == 2 * 2 * (
        2 * 4 * 1 * 256 * 32
    )  # bfloat16 keys and values: layers, rows, heads, slots, width


@pytest.mark.parametrize("use_nope", [False, True])
def test_sparse_decoding_state_by_hand(use_nope):
    """Kernels are divided by heads as keys are, not along the sequence, whatever their number."""
    model = dataclasses.replace(MODEL, sparse_config=SparseConfig(dense_len=-1, use_nope=use_nope))
    held = state_bytes(Workload("decode", model, 320), Candidate(MeshConfig(data=2, fsdp=1, tensor=2), 8))
    # 19 kernels of 32 at a stride of 16, and 4 of 128 at a stride of 64.
    slots = (2 + use_nope) * 320 + (320 - 32) // 16 + 1 + (320 - 128) // 64 + 1
    assert held["cache"] == 2 * 2 * 4 * 1 * slots * 32  # bfloat16: layers, rows, heads, slots and kernels, width


def test_rows_longer_than_the_model_allows_are_named():
    with pytest.raises(ConfigError, match=r"seq_len = 5000: must be at most ModelConfig\.max.* = 4096"):
        Workload("train", MODEL, 5000)
