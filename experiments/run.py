"""The one entry point: `python -m experiments.run <verb> --gin_file=… --gin.NAME=VALUE --workdir=…`.

A verb is a module `experiments/<verb>.py` with a config class `<Verb>Config` and `run(config, workdir)`. It is
imported only when asked for, so that `--help` answers at once.
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import importlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from cpm_jax.common import exit_codes


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb of the runner.

    Attributes:
        summary: one line for `--help`.
        uses_devices: whether the job runs JAX, and so may be spread over processes.
        reads_runs: whether `--workdir` may be the workdir of another verb's run, whose config it then leaves alone.
            Every start of such a verb is for itself, and takes no settings from an earlier one.
    """

    summary: str
    uses_devices: bool = True
    reads_runs: bool = False


VERBS = {
    "convert": Verb("published weights into a checkpoint to start from", reads_runs=True),
    "curate": Verb("filter, deduplicate and decontaminate raw documents, with a card", uses_devices=False),
    "prepare": Verb("tokenise and pack documents into a dataset folder", uses_devices=False),
    "classify": Verb("train a classifier of documents on two pools, or score documents with one", uses_devices=False),
    "pretrain": Verb("train a model on dataset folders; the same command resumes"),
    "sft": Verb("fine-tune a checkpoint on conversations, with the loss on assistant turns only"),
    "quantize": Verb("a model with 4-bit weights: a checkpoint, and packed for other runtimes", uses_devices=False),
    "generate": Verb("continue prompts with a trained model", reads_runs=True),
    "evaluate": Verb("score a model on tasks, item by item, and compare it with another; the same command resumes"),
    "ruler": Verb("ask a model, ours or behind a server, about long texts: a score for every length and depth"),
    "verify": Verb("which candidate data set makes a model better, and how sure that is; the same command resumes"),
    "rounds": Verb("verify seeds, learn a filter from the best, filter, and again; the same command resumes"),
    "sweep": Verb(
        "train many small models over a space of settings: which to take; the same command resumes", uses_devices=False
    ),
    "worker": Verb("take trials of the sweep in --workdir and train them", uses_devices=False, reads_runs=True),
    "export": Verb("a model as a Hugging Face folder or a GGUF file, checked; or verify an export", reads_runs=True),
    "quickstart": Verb("prepare, pretrain, evaluate, sample and export a small model; ends with report.html"),
    "predict": Verb("what a family of small runs says about a large one, and the next run to make", uses_devices=False),
    "plan": Verb("what a TPU pod will do: memory, time and cost, compiled without the pod", uses_devices=False),
}

_EPILOG = """\
values:
  --gin.NAME=VALUE sets a macro (--gin.BATCH_SIZE=8) or a binding (--gin.ModelConfig.num_layers=4). A value that is no
  gin literal is taken as a string, so --gin.DATA=/data/set needs no quotes; the folder 2024 is --gin.DATA=./2024.
order:
  flags win over files, a later file wins over an earlier one, files win over the config that a workdir has saved.
  In a workdir with a saved config no --gin_file is needed: `pretrain --workdir=X` goes on with the run in X. Of
  convert, generate and export every start is for itself.
`<verb> --help` lists the macros of a verb. Exit codes: 0 done, 1 failed, 2 bad configuration, 3 bad input,
75 preempted, 76 stuck and 78 another process lost (run the same command again), 77 loss not finite.
"""


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {name:<12}{verb.summary}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="cpm_jax",
        usage="%(prog)s <verb> [--gin_file=FILE ...] [--gin.NAME=VALUE ...] --workdir=DIR [--dry_run]",
        description=f"verbs:\n{verbs}",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    parser.add_argument("verb", nargs="?", metavar="verb", help=argparse.SUPPRESS)
    add("-h", "--help", action="store_true", help="show this, or after a verb the macros of that verb")
    add(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a path, or a name such as size/5m.gin; in order",
    )
    add("--workdir", type=Path, metavar="DIR", help="folder that the run writes to and resumes from")
    add("--dry_run", action="store_true", help="build everything without memory or data, print sizes and config, exit")
    add("--debug", action="store_true", help="show the traceback of an error in configuration or input")
    hosts = parser.add_argument_group("many hosts (the same command on each)")
    hosts.add_argument(
        "--distributed", action="store_true", help="find the others as Cloud TPU, SLURM, Open MPI, Kubernetes allow"
    )
    hosts.add_argument("--coordinator_address", metavar="HOST:PORT", help="address of process 0")
    hosts.add_argument("--num_processes", type=int, metavar="N", help="how many processes there are")
    hosts.add_argument("--process_id", type=int, metavar="I", help="which of them this is, from 0")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        An exit code of `cpm_jax.common.exit_codes`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    for flag in argv:
        if flag.startswith("--gin.") and "=" not in flag:
            parser.error(f"{flag}: write the value after an equals sign, as in --gin.BATCH_SIZE=8")
    args = parser.parse_args([a for a in argv if not a.startswith("--gin.")])
    if args.verb is None:
        parser.print_help()
        return exit_codes.OK if args.help else exit_codes.BAD_CONFIG
    from cpm_jax.common.config import ConfigError, InputError

    try:
        if args.verb not in VERBS:
            from cpm_jax.common.gin_files import suggest

            raise ConfigError(f"no verb {args.verb!r}{suggest(args.verb, list(VERBS))}\n  verbs: {', '.join(VERBS)}")
        if args.help:
            from experiments.verb_help import verb_help

            _print(verb_help(args.verb, VERBS[args.verb].summary))
            return exit_codes.OK
        if args.workdir is None:
            raise ConfigError(f"{args.verb} needs --workdir=DIR, the folder that the run writes to")
        _run(args, argv)
    except (ConfigError, InputError, exit_codes.Stop) as error:
        if args.debug:
            traceback.print_exc()
        print(f"{'' if isinstance(error, exit_codes.Stop) else 'error: '}{error}", file=sys.stderr, flush=True)
        return error.code
    return exit_codes.OK


