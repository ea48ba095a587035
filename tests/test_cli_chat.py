"""`mlxvlm chat` as a shell sees it: answers on stdout, notes on stderr, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_vlm import picture, tiny_config, tiny_vlm
from typer.testing import CliRunner

import mlxvlm
import mlxvlm.reply
from mlxvlm.chat import Conversation
from mlxvlm.cli.main import app
from mlxvlm.weights.save import save

ROOT = Path(__file__).resolve().parent.parent
ABOUT = "This model knows noise."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and two pictures beside it."""
    folder = tmp_path_factory.mktemp("chat")
    save(tiny_vlm(tiny_config(about=ABOUT)), folder / "model")
    for name, seed in (("a.png", 1), ("b c.png", 2)):
        Image.fromarray(picture(seed)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def vlm(folder):
    return mlxvlm.load(str(folder / "model"))


@pytest.fixture
def chat(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def run(*args, model="model", input=None):
        named = ["-m", model] if model else []
        return CliRunner().invoke(app, ["chat", *args, *named, "--max-tokens", "9"], input=input)

    return run


def answer(vlm, folder, text, *names, **options):
    images = [folder / name for name in names]
    messages = [{"role": "user", "content": text}]
    return vlm.generate(messages, images, **{"max_tokens": 9, **options})


def test_one_answer_about_several_pictures(chat, vlm, folder):
    done = chat("a.png", "b c.png", "-p", "What is this?")
    assert done.exit_code == 0 and done.stderr == ""
    expected = answer(vlm, folder, "What is this?", "a.png", "b c.png").text
    assert done.stdout == expected + "\n"


def test_no_pictures_and_a_question_from_stdin(chat, vlm, folder):
    done = chat("-p", "-", input="Who are\nyou?\n")
    assert done.stdout == answer(vlm, folder, "Who are\nyou?").text + "\n"


@pytest.mark.parametrize(("args", "input"), [(["-p", "Why?"], None), ([], "Why?\n")])
def test_json_is_one_object(chat, vlm, folder, args, input):
    done = chat("a.png", "--json", *args, input=input)
    assert done.stderr == ""
    reply = answer(vlm, folder, "Why?", "a.png")
    found = json.loads(done.stdout)
    timings = {"time_to_first_token_s", "prompt_tps", "generation_tps", "peak_memory_gb"}
    assert all(found.pop(name) > 0 for name in timings)
    assert found == {
        "model": "model",
        "images": ["a.png"],
        "text": reply.text,
        "prompt_tokens": reply.prompt_tokens,
        "generation_tokens": 9,
        "finish_reason": "length",
    }


def test_sampling_flags_reach_the_model(chat, vlm, folder):
    flags = ("--temp", "1.5", "--top-p", "0.9", "--seed", "4")
    done = chat("a.png", "-p", "Why?", *flags)
    options = {"temperature": 1.5, "top_p": 0.9, "seed": 4}
    assert done.stdout == answer(vlm, folder, "Why?", "a.png", **options).text + "\n"
    assert done.stdout != chat("a.png", "-p", "Why?").stdout
    system = chat("-p", "Why?", "--system", "Be brief.", "--dtype", "float32")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert system.stdout == vlm.generate(messages, max_tokens=9).text + "\n"


def test_a_session_of_the_prompt_loop(chat, vlm, folder):
    lines = [
        "/help",
        "What is this?",
        "",
        "/image 'b c.png' missing.png",
        "/image b c.png",
        "/nonsense",
        "And this?",
        "/image",
        "/image 'a.png",
        "/clear",
        "Why?",
        "/exit",
        "Never asked.",
    ]
    done = chat("a.png", input="\n".join(lines) + "\n")
    assert done.exit_code == 0
    twin = Conversation(vlm, max_tokens=9)
    expected = ""
    for images, text in (("a.png", "What is this?"), ("b c.png", "And this?"), (None, "Why?")):
        if images is None:
            twin.clear()
        else:
            twin.add(folder / images)
        expected += list(twin.ask(text))[-1].reply.text + "\n"
    assert done.stdout == expected
    assert "/image PATH..." in done.stderr
    assert "mlxvlm: error: there is no picture missing.png." in done.stderr
    assert "1 picture for the next question" in done.stderr
    assert "no command /nonsense" in done.stderr
    assert "at least one path" in done.stderr and "quotes" in done.stderr


def test_the_end_of_input_leaves(chat, vlm, folder):
    done = chat(input="Why?")
    assert (done.exit_code, done.stdout) == (0, answer(vlm, folder, "Why?").text + "\n")


def interrupted_once(monkeypatch):
    """The first answer is stopped by Ctrl-C after three tokens."""
    real = mlxvlm.reply.generate_tokens
    calls = []

    def generate_tokens(*args, **options):
        tokens = real(*args, **options)
        calls.append(None)
        if len(calls) > 1:
            return tokens

        def broken():
            for _ in range(3):
                yield next(tokens)
            raise KeyboardInterrupt

        return broken()

    monkeypatch.setattr(mlxvlm.reply, "generate_tokens", generate_tokens)


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(chat, vlm, folder, monkeypatch):
    whole = chat("a.png", input="What is this?\n").stdout
    interrupted_once(monkeypatch)
    done = chat("a.png", input="What is this?\nWhy?\n")
    assert done.exit_code == 0 and "(stopped)" in done.stderr
    said = "".join(
        chunk.text
        for chunk, _ in zip(
            vlm.stream([{"role": "user", "content": "What is this?"}], [folder / "a.png"]),
            range(3),
            strict=False,
        )
    )
    assert whole.startswith(said) and said
    messages = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Why?"},
    ]
    again = vlm.generate(messages, [folder / "a.png"], max_tokens=9)
    assert done.stdout == f"{said}\n{again.text}\n"


def test_ctrl_c_ends_a_single_answer_with_130(chat, monkeypatch):
    interrupted_once(monkeypatch)
    assert chat("a.png", "-p", "What is this?").exit_code == 130


def test_the_default_model_says_what_it_is(chat, folder, monkeypatch):
    monkeypatch.setattr("mlxvlm.cli.chat.demo", lambda: folder / "model")
    done = chat("-p", "Why?", model=None)
    assert ABOUT in done.stderr and "-m names a real model" in done.stderr
    assert ABOUT not in done.stdout
    quiet = chat("-p", "Why?", "--json", model=None)
    assert quiet.stderr == "" and json.loads(quiet.stdout)["model"] == "demo"
    assert ABOUT not in chat("-p", "Why?").stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["missing.png", "-p", "Why?", "-m", "no-such-model"], 1, "no picture missing.png"),
        (["https://example.org/a.png", "-p", "Why?"], 1, "--allow-urls"),
        (["-p", "  "], 1, "no question"),
        (["-p", "Why?", "--max-tokens", "0"], 2, "--max-tokens"),
        (["-p", "Why?", "--temp", "-1"], 2, "--temp"),
        (["-p", "Why? " * 200], 1, "at most 512"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(folder, monkeypatch, args, code, said):
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["chat", "-m", "model", *args])
    assert done.exit_code == code
    assert said in done.stderr and "Traceback" not in done.output
    assert done.stdout == ""


def test_text_that_is_no_utf8(chat, vlm, folder):
    done = chat("-p", "-", input=b"caf\xe9?")
    assert done.stdout == answer(vlm, folder, "caf\ufffd?").text + "\n"


def test_in_a_process_of_its_own(folder, vlm):
    names = [str(folder / "b c.png"), "-m", str(folder / "model"), "--max-tokens", "9"]
    command = [sys.executable, "-m", "mlxvlm", "chat", *names]
    done = subprocess.run(command, input=b"Why\xff?\n", capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    expected = answer(vlm, folder, "Why\ufffd?", "b c.png").text + "\n"
    assert done.stdout.decode() == expected
