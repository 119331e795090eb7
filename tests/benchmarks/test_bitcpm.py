"""The study of two-stage ternary training: its sizes, its arms, what it makes of losses, and a small one of its own."""

import contextlib
import dataclasses
import json
import time

import pytest

from benchmarks.bitcpm import claimed, comparisons, draw_shares, verdict, write
from benchmarks.bitcpm_study import CELLS_DIR, CELLS_FILE, FROM_SCRATCH, FULL_PRECISION, Study, StudyConfig, arms
from benchmarks.results import Benchmark
from cpm_jax.common.config import ConfigError
from cpm_jax.common.gin_files import list_gin_files
from cpm_jax.common.gin_utils import Settings
from cpm_jax.modeling.model_size import count_params
from cpm_jax.training.schedules import make_schedule
from tests.experiments.test_pretrain import config, make_dataset

SIZES = {  # parameters, and thousands of tokens of a training with rows of 128
    "bitcpm_study": (229_000, 1_638),
    "bitcpm_study_3h": (520_000, 16_384),
    "bitcpm_study_gpu": (4_951_000, 393_216),
    "bitcpm_groups": (1_640_000, 819),
}
NAMES = [path.stem for path in list_gin_files() if path.stem.startswith(("bitcpm_study", "bitcpm_groups"))]


def study_of(dataset, **changes):
    given = {
        "base": config(dataset, train={"steps": 100, "eval_batches": 2, "log_every": 50}),
        "peak_lr": 0.01,
        "qat_peak_lr": 0.005,
        "warmup_steps": 5,
        "decay_steps": 20,
        "group_size": 32,
        "other_group_sizes": (),
        "shares": (0.1, 0.4),
        "control_share": 0.4,
        "seeds": (0, 1),
    }
    return StudyConfig(**given | changes)


@pytest.fixture
def study():
    return study_of("/data/set")


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    study = Settings([f"papers/minicpm4/{name}.gin"], ["--gin.DATA=/data/set"], StudyConfig).build()
    params, thousands = SIZES[name]
    assert count_params(study.base.model).total == pytest.approx(params, rel=0.01)
    train = study.base.train
    assert train.steps * train.batch_size * 128 // 1000 == thousands
    assert study.decay_steps == 0.2 * train.steps
    assert study.base.model.ternary is None


def test_every_arm_sees_all_tokens_and_goes_on_where_the_stable_run_was(study, tmp_path):
    made = Study(study, tmp_path)
    by_name = {arm.name: made.cell(arm, 1) for arm in arms(study)}
    assert list(by_name) == [
        FULL_PRECISION,
        FROM_SCRATCH,
        "10% ternary",
        "40% ternary",
        "40% ternary, no warm-up",
        "40% ternary, distilled",
    ]
    stable = made.stable(1)
    assert (stable.train.steps, stable.checkpoint.every, stable.model.ternary) == (90, 10, None)
    for name, cell in by_name.items():
        assert (cell.train.steps, cell.train.seed, cell.init) == (100, 1, "state")
        assert (cell.model.ternary is None) == (name == FULL_PRECISION)
        assert (cell.loss.distillation is not None) == name.endswith("distilled")
    starts = {name: cell.init_from.rpartition("/")[2] for name, cell in by_name.items()}
    assert starts == {
        FULL_PRECISION: "80",
        FROM_SCRATCH: "",
        "10% ternary": "90",
        "40% ternary": "60",
        "40% ternary, no warm-up": "60",
        "40% ternary, distilled": "60",
    }

    def rates(name, *steps):
        return [float(make_schedule(by_name[name].schedule)(step)) for step in steps]

    assert rates("40% ternary", 60, 65, 79, 100) == pytest.approx([0, 0.005, 0.005, 0.0005])
    assert rates("40% ternary, no warm-up", 60) == pytest.approx([0.005])
    assert rates("10% ternary", 90, 95, 100) == pytest.approx([0, 0.005, 0.0005])  # decays all the way
    assert rates(FULL_PRECISION, 5, 80, 100) == pytest.approx([0.01, 0.01, 0.001])
    constant = make_schedule(stable.schedule)
    assert [float(constant(step)) for step in (5, 80, 90)] == pytest.approx([0.01] * 3)


