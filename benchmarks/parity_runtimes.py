"""The runtimes of the parity matrix: how each gets a checkpoint, and how it is asked what that says.

To add one: a class in `parity_worker.py` that loads an export and gives logits, and an entry in `RUNTIMES` here.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import native_runtime, parity_worker
from benchmarks.parity_checkpoints import Checkpoint
from benchmarks.parity_worker import CHUNK, Cached, Job, Logits, answer, write_jobs
from cpm_jax.checkpoints.hf_config import default_layout
from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.common.extras import how_to_install
from cpm_jax.inference.decode_loop import cache_length, extend, start
from cpm_jax.inference.generate import decoding_params, unstack_on_cpu
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, bind
from cpm_jax.modeling.kv_cache import Cache, init_cache
from export.checks import read_export
from export.devices import runtimes as devices
from export.devices.convert import export_device
from export.folders import ExportError
from export.gptq import export_gptq
from export.hf import export_hf, left_out_notes
from export.marlin import export_marlin

GREEDY = SamplingConfig(temperature=0)
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Exported:
    """A checkpoint as a runtime gets it.

    Attributes:
        path: the folder or file that it loads.
        format: what that is.
        notes: what is not as in the checkpoint, in the export's own words.
    """

    path: Path
    format: str
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Its size, with tokenizer and programs."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _feed(
    config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    decoder = bind(config, params)
    hidden, cache = decoder.decode(tokens, positions, cache)
    return decoder.logits(hidden), cache


class Ours(Cached):
    """Our decoder with its cache; it goes on by the loop that `generate` runs."""

    def __init__(self, config: ModelConfig, params: Params, capacity: int):
        self._config = dataclasses.replace(config, num_nextn_predict_layers=0)
        self._length = cache_length(config, capacity)
        self._params = unstack_on_cpu(decoding_params(config, jax.tree.map(jnp.asarray, params)))
        for length in (CHUNK, 1):  # a program is compiled when it is first called
            self.feed(self.begin(), [0] * length, 0)

    def begin(self) -> Cache:
        """As `Cached.begin`."""
        return init_cache(self._config, 1, self._length)

    def feed(self, cache: Any, ids: Sequence[int], first: int) -> tuple[Logits, Any]:
        """As `Cached.feed`."""
        tokens, positions = (jnp.asarray([x], jnp.int32) for x in (ids, range(first, first + len(ids))))
        logits, cache = _feed(self._config, self._params, tokens, positions, cache)
        return np.asarray(logits[0]), cache

    def generate(self, ids: Sequence[int], new: int) -> Iterator[int]:
        """As `Model.generate`."""
        state = start(
            self._params,
            [ids],
            config=self._config,
            sampling=GREEDY,
            max_new_tokens=new,
            seed=0,
            indices=[0],
            prefill_chunks=(CHUNK,),
        )
        for _ in range(0, new, 16):
            state, tokens = extend(
                self._params, state, jnp.zeros(0, jnp.int32), num_tokens=16, config=self._config, sampling=GREEDY
            )
            yield from np.asarray(tokens)[0].tolist()


def write_hf(checkpoint: Checkpoint, folder: Path, layout: str) -> Exported:
    """A Hugging Face folder; of a quantised model the weights that its codes stand for."""
    config = checkpoint.config
    result = export_hf(checkpoint.params, config, checkpoint.tokenizer, folder, layout=layout, dtype=checkpoint.dtype)
    return Exported(folder, f"{result.architecture}, {checkpoint.dtype}", left_out_notes(config, result))


def write_packed(checkpoint: Checkpoint, folder: Path, packing: str) -> Exported:
    """A Hugging Face folder with codes and scales."""
    assert checkpoint.quantized is not None
    write = {"gptq": export_gptq, "marlin": export_marlin}[packing]
    result = write(checkpoint.quantized, checkpoint.tokenizer, folder)
    return Exported(folder, f"{result.architecture}, {packing}")


def write_gguf(checkpoint: Checkpoint, folder: Path, kind: str) -> Exported:
    """A GGUF file; what it reads back as is checked, as cells are judged by it."""
    from export.gguf import check_read_back, export_gguf  # needs the extra `gguf`

    params, config = checkpoint.params, checkpoint.config
    result = export_gguf(params, config, checkpoint.tokenizer, folder, kind=kind, ternary=checkpoint.ternary)
    check_read_back(folder / result.file, params, config, kind)
    return Exported(folder / result.file, f"GGUF {result.architecture}, {kind}", result.notes)


def write_stablehlo(checkpoint: Checkpoint, folder: Path, dtype: str) -> Exported:
    """StableHLO programs."""
    from export.stablehlo import export_stablehlo  # needs the extra `export`

    result = export_stablehlo(checkpoint.params, checkpoint.config, checkpoint.tokenizer, folder, dtype=dtype)
    return Exported(folder, f"StableHLO, {dtype}", result.notes)


def write_device(checkpoint: Checkpoint, folder: Path, runtime: str) -> Exported:
    """What a device's runtime loads, by its own converter."""
    result = export_device(
        checkpoint.params, checkpoint.config, checkpoint.tokenizer, folder, runtime=runtime, dtype="float32"
    )
    return Exported(folder, f"{devices.RUNTIMES[runtime].model_file} of {result.architecture}, float32", result.notes)


