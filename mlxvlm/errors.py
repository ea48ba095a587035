"""What can go wrong, as a user sees it.

    VLMError                 a user's error: printed as one line, never as a traceback
    ├── ConfigError          a config.json or recipe that cannot be meant
    │   └── UsageError       a flag that cannot be meant (exit code 2)
    ├── WeightsError         a checkpoint whose tensors do not fit its config
    ├── HubError             a repository that cannot be had
    ├── PictureError         a file that is no usable picture
    ├── PromptError          messages and pictures that do not fit together
    ├── CacheError           an embedding cache that is damaged, foreign or in use
    └── DataError            a training row or data file that cannot be used

Each message states the rule, the value that broke it, and the way out. Bugs raise ordinary
Python exceptions and do show a traceback.
"""


class VLMError(Exception):
    """Base of every error that a user can cause and mend.

    kind: what is wrong with a row of data that costs itself, in two or three words, to count by.
    """

    default_kind = "other"

    def __init__(self, *args: object, kind: str = ""):
        super().__init__(*args)
        self.kind = kind or self.default_kind


class ConfigError(VLMError):
    """A configuration value that is missing, unknown or impossible."""


class UsageError(ConfigError):
    """A flag, or the same value in a recipe, that is missing, unknown or out of its range."""


class WeightsError(VLMError):
    """Tensors that are missing, unexpected, misshapen or not finite."""


class HubError(VLMError):
    """A repository or file that cannot be reached, is gated, or does not fit on the disk."""


class PictureError(VLMError):
    """A picture that cannot be read: empty, truncated, too large, or not a picture."""

    default_kind = "picture"


class PromptError(VLMError):
    """Messages that cannot be rendered, or pictures that do not match their places."""

    default_kind = "malformed"


class CacheError(VLMError):
    """An embedding cache that is damaged, made by another encoder, or held by another writer."""

    default_kind = "picture"


class DataError(VLMError):
    """Training data that cannot be read or used."""

    default_kind = "malformed"
