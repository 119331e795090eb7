"""Trials of a sweep that share a program, trained at once: `python -m experiments.sweep_program < trials.json`.

Each trial's folder is afterwards that of an ordinary `pretrain` run, with its config, metrics and checkpoints.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.common.gin_utils import Settings
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.data.loader import open_datasets
from cpm_jax.scaling.stacked import train_stacked
from experiments import pretrain
from experiments.run import recorded
from experiments.sweep_trials import as_stacked, pretrain_arguments


def main() -> int:
    """Trains what standard input names: {"gin_files": […], "trials": [[folder, [flag, …]], …]}, all in one folder.

    Returns:
        An exit code of `cpm_jax.common.exit_codes`; OK too where the losses of some are not finite.
    """
    what = json.load(sys.stdin)
    try:
        with contextlib.ExitStack() as stack:
            folders, configs = [], []
            for name, flags in what["trials"]:
                settings = Settings(what["gin_files"], flags, pretrain.PretrainConfig)
                configs.append(settings.build())
                folders.append(Path(name))
                arguments = pretrain_arguments(what["gin_files"], flags, folders[-1])
                stack.enter_context(recorded("pretrain", folders[-1], arguments, settings))
            _train(folders, configs)
    except (ConfigError, InputError, exit_codes.Stop) as error:
        print(error, file=sys.stderr, flush=True)
        return error.code
    return exit_codes.OK


def _train(folders: Sequence[Path], configs: Sequence[Any]) -> None:
    first = configs[0]
    datasets = open_datasets(first.mixture)
    for folder in folders:
        shutil.copytree(datasets[0].tokenizer_path, folder / pretrain.TOKENIZER_DIR, dirs_exist_ok=True)
    by_name = {folder.name: config for folder, config in zip(folders, configs, strict=True)}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def data(seed: int) -> Any:
        train = dataclasses.replace(first.train, seed=seed)
        return pretrain.train_data(first.mixture, train, datasets, first.num_workers, mesh)

    print(f"{len(configs)} trials in one program", flush=True)
    results = train_stacked(
        first.train,
        trials=[as_stacked(name, config) for name, config in by_name.items()],
        loss=first.loss,
        data=data,
        workdir=folders[0].parent,
        checkpoint=first.checkpoint,
        fixed=lambda trial: pretrain.fixed_settings(by_name[trial.name], datasets),
        devices=jax.devices()[: math.gcd(len(configs), jax.device_count())],
    )
    for result in results:
        print(
            f"{result.name}: {result.status} after {result.steps} steps, {result.seconds:.1f} s of its own", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
