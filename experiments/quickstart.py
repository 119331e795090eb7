"""The verb `quickstart`: real text to a trained, measured, exported model and a report, in one call.

Seven stages, nine with curation and its verification, each of which is skipped where an earlier call finished it:
docs/quickstart.md.
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from cpm_jax.checkpoints.manager import CheckpointConfig, find_checkpoint, restore_params
from cpm_jax.checkpoints.weights import Weights, checkpoint_origin
from cpm_jax.common.config import ConfigError, config_dataclass, config_to_dict
from cpm_jax.common.extras import how_to_install
from cpm_jax.common.files import write_json
from cpm_jax.common.training_report import peak_memory
from cpm_jax.data.manifest import Manifest
from cpm_jax.data.mixture import Component, MixtureConfig
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation import bits_per_byte, compression
from cpm_jax.evaluation.documents import Documents, read_split
from cpm_jax.evaluation.ngram import NgramModel
from cpm_jax.inference.generate import Generator, collect
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import count_params, train_flops_per_token
from cpm_jax.training.loop import TrainConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import ScheduleConfig
from cpm_jax.training.train_state import abstract_state
from experiments import pretrain
from experiments.curate import CurateConfig
from experiments.prepare import summary
from experiments.quickstart_curation import (
    curated_text,
    keep_stable_checkpoint,
    run_curation,
    run_verification,
)
from experiments.quickstart_report import write_quickstart_report

STAGES = ("prepare", "pretrain", "evaluate", "sample", "export", "check", "report")
_TITLES = {
    "curate": "curate: filter, drop duplicates",
    "prepare": "prepare: clean, split, train a tokenizer, pack",
    "pretrain": "pre-train",
    "evaluate": "evaluate: bits per byte beside zstd and an n-gram model",
    "sample": "sample",
    "export": "write a Hugging Face folder",
    "check": "check it against transformers",
    "verify": "verify: is the curated text better than the raw one?",
    "report": "report",
}
STAGES_FILE = "stages.json"
DATA_DIR, HF_DIR, REPORT_FILE = "data", "hf", "report.html"


@config_dataclass
class QuickstartConfig:
    """What to train, on what, and how long.

    Attributes:
        prepare: the text and the tokenizer.
        model: the model.
        schedule: learning rate over `train.steps`.
        train: steps, batch size, logging, evaluation.
        optimizer: the optimizer.
        checkpoint: when to save.
        max_epochs: most passes over the training split. Where the text is too small for `train.steps`, the steps, and
            the phases of the schedule in proportion, are cut down to it.
        sampling: how samples are drawn.
        num_samples: number of held-out documents whose beginnings are continued.
        prompt_tokens: most tokens of such a beginning.
        sample_tokens: tokens of each continuation.
        ngram_order: longest n-gram of the model to compare with.
        ngram_tokens: most training tokens that it counts, to bound its memory (about 300 bytes each).
        curate: whether the text is curated before it is prepared.
        verify: whether the curated text is then compared with the raw one.
        curation: how it is curated; its sources are those of `prepare`.
        verify_steps: steps of an annealing on either.
        verify_seeds: annealings of each.
    """

    prepare: PrepareConfig
    model: ModelConfig
    schedule: ScheduleConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    max_epochs: PositiveInt = 10
    sampling: SamplingConfig = SamplingConfig()
    num_samples: NonNegativeInt = 4
    prompt_tokens: PositiveInt = 48
    sample_tokens: PositiveInt = 128
    ngram_order: PositiveInt = 5
    ngram_tokens: PositiveInt = 8_000_000
    curate: bool = False
    verify: bool = False
    curation: CurateConfig | None = None
    verify_steps: PositiveInt = 100
    verify_seeds: PositiveInt = 2

    def __post_init__(self) -> None:
        if self.curate and self.curation is None:
            raise ConfigError(
                "QuickstartConfig.curation = None: with curate = True a CurateConfig is needed",
                field="QuickstartConfig.curation",
            )
        if self.verify and not self.curate:
            raise ConfigError(
                "QuickstartConfig.verify = True: compares the curated text with the raw one, and needs curate = True",
                field="QuickstartConfig.verify",
            )
        if self.prepare.format != "text":
            raise ConfigError(
                f"PrepareConfig.format = {self.prepare.format!r}: a quickstart trains on text; for conversations run "
                "prepare and sft",
                field="PrepareConfig.format",
            )
        if not self.prepare.validation_fraction:
            raise ConfigError(
                "PrepareConfig.validation_fraction = 0: a quickstart measures on held-out text; must be above 0",
                field="PrepareConfig.validation_fraction",
            )
        if (self.prepare.vocab_size or 0) > self.model.vocab_size:
            raise ConfigError(
                f"ModelConfig.vocab_size = {self.model.vocab_size}: must be at least that of the tokenizer to train, "
                f"PrepareConfig.vocab_size = {self.prepare.vocab_size}",
                field="ModelConfig.vocab_size",
            )
        longest = max(self.prepare.seq_len, self.prompt_tokens + self.sample_tokens)
        if longest > self.model.max_position_embeddings:
            raise ConfigError(
                f"ModelConfig.max_position_embeddings = {self.model.max_position_embeddings}: must be at least "
                f"PrepareConfig.seq_len and QuickstartConfig.prompt_tokens + sample_tokens, here {longest}",
                field="ModelConfig.max_position_embeddings",
            )


class Stages:
    """Which stages a workdir has behind it, how long each took and what it found; kept in `stages.json`."""

    def __init__(self, workdir: Path, key: str, names: Sequence[str] = STAGES):
        """Reads what earlier calls did.

        Args:
            workdir: folder of the run.
            key: hash of the config: what was done under another one is done again.
            names: of the stages, in order.
        """
        self._names = tuple(names)
        self._path = workdir / STAGES_FILE
        self._key = key
        self._done: dict[str, Any] = {}
        if self._path.exists():
            content = json.loads(self._path.read_text("utf-8"))
            self._done = content["stages"] if content["key"] == key else {}

    @property
    def complete(self) -> bool:
        """Whether every stage is done."""
        return all("result" in self._done.get(name, {}) for name in self._names)

    @property
    def seconds(self) -> dict[str, float]:
        """Time of each stage that was begun, over all calls that ended by themselves."""
        return {name: entry["seconds"] for name, entry in self._done.items()}

    def do(self, name: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Does a stage, or gives what an earlier call found.

        Args:
            name: one of the stages.
            function: does it, and returns what later stages and the report need to know, as JSON.
        """
        header = f"[{self._names.index(name) + 1}/{len(self._names)}] {_TITLES[name]}"
        entry = self._done.get(name, {})
        if "result" in entry:
            print(f"{header}: done before, in {entry['seconds']:.1f} s", flush=True)
            return entry["result"]
        print(header, flush=True)
        begin = time.monotonic()
        result = None
        try:
            result = function()
        finally:
            seconds = entry.get("seconds", 0.0) + time.monotonic() - begin
            self._done[name] = {"seconds": seconds} | ({} if result is None else {"result": result})
            write_json(self._path, {"key": self._key, "stages": self._done})
        return result


