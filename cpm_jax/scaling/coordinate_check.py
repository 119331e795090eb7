"""The coordinate check of µP: do activations, and what training changes in them, keep their size as models widen?

Models of one family and several widths take a few steps on one batch; the root mean square of the coordinates of each
activation is measured before and after. Under µP its logarithm is flat over that of the width, under standard
parametrisation it climbs (Tensor Programs V, arXiv:2203.03466, §3 and appendix D.1, "coord check").
"""

import dataclasses
import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.modeling import decoder
from cpm_jax.modeling.block import causal_attend, select
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.rotary import rotation
from cpm_jax.scaling.mup import KvHeads, at_width
from cpm_jax.training.losses import Batch
from cpm_jax.training.optimizer import OptimizerConfig, group_of, make_optimizer
from cpm_jax.training.schedules import Phase, ScheduleConfig
from cpm_jax.training.train_state import init_state
from cpm_jax.training.train_step import make_train_step

Quantity = Literal["size", "change"]
Activations = dict[str, Float[jax.Array, "B T _"]]


@config_dataclass
class CoordinateCheckConfig:
    """What is trained and when it is measured.

    Attributes:
        model: a member of the family; `scaling.mup.at_width` widens it.
        widths: d_model of the models, at least two.
        steps: after how many steps sizes are measured; before the first they always are.
        seeds: of initial parameters; sizes are averaged over them.
        learning_rate: constant, of the base width.
        optimizer: AdamW's constants.
        kv_heads: whether key and value heads keep their number or grow with the width.
    """

    model: ModelConfig
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=2)]
    steps: tuple[PositiveInt, ...] = (1, 3, 10)
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    learning_rate: PositiveFloat = 0.01
    optimizer: OptimizerConfig = OptimizerConfig()
    kv_heads: KvHeads = "fixed"

    def __post_init__(self) -> None:
        if len(set(self.widths)) < 2:
            raise ConfigError(
                f"CoordinateCheckConfig.widths = {self.widths}: a slope needs at least two different widths",
                field="CoordinateCheckConfig.widths",
            )


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The size of one activation, or of what training changed in a kind of parameter.

    Attributes:
        width: d_model.
        seed: of the initial parameters.
        step: steps taken.
        site: "embedding", "layer_0/attention", "layer_0/mlp", "layer_0/residual", "hidden", "logits"; for parameters
            "parameters/matrix" and so on by `training.optimizer.group_of`.
        size: root mean square of its coordinates; of parameters, too.
        change: root mean square of its difference to step 0 on the same batch.
    """

    width: int
    seed: int
    step: int
    site: str
    size: float
    change: float


def activations(model: decoder.Decoder, batch: Batch) -> Activations:
    """What flows through a model: embeddings, each layer's two branches as added and the stream after it, logits.

    Args:
        model: from `modeling.decoder.bind`.
        batch: as in docs/architecture.md.
    """
    config, multiplier = model.config, model.multipliers.residual
    angles = rotation(config, batch["positions"], length=batch["tokens"].shape[1])
    attend = causal_attend(config, batch["segment_ids"])
    x = model.embed_tokens(batch["tokens"], model.multipliers.embedding)
    found = {"embedding": x}
    for index in range(config.num_layers):
        layer = select(model.layers, index)
        attended = layer.self_attn(layer.input_layernorm(x), angles, attend)[0]
        x = x + attended * multiplier
        fed = layer.mlp(layer.post_attention_layernorm(x))
        x = x + fed * multiplier
        name = f"layer_{index}"
        found |= {f"{name}/attention": attended, f"{name}/mlp": fed, f"{name}/residual": x}
    hidden = model.norm(x)
    return found | {"hidden": hidden, "logits": model.logits(hidden)}


def coordinate_check(config: CoordinateCheckConfig, batch: Batch) -> list[Measurement]:
    """Trains the family on one batch over and over, and measures.

    Args:
        config: what is trained.
        batch: as in docs/architecture.md, for all models.

    Raises:
        ConfigError: a width that does not give whole heads.
    """
    return [found for width in config.widths for seed in config.seeds for found in measure(config, width, seed, batch)]


def measure(config: CoordinateCheckConfig, width: int, seed: int, batch: Batch) -> list[Measurement]:
    """The part of `coordinate_check` that one model is.

    Args:
        config: what is trained; its widths and seeds are not read.
        width: d_model.
        seed: of the initial parameters.
        batch: as in docs/architecture.md.

    Raises:
        ConfigError: the width does not give whole heads.
    """
    model = at_width(config.model, width, config.kv_heads)
    optimizer, step, run = _programs(config.optimizer, config.learning_rate, model)
    state = init_state(model, optimizer, jax.random.key(seed))
    start: dict[str, list[np.ndarray]] | None = None
    found = []
    for number in range(max(config.steps, default=0) + 1):
        if number == 0 or number in config.steps:
            # Copies: the step takes the arrays of the state.
            params = jax.tree.map(np.array, state.params)
            now = _by_site(jax.device_get(run(state.params, batch)), params)
            start = start or now
            for site, arrays in now.items():
                change = _rms([a - b for a, b in zip(arrays, start[site], strict=True)])
                found.append(Measurement(model.d_model, seed, number, site, _rms(arrays), change))
        state, _ = step(state, batch)
    return found


# The seeds of a width share its programs.
@functools.lru_cache(maxsize=1)
def _programs(adamw: OptimizerConfig, learning_rate: float, model: ModelConfig) -> tuple[Any, Any, Any]:
    constant = ScheduleConfig(phases=(Phase(steps=1, end=learning_rate),))
    optimizer = make_optimizer(adamw, constant, model)
    run = jax.jit(lambda params, batch: activations(decoder.bind(model, params), batch))
    return optimizer, make_train_step(model, optimizer), run


def _by_site(flows: Mapping[str, np.ndarray], params: Any) -> dict[str, list[np.ndarray]]:
    """Activations, and the parameters by group."""
    found = {site: [array] for site, array in flows.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.setdefault(f"parameters/{group_of(tuple(key.key for key in path))}", []).append(leaf)
    return found


def _rms(arrays: Sequence[np.ndarray]) -> float:
    total = sum(np.square(array, dtype=np.float64).sum() for array in arrays)
    return math.sqrt(total / sum(array.size for array in arrays))


def slopes(measurements: Iterable[Measurement], step: int, quantity: Quantity) -> dict[str, float]:
    """The exponent by which each quantity grows with the width: least squares of log size over log width.

    Args:
        measurements: of `coordinate_check`.
        step: after how many steps.
        quantity: "size", or "change" since step 0.

    Returns:
        By site. 0 is flat, 0.5 grows as the square root of the width, and so on; the logarithms of a width's seeds are
        averaged. NaN where something was zero or not finite.
    """
    by_site: Mapping[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for m in measurements:
        if m.step == step:
            by_site[m.site][m.width].append(getattr(m, quantity))
    return {site: _slope(widths) for site, widths in by_site.items()}


def _slope(by_width: Mapping[int, Sequence[float]]) -> float:
    values = [value for width in by_width.values() for value in width]
    if not all(np.isfinite(value) and value > 0 for value in values):
        return float("nan")
    logs = {np.log(width): statistics.fmean(np.log(sizes)) for width, sizes in by_width.items()}
    return statistics.linear_regression(list(logs), list(logs.values())).slope
