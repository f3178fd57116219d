"""What the process from which tests fork others has imported: the tests, and all that a tiny model takes."""

import torch
from transformers import AutoModelForCausalLM

from tests import test_compress, test_distributed, test_search_run  # noqa: F401
from tests.conftest import make_config

with torch.device("meta"):
    for variant in ("llama-tied", "qwen3-tied"):
        AutoModelForCausalLM.from_config(make_config(variant))
