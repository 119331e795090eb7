"""Deduplication: exact, near (MinHash-LSH), and of paragraphs; over any number of shards in bounded memory.

Workers make a few numbers of every document (`document_keys`, `paragraph_keys`); one pass over all of them decides
(`find_duplicates`, `find_duplicate_paragraphs`). Of documents that belong together the first stays, in the order of
the input, so the decision does not depend on who computed what, or when.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt64

from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.curation.code_and_math import in_blocks
from cpm_jax.curation.document import Document
from cpm_jax.curation.extra import import_extra
from cpm_jax.curation.words import hash_ngrams, hash_words, normal_words

# Of several that fit a document the smallest counts. One whose id is also that of an earlier one, with another text,
# stays: files may each count their records from 0.
KEPT, EXACT, NEAR, SAME_ID = range(4)
REASONS = {EXACT: "exact duplicate", NEAR: "near duplicate"}
PARAGRAPHS = "duplicate paragraphs"

_KEYS_AT_ONCE = 1 << 23  # that are sorted in memory
_SHINGLES_AT_ONCE = 1 << 8  # so that what is computed stays in the processor's cache
_PARAGRAPH = re.compile(r"(?m)(?:^[^\S\n]*+\S[^\n]*+(?:\n|\Z))+")  # lines that are not blank
_DISTINCT = re.compile(r"#\d{5,}-\d+\Z")
_LINE = re.compile(r"(?m)^[^\S\n]*+\S[^\n]*+")
FIXED_KEYS = 2  # keys before those of the bands: of the text and of the id


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
    keys = np.zeros(FIXED_KEYS + config.bands, np.uint64)
    keys[0] = xxhash.xxh3_64_intdigest(document.text.encode())
    keys[1] = xxhash.xxh3_64_intdigest(f"{document.source}\0{document.id}".encode(errors="replace"))
    if config.bands and (smallest := signature(document.text, config)) is not None:
        for band, rows in enumerate(smallest.reshape(config.bands, config.rows)):
            keys[FIXED_KEYS + band] = xxhash.xxh3_64_intdigest(rows.tobytes())
    return keys


class KeyFile:
    """An array [keys, documents] in a file, of which one row at a time is held in memory."""

    def __init__(self, path: Path):
        """Opens the file, which `numpy.save` wrote in C order."""
        self._path = path
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            self.shape, fortran_order, self._dtype = np.lib.format.read_array_header_1_0(file)
            self._begin = file.tell()
        assert not fortran_order or 1 in self.shape, f"{path} was not written row by row"

    def __getitem__(self, row: int) -> np.ndarray:
        """A row."""
        num_bytes = self.shape[1] * self._dtype.itemsize
        with self._path.open("rb") as file:
            file.seek(self._begin + row * num_bytes)
            return np.frombuffer(file.read(num_bytes), self._dtype)


class _Surviving:
    """The keys of those paragraphs whose document stays, 0 for the others."""

    def __init__(self, keys: "Keys", stays: Bool[np.ndarray, " paragraphs"]):
        self._keys = keys
        self._stays = stays
        self.shape: tuple[int, ...] = keys.shape

    def __getitem__(self, row: int) -> np.ndarray:
        return np.where(self._stays, self._keys[row], np.uint64(0))


Keys: TypeAlias = KeyFile | _Surviving | np.ndarray


def _runs(shards: Sequence[Keys], row: int) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """Of keys that occur more than once: places of the later ones, and of the first of the same key.

    Args:
        shards: keys of each shard, one after another. 0 is no key.
        row: which of the keys.
    """
    starts = np.cumsum([0, *(shard.shape[1] for shard in shards)])
    # So many passes over the shards that the keys of each fit in memory.
    parts = -(-int(starts[-1]) // _KEYS_AT_ONCE)
    for part in range(parts):
        some_keys, some_places = [], []
        for shard, start in zip(shards, starts, strict=False):
            column = shard[row]
            chosen = np.flatnonzero((column % np.uint64(parts) == part) & (column != 0))
            some_keys.append(column[chosen])
            some_places.append(chosen + start)
        keys, places = np.concatenate(some_keys), np.concatenate(some_places)
        order = np.argsort(keys, kind="stable")  # keeps the order of places within a key
        keys, places = keys[order], places[order]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        first_of = places[np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))]
        yield places[~is_first], first_of[~is_first]


def find_duplicates(keys: Sequence[Keys]) -> UInt8[np.ndarray, " documents"]:
    """Decides about every document.

    Args:
        keys: of each shard an array [keys, documents], whose columns `document_keys` made.

    Returns:
        Of each document, over all shards, whether it stays, KEPT or SAME_ID, or why it goes: EXACT or NEAR.
    """
    fates = np.zeros(sum(shard.shape[1] for shard in keys), np.uint8)
    if not len(fates):
        return fates
    for later, _ in _runs(keys, 0):
        fates[later] = EXACT
    # Of documents with one text only the first takes part: the others would add nothing.
    members = firsts = np.empty(0, np.int64)
    for row in range(FIXED_KEYS, keys[0].shape[0]):
        for later, earliest in _runs(keys, row):
            chosen = fates[later] == KEPT
            members, firsts = _groups(
                np.concatenate([members, later[chosen]]), np.concatenate([firsts, earliest[chosen]])
            )
    fates[members[fates[members] == KEPT]] = NEAR
    for later, _ in _runs(keys, 1):
        fates[later[fates[later] == KEPT]] = SAME_ID
    return fates


def stays(fates: UInt8[np.ndarray, " documents"]) -> Bool[np.ndarray, " documents"]:
    """Which documents `find_duplicates` keeps."""
    return (fates == KEPT) | (fates == SAME_ID)


def distinct_id(id: str, shard: int, number: int) -> str:
    """The id of a document whose own is that of an earlier one: its shard, and its number there, are added."""
    return f"{id}#{shard:05d}-{number}"


def given_id(id: str) -> str:
    """The id without what `distinct_id` added."""
    return _DISTINCT.sub("", id)


def _groups(
    left: Int[np.ndarray, " links"], right: Int[np.ndarray, " links"]
) -> tuple[Int[np.ndarray, " members"], Int[np.ndarray, " members"]]:
    """Of documents that are linked, directly or through others, all but the first, and for each the first."""
    nodes, ends = np.unique(np.concatenate([left, right]), return_inverse=True)
    left, right = np.split(ends, 2)
    root = np.arange(len(nodes))
    while not (root[left] == root[right]).all():
        lower = np.minimum(root[left], root[right])
        np.minimum.at(root, root[left], lower)
        np.minimum.at(root, root[right], lower)
        while not (root[root] == root).all():
            root = root[root]
    is_member = root != np.arange(len(nodes))
    return nodes[is_member], nodes[root[is_member]]


def paragraphs(text: str, least: int) -> list[tuple[int, int]]:
    """Begin and end of the paragraphs, divided by blank lines, that may go: long ones that are no code or formulas.

    A text without blank lines is divided at line ends.
    """
    pattern = _PARAGRAPH if "\n\n" in text else _LINE
    pieces = [_stripped(match) for match in pattern.finditer(text)]
    lies_in_block = in_blocks(text)
    return [(begin, end) for begin, end in pieces if end - begin >= least and not lies_in_block(begin, end)]


def _stripped(match: re.Match[str]) -> tuple[int, int]:
    left = len(match[0]) - len(match[0].lstrip())
    return match.start() + left, match.start() + len(match[0].rstrip())


def paragraph_keys(text: str, least: int) -> UInt64[np.ndarray, " paragraphs"]:
    """A hash of each paragraph that `paragraphs` names, without regard to case, punctuation and layout."""
    xxhash = import_extra("xxhash")
    found = [" ".join(normal_words(text[begin:end])) for begin, end in paragraphs(text, least)]
    return np.array([xxhash.xxh3_64_intdigest(words.encode()) if words else 0 for words in found], np.uint64)


def find_duplicate_paragraphs(
    keys: Sequence[Keys], counts: Sequence[np.ndarray], fates: UInt8[np.ndarray, " documents"]
) -> list[Bool[np.ndarray, " paragraphs"]]:
    """Decides about every paragraph of the documents that stay; paragraphs of the others count for nothing.

    Args:
        keys: of each shard an array [1, paragraphs], as `paragraph_keys` made them, one document after another.
        counts: of each shard, how many of them belong to each document.
        fates: as `find_duplicates` gives them.

    Returns:
        Of each shard, which paragraphs go.
    """
    rows, start = [], 0
    for shard, count in zip(keys, counts, strict=True):
        rows.append(_Surviving(shard, np.repeat(stays(fates[start : start + len(count)]), count)))
        start += len(count)
    ends = np.cumsum([row.shape[1] for row in rows])
    goes = np.zeros(ends[-1] if rows else 0, bool)
    for later, _ in _runs(rows, 0):
        goes[later] = True
    return np.split(goes, ends[:-1])[: len(rows)]


def without_paragraphs(text: str, least: int, goes: Bool[np.ndarray, " paragraphs"]) -> str:
    """The text without some of the paragraphs that `paragraphs` names."""
    result, end = [], 0
    for (begin, stop), gone in zip(paragraphs(text, least), goes, strict=True):
        if gone:
            result.append(text[end:begin])
            end = stop
    return re.sub(r"\n[ \t]*\n\s*\n", "\n\n", "".join([*result, text[end:]])).strip() if result else text
