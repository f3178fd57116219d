"""Talking to models, side by side: a local web page (Gradio), or the terminal."""

import html
import socket
import sys
from collections.abc import Iterator
from threading import Event
from typing import Any

from minitron.errors import UserError
from minitron.evaluation.generation import Answer, Sampling, Speaker

LOOPBACK = "127.0.0.1"
MOST_CHARACTERS = 20_000
"""Of one prompt on the page."""
MOST_NEW_TOKENS = 1_024
AT_ONCE = 8
"""Answers that each model gives at the same time: a slow listener keeps nobody waiting."""
STYLE = """
.gradio-container { font-family: system-ui, sans-serif; }
.speed { color: #555; font-size: .9rem; min-height: 1.5em; }
"""

Turns = list[dict[str, str]]


def page(speakers: dict[str, Speaker], title: str) -> Any:
    """The page as Gradio blocks, not yet served.

    Raises:
        UserError: Gradio is not installed.
    """
    gr = _gradio()
    is_chatty = all(speaker.is_chatty for speaker in speakers.values())
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown("## Side by side" if len(speakers) > 1 else "## Try it")
        panes, speeds, said = {}, {}, {name: gr.State([]) for name in speakers}
        with gr.Row():
            for name, speaker in speakers.items():
                with gr.Column(min_width=280):
                    panes[name] = gr.Chatbot(
                        label=f"{name}, {_millions(speaker)}", elem_id=f"pane-{name}", height=420,
                        render_markdown=False, buttons=["copy"], feedback_options=None,
                    )  # fmt: skip
                    speeds[name] = gr.Textbox(show_label=False, container=False, interactive=False, max_lines=1,
                                              elem_id=f"speed-{name}", elem_classes="speed")  # fmt: skip
        prompt = gr.Textbox(
            label="Your turn" if is_chatty else "Text to go on from", lines=3, max_lines=12, autofocus=True,
            max_length=MOST_CHARACTERS, elem_id="prompt", placeholder="What is the capital of France?" if is_chatty
            else "The capital of France is",
        )  # fmt: skip
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send")
            stop = gr.Button("Stop", elem_id="stop")
            clear = gr.Button("New chat" if is_chatty else "Clear", elem_id="clear")
        with gr.Accordion("Sampling", open=False):
            settings = [
                gr.Slider(1, MOST_NEW_TOKENS, value=128, step=1, label="New tokens at most"),
                gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: the likeliest)"),
                gr.Slider(0.05, 1, value=1, step=0.05, label="Top p"),
                gr.Number(value=0, precision=0, label="Seed"),
            ]
        asked = gr.State("")
        taken = send.click(lambda text: ("", text), [prompt], [prompt, asked], queue=False)
        answers = [
            taken.then(
                _answering(speaker), [asked, said[name], *settings], [said[name], panes[name], speeds[name]],
                concurrency_limit=AT_ONCE, concurrency_id=name,
            )
            for name, speaker in speakers.items()
        ]  # fmt: skip
        stop.click(None, cancels=answers)
        for name in speakers:
            panes[name].clear(lambda: ([], ""), None, [said[name], speeds[name]])
        everything = [part[name] for part in (said, panes, speeds) for name in speakers]
        nothing: list[Any] = [[]] * (2 * len(speakers)) + [""] * len(speakers)
        clear.click(lambda: nothing, None, everything, cancels=answers)
    return blocks


def _answering(speaker: Speaker) -> Any:
    def answer(
        text: str, history: Turns, max_new_tokens: float, temperature: float, top_p: float, seed: float
    ) -> Iterator[tuple[Turns, Turns, str]]:
        if not text:
            yield history, _shown(history), ""
            return
        turns = [*history, {"role": "user", "content": text[:MOST_CHARACTERS]}]
        sampling = Sampling(min(int(max_new_tokens), MOST_NEW_TOKENS), temperature, top_p, int(seed) % 2**32)

        def with_answer(said: str, speed: str = "") -> tuple[Turns, Turns, str]:
            every = [*turns, {"role": "assistant", "content": said}]
            return every, _shown(every), speed

        yield with_answer("…")
        try:
            for found in speaker.answer(turns, sampling):
                yield with_answer(found.text or "…", speed_in_words(found))
        except UserError as error:
            yield history, _shown([*turns, {"role": "assistant", "content": f"({error})"}]), ""

    return answer


def _shown(turns: Turns) -> Turns:
    """As text: no markup in a prompt or an answer means anything."""
    return [{"role": turn["role"], "content": html.escape(turn["content"])} for turn in turns]


def speed_in_words(answer: Answer) -> str:
    """`48 tokens · 31.2 tokens/s`."""
    return f"{answer.num_tokens} tokens · {answer.tokens_per_second:.1f} tokens/s"


def serve(speakers: dict[str, Speaker], title: str, host: str, port: int | None, blocking: bool = True) -> str:
    """Serve the page until interrupted, at the address that is returned and printed.

    Raises:
        UserError: the port is taken, or Gradio is not installed.
    """
    gr = _gradio()
    _require_free(host, port)
    font = ["system-ui", "sans-serif"]  # the default theme would fetch its fonts
    served = page(speakers, title).queue(api_open=False)
    _, address, _ = served.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, footer_links=[],
        theme=gr.themes.Base(font=font, font_mono=["monospace"]), css=STYLE, max_file_size="1kb", ssr_mode=False,
    )  # fmt: skip
    print(f"open {address} · Ctrl-C ends it", file=sys.stderr, flush=True)
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


def talk(speakers: dict[str, Speaker], sampling: Sampling) -> None:
    """Take turns on the terminal until its input ends: every model answers each of them."""
    histories: dict[str, Turns] = {name: [] for name in speakers}
    print("an empty line begins a new chat; Ctrl-D ends", file=sys.stderr)
    while (text := _line()) is not None:
        if not text.strip():
            histories = {name: [] for name in speakers}
            continue
        for name, speaker in speakers.items():
            turns = [*histories[name], {"role": "user", "content": text}]
            print(f"\n[{name}] ", end="", flush=True)
            said, found = "", None
            try:
                for found in speaker.answer(turns, sampling):
                    print(_printable(found.text[len(said) :]), end="", flush=True)
                    said = found.text
            except UserError as error:
                print(f"({error})", end="")
            if found:
                print(f"\n    {speed_in_words(found)}", end="", file=sys.stderr)
            histories[name] = [*turns, {"role": "assistant", "content": said}] if speaker.is_chatty else []
        print()


def _line() -> str | None:
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _printable(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _millions(speaker: Speaker) -> str:
    return f"{sum(parameter.numel() for parameter in speaker.model.parameters()) / 1e6:,.1f} M parameters"


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise UserError("the chat page needs gradio: pip install 'minitron[chat]'; or use --terminal") from error
    return gradio
