"""Shows a document as a model will see it, with the part that is learnt marked."""

from itertools import groupby
from typing import Any

from minitron.data.chats import Chat
from minitron.data.rows import Document
from minitron.data.tokens import tokenise

OPENS, CLOSES = "⟦", "⟧"
"""The marks around what is learnt."""
MOST_CHARACTERS = 1_500


def example_in_words(document: Document, tokenizer: Any) -> str:
    """Return the text of a document as it was tokenised, what is learnt within ⟦ and ⟧, after a line that names both.

    Raises:
        UserError: see `tokenise`.
    """
    [tokens] = tokenise([document], tokenizer)
    pairs = zip(tokens.is_learnt.tolist(), tokens.ids.tolist(), strict=True)
    text = ""
    for is_learnt, run in groupby(pairs, key=lambda pair: pair[0]):
        part = tokenizer.decode([token for _, token in run], clean_up_tokenization_spaces=False)
        text += f"{OPENS}{part}{CLOSES}" if is_learnt else part
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]} …"
    kind = "a text, all of which is learnt"
    if isinstance(document, Chat):
        kind = f"a chat of {len(document.messages)} turns ({document.where})"
        if not tokenizer.chat_template:
            kind = f"a question with its answer, without a chat template ({document.where})"
    learnt = int(tokens.is_learnt.sum())
    return f"the first example: {kind}, {learnt:,} of {len(tokens.ids):,} tokens learnt, within {OPENS}{CLOSES}\n{text}"
