"""What the study of strategies makes of losses. Its gin files are built in tests/experiments/test_gin_configs.py."""

import math

import pytest
import scipy.stats

from benchmarks import strategy_report
from benchmarks.results import Benchmark
from benchmarks.strategy import GIN_DIR, QUESTIONS, SEEDS, losses, step_law
from benchmarks.strategy_report import MARGIN, Comparison, draw, read_answers, save_answers, write_results
from cpm_jax.common.gin_files import list_gin_files
from cpm_jax.common.gin_utils import Settings
from cpm_jax.modeling.model_size import count_params
from cpm_jax.scaling.runs import Run
from cpm_jax.scaling.space import points
from experiments.pretrain import PretrainConfig
from experiments.sweep import SweepConfig


def compare(claim, *differences, reference=4.0):
    """A comparison whose seeds differ by so much."""
    base = dict.fromkeys(range(len(differences)), reference)
    return Comparison("q", "a", "b", claim, {s: base[s] + d for s, d in enumerate(differences)}, base)


def test_the_interval_is_that_of_a_t_test():
    found = compare("better", -0.03, -0.01, -0.02)
    low, high = scipy.stats.ttest_1samp([-0.03, -0.01, -0.02], 0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-6)


@pytest.mark.parametrize(
    ("claim", "differences", "verdict"),
    [
        ("better", (-0.03, -0.031, -0.029), "holds"),
        ("better", (-0.03, 0.01, -0.02), "direction only"),
        ("better", (0.001, 0.002, 0.001), "not at this scale"),
        ("no worse", (0.001, 0.002, 0.001), "holds"),  # within the margin of 0.02
        ("no worse", (-0.2, -0.25, -0.22), "holds"),
        ("no worse", (0.0, 0.03, 0.01), "direction only"),
        ("no worse", (0.03, 0.031, 0.029), "not at this scale"),
        ("", (0.03, 0.031, 0.029), "worse"),
        ("", (-0.03, -0.031, -0.029), "better"),
        ("", (-0.03, 0.02, 0.01), "no difference told"),
    ],
)
def test_verdicts(claim, differences, verdict):
    assert pytest.approx(0.02) == MARGIN * 4.0
    assert compare(claim, *differences).verdict == verdict


def test_seeds_are_paired():
    """Seeds that differ much from each other and not within themselves tell a small difference."""
    ours, theirs = {0: 3.0, 1: 4.0, 2: 5.0}, {0: 3.01, 1: 4.01, 2: 5.011}
    assert Comparison("q", "a", "b", "better", ours, theirs).verdict == "holds"


def run_of(seed, loss, **config):
    return Run(
        id=f"{seed}{config}",
        num_params=1,
        num_embedding_params=1,
        d_model=1,
        num_layers=1,
        tokens=1,
        flops=1.0,
        batch_tokens=1,
        learning_rate=0.01,
        seed=seed,
        loss=loss,
        config={"SEED": seed} | config,
        status="done" if loss else "diverged",
    )


def test_losses_are_chosen_by_bindings_and_none_may_be_missing():
    runs = [run_of(seed, seed + 1.5, FP8=fp8) for seed in SEEDS for fp8 in (False, True)]
    assert losses(runs, {"FP8": True}) == {0: 1.5, 1: 2.5, 2: 3.5}
    runs[-1] = run_of(2, None, FP8=True)
    with pytest.raises(ValueError, match=r"\{'FP8': True\}: seeds \[0, 1, 2\] are needed, .*2: 'diverged'"):
        losses(runs, {"FP8": True})


def test_step_law_at_one_billion():
    """The example of published_laws.py, and how it grows."""
    rate, batch = step_law(1e9, 1e11)
    assert rate == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert 1.6e-3 < rate < 1.7e-3
    assert math.log(step_law(1e9, 1e12)[1] / batch, 10) == pytest.approx(0.571)


def test_every_question_has_its_file():
    names = {path.stem for path in list_gin_files() if path.parent.name == "strategy"}
    assert names == {*QUESTIONS, "base", "full", "gpu", "depth_gpu"}


@pytest.mark.parametrize(("size", "own", "params"), [("", [], 0.63e6), ("gpu", ["depth_gpu"], 4.9e6)])
def test_shapes_of_depth_have_equal_parameters(size, own, params):
    files = [f"{GIN_DIR}/{name}.gin" for name in ("depth", *([size] if size else []), *own)]
    config = Settings(files, ["--gin.DATA=somewhere"], SweepConfig).build()
    found = []
    for point in points(config.base().space):
        flags = [f"--gin.{name}={value!r}" for name, value in (config.bindings | point).items()]
        model = Settings(config.base().gin_files, flags, PretrainConfig).build().model
        assert model.head_size == 32
        found.append(count_params(model).total)
    assert len(set(found)) == 3
    assert found == pytest.approx([params] * 9, rel=0.02)


def test_the_figure_has_a_line_for_each_comparison():
    found = [compare("better", -0.03, -0.031, -0.029), compare("", 0.1, 0.2, 0.3)]
    (axis,) = draw(found, "tiny").axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["q: a − b"] * 2


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results of its own."""
    monkeypatch.setattr(strategy_report, "RESULTS_DIR", tmp_path)
    monkeypatch.setattr(strategy_report, "IMAGES", tmp_path)
    return tmp_path


def test_answers_of_several_machines_are_kept_and_the_newer_wins(results):
    save_answers("strategy", "mtp", [compare("better", 0.1, 0.2, 0.3), compare("better", 0.2, 0.2, 0.3)], "tiny")
    save_answers("strategy", "fp8", [compare("no worse", 0.1, 0.2, 0.4)], "tiny")
    newer = [compare("better", -0.1, -0.2, -0.3)]
    save_answers("strategy", "mtp", newer, "tiny")
    assert read_answers("strategy", "tiny") == {"fp8": [compare("no worse", 0.1, 0.2, 0.4)], "mtp": newer}
    with pytest.raises(ValueError, match="'fp8' is of tiny, this study of large"):
        read_answers("strategy", "large")


def test_what_is_written_says_the_verdict(results, monkeypatch):
    written = {}
    monkeypatch.setattr(Benchmark, "write", lambda self: written.setdefault("rows", self.rows))
    write_results("strategy", "python", [compare("no worse", 0.001, 0.002, 0.001)], "tiny")
    assert "claimed to be no worse: holds" in written["rows"][0].baseline_name
    assert (results / "strategy.svg").exists()
