"""Our adapter beside lm-eval's own for Hugging Face models, on the same random weights and the same requests."""

import dataclasses
import logging
import re

import jax
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from cpm_jax.common.config import InputError
from cpm_jax.data.chat import CHATML
from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
from export.hf import export_hf


@pytest.fixture(scope="module")
def ours(random_model):
    return CpmJaxLM(random_model.config, random_model.params, random_model.tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def theirs(random_model):
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    folder = random_model.path / "hf"
    export_hf(random_model.params, random_model.config, random_model.tokenizer, folder)
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3)


def requests(kind, arguments, **fields):
    return [Instance(kind, {}, args, 0, metadata=("t", i, 1), **fields) for i, args in enumerate(arguments)]


PAIRS = [
    ("the quick brown", " fox"),
    ("the quick brown", " fox jumps over the lazy dog"),
    ("the quick brown ", "fox"),  # the space belongs to the continuation
    ("", "the dog"),
    ("", "<s>the dog"),  # spells out the BOS that would precede it
    ("<s>the quick", " fox"),
    ("日", "本 dog"),
    ("a" * 400, " fox"),  # longer than the model reads
    ("the lazy dog. " * 9, " over the lazy"),
    ("Question: x\nAnswer:", " A"),
    ("Question: x\nAnswer:", " B"),
]


def test_loglikelihoods_equal_those_of_lm_evals_own_adapter(ours, theirs):
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_continuations_are_seen_as_such(ours, theirs):
    contexts = ["the quick", "fox", "lazy dog.", "a", "Question:", "12"]
    pairs = [(context, chr(code)) for context in contexts for code in range(33, 127)]
    expected = [greedy for _, greedy in theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
    assert [greedy for _, greedy in ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)] == expected
    assert 0 < sum(expected) <= len(contexts)


@pytest.mark.parametrize("length", [1, 30, 191, 192, 193, 700])
def test_rolling_loglikelihoods_are_equal_at_any_length(ours, theirs, length):
    text = ("the quick brown fox, 日本. " * 200)[:length]
    given = requests("loglikelihood_rolling", [(text,)])
    expected = theirs.loglikelihood_rolling(given, disable_tqdm=True)
    assert ours.loglikelihood_rolling(given, disable_tqdm=True) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False},
        {"until": ["e", "o"], "max_gen_toks": 40, "do_sample": False},
        {"until": "a", "max_new_tokens": 8},
        {"until": [], "max_gen_toks": 100, "temperature": 0.0},  # the longest prompt loses its beginning
    ],
)
def test_greedy_texts_are_equal(ours, theirs, settings):
    # Not one that spells its BOS: lm-eval's adapter looks for that in the first prompt of a batch alone.
    prompts = ["the quick", "", "fox jumps over the lazy", "日本", "the lazy dog. " * 12]
    arguments = [(prompt, dict(settings)) for prompt in prompts if prompt or settings["until"] != "a"]
    expected = theirs.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert ours.generate_until(requests("generate_until", arguments), disable_tqdm=True) == expected
    assert any(expected)


TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi "},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "and?"},
]


def test_chat_prompts_are_equal(ours, theirs):
    assert ours.apply_chat_template(TURNS) == theirs.apply_chat_template(TURNS)
    opened = [*TURNS, {"role": "assistant", "content": "It is "}]
    assert ours.apply_chat_template(opened, add_generation_prompt=False) == theirs.apply_chat_template(
        opened, add_generation_prompt=False
    )
    assert ours.chat_template(True) == CHATML == theirs.chat_template(True)


def test_a_template_without_system_turns_gets_none(random_model, ours):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = type(random_model.tokenizer)(
        random_model.tokenizer._backend, random_model.tokenizer._settings | {"chat_template": refusing}
    )
    lm = CpmJaxLM(random_model.config, random_model.params, tokenizer)
    assert lm.apply_chat_template(TURNS) == ours.apply_chat_template(TURNS[1:])
    with pytest.raises(InputError, match="refused by the chat template"):
        lm.apply_chat_template([{"role": "user"}])


