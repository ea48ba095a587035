"""Messages to tokens, image slots and supervised tokens; a layout a file."""

from .layout import render, render_many
from .messages import normalize_messages
from .pieces import Prompt

__all__ = ["Prompt", "normalize_messages", "render", "render_many"]
