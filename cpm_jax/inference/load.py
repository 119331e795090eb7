"""A model with its tokenizer, from wherever it lies: our checkpoints, a Hugging Face folder, a GGUF file."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

from jax.sharding import Mesh

from cpm_jax.checkpoints.hf_config import eos_token_ids, read_config
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.manager import find_checkpoint, find_tokenizer, read_meta, restore_params
from cpm_jax.checkpoints.sources import CONFIG_FILE, check_tokenizer, open_source
from cpm_jax.common.config import InputError, config_from_dict
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.decoder import Params, abstract_params
from cpm_jax.modeling.int8 import WeightDType, quantize_layers
from cpm_jax.modeling.ternary import materialize

ComputeDType = Literal["", "float32", "bfloat16"]


class LoadedModel(NamedTuple):
    """What generation and evaluation need.

    Attributes:
        config: the model; one that was trained ternary is an ordinary one here.
        params: its parameters; of such a model the rounded values.
        tokenizer: the tokenizer that it was trained with.
        step: training step of the checkpoint; 0 of weights from elsewhere.
        path: the checkpoint, folder or file that was read.
        eos_ids: tokens that end a text by what the weights were published with; the tokenizer names one of its own.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    step: int
    path: Path
    eos_ids: tuple[int, ...] = ()


def load_model(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: ComputeDType = "",
    mesh: Mesh | None = None,
    sparse_config: SparseConfig | None = None,
    weight_dtype: WeightDType = "",
) -> LoadedModel:
    """Loads a model.

    Args:
        path: a workdir or a checkpoints directory (the newest checkpoint that is whole is taken), one checkpoint or an
            averaged one, a Hugging Face folder, or a .gguf file.
        tokenizer: a tokenizer.json or its folder; None takes the one that lies with the model.
        dtype: what to compute in; "" is what the checkpoint says, float32 for weights from elsewhere.
        mesh: how the parameters are to lie, from `common.sharding.make_mesh`; None is one device.
        sparse_config: sparse attention to use with these weights; None is what the checkpoint says.
        weight_dtype: "int8" rounds the kernels of the layers to int8; "" leaves them.

    Raises:
        ConfigError: the mesh does not divide the parameters, or `sparse_config` or `weight_dtype` does not fit the
            model.
        CheckpointError: there is no checkpoint, none is whole, or no tokenizer was found with it.
        SourceError: weights from elsewhere that cannot be read or held.
        DataError: the tokenizer cannot be read.
        InputError: the tokenizer does not fit the model.
    """
    path = Path(path)
    foreign = path.suffix == ".gguf" or (path / CONFIG_FILE).is_file()
    loaded = (_load_foreign if foreign else _load_own)(path, tokenizer, dtype, mesh)
    if sparse_config is not None:
        loaded = loaded._replace(config=dataclasses.replace(loaded.config, sparse_config=sparse_config))
    if weight_dtype == "int8":
        loaded = loaded._replace(params=quantize_layers(loaded.config, loaded.params))
    return loaded


def _load_own(path: Path, tokenizer: str | Path | None, dtype: ComputeDType, mesh: Mesh | None) -> LoadedModel:
    step_dir = find_checkpoint(path)
    folder = tokenizer or find_tokenizer(step_dir)
    loaded = Tokenizer.load(folder)
    meta = read_meta(step_dir)
    config = config_from_dict(ModelConfig, meta["model"] | ({"dtype": dtype} if dtype else {}))
    params, _ = restore_params(step_dir, abstract_params(config, mesh) if mesh else None)
    trained_with = meta.get("fixed", {}).get("tokenizer_sha256", loaded.sha256)
    if trained_with != loaded.sha256:
        raise InputError(
            f"the tokenizer {folder} is not the one that the model in {step_dir} was trained with: its sha256 is "
            f"{loaded.sha256}, not {trained_with}"
        )
    config, params = materialize(config, params)
    imported = meta.get("imported", {})
    eos_ids = eos_token_ids(imported.get("config", {}), imported.get("generation_config", {}))
    return LoadedModel(config, params, loaded, int(meta.get("step", 0)), step_dir, eos_ids)


def _load_foreign(path: Path, tokenizer: str | Path | None, dtype: ComputeDType, mesh: Mesh | None) -> LoadedModel:
    source = open_source(path)
    loaded = Tokenizer.load(tokenizer) if tokenizer else source.tokenizer()
    if loaded is None:
        raise InputError(f"{path} has no tokenizer with it: give the path of a tokenizer.json or of its folder")
    check_tokenizer(loaded, read_config(source.config).vocab_size, tokenizer or path)
    config, params = import_params(source, mesh, dtype or "float32")
    # A tokenizer that was given has ids of its own.
    eos_ids = () if tokenizer else eos_token_ids(source.config, source.generation_config)
    return LoadedModel(config, params, loaded, 0, path, eos_ids)
