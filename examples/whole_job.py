"""The whole job from Python: search for a shape, prune, distil and evaluate.

    python examples/whole_job.py smollm2 runs/example wiki

Run again after an interruption, it continues; run again after the end, it prints the figures.
"""

import sys

import minitron

teacher, out, data = sys.argv[1:4] if len(sys.argv) > 3 else ("smollm2", "runs/example", "wiki")
minitron.configure_backends()

try:
    result = minitron.compress(
        teacher,
        out,
        target_params=0.7,
        data=data,
        # Sized for two CPU cores; a good student takes millions of tokens.
        calibration={"tokens": "8k"},
        distill={"tokens": "16k", "batch_size": 1, "learning_rate": 5e-4},
        evaluation={"tokens": "4k"},
    )
except minitron.UserError as error:
    sys.exit(f"error: {error}")

print(result)
print(f"{result.arch.num_parameters:,} parameters in {result.student}")
