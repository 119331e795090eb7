"""Folders that carry their own code: plain transformers loads them, and computes what our decoder does."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from cpm_jax.checkpoints.hf_config import LAYOUTS
from cpm_jax.common.config import ConfigError
from cpm_jax.modeling.config import RopeConfig
from export.hf import export_hf
from export.hf_check import check_hf, logits_of
from export.hf_code import code_of
from tests.checkpoints import published_decoders
from tests.checkpoints.published_folders import CONFIGS, V, write
from tests.export.small_models import (
    DYNAMIC,
    LLAMA3,
    LONGROPE,
    MUP,
    PLAIN,
    SPARSE,
    TEXTS,
    YARN,
    random_params,
    small_tokenizer,
)

LENGTH = 150
CASES = {
    "minicpm": ("minicpm", MUP | {"rope": LONGROPE}),
    "minicpm sparse": ("minicpm", MUP | {"rope": LONGROPE, "sparse_config": SPARSE}),
    "minicpm sparse, tied, biases": (
        "minicpm",
        {
            "sparse_config": dataclasses.replace(
                SPARSE, variant="paper", use_nope=True, lse_approximation=False, kernel_size=10, dense_len=-1
            ),
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
    ),
    "internlm2": ("internlm2", {"attention_bias": True, "rope": DYNAMIC}),
    "mimo": ("mimo", {"attention_bias": True, "num_nextn_predict_layers": 1, "head_dim": 24, "rope": YARN}),
    "mimo llama3": ("mimo", {"attention_bias": True, "num_kv_heads": 4, "rope": LLAMA3}),
    "mimo linear": ("mimo", {"attention_bias": True, "rope": RopeConfig(scaling="linear", factor=2.5)}),
}
IDS = np.random.default_rng(3).integers(0, PLAIN.vocab_size, LENGTH).tolist()


def load(folder, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Gives the model, the parameters, the folder of a case, and what transformers loads of it."""

    @functools.cache
    def export(case):
        layout, changes = CASES[case]
        config = dataclasses.replace(PLAIN, **changes)
        params, folder = random_params(config), tmp_path_factory.mktemp("code") / layout
        export_hf(params, config, small_tokenizer(), folder, layout=layout)
        return config, params, folder, load(folder)

    return export


def logits(model, rows, mask=None):
    with torch.no_grad():
        return model(torch.tensor(rows), attention_mask=mask).logits.numpy()


def generate(model, rows, count, mask=None):
    rows = torch.tensor(rows)
    mask = torch.ones_like(rows) if mask is None else mask
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(rows, attention_mask=mask, **options)[:, rows.shape[1] :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_decoder_does(case, exported):
    config, params, _, model = exported(case)
    assert type(model).__name__ == LAYOUTS[CASES[case][0]].architecture
    ours, theirs = logits_of(config, params, IDS), logits(model, [IDS])[0]
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * np.abs(ours).max())


@pytest.mark.parametrize("case", [case for case in CASES if "linear" not in case])
def test_cached_tokens_are_those_of_whole_rows(case, exported):
    """Between the lengths, 48 and 64, at which frequencies change or attention becomes sparse."""
    config, _, _, model = exported(case)
    ids = IDS[:20] if config.rope.scaling == "dynamic" else IDS[:100]
    for token in generate(model, [ids], 20)[0]:
        assert token == logits(model, [ids])[0, -1].argmax()
        ids = [*ids, token]


@pytest.mark.parametrize("case", ["minicpm sparse, tied, biases", "internlm2", "mimo"])
def test_padded_rows_are_computed_as_they_are_alone(case, exported):
    config, _, _, model = exported(case)
    short = IDS[50:]
    rows, mask = [IDS, [0] * 50 + short], torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :50] = 0
    both = logits(model, rows, mask)
    np.testing.assert_allclose(both[0], logits(model, [IDS])[0], rtol=0, atol=1e-4 * np.abs(both).max())
    if config.rope.scaling == "dynamic":  # the frequencies of a batch are those of its longest row
        return
    np.testing.assert_allclose(both[1, 50:], logits(model, [short])[0], rtol=0, atol=1e-4 * np.abs(both).max())
    assert generate(model, rows, 6, mask)[1] == generate(model, [short], 6)[0]