def run(config: QuickstartConfig, workdir: Path) -> None:
    """Goes through the stages in `workdir`, from where an earlier call ended.

    Raises:
        ConfigError: sizes that do not fit each other, or settings that changed since the last call.
        InputError: the text cannot be read, or there is none.
        exit_codes.Stop: the training was told to stop, or its loss is not finite.
        export.hf_check.ExportError: transformers does not give what our model gives.
    """
    key = hashlib.sha256(json.dumps(config_to_dict(config), sort_keys=True).encode()).hexdigest()
    report_path = workdir / REPORT_FILE
    stages = Stages(workdir, key, stage_names(config))
    if stages.complete and report_path.exists():
        print(f"this quickstart is done; its report is {report_path}\nfor another one give --workdir another folder")
        return
    data = workdir / DATA_DIR
    curated = stages.do("curate", lambda: run_curation(config, workdir)) if config.curate else None

    def do_prepare() -> dict[str, Any]:
        manifest = prepare(curated_text(config, workdir), data)
        print(summary(manifest, data))
        return {}

    stages.do("prepare", do_prepare)
    manifest = Manifest.load(data)
    job = pretrain_config(config, manifest, data)
    checkpoint, stable_step = keep_stable_checkpoint(job)
    if config.verify:
        job = dataclasses.replace(job, checkpoint=checkpoint)

    def do_pretrain() -> dict[str, Any]:
        print(describe(job, manifest))
        pretrain.run(job, workdir)
        return {"memory": training_memory(job)}

    trained = stages.do("pretrain", do_pretrain)
    tokenizer = Tokenizer.load(data / "tokenizer")
    params, meta = restore_params(workdir)
    held_out = read_split(data, "validation")
    scores = stages.do("evaluate", lambda: score(config, params, held_out, data, tokenizer))
    samples = stages.do("sample", lambda: {"samples": draw_samples(config, params, held_out, tokenizer)})
    exported = stages.do("export", lambda: export(config, params, meta, manifest, scores, tokenizer, workdir))
    checked = stages.do("check", lambda: check(config, params, held_out, tokenizer, workdir))
    verified = None
    if config.verify:
        verified = stages.do("verify", lambda: run_verification(config, stable_step, data, workdir))

    def do_report() -> dict[str, Any]:
        write_quickstart_report(
            report_path,
            config=config,
            job=job,
            manifest=manifest,
            memory=trained["memory"],
            scores=scores,
            samples=samples["samples"],
            exported=exported,
            checked=checked,
            curated=curated,
            verified=verified,
            seconds=stages.seconds,
        )
        return {}

    stages.do("report", do_report)
    total = sum(stages.seconds.values())
    print(
        f"done in {total / 60:.1f} minutes: {scores['model']['value']:.3f} bits per byte on held-out text "
        f"(zstd -19: {scores['zstd']['value']:.3f})\n"
        f"report: {report_path}\nHugging Face folder: {workdir / HF_DIR}\n"
        f"try it: python -m experiments.run generate --workdir={workdir}"
    )


