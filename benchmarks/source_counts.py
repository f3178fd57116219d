"""Counts of the source that a reader feels: lines, functions of many parameters, formatting switched off, `Any`.

python benchmarks/source_counts.py [SOURCE ...]
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
MOST_PARAMETERS = 6


def main() -> None:
    """Print one line per folder of sources."""
    for folder in sys.argv[1:] or ["src"]:
        texts = [path.read_text() for path in sorted(Path(folder).rglob("*.py"))]
        nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        counts = {
            "files": len(texts),
            "lines": sum(text.count("\n") for text in texts),
            "lines of code": sum(map(lines_of_code, texts)),
            f"functions of more than {MOST_PARAMETERS} parameters": sum(
                num_parameters(function) > MOST_PARAMETERS for function in functions
            ),
            "fmt: skip": sum(text.count("# fmt: skip") for text in texts),
            "Any": sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes),
        }
        print(f"{folder}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of a function's parameters without `self` and `cls`."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in {"self", "cls"} for argument in every)


def lines_of_code(text: str) -> int:
    """Return the number of lines that are neither blank nor comment nor docstring."""
    strings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    used = {line for token in tokens if token.type not in LAYOUT for line in range(token.start[0], token.end[0] + 1)}
    return len(used - strings)


if __name__ == "__main__":
    main()
