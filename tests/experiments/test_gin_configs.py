"""Every gin file of the repository parses, builds and dry-runs, in a command that its own header gives."""

import re
import shlex

import pytest

from cpm_jax.common import exit_codes
from cpm_jax.common.gin_files import GIN_ROOT, find_gin_file, list_gin_files, read_gin_file, with_includes
from cpm_jax.common.gin_utils import Settings
from experiments import run

ALL = {str(path.relative_to(GIN_ROOT)) for path in list_gin_files()}
RUNS = sorted(name for name in ALL if name.split("/")[0] in ("runs", "papers"))
SIZES = sorted(name for name in ALL if name.startswith("size/"))
INCLUDED_ONLY = {"papers/mimo/common.gin"}
# Of benchmarks: tests/benchmarks/test_verification_trust.py and test_bitcpm.py build them.
STUDIES = {name for name in ALL if re.match(r"papers/minicpm4/(verification_trust|bitcpm_(study|groups))", name)}
STEPS = ["--gin.BATCH_SIZE=4", "--gin.TRAIN_STEPS=100"]


def example(name: str) -> list[str]:
    """The arguments of the command in a file's header."""
    header = read_gin_file(find_gin_file(name)).header
    _, found, command = header.partition("python -m experiments.run ")
    assert found, f"{name}: its header gives no example command"
    return shlex.split(command.replace("\\\n", " "))


def pretrain(arch: str, size: str, optim: str = "optim/wsd_mup.gin", data: str = "data/folders.gin") -> list[str]:
    """A pre-training of a model."""
    files = [f"--gin_file={name}" for name in (arch, size, data, optim, "runs/pretrain.gin")]
    return ["pretrain", *files, "--gin.DATA=/data/set", *STEPS]


def optim_flags(optim: str) -> list[str]:
    """What an optim file asks for."""
    needs = {
        s.name
        for file in with_includes(find_gin_file(optim))
        for s in file.settings
        if repr(s.value) == "%gin.REQUIRED"
    }
    values = {"PEAK_LR": "0.01", "WARMUP_STEPS": "10", "DECAY_STEPS": "10"}
    return [f"--gin.{name}={values[name]}" for name in sorted(needs & values.keys())]


def archs_of(size: str) -> list[str]:
    """The architectures that a size's header says it goes with."""
    return re.findall(r"arch/\w+\.gin", read_gin_file(find_gin_file(size)).header)


PAIRS = [(arch, size) for size in SIZES for arch in archs_of(size)]
PAIRS.append(("arch/minicpm4_128k.gin", "size/minicpm4_8b.gin"))
OPTIMS = sorted(name for name in ALL if name.startswith("optim/"))


COMMANDS = {name: example(name) for name in sorted(set(RUNS) - INCLUDED_ONLY - STUDIES)}
COMMANDS |= {f"{a} {s}": [*pretrain(a, s), *optim_flags("optim/wsd_mup.gin")] for a, s in PAIRS}
COMMANDS |= {name: example(name) for name in ("arch/infllm_v2.gin", "arch/ternary.gin")}
COMMANDS |= {name: [*pretrain("arch/minicpm4.gin", "size/5m.gin", name), *optim_flags(name)] for name in OPTIMS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_file_builds_its_config_and_so_does_what_is_saved_of_it(name, tmp_path):
    arguments = COMMANDS[name]
    files = [a.partition("=")[2] for a in arguments if a.startswith("--gin_file=")]
    flags = [a for a in arguments if a.startswith("--gin.")]
    assert name in files or set(name.split()) <= set(files)
    _, config_class = run.import_verb(arguments[0])
    settings = Settings(files, flags, config_class)
    config = settings.build()
    assert type(config) is config_class
    saved = tmp_path / "config.gin"
    saved.write_text(settings.config_str())
    again = Settings([saved], [], config_class)
    assert again.build() == config
    assert again.config_str() == saved.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, command in COMMANDS.items() if command[0] not in ("convert", "export", "sft", "generate")]
)
def test_every_file_dry_runs(name, tmp_path, capsys):
    # Those that need a checkpoint or weights dry-run in test_end_to_end.py (sft, generate) and test_convert.py
    # (convert, export).
    arguments = [a for a in COMMANDS[name] if not a.startswith("--workdir=")]
    code = run.main([*arguments, f"--workdir={tmp_path / 'work'}", "--dry_run"])
    printed = capsys.readouterr()
    assert code == exit_codes.OK, printed.err
    assert not (tmp_path / "work").exists()
    if arguments[0] == "pretrain":
        for said in ("parameters ", "FLOPs/token ", "activations ", "schedule ", "NOT THERE", "ModelConfig.d_model = "):
            assert said in printed.out


