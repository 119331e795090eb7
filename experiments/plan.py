"""The verb `plan`: what a pod will do, before there is one."""

from pathlib import Path

import jax
from pydantic import PositiveFloat, PositiveInt

from cpm_jax.common import report
from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.common.files import write_json
from cpm_jax.common.progress import Progress
from cpm_jax.common.sharding import MeshConfig
from cpm_jax.planning.analytic import Guess
from cpm_jax.planning.aot import libtpu_path
from cpm_jax.planning.chips import parse_topology
from cpm_jax.planning.plan_report import build_page, describe, libtpu_init_args
from cpm_jax.planning.search import Evaluation, Plan, choose, find_guesses, make_plan, to_json
from cpm_jax.planning.workload import Remat, Workload

REPORT_FILE = "report.html"
PLAN_FILE = "plan.json"
_COMPILED_DIR = "compiled"


@config_dataclass
class PlanConfig:
    """A plan.

    Attributes:
        workload: what runs.
        topology: chip and sides of the slice, as "v5p:8x8x8".
        batch_sizes: rows per step over all chips (sequences in decoding) to choose from.
        price_per_chip_hour: in any currency.
        token_budget: tokens whose days and cost are told.
        remats: remat policies to choose from, in training.
        meshes: meshes to choose from; none takes all that divide the chips and the model.
        num_compiles: candidates that are compiled.
        compile_timeout: seconds for one of them.
    """

    workload: Workload
    topology: str
    batch_sizes: tuple[PositiveInt, ...]
    price_per_chip_hour: PositiveFloat
    token_budget: PositiveFloat = 1e12
    remats: tuple[Remat, ...] = ("full", "dots", "none")
    meshes: tuple[MeshConfig, ...] = ()
    num_compiles: PositiveInt = 3
    compile_timeout: PositiveFloat = 600.0

    def __post_init__(self) -> None:
        chips = parse_topology(self.topology).num_chips
        if not self.batch_sizes or not self.remats:
            raise ConfigError(
                "PlanConfig.batch_sizes and PlanConfig.remats: give at least one each", field="PlanConfig"
            )
        for mesh in self.meshes:
            if -1 in mesh.sizes or mesh.data * mesh.fsdp * mesh.tensor * mesh.context != chips:
                raise ConfigError(
                    f"PlanConfig.meshes: {mesh.sizes} must multiply to the {chips} chips of {self.topology}",
                    field="PlanConfig.meshes",
                )


def find_candidates(config: PlanConfig) -> list[Guess]:
    """All candidates that the formulas let fit, best first.

    Raises:
        ConfigError: no batch size and mesh go together.
    """
    return find_guesses(
        config.workload, parse_topology(config.topology), config.batch_sizes, config.remats, config.meshes
    )


def chosen(config: PlanConfig) -> list[Guess]:
    """Those of `find_candidates` that are compiled."""
    return choose(find_candidates(config), config.num_compiles)


def make(config: PlanConfig, workdir: Path) -> Plan:
    """Makes the plan, with what was compiled before in `workdir`; shows how far it is."""
    with Progress("plan: compile", config.num_compiles) as progress:

        def show(done: int, total: int, evaluation: Evaluation) -> None:
            said = "does not fit" if not evaluation.fits else f"estimated MFU {evaluation.mfu:.1%}"
            progress.write(
                f"{done}/{total} {evaluation.candidate.label}: {said}, compiled in {evaluation.compile_seconds:.0f} s, "
                f"about {(total - done) * evaluation.compile_seconds:.0f} s to go"
            )
            progress.update(done)

        return make_plan(
            config.workload,
            parse_topology(config.topology),
            batch_sizes=config.batch_sizes,
            remats=config.remats,
            mesh_choices=config.meshes,
            num_compiles=config.num_compiles,
            timeout=config.compile_timeout,
            cache=workdir / _COMPILED_DIR,
            on_compiled=show,
        )


def run(config: PlanConfig, workdir: Path) -> None:
    """Compiles the most promising candidates and writes the plan as text, `plan.json` and `report.html`.

    Raises:
        ConfigError: libtpu does not know the topology, or nothing divides model, batch and chips.
        InputError: libtpu is missing, or the compiler failed.
    """
    jax.config.update("jax_platforms", "cpu")  # shapes need no accelerator
    libtpu_path()
    plan = make(config, workdir)
    write_json(workdir / PLAN_FILE, to_json(plan, config.token_budget, config.price_per_chip_hour))
    page = build_page(plan, f"Plan for {plan.topology.name}", config.token_budget, config.price_per_chip_hour)
    path = report.write(page, workdir / REPORT_FILE)
    print(describe(plan, config.token_budget, config.price_per_chip_hour))
    print(f"the real run needs LIBTPU_INIT_ARGS='{libtpu_init_args()}'\nreport: {path}")
