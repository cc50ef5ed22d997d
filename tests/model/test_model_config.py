"""config.json and generation_config.json mean for dpllm what they mean for transformers."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import edit_json
from transformers import AutoModelForCausalLM

from dpllm.base.errors import InputError
from dpllm.model.config import end_token_ids

ABSENT = object()


@pytest.fixture
def model(checkpoints, tmp_path):
    """A checkpoint of one's own to edit."""
    return shutil.copytree(checkpoints / "llama", tmp_path / "model")


def write_end_tokens(model, config, generation) -> None:
    """Puts `eos_token_id` into both files. ABSENT leaves the field out; None as `generation` leaves out the file."""
    fields = json.loads((model / "config.json").read_text())
    fields.pop("eos_token_id", None)
    (model / "config.json").write_text(json.dumps(fields))
    if config is not ABSENT:
        edit_json(model / "config.json", eos_token_id=config)
    (model / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))


@pytest.mark.parametrize("config", [1, [1, 5], [], None, ABSENT])
@pytest.mark.parametrize(
    "generation", [None, {}, {"eos_token_id": 7}, {"eos_token_id": [7, 1, 9]}, {"eos_token_id": None}]
)
def test_end_tokens_are_those_of_transformers(model, config, generation):
    write_end_tokens(model, config, generation)
    wanted = AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id
    wanted = [] if wanted is None else wanted if isinstance(wanted, list) else [wanted]
    assert list(end_token_ids(model)) == wanted


@pytest.mark.parametrize("value", ["1", 1.5, True, [1, "2"], {"id": 1}])
def test_end_tokens_that_are_no_numbers_are_refused(model, value):
    write_end_tokens(model, 1, {"eos_token_id": value})
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is"):
        end_token_ids(model)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_damaged_generation_config_is_refused(model, content):
    (model / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"generation_config\.json"):
        end_token_ids(model)
