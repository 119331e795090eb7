"""Checkpoints on disk: saved in the background, committed atomically, restored from the newest that is whole.

A checkpoint is a folder `<directory>/<step>` that Orbax writes under another name and renames when all is there:
`state/` (the training state's arrays), `meta/` (JSON: step, tokens seen, configs, versions) and `checksums.json`.
A folder whose files are not those that were written is skipped, said to be so, and moved to `unreadable/`; a directory
in which none is readable is an error, never a fresh start.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy
from pydantic import NonNegativeInt, PositiveInt

from cpm_jax.checkpoints import integrity
from cpm_jax.common.config import InputError, config_dataclass

CHECKPOINTS_DIR = "checkpoints"  # within a workdir
TOKENIZER_DIR = "tokenizer"  # within a workdir
UNREADABLE_DIR = "unreadable"  # within the checkpoints' directory

logger = logging.getLogger(__name__)


class CheckpointError(InputError):
    """A checkpoint that cannot be written, read, or does not fit what is to be restored; says which and why."""


@config_dataclass
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    Attributes:
        every: steps between saves; the last step is always saved.
        keep_last: how many of the newest are kept. At least 2, so that there is one to fall back to.
        keep_every: checkpoints of steps divisible by this are kept for good; 0 keeps none so.
        asynchronous: whether training goes on while files are written.
    """

    every: PositiveInt = 1000
    keep_last: PositiveInt = 3
    keep_every: NonNegativeInt = 0
    asynchronous: bool = True


class Restored(NamedTuple):
    """What `Checkpointer.restore_latest` found."""

    step: int
    state: Any
    meta: dict[str, Any]


def list_steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps of the committed checkpoints in a checkpoints directory, ascending; empty if there is no directory."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


class Checkpointer:
    """Saves and restores the state of one run. A context manager; every process calls every method."""

    def __init__(self, directory: str | os.PathLike[str], config: CheckpointConfig | None = None):
        """Makes the directory, and removes what a killed save left unfinished there.

        Args:
            directory: the checkpoints' directory of a run.
            config: which checkpoints are kept.

        Raises:
            OSError: if the directory cannot be made.
        """
        self._directory = Path(directory).absolute()
        self._config = config or CheckpointConfig()
        self._saving: int | None = None
        policies: list[Any] = [preservation_policy.LatestN(self._config.keep_last)]
        if self._config.keep_every:
            policies.append(preservation_policy.EveryNSteps(self._config.keep_every))
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                # Called when all processes have written and before the folder is renamed, on process 0.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            ),
        )

    def _write_checksums(self) -> None:
        for path in self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            integrity.write_checksums(path)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Saves a checkpoint; returns when the arrays are copied off the device, before they are on disk.

        Waits for the save before it where that has not ended.

        Args:
            step: optimizer steps done.
            state: pytree of jax arrays.
            meta: what goes with it, as JSON.

        Raises:
            CheckpointError: if this save, or the one before, failed. Committed checkpoints are untouched.
        """
        self.wait()
        self._saving = step
        try:
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta)))
            self._manager.save(step, args=items, force=True)  # without force, an old step is silently left out
        except Exception as error:
            raise self._save_error(error) from error
        if not self._config.asynchronous:
            self.wait()

    def check_for_errors(self) -> None:
        """Raises what went wrong in the background, if something did; cheap enough to be called each step.

        Raises:
            CheckpointError: if the last save failed.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress is committed.

        Raises:
            CheckpointError: if it failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error
        self._saving = None

    def _save_error(self, error: Exception) -> CheckpointError:
        step, self._saving = self._saving, None
        left = ", ".join(map(str, list_steps(self._directory))) or "none"
        return CheckpointError(
            f"saving the checkpoint of step {step} in {self._directory} failed: {error}\n"
            f"Committed checkpoints are untouched (steps: {left}). Free space or mend the disk, then run the same "
            "command again."
        )

    def close(self) -> None:
        """Waits for the save in progress and ends the background threads.

        Raises:
            CheckpointError: if the save failed.
        """
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self.close()

    def restore_latest(
        self, abstract_state: Any, check_meta: Callable[[dict[str, Any]], None] | None = None
    ) -> Restored | None:
        """Restores the newest checkpoint that is whole.

        Args:
            abstract_state: the state's pytree of ShapeDtypeStructs with the shardings to restore to; they need not be
                those it was saved with.
            check_meta: called with the metadata before the arrays are read; raises to refuse the checkpoint.

        Returns:
            None if the directory holds no checkpoint.

        Raises:
            CheckpointError: if there are checkpoints and none is whole, or the newest whole one is of another model.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(list_steps(self._directory)):
            damage = _find_damage(self._directory / str(step))
            if damage:
                damaged[step] = damage
                logger.warning("checkpoint %s is unreadable: %s; trying the one before", step, damage)
                continue
            meta = read_meta(self._directory / str(step))
            if check_meta is not None:
                check_meta(meta)
            state = _restore_state(self._directory / str(step), abstract_state, meta)
            self._set_aside(damaged)
            return Restored(step, state, meta)
        if damaged:
            raise _none_readable(self._directory, damaged)
        return None

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        """Moves damaged checkpoints to where they are not in the way of new ones of the same step."""
        if not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                target = self._directory / UNREADABLE_DIR / str(step)
                while target.exists():
                    target = target.with_name(target.name + "_")
                target.parent.mkdir(exist_ok=True)
                (self._directory / str(step)).rename(target)
                logger.warning("moved the unreadable checkpoint of step %s to %s", step, target)
        _barrier("unreadable checkpoints set aside")
        self._manager.reload()


def restore_params(path: str | os.PathLike[str], abstract_params: Any = None) -> tuple[Any, dict[str, Any]]:
    """Restores the parameters alone, for fine-tuning, generation and export.

    Args:
        path: a workdir, a checkpoints directory (the newest whole checkpoint is taken) or one checkpoint.
        abstract_params: the tree of ShapeDtypeStructs with shardings; None takes the saved shapes, on one device.

    Returns:
        The parameter tree, and the metadata of the checkpoint.

    Raises:
        CheckpointError: if there is no checkpoint, none is whole, or it is of another model.
    """
    step_dir = find_checkpoint(path)
    meta = read_meta(step_dir)
    if abstract_params is None:
        abstract_params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _saved_tree(step_dir)["params"]
        )
    return _restore_state(step_dir, {"params": abstract_params}, meta)["params"], meta


def restore_state(path: str | os.PathLike[str], abstract_state: Any) -> Restored:
    """Restores a whole training state from another run, to go on with its optimizer and its count of steps.

    Args:
        path: as in `restore_params`.
        abstract_state: the state's pytree of ShapeDtypeStructs with shardings.

    Raises:
        CheckpointError: if there is no checkpoint, none is whole, or it is of another model or optimizer.
    """
    step_dir = find_checkpoint(path)
    meta = read_meta(step_dir)
    return Restored(meta["step"], _restore_state(step_dir, abstract_state, meta), meta)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Finds the checkpoint that a path means.

    Args:
        path: a workdir, a checkpoints directory (the newest whole checkpoint is taken) or one checkpoint.

    Raises:
        CheckpointError: if there is none, or none that is whole.
    """
    path = Path(path).absolute()
    if (path / "state").is_dir() or (path / integrity.CHECKSUMS_FILE).exists():
        if damage := _find_damage(path):
            raise CheckpointError(f"checkpoint {path} is unreadable: {damage}")
        return path
    directory = path / CHECKPOINTS_DIR if (path / CHECKPOINTS_DIR).is_dir() else path
    damaged: dict[int, str] = {}
    for step in reversed(list_steps(directory)):
        damage = _find_damage(directory / str(step))
        if not damage:
            return directory / str(step)
        damaged[step] = damage
        logger.warning("checkpoint %s is unreadable: %s; taking the one before", step, damage)
    if damaged:
        raise _none_readable(directory, damaged)
    foreign = path.suffix == ".gguf" or (path / "config.json").is_file()
    raise CheckpointError(
        f"{path} holds no checkpoint: give a workdir, its {CHECKPOINTS_DIR}/ folder, or a folder of one step in it"
        + ("; to start from published weights, make a workdir of them with the verb convert" if foreign else "")
    )


