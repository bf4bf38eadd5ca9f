"""Every error a user of kvfold can meet. This module imports nothing; each error carries one full sentence:
what, where, expected, got, what to do."""

from __future__ import annotations


class KvfoldError(Exception):
    """The root of all errors raised on purpose."""


class ModelFileError(KvfoldError):
    """A checkpoint file that is damaged, truncated or inconsistent.

    Attributes: `file` (path as given), `where` (tensor or metadata key, may be empty), `offset` (byte, -1 unknown).
    """

    def __init__(self, file: object, reason: str, *, where: str = "", offset: int = -1) -> None:
        self.file = str(file)
        self.where = where
        self.offset = offset
        self.reason = reason
        place = f" {where}:" if where else ""
        at = f" (at byte {offset})" if offset >= 0 else ""
        super().__init__(f"{self.file}:{place} {reason}{at}")


class UnsupportedModel(KvfoldError):
    """A well-formed checkpoint of an architecture or option that kvfold does not run."""


class UnsupportedType(UnsupportedModel):
    """A tensor type that kvfold knows by name but does not decode, or does not know at all."""


class SettingError(KvfoldError):
    """A setting with a value that is not allowed; the sentence lists the allowed ones."""


class PlanError(SettingError):
    """A forced path or form that this model, cache or backend cannot run."""


class OutOfPages(KvfoldError):
    """The cache has too few free pages for the request; the sentence says how many tokens would fit."""


class MissingExtra(KvfoldError):
    """An optional package is needed; the sentence says what to install."""


def install_extra(extra: str) -> str:
    """What a MissingExtra says to do, as README.md installs."""
    return f"pip install -c constraints.txt '.[{extra}]' where kvfold was cloned"


class NotYet(KvfoldError):
    """A setting of the peers that is understood but not implemented yet."""


class Cancelled(KvfoldError):
    """The step was stopped at a layer cut because its caller asked for it."""


class NumericsError(KvfoldError):
    """The model computed NaN or infinity; only the request it happened in fails."""


class TemplateError(KvfoldError):
    """A chat template that raised, never ended, or asked for too much; the sentence says which."""
