"""What runtimes say of exports, in a process of their own: `python -m benchmarks.parity_worker RUNTIME JOBS`.

JOBS is JSON, a list of `Job`. Each gets a file (.npz) with the logits of its rows, the greedy continuation of their
beginnings, how long loading took and how fast the tokens came, and which packages of ours were imported to do so; or
with the words in which the runtime refuses. Nothing of ours is imported here but what is measured.
"""

import abc
import importlib.metadata
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

CHUNK = 64  # tokens of a prompt that are read at once
SINGLY = 64  # tokens at the end of a row that are read one by one
UNTIMED = 16  # new tokens before speed is measured: some runtimes pass on so many at a time
OUR_PACKAGES = ("cpm_jax", "experiments", "export", "kernels_pallas")

Logits = Float[np.ndarray, "T V"]


@dataclass(frozen=True)
class Job:
    """One export to run.

    Attributes:
        path: the folder or file that the runtime loads.
        out: where what it says goes.
        program: the runtime itself, where it is a program.
        rows: token ids to give logits for, each `capacity` long.
        prompt: so many tokens of each row are continued.
        new: by so many.
        capacity: length of caches.
    """

    path: str
    out: str
    program: str
    rows: list[list[int]]
    prompt: int
    new: int
    capacity: int


class Model(Protocol):
    """An export, loaded: every runtime is one of these."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits after each token: a prompt read in chunks, and its last tokens singly, where the runtime can."""
        ...

    def generate(self, ids: Sequence[int], new: int) -> Iterator[int]:
        """Continues tokens by the most probable ones, whether or not they end a text."""
        ...


