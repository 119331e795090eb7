"""The PyTorch runtime beside transformers on the same folder: reading a prompt, decoding, and memory.

    python -m benchmarks.torch_runtime_speed --folder FOLDER [--lengths 512 2048]
    python -m benchmarks.torch_runtime_speed --gin_file arch/minicpm4_128k.gin arch/infllm_v2.gin size/minicpm4_8b.gin \
        --lengths 8192 32768 131008 --kernels triton          # random weights of a size; on a GPU

FOLDER is one that `export` wrote in a layout of which transformers has a class. Where its config.json has a
`sparse_config`, ours attends as it says and densely, transformers densely. Transformers attends by FlashAttention:
through the package flash-attn where it is installed, else through PyTorch's own kernel. Each arm runs in a process of
its own: once for all that is compiled or captured, then `REPEATS` times, of which the medians count.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from benchmarks.results import RESULTS_DIR, Benchmark
from cpm_jax.checkpoints.hf_config import LAYOUTS, default_layout, write_config
from cpm_jax.common.gin_utils import Settings
from cpm_jax.modeling.config import ModelConfig
from export.torch_runtime.generate import SamplingConfig, Speed, generate
from export.torch_runtime.linear import Kernels
from export.torch_runtime.model import load_model

REPEATS = 3


class Arm(NamedTuple):
    """One way to run a folder.

    Attributes:
        folder: of weights.
        length: tokens of the prompt.
        new_tokens: that follow it.
        device: where.
        dtype: of activations and weights.
        kernels: ours, by these; None is transformers.
        compiled: whether our step of decoding is compiled.
    """

    folder: Path
    length: int
    new_tokens: int
    device: str
    dtype: str
    kernels: Kernels | None
    compiled: bool = False


class Measured(NamedTuple):
    """What one arm took.

    Attributes:
        prefill: tokens of the prompt a second, up to the first new token.
        decode: new tokens a second, after the first.
        memory: GiB at most: of the GPU by PyTorch's count, or of the process.
    """

    prefill: float
    decode: float
    memory: float


class _Clock(transformers.StoppingCriteria):
    """Notes when each token is there."""

    def __init__(self, device: str):
        self._device, self.times = device, [_now(device)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        del scores
        self.times.append(_now(self._device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def attention_of_transformers(device: str) -> str:
    """The implementation that a user would choose on a device."""
    found = device.startswith("cuda") and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if found else "sdpa"


def measure(arm: Arm) -> Measured:
    """Runs one arm in this process."""
    ids = torch.randint(0, 1000, (arm.length,), generator=torch.Generator().manual_seed(0)).tolist()
    run = _theirs(arm, ids) if arm.kernels is None else _ours(arm, ids)
    rates = [run() for _ in range(REPEATS + 1)][1:]
    if arm.device.startswith("cuda"):
        memory = torch.cuda.max_memory_allocated(arm.device)
    else:
        # Not ru_maxrss, which begins at the size of the process that started this one.
        memory = int(Path("/proc/self/status").read_text("utf-8").split("VmHWM:")[1].split()[0]) * 1024
    prefill, decode = (statistics.median(values) for values in zip(*rates, strict=True))
    return Measured(prefill, decode, memory / 2**30)


def _ours(arm: Arm, ids: list[int]) -> Callable[[], tuple[float, float]]:
    assert arm.kernels is not None
    model = load_model(arm.folder, arm.device, getattr(torch, arm.dtype))
    model.config = dataclasses.replace(model.config, eos_token_ids=())
    model.use_kernels(arm.kernels)

    def run() -> tuple[float, float]:
        speed, greedy = Speed(), SamplingConfig(temperature=0)
        for _ in generate(model, ids, arm.new_tokens, greedy, compiled=arm.compiled, speed=speed):
            pass
        return speed.prefill_rate, speed.decode_rate

    return run


def _theirs(arm: Arm, ids: list[int]) -> Callable[[], tuple[float, float]]:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        arm.folder, dtype=getattr(torch, arm.dtype), attn_implementation=attention_of_transformers(arm.device)
    )
    model = loaded.to(arm.device)
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=arm.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    prompt = torch.tensor([ids], device=arm.device)

    def run() -> tuple[float, float]:
        clock = _Clock(arm.device)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=[clock])
        begin, first, *_, last = clock.times
        return len(ids) / (first - begin), (arm.new_tokens - 1) / (last - first)

    return run


def random_folder(model: ModelConfig, folder: Path, device: str) -> Path:
    """A folder of random bfloat16 weights, made by transformers on `device`."""
    layout = LAYOUTS[default_layout(model).model_type]
    entries = write_config(model, layout)
    config = transformers.AutoConfig.for_model(**entries)
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(entries | {"dtype": "bfloat16", "eos_token_id": 0}), "utf-8")
    return folder


def dense_copy(folder: Path, copy: Path) -> Path:
    """The same weights without `sparse_config`."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path.resolve())
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["sparse_config"]
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    return copy


