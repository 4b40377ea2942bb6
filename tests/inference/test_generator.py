"""Generated text depends on session and seed alone; stop strings and session state."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.families import SCRIPTS
from helpers.inference import make_engine
from helpers.small import worst

from tttjax.data.tokenizers.base import ByteTokenizer, IdsTokenizer
from tttjax.errors import UserError
from tttjax.inference.generator import Generator, Request, Transcript
from tttjax.inference.options import Sampling

pytestmark = pytest.mark.slow


class Letters(IdsTokenizer):
    """Tokens 0..10 as letters; 10 is EOS."""

    def __init__(self):
        super().__init__(11, None, 10)

    def bytes_after(self, token, previous):
        return None if token == 10 else bytes((97 + token,))


class Numbers(IdsTokenizer):
    """Numbers with a blank before each but the first; 0 is BOS, without text."""

    def __init__(self):
        super().__init__(11, 0, None)

    def bytes_after(self, token, previous):
        return super().bytes_after(token, previous) if token else None


def requests(engine, token, number, **options):
    result = []
    for r in range(number):
        prompt = token[r % 2, : 3 + r]
        session, _ = engine.read(engine.start(), prompt)
        options = {"max_tokens": 3 + 2 * r, "seed": r, "prompt": prompt, **options}
        result.append(Request(session, Sampling(repetition_penalty=1.2), **options))
    return result


def test_batched_generation_equals_single_generation():
    engine, token = make_engine("ttt_e2e")
    batch_requests = requests(engine, token, 3)
    generator = Generator(engine, Letters(), batch_requests)
    tokens = list(generator)
    for r, request in enumerate(batch_requests):
        alone = Generator(engine, Letters(), [request])
        own = [generated for generated in tokens if generated.request == r]
        assert [p.token for p in own] == [p.token for p in alone]
        assert own[-1].finish_reason in ("length", "eos")
        assert len(own) <= request.max_tokens
        text = "".join(generated.text for generated in own)
        assert text == Letters().decode([generated.token for generated in own])
        # The session includes all generated tokens.
        session = generator.sessions[r]
        assert session.tokens == request.session.tokens + len(own)
        read, _ = engine.read(request.session, np.array([p.token for p in own]))
        assert worst(session.learned.fast, read.learned.fast) < 1e-5
        assert worst(session.logit_V, read.logit_V) < 1e-4


def test_learn_false_excludes_generated_tokens_from_updates():
    engine, token = make_engine("ttt_e2e")
    (request,) = requests(engine, token, 1, max_tokens=9)
    for learn in (True, False):
        generator = Generator(engine, IdsTokenizer(11, None, None), [request], learn=learn)
        assert len(list(generator)) == 9  # no token is EOS
        (session,) = generator.sessions
        assert len(session.uncommitted) == 4
        drift = worst(session.learned.fast, engine.start().learned.fast)
        assert drift > 0  # the first chunk has two targets from the prompt
        if learn:
            learned = drift
    assert drift != learned


def test_stop_string_ends_text_and_is_not_shown():
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
    assert other.flush() == "bc"


def test_characters_are_shown_once_complete():
    text = Transcript(ByteTokenizer(), [])
    assert [text.add(b)[0] for b in "aé☃".encode()] == ["a", "", "é", "", "", "☃"]
    broken = Transcript(ByteTokenizer(), [])
    assert broken.add(0xC3) == ("", False)
    assert broken.flush() == "\ufffd"


@pytest.mark.parametrize("name", ["ttt_e2e", "static"])
def test_text_continues_from_the_prompt(name):
    engine, token = make_engine(name)
    numbers = IdsTokenizer(11, 0, None)
    session, _ = engine.read(engine.start(), token[0, :3])
    for prompt in (token[0, :3], ()):  # given, and from the session alone
        request = Request(session, max_tokens=3, prompt=prompt)
        tokens = list(Generator(engine, numbers, [request]))
        assert "".join(p.text for p in tokens) == "".join(f" {p.token}" for p in tokens)
        # A stop string may begin with that blank.
        (generated,) = Generator(engine, numbers, [replace(request, stop=(" ",))])
        assert (generated.text, generated.finish_reason) == ("", "stop")
    session, _ = engine.read(engine.start(), np.zeros(1, np.int32))
    first = next(iter(Generator(engine, Numbers(), [Request(session, prompt=(0,))])))
    assert first.text == str(first.token)


def test_character_continues_from_a_session():
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
                generated, stopped = text.add(token)
                shown += generated
                if stopped:
                    break
            assert stopped
            assert shown == (script * 2).partition(stop)[0]


def test_invalid_requests_are_refused():
    engine, token = make_engine("static")
    with pytest.raises(UserError, match="a prompt needs at least one token"):
        Generator(engine, Letters(), [Request(engine.start())])
    (request,) = requests(engine, token, 1, max_tokens=0)
    with pytest.raises(UserError, match="max_tokens=0"):
        Generator(engine, Letters(), [request])
