"""Weights imported onto a mesh of 8 devices are those of one device, and each device's part is all that is read."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from cpm_jax.checkpoints.hf_layouts import flatten
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import HfSource, Index
from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import MeshConfig, make_mesh, params_sharding
from cpm_jax.modeling.decoder import param_axes
from tests.checkpoints.published_folders import CONFIGS, write

pytestmark = pytest.mark.multidevice

MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(fsdp=1, tensor=4, data=2),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}


class Counting(HfSource):
    """Counts how often each value of a tensor is read."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.counts: dict[str, np.ndarray] = {name: np.zeros(self.shape(name), int) for name in self.names()}
        self.largest = 0

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        self.counts[name][index or ...] += 1
        values = super().read(name, index)
        self.largest = max(self.largest, values.size)
        return values


@pytest.mark.parametrize("mesh_config", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("layout", ["llama with biases", "minicpm", "internlm2", "mimo"])
def test_equals_one_device(layout: str, mesh_config: MeshConfig, tmp_path: Path) -> None:
    write(tmp_path, CONFIGS[layout], "bfloat16")
    config, alone = import_params(HfSource(tmp_path))
    mesh = make_mesh(mesh_config)
    source = Counting(tmp_path)
    same, params = import_params(source, mesh)
    assert same == config
    shardings = flatten(params_sharding(param_axes(config), alone, mesh))
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(value, flatten(alone)[path], err_msg=path)
        assert value.sharding == shardings[path]
        for shard in value.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(flatten(alone)[path])[shard.index])
    for name, counts in source.counts.items():
        if name.endswith("wqkv.weight"):  # rows of q, k and v lie between one another: a group is read for each part
            parts_of_a_group = max(1, mesh_config.tensor // 2)
            assert counts.max() <= 3 * parts_of_a_group
        else:
            assert (counts == 1).all(), name
    if mesh_config.fsdp == 8:
        assert source.largest == 64 * 300 // 8  # an eighth of the embedding


def test_groups_of_fused_rows_that_a_device_shares(tmp_path: Path) -> None:
    """Two kv heads on four devices: query heads are divided, keys and values replicated."""
    write(tmp_path, CONFIGS["internlm2"])
    _, params = import_params(HfSource(tmp_path), make_mesh(MeshConfig(fsdp=2, tensor=4)))
    attention = params["layers"]["self_attn"]
    sizes = {
        name: Counter(shard.data.shape for shard in attention[name]["kernel"].addressable_shards)
        for name in ("q_proj", "k_proj")
    }
    assert sizes == {"q_proj": {(3, 32, 16): 8}, "k_proj": {(3, 32, 8): 8}}


def test_a_mesh_that_does_not_divide(tmp_path: Path) -> None:
    write(tmp_path, CONFIGS["llama"] | {"vocab_size": 302})
    with pytest.raises(ConfigError, match=r"its dimension 'vocab' of size 302 cannot be divided into 4 parts"):
        import_params(HfSource(tmp_path), make_mesh(MeshConfig(fsdp=2, tensor=4)))
    with pytest.raises(ConfigError, match=r"MeshConfig.tensor = 8: must divide ModelConfig.num_heads = 4"):
        import_params(HfSource(tmp_path), make_mesh(MeshConfig(fsdp=1, tensor=8)))
    assert len(jax.devices()) == 8
