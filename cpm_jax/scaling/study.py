"""A sweep's study in Optuna: what to try next, whose worker has died, what may be promoted.

Workers decide one after the other, so that a trial is handed out once: `next_trial` holds a lock in the sweep's folder,
and one of PostgreSQL, which machines that share no folder share.
"""

import contextlib
import copy
import datetime
import fcntl
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt

from cpm_jax.common.config import ConfigError, InputError, config_dataclass, config_differences
from cpm_jax.scaling.extra import import_extra
from cpm_jax.scaling.space import Bindings, Space, walk

LOCK_FILE = "study.lock"  # within a workdir
# User attributes of trials.
ID, BINDINGS, POINT = "id", "bindings", "point"
PROMOTED, DUPLICATE_OF, CLAIMED = "promoted", "duplicate_of", "claimed"
STATUS, ERROR, LOG, PROGRESS, RUN = "status", "error", "log", "progress", "run"  # what became of it
EXHAUSTED = "exhausted"  # of the study
_MOST_DUPLICATES = 100  # in a row: a sampler that has nothing new to propose

logger = logging.getLogger(__name__)


@config_dataclass
class StudyConfig:
    """How trials are chosen, and which of them end early.

    Attributes:
        sampler: "grid" takes all points of a finite space, in order; "random"; "tpe"; "cma-es" for ranges alone.
        num_trials: different trials to make; None is all points of a grid.
        pruner: "asha" and "hyperband" end trials whose held-out loss is not among the best at equal tokens.
        min_share: share of a trial's tokens before which it is not ended.
        reduction_factor: one of so many trials goes on at each rung.
        promote: so many of the best ended trials are trained to their end after all, from their checkpoints.
        seed: of the sampler.
    """

    sampler: Literal["grid", "random", "tpe", "cma-es"] = "grid"
    num_trials: PositiveInt | None = None
    pruner: Literal["none", "asha", "hyperband"] = "none"
    min_share: Annotated[float, Field(gt=0, lt=1)] = 0.125
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    promote: NonNegativeInt = 0
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if self.sampler != "grid" and self.num_trials is None:
            raise ConfigError(
                f"StudyConfig.num_trials = None: the sampler {self.sampler!r} has no end of its own; give a number",
                field="StudyConfig.num_trials",
            )


class Claim(NamedTuple):
    """A trial that this worker has to train.

    Attributes:
        trial: `optuna.Trial`.
        bindings: what it sets.
    """

    trial: Any
    bindings: Bindings


def check_space(config: StudyConfig, space: Space) -> None:
    """Checks that a sampler can draw from a space.

    Raises:
        ConfigError: a grid of a range, or CMA-ES over options.
    """
    if config.sampler == "grid":
        next(walk(space))
    if config.sampler == "cma-es":
        options = [
            label for label, what in space.dimensions().items() if not isinstance(what, Mapping) and len(what) > 1
        ]
        if options:
            raise ConfigError(
                f"StudyConfig.sampler = 'cma-es': {', '.join(options)} has options; accepted are spaces of log_uniform "
                "and uniform alone",
                field="StudyConfig.sampler",
            )


def open_study(
    storage: Any,
    name: str,
    config: StudyConfig,
    space: Space,
    *,
    min_tokens: int,
    max_tokens: int,
    shared: Mapping[str, Any],
    about: str,
) -> Any:
    """Makes a study, or goes on with it.

    Args:
        storage: from `open_storage`.
        name: of the study.
        config: how trials are chosen.
        space: of the trials.
        min_tokens: before which none is ended.
        max_tokens: of a whole trial.
        shared: what all trials have in common, as JSON; it must be the same at each start.
        about: kept with the study: what its workers need to know.

    Raises:
        ConfigError: the study was made with another space, or other common settings; says what differs.
    """
    optuna = import_extra("optuna")
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction="minimize",
        load_if_exists=True,
        sampler=_sampler(config, 0),
        pruner=_pruner(config, min_tokens, max_tokens),
    )
    dimensions = {**{f"base {name}": value for name, value in shared.items()}, **space.dimensions()}
    attributes = study.user_attrs
    before = attributes.get("space")
    if before is not None and before != dimensions:
        said = "; ".join(
            f"{label}: {was!r} then, {now!r} now"
            for label, (was, now) in config_differences(before, dimensions).items()
        )
        raise ConfigError(
            f"the study {name!r} was made with another space: {said}. Give this one another --workdir or NAME",
            field="space",
        )
    if before is None:
        study.set_user_attr("space", dimensions)
    if attributes.get("about") != about:
        study.set_user_attr("about", about)
    return study


def load_study(storage: Any, name: str) -> Any:
    """Opens a study that is there, to read it.

    Raises:
        InputError: there is none.
    """
    optuna = import_extra("optuna")
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError as error:
        raise InputError(f"no study {name!r} in this database; start it with: sweep") from error


