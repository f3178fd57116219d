"""What programs read beside a graph: configs for Transformers.js and onnxruntime-genai, and the tokenizer."""

from pathlib import Path
from typing import Any

from minitron.files import read_json, write_json
from minitron.formats.answers import ends_of
from minitron.model.checkpoint import Checkpoint
from minitron.model.writing import copy_companions

CONFIG, TOKENIZER_CONFIG, TEMPLATE = "config.json", "tokenizer_config.json", "chat_template.jinja"


def write_companions(folder: Path, graph: Path, checkpoint: Checkpoint, *, tokenizer: Any, dtype: str) -> None:
    """Write the config and the tokenizer of a model into the folder that holds its graph.

    `dtype` is what Transformers.js calls the type of the matrices, by which it finds the file. It reads the chat
    template in the tokenizer's config only, where transformers no longer writes it.
    """
    copy_companions(checkpoint.folder, folder)
    checkpoint.config.save_pretrained(folder)
    reading = {"dtype": dtype, "use_external_data_format": {graph.name: 1}}
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), "transformers.js_config": reading})
    template, settings = folder / TEMPLATE, folder / TOKENIZER_CONFIG
    if template.is_file() and settings.is_file():
        stated = {"chat_template": template.read_text(encoding="utf-8")}
        write_json(settings, {**read_json(settings), **stated})
    write_json(folder / "genai_config.json", genai_config(graph.relative_to(folder), checkpoint, tokenizer))


def genai_config(graph: Path, checkpoint: Checkpoint, tokenizer: Any) -> dict[str, Any]:
    """Return the config by which onnxruntime-genai runs a graph: its file, inputs and outputs, sizes, and tokens."""
    config: Any = checkpoint.config
    ends = ends_of(checkpoint, tokenizer)
    tokens = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    inputs = ("input_ids", "attention_mask", "position_ids")
    heads = config.num_attention_heads
    return {
        "model": {
            "type": "decoder",
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            **{name: token for name, token in tokens.items() if token is not None},
            **({"eos_token_id": ends} if ends else {}),
            "decoder": {
                "filename": str(graph),
                "inputs": {
                    **{name: name for name in inputs},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "hidden_size": config.hidden_size,
                "num_hidden_layers": config.num_hidden_layers,
                "num_attention_heads": heads,
                "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
                "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": False,
        },
    }
