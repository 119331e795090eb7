"""The verb `export`: folders and files that others read, whole or not there, with a manifest that is verified."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
import transformers

from cpm_jax.common import exit_codes
from cpm_jax.common.files import sha256
from cpm_jax.data.tokenizer import Tokenizer
from experiments import run
from experiments.export import model_name
from tests.checkpoints.published_folders import CONFIGS, GENERATION_CONFIG, V, write
from tests.experiments.test_convert import TEXT, convert, fine_tune, pretrain


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXT, V)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A small Qwen2 in bfloat16, in two shards."""
    folder = tmp_path_factory.mktemp("published")
    write(folder, CONFIGS["qwen2"], "bfloat16")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, published: Path) -> Path:
    workdir = tmp_path_factory.mktemp("imported")
    assert convert(workdir, SOURCE=published) == exit_codes.OK
    return workdir


@pytest.fixture(scope="module")
def minicpm(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A small MiniCPM: multipliers, LongRoPE, sparse attention."""
    folder = tmp_path_factory.mktemp("minicpm")
    write(folder, CONFIGS["minicpm"], "bfloat16")
    tokenizer.save(folder)
    return folder


def command(workdir: Path, **macros: object) -> list[str]:
    return ["export", f"--workdir={workdir}", *(f"--gin.{name}={value}" for name, value in macros.items())]


def export(workdir: Path, **macros: object) -> int:
    """Without the checks, unless they are asked for."""
    return run.main(command(workdir, **({"CHECK": False} | macros)))


def verify(folder: Path) -> int:
    return run.main(command(folder.parent / "verified", VERIFY=folder))


@pytest.mark.parametrize("kind", ["", "Q8_0"])
def test_gguf(kind: str, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Written, checked, and verified from its manifest alone; transformers reads it."""
    assert export(tmp_path, SOURCE=imported, FORMAT="gguf", TYPE=kind, NAME="tiny", CHECK=True) == exit_codes.OK
    folder = tmp_path / f"gguf-{kind or 'BF16'}"  # it came in bfloat16
    assert {path.name for path in folder.iterdir()} == {f"tiny-{kind or 'BF16'}.gguf", "manifest.json"}
    said = capsys.readouterr().out
    for name in ("read_back", "source", "transformers"):
        assert f"check {name}: " in said
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["architecture"]) == ("gguf", "qwen2")
    assert manifest["source"]["kind"] == "checkpoint"
    assert manifest["tools"]["gguf"]
    figures = {check["name"]: check["figures"] for check in manifest["checks"]}
    assert figures["read_back"]["values"] == manifest["parameters"]
    if not kind:
        assert figures["source"]["max_error"] <= 1e-5
        assert figures["source"]["perplexity"] == pytest.approx(figures["source"]["perplexity_of_source"])
    else:
        assert 0 < figures["source"]["kl_divergence"] < 0.1
        assert manifest["types"][kind] > 20
    assert figures["transformers"]["architecture"] == "Qwen2ForCausalLM"
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert verify(moved) == exit_codes.OK
    said = capsys.readouterr().out
    assert "3 texts: tokens and greedy text as recorded" in said
    assert "transformers: architecture Qwen2ForCausalLM" in said
    assert not list(tmp_path.rglob(".*"))


