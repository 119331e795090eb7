"""The page that a quickstart ends with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpm_jax.common import report
from cpm_jax.common.config import config_to_dict
from cpm_jax.common.figures import bar_figure, human, human_bytes, human_seconds
from cpm_jax.common.metrics import METRICS_FILE, read_metrics
from cpm_jax.common.report import Details, Figure, Headline, Page, Sample, Section, Table, Text
from cpm_jax.common.training_report import footer, median_throughput, training_section
from cpm_jax.data.manifest import Manifest
from cpm_jax.modeling.model_size import count_params

if TYPE_CHECKING:  # the stages import this module
    from experiments.pretrain import PretrainConfig
    from experiments.quickstart import QuickstartConfig

_OURS = "this model"


def write_quickstart_report(
    path: Path,
    *,
    config: "QuickstartConfig",
    job: "PretrainConfig",
    manifest: Manifest,
    memory: Mapping[str, float],
    scores: Mapping[str, Any],
    samples: Sequence[Mapping[str, str]],
    exported: Mapping[str, Any],
    checked: Mapping[str, Any],
    seconds: Mapping[str, float],
    curated: Mapping[str, Any] | None = None,
    verified: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `report.html` from what the stages found.

    Args:
        path: where to; the run's `metrics.jsonl` lies beside it.
        config: what was asked for.
        job: the training job that came of it.
        manifest: of the dataset.
        memory: bytes by what holds them.
        scores: bits per byte, from the stage "evaluate".
        samples: title, prompt and text of each.
        exported: from the stage "export".
        checked: from the stage "check".
        seconds: time of each stage.
        curated: from the stage "curate", if there was one.
        verified: from the stage "verify", if there was one.

    Returns:
        The path.
    """
    rows = read_metrics(path.parent / METRICS_FILE)
    size = count_params(job.model)
    source = ", ".join(
        "the Python standard library" if name == "stdlib" else name for name in config.prepare.source_list
    )
    tokens = job.train.steps * job.train.batch_size * manifest.seq_len
    epochs = tokens / max(1, manifest.splits["train"].tokens)
    page = Page(
        title=f"{human(size.total)} parameters trained on {source}",
        subtitle=(
            f"A MiniCPM4-shaped decoder from random weights: {tokens:,} tokens of {source}, {epochs:.2g} passes, "
            f"in {human_seconds(seconds['pretrain'])}."
        ),
        headlines=_headlines(rows, scores, checked, seconds),
        sections=[
            _quality(config, scores),
            Section("Samples", [_sample_text(config), *(Sample(**sample) for sample in samples)]),
            training_section(rows, memory),
            *([] if verified is None else [_verification(config, verified)]),
            *([] if curated is None else [_curation(curated)]),
            _data(manifest, scores),
            _model(job, exported, checked),
            _run(path, config, job, seconds),
        ],
        footer=footer(),
    )
    return report.write(page, path)


def _headlines(
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Any],
    checked: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> list[Headline]:
    compared = f"zstd -19: {scores['zstd']['value']:.2f}, n-gram: {scores['ngram']['value']:.2f}"
    if "max_error" in checked:
        same = Headline(
            "Logits in transformers",
            f"{checked['max_error']:.1e}",
            "",
            f"largest difference; they reach {checked['largest_logit']:.3g}",
        )
    else:
        same = Headline(
            "Logits in transformers", "–", "", f"not checked: {', '.join(checked['missing'])} not installed"
        )
    return [
        Headline("Held-out text", f"{scores['model']['value']:.3f}", "bits per byte", compared),
        Headline(
            "Whole run", human_seconds(sum(seconds.values())), "", f"training {human_seconds(seconds['pretrain'])}"
        ),
        Headline("Throughput", human(median_throughput(rows)), "tokens/s", "median while training"),
        same,
    ]


def _quality(config: "QuickstartConfig", scores: Mapping[str, Any]) -> Section:
    model, ngram, primed = scores["model"], scores["ngram"], scores["zstd_primed"]
    names = {
        _OURS: model["value"],
        f"{config.ngram_order}-gram, Kneser–Ney": ngram["value"],
        "zstd -19 + training text": primed["value"],
        "zstd -19": scores["zstd"]["value"],
    }
    best = min(names, key=lambda name: names[name])
    others = min(value for name, value in names.items() if name != _OURS)
    verdict = (
        f"It needs {100 * (1 - model['value'] / others):.0f}% fewer bits than the best of the others."
        if best == _OURS
        else f"The best here is {best}: this model needs {100 * (model['value'] / others - 1):.0f}% more bits."
    )
    documents = "document" if model["documents"] == 1 else "documents"
    error = "" if model["standard_error"] is None else f" ± {model['standard_error']:.3f}"
    return Section(
        "How well does it predict text that it never saw?",
        [
            Text(
                f"{model['documents']:,} held-out {documents}, {model['num_bytes']:,} bytes. A perfect coder "
                f"would write them in {model['value']:.3f}{error} bits per byte with this model. {verdict}"
            ),
            bar_figure(
                names,
                ylabel="held-out bits per byte (lower is better)",
                strong=[_OURS],
                errors={_OURS: model["standard_error"] or 0.0},
                caption=(
                    "All on the same documents. The whisker is one standard error over documents. The model reads "
                    f"windows of {config.prepare.seq_len} tokens that overlap by half; the ends of documents are "
                    f"predicted too. The {config.ngram_order}-gram model (interpolated, modified Kneser–Ney) counted "
                    f"{ngram['train_tokens']:,} tokens of the training split. zstd -19 compresses the held-out text as "
                    f"one stream, the second time with {human_bytes(primed['reference_bytes'])} of training text as "
                    "its dictionary."
                ),
            ),
        ],
    )


