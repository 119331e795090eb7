"""Text generation: streams, stop strings, ends, errors and checkpoints."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.checkpoints.averaging import write_average
from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer
from cpm_jax.common.config import ConfigError, InputError, config_to_dict
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference import generate
from cpm_jax.inference.decode_loop import NO_TOKEN
from cpm_jax.inference.generate import Completion, Generator, collect
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import ModelConfig, RopeConfig
from cpm_jax.modeling.decoder import Params, bind, init_params

GREEDY = SamplingConfig(temperature=0.0)
HOT = SamplingConfig(temperature=3.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog, über 日本語 🙂"] * 3, vocab_size=290)


@pytest.fixture
def config(tiny_config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """A random model with a tied head would repeat its last token for ever."""
    return dataclasses.replace(
        tiny_config, vocab_size=tokenizer.vocab_size, tie_word_embeddings=False, initializer_range=0.3
    )


@pytest.fixture
def params(config: ModelConfig) -> Params:
    return init_params(config, jax.random.key(0))


@pytest.fixture
def generator(config, params, tokenizer) -> Generator:
    return Generator(config, params, tokenizer, tokens_per_call=5, prefill_chunks=(16, 4))


def complete(generator: Generator, prompts: list[str], **options) -> list[Completion]:
    ids = [generator.tokenizer.encode_prompt(prompt) for prompt in prompts]
    return collect(generator.stream(ids, **{"sampling": HOT, "max_new_tokens": 40} | options))


PROMPTS = ["the quick", "a", "jumps over the lazy dog, and over the quick brown fox", "日本"]


def test_text_is_the_decoded_tokens(generator):
    for completion in complete(generator, PROMPTS):
        ids = [token for token in completion.token_ids if token != generator.tokenizer.eos_id]
        # A random model makes many broken characters.
        assert completion.text == generator.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_is_not_shown_before_it_is_complete(generator, monkeypatch):
    ids = generator.tokenizer.encode("x🙂é")
    pieces = run_scripted(generator, monkeypatch, ids, tokens_per_call=1)
    assert [piece.text for piece in pieces if piece.text] == ["x", "🙂", "é"]


def run_scripted(generator, monkeypatch, ids, *, tokens_per_call=3, **options):
    """What the host makes of given tokens, whatever the model says."""
    script = iter([*ids, *[NO_TOKEN] * 100])

    def extend(params, state, end_ids, *, num_tokens, config, sampling):
        new = [next(script) for _ in range(num_tokens)]
        ends = [place for place, token in enumerate(new) if token in np.asarray(end_ids)]
        if ends:
            new[ends[0] + 1 :] = [NO_TOKEN] * (num_tokens - ends[0] - 1)
        return state, np.array([new])

    monkeypatch.setattr(generate, "extend", extend)
    generator._tokens_per_call = tokens_per_call
    return list(generator.stream([[1, 2]], **{"max_new_tokens": len(ids)} | options))


@pytest.mark.parametrize("tokens_per_call", [1, 2, 3, 50])
class TestEnds:
    def test_a_stop_string_across_tokens_is_trimmed_exactly(self, generator, monkeypatch, tokens_per_call):
        ids = generator.tokenizer.encode("the fox. Then more") + [0] * 60
        (done,) = collect(
            run_scripted(generator, monkeypatch, ids, tokens_per_call=tokens_per_call, stop=["x. T", "never"])
        )
        assert (done.text, done.finish_reason) == ("the fo", "stop")
        assert generator.tokenizer.decode(done.token_ids).startswith("the fox. T")
        assert len(done.token_ids) < len(ids)

    def test_held_back_text_comes_out_at_the_end(self, generator, monkeypatch, tokens_per_call):
        ids = generator.tokenizer.encode("the EN")
        (done,) = collect(run_scripted(generator, monkeypatch, ids, tokens_per_call=tokens_per_call, stop=["END"]))
        assert (done.text, done.finish_reason) == ("the EN", "length")

    def test_eos(self, generator, monkeypatch, tokens_per_call):
        ids = [*generator.tokenizer.encode("the"), generator.tokenizer.eos_id, *generator.tokenizer.encode("dog")]
        ids += [0] * 50
        (done,) = collect(run_scripted(generator, monkeypatch, ids, tokens_per_call=tokens_per_call))
        assert (done.text, done.finish_reason) == ("the", "eos")
        assert done.token_ids[-1] == generator.tokenizer.eos_id

    def test_a_special_token_as_stop_string(self, generator, monkeypatch, tokens_per_call):
        ids = generator.tokenizer.encode("the<|im_end|>dog") + [0] * 50
        (done,) = collect(
            run_scripted(generator, monkeypatch, ids, tokens_per_call=tokens_per_call, stop=["<|im_end|>"])
        )
        assert (done.text, done.finish_reason) == ("the", "stop")

    def test_length(self, generator, monkeypatch, tokens_per_call):
        ids = generator.tokenizer.encode("the quick brown fox")
        (done,) = collect(run_scripted(generator, monkeypatch, ids, tokens_per_call=tokens_per_call))
        assert (done.text, done.finish_reason) == ("the quick brown fox", "length")


def test_a_stop_string_ends_its_own_row_only(generator):
    free = complete(generator, PROMPTS, sampling=HOT)
    stop = free[0].text[10:13]
    for before, after in zip(free, complete(generator, PROMPTS, sampling=HOT, stop=[stop]), strict=True):
        text, found, _ = before.text.partition(stop)
        assert after.text == text
        if found:
            assert after.finish_reason == "stop"
            assert before.token_ids[: len(after.token_ids)] == after.token_ids
        else:
            assert after == before


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.0, top_p=0.9)])
def test_batches_and_their_order_do_not_matter(generator, sampling):
    together = complete(generator, PROMPTS, sampling=sampling)
    alone = [complete(generator, [p], sampling=sampling, indices=[i])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone


def test_mtp_layers_change_nothing(config, tokenizer, generator):
    with_mtp = dataclasses.replace(config, num_nextn_predict_layers=1)
    params = init_params(with_mtp, jax.random.key(0))  # A parameter's value depends on its path alone.
    assert "mtp_layers" in params
    other = Generator(with_mtp, params, tokenizer, tokens_per_call=5, prefill_chunks=(16, 4))
    assert complete(other, PROMPTS) == complete(generator, PROMPTS)


def test_parameters_are_held_in_the_compute_dtype(config, params, tokenizer):
    half = dataclasses.replace(config, dtype="bfloat16")
    held = Generator(half, params, tokenizer)._params
    assert {leaf.dtype for leaf in held["layers"]["mlp"]["up_proj"]["kernel"]} == {jnp.dtype("bfloat16")}
    assert held["norm"]["scale"].dtype == "float32"


def test_an_int8_cache_takes_the_most_probable_tokens_up_to_near_ties(config, params, tokenizer):
    """Prompts of different lengths in one batch, with their outputs longer than a group of the cache's tokens."""
    int8 = Generator(config, params, tokenizer, cache_dtype="int8", tokens_per_call=5, prefill_chunks=(16, 4))
    together = complete(int8, PROMPTS, sampling=GREEDY)
    prompts = [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    rows = np.zeros((len(prompts), max(map(len, prompts)) + 40), np.int32)
    for row, prompt, completion in zip(rows, prompts, together, strict=True):
        row[: len(prompt) + len(completion.token_ids)] = [*prompt, *completion.token_ids]
    positions = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)

    @jax.jit
    def full_logits(params):
        model = bind(config, params)
        return model.logits(model(rows, positions, np.ones_like(rows)))

    logits = np.asarray(full_logits(params))
    for row, prompt, completion in zip(logits, prompts, together, strict=True):
        seen = row[len(prompt) - 1 :][: len(completion.token_ids)]
        lost = seen.max(1) - seen[np.arange(len(seen)), list(completion.token_ids)]
        # Random models leave tokens that are all but equally probable: 1 in 100 standard deviations is one.
        assert lost.max() < 0.01 * seen.std()
        assert (lost == 0).mean() > 0.9


