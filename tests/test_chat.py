"""Tests chats with models: streamed answers, their limits, the terminal, and the pages in a real browser."""

import io
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.data.tokens import load_tokenizer
from minitron.errors import UserError
from minitron.evaluation.generation import Sampling, TextGenerator
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.reports import chat
from tests.conftest import make_model

CPU = torch.device("cpu")
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> **bold** \x07\x1b[31m"
TEMPLATE = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}\n{% endfor %}[assistant] "


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    checkpoint = open_checkpoint(make_model(tmp_path_factory.mktemp("chat") / "model", "llama-tied"))
    return TextGenerator(load_model(checkpoint, CPU, torch.float32), load_tokenizer(checkpoint.folder))


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_streamed_answer_ends_as_the_text_of_generate(speaker: TextGenerator) -> None:
    answers = list(speaker.stream(turn("one and one"), Sampling(max_new_tokens=12)))
    assert len(answers) > 3
    assert all(after.text.startswith(before.text) for before, after in pairwise(answers))
    ids = speaker.prompt(turn("one and one"))
    expected = speaker.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert answers[-1].text == speaker.tokenizer.decode(expected, skip_special_tokens=True)
    assert answers[-1].num_tokens == len(expected)
    assert answers[-1].tokens_per_second > 0


def test_sampling_follows_its_seed(speaker: TextGenerator) -> None:
    def answer(seed: int, temperature: float) -> str:
        sampling = Sampling(max_new_tokens=16, temperature=temperature, seed=seed)
        return list(speaker.stream(turn("one"), sampling))[-1].text

    assert answer(0, 1.5) == answer(0, 1.5)
    assert answer(0, 1.5) != answer(1, 1.5)
    assert answer(0, 0.0) == answer(1, 0.0)


def test_closing_the_stream_stops_the_model(speaker: TextGenerator) -> None:
    before = threading.active_count()
    stream = speaker.stream(turn("one"), Sampling(max_new_tokens=200))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon and "generate" in thread.name:
            thread.join(10)
    assert threading.active_count() <= before + 1


def test_prompts_have_a_limit(speaker: TextGenerator) -> None:
    with pytest.raises(UserError, match=r"the prompt has 300 tokens, .* above the model's 256: shorten it"):
        next(speaker.stream(turn("x" * 300), Sampling(max_new_tokens=8)))
    with pytest.raises(UserError, match="the prompt is empty"):
        next(speaker.stream(turn(""), Sampling()))


def test_a_template_is_used_where_there_is_one(speaker: TextGenerator) -> None:
    assert not speaker.has_chat_template
    assert speaker.tokenizer.decode(speaker.prompt(turn("hello"))[0]) == "hello"
    speaker.tokenizer.chat_template = TEMPLATE
    try:
        assert speaker.has_chat_template
        turns = [*turn("hello"), {"role": "assistant", "content": "yes?"}, *turn("nothing")]
        prompt = speaker.tokenizer.decode(speaker.prompt(turns)[0])
        assert prompt == "[user] hello\n[assistant] yes?\n[user] nothing\n[assistant] "
    finally:
        speaker.tokenizer.chat_template = None


def test_on_the_terminal_every_model_answers(
    speaker: TextGenerator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n" + "y" * 300 + "\n"))
    chat.talk({"teacher": speaker, "student": speaker}, Sampling(max_new_tokens=4))
    out, err = capsys.readouterr()
    assert out.count("[teacher]") == out.count("[student]") == 2
    assert err.count("tokens/s") == 2
    assert out.count("shorten it") == 2


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert chat.printable(HOSTILE) == HOSTILE.replace("\x07", "\ufffd").replace("\x1b", "\ufffd")


def test_turns_are_shown_as_text() -> None:
    [shown] = chat.escaped(turn(HOSTILE))
    assert "<" not in shown["content"]


def test_a_taken_port_is_refused(speaker: TextGenerator) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind((chat.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot serve on 127.0.0.1:{port}"):
            chat.serve({"model": speaker}, "test", port=port, blocking=False)


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium: `make chromium` installs it where it can")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


def watched(browser: Any) -> tuple[Any, list[str], list[str]]:
    """Return a page, the addresses that it requests, and the errors on its console."""
    page = browser.new_page()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    return page, requests, errors


@pytest.mark.filterwarnings("ignore")
def test_on_the_page_both_answers_stream(speaker: TextGenerator, browser: Any) -> None:
    pytest.importorskip("gradio")
    handle = speaker.model.register_forward_hook(lambda *_: time.sleep(0.02))  # as slow as a real one
    address = chat.serve({"teacher": speaker, "student": speaker}, "test", blocking=False)
    page, requests, _ = watched(browser)
    page.goto(address)
    page.fill("#prompt textarea", HOSTILE)
    page.click("#send")
    seen: dict[str, list[str]] = {"teacher": [], "student": []}
    speed = "id => document.querySelector(`#speed-${id} textarea, #speed-${id} input`).value"
    for _ in range(600):
        for name, speeds in seen.items():
            speeds.append(page.evaluate(speed, name))
        if all(speeds[-1].startswith("128 tokens") for speeds in seen.values()):
            break
        page.wait_for_timeout(50)
    assert all(speeds[-1].startswith("128 tokens") for speeds in seen.values())
    both_at_work = {pair for pair in zip(*seen.values(), strict=True) if all(pair)}
    assert len(both_at_work) > 5
    assert page.evaluate("window.hacked") is None
    for name in seen:
        assert "<script>window.hacked = 1</script>" in page.inner_text(f"#pane-{name}")
        assert page.locator(f"#pane-{name} img[src=x]").count() == 0
    assert all(url.startswith((address.rstrip("/"), "data:", "blob:")) for url in requests)
    handle.remove()
    page.click("#clear")
    page.wait_for_function("!document.querySelector('#pane-student').innerText.includes('hacked')")
    page.fill("#prompt textarea", "<img src=x onerror='window.hacked = 2'>" * 2**15)  # more than a megabyte
    page.click("#send")
    for name in seen:
        page.wait_for_function(f"document.querySelector('#pane-{name}').innerText.includes('shorten it')")
        assert page.locator(f"#pane-{name} img[src=x]").count() == 0
        assert 1000 < len(page.inner_text(f"#pane-{name}")) < 2 * chat.MAX_PROMPT_CHARACTERS
    assert page.evaluate("window.hacked") is None


def test_a_report_opens_without_a_network(browser: Any, tmp_path: Path, text_file: Path) -> None:
    from minitron import pipeline
    from tests.test_compress import QUICK, recipe

    odd = tmp_path / "<b>text & more"
    odd.mkdir()
    text = odd / "text.txt"
    text.write_text(text_file.read_text())
    teacher = make_model(odd / "model", "llama-tied")
    pipeline.compress(recipe(teacher, text, **QUICK), tmp_path / "run")
    report = tmp_path / "run" / "report.html"
    assert report.stat().st_size < 6e6
    page, requests, errors = watched(browser)
    page.goto(report.as_uri())
    assert requests == [report.as_uri()]
    assert not errors
    assert "<b>text & more" in page.inner_text("h1")
    assert page.locator("b").count() == 0
    assert page.locator("svg").count() >= 8
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
