"""End tokens, suggested options and notes about the text, as the command line tells them."""

from __future__ import annotations

import pytest
from command_line import edit_json
from scripted_models import save_scripted, token_chain


@pytest.fixture
def saying(tokenizer, tmp_path):
    """A checkpoint that continues 'A' with 'bcdef' and an end token."""
    chain = [*token_chain(tokenizer, "Abcdef"), tokenizer.eos_token_id]
    save_scripted(tmp_path / "saying", tokenizer, chain)
    return tmp_path / "saying"


def test_every_end_token_of_the_generation_config_ends(ok, saying, tokenizer):
    edit_json(saying / "generation_config.json", eos_token_id=[1, token_chain(tokenizer, "d")[0]])
    said = ok("generate", "A", "--overlay", saying, "--json").json
    assert (said["text"], said["stopped_by"]) == ("bc", "end token")
    edit_json(saying / "generation_config.json", eos_token_id=None)
    unended = ok("generate", "A", "--overlay", saying, "--max-new-tokens", 9, "--json").json
    assert unended["stopped_by"] == "max_new_tokens", (
        "as with transformers, the file alone decides where it exists"
    )
    (saying / "generation_config.json").unlink()
    assert ok("generate", "A", "--overlay", saying, "--json").json["text"] == "bcdef"


def test_a_wrong_end_token(refused, saying):
    edit_json(saying / "generation_config.json", eos_token_id="x")
    refused("generate", "A", "--overlay", saying, says="eos_token_id is 'x'")


def test_stop_tokens(ok, refused, saying):
    arguments = ("generate", "A", "--overlay", saying, "--json")
    said = ok(*arguments, "--stop-token", "e").json
    assert (said["text"], said["stopped_by"]) == ("bcd", "stop token")
    for option in ("--stop-token", "--stop"):  # a special token is not part of the text, and yet ends it
        edit_json(saying / "generation_config.json", eos_token_id=0)
        said = ok(*arguments, option, "</s>").json
        assert (said["text"], said["stopped_by"]) == ("bcdef", "stop token")
    refused(*arguments, "--stop-token", "q w z", says="'q w z' is not one token")


def test_suggested_options_are_said_and_not_forced(ok, saying):
    edit_json(saying / "generation_config.json", temperature=0.6, top_p=0.9, do_sample=True)
    result = ok("generate", "A", "--overlay", saying)
    assert result.out == "bcdef\n" and result.err.count("suggests: --temperature 0.6 --top-p 0.9") == 1
    assert "suggests" not in ok("generate", "A", "--overlay", saying, "--temperature", 0.1).err
    facts = ok("inspect", saying, "--json").json
    assert facts["suggested_sampling"] == {"temperature": 0.6, "top_p": 0.9} and facts["end_tokens"] == [1]


def test_a_doubled_start_and_used_up_positions_are_noted(ok, saying):
    assert "begins with <s>" in ok("generate", "<s>A", "--overlay", saying).err
    edit_json(saying / "config.json", max_position_embeddings=4)
    result = ok("generate", "A", "--overlay", saying)
    assert "4 positions are used up" in result.err and "begins with" not in result.err


def test_code_of_a_model_is_neither_run_nor_asked_about(refused, saying, tmp_path):
    edit_json(saying / "tokenizer_config.json", tokenizer_class="FooTokenizer",
              auto_map={"AutoTokenizer": ["foo.FooTokenizer", None]})  # fmt: skip
    (saying / "foo.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(9)\n")
    for command in (("generate", "A", "--overlay", saying), ("quantize", saying, tmp_path / "out")):
        refused(*command, stdin="y\ny\n", says="never runs")
    assert not (tmp_path / "ran").exists()


def test_a_model_without_policy_is_called_unquantised(ok, saying):
    err = ok("generate", "A", "--overlay", saying).err
    assert "· unquantised ·" in err and "None" not in err


def test_eval_says_how_much_it_scores(ok, tiny_overlay, tokenizer, tmp_path):
    text = tmp_path / "three.jsonl"
    text.write_text("".join(f'{{"text": "{word * 9}"}}\n' for word in ("bees ", "cats ", "dogs ")))
    whole = [len(tokenizer(word * 9)["input_ids"]) for word in ("bees ", "cats ", "dogs ")]
    common = ("eval", text, "--overlay", tiny_overlay, "--target-bits", "4", "--policy", "uniform", "--json")

    everything = ok(*common)
    assert "only a part" not in everything.err
    assert everything.json["text"] == {
        "tokens": sum(whole), "tokens_given": sum(whole), "documents": 3, "documents_given": 3,
    }  # fmt: skip

    cut = ok(*common, "--context", 5)
    line = f"only a part of the text is scored: 15 of {sum(whole)} tokens, because --context is 5 a document."
    assert cut.err.count(line) == 1 and cut.json["text"]["tokens"] == 15
    assert cut.json["results"][0]["tokens"] == 12

    ended = ok(*common, "--max-tokens", whole[0])
    assert "1 of 3 documents (2 left out: --max-tokens" in ended.err
    assert ended.json["text"] == {
        "tokens": whole[0], "tokens_given": whole[0], "documents": 1, "documents_given": 3,
    }  # fmt: skip


def test_eval_says_that_positions_cut_documents(ok, tiny_overlay, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("The bees live in the attic. " * 300)
    result = ok("eval", long, "--overlay", tiny_overlay, "--target-bits", "4", "--policy", "uniform",
                "--context", 10**6)  # fmt: skip
    assert "because the number of the model's positions is" in result.err
