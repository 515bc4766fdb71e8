"""The exception tree: every error that stoker raises on purpose is a `StokerError`.

The C++ core raises the same classes (runtime/base/errors.h names the kinds).
"""

from __future__ import annotations


class StokerError(Exception):
    """Base of every error that stoker raises on purpose.

    Its text is one line that any encoding of Unicode and any terminal takes: a path or a name in it
    may hold newlines, control characters and bytes that are not UTF-8, which appear escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ModelFileError(StokerError):
    """A model file is missing, truncated, corrupt or changed while in use."""


class UnsupportedModelError(StokerError):
    """The architecture, tensor type or feature is one that stoker does not run."""


class ContextLengthError(StokerError):
    """The tokens are more than the session's context holds."""


class BudgetError(StokerError):
    """The plan does not fit the memory; the message names what would."""


class OptionError(StokerError, ValueError):
    """An argument, option or environment variable has a value that cannot be used."""


class DeviceError(StokerError, OSError):
    """The device failed: a read error, or an instruction that traps."""


class TokenizerError(StokerError):
    """The file's tokenizer is missing, malformed or of an unknown kind."""


class ChatTemplateError(StokerError):
    """The chat template is missing, malformed, or rejected the messages."""


class DownloadError(StokerError):
    """A model could not be fetched or did not match its checksum."""


class Cancelled(StokerError):
    """The session was cancelled from another thread; it stays usable."""


def one_line(error: BaseException) -> str:
    """Returns the error's message on one line, cut after 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
