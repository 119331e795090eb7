"""The runtimes for devices: what converts a Hugging Face folder for each of them, and what runs the result.

Both the converter and the runtime are other projects' packages, and run in processes of their own.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np

from cpm_jax.common.extras import how_to_install
from export.folders import ExportError

# They would ask the hub for what a folder does not have, and report that they are used.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Job:
    """What a runtime is to do with a model; the workers describe what they answer.

    Attributes:
        folder: of the model.
        texts: to turn into token ids.
        rows: token ids to compute the logits of, all positions of a row at once.
        prompts: token ids to continue greedily, with a cache.
        new_tokens: by how many at most; a token that ends a text ends it.
        exact: whether to compute in float32 throughout, where the runtime would otherwise round activations or the
            cache because it is faster.
        threads: to compute with; 0 is the runtime's choice.
    """

    folder: str
    texts: Sequence[str] = ()
    rows: Sequence[Sequence[int]] = ()
    prompts: Sequence[Sequence[int]] = ()
    new_tokens: int = 0
    exact: bool = True
    threads: int = 0


@dataclass(frozen=True)
class Runtime:
    """A runtime and the converter that writes for it.

    Attributes:
        title: its name.
        types: types in which the converter stores weights, and its arguments for them.
        converter: module whose command line the converter is, or a script beside this file.
        arguments: its arguments; {source} and {folder} stand for the folders.
        model_file: by which a folder is known to be one of this runtime.
        worker: script that runs a model by a job.
        modules: what both need.
        how_to_install: the command that installs them.
        beside: folder, within this environment, of the environment that they have for themselves, as they contradict
            others; "" where they are in this one.
        longest: tokens that a cache holds at most; 0 is the model's context.
    """

    title: str
    types: Mapping[str, Sequence[str]]
    converter: str
    arguments: Sequence[str]
    model_file: str
    worker: str
    modules: Sequence[str]
    how_to_install: str
    beside: str = ""
    longest: int = 0

    def missing(self) -> str:
        """What is not installed, and the command that installs it; "" where nothing is missing."""
        places = [str(path) for path in Path(sys.prefix, self.beside).glob("lib/python*/site-packages")]
        lacking = [name for name in self.modules if PathFinder.find_spec(name, places if self.beside else None) is None]
        return f"{', '.join(lacking)} not installed ({self.how_to_install})" if lacking else ""

    def convert(self, source: Path, folder: Path, dtype: str) -> None:
        """Converts a Hugging Face folder.

        Args:
            source: the folder.
            folder: where to write.
            dtype: of the stored weights, a key of `types`.

        Raises:
            ExportError: the converter is missing or fails.
        """
        arguments = [
            argument.format(source=source, folder=folder) for argument in (*self.arguments, *self.types[dtype])
        ]
        script = self.converter.endswith(".py")
        self._run(*(["-P", Path(__file__).with_name(self.converter)] if script else ["-m", self.converter]), *arguments)

    def ask(self, job: Job) -> dict[str, Any]:
        """Runs a job in a process of its own.

        Returns:
            What the worker says, by the names in `onnx_worker.py`.

        Raises:
            ExportError: the runtime is missing, or does not run the model.
        """
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch) / "job.json", Path(scratch) / "out.npz"]
            files[0].write_text(json.dumps(asdict(job)), "utf-8")
            # -P: the folder of the script is not searched for modules.
            self._run("-P", Path(__file__).with_name(self.worker), *files)
            with np.load(files[1]) as said:
                return dict(said)

    def _run(self, *arguments: object) -> None:
        if words := self.missing():
            raise ExportError(words)
        python = Path(sys.prefix, self.beside, "bin/python") if self.beside else sys.executable
        command = [str(python), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | _OFFLINE)
        if done.returncode:
            words = (done.stderr or done.stdout).strip()[-1500:]
            raise ExportError(f"{self.title}: {arguments[1]} failed with exit code {done.returncode}: {words}")


RUNTIMES = {
    "onnx": Runtime(
        title="ONNX Runtime",
        types={"float32": ["fp32"], "int8": ["int8"], "int4": ["int4"]},
        converter="onnxruntime_genai.models.builder",
        arguments=(
            *("--input", "{source}", "--output", "{folder}", "--cache_dir", "{source}/cache"),
            *("--execution_provider", "cpu", "--precision"),
        ),
        model_file="model.onnx",
        worker="onnx_worker.py",
        modules=("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "torch", "transformers"),
        how_to_install=how_to_install("onnx"),
    ),
    "openvino": Runtime(
        title="OpenVINO",
        types={
            "float32": ["fp32"],
            "float16": ["fp16"],
            "int8": ["int8"],
            # Rows that groups of 128 do not divide get the largest group that does.
            "int4": ["int4", "--group-size", "128", "--group-size-fallback", "adjust"],
        },
        converter="optimum.commands.optimum_cli",
        arguments=(
            *("export", "openvino", "{folder}", "--model", "{source}", "--task", "text-generation-with-past"),
            "--weight-format",
        ),
        model_file="openvino_model.xml",
        worker="openvino_worker.py",
        modules=("openvino", "openvino_genai", "openvino_tokenizers", "optimum", "nncf", "torch", "transformers"),
        how_to_install="make openvino",
        beside="openvino",  # its converter wants an older transformers than the rest
    ),
    "executorch": Runtime(
        title="ExecuTorch",
        types={"float32": ["float32"], "int8": ["int8"], "int4": ["int4"]},
        converter="executorch_convert.py",
        arguments=("{source}", "{folder}"),
        model_file="model.pte",
        worker="executorch_worker.py",
        modules=("executorch", "safetensors", "tokenizers", "torch", "torchao"),
        how_to_install="make executorch",
        beside="executorch",  # it wants packages that nothing else does
        longest=2048,  # memory for the whole cache is taken at the start
    ),
}
