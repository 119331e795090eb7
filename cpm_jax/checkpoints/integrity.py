"""Whether the files of a checkpoint are those that were written.

Orbax commits a checkpoint by renaming its folder, so a kill leaves no half of one; but files are also cut short, lost
or changed by what comes later: a full or failing disk, an interrupted copy. Its formats do not notice all of that (a
flipped bit inside an array restores silently). So a list of sizes and SHA-256 hashes is written into the folder
before it is renamed.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cpm_jax.common import files

CHECKSUMS_FILE = "checksums.json"

# Orbax writes these at the very end, and does not read them back.
_WRITTEN_LATER = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})


def _hash_all(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the interpreter's lock
        return list(pool.map(files.sha256, paths))


def write_checksums(directory: Path) -> None:
    """Lists the files below `directory`, with size and hash, in `checksums.json`."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in _WRITTEN_LATER)
    hashes = _hash_all(paths)
    listing = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes, strict=True)
    }
    files.write_json(directory / CHECKSUMS_FILE, listing)


def find_damage(directory: Path) -> str:
    """Compares the files below `directory` with `checksums.json`.

    Returns:
        "" where all are as they were written, else what is wrong with the first that is not.
    """
    try:
        listing = json.loads((directory / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        expected = {directory / name: (entry["bytes"], entry["sha256"]) for name, entry in listing.items()}
    except FileNotFoundError:
        return f"{CHECKSUMS_FILE} is missing: it was not wholly written, or not by this program"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{CHECKSUMS_FILE} cannot be read: {error}"
    for path, (size, _) in expected.items():  # sizes first: cheap, and the usual damage
        if not path.is_file():
            return f"{path.relative_to(directory)} is missing"
        if path.stat().st_size != size:
            return f"{path.relative_to(directory)} has {path.stat().st_size} bytes, {size} were written"
    try:
        hashes = _hash_all(list(expected))
    except OSError as error:
        return str(error)
    for (path, (_, digest)), found in zip(expected.items(), hashes, strict=True):
        if found != digest:
            return f"{path.relative_to(directory)} has changed since it was written (SHA-256 differs)"
    return "" if expected else f"{CHECKSUMS_FILE} lists no file"
