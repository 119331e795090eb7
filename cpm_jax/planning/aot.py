"""Compiles candidates ahead of time, each in a process of its own, and keeps what came out."""

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpm_jax.common import provenance
from cpm_jax.common.config import ConfigError, InputError, config_to_dict
from cpm_jax.common.files import write_json
from cpm_jax.planning.chips import CHIPS, Topology
from cpm_jax.planning.workload import Candidate, Workload

# Lets weights be gathered beside computation and gradients be scattered as they are summed. Whoever runs the plan sets
# the same options in LIBTPU_INIT_ARGS.
COMPILER_OPTIONS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
}
# libtpu would look for the machine that it is on.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # There is no device that two processes could want.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_ROOT = Path(__file__).resolve().parents[2]
# What decides the program and what is kept of it, beside its request.
_SOURCES = (
    *("cpm_jax/modeling", "cpm_jax/training", "kernels_pallas"),
    *("cpm_jax/common/sharding.py", "cpm_jax/planning/workload.py", "cpm_jax/planning/compile_process.py"),
)


class CompileError(InputError):
    """A candidate could not be compiled, for another reason than its size; the message holds what the compiler said."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a candidate.

    Attributes:
        seconds: that it took.
        memory: bytes per chip by `argument`, `output`, `alias`, `temp` and `generated_code`; empty if it did not fit.
        program: the text of the optimised HLO; "" if it did not fit.
        refusal: what the compiler said if the program needs more memory than the chip has; else "".
        used_bytes: what it would need then, as far as the compiler says.
        cached: whether it was compiled before.
        cpu_seconds: of all its threads: what other jobs on the machine do not change.
    """

    seconds: float
    memory: dict[str, int]
    program: str
    refusal: str = ""
    used_bytes: int | None = None
    cached: bool = False
    cpu_seconds: float = 0.0


def libtpu_path() -> str:
    """The folder to import libtpu from; "" where it is importable as it is.

    Raises:
        InputError: saying how to install it.
    """
    if importlib.util.find_spec("libtpu") is not None:
        return ""
    # Kept out of the environment itself: where libtpu is found, every JAX process looks for a TPU first.
    beside = Path(sys.prefix) / "aot"
    if (beside / "libtpu").is_dir():
        return str(beside)
    raise InputError(
        "libtpu, the TPU compiler, is not installed. In a checkout run `make aot`; elsewhere "
        f"`pip install --no-deps --target {beside} '{_libtpu_requirement()}'`. No TPU is needed"
    )


def _libtpu_requirement() -> str:
    """What the jax that is installed asks for on a TPU."""
    requirements = importlib.metadata.requires("jax") or []
    return next((r.partition(";")[0].strip() for r in requirements if r.startswith("libtpu")), "libtpu")


@functools.cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for source in _SOURCES:
        path = _ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def compile_candidate(
    workload: Workload, candidate: Candidate, topology: Topology, cache: Path, timeout: float
) -> Compiled:
    """Compiles a candidate, or takes what an earlier call with the same arguments, code and versions left.

    Args:
        workload: what runs.
        candidate: how.
        topology: on what.
        cache: folder of results.
        timeout: seconds after which the compiler is stopped.

    Raises:
        ConfigError: libtpu does not know the topology, or the mesh does not fit model or batch.
        CompileError: the compiler failed or ran out of time.
        InputError: libtpu is not installed.
    """
    path = libtpu_path()
    request = {
        "topology": topology.name,
        "workload": config_to_dict(workload),
        "candidate": config_to_dict(candidate),
        "compiler_options": COMPILER_OPTIONS,
    }
    key = {**request, "versions": provenance.versions(), "sources": _source_digest()}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    result, program = cache / f"{name}.json", cache / f"{name}.hlo.gz"
    cached = result.exists()
    if not cached:
        write_json(cache / f"{name}.request.json", request)
        _run(cache / f"{name}.request.json", result, program, path, timeout)
    return _read(json.loads(result.read_text(encoding="utf-8")), result, program, topology, cached)


def compiler_environment(libtpu: str) -> dict[str, str]:
    """The environment of a process that compiles for TPUs that are not there.

    Args:
        libtpu: where libtpu is, from `libtpu_path`.
    """
    search = [libtpu, str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(part for part in search if part)}


def _run(request: Path, result: Path, program: Path, libtpu: str, timeout: float) -> None:
    environment = compiler_environment(libtpu)
    command = [sys.executable, "-m", "cpm_jax.planning.compile_process", *map(str, (request, result, program))]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise CompileError(
            f"the compiler did not finish within PlanConfig.compile_timeout = {timeout:.0f} seconds"
        ) from None
    if done.returncode or not result.exists():
        raise CompileError(f"the compiler failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")


def _read(result: dict[str, Any], path: Path, program: Path, topology: Topology, cached: bool) -> Compiled:
    status = result["status"]
    if status in ("unknown_topology", "bad_config"):
        path.unlink()  # an error is no result to keep
    if status == "unknown_topology":
        chip = topology.chip
        raise ConfigError(
            f"PlanConfig.topology = {topology.name!r}: libtpu does not know it ({result['message'].splitlines()[0]}); "
            f"known are for example {', '.join(f'{chip.name}:{sides}' for sides in chip.examples)}; "
            f"chips: {', '.join(CHIPS)}",
            field="PlanConfig.topology",
        )
    if status == "bad_config":
        raise ConfigError(result["message"], field=result["field"])
    if status == "too_large":
        return Compiled(
            result["seconds"], {}, "", result["message"], result["used_bytes"], cached, result["cpu_seconds"]
        )
    text = gzip.decompress(program.read_bytes()).decode()
    return Compiled(result["seconds"], result["memory"], text, cached=cached, cpu_seconds=result["cpu_seconds"])
