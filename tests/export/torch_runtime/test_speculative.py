"""Speculative decoding by MTP layers: drafts are those of our MTP layers, and the text is that of plain decoding."""

import dataclasses

import numpy as np
import pytest
import torch

from export.hf import export_hf
from export.torch_runtime import cli
from export.torch_runtime.config import FolderError
from export.torch_runtime.generate import SamplingConfig, Speed, eager_step, generate, prefill, static_step
from export.torch_runtime.model import load_model
from tests.export.mtp_models import drafting_params, mtp_logits
from tests.export.small_models import small_tokenizer
from tests.export.torch_runtime.models import PLAIN, SPARSE, params_of, tokens_of

MTP_LAYERS, ROUNDS, LENGTH = 2, 20, 160
GREEDY = SamplingConfig(temperature=0)
# What attention is, and tokens of the prompt: one alone is shorter than what MTP layers read again in each round.
CASES = {"dense": (None, 1), "sparse": (SPARSE, 90)}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """The model's config and parameters, its folder, and a prompt."""
    sparse, length = CASES[request.param]
    config = dataclasses.replace(
        PLAIN, attention_bias=True, num_nextn_predict_layers=MTP_LAYERS, sparse_config=sparse, num_layers=1
    )
    params, folder = drafting_params(params_of(config), config), tmp_path_factory.mktemp("mtp") / "hf"
    export_hf(params, config, small_tokenizer(), folder, layout="mimo")
    return config, params, folder, tokens_of(length)[0].tolist()


@torch.inference_mode()
def rounds(model, prompt, make_step):
    """Of each round the known tokens, its drafts, and logits after the last known token and the drafts."""
    cache = model.init_cache(LENGTH)
    text = [*prompt, int(prefill(model, torch.tensor([prompt]), cache, chunk=37).argmax())]
    step, found = make_step(model, cache), []
    while len(found) < ROUNDS:
        drafts, logits = step(torch.tensor([text[-1:]]), torch.tensor([len(text) - 1]))
        found.append((list(text), drafts[0].tolist(), logits[0].numpy()))
        for token, draft in zip(logits[0].argmax(dim=-1).tolist(), [*drafts[0].tolist(), None], strict=True):
            text.append(token)
            if token != draft:
                break
    return found


@pytest.fixture(scope="module")
def drafted(case):
    """The rounds after a prompt."""
    *_, folder, prompt = case
    return rounds(load_model(folder, mtp=True), prompt, eager_step)


def test_each_round_is_ours(case, drafted):
    config, params, *_ = case
    rows = np.zeros((ROUNDS, LENGTH), np.int32)
    for row, (text, drafts, _) in zip(rows, drafted, strict=True):
        row[: len(text) + MTP_LAYERS] = text + drafts
    expected = np.asarray(mtp_logits(params, rows, config))
    for number, (text, drafts, logits) in enumerate(drafted):
        last = len(text) - 1
        np.testing.assert_allclose(logits, expected[0, number, last : last + MTP_LAYERS + 1], atol=1e-4, rtol=0)
        assert expected[1:, number, last - 1].argmax(axis=-1).tolist() == drafts
    # Every number of drafts was right at times: what was computed of wrong ones has been computed again.
    lengths = [len(text) for text, *_ in drafted]
    assert set(np.diff(lengths).tolist()) == set(range(1, MTP_LAYERS + 2))


def test_the_text_is_that_of_plain_decoding(case):
    _, _, folder, prompt = case
    new, plain, drafted = 60, Speed(), Speed()
    model = load_model(folder)
    model.config = dataclasses.replace(model.config, eos_token_ids=())
    expected = list(generate(model, prompt, new, GREEDY, speed=plain))
    assert (plain.steps, plain.acceptance_length) == (new - 1, 1.0)
    model = load_model(folder, mtp=True)
    model.config = dataclasses.replace(model.config, eos_token_ids=())
    assert list(generate(model, prompt, new, GREEDY, speed=drafted)) == expected
    assert drafted.new_tokens == new
    assert drafted.steps < 0.9 * new
    assert drafted.acceptance_length == pytest.approx(new / drafted.steps, rel=0.1)
    assert list(generate(model, prompt, 7, GREEDY)) == expected[:7]
    model.config = dataclasses.replace(model.config, eos_token_ids=(expected[10],))
    assert list(generate(model, prompt, new, GREEDY)) == expected[: expected.index(expected[10]) + 1]


def test_a_round_is_one_graph_that_serves_every_position(case, drafted):
    *_, folder, prompt = case
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def compiled(model, cache):
        return torch.compile(static_step(model, cache), fullgraph=True, backend=backend)

    torch.compiler.reset()
    found = rounds(load_model(folder, mtp=True), prompt, compiled)
    assert [round[:2] for round in found] == [round[:2] for round in drafted]
    for (*_, logits), (*_, expected) in zip(found, drafted, strict=True):
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert len(graphs) == 1


def test_draws_of_a_distribution_are_verified_too(case):
    """At the temperature of the draws, drafts are right about as often as the model is sure of them."""
    _, _, folder, prompt = case
    model = load_model(folder, mtp=True)
    model.config = dataclasses.replace(model.config, eos_token_ids=())
    lengths = []
    for temperature in (1e-6, 100.0):
        new, speed = 60, Speed()
        tokens = list(generate(model, prompt, new, SamplingConfig(temperature, top_p=1.0), speed=speed))
        assert len(tokens) == new
        lengths.append(speed.acceptance_length)
        if temperature < 1:
            assert tokens == list(generate(model, prompt, new, GREEDY))
    assert lengths[1] < 1.2 < lengths[0]


def test_the_command_says_how_many_drafts_were_right(case, capsys):
    _, _, folder, _ = case
    args = [str(folder), "--prompt", "def add(a, b):", "--temperature", "0", "--device", "cpu", "--max-new-tokens", "9"]
    assert cli.main(args) == 0
    plain = capsys.readouterr()
    assert cli.main([*args, "--speculative"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out
    assert " in a step)" in drafted.err
    assert " in a step)" not in plain.err


def test_a_folder_without_mtp_layers_is_named(tmp_path):
    export_hf(params_of(PLAIN), PLAIN, small_tokenizer(), tmp_path / "hf", layout="llama")
    with pytest.raises(FolderError, match="num_nextn_predict_layers = 0: there are no MTP layers to draft"):
        load_model(tmp_path / "hf", mtp=True)
