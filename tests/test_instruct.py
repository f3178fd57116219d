"""Benchmarks of chats and programs: prompts, cached answers and ratings."""

import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from minitron.errors import UserError
from minitron.harness import bfcl, chatrag, humaneval, mbpp, mt_bench, programs, run_plan
from minitron.harness.answers import Answerer, Decoding, Request
from minitron.harness.interface import Inputs
from minitron.harness.judge import Judge
from minitron.harness.lm_eval_model import load_lm
from minitron.harness.plan import Plan, fitting, plan_tasks
from minitron.model.checkpoint import Checkpoint

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's


class Scripted(Answerer):
    """Returns the answers of a function and records the requests."""

    def __init__(self, says: Callable[[Request], str], context: int = 2048) -> None:
        super().__init__(None, "scripted", 0)
        self.says, self.limit = says, context
        self.asked: list[Request] = []

    @property
    def context(self) -> int:
        return self.limit

    def answers(self, requests: Any, stage: str = "") -> list[str]:
        self.asked += requests
        return [self.says(request) for request in requests]

    def num_tokens(self, text: str) -> int:
        return len(text.split())

    def beginning(self, text: str, num_tokens: int) -> str:
        return " ".join(text.split()[:num_tokens])


@pytest.fixture
def answerer(teachers: Callable[[str], Checkpoint]) -> Answerer:
    pytest.importorskip("lm_eval")
    model = load_lm(teachers("llama").folder, "cpu", "float32", batch_size=3)
    return Answerer(model, "tiny", seed=0)


def test_answers_do_not_depend_on_the_rest_of_the_batch(answerer: Answerer) -> None:
    requests = [Request([{"role": "user", "content": "count " * n}], 8) for n in (1, 7, 3, 5)]
    together = answerer.answers(requests)
    assert together == [answerer.answers([request])[0] for request in requests]
    assert len(set(together)) > 1


def test_chats_are_written_by_the_template(answerer: Answerer) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "who?"}]
    assert answerer._prompt(messages) == ("System: be kind\n\nUser: who?\n\nAssistant:", ["\n\nUser:"])
    answerer.model.tokenizer.chat_template = TEMPLATE
    assert answerer._prompt(messages) == ("<system>be kind\n<user>who?\n<assistant>", [])


def test_an_answer_that_cannot_fit_is_refused(answerer: Answerer) -> None:
    with pytest.raises(UserError, match="do not fit in a context of 256"):
        answerer.answers([Request([{"role": "user", "content": "hello"}], 256)])