def rows_of(**losses):
    return [
        {"arm": arm, "seed": seed, "loss": loss, "seconds": 1.0}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def test_the_claim_is_judged_by_its_worst_share(study):
    rows = rows_of(
        **{
            FULL_PRECISION: (4.0, 4.1),
            FROM_SCRATCH: (4.2, 4.3),
            "10% ternary": (4.5, 4.6),
            "40% ternary": (4.21, 4.31),  # within half a percent
            "40% ternary, no warm-up": (4.3, 4.4),
            "40% ternary, distilled": (4.2, 4.32),
        }
    )
    found = comparisons(study, rows)
    said = {(one.arm, one.reference): one.verdict for one in found}
    assert said[FROM_SCRATCH, FULL_PRECISION] == "worse"
    assert said["10% ternary", FROM_SCRATCH] == "worse"
    assert said["40% ternary", FROM_SCRATCH] == "holds"
    assert said["40% ternary", "40% ternary, no warm-up"] == "holds"
    assert said["40% ternary, distilled", "40% ternary"] == "not at this scale"
    assert [one.arm for one in claimed(found)] == ["40% ternary"]
    assert verdict(claimed(found)) == "holds"
    worse = dataclasses.replace(claimed(found)[0], losses={0: 4.4, 1: 4.5})
    assert verdict([*claimed(found), worse]) == "not at this scale"
    assert len(draw_shares(study, rows, "small").axes[0].lines) > 6


def test_what_makes_no_study(study):
    for changes, match in (
        ({"shares": (0.125, 0.4)}, r"StudyConfig.shares = .*: must be whole percents below 1"),
        ({"shares": (0.1,)}, r"StudyConfig.control_share = 0.4: must be 0 or one of shares"),
        ({"seeds": (0,)}, "an interval needs at least two"),
        ({"warmup_steps": 10}, "must be below the 10 steps of the shortest second stage"),
        ({"base": config("/data/set")}, r"TrainConfig.steps = 6: must be a multiple of 100"),
    ):
        with pytest.raises(ConfigError, match=match):
            dataclasses.replace(study, **changes)


def test_what_is_written(study, tmp_path, monkeypatch):
    rows = rows_of(**{arm.name: (4.0 + i / 10, 4.1 + i / 10) for i, arm in enumerate(arms(study))})
    monkeypatch.setattr("benchmarks.bitcpm.IMAGES", tmp_path)
    written = []
    monkeypatch.setattr(Benchmark, "write", lambda self: written.extend(self.rows))
    write("small", "python -m benchmarks.bitcpm", study, rows)
    assert len(written) == len(comparisons(study, rows)) + 1
    assert "trained ternary at the end, are no worse than all of them: not at this scale" in written[-1].metric
    assert (written[-1].ours, written[-1].baseline) == (0, 1)
    assert (tmp_path / "small.svg").is_file()


@pytest.mark.slow
def test_a_study_in_pieces(tmp_path):
    """Stopped and gone on with, beside other processes; a cell leaves its line."""
    study = study_of(str(make_dataset(tmp_path / "data", "common")), shares=(0.5,), control_share=0)
    folder = tmp_path / "study"
    assert not Study(study, folder).run(time.monotonic() - 1)
    made = Study(study, folder)
    with contextlib.ExitStack() as others:
        for arm in arms(study):
            assert others.enter_context(made._taken(arm.name, 1))
        with made._taken(FROM_SCRATCH, 0):
            assert not made.run(float("inf"))
        assert [(row["arm"], row["seed"]) for row in made.rows()] == [(FULL_PRECISION, 0), ("50% ternary", 0)]
        again = Study(study, folder)
        assert not again.run(float("inf"))
    rows = again.rows()
    assert [(row["arm"], row["seed"]) for row in rows][2:] == [(FROM_SCRATCH, 0)]
    assert len({row["loss"] for row in rows}) == 3
    assert all(1 < row["loss"] < 5.7 for row in rows)
    assert sorted(path.name for path in (folder / CELLS_DIR).iterdir() if path.is_dir()) == [
        "full_precision-0",
        "stable-0",
    ]
    with (folder / CELLS_FILE).open("a") as file:
        file.writelines(json.dumps(row | {"seed": 1}) + "\n" for row in rows)
    assert again.run(float("inf"))
    assert not (folder / CELLS_DIR).exists()
    with pytest.raises(
        ConfigError, match=r"holds another study: peak_lr: 0.01 there, now 0.02; take another --workdir"
    ):
        Study(dataclasses.replace(study, peak_lr=0.02), folder)