def test_stablehlo(minicpm: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Written in the type of the weights, checked, and verified; a changed program is named."""
    assert export(tmp_path, SOURCE=minicpm, FORMAT="stablehlo", CHECK=True) == exit_codes.OK
    folder = tmp_path / "stablehlo"
    said = capsys.readouterr()
    assert "sparse attention (InfLLM v2) is left out" in said.err
    for name in ("read_back", "source", "stablehlo"):
        assert f"check {name}: " in said.out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], list(manifest["types"])) == ("stablehlo", ["bfloat16"])
    assert verify(folder) == exit_codes.OK
    said = capsys.readouterr().out
    assert "3 texts: tokens and greedy text as recorded" in said
    assert "stablehlo: positions" in said
    (folder / "decode.stablehlo").write_bytes(b"")
    assert verify(folder) == exit_codes.BAD_INPUT
    assert "decode.stablehlo has 0 bytes where the manifest says" in capsys.readouterr().err


def test_what_verify_finds(minicpm: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Another file, a missing one; and files that were changed together with their hashes."""
    assert export(tmp_path, SOURCE=minicpm, FORMAT="gguf", TYPE="F16", CHECK=True) == exit_codes.OK
    said = capsys.readouterr()
    assert "sparse attention (InfLLM v2) is left out" in said.err
    assert "not checked, transformers: transformers does not load GGUF files of minicpm" in said.out
    folder = tmp_path / "gguf-F16"
    (model,) = folder.glob("*.gguf")
    content, manifest = model.read_bytes(), (folder / "manifest.json").read_text()

    damaged = bytearray(content)
    damaged[-200] ^= 64
    model.write_bytes(damaged)
    assert verify(folder) == exit_codes.BAD_INPUT
    assert f"{model.name} has changed: sha256" in capsys.readouterr().err

    entry = json.loads(manifest)
    norm = gguf.GGUFReader(model, "r+").tensors
    next(tensor for tensor in norm if tensor.name == "output_norm.weight").data[:] = 1.5
    del norm
    entry["files"][model.name]["sha256"] = sha256(model)
    (folder / "manifest.json").write_text(json.dumps(entry))
    assert verify(folder) == exit_codes.BAD_INPUT
    assert "differ by" in capsys.readouterr().err

    model.unlink()
    assert verify(folder) == exit_codes.BAD_INPUT
    assert f"{model.name} is missing" in capsys.readouterr().err
    assert verify(minicpm) == exit_codes.BAD_INPUT
    assert "has no manifest.json" in capsys.readouterr().err


def test_a_hugging_face_folder_has_a_manifest(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also of a folder made of a folder; a failed check leaves nothing."""
    assert export(tmp_path, SOURCE=published, FORMAT="llama", CHECK=True) == exit_codes.OK
    manifest = json.loads((tmp_path / "hf/manifest.json").read_text())
    assert manifest["types"] == {"bfloat16": 3 * 13 + 3}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= manifest["files"].keys()
    assert [check["name"] for check in manifest["checks"]] == ["read_back", "source", "transformers"]
    assert verify(tmp_path / "hf") == exit_codes.OK
    (tmp_path / "hf/README.md").write_text("mine")
    capsys.readouterr()
    assert verify(tmp_path / "hf") == exit_codes.BAD_INPUT
    assert "README.md has 4 bytes where the manifest says" in capsys.readouterr().err


def test_a_folder_with_code_of_its_own(minicpm: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its code is run to check it, unless somebody has changed it, whatever the manifest says."""
    assert export(tmp_path, SOURCE=minicpm, TYPE="float32", CHECK=True) == exit_codes.OK
    folder = tmp_path / "hf"
    said = capsys.readouterr()
    assert "check transformers: architecture MiniCPMForCausalLM" in said.out
    assert "sparse attention" not in said.err
    assert verify(folder) == exit_codes.OK
    assert "transformers: architecture MiniCPMForCausalLM" in capsys.readouterr().out
    code, manifest = folder / "modeling_minicpm.py", folder / "manifest.json"
    code.write_text(code.read_text() + "raise SystemExit\n")
    entry = json.loads(manifest.read_text())
    entry["files"][code.name] = {"bytes": code.stat().st_size, "sha256": sha256(code)}
    manifest.write_text(json.dumps(entry))
    assert verify(folder) == exit_codes.OK
    assert "transformers: modeling_minicpm.py is not what this version writes" in capsys.readouterr().out


def test_a_failed_check_leaves_the_earlier_export(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert export(tmp_path, SOURCE=published, FORMAT="gguf", TYPE="F32") == exit_codes.OK
    before = {path.name: path.read_bytes() for path in (tmp_path / "gguf-F32").iterdir()}
    with monkeypatch.context() as patch:
        write = gguf.GGUFWriter.write_tensor_data
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda self, tensor: write(self, tensor ^ 1))
        assert export(tmp_path, SOURCE=published, FORMAT="gguf", TYPE="F32", CHECK=True) == exit_codes.BAD_INPUT
    assert "reads back with other values than it had" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "gguf-F32").iterdir()} == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_killed_export_leaves_nothing(published: Path, tmp_path: Path) -> None:
    """Killed as soon as it has begun to write; the same command then makes it whole."""
    arguments = command(tmp_path, SOURCE=published, FORMAT="gguf", TYPE="F32", CHECK=True)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    job = subprocess.Popen([sys.executable, "-m", "experiments.run", *arguments], env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".gguf-F32*")) and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.001)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert not (tmp_path / "gguf-F32").exists()
    assert run.main(arguments) == exit_codes.OK
    assert verify(tmp_path / "gguf-F32") == exit_codes.OK
    assert not list(tmp_path.glob(".*"))