def stage_names(config: QuickstartConfig) -> tuple[str, ...]:
    """The stages that a config asks for, in order."""
    *most, last = STAGES
    return (*(["curate"] if config.curate else []), *most, *(["verify"] if config.verify else []), last)


def pretrain_config(config: QuickstartConfig, manifest: Manifest, data: Path) -> pretrain.PretrainConfig:
    """The training job: cut down, if need be, to `max_epochs` passes over the training split."""
    rows = manifest.splits["train"].records
    most = max(1, math.ceil(config.max_epochs * rows / config.train.batch_size))
    steps = min(config.train.steps, most)
    share = steps / config.train.steps
    phases = tuple(
        dataclasses.replace(phase, steps=max(1, round(phase.steps * share)) if phase.steps else 0)
        for phase in config.schedule.phases
    )
    often = max(1, steps // 8)
    return pretrain.PretrainConfig(
        model=config.model,
        mixture=MixtureConfig(components=(Component(name="text", path=str(data)),)),
        schedule=dataclasses.replace(config.schedule, phases=phases),
        train=dataclasses.replace(config.train, steps=steps, eval_every=min(config.train.eval_every, often)),
        optimizer=config.optimizer,
        checkpoint=dataclasses.replace(config.checkpoint, every=min(config.checkpoint.every, often)),
    )


def describe(job: pretrain.PretrainConfig, manifest: Manifest) -> str:
    """What is about to be trained, for the terminal."""
    tokens = job.train.steps * job.train.batch_size * manifest.seq_len
    epochs = tokens / max(1, manifest.splits["train"].tokens)
    return (
        f"  {count_params(job.model).total:,} parameters, {job.train.steps:,} steps of "
        f"{job.train.batch_size} × {manifest.seq_len} tokens: {tokens:,} tokens, {epochs:.2g} passes"
    )


def training_memory(job: pretrain.PretrainConfig) -> dict[str, int]:
    """Bytes of the training state by kind, and the most that this process has held."""
    update = make_optimizer(job.optimizer, job.schedule, job.model)
    state = abstract_state(job.model, update)

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    parameters = size(state.params)
    return {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": size(state.opt_state),
        "process, peak": peak_memory(),
    }


def score(
    config: QuickstartConfig, params: dict[str, Any], held_out: Documents, data: Path, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Bits per byte of the model, zstd and an n-gram model on the same held-out documents."""
    model = bits_per_byte.evaluate(
        params, config.model, held_out, window=config.prepare.seq_len, bos_id=tokenizer.bos_id, progress=True
    )
    print(f"  this model: {model}", flush=True)
    train = read_split(data, "train", max_tokens=config.ngram_tokens)
    plain = compression.zstd(held_out.texts)
    primed = compression.zstd_with_reference(held_out.texts, train.texts)
    print(f"  zstd -19: {plain.bits_per_byte:.4f}; with the training text before it: {primed.bits_per_byte:.4f}")
    counted = NgramModel(train.tokens, config.model.vocab_size, config.ngram_order)
    first = bits_per_byte.first_token_bits(held_out, tokenizer.bos_id, config.model.vocab_size)
    ngram = bits_per_byte.summarise(counted.document_bits(held_out.tokens) + first, held_out)
    print(f"  {config.ngram_order}-gram model: {ngram}", flush=True)
    return {
        "model": dataclasses.asdict(model),
        "ngram": dataclasses.asdict(ngram)
        | {"ngrams": counted.num_ngrams, "train_tokens": sum(map(len, train.tokens))},
        "zstd": {"value": plain.bits_per_byte, "bytes": plain.compressed_bytes},
        "zstd_primed": {"value": primed.bits_per_byte, "reference_bytes": primed.reference_bytes},
        "decoded_bytes": int(held_out.document_bytes.sum()),
    }


def draw_samples(
    config: QuickstartConfig, params: dict[str, Any], held_out: Documents, tokenizer: Tokenizer
) -> list[dict[str, str]]:
    """Continues the beginnings of held-out documents, which lie evenly over the split."""
    chosen = np.linspace(0, len(held_out) - 1, min(config.num_samples, len(held_out))).astype(int)
    prompts = []
    for index in chosen:
        tokens = held_out.tokens[index]
        prompts.append([int(t) for t in tokens[: min(config.prompt_tokens, max(1, len(tokens) // 2))]])
    if not prompts:
        return []
    generator = Generator(config.model, params, tokenizer)
    completions = collect(
        generator.stream(prompts, sampling=config.sampling, max_new_tokens=config.sample_tokens, seed=config.train.seed)
    )
    samples = [
        {
            "title": f"held-out document {index + 1} of {len(held_out)}",
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "text": completion.text,
        }
        for index, prompt, completion in zip(chosen, prompts, completions, strict=True)
    ]
    for sample in samples:
        print(f"  --- {sample['title']} ---\n{sample['prompt']}▌{sample['text']}", flush=True)
    return samples


def export(
    config: QuickstartConfig,
    params: dict[str, Any],
    meta: dict[str, Any],
    manifest: Manifest,
    scores: dict[str, Any],
    tokenizer: Tokenizer,
    workdir: Path,
) -> dict[str, Any]:
    """Writes the Hugging Face folder, checked, with a manifest and the facts of the training in its model card."""
    from experiments.export import ExportConfig, tell, write_hf
    from export.publish import publish_export

    facts = {
        "Text": ", ".join(manifest.sources),
        "Steps": f"{meta['step']:,}",
        "Tokens": f"{meta['tokens_seen']:,}",
        "Held-out bits per byte": str(bits_per_byte.BitsPerByte(**scores["model"])),
        "zstd -19 on the same text": f"{scores['zstd']['value']:.4f}",
        "Commit": meta["git_revision"] or "unknown",
    }
    origin = checkpoint_origin(find_checkpoint(workdir), meta, config.model, tokenizer)
    weights = Weights(config.model, params, tokenizer, imported={}, facts=facts, origin=origin)
    written, checked = publish_export(
        workdir / HF_DIR, "hf", weights, lambda folder: write_hf(ExportConfig(), weights, weights.dtype, folder)
    )
    tell(written, checked)
    print(f"  {workdir / HF_DIR}: {written.architecture}, {written.parameters:,} parameters")
    return {
        "architecture": written.architecture,
        "parameters": written.parameters,
        "left_out": sum(leaf.size for leaf in jax.tree.leaves(params.get("mtp_layers", {}))),
        "flops_per_token": train_flops_per_token(config.model, manifest.seq_len),
    }


def check(
    config: QuickstartConfig, params: dict[str, Any], held_out: Documents, tokenizer: Tokenizer, workdir: Path
) -> dict[str, Any]:
    """Loads the folder with transformers and compares; says so where transformers or torch is not installed."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"  not checked: {' and '.join(missing)} not installed ({how_to_install('export')})")
        return {"missing": missing}
    from export.hf_check import check_hf

    longest_first = np.argsort([-len(tokens) for tokens in held_out.tokens], kind="stable")
    texts = [held_out.texts[index] for index in longest_first[:2]]
    result = check_hf(workdir / HF_DIR, params, config.model, tokenizer, texts, max_tokens=config.prepare.seq_len)
    print(f"  {result}")
    return dataclasses.asdict(result)
