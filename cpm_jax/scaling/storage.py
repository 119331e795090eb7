"""Where a study lies: SQLite or PostgreSQL behind Optuna, with the errors of a database named."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cpm_jax.common.config import InputError
from cpm_jax.scaling.extra import import_extra

T = TypeVar("T")
STUDY_FILE = "study.db"  # within a workdir


class StorageError(InputError):
    """A database that cannot be used: locked, gone, or of another kind."""


def storage_url(url: str, workdir: Path) -> str:
    """The URL for SQLAlchemy: "" is a SQLite file in the workdir, postgresql:// is spoken by psycopg 3.

    Raises:
        StorageError: it is of another kind.
    """
    if not url:
        return f"sqlite:///{(workdir / STUDY_FILE).absolute()}"
    scheme, _, rest = url.partition("://")
    if not rest or scheme not in ("sqlite", "postgresql", "postgresql+psycopg"):
        raise StorageError(f"storage = {url!r}: accepted is postgresql://user@host/name or sqlite:///file")
    return f"postgresql+psycopg://{rest}" if scheme == "postgresql" else url


def open_storage(url: str, *, heartbeat_seconds: int, grace_seconds: int, patience: float) -> Any:
    """Opens a study's database; makes its tables where they are missing.

    Args:
        url: from `storage_url`.
        heartbeat_seconds: how often workers say that they live.
        grace_seconds: a trial whose worker has been silent for so long is given to another, from its checkpoint.
        patience: seconds to wait for a database that is locked or cannot be reached.

    Returns:
        An `optuna.storages.RDBStorage`.

    Raises:
        StorageError: it is still locked or unreachable after `patience`, or is no database of Optuna.
    """
    optuna = import_extra("optuna")
    if url.startswith("postgresql+psycopg"):
        import_extra("psycopg")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sqlite = url.startswith("sqlite")
    arguments = {"timeout": patience} if sqlite else {"connect_timeout": max(2, round(min(patience, 10)))}
    if sqlite:
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)

    def make() -> Any:
        with warnings.catch_warnings():
            # Heartbeats are marked experimental; the pinned version has what is used here.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": arguments, "pool_pre_ping": True},
                heartbeat_interval=heartbeat_seconds,
                grace_period=grace_seconds,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(
                    max_retry=None, inherit_intermediate_values=True
                ),
            )

    try:
        return patiently(make, url, 0.0 if sqlite else patience)  # SQLite itself waits for a lock
    except RuntimeError as error:  # tables of another version of Optuna; says how to bring them up to date
        raise StorageError(f"the study's database {shown(url)}: {error}") from error


def patiently(call: Callable[[], T], url: str, patience: float) -> T:
    """Calls until the database answers.

    Args:
        call: what uses the database.
        url: of it.
        patience: seconds until it is given up.

    Raises:
        StorageError: it did not answer in time, or is no such database; says which, without a password.
    """
    sqlalchemy = import_extra("sqlalchemy")
    optuna = import_extra("optuna")
    deadline, pause = time.monotonic() + patience, 0.2
    while True:
        try:
            return call()
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            passing = isinstance(_database_error(error), sqlalchemy.exc.OperationalError)
            if not passing or time.monotonic() + pause > deadline:
                raise StorageError(f"the study's database {shown(url)}: {_reason(error)}") from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def shown(url: str) -> str:
    """A URL without its password."""
    return import_extra("sqlalchemy").engine.make_url(url).render_as_string(hide_password=True)


def _database_error(error: BaseException) -> BaseException:
    cause = error.__cause__
    return cause if cause is not None and "sqlalchemy" in type(cause).__module__ else error


def _reason(error: BaseException) -> str:
    text = str(getattr(_database_error(error), "orig", None) or _database_error(error)).strip().partition("\n")[0]
    if "database is locked" in text:
        return "locked: another process has held it for too long (a backup?); end it, or use PostgreSQL"
    if "not a database" in text:
        return f"no SQLite database ({text})"
    return f"cannot be used: {text}"
