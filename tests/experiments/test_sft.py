"""The verb `sft`: starts from the checkpoint, learns assistant turns only, refuses what does not fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer, restore_params
from cpm_jax.common.config import ConfigError, InputError, config_from_dict, config_to_dict
from cpm_jax.data.loader import make_loader
from cpm_jax.data.mixture import from_folders
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.loop import TrainConfig
from cpm_jax.training.schedules import cosine
from experiments import sft
from experiments.sft import SftConfig

SEQ_LEN = 64


def write_base(folder, model_vocab=None):
    """A workdir as a pre-training leaves it, with a random model."""
    tokenizer = Tokenizer.train([f"Number {i}. After {i}?" for i in range(200)], vocab_size=300)
    model = ModelConfig(
        vocab_size=model_vocab or tokenizer.vocab_size,
        num_layers=1,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        d_ff=64,
        max_position_embeddings=128,
        initializer_range=0.3,
        dtype="float32",
    )
    with Checkpointer(folder / "checkpoints", CheckpointConfig(every=1)) as checkpointer:
        state = {"step": jnp.int32(1), "params": decoder.init_params(model, jax.random.key(3))}
        fixed = {"tokenizer_sha256": tokenizer.sha256}
        checkpointer.save(1, state, {"model": config_to_dict(model), "fixed": fixed})
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with open(path, "w") as file:
        for i in range(40):
            turns = [{"role": "user", "content": f"After {i}?"}, {"role": "assistant", "content": f"{i + 1}."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def config(base, data, learning_rate=1e-30, **changes):
    values = {
        "init_from": str(base),
        "data": str(data),
        "seq_len": SEQ_LEN,
        "schedule": cosine(peak_lr=learning_rate, train_steps=2, warmup_steps=0),
        "train": TrainConfig(steps=2, batch_size=2, log_every=1, eval_every=0),
        "validation_fraction": 0.1,
    }
    return SftConfig(**values | changes)


@pytest.mark.slow
def test_starts_from_the_checkpoint_and_counts_assistant_tokens_only(base, conversations, tmp_path):
    run = config(base, conversations)
    sft.run(run, tmp_path)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    # With a learning rate of all but nothing, the parameters are those of the checkpoint still.
    before, meta = restore_params(base)
    after, _ = restore_params(tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), before, after)

    tokenizer = Tokenizer.load(base / "tokenizer")
    model = decoder.bind(config_from_dict(ModelConfig, meta["model"]), before)
    loader = make_loader(from_folders(str(tmp_path / "data")), 2, seed=run.train.seed)
    for step, batch in zip((1, 2), loader, strict=False):
        logits = np.asarray(model.logits(model(batch["tokens"], batch["positions"], batch["segment_ids"])), np.float64)
        log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_probs -= logits.max(-1, keepdims=True)
        nll = -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
        learned = batch["loss_weights"] == 1
        said = tokenizer.decode(batch["targets"][learned].tolist())
        assert "After" not in said
        assert all(turn.endswith(".") for turn in said.removesuffix("<|im_end|>").split("<|im_end|>"))
        line = next(line for line in metrics if line["step"] == step)
        assert line["loss"] == pytest.approx(nll[learned].mean(), rel=1e-5)


@pytest.mark.slow
def test_learns(base, conversations, tmp_path):
    run = config(
        base,
        conversations,
        schedule=cosine(peak_lr=3e-3, train_steps=30, warmup_steps=3),
        train=TrainConfig(steps=30, batch_size=4, log_every=1, eval_every=30, eval_batches=0),
    )
    sft.run(run, tmp_path)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    assert any("eval/loss" in line for line in metrics)


def test_model_and_tokenizer_are_those_of_the_checkpoint(base, conversations):
    model, tokenizer = sft.starting_model(config(base, conversations))
    assert model.d_model == 32
    assert model.remat == "none"
    assert tokenizer == base / "tokenizer"
    assert sft.starting_model(config(base, conversations, remat="full"))[0] == dataclasses.replace(model, remat="full")


def test_folders_prepared_before(base, conversations, tmp_path):
    def chats(name, tokenizer):
        settings = {"sources": str(conversations), "seq_len": SEQ_LEN, "tokenizer": str(tokenizer), "format": "chat"}
        prepare(PrepareConfig(**settings, num_workers=0), tmp_path / name, progress=False)
        return tmp_path / name

    ours = base / "tokenizer"
    fits = config(base, chats("fits", ours))
    assert sft.preparation_of(fits, ours) is None
    assert sft.mixture_of(fits, ours, tmp_path) == from_folders(str(tmp_path / "fits"))

    other = tmp_path / "other_tokenizer"
    Tokenizer.train(["something else entirely"], vocab_size=280).save(other)
    wrong = config(base, chats("wrong", other))
    with pytest.raises(InputError, match="was prepared with another tokenizer"):
        sft.mixture_of(wrong, ours, tmp_path)
    with pytest.raises(InputError, match="give dataset folders or conversations, not both"):
        sft.mixture_of(dataclasses.replace(fits, data=(fits.data, str(conversations))), ours, tmp_path)


def test_a_dataset_of_texts_is_refused(base, tmp_path):
    (tmp_path / "text.txt").write_text("words " * 500)
    settings = {"sources": str(tmp_path / "text.txt"), "seq_len": SEQ_LEN, "tokenizer": str(base / "tokenizer")}
    prepare(PrepareConfig(**settings, num_workers=0, validation_fraction=0.0), tmp_path / "set", progress=False)
    with pytest.raises(InputError, match=r"format 'text': prepare it with --gin\.FORMAT=chat"):
        sft.run(config(base, tmp_path / "set"), tmp_path / "out")


def test_what_does_not_fit_the_checkpoint(base, conversations, tmp_path):
    with pytest.raises(ConfigError, match=r"SftConfig.seq_len = 256: must be at most 128"):
        sft.run(config(base, conversations, seq_len=256), tmp_path)
    with pytest.raises(InputError, match="holds no checkpoint"):
        sft.run(config(tmp_path, conversations), tmp_path)
    small = write_base(tmp_path / "small", model_vocab=100)
    with pytest.raises(InputError, match=r"is not the one that the model of .* was trained with \(100 ids"):
        sft.run(config(small, conversations), tmp_path)
    swapped = write_base(tmp_path / "swapped")
    Tokenizer.train(["something else entirely"], vocab_size=280).save(swapped / "tokenizer")
    with pytest.raises(InputError, match="is not the one that the model of"):
        sft.run(config(swapped, conversations), tmp_path)
    (small / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="has no tokenizer"):
        sft.run(config(small, conversations), tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        sft.run(config(base, tmp_path / "missing.jsonl"), tmp_path / "out")
