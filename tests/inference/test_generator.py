"""What is written depends on the request's own session and seed, and ends where it should."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.families import SCRIPTS
from helpers.inference import make_engine
from helpers.small import worst

from tttjax.data.tokenizers.base import ByteTokenizer, IdsTokenizer
from tttjax.errors import UserError
from tttjax.inference.generator import Generator, Request, Transcript
from tttjax.inference.sampling import Sampling


class Letters(IdsTokenizer):
    """Tokens 0..10 as letters; 10 ends."""

    def __init__(self):
        super().__init__(11, None, 10)

    def bytes_after(self, token, previous):
        return None if token == 10 else bytes((97 + token,))


class Numbers(IdsTokenizer):
    """Numbers with a blank before each but the first; 0 begins and has no text."""

    def __init__(self):
        super().__init__(11, 0, None)

    def bytes_after(self, token, previous):
        return super().bytes_after(token, previous) if token else None


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
    start_batch = Generator(engine, Letters(), wanted)
    pieces = list(start_batch)
    for r, request in enumerate(wanted):
        alone = Generator(engine, Letters(), [request])
        mine = [piece for piece in pieces if piece.request == r]
        assert [p.token for p in mine] == [p.token for p in alone]
        assert mine[-1].finished in ("length", "eos")
        assert len(mine) <= request.max_tokens
        text = "".join(piece.text for piece in mine)
        assert text == Letters().decode([piece.token for piece in mine])
        # The session has read all that was written.
        session = start_batch.sessions[r]
        assert session.tokens == request.session.tokens + len(mine)
        read, _ = engine.read(request.session, np.array([p.token for p in mine]))
        assert worst(session.learned.fast, read.learned.fast) < 1e-5
        assert worst(session.logit_V, read.logit_V) < 1e-4


def test_what_is_written_need_not_be_learned():
    engine, token = make_engine("ttt_e2e")
    (request,) = requests(engine, token, 1, max_tokens=9)
    for learn in (True, False):
        writer = Generator(engine, Letters(), [request], learn=learn)
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
    text = Transcript(ByteTokenizer(), [])
    assert [text.add(b)[0] for b in "aé☃".encode()] == ["a", "", "é", "", "", "☃"]
    broken = Transcript(ByteTokenizer(), [])
    assert broken.add(0xC3) == ("", False)
    assert broken.rest() == "\ufffd"


@pytest.mark.parametrize("name", ["ttt_e2e", "static"])
def test_a_text_goes_on_from_what_was_read(name):
    engine, token = make_engine(name)
    numbers = IdsTokenizer(11, 0, None)
    session, _ = engine.read(engine.start(), token[0, :3])
    for prompt in (token[0, :3], ()):  # given, and known from the session alone
        request = Request(session, max_tokens=3, prompt=prompt)
        pieces = list(Generator(engine, numbers, [request]))
        assert "".join(p.text for p in pieces) == "".join(f" {p.token}" for p in pieces)
        # A stop string may begin with that blank.
        (piece,) = Generator(engine, numbers, [replace(request, stop=(" ",))])
        assert (piece.text, piece.finished) == ("", "stop")
    session, _ = engine.read(engine.start(), np.zeros(1, np.int32))
    first = next(iter(Generator(engine, Numbers(), [Request(session, prompt=(0,))])))
    assert first.text == str(first.token)


def test_a_character_goes_on_from_a_session():
    text = Transcript(ByteTokenizer(), ["☃b"], "a☃".encode()[:2])
    assert [text.add(b) for b in "☃".encode()[1:]] == [("", False)] * 2
    assert text.add(ord("b")) == ("", True)


def test_stop_strings_are_found_in_every_script():
    for script in SCRIPTS.values():
        tokens = ByteTokenizer().encode(script * 2).tolist()
        for start in range(len(script)):
            stop = script[start : start + 3]
            text, shown = Transcript(ByteTokenizer(), [stop]), ""
            for token in tokens:
                piece, stopped = text.add(token)
                shown += piece
                if stopped:
                    break
            assert stopped
            assert shown == (script * 2).partition(stop)[0]


def test_impossible_requests_are_refused():
    engine, token = make_engine("static")
    with pytest.raises(UserError, match="a prompt needs at least one token"):
        Generator(engine, Letters(), [Request(engine.start())])
    (request,) = requests(engine, token, 1, max_tokens=0)
    with pytest.raises(UserError, match="max_tokens=0"):
        Generator(engine, Letters(), [request])
