"""What a trial of a sweep is: its id, the program that it may share, spaces in Python files."""

import pytest

from cpm_jax.common.config import ConfigError
from experiments import sweep_trials


def test_two_spellings_of_a_trial_share_an_id(make_sweep, sweep_data, tmp_path):
    base = make_sweep().base()
    plain = sweep_trials.resolve(base, {"PEAK_LR": 0.01})
    spelled = sweep_trials.resolve(base, {"wsd.peak_lr": 0.01, "INIT": "params"})
    assert plain.id == spelled.id
    moved = tmp_path / "set"
    moved.symlink_to(sweep_data)
    assert sweep_trials.resolve(base, {"PEAK_LR": 0.01, "DATA": str(moved)}).id == plain.id
    assert sweep_trials.resolve(base, {"PEAK_LR": 0.01, "LOG_EVERY": 7, "REMAT": "full"}).id == plain.id
    others = [{"PEAK_LR": 0.02}, {"PEAK_LR": 0.01, "SEED": 1}, {"PEAK_LR": 0.01, "D_FF": 96}]
    ids = {sweep_trials.resolve(base, bindings).id for bindings in others}
    assert len(ids | {plain.id}) == 4


def test_which_trials_share_a_program(make_sweep):
    base = make_sweep().base()

    def key(**bindings):
        return sweep_trials.program_key(sweep_trials.resolve(base, {"PEAK_LR": 0.01} | bindings))

    decay = {"OptimizerConfig.weight_decay": 0.0}

    assert key() == key(PEAK_LR=0.02, SEED=3, DIM_MODEL_BASE=16, WARMUP_STEPS=7, **decay)
    assert len({key(), key(D_FF=96), key(BATCH_SIZE=2), key(CHECKPOINT_EVERY=5), key(EVAL_EVERY=5)}) == 5
    assert key(**{"TrainConfig.average_last": 2}) is None


def test_python_files_name_space_and_base(make_sweep, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from cpm_jax.scaling import space as s\nBINDINGS = {'D_FF': 96}\nSPACE = s.values('PEAK_LR', 0.01, 0.02)\n"
    )
    base = make_sweep(str(file)).base()
    assert sweep_trials.resolve(base, {"PEAK_LR": 0.01}).config.model.d_ff == 96
    file.write_text("SPACE = 3\n")
    with pytest.raises(ConfigError, match="SPACE = 3: accepted is a space"):
        make_sweep(str(file)).base()
    file.write_text("SPACE = [\n")
    with pytest.raises(ConfigError, match=r"mine\.py': '\[' was never closed"):
        make_sweep(str(file)).base()
    with pytest.raises(ConfigError, match="No such file"):
        make_sweep(str(tmp_path / "none.py")).base()