class Stand(BaseHTTPRequestHandler):
    """An endpoint of chat completions that is busy at first and then rates first turns 8 and second turns 3."""

    asked: ClassVar[list[dict[str, Any]]] = []
    key = ""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).key = self.headers.get("Authorization", "")
        self.asked.append(asked)
        if asked["model"] == "unknown":
            self.send_response(404)
            content = b"no such model"
        elif len(self.asked) == 1:
            self.send_response(503)
            content = b"busy"
        else:
            self.send_response(200)
            words = asked["messages"][1]["content"]
            said = "none" if "unratable" in words else "Rating: [[3]]" if "### User" in words else "Rating: [[8]]"
            content = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Stand.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stand)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def mt_data(tmp_path: Path) -> Path:
    """Write three questions and prompts that show their fields; the files end without a line break."""
    folder = tmp_path / "mt"
    folder.mkdir()
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["write", "again"]},
        {"question_id": 111, "category": "math", "turns": ["1+1?", "and 2+2?"]},
        {"question_id": 150, "category": "stem", "turns": ["unratable", "why {not}?"]},
    ]
    prompts = [
        {"name": name, "system_prompt": "judge", "prompt_template": template}
        for name, template in {
            "single-v1": "Q {question} A {answer}",
            "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
            "single-v1-multi-turn": "### User {question_1} {answer_1} {question_2} {answer_2}",
            "single-math-v1-multi-turn": "### User {ref_answer_2} {question_2} {answer_2}",
        }.items()
    ]
    reference = [{"question_id": 111, "choices": [{"turns": ["it is two", "it is four"]}]}]
    files: dict[str, list[Any]] = {"question": questions, "judge_prompts": prompts, "reference_gpt-4": reference}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_mt_bench(mt_data: Path, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    model = Scripted(lambda request: f"told {len(request.messages)}")
    judge = Judge(endpoint, "the/judge", wait=0.0)
    found = mt_bench.run(model, Inputs(mt_data, judge=judge), tmp_path / "out")
    assert found["metrics"] == {
        "rating": pytest.approx((8 + 8 + 3 + 3) / 4), "turn_1": 8.0, "turn_2": 3.0, "writing": 5.5, "math": 5.5,
        "unrated": 2.0,
    }  # fmt: skip
    assert [request.temperature for request in model.asked[:3]] == [0.7, 0.0, 0.1]
    assert [message["content"] for message in model.asked[3].messages] == ["write", "told 1", "again"]
    assert Stand.key == "Bearer secret"
    words = [asked["messages"][1]["content"] for asked in Stand.asked]
    assert "Q 1+1? R it is two A told 1" in words
    assert "### User it is four and 2+2? told 3" in words
    rows = [json.loads(line) for line in (tmp_path / "out/model_answer/scripted.jsonl").read_text().splitlines()]
    assert rows[0]["choices"][0]["turns"] == ["told 1", "told 3"]

    before = len(Stand.asked)
    assert mt_bench.run(model, Inputs(mt_data, judge=judge), tmp_path / "out")["metrics"] == found["metrics"]
    assert (len(model.asked), len(Stand.asked)) == (6, before)
    assert mt_bench.run(model, Inputs(mt_data, 1, judge=judge), tmp_path / "out")["items"] == 1


def test_a_judge_that_refuses_is_named(endpoint: str, mt_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="status 404: no such model"):
        Judge(endpoint, "unknown", wait=0.0).complete([{"role": "user", "content": "?"}])
    assert len(Stand.asked) == 1  # a refused request is not repeated
    found = mt_bench.run(
        Scripted(lambda _: "so"), Inputs(mt_data, judge=Judge(endpoint, "unknown", wait=0.0)), tmp_path / "out"
    )
    assert found["metrics"] == {}
    assert "not judged: the judge at" in found["note"]
    with pytest.raises(UserError, match="does not answer"):
        Judge("http://127.0.0.1:9", "any", wait=0.0).complete([{"role": "user", "content": "?"}])


def test_without_a_judge_answers_are_kept(mt_data: Path, tmp_path: Path, answerer: Answerer) -> None:
    identity = {"model": "a", "seed": 0}
    plan, inputs, answers = Plan((), ("mt_bench",), {}, 2), Inputs(mt_data), tmp_path / "kept"
    found = run_plan(plan, answerer, inputs, answers=answers, identity=identity)
    assert found["mt_bench"]["metrics"] == {}
    assert "--judge" in found["mt_bench"]["note"]
    kept = tmp_path / "kept/mt_bench/model_answer/tiny.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    with pytest.raises(UserError, match=r"are from another run \(data differs\)"):
        run_plan(plan, answerer, Inputs(tmp_path), answers=answers, identity=identity)
    with pytest.raises(UserError, match=r"are from another run \(model differs\)"):
        run_plan(plan, answerer, inputs, answers=answers, identity={"model": "b", "seed": 0})


@pytest.mark.parametrize(
    ("answer", "right", "f1"),
    [
        ("The cat, on a mat!", "cat on the mat", 1.0),
        ("a cat", "dog", 0.0),
        ("black cat", "cat", 2 / 3),
        ("", "cat", 0.0),
        ("cat cat", "cat", 2 / 3),
    ],
)
def test_f1_of_words(answer: str, right: str, f1: float) -> None:
    assert chatrag.word_f1(answer, right) == pytest.approx(f1)
    assert chatrag.word_f1(right, answer) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "gold", "is_right"),
    [
        ("it was $1,200 million", 1200.0, True),
        ("about 0.12", 0.12345, True),
        ("about 0.13", 0.12345, False),
        ("12.3 percent", 0.12345, True),
        ("a decrease of 10", -10, True),
        ("an increase of 10", -10, False),
        ("10 (2017) + 20 (2018)", 30.5, True),
        ("yes", "yes", True),
    ],
)
def test_numbers_of_convfinqa(answer: str, gold: Any, is_right: bool) -> None:
    row = {"exe_answer": gold, "answers": ["10 + 20"], "messages": [{"role": "user", "content": "what percent?"}]}
    assert chatrag._has_number(row, answer) is is_right