def test_longrope_rows_of_both_kinds_in_one_batch(config, tokenizer):
    rope = RopeConfig(short_factor=(1.0,) * 8, long_factor=tuple(range(2, 10)), original_max_position_embeddings=64)
    config = dataclasses.replace(config, rope=rope)
    generator = Generator(config, init_params(config, jax.random.key(0)), tokenizer)
    prompts = [[5] * 3, [6] * 100, [7] * 24, [8] * 25]
    options = {"sampling": GREEDY, "max_new_tokens": 40}
    together = collect(generator.stream(prompts, **options))
    for index, prompt in enumerate(prompts):
        assert collect(generator.stream([prompt], indices=[index], **options)) == [together[index]]


class TestErrors:
    def test_prompt_too_long(self, generator):
        with pytest.raises(ConfigError, match=r"prompt 1 has 230 tokens and max_new_tokens = 27.*= 256"):
            generator.stream([[1], [1] * 230], max_new_tokens=27)

    def test_the_longest_prompt_that_fits(self, generator):
        (done,) = collect(generator.stream([[7] * 230], max_new_tokens=26, sampling=HOT))
        assert done.finish_reason == "eos" or len(done.token_ids) == 26

    @pytest.mark.parametrize(
        ("prompts", "options", "error", "message"),
        [
            ([[1], []], {}, InputError, "prompt 1 is empty"),
            ([[1, 290]], {}, InputError, "prompt 0 has token ids from 1 to 290"),
            ([[-1]], {}, InputError, "prompt 0 has token ids from -1"),
            ([[1]], {"stop": [""]}, ConfigError, "stop string cannot be empty"),
            ([[1]], {"max_new_tokens": 0}, ConfigError, "max_new_tokens = 0"),
        ],
    )
    def test_bad_requests(self, generator, prompts, options, error, message):
        with pytest.raises(error, match=message):
            generator.stream(prompts, **{"max_new_tokens": 5} | options)

    def test_a_tokenizer_that_does_not_fit(self, tiny_config, tokenizer):
        with pytest.raises(InputError, match="the tokenizer has 290 tokens and the model's vocab_size is 128"):
            Generator(tiny_config, init_params(tiny_config, jax.random.key(0)), tokenizer)


