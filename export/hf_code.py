"""The code that a folder carries where `transformers` has no class for its layout.

`export/hf_modeling/` is a decoder with Llama's names; in a folder its classes and files have the names of the layout,
and its modules those of the layout's tensors, so that nothing is renamed when the weights are loaded.
"""

import json
import re
from pathlib import Path

from cpm_jax.checkpoints.hf_config import Layout
from cpm_jax.checkpoints.sources import CONFIG_FILE

_SOURCE = Path(__file__).parent / "hf_modeling"
_FILES = ("configuration", "modeling")
# Words of the code by layout, where they are not Llama's.
_NAMES = {
    "internlm2": {
        "attention_bias": "bias",
        "embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "self_attn": "attention",
        "o_proj": "wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp": "feed_forward",
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
        "lm_head": "output",
    }
}


def auto_map(layout: Layout, *, config_only: bool = False) -> dict[str, str]:
    """The entry `auto_map` of config.json, by which transformers finds the code of a folder.

    Args:
        layout: of the folder.
        config_only: without the model's class, for weights that it does not load; others' loaders of those begin with
            `AutoConfig`.
    """
    name = layout.architecture.removesuffix("ForCausalLM")
    config = {"AutoConfig": f"configuration_{layout.model_type}.{name}Config"}
    if config_only:
        return config
    return config | {"AutoModelForCausalLM": f"modeling_{layout.model_type}.{layout.architecture}"}


def code_of(layout: Layout, *, config_only: bool = False) -> dict[str, str]:
    """The files `configuration_<layout>.py` and `modeling_<layout>.py`, by name.

    Args:
        layout: of the folder.
        config_only: the first of them alone.
    """
    name = layout.architecture.removesuffix("ForCausalLM")
    words = {f"{file}_decoder": f"{file}_{layout.model_type}" for file in _FILES}
    words |= {r"export\.hf_modeling\.": ".", 'model_type = "decoder"': f'model_type = "{layout.model_type}"'}
    words |= {r"Decoder(?=[A-Z])": name}
    words |= {rf"\b{ours}\b": theirs for ours, theirs in _NAMES.get(layout.model_type, {}).items()}
    files = {}
    for file in _FILES[:1] if config_only else _FILES:
        text = (_SOURCE / f"{file}_decoder.py").read_text("utf-8")
        for word, replacement in words.items():
            text = re.sub(word, replacement, text)
        files[f"{file}_{layout.model_type}.py"] = text
    return files


def why_not_run(layout: Layout, folder: Path) -> str:
    """Why the code of a folder should not be run to check it; "" where it is what this version writes."""
    for name, text in code_of(layout).items():
        file = folder / name
        if not file.is_file():
            return f"transformers has no class {layout.architecture}, and the folder has no {name}"
        if file.read_bytes() != text.encode():
            return f"{name} is not what this version writes, and code of others is not run"
    if json.loads((folder / CONFIG_FILE).read_text("utf-8")).get("auto_map") != auto_map(layout):
        return f"auto_map in {CONFIG_FILE} names other code than this version writes, and code of others is not run"
    return ""
