"""Tokenise+pack and read throughput beside Hugging Face `datasets`: same text, same tokenizer, same processes.

Both sides read one jsonl file, tokenise it with the same tokenizer.json, end each document with EOS, join all to one
stream and cut it into rows, with two processes, and write the rows to disk; then both read shuffled batches of rows
back as numpy arrays. Ours does more on the way (cleans, drops exact duplicates, hashes shards; batches carry positions,
segments and loss weights): that time is counted. Repeats are interleaved, so that a busy machine slows both; the table
has medians.
"""

import argparse
import collections
import json
import os
import statistics
import tempfile
import time
from collections.abc import Generator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import Benchmark
from cpm_jax.data.loader import make_loader
from cpm_jax.data.mixture import from_folders
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.data.sources import Document, read_documents
from cpm_jax.data.tokenizer import Tokenizer

PROCESSES = 2
BATCH_SIZE = 32


def write_text(source: str, megabytes: float, path: Path) -> int:
    """Writes documents of a source as jsonl, at most so many megabytes; returns the bytes of text."""
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for document in read_documents(source):
            if isinstance(document, Document):
                total += len(document.text.encode())
                if total > megabytes * 1e6:
                    break
                file.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
    return min(total, path.stat().st_size)


def prepare_ours(text: Path, tokenizer: Path, seq_len: int, folder: Path) -> Path:
    """Our tokenise+pack; returns the folder."""
    config = PrepareConfig(
        sources=str(text), seq_len=seq_len, tokenizer=str(tokenizer), validation_fraction=0.0, num_workers=PROCESSES
    )
    prepare(config, folder, progress=False)
    return folder


def prepare_theirs(text: Path, tokenizer: Path, seq_len: int, folder: Path) -> Any:
    """The same with `datasets`, as its language-modelling examples do it; returns the dataset of rows."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer)

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = fast(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [[fast.bos_token_id, *document, fast.eos_token_id] for document in ids]}

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        stream = [token for document in batch["input_ids"] for token in document]
        end = len(stream) // seq_len * seq_len
        return {"input_ids": [stream[place : place + seq_len] for place in range(0, end, seq_len)]}

    raw = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder))
    tokenised = raw.map(tokenise, batched=True, num_proc=PROCESSES, remove_columns=raw.column_names)
    return tokenised.map(pack, batched=True, num_proc=PROCESSES)


def read_ours(folder: Path, workers: int) -> Generator[np.ndarray, None, None]:
    """Shuffled batches of tokens by our loader, without end."""
    loader = make_loader(from_folders(str(folder)), BATCH_SIZE, seed=0, num_workers=workers)
    try:
        for batch in loader:
            yield batch["tokens"]
    finally:
        loader.close()


def read_theirs(rows: Any, workers: int) -> Generator[np.ndarray, None, None]:
    """Shuffled batches of tokens by `datasets`, with torch's loader where there are worker processes, without end."""
    import torch

    shuffled = rows.with_format("numpy").shuffle(seed=0)

    def collate(items: list[dict[str, Any]]) -> np.ndarray:
        return np.stack([item["input_ids"] for item in items])

    while True:
        if workers:
            yield from torch.utils.data.DataLoader(
                shuffled, batch_size=BATCH_SIZE, num_workers=workers, collate_fn=collate, drop_last=True
            )
        else:
            for batch in shuffled.iter(batch_size=BATCH_SIZE, drop_last_batch=True):
                yield np.stack(list(batch["input_ids"]))


def tokens_per_second(batches: Generator[np.ndarray, None, None], count: int) -> float:
    """Speed of so many batches after the first, with which processes and files are opened."""
    next(batches)
    begin = time.perf_counter()
    tokens = sum(batch.size for batch in islice(batches, count))
    seconds = time.perf_counter() - begin
    batches.close()
    return tokens / seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes `results/data_throughput.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib", help="what to read")
    parser.add_argument("--megabytes", type=float, default=12.0, help="of text")
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--batches", type=int, default=500, help=f"of {BATCH_SIZE} rows, to read")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # both sides are parallel by processes

    figures: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, tokenizer = folder / "text.jsonl", folder / "tokenizer"
        num_bytes = write_text(args.source, args.megabytes, text)
        documents = (item.text for item in read_documents(str(text)) if isinstance(item, Document))
        Tokenizer.train(documents, args.vocab_size).save(tokenizer)
        sides = (("ours", prepare_ours, read_ours), ("theirs", prepare_theirs, read_theirs))
        for repeat in range(args.repeats):
            prepared = {}
            for side, prepare_rows, _ in sides:
                begin = time.perf_counter()
                prepared[side] = prepare_rows(text, tokenizer, args.seq_len, folder / f"{side}{repeat}")
                seconds = time.perf_counter() - begin
                figures["tokenise+pack", "MB/s of text", side].append(num_bytes / seconds / 1e6)
            for workers in (0, PROCESSES):
                metric = f"read shuffled batches, {workers or 'no'} worker processes"
                for side, _, read in sides:
                    speed = tokens_per_second(read(prepared[side], workers), args.batches)
                    figures[metric, "tokens/s", side].append(speed)
            print(f"repeat {repeat + 1} of {args.repeats} done", flush=True)

    bench = Benchmark("data_throughput")
    for metric, unit, side in list(figures):
        if side == "ours":
            bench.add(
                metric,
                unit,
                statistics.median(figures[metric, unit, "ours"]),
                larger_is_better=True,
                baseline_name="Hugging Face datasets",
                baseline=statistics.median(figures[metric, unit, "theirs"]),
            )
    bench.write()


if __name__ == "__main__":
    main()
