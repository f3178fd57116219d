"""Small tokenizers of every kind, trained on the reference of the Python language, which every installation holds."""

import json
import pydoc_data.topics
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minitron.data.vocabulary import BYTES

TEXTS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:40]] + [
    "Grüße aus Köln, élève naïve, señor, Ελλάδα, 東京は日本の首都です。 Привет, мир! 🙂🙂",
]
LINES = "\n".join(line for text in TEXTS for line in text.splitlines() if line.strip())
SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"


def byte_level() -> Tokenizer:
    """GPT-2's kind: merges of bytes; one added token beside the special ones."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, **_quiet()))
    return made


def whole_words_first() -> Tokenizer:
    """Llama 3's kind: as `byte_level`, but a word that is a token stays whole, whatever the merges are."""
    content = json.loads(byte_level().to_str())
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["Ġunreachable"] = max(content["model"]["vocab"].values()) + 1
    return Tokenizer.from_str(json.dumps(content))


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: merges of characters, of which every token has all its splits as transformers converts them."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, **_quiet()))
    content = json.loads(made.to_str())
    ranked = list(content["model"]["vocab"])
    rare = {"東", "京", "Ελ"}  # characters without a token of their own, which bytes have to write
    kept = [token for token in ranked if not any(character in token for character in rare)]
    order = {token: number for number, token in enumerate([*SPECIAL, *BYTES, *kept[len(SPECIAL) :]])}
    splits = [
        (token[:at], token[at:])
        for token in kept
        for at in range(1, len(token))
        if token[:at] in order and token[at:] in order
    ]
    splits.sort(key=lambda pair: order[pair[0] + pair[1]])
    content["model"]["vocab"], content["model"]["merges"] = order, splits
    for token in content["added_tokens"]:
        token["id"] = order[token["content"]]
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", order["<s>"])])
    return made


def unigram() -> Tokenizer:
    """T5's and XLNet's kind: pieces with scores, here with bytes for characters without a piece."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>", **_quiet())
    made.train_from_iterator(TEXTS, trainer)
    content = json.loads(made.to_str())
    lowest = min(score for _, score in content["model"]["vocab"])
    content["model"]["vocab"] += [[piece, lowest - 1] for piece in BYTES]
    content["model"]["byte_fallback"] = True
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


def word_piece() -> Tokenizer:
    """BERT's kind: the longest token first, with a mark inside words."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIAL, **_quiet()))
    numbers = made.get_vocab()
    made.post_processor = processors.BertProcessing(("</s>", numbers["</s>"]), ("<s>", numbers["<s>"]))
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    made.__name__: made for made in (byte_level, whole_words_first, byte_fallback, unigram, word_piece)
}


@cache
def tokenizer_of(kind: str) -> Any:
    """Return transformers' tokenizer of a kind, with an added token and a chat template."""
    made = KINDS[kind]()
    known = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **known)
    fast.add_tokens(["<|turn|>"])
    fast.chat_template = CHAT
    return fast


def _quiet() -> dict[str, Any]:
    return {"show_progress": False}
