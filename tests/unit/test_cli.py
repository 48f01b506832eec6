"""The command line: what goes to stdout and what to stderr, exit codes, and that no one sees a traceback unasked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from bmojo_edge import checkpoint
from bmojo_edge.cli import app
from bmojo_edge.config import Config
from bmojo_edge.generate import generate
from bmojo_edge.parameters import parameter_shapes
from bmojo_edge.session import Session
from bmojo_edge.tokenizer import Tokenizer
from tests.helpers import random_weights
from tests.unit.fake_lm import FakeLM

ROOT = Path(__file__).parents[2]
MODULES = {name: sys.modules[f"bmojo_edge.cli.{name}"] for name in ("chat", "generate", "convert", "info")}


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [*arguments], input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def lm(byte_level_folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLM:
    """A model that every command gets, whichever it asks for."""
    fake = FakeLM(Tokenizer.load(byte_level_folder))
    for name in ("chat", "generate"):
        monkeypatch.setattr(MODULES[name], "open_model", lambda model: fake)
    return fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = Config.preset("tiny", n_sinks=4)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config).items()
    checkpoint.save(path, config, {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes})
    return path


# --- the program


def test_version_and_help() -> None:
    import bmojo_edge

    assert run("--version").stdout == f"bmojo-edge {bmojo_edge.__version__}\n"
    shown = run("--help")
    assert shown.exit_code == 0
    for command in ("chat", "generate", "convert", "info"):
        assert command in shown.stdout
        text = run(command, "--help").stdout
        assert "Examples" in text
        assert f"bmojo-edge {command}" in text
        assert "--debug" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["info"],
        ["info", ".", "--nope"],
        ["generate"],
        ["generate", "--prompt", "x", "--temp", "-1"],
        ["generate", "--prompt", "x", "--temp", "nan"],
        ["generate", "--prompt", "x", "--top-p", "1.5"],
        ["generate", "--prompt", "x", "--top-k", "a"],
        ["generate", "--prompt", "x", "--repetition-penalty", "0"],
        ["generate", "--prompt", "x", "--max-tokens", "-1"],
        ["generate", "--prompt", "x", "--stop", ""],
        ["chat", "--temp", "inf"],
        ["chat", "a", "b"],
        ["convert", "x"],
        ["convert", "x", "--out", "y", "--dtype", "int8"],
        ["convert", "x", "--out", "y", "-q", "--q-bits", "3"],
        ["convert", "x", "--out", "y", "--q-bits", "4"],
        ["convert", "x", "--out", "y", "--window", "0"],
    ],
)
def test_misuse_is_exit_code_2_and_computes_nothing(arguments: list[str], lm: FakeLM) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Usage: bmojo-edge" in result.stderr or "Invalid value" in result.stderr
    assert "Traceback" not in result.stderr
    assert lm.fed == []


def test_main_runs_in_a_process_of_its_own_and_stays_light() -> None:
    code = """
import sys
from bmojo_edge.cli import main
try:
    main()
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("bmojo-edge ")
    assert not set(done.stderr.split()) & {"numpy", "mlx", "torch", "tokenizers", "jinja2", "bmojo_convert"}


# --- failures


