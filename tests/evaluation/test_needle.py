"""Needle tests: exact prompts, regions by the attention mask, models with known answers."""

import csv
import dataclasses
import json
import re

import jax
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from helpers.small import worst

import tttjax.evaluation.needle.model
from tttjax.cli import main
from tttjax.data.tokenizers.base import ByteTokenizer, IdsTokenizer
from tttjax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from tttjax.errors import UserError
from tttjax.evaluation.needle import haystack
from tttjax.evaluation.needle.haystack import Haystack
from tttjax.evaluation.needle.model import MORE_TOKENS, Answer, EngineModel, Likelihood
from tttjax.evaluation.needle.outputs import heat_maps
from tttjax.evaluation.needle.prompts import (
    INTRODUCTION,
    PromptSpec,
    check_tokenizer,
    make_prompt,
)
from tttjax.evaluation.needle.results import (
    MEASURES,
    PROMPT,
    NeedleResults,
    NeedleSeries,
    group_means,
)
from tttjax.evaluation.needle.runner import NeedleSettings, run_prompts
from tttjax.evaluation.needle.summary import blocks, sentence
from tttjax.evaluation.needle.tasks import TASKS
from tttjax.evaluation.statistics import average, subtract, wilson
from tttjax.evaluation.tables import render
from tttjax.inference.engine import Engine
from tttjax.ops.attention.attend import AttentionMask, mask_fn
from tttjax.parallel.mesh import make_mesh
from tttjax.runs.eval_setup import LearningOptions, iter_eval_setups
from tttjax.runs.run import RunSpec, open_run

pytestmark = pytest.mark.slow

STORY = (
    "A heron stood in the shallows, and no fish came near it! Who would wait so long? Not the fox. "
    "He had other plans; the hens of the mill were fat, the miller slept, the night was dark.\n\n"
    "By dawn it rained. Two feathers lay on the threshold, one white, one brown, and the heron was "
    "still standing there, patient as a post. "
)
DEPTHS = (0.0, 0.3, 1.0)
WINDOW = 220


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "sp.model"
    path.write_bytes(train_sentencepiece([STORY * 20], 300))
    return {"bytes": ByteTokenizer(), "sentencepiece": SentencePieceTokenizer(path)}


def story(tokenizer):
    return Haystack("a story", haystack.sentences(STORY), tokenizer)


# Prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_exact_to_the_token(tokenizers, kind, task):
    tokenizer = tokenizers[kind]
    hay = haystack.noise(tokenizer) if TASKS[task].in_noise else story(tokenizer)
    for length in (420, 911):
        starts = []
        for depth in DEPTHS:
            prompt = make_prompt(PromptSpec(TASKS[task], length, depth, 0), hay, seed=3)
            assert len(prompt.token_T) == len(prompt.control_T) == length
            assert prompt.token_T[0] == tokenizer.bos_id
            start, stop = prompt.needle
            starts.append(start)
            span = tokenizer.decode(prompt.token_T[start:stop]).strip()
            assert re.fullmatch(
                rf"One of the special magic (number|uuid)s for \w+-\w+ is: {prompt.value}\.", span
            )
            for smaller in (prompt.token_T[start + 1 : stop], prompt.token_T[start : stop - 1]):
                assert span not in tokenizer.decode(smaller)
            text = tokenizer.decode(prompt.token_T)
            assert text.count(prompt.value) == 1
            assert text.endswith(" is:")
            question = tokenizer.decode(prompt.token_T[prompt.question :]).strip()
            assert question.startswith("What is the special magic")
            assert prompt.distance == prompt.question - stop
            # The control is the same but for the needle, whose value is nowhere in it.
            assert prompt.value not in tokenizer.decode(prompt.control_T)
            same = prompt.token_T == prompt.control_T
            assert same[:start].all()
            assert same[stop:].all()
            # The value goes on where the prompt ends.
            whole = tokenizer.decode(np.concatenate((prompt.token_T, prompt.answer_A)))
            assert whole == f"{text} {prompt.value}"
            decoy = tokenizer.decode(np.concatenate((prompt.token_T, prompt.decoy_A)))[len(text) :]
            assert decoy != f" {prompt.value}"
            form = r" \d{7}" if prompt.spec.task.kind == "number" else r" [0-9a-f-]{36}"
            assert re.fullmatch(form, decoy)
        assert prompt.distance <= 1  # at a depth of 100 %: nothing is between needle and question
        first = len(tokenizer.encode(INTRODUCTION.format(kind="number"))) + 1
        assert first - 2 <= starts[0] <= first + haystack.LONGEST_SENTENCE
        if length > 900:
            assert (starts[1] - first) / (starts[2] - first) == pytest.approx(0.3, abs=0.1)


