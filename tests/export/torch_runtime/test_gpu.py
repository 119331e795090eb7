"""On a GPU, where there is one: the step as a CUDA graph, with either kernels, makes the text that a CPU makes."""

import pytest
import torch

from export.torch_runtime.generate import SamplingConfig, generate
from export.torch_runtime.model import load_model
from tests.export.small_models import SPARSE, small_tokenizer
from tests.export.torch_runtime.models import exported, tokens_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_the_text_is_that_of_a_cpu(sparse, kernels, tmp_path):
    *_, on_cpu = exported(tmp_path / "hf", "llama", small_tokenizer(), sparse_config=sparse)
    last = torch.cuda.device_count() - 1  # not the first, where there are several
    on_gpu = load_model(tmp_path / "hf", f"cuda:{last}")
    on_gpu.use_kernels(kernels)
    prompt, greedy = tokens_of(150)[0].tolist(), SamplingConfig(temperature=0)
    assert list(generate(on_gpu, prompt, 40, greedy)) == list(generate(on_cpu, prompt, 40, greedy))