@pytest.mark.parametrize("length", [40, 64, 65, 128])
@pytest.mark.parametrize("layout", ["minicpm", "internlm2", "mimo"])
def test_it_computes_the_published_equations(layout, length, tmp_path):
    """Of weights that came in the layout, read in plain PyTorch by their own names."""
    write(tmp_path, CONFIGS[layout])
    content = json.loads((tmp_path / "config.json").read_text())
    name = LAYOUTS[layout].architecture.removesuffix("ForCausalLM")
    content["auto_map"] = {
        "AutoConfig": f"configuration_{layout}.{name}Config",
        "AutoModelForCausalLM": f"modeling_{layout}.{name}ForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True} | content))
    for file, text in code_of(LAYOUTS[layout]).items():
        (tmp_path / file).write_text(text)
    tokens = torch.tensor(np.random.default_rng(1).integers(0, V, length))
    options = (tokens.roll(-1),) if layout == "mimo" else ()
    expected = getattr(published_decoders, layout)(tmp_path, tokens, *options)
    expected = expected[0] if layout == "mimo" else expected
    np.testing.assert_allclose(logits(load(tmp_path), [tokens.tolist()])[0], expected, rtol=0, atol=3e-5)


def test_what_it_refuses(exported):
    _, _, _, model = exported("minicpm sparse")
    row = torch.tensor([IDS])
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(1, 3\): must be \(1, 150\)"):
        model(row, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="position_ids: must count the tokens"):
        model(row, position_ids=torch.arange(LENGTH)[None] + 1)
    gap = torch.ones_like(row)
    gap[0, 3] = 0
    with pytest.raises(ValueError, match="padded on the left only"):
        model(row, attention_mask=gap)
    with pytest.raises(ValueError, match="caches of fixed length are not supported"):
        model.generate(row, max_new_tokens=2, do_sample=False, cache_implementation="static")
    model.config.rope_parameters["rope_type"], before = "other", model.config.rope_parameters["rope_type"]
    try:
        with pytest.raises(ValueError, match="rope_type = 'other': this file computes default, linear"):
            model(row)
    finally:
        model.config.rope_parameters["rope_type"] = before


def test_transformers_trains_and_saves_it(exported, tmp_path):
    """The loss is that of the logits, and what transformers saves is loaded again as the same model."""
    _, _, folder, _ = exported("internlm2")
    model, row = load(folder), torch.tensor([IDS[:20]])
    out = model(row, labels=row)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], row[0, 1:])
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    np.testing.assert_array_equal(logits(again, [IDS[:20]]), out.logits.detach().numpy())


def test_the_check_runs_no_code_but_ours(exported, tmp_path):
    config, params, folder, _ = exported("mimo")
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    check = check_hf(changed, params, config, small_tokenizer(), TEXTS[:1], greedy_tokens=4, max_tokens=16)
    assert (check.architecture, check.greedy_tokens) == ("MiMoForCausalLM", 4)
    card = (changed / "README.md").read_text()
    assert "trust_remote_code=True)  # MiMoForCausalLM" in card
    content = json.loads((changed / "config.json").read_text())
    elsewhere = content["auto_map"] | {"AutoModelForCausalLM": "other.Model"}
    (changed / "config.json").write_text(json.dumps(content | {"auto_map": elsewhere}))
    with pytest.raises(ConfigError, match=r"auto_map in config.json names other code than this version writes"):
        check_hf(changed, params, config, small_tokenizer(), TEXTS[:1])
    with (changed / "modeling_mimo.py").open("a") as file:
        file.write("raise SystemExit('run')\n")
    with pytest.raises(ConfigError, match=r"modeling_mimo.py is not what this version writes, and code of others"):
        check_hf(changed, params, config, small_tokenizer(), TEXTS[:1])
    (changed / "modeling_mimo.py").unlink()
    with pytest.raises(ConfigError, match=r"no class MiMoForCausalLM, and the folder has no modeling_mimo.py"):
        check_hf(changed, params, config, small_tokenizer(), TEXTS[:1])
