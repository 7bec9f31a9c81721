"""Run the code blocks of a page of the documentation, as a reader would: in order, in one folder, with one model."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.docs import Block, CommandLine, command_lines, read_blocks
from support.docs_checks import BlockError, check_command, check_python, recipe
from support.paths import ROOT
from support.results import evaluation, write_run
from winnowkv.policies import registry

SHORT = 2  # new tokens of every answer, so that a page takes seconds
LOOKING = (
    'quality="balanced"',
    "report",
)  # of a block that shows what was chosen after a lookahead of 64 tokens: its answer ...
LONG = 66  # ... has two more
ADDRESSES = ("127.0.0.1:8000", "localhost:8000")  # of the server in the pages
SECONDS = 120  # a script or request of a page
TEXT = (
    "The archive of Oakham was founded in 1712 by Mary Lund, who wrote the history of the town. It has nine rooms, and the "
    "oldest papers lie in the third. In 1850 a captain named Brandt gave his letters to it. The key to the last room was "
    "lost at sea, and what is in it has not been read since. The mayor wants to open that room in May, when roads are dry.\n"
)
SEVEN_B = {  # the shape of a 7B model, of which `winnow plan --model M` reads no weights
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip

Winnow = Callable[..., tuple[int, str, str]]


def write_files(folder: Path) -> None:
    """The files that the pages speak of as the reader's own."""
    rows = [f"{TEXT[:200]} {question}" for question in ("Who founded it?", "How many rooms has it?")]
    (folder / "report.txt").write_text(TEXT, encoding="utf-8")
    (folder / "mine.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows), encoding="utf-8")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    shutil.copy(model_profile(), folder / "mine.json")
    (folder / "M").mkdir()
    (folder / "M" / "config.json").write_text(json.dumps(SEVEN_B), encoding="utf-8")
    (folder / "runs").mkdir()
    for name in "ab":
        write_run(folder / "runs" / name, evaluation())
    for name in ("benchmarks", "examples", "recipes"):  # the reader stands in a checkout
        (folder / name).symlink_to(ROOT / name)


def model_profile() -> Path:
    """The profile of the embedded model that the package brings, with its curve."""
    (found,) = (ROOT / "src" / "winnowkv" / "data" / "profiles").glob("smollm2-*.json")
    return found


class ShortAnswers:
    """Ends every answer of a model with token number ``tokens``: it is the end token, however the model is asked.

    A long answer does not end before that.
    """

    def __init__(self, model: Any, end: int) -> None:
        self.tokens, self.end, self._said = SHORT, end, 0
        self._hook = model.register_forward_hook(self._heard, with_kwargs=True)

    def _heard(self, model: Any, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        ids = named.get("input_ids", given[0] if given else None)
        self._said = self._said + 1 if ids is not None and ids.shape[-1] == 1 else 0
        if self._said >= self.tokens - 1:
            output.logits[..., self.end] = output.logits.max() + 100
        elif self.tokens == LONG:
            output.logits[..., self.end] = output.logits.min()

    def remove(self) -> None:
        """Let the model answer as it would."""
        self._hook.remove()


class Model:
    """The embedded model, loaded once, in place of every model that a page loads by name."""

    def __init__(self) -> None:
        from winnowkv.models import load as models

        self.load = models.load
        self.model, self.tokenizer = self.load("embedded")
        self.short = ShortAnswers(self.model, self.tokenizer.eos_token_id)
        self._config = self.model.config.to_dict()

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """What loads a model by name returns this one. Folders that exist are loaded as ever."""
        import transformers

        import winnowkv
        from winnowkv.models import load as models

        def load(*given: Any, **named: Any) -> tuple[Any, Any]:
            bound = inspect.signature(self.load).bind(*given, **named)
            if Path(bound.arguments.get("name", "embedded")).is_dir():
                return self.load(*given, **named)
            return self.model, self.tokenizer

        def from_pretrained(kind: Any, value: Any) -> Callable[..., Any]:
            before = kind.from_pretrained

            def loaded(name: Any, *more: Any, **named: Any) -> Any:
                return before(name, *more, **named) if Path(name).is_dir() else value

            return loaded

        patch.setattr(winnowkv, "load", load)
        patch.setattr(models, "load", load)
        for kind, value in ((transformers.AutoModelForCausalLM, self.model), (transformers.AutoTokenizer, self.tokenizer)):
            patch.setattr(kind, "from_pretrained", from_pretrained(kind, value))

    def check_unchanged(self) -> None:
        """No page may leave another model to the next."""
        assert self.model.config.to_dict() == self._config
        assert list(self.model._forward_hooks) == [self.short._hook.id]


class Page:
    """A page that is followed: ``names`` are those of its Python, ``folder`` is where the reader stands.

    Every page has ``text``, a text of the reader's own, and the files of :func:`write_files`.
    """

    def __init__(self, folder: Path, winnow: Winnow, patch: pytest.MonkeyPatch, model: Model) -> None:
        self.folder, self.winnow, self.patch, self.model = folder, winnow, patch, model
        self.names: dict[str, Any] = {"__name__": "__main__", "text": TEXT}
        self.address: str | None = None
        self._stop: list[Callable[[], None]] = []
        write_files(folder)
        patch.chdir(folder)
        patch.setenv("COLUMNS", "120")
        model.stand_in(patch)

    def follow(self, block: Block) -> None:
        """Run a block, or check it if it says why it is not run. Raises BlockError with page and line."""
        if block.continues:
            self.follow(first_python(block))
        if block.language == "python":
            check_python(block)
            if not block.not_run:
                self.run_python(block)
        elif block.is_shell:
            self.run_shell(block)
        elif block.language:
            parse_data(block)
        elif not block.is_plain:
            raise BlockError(f"{block.where}: no rule for a block like this")

    def run_python(self, block: Block) -> None:
        """Run it where the page's earlier blocks have run."""
        text = self.reaching(block.text, block.where)
        self.model.short.tokens = LONG if all(part in text for part in LOOKING) else SHORT
        try:
            exec(compile("\n" * block.line + text, str(ROOT / block.page), "exec"), self.names)
        except Exception as error:
            raise BlockError(f"{block.where}: {type(error).__name__}: {error}") from error
        finally:
            self.model.short.tokens = SHORT

    def run_shell(self, block: Block) -> None:
        """Run its lines, or check those that are not run."""
        try:
            lines = command_lines(block)
        except ValueError as error:
            raise BlockError(str(error)) from error
        for name in block.left_out:
            if not any(line.begins((name,)) for line in lines):
                raise BlockError(f"{block.where}: no line of the block begins with {name!r}")
        for line in lines:
            if block.not_run and (not block.left_out or line.begins(block.left_out)):
                check_command(line)
            else:
                self.run_command(line)

    def run_command(self, line: CommandLine) -> None:
        """Run one command line.

        What makes and fills an environment is only checked, and so is ``make``; ``make serve`` is what its recipe says.
        """
        if line.name in ("source", ".") or line.words[1:3] == ("-m", "venv"):
            return
        if line.name in ("pip", "uv", "make"):
            check_command(line)
            for word in line.words[2:] if line.name == "pip" else ():
                self.install(ROOT / word)
            if line.words[:2] == ("make", "serve"):
                self.serve(*recipe("serve").split()[1:])
        elif line.words[:2] == ("winnow", "serve"):
            self.serve(*line.words[1:])
        elif line.name == "winnow":
            self.run_winnow(line)
        elif line.name == "curl":
            self.run_curl(line)
        elif line.name in ("python", "python3"):
            self.run_script(line)
        else:
            raise BlockError(f"{line.where}: no rule for {line.name}: say why it is not run, or what runs it")

    def install(self, project: Path) -> None:
        """The packages and entry points of a project in the repository, other than ours, are there as if installed."""
        if not (project / "pyproject.toml").is_file() or project == ROOT:
            return
        given = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        installed = self.folder / "installed"
        about = installed / f"{given['name'].replace('-', '_')}-{given['version']}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {given['name']}\nVersion: {given['version']}\n")
        groups = given.get("entry-points", {}).items()
        lines = [line for group, names in groups for line in (f"[{group}]", *(f"{a} = {b}" for a, b in names.items()))]
        (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for folder in (installed, project / "src"):
            self.patch.syspath_prepend(folder)
        registry._entries.cache_clear()

    def run_winnow(self, line: CommandLine) -> None:
        """Run the command in this process."""
        with self.patch.context() as patch:
            for name, value in line.variables.items():
                patch.setenv(name, value)
            code, out, err = self.winnow(*line.words[1:])
        if code:
            raise BlockError(f"{line.where}: {' '.join(line.words)} ended with {code}: {err.strip()}")
        if line.output:
            Path(line.output).write_text(out, encoding="utf-8")

    def run_curl(self, line: CommandLine) -> None:
        """Ask the page's server."""
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        words = [self.reaching(word, line.where) for word in line.words]
        self.run_process([*words, "--fail", "--silent", "--show-error"], line)

    def run_script(self, line: CommandLine) -> None:
        """Run a file of the repository in a process of its own."""
        words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in line.words[1:]]
        self.run_process([sys.executable, *words], line)

    def run_process(self, words: list[str], line: CommandLine) -> None:
        """Run a process, which must end well and print something."""
        path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
        variables = {**os.environ, "PYTHONPATH": path, **line.variables}
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=variables)
        if done.returncode or not done.stdout.strip():
            raise BlockError(f"{line.where}: {' '.join(line.words)} ended with {done.returncode}: {done.stderr.strip()}")

    def reaching(self, text: str, where: str) -> str:
        """The text with the address of the page's server in place of the one that the page names."""
        if not any(address in text for address in ADDRESSES):
            return text
        if self.address is None:
            raise BlockError(f"{where}: nothing on the page has started a server: a line `winnow serve` or `make serve` does")
        for address in ADDRESSES:
            text = text.replace(address, self.address)
        return text

    def serve(self, *words: str) -> None:
        """Run ``winnow serve`` with the page's options in a thread, on a port that is free."""
        self.stop()
        started = threading.Event()

        def run(settings: Any, model: str, device: Any, dtype: Any, bound: Any, address: str, as_json: bool) -> None:
            from winnowkv.cli.serve import build
            from winnowkv.serve.server import Server

            server = Server(build(model, device, dtype, settings, lambda serving: started.set()))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
            thread.start()
            self.address = address.removeprefix("http://")
            self._stop.append(lambda: stop(server, thread))

        with self.patch.context() as patch:
            patch.setattr("winnowkv.cli.serve.run", run)
            patch.setattr("winnowkv.serve.logs.set_up", lambda **given: None)
            code, _, err = self.winnow(*words, "--port", 0, "--store", self.folder / "store")
        if code:
            raise BlockError(f"winnow {' '.join(words)} ended with {code}: {err.strip()}")
        assert started.wait(SECONDS)

    def stop(self) -> None:
        """End the page's server."""
        while self._stop:
            self._stop.pop()()
        self.address = None


