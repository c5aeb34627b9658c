"""The command `clipcap serve`: a page on this machine to drop an image and see its captions, scores and prefix."""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import re
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from clipcap.captioner import Captioner
from clipcap.confidence import Judgement
from clipcap.data.embeddings import mapper_input
from clipcap.data.images import ImageError, read_image
from clipcap.decoding import room_for_captions
from clipcap.evaluation.interpret import Tokens, nearest_tokens, unit_tokens
from clipcap.references import Ranked, Reference, label_reference, neighbour_reference
from common.checks import UserError, require_at_least, require_between, require_one_of, require_text
from common.runtime import RuntimeConfig, resolve_dtype, start

if TYPE_CHECKING:
    import gradio

    from clipcap.guard import Uploads

STRATEGIES = {
    "Beam search": "beam",
    "Beam search, the original's rule": "beam_original",
    "Greedy": "greedy",
    "Sampling": "sample",
}
USED = {
    "beam": ("captions", "beams"),
    "beam_original": ("captions", "beams"),
    "greedy": (),
    "sample": ("captions", "top_p", "temperature", "seed"),
}
"""Settings of each strategy."""
MOST_CAPTIONS = 5
MOST_BEAMS = 10
MOST_PIXELS = 40_000_000
"""Of an image: decoded, it takes three to eight times as many bytes."""
FAR = "⚠ This image is unlike anything the captioner was trained on: its captions may be made up."
SESSIONS = 64
"""Visits that gradio keeps a state of, 40 kB each, of which the page uses nothing; its own choice is 10,000."""
ANSWERS = 256
"""Visits whose calls gradio remembers; by itself it forgets none."""
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

    model: str = "photo"
    """Captioner: photo (for photographs) or tiny (for rendered scenes), both packaged; a directory that `clipcap train`
    or `clipcap convert` wrote; or a hub id."""
    host: str = "127.0.0.1"
    """Address to listen on. Only this machine can reach 127.0.0.1; 0.0.0.0 lets the whole network in."""
    allow_host: tuple[str, ...] = ()
    """More names that browsers may call this server by, such as a proxy's. Without them it answers to localhost and
    --host; unless that is this machine alone, also to its host name and to addresses in digits."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    max_upload: int = 20
    """Largest image file, in megabytes."""
    max_new_tokens: int | None = None
    """Longest caption in tokens; left out, 67, or as many as the captioner has room for."""
    labels: str = ""
    """Names of things to look for in the image: "dog,cat,horse", or a text file with one on each line; left out, 100
    everyday nouns (of tiny, its shapes). They need a captioner whose CLIP has a text tower."""
    neighbours: Path | None = None
    """Captioned images, in any layout that `clipcap train` reads: the page shows the captions of those most like the
    image. They are encoded when the server starts."""
    neighbours_images: Path | None = None
    """Directory of their images, when they are not beside the captions."""
    neighbours_store: Path = Path("out/neighbours")
    """Directory where their embeddings are kept, for the next start."""
    int8: bool = False
    """Compute GPT-2 in 8-bit integers (CPU only)."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class Settings:
    """How an image is captioned: what the page asks for, and the query of `/caption`."""

    strategy: str = "beam"
    captions: int = 3
    beams: int = 5
    top_p: float = 0.9
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_one_of("strategy", self.strategy, tuple(STRATEGIES.values()))
        for name, least, most in (("captions", 1, MOST_CAPTIONS), ("beams", 1, MOST_BEAMS), ("seed", 0, 2**63 - 1)):
            value = getattr(self, name)
            require_at_least(name, value, least)
            if value > most:
                raise UserError(f"{name} is {value}: use at most {most}.")

    @classmethod
    def parse(cls, query: Iterable[tuple[str, str]]) -> Settings:
        """From names and values as text."""
        found: dict[str, Any] = {}
        for name, text in query:
            require_one_of("setting", name, [part.name for part in fields(cls)])
            kind = type(getattr(cls, name))
            try:
                found[name] = kind(text)
            except ValueError:
                raise UserError(f"{name} is {text!r}: give {'a whole' if kind is int else 'a'} number.") from None
        settings = cls(**found)
        for name in found:
            if name not in ("strategy", *USED[settings.strategy]):
                raise UserError(f"{name} is {found[name]}: strategy {settings.strategy!r} does not use it.")
        return settings

    @property
    def options(self) -> dict[str, Any]:
        """Of `decode`."""
        if self.strategy == "greedy":
            return {"strategy": "greedy"}
        options: dict[str, Any] = {"strategy": self.strategy, "num_captions": self.captions}
        if self.strategy == "sample":
            return options | {"top_p": self.top_p, "temperature": self.temperature}
        return options | {"num_beams": max(self.beams, self.captions)}


