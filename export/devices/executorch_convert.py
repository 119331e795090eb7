"""Lowers a Hugging Face folder to an ExecuTorch program: run by an interpreter that has executorch.

`python executorch_convert.py SOURCE FOLDER TYPE`: writes FOLDER/model.pte, for the processor by XNNPACK. Its method
`forward` takes the ids of new tokens [1, T], at most CHUNK, and their positions [T], and returns logits [1, T, V]; the
cache is in the program. Attention and cache are ExecuTorch's operators for language models. With the values that it has
beside it (the length of the cache, the tokens that begin and end a text), ExecuTorch's own runner of language models
generates from it.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (registers torch.ops.llama)
from torch import Tensor, nn
from torchao.quantization import granularity, quant_api, quantize_

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from export.torch_runtime import layers
from export.torch_runtime.cache import LayerCache
from export.torch_runtime.config import SparseConfig
from export.torch_runtime.linear import Linear
from export.torch_runtime.model import Decoder, load_model

GROUP_SIZE = 32  # of 4-bit weights
CHUNK = 256  # tokens that are read at once: memory is planned for as many
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "generation_config.json"),
)


class SlotCache(LayerCache):
    """Keys and values [B, S, K, H], as ExecuTorch's operators for language models keep them."""

    def write(
        self,
        k: Tensor,
        v: Tensor,
        selecting: Tensor,
        positions: Tensor,
        sparse: SparseConfig | None,
        write_kernels: Callable[[Tensor, Tensor, Tensor, int, int], None],
    ) -> None:
        """Writes new tokens to the slots of their positions, in place."""
        begin = positions[0].item()
        torch._check_is_size(begin)
        torch.ops.llama.update_cache(k, self.keys, begin)
        torch.ops.llama.update_cache(v, self.values, begin)


def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Attends to the slots that are filled, and to no others."""
    begin = positions[0].item()
    torch._check_is_size(begin)
    return torch.ops.llama.custom_sdpa(q, keys, values, begin, None, 0.0, True, scale)


class Program(nn.Module):
    """A decoder with its cache."""

    def __init__(self, decoder: Decoder, capacity: int):
        super().__init__()
        self.decoder = decoder
        self.cache = decoder.init_cache(capacity)
        self.register_buffer("rotary", self.cache.rotary)
        for index, layer in enumerate(self.cache.layers):  # what a program changes has to be a buffer
            batch_size, kv_heads, slots, head_dim = layer.keys.shape
            # Made anew: of one head a transposed tensor counts as contiguous, and its order of dimensions does not.
            mine = SlotCache(*(torch.zeros(batch_size, slots, kv_heads, head_dim) for _ in range(2)))
            self.cache.layers[index] = mine
            self.register_buffer(f"keys_{index}", mine.keys)
            self.register_buffer(f"values_{index}", mine.values)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [1, T, V] of tokens [1, T] at consecutive positions [T]."""
        return self.decoder.logits(self.decoder(tokens, positions, self.cache, None))


def quantize(decoder: Decoder, dtype: str) -> None:
    """Stores the weights of linear layers in 8 or 4 bits; activations are rounded to 8 as they come."""
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                outputs, inputs = child.weight.shape
                if dtype == "int4" and inputs % GROUP_SIZE:
                    raise SystemExit(
                        f"int4: groups of {GROUP_SIZE} do not divide a layer's {inputs} inputs; choose int8"
                    )
                linear = nn.Linear(inputs, outputs, bias=child.bias is not None)
                linear.weight = nn.Parameter(child.weight, requires_grad=False)
                if child.bias is not None:
                    linear.bias = nn.Parameter(child.bias, requires_grad=False)
                setattr(module, name, linear)
    weight_dtype, each = {
        "int8": (torch.int8, granularity.PerAxis(0)),
        "int4": (torch.int4, granularity.PerGroup(GROUP_SIZE)),  # type: ignore[attr-defined]
    }[dtype]
    quantize_(
        decoder,
        quant_api.Int8DynamicActivationIntxWeightConfig(weight_dtype=weight_dtype, weight_granularity=each),
    )


def main() -> None:
    """Converts one folder."""
    source, folder, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    decoder = load_model(source, dtype=torch.float32)
    config = decoder.config
    capacity = config.max_position_embeddings
    if dtype != "float32":
        quantize(decoder, dtype)
    chunk = min(CHUNK, capacity)
    count = torch.export.Dim("count", min=1, max=chunk)
    example = (torch.zeros(1, 3, dtype=torch.long), torch.arange(3))
    values = {
        "get_max_seq_len": chunk,
        "get_max_context_len": capacity,
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "use_sdpa_with_kv_cache": True,
        "get_bos_id": config.bos_token_id if config.bos_token_id is not None else -1,
        "get_eos_ids": list(config.eos_token_ids),
    }
    operations = layers._operations("torch")._replace(attend_to_all=attend)
    layers._operations = lambda kernels: operations  # of this process, which does nothing else
    with torch.no_grad():
        exported = torch.export.export(
            Program(decoder, capacity), example, dynamic_shapes=({1: count}, {0: count}), strict=True
        )
        lowered = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=values,
        )
    with open(folder / "model.pte", "wb") as file:
        lowered.to_executorch().write_to_file(file)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


if __name__ == "__main__":
    main()
