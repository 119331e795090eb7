"""What made a result: code revision, package versions and machine, for workdirs, checkpoints and benchmarks."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("cpm_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "array_record", "numpy")


def git_revision() -> str:
    """The commit of the code that runs, with "-dirty" where files differ from it; "" outside a git checkout.

    Figures in `results/` and `docs/images/` are no part of the code: one benchmark's do not make the next one's dirty.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed as a package: a repository further up would be another's
        return ""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!results", ":!docs/images")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git on this machine, or a repository it refuses to read
        return ""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Describes the machine; names no host.

    Returns:
        `cpu` (model), `cores` (that this process may use), `memory_gib`, `system`, and of the accelerators `platform`,
        `device_kind` and `device_count` as JAX sees them, over all processes.
    """
    import jax  # starts the backend: only who asks for the machine pays for it

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
    }
