"""`bench --engine llama.cpp`: with a stand-in for xllamacpp, and in llama.cpp itself."""

import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minitron
from minitron.errors import UserError
from minitron.evaluation.speed import Speed
from minitron.formats.gguf import llama_cpp
from minitron.reports.figures import bench_by_engine, bench_conditions, bench_table
from tests.exports import make_exported

STAND_IN = """
import json
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0.stand-in"

class CommonParams(SimpleNamespace):
    def __init__(self):
        super().__init__(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())

class Server:
    def __init__(self, options):
        if Path(__file__).with_name("refuses").exists():
            raise RuntimeError("Failed to\\nload")
        self.name, self.options = Path(options.model.path).stem, options
        self.seconds = 0.25 if self.name.startswith("model-") else 0.75

    def handle_completions(self, request):
        threads = [self.options.cpuparams.n_threads, self.options.cpuparams_batch.n_threads]
        with Path(__file__).with_name("calls").open("a") as file:
            file.write(json.dumps([self.name, threads, request]) + "\\n")
        if len(request["prompt"]) + request["n_predict"] > self.options.n_ctx:
            return {"error": "too long"}
        timings = {"prompt_ms": 2000 * self.seconds, "predicted_per_token_ms": 1000 * self.seconds}
        return {"choices": [], "timings": timings}
"""
"""A module whose llama.cpp takes longer for teachers than for students."""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a module with its own clock in the place of xllamacpp; temporary files go into their own folder."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    (folder / "xllamacpp.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run directory with a teacher and a student whose embeddings are tied."""
    folder = tmp_path / "run"
    folder.mkdir()
    make_exported(tmp_path / "teacher", "llama")
    make_exported(folder / "student", "llama-tied")
    (folder / "run.json").write_text("{}")
    (folder / "teacher").symlink_to(tmp_path / "teacher")
    return folder


def test_student_and_teacher_take_turns_in_llama_cpp(stand_in: Path, run: Path, tmp_path: Path) -> None:
    earlier = {"model": "m", "rows": [], "device": "cpu"}
    (run / "bench.json").write_text(json.dumps(earlier))
    found = minitron.bench(run, engine="llama.cpp", context=[16], repeats=2)
    record = found.figures
    assert json.loads((run / "bench.json").read_text()) == {"transformers": earlier, "llama.cpp": record}
    assert (record["engine"], record["dtype"], record["device"]) == ("llama.cpp", "q8_0", "cpu")
    [row] = record["rows"]
    for name, folder in (("model", run / "student"), ("against", run / "teacher")):
        assert row[name]["num_parameters"] == minitron.open_teacher(str(folder)).arch.num_parameters
        assert row[name]["num_bytes"] > row[name]["num_parameters"]
    assert row["model"]["num_bytes"] < row["against"]["num_bytes"]
    assert row["speed_up"] == {key: {"median": 3, "low": 3, "high": 3} for key in ("prefill", "decode")}
    assert row["model"]["prefill_tokens_per_second"] == 16 / (2 * 0.25)
    assert row["against"]["decode_tokens_per_second"] == 1 / 0.75

    calls = [json.loads(line) for line in (stand_in / "calls").read_text().splitlines()]
    assert [name for name, _, _ in calls] == ["model-q8_0", "against-q8_0"] * 3  # the first turn warms up
    assert all(threads == [record["threads"]] * 2 for _, threads, _ in calls)
    for _, _, request in calls:
        assert len(request["prompt"]) == 16
        assert max(request["prompt"]) < 320
        assert request["n_predict"] == record["decoded_tokens"]
        assert not request["cache_prompt"]
    assert not list((tmp_path / "temporary").glob("minitron-bench-*"))

    head, student, teacher, ratio = bench_table(record)
    assert head[-2:] == ["parameters", "file"]
    assert student[2] == "student"
    assert teacher[-2] == f"{row['against']['num_parameters'] / 1e6:.1f}M"
    assert ratio[-2] == f"{row['model']['num_parameters'] / row['against']['num_parameters']:.2f}×"
    assert f"xllamacpp 0.0.stand-in), cpu, q8_0, {record['threads']} threads" in bench_conditions(record)


def test_each_engine_keeps_its_figures(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = llama_cpp.Timing({name: [Speed(0.5, 0.1, 1, 8)] for name in ("model", "against")}, "0.0")
    monkeypatch.setattr(llama_cpp, "is_installed", lambda *_: True)
    monkeypatch.setattr(llama_cpp, "alternate", lambda *_, **__: timing)
    monkeypatch.setattr("minitron.evaluation.peak_memory.peak_memory", lambda *_: 2**20)  # a process for each model
    second = minitron.bench(run, context=[8], repeats=1, device="cpu").figures
    first = minitron.bench(run, engine="llama.cpp", context=[8], repeats=1, quantize="f16").figures
    stored = bench_by_engine(json.loads((run / "bench.json").read_text()))
    assert stored == {"llama.cpp": first, "transformers": second}
    assert first["dtype"] == "f16"
    assert bench_table(second)[0][-2:] == ["parameters", "peak memory"]
    assert bench_conditions(first) != bench_conditions(second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "llama_cpp"}, "--engine llama_cpp: did you mean 'llama.cpp'?"),
        ({"engine": "transformers", "quantize": "q8_0"}, "--quantize q8_0 is for --engine llama.cpp"),
        ({"batch": [1, 2]}, "--batch 1,2: --engine llama.cpp is timed with one sequence"),
        ({"device": "cuda"}, "--device cuda: --engine llama.cpp is timed on the CPU"),
        ({"dtype": "float32"}, "--dtype float32: in --engine llama.cpp, --quantize names the type"),
        ({"quantize": "q8"}, "--quantize q8: did you mean 'q8_0'?"),
        ({"context": [4096]}, "context 4096 is above the 256 tokens"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    stand_in: Path, run: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        minitron.bench(run, **{"engine": "llama.cpp", "context": [16], **options})
    assert not (stand_in / "calls").exists()
    assert not (run / "bench.json").exists()
    assert not list((tmp_path / "temporary").glob("minitron-bench-*"))


def test_a_model_that_llama_cpp_refuses_ends_in_one_line(stand_in: Path, run: Path, tmp_path: Path) -> None:
    (stand_in / "refuses").touch()
    with pytest.raises(UserError, match=r"^llama\.cpp: it cannot load model-q8_0\.gguf: Failed to load$"):
        minitron.bench(run, engine="llama.cpp", context=[16])
    assert not (run / "bench.json").exists()
    assert not list((tmp_path / "temporary").glob("minitron-bench-*"))


def test_llama_cpp_is_needed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda *_: False)
    with pytest.raises(UserError, match=r"--engine llama.cpp needs llama.cpp: pip install 'minitron\[llama-cpp\]'"):
        minitron.bench(run, engine="llama.cpp", context=[16])


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_llama_cpp_is_timed(name: str, tmp_path: Path) -> None:
    folder = make_exported(tmp_path / "model", name)
    [row] = minitron.bench(folder, against=folder, engine="llama.cpp", context=[16], repeats=1).figures["rows"]
    for each in ("model", "against"):
        assert row[each]["prefill_tokens_per_second"] > 0
        assert row[each]["decode_tokens_per_second"] > 0


VLLM_STAND_IN = """
import json, time
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0.stand-in"
now = 0.0
time.perf_counter = lambda: now

