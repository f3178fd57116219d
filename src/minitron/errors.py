"""Exceptions with which a run ends in good order."""


class UserError(Exception):
    """What was asked cannot be done, and what would be accepted.

    The command line prints it as one `error: …` line and exits with 2.
    """


class StoppedError(Exception):
    """A signal asked the run to stop and it has saved itself; the command line exits as the signal would have."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("stopped, with everything saved: run the same again to continue")
        self.signal_number = signal_number


def nearest(word: str, accepted: list[str]) -> str:
    """`did you mean …?` when an accepted word is close to `word`, else the list of accepted words."""
    import difflib

    close = difflib.get_close_matches(word, accepted, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"accepted: {', '.join(accepted)}"
