"""`mlxvlm chat` as a shell sees it: answers on stdout, notes on stderr, exit codes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_cache import draw as draw_pictures
from tiny_cache import siglip
from tiny_vlm import EOT, picture, tiny_config, tiny_vlm
from typer.testing import CliRunner

import mlxvlm
import mlxvlm.reply
from mlxvlm.boxes import parse
from mlxvlm.cache.writer import write_cache
from mlxvlm.chat import Conversation
from mlxvlm.cli.main import app
from mlxvlm.data.sources import read_rows
from mlxvlm.images.drawing import draw
from mlxvlm.images.open import open_picture
from mlxvlm.weights.save import save

ROOT = Path(__file__).resolve().parent.parent
ABOUT = "This model knows noise."
REFUSAL = "I only know noise."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and two pictures beside it."""
    folder = tmp_path_factory.mktemp("chat")
    save(tiny_vlm(tiny_config(about=ABOUT, refusal=REFUSAL)), folder / "model")
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
        "reused_tokens": 0,
        "generation_tokens": 9,
        "finish_reason": "length",
        "boxes": [],
        "boxes_left_out": [],
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


def test_pictures_dragged_in_and_what_was_shown(chat, vlm, folder):
    lines = ["/images", "'b c.png' What is this?", "/images", "a.png", "/images", "Why?"]
    done = chat(input="\n".join(lines) + "\n")
    twin = Conversation(vlm, max_tokens=9)
    expected = ""
    for name, text in (("b c.png", "What is this?"), ("a.png", "Why?")):
        twin.add(folder / name)
        expected += list(twin.ask(text))[-1].reply.text + "\n"
    assert done.stdout == expected
    assert "(no picture was shown" in done.stderr
    assert "1  b c.png\n" in done.stderr and "2  a.png  (for the next question)\n" in done.stderr