def test_a_failure_is_one_line_and_exit_code_1(folder: Path, tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none", "no such folder"), (tmp_path, "config.json"), (folder / "config.json", "")):
        result = run("info", str(path))
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith(f"error: {path}")
        assert says in result.stderr
        assert result.stderr.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("info", str(tmp_path), "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, checkpoint.CheckpointError)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("No module named 'mlx'", name="mlx.core"), "'mlx' is not installed. MLX runs on Apple"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "pip install 'bmojo-edge[torch]'"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "pip install x"),
        (PermissionError(13, "Permission denied", "file"), "Permission denied: 'file'"),
        (RuntimeError("[odd] thing"), "RuntimeError: [odd] thing (unexpected; --debug shows where)"),
        (ValueError("shapes"), "ValueError: shapes (unexpected"),
    ],
)
def test_errors_say_what_to_do(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> None:
        raise error

    monkeypatch.setattr(MODULES["generate"], "open_model", fail)
    result = run("generate", "--prompt", "x")
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stdout == ""


# --- info and convert


def test_info_tells_what_it_costs(folder: Path) -> None:
    config = Config.preset("tiny", n_sinks=4)
    facts = json.loads(run("info", str(folder), "--json").stdout)
    assert facts["special_case"] == "B'MOJO with sinks"
    assert (facts["layers"], facts["dtype"], facts["quantization"]) == (2, "float32", None)
    assert facts["weight_bytes"] == 4 * facts["parameters"]
    assert facts["state_bytes"] == config.state_bytes()
    assert (facts["growing_layers"], facts["state_bytes_per_1k_tokens"]) == ([], 0)
    shown = run("info", str(folder)).stdout
    assert f"({config.state_bytes():,} bytes), for ever" in shown
    assert "B'MOJO with sinks" in shown


def test_info_names_layers_that_grow(tmp_path: Path) -> None:
    config = Config.preset("tiny", layer_types=("attention", "bmojo"), ssm=None, n_eidetic=0, dtype="float16")
    shapes = parameter_shapes(config).items()
    checkpoint.save(tmp_path / "m", config, {name: np.zeros(shape, np.float16) for name, shape in shapes})
    facts = json.loads(run("info", str(tmp_path / "m"), "--json").stdout)
    assert facts["growing_layers"] == [0]
    assert facts["state_bytes_per_1k_tokens"] == 1000 * 2 * config.kv_heads * config.d_head * 2
    shown = " ".join(run("info", str(tmp_path / "m")).stdout.split())
    assert "for every 1,000 tokens: 1 of 2 layers attend to everything (layer 0)" in shown
    assert f"({config.state_bytes():,} bytes), for ever, and " in shown


def test_info_of_a_hybrid_with_experts(tmp_path: Path) -> None:
    """It names the special case, what grows and where, and counts the experts."""
    experts = {"n": 4, "per_token": 2, "layers": [1, 3]}
    config = Config.preset(
        "tiny", layer_types=("mamba", *["attention"] * 3, "mamba", "attention"), n_eidetic=0, experts=experts
    )
    checkpoint.save(tmp_path / "m", config, random_weights(config))
    facts = json.loads(run("info", str(tmp_path / "m"), "--json").stdout)
    assert facts["special_case"] == "hybrid of 2 Mamba layers, 4 Transformer layers"
    assert facts["experts"] == experts
    assert facts["growing_layers"] == [1, 2, 3, 5]
    assert facts["state_bytes"] == config.state_bytes()
    # Keys and values of 4 layers, 1,000 tokens.
    assert facts["state_bytes_per_1k_tokens"] == 4 * 2 * 1000 * config.kv_heads * config.d_head * 4
    shown = " ".join(run("info", str(tmp_path / "m")).stdout.split())
    assert "4 of 6 layers attend to everything (layers 1-3, 5)" in shown
    assert "4, 2 a token, in layers 1, 3" in shown


def test_convert_passes_its_options_and_shows_the_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bmojo_convert

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def fake(*args: Any, **options: Any) -> Path:
        calls.append((args, options))
        options.pop("progress")("weights", 1, 2)
        return folder

    monkeypatch.setattr(bmojo_convert, "convert", fake)
    memories = ["--window", "64", "--sinks", "2", "--eidetic", "8"]
    result = run("convert", "a/b", "--out", "o", *memories, "--dtype", "bfloat16", "-q", "--q-bits", "8")
    assert result.exit_code == 0, result.output
    assert "B'MOJO with sinks" in result.stdout
    expected = {"window": 64, "sinks": 2, "fading": None, "eidetic": 8, "chunk": None, "dtype": "bfloat16"}
    assert calls == [(("a/b", Path("o")), expected | {"q_bits": 8, "q_group_size": 64, "overwrite": False})]
    run("convert", "x", "--out", "o", "-q", "--q-group-size", "32", "--overwrite")
    run("convert", "x", "--out", "o")
    assert [(c["q_bits"], c["q_group_size"], c["overwrite"]) for _, c in calls[1:]] == [
        (4, 32, True),
        (None, 64, False),
    ]


def test_convert_of_something_that_is_not_there(tmp_path: Path) -> None:
    result = run("convert", str(tmp_path / "none"), "--out", str(tmp_path / "o"))
    assert result.exit_code == 1
    assert "none" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "o").exists()