def test_no_file_is_left_out():
    tested = {name for command in COMMANDS.values() for name in command if name.startswith("--gin_file=")}
    included = {file.name for name in tested for file in with_includes(find_gin_file(name.partition("=")[2]))}
    assert included | STUDIES == ALL
    assert all(archs_of(size) for size in SIZES)


@pytest.mark.parametrize("name", sorted(ALL))
def test_headers_say_what_a_file_is(name):
    file = read_gin_file(find_gin_file(name))
    assert file.header
    for flag in re.findall(r"--gin\.([A-Z_0-9]+)=", file.header):
        assert flag.isidentifier()
    for other in re.findall(r"\b(?:arch|size|data|optim|runs|papers)/[\w/]+\.gin", file.header):
        assert other in ALL, f"{name} names {other}, which is not there"


def test_required_macros_are_explained():
    for name in sorted(ALL):
        for setting in read_gin_file(find_gin_file(name)).settings:
            if repr(setting.value) == "%gin.REQUIRED":
                assert setting.comment, f"{setting.where}: say what {setting.name} is"


WRONG = {
    "typo in a macro": (["--gin.NUM_LAYRES=4"], "--gin.NUM_LAYRES=4: no gin file uses the macro", "mean NUM_LAYERS"),
    "typo in a class": (["--gin.ModleConfig.d_ff=4"], "nothing named 'ModleConfig'", "mean ModelConfig"),
    "typo in a parameter": (["--gin.ModelConfig.dff=4"], "ModelConfig has no parameter 'dff'", "mean d_ff"),
    "wrong type": (["--gin.BATCH_SIZE=many"], "TrainConfig.batch_size = 'many'", "set by --gin.BATCH_SIZE=many"),
    "not one of": (
        ["--gin.REMAT=some"],
        "ModelConfig.remat = 'some': input should be 'none', 'dots' or 'full'",
        "REMAT",
    ),
    "indivisible": (
        ["--gin.D_MODEL=102"],
        "ModelConfig.d_model = 102: must be divisible by num_heads = 4",
        "set by --gin.D_MODEL=102",
    ),
    "schedule": (["--gin.DECAY_STEPS=200"], "wsd.train_steps = 100: must be at least", "(optim/wsd.gin:"),
    "missing file": (["--gin_file=size/5.gin"], "no gin file 'size/5.gin'", "mean size/5m.gin"),
    "size before arch": (["--gin_file=arch/mimo.gin"], "arch/llama.gin comes later", "D_MODEL: size/5m.gin:"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_named_with_what_would_be_right(wrong, tmp_path, capsys):
    flags, first, second = WRONG[wrong]
    arguments = [*pretrain("arch/minicpm4.gin", "size/5m.gin"), *optim_flags("optim/wsd_mup.gin"), *flags]
    assert run.main([*arguments, f"--workdir={tmp_path / 'new'}"]) == exit_codes.BAD_CONFIG
    said = capsys.readouterr().err
    assert first in said
    assert second in said
    assert "Traceback" not in said
    assert not (tmp_path / "new").exists()


def test_a_missing_layer_is_named(tmp_path, capsys):
    assert run.main(["pretrain", f"--workdir={tmp_path}"]) == exit_codes.BAD_CONFIG
    said = capsys.readouterr().err
    assert "BATCH_SIZE is required by runs/pretrain.gin:" in said
    assert "MODEL is required by runs/pretrain.gin: add one of arch/internlm2.gin, arch/llama.gin" in said
    assert "MIXTURE is required by runs/pretrain.gin: add one of data/folders.gin" in said