Format = tuple[str, str]  # what writes it, and its layout or type
WRITERS: Mapping[str, Callable[[Checkpoint, Path, str], Exported]] = {
    "hf": write_hf,
    "packed": write_packed,
    "gguf": write_gguf,
    "stablehlo": write_stablehlo,
    "device": write_device,
}


def write_format(checkpoint: Checkpoint, folder: Path, chosen: Format) -> Exported | str:
    """Exports a checkpoint; or the words in which that is refused."""
    writer, kind = chosen
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier commit
    try:
        return WRITERS[writer](checkpoint, folder, kind)
    except (ConfigError, InputError) as error:
        return str(error)


def _own_layout(checkpoint: Checkpoint, known: Sequence[str]) -> Format:
    """The folder in the checkpoint's own layout, where the runtime knows it; packed where that is quantised."""
    if checkpoint.packing:
        return "packed", checkpoint.packing
    return "hf", checkpoint.layout if checkpoint.layout in known else "llama"


@dataclass(frozen=True)
class Runtime:
    """A column of the matrix.

    Attributes:
        title: its name there.
        format: what it is given of a checkpoint; None: the checkpoint as it is.
        worker: the class in `parity_worker.RUNTIMES` that runs it, in another process; "": our decoder, in this one.
        device: the runtime in `export.devices` that does, in its own process.
        sparse: whether it attends sparsely.
        refuses: packed formats that it does not load.
        rounds: whether it rounds activations to fit the weights, so that not its logits but its perplexity is judged.
        modules: packages and rooms of ours that its process may import.
        needs: packages that write what it loads.
    """

    title: str
    format: Callable[[Checkpoint], Format] | None
    worker: str = ""
    device: str = ""
    sparse: bool = False
    refuses: tuple[str, ...] = ()
    rounds: bool = False
    modules: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def cannot(self, checkpoint: Checkpoint) -> bool:
        """Whether this runtime is known not to run this checkpoint: then, and only then, it may refuse."""
        return (checkpoint.config.sparse_config is not None and not self.sparse) or checkpoint.packing in self.refuses

    def missing(self) -> str:
        """What is not installed, and how to get it; "" where it runs."""
        if self.device:
            return devices.RUNTIMES[self.device].missing()
        if self.worker == "native":
            return native_runtime.missing()
        packages = parity_worker.missing(self.worker) if self.worker else []
        packages += [name for name in self.needs if importlib.util.find_spec(name) is None]
        return "; ".join(f"{package} is not installed: {HOW_TO_INSTALL[package]}" for package in packages)