# --- generate


def test_generate_prints_the_answer_and_nothing_else(lm: FakeLM) -> None:
    result = run("generate", "--prompt", "The river", "--max-tokens", "9")
    assert result.exit_code == 0, result.output
    assert result.stdout == generate(lm, "The river", max_tokens=9) + "\n"
    assert "tokens read" in result.stderr


def test_generate_json(lm: FakeLM) -> None:
    options = [
        "--max-tokens",
        "9",
        "--temp",
        "0.9",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--min-p",
        "0.01",
        "--seed",
        "3",
    ]
    result = json.loads(run("generate", "-p", "The river", *options, "--json").stdout)
    text = generate(lm, "The river", max_tokens=9, temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, seed=3)
    assert result["text"] == text
    assert len(result["tokens"]) == len(result["logprobs"]) == result["completion_tokens"] <= 9
    assert result["prompt_tokens"] == len(lm.fed[0])
    assert result["finish_reason"] in ("stop", "length")
    nothing = json.loads(run("generate", "-p", "x", "--max-tokens", "0", "--json").stdout)
    assert (nothing["text"], nothing["tokens"], nothing["finish_reason"]) == ("", [], "length")


def test_generate_reads_stdin_and_chats(lm: FakeLM) -> None:
    assert lm.tokenizer is not None
    run("generate", "--prompt", "-", "--max-tokens", "1", stdin="the\nriver 中\n")
    run("generate", "--prompt", "hello", "--max-tokens", "1", "--chat")
    assert lm.fed == [
        lm.tokenizer.encode("the\nriver 中"),
        lm.tokenizer.chat([{"role": "user", "content": "hello"}]),
    ]
    result = run("generate", "--prompt", "-", stdin=b"a\xff")
    assert result.exit_code == 1
    assert "stdin: is not UTF-8 text at byte 1" in result.stderr


def test_generate_stops_at_any_of_several_strings(lm: FakeLM) -> None:
    assert lm.tokenizer is not None
    prompt = "The river"
    lm.says([*lm.tokenizer.encode_continuation(" runs to the sea"), 2], len(lm.tokenizer.encode(prompt)))
    assert run("generate", "-p", prompt, "--stop", "sea", "--stop", "the").stdout == " runs to \n"


# --- chat


def test_one_answer_for_a_script(lm: FakeLM) -> None:
    result = run("chat", "--prompt", "hello", "--system", "Be brief.", "--max-tokens", "8")
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(Session(lm, system="Be brief.").say("hello", max_tokens=8)) + "\n"
    assert "position" in result.stderr
    assert "constant" in result.stderr


def test_a_conversation_from_a_pipe(lm: FakeLM) -> None:
    result = run("chat", "--max-tokens", "5", "--temp", "0", stdin="hello\n\n  why?  \n")
    ref = Session(lm)
    assert result.stdout == "".join("".join(ref.say(text, max_tokens=5)) + "\n" for text in ("hello", "why?"))
    assert result.exit_code == 0
    assert f"position {ref.position:,} " in result.stderr
    assert "cut at 5 tokens" in result.stderr


def test_a_conversation_is_sampled_and_a_seed_repeats_it(lm: FakeLM) -> None:
    first, again, other = (run("chat", "--seed", seed, stdin="hello\n").stdout for seed in "112")
    assert first == again != other
    assert first == "".join(Session(lm).say("hello", max_tokens=512, temperature=0.6, top_p=0.9, seed=1)) + "\n"


def test_slash_commands(lm: FakeLM) -> None:
    lines = [
        "/help",
        "one",
        "two",
        "/rewind",
        "/rewind 5",
        "/rewind x",
        "/nothing",
        "/reset",
        "/rewind",
        "/exit",
        "three",
    ]
    result = run("chat", "--max-tokens", "2", stdin="\n".join(lines))
    assert result.exit_code == 0
    for says in (
        "/rewind [N]",
        "between 0 and the 1 there are",
        "takes a number of exchanges, got 'x'",
        "/nothing: no such command",
        "the 0 there are",
    ):
        assert says in result.stderr
    assert len([call for call in lm.fed if len(call) > 1]) == 2  # "three" was never said
    positions = [line.split()[1] for line in result.stderr.splitlines() if line.startswith("position")]
    assert positions[0] == positions[2] != positions[1]