def _run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    if args.dry_run:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes need no accelerator, and must not take one from a run
    with _joined(args) as process:
        from cpm_jax.common.config import ConfigError
        from cpm_jax.common.gin_utils import Settings

        module, config_class = import_verb(args.verb)
        files = args.gin_file or default_files(args.verb, args.workdir)
        settings = Settings(files, [a for a in argv if a.startswith("--gin.")], config_class)
        config = settings.build()
        try:
            if args.dry_run:
                from experiments.dry_run import describe

                _print(f"{describe(config, args.workdir)}\n\n{settings.config_str()}")
            else:
                with recorded(args.verb, args.workdir, argv, settings) if process == 0 else contextlib.nullcontext():
                    module.run(config, args.workdir)
        except ConfigError as error:
            raise settings.with_origins(error) from error


def _joined(args: argparse.Namespace) -> contextlib.AbstractContextManager[int]:
    """Among the other processes of a run on many hosts, if there are others; gives the number of this one."""
    asked = args.distributed or args.coordinator_address or "JAX_COORDINATOR_ADDRESS" in os.environ
    if args.dry_run or not asked or not VERBS[args.verb].uses_devices:
        return contextlib.nullcontext(0)
    from cpm_jax.common import processes  # imports jax, which not every verb needs

    return processes.joined(args.coordinator_address, args.num_processes, args.process_id)


def _print(text: str) -> None:
    """Prints text of many lines, which the reader (`| head`) may leave early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def import_verb(verb: str) -> tuple[ModuleType, type]:
    """Imports the job of a verb.

    Args:
        verb: a key of `VERBS`.

    Returns:
        The module `experiments.<verb>` and its config class.
    """
    module = importlib.import_module(f"experiments.{verb}")
    return module, getattr(module, f"{verb.capitalize()}Config")


def default_files(verb: str, workdir: Path) -> list[str]:
    """Returns the gin files of a command that names none: the saved config of the run that it goes on with, or the
    verb's run file.

    Args:
        verb: a key of `VERBS`.
        workdir: the run's folder.

    Raises:
        ConfigError: the workdir holds a run of another verb.
    """
    owner = _owner(workdir)
    if owner == verb and not VERBS[verb].reads_runs:
        return [str(workdir / "config.gin")]
    return [f"runs/{verb}.gin"]


def _owner(workdir: Path) -> str:
    """The verb whose run a workdir holds, from the first line of its config; "" when there is none."""
    saved = workdir / "config.gin"
    if not saved.exists():
        return ""
    return saved.read_text(encoding="utf-8").partition("\n")[0].removeprefix(_OWNER)


_OWNER = "# cpm_jax "


@contextlib.contextmanager
def recorded(verb: str, workdir: Path, argv: Sequence[str], settings: Any) -> Iterator[None]:
    """Writes what a run is into its workdir: the command, the config as given and as used, versions and revision.

    A start that the job refuses as badly configured leaves the saved config as it was.
    """
    from cpm_jax.common import files, provenance
    from cpm_jax.common.config import ConfigError

    owner = _owner(workdir)
    if owner not in ("", verb) and not VERBS[verb].reads_runs:
        raise ConfigError(f"--workdir={workdir} holds a run of {owner}: give {verb} a folder of its own")
    texts = {
        "config.gin": f"{_OWNER}{verb}\n{settings.config_str()}",
        "operative_config.gin": settings.operative_config_str(),
        "versions.json": json.dumps({"git_revision": provenance.git_revision()} | provenance.versions(), indent=2)
        + "\n",
    }
    if owner not in ("", verb):
        texts = {}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with open(workdir / "command.txt", "a", encoding="utf-8") as log:
            log.write(f"{now}  {shlex.join(['python', '-m', 'experiments.run', *argv])}\n")
        before = {name: (workdir / name).read_text(encoding="utf-8") for name in texts if (workdir / name).exists()}
        goes_on = before and not VERBS[verb].reads_runs
        if changes := _changes(before.get("config.gin", ""), texts.get("config.gin", "")) if goes_on else "":
            print(f"config.gin differs from that of the last start:\n{changes}")
        for name, text in texts.items():
            files.write_text(workdir / name, text)
    except OSError as error:
        raise ConfigError(f"--workdir={workdir}: {error.strerror or error}") from error
    try:
        yield
    except ConfigError:
        for name in texts:
            if name in before:
                files.write_text(workdir / name, before[name])
            else:
                (workdir / name).unlink()
        raise


def _changes(old: str, new: str) -> str:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return "\n".join(f"  {line}" for line in lines if not line.startswith(("---", "+++", "@@")))


if __name__ == "__main__":
    sys.exit(main())