def measure_alone(arm: Arm) -> Measured | str:
    """Runs one arm in a process of its own, or says why it cannot be run."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, arm).result()
        except torch.OutOfMemoryError:
            return "out of memory"


def add_rows(bench: Benchmark, what: str, ours: Measured | str, theirs: Measured | str, baseline: str) -> None:
    """Three rows of one length and arm, or one that says that it did not run."""
    if isinstance(ours, str):
        bench.add(f"{what}: {ours}", "runs", 0, larger_is_better=True)
        return
    if isinstance(theirs, str):
        what = f"{what} ({baseline}: {theirs})"
    for field, name, unit in (("prefill", "prompt", "tokens/s"), ("decode", "decoding", "tokens/s"),
                              ("memory", "peak memory", "GiB")):  # fmt: skip
        bench.add(
            f"{what}: {name}",
            unit,
            getattr(ours, field),
            larger_is_better=field != "memory",
            **({} if isinstance(theirs, str) else {"baseline_name": baseline, "baseline": getattr(theirs, field)}),
        )


def compare(folders: Mapping[str, Path], args: argparse.Namespace, directory: Path = RESULTS_DIR) -> Path:
    """Measures all arms at all lengths, and writes what came out.

    Args:
        folders: "dense", and "sparse" where there is one.
        args: from the command line.
        directory: where to.
    """
    bench = Benchmark("torch_runtime_speed")
    on_gpu = args.device.startswith("cuda")
    device = torch.cuda.get_device_name(args.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    baseline = f"transformers {transformers.__version__}, {attention_of_transformers(args.device)}"
    for length in args.lengths:
        arm = Arm(folders["dense"], length, args.new_tokens, args.device, args.dtype, None)
        theirs = measure_alone(arm)
        for name, folder in folders.items():
            mine = arm._replace(folder=folder, kernels=args.kernels, compiled=args.compile)
            how = f"{args.kernels} kernels{', compiled' if args.compile else ''}, {args.dtype}"
            what = f"{args.name}, {name}, {how}, {length:,} + {args.new_tokens} tokens on {device}"
            add_rows(bench, what, measure_alone(mine), theirs, baseline)
    return bench.write(directory)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=Path, help="that `export` wrote")
    source.add_argument("--gin_file", nargs="+", help="of a model, which gets random weights")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="of prompts")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--kernels", choices=("torch", "triton"), default="torch")
    parser.add_argument("--compile", action="store_true", help="our step of decoding by torch.compile")
    args = parser.parse_args(argv)
    args.name = Path(args.gin_file[-1]).stem if args.gin_file else args.folder.resolve().parent.name
    return args


def main(argv: Sequence[str] | None = None, directory: Path = RESULTS_DIR) -> None:
    """Measures and reports.

    Raises:
        SystemExit: a prompt with what follows it is longer than the model.
    """
    args = _arguments(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder
        if args.gin_file:
            model = Settings(args.gin_file, [], ModelConfig).build()
            folder = random_folder(model, Path(scratch) / "random", args.device)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        limit = config["max_position_embeddings"] - args.new_tokens
        if too_long := [length for length in args.lengths if length > limit]:
            raise SystemExit(
                f"--lengths {too_long[0]}: at most {limit}, as the model has room for {args.new_tokens} more"
            )
        folders = {"dense": folder}
        if "sparse_config" in config:
            folders = {"dense": dense_copy(folder, Path(scratch) / "dense"), "sparse": folder}
        compare(folders, args, directory)


if __name__ == "__main__":
    main()
