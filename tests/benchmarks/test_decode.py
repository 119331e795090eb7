import dataclasses
import sys

import jax
import pytest

from benchmarks import decode
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.decoder import init_params
from export.hf import export_hf


def test_measures_both_sides_on_the_same_tokens(monkeypatch, tmp_path, tiny_config):
    tokenizer = Tokenizer.train(["tokens do not matter here"], vocab_size=261)
    config = dataclasses.replace(
        tiny_config, vocab_size=tokenizer.vocab_size, tie_word_embeddings=False, initializer_range=0.3
    )
    export_hf(init_params(config, jax.random.key(0)), config, tokenizer, tmp_path / "model")
    monkeypatch.setattr(decode, "REPEATS", 1)
    monkeypatch.setattr(decode, "DECODE_LENGTHS", {1: [5], 2: [3, 7]})
    monkeypatch.setattr(decode, "PREFILL_LENGTH", 40)
    with decode.started(decode.commands(tmp_path / "model", None, None)) as workers:
        bench = decode.measure(workers, [index * 7 % 250 for index in range(200)], new_tokens=4)
    assert [row.unit for row in bench.rows] == ["tokens/s", "MiB", "tokens/s", "tokens/s", "MiB"]
    assert all(row.ours > 0 and row.baseline > 0 for row in bench.rows)


def test_sides_that_disagree_are_not_compared(monkeypatch):
    monkeypatch.setattr(decode, "ask", lambda tokens, request: {"tokens": tokens})
    with pytest.raises(ValueError, match="decode different tokens"):
        decode.take_turns({"ours": [[1, 2]], "other": [[1, 3]]}, [[1]], 2)


def test_a_side_that_ends_is_said(tmp_path):
    command = [sys.executable, "-c", "input()"]
    with decode.started({"ours": command}) as workers, pytest.raises(RuntimeError, match="has ended"):
        decode.ask(workers["ours"], {})
