"""Drops documents that hold what models are evaluated on."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.common.files import as_path, whole_file
from cpm_jax.curation.document import Document
from cpm_jax.curation.words import hash_ngrams, hash_words, normal_words
from cpm_jax.data.errors import DataError

SCORE = "contaminated_ngrams"
_REASON = "contaminated: "


def build_index(path: Path, evaluation_sets: Mapping[str, Iterable[str]], n: int) -> dict[str, int]:
    """Writes the n-grams of evaluation sets to a file that `Decontaminate` reads.

    Words are compared in lower case and without punctuation. A text of fewer than n words is no n-gram, and so cannot
    be found; the result says how many texts there are.

    Args:
        path: the file to write, .npz.
        evaluation_sets: texts of each set, by name.
        n: words per n-gram; 13 in the GPT-3 paper, 16 in MiMo's report.

    Returns:
        How many texts of each set are long enough.

    Raises:
        ConfigError: n is not positive.
    """
    if n < 1:
        raise ConfigError(f"n = {n}: an n-gram has at least 1 word", "n")
    names, counts = sorted(evaluation_sets), {}
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
    for number, name in enumerate(names):
        found = [hash_ngrams(hash_words(normal_words(text)), n) for text in evaluation_sets[name]]
        counts[name] = sum(len(ngrams) > 0 for ngrams in found)
        own = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
        hashes.append(own)
        owners.append(np.full(len(own), number, np.int32))
    keys, first = np.unique(np.concatenate(hashes), return_index=True)
    with whole_file(path) as file:
        np.savez(file, n=n, names=np.array(names, dtype=str), keys=keys, owners=np.concatenate(owners)[first])
    return counts


@functools.lru_cache(maxsize=4)
def _index(path: str) -> tuple[int, list[str], np.ndarray, np.ndarray]:
    try:
        with as_path(path).open("rb") as file, np.load(file) as index:
            return int(index["n"]), index["names"].tolist(), index["keys"], index["owners"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"Decontaminate.index = {path!r} is no index that build_index wrote: {error}") from error


@config_dataclass
class Decontaminate:
    """Drops a document that shares an n-gram with an evaluation set, and names the set that it shares most with.

    Attributes:
        index: a file that `build_index` wrote, a path or a URL.
    """

    index: str

    def __call__(self, document: Document) -> Document:
        """Drops the document, with the number of n-grams as a score, or returns it as it is."""
        n, names, keys, owners = _index(self.index)
        ngrams = np.unique(hash_ngrams(hash_words(normal_words(document.text)), n))
        if not len(ngrams) or not len(keys):
            return document
        places = np.minimum(np.searchsorted(keys, ngrams), len(keys) - 1)
        hits = owners[places[keys[places] == ngrams]]
        if not len(hits):
            return document
        name = names[int(np.bincount(hits).argmax())]
        return document.with_score(SCORE, len(hits)).drop(_REASON + name)


def hits_of(drops: Mapping[str, int]) -> dict[str, int]:
    """How many documents each evaluation set dropped, from counts by reason."""
    return {reason.removeprefix(_REASON): n for reason, n in sorted(drops.items()) if reason.startswith(_REASON)}
