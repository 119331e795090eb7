"""A manifest tells a damaged, missing, changed or added file, and a damaged manifest is an error too."""

import json
from pathlib import Path

import pytest

from cpm_jax.common.files import sha256
from export.folders import ExportError
from export.manifest import Check, RecordedText, check_files, read_manifest, write_manifest

FIELDS = {
    "format": "hf",
    "architecture": "LlamaForCausalLM",
    "types": {"float32": 3},
    "parameters": 12,
    "source": {"name": "run/7", "kind": "checkpoint", "step": 7, "config_sha256": "ab"},
    "left_out": ("sparse attention is left out",),
    "checks": (Check("read_back", {"values": 12, "max_error": 0.5}),),
    "not_checked": {"transformers": "not installed"},
    "texts": (RecordedText("code", "a = 1\n", (5, 6), (7,), (7, 8), (1.5, -0.25)),),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path, **FIELDS)
    return tmp_path


def test_what_was_written_is_read(folder: Path) -> None:
    manifest = read_manifest(folder)
    for name, value in FIELDS.items():
        assert getattr(manifest, name) == value
    assert manifest.files.keys() == {"model.safetensors", "config.json"}
    entry = manifest.files["model.safetensors"]
    assert (entry.bytes, entry.sha256) == (7, sha256(folder / "model.safetensors"))
    assert {"python", "jax", "numpy", "tokenizers"} <= manifest.tools.keys()
    check_files(folder, manifest)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{]"), r"config.json has changed: sha256 \w{12}… is not"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"weight"), "has 6 bytes where the manifest says 7"),
        (lambda folder: (folder / "modeling_mine.py").write_text(""), "modeling_mine.py is not in the manifest"),
    ],
)
def test_other_files(damage, words: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ExportError, match=f"is not as it was exported: .*{words}"):
        check_files(folder, read_manifest(folder))


def test_all_problems_are_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    with pytest.raises(ExportError, match=r"config.json is missing; model.safetensors has changed"):
        check_files(folder, read_manifest(folder))


def test_names_that_lead_elsewhere_are_missing_files(folder: Path) -> None:
    """Only what lies in the folder is read, whatever the manifest says."""
    content = json.loads((folder / "manifest.json").read_text())
    secret = folder.parent / "secret"
    secret.write_text("secret")
    content["files"]["../secret"] = {"bytes": 6, "sha256": sha256(secret)}
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"\.\./secret is missing"):
        check_files(folder, read_manifest(folder))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is damaged: it is not JSON"),
        ("[" * 100_000, "is damaged: it is not JSON"),
        ("[]", "is of version None; this program reads version 1"),
        ('{"version": 2}', "is of version 2; this program reads version 1"),
        ('{"version": 1}', "Manifest.format: "),
    ],
)
def test_damaged_manifests(text: str, words: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ExportError, match=words):
        read_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ExportError, match="it was not written by the verb export"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": []}, "the text 'code' has 0 tokens, 2 after it and 2 logits"),
        ({"top_logits": [1.5]}, "the text 'code' has 2 tokens, 2 after it and 1 logits"),
        ({"top_tokens": [], "top_logits": []}, "the text 'code' has 2 tokens, 0 after it and 0 logits"),
        ({"greedy": [-7]}, "the text 'code' has tokens below 0"),
    ],
)
def test_recorded_texts_that_say_nothing(changes, words: str, folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["texts"][0] |= changes
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=f"is damaged: RecordedText.*{words}"):
        read_manifest(folder)


def test_fields_of_another_type(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["files"]["config.json"]["bytes"] = "many"
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"is damaged: Manifest\.files\.config\.json\.bytes = 'many'"):
        read_manifest(folder)
