"""The command line: verbs, layers, what a workdir keeps, exit codes."""

import json
import subprocess
import sys
import types

import pytest

from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError, config_dataclass
from experiments import run

TOY = """\
# A job for tests.
from __gin__ import dynamic_registration

from experiments import toy

DATA = %gin.REQUIRED  # a folder
STEPS = 3

toy.ToyConfig:
    data = %DATA
    steps = %STEPS
"""


@config_dataclass
class ToyConfig:
    """Fields of every plain kind."""

    data: str
    steps: int = 1
    rate: float = 0.1

    def __post_init__(self):
        if self.steps < 0:
            raise ConfigError(f"ToyConfig.steps = {self.steps}: must be 0 or more", field="ToyConfig.steps")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A verb `toy`; returns the list of (config, workdir) it was run with."""
    module = types.ModuleType("experiments.toy")
    ToyConfig.__module__ = module.__name__
    module.ToyConfig = ToyConfig
    calls = []

    def job(config, workdir):
        if config.data == "broken":
            raise InputError("broken: not a dataset")
        if config.data == "other":
            raise ConfigError("data = 'other': the run was begun with 'one'", field="data")
        if config.data == "preempted":
            raise exit_codes.Stop(exit_codes.PREEMPTED, "stopped and saved at step 3")
        calls.append((config, workdir))

    module.run = job
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules["experiments"], "toy", module, raising=False)
    monkeypatch.setitem(run.VERBS, "toy", run.Verb("a job for tests", uses_devices=False))
    monkeypatch.setitem(run.VERBS, "look", run.Verb("reads a toy", uses_devices=False, reads_runs=True))
    module.LookConfig = ToyConfig
    monkeypatch.setitem(sys.modules, "experiments.look", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.gin").write_text(TOY)
    return calls


FILE = "--gin_file=toy.gin"


def test_runs_the_job(toy, tmp_path):
    assert run.main(["toy", FILE, "--gin.DATA=/some/set", "--workdir=out"]) == exit_codes.OK
    [(config, workdir)] = toy
    assert config == ToyConfig(data="/some/set", steps=3)
    assert (tmp_path / workdir / "config.gin").exists()


def test_the_workdir_keeps_what_was_run(toy, tmp_path):
    for steps in (4, 5):
        run.main(["toy", FILE, "--gin.DATA=a set", f"--gin.STEPS={steps}", "--workdir=out"])
    out = tmp_path / "out"
    commands = (out / "command.txt").read_text().splitlines()
    assert len(commands) == 2
    assert commands[0].endswith(
        "python -m experiments.run toy --gin_file=toy.gin '--gin.DATA=a set' --gin.STEPS=4 --workdir=out"
    )
    assert "STEPS = 5" in (out / "config.gin").read_text()
    assert "ToyConfig.rate = 0.1" in (out / "operative_config.gin").read_text()
    versions = json.loads((out / "versions.json").read_text())
    assert versions["python"].startswith(f"{sys.version_info.major}.")
    assert {"jax", "git_revision"} <= set(versions)


def test_flags_over_files_over_the_saved_config(toy, tmp_path, capsys):
    run.main(["toy", FILE, "--gin.DATA=one", "--gin.STEPS=7", "--workdir=out"])
    run.main(["toy", "--workdir=out"])
    run.main(["toy", "--gin.DATA=two", "--workdir=out"])
    assert "STEPS" not in capsys.readouterr().out
    run.main(["toy", FILE, "--gin.DATA=three", "--workdir=out"])
    assert [(c.data, c.steps) for c, _ in toy] == [("one", 7), ("one", 7), ("two", 7), ("three", 3)]
    printed = capsys.readouterr().out
    assert "-STEPS = 7" in printed
    assert "+STEPS = 3" in printed


def test_a_workdir_belongs_to_one_verb(toy, tmp_path, capsys):
    run.main(["toy", FILE, "--gin.DATA=one", "--workdir=out"])
    before = (tmp_path / "out" / "config.gin").read_text()
    assert run.main(["look", FILE, "--gin.DATA=two", "--workdir=out"]) == exit_codes.OK
    assert (tmp_path / "out" / "config.gin").read_text() == before
    run.main(["look", FILE, "--gin.DATA=two", "--workdir=other"])
    assert run.main(["toy", FILE, "--gin.DATA=one", "--workdir=other"]) == exit_codes.BAD_CONFIG
    assert "holds a run of look" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["toy", FILE, "--workdir=o"], exit_codes.BAD_CONFIG, "DATA is required by toy.gin:6 (a folder)"),
        (["toy", FILE, "--gin.DTAA=x", "--workdir=o"], exit_codes.BAD_CONFIG, "did you mean DATA"),
        (["toy", FILE, "--gin.DATA=x", "--gin.STEPS=few", "--workdir=o"], exit_codes.BAD_CONFIG, "valid integer"),
        (
            ["toy", FILE, "--gin.DATA=x", "--gin.STEPS=-1", "--workdir=o"],
            exit_codes.BAD_CONFIG,
            "set by --gin.STEPS=-1",
        ),
        (["toy", FILE, "--gin.DATA=broken", "--workdir=o"], exit_codes.BAD_INPUT, "broken: not a dataset"),
        (["toy", FILE, "--gin.DATA=x"], exit_codes.BAD_CONFIG, "toy needs --workdir"),
        (["toy", FILE, "--gin.DATA=x", "--workdir=toy.gin"], exit_codes.BAD_CONFIG, "--workdir=toy.gin"),
        (["toy", "--gin_file=typ.gin", "--workdir=o"], exit_codes.BAD_CONFIG, "no gin file 'typ.gin'"),
        (["pretrian", "--workdir=o"], exit_codes.BAD_CONFIG, "no verb 'pretrian'; did you mean pretrain?"),
    ],
)
def test_what_a_user_gets_wrong_is_one_message(toy, capsys, arguments, code, shown):
    assert run.main(arguments) == code
    printed = capsys.readouterr().err
    assert shown in printed
    assert "Traceback" not in printed
    assert toy == []


def test_a_start_that_the_job_refuses_leaves_the_saved_config(toy, tmp_path, capsys):
    run.main(["toy", FILE, "--gin.DATA=one", "--workdir=out"])
    before = (tmp_path / "out" / "config.gin").read_text()
    assert run.main(["toy", "--gin.DATA=other", "--workdir=out"]) == exit_codes.BAD_CONFIG
    assert "set by --gin.DATA=other" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.gin").read_text() == before
    assert run.main(["toy", FILE, "--gin.DATA=other", "--workdir=new"]) == exit_codes.BAD_CONFIG
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["command.txt"]


def test_a_stopped_run_has_its_own_exit_code(toy, capsys):
    assert run.main(["toy", FILE, "--gin.DATA=preempted", "--workdir=out"]) == exit_codes.PREEMPTED
    assert capsys.readouterr().err == "stopped and saved at step 3\n"


def test_debug_shows_where_an_error_came_from(toy, capsys):
    run.main(["toy", FILE, "--workdir=out", "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(["--work_dir=out"], "--work_dir"), (["--gin.DATA", "x"], "--gin.DATA: write the value after an equals sign")],
)
def test_malformed_options_are_refused(toy, capsys, arguments, shown):
    with pytest.raises(SystemExit) as error:
        run.main(["toy", FILE, *arguments])
    assert error.value.code == exit_codes.BAD_CONFIG
    assert shown in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from experiments import run; code = run.main(['--help']);"
        "heavy = {'jax', 'flax', 'numpy', 'gin', 'orbax', 'grain'} & set(sys.modules); assert not heavy, heavy;"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == exit_codes.OK, done.stderr
    for verb in run.VERBS:
        assert f"  {verb} " in done.stdout


def test_no_verb_is_an_error_that_shows_the_help(capsys):
    assert run.main([]) == exit_codes.BAD_CONFIG
    assert "pretrain" in capsys.readouterr().out
