"""A conversation on the screen: prints answers as they come, and carries out the commands between them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpllm.base.errors import InputError
from dpllm.commands.common import note, print_json, stderr
from dpllm.commands.generate import hold_time, note_positions, summarize
from dpllm.commands.terminal_input import EditedLines, Interrupts, Lines

if TYPE_CHECKING:
    from dpllm.conversation import Conversation, ConversationStats
    from dpllm.decode.generation import Generation

SPARE = 16  # with fewer positions left than this, the user is told


@dataclass(frozen=True)
class SlashCommand:
    """A command within a chat. example: its name, with an argument if it takes one."""

    run: Callable[[str], None]
    example: str
    help: str

    @property
    def takes_argument(self) -> bool:
        """Whether something must follow the name."""
        return " " in self.example


class Session:
    """Reads lines, prints answers, and carries out the commands."""

    def __init__(
        self, conversation: Conversation, *, json: bool, max_quality_loss: str | None, headroom: float | None
    ):
        """json: print an object per answer instead of its text. max_quality_loss, headroom: of targets in ms."""
        self.conversation, self.engine, self.json = conversation, conversation.engine, json
        self.max_quality_loss, self.headroom = max_quality_loss, headroom
        self._open = True
        self._said_of: float | None = None  # the time per token that was said to be out of reach
        self._saved: set[Path] = set()
        self.commands = {
            "/bits": SlashCommand(self._bits, "/bits 3", "Read exactly this width from the next token on."),
            "/target": SlashCommand(self._target, "/target 3.25", "Read this number of bits on average."),
            "/tpot": SlashCommand(self._tpot, "/tpot 30", "Hold this time per token in milliseconds."),
            "/stats": SlashCommand(self._stats, "/stats", "Show figures of the conversation."),
            "/reset": SlashCommand(self._reset, "/reset", "Begin a new conversation."),
            "/save": SlashCommand(self._save, "/save FILE", "Write the conversation as JSON Lines."),
            "/help": SlashCommand(self._help, "/help", "Show these lines."),
            "/quit": SlashCommand(self._quit, "/quit", "Leave."),
        }

    def run(self, lines: Lines) -> None:
        """Goes on until the user leaves. A line that cannot be answered or carried out is explained in one line."""
        if isinstance(lines, EditedLines):
            note(f"{self.engine.path.name}: /help lists the commands; Ctrl-C ends an answer; Ctrl-D leaves.")
        while self._open and (line := lines.read()) is not None:
            try:
                if line[:1] == "/" and line[1:2].isalpha():
                    self.carry_out(line)
                elif line.strip():
                    self.answer(line if self.conversation.plain else line.strip())
            except InputError as e:
                note(str(e))

    def answer(self, message: str) -> None:
        """Prints the answer to a message as it comes. Ctrl-C ends it, and keeps what was said."""
        answer = self._say(message)
        if answer is None:
            return
        interrupts = Interrupts()
        try:
            with interrupts:
                for step in answer:
                    interrupts.gently = True
                    self._show(step.text)
                    if interrupts.came:
                        break
        except (Exception, KeyboardInterrupt):
            if not interrupts.came:
                raise
        answer.close()
        if not answer.steps:
            note("The answer was stopped before it began, and the message is forgotten.")
            return
        self._close(answer, interrupts.came)

    def _say(self, message: str) -> Generation | None:
        from dpllm.conversation import OutOfPositions

        try:
            return self.conversation.say(message)
        except OutOfPositions as e:
            note(f"{e} /reset begins a new one.")
            return None

    def _show(self, text: str) -> None:
        if not self.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _close(self, answer: Generation, stopped: bool) -> None:
        """Says after an answer what it took."""
        stats = self.conversation.stats
        if self.json:
            left = stats.positions_left
            summary = summarize(self.engine, answer)
            print_json(summary | {"interrupted": stopped, "positions_left": left})
        else:
            self._show("\n")
            stderr.print(answer_line(answer, stopped), style="dim", markup=False, soft_wrap=True)
        note_positions(self.engine, answer)
        if (shortfall := answer.shortfall) is not None and shortfall.target_ms != self._said_of:
            self._said_of = shortfall.target_ms  # once for each target
            note(str(shortfall))
        if stats.positions_left < SPARE:
            note(
                f"{max(0, stats.positions_left)} of the model's {stats.positions} positions are left. "
                "/reset begins a new conversation."
            )

    # -- commands ----------------------------------------------------------------------------------------

    def carry_out(self, line: str) -> None:
        """Carries out a command. Raises InputError for an unknown one, or an argument that is wrong."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if (command := self.commands.get(name.strip())) is None:
            raise InputError(f"unknown command {name.strip()}. /help lists the commands.")
        if command.takes_argument and not argument:
            raise InputError(f"{name} needs an argument. Write, for example, {command.example}.")
        if argument and not command.takes_argument:
            raise InputError(f"{name} takes no argument. Write {name} alone.")
        interrupts = Interrupts()
        try:
            with interrupts:
                command.run(argument)
        except (Exception, KeyboardInterrupt):
            if not interrupts.came:
                raise
            note(f"{name} was interrupted.")

    def hold(self, tpot_ms: float) -> None:
        """Holds a time per token. Raises InputError for a time that cannot be held."""
        pairs = float(self.conversation.context.cache.lengths.sum())
        hold_time(
            self.engine, tpot_ms, max_quality_loss=self.max_quality_loss, headroom=self.headroom, pairs=pairs
        )

    def _bits(self, argument: str) -> None:
        if not argument.isdecimal():
            raise InputError(f"/bits {argument} is not a whole number. Write, for example, /bits 3.")
        self.engine.set_target(bits=int(argument))
        note(f"{int(argument)} bits everywhere, from the next token on.")

    def _target(self, argument: str) -> None:
        bits = parsed_number("/target", argument, 3.25)
        self.engine.set_target(target_bits=bits)
        note(f"{bits:g} bits on average, from the next token on.")

    def _tpot(self, argument: str) -> None:
        tpot_ms = parsed_number("/tpot", argument, 30)
        self.hold(tpot_ms)
        self._said_of = None
        note(f"{tpot_ms:g} ms per token, from the next token on.")

    def _stats(self, argument: str) -> None:
        note(stats_line(self.conversation.stats))

    def _reset(self, argument: str) -> None:
        self.conversation.reset()
        note("A new conversation begins.")

    def _save(self, argument: str) -> None:
        path = Path(argument).expanduser().absolute()
        if not self.conversation.messages:
            raise InputError("nothing has been said yet, so there is nothing to save.")
        if path.exists() and path not in self._saved:
            raise InputError(f"{path} exists already. Choose another name.")
        self.conversation.save(path)
        self._saved.add(path)
        note(f"{path}: {len(self.conversation.messages)} messages")

    def _help(self, argument: str) -> None:
        for command in self.commands.values():
            note(f"{command.example:<13} {command.help}")
        note("Ctrl-C ends an answer and keeps what was said. Alt-Enter begins a new line of a message.")

    def _quit(self, argument: str) -> None:
        self._open = False