@pytest.fixture
def workdir(tmp_path, config, params, tokenizer):
    """A run of two steps, as `pretrain` leaves it."""
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig(every=1)) as checkpointer:
        for step in (1, 2):
            state = {"step": jax.numpy.int32(step), "params": params}
            meta = {"model": config_to_dict(config), "fixed": {"tokenizer_sha256": tokenizer.sha256}}
            checkpointer.save(step, state, meta)
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path


class TestFromCheckpoint:
    def test_workdir_checkpoints_step_and_average(self, workdir, generator):
        expected = complete(generator, PROMPTS)
        averaged = write_average(workdir, workdir / "averaged", last=2)
        for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "1", averaged, averaged.parent):
            assert complete(Generator.from_checkpoint(path), PROMPTS) == expected

    def test_any_end_that_was_published(self, config, params, tokenizer, generator, tmp_path):
        """generation_config.json goes before config.json, as in `transformers`; the tokenizer's own id ends always."""
        whole = complete(generator, ["the quick"])[0].token_ids
        ends = {token: whole.index(token) for token in whole[5:20]}
        first, second = sorted(ends, key=lambda token: ends[token])[:2]
        published = {
            "config": {"eos_token_id": first},
            "generation_config": {"eos_token_id": [tokenizer.eos_id, second]},
        }
        tokenizer.save(tmp_path / "tokenizer")
        for left_out, end in (({}, second), ({"generation_config"}, first), ({"generation_config", "config"}, None)):
            imported = {name: content for name, content in published.items() if name not in left_out}
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
            with Checkpointer(tmp_path / "checkpoints", CheckpointConfig(every=1)) as checkpointer:
                checkpointer.save(1, {"params": params}, {"model": config_to_dict(config), "imported": imported})
            completion = complete(Generator.from_checkpoint(tmp_path), ["the quick"])[0]
            assert completion.token_ids == (whole if end is None else whole[: ends[end] + 1])
            assert completion.finish_reason == ("length" if end is None else "eos")

    def test_another_tokenizer(self, workdir, tokenizer, tmp_path):
        (workdir / "tokenizer").rename(workdir / "elsewhere")
        with pytest.raises(InputError, match=r"has no tokenizer: looked for .*checkpoints/tokenizer and .*/tokenizer"):
            Generator.from_checkpoint(workdir)
        assert Generator.from_checkpoint(workdir, workdir / "elsewhere").tokenizer.vocab_size == tokenizer.vocab_size

    def test_a_tokenizer_of_the_right_size_that_the_model_was_not_trained_with(self, workdir, tmp_path):
        other = Tokenizer.train(["an altogether different text with other words and pieces"] * 3, vocab_size=290)
        other.save(tmp_path / "other")
        with pytest.raises(InputError, match=r"tokenizer .*other is not the one that the model in .* was trained with"):
            Generator.from_checkpoint(workdir, tmp_path / "other")