def test_prompts_depend_on_seed_not_order(tokenizers):
    settings = NeedleSettings((400, 500), depths=(0.0, 1.0), samples=2)

    def make(prompt_specs, seed):
        hay = haystack.noise(tokenizers["bytes"])
        return {spec: make_prompt(spec, hay, seed).token_T.tolist() for spec in prompt_specs}

    prompt_specs = settings.prompt_specs()
    assert len(prompt_specs) == len(set(prompt_specs)) == 2 * 3 * 2 * 2
    forward, backward = make(prompt_specs, 5), make(prompt_specs[::-1], 5)
    assert forward == backward
    values = list(map(tuple, forward.values()))
    assert len(set(values)) == len(values)
    assert all(prompt != forward[spec] for spec, prompt in make(prompt_specs, 6).items())


@pytest.mark.parametrize("window", [0, 100, 300, 690, 800])
def test_regions_match_the_attention_mask(tokenizers, window):
    attention_mask, found = AttentionMask(window=window), set()
    for depth in np.linspace(0, 1, 9):
        hay = haystack.noise(tokenizers["bytes"])
        prompt = make_prompt(PromptSpec(TASKS["passkey"], 700, float(depth), 0), hay, seed=0)
        needle_S = np.arange(*prompt.needle)
        end = len(prompt.token_T) + len(prompt.answer_A) - 1
        answering_T = np.arange(len(prompt.token_T) - 1, end)
        asking_T = np.arange(prompt.question, end)
        if np.all(mask_fn(answering_T, needle_S, attention_mask)):
            expected = "inside"
        else:
            expected = "edge" if np.any(mask_fn(asking_T, needle_S, attention_mask)) else "outside"
        assert prompt.region(window) == expected
        found.add(expected)
    assert window != 300 or found == {"inside", "edge", "outside"}


def test_text_is_split_into_short_sentences():
    found = haystack.sentences("One.  Two?\nThree - " + "word " * 100 + "\n***\n")
    assert found[:2] == ["One.", "Two?"]
    assert max(map(len, found)) <= haystack.LONGEST_SENTENCE
    assert " ".join(found).split() == ["One.", "Two?", "Three", "-", *["word"] * 100]


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_context_is_refused(tokenizers, task):
    hay = haystack.noise(tokenizers["bytes"])
    with pytest.raises(UserError, match=rf"100 tokens is too short for the task {task}") as caught:
        make_prompt(PromptSpec(TASKS[task], 100, 0.5, 0), hay, seed=0)
    least = int(str(caught.value).split()[-1])
    assert len(make_prompt(PromptSpec(TASKS[task], least, 0.5, 0), hay, seed=0).token_T) == least


def test_lossy_tokenizers_are_refused(monkeypatch):
    with pytest.raises(UserError, match="unknown tokenizer, so it cannot encode text"):
        check_tokenizer(IdsTokenizer(50, 0, 1), list(TASKS.values()))

    class Shouting(ByteTokenizer):
        def decode(self, tokens):
            return super().decode(tokens).upper()

    with pytest.raises(UserError, match="does not keep the text"):
        check_tokenizer(Shouting(), list(TASKS.values()))


# Models with known answers -----------------------------------------------------------------------

NEVER = Likelihood(-2.0, 0.0)


def ask_text(read):
    """A needle model whose text is `read(prompt)`."""

    def ask(prompts):
        return [Answer(f" {read(prompt)} and so on", NEVER, NEVER, NEVER) for prompt in prompts]

    return ask


def oracle(text):
    """Looks the key of the question up in the text."""
    key = re.search(r"What is the special magic \w+ for (\S+) in", text)[1]
    found = re.search(rf"One of the special magic \w+s for {key} is: (\S+)\.", text)
    return found[1] if found else "nothing"


