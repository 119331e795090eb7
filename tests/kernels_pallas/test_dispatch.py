"""Which implementation an op runs: the platform's kernel where it can serve, what was named, or an error."""

import logging

import pytest

from kernels_pallas import dispatch
from kernels_pallas.dispatch import UnsupportedError, choose_implementation

NAMES = ("reference", "xla", "pallas_tpu", "pallas_gpu")


@pytest.mark.parametrize(
    ("platform", "unsupported", "chosen"),
    [
        ("cpu", {"pallas_tpu": None, "pallas_gpu": None}, "xla"),
        ("tpu", {"pallas_tpu": None, "pallas_gpu": None}, "pallas_tpu"),
        ("tpu", {"pallas_tpu": "too wide", "pallas_gpu": None}, "xla"),
        ("gpu", {"pallas_tpu": None, "pallas_gpu": None}, "pallas_gpu"),
        ("cuda", {"pallas_tpu": None, "pallas_gpu": "too wide"}, "xla"),
        ("gpu", {"pallas_tpu": None}, "xla"),
    ],
)
def test_the_choice_is_the_platforms_kernel_where_it_can_serve(platform, unsupported, chosen, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "target_platform", lambda: platform)
    dispatch.log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "kernels_pallas"):
        for _ in range(2):
            assert choose_implementation("op", None, NAMES, unsupported) == chosen
    [line] = caplog.messages  # once
    assert chosen in line
    refused = unsupported.get(dispatch._KERNELS.get(platform)) is not None
    assert caplog.records[0].levelno == (logging.WARNING if refused else logging.INFO)
    assert ("too wide" in line) == ("too wide" in unsupported.values())


def test_a_name_is_served_or_refused():
    assert choose_implementation("op", "reference", NAMES, {"pallas_tpu": "too wide"}) == "reference"
    with pytest.raises(UnsupportedError, match="op: implementation = 'pallas_tpu': too wide"):
        choose_implementation("op", "pallas_tpu", NAMES, {"pallas_tpu": "too wide"})
    with pytest.raises(UnsupportedError, match="op: implementation = 'cuda': must be None or one of 'reference'"):
        choose_implementation("op", "cuda", NAMES, {})
