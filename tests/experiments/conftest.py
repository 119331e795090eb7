"""Sweeps to test with."""

import pytest

from cpm_jax.data.prepare import PrepareConfig, prepare
from experiments.sweep import SweepConfig

STEPS, ROWS, SEQ_LEN = 30, 4, 64
FILES = ("arch/minicpm4.gin", "size/2m.gin", "data/folders.gin", "optim/wsd_mup.gin", "runs/pretrain.gin")
RATES = "values('PEAK_LR', 0.01, 0.03)"


@pytest.fixture(scope="session")
def sweep_data(pool_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    settings = PrepareConfig(pool_files["prose"], SEQ_LEN, vocab_size=300, num_workers=0, validation_fraction=0.1)
    prepare(settings, folder, progress=False)
    return str(folder)


@pytest.fixture
def make_sweep(sweep_data):
    """A sweep of a model that trains in a second."""

    def make(space=RATES, bindings=None, **settings) -> SweepConfig:
        base = {
            "DATA": sweep_data,
            "VOCAB_SIZE": 300,
            "NUM_LAYERS": 1,
            "D_MODEL": 32,
            "NUM_HEADS": 2,
            "NUM_KV_HEADS": 1,
            "D_FF": 64,
            "DTYPE": "float32",
            "BATCH_SIZE": ROWS,
            "TRAIN_STEPS": STEPS,
            "WARMUP_STEPS": 5,
            "DECAY_STEPS": 10,
            "EVAL_EVERY": 10,
            "CHECKPOINT_EVERY": 10,
            "LOG_EVERY": 1,
        }
        fast = {"heartbeat_seconds": 1, "grace_seconds": 15, "report_seconds": 1.0}
        return SweepConfig(gin_files=FILES, bindings=base | (bindings or {}), space=space, **(fast | settings))

    return make
