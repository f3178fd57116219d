"""The verbs on a tiny model, as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron import cli
from minitron.model.checkpoint import open_checkpoint
from tests.conftest import Verb, make_model
from tests.teachers import LLAMA_8B, NANO_12B, NEMO_12B, NEMOTRON_15B, NEMOTRON_H_8B


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['minitron', '--help']\nfrom minitron import cli\ntry: cli.main()\n"
        "except SystemExit: pass\nassert 'typer' in sys.modules\n"
        "sys.exit(1 if {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("compress", "inspect", "calibrate", "search", "prune", "distill", "evaluate", "bench", "report",
                 "chat"):  # fmt: skip
        assert name in done.stdout


def test_every_verb_takes_the_common_options() -> None:
    for command in cli.app.registered_commands:
        assert command.callback is not None
        name, annotations = command.callback.__name__, set(command.callback.__annotations__)
        # A conversation, what is done with files alone, and a plan, in which nothing is drawn at random.
        needed = {
            "chat": {"seed", "device", "dtype"},
            "report": {"as_json"},
            "push": {"as_json"},
            "families": {"as_json"},
            "rejoin": {"as_json"},
            "merge": {"as_json"},
            "plan": {"as_json", "device", "dtype"},
        }
        assert needed.get(name, {"as_json", "seed", "device", "dtype"}) <= annotations, name


def test_inspect_takes_a_folder_or_a_config(verb: Verb, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen2")
    whole, config = verb("inspect", folder), verb("inspect", folder / "config.json")
    assert whole["weights_checked"]
    assert not config["weights_checked"]
    assert whole["num_parameters"] == config["num_parameters"] == open_checkpoint(folder).arch.num_parameters
    assert whole["arch"]["intermediate_size"] == 64
    assert whole["model_type"] == "qwen2"


def test_inspect_says_what_serving_takes(verb: Verb, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "nemotron_h")
    found = verb("inspect", folder, "--batch", "3", "--context", "2k", "--dtype", "float32")
    assert found["memory_of"] == {"batch": 3, "context": 2048, "dtype": "float32"}
    assert found["memory"]["kv_cache"] == 3 * 2048 * 2 * (2 * 3 * 8 * 4)
    assert found["memory"]["weights"] == 4 * found["num_parameters"]
    with pytest.raises(AssertionError, match="unknown dtype 'int3'"):
        verb("inspect", folder, "--dtype", "int3")


PUBLISHED_CUTS = {
    "Nemotron-H-4B": (
        NEMOTRON_H_8B,
        {"hidden-size": 3072, "intermediate-size": 12288, "mamba-num-heads": 112},
        4_489_223_040,
    ),
    "Nemotron-Nano-9B-v2": (
        NANO_12B,
        {
            "hidden-size": 4480,
            "intermediate-size": 15680,
            "num-mamba-layers": 27,
            "num-mlp-layers": 25,
            "num-attention-layers": 4,
        },
        8_888_227_328,
    ),
    "Minitron-8B": (NEMOTRON_15B, {"hidden-size": 4096, "intermediate-size": 16384}, 8_271_699_968),
    "Minitron-4B": (
        NEMOTRON_15B,
        {"hidden-size": 3072, "intermediate-size": 9216, "num-attention-heads": 24},
        4_190_509_056,
    ),
    "Llama-3.1-Minitron-4B-Width": (LLAMA_8B, {"hidden-size": 3072, "intermediate-size": 9216}, 4_512_746_496),
    "Llama-3.1-Minitron-4B-Depth": (LLAMA_8B, {"num-hidden-layers": 16}, 4_540_469_248),
    "MN-Minitron-8B": (NEMO_12B, {"hidden-size": 4096, "intermediate-size": 11520}, 8_414_105_600),
}


@pytest.mark.parametrize("name", PUBLISHED_CUTS)
def test_the_published_shapes_come_out_of_a_dry_run(verb: Verb, name: str, tmp_path: Path) -> None:
    config, sizes, num_parameters = PUBLISHED_CUTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = [word for size, value in sizes.items() for word in (f"--{size}", str(value))]
    assert verb("prune", tmp_path / "config.json", "--dry-run", *options)["num_parameters"] == num_parameters
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


SIZES_CUT = ("--num-attention-heads", "3", "--intermediate-size", "40")
PAPERS = {
    "calibration.ffn_scores": "first_linear", "calibration.head_scores": "aggregate_of_norms",
    "calibration.batch": "l2", "calibration.sequence": "mean", "prune.rounds": "1", "prune.merge_heads": "true",
    "prune.rotate": "false", "prune.refit": "false", "prune.rescale_norms": "false",
}  # fmt: skip


def test_plain_is_the_method_that_it_names(verb: Verb, tmp_path: Path, text_file: Path) -> None:
    teacher = make_model(tmp_path / "model", "nemotron")
    text = ("--data", text_file, "--context", "32", "--set", "calibration.tokens=256", "--set", "evaluation.tokens=512")

    def pruned(*options: str) -> bytes:
        folder = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        verb("prune", teacher, folder, *SIZES_CUT, *text, *options)
        return (folder / "model.safetensors").read_bytes()

    def by_settings(settings: dict[str, str]) -> bytes:
        return pruned(*(word for key, value in settings.items() for word in ("--set", f"{key}={value}")))

    papers, modelopt = pruned("--plain"), pruned("--plain", "modelopt")
    assert papers == pruned("--plain", "papers") == pruned("--plain=papers") == by_settings(PAPERS)
    cut_only = {key: value for key, value in PAPERS.items() if value == "false"}
    assert modelopt == by_settings(cut_only)
    others = [by_settings(PAPERS | {key: value}) for key, value in (
        ("calibration.ffn_scores", "input_of_second"), ("prune.merge_heads", "false"), ("prune.refit", "true"),
    )]  # fmt: skip
    assert len({papers, modelopt, *others}) == 5
    assert pruned() == modelopt  # with scores of its own, and nothing to repair where hidden stays whole
    # What is given on the command line itself holds.
    assert pruned("--plain", "--set", "prune.merge_heads=false") == others[1]
    assert pruned("--plain", "--set", "prune={merge_heads: false}") == others[1]


def test_plain_before_the_arguments_takes_none_of_them(
    verb: Verb, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_model(tmp_path / "model", "llama")
    text = ("--data", text_file, "--context", "32", "--set", "calibration.tokens=64", "--intermediate-size", "32")
    verb("prune", "--plain", teacher, tmp_path / "out", *text)
    assert (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr("sys.argv", ["minitron", "prune", str(teacher), str(tmp_path / "no"), *text, "--plain=paper"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "error: --plain: unknown value 'paper'; accepted: papers, modelopt" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_importance_that_was_measured_otherwise_is_refused(
    verb: Verb, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, stats = make_model(tmp_path / "model", "llama"), tmp_path / "stats"
    verb("calibrate", teacher, stats, "--data", text_file, "--context", "32", "--tokens", "64")
    cut = (teacher, tmp_path / "out", "--intermediate-size", "32", "--importance", stats)
    for options, message in (
        (["--plain"], "calibration.ffn_scores input_of_second, and first_linear is asked for: calibrate again, or give "
         "--set calibration.ffn_scores=input_of_second"),
        (["--set", "calibration.sequence=l2"], "calibration.sequence mean, and l2 is asked for"),
        (["--set", "depth.score=kl"], "depth.score block_influence, and kl is asked for"),
        (["--set", "calibration.other_text=random"], "calibration.other_text written, and random is asked for"),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["minitron", "prune", *map(str, cut), *options])
        with pytest.raises(SystemExit):
            cli.main()
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    # The number of tokens is not the score; nor does a cut without repairs read the text.
    verb("prune", *cut, "--plain", "modelopt", "--set", "calibration.tokens=128")
    file = stats / "importance.safetensors"  # of an earlier version, which took random tokens
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    measured = json.loads(metadata["measured"])
    del measured["scores"]["other_text"]
    save_file(load_file(file), file, metadata | {"measured": json.dumps(measured)})
    monkeypatch.setattr("sys.argv", ["minitron", "prune", *map(str, cut), "--overwrite"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "calibration.other_text random, and written is asked for" in capsys.readouterr().err
    for option in ("calibration.other_text=random", "prune.rotate=false"):
        verb("prune", *cut, "--set", option, "--overwrite")


def test_the_stages_one_after_the_other(verb: Verb, tmp_path: Path, text_file: Path) -> None:
    teacher = make_model(tmp_path / "model", "mistral")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "search: {tokens: 256, zero_shot: 4, zero_shot_tokens: 64, probe_tokens: 64, shortlist: 2, distill_tokens: 0}\n"
        "calibration: {tokens: 256}\nevaluation: {tokens: 512}\ndistill: {batch_size: 1}\n"
    )
    text = ("--data", text_file, "--context", "32", "--recipe", recipe)
    verb("calibrate", teacher, tmp_path / "stats", *text, "--tokens", "256")
    assert set(load_file(tmp_path / "stats" / "importance.safetensors")) == {
        "hidden", "ffn", "query", "kv", "layer", "stream_moment",
    }  # fmt: skip
    found = verb("search", teacher, tmp_path / "shape", *text, "--target-params", "0.6")
    assert json.loads((tmp_path / "shape" / "arch.json").read_text()) == found["arch"]
    stats = ("--importance", tmp_path / "stats")
    pruned = verb("prune", teacher, tmp_path / "pruned", "--arch", tmp_path / "shape" / "arch.json", *stats, *text)
    assert pruned["arch"] == found["arch"]
    by_size = verb(
        "prune", teacher, tmp_path / "by-size", "--hidden-size", "36", "--num-hidden-layers", "3", *stats, *text
    )
    unmended = verb(
        "prune",
        teacher,
        tmp_path / "plain",
        "--hidden-size",
        "36",
        "--num-hidden-layers",
        "3",
        *stats,
        "--plain",
        "modelopt",
    )
    assert unmended["arch"] == by_size["arch"]
    plain, mended = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "by-size"))
    stored = load_file(teacher / "model.safetensors")["model.norm.weight"]
    assert set(plain["model.norm.weight"].tolist()) < set(stored.tolist())
    assert not set(mended["model.norm.weight"].tolist()) & set(stored.tolist())
    assert (by_size["arch"]["hidden_size"], by_size["arch"]["num_hidden_layers"]) == (36, 3)
    by_target = verb("prune", teacher, tmp_path / "by-target", "--target-params", "0.6", *text)
    assert by_target["num_parameters"] <= 0.6 * open_checkpoint(teacher).arch.num_parameters
    verb("distill", teacher, tmp_path / "pruned", tmp_path / "student", *text, "--tokens", "512")
    assert len((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()) == 17
    assert not list(tmp_path.glob(".*"))
    measured = verb("evaluate", tmp_path / "student", *text, "--max-tokens", "320")
    assert measured["num_tokens"] == 310
    assert measured["context"] == 32
    assert measured["perplexity"] > 1


def test_overwrite_is_asked_for(
    verb: Verb, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_model(tmp_path / "model", "llama-tied")
    text = ("--data", text_file, "--context", "32", "--tokens", "256")
    verb("calibrate", teacher, tmp_path / "stats", *text)
    with pytest.raises(AssertionError, match="exists and is not empty"):
        verb("calibrate", teacher, tmp_path / "stats", *text)
    assert "out" in verb("calibrate", teacher, tmp_path / "stats", *text, "--overwrite")


def test_progress_speaks_while_a_long_call_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    from minitron import progress

    assert progress.HEARTBEAT_SECONDS < 5
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.02)
    with progress.Progress("convert") as unknown:
        time.sleep(0.1)
    with progress.Progress("distill", 100, done=40) as known:
        known.advance(30)
        known.note("loss 1.5")
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("convert: 0:00 elapsed") for line in lines) >= 2
    assert any("70 of 100 tokens" in line and "left" in line and "loss 1.5" in line for line in lines)
    assert unknown.done == 0
    assert known.done == 70


def test_any_key_of_the_recipe_can_be_set(verb: Verb, tmp_path: Path, text_file: Path) -> None:
    folder = make_model(tmp_path / "model", "llama-tied")
    (tmp_path / "recipe.yaml").write_text("context: 64\nprune: {refit: false}\n")
    options = ["--data", text_file, "--recipe", tmp_path / "recipe.yaml", "--set", "calibration.tokens=1k"]
    verb("calibrate", folder, tmp_path / "scores", *options, "--set", "context=16")
    assert int(load_file(tmp_path / "scores" / "calibration.safetensors")["num_blocks"]) == 1000 // 16


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("calibration.tokens", "--set 'calibration.tokens' is not KEY=VALUE"),
        ("calibration.tokns=1", "unknown key 'calibration.tokns', did you mean 'tokens'?"),
        ("seed=[1", "--set seed: '[1' is not a value"),
        ("teacher=other", "--set teacher: this is an argument or option of the command"),
    ],
)
def test_what_cannot_be_set_is_named(
    assignment: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model(tmp_path / "model", "llama-tied")
    monkeypatch.setattr("sys.argv", ["minitron", "calibrate", str(folder), str(tmp_path / "o"), "--set", assignment])
    with pytest.raises(SystemExit):
        cli.main()
    assert message in capsys.readouterr().err
