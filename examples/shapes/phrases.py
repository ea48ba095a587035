"""The wording: several phrasings of each kind of question, and the vocabulary that they need.

A bar `|` stands right behind a key word; `qa` takes it out and marks the place.
"""

from __future__ import annotations

import re

from examples.shapes.world import (
    COLORS,
    COLUMNS,
    NUMBERS,
    PRINTED_NUMBERS,
    ROWS,
    SHAPES,
    SIZES,
    WORDS,
)

ABSENT = "nothing"  # what a key grounds to when nothing in the picture matches it
PLURALS = (*SHAPES, "shape", "bar")
# A box is written in thousandths of the picture's sides, in steps that the small picture can show.
COORDINATES = range(0, 1000, 20)

ASKS = {
    "shape": (
        "Which shape is {color}|?",
        "What shape is {color}|?",
        "What is the {color}| shape?",
        "Which shape in the {picture} is {color}|?",
        "What shape is the {color}| one?",
        "The {color}| one: which shape is it?",
    ),
    "color": (
        "What {colour} is the {shape}|?",
        "Which {colour} is the {shape}|?",
        "What is the {colour} of the {shape}|?",
        "What {colour} does the {shape}| have?",
        "Tell me the {colour} of the {shape}|.",
        "The {shape}|: what {colour} is it?",
    ),
    "size": (
        "What size is the {thing}|?",
        "How big is the {thing}|?",
        "Is the {thing}| big, medium or small?",
        "Tell me the size of the {thing}|.",
    ),
    "largest": (
        "Which shape is the {extreme}|?",
        "What is the {extreme}| shape?",
        "Which is the {extreme}| shape in the {picture}?",
        "Which of the shapes is the {extreme}|?",
    ),
    "count_all": (
        "How many shapes| are there?",
        "How many shapes| are in the {picture}?",
        "How many shapes| do you see?",
        "How many shapes| can you see here?",
        "What is the number of shapes|?",
        "Count the shapes|.",
    ),
    "count_color": (
        "How many {color}| shapes are there?",
        "How many shapes are {color}|?",
        "How many {color}| shapes do you see?",
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
        "What can you see in the {place}|?",
        "What is in the {place}| of the {picture}?",
    ),
    "where": (
        "Where is the {thing}|?",
        "Where in the {picture} is the {thing}|?",
        "Where do you see the {thing}|?",
        "In which place is the {thing}|?",
        "Can you tell me where the {thing}| is?",
    ),
    "relation": (
        "Is the {a}| {side} the {b}|?",
        "Does the {a}| stand {side} the {b}|?",
        "Do you see the {a}| {side} the {b}|?",
    ),
    "relation_or": (
        "Is the {a}| {side} or {other} the {b}|?",
        "Does the {a}| stand {side} or {other} the {b}|?",
    ),
    "next": (
        "What is {side} the {b}|?",
        "Which object is {side} the {b}|?",
        "What do you see {side} the {b}|?",
        "What stands {side} the {b}|?",
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
        "Do you see {a_color}| shape?",
        "Is any shape {color}|?",
        "Does the {picture} have {a_color}| shape?",
    ),
    "number": (
        "What number| is printed?",
        "Which number| is printed in the {picture}?",
        "Which number| do you see?",
        "What is the printed number|?",
        "Read the number|.",
        "Tell me the number|.",
    ),
    "word": (
        "What word| is printed?",
        "Which word| is printed in the {picture}?",
        "Which word| do you see?",
        "What is the printed word|?",
        "Read the word|.",
        "Tell me the word|.",
    ),
    "text": (
        "What does the {color}| text say?",
        "Read the {color}| text.",
        "What is printed in {color}|?",
        "What is the {color}| text?",
    ),
    "box": (
        "Give the box of the {thing}|.",
        "What is the box of the {thing}|?",
        "Find the {thing}|.",
        "Show me the {thing}|.",
        "Where exactly is the {thing}|?",
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
        "Describe the {picture}^.",
        "What does the {picture} show^?",
        "What is in the {picture}^?",
        "What do you see^?",
        "Tell me what is in the {picture}^.",
        "Describe what you see^.",
    ),
}
NOT_THERE = "not there"
IN_ONE_WORD = "Answer in one word."
OUTSIDE = "I only know drawn scenes."
OUTSIDE_ASKS = (
    "Who is in the picture?",
    "What is the weather like?",
    "What is your name?",
    "Who painted this?",
    "What is the capital of France?",
    "Is the dog happy?",
    "What time is it?",
    "Can you write a poem?",
    "What brand is the car?",
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


def coordinate(share: float) -> int:
    """A share of the picture's side as a box has it: the nearest of `COORDINATES`."""
    step = COORDINATES.step
    return min(max(round(1000 * share / step) * step, 0), COORDINATES[-1])


def vocabulary() -> list[str]:
    """Every word that a question or an answer can hold, in lower case, plurals by their stems."""
    texts = [text for kind in sorted(ASKS) for text in ASKS[kind]]
    texts = [re.sub(r"\{.*?\}", " ", text) for text in texts]
    texts += [NOT_THERE, OUTSIDE, IN_ONE_WORD, ABSENT, "picture image colour color centre center"]
    texts += ["The number of shapes is at. In the top: a an. Yes. No. tallest shortest"]
    texts += ["largest smallest biggest left of right above below or says"]
    texts += [*COLORS, *SHAPES, *SIZES, *ROWS, *COLUMNS, *NUMBERS]
    stems = {plural(word): word for word in PLURALS}
    words = {word.lower() for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    return sorted({stems[word] if word in stems else word for word in words})


def printed() -> list[str]:
    """What can be printed, or written as a coordinate: each is one token."""
    numbers = sorted({*PRINTED_NUMBERS, *COORDINATES})
    return [*WORDS, *(str(number) for number in numbers)]
