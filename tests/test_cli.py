"""The commands as a shell sees them: exit codes, streams, help, and how soon it answers."""

import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import mlxvlm
from mlxvlm.cli.boundary import Boundary
from mlxvlm.cli.main import app
from mlxvlm.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
ROOT_COMMAND = typer.main.get_command(app)


def walk(command, path=()):
    """Every command and sub-command as (words, command)."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*path, name))


COMMANDS = dict(walk(ROOT_COMMAND))


def mlxvlm_command(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "mlxvlm", *args], capture_output=True, text=True, **kwargs
    )


def test_version():
    done = mlxvlm_command("--version")
    assert (done.returncode, done.stdout) == (0, f"mlxvlm {mlxvlm.__version__}\n")


@pytest.mark.parametrize("args", [["--no-such-flag"], ["no-such-command"]])
def test_wrong_usage_is_2(args):
    done = mlxvlm_command(*args)
    assert done.returncode == 2
    assert done.stdout == "" and args[0] in done.stderr


IDLE = [
    ("sft --dora", "--dora is of adapters"),
    ("sft --lora-rank 4", "--lora-rank is of adapters"),
    ("pretrain --vision-learning-rate 1e-5", "--vision-learning-rate is of the vision tower"),
    ("lora --train lora:lm --projector-learning-rate 1", "--projector-learning-rate is of the"),
    ("sft --batching buckets --pack-length 9", "--pack-length is of packed lines"),
    ("lora --train projector,lm", "lora trains adapters, and --train projector,lm names none"),
    ("sft --ranks 0", "--ranks (=0) must be at least 1"),
    ("sft --hostfile nowhere.json", "--hostfile nowhere.json does not exist"),
    ("sft --ranks 2 --hostfile nowhere.json", "--ranks and --hostfile do not go together"),
]


@pytest.mark.parametrize(("words", "says"), IDLE)
def test_a_flag_that_a_run_would_not_heed_is_refused(words, says):
    command = [*words.split(), "-m", "a", "--data", "b.json", "--out", "c"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and says in done.output


def test_a_recipe_may_say_what_another_stage_heeds(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "a"\ndata = "b.json"\nout = "c"\nlora_rank = 4\n')
    done = CliRunner().invoke(app, ["sft", "--config", str(recipe)])
    assert done.exit_code == 1 and "adapters" not in done.output


@pytest.mark.parametrize("rows", ['[[data]]\ndata = "x"\n[[data]]\ndata = "y"\n', "data = [1]\n"])
def test_sources_under_another_name_are_refused(tmp_path, rows):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "a"\nout = "c"\n' + rows)
    done = CliRunner().invoke(app, ["lora", "--config", str(recipe)])
    assert done.exit_code == 2 and "tables: [[sources]]" in done.output


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "mlxvlm")
def test_every_command_explains_itself(path):
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0, result.output
    assert COMMANDS[path].help, f"{' '.join(path)} has no help text"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "mlxvlm")
def test_every_option_explains_itself(path):
    for option in COMMANDS[path].params:
        if option.param_type_name == "option":
            assert getattr(option, "help", None), f"{' '.join(path)} {option.opts[0]} has no help"


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory):
    """One picture's features on disk."""
    from PIL import Image
    from tiny_vlm import picture, tiny_vlm

    from mlxvlm.cache.writer import write_cache

    folder = tmp_path_factory.mktemp("cache")
    Image.fromarray(picture(0)).save(folder / "a.png")
    write_cache(tiny_vlm().encoder, [("a.png", folder / "a.png")], folder / "features")
    return str(folder / "features")


# What must answer at once, with {} for a cache -> what it may not import on the way.
SLOW = {"mlx_lm", "transformers", "tokenizers", "huggingface_hub", "torch"}
QUICK = {
    "mlxvlm --help": SLOW | {"mlx", "numpy", "PIL"},
    "mlxvlm --version": SLOW | {"mlx", "numpy", "PIL"},
    "mlxvlm cache info {}": SLOW | {"numpy"},
}