def test_another_system_message_from_the_next_question_on(chat, vlm, folder):
    lines = ["/system", "Why?", "/system Be brief.", "/system", "And why?", "/stats"]
    done = chat("a.png", "--system", "Be exact.", input="\n".join(["/stats", *lines]) + "\n")
    twin = Conversation(vlm, system="Be exact.", max_tokens=9)
    twin.add(folder / "a.png")
    first = list(twin.ask("Why?"))[-1].reply.text
    twin.set_system("Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, *twin.messages[1:]]
    assert twin.messages == messages
    messages.append({"role": "user", "content": "And why?"})
    second = vlm.generate(messages, [folder / "a.png"], max_tokens=9)
    assert done.stdout == f"{first}\n{second.text}\n"
    assert "Be exact.\n" in done.stderr and "Be brief.\n" in done.stderr
    assert "(no answer yet)" in done.stderr
    assert f"({second.generation_tokens} tokens" in done.stderr


def test_a_saved_talk_is_a_row_of_training_data(chat, vlm, folder, tmp_path):
    file = tmp_path / "talk.jsonl"
    lines = [f"/save {file}", "What is this?", "/save talk.txt", "a.png", f"/save {file}"]
    done = chat("b c.png", "--system", "Be exact.", input="\n".join(lines) + "\n")
    assert "no answer yet to save" in done.stderr and "wants a .jsonl file" in done.stderr
    (record,) = [row for _, row in read_rows(file)]
    assert record.images == [str(folder / "b c.png")]
    said = done.stdout.removesuffix("\n")
    twin = Conversation(vlm, system="Be exact.", max_tokens=9)
    twin.add(folder / "b c.png")
    assert list(twin.ask("What is this?"))[-1].reply.text == said
    assert record.messages == twin.messages


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
    assert done.stderr == f"{ABOUT} -m names a real model: a folder or a hub id.\n"
    assert ABOUT not in done.stdout
    quiet = chat("-p", "Why?", "--json", model=None)
    assert quiet.stderr == "" and json.loads(quiet.stdout)["model"] == "demo"
    assert ABOUT not in chat("-p", "Why?").stderr


def saying(monkeypatch, vlm, *answers):
    """The model's next answers, whatever it is asked."""
    ids = [[*vlm.tokenizer.encode(text)[0], EOT] for text in answers]
    queue = iter(ids)
    monkeypatch.setattr("mlxvlm.reply.generate_tokens", lambda *a, **k: (i for i in next(queue)))
    # No prompt is read for them, so there is none to keep.
    monkeypatch.setattr("mlxvlm.reuse.Reading.close", lambda reading: None)


def test_a_refusal_without_a_model_is_followed_by_the_command_for_one(
    chat, folder, vlm, monkeypatch
):
    monkeypatch.setattr("mlxvlm.cli.chat.demo", lambda: folder / "model")
    saying(monkeypatch, vlm, REFUSAL)
    done = chat("a.png", "b c.png", "-p", "Who's this?", model=None)
    told = done.stderr.splitlines()
    assert done.stdout == REFUSAL + "\n" and len(told) == 2
    command = shlex.split(told[1].partition(": ")[2])
    assert command[:-2] == ["mlxvlm", "chat", "a.png", "b c.png", "-p", "Who's this?"]
    assert command[-2] == "-m" and "/" in command[-1]

    # Once in a conversation, for the pictures that it shows then.
    saying(monkeypatch, vlm, "A cat.", REFUSAL, REFUSAL)
    done = chat("a.png", input="Why?\n/clear\n/image b c.png\nWho?\nWhere?\n", model=None)
    assert done.stdout == f"A cat.\n{REFUSAL}\n{REFUSAL}\n"
    assert done.stderr.count(" -m mlx-community/") == 1
    assert "mlxvlm chat 'b c.png' -m " in done.stderr

    for named in ("-m", "--json"):
        saying(monkeypatch, vlm, REFUSAL)
        if named == "-m":
            done = chat("a.png", "-p", "Why?")
        else:
            done = chat("a.png", "-p", "Why?", "--json", model=None)
        assert REFUSAL in done.stdout and done.stderr == ""


BOXES = "red star: [100, 200, 500, 600], tip: [900, 100]"


def drawn_on(path):
    """What --draw has to give: the picture in its own size, upright, with BOXES on it."""
    return draw(open_picture(path)[0], parse(BOXES)[0])


def test_draw_gives_the_picture_with_the_boxes_of_the_answer(chat, folder, vlm, monkeypatch):
    photo = Image.fromarray(picture(3)).resize((90, 60))
    exif = photo.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo.save(folder / "turned.jpg", exif=exif)
    saying(monkeypatch, vlm, BOXES)
    done = chat("a.png", "turned.jpg", "-p", "Where?", "--draw", "boxes.png")
    assert (done.exit_code, done.stdout) == (0, BOXES + "\n")
    told = "(1 box and 1 point drawn on turned.jpg, the last of 2 pictures: boxes.png)\n"
    assert done.stderr == told
    found = Image.open(folder / "boxes.png").convert("RGB")
    assert found.size == (60, 90) and found == drawn_on(folder / "turned.jpg")
    assert found != open_picture(folder / "turned.jpg")[0]

    saying(monkeypatch, vlm, BOXES + " [1, 2, 3, 9999]")
    done = chat("a.png", "-p", "Where?", "--draw", "json.png", "--json")
    told = json.loads(done.stdout)
    assert told["boxes"] == [
        {"label": "red star", "x0": 100, "y0": 200, "x1": 500, "y1": 600},
        {"label": "tip", "x0": 900, "y0": 100, "x1": 900, "y1": 100},
    ]
    assert told["drawn"] == "json.png" and len(told["boxes_left_out"]) == 1
    assert "left out [1, 2, 3, 9999]" in done.stderr
    assert Image.open(folder / "json.png").convert("RGB") == drawn_on(folder / "a.png")


def test_draw_in_the_prompt_loop_follows_the_talk(chat, folder, vlm, monkeypatch):
    saying(monkeypatch, vlm, BOXES, "Nothing.", BOXES, BOXES)
    lines = ["Where?", "Why?", "/image b c.png", "/image loop.png", "Where?", "/clear", "Where?"]
    done = chat("a.png", "--draw", "loop.png", input="\n".join(lines) + "\n")
    assert done.exit_code == 0
    notes = ("for the next question", "forgotten")
    told = [line for line in done.stderr.splitlines() if not any(n in line for n in notes)]
    assert told == [
        "(1 box and 1 point drawn on a.png: loop.png)",
        "(no box in this answer, nothing drawn)",
        "mlxvlm: error: --draw loop.png would overwrite the picture itself: name another file.",
        "(1 box and 1 point drawn on b c.png, the last of 2 pictures: loop.png)",
        "mlxvlm: error: there is no picture to draw on: /image PATH shows one.",
    ]
    assert Image.open(folder / "loop.png").convert("RGB") == drawn_on(folder / "b c.png")


def test_no_box_no_file(chat, folder, vlm, monkeypatch):
    for answer, left_out in (("Nothing.", 0), ("[0.1, 0.2, 0.3, 0.4] [3, 3, 2, 2]", 2)):
        saying(monkeypatch, vlm, answer)
        done = chat("a.png", "-p", "Where?", "--draw", "none.png")
        assert (done.exit_code, done.stdout) == (0, answer + "\n")
        assert "no box in this answer, nothing drawn" in done.stderr
        assert ("not fractions of 1, and 1 more" in done.stderr) == bool(left_out)
        assert not (folder / "none.png").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["a.png", "--draw", "out.gif"], ".png, .jpg, .jpeg, .webp"),
        (["a.png", "--draw", "nowhere/out.png"], "no folder nowhere"),
        (["a.png", "--draw", "a.png"], "overwrite the picture itself"),
        (["--draw", "out.png"], "wants a picture"),
    ],
)
def test_a_drawing_that_cannot_be_is_refused_before_the_model_is_loaded(
    chat, monkeypatch, args, said
):
    monkeypatch.setattr("mlxvlm.weights.load.load", lambda *a, **k: pytest.fail("loaded"))
    done = chat(*args, "-p", "Where?")
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1


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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--kv-bits", "5"), "kv_bits (=5)"),
        (("--kv-bits", "8", "--max-kv-size", "99"), "cannot go together"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("--top-p", "0"), "top_p"),
        (("--stop", ""), "stop"),
    ],
)
def test_flags_that_cannot_be_are_told_before_a_model_is_loaded(chat, flags, said):
    done = chat("-p", "Why?", *flags, model="no-such-model")
    assert done.exit_code == 2 and said in done.stderr and done.stdout == ""


