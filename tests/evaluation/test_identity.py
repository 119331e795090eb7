"""By what a folder of results is known again."""

import pytest

from cpm_jax.evaluation.errors import ResumeError
from cpm_jax.evaluation.identity import claim, model_identity


def test_of_weights_wherever_they_lie(random_model, another_model):
    ours = model_identity(random_model.config, random_model.params, "t")
    assert model_identity(random_model.config, dict(reversed(random_model.params.items())), "t") == ours
    other = model_identity(random_model.config, another_model.params, "t")
    assert other["weights_sha256"] != ours["weights_sha256"]


def test_a_folder_is_claimed_once(tmp_path):
    claim(tmp_path, {"weights_sha256": "x"}, {"seed": 0})
    claim(tmp_path, {"weights_sha256": "a"}, {"seed": 0})  # nothing was measured for x
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "t.jsonl").write_text("{}")
    claim(tmp_path, {"weights_sha256": "a"}, {"seed": 0})
    with pytest.raises(ResumeError, match=r"model.weights_sha256: 'a' there, 'b' now"):
        claim(tmp_path, {"weights_sha256": "b"}, {"seed": 0})
    (tmp_path / "evaluation.json").write_text("[")
    with pytest.raises(ResumeError, match="does not say what the items in"):
        claim(tmp_path, {"weights_sha256": "a"}, {"seed": 0})
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(ResumeError, match="does not say what the items in"):
        claim(tmp_path, {"weights_sha256": "a"}, {"seed": 0})
