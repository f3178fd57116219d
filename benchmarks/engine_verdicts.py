"""Which released models vLLM, TensorRT-LLM and Megatron-Bridge run on 1, 2, 4 and 8 GPUs, by their sources.

python benchmarks/engine_verdicts.py ../shared/data/configs

A row of Markdown per config; a number of GPUs stands in the cell of each engine that runs the model on that number, and
what stands in the way of the others follows below the table.
"""

import sys
from pathlib import Path

from minitron.model.config import read_config
from minitron.model.engines import BY_NAME

NAMES = ("vllm", "trtllm", "megatron")
GPUS = (1, 2, 4, 8)


def main() -> None:
    """Print the table and the obstacles."""
    reasons: list[str] = []
    print(f"| model | model_type | {' | '.join(BY_NAME[name].name for name in NAMES)} |")
    print(f"|---|---|{'---|' * len(NAMES)}")
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        config = read_config(path).to_dict()
        cells = []
        for name in NAMES:
            verdicts = {gpus: BY_NAME[name].verdict(config, gpus) for gpus in GPUS}
            cells.append(", ".join(str(gpus) for gpus, verdict in verdicts.items() if verdict.passes) or "none")
            for verdict in verdicts.values():
                reasons += [f"{path.stem}: {obstacle.reason}" for obstacle in verdict.obstacles]
        print(f"| {path.stem} | `{config['model_type']}` | {' | '.join(cells)} |")
    print()
    for reason in dict.fromkeys(reasons):
        print(f"- {reason}")


if __name__ == "__main__":
    main()