def test_models_that_cannot_chat_fail_before_the_first_question(lm: FakeLM) -> None:
    assert lm.tokenizer is not None
    lm.tokenizer = Tokenizer(lm.tokenizer._backend)
    result = run("chat", stdin="hello\n")
    assert result.exit_code == 1
    assert "no chat template" in result.stderr


def test_a_text_the_template_refuses_does_not_end_the_conversation(lm: FakeLM) -> None:
    assert lm.tokenizer is not None
    template = "{% if messages[-1].content == 'bad' %}{{ raise_exception('not that') }}{% endif %}x"
    lm.tokenizer = Tokenizer(lm.tokenizer._backend, chat_templates={"default": template})
    result = run("chat", "--max-tokens", "1", stdin="bad\ngood\n")
    assert "not that" in result.stderr
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1


CHAT = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from bmojo_edge.cli import chat, main
from bmojo_edge.tokenizer import Tokenizer
from tests.helpers import random_weights
from tests.unit.fake_lm import FakeLM

class Slow(FakeLM):
    def prefill(self, tokens, state, lengths=None):
        if len(self.fed) in {interrupts!r}:
            os.kill(os.getpid(), signal.SIGINT)
        return super().prefill(tokens, state)

chat.open_model = lambda model: Slow(Tokenizer.load(Path({folder!r})))
main()
"""


@pytest.fixture
def process(byte_level_folder: Path) -> Iterator[Any]:
    """Starts `bmojo-edge chat` on the fake model; Ctrl-C comes in its n-th call for n in `interrupts`."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, interrupts: tuple[int, ...] = ()) -> subprocess.Popen[str]:
        code = CHAT.format(root=str(ROOT), folder=str(byte_level_folder), interrupts=interrupts)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, "chat", *arguments],
                cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_ctrl_c_stops_the_answer_and_not_the_program(process: Any) -> None:
    child = process("--max-tokens", "9", interrupts=(4,))
    out, err = child.communicate("hello\nwhy?\n", timeout=60)
    assert child.returncode == 0, err
    assert "stopped" in err
    assert len([line for line in err.splitlines() if line.startswith("position")]) == 2
    assert "Traceback" not in err
    assert len(out.splitlines()) >= 2


def test_ctrl_c_at_once_after_ctrl_c_ends_the_program(process: Any) -> None:
    child = process("--max-tokens", "100000", interrupts=(3,))
    child.stdin.write("hello\n")
    child.stdin.flush()
    line = child.stderr.readline()
    assert "stopped" in line
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 0


def test_ctrl_c_with_a_prompt_is_130(process: Any) -> None:
    child = process("--prompt", "hello", interrupts=(2,))
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err


# --- chat in a file


def test_a_session_file_goes_on_where_it_was(lm: FakeLM, tmp_path: Path) -> None:
    file = tmp_path / "a.bmojo"
    first = run("chat", "--session", str(file), "--system", "Be brief.", "--max-tokens", "4", stdin="hello\nwhy?\n")
    assert first.exit_code == 0, first.output
    assert "resumed" not in first.stderr
    saved = Session.open(file, lm)
    assert [turn.user for turn in saved.turns] == ["hello", "why?"]
    again = run("chat", "--session", str(file), "--max-tokens", "4", "--temp", "0", stdin="/rewind\nand?\n")
    assert f"resumed at position {saved.position:,}, after 'why?'" in again.stderr
    assert [turn.user for turn in Session.open(file, lm).turns] == ["hello", "and?"]
    once = run("chat", "--session", str(file), "--prompt", "once", "--max-tokens", "4")
    assert once.exit_code == 0
    assert [turn.user for turn in Session.open(file, lm).turns] == ["hello", "and?", "once"]
    assert once.stdout == Session.open(file, lm).turns[-1].answer + "\n"


