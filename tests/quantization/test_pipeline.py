"""The whole of quantisation on a small model; statistics of inputs against hooks on transformers' own layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from cpm_jax.checkpoints.hf_config import LAYOUTS, write_config
from cpm_jax.checkpoints.hf_layouts import flatten, tensors, to_theirs
from cpm_jax.common.config import ConfigError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.quantization.calibration import calibration_sequences
from cpm_jax.quantization.config import QuantizationConfig, QuantizationError
from cpm_jax.quantization.layer import GROUPS, LINEARS, embed, linear_of, run_layer
from cpm_jax.quantization.pipeline import quantize_model
from cpm_jax.quantization.symmetric import dequantize

SETTINGS = QuantizationConfig(group_size=32, skip_initial_tokens=2)


def _transformers_model(config, params):
    """The same weights in `GraniteForCausalLM`, which has MiniCPM's multipliers."""
    layout = LAYOUTS["granite"]
    model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**write_config(config, layout))).eval()
    flat = flatten(params)
    state = {}
    for part in tensors(layout.names, config):
        values = [np.asarray(flat[path] if part.layer is None else flat[path][part.layer]) for path in part.paths]
        array = to_theirs(part, values, config) if values else np.zeros(part.shape, np.float32)
        state[part.name] = torch.from_numpy(np.array(array))
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def _hooked_inputs(model, tokens):
    """The inputs of every linear layer of every decoder layer, by our names."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        for name in LINEARS:
            module = layer.get_submodule(name.replace("/", "."))
            module.register_forward_hook(
                lambda _, inputs, __, place=(index, name): found.update({place: inputs[0].detach().numpy()})
            )
    with torch.no_grad():
        model(torch.from_numpy(np.array(tokens)).long())
    return found


@pytest.fixture(scope="module")
def quantized(config, params, tokens):
    return {
        name: quantize_model(params, config, settings, np.asarray(tokens), batch_size=2)
        for name, settings in {
            "gptq": SETTINGS,
            "rtn": dataclasses.replace(SETTINGS, method="rtn"),
        }.items()
    }


def test_statistics_are_of_the_inputs_of_each_layer(config, params, tokens):
    hooked = _hooked_inputs(_transformers_model(config, params), tokens)
    stream = embed(config, params["embed_tokens"]["embedding"], tokens)
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        stream, statistics = run_layer(config, layer, stream, groups=(0, 1, 2, 3), skip_initial_tokens=2)
        for group, names in enumerate(GROUPS):
            for name in names:
                valid = hooked[index, name][:, 2:].reshape(-1, statistics[group].hessian.shape[0])
                hessian = valid.T @ valid
                np.testing.assert_allclose(statistics[group].hessian, hessian, atol=1e-4 * np.abs(hessian).max())
                np.testing.assert_allclose(statistics[group].magnitudes, np.abs(valid).sum(0), rtol=1e-3)


def test_every_layer_is_calibrated_on_what_the_quantised_ones_before_it_give(config, params, quantized, tokens):
    """Inputs from the quantised model, in transformers, give the errors that the pipeline says."""
    model = quantized["gptq"]
    hooked = _hooked_inputs(_transformers_model(config, model.params), tokens)
    for index in range(config.num_layers):
        for name in LINEARS:
            valid = hooked[index, name][:, 2:].astype(np.float64)
            kernel = np.asarray(linear_of(params["layers"], name)["kernel"][index], np.float64)
            change = linear_of(model.params["layers"], name)["kernel"][index] - kernel
            share = np.sum((valid @ change) ** 2) / np.sum((valid @ kernel) ** 2)
            np.testing.assert_allclose(model.errors[name][index], share, rtol=1e-2)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_fake_quantised_weights_are_those_of_the_codes(method, config, params, quantized):
    model = quantized[method]
    for name, linear in model.linears.items():
        kernel = linear_of(model.params["layers"], name)["kernel"]
        np.testing.assert_array_equal(kernel, dequantize(*linear))
        assert linear.codes.dtype == np.int8
        assert linear.scales.shape == (config.num_layers, kernel.shape[1] // 32, kernel.shape[2])
    flat, given = flatten(model.params), flatten(params)
    for path in given.keys() - {f"layers/{name}/kernel" for name in LINEARS}:
        np.testing.assert_array_equal(flat[path], given[path])


def test_gptq_comes_closer_than_rounding(config, params, quantized, tokens, logits):
    float_logits = logits(config, params, tokens)
    errors = {
        name: float(jnp.mean((logits(config, quantized[name].params, tokens) - float_logits) ** 2))
        for name in ("gptq", "rtn")
    }
    assert errors["gptq"] < 0.8 * errors["rtn"]
    first = {name: quantized[name].errors for name in ("gptq", "rtn")}
    assert all(first["gptq"][name][0] < first["rtn"][name][0] for name in GROUPS[0])


def test_all_switches_together(config, params, tokens, logits):
    settings = dataclasses.replace(SETTINGS, smoothing=True, rotation=True, bits=8, smoothing_steps=4)
    model = quantize_model(params, config, settings, np.asarray(tokens), batch_size=5)
    assert not model.config.tie_word_embeddings
    assert set(model.exponents) == {names[0] for names in GROUPS}
    before, after = logits(config, params, tokens), logits(model.config, model.params, tokens)
    assert float(abs(after - before).max()) < 0.05 * float(abs(before).max())  # 8 bits: nearly the same model


def test_rounding_needs_no_data(config, params, quantized):
    model = quantize_model(params, config, dataclasses.replace(SETTINGS, method="rtn"))
    assert model.errors == {}
    for name in LINEARS:
        np.testing.assert_array_equal(model.linears[name].codes, quantized["rtn"].linears[name].codes)


def test_what_is_refused(config, params, tokens):
    tokens = np.asarray(tokens)
    with pytest.raises(QuantizationError, match="method = 'gptq' needs calibration sequences"):
        quantize_model(params, config, SETTINGS)
    with pytest.raises(QuantizationError, match="smoothing = True needs calibration sequences"):
        quantize_model(params, config, dataclasses.replace(SETTINGS, method="rtn", smoothing=True))
    with pytest.raises(QuantizationError, match=r"shape \(5, 2\).*more than skip_initial_tokens = 2"):
        quantize_model(params, config, SETTINGS, tokens[:, :2])
    with pytest.raises(ConfigError, match="does not divide the 96 inputs of self_attn/q_proj; choose 32, 16, -1"):
        quantize_model(params, config, dataclasses.replace(SETTINGS, group_size=64), tokens)
    broken = jax.tree.map(np.array, params)
    broken["layers"]["mlp"]["up_proj"]["kernel"][1, 3, 5] = np.nan
    with pytest.raises(QuantizationError, match="mlp/up_proj of layer 1: weights that are not finite"):
        quantize_model(broken, config, dataclasses.replace(SETTINGS, method="rtn"))


def test_calibration_sequences_are_drawn_from_all_texts():
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog\n"] * 20, 300)
    texts = [f"document {number}: the quick brown fox jumps over dog {number}. " * 3 for number in range(50)]
    drawn = calibration_sequences(texts, tokenizer, count=12, length=16, seed=1)
    assert drawn.shape == (12, 16)
    assert drawn.dtype == np.int32
    everything = []
    for text in texts:
        everything += [*tokenizer.encode(text), tokenizer.eos_id]
    size = 16 - int(tokenizer.add_bos)
    whole = {tuple(everything[start : start + size]) for start in range(0, len(everything) - size + 1, size)}
    assert all(tuple(row[16 - size :]) in whole for row in drawn.tolist())
    assert len({tuple(row) for row in drawn.tolist()}) == 12
    assert (drawn == calibration_sequences(texts, tokenizer, 12, 16, seed=1)).all()
    assert (drawn != calibration_sequences(texts, tokenizer, 12, 16, seed=2)).any()
    with pytest.raises(QuantizationError, match=r"have \d+ sequences of 16 tokens, and 100000 are wanted"):
        calibration_sequences(texts, tokenizer, 100_000, 16)
    with pytest.raises(QuantizationError, match="sequences of 1 tokens are BOS and nothing else"):
        calibration_sequences(texts, tokenizer, 12, 1)