def parsed_number(name: str, text: str, example: float) -> float:
    """The number of a command's argument. Raises InputError for anything but a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} {text} is not a number. Write, for example, {name} {example:g}.")
    return value


def answer_line(answer: Generation, stopped: bool) -> str:
    """The figures of one answer."""
    stats = answer.stats
    parts = ["stopped"] if stopped else []
    parts += figures(stats.new_tokens, stats.effective_bits, (stats.tpot_ms or {}).get("p50"))
    return f"[{' · '.join(parts)}]"


def stats_line(stats: ConversationStats) -> str:
    """The figures of a conversation."""
    parts = [f"{stats.answers} answer{'' if stats.answers == 1 else 's'}"]
    parts += figures(stats.tokens, stats.effective_bits, stats.tpot_ms)
    if stats.weight_bytes_per_token is not None:
        parts.append(f"{stats.weight_bytes_per_token / 1e6:.2f} MB of weights a token")
    parts.append(f"{stats.kv_bytes / 1e6:.2f} MB of cache")
    parts.append(f"{stats.positions_left} of {stats.positions} positions left")
    return f"[{' · '.join(parts)}]"


def figures(tokens: int, bits: float | None, ms: float | None) -> list[str]:
    """Tokens, bits and time per token, as far as they are known."""
    parts = [f"{tokens} token{'' if tokens == 1 else 's'}"]
    if bits is not None:
        parts.append(f"{bits:.2f} bits")
    if ms is not None:
        parts.append(f"{ms:.1f} ms/token")
    return parts
