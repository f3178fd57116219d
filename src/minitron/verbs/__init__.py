"""One file per verb: what the command line and `import minitron` call.

Each verb is a function that reads a recipe, checks the inputs, does one job and returns a `Result`.
"""
