"""The program of many trainings: trials that differ in scalars only share what is compiled, and each step's call.

What all trials share stays a constant of the program; what differs (learning rates by step, weight decay, betas,
epsilon, µP's multipliers) is an argument with an axis of trials, and so are parameters and moments. Trials run side
by side (`vmap`), or after each other within the program (`map`), which computes what a training of its own does; on
several devices each takes its part. No operation crosses from one trial to another.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cpm_jax.common.config import ConfigError, config_differences, config_to_dict
from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig, Multipliers
from cpm_jax.modeling.model_size import count_params
from cpm_jax.training.losses import Batch, LossConfig, LossSums, loss_sums
from cpm_jax.training.optimizer import (
    Group,
    Optimizer,
    OptimizerConfig,
    ParameterGroup,
    adamw,
    make_optimizer,
    parameter_groups,
)
from cpm_jax.training.schedules import Schedule, ScheduleConfig, make_schedule
from cpm_jax.training.train_state import TrainState, abstract_state, init_state
from cpm_jax.training.train_step import Metrics, train_step

Method = Literal["vmap", "map"]
TRIALS = "trials"  # name of the mesh axis

_MODEL_SCALARS = ("scale_emb", "scale_depth", "dim_model_base", "initializer_range")
_OPTIMIZER_SCALARS = ("b1", "b2", "eps", "weight_decay", "decay_embeddings", "width_independent_decay")
# Non-embedding parameters up to which CPUs take `vmap`: on one device it is faster at 8,000 and slower at 33,000
# (results/stacked_trials.json).
_CPU_VMAP_PARAMS = 15_000


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        name: of its folder.
        model: the model.
        optimizer: the optimizer.
        schedule: learning rate.
        seed: of the initial parameters and the order of the data.
    """

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    seed: int = 0


def program_key(trial: Trial) -> Hashable:
    """What two trials must agree in to share a program: all but scalars, schedule and seed."""
    defaults: dict[str, Any] = {name: getattr(OptimizerConfig(), name) for name in _OPTIMIZER_SCALARS}
    return (
        dataclasses.replace(trial.model, scale_emb=1.0, scale_depth=0.0, dim_model_base=0, initializer_range=1.0),
        dataclasses.replace(trial.optimizer, **defaults),
    )


def check_trials(trials: Sequence[Trial]) -> None:
    """Refuses trials that cannot share a program.

    Raises:
        ConfigError: naming the field and its values; or there is no trial, or two have one name.
    """
    names = [trial.name for trial in trials]
    if not trials or len(set(names)) != len(names):
        raise ConfigError(f"Trial.name: {names}: give at least one trial, and each its own name", field="Trial.name")
    first = trials[0]
    for other in trials[1:]:
        if program_key(first) == program_key(other):
            continue
        for ours, theirs, scalars in (
            (first.model, other.model, _MODEL_SCALARS),
            (first.optimizer, other.optimizer, _OPTIMIZER_SCALARS),
        ):
            for name, (a, b) in config_differences(config_to_dict(ours), config_to_dict(theirs)).items():
                if name not in scalars:
                    field = f"{type(ours).__name__}.{name}"
                    raise ConfigError(
                        f"{field} = {a!r} in trial {first.name!r} and {b!r} in {other.name!r}: trials of one program "
                        f"may differ in their schedule, seed, {', '.join(_MODEL_SCALARS + _OPTIMIZER_SCALARS)}",
                        field=field,
                    )


def _scalars(trial: Trial) -> dict[str, float]:
    """What a step takes from a trial's configs, beside the schedule."""
    multipliers, table = trial.model.multipliers, parameter_groups(trial.optimizer, trial.model)
    found = dataclasses.asdict(multipliers)
    found |= {name: getattr(trial.optimizer, name) for name in ("b1", "b2", "eps")}
    for group, rule in table.items():
        found |= {f"lr/{group}": rule.lr, f"decay/{group}": rule.decay}
    return found


def _split(trials: Sequence[Trial], steps: int) -> tuple[dict[str, float], Schedule | None, dict[str, np.ndarray]]:
    """Scalars that all trials share; the schedule if they do; and what differs, with a leading axis of trials."""
    every = [_scalars(trial) for trial in trials]
    columns = {name: [scalars[name] for scalars in every] for name in every[0]}
    shared = {name: column[0] for name, column in columns.items() if len(set(column)) == 1}
    varied = {name: np.array(column, np.float32) for name, column in columns.items() if name not in shared}
    if len({trial.schedule for trial in trials}) == 1:
        return shared, make_schedule(trials[0].schedule), varied
    rates = {trial.schedule: _learning_rates(trial.schedule, steps) for trial in trials}
    return shared, None, varied | {"learning_rates": np.stack([rates[trial.schedule] for trial in trials])}


def _learning_rates(schedule: ScheduleConfig, steps: int) -> np.ndarray:
    """The learning rate of each step, [steps]."""
    return np.asarray(jax.jit(jax.vmap(make_schedule(schedule)))(jnp.arange(steps)))


def _multipliers(scalars: Mapping[str, Any]) -> Multipliers:
    return Multipliers(**{field.name: scalars[field.name] for field in dataclasses.fields(Multipliers)})


def _optimizer(scalars: Mapping[str, Any], schedule: Schedule | None, max_grad_norm: float | None) -> Optimizer:
    table = {
        group: ParameterGroup(init_std=0.0, lr=scalars[f"lr/{group}"], decay=scalars[f"decay/{group}"])
        for group in cast(tuple[Group, ...], get_args(Group))
    }
    return adamw(
        table,
        schedule or (lambda step: scalars["learning_rates"][step]),
        b1=scalars["b1"],
        b2=scalars["b2"],
        eps=scalars["eps"],
        max_grad_norm=max_grad_norm,
    )