def test_chat_outputs_end_with_the_turn(random_model):
    lm = CpmJaxLM(random_model.config, random_model.params, random_model.tokenizer)
    lm.apply_chat_template(TURNS)
    assert lm._generation({"until": ["x", ""], "max_gen_toks": 9})[1] == ("x", "<|im_end|>")


def test_requests_that_do_not_fit_are_noted(random_model):
    lm = CpmJaxLM(random_model.config, random_model.params, random_model.tokenizer)
    lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert lm.truncated == {("t", PAIRS.index(("a" * 400, " fox")))}
    settings = {"max_gen_toks": 4, "do_sample": False}
    lm.generate_until(requests("generate_until", [("a", settings), ("a" * 189, settings)]), disable_tqdm=True)
    assert ("t", 1) in lm.truncated


def test_a_continuation_longer_than_the_context_is_read_in_windows(ours, random_model):
    """By lm-eval's rule for texts, where its own adapter gives up."""
    text = "the quick brown fox. " * 60
    (pair,) = ours.loglikelihood(requests("loglikelihood", [("", text)]), disable_tqdm=True)
    (rolling,) = ours.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    # Rolling texts begin with the BOS that the tokenizer adds, predicted from another.
    (bos,) = ours._scorer.score([([0 + random_model.tokenizer.bos_id], [random_model.tokenizer.bos_id])])
    assert pair[0] == pytest.approx(rolling - bos.log_likelihood, rel=0.02)
    assert ours.truncated == {("t", 7), ("t", 0)} or ("t", 0) in ours.truncated


def test_samples_depend_on_seed_item_and_number_alone(random_model):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.9}

    def texts(items, seed=0, batch_size=4):
        lm = CpmJaxLM(
            random_model.config, random_model.params, random_model.tokenizer, seed=seed, batch_size=batch_size
        )
        instances = [
            Instance("generate_until", {}, (f"fox {i}", dict(settings)), 0, metadata=("t", i, 2)) for i in items
        ]
        out = lm.generate_until([instance for instance in instances for _ in range(2)], disable_tqdm=True)
        return {i: out[2 * place : 2 * place + 2] for place, i in enumerate(items)}

    together = texts([0, 1, 2, 3, 4])
    assert together[0][0] != together[0][1]
    assert texts([3, 1], batch_size=3) == {3: together[3], 1: together[1]}
    assert texts([0], seed=1) != {0: together[0]}


def test_batches_of_any_size_use_the_same_programs(random_model, caplog):
    config = dataclasses.replace(random_model.config, rms_norm_eps=1.7e-5)  # no other test has compiled it
    lm = CpmJaxLM(config, random_model.params, random_model.tokenizer, batch_size=4)

    def compiled(number):
        arguments = [(f"fox {i}" * (1 + i % 4), {"max_gen_toks": 16, "do_sample": False}) for i in range(number)]
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
            lm.generate_until(requests("generate_until", arguments), disable_tqdm=True)
        messages = [record.getMessage() for record in caplog.records]
        names = [m.group(1) for m in map(re.compile(r"Compiling (?:jit\()?(\w+)").match, messages) if m]
        return names.count("extend"), names.count("_prefill")

    assert compiled(4)[0] == 1
    assert compiled(7) == (0, 0)
    assert compiled(1) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "generation settings 'num_beams': known are 'until'"),
        ({"max_gen_toks": 192}, "max_gen_toks = 192: must be from 1 to below .* = 192"),
        ({"max_gen_toks": 0}, "max_gen_toks = 0"),
    ],
)
def test_impossible_settings_are_named(ours, settings, message):
    with pytest.raises(InputError, match=message):
        ours.generate_until(requests("generate_until", [("a", settings)]), disable_tqdm=True)


def test_a_missing_lm_eval_names_the_extra():
    import subprocess
    import sys

    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from cpm_jax.common.config import InputError\n"
        "try:\n    import cpm_jax.evaluation.lm_eval_adapter\n"
        "except InputError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install -e '.[eval]'" in done.stdout


def test_the_adapter_does_not_import_torch():
    import subprocess
    import sys

    program = (
        "import sys; import cpm_jax.evaluation.lm_eval_adapter, cpm_jax.evaluation.harness_task\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