def _sample_text(config: "QuickstartConfig") -> Text:
    sampling = config.sampling
    how = "the most probable token each time"
    if sampling.temperature:
        how = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    return Text(f"Pale: the beginning of a held-out document. Dark: how the model went on ({how}).")


def _data(manifest: Manifest, scores: Mapping[str, Any]) -> Section:
    rows = [
        [
            name,
            f"{split.documents:,}",
            f"{split.text_bytes:,}",
            f"{split.tokens:,}",
            f"{split.records:,}",
            f"{split.text_bytes / max(1, split.tokens):.2f}",
        ]
        for name, split in manifest.splits.items()
    ]
    table = Table(
        ["split", "documents", "bytes", "tokens", f"records of {manifest.seq_len}", "bytes per token"],
        rows,
        number_columns=range(1, 6),
        caption="Split by document, so that none is on both sides.",
    )
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejects.items()) or "none"
    facts = [
        f"Exact duplicates dropped: {manifest.duplicates:,}. Rejected: {rejected} (data/rejects.jsonl lists them)."
    ]
    if not manifest.complete:
        facts.append(
            f"Reading ended at max_bytes = {manifest.arguments['max_bytes']:,} bytes of text: the rest of the sources "
            "was not read."
        )
    if (decoded := scores["decoded_bytes"]) != scores["model"]["num_bytes"]:
        facts.append(
            f"The tokenizer cannot be undone exactly: held-out texts decode to {decoded:,} bytes instead of "
            f"{scores['model']['num_bytes']:,}; zstd compressed the decoded text."
        )
    return Section("Data", [table, *map(Text, facts)])


def _curation(curated: Mapping[str, Any]) -> Section:
    kept, drops, rejects = curated["documents"], curated["drops"], curated["rejects"]
    counts = {"kept": kept, **dict(sorted(drops.items(), key=lambda item: -item[1]))}
    read = sum(counts.values())
    facts = [
        f"{kept:,} of {read:,} documents are kept, {human_bytes(curated['text_bytes'])}. Source files of programs pass "
        "the filters of prose unchanged; duplicates among them go. curated/dataset_card.md has examples."
    ]
    if rejects:
        facts.append(f"Could not be read: {', '.join(f'{count:,} {reason}' for reason, count in rejects.items())}.")
    if curated["quarantined"]:
        facts.append(f"Damaged, and not used: {', '.join(curated['quarantined'])}.")
    rows = [[name, f"{count:,}", f"{100 * count / read:.1f}%"] for name, count in counts.items()]
    table = Table(["documents", "number", "share"], rows, number_columns=(1, 2), strong_rows=(0,))
    return Section("Curation", [*map(Text, facts), table])


def _verification(config: "QuickstartConfig", verified: Mapping[str, Any]) -> Section:
    digits, unit = verified["unit"]["digits"], verified["unit"]["name"]
    rows = [
        [name, f"{found['mean']:.{digits}f}", f"{verified['passes'].get(name, 0):.2f}"]
        for name, found in verified["scores"].items()
    ]
    table = Table(
        ["model annealed with", f"held-out {unit}", "passes"],
        rows,
        number_columns=(1, 2),
        caption=(
            "Each from the checkpoint before the decay, on 30% of the candidate and 70% of the training text; default "
            f"is the training text alone; {config.verify_seeds} seeds of {config.verify_steps} steps. Passages of "
            "curated documents that no training saw. A budget this short shows large differences only; "
            "verification/report.html has every pair."
        ),
    )
    return Section("Is the curated text better than the raw one?", [Text(verified["verdict"]), table])


def _model(job: "PretrainConfig", exported: Mapping[str, Any], checked: Mapping[str, Any]) -> Section:
    model, size = job.model, count_params(job.model)
    rows = [
        ["parameters", f"{size.total:,} ({size.non_embedding:,} without embeddings)"],
        ["layers × width", f"{model.num_layers} × {model.d_model}, feed-forward {model.d_ff:,}"],
        ["attention", f"{model.num_heads} query heads and {model.num_kv_heads} key-value heads of {model.head_size}"],
        ["vocabulary", f"{model.vocab_size:,}" + (", tied embeddings" if model.tie_word_embeddings else "")],
        ["arithmetic", f"{human(exported['flops_per_token'])} floating-point operations per trained token"],
        ["Hugging Face class", exported["architecture"]],
    ]
    if exported["left_out"]:
        rows.append(["left out there", f"{exported['left_out']:,} parameters of MTP layers"])
    if "max_error" in checked:
        found = (
            f"{checked['tokens']:,} positions of held-out text: logits differ by at most {checked['max_error']:.2g}, "
            f"where they reach {checked['largest_logit']:.3g}; {checked['greedy_tokens']} greedy tokens agree"
        )
    else:
        found = f"not checked: {', '.join(checked['missing'])} not installed"
    return Section("Model", [Table([], [*rows, ["in transformers", found]])])


def _run(path: Path, config: "QuickstartConfig", job: "PretrainConfig", seconds: Mapping[str, float]) -> Section:
    blocks: list[Figure | Details] = [
        bar_figure(dict(seconds), ylabel="time of each stage", format_value=human_seconds),
        Details("Configuration as given", json.dumps(config_to_dict(config), indent=1, ensure_ascii=False)),
        Details("Training job that came of it", json.dumps(config_to_dict(job), indent=1, ensure_ascii=False)),
    ]
    operative = path.parent / "operative_config.gin"
    if operative.exists():
        blocks.append(Details("The same as gin: operative_config.gin", operative.read_text("utf-8")))
    return Section("Run", blocks)
