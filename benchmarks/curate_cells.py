"""What `benchmarks.curate` measures, each in a process of its own: stages beside datatrove's, and whole runs."""

import dataclasses
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.classify import published
from cpm_jax.common.files import write_json
from cpm_jax.common.gin_utils import Settings
from cpm_jax.curation import dedup, language
from cpm_jax.curation.classifier import ClassifierConfig, load_classifier, train_classifier
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.document import Document, Filter, apply_filters
from cpm_jax.curation.fasttext_classifier import FastTextConfig
from cpm_jax.curation.pipeline import PipelineConfig, curate
from cpm_jax.curation.pools import Pool
from cpm_jax.curation.readers import Reading, plan_shards, read_shard
from cpm_jax.data.tokenizer import Tokenizer
from experiments import classify
from experiments.classify import ClassifyConfig
from experiments.curate import CurateConfig

BATCH = 256  # texts that are scored together, as the verb does it
SHARD_BYTES = 10_000_000  # of the inputs that are made
REPLACED = 0.3  # share of the words that differ between copies of a document
MAX_CHARACTERS = 50_000

Datatrove = Sequence[Any]  # steps, whose `run` takes and gives an iterable of datatrove's documents


def recipe() -> PipelineConfig:
    """The pipeline of `gin_configs/runs/curate.gin`, of which sources and workers are still to be set."""
    config: CurateConfig = Settings(["runs/curate.gin"], ["--gin.DATA=unset"], CurateConfig).build()
    return config.pipeline


def collect(sources: Sequence[str], limit: int, folder: Path) -> dict[str, Any]:
    """Writes the documents that all cells share: English for sure, an equal share of each source, each text once."""
    identify = language.LanguageId(keep=("en",))
    found: dict[str, dict[str, Any]] = {}
    for number, source in enumerate(sources):
        items = (item for shard in plan_shards([source])[0] for item in read_shard(shard, Reading()))
        documents = (item for item in items if isinstance(item, Document) and len(item.text) <= MAX_CHARACTERS)
        english = (document for document in documents if not identify(document).dropped)
        for document in itertools.islice(english, limit // len(sources)):
            found.setdefault(document.text, {"text": document.text, "id": f"{number}:{document.id}", "pool": number})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "documents.json", list(found.values()))
    return {"documents": len(found), "bytes": sum(len(text.encode()) for text in found)}


def documents_of(folder: Path) -> list[Document]:
    """What `collect` wrote."""
    rows = json.loads((folder / "documents.json").read_text("utf-8"))
    return [Document(row["text"], row["id"], metadata={"pool": row["pool"]}) for row in rows]


def timed(function: Callable[[list[Document]], Any], documents: list[Document]) -> tuple[Any, float]:
    """A result, and the seconds that it took after a first call, which loads what is needed."""
    function(documents[:1])
    begin = time.perf_counter()
    result = function(documents)
    return result, time.perf_counter() - begin


