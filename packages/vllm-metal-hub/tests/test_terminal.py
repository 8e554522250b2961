import io

import pytest
from rich.console import Console

from vllm_metal_hub.terminal import FlowingText, StageDisplay, seconds_text


def console(terminal, width=20):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def flow(pieces, terminal):
    screen = console(terminal)
    text = FlowingText(screen)
    for piece in pieces:
        text.write(piece)
    text.end()
    return screen.file.getvalue()


def test_lines_break_between_words_on_a_terminal():
    assert flow(["The sk", "y is blue bec", "ause of it"], True) == "The sky is blue \nbecause of it\n"


def test_text_is_left_alone_elsewhere():
    assert flow(["The sky is [bold] and ", "much longer than a line"], False).startswith(
        "The sky is [bold] and much longer than a line"
    )


def test_stages_are_plain_lines_elsewhere():
    screen = console(False, width=80)
    with StageDisplay(screen, "x") as display:
        display.show("one")
        display.show("one")
        display.show("two")
    lines = screen.file.getvalue().splitlines()
    assert lines[0] == "x …"
    assert [line.split("s  ")[1] for line in lines[1:]] == ["one", "two"]


@pytest.mark.parametrize(("seconds", "text"), [(0.0851, "85 ms"), (2.14, "2.1 s")])
def test_durations(seconds, text):
    assert seconds_text(seconds) == text
