"""Layers of gin files and flags, and what a user is told when they are wrong."""

import pickle

import pytest

from cpm_jax.common import gin_files
from cpm_jax.common.config import ConfigError
from cpm_jax.common.gin_files import REQUIRED, Reference, parse_flag
from cpm_jax.common.gin_utils import Settings
from cpm_jax.modeling.config import ModelConfig, RopeConfig

ARCH = """\
# A small decoder.
# Second line.
from __gin__ import dynamic_registration

from cpm_jax.modeling import config

D_MODEL = %gin.REQUIRED  # width of the residual stream
NUM_HEADS = 4
NUM_LAYERS = 2

config.ModelConfig:
    vocab_size = 128
    num_layers = %NUM_LAYERS
    d_model = %D_MODEL
    num_heads = %NUM_HEADS
    num_kv_heads = 2
    d_ff = 96
    rope = @config.RopeConfig()

config.RopeConfig.rope_theta = 5_000.0
"""
SIZE = "D_MODEL = 64\nNUM_LAYERS = 3\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arch.gin").write_text(ARCH)
    (tmp_path / "size.gin").write_text(SIZE)
    return tmp_path


def build(*flags, files=("arch.gin", "size.gin")):
    return Settings(files, flags, ModelConfig).build()


def message(*flags, files=("arch.gin", "size.gin")):
    with pytest.raises(ConfigError) as error:
        build(*flags, files=files)
    return str(error.value)


def test_builds_the_plain_class():
    config = build()
    assert type(config) is ModelConfig
    assert type(config.rope) is RopeConfig
    assert config == ModelConfig(
        vocab_size=128,
        num_layers=3,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        d_ff=96,
        rope=RopeConfig(rope_theta=5000.0),
    )
    assert pickle.loads(pickle.dumps(config)) == config  # workers get configs by pickling


def test_later_files_win_and_flags_win_over_all(here):
    (here / "late.gin").write_text("NUM_LAYERS = 5\n")
    files = ("arch.gin", "size.gin", "late.gin")
    assert build(files=files).num_layers == 5
    assert build("--gin.NUM_LAYERS=7", files=files).num_layers == 7


def test_a_binding_given_as_a_flag_wins():
    assert build("--gin.ModelConfig.d_ff=200").d_ff == 200
    assert build("--gin.config.RopeConfig.rope_theta=7e4").rope.rope_theta == 7e4


def test_the_whole_config_written_out_gives_the_same_config(here):
    settings = Settings(["arch.gin", "size.gin"], ["--gin.NUM_HEADS=8"], ModelConfig)
    config = settings.build()
    (here / "config.gin").write_text(settings.config_str())
    again = Settings(["config.gin"], [], ModelConfig)
    assert again.build() == config
    assert again.config_str() == settings.config_str()
    assert build("--gin.NUM_HEADS=2", files=["config.gin"]).num_heads == 2


def test_what_a_later_file_replaces_is_not_needed_and_not_saved(here):
    (here / "late.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from cpm_jax.modeling import config\n"
        "config.ModelConfig.d_model = 32\n"
    )
    settings = Settings(["arch.gin", "late.gin"], [], ModelConfig)  # without a size, D_MODEL stays required
    assert settings.build().d_model == 32
    assert "D_MODEL" not in settings.config_str()
    (here / "config.gin").write_text(settings.config_str())
    assert build(files=["config.gin"]) == settings.build()
    assert "has no effect: nothing in this ModelConfig reads D_MODEL" in message(
        "--gin.D_MODEL=8", files=["arch.gin", "late.gin"]
    )


def test_the_operative_config_has_defaults_and_no_unused_parts():
    settings = Settings(["arch.gin", "size.gin"], [], ModelConfig)
    settings.build()
    text = settings.operative_config_str()
    assert "ModelConfig.rms_norm_eps = 1e-06" in text
    assert "NUM_LAYERS = 3" in text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("1e-3", 1e-3),
        ("True", True),
        ("None", None),
        ("'quoted'", "quoted"),
        ("(1, 2)", (1, 2)),
        ("/data/a b/set", "/data/a b/set"),
        ("minicpm", "minicpm"),
        ("5m", "5m"),
        ("", ""),
        ("a=b", "a=b"),
        ("it's", "it's"),
        ("%SEED", Reference("SEED", is_macro=True)),
        ("@data/config.RopeConfig()", Reference("data/config.RopeConfig", is_macro=False)),
        ("100%", "100%"),
        ("me@home", "me@home"),
    ],
)
def test_values_of_flags(text, value):
    setting = parse_flag(f"--gin.NAME={text}")
    assert setting.value == value
    assert type(setting.value) is type(value)