def find_tokenizer(step_dir: str | os.PathLike[str]) -> Path:
    """The folder of the tokenizer that belongs to a checkpoint, in the workdir that the checkpoint is in.

    Args:
        step_dir: from `find_checkpoint`.

    Raises:
        CheckpointError: there is none.
    """
    places = [parent / TOKENIZER_DIR for parent in Path(step_dir).parents[:2]]
    for place in places:
        if place.is_dir():
            return place
    raise CheckpointError(
        f"checkpoint {step_dir} has no tokenizer: looked for {' and '.join(map(str, places))}; give the path of one"
    )


def read_meta(step_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of one checkpoint, from `find_checkpoint`."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(Path(step_dir) / "meta", args=ocp.args.JsonRestore())


def _none_readable(directory: Path, damaged: Mapping[int, str]) -> CheckpointError:
    reasons = "\n".join(f"  step {step}: {damage}" for step, damage in damaged.items())
    return CheckpointError(
        f"{directory} holds {len(damaged)} checkpoints and none is readable:\n{reasons}\n"
        "Put back a copy of one, or begin anew in another workdir."
    )


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _find_damage(step_dir: Path) -> str:
    """As `integrity.find_damage`; process 0 reads the files and tells the others, so that all take the same one."""
    damage = integrity.find_damage(step_dir) if jax.process_index() == 0 else ""
    if jax.process_count() == 1:
        return damage
    damaged = bool(multihost_utils.broadcast_one_to_all(bool(damage)))
    return (damage or "see the log of process 0") if damaged else ""


def _saved_tree(step_dir: Path) -> dict[str, Any]:
    """The tree of array metadata in a checkpoint: dicts and lists, whatever the state's own classes were."""
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.metadata(epath.Path(step_dir / "state")).tree
    finally:
        handler.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _restore_state(step_dir: Path, abstract: Any, meta: Mapping[str, Any]) -> Any:
    """Restores the parts of a state that `abstract` has at its top level, in the dtypes that `abstract` has."""
    wanted = _shapes(abstract)
    parts = {name.split("/")[0] for name in wanted}
    saved = {name: value for name, value in _shapes(_saved_tree(step_dir)).items() if name.split("/")[0] in parts}
    different = [name for name in wanted | saved if wanted.get(name) != saved.get(name)]
    if different:
        # Parameters say more than the optimizer's copies of them.
        name = min(different, key=lambda name: (not name.startswith("params/"), name))
        says = {
            place: f"shape {tree[name]}" if name in tree else "nothing"
            for place, tree in (("checkpoint", saved), ("model", wanted))
        }
        model = meta.get("model", {})
        described = ", ".join(f"{field} = {value}" for field, value in model.items() if isinstance(value, int | float))
        raise CheckpointError(
            f"checkpoint {step_dir} is of another model: at {name} it has {says['checkpoint']} where the model to be "
            f"restored has {says['model']} ({len(different)} of {len(wanted | saved)} arrays differ)."
            + (f"\nThe checkpoint's model: {described}" if described else "")
        )
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default), abstract
    )
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(step_dir / "state", args=arguments)
