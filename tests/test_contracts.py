"""Rules of the house that no single module can keep: import arrows, gin at the edge, torch outside, file sizes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cpm_jax", "kernels_pallas", "experiments", "export", "benchmarks")

# docs/architecture.md: a room may import itself and what stands here.
ARROWS = {
    "kernels_pallas": set(),
    "cpm_jax.common": set(),
    "cpm_jax.modeling": {"cpm_jax.common", "kernels_pallas"},
    "cpm_jax.checkpoints": {"cpm_jax.common", "cpm_jax.modeling", "cpm_jax.data"},
    "cpm_jax.data": {"cpm_jax.common"},
    "cpm_jax.training": {
        "cpm_jax.common",
        "cpm_jax.modeling",
        "cpm_jax.data",
        "cpm_jax.checkpoints",
        "kernels_pallas",
    },
    "cpm_jax.planning": {"cpm_jax.common", "cpm_jax.modeling", "cpm_jax.training", "kernels_pallas"},
    "cpm_jax.inference": {"cpm_jax.common", "cpm_jax.modeling", "cpm_jax.checkpoints", "cpm_jax.data"},
    "cpm_jax.evaluation": {
        "cpm_jax.common",
        "cpm_jax.modeling",
        "cpm_jax.checkpoints",
        "cpm_jax.data",
        "cpm_jax.training",
        "cpm_jax.inference",
        "cpm_jax.tools",
    },
    "cpm_jax.scaling": {"cpm_jax.common", "cpm_jax.modeling", "cpm_jax.checkpoints", "cpm_jax.training"},
    "cpm_jax.quantization": {"cpm_jax.common", "cpm_jax.modeling", "cpm_jax.data"},
    "cpm_jax.curation": {"cpm_jax.common", "cpm_jax.data", "cpm_jax.tools"},
    "cpm_jax.tools": {"cpm_jax.common"},
}
EXPORT_MAY_IMPORT = set(ARROWS) | {"export"}


def sources(*packages: str) -> list[Path]:
    """All Python files of the packages."""
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def room(module: str) -> str:
    """`cpm_jax.modeling.decoder` is in the room `cpm_jax.modeling`; other packages are one room each."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "cpm_jax" else parts[0]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_name(path: Path) -> str:
    """The dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", sources("cpm_jax", "kernels_pallas", "export"), ids=module_name)
def test_imports_follow_the_arrows(path):
    here = room(module_name(path))
    allowed = EXPORT_MAY_IMPORT if here == "export" else ARROWS.get(here, set()) | {here}
    for name in imports(path):
        if name.split(".")[0] in PACKAGES:
            assert room(name) in allowed, f"{here} may not import {name}: see docs/architecture.md"


def test_gin_stays_at_the_edge():
    edge = {"cpm_jax.common.gin_files", "cpm_jax.common.gin_utils"}
    for path in sources("cpm_jax", "kernels_pallas", "export"):
        if module_name(path) not in edge:
            assert not any(name.split(".")[0] == "gin" for name in imports(path)), f"{path} imports gin"


def test_torch_stays_outside_the_library():
    for path in sources("cpm_jax", "kernels_pallas", "experiments"):
        heavy = {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}
        assert not heavy, f"{path} imports {heavy}: only export/, tests/ and benchmarks/ may"


def test_data_runs_without_jax():
    for path in sources("cpm_jax/data", "cpm_jax/curation"):
        heavy = {name.split(".")[0] for name in imports(path)} & {"jax", "flax", "optax", "orbax"}
        assert not heavy, f"{path} imports {heavy}: data workers must start without a device"


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests"), ids=module_name)
def test_files_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_tests_mirror_the_packages():
    for path in (ROOT / "tests").glob("*/test_*.py"):
        folder = path.parent.name
        known = {"multidevice", "aot", "kernels_pallas", "experiments", "export", "benchmarks"}
        assert folder in known or (ROOT / "cpm_jax" / folder).is_dir(), f"{path}: no room cpm_jax/{folder}"
