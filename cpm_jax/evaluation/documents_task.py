"""Bits per byte of a dataset folder, document by document, by the definition in `bits_per_byte.py`."""

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpm_jax.data.manifest import Manifest
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.bits_per_byte import document_bits, first_token_bits
from cpm_jax.evaluation.documents import Documents, read_split
from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.harness_task import Reject
from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
from cpm_jax.evaluation.results import Item, Measured

METRIC = "bits_per_byte"
_SHOWN = 500  # characters of a document that its item keeps
_DOCUMENTS_AT_ONCE = 64


@dataclasses.dataclass
class DocumentsTask:
    """The held-out documents of a dataset folder; has the same methods as `HarnessTask`.

    Attributes:
        name: name of the task.
        documents: of the split, as the folder's tokenizer has them.
        tokenizer: of the folder.
        window: tokens that the model reads at once: the length of the folder's records.
        data: where the documents are from, in a few words.
    """

    name: str
    documents: Documents
    tokenizer: Tokenizer
    window: int
    data: str
    main_metric: str = METRIC
    rejects: Sequence[Reject] = ()
    num_fewshot: int = 0

    def __post_init__(self) -> None:
        self._indices = range(len(self.documents))

    @classmethod
    def from_folder(cls, folder: Path) -> "DocumentsTask":
        """Reads the validation split.

        Raises:
            TaskError: the split is empty.
            DataError: there is none, or the folder holds conversations.
        """
        documents, manifest = read_split(folder, "validation"), Manifest.load(folder)
        if not len(documents):
            raise TaskError(f"dataset folder {folder} has no document in its validation split")
        data = f"{len(documents):,} held-out documents of {folder.name}"
        tokenizer = Tokenizer.load(folder / "tokenizer")
        return cls(folder.resolve().name, documents, tokenizer, manifest.seq_len, data)

    def higher_is_better(self, metric: str) -> bool:
        """Fewer bits are better."""
        del metric
        return False

    def build(self, lm: Any, *, limit: int = 0, **_: Any) -> None:
        """Chooses the first `limit` documents; 0 is all. There are no prompts to make."""
        del lm
        self._indices = range(min(limit or len(self.documents), len(self.documents)))

    def hashes(self) -> dict[int, tuple[str, str]]:
        """The hash of each chosen document, and what its item shows of it."""
        return {
            index: (_hash(self.documents.texts[index]), self.documents.texts[index][:_SHOWN]) for index in self._indices
        }

    def run(self, lm: CpmJaxLM, indices: Collection[int], *, batch_size: int) -> Iterator[list[Item]]:
        """Scores documents, yielding some as soon as they are known, the longest first.

        A model with another tokenizer than the folder's gets the texts in its own tokens, with its own BOS and EOS.
        """
        del batch_size  # rows are short: the scorer fills batches itself
        order = sorted(indices, key=lambda index: -len(self.documents.tokens[index]))
        sizes = self.documents.document_bytes
        for first in range(0, len(order), _DOCUMENTS_AT_ONCE):
            chosen = order[first : first + _DOCUMENTS_AT_ONCE]
            documents = Documents(
                [self._tokens(index, lm.tokens) for index in chosen],
                [self.documents.texts[index] for index in chosen],
                int(sizes[chosen].sum()),
            )
            config = lm.generator.config
            window = min(self.window, config.max_position_embeddings)
            bits = document_bits(lm.params, config, documents, window)
            bits += first_token_bits(documents, lm.tokens.bos_id, config.vocab_size)
            yield [self._item(index, float(bits[place]), int(sizes[index])) for place, index in enumerate(chosen)]

    def _tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        if tokenizer.sha256 == self.tokenizer.sha256:
            return self.documents.tokens[index]
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        return np.array(tokenizer.encode_prompt(self.documents.texts[index]) + end, np.uint32)

    def _item(self, index: int, bits: float, num_bytes: int) -> Item:
        text = self.documents.texts[index]
        return Item(
            index=index,
            doc_hash=_hash(text),
            prompt=text[:_SHOWN],
            choices=(),
            target="",
            responses=(bits,),
            metrics={METRIC: Measured(bits, num_bytes)},
        )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
