"""The verb `curate`: raw documents in, a filtered, deduplicated, decontaminated data set with a card out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.common.files import as_path
from cpm_jax.curation.pipeline import CARD, MANIFEST, PipelineConfig, curate
from cpm_jax.curation.places import DATA_DIR
from cpm_jax.data.prepare import REJECTS_FILE
from cpm_jax.data.sources import Reject, read_file
from cpm_jax.evaluation import package_data

# Tasks whose questions are texts. Those of reasoning_gym are made anew from a seed, and texts of the user's own are
# given as files.
_TASKS = {
    "gsm8k_sample": package_data.gsm8k,
    "hellaswag_sample": package_data.hellaswag,
    "truthfulqa_mc1_sample": package_data.truthfulqa_mc1,
    "humaneval": package_data.human_eval,
}


@config_dataclass
class CurateConfig:
    """What the verb does.

    Attributes:
        pipeline: what to read, the filters, and what counts as a duplicate.
        evaluation_sets: tasks of `evaluate`, or .jsonl files of items; documents that share text with them go.
        output_dir: where the data set goes, a folder or a URL such as s3://bucket/folder; None is the workdir.
    """

    pipeline: PipelineConfig
    evaluation_sets: tuple[str, ...] | list[str] = ()
    output_dir: str | None = None


def run(config: CurateConfig, workdir: Path) -> None:
    """Curates into `workdir`, or where the config says, and prints what is there then."""
    output_dir = workdir if config.output_dir is None else as_path(config.output_dir)
    done_before = (output_dir / MANIFEST).exists()
    manifest = curate(config.pipeline, output_dir, evaluation_sets=evaluation_texts(config.evaluation_sets))
    if done_before:
        print("nothing to do: an earlier call was finished")
    print(summary(manifest, output_dir))


def evaluation_texts(names: Sequence[str]) -> dict[str, list[str]]:
    """The texts of evaluation sets: of each item all that it says, questions and answers.

    Raises:
        ConfigError: a name is neither a task nor a file.
        TaskError: the package that holds a task is not installed.
        DataError: a file cannot be read.
    """
    sets: dict[str, list[str]] = {}
    for name in names:
        if name in _TASKS:
            items: Sequence[Any] = _TASKS[name]()
        elif name.endswith(".jsonl") and Path(name).is_file():
            records = list(read_file(Path(name), Path(name).name, name))
            for record in records:
                if isinstance(record, Reject):
                    raise ConfigError(
                        f"CurateConfig.evaluation_sets: {record.id}: {record.reason}: {record.detail}",
                        "CurateConfig.evaluation_sets",
                    )
            items = [record.value for record in records if not isinstance(record, Reject)]
        else:
            raise ConfigError(
                f"CurateConfig.evaluation_sets: no evaluation set {name!r}: accepted are {', '.join(_TASKS)} and "
                ".jsonl files",
                "CurateConfig.evaluation_sets",
            )
        sets[name] = ["\n".join(_strings(item)) for item in items]
    return sets


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def summary(manifest: Mapping[str, Any], output_dir: Path) -> str:
    """What a curated data set holds, in a few lines for the terminal."""
    read = manifest["documents"] + sum(manifest["drops"].values())
    shards = sum(name.startswith(f"{DATA_DIR}/") for name in manifest["files"])
    lines = [
        f"curated: {output_dir}",
        f"  kept: {manifest['documents']:,} of {read:,} documents, {manifest['text_bytes']:,} bytes, {shards} shards",
        *([f"  ids given twice, made distinct: {manifest['repeated_ids']:,}"] if manifest["repeated_ids"] else []),
        *(f"  dropped, {reason}: {count:,}" for reason, count in _by_count(manifest["drops"])),
        f"  rejects ({REJECTS_FILE}): {json.dumps(manifest['rejects']) if manifest['rejects'] else 'none'}",
        *(
            f"  damaged, not used: {item['id']} ({item['reason']}: {item['detail']})"
            for item in manifest["quarantined"]
        ),
        f"  card: {output_dir / CARD}",
    ]
    return "\n".join(lines)


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
