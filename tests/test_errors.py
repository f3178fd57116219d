"""Bad input through the command line: exit status 2, one clear line, and nothing left behind."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import minitron
from minitron import cli
from tests.conftest import byte_tokenizer, make_model

Run = Callable[..., str]


@dataclass
class Place:
    """A good teacher and text, and the run folder that must not come to be."""

    folder: Path
    teacher: Path
    text: Path

    @property
    def out(self) -> Path:
        return self.folder / "runs" / "out"

    def config(self, **changes: Any) -> None:
        path = self.teacher / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.teacher / "model.safetensors")
        change(tensors)
        save_file(tensors, self.teacher / "model.safetensors")


@pytest.fixture
def place(tmp_path: Path, text_file: Path) -> Place:
    return Place(tmp_path, make_model(tmp_path / "model", "llama-tied"), text_file)


@pytest.fixture
def refused(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line, which must refuse; give its one error line."""

    def run(*arguments: str) -> str:
        before = sorted(place.folder.rglob("*"))
        monkeypatch.setattr("sys.argv", ["minitron", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        assert stopped.value.code == 2, captured.err
        assert captured.out == ""
        assert "Traceback" not in captured.err
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, captured.err
        assert captured.err.splitlines()[-1] == lines[0]
        assert sorted(place.folder.rglob("*")) == before
        return lines[0]

    return run


def compress(place: Place, *extra: str, target: str = "0.6", teacher: Path | str | None = None) -> list[str]:
    return [
        "compress", str(teacher or place.teacher), str(place.out), "--target-params", target, "--context", "32",
        "--data", str(place.text), "--tokens", "256", *extra,
    ]  # fmt: skip


def test_unknown_teacher(place: Place, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for teacher in ("nobody/nothing", "no such thing", str(place.folder / "none")):
        message = refused(*compress(place, teacher=teacher))
        assert "neither a folder, nor a .gguf file, nor a built-in name (smollm2), nor a hub model" in message


def test_missing_gguf(place: Place, refused: Run) -> None:
    assert "does not exist" in refused(*compress(place, teacher=place.folder / "none.gguf"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100, b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_corrupt_gguf(place: Place, refused: Run, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_CACHE", str(place.folder / "cache"))
    (place.folder / "broken.gguf").write_bytes(content)
    message = refused(*compress(place, teacher=place.folder / "broken.gguf"))
    assert "broken.gguf is truncated, corrupt or not a GGUF file" in message


def test_unsupported_model_type(place: Place, refused: Run) -> None:
    place.config(model_type="bert")
    message = refused(*compress(place))
    assert "model_type 'bert' has no table" in message
    assert "--family llama" in message  # its tensors are a Llama's


def test_an_unknown_type_with_known_tensors_names_the_flag_that_tries_it(
    place: Place, refused: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.config(model_type="myllama", head_dim=8)
    message = refused(*compress(place))
    assert message.endswith("its tensors match the table of llama: try --family llama")
    quick = place.folder / "quick.yaml"
    quick.write_text(
        "search: {tokens: 64, zero_shot: 2, zero_shot_tokens: 64, probe_tokens: 0, shortlist: 1, distill_tokens: 0}\n"
        "calibration: {tokens: 256}\nevaluation: {tokens: 64}\n"
    )
    monkeypatch.setattr("sys.argv", ["minitron", *compress(place, "--family", "llama", "--recipe", str(quick))])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    config = json.loads((place.out / "student" / "config.json").read_text())
    assert config["model_type"] in {"llama", "mistral"}


def test_an_unknown_type_with_unknown_tensors_names_no_flag(place: Place, refused: Run) -> None:
    place.config(model_type="myllama")
    place.tensors(lambda tensors: tensors.update({"adapter.weight": torch.zeros(2)}))
    assert "--family" not in refused(*compress(place))
    assert "no causal language model 'lama'; did you mean 'llama'?" in refused(*compress(place, "--family", "lama"))


def test_quantised_weights(place: Place, refused: Run) -> None:
    place.config(quantization_config={"quant_method": "aqlm"})
    assert "holds quantised weights (aqlm); convert them to bfloat16 first" in refused(*compress(place))


def test_a_config_alone_may_be_of_a_quantised_model(place: Place) -> None:
    place.config(quantization_config={"quant_method": "mxfp4"})
    assert minitron.inspect(place.teacher / "config.json").arch.num_parameters > 0


def test_unknown_tensor(place: Place, refused: Run) -> None:
    place.tensors(lambda tensors: tensors.update({"model.layers.0.adapter.weight": torch.zeros(2)}))
    assert "matches tensor model.layers.0.adapter.weight" in refused(*compress(place))


@pytest.mark.parametrize("kept", [0, 7, 200, 0.5])
def test_truncated_safetensors(place: Place, refused: Run, kept: float) -> None:
    path = place.teacher / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "model.safetensors is missing, truncated or corrupt" in refused(*compress(place))


def test_missing_shard(place: Place, refused: Run) -> None:
    (place.teacher / "model.safetensors").rename(place.teacher / "model-00001-of-00002.safetensors")
    names = load_file(place.teacher / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (place.teacher / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model-00002-of-00002.safetensors is missing" in refused(*compress(place))


def test_pickled_checkpoint(place: Place, refused: Run) -> None:
    tensors = load_file(place.teacher / "model.safetensors")
    (place.teacher / "model.safetensors").unlink()
    torch.save(tensors, place.teacher / "pytorch_model.bin")
    message = refused(*compress(place))
    assert "pickled weights (pytorch_model.bin)" in message
    assert "safetensors" in message


def test_no_config(place: Place, refused: Run) -> None:
    (place.teacher / "config.json").unlink()
    assert "config.json does not exist" in refused(*compress(place))


def test_broken_config(place: Place, refused: Run) -> None:
    (place.teacher / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(*compress(place))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("2", "the feasible ones nearest to that: "),
        ("0.01", "the feasible ones nearest to that: "),
        ("1.0", "is not below the teacher's"),
        ("5B", "is not below the teacher's"),
        ("most", "is not a number; accepted: a share of the teacher such as 0.7, an amount"),
        ("-0.5", "is not a number"),
        ("nan", "is not a number"),
    ],
)
def test_impossible_targets(place: Place, refused: Run, target: str, message: str) -> None:
    assert message in refused(*compress(place, target=target))


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "big"}, {"vocab_size": None}, {"num_attention_heads": 0}, {"num_hidden_layers": -1},
     {"num_attention_heads": 5}],
)  # fmt: skip
def test_impossible_configs(place: Place, refused: Run, changes: dict[str, Any]) -> None:
    place.config(**changes)
    assert "config" in refused(*compress(place))
    assert "config" in refused("inspect", str(place.teacher / "config.json"))


def test_an_impossible_entry_that_no_size_depends_on(place: Place, refused: Run) -> None:
    place.config(rope_parameters=3)
    assert "config" in refused(*compress(place))


@pytest.mark.parametrize("index", [[], {"weight_map": 3}, {"weight_map": {"a": 1}}, {}])
def test_impossible_indices(place: Place, refused: Run, index: Any) -> None:
    (place.teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has no weight_map" in refused(*compress(place))


def test_an_index_that_names_a_tensor_its_file_lacks(place: Place, refused: Run) -> None:
    names = load_file(place.teacher / "model.safetensors")
    place.tensors(lambda tensors: tensors.pop("model.norm.weight"))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (place.teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "tensor model.norm.weight is missing" in refused(*compress(place))


def test_a_context_that_the_teacher_was_not_made_for(place: Place, refused: Run) -> None:
    place.config(max_position_embeddings=16)
    assert "context 32 is above the 16 tokens" in refused(*compress(place))


def test_no_tokenizer(place: Place, refused: Run) -> None:
    (place.teacher / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Runes"}}')
    assert "holds no tokenizer that can be loaded" in refused(*compress(place))


def test_no_target(place: Place, refused: Run) -> None:
    assert "target_params is not given" in refused("compress", str(place.teacher), str(place.out))


def test_a_target_between_shapes_shows_the_feasible_ones(place: Place, refused: Run) -> None:
    recipe = place.folder / "recipe.yaml"
    recipe.write_text("search: {tolerance: 1.0e-9}")
    message = refused(*compress(place, "--recipe", str(recipe), target="30001"))
    assert "the feasible ones nearest to that: " in message


@pytest.mark.parametrize("content", [b"", b"short", b"\0\1\2" * 1000, b"\xff\xfd" * 1000])
def test_bad_text(place: Place, refused: Run, content: bytes) -> None:
    place.text.write_bytes(content)
    message = refused(*compress(place))
    assert any(words in message for words in ("is empty", "shorter than one block", "is not text", "is not UTF-8"))


def test_missing_text(place: Place, refused: Run) -> None:
    place.text.unlink()
    assert "does not exist" in refused(*compress(place))


def test_too_few_blocks(place: Place, refused: Run) -> None:
    place.text.write_text("a" * 70)
    assert "has 2 block(s) of 32 tokens; training, held-out and evaluation need at least one each" in refused(
        *compress(place)
    )


def test_out_is_not_a_run(place: Place, refused: Run) -> None:
    place.out.mkdir(parents=True)
    (place.out / "thesis.txt").write_text("years of work")
    assert "is not a run of minitron" in refused(*compress(place))
    assert "holds no run.json" in refused(*compress(place, "--overwrite"))


def test_out_belongs_to_another_recipe(place: Place, refused: Run) -> None:
    place.out.mkdir(parents=True)
    recipe = {"teacher": str(place.teacher), "target_params": 0.5}
    (place.out / "run.json").write_text(json.dumps({"recipe": recipe, "stages": {}, "sources": {}, "versions": {}}))
    message = refused(*compress(place))
    assert "belongs to another recipe" in message
    assert "--overwrite" in message


def test_out_holds_somebody_elses_record(place: Place, refused: Run) -> None:
    place.out.mkdir(parents=True)
    (place.out / "run.json").write_text("{}")
    assert "is not the record of a run" in refused(*compress(place))


def test_overwrite_of_a_stage_replaces_its_own_kind_only(place: Place, refused: Run) -> None:
    place.out.mkdir(parents=True)
    (place.out / "thesis.txt").write_text("years of work")
    text = ("--data", str(place.text), "--context", "32", "--overwrite")
    for verb in (["calibrate"], ["search", "--target-params", "0.6"], ["prune", "--hidden-size", "40"]):
        assert "only replaces results of this kind" in refused(
            verb[0], str(place.teacher), str(place.out), *verb[1:], *text
        )
    message = refused("prune", str(place.teacher), str(place.teacher), "--hidden-size", "40", *text)
    assert "which is one of the inputs" in message


def test_overwrite_destroys_nothing_before_the_inputs_are_good(place: Place, refused: Run) -> None:
    place.out.mkdir(parents=True)
    (place.out / "run.json").write_text("{}")
    place.text.unlink()
    refused(*compress(place, "--overwrite"))
    assert (place.out / "run.json").exists()


def test_out_is_a_file(place: Place, refused: Run) -> None:
    (place.folder / "runs").write_text("in the way")
    assert "is not a folder" in refused(*compress(place))


def test_out_cannot_be_written(place: Place, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "permission denied" in refused(*compress(place))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distil: {tokens: 1k}", "unknown key 'distil', did you mean 'distill'?"),
        ("distill: {learning_rat: 1}", "unknown key 'distill.learning_rat', did you mean 'learning_rate'?"),
        ("calibration: {tokens: lots}", "calibration.tokens: 'lots' is not a count"),
        ("distill: {learning_rate: fast}", "distill.learning_rate: "),
        ("- a list", "must be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_recipes(place: Place, refused: Run, text: str, message: str) -> None:
    recipe = place.folder / "recipe.yaml"
    recipe.write_text(text)
    assert message in refused(*compress(place, "--recipe", str(recipe)))


def test_missing_recipe(place: Place, refused: Run) -> None:
    assert "does not exist" in refused(*compress(place, "--recipe", str(place.folder / "none.yaml")))


def test_bad_options(place: Place, refused: Run) -> None:
    assert "No such option" in refused(*compress(place, "--tokenz", "3"))
    assert "unknown device" in refused(*compress(place, "--device", "abacus"))
    assert "unknown dtype" in refused(*compress(place, "--dtype", "float31"))
    assert "CUDA devices" in refused(*compress(place, "--device", "cuda:9"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(place: Place, refused: Run, value: float) -> None:
    def breaks(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value

    place.tensors(breaks)
    assert "model.layers.1.mlp.down_proj.weight holds NaN or infinity" in refused(*compress(place))


def test_no_space_is_seen_beforehand(place: Place, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert "no space left" in refused(*compress(place))


def test_no_space_in_the_middle(place: Place, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("minitron.pruning.importance.save_file", full)
    assert "no space left" in refused(*compress(place))


def test_no_space_as_safetensors_reports_it(place: Place, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("minitron.pruning.importance.save_file", full)
    assert "no space left" in refused(*compress(place))


def test_wrong_shapes_for_prune(place: Place, refused: Run) -> None:
    prune = ["prune", str(place.teacher), str(place.out), "--data", str(place.text), "--context", "32"]
    assert "intermediate_size 65 is above the teacher's 64" in refused(*prune, "--intermediate-size", "65")
    assert "not a multiple" in refused(*prune, "--num-attention-heads", "4")
    assert "not several of them" in refused(*prune, "--hidden-size", "40", "--target-params", "0.5")
    assert "target_params is not given" in refused(*prune)
    assert "needs a shape" in refused("prune", str(place.teacher), "--dry-run")
    assert "prune needs OUT" in refused("prune", str(place.teacher), "--hidden-size", "40")


def test_importance_of_another_teacher(place: Place, refused: Run) -> None:
    stats = place.folder / "stats"
    stats.mkdir()
    save_file({"hidden": torch.ones(47)}, stats / "importance.safetensors")
    arguments = ["prune", str(place.teacher), str(place.out), "--hidden-size", "40", "--importance", str(stats)]
    assert "is not the importance of this teacher: axis hidden has shape [47]" in refused(*arguments)


def test_importance_of_other_weights_of_the_same_shape(
    place: Place, refused: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(place.folder / "other", "llama-tied", seed=1)
    others = [str(other), str(place.folder / "stats"), "--data", str(place.text), "--context", "32"]
    cli.app(["calibrate", *others], standalone_mode=False)
    capsys.readouterr()
    arguments = ["prune", str(place.teacher), str(place.out), "--hidden-size", "40"]
    message = refused(*arguments, "--importance", str(place.folder / "stats"))
    assert "is not the importance of this teacher: it was measured on other weights" in message


@pytest.mark.parametrize(
    ("variant", "shape", "recipe", "message"),
    [
        ("llama-tied", "--num-attention-heads 1", "seed: 0", "num_attention_heads 1 is not a multiple of"),
        ("llama-tied", "--num-key-value-heads 0", "seed: 0", "num_key_value_heads"),
        ("gemma2", "--hidden-size 36", "prune: {rotate: true}", "can be permuted but not rotated"),
        ("llama-tied", "--intermediate-size 56", "{calibration: {tokens: 32}, prune: {refit: true}}",
         "a refit of 56 inputs needs at least as many calibration tokens; there are 32"),
    ],
)  # fmt: skip
def test_starts_that_cannot_be(place: Place, refused: Run, variant: str, shape: str, recipe: str, message: str) -> None:
    teacher, file = make_model(place.folder / "teacher", variant), place.folder / "recipe.yaml"
    file.write_text(recipe)
    arguments = ["--data", str(place.text), "--context", "32", "--recipe", str(file), *shape.split()]
    assert message in refused("prune", str(teacher), str(place.out), *arguments)


def test_calibrating_on_padding(place: Place, refused: Run) -> None:
    place.text.write_text("a" * 20_000)
    message = refused("calibrate", str(place.teacher), str(place.out), "--data", str(place.text), "--context", "32")
    assert "the calibration text holds only token 64: is it nothing but padding?" in message


@pytest.mark.parametrize(
    ("option", "num_ranks", "message"),
    [
        ("--dtype=float16", 1, "too small for float16"),
        ("--set=distill.top_k=258", 1, "distill.top_k 258 leaves no tail of 258 tokens"),
        ("--set=distill.batch_size=3", 2, "distill.batch_size 3 cannot be split equally among 2 ranks"),
        ("--set=distill.trains=lora", 2, "distill.trains lora runs in one process"),
        ("--set=distill.correction.trains=lora", 2, "distill.correction.trains lora runs in one process"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_any_work(
    place: Place, refused: Run, monkeypatch: pytest.MonkeyPatch, option: str, num_ranks: int, message: str
) -> None:
    def no_text(*_: Any) -> None:
        raise AssertionError("text is read")

    monkeypatch.setattr("minitron.session.read_splits", no_text)
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    text = ("--data", str(place.text), "--context", "32", "--tokens", "256", option)
    assert message in refused("distill", str(place.teacher), str(place.teacher), str(place.out), *text)
    assert message in refused("correct", str(place.teacher), str(place.out), *text)
    if num_ranks == 1:
        assert message in refused(*compress(place, option))


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("llama-tied", ("--dtype=float16",), "too small for float16"),
        ("llama-tied", ("--set=budget.latency=soon",), "budget.latency 'soon' is not understood"),
        ("llama-tied", ("--set=depth.score=task",), "depth.score task needs depth.task"),
        ("llama-tied", ("--set=depth.removal=iterative",), "block influence is measured once"),
        ("nemotron_h", ("--set=depth.removal=contiguous",), "are of several kinds"),
        ("gemma2", ("--set=prune.rotate=true",), "can be permuted but not rotated"),
        ("llama-tied", ("--set=distill.trains=lora",), "distill.trains lora needs peft"),
        ("llama-tied", ("--set=distill.optimizer=adamw8bit",), "distill.optimizer adamw8bit needs torchao"),
        ("llama-tied", ("--set=distill.compile=true",), "distill.compile needs a C++ compiler"),
        ("llama-tied", ("--set=distill.teacher_states=TEXT",), "holds no states.json"),
    ],
)
def test_what_a_run_would_need_later_is_checked_before_any_work(
    place: Place, refused: Run, monkeypatch: pytest.MonkeyPatch, variant: str, options: tuple[str, ...], message: str
) -> None:
    def no_text(*_: Any) -> None:
        raise AssertionError("text is read")

    monkeypatch.setattr("minitron.session.read_splits", no_text)
    monkeypatch.setattr("minitron.distillation.find_spec", lambda _: None)
    monkeypatch.setattr("minitron.distillation.sys", SimpleNamespace(modules={}))
    monkeypatch.setattr("minitron.distillation.shutil.which", lambda _: None)
    teacher = make_model(place.folder / "teacher", variant)
    given = [option.replace("TEXT", str(place.text)) for option in options]
    assert message in refused(*compress(place, *given, teacher=teacher))
    settings = ["--target-params", "0.6", "--context", "32", "--data", str(place.text)]
    assert message in refused("search", str(teacher), str(place.out), *settings, *given)


def test_speed_for_more_tokens_than_the_teacher_was_made_for(place: Place) -> None:
    settings: dict[str, Any] = {"target_params": 0.6, "context": 32, "budget": {"throughput": "2x", "context": 4096}}
    with pytest.raises(minitron.UserError, match="context 4096 is above the 256 tokens"):
        minitron.search(place.teacher, place.out, data="absent.txt", **settings)


def test_correcting_with_losses_that_need_a_student(place: Place, refused: Run) -> None:
    arguments = ("correct", str(place.teacher), str(place.out), "--data", str(place.text), "--context", "32")
    message = refused(*arguments, "--set=distill.intermediate.of=[embedding]")
    assert "correct trains the teacher alone" in message


@pytest.mark.parametrize(
    ("scale", "message"),
    [(1e4, "overflow float16"), (float("nan"), "_proj.weight holds NaN or infinity")],
)
def test_calibrating_beyond_the_dtype(place: Place, refused: Run, scale: float, message: str) -> None:
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down")]
    place.tensors(lambda tensors: [tensors[name].mul_(scale) for name in names])
    arguments = ("calibrate", str(place.teacher), str(place.out), "--data", str(place.text), "--context", "32")
    assert message in refused(*arguments, "--dtype=float16")


def test_measuring_a_model_that_gives_nan(place: Place, refused: Run) -> None:
    place.tensors(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    message = refused("evaluate", str(place.teacher), "--data", str(place.text), "--context", "32")
    assert "the model's logits are NaN" in message


def test_stages_that_run_in_one_process(place: Place, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused("prune", str(place.teacher), str(place.out), "--hidden-size", "32", "--data", str(place.text))
    assert "only compress, search, distill, correct and tune run under torchrun" in message


def test_distilling_between_tokenizers(place: Place, refused: Run) -> None:
    student = make_model(place.folder / "student", "llama-tied", vocab_size=300)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["quite another token"])
    tokenizer.save_pretrained(student)
    message = refused("distill", str(place.teacher), str(student), str(place.out), "--data", str(place.text))
    assert "teacher and student have different tokenizers: 1 tokens differ" in message


def test_losses_without_a_tail(place: Place, refused: Run) -> None:
    text = ("--data", str(place.text), "--context", "32", "--tokens", "256", "--recipe", str(place.folder / "r.yaml"))
    for recipe, message in (
        ("top_k: 258", "distill.top_k 258 leaves no tail of 258 tokens"),
        ("{loss: mse, top_k: 4}", "top_k needs a loss of probabilities, not mse"),
        ("{loss: jsd, beta: 1.0}", "distill.beta: "),
    ):
        (place.folder / "r.yaml").write_text(f"distill: {recipe if '{' in recipe else '{' + recipe + '}'}")
        assert message in refused("distill", str(place.teacher), str(place.teacher), str(place.out), *text)


def test_evaluating_nothing(place: Place, refused: Run) -> None:
    message = refused("evaluate", str(place.teacher), "--data", str(place.text), "--max-tokens", "some")
    assert "--max-tokens: 'some' is not a count" in message
