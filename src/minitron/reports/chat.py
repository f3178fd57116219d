"""Serves a chat with models side by side, on a local web page (Gradio) or on the terminal."""

import html
import socket
import sys
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any

from minitron.errors import UserError
from minitron.evaluation.generation import Completion, Sampling, TextGenerator

LOOPBACK = "127.0.0.1"
MAX_PROMPT_CHARACTERS = 20_000
"""Characters of one prompt on the page."""
MAX_NEW_TOKENS = 1_024
MAX_CONCURRENT_ANSWERS = 8
"""Answers that each model generates at a time, so that one slow reader does not block the others."""
STYLE = """
.gradio-container { font-family: system-ui, sans-serif; }
.speed { color: #555; font-size: .9rem; min-height: 1.5em; }
"""

Turns = list[dict[str, str]]
Update = tuple[Turns, Turns, str]
"""New contents of a model's history, pane and speed line."""


def page(speakers: dict[str, TextGenerator], title: str) -> Any:
    """Return the chat page as Gradio blocks that are not served yet.

    Raises:
        UserError: Gradio is not installed.
    """
    gr = _gradio()
    is_chat = all(speaker.has_chat_template for speaker in speakers.values())
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown("## Side by side" if len(speakers) > 1 else "## Try it")
        panes, speeds, histories = {}, {}, {name: gr.State([]) for name in speakers}
        with gr.Row():
            for name, speaker in speakers.items():
                with gr.Column(min_width=280):
                    panes[name], speeds[name] = _pane(gr, name, speaker)
        prompt = gr.Textbox(
            label="Your message" if is_chat else "Text to continue",
            placeholder="What is the capital of France?" if is_chat else "The capital of France is",
            lines=3,
            max_lines=12,
            max_length=MAX_PROMPT_CHARACTERS,
            autofocus=True,
            elem_id="prompt",
        )
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send")
            stop = gr.Button("Stop", elem_id="stop")
            clear = gr.Button("New chat" if is_chat else "Clear", elem_id="clear")
        with gr.Accordion("Sampling", open=False):
            settings = [
                gr.Slider(1, MAX_NEW_TOKENS, value=128, step=1, label="Maximum number of new tokens"),
                gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0 is greedy)"),
                gr.Slider(0.05, 1, value=1, step=0.05, label="Top p"),
                gr.Number(value=0, precision=0, label="Seed"),
            ]
        sent = gr.State("")
        moved = send.click(lambda text: ("", text), [prompt], [prompt, sent], queue=False)
        answers = [
            moved.then(
                _answering(speaker),
                [sent, histories[name], *settings],
                [histories[name], panes[name], speeds[name]],
                concurrency_limit=MAX_CONCURRENT_ANSWERS,
                concurrency_id=name,
            )
            for name, speaker in speakers.items()
        ]
        stop.click(None, cancels=answers)
        for name in speakers:
            panes[name].clear(lambda: ([], ""), None, [histories[name], speeds[name]])
        contents = [part[name] for part in (histories, panes, speeds) for name in speakers]
        empty: list[Any] = [[]] * (2 * len(speakers)) + [""] * len(speakers)
        clear.click(lambda: empty, None, contents, cancels=answers)
    return blocks


def _pane(gr: Any, name: str, speaker: TextGenerator) -> tuple[Any, Any]:
    """Return the pane that shows a model's chat, and the line for its speed below."""
    size = sum(parameter.numel() for parameter in speaker.model.parameters()) / 1e6
    pane = gr.Chatbot(
        label=f"{name}, {size:,.1f} M parameters",
        height=420,
        render_markdown=False,
        buttons=["copy"],
        feedback_options=None,
        elem_id=f"pane-{name}",
    )
    speed = gr.Textbox(
        show_label=False,
        container=False,
        interactive=False,
        max_lines=1,
        elem_id=f"speed-{name}",
        elem_classes="speed",
    )
    return pane, speed


