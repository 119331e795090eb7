"""A model in memory with all that is known of it, from wherever it lies: what `convert` and `export` begin with.

`cpm_jax/inference/load.py` loads a model to run it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from cpm_jax.checkpoints.hf_config import eos_token_ids, notes, read_config, without_token_ids
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.manager import find_checkpoint, find_tokenizer, read_meta, restore_params
from cpm_jax.checkpoints.sources import CONFIG_FILE, SourceError, TensorSource, check_tokenizer, open_source
from cpm_jax.common import provenance
from cpm_jax.common.config import InputError, config_from_dict, config_to_dict
from cpm_jax.common.progress import Progress
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import PER_CHANNEL, PER_TENSOR, DType, ModelConfig, TernaryConfig
from cpm_jax.modeling.decoder import Params, abstract_params
from cpm_jax.modeling.ternary import materialize


@dataclass(frozen=True)
class Weights:
    """A model in memory.

    Attributes:
        model: what it is.
        params: its parameters.
        tokenizer: its tokenizer.
        imported: where it was imported from ("path"), in which type ("dtype", until it is trained on) and with which
            config.json ("config") and generation_config.json ("generation_config"); empty for a model that began here.
        facts: what its model card says.
        origin: what a manifest says of the source: its name, kind, step, tokens, commit and hashes.
        ternary: how a model was rounded that was trained ternary; `model` and `params` then are of the rounded values.
    """

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    imported: Mapping[str, Any]
    facts: Mapping[str, str]
    origin: Mapping[str, str | int]
    ternary: TernaryConfig | None = None

    @property
    def dtype(self) -> str:
        """The type that loses nothing: the one that the weights came in, or that they were trained in."""
        return self.imported.get("dtype") or self.model.param_dtype


def load_weights(
    path: Path,
    tokenizer: str = "",
    *,
    param_dtype: DType = "float32",
    dtype: DType = "float32",
    mesh: Mesh | None = None,
) -> Weights:
    """Reads a Hugging Face folder, a .gguf file, or a workdir, checkpoints folder or checkpoint of ours.

    Args:
        path: which.
        tokenizer: a tokenizer.json or its folder; "" takes the one that lies with the weights.
        param_dtype: type that the weights of others are kept in.
        dtype: type of activations and matrix products of a model of others.
        mesh: how the parameters lie on devices.

    Raises:
        InputError: it is nothing of the kind, cannot be read, or does not fit its tokenizer.
        ConfigError: the mesh does not fit.
    """
    if is_foreign(path):
        return _load_foreign(open_source(path), path, tokenizer, param_dtype, dtype, mesh)
    return _load_checkpoint(_find(path), tokenizer, mesh)


def is_foreign(path: Path) -> bool:
    """Whether a path holds weights of others: a file, or a folder with config.json, which no workdir has."""
    return path.is_file() or path.suffix == ".gguf" or (path / CONFIG_FILE).is_file()


def _find(path: Path) -> Path:
    try:
        return find_checkpoint(path)
    except InputError as error:
        raise SourceError(
            f"source = {str(path)!r} cannot be read: no Hugging Face folder (it has no {CONFIG_FILE}), no .gguf file, "
            f"and {error}"
        ) from error


def _load_foreign(
    source: TensorSource, path: Path, given: str, param_dtype: DType, dtype: DType, mesh: Mesh | None
) -> Weights:
    """Reads weights of others, onto the mesh, and says what of them is not computed here."""
    tokenizer = Tokenizer.load(given) if given else source.tokenizer()
    if tokenizer is None:
        raise SourceError(
            f"{path} has no tokenizer.json: give one with TOKENIZER (tokenizer.model and vocab.json are not read; "
            "transformers' AutoTokenizer saves them as tokenizer.json)"
        )
    model = read_config(source.config)
    eos_token_ids(source.config, source.generation_config)  # generation could not read others
    check_tokenizer(tokenizer, model.vocab_size, given or path)
    arrays = len(jax.tree.leaves(abstract_params(model)))
    with Progress("reading", arrays, enabled=jax.process_index() == 0) as progress:
        for note in notes(source.config):
            progress.write(note)
        model, params = import_params(source, mesh, param_dtype, on_param=progress.update)
    types = {source.dtype(name).name for name in source.names()}
    imported = {
        "path": str(path),
        "dtype": types.pop() if len(types) == 1 else "float32",
        "config": source.config,
        "generation_config": source.generation_config,
    }
    if given:  # the ids of special tokens are then its own
        imported = without_token_ids(imported)
    facts = {"Imported from": path.name, "Commit": provenance.git_revision() or "unknown"}
    model = dataclasses.replace(model, dtype=dtype)
    origin = {"name": path.name, "kind": "GGUF file" if path.suffix == ".gguf" else "Hugging Face folder"}
    return Weights(model, params, tokenizer, imported, facts, origin | _hashes(model, tokenizer))


def _load_checkpoint(checkpoint: Path, given: str, mesh: Mesh | None) -> Weights:
    """Reads a checkpoint of ours and the tokenizer that belongs to it."""
    meta = read_meta(checkpoint)
    model = config_from_dict(ModelConfig, meta["model"])
    tokenizer = Tokenizer.load(given or find_tokenizer(checkpoint))
    trained_with = meta.get("fixed", {}).get("tokenizer_sha256", tokenizer.sha256)
    if trained_with != tokenizer.sha256:
        raise InputError(
            f"the tokenizer (sha256 {tokenizer.sha256[:12]}…) is not the one that {checkpoint} was trained with "
            f"(sha256 {trained_with[:12]}…)"
        )
    params, _ = restore_params(checkpoint, abstract_params(model, mesh) if mesh else None)
    facts = {
        "Steps": f"{meta.get('step', 0):,}",
        "Tokens": f"{meta.get('tokens_seen', 0):,}",
        "Commit": meta.get("git_revision") or "unknown",
    }
    imported = meta.get("imported", {})
    if imported:
        facts = {"Imported from": Path(imported["path"]).name} | facts
    if model.ternary is not None:
        facts |= {"Weights": f"ternary, {describe_groups(model.ternary)}"}
    origin = checkpoint_origin(checkpoint, meta, model, tokenizer)
    plain, params = materialize(model, params)
    return Weights(plain, params, tokenizer, imported, facts, origin, model.ternary)


def describe_groups(ternary: TernaryConfig) -> str:
    """What shares a scale, in words."""
    names = {PER_TENSOR: "one scale for each matrix", PER_CHANNEL: "one scale for each output"}
    return names.get(ternary.group_size, f"one scale for {ternary.group_size} inputs of each output")


def checkpoint_origin(
    checkpoint: Path, meta: Mapping[str, Any], model: ModelConfig, tokenizer: Tokenizer
) -> dict[str, str | int]:
    """What a manifest says of a checkpoint of ours that was exported.

    Args:
        checkpoint: its folder, in one of checkpoints in a workdir.
        meta: what it says of itself.
        model: its model.
        tokenizer: its tokenizer.
    """
    return {
        "name": f"{checkpoint.resolve().parents[1].name}/{checkpoint.name}",
        "kind": "checkpoint",
        "step": meta.get("step", 0),
        "tokens_seen": meta.get("tokens_seen", 0),
        "commit": meta.get("git_revision") or "",
        **_hashes(model, tokenizer),
    }


def _hashes(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, str]:
    config = json.dumps(config_to_dict(model), sort_keys=True)
    return {"config_sha256": hashlib.sha256(config.encode()).hexdigest(), "tokenizer_sha256": tokenizer.sha256}
