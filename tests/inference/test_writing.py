"""What is written depends on the request's own session and seed, and ends where it should."""

import numpy as np
import pytest

from tests.inference.test_engine import make_engine
from tests.small import worst
from tttjax.data.tokenizers import IdsTokenizer
from tttjax.errors import UserError
from tttjax.inference.sampling import Sampling
from tttjax.inference.writing import Request, Transcript, Writer


class Letters(IdsTokenizer):
    """Tokens 0..10 as letters; 10 ends."""

    def __init__(self):
        super().__init__(11, None, 10)

    def decode(self, tokens):
        return "".join(chr(97 + int(token)) for token in tokens if token != 10)


class Bytes(Letters):
    def decode(self, tokens):
        return bytes(int(token) for token in tokens).decode(errors="replace")


def requests(engine, token, number, **options):
    found = []
    for r in range(number):
        prompt = token[r % 2, : 3 + r]
        session, _ = engine.read(engine.start(), prompt)
        options = {"max_tokens": 3 + 2 * r, "seed": r, "prompt": prompt, **options}
        found.append(Request(session, Sampling(repetition_penalty=1.2), **options))
    return found


def test_alone_or_with_others_the_same_is_written():
    engine, token = make_engine("ttt_e2e")
    wanted = requests(engine, token, 3)
    together = Writer(engine, Letters(), wanted)
    pieces = list(together)
    for r, request in enumerate(wanted):
        alone = Writer(engine, Letters(), [request])
        mine = [piece for piece in pieces if piece.request == r]
        assert [p.token for p in mine] == [p.token for p in alone]
        assert mine[-1].finished in ("length", "eos")
        assert len(mine) <= request.max_tokens
        text = "".join(piece.text for piece in mine)
        assert text == Letters().decode([piece.token for piece in mine])
        # The session has read all that was written.
        session = together.sessions[r]
        assert session.tokens == request.session.tokens + len(mine)
        read, _ = engine.read(request.session, np.array([p.token for p in mine]))
        assert worst(session.learned.fast, read.learned.fast) < 1e-5
        assert worst(session.logit_V, read.logit_V) < 1e-4


def test_what_is_written_need_not_be_learned():
    engine, token = make_engine("ttt_e2e")
    (request,) = requests(engine, token, 1, max_tokens=9)
    for learn in (True, False):
        writer = Writer(engine, Letters(), [request], learn=learn)
        assert len(list(writer)) == 9
        (session,) = writer.sessions
        assert len(session.pending) == 4
        drift = worst(session.learned.fast, engine.start().learned.fast)
        assert drift > 0  # the first chunk has two targets that were read
        if learn:
            learned = drift
    assert drift != learned


def test_a_stop_string_ends_it_and_is_not_shown():
    text = Transcript(Letters(), ["cd", "x"])
    shown = [text.add(token) for token in (0, 2, 2, 1, 2, 3)]
    assert shown == [
        ("a", False),
        ("", False),
        ("c", False),
        ("cb", False),
        ("", False),
        ("", True),
    ]
    other = Transcript(Letters(), ["bcd"])
    assert [other.add(t) for t in (1, 2)] == [("", False)] * 2
    assert other.rest() == "bc"


def test_a_character_is_shown_when_it_is_whole():
    text = Transcript(Bytes(), [])
    assert [text.add(b)[0] for b in "aé☃".encode()] == ["a", "", "é", "", "", "☃"]
    broken = Transcript(Bytes(), [])
    assert broken.add(0xC3) == ("", False)
    assert broken.rest() == "\ufffd"


def test_impossible_requests_are_refused():
    engine, token = make_engine("static")
    with pytest.raises(UserError, match="a prompt needs at least one token"):
        Writer(engine, Letters(), [Request(engine.start())])
    (request,) = requests(engine, token, 1, max_tokens=0)
    with pytest.raises(UserError, match="max_tokens=0"):
        Writer(engine, Letters(), [request])