def enqueue_grid(study: Any, space: Space, num_trials: int | None) -> None:
    """Puts the points of a space, all or the first `num_trials`, into the study, as far as they are not there yet."""
    there = {trial.user_attrs.get(POINT) for trial in study.get_trials(deepcopy=False)}
    for index, (chosen, _) in enumerate(itertools.islice(walk(space), num_trials)):
        if index not in there:
            study.enqueue_trial(chosen, user_attrs={POINT: index})


def next_trial(
    study: Any, config: StudyConfig, space: Space, folder: Path, identify: Callable[[Bindings], str]
) -> Claim | Literal["wait", "done"]:
    """Takes a trial: one whose worker died, one that waits, or a new one.

    Trials that come out as one that was there before are told its result and not trained again; those whose values do
    not go together have failed.

    Args:
        study: from `open_study`.
        config: of it.
        space: of it.
        folder: of the sweep, where the lock lies.
        identify: gives the id of a trial from its bindings, or raises ConfigError.

    Returns:
        The trial; "wait" while others are at work whose trials may still come back; "done" when none is left.
    """
    optuna = import_extra("optuna")
    state = optuna.trial.TrialState
    with locked(folder / LOCK_FILE), _locked_database(study), warnings.catch_warnings():
        # Heartbeats are marked experimental, and meant for Study.optimize; the worker sends them itself.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage")
        optuna.storages.fail_stale_trials(study)
        for _ in range(_MOST_DUPLICATES):
            trials = study.get_trials(deepcopy=False)
            if _give_back_lost(study, trials, state):
                continue
            if not any(t.state == state.WAITING for t in trials) and _enough(config, space, trials, state):
                if not any(t.state == state.RUNNING for t in trials) and _promote(study, config, trials):
                    continue
                return "wait" if any(t.state == state.RUNNING for t in trials) else "done"
            # By the number of trials, so that no two workers propose the same, and a second sweep proposes it again.
            study.sampler = _sampler(config, len(trials))
            trial = study.ask()
            study._storage.record_heartbeat(trial._trial_id)
            bindings = space.draw(_Ask(trial))
            trial.set_user_attr(BINDINGS, repr(bindings))
            try:
                trial.set_user_attr(ID, identify(bindings))
            except ConfigError as error:  # a sweep checks some points of a large space, not all
                trial.set_user_attr(STATUS, "failed")
                trial.set_user_attr(ERROR, str(error))
                study.tell(trial, state=state.FAIL)
                continue
            trial.set_user_attr(STATUS, "running")
            trial.set_user_attr(CLAIMED, trial.number)
            if not _tell_if_known(study, trial, trials, state):
                return Claim(trial, bindings)
        study.set_user_attr(EXHAUSTED, True)
    logger.warning("%s proposals in a row were trials that were there already: ending", _MOST_DUPLICATES)
    return "done"


def is_over(study: Any, config: StudyConfig, space: Space, trials: Sequence[Any]) -> bool:
    """Whether no trial is left: all have ended, none is to be made, none to be promoted."""
    state = import_extra("optuna").trial.TrialState
    if any(not t.state.is_finished() for t in trials):
        return False
    enough = _enough(config, space, trials, state) and not _promotable(config, trials)
    return enough or bool(study.user_attrs.get(EXHAUSTED))


def beat(study: Any, trial: Any, progress: Mapping[str, float]) -> None:
    """Says that a trial's worker lives, and how far it has come: "tokens", "seconds", "cpu_seconds"."""
    study._storage.record_heartbeat(trial._trial_id)
    if progress:
        trial.set_user_attr(PROGRESS, progress)


def give_back(study: Any, trial: Any) -> None:
    """Puts a trial back, as this worker has to stop: another one goes on from its checkpoint."""
    optuna = import_extra("optuna")
    trial.set_user_attr(STATUS, "retried")
    frozen = study.tell(trial, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
    _retry(study, frozen)


def _enough(config: StudyConfig, space: Space, trials: Sequence[Any], state: Any) -> bool:
    """Whether no new trial is to be made."""
    made = [t for t in trials if _counts(t, state)]
    if config.sampler == "grid" or (config.num_trials is not None and len(made) >= config.num_trials):
        return True
    return space.size is not None and len({t.user_attrs.get(ID) for t in made}) >= space.size


def _give_back_lost(study: Any, trials: Sequence[Any], state: Any) -> bool:
    """Gives back what no heartbeat tells of; whether there was any.

    A worker may die while it takes a trial, before its first heartbeat; or between telling that a trial failed and
    putting it back.
    """
    oldest = datetime.datetime.now() - datetime.timedelta(seconds=study._storage.get_heartbeat_interval())
    retried = {number for t in trials for number in t.system_attrs.get("retry_history", [])}
    taken = [
        t
        for t in trials
        if t.state == state.RUNNING and t.user_attrs.get(CLAIMED) != t.number and t.datetime_start < oldest
    ]
    dropped = [
        t
        for t in trials
        if t.state == state.FAIL
        and t.user_attrs.get(STATUS) not in ("failed", "diverged")
        and DUPLICATE_OF not in t.user_attrs
        and t.number not in retried
        and t.datetime_complete < oldest
    ]
    for trial in taken:
        study.tell(trial.number, state=state.FAIL, skip_if_finished=True)
    for trial in [*taken, *dropped]:
        _retry(study, trial)
    return bool(taken or dropped)


def _retry(study: Any, frozen: Any) -> None:
    optuna = import_extra("optuna")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=None, inherit_intermediate_values=True)
    retry(study, copy.deepcopy(frozen))  # it changes what it is given, here the storage's cache


