"""The verb `prepare`: real text in, a dataset folder out."""

import json
from pathlib import Path

from cpm_jax.data.manifest import FILE_NAME, Manifest
from cpm_jax.data.prepare import REJECTS_FILE, PrepareConfig, prepare


def run(config: PrepareConfig, workdir: Path) -> None:
    """Prepares `config.sources` into `workdir` and prints what is there then."""
    done_before = (workdir / FILE_NAME).exists()
    manifest = prepare(config, workdir)
    if done_before:
        print("nothing to do: an earlier call was finished")
    print(summary(manifest, workdir))


def summary(manifest: Manifest, workdir: Path) -> str:
    """What a dataset folder holds, in a few lines for the terminal."""
    lines = [f"prepared: {workdir}"]
    for name, split in manifest.splits.items():
        lines.append(
            f"  {name}: {split.documents:,} documents, {split.text_bytes:,} bytes, {split.tokens:,} tokens, "
            f"{split.records:,} records of {manifest.seq_len} in {len(split.shards)} shards"
        )
    lines.append(f"  exact duplicates dropped: {manifest.duplicates:,}")
    if manifest.truncated:
        lines.append(f"  conversations cut: {manifest.truncated:,}")
    if not manifest.complete:
        lines.append(f"  left unread beyond max_bytes = {manifest.arguments['max_bytes']:,}: the rest of the sources")
    rejects = json.dumps(manifest.rejects) if manifest.rejects else "none"
    lines.append(f"  rejects ({REJECTS_FILE}): {rejects}")
    return "\n".join(lines)
