"""The tensors of a folder, under the names of its architecture, as the layers of the runtime take them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from export.torch_runtime.config import FolderError, ModelConfig, read_json
from export.torch_runtime.linear import WORD, Linear, QuantizedLinear, unpack

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
# What a folder may have that is not needed to predict the next token: MTP layers, tables of rotary embedding.
_LEFT_OUT = ("model.mtp_layers.", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Names:
    """What an architecture calls its tensors; those of a layer stand behind `model.layers.<index>.`."""

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    post_attention_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


LLAMA = Names()
# Its wqkv is one tensor whose rows are, for each key/value head, those of its query heads, of the key, of the value.
INTERNLM2 = Names(
    embedding="model.tok_embeddings",
    head="output",
    input_norm="attention_norm",
    qkv=("attention.wqkv",),
    o="attention.wo",
    post_attention_norm="ffn_norm",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
)


class Weights:
    """A folder's tensors, each read when it is asked for, straight onto the device.

    Attributes:
        config: of the folder.
        names: of its tensors.
        device: where tensors go.
        dtype: what floating-point tensors are converted to.
    """

    def __init__(self, folder: str | Path, config: ModelConfig, device: torch.device | str, dtype: torch.dtype):
        """Opens the weight files.

        Raises:
            FolderError: there are none, or one is missing or cut short.
        """
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        if self.device.type == "cuda" and self.device.index is None:  # for safetensors that were the first
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.names = INTERNLM2 if config.model_type == "internlm2" else LLAMA
        self._folder = Path(folder)
        self._files: dict[str, Any] = {}
        for file in self._weight_files():
            opened = _open(file, str(self.device))
            self._files |= dict.fromkeys(opened.keys(), opened)
        self._unread = set(self._files)

    def _weight_files(self) -> list[Path]:
        """The shards that the index names, or the one file without an index."""
        index = self._folder / INDEX_FILE
        if not index.is_file():
            found = sorted(path.name for path in self._folder.glob("*.safetensors"))
            if found != [WEIGHTS_FILE]:
                raise FolderError(
                    f"{self._folder} needs {WEIGHTS_FILE}, or shards named in {INDEX_FILE}; it has "
                    f"{', '.join(found) or 'neither'}. A folder of Marlin weights is for CPM.cu: export it as gptq"
                )
            return [self._folder / WEIGHTS_FILE]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise FolderError(f'{index} must have a "weight_map" from the names of tensors to those of files')
        files = [self._folder / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FolderError(f"{self._folder} lacks the shard {missing[0]}, which {INDEX_FILE} names")
        return files

    def _read(self, name: str, shape: Sequence[int]) -> Tensor:
        if name not in self._files:
            raise FolderError(f"{self._folder} has no tensor {name}, which its config.json asks for")
        tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise FolderError(
                f"{self._folder}: {name} has the shape {list(tensor.shape)}, and config.json says {list(shape)}"
            )
        self._unread.discard(name)
        return tensor

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A floating-point tensor.

        Raises:
            FolderError: there is none, or it is of another shape.
        """
        return self._read(name, shape).to(self.dtype)

    def linear(
        self, prefix: str, names: Sequence[str], inputs: int, outputs: Sequence[int], bias: bool
    ) -> Linear | QuantizedLinear:
        """One layer for several of a folder that have the same inputs, their outputs one after another.

        Args:
            prefix: of their names.
            names: the layers.
            inputs: number of inputs.
            outputs: number of outputs of each.
            bias: whether they have biases.
        """
        paths = [f"{prefix}{name}" for name in names]
        sizes = list(zip(paths, outputs, strict=True))
        biases = torch.cat([self.tensor(f"{path}.bias", size) for path, size in sizes]) if bias else None
        if self.config.quantization is None:
            return Linear(torch.cat([self.tensor(f"{path}.weight", size, inputs) for path, size in sizes]), biases)
        parts = [self._quantized(path, inputs, size) for path, size in sizes]
        qweight, scales, zeros = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return QuantizedLinear(qweight, scales, zeros, biases, self.config.quantization.bits)

    def _quantized(self, path: str, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zero points of one layer."""
        config = self.config.quantization
        assert config is not None
        bits, group = config.bits, inputs if config.group_size == -1 else config.group_size
        codes = WORD // bits
        if inputs % group or inputs % codes or outputs % codes:
            raise FolderError(
                f"config.json: quantization_config: {path} has {inputs} inputs and {outputs} outputs: accepted are "
                f"multiples of {codes}, the codes in a word, and inputs that group_size = {group} divides"
            )
        groups = inputs // group
        qweight = self._read(f"{path}.qweight", (inputs * bits // WORD, outputs))
        scales = self._read(f"{path}.scales", (groups, outputs))
        packed = self._read(f"{path}.qzeros", (groups, outputs * bits // WORD))
        zeros = unpack(packed.T.contiguous(), bits).T.contiguous()
        if f"{path}.g_idx" in self._files:
            order = self._read(f"{path}.g_idx", (inputs,))
            if not torch.equal(order, (torch.arange(inputs, device=order.device) // group).to(order.dtype)):
                raise FolderError(f"{path}.g_idx is not in the order of the inputs: quantise without desc_act")
        # A stored zero point of one less than 0 wraps around.
        return qweight, scales, (zeros + config.zero_offset) & ((1 << bits) - 1)

    def qkv(self, prefix: str) -> Linear | QuantizedLinear:
        """The projection to all query heads, then all keys, then all values."""
        config, names = self.config, self.names.qkv
        sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        if len(names) == 3:
            return self.linear(prefix, names, config.hidden_size, sizes, config.qkv_bias)
        if config.quantization is not None:
            raise FolderError("config.json: quantization_config with a fused wqkv: export the layout 'llama' as gptq")
        weight = self._regroup(self.tensor(f"{prefix}{names[0]}.weight", sum(sizes), config.hidden_size))
        bias = self._regroup(self.tensor(f"{prefix}{names[0]}.bias", sum(sizes))) if config.qkv_bias else None
        return Linear(weight, bias)

    def _regroup(self, fused: Tensor) -> Tensor:
        """Rows of each key/value head, [its query heads, k, v], as rows of all query heads, all keys, all values."""
        heads, size = self.config.num_kv_heads, self.config.head_dim
        grouped = fused.unflatten(0, (heads, -1, size))
        return torch.cat([part.flatten(0, 2) for part in (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])])

    def check_all_read(self) -> None:
        """Checks that no tensor was passed over that changes what is computed.

        Raises:
            FolderError: some were; names them.
        """
        left_out = _LEFT_OUT + ((self.names.head,) if self.config.tie_word_embeddings else ())
        if strange := sorted(name for name in self._unread if not any(part in name for part in left_out)):
            more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
            raise FolderError(f"{self._folder} has tensors that are not computed with: {', '.join(strange[:5])}{more}")


def _open(file: Path, device: str) -> Any:
    try:
        return safetensors.safe_open(file, framework="pt", device=device)
    except (OSError, safetensors.SafetensorError) as error:
        raise FolderError(f"{file} cannot be read as safetensors: {error}. It may have been cut short") from error


def num_bytes(module: torch.nn.Module) -> int:
    """Bytes of all weights of a model."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in module.buffers())
