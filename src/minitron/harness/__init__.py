"""Other people's benchmarks: lm-eval and what it lacks."""
