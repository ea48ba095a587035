"""`mlxvlm chat`: a talk about pictures, or one answer."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlxvlm.cli.boundary import describe
from mlxvlm.errors import ConfigError, PictureError, UsageError

if TYPE_CHECKING:
    from mlxvlm.cache import EmbeddingCache
    from mlxvlm.chat import Conversation
    from mlxvlm.cli.draw import Drawing
    from mlxvlm.prompt_cache import PromptCache
    from mlxvlm.reply import Chunk, Reply

HELP = """\
/image PATH...  show pictures; the next question is about them (quote a path with spaces)
/retry [TEMP]   ask the last question again, at another temperature if you like
/clear          forget the conversation and its pictures
/help           show this
/exit           leave, as Ctrl-D does
Ctrl-C stops an answer and keeps the conversation."""

DEMO = "demo"
# For what the small model does not know: LLaVA-1.5 7B in 4 bits, ungated.
LARGER = "mlx-community/llava-1.5-7b-4bit"
LARGER_SIZE = "4 GB"
# What an option is where it is not given.
MODELS_CHOICE = "Default: as the model's generation_config.json says, else "


def chat(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Pictures to talk about.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="A folder or a hub id. Default: the small model that comes with mlxvlm.",
            show_default=False,
        ),
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
        typer.Option("--adapter-path", metavar="DIR", help="Adapters that `mlxvlm lora` trained."),
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
            "--temp", min=0.0, help="Sampling temperature; 0 is greedy. " + MODELS_CHOICE + "0."
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
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="What tensors become. Default: as stored."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")
    ] = None,
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
    paths = [_checked(image) for image in images or []]
    question = _question(prompt, as_json)
    drawing = None
    if draw is not None:
        from mlxvlm.cli.draw import Drawing

        drawing = Drawing(draw, allow_urls, tell=_note)
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
        report=lambda download: _note(str(download)),
    )
    if model is None and not as_json:
        about = vlm.config.about or "This is the small model that comes with mlxvlm."
        _note(f"{about} -m names a real model: a folder or a hub id.")
    conversation = Conversation(
        vlm,
        system=_text(system),
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
    if question is None:
        _loop(talk)
    elif as_json:
        from mlxvlm.reply import last_reply

        reply = last_reply(conversation.ask(question))
        told = asdict(reply)
        del told["tokens"]
        if drawing:
            drawn = drawing.answer(reply, paths)
            told["drawn"] = None if drawn is None else str(drawn)
        typer.echo(json.dumps({"model": model or DEMO, "images": paths, **told}))
    else:
        talk.ask(question, once=True)
    if disk is not None and disk.problem:
        _note(f"mlxvlm: warning: {disk.problem}")


@dataclass
class Talk:
    """A conversation as the terminal has it.

    pictures: paths and URLs of what it shows. hints: whether no model was named, so that a refusal
    is to be followed, once, by a command that names one.
    """

    conversation: Conversation
    pictures: list[str]
    drawing: Drawing | None
    hints: bool

    def ask(self, question: str, once: bool = False) -> None:
        self.say(self.conversation.ask(question), question if once else "")

    def say(self, chunks: Generator[Chunk, None, None], question: str = "") -> None:
        """Streams an answer to stdout, and does what else is done with an answer."""
        reply = _stream(chunks)
        if self.hints and reply.text.strip() == self.conversation.vlm.config.refusal != "":
            self.hints = False
            asked = ["-p", question] if question else []
            command = shlex.join(["mlxvlm", "chat", *self.pictures, *asked, "-m", LARGER])
            _note(f"For photographs name a model ({LARGER_SIZE} to download): {command}")
        if self.drawing:
            self.drawing.answer(reply, self.pictures)

    def show(self, paths: list[str]) -> None:
        if self.drawing:
            self.drawing.check(paths)
        self.conversation.add(*paths)
        self.pictures = [*self.pictures, *paths]

    def clear(self) -> None:
        self.conversation.clear()
        self.pictures = []


def _loop(talk: Talk) -> None:
    """Reads lines until /exit or the end of input; each is a command or a question."""
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401  gives input() its line editing
        except ImportError:
            pass
        _note("/help lists the commands; Ctrl-D leaves.")
    while True:
        try:
            line = _read_line()
        except EOFError:
            if sys.stdin.isatty():
                _note("")
            return
        except KeyboardInterrupt:
            _note("\n(/exit or Ctrl-D leaves)")
            continue
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        try:
            if command == "/help":
                _note(HELP)
            elif command == "/clear":
                talk.clear()
                _note("(forgotten, pictures too)")
            elif command == "/retry":
                talk.say(talk.conversation.retry(**_temperature(rest)))
            elif command == "/image":
                _show(talk, rest.strip())
            elif command.startswith("/") and not line.startswith("//") and "/" not in command[1:]:
                _note(f"There is no command {command}; /help lists them.")
            elif line:
                talk.ask(line)
        except KeyboardInterrupt:
            _note("(stopped)")
        except Exception as error:
            # What a user can mend ends the turn, not the conversation.
            if (message := describe(error)) is None:
                raise
            _note(f"mlxvlm: error: {message}")


def _show(talk: Talk, rest: str) -> None:
    """/image: adds the pictures whose paths are in `rest`."""
    if not rest:
        raise PictureError("/image wants at least one path: /image cat.jpg 'my dog.png'")
    try:
        # Typed by hand, a path may hold a bare space or apostrophe: it is one if the file exists.
        paths = [rest] if Path(rest).expanduser().is_file() else shlex.split(rest)
    except ValueError:
        raise PictureError(f"the quotes in {rest!r} do not match.") from None
    talk.show([_checked(path) for path in paths])
    waiting = talk.conversation.waiting
    _note(f"({waiting} picture{'s' if waiting > 1 else ''} for the next question)")


def _temperature(rest: str) -> dict[str, float]:
    """/retry: the options that its argument gives."""
    if not rest.strip():
        return {}
    try:
        return {"temperature": float(rest)}
    except ValueError:
        raise UsageError(f"/retry takes a temperature or nothing, not {rest.strip()!r}.") from None


def _stream(chunks: Generator[Chunk, None, None]) -> Reply:
    """Streams an answer to stdout and ends its line, also where it is cut short."""
    reply = None
    with closing(chunks):
        try:
            for chunk in chunks:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                reply = chunk.reply
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
    assert reply is not None  # the last chunk carries it
    return reply


def _read_line() -> str:
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _text(input("> ")).strip()
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)  # stdout is a file or a pipe, for answers alone
    line = sys.stdin.buffer.readline().decode("utf-8", "replace")
    if not line:
        raise EOFError
    return line.strip()


def _question(prompt: str | None, as_json: bool) -> str | None:
    """The text of -p, or None for a prompt loop. --json alone reads stdin, as `-p -` does."""
    if prompt is None and as_json:
        if sys.stdin.isatty():
            raise typer.BadParameter("it needs the question: -p TEXT.", param_hint="--json")
        prompt = "-"
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    return None if prompt is None else _text(prompt).strip()


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


def _checked(image: str) -> str:
    """A picture's path, known to exist before a model is loaded for it; a URL as it is."""
    if "://" in image:
        return image
    path = Path(image).expanduser()
    if not path.exists():
        raise PictureError(f"there is no picture {image}.")
    return str(path)


def _text(raw: str) -> str:
    """Bytes that are no UTF-8 reach Python as lone surrogates, which no tokenizer takes."""
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def demo() -> Path:
    """The folder of the small model that comes with the package."""
    import mlxvlm.weights

    folder = Path(mlxvlm.weights.__file__).parent / DEMO
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"the small model is missing from this installation ({folder}). Name a model with -m."
        )
    return folder


def _note(text: str) -> None:
    typer.echo(text, err=True)
