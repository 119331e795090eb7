"""SmolLM2 from its published weights through our own verbs: trained on, fine-tuned, exported, read by transformers.

`python -m benchmarks.finetune [--workdir=DIR]`: some minutes on two cores. The texts are real and come with every
Python: the chapters of the language reference that `help()` shows go on with its pre-training, and the functions of the
standard library with the docstrings that their authors wrote become conversations. The commands are those of
docs/finetune_smollm2.md. With the same DIR, what is done is not done again.
"""

import argparse
import ast
import json
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data import topics

import jax
import numpy as np

from benchmarks.pretrained import smollm2_path
from benchmarks.results import Benchmark
from cpm_jax.checkpoints.manager import find_checkpoint, read_meta, restore_params
from cpm_jax.common.config import config_from_dict
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.data.loader import make_validation_loader, open_datasets
from cpm_jax.data.mixture import from_folders
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.train_step import make_eval_step, put_batch
from export.hf_check import HfCheck, check_hf

ROOT = Path(__file__).resolve().parents[1]
MODEL = ("arch/llama.gin", "size/smollm2_135m.gin", "data/folders.gin", "optim/cosine.gin", "runs/pretrain.gin")
SEQ_LEN = 512
BATCH_SIZE = 4
STEPS = {"pretrain": 24, "sft": 4}
WARMUP_STEPS = {"pretrain": 4, "sft": 1}
TRAINING = {
    "BATCH_SIZE": BATCH_SIZE,
    "NUM_MICROBATCHES": 2,
    "PEAK_LR": 1e-4,
    "LOG_EVERY": 2,
    "EVAL_EVERY": 12,
}
CHECKED_TEXT = ROOT / "docs" / "architecture.md"


def verb(name: str, workdir: Path, macros: Mapping[str, object], gin_files: Sequence[str] = ()) -> None:
    """Runs `python -m experiments.run <name>`."""
    command = [sys.executable, "-m", "experiments.run", name, f"--workdir={workdir}"]
    command += [f"--gin_file={file}" for file in gin_files]
    command += [f"--gin.{macro}={value}" for macro, value in macros.items()]
    print("$", shlex.join(["python", *command[1:]]), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def write_chapters(folder: Path) -> None:
    """Writes the chapters of the language reference as text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.topics.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")


def docstring_conversations() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Conversations in which a function of the standard library is shown and its docstring is written."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text("utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or not (text := ast.get_docstring(node)):
                continue
            quoted = node.body[0]
            code = "\n".join([*lines[node.lineno - 1 : quoted.lineno - 1], *lines[quoted.end_lineno : node.end_lineno]])
            if 60 <= len(text) <= 600 and 100 <= len(code) <= 1000:
                question = f"Write a docstring for this Python function.\n\n```python\n{code}\n```"
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
                yield {"messages": turns}


def held_out_loss(checkpoint: Path, dataset: Path) -> float:
    """Mean negative log-likelihood of the targets of a dataset's validation split, in nats per token."""
    folder = find_checkpoint(checkpoint)
    config = config_from_dict(ModelConfig, read_meta(folder)["model"])
    mixture, mesh = from_folders(str(dataset)), make_mesh(MeshConfig())
    params, _ = restore_params(folder)
    step = make_eval_step(config, num_sources=len(open_datasets(mixture)), mesh=mesh)
    sums = np.zeros(2)
    batches = make_validation_loader(mixture, BATCH_SIZE, process_index=0, process_count=1, num_workers=0)
    for batch in batches:
        losses = jax.device_get(step(params, put_batch(batch, mesh)))
        sums += losses.nll.sum(), losses.source_weight.sum()
    return float(sums[0] / sums[1])


def last_evaluation(workdir: Path) -> float:
    """The same quantity as the training itself measured it at its end."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["eval/loss"] for line in lines if "eval/loss" in line][-1]


def check_export(workdir: Path, folder: Path) -> HfCheck:
    """Compares a Hugging Face folder, as transformers computes it, with the checkpoint that it was made from."""
    checkpoint = find_checkpoint(workdir)
    config = config_from_dict(ModelConfig, read_meta(checkpoint)["model"])
    params, _ = restore_params(checkpoint)
    texts = [CHECKED_TEXT.read_text("utf-8"), "Once upon a time, there was a little girl who"]
    return check_hf(folder, params, config, Tokenizer.load(workdir / "tokenizer"), texts)


def main(argv: list[str] | None = None) -> int:
    """Runs everything and writes results/finetune.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=None, help="where to work; a temporary folder by default")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        run(arguments.workdir or Path(temporary))
    return 0


def run(workdir: Path) -> None:
    """The whole recipe, in a folder."""
    published, chapters, conversations = workdir / "smollm2", workdir / "chapters", workdir / "docstrings.jsonl"
    verb("convert", published, {"SOURCE": smollm2_path()})
    write_chapters(chapters)
    rows = [json.dumps(record, ensure_ascii=False) for record in docstring_conversations()]
    conversations.write_text("\n".join(rows[::3]) + "\n", "utf-8")
    settings = {"TOKENIZER": published / "tokenizer", "SEQ_LEN": SEQ_LEN, "VALIDATION_FRACTION": 0.1}
    texts, chats = workdir / "texts", workdir / "chats"
    verb("prepare", texts, settings | {"DATA": chapters})
    verb("prepare", chats, settings | {"DATA": conversations, "FORMAT": "chat"})

    stages = {
        "pretrain": (published, texts, "going on with pre-training: the Python language reference"),
        "sft": (workdir / "pretrain", chats, "fine-tuning: docstrings of the standard library"),
    }
    for name, (start, data, _) in stages.items():
        steps = STEPS[name]
        macros: dict[str, object] = {**TRAINING, "TRAIN_STEPS": steps, "WARMUP_STEPS": WARMUP_STEPS[name]}
        macros |= {"CHECKPOINT_EVERY": steps, "INIT_FROM": start, "DATA": data}
        macros |= {"DTYPE": "float32"} if name == "pretrain" else {"SEQ_LEN": SEQ_LEN}
        verb(name, workdir / name, macros, MODEL if name == "pretrain" else ())
    folder = workdir / "exported"
    verb("convert", folder, {"SOURCE": workdir / "sft", "FORMAT": "llama"})

    bench = Benchmark("finetune", command="python -m benchmarks.finetune")
    for name, (start, data, title) in stages.items():
        bench.add(
            f"{title}, {STEPS[name]} steps of {BATCH_SIZE} x {SEQ_LEN} tokens, held-out loss",
            "nats/token",
            last_evaluation(workdir / name),
            larger_is_better=False,
            baseline_name="before",
            baseline=held_out_loss(start, data),
            goal=1.0,
        )
    check = check_export(workdir / "sft", folder / "hf")
    print(check)
    bench.add(
        "exported and read by transformers, largest difference of logits",
        "of the largest",
        check.max_error / check.largest_logit,
        larger_is_better=False,
        baseline_name="at most 1e-4",
        baseline=1e-4,
        goal=1.0,
    )
    bench.write()


if __name__ == "__main__":
    sys.exit(main())
