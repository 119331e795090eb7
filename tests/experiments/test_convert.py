"""The verb `convert`: folders of others become workdirs that the other verbs take."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from cpm_jax.checkpoints.hf_layouts import flatten
from cpm_jax.checkpoints.manager import find_checkpoint, read_meta, restore_params
from cpm_jax.checkpoints.sources import SourceError, check_tokenizer
from cpm_jax.common import exit_codes
from cpm_jax.common.config import InputError
from cpm_jax.data.tokenizer import Tokenizer
from experiments import run
from tests.checkpoints.published_folders import CONFIGS, V, write

TEXT = [f"Number {i}. After {i}?" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXT, V)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A small Qwen2 in bfloat16, in two shards, with a chat template of its own file."""
    folder = tmp_path_factory.mktemp("published")
    write(folder, CONFIGS["qwen2"], "bfloat16")
    tokenizer.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(settings.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, published: Path) -> Path:
    workdir = tmp_path_factory.mktemp("imported")
    assert convert(workdir, SOURCE=published) == exit_codes.OK
    return workdir


def convert(workdir: Path, **macros: object) -> int:
    return run.main(["convert", f"--workdir={workdir}", *(f"--gin.{name}={value}" for name, value in macros.items())])


def test_an_import_is_a_checkpoint_like_others(imported: Path, published: Path, tokenizer: Tokenizer) -> None:
    checkpoint = find_checkpoint(imported)
    assert checkpoint.name == "0"
    params, meta = restore_params(imported)
    assert (meta["step"], meta["tokens_seen"]) == (0, 0)
    assert meta["fixed"]["tokenizer_sha256"] == tokenizer.sha256
    assert meta["imported"]["dtype"] == "bfloat16"
    weights = safetensors.numpy.load_file(published / "model-00001-of-00002.safetensors")
    weights |= safetensors.numpy.load_file(published / "model-00002-of-00002.safetensors")
    ours = np.asarray(params["layers"]["self_attn"]["v_proj"]["kernel"][1])
    np.testing.assert_array_equal(ours, weights["model.layers.1.self_attn.v_proj.weight"].astype(np.float32).T)
    kept = Tokenizer.load(imported / "tokenizer")
    assert kept.sha256 == tokenizer.sha256
    assert kept.require_chat_template().source == tokenizer.require_chat_template().source


def test_generate_takes_it(imported: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--gin.PROMPTS=Number 7", "--gin.MAX_NEW_TOKENS=4", "--gin.TEMPERATURE=0"]
    assert run.main(["generate", f"--workdir={imported}", *arguments]) == exit_codes.OK
    assert capsys.readouterr().out.startswith("Number 7")


def fine_tune(imported: Path, folder: Path) -> Path:
    """Two steps on conversations with a learning rate of nothing; returns the workdir."""
    chats = folder / "chats.jsonl"
    turns = [
        [{"role": "user", "content": f"After {i}?"}, {"role": "assistant", "content": f"{i + 1}."}] for i in range(40)
    ]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    settings = {"INIT_FROM": imported, "DATA": chats, "TRAIN_STEPS": 2, "BATCH_SIZE": 2, "PEAK_LR": 1e-30}
    settings |= {"SEQ_LEN": 64, "EVAL_EVERY": 0}
    flags = [f"--gin.{name}={value}" for name, value in settings.items()]
    assert run.main(["sft", f"--workdir={folder / 'sft'}", *flags]) == exit_codes.OK
    return folder / "sft"


def pretrain(imported: Path, tokenizer: Path, folder: Path) -> Path:
    """One step on texts, likewise."""
    text = folder / "text.txt"
    text.write_text("\n".join(TEXT * 3))
    prepare = {"DATA": text, "SEQ_LEN": 32, "TOKENIZER": tokenizer, "VALIDATION_FRACTION": 0}
    flags = [f"--gin.{name}={value}" for name, value in prepare.items()]
    assert run.main(["prepare", f"--workdir={folder / 'data'}", *flags]) == exit_codes.OK
    job = {"DATA": folder / "data", "INIT_FROM": imported, "TRAIN_STEPS": 1, "BATCH_SIZE": 2, "PEAK_LR": 1e-30}
    job |= {"WARMUP_STEPS": 0, "EVAL_EVERY": 0}
    files = [imported / "model.gin", "data/folders.gin", "optim/cosine.gin", "runs/pretrain.gin"]
    flags = [f"--gin_file={name}" for name in files]
    flags += [f"--gin.{name}={value}" for name, value in job.items()]
    assert run.main(["pretrain", f"--workdir={folder / 'run'}", *flags]) == exit_codes.OK
    return folder / "run"


def test_sft_starts_from_it(imported: Path, tmp_path: Path) -> None:
    """With a learning rate of nothing the weights that come out are those that went in."""
    workdir = fine_tune(imported, tmp_path)
    meta = read_meta(find_checkpoint(workdir))
    assert meta["model"]["attention_bias"]
    before, after = (flatten(restore_params(place)[0]) for place in (imported, workdir))
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_allclose(after[path], value, rtol=0, atol=1e-20)


def test_pretrain_starts_from_it(imported: Path, tmp_path: Path) -> None:
    """With the gin file of its model that the import has written."""
    workdir = pretrain(imported, imported / "tokenizer", tmp_path)
    before, after = (restore_params(place)[0]["embed_tokens"]["embedding"] for place in (imported, workdir))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-20)
    models = [read_meta(find_checkpoint(place))["model"] for place in (imported, workdir)]
    assert models[0] == models[1]


