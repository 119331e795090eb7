"""The card of a curated data set: what is in it, what is not and why, for people and for `datasets.load_dataset`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cpm_jax.curation.decontamination import hits_of
from cpm_jax.curation.statistics import OTHER, Statistics, common

_QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_BINS = 10
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def dataset_card(manifest: Mapping[str, Any], statistics: Statistics) -> str:
    """The card as Markdown, with the header that Hugging Face reads.

    Args:
        manifest: of the data set.
        statistics: of all its documents.
    """
    read = statistics.documents + sum(statistics.drops.values())
    sections = [
        _header(manifest, statistics),
        f"# {statistics.documents:,} documents, {statistics.characters:,} characters\n",
        f"Of {read:,} documents that were read {_percent(statistics.documents, read)} are kept."
        f" Those dropped are in `dropped/` with their reasons, what could not be read in `rejects.jsonl`.\n",
        _repeated_ids(statistics),
        _table("Dropped, by filter", ("reason", "documents", "of all"), _shares(statistics.drops, read)),
        _table("Could not be read", ("reason", "records"), _counted(statistics.rejects)),
        _table(
            "Damaged files, of which nothing is used",
            ("file", "reason", "where"),
            [(item["id"], item["reason"], item["detail"]) for item in manifest["quarantined"]],
        ),
        _table("Sources", ("source", "documents", "of all"), _shares(common(statistics.sources), statistics.documents)),
        _table(
            "Languages",
            ("language", "documents", "of all"),
            _shares(_known(common(statistics.languages)), statistics.documents),
        ),
        _table(
            "Licences, as the documents state them",
            ("licence", "documents", "of all"),
            _shares(common(statistics.licences), statistics.documents)
            or [("none stated", f"{statistics.documents:,}", "100.0%")],
        ),
        _quantiles(statistics),
        *(_histogram(name, sample.values) for name, sample in sorted(statistics.scores.items())),
        _decontamination(statistics, manifest),
        _excerpts(statistics),
        _commands(manifest),
    ]
    return "\n".join(section for section in sections if section)


def _header(manifest: Mapping[str, Any], statistics: Statistics) -> str:
    languages = sorted(name for name in common(statistics.languages) if name and name != OTHER)
    size = next((name for limit, name in _SIZES if statistics.documents < limit), "n>10M")
    lines = ["---", "configs:", "- config_name: default", "  data_files:", "  - split: train", "    path: data/*"]
    lines += ["task_categories:", "- text-generation", "size_categories:", f"- {size}"]
    if languages:
        lines += ["language:", *(f"- '{language}'" for language in languages)]
    if len(statistics.licences) == 1:
        lines.append(f"license: {next(iter(statistics.licences)).lower()}")
    return "\n".join([*lines, "---", ""])


def _repeated_ids(statistics: Statistics) -> str:
    if not statistics.repeated_ids:
        return ""
    return (
        f"{statistics.repeated_ids:,} had the id of an earlier document of the same source with another text: to theirs"
        " `#`, the shard and the place in it were added.\n"
    )


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "–"


def _counted(counts: Mapping[str, int]) -> list[tuple[str, ...]]:
    return [(name, f"{count:,}") for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _shares(counts: Mapping[str, int], whole: int) -> list[tuple[str, ...]]:
    return [(name, count, _percent(counts[name], whole)) for name, count in _counted(counts)]


def _known(languages: Mapping[str, int]) -> dict[str, int]:
    return {name or "not identified": count for name, count in languages.items()}


def _table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [f"## {title}", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows), ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _quantiles(statistics: Statistics) -> str:
    values = np.quantile(statistics.lengths.values, _QUANTILES)
    header = tuple(f"{100 * quantile:g}%" for quantile in _QUANTILES)
    title = f"Lengths in characters: quantiles of {len(statistics.lengths.values):,} documents"
    return _table(title, header, [tuple(f"{value:,.0f}" for value in values)])


def _histogram(name: str, values: list[float]) -> str:
    counts, edges = np.histogram(values, bins=_BINS)
    rows = [
        (f"{low:.4g} – {high:.4g}", _percent(count, len(values)), "█" * round(40 * count / counts.max()))
        for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
    ]
    return _table(f"Score `{name}`: {len(values):,} documents", ("from – to", "share", ""), rows)


def _decontamination(statistics: Statistics, manifest: Mapping[str, Any]) -> str:
    hits, evaluation_texts = hits_of(statistics.drops), manifest["evaluation_sets"]
    rows = [
        (name, f"{evaluation_texts.get(name, 0):,}", f"{hits.get(name, 0):,}")
        for name in sorted(evaluation_texts.keys() | hits.keys())
    ]
    title = f"Decontamination, by {manifest['arguments']['decontamination_ngram']} words in a row"
    return _table(title, ("evaluation set", "texts compared with", "documents dropped"), rows)


def _excerpts(statistics: Statistics) -> str:
    lines = ["## Examples", ""]
    for reason, sample in sorted(statistics.excerpts.items()):
        lines.append(f"### {f'Dropped: {reason}' if reason else 'Kept'}")
        for name, text in sample.values:
            fence = "~" * (max(3, *(len(run) + 1 for run in [*text.split("\n"), ""] if set(run) == {"~"}), 3))
            lines += [f"`{name}`", f"{fence}text", text, fence, ""]
    return "\n".join(lines)


def _commands(manifest: Mapping[str, Any]) -> str:
    sources = ", ".join(f"`{source}`" for source in manifest["arguments"]["sources"])
    return (
        f"## Commands\nMade of {sources} with the settings in `curation.json`. The verb `curate` leaves them in its"
        " workdir as `config.gin`, too, and the first command makes the data set again; the others read it.\n```\n"
        "python -m experiments.run curate --gin_file=config.gin --workdir=OUT\n"
        "python -m experiments.run prepare --gin.DATA=OUT/data --gin.TOKENIZER=… --workdir=DATASET\n"
        "datasets.load_dataset('OUT/data')\n```\n"
    )
