import io

from cpm_jax.common import progress
from cpm_jax.common.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_shows_a_bar_with_rate_and_figures():
    out = Terminal()
    with Progress("train", 10, tokens_per_step=1000, file=out) as bar:
        for step in range(1, 11):
            bar.update(step, loss=1.23456)
        bar.write("a message")
    text = out.getvalue()
    assert "10/10" in text
    assert "tokens/s" in text
    assert "loss=1.235" in text
    assert "a message\n" in text


def test_log_is_quiet_between_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress("train", 1000, initial=500, tokens_per_step=100, file=out) as bar:
        for step in range(501, 601):
            now[0] += 1.0
            bar.update(step, loss=2.0)
    lines = out.getvalue().splitlines()
    assert len(lines) == 4  # every 30 s of 100 s, and the end
    assert lines[0] == "train: 530/1000 steps, 100 tokens/s, ETA 7:50, loss 2"
    assert lines[-1] == "train: 600/1000 steps, 100 tokens/s, ETA 6:40, loss 2"


def test_the_first_step_does_not_count_for_the_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress("train", 100, file=io.StringIO())
    now[0] = 60.0  # compilation
    bar.update(1)
    assert bar.rate == 0.0
    now[0] = 62.0
    bar.update(5)
    assert bar.rate == 2.0


def test_disabled_is_silent():
    out = io.StringIO()
    with Progress("train", 10, enabled=False, file=out) as bar:
        bar.update(10)
        bar.write("x")
    assert out.getvalue() == ""


def test_bytes_are_scaled_and_the_first_update_counts_where_nothing_compiles(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress("read", 4_000_000, unit="B", first_compiles=False, file=out) as bar:
        now[0] = 40.0
        bar.update(1_000_000, **{"documents/s": 12_345.6})
    assert out.getvalue().splitlines()[0] == "read: 1.00MB/4.00MB, ETA 2:00, documents/s 12,346"


def test_a_unit_has_its_name_on_lines_and_bars():
    out, terminal = io.StringIO(), Terminal()
    for file in (out, terminal):
        with Progress("write", 3, unit="shard", first_compiles=False, file=file) as bar:
            bar.update(3)
    assert out.getvalue().startswith("write: 3/3 shards, ETA 0:00")
    assert "shard/s" in terminal.getvalue()
