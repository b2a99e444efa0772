"""Whether Redis answers, as the last attempt saw it."""

from __future__ import annotations


class LinkState:
    """Shared by the services of one sidecar. ``trouble`` says what the last failure was; empty while the link is up.

    Up until an attempt says otherwise: after a start the first check shall try, not be told that nobody has yet.
    """

    def __init__(self) -> None:
        self.up = True
        self.trouble = ""
        self.refused = False

    def succeeded(self) -> None:
        """A call was answered."""
        self.up = True
        self.refused = False
        self.trouble = ""

    def failed(self, error: Exception, *, refused: bool = False) -> bool:
        """A call was not answered. Whether that is news."""
        news = self.up or self.trouble != str(error)
        self.up = False
        self.refused = refused
        self.trouble = str(error)
        return news