class SamplingParams(SimpleNamespace):
    pass

class LLM:
    def __init__(self, model, **options):
        if Path(__file__).parent.with_name("refuses").exists():
            raise ValueError("no such\\nmodel")
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 300)
        self.model, self.options, self.seconds = model, options, 0.25 if model.endswith("student") else 0.75

    def generate(self, prompts, sampling, use_tqdm):
        global now
        with Path(__file__).parent.with_name("calls").open("a") as file:
            lengths = [len(prompt["prompt_token_ids"]) for prompt in prompts]
            file.write(json.dumps([self.model, lengths, sampling.max_tokens, self.options]) + "\\n")
        now += self.seconds * (2 + sampling.max_tokens)
"""
"""A vLLM with its own clock, which takes two tokens' time for a prompt."""


@pytest.fixture
def vllm_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a package with its own clock in the place of vLLM."""
    package = tmp_path / "stand-in" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VLLM_STAND_IN)
    (package / "platforms.py").write_text(
        'from types import SimpleNamespace as N\ncurrent_platform = N(device_type="cpu")'
    )
    monkeypatch.setattr("time.perf_counter", time.perf_counter)  # restored afterwards
    for name in ("vllm", "vllm.platforms"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(package.parent)
    yield package.parent
    for name in ("vllm", "vllm.platforms"):
        sys.modules.pop(name, None)


def test_student_and_teacher_take_turns_in_vllm(vllm_stand_in: Path, run: Path) -> None:
    record = minitron.bench(run, engine="vllm", context=[8, 16], batch=[1, 2], repeats=2).figures
    assert json.loads((run / "bench.json").read_text()) == {"vllm": record}
    assert [(row["batch"], row["context"]) for row in record["rows"]] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    for row in record["rows"]:
        assert row["speed_up"] == {key: {"median": 3, "low": 3, "high": 3} for key in ("prefill", "decode")}
        assert row["model"]["prefill_tokens_per_second"] == row["batch"] * row["context"] / (3 * 0.25)
        assert row["against"]["decode_tokens_per_second"] == pytest.approx(row["batch"] / 0.75)
    calls = [json.loads(line) for line in (vllm_stand_in / "calls").read_text().splitlines()]
    assert [Path(model).name for model, *_ in calls[:4]] == ["student", "student", "teacher", "teacher"]
    assert [tokens for _, _, tokens, _ in calls[:4]] == [1, 1 + record["decoded_tokens"]] * 2
    assert calls[-1][1] == [16, 16]
    assert all(options["max_model_len"] == 16 + 1 + record["decoded_tokens"] for *_, options in calls)
    assert not any(options["enable_prefix_caching"] or options["trust_remote_code"] for *_, options in calls)
    assert "vllm 0.0.stand-in, cpu, auto" in bench_conditions(record)


def test_what_vllm_cannot_do_ends_in_one_line(vllm_stand_in: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"quantize": "q8_0"}, "--quantize q8_0 is for --engine llama.cpp: vllm runs models as they are"),
        ({"device": "cpu"}, "--device cpu: --engine vllm runs on the device"),
    )
    for options, message in refused:
        with pytest.raises(UserError, match=re.escape(message)):
            minitron.bench(run, engine="vllm", context=[16], **options)
    (vllm_stand_in / "refuses").touch()
    with pytest.raises(UserError, match=r"^vLLM cannot load .*student: no such model$"):
        minitron.bench(run, engine="vllm", context=[16])
    assert not (run / "bench.json").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(UserError, match="--engine vllm needs vLLM"):
        minitron.bench(run, engine="vllm", context=[16])
