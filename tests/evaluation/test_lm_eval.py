"""The lm-evaluation-harness model, against token-by-token decoding and in the harness."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness and what it imports

import datasets  # noqa: E402
import lm_eval  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from tttjax.data.tokenizers.base import ByteTokenizer  # noqa: E402
from tttjax.errors import UserError  # noqa: E402
from tttjax.evaluation.lm_eval import TTTJaxLM, _common_prefix, _request_options  # noqa: E402

CONTEXTS = ("the sea was calm", "the sea was rough, and", "a")


@pytest.fixture(scope="module")
def workdir(make_run):
    """Chunks of 8 bytes: contexts and continuations trigger inner updates."""
    return make_run("harness", suffix_layers=1, fast_mlp=True)


@pytest.fixture(scope="module")
def lm(workdir):
    return TTTJaxLM(str(workdir), batch_size=4)


def ask(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def by_hand(lm, context, continuation):
    """Log-probability and greediness with `Engine.read` alone, BOS and all, token by token."""
    engine, tokenizer = lm._engine, lm._loaded.tokenizer
    head_T = np.append(tokenizer.bos_id, tokenizer.encode(context)).astype(np.int32)
    session, _ = engine.read(engine.start(), head_T)
    total, greedy = 0.0, True
    for token in tokenizer.encode(continuation):
        logprob_V = np.asarray(jax.nn.log_softmax(session.logit_V), np.float64)
        total += logprob_V[token]
        greedy &= bool(logprob_V[token] == logprob_V.max())
        session, _ = engine.read(session, np.array([token], np.int32))
    return total, greedy


def greedy_text(lm, context, length):
    """Greedy continuation, up to the first token that is not ASCII."""
    text = ""
    while len(text) < length:
        engine, tokenizer = lm._engine, lm._loaded.tokenizer
        head_T = np.append(tokenizer.bos_id, tokenizer.encode(context + text)).astype(np.int32)
        token = int(np.argmax(engine.read(engine.start(), head_T)[0].logit_V))
        if token >= 128:
            return text
        text += chr(token)
    return text


def test_loglikelihood_equals_token_by_token_scoring(lm):
    pairs = [(context, more) for context in CONTEXTS for more in (" and deep", " b", "x" * 70)]
    pairs += [("", "from nothing"), (CONTEXTS[0], " b")]
    found = lm.loglikelihood(ask(*pairs), disable_tqdm=True)
    for pair, (logprob, is_greedy) in zip(pairs, found, strict=True):
        expected, greedy = by_hand(lm, *pair)
        assert logprob == pytest.approx(expected, rel=1e-5)
        assert is_greedy == greedy
    # The harness counts blanks at the end of a context to what follows.
    ((logprob, _),) = lm.loglikelihood(ask(("the sea ", "and all")), disable_tqdm=True)
    assert logprob == pytest.approx(by_hand(lm, "the sea", " and all")[0], rel=1e-5)
    assert lm.loglikelihood([], disable_tqdm=True) == []


def test_what_greedy_decoding_writes_is_greedy(lm):
    context, text = next(
        (letter, text) for letter in "abcdefghijklmnop" if (text := greedy_text(lm, letter, 2))
    )
    ((_, greedy),) = lm.loglikelihood(ask((context, text)), disable_tqdm=True)
    assert greedy is True
    other = "!" if text[0] != "!" else "?"
    ((_, greedy),) = lm.loglikelihood(ask((context, other)), disable_tqdm=True)
    assert greedy is False


def test_batching_and_order_change_nothing(lm):
    pairs = [(context, more) for context in CONTEXTS for more in (" and deep", " b")]
    found = lm.loglikelihood(ask(*pairs), disable_tqdm=True)
    backward = lm.loglikelihood(ask(*pairs[::-1]), disable_tqdm=True)[::-1]
    alone = lm.loglikelihood(ask(pairs[3]), disable_tqdm=True)
    np.testing.assert_allclose(found, backward, rtol=1e-5)
    np.testing.assert_allclose(found[3], alone[0], rtol=1e-5)


def test_rolling_scores_the_full_text(lm):
    text = "the sea was calm, the sea was rough, " * 4
    (found,) = lm.loglikelihood_rolling(ask((text,)), disable_tqdm=True)
    assert found == pytest.approx(by_hand(lm, "", text)[0], rel=1e-5)
    assert lm.loglikelihood_rolling(ask(("",)), disable_tqdm=True) == [0.0]


def test_generated_text_keeps_its_first_space(lm, monkeypatch):
    class Spelled(ByteTokenizer):
        """Adds a space before every byte but the first."""

        def bytes_after(self, token, previous):
            raw = super().bytes_after(token, previous)
            return raw if raw is None or previous is None else b" " + raw

    monkeypatch.setattr(lm, "_loaded", replace(lm._loaded, tokenizer=Spelled()))
    options = {"until": [], "max_gen_toks": 4, "do_sample": False}
    (text,) = lm.generate_until(ask((CONTEXTS[0], options)), disable_tqdm=True)
    assert text.startswith(" ")
    stopped = {**options, "until": [text[:3]]}
    assert lm.generate_until(ask((CONTEXTS[0], stopped)), disable_tqdm=True) == [""]


def test_generation_stops_at_stop_strings(lm):
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    full = lm.generate_until(ask(*((c, options) for c in CONTEXTS)), disable_tqdm=True)
    for context, text in zip(CONTEXTS, full, strict=True):
        expected = greedy_text(lm, context, 12)
        assert text.startswith(expected)
    text = max(full, key=len)
    context = CONTEXTS[full.index(text)]
    stop = text[len(text) // 2]
    (cut,) = lm.generate_until(ask((context, {**options, "until": stop})), disable_tqdm=True)
    assert cut == text[: text.index(stop)]


def test_repeated_requests_get_new_samples(lm):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = ask((CONTEXTS[0], options), (CONTEXTS[1], options), (CONTEXTS[0], options))
    first, _, again = lm.generate_until(requests, disable_tqdm=True)
    assert first != again
    assert lm.generate_until(requests[:1], disable_tqdm=True) == [first]


def test_generation_options_are_converted_or_refused():
    request = _request_options({"until": ["\n", ""], "max_tokens": 5, "temperature": 0.7})
    assert request["stop"] == ("\n",)
    assert request["max_tokens"] == 5
    assert request["sampling"].temperature == 0  # without do_sample
    request = _request_options({"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (request["sampling"].temperature, request["sampling"].top_p) == (0.7, 0.9)
    assert (request["max_tokens"], request["stop"]) == (256, ())
    with pytest.raises(UserError, match=r"generation option num_beams.* is not supported"):
        _request_options({"num_beams": 4})


def test_common_prefix_of_contexts():
    assert _common_prefix([(1, 2, 3), (1, 2), (1, 2, 4, 5)]) == (1, 2)
    assert _common_prefix([(1, 2)]) == (1, 2)
    assert _common_prefix([(1,), (2,)]) == ()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"learn": "some"}, "learn=some is unknown; choose from all, prompt, none"),
        ({"learn": "none", "mode": "on"}, "contradict each other"),
        ({"batch_size": 0}, "batch_size=0 must be a number of at least 1, or auto"),
    ],
)
def test_invalid_arguments_are_user_errors(workdir, values, expected):
    with pytest.raises(UserError, match=expected):
        TTTJaxLM(str(workdir), **values)


def test_the_harness_finds_the_model_by_its_name(workdir):
    found = get_model("tttjax").create_from_arg_string(
        f"workdir={workdir},learn=prompt,max_length=64", {"batch_size": "auto", "device": "cuda:0"}
    )
    assert isinstance(found, TTTJaxLM)
    assert found.get_model_info()["learns_from_answers"] is False
    assert found.tok_encode("ab", add_special_tokens=True) == [256, 97, 98]


def test_the_harness_evaluates_a_run(workdir, lm):
    """A task of two documents, made here; accuracy and perplexity against the numbers by hand."""
    docs = [
        {"question": CONTEXTS[0], "choices": [" and deep", " b"], "answer": 0},
        {"question": CONTEXTS[1], "choices": [" and deep", " b"], "answer": 1},
    ]
    documents = datasets.Dataset.from_list(docs)
    common = {"test_split": "test", "custom_dataset": lambda **kwargs: {"test": documents}}
    choice = {
        **common,
        "task": "own_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        **common,
        "task": "own_perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=[choice, rolling],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    right = [
        np.argmax([by_hand(lm, doc["question"], more)[0] for more in doc["choices"]])
        == doc["answer"]
        for doc in docs
    ]
    assert found["results"]["own_choice"]["acc,none"] == np.mean(right)
    nats = sum(by_hand(lm, "", doc["question"])[0] for doc in docs)
    size = sum(len(doc["question"]) for doc in docs)
    perplexity = found["results"]["own_perplexity"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(np.exp(-nats / size), rel=1e-4)
    assert found["config"]["workdir"] == str(workdir)
    assert found["config"]["chunk_size"] == 8


def test_lone_surrogates_are_user_errors(lm):
    half = "a\ud83d"
    for call in (
        lambda: lm.loglikelihood(ask((half, "b")), disable_tqdm=True),
        lambda: lm.loglikelihood_rolling(ask((half,)), disable_tqdm=True),
        lambda: lm.generate_until(ask((half, {"until": ["."]})), disable_tqdm=True),
        lambda: lm.generate_until(ask(("a", {"until": half})), disable_tqdm=True),
    ):
        with pytest.raises(UserError, match="lone surrogate"):
            call()
