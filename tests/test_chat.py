"""chat.py: turns, pictures and what a conversation remembers of them."""

from __future__ import annotations

import pytest
from tiny_vlm import picture, tiny_config, tiny_vlm

from mlxvlm.chat import Conversation
from mlxvlm.errors import ConfigError, PictureError, PromptError
from mlxvlm.reuse import Reuse
from mlxvlm.vision.siglip import SiglipVision


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture
def encoded(monkeypatch):
    """How many views each run of the vision tower took."""
    runs = []
    call = SiglipVision.__call__

    def counted(self, pixels):
        runs.append(len(pixels))
        return call(self, pixels)

    monkeypatch.setattr(SiglipVision, "__call__", counted)
    return runs


def ask(conversation, text, **options):
    return list(conversation.ask(text, **options))[-1].reply


def fresh(vlm, conversation, **options):
    """The answer to the last question without a conversation."""
    return vlm.generate(conversation.messages[:-1], conversation.pictures, **options)


def test_each_turn_answers_as_a_fresh_call_does(vlm):
    chat = Conversation(vlm, system="You are terse.", max_tokens=8)
    chat.add(picture(1))
    turns = [("What is this?", ()), ("And this?", (picture(2),)), ("Which is larger?", ())]
    for text, more in turns:
        chat.add(*more)
        reply = ask(chat, text)
        again = fresh(vlm, chat, max_tokens=8)
        assert (reply.tokens, reply.text) == (again.tokens, again.text)
        assert reply.prompt_tokens == again.prompt_tokens
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system", *["user", "assistant"] * 3]
    kinds = [[part["type"] for part in m["content"]] for m in chat.messages if m["role"] == "user"]
    assert kinds == [["image", "text"], ["image", "text"], ["text"]]


def test_the_encoder_sees_each_picture_once(vlm, encoded):
    chat = Conversation(vlm, max_tokens=3)
    chat.add(picture(1), picture(2))
    for text in ("One?", "Two?", "Three?"):
        ask(chat, text)
    assert encoded == [2]  # both at once, and never again
    chat.add(picture(1))  # the same content under another name
    ask(chat, "Again?")
    assert encoded == [2]
    chat.add(picture(3))
    ask(chat, "New?")
    assert encoded == [2, 1]
    fresh(vlm, chat, max_tokens=3)
    assert sum(encoded) == 7  # without a conversation: all four


def test_a_changed_file_is_a_different_picture(vlm, encoded, tmp_path):
    from PIL import Image

    path = tmp_path / "p.png"
    chat = Conversation(vlm, max_tokens=6)
    answers = []
    for seed in (1, 2):
        Image.fromarray(picture(seed)).save(path)
        chat.add(path)
        answers.append(ask(chat, "What is this?"))
    assert encoded == [1, 1]
    assert answers[1].tokens == fresh(vlm, chat, max_tokens=6).tokens


def test_clear_forgets_all_but_the_system_message(vlm, encoded):
    chat = Conversation(vlm, system="You are terse.", max_tokens=5)
    first = ask(chat, "Hello?")
    chat.add(picture(1))
    ask(chat, "What is this?")
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "You are terse."}]
    assert chat.pictures == [] and chat.waiting == 0
    assert ask(chat, "Hello?").tokens == first.tokens
    chat.add(picture(1))
    ask(chat, "What is this?")
    assert encoded == [1, 1]


def test_an_answer_cut_short_stands_as_far_as_it_got(vlm):
    chat = Conversation(vlm, max_tokens=20)
    chat.add(picture(1))
    stream = chat.ask("What is this?")
    said = ""
    while len(said) < 3:
        said += next(stream).text
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    assert chat.waiting == 0
    assert ask(chat, "And?").tokens == fresh(vlm, chat, max_tokens=20).tokens


def test_a_question_without_an_answer_is_forgotten_and_its_pictures_wait(vlm, monkeypatch):
    def interrupted(self, pixels):
        raise KeyboardInterrupt

    chat = Conversation(vlm, max_tokens=4)
    chat.add(picture(1))
    chat.ask("Never read.")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SiglipVision, "__call__", interrupted)
        ask(chat, "What is this?")
    assert chat.messages == [] and chat.waiting == 1
    ask(chat, "What is that?")
    assert chat.messages[0]["content"][0] == {"type": "image"} and chat.waiting == 0