def side_by_side(
    documents: list[Document], ours: Callable[[list[Document]], Any], theirs: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """How many documents each gives back, in how many seconds."""
    about = {"documents": len(documents), "bytes": sum(len(document.text.encode()) for document in documents)}
    result, seconds = timed(ours, documents)
    found: dict[str, Any] = {"about": about, "ours": {"kept": len(result), "seconds": seconds}}
    for name, function in theirs.items():
        result, seconds = timed(function, documents)
        found[name] = {"kept": len(result), "seconds": seconds}
    return found


def through(steps: Datatrove, documents: Iterable[Document]) -> list[Any]:
    """datatrove's documents after its steps, as its executor runs them, without readers and writers."""
    from datatrove.data import Document as TheirDocument

    data: Iterable[Any] = (TheirDocument(text=document.text, id=document.id) for document in documents)
    for step in steps:
        data = step.run(data, 0, 1)
    return list(data)


def their_chain() -> Datatrove:
    """What datatrove has of our chain for English, with FineWeb's settings."""
    import fasttext
    from datatrove.pipeline import filters, formatters

    filters.LanguageFilter._requires_dependencies = []  # it asks for one distribution of fastText, by its name
    identify = filters.LanguageFilter()
    identify.model._model = fasttext.load_model(str(language.model_path()))  # its own would be downloaded
    return [
        formatters.FTFYFormatter(),
        identify,
        filters.GopherRepetitionFilter(),
        filters.GopherQualityFilter(),
        filters.C4QualityFilter(filter_no_terminal_punct=False),
        filters.FineWebQualityFilter(),
        formatters.PIIFormatter(),
    ]


def keep(documents: list[Document], filters: Sequence[Filter]) -> list[Document]:
    """What filters keep."""
    judged = (apply_filters(document, filters) for document in documents)
    return [document for document in judged if not document.dropped]


def chain(folder: Path) -> dict[str, Any]:
    """The filters of the recipe beside datatrove's, document by document."""
    filters, theirs = recipe().filters, their_chain()
    return side_by_side(
        documents_of(folder),
        lambda documents: keep(documents, filters),
        {"datatrove": lambda documents: through(theirs, documents)},
    )


def train(folder: Path) -> dict[str, Any]:
    """A classifier of the first source's documents against the others', of the paper's shape but for the buckets.

    It learns faster than the paper's, from thousands of times less text: else all scores would be 0.5.
    """
    positive, negative = (
        Pool(name, [d for d in documents_of(folder) if (d.metadata["pool"] == 0) == first])
        for name, first in (("positive", True), ("negative", False))
    )
    config = ClassifierConfig(scorer=FastTextConfig(bucket=200_000, lr=0.5, epoch=5))
    return {"examples": train_classifier(config, positive, negative, folder / "classifier")["examples"]}


class _Published:
    """A step of datatrove that does Ultra-FineWeb's preprocessing as it was published."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def run(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        for document in data:
            document.text = published([document.text], self._tokenizer)[0]
            yield document


def their_classifier(classifier: Path) -> Any:
    """datatrove's filter with our model, which keeps what the model calls positive."""
    import fasttext
    from datatrove.pipeline.filters import FastTextClassifierFilter

    FastTextClassifierFilter._requires_dependencies = []
    step = FastTextClassifierFilter("", keep_labels=("pos", 0.5))
    step._model = fasttext.load_model(str(next(classifier.glob("model.*"))))
    return step


def score(folder: Path) -> dict[str, Any]:
    """The classifier stage beside datatrove's filter: that alone, and after the preprocessing that the scores need."""
    classifier = folder / "classifier"
    scorer, threshold = load_classifier(classifier)
    step, prepare = their_classifier(classifier), _Published(Tokenizer.load(classifier / "tokenizer"))

    def ours(documents: list[Document]) -> list[Document]:
        kept = []
        for batch in (documents[i : i + BATCH] for i in range(0, len(documents), BATCH)):
            scores = scorer([document.text for document in batch]).tolist()
            kept += [document for document, value in zip(batch, scores, strict=True) if value >= threshold]
        return kept

    return side_by_side(
        documents_of(folder),
        ours,
        {
            "datatrove": lambda documents: through([step], documents),
            "datatrove, preprocessed": lambda documents: through([prepare, step], documents),
        },
    )


def near_duplicates(folder: Path) -> dict[str, Any]:
    """MinHash over documents of which a quarter has a copy: signatures, buckets, groups, and what is left of them."""
    documents = documents_of(folder)
    draw = np.random.default_rng(0)
    copies = [dataclasses.replace(d, id=f"copy {d.id}", text=vary(d.text, draw, 0.01)) for d in documents[::4]]
    config = DedupConfig()

    def ours(given: list[Document]) -> list[Document]:
        keys = np.stack([dedup.document_keys(document, config) for document in given], axis=1)
        fates = dedup.find_duplicates([keys])
        return [document for document, fate in zip(given, fates, strict=True) if fate == dedup.KEPT]

    return side_by_side([*documents, *copies], ours, {"datatrove": their_minhash})


def their_minhash(documents: list[Document]) -> list[Any]:
    """datatrove's four stages, whose defaults are the same numbers."""
    from datatrove.data import Document as TheirDocument
    from datatrove.pipeline import dedup as stages

    def given() -> Iterator[Any]:
        return (TheirDocument(text=document.text, id=document.id) for document in documents)

    with tempfile.TemporaryDirectory() as folder:
        signatures, pairs, removed = (f"{folder}/{name}" for name in ("signatures", "pairs", "removed"))
        stages.MinhashDedupSignature(signatures).run(given(), 0, 1)
        for bucket in range(stages.MinhashConfig().num_buckets):
            stages.MinhashDedupBuckets(signatures, pairs).run(None, bucket, stages.MinhashConfig().num_buckets)
        stages.MinhashDedupCluster(pairs, removed).run(None, 0, 1)
        return list(stages.MinhashDedupFilter(removed).run(given(), 0, 1))


def vary(text: str, draw: np.random.Generator, share: float) -> str:
    """A copy of a text with a share of its words replaced by others of the same text."""
    words = np.array(text.split(" "), dtype=object)
    chosen = np.flatnonzero(draw.random(len(words)) < share)
    words[chosen] = words[draw.integers(len(words), size=len(chosen))]
    return " ".join(words.tolist())


def make_input(folder: Path, gigabytes: float) -> Path:
    """Writes copies of the documents as .jsonl files until they have so many bytes, unlike enough to be no duplicates.

    With 30% of the words replaced in each, two copies share a few of their 5-grams and hardly any paragraph.
    """
    target = folder / f"input_{gigabytes:g}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    documents, draw = documents_of(folder), np.random.default_rng(1)
    written, numbers = 0, itertools.count()
    for shard in range(max(1, round(1e9 * gigabytes / SHARD_BYTES))):
        with open(target / f"{shard:05d}.jsonl", "wb") as file:
            while file.tell() < SHARD_BYTES and written + file.tell() < 1e9 * gigabytes:
                number = next(numbers)
                text = vary(documents[number % len(documents)].text, draw, REPLACED)
                file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False).encode() + b"\n")
            written += file.tell()
    return target