def rag_rows(content: str, *answers: str, passages: int = 7) -> list[dict[str, Any]]:
    ctxs = [{"title": f"t{i}", "text": f"passage{i} " * 50} for i in range(passages)]
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": content},
    ]
    return [{"messages": messages, "ctxs": ctxs, "answers": list(answers)}]


def test_chatrag(tmp_path: Path) -> None:
    parts = {
        "coqa/dev.json": rag_rows("which?", "red"),
        "inscit/dev.json": rag_rows("what?", "blue", chatrag.NO_ANSWER),
        "quac/test.json": rag_rows("where?", chatrag.NO_ANSWER),
        "doqa/test_movies.json": rag_rows("which film?", "none such"),
        "doqa/test_travel.json": rag_rows("whither?", "red"),
    }
    for name, rows in parts.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    model = Scripted(lambda request: "Sorry, I am unable to." if "where?" in str(request.messages) else "red")
    found = chatrag.run(model, Inputs(tmp_path), tmp_path / "out")
    scores = {"coqa": 100.0, "inscit": 0.0, "quac": 100.0, "doqa_movies": 0.0, "doqa_travel": 100.0}
    assert found["metrics"] == {"average": (100 + 0 + 100 + 50) / 4, **scores}
    assert found["items"] == 5
    assert "convfinqa" in found["note"]
    asked = {request.messages[-1]["content"]: request.messages for request in model.asked}
    short = next(messages for last, messages in asked.items() if last.endswith("which?"))
    assert short[-1]["content"].startswith("Answer the following question with a short span.")
    assert short[1]["content"] == "first"
    assert asked["what?"][1]["content"] == "Please give a full and complete answer for the question. first"
    assert "passage4" in asked["what?"][0]["content"]
    assert "passage5" not in asked["what?"][0]["content"]

    narrow = Scripted(lambda request: "red", context=256)
    chatrag.run(narrow, Inputs(tmp_path, 1), tmp_path / "narrow")
    assert all(sum(len(m["content"].split()) for m in request.messages) < 256 - 64 for request in narrow.asked)
    assert all("whe" in r.messages[-1]["content"] or "passage0" in r.messages[0]["content"] for r in narrow.asked)