def test_a_stream_that_outlives_its_conversation_leaves_the_next_alone(vlm):
    chat = Conversation(vlm, max_tokens=20)
    stream = chat.ask("What is this?")
    while not next(stream).text:
        pass
    chat.clear()
    chat.add(picture(1))
    stream.close()
    assert chat.messages == [] and chat.waiting == 1


def test_features_from_elsewhere_need_no_encoder(vlm, encoded):
    features = vlm.features([picture(1)])
    chat = Conversation(vlm, max_tokens=6)
    chat.add(*features)
    reply = ask(chat, "What is this?")
    assert encoded == [1]
    assert reply.tokens == fresh(vlm, chat, max_tokens=6).tokens


def test_a_picture_alone_is_a_question(vlm):
    chat = Conversation(vlm, max_tokens=2)
    chat.add(picture(1))
    ask(chat, "")
    assert chat.messages[0]["content"] == [{"type": "image"}]
    with pytest.raises(PromptError, match="no question"):
        chat.ask("  ")


def test_what_cannot_be_leaves_the_conversation_as_it_was(vlm):
    config = tiny_config()
    config.language["max_position_embeddings"] = 100
    chat = Conversation(tiny_vlm(config), max_tokens=2)
    with pytest.raises(PictureError):
        chat.add(picture(1), "no-such-picture.jpg")
    assert chat.pictures == []
    with pytest.raises(PromptError, match="at most 100"):
        chat.ask("Why? " * 30)
    with pytest.raises(ConfigError, match="temperature"):
        chat.ask("Why?", temperature=-1)
    assert chat.messages == []
    assert ask(chat, "Why?").generation_tokens == 2


def test_options_of_a_question_go_before_the_conversations(vlm):
    chat = Conversation(vlm, max_tokens=3, temperature=1.0, seed=1)
    assert ask(chat, "Why?").generation_tokens == 3
    assert ask(chat, "Why?", max_tokens=2).generation_tokens == 2


def test_retry_asks_again_in_the_place_of_the_answer(vlm, encoded):
    chat = Conversation(vlm, max_tokens=5, temperature=1.0, seed=3)
    with pytest.raises(PromptError, match="no answer yet"):
        chat.retry()
    chat.add(picture(1))
    first = ask(chat, "What is this?")
    ask(chat, "And?")
    question = chat.messages[-2]
    chat.add(picture(2))  # for the next question
    tries = [list(chat.retry())[-1].reply for _ in range(2)]
    assert chat.messages[-2:] == [question, {"role": "assistant", "content": tries[1].text}]
    assert len(chat.messages) == 4 and chat.messages[1]["content"] == first.text
    assert tries[0].tokens != tries[1].tokens  # each draws anew, as its seed says
    fresh = vlm.generate(
        chat.messages[:3], chat.pictures[:1], max_tokens=5, temperature=1.0, seed=5
    )
    assert tries[1].tokens == fresh.tokens
    assert tries[1].reused_tokens == tries[1].prompt_tokens - 1
    assert chat.waiting == 1
    ask(chat, "And this?")
    assert chat.messages[4]["content"][0] == {"type": "image"}
    assert encoded[:2] == [1, 1]  # the second is that of the fresh call
    stream = chat.retry()
    next(stream)
    answer = chat.messages[-1]
    chat.retry().close()
    assert chat.messages[-1] is answer


def test_a_history_that_was_edited_is_read_from_the_edit_on(vlm):
    chat = Conversation(vlm, max_tokens=6)
    chat.add(picture(1))
    for text in ("What is this?", "And?"):
        ask(chat, text)
    chat.messages[1]["content"] = "A cat."
    reply = ask(chat, "Why?")
    assert reply.tokens == fresh(vlm, chat, max_tokens=6).tokens
    end = len(vlm.tokenize(chat.messages[:1], chat.pictures, add_generation_prompt=True))
    assert reply.reused_tokens == end


def test_conversations_may_share_what_they_reuse(vlm, encoded):
    reuse = Reuse(vlm)
    chats = [Conversation(vlm, max_tokens=4, reuse=reuse) for _ in range(2)]
    for chat in chats:
        chat.add(picture(1))
        ask(chat, "What is this?")
    assert encoded == [1]
    chats[0].clear()  # what is shared stays
    assert len(reuse.prefixes) > 0
