"""Real texts as long as books, of three kinds, from Debian packages installed for their text alone.

A package is downloaded with `apt-get download` and unpacked into a folder; nothing is installed. Every kind is cut into
a part to measure on and a part to train on, which are different books, sections or chapters.
"""

import gzip
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

# R's type number of a character vector and of a string in it, and the size of a missing one (R Internals, section 1.8).
_CHARACTER_VECTOR, _STRING, _MISSING = 16, 9, -1
_TYPE = 0xFF


class LongText(NamedTuple):
    """One kind of text.

    Attributes:
        evaluation: one book, section or run of chapters.
        training: documents that share no passage with it.
    """

    evaluation: str
    training: Sequence[str]


def long_texts(folder: Path) -> dict[str, LongText]:
    """Returns the texts by kind: "novels", "essays", "standard".

    Args:
        folder: where packages are unpacked; what is there is not downloaded again.

    Raises:
        RuntimeError: a package cannot be had.
    """
    return {kind: read(_unpacked(package, folder)) for kind, (package, read) in _KINDS.items()}


def _novels(root: Path) -> LongText:
    """Jane Austen's six novels; Persuasion is measured on."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = ["\n".join(lines) for lines in r_character_vectors(data)]
    (measured,) = (novel for novel in novels if novel.startswith("Persuasion"))
    return LongText(measured, [novel for novel in novels if novel is not measured])


def _essays(root: Path) -> LongText:
    """An Anarchist FAQ: essays on politics and history; section H.3, the longest, is measured on."""
    files = sorted((root / "usr/share/doc/anarchism/markdown").glob("sec*.md.gz"))
    texts = {path.name.removesuffix(".md.gz"): gzip.decompress(path.read_bytes()).decode("utf-8") for path in files}
    # Pages of a few lines are tables of contents.
    return LongText(texts.pop("secH3"), [text for text in texts.values() if len(text) > 10_000])


def _standard(root: Path) -> LongText:
    """The Debian Policy Manual: technical prose; its second half is measured on."""
    text = gzip.decompress((root / "usr/share/doc/debian-policy/policy.txt.gz").read_bytes()).decode("utf-8")
    half = text.index("\n\n", len(text) // 2)
    return LongText(text[half:].lstrip("\n"), [text[:half]])


# The package of each kind, and what finds the text in it.
_KINDS: dict[str, tuple[str, Callable[[Path], LongText]]] = {
    "novels": ("r-cran-janeaustenr", _novels),
    "essays": ("anarchism", _essays),
    "standard": ("debian-policy", _standard),
}


def _unpacked(package: str, folder: Path) -> Path:
    root = folder / package
    if root.exists():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            subprocess.run(["apt-get", "--quiet", "download", package], cwd=temporary, check=True, capture_output=True)
            (archive,) = Path(temporary).glob("*.deb")
            subprocess.run(["dpkg-deb", "--extract", archive, Path(temporary) / "root"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"the text of Debian's package {package} is not in {root}, and apt-get download did not bring it "
                f"({error}): unpack the package there with dpkg-deb --extract"
            ) from error
        (Path(temporary) / "root").rename(root)
    return root


def r_character_vectors(data: bytes) -> list[list[str]]:
    """Reads a lazy-load database of R (`.rdb`) that holds character vectors only.

    Each object is the length of its serialisation and that, compressed by zlib: a header, whether it is a character
    vector, how many strings it has, and of each its flags, length and bytes, all numbers big-endian int32.

    Args:
        data: the file.

    Raises:
        ValueError: an object is something else.
    """
    vectors, at = [], 0
    while at < len(data):
        stream = zlib.decompressobj()
        object_ = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        vectors.append(_character_vector(object_))
    return vectors


def _character_vector(data: bytes) -> list[str]:
    # "X\n", then format 2: three versions; format 3 goes on with the length and name of the encoding.
    (version,) = struct.unpack_from(">i", data, 2)
    at = 14
    if version == 3:
        at += 4 + struct.unpack_from(">i", data, at)[0]
    flags, count = struct.unpack_from(">ii", data, at)
    if data[:2] != b"X\n" or version not in (2, 3) or flags & _TYPE != _CHARACTER_VECTOR:
        raise ValueError(f"an object of format {version} and type {flags & _TYPE} is no character vector of R")
    at += 8
    strings = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", data, at)
        if flags & _TYPE != _STRING:
            raise ValueError(f"a character vector of R holds an object of type {flags & _TYPE}")
        at += 8
        if size != _MISSING:
            strings.append(data[at : at + size].decode("utf-8"))
            at += size
    return strings