class StackedProgram:
    """The compiled steps of trials that share a program."""

    def __init__(
        self,
        trials: Sequence[Trial],
        *,
        steps: int,
        loss: LossConfig,
        num_sources: int = 1,
        num_microbatches: int = 1,
        shared_batch: bool = True,
        method: Method | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Prepares the programs; nothing is compiled before the first call.

        Args:
            trials: N of them.
            steps: of the trainings, where schedules differ.
            loss: weights of the losses.
            num_sources: S, the number of mixture components.
            num_microbatches: parts of the batch whose gradients are accumulated one after the other.
            shared_batch: whether all trials take the same batch, or each its own, with a leading axis [N].
            method: None takes what is faster for the model's size.
            devices: over which trials are spread, as many to each; None takes the default device.

        Raises:
            ConfigError: the trials cannot share a program, or not be spread evenly.
        """
        check_trials(trials)
        self.trials = tuple(trials)
        self.devices = tuple(devices or jax.devices()[:1])
        self.method: Method = method or choose_method(trials[0].model, self.devices[0].platform)
        self.shared_batch = shared_batch
        if len(trials) % len(self.devices):
            raise ConfigError(
                f"StackedProgram.devices: {len(trials)} trials cannot be spread evenly over {len(self.devices)}: must "
                "be a number that divides them",
                field="StackedProgram.devices",
            )
        self.mesh = Mesh(np.array(self.devices), (TRIALS,))
        model, clip = trials[0].model, trials[0].optimizer.max_grad_norm
        shared, schedule, varied = _split(trials, steps)
        self._host_varied = varied

        def step(varied: Any, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            scalars = shared | varied
            function = train_step(
                model,
                _optimizer(scalars, schedule, clip),
                loss=loss,
                num_sources=num_sources,
                num_microbatches=num_microbatches,
                multipliers=_multipliers(scalars),
            )
            return function(state, batch)

        def evaluate(varied: Any, params: Any, batch: Batch) -> LossSums:
            return loss_sums(decoder.bind(model, params, _multipliers(shared | varied)), batch, num_sources)

        self._step = jax.jit(self._over_trials(step, shared_batch), donate_argnums=1)
        self._evaluate = jax.jit(self._over_trials(evaluate, True))

    @functools.cached_property
    def _varied(self) -> Any:
        return self.put(self._host_varied)

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """Lowers the step for devices that need not exist.

        Args:
            batch: `jax.ShapeDtypeStruct`s or arrays.
        """
        trial, sharding = self.trials[0], NamedSharding(self.mesh, PartitionSpec(TRIALS))
        one = abstract_state(trial.model, make_optimizer(trial.optimizer, trial.schedule, trial.model))
        varied, states, given = (
            jax.tree.map(lambda x, lead=lead: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=sharding), tree)
            for tree, lead in ((self._host_varied, ()), (one, (len(self.trials),)), (batch, ()))
        )
        if self.shared_batch:
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), batch)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # says for which platform
            return self._step.lower(varied, states, given)

    def put(self, tree: Any) -> Any:
        """Puts arrays with a leading axis of trials on the devices."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(TRIALS)))

    def init(self) -> TrainState:
        """The initial states of all trials, [N, ...], each as its own training draws it."""
        programs: dict[ModelConfig, Callable[[jax.Array], TrainState]] = {}
        states = []
        for trial in self.trials:
            # Models that start alike share what draws them; the optimizer's state starts at zero for all.
            model = dataclasses.replace(trial.model, scale_emb=1.0, scale_depth=0.0)
            if model not in programs:
                optimizer = make_optimizer(trial.optimizer, trial.schedule, model)
                programs[model] = jax.jit(functools.partial(init_state, model, optimizer))
            states.append(programs[model](jax.random.key(trial.seed)))
        return self.put(jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(states)))

    def step(self, states: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step of every trial; takes the states' own arrays. Metrics are those of a train step, [N, ...]."""
        return self._step(self._varied, states, batch)

    def evaluate(self, params: Any, batch: Batch) -> LossSums:
        """Loss sums of one batch under every trial's parameters, [N, ...]."""
        return self._evaluate(self._varied, params, batch)

    def _over_trials(self, function: Callable[..., Any], shared_batch: bool) -> Callable[..., Any]:
        """`function(varied, of one trial, batch)` for the trials of each device."""

        def side_by_side(varied: Any, stacked: Any, batch: Any) -> Any:
            return jax.vmap(function, in_axes=(0, 0, None if shared_batch else 0))(varied, stacked, batch)

        def after_each_other(varied: Any, stacked: Any, batch: Any) -> Any:
            if shared_batch:
                return jax.lax.map(lambda of_one: function(*of_one, batch), (varied, stacked))
            return jax.lax.map(lambda of_one: function(*of_one), (varied, stacked, batch))

        together = side_by_side if self.method == "vmap" else after_each_other
        if len(self.devices) == 1:
            return together
        each, all_of_it = PartitionSpec(TRIALS), PartitionSpec()
        return jax.shard_map(
            together,
            mesh=self.mesh,
            in_specs=(each, each, all_of_it if shared_batch else each),
            out_specs=each,
            check_vma=False,
        )


def choose_method(model: ModelConfig, platform: str) -> Method:
    """The faster method for a model: on CPUs `vmap` for small ones only, elsewhere always.

    Args:
        model: of the trials.
        platform: of the devices, "cpu" or an accelerator's.
    """
    if platform != "cpu" or count_params(model).non_embedding <= _CPU_VMAP_PARAMS:
        return "vmap"
    return "map"