def stop(server: Any, thread: threading.Thread) -> None:
    """End a server in a thread."""
    server._events.call_soon_threadsafe(server.begin_stop)
    thread.join(SECONDS)
    assert not thread.is_alive()


@contextmanager
def following(folder: Path, winnow: Winnow, model: Model) -> Iterator[Page]:
    """A page to be followed in a folder; then its server ends, and the model is as it was."""
    with pytest.MonkeyPatch.context() as patch:
        page = Page(folder, winnow, patch, model)
        try:
            yield page
        finally:
            page.stop()
    registry._entries.cache_clear()  # what the page installed is gone
    model.check_unchanged()


def first_python(block: Block) -> Block:
    """The first Python block of the page that a block continues."""
    page = str(Path(block.page).parent / block.continues)
    if not (ROOT / page).is_file():
        raise BlockError(f"{block.where}: {page} is not there")
    return next(one for one in read_blocks(page) if one.language == "python")


def parse_data(block: Block) -> None:
    """A block of data is well formed; one in a language without a rule is an error."""
    if block.is_plain:
        return
    readers: dict[str, Callable[[str], Any]] = {
        "json": json.loads, "toml": tomllib.loads, "yaml": lambda text: list(yaml.safe_load_all(text)),
        "jsonl": lambda text: [json.loads(line) for line in text.splitlines() if line.strip()],
    }  # fmt: skip
    if block.language not in readers:
        raise BlockError(f"{block.where}: no rule for blocks of {block.language}")
    try:
        readers[block.language](block.text)
    except (ValueError, yaml.YAMLError) as error:
        raise BlockError(f"{block.where}: {error}") from error
