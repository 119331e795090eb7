"""How weights are quantised: the switches of MiniCPM4's P-GPTQ and of what it is combined with."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from cpm_jax.common.config import ConfigError, InputError, config_dataclass

PER_CHANNEL = -1  # as group_size


class QuantizationError(InputError):
    """Weights or calibration data that cannot be quantised."""


@config_dataclass
class QuantizationConfig:
    """Weight-only quantisation of the linear layers to integers, symmetric, with a scale for each group of inputs.

    The switches are independent: the paper's S-P-GPTQ is `method` "gptq", `skip_initial_tokens` 4 and `smoothing`.

    Attributes:
        method: "rtn" rounds every weight to the nearest code; "gptq" (arXiv 2210.17323) makes up for each error in the
            weights that are still to be rounded.
        bits: of a code.
        group_size: consecutive inputs that share a scale; -1 is all of them (one scale for each output).
        skip_initial_tokens: calibration leaves out this many tokens at the start of each sequence, whose activations
            are many times those of all others (P-GPTQ: 4; MiniCPM4 report §4.1.2, Eq. 12). 0 takes all, as SmolLM2
            loses by it: docs/quantization.md.
        smoothing: whether inputs with large activations are scaled up in the weights before (AWQ, arXiv 2306.00978;
            the report's S-).
        smoothing_steps: exponents that are tried for each group of layers, evenly from 0 to below 1.
        rotation: whether the residual stream is rotated before (QuaRot, arXiv 2404.00456), which spreads large
            activations over all of it. It unties a tied head.
        damping: added to the diagonal of GPTQ's Hessian, in units of its mean.
        block_size: inputs that GPTQ quantises before it passes their error on to all later ones.
        seed: of the rotation's signs.
    """

    method: Literal["rtn", "gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = 128
    skip_initial_tokens: NonNegativeInt = 0
    smoothing: bool = False
    smoothing_steps: PositiveInt = 20
    rotation: bool = False
    damping: PositiveFloat = 0.01
    block_size: PositiveInt = 128
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise ConfigError(
                f"QuantizationConfig.group_size = {self.group_size}: must be positive, or -1 for one scale for each "
                "output",
                field="QuantizationConfig.group_size",
            )

    @property
    def calibrates(self) -> bool:
        """Whether calibration data changes the result."""
        return self.method == "gptq" or self.smoothing

    def group_size_of(self, in_features: int, name: str) -> int:
        """Inputs that share a scale in a layer of `in_features` inputs.

        Args:
            in_features: of the layer.
            name: of the layer, for the message.

        Raises:
            ConfigError: the group size does not divide them.
        """
        size = in_features if self.group_size == PER_CHANNEL else self.group_size
        if in_features % size:
            fits = [str(power) for power in (128, 64, 32, 16) if in_features % power == 0]
            raise ConfigError(
                f"QuantizationConfig.group_size = {size}: does not divide the {in_features} inputs of {name}; choose "
                f"{', '.join([*fits, '-1 (one scale for each output)'])}",
                field="QuantizationConfig.group_size",
            )
        return size
