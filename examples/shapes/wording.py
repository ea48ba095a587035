"""Questions as people put them: in other words, with a greeting or a thank-you, with a slip.

None of it changes what is asked. The other words are not in the vocabulary; the tokenizer spells
them out.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from examples.shapes.qa import QA, lift

BEFORE = (
    "Please:",
    "Hello!",
    "Hi there,",
    "So,",
    "Well,",
    "Now,",
    "Next:",
    "And",
    "Look closely.",
    "Quick question:",
    "I wonder:",
    "I would like to know:",
    "Could you help me?",
    "Can you say,",
    "Tell me,",
    "Let me know:",
    "For my homework:",
    "Just curious:",
    "In this drawing,",
    "Looking at the page,",
    "Take a look.",
    "One more thing:",
    "Think first.",
    "Answer me this:",
)
AFTER = (
    "Please.",
    "Thanks!",
    "Thank you.",
    "Be exact.",
    "Take your time.",
    "Now.",
    "That is all.",
    "I need it soon.",
    "Any idea?",
    "Do you know?",
    "Look twice.",
    "Just say it.",
)
# As in `phrases.ASKS`: a bar behind a key word, a caret where the first step begins.
OTHERWISE = {
    "shape": (
        "{color}|: which shape?",
        "Name the {color}| shape.",
        "Something here is {color}|. What shape is it?",
        "I see something {color}|. Which shape?",
    ),
    "color": (
        "Name the colour of the {shape}|.",
        "{shape}|, which color?",
        "In what color was the {shape}| painted?",
        "The {shape}| has which colour?",
    ),
    "size": (
        "Is it big or small, the {thing}|?",
        "{thing}|: what size?",
        "How large is the {thing}|?",
        "Say how big the {thing}| looks.",
    ),
    "largest": (
        "Tell me the {extreme}| shape.",
        "Which one is {extreme}|?",
        "Find the {extreme}| of them all.",
        "Look for the {extreme}| thing. What is it?",
    ),
    "count_all": (
        "Number of shapes|?",
        "How many shapes| altogether?",
        "Can you tell how many shapes| there are?",
        "I want to know how many shapes| it has.",
    ),
    "count_color": (
        "{color}| shapes: how many?",
        "How many of them are {color}|?",
        "Tell me how many {color}| shapes you find.",
        "Of the {color}| ones, how many?",
    ),
    "count_shape": (
        "Number of {shapes}|?",
        "Of all these {shapes}|, how many?",
        "Tell me how many {shapes}| you find.",
        "How many {shapes}| altogether?",
    ),
    "at": (
        "Look at the {place}|. What is there?",
        "{place}|: what is it?",
        "What did they draw in the {place}|?",
        "Say what the {place}| shows.",
    ),
    "where": (
        "{thing}|: where?",
        "Whereabouts is the {thing}|?",
        "In which part is the {thing}|?",
        "Say in which place the {thing}| stands.",
    ),
    "relation": (
        "Tell me if the {a}| is {side} the {b}|.",
        "{a}| {side} the {b}|: yes or no?",
        "Is it true that the {a}| is {side} the {b}|?",
        "Would the {a}| be {side} the {b}|?",
    ),
    "relation_or": (
        "Say if the {a}| is {side} or {other} the {b}|.",
        "Which is it: the {a}| {side} or {other} the {b}|?",
        "Does the {a}| lie {side} or {other} the {b}|?",
    ),
    "next": (
        "{side} the {b}|: what is it?",
        "Look {side} the {b}|. What is there?",
        "Say what is {side} the {b}|.",
        "Is something {side} the {b}|? What is it?",
    ),
    "yesno": (
        "{a_thing}|: is it there?",
        "Tell me if there is {a_thing}|.",
        "Could there be {a_thing}| somewhere?",
        "Did they draw {a_thing}|?",
    ),
    "yesno_color": (
        "{a_color}| shape: is it there?",
        "Tell me if there is {a_color}| shape.",
        "Is anything {color}|?",
        "Did they draw {a_color}| shape?",
    ),
    "number": (
        "Say the number|.",
        "Can you read the number|?",
        "A number| is printed there. Which?",
        "Which digits? Tell me the number| on it.",
    ),
    "word": (
        "Say the word|.",
        "Can you read the word|?",
        "A word| is printed there. Which?",
        "What does the word| say?",
    ),
    "text": (
        "Say what the {color}| text says.",
        "Can you read the {color}| text?",
        "{color}| text: what is it?",
        "What does it say in {color}|?",
    ),
    "box": (
        "Box of the {thing}|?",
        "Give me the box around the {thing}|.",
        "Draw a box around the {thing}|.",
        "I need the box of the {thing}|.",
    ),
    "bar_value": (
        "{color}| bar: what value?",
        "How much is the {color}| bar?",
        "Say the height of the {color}| bar.",
        "Where does the {color}| bar end?",
    ),
    "bars_count": (
        "Number of bars|?",
        "How many bars| altogether?",
        "Tell me how many bars| it has.",
    ),
    "bar_extreme": (
        "Tell me the {extreme}| bar.",
        "Say the color of the {extreme}| bar.",
        "Find the {extreme}| bar. What color is it?",
    ),
    "type": (
        "A bar chart|, is it?",
        "Tell me if this is a bar chart|.",
        "Are we looking at a bar chart|?",
    ),
    "describe": (
        "Say everything you see^.",
        "List what the picture shows^.",
        "Go through the picture and tell me what is there^.",
        "So what have we got here^?",
    ),
}
LEAST = 4  # letters of a word that a slip may hit


def loosely(qa: QA, rng: random.Random) -> QA:
    """The same question with one or two of these about it."""
    ways = rng.sample(("otherwise", "before", "after", "slip"), rng.choice((1, 1, 2)))
    if "otherwise" in ways and qa.template in OTHERWISE:
        qa = _otherwise(qa, rng)
    if "slip" in ways:
        qa = _slip(qa, rng)
    if "before" in ways:
        opening = rng.choice(BEFORE) + " "
        lower = rng.random() < 0.5 and not opening.endswith((". ", "! ", "? "))
        question = qa.question[0].lower() + qa.question[1:] if lower else qa.question
        qa = _edit(replace(qa, question=question), 0, 0, opening)
    if "after" in ways:
        stop = "" if qa.question[-1] in "?." else rng.choice("?.,")
        qa = replace(qa, question=f"{qa.question}{stop} {rng.choice(AFTER)}")
    return qa


def _otherwise(qa: QA, rng: random.Random) -> QA:
    text = rng.choice(OTHERWISE[qa.template]).format(**qa.slots)
    asked, said = ([mark for mark in qa.marks if mark.turn == turn] for turn in (0, 1))
    # About a picture with nothing drawn in it, keys refer to nothing and carry no marks.
    words = [mark.words for mark in asked] or [{}] * len(re.findall(r"[|^]", text))
    text, marks = lift(text, 0, words)
    return replace(qa, question=text, marks=(*(marks if asked else ()), *said))


def _slip(qa: QA, rng: random.Random) -> QA:
    """Two letters swapped, one lost, or one doubled, behind a word's first letter."""
    ends = [mark.end for mark in qa.marks if mark.turn == 0]
    places = [
        at
        for word in re.finditer(rf"[A-Za-z]{{{LEAST},}}", qa.question)
        for at in range(word.start() + 2, word.end())
        # A mark within a word, behind a plural's stem, could not stay at the end of a token.
        if not any(word.start() < end < word.end() for end in ends)
    ]
    if not places:
        return qa
    at = rng.choice(places)
    a, b = qa.question[at - 1], qa.question[at]
    slip = rng.choice((b + a, a, a + a + b))
    return _edit(qa, at - 1, at + 1, slip)


def _edit(qa: QA, start: int, end: int, text: str) -> QA:
    """Puts `text` where [start, end) of the question was; marks behind it move along."""
    shift = len(text) - (end - start)
    marks = tuple(
        replace(mark, end=mark.end + shift) if mark.turn == 0 and mark.end >= end else mark
        for mark in qa.marks
    )
    return replace(qa, question=qa.question[:start] + text + qa.question[end:], marks=marks)
