"""A model as two StableHLO programs, prefill and decode with a cache, that run with JAX alone on CPU, GPU and TPU.

`jax.export` writes them. Batch, length of the prompt and, in blocks, length of the cache stay symbolic; parameters are
arguments and lie beside the programs. `generate.py` in the folder runs them and shows how they are called.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float, Int

from cpm_jax.common.config import ConfigError, config_from_dict, config_to_dict
from cpm_jax.common.extras import import_extra
from cpm_jax.common.files import write_json
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import DType, ModelConfig
from cpm_jax.modeling.decoder import Params, abstract_params, bind
from cpm_jax.modeling.kv_cache import KEY_BLOCK, KVCache
from export.folders import WHERE_SPARSE, ExportError, on_host, whole_folder
from export.hf_check import logits_of
from export.manifest import Check

PLATFORMS = ("cpu", "cuda", "tpu")
MODEL_FILE, PARAMS_FILE, SCRIPT_FILE = "model.json", "params.safetensors", "generate.py"
PROGRAMS = {"prefill": "prefill.stablehlo", "decode": "decode.stablehlo"}
DTYPES = get_args(DType)  # those that our models compute in
TOLERANCE = 1e-4
FlatParams = dict[str, Array]


@dataclass(frozen=True)
class StableHLOExport:
    """What was written.

    Attributes:
        tensors: number of parameters' arrays.
        parameters: number of values in them.
        notes: what is not as in the model, in sentences.
    """

    tensors: int
    parameters: int
    notes: tuple[str, ...]


def exported_model(config: ModelConfig, dtype: DType) -> ModelConfig:
    """The model that the programs compute: dense, without MTP layers, parameters and activations of one type.

    Raises:
        ConfigError: the model is ternary.
    """
    config.refuse_ternary("a StableHLO program")
    return dataclasses.replace(
        config,
        dtype=dtype,
        param_dtype=dtype,
        fp8=False,
        remat="none",
        sparse_config=None,
        num_nextn_predict_layers=0,
    )


def cache_limit(config: ModelConfig) -> int:
    """The most slots of a cache, in whole blocks: beyond, rotary embeddings have other frequencies or the context ends.

    Less than a block is one of its own.
    """
    limit = min(config.max_position_embeddings, config.rope.switch_length or config.max_position_embeddings)
    return limit // KEY_BLOCK * KEY_BLOCK or limit


def make_programs(config: ModelConfig) -> dict[str, jax.export.Exported]:
    """Lowers prefill (2 tokens or more of each row) and decode (one) for all platforms.

    Both are called as (params, tokens [B, T], positions [B, T], keys [L, B, K, S, H], values [L, B, K, S, H]) and give
    (logits [B, T, V], keys, values). Position and slot are the same; S is a multiple of `KEY_BLOCK`, at most
    `cache_limit`, or that limit where it is less than a block.

    Args:
        config: from `exported_model`.
    """
    flat = flax.traverse_util.flatten_dict(abstract_params(config), sep=".")

    def step(
        params: FlatParams,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        keys: Float[Array, "L B K S H"],
        values: Float[Array, "L B K S H"],
    ) -> tuple[Float[Array, "B T V"], Float[Array, "L B K S H"], Float[Array, "L B K S H"]]:
        decoder = bind(config, flax.traverse_util.unflatten_dict(params, sep="."))
        hidden, cache = decoder.decode(tokens, positions, KVCache(keys, values))
        assert isinstance(cache, KVCache)
        return decoder.logits(hidden), cache.keys, cache.values

    limit = cache_limit(config)
    slots = f"{KEY_BLOCK}*n" if limit >= KEY_BLOCK else str(limit)
    bounds = (f"n <= {limit // KEY_BLOCK}",) if limit >= KEY_BLOCK else ()
    exported = {}
    for name, length in (("prefill", "t"), ("decode", "1")):
        scope = jax.export.SymbolicScope((*bounds, *(("t >= 2", f"t <= {slots}") if length == "t" else ())))
        shape = jax.export.symbolic_shape(f"b, {length}", scope=scope)
        heads = jax.export.symbolic_shape(
            f"{config.num_layers}, b, {config.num_kv_heads}, {slots}, {config.head_size}", scope=scope
        )
        tokens, cache = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(heads, config.dtype)
        program = jax.jit(step, donate_argnums=(3, 4))
        exported[name] = jax.export.export(program, platforms=PLATFORMS)(flat, tokens, tokens, cache, cache)
    return exported


def export_stablehlo(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: str = "float32",
    eos_token_ids: Sequence[int] = (),
) -> StableHLOExport:
    """Writes a folder with both programs, the parameters, the tokenizer and a script that runs them.

    Args:
        params: of the model.
        config: the model.
        tokenizer: its tokenizer.
        folder: a new folder, or an earlier export.
        dtype: of parameters, activations and cache; logits are float32.
        eos_token_ids: tokens that end a text; those of the tokenizer where there are none.

    Raises:
        ConfigError: the type is none of `DTYPES`, or the folder holds something else.
        ExportError: the package flatbuffers, by which JAX writes programs, is not installed.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: accepted are {', '.join(DTYPES)}", field="dtype")
    import_extra("flatbuffers", "export", ExportError)
    model = exported_model(config, cast(DType, dtype))
    names = flax.traverse_util.flatten_dict(abstract_params(model), sep=".")
    given = flax.traverse_util.flatten_dict(params, sep=".")
    arrays = {name: np.ascontiguousarray(on_host(given[name], None).astype(jnp.dtype(dtype))) for name in names}
    ends = list(eos_token_ids) or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    with whole_folder(folder) as partial:
        for name, program in make_programs(model).items():
            (partial / PROGRAMS[name]).write_bytes(program.serialize())
        safetensors.numpy.save_file(arrays, partial / PARAMS_FILE)
        tokenizer.save(partial)
        about = {
            "eos_token_ids": ends,
            "bos_token_id": tokenizer.bos_id if tokenizer.add_bos else None,
            "cache": {
                "layers": model.num_layers,
                "kv_heads": model.num_kv_heads,
                "head_dim": model.head_size,
                "dtype": dtype,
                "block": min(KEY_BLOCK, cache_limit(model)),
                "max_slots": cache_limit(model),
            },
            "model": config_to_dict(model),
        }
        write_json(partial / MODEL_FILE, about)
        shutil.copyfile(Path(__file__).with_name("stablehlo_generate.py"), partial / SCRIPT_FILE)
    return StableHLOExport(len(arrays), sum(array.size for array in arrays.values()), tuple(_notes(config, model)))


