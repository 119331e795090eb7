"""A trained classifier as a filter, so that `curate` scores with it."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from cpm_jax.common.config import ConfigError, InputError, config_dataclass
from cpm_jax.common.files import absolute, sha256
from cpm_jax.curation.document import Document
from cpm_jax.curation.filters import TextFilter

SCORE = "classifier"  # the name of the score, and what a dropped document says


@config_dataclass
class ClassifierScore(TextFilter):
    """Scores documents with a fastText classifier that `classify` trained; drops those below a threshold.

    The score is that of `classify` with MODE=score, to the last bit: both call the scorer that `load_classifier` gives,
    whose scores do not depend on what else is in a call.

    Attributes:
        folder: of the classifier: `classifier` in the workdir of `classify`.
        threshold: documents with at least this score are kept; None takes the classifier's own.
        drop: whether the others are dropped; False only scores.
        name: of the score, and the reason of a drop.
    """

    folder: str = ""
    threshold: float | None = None
    drop: bool = True
    name: str = SCORE

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        for field in ("folder", "name"):
            if not getattr(self, field):
                message = f"ClassifierScore.{field} = '': must not be empty"
                raise ConfigError(message, f"ClassifierScore.{field}")
        self.check_fractions("threshold")
        object.__setattr__(self, "folder", absolute(self.folder))  # executors of Spark work in other folders

    def judge(self, document: Document) -> Document:
        """Returns the document with its score, dropped if that is too low."""
        from cpm_jax.curation.classifier import CLASSIFIER_FILE

        try:
            version = os.stat(f"{self.folder}/{CLASSIFIER_FILE}").st_mtime_ns
        except OSError:
            version = 0  # loading says what is wrong
        scorer, threshold = _load(self.folder, version)
        if self.threshold is not None:
            threshold = self.threshold
        score = float(scorer([document.text])[0])
        document = document.with_score(self.name, score)
        return document.drop(self.name) if self.drop and score < threshold else document

    def identity(self) -> dict[str, Any]:
        """What the result depends on: the classifier by its hash, wherever it lies.

        Raises:
            InputError: the folder holds no classifier, or one that asks a server.
        """
        from cpm_jax.curation.classifier import CLASSIFIER_FILE

        _check_kind(self.folder)
        fields = dataclasses.asdict(self)
        del fields["folder"]
        return fields | {"classifier_sha256": sha256(Path(self.folder) / CLASSIFIER_FILE)}


def _check_kind(folder: str) -> None:
    from cpm_jax.curation.classifier import read_classifier

    kind = read_classifier(Path(folder))["kind"]
    if kind != "fasttext":
        raise InputError(
            f"ClassifierScore.folder = {folder!r}: a classifier of kind {kind!r} asks a server and keeps the replies "
            "in one file, which workers cannot share; accepted is 'fasttext'. Score with classify and MODE=score"
        )


@functools.lru_cache(maxsize=4)
def _load(folder: str, version: int) -> tuple[Any, float]:
    """The scorer and its threshold, once in each process and for each classifier that lay in the folder."""
    del version
    from cpm_jax.curation.classifier import load_classifier  # needs fastText, which other filters do not

    _check_kind(folder)
    return load_classifier(folder)
