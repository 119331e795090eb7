"""A process that is killed while it writes an export leaves a whole one or none, and nothing that stops the next.

A kill is simulated: from some moment on no call that changes the disk comes through, those of clean-up neither.
"""

import builtins
import dataclasses
import io
import os
import shutil
from pathlib import Path

import pytest
import safetensors.numpy

from cpm_jax.checkpoints.weights import Weights
from cpm_jax.quantization.pipeline import quantize_model
from export import stablehlo
from export.checks import Checked
from export.folders import ExportError
from export.manifest import check_files, read_manifest
from export.publish import Written, publish_export
from tests.export.formats import FORMATS
from tests.export.quantized_models import CONFIG, ROUNDED
from tests.export.small_models import random_params, small_tokenizer


class Killed(BaseException):
    """In place of SIGKILL."""


class Disk:
    """Counts what changes files below a folder, and lets nothing through after a moment."""

    CALLS = ((os, "mkdir"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree"))

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.done, self.last = str(folder), 0, 0
        for module, name in (*self.CALLS, (safetensors.numpy, "save_file")):
            patch.setattr(module, name, self._counting(getattr(module, name), lambda *_, **__: True))
        for module in (builtins, io, os):
            patch.setattr(module, "open", self._counting(module.open, self._writes))

    @staticmethod
    def _writes(_: object, mode: str | int = "r", *rest: object, **more: object) -> bool:
        return bool(mode & (os.O_WRONLY | os.O_RDWR)) if isinstance(mode, int) else bool(set(mode) & set("wax+"))

    def _counting(self, call, changes):
        def counted(*args, **options):
            named = [arg for arg in args if isinstance(arg, str | os.PathLike)]
            if named and any(str(arg).startswith(self.folder) for arg in named) and changes(*args, **options):
                if self.last and self.done >= self.last:
                    raise Killed
                self.done += 1
            return call(*args, **options)

        return counted


def without_checks(*_: object) -> Checked:
    return Checked()


def failing(*_: object, **__: object) -> None:
    raise ExportError("it fails, as a test wants it")


# The layouts of Hugging Face folders have one writer; that of mimo writes code too.
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("llama", "qwen2", "granite", "internlm2")])
def test_what_a_kill_leaves(name, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, num_layers=1, scan_layers=False, attention_bias=name == "mimo")
    weights = Weights(config, random_params(config), small_tokenizer(), {}, {}, {"name": "tiny/7"})
    quantized = quantize_model(weights.params, config, ROUNDED) if name in ("gptq", "marlin") else None
    programs = stablehlo.make_programs(stablehlo.exported_model(config, "float32")) if name == "stablehlo" else None
    monkeypatch.setattr("tests.export.formats.quantize_model", lambda *_: quantized)
    monkeypatch.setattr("export.stablehlo.make_programs", lambda _: programs)
    for place in ("experiments.export", "export.checks"):
        monkeypatch.setattr(f"{place}.check_export", without_checks)
    folder = FORMATS[name](weights, tmp_path)
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path, patch)
        FORMATS[name](weights, tmp_path)
    moments = disk.done
    assert moments > 10
    seen = set()
    # The last ones are the two renames, and the removal of the earlier export and of what is left beside it.
    for last in (1, 2, moments // 3, moments // 2, *range(moments - 6, moments)):
        with monkeypatch.context() as patch:
            Disk(tmp_path, patch).last = last
            with pytest.raises(Killed):
                FORMATS[name](weights, tmp_path)
        seen.add(folder.is_dir())
        if folder.is_dir():
            check_files(folder, read_manifest(folder))
        else:
            with monkeypatch.context() as patch:
                patch.setattr("export.publish.write_manifest", failing)
                with pytest.raises(ExportError, match="as a test wants it"):
                    FORMATS[name](weights, tmp_path)
            check_files(folder, read_manifest(folder))  # the earlier one has its name again
        FORMATS[name](weights, tmp_path)
        check_files(folder, read_manifest(folder))
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert seen == {True, False}  # between the two renames there is none


def test_a_converter_that_outlives_a_kill_writes_into_no_later_export(tmp_path):
    """Its process is not killed with ours."""
    weights = Weights(CONFIG, {}, small_tokenizer(), {}, {}, {"name": "tiny/7"})
    stages = []

    def write(stage: Path) -> Written:
        for folder in (*stages, stage):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"attempt {stages.index(folder) if folder in stages else len(stages)}").write_text("x")
        stages.append(stage)
        if len(stages) == 1:
            raise Killed
        return Written("Tiny", {}, 0, (), without_checks)

    with pytest.raises(Killed):
        publish_export(tmp_path / "onnx", "onnx", weights, write)
    publish_export(tmp_path / "onnx", "onnx", weights, write)
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"attempt 1", "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