def test_every_sampling_flag_reaches_the_model(chat, vlm, folder):
    flags = "--temp 1.5 --top-k 40 --min-p 0.01 --repetition-penalty 1.2 --seed 4 --max-kv-size 99"
    options = {"temperature": 1.5, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2}
    expected = answer(vlm, folder, "Why?", "a.png", seed=4, max_kv_size=99, **options).text
    assert chat("a.png", "-p", "Why?", *flags.split()).stdout == expected + "\n"
    whole = answer(vlm, folder, "Why?", "a.png").text
    stop = next(c for c in whole[2:] if c.isascii() and c.isprintable())
    done = chat("a.png", "-p", "Why?", "--stop", stop)
    assert done.stdout == whole[: whole.index(stop)] + "\n"


def test_generation_config_rules_where_no_flag_does(chat, vlm, folder, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    config = {"do_sample": True, "temperature": 1.5, "top_k": 40}
    (model / "generation_config.json").write_text(json.dumps(config))
    hot = answer(vlm, folder, "Why?", "a.png", temperature=1.5, top_k=40, seed=2).text
    assert chat("a.png", "-p", "Why?", "--seed", "2", model=str(model)).stdout == hot + "\n"
    cold = answer(vlm, folder, "Why?", "a.png").text
    assert chat("a.png", "-p", "Why?", "--temp", "0", model=str(model)).stdout == cold + "\n"


def test_a_retry_in_the_prompt_loop(chat, vlm, folder):
    done = chat("a.png", input="/retry\nWhy?\n/retry\n/retry hot\n/retry 1.5\n")
    lines = answer(vlm, folder, "Why?", "a.png").text
    assert done.stdout.startswith(f"{lines}\n{lines}\n")
    assert not done.stdout.endswith(f"{lines}\n{lines}\n{lines}\n")
    assert "no answer yet" in done.stderr and "not 'hot'" in done.stderr


@pytest.mark.parametrize("at", ["encoder", "projector"])
def test_an_embedding_cache_serves_its_pictures(chat, folder, monkeypatch, tmp_path, at):
    """Nothing is encoded nor decoded for a picture that the cache knows by content; others are."""
    from mlxvlm.vision.siglip import SiglipVision

    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"image": "a.png", "text": "A."}]))
    made = ["cache-embeddings", str(rows), "--images", ".", "-m", "model", "--codec", "float32"]
    out = str(tmp_path / "features")
    done = CliRunner().invoke(app, [*made, "--at", at, "--out", out])
    assert done.exit_code == 0, done.stderr
    expected = [chat(name, "-p", "Why?").stdout for name in ("a.png", "b c.png")]
    runs = []
    call = SiglipVision.__call__
    monkeypatch.setattr(SiglipVision, "__call__", lambda s, x: runs.append(len(x)) or call(s, x))
    with monkeypatch.context() as patch:
        patch.setattr("mlxvlm.images.tiling.open_picture", None)
        assert chat("a.png", "-p", "Why?", "--cache", out).stdout == expected[0]
    assert runs == []
    assert chat("b c.png", "-p", "Why?", "--cache", out).stdout == expected[1]
    assert runs == [1]
    (tmp_path / "a.png").write_bytes((folder / "b c.png").read_bytes())  # the name is known
    assert chat(str(tmp_path / "a.png"), "-p", "Why?", "--cache", out).stdout == expected[1]
    assert runs == [1, 1]


