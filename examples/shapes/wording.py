"""Questions as people put them: with a greeting, a thank-you, or a slip of the keyboard.

None of it changes what is asked. Slips spare the key words, since a key that is misspelt may mean
another one.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from examples.shapes.qa import QA

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
# Words that a slip may hit: what is left when they are guessed wrong still asks the same.
FILLERS = (
    "what which where there many picture image does have shape shapes number tell describe show "
    "count object stand stands printed read chart colour color find you see the from"
).split()


def loosely(qa: QA, rng: random.Random) -> QA:
    """The same question with one or two of these about it."""
    ways = rng.sample(("before", "after", "slip"), rng.choice((1, 1, 2)))
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


def _slip(qa: QA, rng: random.Random) -> QA:
    """Two letters swapped, one lost, or one doubled, in one of the words that are no keys."""
    keys = {mark.end for mark in qa.marks if mark.turn == 0}
    words = [
        match
        for match in re.finditer(r"[A-Za-z]+", qa.question)
        if match[0].lower() in FILLERS
        and not any(match.start() < end <= match.end() for end in keys)
    ]
    if not words:
        return qa
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end())
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
