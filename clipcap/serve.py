"""The command `clipcap serve`: a page on this machine to drop an image and see its captions, scores and prefix."""

from __future__ import annotations

import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from clipcap.captioner import Captioner
from clipcap.images import ImageError, read_image
from clipcap.interpret import nearest_tokens
from common.checks import UserError, require_at_least, require_between
from common.runtime import RuntimeConfig, resolve_dtype, start

if TYPE_CHECKING:
    import gradio

STRATEGIES = {
    "Beam search": "beam",
    "Beam search, the original's rule": "beam_original",
    "Greedy": "greedy",
    "Sampling": "sample",
}
MOST_CAPTIONS = 5
MOST_BEAMS = 10
KEPT_SECONDS = 3600
"""After this time uploaded files are deleted."""
SESSIONS = 64
"""Visits that gradio keeps a state of, 40 kB each, of which the page uses nothing; its own choice is 10,000."""
# Widths must not follow the content: the tables measure themselves by their columns, and the page would never rest.
CSS = """
footer {display: none !important}
.gradio-container {width: 100% !important; max-width: 1080px !important; margin: 0 auto !important}
.gradio-container .column {flex-basis: 320px !important}
#captions table {font-family: var(--font) !important}
#title h1 {margin-bottom: 0}
#best textarea {font-size: 1.35rem; line-height: 1.4; font-weight: 600}
"""


@dataclass(frozen=True)
class ServeConfig:
    """Open a page on this machine to caption images: needs the extra [serve]."""

    model: str = "tiny"
    """Captioner: tiny (packaged), a directory that `clipcap train` or `clipcap convert` wrote, or a hub id."""
    host: str = "127.0.0.1"
    """Address to listen on. Only this machine can reach 127.0.0.1; 0.0.0.0 lets the whole network in."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    max_upload: int = 20
    """Largest image file, in megabytes."""
    max_new_tokens: int = 67
    """Longest caption."""
    int8: bool = False
    """Compute GPT-2 in 8-bit integers (CPU only)."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def build_page(captioner: Captioner, *, max_new_tokens: int = 67, name: str = "tiny") -> gradio.Blocks:
    """The page, whose one function is also the endpoint `/caption` of gradio_client.

    `/caption` takes an image file, a strategy's label, the number of captions, beams, nucleus, temperature and seed; it
    returns the best caption, a table of captions with scores, and a table of the prefix's tokens.

    Raises:
        UserError: gradio is not installed.
    """
    gr = _gradio()
    # One thread for all requests: each thread of gradio's would keep the memory of its largest image for itself.
    worker = ThreadPoolExecutor(1, thread_name_prefix="caption")

    def answer(
        path: str | None, strategy: str, count: float, beams: float, top_p: float, temperature: float, seed: float
    ) -> tuple[str, list[list[Any]], list[list[Any]]]:
        if path is None:
            raise gr.Error("Choose an image first.", print_exception=False)
        kind = STRATEGIES[strategy]  # gradio lets no other pass
        options: dict[str, Any] = {"strategy": kind, "num_captions": min(int(count), MOST_CAPTIONS)}
        if kind == "greedy":
            options["num_captions"] = 1
        elif kind == "sample":
            options |= {"top_p": float(top_p), "temperature": float(temperature), "seed": int(seed or 0)}
        else:
            options["num_beams"] = max(min(int(beams), MOST_BEAMS), options["num_captions"])
        try:
            image = read_image(path)
            found = next(captioner.stream([image], batch_size=1, max_new_tokens=max_new_tokens, **options))
            with torch.inference_mode():
                prefix = captioner.model.prefix(captioner.embed([image]))[0]
            tokens = nearest_tokens(captioner.model, prefix, k=5)
        except UserError as error:
            shown = str(error).replace(repr(str(path)), repr(os.path.basename(path)))  # not where it was put
            what = "This file cannot be captioned" if isinstance(error, ImageError) else "These settings do not work"
            raise gr.Error(f"{what}: {shown}", print_exception=False) from error
        captions = [[rank, text, f"{score:.3f}"] for rank, (text, score) in
                    enumerate(zip(found.captions, found.scores, strict=True), 1)]  # fmt: skip
        words = [
            [position, " · ".join(f"{token!r} {value:.2f}" for token, value in row)]
            for position, row in enumerate(tokens, 1)
        ]
        return found.captions[0], captions, words

    @wraps(answer)
    def caption(*inputs: Any) -> tuple[str, list[list[Any]], list[list[Any]]]:
        return worker.submit(answer, *inputs).result()

    with gr.Blocks(title="clipcap", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(f"# clipcap\nDrop an image and see what the captioner **{name}** says of it.", elem_id="title")
        with gr.Row():
            with gr.Column(scale=5):
                image = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=320)
                # gradio would open the file first, and show "Error" for one that it cannot.
                image.preprocess = lambda payload: payload and payload.path
                strategy = gr.Dropdown(list(STRATEGIES), value="Beam search", label="Decoding")
                count = gr.Slider(1, MOST_CAPTIONS, value=3, step=1, label="Captions")
                with gr.Accordion("More", open=False):
                    beams = gr.Slider(1, MOST_BEAMS, value=5, step=1, label="Beams")
                    top_p = gr.Slider(0.05, 1, value=0.9, step=0.05, label="Nucleus (sampling)")
                    temperature = gr.Slider(0.1, 2, value=1.0, step=0.1, label="Temperature (sampling)")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed (sampling)")
                button = gr.Button("Caption", variant="primary", elem_id="caption")
            with gr.Column(scale=6):
                best = gr.Textbox(label="Caption", elem_id="best", lines=2, interactive=False)
                table = gr.Dataframe(
                    headers=["", "caption", "score"], interactive=False, wrap=True, buttons=[], elem_id="captions",
                    label="Captions, best first, with their log-probability in nats a token",
                    column_widths=["10%", "72%", "18%"],
                )  # fmt: skip
                with gr.Accordion("The prefix, as its nearest tokens", open=False):
                    prefix = gr.Dataframe(
                        headers=["", "tokens with cosine similarity"], show_label=False, interactive=False, wrap=True,
                        buttons=[], column_widths=["10%", "90%"], elem_id="prefix",
                    )  # fmt: skip
        inputs = [image, strategy, count, beams, top_p, temperature, seed]
        button.click(caption, inputs, [best, table, prefix], api_name="caption", concurrency_limit=1)
    page.queue(max_size=32, default_concurrency_limit=1)
    return page


