"""The wording: several phrasings of each kind of question, and the vocabulary that they need.

A bar `|` stands right behind a key word; `questions` takes it out and marks the place.
"""

from __future__ import annotations

import re

from examples.shapes.world import COLORS, COLUMNS, NUMBERS, ROWS, SHAPES, SIZES

ABSENT = "nothing"  # what a key grounds to when nothing in the picture matches it
PLURALS = (*SHAPES, "shape", "object", "bar")

ASKS = {
    "shape": (
        "Which shape is {color}|?",
        "What shape is {color}|?",
        "What is the {color}| shape?",
        "Which object in the {picture} is {color}|?",
        "What is the shape of the {color}| object?",
    ),
    "color": (
        "What {colour} is the {shape}|?",
        "Which {colour} is the {shape}|?",
        "What is the {colour} of the {shape}|?",
        "What {colour} does the {shape}| have?",
        "Tell me the {colour} of the {shape}|.",
    ),
    "count_all": (
        "How many shapes| are there?",
        "How many objects| are there?",
        "How many shapes| are in the {picture}?",
        "How many objects| do you see?",
        "Count the shapes|.",
    ),
    "count_color": (
        "How many {color}| shapes are there?",
        "How many shapes are {color}|?",
        "How many {color}| objects do you see?",
        "What is the number of {color}| shapes?",
        "Count the {color}| shapes.",
    ),
    "count_shape": (
        "How many {shapes}| are there?",
        "How many {shapes}| are in the {picture}?",
        "How many {shapes}| do you see?",
        "What is the number of {shapes}|?",
        "Count the {shapes}|.",
    ),
    "at": (
        "What is in the {place}|?",
        "What is at the {place}|?",
        "What do you see in the {place}|?",
        "Which object is in the {place}|?",
        "What is in the {place}| of the {picture}?",
    ),
    "where": (
        "Where is the {thing}|?",
        "Where in the {picture} is the {thing}|?",
        "Where do you see the {thing}|?",
        "In which place is the {thing}|?",
        "Can you tell me where the {thing}| is?",
    ),
    "yesno": (
        "Is there {a_thing}|?",
        "Do you see {a_thing}|?",
        "Is there {a_thing}| in the {picture}?",
        "Does the {picture} have {a_thing}|?",
        "Can you see {a_thing}| here?",
    ),
    "yesno_color": (
        "Is there {a_color}| shape?",
        "Do you see {a_color}| object?",
        "Is anything {color}|?",
        "Does the {picture} have {a_color}| shape?",
    ),
    "size": (
        "What size is the {thing}|?",
        "How big is the {thing}|?",
        "Is the {thing}| big or small?",
        "Is the {thing}| small or big?",
    ),
    "bar_value": (
        "How tall is the {color}| bar?",
        "How high is the {color}| bar?",
        "What is the value of the {color}| bar?",
        "What value does the {color}| bar have?",
        "What is the height of the {color}| bar?",
    ),
    "bars_count": (
        "How many bars| are there?",
        "How many bars| are in the chart?",
        "How many bars| does the chart have?",
        "Count the bars|.",
    ),
    "bar_extreme": (
        "Which bar is the {extreme}|?",
        "What is the {colour} of the {extreme}| bar?",
        "What {colour} is the {extreme}| bar?",
        "What is the {extreme}| bar?",
    ),
    "type": (
        "Is this a bar chart|?",
        "Is the {picture} a bar chart|?",
        "Do you see a bar chart|?",
    ),
    "describe": (
        "Describe the {picture}|.",
        "What does the {picture} show|?",
        "What is in the {picture}|?",
        "What do you see|?",
        "Tell me what is in the {picture}|.",
    ),
}
NOT_THERE = "not there"
OUTSIDE = "I only know drawn shapes and bar charts."
OUTSIDE_ASKS = (
    "What does the text say?",
    "Who is in the picture?",
    "What is the weather like?",
    "What is your name?",
    "Who painted this?",
    "What is the capital of France?",
    "Is the dog happy?",
    "What time is it?",
    "Can you write a poem?",
    "What brand is the car?",
    "Read the sign.",
    "Which animal is this?",
    "Translate this for me.",
    "What is 12 times 7?",
    "Why is the sky blue?",
    "Where was this photo taken?",
)


def plural(word: str) -> str:
    return word + ("es" if word.endswith("s") else "s")


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def vocabulary() -> list[str]:
    """Every word that a question or an answer can hold, in lower case, plurals by their stems."""
    texts = [text for kind in sorted(ASKS) for text in ASKS[kind]]
    texts = [re.sub(r"\{.*?\}", " ", text) for text in texts]
    texts += [NOT_THERE, OUTSIDE, ABSENT, "picture image colour color centre center"]
    texts += ["The number of shapes is at. In the top: a an. Yes. No. tallest shortest"]
    texts += [*COLORS, *SHAPES, *SIZES, *ROWS, *COLUMNS, *NUMBERS]
    stems = {plural(word): word for word in PLURALS}
    words = {word.lower() for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    return sorted({stems[word] if word in stems else word for word in words})
