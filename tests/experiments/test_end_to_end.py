"""Text to a model that answers, through the command line as a user has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpm_jax.checkpoints.manager import list_steps
from cpm_jax.common import exit_codes
from experiments import run

ROOT = Path(__file__).resolve().parents[2]
MODEL = [
    "--gin_file=arch/minicpm4.gin",
    "--gin_file=size/5m.gin",
    "--gin.VOCAB_SIZE=512",
    "--gin.NUM_LAYERS=1",
    "--gin.D_MODEL=64",
    "--gin.NUM_HEADS=2",
    "--gin.NUM_KV_HEADS=1",
    "--gin.HEAD_DIM=32",
    "--gin.D_FF=128",
]
PRETRAIN = [
    *MODEL,
    "--gin_file=data/folders.gin",
    "--gin_file=optim/wsd_mup.gin",
    "--gin_file=runs/pretrain.gin",
    "--gin.BATCH_SIZE=4",
    "--gin.TRAIN_STEPS=12",
    "--gin.WARMUP_STEPS=2",
    "--gin.DECAY_STEPS=4",
    "--gin.CHECKPOINT_EVERY=6",
    "--gin.EVAL_EVERY=6",
    "--gin.LOG_EVERY=1",
]


def command(*arguments: str, code: int = exit_codes.OK) -> str:
    """Runs the command line from another folder, as an installed package would be."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=500,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_prepare_pretrain_sft_generate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"Number {i} is followed by {i + 1}.\n" * 30)
    turns = [
        {"messages": [{"role": "user", "content": f"After {i}?"}, {"role": "assistant", "content": f"{i + 1}."}]}
        for i in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns) + "{not json\n")

    flags = ["--gin.VOCAB_SIZE=400", "--gin.SEQ_LEN=64", "--gin.VALIDATION_FRACTION=0.1", "--gin.NUM_WORKERS=0"]
    command("prepare", "--gin.DATA=text", *flags, "--workdir=set")
    assert (tmp_path / "set" / "manifest.json").exists()

    said = command("pretrain", *PRETRAIN, "--gin.DATA=set", "--workdir=base")
    assert list_steps("base/checkpoints") == [6, 12]
    assert losses(tmp_path / "base")[-1] < losses(tmp_path / "base")[0]
    assert {"command.txt", "config.gin", "operative_config.gin", "versions.json"} <= set(os.listdir("base"))
    said = command("pretrain", "--workdir=base")
    assert "nothing to do" in said
    config = Path("base/config.gin").read_text()
    said = command("pretrain", "--gin.BATCH_SIZE=8", "--workdir=base", code=exit_codes.BAD_CONFIG)
    assert "the workdir holds a run at step 12 with other settings" in said
    assert "Traceback" not in said
    assert Path("base/config.gin").read_text() == config

    anneal = [*MODEL, "--gin_file=data/folders.gin", "--gin_file=optim/wsd_mup.gin", "--gin_file=runs/anneal.gin"]
    anneal += ["--gin.BATCH_SIZE=4", "--gin.TRAIN_STEPS=9", "--gin.WARMUP_STEPS=2", "--gin.DECAY_STEPS=3"]
    command("pretrain", *anneal, "--gin.DATA=set", "--gin.INIT_FROM=base/checkpoints/6", "--workdir=annealed")
    assert list_steps("annealed/checkpoints") == [9]

    sft = [
        "--gin.INIT_FROM=base",
        "--gin.SEQ_LEN=64",
        "--gin.TRAIN_STEPS=6",
        "--gin.BATCH_SIZE=2",
        "--gin.PEAK_LR=1e-3",
    ]
    sft += ["--gin.VALIDATION_FRACTION=0.1", "--gin.EVAL_EVERY=3", "--gin.LOG_EVERY=1"]
    said = command("sft", "--gin.DATA=chat.jsonl", *sft, "--workdir=chat", "--dry_run")
    assert "chat.jsonl: " in said
    assert "FLOPs/token" in said
    assert not Path("chat").exists()
    command("sft", "--gin.DATA=chat.jsonl", *sft, "--workdir=chat")
    assert (
        "not json" in Path("chat/data/rejects.jsonl").read_text()
        or "JSON" in Path("chat/data/rejects.jsonl").read_text()
    )
    assert len(losses(tmp_path / "chat")) == 6
    assert "nothing to do" in command("sft", "--workdir=chat")
    # The same conversations as a dataset folder; and folders that do not fit.
    assert run.main(["sft", "--gin.DATA=chat/data", *sft, "--workdir=again", "--dry_run"]) == exit_codes.OK
    capsys.readouterr()
    assert run.main(["sft", "--gin.DATA=set", *sft, "--workdir=again"]) == exit_codes.BAD_INPUT
    assert "set was prepared with format 'text'" in capsys.readouterr().err
    assert run.main(["sft", "--gin.DATA=('set', 'chat.jsonl')", *sft, "--workdir=again"]) == exit_codes.BAD_INPUT
    assert "not both" in capsys.readouterr().err

    said = command(
        "generate", "--gin.PROMPTS=After 7?", "--gin.CHAT=True", "--gin.MAX_NEW_TOKENS=8", "--gin.OUTPUT=out.jsonl",
        "--workdir=chat",
    )  # fmt: skip
    record = json.loads(Path("out.jsonl").read_text())
    assert record["prompt"] == "After 7?"
    assert 0 < record["num_tokens"] <= 8
    assert "# cpm_jax sft" in Path("chat/config.gin").read_text()
    assert run.main(["generate", "--workdir=chat", "--dry_run"]) == exit_codes.OK
    assert "parameters " in capsys.readouterr().out
