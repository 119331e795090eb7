"""What the verb prints."""

from cpm_jax.data.prepare import PrepareConfig
from experiments.prepare import run


def test_run_says_what_is_there(tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"in/{number}").mkdir(parents=True)
        (tmp_path / f"in/{number}/text.txt").write_text(f"document {number % 2}")
    (tmp_path / "in/image.png").write_bytes(b"\0")
    config = PrepareConfig(sources=str(tmp_path / "in"), seq_len=8, vocab_size=300, num_workers=0)
    run(config, tmp_path / "out")
    first = capsys.readouterr().out.splitlines()
    assert first[0] == f"prepared: {tmp_path / 'out'}"
    assert first[1].startswith("  train: 1 documents, 10 bytes, ")
    assert first[2].startswith("  validation: 1 documents, 10 bytes, ")
    assert first[3:] == ["  exact duplicates dropped: 1", '  rejects (rejects.jsonl): {"binary content": 1}']
    run(config, tmp_path / "out")
    again = capsys.readouterr().out.splitlines()
    assert again == ["nothing to do: an earlier call was finished", *first]