def test_places_that_cannot_be_written(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All of them are said before the weights are read, and nothing there is changed."""
    precious = tmp_path / "taken/hf/precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    assert export(tmp_path / "taken", SOURCE=published) == exit_codes.BAD_CONFIG
    assert "holds files that are no export" in (said := capsys.readouterr().err)
    assert "reading: " not in said
    assert precious.read_text() == "mine"
    shutil.copytree(published, tmp_path / "out/hf")
    assert export(tmp_path / "out", SOURCE=tmp_path / "out/hf") == exit_codes.BAD_CONFIG
    assert "what is written would replace it" in capsys.readouterr().err


def test_a_full_disk(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("export.hf.safetensors.numpy.save_file", full)
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
        for form in ("hf", "gguf"):
            assert export(tmp_path, SOURCE=imported, FORMAT=form) == exit_codes.BAD_INPUT
            assert "cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))
    assert not list(tmp_path.glob("*/"))
    assert export(tmp_path, SOURCE=imported) == exit_codes.OK


@pytest.mark.parametrize(
    ("macros", "code", "words"),
    [
        ({"SOURCE": "/nowhere"}, exit_codes.BAD_INPUT, "no Hugging Face folder (it has no config.json), no .gguf file"),
        ({"FORMAT": "gpt2"}, exit_codes.BAD_CONFIG, "'openvino' or 'executorch'"),
        (
            {"TYPE": "Q8_0"},
            exit_codes.BAD_CONFIG,
            "accepted are float32, bfloat16, float16; GGUF's types need FORMAT=gguf",
        ),
        ({"FORMAT": "stablehlo", "TYPE": "float16"}, exit_codes.BAD_CONFIG, "accepted are float32, bfloat16;"),
        ({"FORMAT": "gguf", "TYPE": "Q4_K"}, exit_codes.BAD_CONFIG, "write F16, and let llama.cpp's llama-quantize"),
        ({"FORMAT": "gguf", "TYPE": "TQ2_0"}, exit_codes.BAD_CONFIG, "stores blocks of 256"),
        ({"NAME": "a/b"}, exit_codes.BAD_CONFIG, "without slashes"),
        ({"TOKENIZER": "/nowhere"}, exit_codes.BAD_INPUT, "no such tokenizer.json"),
        ({"VERIFY": "/nowhere"}, exit_codes.BAD_INPUT, "/nowhere has no manifest.json"),
    ],
)
def test_refused(
    macros: dict, code: int, words: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert export(tmp_path, **{"SOURCE": published} | macros) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_an_export_takes_no_settings_from_an_earlier_one(imported: Path, tmp_path: Path) -> None:
    """All into one workdir, as docs/export.md has it."""
    assert export(tmp_path, SOURCE=imported, FORMAT="gguf", TYPE="Q8_0", NAME="mine") == exit_codes.OK
    assert run.main(command(tmp_path, VERIFY=tmp_path / "gguf-Q8_0")) == exit_codes.OK
    assert run.main(command(tmp_path, SOURCE=imported, FORMAT="gguf")) == exit_codes.OK
    assert [path.name for path in (tmp_path / "gguf-BF16").glob("*.gguf")] != ["mine-BF16.gguf"]
    manifest = json.loads((tmp_path / "gguf-BF16/manifest.json").read_text())
    assert "read_back" in {check["name"] for check in manifest["checks"]}


def test_names_of_models() -> None:
    assert model_name("SmolLM2-135M-Instruct.Q4_1.gguf") == "SmolLM2-135M-Instruct"
    assert model_name("tiny-F16.gguf") == "tiny"
    assert model_name("runs-5m/500") == "runs-5m"
    assert model_name("Qwen2.5-0.5B") == "Qwen2.5-0.5B"


@pytest.mark.parametrize("dtype", ["", "float32"])
def test_out_again(imported: Path, published: Path, tmp_path: Path, dtype: str) -> None:
    """FORMAT=hf is the layout and the type that the weights came in, unless another type is asked for."""
    assert export(tmp_path, SOURCE=imported, FORMAT="hf", TYPE=dtype, MAX_SHARD_BYTES=100_000) == exit_codes.OK
    before, after = {}, {}
    for tensors, folder in ((before, published), (after, tmp_path / "hf")):
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= safetensors.numpy.load_file(file)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value.astype(dtype or value.dtype))
        assert after[name].dtype == (dtype or value.dtype)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["eos_token_id"] == [2, 5]
    assert "auto_map" not in config


def test_what_a_model_was_published_with_comes_out_of_its_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Several ids that end a text, and how it likes to be sampled; `transformers` reads them of the export."""
    folder = tmp_path / "llama"
    folder.mkdir()
    write(folder, CONFIGS["llama"] | {"eos_token_id": [2, 7]}, "bfloat16")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG | {"transformers_version": "4.0"}))
    tokenizer.save(folder)
    assert convert(tmp_path / "imported", SOURCE=folder) == exit_codes.OK
    tuned = fine_tune(tmp_path / "imported", tmp_path)
    further = pretrain(tmp_path / "imported", tmp_path / "imported/tokenizer", tmp_path)
    for workdir in (tmp_path / "imported", tuned, further):
        assert export(workdir, FORMAT="hf") == exit_codes.OK
        config, generation = (
            json.loads((workdir / "hf" / f"{name}.json").read_text()) for name in ("config", "generation_config")
        )
        assert config["eos_token_id"] == [2, 7]
        assert (config["bos_token_id"], config["pad_token_id"]) == (1, 2)
        assert config["dtype"] == ("float32" if workdir in (tuned, further) else "bfloat16")  # trained in float32
        assert generation == GENERATION_CONFIG | {"pad_token_id": 2}
        read = transformers.GenerationConfig.from_pretrained(workdir / "hf")
        assert (read.eos_token_id, read.temperature) == ([2, 7], 0.6)
        card = (workdir / "hf/README.md").read_text()
        assert "| Imported from | llama |" in card


