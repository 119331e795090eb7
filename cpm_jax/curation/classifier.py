"""Training a classifier of documents from two pools, measuring it on what was held out, and choosing its threshold."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeInt

from cpm_jax.common.config import ConfigError, InputError, config_dataclass, config_from_dict, config_to_dict
from cpm_jax.common.files import sha256, write_json
from cpm_jax.curation import fasttext_classifier
from cpm_jax.curation.classifier_metrics import (
    PrecisionRecall,
    calibration,
    precision_recall,
    roc_auc,
    threshold_for_keep_rate,
    threshold_for_precision,
)
from cpm_jax.curation.document import Document
from cpm_jax.curation.fasttext_classifier import FastTextClassifier, FastTextConfig
from cpm_jax.curation.language_model_scorers import (
    Embedder,
    EmbeddingClassifier,
    EmbeddingConfig,
    Judge,
    JudgeConfig,
    fit_logistic,
)
from cpm_jax.curation.pools import Pool, position

CLASSIFIER_FILE = "classifier.json"
CACHE_FILE = "replies.sqlite"
_CURVE_POINTS = 200
_MISTAKES = 5

Scorer: TypeAlias = Callable[[Sequence[str]], Float[np.ndarray, " n"]]
ScorerConfig: TypeAlias = FastTextConfig | EmbeddingConfig | JudgeConfig
_KINDS: dict[str, type[ScorerConfig]] = {"fasttext": FastTextConfig, "embedding": EmbeddingConfig, "judge": JudgeConfig}
Share = Annotated[float, Field(gt=0, le=1)]


@config_dataclass
class ClassifierConfig:
    """How a classifier is trained and where it cuts.

    Attributes:
        scorer: what gives the scores: fastText, a linear model of embeddings, or a language model as judge, which
            learns nothing and is only measured.
        held_out_fraction: share of each pool that is measured on and not trained on, chosen by the hash of the text.
        balance: whether the larger pool is cut to the size of the smaller one for training.
        threshold: documents with at least this score are kept.
        keep_rate: instead, the share of the held-out negative pool that is kept: the rate on the raw web, where the
            negative pool is a sample of it.
        precision: instead, the share of positives that what is kept of the held-out documents has at least.
        seed: of the choice of held-out documents and of the order of the examples.
    """

    scorer: ScorerConfig = FastTextConfig()
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    balance: bool = True
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    keep_rate: Share | None = None
    precision: Share | None = None
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if self.keep_rate is not None and self.precision is not None:
            raise ConfigError(
                f"ClassifierConfig.keep_rate = {self.keep_rate} and precision = {self.precision}: the threshold can "
                "follow one of them; set the other to None",
                field="ClassifierConfig.keep_rate",
            )


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of a training.

    Attributes:
        texts: of the training examples, in their order.
        labels: whether each is positive.
        held_out: documents to measure on.
        held_out_labels: whether each is positive.
    """

    texts: list[str]
    labels: Bool[np.ndarray, " n"]
    held_out: list[Document]
    held_out_labels: Bool[np.ndarray, " m"]


def split_pools(config: ClassifierConfig, positive: Pool, negative: Pool) -> Split:
    """Divides pools into examples and held-out documents; every choice is by content, none by the order of reading."""
    train, held_out = [], []
    for pool in (positive, negative):
        ordered = sorted(pool.documents, key=lambda document: position(document.text, config.seed))
        count = max(1, round(config.held_out_fraction * len(ordered)))
        held_out.append(ordered[:count])
        train.append(ordered[count:])
    most = min(map(len, train)) if config.balance else max(map(len, train))
    examples = [
        (d.text, label) for documents, label in zip(train, (True, False), strict=True) for d in documents[:most]
    ]
    # fastText learns from one line after the other: the classes must alternate, and the positions have sorted them.
    examples.sort(key=lambda example: position(example[0], config.seed + 1))
    return Split(
        [text for text, _ in examples],
        np.array([label for _, label in examples], bool),
        [*held_out[0], *held_out[1]],
        np.array([True] * len(held_out[0]) + [False] * len(held_out[1]), bool),
    )