def test_a_cache_of_another_encoder_is_refused(chat, folder, tmp_path):
    write_cache(siglip(9), draw_pictures(tmp_path / "pictures", 2), tmp_path / "other")
    done = chat("a.png", "-p", "Why?", "--cache", str(tmp_path / "other"))
    assert done.exit_code == 1 and "was made by another encoder" in done.stderr
    assert done.stdout == ""
    none = chat("a.png", "-p", "Why?", "--cache", str(tmp_path / "none"), model="no-such-model")
    assert none.exit_code == 1 and "holds no embedding cache" in none.stderr


def test_prompts_are_kept_across_runs(chat, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    kept = str(tmp_path / "prompts")
    first, again = (
        json.loads(chat("a.png", "--json", "-p", "Why?", "--prompt-cache", kept).stdout)
        for _ in range(2)
    )
    assert first["reused_tokens"] == 0 and again["text"] == first["text"]
    assert again["reused_tokens"] == again["prompt_tokens"] - 1
    (tmp_path / "full").mkdir()
    monkeypatch.setattr("mlxvlm.prompt_cache.publish", full)
    done = chat("a.png", "-p", "Why?", "--prompt-cache", str(tmp_path / "full"))
    assert done.stdout == first["text"] + "\n" and done.exit_code == 0
    assert "warning: the prompt could not be kept" in done.stderr and "No space" in done.stderr


def test_flags_of_prompts_on_disk_that_cannot_be(chat, tmp_path):
    kept = str(tmp_path / "prompts")
    for flags, code, said in (
        (("--prompt-cache-gb", "1"), 2, "which is not given"),
        (("--prompt-cache", kept, "--prompt-cache-gb", "0"), 2, "must be above 0"),
        (("--prompt-cache", "a.png"), 1, "a.png cannot be a folder"),
    ):
        done = chat("-p", "Why?", *flags, model="no-such-model")
        assert done.exit_code == code and said in done.stderr


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
