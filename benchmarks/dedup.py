"""Deduplication on planted duplicates in real documents: what is found and what wrongly, how fast, in how much memory.

    python -m benchmarks.dedup SOURCE [SOURCE ...] [--limit 2000]

A source is what `curate` reads. Near duplicates are copies of real documents with edits of several kinds; the truth
about every pair, planted or not, is the exact Jaccard similarity of their sets of 5-grams. Where datatrove is installed
(`pip install datatrove spacy`), its signatures are timed on the same English documents.
"""

import argparse
import collections
import itertools
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.results import Benchmark
from cpm_jax.curation import dedup
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.document import Document
from cpm_jax.curation.readers import Reading, plan_shards, read_shard
from cpm_jax.curation.words import hash_ngrams, hash_words, normal_words

CONFIG = DedupConfig()
SIMILAR = 0.7  # Jaccard similarity from which two documents count as near duplicates
MIN_WORDS = 50


def with_words_replaced(share: float) -> Callable[[str, random.Random], str]:
    """An edit that replaces some words by others of the same text."""

    def edit(text: str, draw: random.Random) -> str:
        words = text.split(" ")
        return " ".join(draw.choice(words) if draw.random() < share else word for word in words)

    return edit


def in_a_frame(text: str, draw: random.Random) -> str:
    """Another site's header and footer around the text, a tenth of its length together."""
    frame = " ".join(f"menu{draw.randrange(100_000)}" for _ in range(max(1, len(text.split()) // 20)))
    return f"{frame}\n\n{text}\n\n{frame[::-1]}"


def cut_short(text: str, draw: random.Random) -> str:
    """The first 85% of the text."""
    del draw
    return text[: int(0.85 * len(text))]


def in_other_layout(text: str, draw: random.Random) -> str:
    """Upper case, other line ends and other punctuation."""
    del draw
    return text.upper().replace(",", ";").replace("\n", "\r\n").replace(". ", " . ")


EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "other layout": in_other_layout,
    "1% of words replaced": with_words_replaced(0.01),
    "2% of words replaced": with_words_replaced(0.02),
    "5% of words replaced": with_words_replaced(0.05),
    "header and footer": in_a_frame,
    "last 15% cut": cut_short,
}


def shingles(text: str) -> set[int]:
    """Hashes of the 5-grams, all of them."""
    return set(hash_ngrams(hash_words(normal_words(text)), CONFIG.ngram).tolist())


def most_similar_earlier(sets: Sequence[set[int]]) -> list[float]:
    """Of each document the greatest exact similarity to one before it."""
    owners: dict[int, list[int]] = collections.defaultdict(list)
    best = []
    for number, own in enumerate(sets):
        shared = collections.Counter(itertools.chain.from_iterable(owners[shingle] for shingle in own))
        best.append(max((n / (len(own) + len(sets[other]) - n) for other, n in shared.items()), default=0.0))
        for shingle in own:
            owners[shingle].append(number)
    return best


def read(sources: Sequence[str], limit: int) -> list[Document]:
    """Real documents, each text once, of 50 words at least."""
    documents: dict[str, Document] = {}
    for source in sources:
        shards, _ = plan_shards([source])
        items = (item for shard in shards for item in read_shard(shard, Reading()) if isinstance(item, Document))
        for item in itertools.islice(items, limit):
            if len(normal_words(item.text)) >= MIN_WORDS:
                documents.setdefault(item.text, item)
    return list(documents.values())


def keys_of(documents: Sequence[Document]) -> np.ndarray:
    """Of all documents, as one shard."""
    return np.stack([dedup.document_keys(document, CONFIG) for document in documents], axis=1)


def _occurred_before(texts: Sequence[str]) -> np.ndarray:
    """Of each text whether it is equal to one before it."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(text, number) != number for number, text in enumerate(texts)])


def measure_documents(benchmark: Benchmark, originals: Sequence[Document]) -> None:
    """Recall by kind of copy, and precision over all that is dropped."""
    draw = random.Random(0)
    planted = [("exact", Document(document.text, f"exact {document.id}")) for document in originals]
    for kind, edit in EDITS.items():
        for document in draw.sample(originals, min(400, len(originals))):
            planted.append((kind, Document(edit(document.text, draw), f"{kind} {document.id}")))
    documents = [*originals, *(document for _, document in planted)]
    fates = dedup.find_duplicates([keys_of(documents)])
    # Similarity between planted copies counts, too: several may be of one original.
    similarity = most_similar_earlier([shingles(document.text) for document in documents])
    of_kind: dict[str, list[tuple[bool, float]]] = collections.defaultdict(list)
    for (kind, _), fate, similar in zip(planted, fates[len(originals) :], similarity[len(originals) :], strict=True):
        of_kind[kind].append((fate != dedup.KEPT, similar))
    for kind, found in of_kind.items():
        share = 100 * float(np.mean([gone for gone, _ in found]))
        name, expected = "all of them", 100.0
        if kind != "exact":
            similarities = np.array([similar for _, similar in found])
            name = "the formula, at the exact similarities"
            expected = 100 * float(np.mean(1 - (1 - similarities**CONFIG.rows) ** CONFIG.bands))
        metric = f"recall, {kind} ({len(found)} copies)"
        benchmark.add(metric, "%", share, larger_is_better=True, baseline_name=name, baseline=expected)
    occurred = _occurred_before([document.text for document in documents])
    right = 100 * float(np.mean(occurred[fates == dedup.EXACT]))
    benchmark.add("precision: exact duplicates whose very text occurred before", "%", right, larger_is_better=True)
    is_near, similar_to = fates == dedup.NEAR, np.array(similarity)
    for least in (SIMILAR, 0.5):
        right = 100 * float(np.mean(similar_to[is_near] >= least))
        benchmark.add(
            f"precision: near duplicates whose similarity to an earlier document is at least {least}",
            "%",
            right,
            larger_is_better=True,
        )
    recall = 100 * float(np.mean(is_near[(similar_to >= 0.8) & (fates != dedup.EXACT)]))
    benchmark.add("recall, all pairs of similarity 0.8 and more", "%", recall, larger_is_better=True)
    unlike = fates[similar_to < 0.3]
    wrong = 100 * float(np.mean(unlike != dedup.KEPT))
    benchmark.add("dropped though no earlier document is of similarity 0.3", "%", wrong, larger_is_better=False)


def as_a_paragraph(host: str, piece: str) -> str:
    """A document with a paragraph of another one."""
    return f"{host[:1000]} and so on\n\n{piece}\n\nThe end."


def within_a_paragraph(host: str, piece: str) -> str:
    """A document with the same words in the middle of a paragraph of its own."""
    own = " ".join(host.split())
    return f"{host[:1000]} and so on\n\n{own[:300]} {piece} {own[-300:]}\n\nThe end."


PASSAGES: dict[str, Callable[[str, str], str]] = {
    "paragraphs": as_a_paragraph,
    "a passage within another paragraph": within_a_paragraph,
}


def _without_duplicate_paragraphs(texts: Sequence[str], least: int) -> tuple[list[np.ndarray], list[str]]:
    """Which paragraphs of documents go, and what is left of these."""
    keys = [dedup.paragraph_keys(text, least)[None] for text in texts]
    counts = [np.array([found.shape[1]]) for found in keys]
    goes = dedup.find_duplicate_paragraphs(keys, counts, np.zeros(len(texts), np.uint8))
    return goes, [dedup.without_paragraphs(text, least, gone) for text, gone in zip(texts, goes, strict=True)]


def measure_paragraphs(benchmark: Benchmark, originals: Sequence[Document]) -> None:
    """Paragraphs of other documents, put into documents: as paragraphs of their own, and within others."""
    for kind, plant in PASSAGES.items():
        _measure_passages(benchmark, [document.text for document in originals], kind, plant)


def _measure_passages(benchmark: Benchmark, texts: list[str], kind: str, plant: Callable[[str, str], str]) -> None:
    least = CONFIG.min_paragraph or 1
    draw = random.Random(1)
    pieces = [text[begin:end] for text in texts for begin, end in dedup.paragraphs(text, least)]
    planted = {}
    for host in draw.sample(range(len(texts)), min(300, len(texts))):
        piece = draw.choice(pieces).upper()
        planted[len(texts)] = piece
        texts.append(plant(texts[host], piece))
    goes, removed = _without_duplicate_paragraphs(texts, least)
    found = 100 * float(np.mean([piece not in removed[number] for number, piece in planted.items()]))
    benchmark.add(f"recall, {kind} ({len(planted)} planted)", "%", found, larger_is_better=True)
    if plant is not as_a_paragraph:
        return
    seen: set[str] = set()
    right = wrong = 0
    for text, gone in zip(texts, goes, strict=True):
        for (begin, end), goes_away in zip(dedup.paragraphs(text, least), gone, strict=True):
            words = " ".join(normal_words(text[begin:end]))
            right += bool(goes_away) and words in seen
            wrong += bool(goes_away) and words not in seen
            seen.add(words)
    benchmark.add("precision, paragraphs", "%", 100 * right / (right + wrong), larger_is_better=True)


def measure_speed(benchmark: Benchmark, originals: Sequence[Document]) -> None:
    """Signatures per second, beside datatrove's where it is installed."""
    texts = [document.text for document in originals if document.text.isascii()]
    start = time.perf_counter()
    for text in texts:
        dedup.signature(text, CONFIG)
    ours = len(texts) / (time.perf_counter() - start)
    theirs = None
    try:
        from datatrove.pipeline.dedup import MinhashDedupSignature
    except ImportError:
        print("datatrove is not installed: its signatures are not timed")
    else:
        with tempfile.TemporaryDirectory() as folder:
            step = MinhashDedupSignature(folder)
            step.get_signature(step.get_shingles("load what is needed for the first document"))
            start = time.perf_counter()
            for text in texts:
                step.get_signature(step.get_shingles(text))
            theirs = len(texts) / (time.perf_counter() - start)
    benchmark.add(
        "signatures",
        "documents/s/core",
        ours,
        larger_is_better=True,
        baseline_name="datatrove, same numbers of bands and rows",
        baseline=theirs,
    )


def _peak_memory() -> float:
    """The most memory that this process held, in MiB; what `getrusage` says may be its parent's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def _decide(folder: str, shards: int, result: "multiprocessing.Queue[tuple[float, float]]") -> None:
    keys = [dedup.KeyFile(Path(folder) / f"{number}.npy") for number in range(shards)]
    before = _peak_memory()
    start = time.perf_counter()
    dedup.find_duplicates(keys)
    seconds = time.perf_counter() - start
    result.put((seconds, _peak_memory() - before))


def measure_memory(benchmark: Benchmark) -> None:
    """The one pass over all keys: random ones, of which a tenth is equal to another."""
    context = multiprocessing.get_context("spawn")
    for millions in (0.5, 2.0):
        per_shard, shards = 50_000, int(millions * 20)
        generator = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            for number in range(shards):
                keys = generator.integers(1, 1 << 63, (2 + CONFIG.bands, per_shard), np.uint64)
                keys[2:, : per_shard // 10] = keys[2:, -(per_shard // 10) :]
                np.save(Path(folder) / f"{number}.npy", keys)
            queue: multiprocessing.Queue[tuple[float, float]] = context.Queue()
            process = context.Process(target=_decide, args=(folder, shards, queue))
            process.start()
            seconds, memory = queue.get()
            process.join()
        name = f"{millions:g} million documents"
        benchmark.add(f"deciding about {name}", "s", seconds, larger_is_better=False)
        benchmark.add(f"memory for it, {name}", "MiB", memory, larger_is_better=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes results/dedup.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="what curate reads")
    parser.add_argument("--limit", type=int, default=2000, help="documents of each source")
    args = parser.parse_args(argv)
    originals = read(args.sources, args.limit)
    benchmark = Benchmark("dedup", "python -m benchmarks.dedup SOURCES, see docs/curate.md")
    benchmark.add("real documents", "", len(originals), larger_is_better=True)
    measure_documents(benchmark, originals)
    measure_paragraphs(benchmark, originals)
    measure_speed(benchmark, originals)
    measure_memory(benchmark)
    benchmark.write()


if __name__ == "__main__":
    main()