@pytest.mark.parametrize("flag", ["--gin.NAME", "--gin.=3", "--gin.a-b=3", "--gin.A..b=3"])
def test_malformed_flags(flag):
    with pytest.raises(ConfigError, match=r"--gin\."):
        parse_flag(flag)


def test_a_key_that_a_dict_names_twice_is_refused():
    with pytest.raises(ConfigError, match=r"--gin.NAME=.*: 'a' is named twice"):
        parse_flag("--gin.NAME=({'a': 1, 'b': 2, 'a': 3},)")
    assert parse_flag("--gin.NAME=({'a': 1}, {'a': 2})").value == ({"a": 1}, {"a": 2})


def test_typo_in_a_macro_names_the_close_one():
    text = message("--gin.NUM_LAYRES=4")
    assert "--gin.NUM_LAYRES=4" in text
    assert "did you mean NUM_LAYERS" in text


def test_typo_in_a_macro_of_a_file_names_the_line(here):
    (here / "size.gin").write_text("D_MODEL = 64\nNUM_LAYRES = 4\n")
    text = message()
    assert "size.gin:2: NUM_LAYRES" in text
    assert "did you mean NUM_LAYERS" in text


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--gin.ModleConfig.d_ff=4", "did you mean ModelConfig"),
        ("--gin.ModelConfig.dff=4", "did you mean d_ff"),
        ("--gin.ModelConfig.nothing_like_it=4", "accepted: vocab_size, num_layers"),
        ("--gin.D_MODEL=@config.RopConfig()", "did you mean RopeConfig"),
    ],
)
def test_unknown_names_in_flags(flag, hint):
    text = message(flag)
    assert flag in text
    assert hint in text


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("config.ModleConfig.d_ff = 4", "did you mean ModelConfig"),
        ("config.ModelConfig.dff = 4", "did you mean d_ff"),
        ("confg.ModelConfig.d_ff = 4", "did you mean config"),
        ("config.RopeConfig.rope_theta = @config.Rope()", "no 'Rope' there"),
    ],
)
def test_unknown_names_in_files(here, line, hint):
    number = len(ARCH.splitlines()) + 1
    (here / "arch.gin").write_text(ARCH + line + "\n")
    text = message()
    assert f"arch.gin:{number}: " in text
    assert hint in text


def test_a_module_that_is_not_there(here):
    (here / "arch.gin").write_text(ARCH.replace("cpm_jax.modeling", "cpm_jax.modelling"))
    assert "arch.gin:5: from cpm_jax.modelling import config: No module named" in message()


def test_not_gin(here):
    (here / "size.gin").write_text("D_MODEL = 64\nNUM_LAYERS == 3\n")
    assert "size.gin:2: " in message()
    (here / "size.gin").write_text("D_MODEL = (64\n")
    assert "size.gin:" in message()
    (here / "size.gin").write_bytes(b"\xff\xfe\x00")
    assert "size.gin: cannot be read" in message()


def test_a_missing_file():
    text = message(files=["arch.gin", "sizes.gin"])
    assert "no gin file 'sizes.gin'" in text


def test_a_required_macro_without_a_value():
    text = message(files=["arch.gin"])
    assert "D_MODEL is required by arch.gin: add one of size/150m.gin, " in text
    assert "--gin.D_MODEL=" in text


def test_required_because_of_the_order_of_files():
    assert "D_MODEL: size.gin:1 sets it, but arch.gin comes later: give arch.gin first" in message(
        files=["size.gin", "arch.gin"]
    )


