"""One process of a training of some steps; test_processes.py starts it once or twice and compares what it prints."""

import argparse
import json

import jax

from cpm_jax.common.sharding import MeshConfig, data_shard, make_mesh
from cpm_jax.data.loader import make_loader
from cpm_jax.data.mixture import from_folders
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import Phase, ScheduleConfig
from cpm_jax.training.train_state import init_state
from cpm_jax.training.train_step import make_train_step, put_batch

CONFIG = ModelConfig(
    vocab_size=320,
    num_layers=1,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    d_ff=64,
    dtype="float32",
    param_dtype="float32",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--mesh", required=True, help="sizes of data, fsdp, tensor, context")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    if args.processes > 1:
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.process)

    mesh = make_mesh(MeshConfig(*json.loads(args.mesh)))
    optimizer = make_optimizer(OptimizerConfig(), ScheduleConfig(phases=(Phase(steps=1, end=0.01),)), CONFIG)
    state = init_state(CONFIG, optimizer, jax.random.key(0), mesh)
    step = make_train_step(CONFIG, optimizer, mesh=mesh)
    index, count = data_shard(mesh)
    losses = []
    with make_loader(from_folders(args.data), 8, seed=0, process_index=index, process_count=count) as loader:
        for batch in (next(loader) for _ in range(3)):
            state, metrics = step(state, put_batch(batch, mesh))
            losses.append([float(metrics[key]) for key in ("loss", "grad_norm", "tokens", "loss_tokens")])
    print(json.dumps({"part": [index, count], "losses": losses}))


if __name__ == "__main__":
    main()
