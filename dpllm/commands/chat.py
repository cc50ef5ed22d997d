"""`dpllm chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from dpllm.commands import generate as generating
from dpllm.commands.app import (
    COMMON,
    Accuracy,
    Backend,
    Command,
    Device,
    MaxNewTokens,
    MaxQualityLoss,
    Overlay,
    TargetBits,
    Temperature,
    Threads,
    TpotMs,
    app,
)
from dpllm.commands.chat_session import Session
from dpllm.commands.common import Hardware
from dpllm.commands.terminal_input import lines_of_user

Context = Annotated[
    str | None,
    typer.Option(
        "--context",
        help="Directory of a saved context that the conversation is about. Make one with 'dpllm context build --chat'.",
        rich_help_panel=COMMON,
    ),
]
System = Annotated[
    str | None,
    typer.Option("--system", help="Begin with this system text.", rich_help_panel=COMMON),
]
Plain = Annotated[
    bool,
    typer.Option(
        "--plain",
        help="Use no chat template: the model continues what was said as one text. For models without a template.",
        rich_help_panel=COMMON,
    ),
]
JsonAnswers = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object per answer on stdout.", rich_help_panel=COMMON),
]


@app.command(cls=Command)
def chat(
    *,
    overlay: Overlay = None,
    system: System = None,
    plain: Plain = False,
    max_new_tokens: MaxNewTokens = 512,
    stop: generating.Stop = None,
    stop_token: generating.StopToken = None,
    context: Context = None,
    json: JsonAnswers = False,
    target_bits: TargetBits = None,
    tpot_ms: TpotMs = None,
    max_quality_loss: MaxQualityLoss = None,
    max_memory: generating.MaxMemory = None,
    bits: generating.Bits = None,
    guarantee: generating.Guarantee = False,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    resident_bits: generating.ResidentBits = None,
    headroom: generating.Headroom = None,
    policy: generating.Policy = None,
    temperature: Temperature = 0.0,
    top_k: generating.TopK = 0,
    top_p: generating.TopP = 1.0,
    min_p: generating.MinP = 0.0,
    repetition_penalty: generating.RepetitionPenalty = 1.0,
    seed: generating.RandomSeed = None,
    speculate: generating.Speculate = "auto",
    draft_bits: generating.DraftBits = None,
    accuracy: Accuracy = "balanced",
) -> None:
    """Hold a conversation. Lines that begin with a slash are commands, such as /bits 3 or /help.

    Example: dpllm chat --overlay llama-1b --system 'Answer briefly.' --target-bits 3.25. Ctrl-C ends an answer, Ctrl-D
    the conversation. Messages may also come through a pipe, one on each line.
    """
    from dpllm.context.kv_context import KVContext
    from dpllm.conversation import Conversation
    from dpllm.decode.options import GenerateOptions

    options = GenerateOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
        stop_tokens=tuple(stop_token or ()), speculate=speculate,
        draft_bits=draft_bits,
    )  # fmt: skip
    generating.check_precision(bits=bits, target_bits=target_bits, policy=policy, guarantee=guarantee)
    generating.check_targets(
        tpot_ms=tpot_ms, max_quality_loss=max_quality_loss, bits=bits, target_bits=target_bits, policy=policy
    )
    hardware = Hardware(device=device, backend=backend, threads=threads, accuracy=accuracy)
    engine = generating.open_engine(
        overlay, hardware, bits=bits, target_bits=target_bits, policy=policy,
        resident=generating.planes_to_hold(overlay, resident_bits=resident_bits, max_memory=max_memory),
    )  # fmt: skip
    about = None if context is None else KVContext.load(context, engine)
    conversation = Conversation(engine, options, system=system, plain=plain, context=about)
    hardware.note_about(engine.decoder)
    if guarantee:
        assert target_bits is not None
        engine.hold_budget(target_bits)
    session = Session(conversation, json=json, max_quality_loss=max_quality_loss, headroom=headroom)
    generating.note_suggestions(engine, options)
    if tpot_ms is not None:
        session.hold(tpot_ms)
    session.run(lines_of_user())
