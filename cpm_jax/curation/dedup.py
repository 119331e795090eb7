"""Deduplication: exact, near (MinHash-LSH), and of paragraphs; over any number of shards in bounded memory.

Workers make a few numbers of every document (`document_keys`, `paragraph_keys`); one pass over all of them decides
(`find_duplicates`, `find_duplicate_paragraphs`). Of documents that belong together the first stays, in the order of
the input, so the decision does not depend on who computed what, or when.
"""

import functools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt64

from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.curation.code_and_math import blocks
from cpm_jax.curation.document import Document
from cpm_jax.curation.extra import import_extra
from cpm_jax.curation.words import hash_ngrams, hash_words, normal_words

KEPT, EXACT, SAME_ID, NEAR = range(4)
REASONS = {EXACT: "exact duplicate", SAME_ID: "duplicate id", NEAR: "near duplicate"}
PARAGRAPHS = "duplicate paragraphs"

_KEYS_AT_ONCE = 1 << 24  # that are sorted in memory
_SHINGLES_AT_ONCE = 1 << 8  # so that what is computed stays in the processor's cache
_PARAGRAPH = re.compile(r"(?:[^\n]*\S[^\n]*(?:\n|\Z))+")  # lines that are not blank
_LINE = re.compile(r"[^\n]*\S[^\n]*")
_FIXED = 2  # keys before those of the bands: of the text and of the id


@config_dataclass
class DedupConfig:
    """What counts as a duplicate. The defaults of MinHash are FineWeb's.

    Attributes:
        ngram: words of the pieces by which texts are compared.
        bands: groups of hashes; two documents that agree in all hashes of a group are near duplicates. 0 looks for
            exact duplicates only.
        rows: hashes per band. Documents of Jaccard similarity s are found with probability 1 - (1 - s^rows)^bands.
        seed: of the hash functions.
        min_paragraph: fewest characters of a paragraph that goes when it occurred before, in whatever document; None
            keeps all paragraphs. Paragraphs of code and formulas always stay.
        min_rest: a document that loses paragraphs and keeps fewer characters than this is dropped.
    """

    ngram: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1
    min_paragraph: int | None = 200
    min_rest: int = 200

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        for name, least in {"ngram": 1, "bands": 0, "rows": 1, "seed": 0, "min_paragraph": 1, "min_rest": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"DedupConfig.{name} = {value}: must be at least {least}", f"DedupConfig.{name}")


@functools.cache
def _hash_functions(config: DedupConfig) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(config.seed)
    number = config.bands * config.rows
    # Odd factors make each function a permutation of the 32-bit numbers.
    factors = generator.integers(1 << 32, size=(number, 1), dtype=np.uint32) | np.uint32(1)
    return factors, generator.integers(1 << 32, size=(number, 1), dtype=np.uint32)


def signature(text: str, config: DedupConfig) -> np.ndarray | None:
    """The MinHash signature of a text, uint32 [bands * rows]; None if it has fewer words than an n-gram."""
    shingles = hash_ngrams(hash_words(normal_words(text)), config.ngram)
    if not len(shingles):
        return None
    short = np.unique((shingles >> np.uint64(32)).astype(np.uint32))
    factors, offsets = _hash_functions(config)
    smallest = np.full(len(factors), 0xFFFFFFFF, np.uint32)
    room = np.empty((len(factors), min(_SHINGLES_AT_ONCE, len(short))), np.uint32)
    for start in range(0, len(short), _SHINGLES_AT_ONCE):
        part = short[start : start + _SHINGLES_AT_ONCE]
        hashes = np.multiply(factors, part, out=room[:, : len(part)])
        hashes += offsets
        np.minimum(smallest, hashes.min(axis=1), out=smallest)
    return smallest


def document_keys(document: Document, config: DedupConfig) -> UInt64[np.ndarray, " keys"]:
    """What `find_duplicates` needs of a document: a hash of its text, of its name and of each band; 0 for no band."""
    xxhash = import_extra("xxhash")
    keys = np.zeros(_FIXED + config.bands, np.uint64)
    keys[0] = xxhash.xxh3_64_intdigest(document.text.encode())
    keys[1] = xxhash.xxh3_64_intdigest(f"{document.source}\0{document.id}".encode(errors="replace"))
    if config.bands and (smallest := signature(document.text, config)) is not None:
        for band, rows in enumerate(smallest.reshape(config.bands, config.rows)):
            keys[_FIXED + band] = xxhash.xxh3_64_intdigest(rows.tobytes())
    return keys


