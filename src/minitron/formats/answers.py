"""Where an answer of a model ends, which engines have to find stated beside its weights."""

from typing import Any

from minitron.model.checkpoint import Checkpoint


def ends_of(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """Return the tokens at which an answer ends: those of the generation config, and the tokenizer's."""
    from transformers import GenerationConfig

    stated: Any = None
    if (checkpoint.folder / "generation_config.json").is_file():
        folder = checkpoint.folder
        read = GenerationConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        stated = read.eos_token_id
    listed = stated if isinstance(stated, list) else [stated]
    numbers = (tokenizer.eos_token_id, *listed)
    return list(dict.fromkeys(n for n in numbers if n is not None and tokenizer.convert_ids_to_tokens(n) is not None))