def ask_with(tokenizers, ask, kind="sentencepiece"):
    tokenizer = tokenizers[kind]
    settings = NeedleSettings((400, 600), depths=(0.0, 0.5, 1.0), samples=4, batch_size=5)
    hays = {"passkey": haystack.noise(tokenizer)}
    hays |= dict.fromkeys(("number", "uuid"), story(tokenizer))
    return run_prompts(ask, settings, hays, window=WINDOW)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_an_oracle_finds_every_needle_and_none_without(tokenizers, kind):
    decode = tokenizers[kind].decode
    found = ask_with(tokenizers, ask_text(lambda p: oracle(decode(p.token_T))), kind)
    assert len(found) == 2 * 3 * 3 * 4
    assert all(row["correct"] == 1 for row in found)
    without = ask_with(tokenizers, ask_text(lambda p: oracle(decode(p.control_T))), kind)
    assert not any(row["correct"] for row in without)


def test_guessing_finds_nothing(tokenizers):
    rng = np.random.default_rng(0)
    guess = ask_text(lambda prompt: rng.integers(10**6, 10**7))
    assert not any(row["correct"] for row in ask_with(tokenizers, guess))


def test_a_windowed_oracle_finds_the_needles_inside(tokenizers):
    """And not what is outside: regions and results agree sample by sample."""
    tokenizer = tokenizers["sentencepiece"]

    def ask(prompts):
        seen = [tokenizer.decode(p.token_T[p.question - WINDOW + 1 :]) for p in prompts]
        return ask_text(lambda prompt: oracle(seen[prompts.index(prompt)]))(prompts)

    def ask_each(prompts):
        return [answer for prompt in prompts for answer in ask([prompt])]

    rows = ask_with(tokenizers, ask_each)
    assert {"inside", "outside"} <= {row["region"] for row in rows}
    for row in rows:
        if row["region"] != "edge":
            assert row["correct"] == (row["region"] == "inside")


# Numbers -----------------------------------------------------------------------------------------


def test_intervals_of_a_proportion_by_hand():
    low, high = wilson(0, 10)
    assert low == 0
    assert high == pytest.approx(1.959964**2 / (10 + 1.959964**2))
    low, high = wilson(5, 10)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(50, 100)[1] - wilson(50, 100)[0] < high - low


def test_means_gains_and_paired_differences_by_hand(tokenizers):
    logprobs = iter(np.linspace(-4, -1, 1000))

    def ask(prompts):
        return [
            Answer("", Likelihood(next(logprobs), 0.5), Likelihood(-5, 0.1), Likelihood(-4.5, 0.2))
            for _ in prompts
        ]

    a, b = (pd.DataFrame(ask_with(tokenizers, ask)) for _ in range(2))
    by_region = average(a, ["region"], MEASURES).set_index("region")
    for region, values in a.groupby("region")["logprob"]:
        row = by_region.loc[region]
        assert row["number"] == len(values)
        assert row["gain"] == pytest.approx(values.mean() + 5)
        assert row["recall"] == pytest.approx(values.mean() + 4.5)
        assert row["recall_stderr"] == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5)
        assert row["top"] == 0.5
    changed = subtract(b, a.sample(frac=1, random_state=0), PROMPT, ["logprob"])["logprob"]
    np.testing.assert_allclose(changed, len(a) * 3 / 999)
    with pytest.raises(ValueError, match="same rows"):
        subtract(a[1:], b[:-1], PROMPT, ["gain"])