def test_another_programs_writing_is_not_overwritten(
    lm: FakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, say = tmp_path / "a.bmojo", Session.say

    def meanwhile(self: Session, text: str, **options: Any) -> Iterator[str]:
        if text == "two":
            twin = Session.open(file, lm)
            list(say(twin, "elsewhere", max_tokens=1))
            twin.save(file)
        return say(self, text, **options)

    monkeypatch.setattr(Session, "say", meanwhile)
    lines = ["one", "two", f"/save {tmp_path / 'b.bmojo'}", "/reset", "three"]
    result = run("chat", "--session", str(file), "--max-tokens", "2", stdin="\n".join(lines))
    assert result.stderr.count("was written by another program") == 1
    assert "b.bmojo stays as it is" in " ".join(result.stderr.split())
    said = [[turn.user for turn in Session.open(tmp_path / name, lm).turns] for name in ("a.bmojo", "b.bmojo")]
    assert said == [["one", "elsewhere"], ["one", "two"]]


def test_a_transcript_is_appended_beside_the_session(lm: FakeLM, tmp_path: Path) -> None:
    file, beside = tmp_path / "a.bmojo", tmp_path / "a.bmojo.jsonl"
    chat = ["chat", "--session", str(file), "--transcript", "--max-tokens", "3"]
    run(*chat, stdin="one\n/rewind\n中\n")
    with beside.open("a") as torn:
        torn.write('{"position": 1')  # a process was killed here
    run(*chat, "--prompt", "three")
    lines = beside.read_text().splitlines()
    said = [json.loads(line) for line in (*lines[:2], lines[3])]
    assert [line["user"] for line in said] == ["one", "中", "three"]
    assert said[-1]["answer"] == Session.open(file, lm).turns[-1].answer
    assert said[-1]["position"] == Session.open(file, lm).position
    assert run("chat", "--transcript").exit_code == 2


def test_a_session_file_is_refused_by_name(lm: FakeLM, tmp_path: Path) -> None:
    file = tmp_path / "a.bmojo"
    run("chat", "--session", str(file), "--system", "Be brief.", "--max-tokens", "1", stdin="hello\n")
    result = run("chat", "--session", str(file), "--system", "Be long.", stdin="hello\n")
    assert result.exit_code == 2
    assert "has another system message" in result.stderr
    file.write_bytes(file.read_bytes()[:-100])
    result = run("chat", "--session", str(file), stdin="hello\n")
    assert result.exit_code == 1
    assert f"error: {file}: is no session file, or truncated or damaged" in result.stderr
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert run("chat", "--session", str(notes), stdin="hello\n").exit_code == 1
    assert notes.read_text() == "mine"


def test_commands_of_a_conversation_in_files(lm: FakeLM, tmp_path: Path) -> None:
    main, copy, other = (tmp_path / name for name in ("main.bmojo", "copy.bmojo", "other.bmojo"))
    lines = [
        "one", "two", "/edit TWO", "/edit 2 ONE", "/regenerate", f"/fork {copy}", "in the copy", "/back", "/back",
        f"/save {other}", "three", f"/open {copy}", "four", "/save", f"/save {other}", f"/fork {main}",
        "/edit", "/rewind 99", "/open nowhere", "/fork",
        "unsaved", "/exit",
    ]  # fmt: skip
    result = run("chat", "--session", str(main), "--max-tokens", "2", stdin="\n".join(lines))
    assert result.exit_code == 0, result.output
    said = {path.stem: [turn.user for turn in Session.open(path, lm).turns] for path in (main, copy, other)}
    assert said == {"main": ["ONE"], "copy": ["ONE", "in the copy", "four"], "other": ["ONE", "three"]}
    for says in (
        "other.bmojo: exists", "main.bmojo: exists",
        "saved in", "/back leads nowhere", "/save needs the name", "/edit needs the text", "between 0 and the 3",
        "nowhere", "not saved; /save FILE keeps it", "resumed at position",
    ):  # fmt: skip
        assert says in result.stderr, says


def test_a_file_that_cannot_be_written_is_named_before_the_first_question(lm: FakeLM, tmp_path: Path) -> None:
    result = run("chat", "--session", str(tmp_path / "no" / "a.bmojo"), stdin="one\n")
    assert result.exit_code == 1
    assert "no/" in result.stderr
    assert lm.fed == []


def test_a_save_that_fails_does_not_end_the_conversation(
    lm: FakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saves = Session.save, []

    def full(self: Session, path: Any) -> None:
        saves.append(path)
        if len(saves) in (2, 3):
            raise OSError(28, "No space left on device")
        save(self, path)

    monkeypatch.setattr(Session, "save", full)
    result = run("chat", "--session", str(tmp_path / "a.bmojo"), "--max-tokens", "2", stdin="one\ntwo\nthree\n")
    assert result.exit_code == 0
    assert result.stderr.count("not saved: [Errno 28] No space left on device") == 2
    assert len(Session.open(tmp_path / "a.bmojo", lm).turns) == 3


# --- inspect


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, byte_level_folder: Path) -> Path:
    """A model folder of all memories whose tokenizer can chat."""
    path = tmp_path_factory.mktemp("talker") / "m"
    size = Tokenizer.load(byte_level_folder).vocab_size
    config = Config.preset("tiny", vocab_size=size, n_sinks=2, window=16, n_eidetic=8, layer_types=("bmojo", "mamba"))
    checkpoint.save(path, config, random_weights(config), byte_level_folder)
    return path


def test_inspect_a_session(talker: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.bmojo"
    asked = ["chat", str(talker), "--session", str(file), "--max-tokens", "5", "--temp", "0"]
    shown = run(*asked, stdin="The river runs to the sea, and back.\n/memory\n").stderr
    found = json.loads(run("inspect", str(file), "--json").stdout)
    assert [layer["kind"] for layer in found["layers"]] == ["bmojo", "mamba"]
    kept = found["layers"][0]["eidetic"]
    assert len(kept) == 8
    assert [k["position"] for k in kept] == sorted(k["position"] for k in kept)
    tokenizer = Tokenizer.load(talker)
    ids = tokenizer.chat([{"role": "user", "content": "The river runs to the sea, and back."}])
    for k in (*kept, *found["layers"][0]["sinks"]):
        assert k["id"] == ids[k["position"]]
        assert k["text"] == tokenizer.decode([k["id"]])
        assert k["age"] == found["position"] - 1 - k["position"]
    assert [k["innovation"] for k in found["layers"][0]["sinks"]] == [None, None]
    assert min(k["innovation"] for k in kept) > 0
    assert sum(found["attention"].values()) == pytest.approx(1)
    assert found["attention"] == found["layers"][0]["attention"]
    assert all(found["attention"][name] > 0 for name in ("window", "fading", "eidetic", "sinks"))
    assert found["attention"]["storage"] == 0
    assert found["queries"] == 5
    assert "attention of the last answer (5 tokens, mean of all layers): window" in " ".join(shown.split())
    table = " ".join(run("inspect", str(file), "--all").stdout.split())
    assert all(f"@{k['position']:,} {k['innovation']:.2f} {k['age']:,}" in table for k in kept)


def test_inspect_a_text(talker: Path) -> None:
    found = json.loads(run("inspect", str(talker), "--prompt", "The river runs to the sea. " * 5, "--json").stdout)
    assert len(found["layers"][0]["eidetic"]) == 8
    assert found["queries"] == 1
    assert sum(found["attention"].values()) == pytest.approx(1)


def test_inspect_says_what_it_needs(lm: FakeLM, talker: Path, tmp_path: Path) -> None:
    Session(lm).save(tmp_path / "a.bmojo")
    Session(lm).save(tmp_path / "b.bmojo")
    for arguments in ([str(talker)], [str(talker), "-p", "x", "-m", "y"], [str(tmp_path / "a.bmojo"), "-p", "x"]):
        assert run("inspect", *arguments).exit_code == 2
    assert run("inspect", str(tmp_path / "none")).exit_code == 1
    result = run("inspect", str(tmp_path / "a.bmojo"), "--model", str(talker))
    assert result.exit_code == 1
    assert "in the session and" in result.stderr