def _counts(trial: Any, state: Any) -> bool:
    """Whether a trial counts as one that was made: not one that was there before, or that goes on elsewhere."""
    if trial.state == state.WAITING or DUPLICATE_OF in trial.user_attrs or PROMOTED in trial.user_attrs:
        return False
    return not (trial.state == state.FAIL and trial.user_attrs.get(STATUS) not in ("failed", "diverged"))


def _tell_if_known(study: Any, trial: Any, trials: Sequence[Any], state: Any) -> bool:
    mine = trial.user_attrs[ID]
    retries = import_extra("optuna").storages.RetryHeartbeatStaleTrialCallback
    history = set(retries.retry_history(study._storage.get_trial(trial._trial_id)))
    same = [t for t in trials if t.user_attrs.get(ID) == mine and t.number != trial.number]
    if PROMOTED not in trial.user_attrs:
        for other in same:
            if other.state in (state.COMPLETE, state.PRUNED) and DUPLICATE_OF not in other.user_attrs:
                trial.set_user_attr(DUPLICATE_OF, other.number)
                if other.state == state.COMPLETE:
                    study.tell(trial, other.value)
                else:
                    study.tell(trial, state=state.PRUNED)
                return True
    if any(t.state == state.RUNNING and t.number not in history for t in same):
        trial.set_user_attr(DUPLICATE_OF, next(t.number for t in same if t.state == state.RUNNING))
        study.tell(trial, state=state.FAIL)
        return True
    return False


def _promotable(config: StudyConfig, trials: Sequence[Any]) -> list[Any]:
    """The best of the trials that were ended early, those that are still to be promoted."""
    already = {t.user_attrs[PROMOTED] for t in trials if PROMOTED in t.user_attrs}
    ended = [t for t in trials if t.user_attrs.get(STATUS) == "pruned" and DUPLICATE_OF not in t.user_attrs]
    # Those that came further were better at every rung before.
    ranked = sorted((t for t in ended if t.value is not None), key=lambda t: (-(t.last_step or 0), t.value))
    return [t for t in ranked if t.number not in already][: max(0, config.promote - len(already))]


def _promote(study: Any, config: StudyConfig, trials: Sequence[Any]) -> bool:
    """Enqueues what is to be promoted; whether there was anything."""
    chosen = _promotable(config, trials)
    for trial in chosen:
        study.enqueue_trial(trial.params, user_attrs={PROMOTED: trial.number})
    return bool(chosen)


class _Ask:
    """Lets a trial of Optuna choose."""

    def __init__(self, trial: Any):
        self._trial = trial

    def choose(self, label: str, options: Sequence[Any]) -> int:
        return 0 if len(options) == 1 else list(options).index(self._trial.suggest_categorical(label, list(options)))

    def uniform(self, label: str, low: float, high: float, log: bool) -> float:
        return self._trial.suggest_float(label, low, high, log=log)


def _sampler(config: StudyConfig, number: int) -> Any:
    seed = config.seed * 1_000_003 + number
    samplers = import_extra("optuna").samplers
    if config.sampler == "tpe":
        return samplers.TPESampler(seed=seed, constant_liar=True)
    if config.sampler == "cma-es":
        import_extra("cmaes")
        return samplers.CmaEsSampler(seed=seed)
    return samplers.RandomSampler(seed=seed)


def _pruner(config: StudyConfig, min_tokens: int, max_tokens: int) -> Any:
    pruners = import_extra("optuna").pruners
    if config.pruner == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=min_tokens, reduction_factor=config.reduction_factor)
    if config.pruner == "hyperband":
        return pruners.HyperbandPruner(
            min_resource=min_tokens, max_resource=max_tokens, reduction_factor=config.reduction_factor
        )
    return pruners.NopPruner()


@contextlib.contextmanager
def _locked_database(study: Any) -> Iterator[None]:
    """Holds a lock of PostgreSQL on the study; the server lets go of it when the connection ends."""
    engine = study._storage._backend.engine
    if engine.dialect.name != "postgresql":
        yield
        return
    lock = import_extra("sqlalchemy").text("SELECT pg_advisory_xact_lock(:study)")
    with engine.connect() as connection:
        connection.execute(lock, {"study": study._study_id})
        yield


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Any]:
    """Holds a file's lock; the system lets go of it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