class Answer(NamedTuple):
    """What is said of an image."""

    captions: list[str]
    """Best first."""
    scores: list[float]
    """Mean log-probability of a token, in nats."""
    tokens: Tokens
    """Nearest to each position of the prefix."""
    sure: Judgement | None
    """How sure the captions are; None of a captioner that is not calibrated."""
    labels: Ranked
    neighbours: Ranked

    @property
    def json(self) -> dict[str, Any]:
        """What `/caption` answers."""
        confidences = [{"confidence": round(p, 4)} for p in self.sure.confidences] if self.sure else []
        confidences = confidences or [{}] * len(self.captions)
        captions = zip(self.captions, self.scores, confidences, strict=True)
        found: dict[str, Any] = {
            "captions": [{"caption": text, "score": round(score, 4)} | more for text, score, more in captions]
        }
        if self.sure:
            found["far"] = self.sure.far
        if self.labels:
            found["labels"] = [{"label": name, "similarity": round(value, 4)} for name, value in self.labels]
        if self.neighbours:
            found["neighbours"] = [{"caption": text, "similarity": round(value, 4)} for text, value in self.neighbours]
        return found


class Worker:
    """Captions files one after the other, in a thread of its own.

    One thread for all requests: each of several would keep the memory of its largest image for itself.
    """

    def __init__(
        self,
        captioner: Captioner,
        max_new_tokens: int,
        labels: Reference | None = None,
        neighbours: Reference | None = None,
    ) -> None:
        self.captioner, self.max_new_tokens = captioner, max_new_tokens
        self.labels, self.neighbours = labels, neighbours
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="caption")
        self.table = unit_tokens(captioner.model)

    def submit(self, path: str, settings: Settings, *, name: str) -> Future[Answer]:
        """Caption a file, that errors call `name`: they are UserErrors, and do not say where it lies."""
        return self.thread.submit(self._answer, path, settings, name)

    def _answer(self, path: str, settings: Settings, name: str) -> Answer:
        captioner = self.captioner
        generator = torch.Generator(captioner.model.device).manual_seed(settings.seed)
        options: dict[str, Any] = settings.options | {"generator": generator, "int8": captioner.int8}
        try:
            image = read_image(path, max_pixels=MOST_PIXELS, side=captioner.clip.preprocess.size)
            features = captioner.features(captioner.clip.preprocess([image]))
            embedding = mapper_input(features, captioner.model.config.inputs)
            with torch.inference_mode():
                prefix = captioner.model.prefix(embedding)[0]
            found = captioner.decode(features, max_new_tokens=self.max_new_tokens, **options)[0]
        except UserError as error:
            shown = str(error).replace(repr(path), repr(name))
            what = "This file cannot be captioned" if isinstance(error, ImageError) else "These settings do not work"
            raise UserError(f"{what}: {shown}") from error
        return Answer(
            [captioner.text(caption) for caption in found],
            [caption.score for caption in found],
            nearest_tokens(captioner.model, prefix, k=5, table=self.table),
            captioner.judge(features, [found])[0] if captioner.model.calibration else None,
            *(known.nearest(features.embedding[0]) if known else [] for known in (self.labels, self.neighbours)),
        )


def as_markdown(text: str) -> str:
    """Markdown that shows `text` as it is: a model's or a file's name may hold marks such as * or _, or HTML."""
    return html.escape(re.sub(r"([\\`*_{}\[\]()#+\-.!|~$^])", r"\\\1", text), quote=False)