def launch(
    page: gradio.Blocks, *, host: str = "127.0.0.1", port: int = 7860, max_upload: int = 20, block: bool = True
) -> str:
    """Serve the page and return its address; with `block`, once it is stopped.

    Raises:
        UserError: the port is taken or may not be used.
    """
    require_at_least("max_upload", max_upload, 1)
    port = _free_port(host, port)
    themes = _gradio().themes
    # System fonts: the default theme would ask the web for its own.
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    theme = themes.Soft(primary_hue="teal", font=fonts, font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host, server_port=port, max_file_size=max_upload << 20, prevent_thread_lock=True, quiet=True,
        share=False, inbrowser=False, max_threads=8, theme=theme, css=CSS,
        state_session_capacity=SESSIONS,
    )  # fmt: skip
    address = f"http://{host}:{port}"
    if block:
        print(f"clipcap is at {address} (Ctrl-C stops it)", flush=True)
        page.block_thread()
    return address


def run(config: ServeConfig) -> int:
    """`clipcap serve`."""
    _gradio()  # before the models load
    device = start(config.runtime)
    require_at_least("max_new_tokens", config.max_new_tokens, 1)
    require_at_least("max_upload", config.max_upload, 1)
    _free_port(config.host, config.port)
    dtype: Any = "int8" if config.int8 else resolve_dtype(config.runtime.precision)
    captioner = Captioner.from_pretrained(config.model, device=device, dtype=dtype)
    page = build_page(captioner, max_new_tokens=config.max_new_tokens, name=config.model)
    with contextlib.suppress(KeyboardInterrupt):
        launch(page, host=config.host, port=config.port, max_upload=config.max_upload)
    return 0


def _gradio() -> Any:
    """gradio, told to ask nothing of the web."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise UserError("clipcap serve needs gradio: pip install 'clip-gpt-toolkit[serve]'.") from error
    return gradio


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0, when it can be listened on."""
    require_between("port", port, 0, 65535)
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except (OSError, UnicodeError) as error:  # a host that can be no name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"port {port} of {host!r} cannot be used ({reason}): give another --port, or 0.") from error
