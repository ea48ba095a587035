"""The same questions in words that no training row has, and as people type them.

Training's phrasings stand in `phrases.ASKS`; none of these may, which a test checks.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from examples.shapes.qa import QA

PARAPHRASES = {
    "shape": (
        "What sort of figure is painted {color}?",
        "the {color} one, what is it",
        "Name the thing that is {color}.",
    ),
    "color": (
        "How is the {shape} painted?",
        "the {shape}, what colour has it got",
        "In which colour was the {shape} drawn?",
    ),
    "size": (
        "Would you call the {thing} small, medium or big?",
        "the {thing}, how large is it",
        "What size would you say that the {thing} has?",
    ),
    "largest": (
        "Of all the shapes, which one is the {extreme}?",
        "the {extreme} one, what is it",
        "Name the {extreme} shape for me.",
    ),
    "count_all": (
        "Can you count all the shapes for me?",
        "shapes, how many",
        "In total, how many shapes have been drawn?",
    ),
    "count_color": (
        "Can you count the {color} shapes for me?",
        "{color} shapes, how many",
        "How many of the shapes have been painted {color}?",
    ),
    "count_shape": (
        "Can you count the {shapes} for me?",
        "{shapes}, how many",
        "What is the total of {shapes} that you find?",
    ),
    "at": (
        "Tell me what stands in the {place}.",
        "the {place}, what is there",
        "What has been drawn in the {place}?",
    ),
    "where": (
        "Which part of the picture holds the {thing}?",
        "the {thing}, where is it",
        "I cannot find the {thing}. Where should I look?",
    ),
    "relation": (
        "Would you say that the {a} is {side} the {b}?",
        "the {a}, is it {side} the {b}",
        "Can the {a} be found {side} the {b}?",
    ),
    "relation_or": (
        "Tell me whether the {a} is {side} or {other} the {b}.",
        "the {a}, is it {side} or {other} the {b}",
        "Would you find the {a} {side} or {other} the {b}?",
    ),
    "next": (
        "Tell me what stands {side} the {b}.",
        "{side} the {b}, what is there",
        "Which thing would I find {side} the {b}?",
    ),
    "yesno": (
        "Has {a_thing} been drawn?",
        "{a_thing}, is there one",
        "I am looking for {a_thing}. Is one here?",
    ),
    "yesno_color": (
        "Has {a_color} shape been drawn?",
        "{a_color} shape, is there one",
        "I am looking for {a_color} shape. Is one here?",
    ),
    "number": (
        "Which number can you read?",
        "the number, what is it",
        "Please read out the number.",
    ),
    "word": (
        "Which word can you read?",
        "the word, what is it",
        "Please read out the word.",
    ),
    "text": (
        "What is written in {color} letters?",
        "the {color} writing, what does it say",
        "Please read out what is printed in {color}.",
    ),
    "bar_value": (
        "Up to which value does the {color} bar go?",
        "the {color} bar, how tall is it",
        "Which height has the {color} bar got?",
    ),
    "bars_count": (
        "Can you count the bars for me?",
        "bars, how many",
        "In total, how many bars have been drawn?",
    ),
    "bar_extreme": (
        "Of all the bars, which one is the {extreme}?",
        "the {extreme} bar, what colour has it got",
        "Name the colour of the {extreme} bar for me.",
    ),
    "describe": (
        "Please tell me everything that you see.",
        "all of it, what is there",
        "Give me a full description of the picture.",
    ),
}


def paraphrased(qa: QA, rng: random.Random) -> QA:
    """The question in words of `PARAPHRASES`."""
    text = rng.choice(PARAPHRASES[qa.template]).format(**qa.slots)
    return replace(qa, question=text, marks=())


def lower_case(qa: QA, rng: random.Random) -> QA:
    """All in small letters, without the mark at the end."""
    return replace(qa, question=qa.question.lower().rstrip("?."), marks=())


def mistyped(qa: QA, rng: random.Random) -> QA:
    """One slip in one word of four letters or more: swapped, missing or doubled."""
    words = list(re.finditer(r"[A-Za-z]{4,}", qa.question))
    word = rng.choice(words)
    text = word.group()
    at = rng.randrange(1, len(text) - 1)
    slips = [text[:at] + text[at + 1 :], text[:at] + text[at] + text[at:]]
    if text[at] != text[at + 1]:
        slips.append(text[:at] + text[at + 1] + text[at] + text[at + 2 :])
    slip = rng.choice(slips)
    question = qa.question[: word.start()] + slip + qa.question[word.end() :]
    return replace(qa, question=question, marks=())