def test_gguf_ends_texts_by_the_config_where_the_tokenizer_names_no_end(published: Path, tmp_path: Path) -> None:
    shutil.copytree(published, tmp_path / "source")
    settings = json.loads((published / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "source/tokenizer_config.json").write_text(json.dumps(settings))
    assert export(tmp_path / "out", SOURCE=tmp_path / "source", FORMAT="gguf", NAME="tiny") == exit_codes.OK
    reader = gguf.GGUFReader(tmp_path / "out/gguf-BF16/tiny-BF16.gguf")
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 2  # config.json: [2, 5]
    assert not json.loads((tmp_path / "out/gguf-BF16/manifest.json").read_text())["left_out"]


def test_ids_of_another_tokenizer_do_not_come_out(imported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    Tokenizer.train(["quite other words"], V - 20).save(other)
    workdir = pretrain(imported, other, tmp_path)
    assert export(workdir, FORMAT="hf") == exit_codes.OK
    config = json.loads((workdir / "hf/config.json").read_text())
    assert config["eos_token_id"] == Tokenizer.load(other).eos_id
    assert config["model_type"] == "qwen2"


def test_a_folder_goes_straight_into_another_layout(published: Path, tmp_path: Path) -> None:
    """Qwen2 as InternLM2: q, k and v fused into one tensor, and its biases."""
    assert export(tmp_path / "a", SOURCE=published, FORMAT="internlm2") == exit_codes.OK
    tensors = safetensors.numpy.load_file(tmp_path / "a/hf/model.safetensors")
    assert tensors["model.layers.2.attention.wqkv.bias"].shape == (128,)
    assert not tensors["model.layers.2.attention.wo.bias"].any()
    assert export(tmp_path / "b", SOURCE=tmp_path / "a/hf", FORMAT="qwen2") == exit_codes.OK
    again = safetensors.numpy.load_file(tmp_path / "b/hf/model.safetensors")
    before = safetensors.numpy.load_file(published / "model-00001-of-00002.safetensors")
    assert all(again[name].tobytes() == value.tobytes() for name, value in before.items())


def test_values_beyond_float16_name_the_flag(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture
) -> None:
    tensors = write(tmp_path / "source", CONFIGS["llama"], shards=1)
    tensors["model.norm.weight"] *= 1e5
    safetensors.numpy.save_file(tensors, tmp_path / "source/model.safetensors")
    tokenizer.save(tmp_path / "source")
    assert export(tmp_path / "out", SOURCE=tmp_path / "source", FORMAT="hf", TYPE="float16") == exit_codes.BAD_CONFIG
    said = capsys.readouterr().err
    assert "ExportConfig.type: dtype = 'float16': model.norm.weight has values up to" in said
    assert "set by --gin.TYPE=float16" in said
    assert not (tmp_path / "out/hf").exists()
