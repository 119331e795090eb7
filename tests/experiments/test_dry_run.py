"""What a dry run says, against what JAX and the data really need."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import MeshConfig, make_abstract_mesh
from cpm_jax.data.mixture import from_folders
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.loop import TrainConfig
from cpm_jax.training.losses import loss_sums
from cpm_jax.training.schedules import wsd
from experiments import dry_run, run
from experiments.pretrain import PretrainConfig


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"document {i}: " + "some words that come again " * (20 + i))
    prepare(
        PrepareConfig(sources=str(text), seq_len=64, vocab_size=280, validation_fraction=0.1, num_workers=0),
        folder / "set",
        progress=False,
    )
    return folder / "set"


def pretrain_config(model, path, **kwargs):
    return PretrainConfig(
        model=dataclasses.replace(model, vocab_size=512),
        mixture=from_folders(str(path)),
        schedule=wsd(peak_lr=0.01, train_steps=50, warmup_steps=5, decay_steps=10),
        train=TrainConfig(steps=50, batch_size=4, num_microbatches=2, **kwargs),
    )


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_activations_are_of_the_size_that_xla_needs(tiny_config, remat):
    """Of XLA's temporary memory for a gradient, which has buffers of its own and fuses others away."""
    model = dataclasses.replace(tiny_config, num_layers=4, d_ff=192, remat=remat)
    rows, seq_len = 4, 256
    ints = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ints)
    batch["loss_weights"] = jax.ShapeDtypeStruct((rows, seq_len), jnp.float32)
    batch["source_ids"] = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def gradient(params, batch):
        return jax.grad(lambda p: loss_sums(decoder.bind(model, p), batch, 1).nll)(params)

    compiled = jax.jit(gradient).lower(decoder.abstract_params(model), batch).compile()
    ratio = dry_run.activation_bytes(model, rows, seq_len) / compiled.memory_analysis().temp_size_in_bytes
    assert 0.4 < ratio < 2.5


def test_remat_keeps_less(tiny_config):
    model = dataclasses.replace(tiny_config, num_layers=8)
    none, dots, full = (
        dry_run.activation_bytes(dataclasses.replace(model, remat=remat), 2, 128) for remat in ("none", "dots", "full")
    )
    assert full < dots < none


def test_a_training_on_data_that_is_there(tiny_config, dataset, tmp_path):
    said = dry_run.describe(pretrain_config(tiny_config, dataset), tmp_path / "new")
    assert "which is new" in said
    assert "schedule     50 steps of 256 tokens" in said
    assert "activations of 2 x 64 tokens (estimate)" in said
    assert "steps 0 to 5: 1280 tokens, 0 to 0.01, linear" in said
    assert "epochs over all of it" in said
    assert "NOT THERE" not in said


def test_parts_that_do_not_fit_are_found(tiny_config, dataset, tmp_path):
    config = pretrain_config(tiny_config, dataset)
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    with pytest.raises(ConfigError, match="vocab_size = 100"):
        dry_run.describe(small, tmp_path)
    odd = dataclasses.replace(config, train=dataclasses.replace(config.train, num_microbatches=3))
    with pytest.raises(ConfigError, match="batch_size = 4"):
        dry_run.describe(odd, tmp_path)


def memory(lines):
    """(one copy, per device) in MiB by what it is."""
    table = [line.split("MiB") for line in lines[1:]]
    return {what.strip(): (float(whole.replace(",", "")), float(one.replace(",", ""))) for whole, one, what in table}


def test_memory_is_that_of_the_state(tiny_config, dataset):
    config = pretrain_config(tiny_config, dataset)
    params = sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract_params(config.model)))
    one_device = make_abstract_mesh(MeshConfig())
    mib = memory(dry_run.memory_lines(config.model, config.optimizer, config.schedule, 2, 64, one_device))
    assert mib["parameters"][0] == pytest.approx(4 * params / 2**20, abs=0.0051)
    assert mib["optimizer"][0] == pytest.approx(8 * params / 2**20, abs=0.0051)
    assert mib["gradients"] == mib["parameters"]
    assert sum(whole for whole, _ in mib.values()) == pytest.approx(2 * mib["in all"][0], abs=0.03)
    assert all(whole == one for whole, one in mib.values())


def test_memory_per_device_by_hand(dataset):
    """Llama-shaped: matrices are divided over fsdp and tensor, norms lie on every device."""
    model = ModelConfig(
        vocab_size=1024, num_layers=4, d_model=256, num_heads=8, num_kv_heads=2, d_ff=512, head_dim=32, dtype="float32"
    )
    config = pretrain_config(model, dataset)
    mesh = make_abstract_mesh(MeshConfig(data=2, fsdp=4, tensor=4, context=2))
    # The vocabulary is pretrain_config's, 512.
    matrices = 2 * 512 * 256 + 4 * (256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 512)
    norms = 4 * 2 * 256 + 256
    mib = memory(dry_run.memory_lines(config.model, config.optimizer, config.schedule, 16, 64, mesh))
    assert mib["parameters"] == pytest.approx(
        (4 * (matrices + norms) / 2**20, 4 * (matrices / 16 + norms) / 2**20), abs=0.0051
    )
    assert mib["optimizer"][1] == pytest.approx(8 * (matrices / 16 + norms) / 2**20, abs=0.0051)
    whole, one = mib["activations of 16 x 64 tokens (estimate)"]
    assert one == pytest.approx(whole / (2 * 4 * 2), abs=0.0051)  # rows over data and fsdp, lengths over context


def test_mesh_of_another_machine(tiny_config, dataset, tmp_path):
    config = dataclasses.replace(pretrain_config(tiny_config, dataset), mesh=MeshConfig(fsdp=2))
    assert "mesh         data 1 x fsdp 2 x tensor 1 x context 1: 2 devices; 1 seen here" in dry_run.describe(
        config, tmp_path
    )
    for mesh, message in [
        (MeshConfig(fsdp=1, tensor=3), "MeshConfig.tensor = 3: must divide ModelConfig.num_heads = 4"),
        (MeshConfig(fsdp=3), "size 64 cannot be divided into 3 parts .MeshConfig.fsdp = 3"),
        (MeshConfig(data=4, fsdp=1), "batch_size = 4: must be a multiple of .* 2 x 4 x 1 = 8"),
        (MeshConfig(fsdp=1, context=3), "seq_len = 64: must be a multiple of MeshConfig.context = 3"),
        (MeshConfig(tensor=2), "tensor 2 x context 1 does not fit 1 devices"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dry_run.describe(dataclasses.replace(config, mesh=mesh), tmp_path)


def test_prepare(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x" * 1000)
    arguments = [
        "prepare",
        f"--gin.DATA={tmp_path}/*.txt",
        "--gin.VOCAB_SIZE=300",
        f"--workdir={tmp_path}/out",
        "--dry_run",
    ]
    assert run.main(arguments) == exit_codes.OK
    assert "a*.txt: 1,000 bytes" in capsys.readouterr().out.replace("/*.txt", "/a*.txt")
    assert run.main([*arguments, f"--gin.DATA={tmp_path}/missing"]) == exit_codes.BAD_INPUT
    assert "missing' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_generate_without_a_checkpoint(tmp_path, capsys):
    assert run.main(["generate", f"--workdir={tmp_path}", "--dry_run"]) == exit_codes.BAD_INPUT
    assert "no checkpoint" in capsys.readouterr().err
