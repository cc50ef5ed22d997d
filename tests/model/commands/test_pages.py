"""The commands and the Python code of the documentation, run as they stand on the page.

A command is run literally, unless NOT_RUN says why it is not. The models of the examples have stand-ins: `llama-1b` is
the reference model with a chat template, `~/models/Llama-3.2-1B` is a tiny model. Where an example takes minutes on a
model of real size, the slow tests run it on these.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from pathlib import Path

import pytest
import typer.main
from pages import ROOT, Block, block_commands, blocks, is_synopsis, span_commands, words

import dpllm as package
from dpllm import reference
from dpllm.commands.app import app
from dpllm.commands.main import main  # noqa: F401  # registers the commands

PAGES = ("README.md", "docs/commands.md")
PREPARE = "dpllm quantize", "dpllm calibrate"
NOT_RUN = {
    "make demo": "installs an environment",
    "make test": "installs an environment",
    "make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu": "downloads torch",
    "pip install .": "installs an environment; make wheel-test does the same in a fresh one",
    "dpllm chat": "needs a terminal, and a model with a chat template",
}
SLOW = ("dpllm bench", "dpllm report", "dpllm demo", "dpllm profile", "dpllm doctor")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SLOW_HEADINGS = ("quantize", "calibrate", "plan")
NOTES = "We meet on Monday.\nWe decided to keep bees on the roof.\n" * 8


@pytest.fixture
def desk(tmp_path, monkeypatch, tiny_checkpoint) -> Path:
    """A folder to work in, with a home directory, a text, and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text(NOTES)
    shutil.copytree(tiny_checkpoint, tmp_path / "models" / "Llama-3.2-1B")
    return tmp_path


@pytest.fixture
def prepared(desk) -> Path:
    """The same, with an overlay that was quantised and calibrated before."""
    shutil.copytree(reference.overlay_path(), desk / "llama-1b")
    (desk / "llama-1b" / "chat_template.jinja").write_text(TEMPLATE)
    return desk


def commands_of(page: str) -> list[str]:
    """The commands of a page that are complete, in order."""
    spans = [c for c in span_commands(page) if not is_synopsis(c) and not is_name(c)]
    return [*block_commands(page), *spans]


def command_of(arguments: list[str]):
    """(the click command, its own arguments) of a command line."""
    command, rest = typer.main.get_command(app), arguments
    while rest and rest[0] in getattr(command, "commands", ()):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def is_name(command: str) -> bool:
    """Whether only the name of a command is given, and the command needs more than its name."""
    found, rest = command_of(words(command)[1:])
    needs = hasattr(found, "commands") or any(p.required for p in found.params)
    return needs and all(word.startswith("-") for word in rest)


def expanded(command: str) -> list[str]:
    return [re.sub(r"^~", str(Path.home()), word) for word in words(command)]


def check(dpllm, command: str) -> str:
    """Runs a command and returns what it printed."""
    name, *arguments = expanded(command)
    assert name == "dpllm", f"{command}: neither run nor in NOT_RUN"
    result = dpllm(*arguments)
    assert result.code == 0, f"{command}: {result.err}"
    assert "Traceback" not in result.err
    return result.out


# -- commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_commands(dpllm, prepared, page):
    for command in commands_of(page):
        if command not in NOT_RUN and not command.startswith((*SLOW, *PREPARE)):
            check(dpllm, command)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_that_take_a_minute(dpllm, prepared, page):
    for command in commands_of(page):
        if command.startswith(SLOW):
            check(dpllm, command)


@pytest.mark.slow
def test_a_model_of_ones_own(dpllm, desk):
    """Quantise, calibrate, generate: the commands follow one another on the page."""
    own = [c for c in block_commands("README.md") if "llama-1b" in c]
    assert [c.split()[1] for c in own] == ["quantize", "calibrate", "generate"]
    for command in own:
        check(dpllm, command)


def test_the_text_that_is_shown(dpllm, prepared):
    """The reference model says what README shows, apart from the line of figures."""
    [block] = [b for b in blocks("README.md") if b.language == "console"]
    first, *output = block.text.splitlines()
    assert output[-1].startswith("[40 tokens")
    assert check(dpllm, first.removeprefix("$ ")).rstrip("\n").splitlines() == output[:-1]