def build_page(worker: Worker, uploads: Uploads, name: str) -> gradio.Blocks:
    """The page, whose one function is also the endpoint `/caption` of gradio_client.

    `/caption` takes an image file, a strategy's label, the number of captions, beams, nucleus, temperature and seed; it
    returns the best caption, a table of captions with scores (and confidence), what is to be said of the image itself,
    a table of the prefix's tokens, and tables of labels and of neighbours' captions where there are any.
    """
    gr = _gradio()
    from clipcap.guard import NOT_UPLOADED

    def caption(
        path: str | None, strategy: str, count: float, beams: float, top_p: float, temperature: float, seed: float
    ) -> tuple[Any, ...]:
        if path is None:
            raise gr.Error("Choose an image first.", print_exception=False)
        if path not in uploads:
            raise gr.Error(NOT_UPLOADED, print_exception=False)
        kind = STRATEGIES[strategy]  # gradio lets no other pass
        try:
            settings = Settings(kind, int(count), int(beams), float(top_p), float(temperature), int(seed or 0))
        except (TypeError, ValueError, OverflowError) as error:
            raise gr.Error(
                html.escape(f"These settings do not work: {error}", quote=False), print_exception=False
            ) from error
        try:
            found = worker.submit(path, settings, name=os.path.basename(path)).result()
        except UserError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
        sure = [f"{p:.0%}" for p in found.sure.confidences] if found.sure else []
        rows = [
            [rank, text, *sure[rank - 1 : rank], f"{score:.3f}"]
            for rank, (text, score) in enumerate(zip(found.captions, found.scores, strict=True), 1)
        ]
        words = [
            [position, " · ".join(f"{token!r} {value:.2f}" for token, value in row)]
            for position, row in enumerate(found.tokens, 1)
        ]
        tables = [
            [[name, f"{value:.2f}"] for name, value in several]
            for known, several in ((worker.labels, found.labels), (worker.neighbours, found.neighbours))
            if known
        ]
        warning = FAR if found.sure and found.sure.far else ""
        return found.captions[0], rows, gr.Markdown(warning, visible=bool(warning)), words, *tables

    default = Settings()
    sure = worker.captioner.model.calibration is not None
    about = "the probability that each is right, and its log-probability" if sure else "their log-probability"
    about += " in nats a token"
    with gr.Blocks(title="clipcap", analytics_enabled=False) as page:
        gr.Markdown(
            f"# clipcap\nDrop an image and see what the captioner **{as_markdown(name)}** says of it.", elem_id="title"
        )
        with gr.Row():
            with gr.Column(scale=5):
                image = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=320)
                # gradio would open the file first, and show "Error" for one that it cannot.
                image.preprocess = lambda payload: payload and payload.path
                strategy = gr.Dropdown(list(STRATEGIES), value="Beam search", label="Decoding")
                count = gr.Slider(1, MOST_CAPTIONS, value=default.captions, step=1, label="Captions")
                with gr.Accordion("More", open=False):
                    beams = gr.Slider(1, MOST_BEAMS, value=default.beams, step=1, label="Beams")
                    top_p = gr.Slider(0.05, 1, value=default.top_p, step=0.05, label="Nucleus (sampling)")
                    temperature = gr.Slider(0.1, 2, value=default.temperature, step=0.1, label="Temperature (sampling)")
                    seed = gr.Number(default.seed, precision=0, minimum=0, label="Seed (sampling)")
                button = gr.Button("Caption", variant="primary", elem_id="caption")
            with gr.Column(scale=6):
                best = gr.Textbox(label="Caption", elem_id="best", lines=2, interactive=False)
                warning = gr.Markdown(visible=False, elem_id="far")
                table = gr.Dataframe(
                    headers=["", "caption", *(["confidence"] if sure else []), "score"], interactive=False, wrap=True,
                    buttons=[], elem_id="captions", label="Captions, best first, with " + about,
                    column_widths=["8%", "56%", "20%", "16%"] if sure else ["10%", "72%", "18%"],
                )  # fmt: skip
                found = [
                    gr.Dataframe(
                        headers=[head, "similarity"], interactive=False, wrap=True, buttons=[], elem_id=name,
                        label=label, column_widths=["76%", "24%"],
                    )
                    for known, name, head, label in (
                        (worker.labels, "labels", "label", "Zero-shot labels, by CLIP's similarity"),
                        (worker.neighbours, "neighbours", "caption", "Captions of the most similar known images"),
                    )
                    if known
                ]  # fmt: skip
                with gr.Accordion("The prefix, as its nearest tokens", open=False):
                    prefix = gr.Dataframe(
                        headers=["", "tokens with cosine similarity"], show_label=False, interactive=False, wrap=True,
                        buttons=[], column_widths=["10%", "90%"], elem_id="prefix",
                    )  # fmt: skip
        inputs = [image, strategy, count, beams, top_p, temperature, seed]
        button.click(caption, inputs, [best, table, warning, prefix, *found], api_name="caption", concurrency_limit=1)
    page.queue(max_size=32, default_concurrency_limit=1)
    return page


