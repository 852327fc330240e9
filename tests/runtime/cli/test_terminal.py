"""What a terminal shows, seen through a terminal emulator: the answer once, whatever scrolled, was resized,
or was interrupted."""

from __future__ import annotations

import json
import random
import sys

import pytest
from demo import PLAN, PROMPT, demo_task
from places import ROOT
from pseudo_terminal import Session
from screens import _Screen, bare, wrapped

from trt_runtime.system import screen

PROGRAM = (sys.executable, "-m", "trt_runtime.cli")


def _play(monkeypatch, seed, resizing):
    """A random answer, unmasked in a random order; the screen after it, and the answer."""
    monkeypatch.setattr(screen, "size_of", lambda out: out.size)
    rng = random.Random(seed)
    lines = rng.choice([3, 4, 6, 10, 24])
    out = _Screen(rng.choice([11, 20, 40, 60, 80]), lines)
    letters = (
        "abcdefgh ijkl"
        + ("日本語漢字" if seed % 2 else "")
        + ("\n" if seed % 3 == 0 else "")
        + ("🙂" if seed % 7 == 0 else "")
    )
    tokens = [
        "".join(rng.choice(letters) for _ in range(rng.randrange(1, 7))) for _ in range(rng.randrange(1, 60))
    ]
    if seed % 5 == 0:
        tokens = [token.replace("a", "e\u0301") for token in tokens]
    live, done = screen.Live(out), [False] * len(tokens)
    for start in range(0, len(tokens), 8):
        left = list(range(start, min(start + 8, len(tokens))))
        rng.shuffle(left)
        while left:
            new, left = set(left[:2]), left[2:]
            done = [was or i in new for i, was in enumerate(done)]
            gap = done.index(False) if False in done else len(done)
            spans = [
                (token, screen.BRIGHT if i in new else screen.PLAIN) if done[i] else ("░", screen.DIM)
                for i, token in enumerate(tokens)
            ]
            live.show(spans, sum(map(len, tokens[:gap])))
            if resizing and rng.random() < 0.15:
                out.resize(
                    rng.choice([11, 20, 40, 60, 80]), rng.choice([lines, lines + 3, max(2, lines - 2)])
                )
    live.finish("".join(tokens))
    return out, "".join(tokens)


def test_random_answers_are_on_the_screen_once(monkeypatch):
    for seed in range(200):
        out, text = _play(monkeypatch, seed, resizing=False)
        assert bare(out.terminal.text()) == bare(text), seed
        if seed % 5:  # elsewhere what is combined stays out of the last column
            assert out.terminal.text() == "\n".join(wrapped(text, out.size[0])).strip("\n"), seed


def test_resizing_leaves_nothing_behind(monkeypatch):
    for seed in range(200):
        out, text = _play(monkeypatch, seed, resizing=True)
        assert bare(out.terminal.text()) == bare(text), seed


def test_only_what_changed_is_written(monkeypatch):
    monkeypatch.setattr(screen, "size_of", lambda out: out.size)
    out = _Screen(60, 10)
    live = screen.Live(out)
    words = [f"word{i} " for i in range(40)]
    live.show([("".join(words), screen.PLAIN), ("░" * 30, screen.DIM)], 200)
    before = len(out.terminal.received)
    live.show([("".join(words), screen.PLAIN), ("░" * 30, screen.DIM)], 200)
    assert len(out.terminal.received) == before
    live.show([("".join(words), screen.PLAIN), ("░" * 29, screen.DIM), ("x", screen.BRIGHT)], 200)
    assert len(out.terminal.received) - before < 40
    live.finish("".join(words))


def test_control_characters_of_an_answer_move_nothing(monkeypatch):
    monkeypatch.setattr(screen, "size_of", lambda out: out.size)
    out = _Screen(60, 10)
    screen.Live(out).finish("one\x1b[2Jtwo\rthree\x07\tfour")
    assert (
        out.terminal.text() == "one\ufffd[2Jtwothree\ufffd        four"
        and "\x1b[2J" not in out.terminal.received
    )


@pytest.mark.parametrize("resized", [None, (40, 10), (80, 10), (33, 6), (70, 20)])
def test_a_long_answer_scrolls_out_once(tmp_path, resized):
    """400 tokens on 60x10, wide characters among them, the terminal resized in the middle."""
    rng = random.Random(1)
    words = ["red ", "cups", " 日本", "語 ", "ga", "rage", ", ", "e\u0301t", "🙂", ".\n", "kitchen "]
    tokens = [rng.choice(words) for _ in range(400)]
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    session = Session(
        sys.executable,
        ROOT / "tests" / "helpers" / "streamer.py",
        tmp_path / "tokens.json",
        32,
        PYTHONPATH=str(ROOT),
    )
    session.until(lambda terminal: "waiting" in terminal.received)
    if resized:
        session.resize(*resized)
    session.send("typed meanwhile\n")  # is not shown, and what the program waits for
    assert session.end() == 0
    said, _, summary = session.terminal.text().rpartition("[")
    assert bare(said) == bare("".join(tokens)) and "forwards" in summary
    if resized is None:
        assert len(session.terminal.received) < 40_000
        assert len(session.terminal.rows()) < len(wrapped("".join(tokens), 60)) + 15