def test_tables_count_what_was_found(tokenizers):
    decode = tokenizers["sentencepiece"].decode
    learns = {"rule": "sgd", "lr": 1.0, "clip": 1.0, "chunk_size": 8}
    readers = {"on": lambda p: oracle(decode(p.token_T)), "off": lambda p: "nothing"}
    series = [
        NeedleSeries("run", mode, f"run, TTT {mode}", inner, 1.0)
        for mode, inner in zip(readers, (learns, None), strict=True)
    ]
    rows = [
        one.answers(ask_with(tokenizers, ask_text(read)))
        for one, read in zip(series, readers.values(), strict=True)
    ]
    results = NeedleResults(
        series=tuple(series),
        answers=pd.concat(rows, ignore_index=True),
        tasks=tuple(TASKS),
        lengths=(400, 600),
        depths=(0.0, 0.5, 1.0),
        samples=4,
        seed=0,
        window=WINDOW,
        runs=({"name": "run", "step": 3, "source": "runs/run", "window": WINDOW},),
        haystacks=dict.fromkeys(TASKS, "a story"),
        notes=(),
    )
    assert results.distances()[:4] == [(0, 55), (55, 110), (110, 220), (220, 440)]
    means = group_means(results)
    for task in TASKS:
        of_task = means[(means["task"] == task) & (means["mode"] == "on")]
        assert (of_task["found"] == of_task["needles"]).all()
        by = of_task.groupby("by")["needles"].sum().to_dict()
        assert by == {"length": 24, "cell": 24, "distance": 24, "region": 24}
    text = render(blocks(results))
    assert "100 % (76-100)" in text
    assert "0 % (0-24)" in text
    assert re.search(r"run, TTT on - run, TTT off, outside it *\| \+1.0000 ± 0.0000 \*", text)
    outside = int((rows[0]["region"] == "outside").sum())
    assert sentence(results).startswith(
        f"Outside the window, run, TTT on found {outside} of {outside} needles, with a recall of "
        "+0.000 ± 0.000 nats per token"
    )
    assert f"run, TTT off found 0 of {outside} needles" in sentence(results)
    for region, words in (("inside", "Inside the window"), ("edge", "On its edge")):
        selected = results.answers[results.answers["region"] == region]
        assert len(selected)
        text = sentence(dataclasses.replace(results, answers=selected))
        assert text.startswith(f"{words} (none was outside), run, TTT on found")
    near = results.answers["depth"].map({0.0: 0.331, 0.5: 0.334, 1.0: 1.0})
    moved = dataclasses.replace(results, answers=results.answers.assign(depth=near))
    figure = heat_maps(moved, "passkey")
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["33%", "33%", "100%"]  # near depths are two rows


# Models ------------------------------------------------------------------------------------------

FAST = {"suffix_layers": 1, "fast_mlp": True}


@pytest.fixture(scope="module")
def workdir(make_run):
    return make_run("needle", **FAST)


@pytest.fixture(scope="module", autouse=True)
def one_engine_per_mode():
    """All engines here have the weights of one run, so those of one mode are one engine."""
    engines = {}

    def engine(inference_model, params, max_length):
        key = inference_model.chunk_size, max_length
        known = engines.setdefault(key, Engine(inference_model, params, max_length))
        assert known.inference_model.lr == inference_model.lr
        assert worst(known._params, params) == 0
        return known

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tttjax.evaluation.needle.model, "Engine", engine)
        yield


def test_engine_answers_equal_token_by_token_decoding(workdir, tokenizers):
    """Against token-by-token decoding of single prompts, without prefix sharing or batching."""
    run, tokenizer = open_run(RunSpec(workdir)), tokenizers["bytes"]
    hay = haystack.noise(tokenizer)
    prompts = [make_prompt(PromptSpec(TASKS["passkey"], 300, d, 0), hay, 0) for d in (0.1, 0.7)]
    mesh = make_mesh(devices=jax.devices()[:1])
    (setup,) = next(iter_eval_setups(run, ["on"], LearningOptions(), mesh))
    model = EngineModel(setup, tokenizer, 330)
    answers, engine = model(prompts), model._engine  # its functions are compiled already

    def follow(token_T, answer_A):
        session, _ = engine.read(engine.start(), token_T)
        nll, tops = [], []
        for token in answer_A:
            logprob_V = jax.nn.log_softmax(session.logit_V)
            nll.append(-float(logprob_V[token]))
            tops.append(int(np.argmax(logprob_V)) == token)
            session, _ = engine.read(session, np.array([token]))
        return -np.mean(nll), np.mean(tops)

    for prompt, answer in zip(prompts, answers, strict=True):
        for found, text, value in (
            (answer.value, prompt.token_T, prompt.answer_A),
            (answer.absent, prompt.control_T, prompt.answer_A),
            (answer.decoy, prompt.token_T, prompt.decoy_A),
        ):
            expected = follow(text, value)
            assert (found.logprob, found.top) == pytest.approx(expected, rel=1e-4)
    session, _ = engine.read(engine.start(), prompts[0].token_T)
    written = []
    for _ in range(len(prompts[0].answer_A) + MORE_TOKENS):
        token = int(np.argmax(session.logit_V[: tokenizer.vocab_size]))
        written.append(token)
        if token == tokenizer.eos_id:
            break
        session, _ = engine.read(session, np.array([token]))
    assert answers[0].text == tokenizer.decode(written)


