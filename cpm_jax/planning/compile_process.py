"""Compiles one candidate for TPUs that are not there; a process of its own, which `aot.py` starts.

    python -m cpm_jax.planning.compile_process REQUEST.json RESULT.json PROGRAM.hlo.gz

libtpu reads its settings when it is loaded, and may take the process with it.
"""

import gzip
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from cpm_jax.common.config import ConfigError, config_from_dict
from cpm_jax.common.files import write_json
from cpm_jax.planning.workload import Candidate, Workload, lower

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def used_bytes(message: str) -> int | None:
    """What the compiler says that a program would need, from its refusal; None where it does not."""
    for form in (r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds"):
        if found := re.search(form, message):
            return round(float(found[1]) * _UNITS[found[2]])
    return None


def compile_request(request: dict[str, Any], program: Path) -> dict[str, Any]:
    """Compiles what a request of `aot.compile_candidate` asks for.

    Args:
        request: topology, workload, candidate and compiler options.
        program: where the compiled program's text goes.

    Returns:
        `status` ("compiled", "too_large", "bad_config" or "unknown_topology") and what goes with it.
    """
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"])
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return {"status": "unknown_topology", "message": str(error)}
    try:
        workload = config_from_dict(Workload, request["workload"])
        lowered = lower(workload, config_from_dict(Candidate, request["candidate"]), list(description.devices))
    except ConfigError as error:
        return {"status": "bad_config", "message": str(error), "field": error.field}
    start, cpu_start = time.monotonic(), time.process_time()
    try:
        compiled = lowered.compile(compiler_options=request["compiler_options"])
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        return {
            "status": "too_large",
            "message": message.partition("\n\n")[0][:2000],
            "used_bytes": used_bytes(message),
            "seconds": time.monotonic() - start,
            "cpu_seconds": time.process_time() - cpu_start,
        }
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    memory = compiled.memory_analysis()
    program.write_bytes(gzip.compress((compiled.as_text() or "").encode(), compresslevel=6))
    return {
        "status": "compiled",
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memory": {
            name: getattr(memory, f"{name}_size_in_bytes")
            for name in ("argument", "output", "alias", "temp", "generated_code")
        },
    }


if __name__ == "__main__":
    request_path, result_path, program_path = map(Path, sys.argv[1:])
    write_json(result_path, compile_request(json.loads(request_path.read_text(encoding="utf-8")), program_path))