def _answering(speaker: TextGenerator) -> Callable[..., Iterator[Update]]:
    """Return the function that Gradio calls with the inputs of the page to stream a model's answer."""

    def answer(text: str, history: Turns, *settings: float) -> Iterator[Update]:
        if not text:
            yield history, escaped(history), ""
            return
        max_new_tokens, temperature, top_p, seed = settings
        turns = [*history, {"role": "user", "content": text[:MAX_PROMPT_CHARACTERS]}]
        sampling = Sampling(min(int(max_new_tokens), MAX_NEW_TOKENS), temperature, top_p, int(seed) % 2**32)

        def with_answer(content: str, speed: str = "") -> Update:
            chat = [*turns, {"role": "assistant", "content": content}]
            return chat, escaped(chat), speed

        yield with_answer("…")
        try:
            for partial in speaker.stream(turns, sampling):
                yield with_answer(partial.text or "…", speed_text(partial))
        except UserError as error:
            _, shown, _ = with_answer(f"({error})")
            yield history, shown, ""

    return answer


def escaped(turns: Turns) -> Turns:
    """Return turns as HTML text, in which markup of a prompt or an answer has no effect."""
    return [{"role": turn["role"], "content": html.escape(turn["content"])} for turn in turns]


def speed_text(answer: Completion) -> str:
    """Return the length and the speed of an answer, such as `48 tokens · 31.2 tokens/s`."""
    return f"{answer.num_tokens} tokens · {answer.tokens_per_second:.1f} tokens/s"


def serve(
    speakers: dict[str, TextGenerator],
    title: str,
    *,
    host: str = LOOPBACK,
    port: int | None = None,
    blocking: bool = True,
) -> str:
    """Serve the chat page until interrupted, or in the background; return its address, which is also printed.

    Without a `port`, the page is served at a free one.

    Raises:
        UserError: the port is taken, or Gradio is not installed.
    """
    gr = _gradio()
    _require_free(host, port)
    font = ["system-ui", "sans-serif"]  # the default theme would download its fonts
    _, address, _ = (
        page(speakers, title)
        .queue(api_open=False)
        .launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=gr.themes.Base(font=font, font_mono=["monospace"]),
            css=STYLE,
            max_file_size="1kb",
            ssr_mode=False,
        )
    )
    print(f"Open {address} in a browser; Ctrl-C stops the server.", file=sys.stderr, flush=True)
    if blocking:
        _wait()
    return str(address)


def _require_free(host: str, port: int | None) -> None:
    with socket.socket() as trial:
        try:
            trial.bind((host, port or 0))
        except OSError as error:
            raise UserError(f"cannot serve on {host}:{port or ''}: {' '.join(str(error).split())}") from error


def _wait() -> None:
    try:
        Event().wait()
    except KeyboardInterrupt:
        print(file=sys.stderr)


def talk(speakers: dict[str, TextGenerator], sampling: Sampling) -> None:
    """Read prompts from the terminal until its input ends; every model answers each of them."""
    histories: dict[str, Turns] = {name: [] for name in speakers}
    print("An empty line starts a new chat; Ctrl-D ends.", file=sys.stderr)
    while (text := _read_line()) is not None:
        if not text.strip():
            histories = {name: [] for name in speakers}
            continue
        for name, speaker in speakers.items():
            turns = [*histories[name], {"role": "user", "content": text}]
            print(f"\n[{name}] ", end="", flush=True)
            answer = _print_answer(speaker, turns, sampling)
            histories[name] = [*turns, {"role": "assistant", "content": answer}] if speaker.has_chat_template else []
        print()


def _print_answer(speaker: TextGenerator, turns: Turns, sampling: Sampling) -> str:
    """Print an answer while it is generated, then its speed; return its text."""
    text, partial = "", None
    try:
        for partial in speaker.stream(turns, sampling):
            print(printable(partial.text[len(text) :]), end="", flush=True)
            text = partial.text
    except UserError as error:
        print(f"({error})", end="")
    if partial:
        print(f"\n    {speed_text(partial)}", end="", file=sys.stderr)
    return text


def _read_line() -> str | None:
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def printable(text: str) -> str:
    """Return `text` with a replacement character for every character that would control the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise UserError("the chat page needs gradio: pip install 'minitron[chat]'; or use --terminal") from error
    return gradio