class Cached(abc.ABC):
    """A runtime with a cache: one function that feeds tokens and gives their logits is all it needs."""

    @abc.abstractmethod
    def begin(self) -> Any:
        """An empty cache."""

    @abc.abstractmethod
    def feed(self, cache: Any, ids: Sequence[int], first: int) -> tuple[Logits, Any]:
        """Logits after each of some tokens, of which the first has position `first`, and the cache with them."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """As `Model.logits`."""
        cache, found, together = self.begin(), [], max(len(ids) - SINGLY, 0)
        starts = [*range(0, together, CHUNK), *range(together, len(ids)), len(ids)]
        for start, end in itertools.pairwise(starts):
            logits, cache = self.feed(cache, ids[start:end], start)
            found.append(logits)
        return np.concatenate(found)

    def generate(self, ids: Sequence[int], new: int) -> Iterator[int]:
        """As `Model.generate`."""
        logits, cache = self.feed(self.begin(), ids, 0)
        for index in range(new):
            yield (token := int(logits[-1].argmax()))
            if index + 1 < new:
                logits, cache = self.feed(cache, [token], len(ids) + index)


class Transformers(Cached):
    """A Hugging Face folder in transformers, attending as its own code says ("eager")."""

    packages = ("transformers", "torch")

    def __init__(self, job: Job):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self._torch = torch
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            job.path, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=True,
            output_loading_info=True,
        )  # fmt: skip
        self._model, info = loaded
        if problems := {name: sorted(map(str, found)) for name, found in info.items() if found}:
            raise ValueError(f"transformers loads {job.path} with {problems}")
        self._model.eval()

    def begin(self) -> Any:
        """None: the class makes the cache that it likes."""
        return None

    def feed(self, cache: Any, ids: Sequence[int], first: int) -> tuple[Logits, Any]:
        """As `Cached.feed`."""
        with self._torch.inference_mode():
            out = self._model(self._torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
        return out.logits[0].numpy(), out.past_key_values


class TorchRuntime(Cached):
    """`export/torch_runtime`."""

    packages = ("torch",)

    def __init__(self, job: Job):
        import torch

        from export.torch_runtime.generate import eager_step
        from export.torch_runtime.model import load_model

        self._torch, self._step, self._capacity = torch, eager_step, job.capacity
        self._model = load_model(job.path, dtype=torch.float32)

    def begin(self) -> Any:
        """As `Cached.begin`."""
        return self._model.init_cache(self._capacity)

    def feed(self, cache: Any, ids: Sequence[int], first: int) -> tuple[Logits, Any]:
        """As `Cached.feed`; a single token by the step that `generate` takes."""
        tokens = self._torch.tensor([list(ids)])
        positions = self._torch.arange(first, first + len(ids))
        with self._torch.inference_mode():
            if len(ids) == 1:
                return self._step(self._model, cache)(tokens, positions)[1][0].numpy(), cache
            hidden = self._model(tokens, positions, cache, num_slots=first + len(ids))
            return self._model.logits(hidden)[0].numpy(), cache


class StableHLO(Cached):
    """The programs of a folder, called by the script that lies with them."""

    packages = ("jax", "flatbuffers")

    def __init__(self, job: Job):
        import jax.numpy as jnp
        import safetensors.flax

        path = Path(job.path)
        script = _load_script(path / "generate.py")
        self._jnp, self._about = jnp, json.loads((path / "model.json").read_text("utf-8"))
        self._params = safetensors.flax.load_file(path / "params.safetensors")
        self._prefill, self._decode = script.load("prefill"), script.load("decode")
        block = self._about["cache"]["block"]
        self._slots = -(-job.capacity // block) * block
        for length in (CHUNK, 1):  # a program is compiled when it is first called
            self.feed(self.begin(), [0] * length, 0)

    def begin(self) -> Any:
        """As `Cached.begin`."""
        cache = self._about["cache"]
        shape = (cache["layers"], 1, cache["kv_heads"], self._slots, cache["head_dim"])
        return [self._jnp.zeros(shape, cache["dtype"]) for _ in range(2)]

    def feed(self, cache: Any, ids: Sequence[int], first: int) -> tuple[Logits, Any]:
        """As `Cached.feed`."""
        call = self._decode if len(ids) == 1 else self._prefill
        tokens = self._jnp.asarray([list(ids)], self._jnp.int32)
        positions = self._jnp.arange(first, first + len(ids), dtype=self._jnp.int32)[None]
        logits, *cache = call(self._params, tokens, positions, *cache)
        return np.asarray(logits[0]), cache


class LlamaCpp(Cached):
    """A .gguf file in llama.cpp, which the package cyllama brings."""

    packages = ("cyllama",)
    beside = "llama"  # a folder in the environment that only its processes see

    def __init__(self, job: Job):
        from benchmarks.llama_cpp_worker import Session

        self._session = Session(job.path, job.capacity)

    def begin(self) -> Any:
        """As `Cached.begin`."""
        self._session.clear()

    def feed(self, cache: Any, ids: Sequence[int], first: int) -> tuple[Logits, Any]:
        """As `Cached.feed`."""
        return self._session.logits(list(ids), first), None


class Native:
    """`export/cuda`'s program on the CPU; it takes no single tokens but its own, and is started for each text."""

    packages = ()

    def __init__(self, job: Job):
        self._command = [job.program, job.path, "--capacity", str(job.capacity), "--chunk", str(CHUNK)]
        self._logits_file = Path(job.out).with_suffix(".logits")
        self._run()

    def _run(self, *arguments: str) -> None:
        done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError((done.stderr.strip() or f"it ends with {done.returncode}").splitlines()[0])

    def logits(self, ids: Sequence[int]) -> Logits:
        """As `Model.logits`."""
        self._run("--ids", ",".join(map(str, ids)), "--logits", str(self._logits_file))
        found = np.fromfile(self._logits_file, np.float32).reshape(len(ids), -1)
        self._logits_file.unlink()
        return found

    def generate(self, ids: Sequence[int], new: int) -> Iterator[int]:
        """As `Model.generate`; a token is printed when it is known."""
        more = ["--ids", ",".join(map(str, ids)), "--max-new-tokens", str(new), "--ignore-eos"]
        with subprocess.Popen([*self._command, *more], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
            assert program.stdout is not None
            word = b""
            while character := program.stdout.read(1):
                if character.isspace():
                    yield int(word)
                    word = b""
                else:
                    word += character
        if program.returncode:
            raise ValueError(f"{self._command[0]} ends with {program.returncode}")


RUNTIMES: Mapping[str, Any] = {
    "transformers": Transformers,
    "torch_runtime": TorchRuntime,
    "stablehlo": StableHLO,
    "llama_cpp": LlamaCpp,
    "native": Native,
}


def _load_script(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"script_{abs(hash(str(file)))}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def beside(runtime: str) -> list[str]:
    """Folders with packages that only a runtime's processes see."""
    name = getattr(RUNTIMES[runtime], "beside", "")
    return [str(Path(sys.prefix) / name)] if name else []


def missing(runtime: str) -> list[str]:
    """The packages of a runtime that are not installed."""
    places = [*beside(runtime), *sys.path]
    return [name for name in RUNTIMES[runtime].packages if PathFinder.find_spec(name, places) is None]


def versions(runtime: str) -> str:
    """What runs."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in RUNTIMES[runtime].packages)


def measure(load: Callable[[Job], Model], job: Job) -> dict[str, Any]:
    """Loads an export, and asks it.

    Returns:
        `load_seconds`; `logits_0`, … of each row [T, V]; `greedy` [rows, new]; `tokens_per_second` of the median row,
        after the first new tokens.
    """
    began = time.perf_counter()
    model = load(job)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - began}
    greedy, rates = [], []
    for index, row in enumerate(job.rows):
        found[f"logits_{index}"] = np.asarray(model.logits(row), np.float32)
        said, times = [], []
        for token in model.generate(row[: job.prompt], job.new):
            said.append(token)
            times.append(time.perf_counter())
        greedy.append(said)
        rates.append((len(times) - UNTIMED) / (times[-1] - times[UNTIMED - 1]))
    return found | {"greedy": np.asarray(greedy), "tokens_per_second": float(np.median(rates))}


def answer(load: Callable[[Job], Model], job: Job) -> dict[str, Any]:
    """What `measure` finds; or "refused", the words of whatever the runtime raises.

    What that is is its own; whether it may is judged by who asked.
    """
    try:
        return measure(load, job)
    except Exception as error:
        words = str(error) or repr(error)
        return {"refused": words.replace(job.path, "the export") if job.path else words}


def save(out: Path, found: Mapping[str, Any]) -> None:
    """Writes what was found, whole or not at all."""
    partial = out.with_suffix(".partial.npz")
    np.savez(partial, **found)
    partial.replace(out)


def write_jobs(file: Path, jobs: Sequence[Job]) -> None:
    """Writes the file that `main` reads."""
    file.write_text(json.dumps([asdict(job) for job in jobs]), "utf-8")


def main() -> None:
    """Runs the jobs of a file, one after another."""
    runtime, file = sys.argv[1], Path(sys.argv[2])
    for entry in json.loads(file.read_text("utf-8")):
        job = Job(**entry)
        found = answer(RUNTIMES[runtime], job)
        ours = {name for name in sys.modules if name.partition(".")[0] in OUR_PACKAGES}
        rooms = sorted({".".join(name.split(".")[:2]) for name in ours} - {"export"})  # an empty package
        save(Path(job.out), found | {"versions": versions(runtime), "our_modules": ",".join(rooms)})


if __name__ == "__main__":
    main()