def pipeline(folder: Path, gigabytes: float, num_workers: int) -> dict[str, Any]:
    """`curate` with its recipe over an input that was made; its output is not kept."""
    source, output = make_input(folder, gigabytes), folder / f"output_{gigabytes:g}_{num_workers}"
    shutil.rmtree(output, ignore_errors=True)
    num_bytes = sum(path.stat().st_size for path in source.iterdir())
    config = dataclasses.replace(recipe(), sources=str(source), num_workers=num_workers)
    begin = time.perf_counter()
    manifest = curate(config, output, progress=False)
    seconds = time.perf_counter() - begin
    for made in (source, output):
        shutil.rmtree(made)
    read = manifest["documents"] + sum(manifest["drops"].values())
    return {"seconds": seconds, "documents": read, "kept": manifest["documents"], "bytes": num_bytes}


def score_in_pool(folder: Path, gigabytes: float, num_workers: int) -> dict[str, Any]:
    """`classify` scores an input that was made; its output is not kept."""
    source, output = make_input(folder, gigabytes), folder / f"scored_{num_workers}"
    shutil.rmtree(output, ignore_errors=True)
    num_bytes = sum(path.stat().st_size for path in source.iterdir())
    config = ClassifyConfig(
        mode="score", trained=str(folder / "classifier"), input=str(source), num_workers=num_workers
    )
    begin = time.perf_counter()
    summary = classify.score(config, output)
    seconds = time.perf_counter() - begin
    for made in (source, output):
        shutil.rmtree(made)
    return {
        "seconds": seconds,
        "documents": summary["documents"],
        "kept": summary["kept"],
        "bytes": num_bytes,
    }