@pytest.mark.parametrize("line", QUICK)
def test_answers_without_heavy_imports(line, small_cache):
    code = (
        "import sys\nfrom mlxvlm.cli.main import app\n"
        f"try:\n    app({line.format(small_cache).split()[1:]!r})\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout
    assert not set(done.stderr.split()) & QUICK[line]


@pytest.mark.parametrize("line", QUICK)
def test_answers_in_0_4_seconds(line, small_cache):
    """By processor time, the best of three, so that a busy machine does not decide it."""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert mlxvlm_command(*line.format(small_cache).split()[1:]).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.4


# What a command may raise -> (exit code, what stderr says).
METAL = "[METAL] Command buffer execution failed: "
ENDINGS = {
    "user": (ConfigError("a must be b."), 1, "mlxvlm: error: a must be b.\n"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted"),
    "no file": (FileNotFoundError(2, "No such file or directory", "x.json"), 1, "x.json"),
    "disk full": (OSError(28, "No space left on device"), 1, "No space left on device"),
    "no mlx": (ModuleNotFoundError("No module named 'mlx'", name="mlx"), 1, "MLX is not installed"),
    "display": (RuntimeError(METAL + "Impacting Interactivity (0000000e:x)"), 1, "over SSH"),
    "timeout": (RuntimeError(METAL + "Caused GPU Timeout Error (00000002:x)"), 1, "too long"),
    "memory": (RuntimeError(METAL + "Insufficient Memory (00000008:x)"), 1, "--batch-size"),
    "buffers": (RuntimeError("[metal::malloc] Resource limit (499000) exceeded."), 1, "buffers"),
    "malloc": (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"), 1, "GPU ran out"),
    "other metal": (RuntimeError(METAL + "Internal Error"), 1, "--resume"),
}


def failing(error):
    """An app whose one command raises `error`, behind the commands' own boundary."""
    failing_app = typer.Typer(cls=Boundary, pretty_exceptions_enable=False)

    @failing_app.callback()
    def root() -> None: ...

    @failing_app.command()
    def fail() -> None:
        if error is not None:
            raise error

    return failing_app


@pytest.mark.parametrize("name", ENDINGS)
def test_errors_become_exit_codes(name):
    error, code, said = ENDINGS[name]
    result = CliRunner().invoke(failing(error), ["fail"])
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output and result.stdout == ""


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("another"), ImportError("x")])
def test_a_bug_keeps_its_traceback(error):
    result = CliRunner().invoke(failing(error), ["fail"])
    assert result.exception is error


def test_exit_codes_of_commands_pass_through():
    assert CliRunner().invoke(failing(typer.Exit(3)), ["fail"]).exit_code == 3
    assert CliRunner().invoke(failing(None), ["fail"]).exit_code == 0
    assert CliRunner().invoke(failing(None), ["fail", "--no-such-flag"]).exit_code == 2


CHILD = """
import sys, time, typer
from mlxvlm.cli.boundary import Boundary

app = typer.Typer(cls=Boundary, pretty_exceptions_enable=False)

@app.callback()
def root() -> None: ...

@app.command()
def work() -> None:
    {body}

app(["work"])
"""


def test_ctrl_c_is_130():
    body = "print('ready', flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert (child.returncode, said.strip()) == (130, "mlxvlm: interrupted")


@pytest.mark.parametrize("lines", [1, 100_000], ids=["buffered", "streaming"])
def test_a_reader_who_leaves_is_no_error(lines):
    body = f"sys.stdin.read(1); print('x\\n' * {lines})"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(body=body)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdin and child.stdout and child.stderr
    child.stdout.close()
    child.stdin.write(b"go")
    child.stdin.close()
    assert child.wait(timeout=30) == 1
    assert child.stderr.read() == b""
    child.stderr.close()


def shown_commands():
    """Each `mlxvlm ...` line of the README's code blocks, continuation lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("mlxvlm "):
                yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("words", shown_commands(), ids=lambda words: " ".join(words[:2]))
def test_the_readme_shows_what_there_is(words):
    """Every command and flag that the README shows exists."""
    path: tuple[str, ...] = ()
    while words and (*path, words[0]) in COMMANDS:
        path, words = (*path, words[0]), words[1:]
    assert path or words[0].startswith("-"), f"no command {words[0]!r}"
    params = COMMANDS[path].params
    known = {name for p in params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    assert {word for word in words if word.startswith("-")} <= known
