"""What the filters of this package have in common."""

import abc
import dataclasses
from pathlib import PurePath
from typing import Any

from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.curation.document import Document, apply_filters

# Endings of files that are programs, or their settings.
# fmt: off
SOURCE_FILES = (
    ".c", ".cc", ".cfg", ".cmake", ".cpp", ".cs", ".css", ".cu", ".cuh", ".gin", ".go", ".h", ".hpp", ".hs", ".ini",
    ".java", ".jl", ".js", ".jsx", ".kt", ".lua", ".m", ".mk", ".ml", ".php", ".pl", ".proto", ".py", ".pyi", ".pyx",
    ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".toml", ".ts", ".tsx", ".vue", ".yaml", ".yml",
)
# fmt: on


@config_dataclass
class TextFilter(abc.ABC):
    """A filter that may be for some languages only.

    A class that derives from it defines `judge`.

    Attributes:
        languages: those it concerns, as `Document.language` names them; documents of others pass unchanged. () for
            all.
    """

    languages: tuple[str, ...] | list[str] = ()

    def __call__(self, document: Document) -> Document:
        """The document, perhaps changed or dropped."""
        if self.languages and document.language not in self.languages:
            return document
        return self.judge(document)

    @abc.abstractmethod
    def judge(self, document: Document) -> Document:
        """What `__call__` does to a document of the right language."""

    def check_fractions(self, *names: str) -> None:
        """Checks that fields are None or in [0, 1].

        Raises:
            ConfigError: one is not.
        """
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                field = f"{type(self).__name__}.{name}"
                raise ConfigError(f"{field} = {value}: must be None or in [0, 1]", field)


@config_dataclass
class ExceptSourceFiles:
    """Applies filters to all documents but the source files of programs, which no rule for prose fits.

    Attributes:
        filters: what to apply, in order.
        endings: of the files that pass unchanged, by the names that are their ids; records of tables have none.
    """

    filters: tuple[Any, ...] | list[Any]
    endings: tuple[str, ...] | list[str] = SOURCE_FILES

    def __call__(self, document: Document) -> Document:
        """The document, perhaps changed or dropped."""
        if PurePath(document.id).suffix.lower() in self.endings:
            return document
        return apply_filters(document, self.filters)

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        return {"filters": [described(apply) for apply in self.filters], "endings": self.endings}


def described(apply: Any) -> dict[str, Any]:
    """What a filter is, as JSON holds it: its class, and what its result depends on.

    That is its fields, or what its method `identity` gives in their place, where it depends on a file.
    """
    if dataclasses.is_dataclass(apply) and not isinstance(apply, type):
        fields = apply.identity() if hasattr(apply, "identity") else dataclasses.asdict(apply)
        return {"filter": type(apply).__qualname__} | fields
    return {"filter": getattr(apply, "__qualname__", type(apply).__qualname__)}


def with_text(document: Document, text: str) -> Document:
    """The document with another text; the same object where nothing changes."""
    return document if text == document.text else dataclasses.replace(document, text=text)