def _runs(columns: Sequence[np.ndarray]) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """Of keys that occur more than once: places of the later ones, and of the first of the same key.

    Args:
        columns: keys of each shard, one after another; they may lie on disk. 0 is no key.
    """
    total = sum(map(len, columns))
    if not total:
        return
    # So many passes over the columns that the keys of each fit in memory.
    parts = max(1, -(-total // _KEYS_AT_ONCE))
    starts = np.cumsum([0, *map(len, columns)])
    for part in range(parts):
        chosen = [np.flatnonzero((column % np.uint64(parts) == part) & (column != 0)) for column in columns]
        keys = np.concatenate([column[here] for column, here in zip(columns, chosen, strict=True)])
        places = np.concatenate([here + start for here, start in zip(chosen, starts, strict=False)])
        order = np.argsort(keys, kind="stable")  # keeps the order of places within a key
        keys, places = keys[order], places[order]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        first_of = places[np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))]
        yield places[~is_first], first_of[~is_first]


def find_duplicates(keys: Sequence[np.ndarray]) -> UInt8[np.ndarray, " documents"]:
    """Decides about every document.

    Args:
        keys: of each shard an array [keys, documents], whose columns `document_keys` made; it may lie on disk.

    Returns:
        Of each document, over all shards, KEPT or why it goes: EXACT, SAME_ID or NEAR.
    """
    fates = np.zeros(sum(shard.shape[1] for shard in keys), np.uint8)
    if not len(fates):
        return fates
    for column, fate in ((0, EXACT), (1, SAME_ID)):
        for later, _ in _runs([shard[column] for shard in keys]):
            fates[later[fates[later] == KEPT]] = fate
    # Of documents with one text or name only the first takes part: the others would add nothing.
    first, second = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for column in range(_FIXED, keys[0].shape[0]):
        for later, earliest in _runs([shard[column] for shard in keys]):
            chosen = fates[later] == KEPT
            first.append(earliest[chosen])
            second.append(later[chosen])
    later = _not_first(np.concatenate(first), np.concatenate(second))
    fates[later[fates[later] == KEPT]] = NEAR
    return fates


def _not_first(first: Int[np.ndarray, " links"], second: Int[np.ndarray, " links"]) -> Int[np.ndarray, " n"]:
    """All that linked documents but the first of each connected group."""
    nodes, ends = np.unique(np.concatenate([first, second]), return_inverse=True)
    left, right = np.split(ends, 2)
    root = np.arange(len(nodes))
    while not (root[left] == root[right]).all():
        lower = np.minimum(root[left], root[right])
        np.minimum.at(root, root[left], lower)
        np.minimum.at(root, root[right], lower)
        while not (root[root] == root).all():
            root = root[root]
    return nodes[root != np.arange(len(nodes))]


def paragraphs(text: str, least: int) -> list[tuple[int, int]]:
    """Begin and end of the paragraphs, divided by blank lines, that may go: long ones that are no code or formulas.

    A text without blank lines is divided at line ends.
    """
    pattern = _PARAGRAPH if "\n\n" in text else _LINE
    pieces = [_stripped(match) for match in pattern.finditer(text)]
    kept_spans = blocks(text)
    return [
        (begin, end)
        for begin, end in pieces
        if end - begin >= least and not any(begin < stop and start < end for start, stop in kept_spans)
    ]


def _stripped(match: re.Match[str]) -> tuple[int, int]:
    left = len(match[0]) - len(match[0].lstrip())
    return match.start() + left, match.start() + len(match[0].rstrip())


def paragraph_keys(text: str, least: int) -> UInt64[np.ndarray, " paragraphs"]:
    """A hash of each paragraph that `paragraphs` names, without regard to case, punctuation and layout."""
    xxhash = import_extra("xxhash")
    found = [" ".join(normal_words(text[begin:end])) for begin, end in paragraphs(text, least)]
    return np.array([xxhash.xxh3_64_intdigest(words.encode()) if words else 0 for words in found], np.uint64)


def find_duplicate_paragraphs(
    keys: Sequence[np.ndarray], counts: Sequence[np.ndarray], fates: UInt8[np.ndarray, " documents"]
) -> list[Bool[np.ndarray, " paragraphs"]]:
    """Decides about every paragraph of the documents that stay; paragraphs of the others count for nothing.

    Args:
        keys: of each shard, as `paragraph_keys` made them, one document after another.
        counts: of each shard, how many of them belong to each document.
        fates: as `find_duplicates` gives them.

    Returns:
        Of each shard, which paragraphs go.
    """
    columns, start = [], 0
    for shard, count in zip(keys, counts, strict=True):
        stays = np.repeat(fates[start : start + len(count)] == KEPT, count)
        columns.append(np.where(stays, shard, np.uint64(0)))
        start += len(count)
    goes = np.zeros(sum(map(len, columns)), bool)
    for later, _ in _runs(columns):
        goes[later] = True
    return np.split(goes, np.cumsum([len(column) for column in columns])[:-1]) if columns else []


def without_paragraphs(text: str, least: int, goes: Bool[np.ndarray, " paragraphs"]) -> str:
    """The text without some of the paragraphs that `paragraphs` names."""
    result, end = [], 0
    for (begin, stop), gone in zip(paragraphs(text, least), goes, strict=True):
        if gone:
            result.append(text[end:begin])
            end = stop
    return re.sub(r"\n[ \t]*\n\s*\n", "\n\n", "".join([*result, text[end:]])).strip() if result else text