def train_classifier(config: ClassifierConfig, positive: Pool, negative: Pool, folder: Path) -> dict[str, Any]:
    """Trains, measures, chooses the threshold, and writes all into a folder, `classifier.json` last.

    Args:
        config: how.
        positive: documents to keep.
        negative: documents not to keep.
        folder: becomes what `load_classifier` reads.

    Returns:
        What `classifier.json` holds.

    Raises:
        InputError: fastText cannot train on these examples, or no threshold gives the precision that was asked for.
        EndpointError: a server fails.
    """
    split = split_pools(config, positive, negative)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [document.text for document in split.held_out]
    extra: dict[str, Any] = {}
    kind = next(name for name, cls in _KINDS.items() if isinstance(config.scorer, cls))
    if isinstance(config.scorer, FastTextConfig):
        trained = fasttext_classifier.train(config.scorer, split.texts, split.labels, folder)
        scores = trained.classifier(texts)
        extra["words"] = {
            name: [dataclasses.asdict(word) for word in words]
            for name, words in zip(("positive", "negative"), trained.words, strict=True)
        }
        if config.scorer.quantize:
            full = trained.full(texts)
            extra["before_quantization"] = _figures(full, split.held_out_labels) | {
                "largest_change_of_a_score": float(np.abs(full - scores).max())
            }
        model = next(folder.glob("model.*"))
        extra["model"] = {"file": model.name, "bytes": model.stat().st_size, "sha256": sha256(model)}
    elif isinstance(config.scorer, EmbeddingConfig):
        embed = Embedder(config.scorer, folder / CACHE_FILE)
        weights, bias = fit_logistic(embed(split.texts), split.labels, config.scorer.l2)
        linear = EmbeddingClassifier(embed, weights, bias)
        linear.save(folder)
        scores = linear(texts)
    else:
        scores = Judge(config.scorer, folder / CACHE_FILE)(texts)
    labels = split.held_out_labels
    curve = precision_recall(scores, labels)
    threshold = _threshold(config, curve, scores, labels)
    result = {
        "kind": kind,
        "config": config_to_dict(config) | {"scorer": _without_key(config_to_dict(config.scorer))},
        "threshold": threshold,
        "pools": {
            pool.name: {"documents": len(pool.documents), **pool.set_aside.to_json()} for pool in (positive, negative)
        },
        "examples": {"positive": int(split.labels.sum()), "negative": int((~split.labels).sum())},
        "held_out": {"positive": int(labels.sum()), "negative": int((~labels).sum())},
        **_figures(scores, labels),
        "at_threshold": _at(threshold, scores, labels),
        "curve": _curve(curve),
        "calibration": _calibration(scores, labels),
        "histogram": {
            name: np.histogram(scores[labels == value], bins=20, range=(0, 1))[0].tolist()
            for name, value in (("positive", True), ("negative", False))
        },
        "mistakes": _mistakes(split.held_out, scores, labels, threshold),
        **extra,
    }
    write_json(folder / CLASSIFIER_FILE, result)
    return result


def load_classifier(folder: str | Path) -> tuple[Scorer, float]:
    """Loads what `train_classifier` wrote: the scorer and its threshold.

    A server's key is not kept: the environment variable OPENAI_API_KEY is taken.

    Raises:
        InputError: the folder holds no classifier whose training has ended.
    """
    folder = Path(folder)
    about = read_classifier(folder)
    config = config_from_dict(_KINDS[about["kind"]], about["config"]["scorer"])
    key = os.environ.get("OPENAI_API_KEY", "")
    if isinstance(config, EmbeddingConfig):
        embed = Embedder(dataclasses.replace(config, api_key=key), folder / CACHE_FILE)
        return EmbeddingClassifier.load(folder, embed), about["threshold"]
    if isinstance(config, JudgeConfig):
        return Judge(dataclasses.replace(config, api_key=key), folder / CACHE_FILE), about["threshold"]
    return FastTextClassifier.load(folder), about["threshold"]


def read_classifier(folder: Path) -> dict[str, Any]:
    """What `classifier.json` says.

    Raises:
        InputError: there is none.
    """
    try:
        return json.loads((folder / CLASSIFIER_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds no classifier whose training has ended ({CLASSIFIER_FILE}: {error}): give the folder "
            "`classifier` in the workdir of `classify`"
        ) from error


def _threshold(
    config: ClassifierConfig, curve: PrecisionRecall, scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]
) -> float:
    if config.keep_rate is not None:
        return threshold_for_keep_rate(scores[~labels], config.keep_rate)
    if config.precision is not None:
        return threshold_for_precision(curve, config.precision)
    return config.threshold


def _figures(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]) -> dict[str, float]:
    found = calibration(scores, labels)
    return {
        "average_precision": precision_recall(scores, labels).average_precision,
        "roc_auc": roc_auc(scores, labels),
        "accuracy_at_0.5": float(((scores >= 0.5) == labels).mean()),
        "expected_calibration_error": found.expected_error,
        "brier": found.brier,
    }


def _at(threshold: float, scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]) -> dict[str, float | None]:
    kept = scores >= threshold
    return {
        "precision": float(labels[kept].mean()) if kept.any() else None,
        "recall": float(kept[labels].mean()),
        "keep_rate_of_negatives": float(kept[~labels].mean()),
    }


def _curve(curve: PrecisionRecall) -> dict[str, list[float]]:
    chosen = np.unique(np.linspace(0, len(curve.thresholds) - 1, _CURVE_POINTS).astype(int))
    return {field.name: getattr(curve, field.name)[chosen].tolist() for field in dataclasses.fields(curve)}


def _calibration(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]) -> dict[str, list[float]]:
    found = calibration(scores, labels)
    return {name: getattr(found, name).tolist() for name in ("mean_score", "positive_share", "count")}


def _mistakes(
    documents: Sequence[Document],
    scores: Float[np.ndarray, " n"],
    labels: Bool[np.ndarray, " n"],
    threshold: float,
) -> dict[str, list[dict[str, Any]]]:
    """The held-out documents that are farthest on the wrong side of the threshold."""
    found = {}
    for name, wrong, sign in (
        ("positive_but_dropped", labels & (scores < threshold), 1),
        ("negative_but_kept", ~labels & (scores >= threshold), -1),
    ):
        worst = sorted(np.flatnonzero(wrong).tolist(), key=lambda i: sign * scores[i])[:_MISTAKES]
        found[name] = [
            {"id": documents[i].id, "score": float(scores[i]), "text": documents[i].text[:600]} for i in worst
        ]
    return found


def _without_key(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"api_key": ""} if "api_key" in values else values