def test_bfcl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions and prompts are the leaderboard's; a stand-in replaces its command, which needs many packages."""
    pytest.importorskip("bfcl_eval")
    command = tmp_path / "bin" / "bfcl"
    command.parent.mkdir()
    command.write_text(
        '#!/bin/sh\nmkdir -p "$BFCL_PROJECT_ROOT/score/x/live"\n'
        'echo "$@" > "$BFCL_PROJECT_ROOT/asked"\n'
        'echo \'{"accuracy": 0.5, "correct_count": 1, "total_count": 2}\''
        ' > "$BFCL_PROJECT_ROOT/score/x/live/BFCL_v4_live_simple_score.json"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    model = Scripted(lambda request: "[f(x=1)]")
    found = bfcl.run(model, Inputs(limit=2), tmp_path / "out")
    assert found["metrics"] == {}
    assert "not on the PATH" in found["note"]
    assert found["items"] == 2 * len((*bfcl.LIVE, *bfcl.NON_LIVE))
    path = tmp_path / "out/result/google_gemma-3-1b-it/live/BFCL_v4_live_simple_result.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["result"] for row in rows] == ["[f(x=1)]"] * 2
    first = model.asked[0].messages
    assert [message["role"] for message in first] == ["system", "user"]
    assert "[func_name1(params_name1=params_value1" in first[0]["content"]
    assert '"name": "get_user_info"' in first[0]["content"]

    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
    asked = len(model.asked)
    found = bfcl.run(model, Inputs(limit=2), tmp_path / "out")
    assert found["metrics"] == {"live": 50.0, "live_simple": 50.0}
    assert len(model.asked) == asked
    assert "--partial-eval" in (tmp_path / "out/asked").read_text()
    shutil.rmtree(tmp_path / "out")  # as a temporary folder of a student's answers is, before the teacher's turn
    assert bfcl.run(model, Inputs(limit=2), tmp_path / "other")["metrics"] == found["metrics"]
    command.write_text("#!/bin/sh\necho no module named torch >&2\nexit 1\n")
    assert "failed (no module named torch)" in bfcl.run(model, Inputs(limit=2), tmp_path / "other")["note"]


def test_obstacles_are_named(mt_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    plan = plan_tasks(["minitron-instruct"], Inputs(mt_data), runs_code=False)
    assert "mt_bench" in plan.benchmarks
    assert "chatrag" not in plan.benchmarks
    assert "coqa/dev.json" in plan.skipped["chatrag"]
    assert "no file for its train split" in plan.skipped["ifeval"]
    judged = Inputs(mt_data, judge=Judge("http://127.0.0.1:9", "any"))
    assert mt_bench.obstacle(judged) is None
    (mt_data / "reference_gpt-4.jsonl").unlink()
    assert "no reference answer to question 111" in str(mt_bench.obstacle(judged))
    assert mt_bench.obstacle(Inputs(mt_data)) is None
    with pytest.raises(UserError, match="--judge localhost:8000: must be an address such as http"):
        Judge("localhost:8000", "any")
    assert "--tasks-data" in plan_tasks(["mt_bench", "quick"], Inputs(), runs_code=False).skipped["mt_bench"]


@pytest.mark.parametrize(
    ("program", "is_right"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("from __future__ import annotations\nassert True", True),
        ("exit()\nassert False", False),
        ("import os\nos._exit(0)", False),
        ("x = bytearray(2**31)", False),
        ("open('big', 'wb').write(b'0' * 2**22)", False),
        ("import os\nassert 'PATH' not in os.environ\nassert os.listdir('.') == ['program.py']", True),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(2**31)", False),
        ("print('\\ud800'.encode('utf-8', 'surrogatepass'))", True),
    ],
)
def test_programs_run_under_limits(program: str, is_right: bool) -> None:
    assert programs.passes(program) is is_right


def test_a_program_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "SECONDS", 1)
    started = time.monotonic()
    assert not programs.passes("while True: pass")
    assert not programs.passes("import time\ntime.sleep(60)")
    assert time.monotonic() - started < 10


TWICE = "def twice(x): return 2 * x"


class Programmer(Scripted):
    """Continues texts with the answers of a function."""

    def __init__(self, says: Callable[[Request], str]) -> None:
        super().__init__(says)
        self.prompts: list[str] = []
        self.draws: list[str] = []

    def continuations(self, prompts: Any, decoding: Decoding, *, draw: str, stage: str = "") -> list[str]:
        assert (decoding.temperature, decoding.top_p) == (0.2, 0.95)  # the papers', arXiv 2407.14679, section 4
        self.prompts += prompts
        self.draws.append(draw)
        answers = (Request([{"role": "user", "content": prompt}], decoding.max_new_tokens) for prompt in prompts)
        return [self.says(request) for request in answers]


def test_humaneval_and_mbpp(tmp_path: Path) -> None:
    rows = [
        {"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n", "entry_point": f"f{i}",
         "test": "def check(g):\n    assert g(2) == 4\n"} for i in range(3)
    ]  # fmt: skip
    (tmp_path / "HumanEval.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    problems = [
        {
            "task_id": i,
            "text": f"double {i}",
            "code": "def twice(x): return 2 * x",
            "test_list": ["assert twice(3) == 6"],
        }
        for i in (2, 3, 4, 11, 12)
    ]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(json.dumps(row) for row in problems))
    model = Programmer(lambda request: "    return x * x" if "f1" not in str(request.messages) else "    return 5")
    found = humaneval.run(model, Inputs(tmp_path), tmp_path / "a")
    assert found["metrics"] == {"pass@1": pytest.approx(2 / 3), "pass@10": pytest.approx(2 / 3)}
    assert (found["items"], found["samples"], len(model.prompts)) == (3, 20, 60)
    assert "20 sampled per item, temperature 0.2, top-p 0.95" in found["note"]
    assert len(set(model.draws)) == len(model.draws) > 1
    model = Programmer(lambda request: TWICE if "double 11" in str(request.messages) else "")
    for shots, prompt in ((None, '"""\ndouble 11\nassert twice(3) == 6\n"""\n'), (2, "double 2 Your code")):
        model.prompts.clear()
        found = mbpp.run(model, Inputs(tmp_path, shots=shots), tmp_path / "b")
        assert (found["metrics"], found["items"], found["samples"]) == ({"pass@1": 0.5}, 2, 1)
        assert prompt in model.prompts[0]
        assert model.prompts[0].count("[BEGIN]") == (shots + 1 if shots else 0)
    assert mbpp.run(model, Inputs(tmp_path, shots=2, samples=3), tmp_path / "b")["samples"] == 3
    assert len(model.prompts) == 2 * 3  # two samples are added to the one that is kept
    assert "--run-code" in plan_tasks(["quick", "mbpp"], Inputs(), runs_code=False).skipped["mbpp"]
    many = plan_tasks(["mbpp", "humaneval", "quick"], Inputs(shots=4), runs_code=True).skipped
    assert many["mbpp"] == "4 shots: the benchmark has 3 examples"
    assert many["humaneval"] == "4 shots: the benchmark has no examples"
    plan = plan_tasks(["mbpp", "humaneval"], Inputs(tmp_path), runs_code=True)
    assert plan.benchmarks == ("mbpp", "humaneval")
    short = fitting(plan, 512)
    assert short.benchmarks == ("mbpp",)
    assert "1,024 tokens do not fit in a context of 512" in short.skipped["humaneval"]


