"""The one exception that means: what was asked cannot be done, and here is what would be accepted."""


class UserError(Exception):
    """A mistake the user can mend; the command line prints it as one `error: …` line and exits with 2."""


def nearest(word: str, accepted: list[str]) -> str:
    """`did you mean …?` when an accepted word is close to `word`, else the list of accepted words."""
    import difflib

    close = difflib.get_close_matches(word, accepted, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"accepted: {', '.join(accepted)}"