def _notes(config: ModelConfig, model: ModelConfig) -> list[str]:
    notes = []
    if config.num_nextn_predict_layers:
        notes.append("MTP layers are left out: the next token's probabilities do not depend on them")
    if config.sparse_config is not None:
        notes.append(
            "sparse attention (InfLLM v2) is left out: the programs attend densely, with the same weights; "
            f"{WHERE_SPARSE}"
        )
    if (limit := cache_limit(model)) < config.max_position_embeddings:
        notes.append(
            f"the cache has at most {limit:,} slots of the context's {config.max_position_embeddings:,}: it consists "
            f"of blocks of {KEY_BLOCK}, and beyond a switch of the rotary embedding other programs would be needed"
        )
    return notes


def is_stablehlo(folder: Path) -> bool:
    """Whether a folder holds such an export."""
    return (folder / PROGRAMS["decode"]).is_file()


def read_model(folder: Path) -> tuple[ModelConfig, Params]:
    """The model of an export and its parameters, as they are stored.

    Raises:
        ExportError: a file is missing or damaged.
    """
    try:
        about = json.loads((folder / MODEL_FILE).read_text("utf-8"))
        config = config_from_dict(ModelConfig, about["model"])
        # The framework "flax" has bfloat16, which numpy's own has not.
        with safetensors.safe_open(folder / PARAMS_FILE, framework="flax") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, ConfigError, safetensors.SafetensorError) as error:
        raise ExportError(f"{folder} cannot be read: {error}") from error
    params = flax.traverse_util.unflatten_dict(flat, sep=".")
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config))
    if jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) != expected:
        raise ExportError(f"{folder / PARAMS_FILE} has other names, shapes or types than {MODEL_FILE} says")
    return config, params