def rows_of(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_command_writes_tables_files_and_pictures(workdir, tmp_path, capsys):
    words = ["--context-lengths=300,330", "--needle-depths=0,100", "--needle-samples=2"]
    words += ["--needle-tasks=passkey,number", "--batch-size=1", f"--out={tmp_path / 'out'}"]
    assert main.main(["evaluate", str(workdir), "--needle", *words]) == 0
    out, err = capsys.readouterr()
    assert "S-NIAH-1 (pass-key), hidden in repeated noise." in out
    assert "S-NIAH-2 (number), hidden in the split val of" in out
    assert "needle 100%" in err
    values = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert [series["mode"] for series in values["series"]] == ["on", "off"]
    assert values["window"] == 8
    rows = rows_of(tmp_path / "out" / "needle_samples.csv")
    assert len(rows) == 2 * 2 * 2 * 2 * 2  # modes, tasks, lengths, depths, samples
    for series in values["series"]:
        of_mode = [row for row in rows if row["mode"] == series["mode"]]
        for task, groups in series["tasks"].items():
            regions = [group for group in groups if group["by"] == "region"]
            assert sum(group["needles"] for group in regions) == 8
            first = groups[0]
            chosen = [r for r in of_mode if (r["task"], r["length"]) == (task, "300")]
            mean_gain = np.mean([float(row["gain"]) for row in chosen])
            assert first["length"] == 300
            assert first["gain"]["mean"] == pytest.approx(mean_gain, rel=1e-5)
    prompts = {mode: [r["value"] for r in rows if r["mode"] == mode] for mode in ("on", "off")}
    assert prompts["on"] == prompts["off"]
    groups = rows_of(tmp_path / "out" / "needle.csv")
    assert {group["by"] for group in groups} == {"length", "cell", "distance", "region"}
    for task in ("passkey", "number"):
        image = matplotlib.image.imread(tmp_path / "out" / f"needle_{task}.png")
        assert image[..., :3].std() > 0.01
    assert not (tmp_path / "out" / "needle_uuid.png").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--context-lengths=64"], "64 tokens is too short for the task passkey"),
        (["--needle-tasks=key"], "needle task 'key' is unknown; choose from passkey, number, uuid"),
        (["--needle-depths=120"], "depth of 120 % must be from 0 to 100 %"),
        (["--needle-samples=0"], "samples=0 must be at least 1"),
        (["--bins=4"], "--bins does not apply to needle tests"),
        (["--needle-text=missing.txt"], "missing.txt does not exist"),
        (["--split=tets"], "no documents in the split 'tets'"),
        (["--tokenizer=missing"], "no tokenizer in missing"),
        (["--modes=dynamic"], "does not fit the run needle"),
    ],
)
def test_invalid_settings_are_user_errors(workdir, words, expected, tmp_path, capsys):
    words = ["--context-lengths=400", *words, f"--out={tmp_path / 'out'}"]
    assert main.main(["evaluate", str(workdir), "--needle", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert expected in err
    assert not (tmp_path / "out").exists()


def test_needle_options_alone_are_refused(workdir, capsys):
    assert main.main(["evaluate", str(workdir), "--needle-samples=3"]) == 2
    assert "--needle-samples is an option of needle tests: add --needle" in capsys.readouterr().err


def test_without_text_haystack_is_noise_with_note(workdir, tmp_path):
    from tttjax.evaluation.needle.runner import _haystacks

    run = open_run(RunSpec(workdir))
    gone = dataclasses.replace(run.config.data, sources=(str(tmp_path / "gone"),))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=gone))
    found = _haystacks(run, ByteTokenizer(), NeedleSettings((400,)))
    assert found.by_task["number"].is_noise
    assert "S-NIAH-2 (number) and S-NIAH-3 (UUID) of needle use noise" in found.notes[0]
    assert "gone does not exist" in found.notes[0]


def test_a_haystack_of_json_lines_is_their_texts(tokenizers, tmp_path):
    tokenizer = next(iter(tokenizers.values()))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "The sea is calm."}\n{"text": "A ship comes."}\n')
    assert haystack.from_file(path, tokenizer, 999).sentences == [
        "The sea is calm.",
        "A ship comes.",
    ]
    path.write_text('{"text": "\\ud83d"}\n')
    with pytest.raises(UserError, match="lone surrogate"):
        haystack.from_file(path, tokenizer, 999)
