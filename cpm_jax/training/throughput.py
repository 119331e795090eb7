"""Tokens a second, and the share of the device's peak that the model's arithmetic takes (MFU)."""

import time

import jax

# Dense bf16 peak of one JAX device, in TFLOP/s, from the makers' data sheets. A device kind takes the first entry that
# it begins with.
PEAK_TFLOPS = (
    ("TPU v6", 918.0),  # "TPU v6 lite", "TPU v6e"
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5", 459.0),  # v5p
    ("TPU v4", 275.0),
    ("TPU v3", 61.5),  # of a core, which is what JAX calls a device here; a chip has two
    ("NVIDIA B200", 2250.0),
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H100", 989.0),
    ("NVIDIA H200", 989.0),
    ("NVIDIA A100", 312.0),
    ("NVIDIA L40S", 362.0),
    ("NVIDIA L4", 121.0),
)


def peak_flops(device_kind: str) -> float | None:
    """Published dense bf16 FLOP/s of a device, None where it is not in the table (CPUs)."""
    for prefix, tflops in PEAK_TFLOPS:
        if device_kind.startswith(prefix):
            return tflops * 1e12
    return None


class Throughput:
    """Measures the time between readings."""

    def __init__(self, tokens_per_step: int, flops_per_token: float):
        """Starts the clock.

        Args:
            tokens_per_step: tokens in a global batch.
            flops_per_token: forward and backward pass, from `modeling.model_size.train_flops_per_token`.
        """
        self._tokens_per_step, self._flops_per_token = tokens_per_step, flops_per_token
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * jax.device_count()
        self.restart(0)

    def restart(self, step: int) -> None:
        """Leaves out the time up to now: compilation, evaluation, saving."""
        self._step, self._time = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """The rates since the last reading or restart.

        Args:
            step: steps done, at least one more than then.

        Returns:
            `seconds_per_step`, `tokens_per_second`, and where the device's peak is known `mfu`, from 0 to 1.
        """
        seconds = (time.perf_counter() - self._time) / (step - self._step)
        tokens_per_second = self._tokens_per_step / seconds
        rates = {"seconds_per_step": seconds, "tokens_per_second": tokens_per_second}
        if self._peak is not None:
            rates["mfu"] = tokens_per_second * self._flops_per_token / self._peak
        self.restart(step)
        return rates