def check_read_back(folder: Path, params: Params, dtype: str) -> int:
    """Compares every stored value with the model's, after rounding to the type; returns their number.

    Raises:
        ExportError: one differs.
    """
    stored = flax.traverse_util.flatten_dict(read_model(folder)[1], sep=".")
    given = flax.traverse_util.flatten_dict(params, sep=".")
    for name, array in stored.items():
        if not np.array_equal(on_host(array, None), on_host(given[name], None).astype(jnp.dtype(dtype))):
            raise ExportError(f"{folder}: {name} is not what was written")
    return sum(array.size for array in stored.values())


class Programs:
    """The two programs of a folder, as anybody would call them."""

    def __init__(self, folder: Path):
        """Reads them.

        Raises:
            ExportError: a file is missing or damaged.
        """
        self.config, params = read_model(folder)
        self.params: Mapping[str, Array] = flax.traverse_util.flatten_dict(params, sep=".")
        self._calls = {}
        for name, file in PROGRAMS.items():
            try:
                program = jax.export.deserialize(bytearray((folder / file).read_bytes()))
            except Exception as error:  # flatbuffers raises whatever a damaged file leads to
                raise ExportError(f"{folder / file} cannot be read: {error}") from error
            self._calls[name] = jax.jit(program.call)

    def logits(self, ids: Sequence[int], prefill: int) -> np.ndarray:
        """Logits [T, V] of one row: its first tokens read at once, the others one by one."""
        block = min(KEY_BLOCK, cache_limit(self.config))
        slots = -(-len(ids) // block) * block
        shape = (self.config.num_layers, 1, self.config.num_kv_heads, slots, self.config.head_size)
        cache = (jnp.zeros(shape, self.config.dtype), jnp.zeros(shape, self.config.dtype))
        found = []
        for first, end in ((0, prefill), *((place, place + 1) for place in range(prefill, len(ids)))):
            if first == end:
                continue
            tokens = jnp.asarray([ids[first:end]], jnp.int32)
            positions = jnp.arange(first, end, dtype=jnp.int32)[None]
            call = self._calls["decode" if end - first == 1 else "prefill"]
            logits, *cache = call(dict(self.params), tokens, positions, *cache)
            found.append(np.asarray(logits[0]))
        return np.concatenate(found)


def compare_programs(folder: Path, rows: Sequence[Sequence[int]]) -> Check:
    """Compares what the programs compute, of prompts and of single tokens, with our decoder.

    In float32 they must agree to 1e-4 of the largest logit. bfloat16 rounds wherever XLA does not fuse, so there our
    decoder in float32 is the measure, from which the programs may be twice as far as our decoder in bfloat16.

    Args:
        folder: of the export.
        rows: token ids.

    Raises:
        ExportError: they differ by more.
    """
    programs = Programs(folder)
    exact = dataclasses.replace(programs.config, dtype="float32", param_dtype="float32")
    params = flax.traverse_util.unflatten_dict(dict(programs.params), sep=".")
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    largest = error = ours_error = 0.0
    positions = 0
    for ids in rows:
        truth = logits_of(exact, wide, ids)
        found = programs.logits(ids, max(len(ids) - 4, 0))
        largest = max(largest, float(np.abs(truth).max()))
        error = float(np.maximum(error, np.abs(found - truth).max()))  # Python's max passes over NaN
        ours_error = max(ours_error, float(np.abs(logits_of(programs.config, params, ids) - truth).max()))
        positions += len(ids)
    allowed = TOLERANCE * max(1.0, largest) + (0.0 if programs.config.dtype == "float32" else 2 * ours_error)
    if not error <= allowed:
        raise ExportError(f"logits of {folder} differ by {error:.3g} from ours; {allowed:.3g} is allowed")
    return Check("stablehlo", {"positions": positions, "max_error": error, "largest_logit": largest})
