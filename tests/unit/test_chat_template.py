"""Chat templates that refuse, are broken, or want contents in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_kinds import tokenizer_kinds

from dpllm.base.errors import InputError
from dpllm.decode.chat_template import ChatTemplate

PARTS = "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{{ c['text'] }}{% endfor %}{% endfor %}"
STRICT_PARTS = "{% for m in messages %}{{ m.content[0].text + '!' }}{% endfor %}"
TEXTS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "<part>{{ c.text }}{% endfor %}{% endif %}{% endfor %}"
)
SAID = [{"role": "user", "content": "hello"}]


@pytest.fixture
def template():
    def make(text) -> ChatTemplate:
        tokenizer = tokenizer_kinds()["byte-level"]
        tokenizer.chat_template = text
        return ChatTemplate(tokenizer, Path("m"))

    return make


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PARTS, "[user]hello"),
        (STRICT_PARTS, "hello!"),
        (TEXTS, "[user]hello"),
        (EITHER, "hello"),
        ({"default": TEXTS, "rag": "x"}, "[user]hello"),
    ],
)
def test_templates_that_work(template, text, expected):
    made = template(text)
    assert made.apply(SAID) == expected
    ids = made.apply(SAID, tokenize=True)
    assert ids == made.tokenizer(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [PARTS, TEXTS])
def test_contents_in_parts_are_taken(template, text):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert template(text).apply([{"role": "user", "content": parts}]) == "[user]hello"
    with pytest.raises(InputError, match="of the type 'text'"):
        template(text).apply([{"role": "user", "content": [{"type": "image", "url": "x"}]}])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
        ("{% for m in messages %}{{ m.content ", "unexpected end of template"),
        ("{{ messages[0]['tool_calls'][0]['id'] }}", "tool_calls"),
        ({"tool_use": "x", "rag": "y"}, "rag, tool_use, but none"),
        ("nothing", "leaves out what was said"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "m cannot format these messages"),
        ("{% for i in range(10**9) %}{% endfor %}", "m cannot format these messages"),
        (5, "m cannot format these messages"),
        (None, "no chat template"),
    ],
)
def test_templates_that_do_not(template, text, says):
    with pytest.raises(InputError, match=says) as e:
        template(text).apply(SAID)
    assert len(str(e.value).splitlines()) == 1


def test_only_some_messages_are_refused(template):
    """What the template says of the real text counts, not only of a probe."""
    made = template(
        "{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}" + TEXTS
    )
    assert made.apply(SAID) == "[user]hello"
    with pytest.raises(InputError, match="not that"):
        made.apply([{"role": "user", "content": "no"}])
