"""Meshes that do not fit are named before anything is compiled, by `pretrain` and by its dry run."""

import jax
import pytest

from cpm_jax.common import exit_codes
from cpm_jax.common.sharding import MeshConfig, make_abstract_mesh, make_mesh
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import Phase, ScheduleConfig
from cpm_jax.training.train_state import init_state
from experiments import dry_run, run

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("some words that come again and again, " * 2000)
    settings = {"seq_len": 36, "vocab_size": 280, "validation_fraction": 0.0, "num_workers": 0}
    prepare(PrepareConfig(sources=str(folder / "text.txt"), **settings), folder / "set", progress=False)
    return folder / "set"


def pretrain(dataset, workdir, *flags):
    return run.main(
        [
            *("pretrain", "--gin_file=arch/llama.gin", "--gin_file=size/2m.gin", "--gin_file=data/folders.gin"),
            *("--gin_file=optim/wsd.gin", "--gin_file=runs/pretrain.gin", f"--gin.DATA={dataset}"),
            *("--gin.DTYPE=float32", "--gin.NUM_LAYERS=1", "--gin.D_MODEL=96", "--gin.D_FF=80", "--gin.NUM_HEADS=6"),
            *("--gin.NUM_KV_HEADS=2", "--gin.HEAD_DIM=16", "--gin.VOCAB_SIZE=288", "--gin.BATCH_SIZE=16"),
            *("--gin.TRAIN_STEPS=3", "--gin.WARMUP_STEPS=1", "--gin.DECAY_STEPS=1", "--gin.EVAL_EVERY=0"),
            *("--gin.LOG_EVERY=1", "--gin.PEAK_LR=0.01", f"--workdir={workdir}", *flags),
        ]
    )


@pytest.mark.parametrize("dry", [True, False], ids=["dry_run", "pretrain"])
@pytest.mark.parametrize(
    ("mesh", "flags", "message"),
    [
        ({"tensor": 4}, (), "MeshConfig.tensor = 4: must divide ModelConfig.num_heads = 6"),
        ({"tensor": 8}, ("NUM_HEADS=8", "NUM_KV_HEADS=8", "D_FF=100"), "'mlp' of size 100 cannot be divided into 8"),
        ({"tensor": 4}, ("NUM_HEADS=8", "VOCAB_SIZE=282"), "'vocab' of size 282 cannot be divided into 4 parts"),
        ({"fsdp": 8}, ("D_MODEL=100", "NUM_HEADS=2"), "'embed' of size 100 cannot be divided into 8 parts"),
        ({"fsdp": 8}, ("BATCH_SIZE=12",), "batch_size = 12: must be a multiple of"),
        ({"data": 8, "fsdp": 1}, ("NUM_MICROBATCHES=4",), "batch_size = 16: must be a multiple of"),
        ({"context": 8}, (), "seq_len = 36: must be a multiple of MeshConfig.context = 8"),
        ({"tensor": 3}, (), "fsdp -1 x tensor 3 x context 1 does not fit 8 devices"),
    ],
)
def test_what_does_not_divide_is_named(dataset, tmp_path, capsys, monkeypatch, mesh, flags, message, dry):
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("compiled"))
    flags = [f"--gin.{flag}" for flag in flags] + [f"--gin.MeshConfig.{axis}={size}" for axis, size in mesh.items()]
    code = pretrain(dataset, tmp_path / "run", *flags, *["--dry_run"] * dry)
    said = capsys.readouterr().err
    assert code == exit_codes.BAD_CONFIG, said
    assert message in said
    assert f"set by --gin.MeshConfig.{next(iter(mesh))}" in said
    assert not (tmp_path / "run" / "config.gin").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_mesh_of_fewer_devices_is_refused_and_can_be_planned(dataset, tmp_path, capsys):
    flags = ["--gin.MeshConfig.fsdp=2", "--gin.MeshConfig.tensor=2"]
    assert pretrain(dataset, tmp_path / "run", *flags) == exit_codes.BAD_CONFIG
    assert "fsdp 2 x tensor 2 x context 1 does not fit 8 devices" in capsys.readouterr().err
    assert pretrain(dataset, tmp_path / "run", *flags, "--dry_run") == exit_codes.OK
    assert "4 devices; 8 seen here" in capsys.readouterr().out


def test_memory_per_device_is_that_of_the_arrays(tiny_config):
    mesh_config, schedule = MeshConfig(fsdp=4, tensor=2), ScheduleConfig(phases=(Phase(steps=1, end=0.01),))
    optimizer = OptimizerConfig()
    state = init_state(
        tiny_config, make_optimizer(optimizer, schedule, tiny_config), jax.random.key(0), make_mesh(mesh_config)
    )
    lines = dry_run.memory_lines(tiny_config, optimizer, schedule, 8, 64, make_abstract_mesh(mesh_config))
    for name, tree in (("parameters", state.params), ("optimizer", state.opt_state)):
        held = dict.fromkeys(jax.devices(), 0)
        for leaf in jax.tree.leaves(tree):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        line = next(line for line in lines if line.endswith(name))
        assert len(set(held.values())) == 1
        assert float(line.split()[2]) == pytest.approx(held[jax.devices()[0]] / 2**20, abs=0.0051)