def test_masks_turn_into_text_on_a_terminal(demo_artifact):
    session = Session(*PROGRAM, "generate", demo_artifact, PROMPT, "--stream", columns=70, lines=12)
    session.until(lambda terminal: terminal.text().count("░") > 20)
    assert session.end() == 0
    answer, _, summary = session.terminal.text().rpartition("\n[")
    assert demo_task.is_right(answer.replace("\n", ""), PLAN) and "░" not in answer
    assert "\x1b[1;32m" in session.terminal.received and "forwards" in summary
    assert session.terminal.received.count("\x1b[?25l") == session.terminal.received.count("\x1b[?25h") == 1


def test_a_dumb_terminal_gets_plain_text(demo_artifact):
    session = Session(
        *PROGRAM, "generate", demo_artifact, "clean hall with mop", "--stream", "-q", TERM="dumb"
    )
    assert session.end() == 0
    assert (
        "\x1b" not in session.terminal.received
        and session.terminal.text() == '[{"do": "clean", "in": "hall", "with": "mop"}]'
    )


def test_no_colour_where_the_user_wants_none(demo_artifact):
    session = Session(
        *PROGRAM, "generate", demo_artifact, "clean hall with mop", "--stream", "-q", NO_COLOR="1"
    )
    assert session.end() == 0
    assert "\x1b[1m" in session.terminal.received and "\x1b[1;3" not in session.terminal.received


def test_unknown_words_move_nothing_and_are_few(demo_artifact, capsys):
    from trt_runtime.cli import main as cli

    prompt = " ".join(["clean\x1b[2Jhall", "\x07", *(f"zz{i}" for i in range(50)), "w" * 5000])
    assert cli.main(["generate", str(demo_artifact), "clean hall " + prompt, "--gen-length", "8"]) in (0, 1)
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning.startswith("warning: not in") and warning.endswith("more") and len(warning) < 1000
    assert "\x1b" not in warning and "\x07" not in warning


@pytest.fixture
def talk(demo_artifact, tmp_path):
    """A conversation on a terminal."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\nfrom trt_runtime.cli import main as cli\nfrom trt_runtime.model import "
        "Model\nstream = Model.stream\n"
        "def slow(self, *given, **options):\n    for i, update in enumerate(stream(self, *given, "
        "**options)):\n        yield update\n"
        "        print(end='', flush=True)\n        time.sleep(0.3 if 'slow' in str(given[0]) else 0)\n"
        "Model.stream = slow\nsys.exit(cli.main())\n"
    )
    sessions = []

    def begin():
        sessions.append(
            Session(
                sys.executable,
                script,
                "chat",
                demo_artifact,
                "--single-turn",
                columns=100,
                lines=24,
                XDG_STATE_HOME=str(tmp_path / "state"),
                PYTHONPATH=str(ROOT),
            )
        )
        sessions[-1].until(lambda terminal: ">" in terminal.rows())
        return sessions[-1]

    yield begin
    for session in sessions:
        if session.process.poll() is None:
            session.process.kill()
            session.process.wait()


def _prompts(terminal):
    return [row for row in terminal.rows() if row.startswith(">")]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(talk):
    session = talk()
    session.send("slow clean hall with mop\n")
    session.until(lambda terminal: "░" in terminal.text())
    session.interrupt()
    session.until(lambda terminal: "[stopped]" in terminal.text() and _prompts(terminal)[-1] == ">")
    session.send("clean hall with mop\n")
    session.until(
        lambda terminal: (
            '[{"do": "clean", "in": "hall", "with": "mop"}]' in terminal.text()
            and _prompts(terminal)[-1] == ">"
        )
    )
    session.send("\x04")
    assert session.end() == 0
    assert "Traceback" not in session.terminal.text() and "░" not in session.terminal.text()


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_ends(talk):
    session = talk()
    session.send("half a line")
    session.until(lambda terminal: "> half a line" in terminal.rows())
    session.interrupt()
    session.until(lambda terminal: _prompts(terminal)[-1] == ">" and "Ctrl-C again" in terminal.text())
    session.send("/help\n")
    session.until(lambda terminal: "/reset" in terminal.text() and _prompts(terminal)[-1] == ">")
    session.interrupt()
    session.until(
        lambda terminal: terminal.text().count("Ctrl-C again") == 2 and _prompts(terminal)[-1] == ">"
    )
    session.interrupt()
    assert session.end() == 0
    assert "Traceback" not in session.terminal.text()


def test_lines_are_remembered_from_one_conversation_to_the_next(talk, tmp_path):
    session = talk()
    session.send("clean hall with mop\n")
    session.until(lambda terminal: '"mop"}]' in terminal.text() and _prompts(terminal)[-1] == ">")
    session.send("/exit\n")
    assert session.end() == 0
    file = tmp_path / "state" / "dllm-trt" / "chat_history"
    assert (
        file.read_text().splitlines()[-2:] == ["clean hall with mop", "/exit"]
        and file.stat().st_mode & 0o077 == 0
    )
    session = talk()
    session.send("\x1b[A\x1b[A")  # up, up
    session.until(lambda terminal: "> clean hall with mop" in terminal.rows())
    session.send("\x7f\x7f\x7fbroom\n")  # edited
    session.until(lambda terminal: '"broom"}]' in terminal.text() and _prompts(terminal)[-1] == ">")
    session.send("\x04")
    assert session.end() == 0