def test_what_is_not_run_stands_on_a_page():
    """Also, make commands name targets, and every page of commands has some."""
    on_pages = [c for page in PAGES for c in [*commands_of(page), *inline_makes(page)]]
    assert set(NOT_RUN) <= set(on_pages)
    assert all(block_commands(page) for page in PAGES)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    makes = [c for page in (*PAGES, "CONTRIBUTING.md") for c in [*block_commands(page), *inline_makes(page)]]
    named = {c.split()[1] for c in makes if c.startswith("make ")}
    assert {"demo", "test"} <= named <= set(targets)


def inline_makes(page: str) -> list[str]:
    return re.findall(r"`(make [^`]+)`", (ROOT / page).read_text())


@pytest.mark.parametrize(
    "page", [str(p.relative_to(ROOT)) for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")]]
)
def test_commands_and_options_that_are_named_exist(page):
    for command in [*block_commands(page), *span_commands(page)]:
        name, *arguments = words(command)
        if name != "dpllm" or arguments[0] == "COMMAND":
            continue
        found, rest = command_of(arguments)
        assert found is not typer.main.get_command(app), f"{page}: there is no command {command}"
        known = {o for p in found.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {word for word in rest if re.match("--?[a-z]", word)} <= known, f"{page}: {command}"


# -- Python ------------------------------------------------------------------------------------------------


def python_blocks(page: str, *, signatures: bool) -> list[Block]:
    """The blocks of Python code of a page, or the signatures."""
    found = [b for b in blocks(page) if b.language == "python"]
    return [b for b in found if signatures == bool(re.search(r"\) -> \w+$", b.text.strip()))]


def run(blocks: list[Block]) -> None:
    """Runs blocks one after the other, as one program."""
    names: dict = {"dpllm": package, "engine": package.load("llama-1b", target_bits=3.25)}
    for block in blocks:
        exec(compile(block.text, block.heading, "exec"), names)


def test_python_of_readme(prepared, capsys):
    run(python_blocks("README.md", signatures=False))
    assert "bees" in capsys.readouterr().out


def test_python_of_the_api_page(prepared, capsys):
    found = python_blocks("docs/api.md", signatures=False)
    run([b for b in found if b.heading not in SLOW_HEADINGS])
    assert "9 bits" in capsys.readouterr().out, "the example of an error prints it"
    assert {b.heading for b in found} > set(SLOW_HEADINGS)


@pytest.mark.slow
@pytest.mark.parametrize("heading", SLOW_HEADINGS)
def test_python_of_the_api_page_that_takes_minutes(prepared, heading):
    blocks_here = [b for b in python_blocks("docs/api.md", signatures=False) if b.heading == heading]
    if heading == "plan":
        return run(blocks_here)
    shutil.rmtree("llama-1b")  # the reference model would take minutes
    if heading == "calibrate":
        package.quantize("models/Llama-3.2-1B", "llama-1b", fisher="none")
    names: dict = {"dpllm": package}
    for block in blocks_here:
        exec(compile(block.text, heading, "exec"), names)
    assert Path("llama-1b", "config.json" if heading == "quantize" else "profile.safetensors").exists()


@pytest.mark.parametrize("block", python_blocks("docs/api.md", signatures=True), ids=lambda b: b.heading)
def test_signatures(block):
    """Names, order, kinds and defaults are those of the function; a default of `...` stands for any."""
    called, parameters = block.text.strip().split("(", 1)
    name = called.removeprefix("engine.").removeprefix("dpllm.")
    real = getattr(package.Engine if called.startswith("engine.") else package, name)
    parsed = ast.parse(f"def f({parameters}: pass").body[0].args
    written = {a.arg: "required" for a in parsed.args}
    written |= {
        a.arg: ast.literal_eval(d) for a, d in zip(parsed.args[::-1], parsed.defaults[::-1], strict=False)
    }
    written |= {
        a.arg: ast.literal_eval(d) for a, d in zip(parsed.kwonlyargs, parsed.kw_defaults, strict=True)
    }
    wanted = {p.name: p for p in inspect.signature(real).parameters.values() if p.name != "self"}
    assert list(written) == list(wanted)
    assert {a.arg for a in parsed.kwonlyargs} == {n for n, p in wanted.items() if p.kind is p.KEYWORD_ONLY}
    for key, value in written.items():
        default = wanted[key].default
        assert value in (..., "required" if default is inspect.Parameter.empty else default), key