def test_dry_run(published: Path, imported: Path, capsys: pytest.CaptureFixture) -> None:
    for verb, source, said in (
        ("convert", published, ": Qwen2ForCausalLM"),
        ("export", published, ": Qwen2ForCausalLM"),
        ("export", imported, "/checkpoints/0: checkpoint"),
    ):
        assert run.main([verb, "--workdir=/none", f"--gin.SOURCE={source}", "--dry_run"]) == exit_codes.OK
        assert f"{source}{said}" in capsys.readouterr().out


def test_an_import_is_replaced_and_a_training_is_not(published: Path, imported: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "again"
    shutil.copytree(imported, workdir)
    assert convert(workdir, SOURCE=published, PARAM_DTYPE="bfloat16") == exit_codes.OK
    assert read_meta(workdir / "checkpoints/0")["model"]["param_dtype"] == "bfloat16"
    (workdir / "checkpoints/0").rename(workdir / "checkpoints/7")
    assert convert(workdir, SOURCE=published) == exit_codes.BAD_CONFIG
    assert (workdir / "checkpoints/7").is_dir()


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["tokenizer", "0"])
def test_an_import_killed_while_it_replaces_another(
    name: str, published: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier one comes back with the same command, also where that fails; or is replaced."""
    workdir = tmp_path / "again"
    shutil.copytree(imported, workdir)

    def killed(partial: Path, folder: Path) -> None:
        if folder.name == name:
            folder.rename(folder.with_name(f".{name}.old"))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("experiments.convert.publish_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(workdir, SOURCE=published, PARAM_DTYPE="bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr("experiments.convert.Checkpointer.save", full)
        with pytest.raises(OSError, match="No space"):
            convert(workdir, SOURCE=published, PARAM_DTYPE="bfloat16")
    assert read_meta(find_checkpoint(workdir))["model"]["param_dtype"] == "float32"
    assert Tokenizer.load(workdir / "tokenizer").sha256 == Tokenizer.load(imported / "tokenizer").sha256
    assert convert(workdir, SOURCE=published, PARAM_DTYPE="bfloat16") == exit_codes.OK
    assert read_meta(find_checkpoint(workdir))["model"]["param_dtype"] == "bfloat16"
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["0"]
    assert not list(workdir.glob(".*"))


def test_places_that_cannot_be_written(published: Path, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """All of them are said before the weights are read, and nothing there is changed."""
    (tmp_path / "damaged/checkpoints/0").mkdir(parents=True)
    assert convert(tmp_path / "damaged", SOURCE=published) == exit_codes.BAD_CONFIG
    assert "cannot be told whether it was imported" in capsys.readouterr().err

    (tmp_path / "file").mkdir()
    (tmp_path / "file/tokenizer").write_text("mine")
    assert convert(tmp_path / "file", SOURCE=published) == exit_codes.BAD_CONFIG
    assert "file: File exists: " in capsys.readouterr().err


def test_what_is_cut_short_is_not_there(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint appears before it is whole; the same command then makes it."""
    with monkeypatch.context() as patch:
        patch.setattr("experiments.convert.Checkpointer.save", full)
        with pytest.raises(OSError, match="No space"):
            convert(tmp_path / "a", SOURCE=published)
    with pytest.raises(InputError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "a")
    assert convert(tmp_path / "a", SOURCE=published) == exit_codes.OK
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("macros", "code", "words"),
    [
        ({"SOURCE": "/nowhere"}, exit_codes.BAD_INPUT, "no Hugging Face folder (it has no config.json), no .gguf file"),
        ({"SOURCE": "/nowhere.gguf"}, exit_codes.BAD_INPUT, "/nowhere.gguf: No such file or directory"),
        ({"SOURCE": __file__}, exit_codes.BAD_INPUT, "test_convert.py: neither of these; give a Hugging Face folder"),
        ({"PARAM_DTYPE": "float16"}, exit_codes.BAD_CONFIG, "'float32' or 'bfloat16'"),
        ({"FORMAT": "hf"}, exit_codes.BAD_CONFIG, "FORMAT is a macro of export, prepare"),
        ({"TOKENIZER": "/nowhere"}, exit_codes.BAD_INPUT, "no such tokenizer.json"),
    ],
)
def test_refused(
    macros: dict, code: int, words: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert convert(tmp_path, **{"SOURCE": published} | macros) == code
    assert words in capsys.readouterr().err


def test_a_tokenizer_of_another_size_is_refused(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "tokenizer"
    Tokenizer.train([f"{a}{b} {b}{c}{a}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrs"], 400).save(other)
    assert convert(tmp_path / "work", SOURCE=published, TOKENIZER=other) == exit_codes.BAD_INPUT
    assert f"has 400 ids and the model's vocab_size is {V}" in capsys.readouterr().err
    assert not (tmp_path / "work/checkpoints").exists()
    check_tokenizer(Tokenizer.load(other), 1_424, "here")  # a vocabulary that was rounded up
    with pytest.raises(SourceError, match=r"the tokenizer of here has 400 ids and the model's vocab_size is 49,152"):
        check_tokenizer(Tokenizer.load(other), 49_152, "here")


def test_training_from_published_weights_points_to_convert(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = {"INIT_FROM": published, "DATA": tmp_path, "TRAIN_STEPS": 1, "BATCH_SIZE": 1, "PEAK_LR": 1e-3}
    flags = [f"--gin.{name}={value}" for name, value in settings.items()]
    assert run.main(["sft", f"--workdir={tmp_path / 'sft'}", *flags]) == exit_codes.BAD_INPUT
    assert "make a workdir of them with the verb convert" in capsys.readouterr().err


def test_a_checkpoint_does_not_become_a_checkpoint(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert convert(tmp_path, SOURCE=imported) == exit_codes.BAD_CONFIG
    assert "is a checkpoint of ours already; the verb export writes it" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_import_as_one(published: Path, imported: Path, tmp_path: Path) -> None:
    """Each process reads what its device holds; one of them writes what both share."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = [f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}", "--num_processes=2"]
    command = [sys.executable, "-m", "experiments.run", "convert", "--workdir=two", f"--gin.SOURCE={published}", *place]
    jobs = [
        subprocess.Popen(
            [*command, f"--process_id={number}"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    for job in jobs:
        said, _ = job.communicate(timeout=300)
        assert job.returncode == exit_codes.OK, said
    ours, theirs = (restore_params(place) for place in (tmp_path / "two", imported))
    assert ours[1]["model"] == theirs[1]["model"]
    for path, value in flatten(ours[0]).items():
        np.testing.assert_array_equal(value, flatten(theirs[0])[path])
