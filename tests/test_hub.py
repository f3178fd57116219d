"""Tests the model card as the Hub reads it, and `push` against a stand-in of the Hub's HTTP calls."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from minitron import pipeline
from minitron.errors import UserError
from minitron.reports.hub import push, require_valid_card
from tests.conftest import make_model
from tests.test_compress import QUICK, recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    teacher = make_model(folder / "model", "llama-tied")
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A teacher\n")
    text = folder / "text.txt"
    text.write_text("\n".join(f"{i} times {i} is {i * i}." for i in range(2500)))
    pipeline.compress(recipe(teacher, text, **QUICK), folder / "run")
    return folder / "run"


def test_the_card_is_read_back_with_its_figures(run: Path) -> None:
    data = require_valid_card(run / "student")
    student = json.loads((run / "eval.json").read_text())["student"]
    assert data.license == "apache-2.0"
    assert data.language == "en"
    assert data.library_name == "transformers"
    assert data.base_model is None  # the teacher is a folder, not a model of the hub
    assert "distilled" in data.tags
    figures = {result.metric_type: result.metric_value for result in data.eval_results}
    assert figures == {name: round(student[name], 4) for name in ("perplexity", "bits_per_byte")}
    [arguments] = {json.dumps(result.dataset_args, sort_keys=True) for result in data.eval_results}
    assert json.loads(arguments) == {"context": 32, "num_tokens": student["num_tokens"], "seed": 0}


class StandIn(BaseHTTPRequestHandler):
    """The part of the Hub's interface that an upload calls."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        hub: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.calls.append(self.path)
        if self.path == "/api/repos/create":
            hub.created = json.loads(body)
            self.answer({"url": f"{hub.address}/someone/student"}, hub.status)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    hub.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            self.answer({"commitUrl": f"{hub.address}/someone/student/commit/1", "commitOid": "1", "success": True})
        else:
            self.answer({"error": f"unexpected {self.path}"}, 404)

    def do_GET(self) -> None:
        self.answer({"id": "someone/student", "siblings": [], "private": False})

    def answer(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.address, server.calls, server.files, server.status = f"http://127.0.0.1:{server.server_port}", [], {}, 200
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore")
def test_push_uploads_the_student_and_its_card(run: Path, hub: Any) -> None:
    address = push(run, "someone/student", private=True, endpoint=hub.address)
    assert address == f"{hub.address}/someone/student/commit/1"
    assert hub.created["name"] == "student"
    assert "private" in {hub.created.get("visibility"), hub.created.get("private") and "private"}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert "metrics.jsonl" not in hub.files
    for name in ("README.md", "model.safetensors"):
        assert hub.files[name] == (run / "student" / name).read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_a_refusal_of_the_hub_is_one_line(run: Path, hub: Any, tmp_path: Path) -> None:
    hub.status = 403
    with pytest.raises(UserError, match="the hub refused someone/student"):
        push(run, "someone/student", endpoint=hub.address)
    with pytest.raises(UserError, match="holds no model yet"):
        push(tmp_path, "someone/student", endpoint=hub.address)
    with pytest.raises(UserError, match="the hub refused a/b/c"):
        push(run, "a/b/c", endpoint=hub.address)