@contextlib.contextmanager
def serving(captioner: Captioner, config: ServeConfig) -> Iterator[str]:
    """Serve the page, and `/caption`, until the block ends; gives the address.

    What is uploaded lies in a folder of its own, and goes with it.

    Raises:
        UserError: gradio is not installed, the port is taken or may not be used.
    """
    gr = _gradio()
    from gradio.routes import App, ORJSONResponse

    from clipcap.guard import Guard, Uploads

    port = _free_port(config.host, config.port)
    address = f"[{config.host}]" if ":" in config.host else config.host
    # System fonts: the default theme would ask the web for its own.
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    theme = gr.themes.Soft(primary_hue="teal", font=fonts, font_mono=["ui-monospace", "monospace"])
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="clipcap-serve-", ignore_cleanup_errors=True))
        uploads = Uploads(Path(folder))
        stack.enter_context(_variable("GRADIO_TEMP_DIR", folder))
        worker = Worker(
            captioner,
            config.max_new_tokens or min(67, room_for_captions(captioner.model)),
            label_reference(captioner.clip, config.labels),
            neighbour_reference(captioner.clip, config.neighbours, config.neighbours_images, config.neighbours_store)
            if config.neighbours
            else None,
        )
        stack.callback(worker.thread.shutdown, cancel_futures=True)
        page = build_page(worker, uploads, config.model)

        class Guarded(App):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                try:
                    await guard(scope, receive, send)
                finally:
                    _forget(page)

        app = Guarded(default_response_class=ORJSONResponse)
        guard = Guard(
            partial(App.__call__, app), uploads,
            host=config.host, allow_host=config.allow_host, max_bytes=config.max_upload << 20,
        )  # fmt: skip
        _add_endpoint(app, worker, uploads)
        stopped = threading.Event()
        threading.Thread(target=_keep_tidy, args=(uploads, page, stopped), daemon=True).start()
        stack.callback(stopped.set)
        stack.callback(page.close, verbose=False)
        page.launch(
            server_name=address, server_port=port, max_file_size=config.max_upload << 20, prevent_thread_lock=True,
            quiet=True, share=False, inbrowser=False, ssr_mode=False, mcp_server=False, run_history=False,
            enable_monitoring=False, pwa=False, max_threads=8, theme=theme, css=CSS,
            state_session_capacity=SESSIONS, _app=app,
        )  # fmt: skip
        yield f"http://{address}:{port}"


def _add_endpoint(app: Any, worker: Worker, uploads: Uploads) -> None:
    """`POST /caption`: an image as the body, `Settings` as the query; `Answer.json` comes back."""
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def caption(request: Request) -> Response:
        path = uploads.folder / f"{uuid.uuid4().hex}.sent"
        try:
            settings = Settings.parse(request.query_params.multi_items())
            if request.headers.get("content-type", "").startswith("multipart/"):
                raise UserError("The body is a form: send the image itself, as curl --data-binary @photo.jpg does.")
            with open(path, "wb") as file:
                async for chunk in request.stream():
                    file.write(chunk)
            found = await asyncio.wrap_future(worker.submit(str(path), settings, name="sent"))
        except (UserError, ClientDisconnect) as error:
            return JSONResponse({"detail": str(error)}, 400)
        finally:
            path.unlink(missing_ok=True)
        return JSONResponse(found.json)

    app.router.routes.append(Route("/caption", caption, methods=["POST"]))


def _keep_tidy(uploads: Uploads, page: gradio.Blocks, stopped: threading.Event) -> None:
    """Delete old uploads until the server stops."""
    while not stopped.wait(60):
        uploads.tidy()
        for known in page.temp_file_sets:  # gradio's own lists of them, which would grow
            known.clear()


def _forget(page: gradio.Blocks) -> None:
    """Have gradio forget answered and abandoned calls, but for the last `ANSWERS` visits'."""
    queue = page._queue
    visits = queue.pending_event_ids_session
    for visit in list(visits)[: max(len(visits) - ANSWERS, 0)]:
        if not any(call in queue.event_ids_to_events for call in visits[visit]):
            visits.pop(visit)
            queue.pending_messages_per_session.pop(visit, None)


def run(config: ServeConfig) -> int:
    """`clipcap serve`, until Ctrl-C, `kill` or the end of the terminal."""
    _gradio()  # before the models load
    device = start(config.runtime)
    if config.max_new_tokens is not None:
        require_at_least("max_new_tokens", config.max_new_tokens, 1)
    require_at_least("max_upload", config.max_upload, 1)
    _free_port(config.host, config.port)
    dtype: Any = "int8" if config.int8 else resolve_dtype(config.runtime.precision)
    captioner = Captioner.from_pretrained(config.model, device=device, dtype=dtype)
    with contextlib.suppress(KeyboardInterrupt), _ending_as_by_ctrl_c(), serving(captioner, config) as address:
        print(f"clipcap is at {address} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()
    return 0


@contextlib.contextmanager
def _ending_as_by_ctrl_c() -> Iterator[None]:
    """Let the signals that end a server raise KeyboardInterrupt, so that uploads are deleted."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _gradio() -> Any:
    """gradio, told to ask nothing of the web, and to keep no table of past calls, which it would evaluate at each."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise UserError("clipcap serve needs gradio: pip install 'clip-gpt-toolkit[serve]'.") from error
    return gradio


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0, when it can be listened on."""
    require_text("host", host)
    require_between("port", port, 0, 65535)
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except (OSError, UnicodeError) as error:  # a host that can be no name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"port {port} of {host!r} cannot be used ({reason}): give another --port, or 0.") from error