def test_a_macro_that_nothing_defines(here):
    (here / "arch.gin").write_text(ARCH.replace("d_ff = 96", "d_ff = %HIDDEN"))
    assert "HIDDEN is required by arch.gin:17: set it with --gin.HIDDEN=" in message()


def test_a_missing_layer_is_one_line():
    text = message(files=["arch/minicpm4.gin"])
    assert "VOCAB_SIZE, NUM_LAYERS, D_MODEL" in text
    assert "are required by arch/llama.gin: add one of size/150m.gin, " in text
    assert len(text.splitlines()) == 1


def test_a_wrong_type_is_traced_through_the_macro():
    text = message("--gin.D_MODEL=wide")
    assert "ModelConfig.d_model = 'wide': input should be a valid integer" in text
    assert "set by ModelConfig.d_model = %D_MODEL  (arch.gin:14)" in text
    assert "set by --gin.D_MODEL=wide" in text
    assert "In call to configurable" not in text


def test_an_impossible_size_is_traced(here):
    (here / "size.gin").write_text("D_MODEL = 66\n")
    text = message()
    assert "ModelConfig.d_model = 66: must be divisible by num_heads = 4" in text
    assert "set by D_MODEL = 66  (size.gin:1)" in text


def test_an_error_in_a_nested_config_is_traced():
    text = message("--gin.RopeConfig.rope_theta=-1.0")
    assert "RopeConfig.rope_theta = -1.0: input should be greater than 0" in text
    assert "set by --gin.RopeConfig.rope_theta=-1.0" in text


def test_a_flag_that_changes_nothing_is_refused(here):
    (here / "late.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from cpm_jax.modeling import config\n"
        "THETA = 7.0\n"
        "plain/config.RopeConfig.rope_theta = %THETA\n"
    )
    files = ("arch.gin", "size.gin", "late.gin")
    assert build(files=files).rope.rope_theta == 5000.0  # a default that a file leaves unused is no mistake
    assert "--gin.THETA=8.0: has no effect: nothing in this ModelConfig reads THETA" in message(
        "--gin.THETA=8.0", files=files
    )
    assert "has no effect" in message("--gin.plain/RopeConfig.rope_theta=8.0", files=files)
    assert build(
        "--gin.ModelConfig.rope=@plain/config.RopeConfig()", "--gin.THETA=8.0", files=files
    ).rope == RopeConfig(rope_theta=8.0)


def test_no_file_for_the_config(here):
    (here / "only.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from cpm_jax.modeling import config\n"
        "config.RopeConfig.rope_theta = 2.0\n"
    )
    assert "no gin file configures ModelConfig" in message(files=["only.gin"])


def test_include(here):
    (here / "both.gin").write_text('include "arch.gin"\ninclude "size.gin"\nNUM_LAYERS = 6\n')
    assert build(files=["both.gin"]).num_layers == 6
    (here / "both.gin").write_text('include "arch.gin"\nNUM_LAYERS = 6\ninclude "size.gin"\n')
    settings = Settings(["both.gin"], [], ModelConfig)
    assert [s.value for s in settings.settings if s.name == "NUM_LAYERS"] == [2, 6, 3]
    assert settings.build().num_layers == 3


def test_includes_that_cannot_be_followed(here):
    (here / "both.gin").write_text('include "archs.gin"\n')
    assert "both.gin: include 'archs.gin': no gin file 'archs.gin'" in message(files=["both.gin"])
    (here / "both.gin").write_text('include "arch.gin"\ninclude "again.gin"\n')
    (here / "again.gin").write_text('include "both.gin"\n')
    assert "both.gin includes itself, by both.gin, again.gin" in message(files=["both.gin"])


def test_reading_a_file_as_text(here):
    file = gin_files.read_gin_file(here / "arch.gin")
    assert file.name == "arch.gin"
    assert file.header == "A small decoder.\nSecond line."
    first = file.settings[0]
    assert (first.key, first.value, first.comment) == ("D_MODEL", REQUIRED, "width of the residual stream")
    assert "ModelConfig.rope" in [s.key for s in file.settings]


def test_suggest():
    assert gin_files.suggest("pretrian", ["prepare", "pretrain"]) == "; did you mean pretrain?"
    assert gin_files.suggest("zzz", ["prepare"]) == ""
