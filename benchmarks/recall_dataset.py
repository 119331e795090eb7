"""The recall study at a larger scale: rows as datasets for the verb `pretrain`, and the accuracy of what it trained.

    python -m benchmarks.recall_dataset --write DIR --lengths 2048 8192 --rows 50000
    python -m benchmarks.recall_dataset --checkpoint WORKDIR --lengths 8192

The configuration is papers/minicpm4/recall.gin.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from array_record.python import array_record_module

from benchmarks.recall_data import RecallTask, Split, batch_key, long_task, make_batch, make_tokens
from cpm_jax.checkpoints.manager import restore_params
from cpm_jax.common.config import config_from_dict
from cpm_jax.common.files import sha256
from cpm_jax.data.manifest import Manifest, Shard
from cpm_jax.data.manifest import Split as SplitShards
from cpm_jax.data.records import PackedRecord, encode_record
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import bind


def write_dataset(folder: Path, task: RecallTask, num_rows: int, copies: float = 0.0, seed: int = 0) -> None:
    """Writes a dataset folder as `prepare` does, whose loss is on the answers: for the verb `pretrain`.

    Args:
        folder: what to write; its validation split has a fiftieth as many rows, 64 at least.
        task: what rows look like.
        num_rows: rows to train on.
        copies: share of the training rows that instead are documents of three tokens, x y x, of which the last is
            learned: what `RecallTask.copy_weight` does, as a next token.
        seed: of the rows.
    """
    words = task.vocabulary
    spelled = ["<s>", *(f"k{i}" for i in range(words.num_keys)), *(f"v{i}" for i in range(words.num_values))]
    spelled += [f"f{i}" for i in range(words.num_filler)]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(spelled)}, "<s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "<s>"})
    tokenizer.save(folder / "tokenizer")
    splits: dict[str, tuple[Split, int, float]] = {
        "train": ("train", num_rows, copies),
        "validation": ("validation", max(num_rows // 50, 64), 0.0),
    }
    manifest = Manifest(
        seq_len=task.seq_len,
        format="text",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=words.size,
        splits={name: _write_split(folder, name, task, *split, seed) for name, split in splits.items()},
        rejects={},
        duplicates=0,
        truncated=0,
        sources={"benchmarks.recall_data": num_rows},
        arguments={**dataclasses.asdict(task), "rows": num_rows, "copies": copies, "seed": seed},
    )
    manifest.save(folder)


def _write_split(
    folder: Path, name: str, task: RecallTask, split: Split, num_rows: int, copies: float, seed: int
) -> SplitShards:
    path = folder / f"{name}-00000-of-00001.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    chunk, place = 64, np.arange(task.seq_len + 1)
    copy = place % 3 == 2
    num_copies = num_documents = 0
    draw = jax.jit(functools.partial(make_tokens, task, chunk))
    for index in range(-(-num_rows // chunk)):
        tokens, answers = map(np.asarray, draw(batch_key(split, seed, index)))
        left = num_rows - chunk * index
        for number, (row, mask) in enumerate(zip(tokens[:left], answers[:left], strict=True), chunk * index):
            record = PackedRecord(row.astype(np.uint32), np.zeros(1, np.uint32), mask.astype(np.bool_))
            if num_copies < copies * (number + 1):  # spread evenly over the rows
                copied = np.where(copy, np.roll(record.tokens, 2), record.tokens)
                record = PackedRecord(copied, place[::3].astype(np.uint32), copy)
                num_copies += 1
            writer.write(encode_record(record))
            num_documents += len(record.document_starts)
    writer.close()
    num_tokens, size = num_rows * (task.seq_len + 1), path.stat().st_size
    shard = Shard(path.name, sha256(path), size, num_rows, num_tokens, num_documents, text_bytes=num_tokens)
    return SplitShards((shard,))


def evaluate_checkpoint(folder: Path, lengths: Sequence[int], rows: int) -> dict[int, float]:
    """The accuracy of a checkpoint of the `pretrain` verb by length, on rows like those of `write_dataset`."""
    params, meta = restore_params(folder)
    config, found = config_from_dict(ModelConfig, meta["model"]), {}
    for length in lengths:
        task = dataclasses.replace(long_task(length), num_pairs=long_task(length).pairs[1])

        @jax.jit
        def right(key: jax.Array, task: RecallTask = task) -> jax.Array:
            batch, model = make_batch(task, 1, key), bind(config, params)
            positions = jnp.arange(task.seq_len)[None]
            hidden = model(batch["tokens"], positions, jnp.ones_like(positions))
            guessed = jnp.argmax(model.logits(hidden), axis=-1) == batch["targets"]
            return jnp.sum(guessed * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])

        found[length] = float(np.mean([right(batch_key("test", 0, index)) for index in range(rows)]))
        print(
            f"{length} tokens, {task.pairs[1]} pairs: {100 * found[length]:.1f}% of the answers are right", flush=True
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Writes datasets, or evaluates a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, required=True, help="tokens of the rows")
    parser.add_argument("--write", type=Path, help="folder that gets a dataset for each length")
    parser.add_argument("--rows", type=int, default=50_000, help="rows to train on, of a dataset")
    parser.add_argument("--copies", type=float, default=0.0, help="share of them that teach to copy")
    parser.add_argument("--checkpoint", type=Path, help="workdir of a run")
    parser.add_argument("--test_rows", type=int, default=256, help="rows that a checkpoint is tested on")
    args = parser.parse_args(argv)
    if args.write:
        for length in args.lengths:
            write_dataset(args.write / str(length), long_task(length), args.rows, args.copies)
    if args.checkpoint:
        evaluate_checkpoint(args.checkpoint, args.lengths, args.test_rows)
    if not args.write and not args.checkpoint:
        parser.error("one of --write and --checkpoint is required")


if __name__ == "__main__":
    main()
