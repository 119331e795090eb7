import pytest

from cpm_jax.training import throughput
from cpm_jax.training.throughput import Throughput, peak_flops


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_peak_of_known_devices(kind, tflops):
    assert peak_flops(kind) == tflops * 1e12


def test_peak_of_others_is_unknown():
    assert peak_flops("cpu") is None


def test_rates_leave_out_what_is_before_a_restart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput, "peak_flops", lambda kind: 1e6)
    monkeypatch.setattr(throughput.jax, "device_count", lambda: 2)
    meter = Throughput(tokens_per_step=1000, flops_per_token=600.0)
    now[0] = 100.0  # compiling
    meter.restart(1)
    now[0] = 102.0
    assert meter.read(5) == {"seconds_per_step": 0.5, "tokens_per_second": 2000.0, "mfu": pytest.approx(0.6)}
    now[0] = 103.0
    assert meter.read(6)["seconds_per_step"] == 1.0
