"""Settings of notifications about a run."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.types import FilePath, Positive, Settings, Texts

Event = Literal["finished", "failed", "budget", "hang", "excluded"]
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
_ADDRESS = re.compile(r"[^@\s<>,;]+@[^@\s<>,;]+")


class NotifySettings(Settings):
    """Notifications about the end of a run and about what its supervisor decides.

    Passwords and webhook addresses are named by an environment variable or a file, never written here.
    """

    on: tuple[Event, ...] = Field(
        default=("finished", "failed", "budget", "hang", "excluded"),
        min_length=1,
        description="events: finished; failed; budget, a failure since too many attempts ended early; hang; excluded, a node at "
        "fault is avoided",
    )
    email_to: Texts = Field(default=(), description="e-mail addresses; none means no e-mail")
    email_from: str | None = Field(default=None, description="sender of the e-mails; null means the first recipient")
    smtp: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9.:_\[\]-]+$", description="SMTP server as HOST:PORT; null means the program sendmail"
    )
    smtp_security: Literal["starttls", "tls", "none"] = Field(
        default="starttls", description="encryption of the connection to the SMTP server"
    )
    smtp_user: str | None = Field(default=None, description="user name at the SMTP server; null means no login")
    smtp_password_env: str | None = Field(default=None, pattern=_VARIABLE, description="environment variable with the password")
    smtp_password_file: FilePath | None = Field(default=None, description="file with the password")
    webhook_env: str | None = Field(
        default=None,
        pattern=_VARIABLE,
        description="environment variable with the URL of a webhook that takes Slack's JSON; null means none",
    )
    webhook_file: FilePath | None = Field(default=None, description="file with that URL")
    command: Texts = Field(
        default=(),
        description="a program and its arguments, run without a shell; the text comes on its standard input, FOVEA_EVENT and "
        "FOVEA_RUN are set",
    )
    timeout: Positive = Field(default=20.0, le=120, description="seconds after which a notification is given up")

    @property
    def channels(self) -> bool:
        """Whether anything is notified."""
        return bool(self.email_to or self.webhook_env or self.webhook_file or self.command)

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the environment variables that a notification reads."""
        return tuple(name for name in (self.smtp_password_env, self.webhook_env) if name is not None)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for address in (*self.email_to, *([self.email_from] if self.email_from else [])):
            if not _ADDRESS.fullmatch(address) or not address.isascii() or not address.isprintable():
                raise PydanticCustomError("address", "has {address}, which is not an e-mail address", {"address": repr(address)})
        if (self.smtp_password_env or self.smtp_password_file) and not (self.smtp and self.smtp_user):
            raise PydanticCustomError("password", "has a password, and no smtp and smtp_user to use it with")
        if self.smtp_user and self.smtp_security == "none":
            raise PydanticCustomError("security", "must not log in over a connection without encryption; set smtp_security")
        if self.smtp_user and not (self.smtp_password_env or self.smtp_password_file):
            raise PydanticCustomError("password", "has smtp_user and no smtp_password_env or smtp_password_file")
        if self.webhook_env and self.webhook_file:
            raise PydanticCustomError("webhook", "has webhook_env and webhook_file; give one of them")
        return self
