"""The fastText classifier of Ultra-FineWeb: trained on lines of `text_normalization`, saved with its tokenizer."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import fasttext
import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from cpm_jax.common.config import ConfigError, InputError, config_dataclass
from cpm_jax.curation.text_normalization import TextNormalizer, fold
from cpm_jax.data.tokenizer import Tokenizer

POSITIVE, NEGATIVE = "__label__pos", "__label__neg"
_PREFIX = "__label__"
_TOKENIZER_CHARACTERS = 1 << 25  # to train a tokenizer on
_LEAST_ROWS = 256  # fastText quantises with codebooks of 256 centroids, and needs as many rows


@config_dataclass
class FastTextConfig:
    """How to train; the defaults are Ultra-FineWeb's (MiniCPM4 report §2.2), and fastText's where it names none.

    Attributes:
        dim: length of the vectors.
        lr: learning rate at the beginning; it falls to 0.
        word_ngrams: longest run of words that is a feature of its own.
        min_count: words seen less often are left out.
        epoch: passes over the examples.
        bucket: rows that n-grams share by hash; rows take 4 · dim bytes each.
        seed: of the initial vectors.
        num_threads: with more than one, the threads write over each other's updates: no two trainings are the same.
        tokenizer: a tokenizer.json or its folder; None trains one on the examples.
        vocab_size: of the tokenizer to train.
        quantize: whether the model is compressed (product quantisation, `.ftz`): some hundred times smaller.
        cutoff: rows that are kept when it is compressed, those of the largest norm, which are then trained again; 0
            keeps all.
    """

    dim: PositiveInt = 256
    lr: PositiveFloat = 0.1
    word_ngrams: PositiveInt = 3
    min_count: PositiveInt = 5
    epoch: PositiveInt = 3
    bucket: PositiveInt = 2_000_000
    seed: NonNegativeInt = 0
    num_threads: PositiveInt = 1
    tokenizer: str | None = None
    vocab_size: Annotated[int, Field(ge=300)] = 16_384
    quantize: bool = True
    cutoff: NonNegativeInt = 100_000

    def __post_init__(self) -> None:
        if 0 < self.cutoff < _LEAST_ROWS:
            raise ConfigError(
                f"FastTextConfig.cutoff = {self.cutoff}: must be 0, or at least {_LEAST_ROWS}", "FastTextConfig.cutoff"
            )


@dataclasses.dataclass(frozen=True)
class DecidingWord:
    """A word and what it does to a score.

    Attributes:
        word: as the classifier sees it.
        pull: what one occurrence says for "positive" (> 0) or against it: a document's log-odds are the mean of the
            pulls of its words and n-grams.
        count: occurrences in the training examples.
    """

    word: str
    pull: float
    count: int


class FastTextClassifier:
    """Scores texts by the probability of being positive."""

    def __init__(self, model: Any, normalizer: TextNormalizer):
        """Wraps a fastText model with the labels pos and neg."""
        self._model, self._normalizer = model, normalizer

    @classmethod
    def load(cls, folder: str | Path) -> "FastTextClassifier":
        """Loads what `train` wrote.

        Raises:
            InputError: the folder holds no such model.
        """
        folder = Path(folder)
        found = [path for path in (folder / "model.ftz", folder / "model.bin") if path.is_file()]
        if not found:
            raise InputError(f"{folder} holds no model.ftz and no model.bin: it is no fastText classifier")
        try:
            model = fasttext.load_model(str(found[0]))
        except ValueError as error:
            raise InputError(f"{found[0]} cannot be read as a fastText model: {error}") from error
        if sorted(model.labels) != [NEGATIVE, POSITIVE]:
            raise InputError(f"{found[0]} has the labels {model.labels}: expected {POSITIVE} and {NEGATIVE}")
        return cls(model, TextNormalizer(Tokenizer.load(folder / "tokenizer")))

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """The probability of each text; it does not depend on the other texts of the call."""
        return self.score_lines(self._normalizer(texts))

    def score_lines(self, lines: Sequence[str]) -> Float[np.ndarray, " n"]:
        """As a call, of texts that are normalised already."""
        if not lines:
            return np.zeros(0)
        labels, probabilities = self._model.predict([_without_labels(line) for line in lines])
        # As published: the probability of the label that is found, or one minus it. fastText adds 1e-5 to what it
        # takes the logarithm of, and so goes above 1.
        top = np.array([values[0] for values in probabilities], np.float64)
        positive = np.array([found[0] == POSITIVE for found in labels])
        return np.clip(np.where(positive, top, 1 - top), 0.0, 1.0)

    def deciding_words(self, count: int = 30) -> tuple[list[DecidingWord], list[DecidingWord]]:
        """The words that pull most, by pull times occurrences: for positive, and for negative.

        Raises:
            ValueError: the model is quantised; ask before.
        """
        output = dict(zip(self._model.labels, self._model.get_output_matrix(), strict=True))
        direction = output[POSITIVE] - output[NEGATIVE]
        words, counts = self._model.get_words(include_freq=True)
        pulls = np.array([self._model.get_input_vector(row) @ direction for row in range(len(words))])
        order = np.argsort(pulls * counts)
        chosen = [DecidingWord(words[i], float(pulls[i]), int(counts[i])) for i in order]
        return [w for w in chosen[::-1][:count] if w.pull > 0], [w for w in chosen[:count] if w.pull < 0]

    def save(self, folder: Path, name: str) -> None:
        """Writes the model as `folder/name`."""
        self._model.save_model(str(folder / name))


class Trained(NamedTuple):
    """What `train` gives.

    Attributes:
        classifier: as it will be loaded.
        full: the same before it was quantised.
        words: the words that decide, for positive and for negative.
    """

    classifier: FastTextClassifier
    full: FastTextClassifier
    words: tuple[list[DecidingWord], list[DecidingWord]]


def train(config: FastTextConfig, texts: Sequence[str], labels: Bool[np.ndarray, " n"], folder: Path) -> Trained:
    """Trains a classifier and writes it into a folder.

    Args:
        config: how.
        texts: the examples, in the order in which they are learnt: mix the classes.
        labels: whether each is positive.
        folder: gets `model.ftz` or `model.bin` and `tokenizer/`.

    Raises:
        InputError: no word occurs `min_count` times.
        DataError: the tokenizer cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    normalizer = TextNormalizer(_make_tokenizer(config, texts, folder / "tokenizer"))
    lines = normalizer(texts)
    with tempfile.TemporaryDirectory() as temporary:
        examples, full_path = Path(temporary) / "examples.txt", Path(temporary) / "model.bin"
        with examples.open("w", encoding="utf-8", newline="") as file:
            for line, positive in zip(lines, labels, strict=True):
                file.write(f"{POSITIVE if positive else NEGATIVE} {_without_labels(line)}\n")
        settings = {
            "lr": config.lr,
            "dim": config.dim,
            "minCount": config.min_count,
            "wordNgrams": config.word_ngrams,
            "bucket": config.bucket,
            "epoch": config.epoch,
            "seed": config.seed,
            "thread": config.num_threads,
            "verbose": 0,
        }
        try:
            model = fasttext.train_supervised(input=str(examples), **settings)
        except ValueError as error:
            raise InputError(f"fastText cannot train on {len(lines)} examples: {error}") from error
        if not set(model.words) - {"</s>"}:
            raise InputError(
                f"FastTextConfig.min_count = {config.min_count}: no word of the {len(lines)} examples occurs so often"
            )
        full = FastTextClassifier(model, normalizer)
        words = full.deciding_words()
        if not config.quantize:
            full.save(folder, "model.bin")
            return Trained(full, full, words)
        full.save(full_path.parent, full_path.name)
        small = fasttext.load_model(str(full_path))  # quantising changes a model in place
        rows = len(small.get_words()) + (config.bucket if config.word_ngrams > 1 else 0)
        cut = {"cutoff": config.cutoff, "retrain": True} if 0 < config.cutoff < rows else {}
        try:
            small.quantize(input=str(examples), thread=config.num_threads, verbose=-1, **cut)  # 0 counts as unset
        except ValueError as error:
            raise InputError(
                f"FastTextConfig.quantize = True: {rows} words and buckets cannot be quantised ({error}); set it to "
                "False, or give more examples"
            ) from error
        classifier = FastTextClassifier(small, normalizer)
        classifier.save(folder, "model.ftz")
    return Trained(classifier, full, words)


def _without_labels(line: str) -> str:
    """fastText takes words that begin like a label for one, in training and in prediction."""
    return line.replace(_PREFIX, "__ label__") if _PREFIX in line else line


def _make_tokenizer(config: FastTextConfig, texts: Sequence[str], folder: Path) -> Tokenizer:
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
    else:
        # It sees what it will be given: folded text, equally much of every example where there is too much.
        share = max(1, _TOKENIZER_CHARACTERS // max(1, len(texts)))
        tokenizer = Tokenizer.train((fold(text[:share]) for text in texts), config.vocab_size)
    tokenizer.save(folder)
    return tokenizer