EXPORT = how_to_install("export")
HOW_TO_INSTALL = {
    "cyllama": "make llama",
    "flatbuffers": EXPORT,
    "gguf": how_to_install("gguf"),
    "torch": EXPORT,
    "transformers": EXPORT,
}
TORCH_LAYOUTS = ("llama", "qwen2", "granite", "minicpm", "internlm2", "mimo")  # docs/torch_runtime.md
NATIVE_LAYOUTS = ("llama", "qwen2", "granite", "minicpm")  # docs/cuda.md
# The columns of the matrix.
RUNTIMES: Mapping[str, Runtime] = {
    "jax": Runtime("JAX, with a cache", None, sparse=True),
    "transformers": Runtime(
        "transformers", lambda checkpoint: ("hf", default_layout(checkpoint.config).model_type), "transformers"
    ),
    # Where it has no class the folder carries code, which attends sparsely too.
    "transformers_own": Runtime(
        "transformers, own layout", lambda checkpoint: ("hf", checkpoint.layout), "transformers", sparse=True
    ),
    "gguf": Runtime("GGUF, read back", lambda checkpoint: ("gguf", "F32"), needs=("gguf",)),
    "llama_cpp": Runtime("llama.cpp", lambda checkpoint: ("gguf", "F32"), "llama_cpp", needs=("gguf",)),
    "llama_cpp_packed": Runtime(
        "llama.cpp, packed",
        lambda checkpoint: ("gguf", checkpoint.gguf_type),
        "llama_cpp",
        rounds=True,
        needs=("gguf",),
    ),
    "stablehlo": Runtime("StableHLO", lambda checkpoint: ("stablehlo", "float32"), "stablehlo"),
    "torch_runtime": Runtime(
        "PyTorch runtime",
        lambda checkpoint: _own_layout(checkpoint, TORCH_LAYOUTS),
        "torch_runtime",
        sparse=True,
        refuses=("marlin",),
        modules=("export.torch_runtime",),
    ),
    "native": Runtime("C++ runtime", lambda checkpoint: _own_layout(checkpoint, NATIVE_LAYOUTS), "native", sparse=True),
    "onnx": Runtime("ONNX Runtime", lambda checkpoint: ("device", "onnx"), device="onnx"),
    "openvino": Runtime("OpenVINO", lambda checkpoint: ("device", "openvino"), device="openvino"),
    "executorch": Runtime("ExecuTorch", lambda checkpoint: ("device", "executorch"), device="executorch"),
}


def ask(
    runtime: Runtime, jobs: Mapping[str, Job], checkpoints: Mapping[str, Checkpoint], work: Path
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What a runtime says of each checkpoint, in the form of `parity_worker.measure`; or "refused", with its words.

    Args:
        runtime: which.
        jobs: by the checkpoint's name.
        checkpoints: the models.
        work: folder for what passes between processes.
    """
    if runtime.worker:
        yield from _ask_workers(runtime.worker, jobs, work)
        return
    for name, job in jobs.items():
        if runtime.device:
            yield name, _ask_device(runtime.device, job, checkpoints[name].tokenizer.eos_id)
        else:
            yield name, answer(functools.partial(_load_ours, checkpoints[name]), job)


def _ask_device(device: str, job: Job, eos_id: int | None) -> dict[str, Any]:
    """Its rows are read at once. A text ends with the token that ends texts, which not every runtime passes on."""
    asked = devices.Job(job.path, rows=job.rows, prompts=[row[: job.prompt] for row in job.rows], new_tokens=job.new)
    try:
        said = devices.RUNTIMES[device].ask(asked)
    except ExportError as error:
        return {"refused": str(error)}
    greedy = [said[f"said_{index}"].tolist() for index in range(len(job.rows))]
    rates = [(len(text) - 1) / seconds for text, seconds in zip(greedy, said["decode_seconds"], strict=True)]
    ended = [text if len(text) == job.new or text[-1:] == [eos_id] else [*text, eos_id] for text in greedy]
    versions = json.loads(str(said["versions"])).items()
    return said | {
        "greedy": ended,
        "tokens_per_second": float(np.median(rates)),
        "versions": ", ".join(f"{package} {version}" for package, version in versions),
    }


def _load_ours(checkpoint: Checkpoint, job: Job) -> Ours:
    if not job.path:
        return Ours(checkpoint.config, checkpoint.params, job.capacity)
    read = read_export(Path(job.path))
    return Ours(read.config, read.params, job.capacity)


def _ask_workers(worker: str, jobs: Mapping[str, Job], work: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Runs jobs in one process; a job that ends it is taken out, and the others have a new one."""
    left = dict(jobs)
    path = os.pathsep.join(filter(None, (*parity_worker.beside(worker), os.environ.get("PYTHONPATH"))))
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    for job in left.values():
        Path(job.out).unlink(missing_ok=True)
    while left:
        write_jobs(work / "jobs.json", list(left.values()))
        command = [sys.executable, "-m", "benchmarks.parity_worker", worker, str(work / "jobs.json")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        for name in [name for name, job in left.items() if Path(job.out).exists()]:
            job = left.pop(name)
            with np.load(job.out) as said:
                yield name, said
            Path(job.out).unlink()
        if left:  # they run in order: the first that is left has ended the process
            name = next(iter(left))
            del left[name]
            yield name, {"refused": f"the process ended with {done.returncode}: {done.stderr[-500:].strip()}"}