@pytest.mark.parametrize(("num_samples", "k"), [(20, 1), (20, 3), (12, 10), (5, 5)])
def test_the_estimate_is_the_share_of_all_choices_that_hold_a_program_that_passes(num_samples: int, k: int) -> None:
    for num_passed in range(num_samples + 1):
        passed = [i < num_passed for i in range(num_samples)]
        choices = [any(chosen) for chosen in itertools.combinations(passed, k)]
        assert programs.pass_at(k, num_samples, num_passed) == pytest.approx(sum(choices) / len(choices))
    assert k == 1 or programs.pass_at(k, num_samples, 1) != pytest.approx(programs.pass_at(1, num_samples, 1))


def test_interrupted_sampling_continues_to_the_same_programs(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.harness.answers.SAVED_AT_ONCE", 4)
    monkeypatch.setattr(programs, "TEMPERATURE", 4.0)  # the tiny model is sure of its next tokens
    generation, prompts = programs.Generation("tiny", ("\n\n",), 6, samples=3), ["one", "two", "three"]
    whole = generation.generate(answerer, prompts, Inputs(), tmp_path / "whole")
    assert len({program for item in whole for program in item}) == 9
    calls, generate = [], answerer.continuations

    def interrupted(*args: Any, **options: Any) -> list[str]:
        calls.append(options["draw"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(answerer, "continuations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generation.generate(answerer, prompts, Inputs(), tmp_path / "part")
    assert generation.generate(answerer, prompts, Inputs(), tmp_path / "part") == whole
    assert calls == ["tiny 0-0", "tiny 1-1", "tiny 1-1", "tiny 2-2"]
    answerer.seed = 1
    assert generation.generate(answerer, prompts, Inputs(), tmp_path / "other") != whole
