"""Decoding with parameters and cache divided over 8 devices gives the tokens of one device."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from cpm_jax.checkpoints.manager import Checkpointer
from cpm_jax.common import exit_codes
from cpm_jax.common.config import config_to_dict
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference import decode_loop
from cpm_jax.inference.generate import Generator, collect
from cpm_jax.inference.load import load_model
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from experiments import run

pytestmark = pytest.mark.multidevice

GREEDY = SamplingConfig(temperature=0.0)
HOT = SamplingConfig(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.1)
PROMPTS = ["Number 1. After 1?", "After", "Number 12. After 13? Number 14. After 15? Number 16.", "?"]
MESHES = {
    "tensor": MeshConfig(fsdp=1, tensor=8),
    "fsdp": MeshConfig(fsdp=8),  # four prompts: rows that the mesh does not divide stay whole
    "data_tensor": MeshConfig(data=4, fsdp=1, tensor=2),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run as training leaves it: MTP, and fewer key and value heads than the tensor axis may have parts."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train([f"Number {i}. After {i}?" for i in range(200)], vocab_size=300)
    tokenizer.save(folder / "tokenizer")
    model = ModelConfig(
        vocab_size=304,
        num_layers=1,
        d_model=64,
        num_heads=8,
        num_kv_heads=4,
        d_ff=128,
        max_position_embeddings=128,
        num_nextn_predict_layers=1,
        initializer_range=0.2,
        dtype="float32",
    )
    with Checkpointer(folder / "checkpoints") as checkpointer:
        state = {"step": jnp.int32(1), "params": decoder.init_params(model, jax.random.key(3))}
        fixed = {"tokenizer_sha256": tokenizer.sha256}
        checkpointer.save(1, state, {"model": config_to_dict(model), "fixed": fixed})
    return folder


def tokens(generator, sampling):
    prompts = [generator.tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    pieces = generator.stream(prompts, sampling=sampling, max_new_tokens=24, seed=1)
    return [completion.token_ids for completion in collect(pieces)]


@pytest.fixture(scope="module")
def alone(workdir):
    generator = Generator.from_checkpoint(workdir)
    return {sampling: tokens(generator, sampling) for sampling in (GREEDY, HOT)}


@pytest.mark.parametrize("name", MESHES)
def test_same_tokens_on_a_mesh(workdir, alone, name):
    mesh = make_mesh(MESHES[name])
    generator = Generator.from_checkpoint(workdir, mesh=mesh)
    kernel = generator._params["layers"]["mlp"]["up_proj"]["kernel"]
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert kernel.addressable_shards[0].data.size == kernel.size // parts
    for sampling, expected in alone.items():
        assert tokens(generator, sampling) == expected


@pytest.mark.parametrize(("name", "spec"), [("data_tensor", (None, "data", "tensor")), ("tensor", ())])
def test_the_cache_lies_on_rows_and_heads_and_stays_where_it_is(workdir, name, spec):
    """Four key and value heads: in eight parts every part has them all, and none is sent to another."""
    mesh = make_mesh(MESHES[name])
    generator = Generator.from_checkpoint(workdir, mesh=mesh)
    given = {"config": generator.config, "sampling": GREEDY}
    ends = jnp.asarray([0])
    with jax.set_mesh(mesh):
        state = decode_loop.start(
            generator._params, [[1, 2, 3]] * 8, max_new_tokens=8, seed=0, indices=range(8), **given
        )
        program = decode_loop.extend.lower(generator._params, state, ends, num_tokens=2, **given).compile().as_text()
        state, _ = decode_loop.extend(generator._params, state, ends, num_tokens=2, **given)
    for cached in (state.cache.keys, state.cache.values):
        assert tuple(cached.sharding.spec[:3]) == spec
    slots = state.cache.length
    assert not re.search(rf"\[[\d,]*\b{slots},8\]\S* all-(gather|to-all|reduce)", program)


@pytest.mark.parametrize("name", MESHES)
def test_sparse_attention_gives_the_same_tokens_on_a_mesh(workdir, name):
    sparse = SparseConfig(kernel_size=4, kernel_stride=2, block_size=4, window_size=8, topk=2, dense_len=-1)
    loaded = load_model(workdir)
    config = dataclasses.replace(loaded.config, sparse_config=sparse)
    alone = Generator(config, loaded.params, loaded.tokenizer)
    dense = Generator(loaded.config, loaded.params, loaded.tokenizer)
    mesh = make_mesh(MESHES[name])
    shared = Generator(config, load_model(workdir, mesh=mesh).params, loaded.tokenizer, mesh=mesh)
    for sampling in (GREEDY, HOT):
        assert tokens(shared, sampling) == tokens(alone, sampling) != tokens(dense, sampling)


def generate(workdir, output, *flags):
    arguments = ["generate", f"--workdir={workdir}", f"--gin.PROMPTS={tuple(PROMPTS)}", f"--gin.OUTPUT={output}"]
    code = run.main([*arguments, "--gin.MAX_NEW_TOKENS=20", *flags])
    return code, [json.loads(line)["completion"] for line in output.read_text().splitlines()] if not code else []


def test_the_verb(workdir, tmp_path, capsys):
    one = generate(workdir, tmp_path / "one.jsonl")
    flags = ["--gin.MeshConfig.tensor=2", "--gin.MeshConfig.data=2"]  # the first four devices
    assert one == generate(workdir, tmp_path / "four.jsonl", *flags)
    capsys.readouterr()
    for mesh, message in (
        ("tensor=16", "tensor 16 x context 1 does not fit 8 devices"),
        ("tensor=3", "MeshConfig.tensor = 3: must divide ModelConfig.num_heads = 8"),
    ):
        assert generate(workdir, tmp_path / "none", f"--gin.MeshConfig.{mesh}")[0] == exit_codes.BAD_CONFIG
        assert message in capsys.readouterr().err


def test_sft_and_pretrain_start_from_a_checkpoint_of_one_device(workdir, tmp_path, monkeypatch):
    chats = tmp_path / "chats.jsonl"
    turns = [
        [{"role": "user", "content": f"After {i}?"}, {"role": "assistant", "content": f"{i + 1}."}] for i in range(60)
    ]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    flags = [
        *(f"--gin.INIT_FROM={workdir}", "--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=8"),
        *("--gin.PEAK_LR=0.01", "--gin.LOG_EVERY=1", "--gin.EVAL_EVERY=0"),
    ]

    def losses(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    def train(verb, name, *more):
        assert run.main([verb, f"--workdir={tmp_path / name}", *flags, *more]) == exit_codes.OK
        return losses(tmp_path / name)

    sft = [f"--gin.DATA={chats}", "--gin.SEQ_LEN=32", "--gin.VALIDATION_FRACTION=0.1"]
    mesh = ["--gin.MeshConfig.fsdp=4", "--gin.MeshConfig.tensor=2"]
    files = [
        f"--gin_file={name}.gin" for name in ("arch/llama", "size/2m", "data/folders", "optim/wsd", "runs/pretrain")
    ]
    model = [
        *("--gin.VOCAB_SIZE=304", "--gin.NUM_LAYERS=1", "--gin.D_MODEL=64", "--gin.NUM_HEADS=8", "--gin.D_FF=128"),
        *("--gin.NUM_KV_HEADS=4", "--gin.HEAD_DIM=8", "--gin.MAX_POSITION_EMBEDDINGS=128", "--gin.DTYPE=float32"),
        *("--gin.ModelConfig.num_nextn_predict_layers=1", "--gin.ModelConfig.tie_word_embeddings=False"),
    ]
    schedule = ["--gin.WARMUP_STEPS=0", "--gin.DECAY_STEPS=1"]
    pretrain = [*files, *model, *schedule, f"--gin.DATA={tmp_path / 'sft_8' / 'data'}"]
    on_eight = {
        "sft": train("sft", "sft_8", *sft, *mesh),
        "pretrain": train("pretrain", "pretrain_8", *pretrain, *mesh),
    }
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    on_one = {"sft": train("sft", "sft_1", *sft), "pretrain": train("pretrain", "pretrain_1", *pretrain)}
    for verb, curve in on_eight.items():
        assert len(curve) == 2
        assert curve == pytest.approx(on_one[verb], rel=1e-5)
