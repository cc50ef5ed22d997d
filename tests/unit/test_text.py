"""Text sources: what is read, and what is refused in one line."""

from __future__ import annotations

import json

import pytest
import torch

from dpllm.base.errors import InputError
from dpllm.base.text import documents_sha256, encode, load_tokenizer, read_documents, sample_sequences


def refused(path) -> str:
    with pytest.raises(InputError) as e:
        read_documents(path)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("zwei Zeilen\nüber Äpfel\n", "utf-8")
    assert read_documents(tmp_path / "a.txt") == ["zwei Zeilen\nüber Äpfel\n"]


def test_jsonl_is_a_document_a_line(tmp_path):
    lines = [{"text": "one"}, {"text": "two\nlines", "id": 7}, {"text": "  "}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_documents(tmp_path / "a.jsonl") == ["one", "two\nlines"]


def test_only_newlines_part_jsonl_lines(tmp_path):
    text = "a\u2028b\u0085c"  # line separators to str.splitlines, and allowed inside JSON strings
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", "utf-8")
    assert read_documents(tmp_path / "a.jsonl") == [text]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n", "utf-8-sig")
    (tmp_path / "b.txt").write_text("two", "utf-8-sig")
    assert read_documents(tmp_path) == ["one", "two"]


def test_a_directory_is_its_text_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "sub" / "c.py").write_text("third")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    assert read_documents(tmp_path) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t", "empty"),
        ("a.jsonl", b"\n\n", "empty"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", b"\xff\xfeh\x00i\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "line 2"),
        ("a.jsonl", b'{"txt": "x"}', "line 1"),
        ("a.jsonl", b'{"text": 5}', "line 1"),
        ("a.jsonl", b'["text"]', "line 1"),
        ("a.jsonl", b"5", "line 1"),
        ("a.jsonl", b'{"text": "half a pair \\ud800"}', "line 1"),
    ],
)
def test_no_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


def test_nothing_there(tmp_path):
    assert "does not exist" in refused(tmp_path / "missing.txt")
    assert "holds no" in refused(tmp_path)


def test_a_broken_file_in_a_directory_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert "b.txt" in refused(tmp_path)


def test_corpus_hash_sees_where_documents_end():
    assert documents_sha256(["ab", "c"]) != documents_sha256(["a", "bc"])
    assert documents_sha256(["ab", "c"]) == documents_sha256(("ab", "c"))


def test_windows_are_cut_from_the_joined_text(tokenizer):
    documents = ["def f():\n    return 1\n" * 9, "class A:\n    pass\n" * 9]
    stream = [i for d in documents for i in tokenizer(d, add_special_tokens=False)["input_ids"]]
    rows = sample_sequences(documents, tokenizer, 1000, 16)
    assert rows.dtype == torch.int64
    assert rows.shape == (len(stream) // 15, 16)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    windows = [stream[i * 15 : (i + 1) * 15] for i in range(len(rows))]
    assert sorted(rows[:, 1:].tolist()) == sorted(windows)
    assert rows[:, 1:].tolist() != windows, "in random order: a part of them is a sample too"


def test_sampling_depends_on_the_seed_only(tokenizer, heldout_documents):
    once, again, other = (sample_sequences(heldout_documents[:4], tokenizer, 8, 32, s) for s in (0, 0, 1))
    assert once.shape == (8, 32)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert len({tuple(row) for row in once.tolist()}) == 8, "windows are drawn without repetition"


def test_too_short(tokenizer):
    with pytest.raises(InputError, match="at least 63 are needed") as e:
        sample_sequences(["short"], tokenizer, 4, 64)
    assert len(str(e.value).splitlines()) == 1


def test_encode_puts_bos_in_front_and_nothing_behind(tokenizer):
    ids = encode(tokenizer, "import os")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "import os"
    assert encode(tokenizer, "")[-1:] != [tokenizer.eos_token_id]


def test_encode_drops_an_appended_eos(tokenizer, tiny_checkpoint):
    from tokenizers import processors

    appending = load_tokenizer(tiny_checkpoint)
    appending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert appending("import os")["input_ids"][-1] == 1
    assert encode(appending, "import os") == encode(tokenizer, "import os")


def test_tokenizers_that_cannot_be_loaded(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded") as e:
        load_tokenizer(tmp_path)
    assert len(str(e.value).splitlines()) == 1
