"""`mlxvlm chat`: a talk about pictures, or one answer."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlxvlm.cli.lines import text_of
from mlxvlm.cli.parts import Language, Resize, Vision
from mlxvlm.cli.talk import Talk, checked, loop, note
from mlxvlm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from mlxvlm.cache import EmbeddingCache
    from mlxvlm.cli.batch import BatchFile
    from mlxvlm.prompt_cache import PromptCache

DEMO = "demo"
# What an option is where it is not given.
MODELS_CHOICE = "Default: as the model's generation_config.json says, else "

ModelOrDemo = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A folder or a hub id. Default: the small model that comes with mlxvlm.",
        show_default=False,
    ),
]


def chat(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Pictures to talk about.")
    ] = None,
    model: ModelOrDemo = None,
    video: Annotated[
        list[str] | None,
        typer.Option(
            "--video",
            metavar="FILE",
            help="An animation (GIF, WebP, APNG) or a video file to show as frames (may be "
            "repeated; files take `pip install 'mlxvlm[video]'`).",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", min=1, help="The most frames of a --video. Default: 8."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Give one answer to TEXT and leave; '-' reads it from stdin.",
        ),
    ] = None,
    adapter_path: Annotated[
        str | None,
        typer.Option("--adapter-path", metavar="DIR", help="Adapters of `mlxvlm lora` or PEFT."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=1, help="The longest answer, in tokens. " + MODELS_CHOICE + "256."
        ),
    ] = None,
    temp: Annotated[
        float | None,
        typer.Option(
            "--temp",
            "--temperature",
            min=0.0,
            help="Sampling temperature; 0 is greedy. " + MODELS_CHOICE + "0.",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", min=0.0, max=1.0, help="Nucleus sampling; 1 is off. " + MODELS_CHOICE + "1."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", min=0, help="Sample among so many; 0 is all. " + MODELS_CHOICE + "0."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            min=0.0,
            max=1.0,
            help="Leave out what is less likely than this share of the likeliest. "
            + MODELS_CHOICE
            + "0.",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty", help="Above 1: repeat less. " + MODELS_CHOICE + "none."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End answers before TEXT (may be repeated)."),
    ] = None,
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="The system message.")
    ] = "",
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Makes sampling repeatable.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="One JSON object on stdout, timings too; without -p, stdin is the question.",
        ),
    ] = False,
    draw: Annotated[
        str | None,
        typer.Option(
            "--draw",
            metavar="FILE",
            help="Draw the boxes that an answer names on the last picture shown (PNG, JPEG, WebP).",
        ),
    ] = None,
    vote: Annotated[
        bool,
        typer.Option(
            "--vote",
            help="With -p: sample several answers, each with its steps, and say what most of them "
            "come to.",
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="With --vote: how many answers. Default: 8."),
    ] = None,
    reason: Annotated[
        bool | None,
        typer.Option(
            "--reason/--no-reason",
            help="With --vote: ask for steps before the answer. [on, but for the small model]",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="FILE",
            help="Answer a .jsonl file of questions, many at a time, into --out. A row has "
            '"prompt" or "messages", and "image" or "images", beside the file.',
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="With --batch: a line for each row, as it is answered; run again, it goes on.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, help="With --batch: questions answered together. Default: 8."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="What tensors become. Default: as stored."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")
    ] = None,
    language: Language = None,
    vision: Vision = None,
    resize: Resize = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            metavar="DIR",
            help="Features that `mlxvlm cache-embeddings` made: their pictures are not encoded.",
        ),
    ] = None,
    prompt_cache: Annotated[
        str | None,
        typer.Option(
            "--prompt-cache",
            metavar="DIR",
            help="Keep what was read of prompts there, for later runs.",
        ),
    ] = None,
    prompt_cache_gb: Annotated[
        float | None,
        typer.Option(
            "--prompt-cache-gb",
            metavar="GB",
            help="The most that --prompt-cache may take; what was used longest ago goes first. "
            "Default: 10.",
            show_default=False,
        ),
    ] = None,
    max_kv_size: Annotated[
        int | None,
        typer.Option(
            "--max-kv-size",
            metavar="TOKENS",
            help="Keep keys and values of so many tokens, the first 4 and the latest.",
        ),
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option("--kv-bits", help="Quantise keys and values: 2, 4 or 8 bits.")
    ] = None,
    kv_group_size: Annotated[
        int, typer.Option("--kv-group-size", help="Numbers that share a scale: 32, 64 or 128.")
    ] = 64,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Let IMAGE be an http(s) address.")
    ] = False,
) -> None:
    """Talk about pictures: a prompt loop, or one answer with -p."""
    paths = [checked(image) for image in images or []]
    videos = [checked(one) for one in video or []]
    if frames is not None and batch is not None:
        raise UsageError("--frames and --batch do not go together; drop one.")
    file = None
    if batch is not None:
        others = {
            "IMAGE": paths,
            "--video": videos,
            "--prompt": prompt,
            "--json": as_json,
            "--draw": draw,
            "--vote": vote,
            "--prompt-cache": prompt_cache,
            "--max-kv-size": max_kv_size,
            "--kv-bits": kv_bits,
        }
        file = _batch_file(batch, out, text_of(system), others)
    elif out is not None or (batch_size is not None and not vote):
        raise UsageError("--out and --batch-size go with --batch FILE, which is not given.")
    question = _question(prompt, as_json)
    if vote:
        others = {
            "--draw": draw,
            "--prompt-cache": prompt_cache,
            "--max-kv-size": max_kv_size,
            "--kv-bits": kv_bits,
        }
        _check_vote(question, others)
    elif samples is not None or reason is not None:
        raise UsageError("--samples and --reason go with --vote, which is not given.")
    if frames is not None and question is not None and not videos:
        raise UsageError("--frames is of a --video FILE, which is not given.")
    drawing = None
    if draw is not None:
        if videos:
            raise UsageError("--draw draws on pictures, and not on a --video; drop one.")
        from mlxvlm.cli.draw import Drawing

        drawing = Drawing(draw, allow_urls, tell=note)
        drawing.check(paths)
        if question is not None and not paths:
            raise UsageError("--draw wants a picture to draw on: mlxvlm chat photo.jpg --draw ...")

    from mlxvlm.chat import Conversation
    from mlxvlm.language.generate import check_settings
    from mlxvlm.language.kv import KVSettings
    from mlxvlm.machine import limits
    from mlxvlm.reuse import Reuse
    from mlxvlm.stop import StopStrings
    from mlxvlm.weights.load import load

    settings = {
        "max_tokens": max_tokens,
        "temperature": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    try:
        KVSettings(max_kv_size, kv_bits, kv_group_size).check()
        check_settings(**settings)
        StopStrings(stop or ())
    except ConfigError as error:
        raise UsageError(str(error)) from None
    opened = _opened(cache)
    disk = _prompts(prompt_cache, prompt_cache_gb)
    limits.limit_serving()
    vlm = load(
        model or str(demo()),
        adapter=adapter_path,
        dtype=dtype,
        revision=revision,
        report=lambda download: note(str(download)),
        language=language,
        vision=vision,
        resize=resize or "",
    )
    if model is None and not as_json:
        about = vlm.config.about or "This is the small model that comes with mlxvlm."
        note(f"{about} -m names a real model: a folder or a hub id.")
    if file is not None:
        sizes = {} if batch_size is None else {"batch_size": batch_size}
        reuse = Reuse(vlm, cache=opened)
        file.answer(vlm, allow_urls=allow_urls, reuse=reuse, stop=stop or (), **sizes, **settings)
        return
    if vote:
        from mlxvlm.cli.vote import tell

        if reason is None and model is None:
            reason = False  # the small model was never asked for steps
        asked = {"samples": samples, "reason": reason, "batch_size": batch_size}
        asked = {name: value for name, value in asked.items() if value is not None}
        shown = {"model": model or DEMO, "images": paths, **({"videos": videos} if videos else {})}
        asked |= {"reuse": Reuse(vlm, cache=opened), "stop": stop or (), "allow_urls": allow_urls}
        tell(vlm, str(question), text_of(system), (shown, frames), as_json, **asked, **settings)
        return
    conversation = Conversation(
        vlm,
        system=text_of(system),
        allow_urls=allow_urls,
        reuse=Reuse(vlm, cache=opened, disk=disk),
        stop=stop or (),
        max_kv_size=max_kv_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        **settings,
    )
    conversation.add(*paths)
    talk = Talk(conversation, paths, drawing, hints=model is None)
    if frames is not None:
        talk.frames = frames
    talk.show_videos(videos)
    if question is None:
        loop(talk)
    elif as_json:
        from mlxvlm.reply import last_reply

        reply = last_reply(conversation.ask(question))
        told = asdict(reply)
        del told["tokens"]
        if drawing:
            drawn = drawing.answer(reply, paths)
            told["drawn"] = None if drawn is None else str(drawn)
        shown = {"videos": videos} if videos else {}
        typer.echo(json.dumps({"model": model or DEMO, "images": paths, **shown, **told}))
    else:
        talk.ask(question, once=True)
    if disk is not None and disk.problem:
        note(f"mlxvlm: warning: {disk.problem}")


def _question(prompt: str | None, as_json: bool) -> str | None:
    """The text of -p, or None for a prompt loop. --json alone reads stdin, as `-p -` does."""
    if prompt is None and as_json:
        if sys.stdin.isatty():
            raise typer.BadParameter("it needs the question: -p TEXT.", param_hint="--json")
        prompt = "-"
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    return None if prompt is None else text_of(prompt).strip()


def _batch_file(source: str, out: str | None, system: str, others: dict[str, Any]) -> BatchFile:
    """The files of --batch, read before a model is loaded for them."""
    if found := [name for name, value in others.items() if value]:
        raise UsageError(f"--batch and {found[0]} do not go together; drop one.")
    if out is None:
        raise UsageError("--batch wants a file for the answers: --out answers.jsonl.")
    from mlxvlm.cli.batch import BatchFile

    return BatchFile(source, out, system)


def _check_vote(question: str | None, others: dict[str, Any]) -> None:
    if question is None:
        raise UsageError("--vote wants the question: -p TEXT.")
    if found := [name for name, value in others.items() if value]:
        raise UsageError(f"--vote and {found[0]} do not go together; drop one.")


def _opened(cache: str | None) -> EmbeddingCache | None:
    """The embedding cache of --cache, known to be one before a model is loaded for it."""
    if cache is None:
        return None
    from mlxvlm.cache import EmbeddingCache

    return EmbeddingCache.open(cache)


def _prompts(folder: str | None, gigabytes: float | None) -> PromptCache | None:
    """The folder of --prompt-cache."""
    if folder is None:
        if gigabytes is not None:
            raise UsageError("--prompt-cache-gb bounds --prompt-cache, which is not given.")
        return None
    if gigabytes is not None and not 0 < gigabytes < 10**6:
        raise UsageError(f"--prompt-cache-gb (={gigabytes:g}) must be above 0.")
    from mlxvlm.prompt_cache import LIMIT, PromptCache

    return PromptCache(folder, LIMIT if gigabytes is None else int(gigabytes * 10**9))


def demo() -> Path:
    """The folder of the small model that comes with the package."""
    import mlxvlm.weights

    folder = Path(mlxvlm.weights.__file__).parent / DEMO
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"the small model is missing from this installation ({folder}). Name a model with -m."
        )
    return folder
