"""`tttjax generate`, `read` and `sessions` from the command line."""

import io
import json

import pytest

import tttjax.cli.generate
import tttjax.runs.long_text
from tttjax.cli.main import main
from tttjax.data.preparation import prepare
from tttjax.errors import UserError
from tttjax.inference.engine import Engine
from tttjax.inference.session_file import read_header
from tttjax.runs.load import load_model
from tttjax.runs.long_text import find_text

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_models")]

TEXT = "the cat sat on the mat. " * 3  # one prefill call of 64 bytes, and one of 8


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_samples_use_consecutive_seeds(run, capsys):
    options = ("generate", run, "--prompt", "the cat", "--max-tokens=6", "--json")
    code, out, _ = call(capsys, *options, "--seed=3", "--samples=2")
    assert code == 0
    two = json.loads(out)
    for text in two:
        assert text["finished"] == ("length" if len(text["tokens"]) == 6 else "eos")
    assert all(logprob < 0 for text in two for logprob in text["logprobs"])
    for i in range(2):
        (alone,) = json.loads(call(capsys, *options, f"--seed={3 + i}")[1])
        assert alone["tokens"] == two[i]["tokens"]
    greedy = [call(capsys, *options, "--temperature=0", f"--seed={i}")[1] for i in range(2)]
    assert greedy[0] == greedy[1]


def test_prompt_is_echoed_only_on_a_terminal(run, capsys, monkeypatch):
    options = ("generate", run, "--prompt", "the cat", "--max-tokens=4", "--temperature=0")
    alone = call(capsys, *options)[1]
    assert "the cat" not in alone
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert call(capsys, *options)[1] == f"\x1b[2mthe cat\x1b[0m{alone}"
    monkeypatch.setenv("TERM", "dumb")
    assert call(capsys, *options)[1] == f"the cat{alone}"
    assert "the cat" not in call(capsys, *options, "--json")[1]


def test_batched_prompts_match_single_prompts(run, tmp_path, capsys):
    texts = ["the cat sat\u2028on the mat", "on", TEXT[:40]]
    lines = [texts[0], {"prompt": texts[1]}, texts[2]]
    written = [json.dumps(line, ensure_ascii=False) for line in lines]
    (tmp_path / "p.jsonl").write_text("\n\n".join(written), encoding="utf-8")
    options = ("--max-tokens=5", "--samples=2", "--temperature=0.5")
    many = ("generate", run, "--prompts", tmp_path / "p.jsonl", "--batch=4", *options)
    results = [json.loads(line) for line in call(capsys, *many)[1].splitlines()]
    assert [(text.pop("prompt"), text.pop("sample")) for text in results] == [
        (i, j) for i in range(3) for j in range(2)
    ]
    for i, text in enumerate(texts):
        alone = json.loads(call(capsys, "generate", run, "--prompt", text, "--json", *options)[1])
        for j in range(2):
            assert results[2 * i + j]["tokens"] == alone[j]["tokens"]
            assert results[2 * i + j]["logprobs"] == pytest.approx(alone[j]["logprobs"], abs=1e-4)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('"a"\nb', "line 2, is not JSON"),
        ('{"text": "a"}', "line 1, has no prompt"),
        ('""', "line 1, has no prompt"),
        ("\n", "has no prompts in it"),
    ],
)
def test_bad_prompt_files_are_refused(run, tmp_path, capsys, lines, sentence):
    (tmp_path / "p.jsonl").write_text(lines)
    code, out, err = call(capsys, "generate", run, "--prompts", tmp_path / "p.jsonl")
    assert (code, out) == (2, "")
    assert sentence in err


def test_session_resumes_prefill(run, tmp_path, capsys):
    file = tmp_path / "s.session"
    (tmp_path / "t.txt").write_text(TEXT)
    (tmp_path / "u.txt").write_text(TEXT + "and")
    save = ("--save-session", file, "--max-tokens=0")
    assert call(capsys, "generate", run, "--prompt-file", tmp_path / "t.txt", *save)[0] == 0
    before = file.read_bytes()
    options = ("--max-tokens=5", "--temperature=0", "--json")
    _, resumed, _ = call(capsys, "generate", run, "--session", file, "--prompt", "and", *options)
    assert file.read_bytes() == before
    _, single_call, _ = call(capsys, "generate", run, "--prompt-file", tmp_path / "u.txt", *options)
    assert json.loads(resumed)[0]["tokens"] == json.loads(single_call)[0]["tokens"]
    # The model is opened once for all commands here; opened again, it is the session's model too.
    assert read_header(file).model == load_model(run).model_fingerprint
    code, summary, _ = call(capsys, "sessions", file)
    assert code == 0
    assert f"{len(TEXT) + 1} tokens, " in summary
    assert "drift" in summary


def test_generation_resumes_bit_identically_from_session(run, tmp_path, capsys):
    options = ("--json", "--seed=5")
    full = call(capsys, "generate", run, "--prompt", "the cat", "--max-tokens=14", *options)[1]
    save = ("--save-session", tmp_path / "s", "--max-tokens=6")
    start = call(capsys, "generate", run, "--prompt", "the cat", *save, *options)[1]
    resume = ("--session", tmp_path / "s", "--max-tokens=8")
    end = call(capsys, "generate", run, *resume, *options)[1]
    (full,), (start,), (end,) = map(json.loads, (full, start, end))
    assert start["tokens"] + end["tokens"] == full["tokens"]
    assert start["logprobs"] + end["logprobs"] == full["logprobs"]


def test_resume_without_learning_settles_pending_tokens(run, tmp_path, capsys):
    """They were read already, and later updates do not use them."""
    first = ("--save-session", tmp_path / "a", "--max-tokens=0", "--prompt", "x" * 12)
    assert call(capsys, "generate", run, *first)[0] == 0
    again = ("--session", tmp_path / "a", "--save-session", tmp_path / "b", "--max-tokens=0")
    assert call(capsys, "generate", run, *again, "--prompt", "yz", "--learn=none")[0] == 0
    headers = [json.loads(call(capsys, "sessions", "--json", tmp_path / name)[1]) for name in "ab"]
    (before,), (after,) = (about.values() for about in headers)
    assert (before["tokens"], before["pending"]) == (13, 5)
    assert (after["tokens"], after["pending"]) == (15, 0)
    assert after["drift"] == before["drift"]


def test_text_is_read_to_its_end_once(run, tmp_path, capsys):
    text, session, log = (tmp_path / name for name in ("t.txt", "s.session", "log.csv"))
    text.write_text(TEXT)
    code, _, err = call(capsys, "read", run, text, "--save-session", session, "--log", log)
    assert code == 0
    assert f"{len(TEXT) + 1} tokens in" in err
    rows = log.read_text().splitlines()
    assert rows[0] == "tokens,loss,grad_norm"
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(8, len(TEXT) + 1, 8))
    again = call(capsys, "read", run, text, "--save-session", session, "--log", log)
    assert again[0] == 0
    assert log.read_text().splitlines() == rows
    about = json.loads(call(capsys, "sessions", "--json", session)[1])[str(session)]
    assert about["source"]["tokens"] == about["source"]["of"] == len(TEXT)
    text.write_text(TEXT + "more")
    refused = call(capsys, "read", run, text, "--save-session", session)
    assert refused[0] == 2
    assert "session of another text" in refused[2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "the prompt is empty"),
        (["--prompt", "x", "--samples=0"], "--samples=0 must be at least 1"),
        (["--prompt", "x", "--max-tokens=0"], "generates nothing: add --save-session"),
        (["--prompt", "x", "--stop="], "--stop is empty"),
        (["--prompt", "x", "--learn=none", "--mode=dynamic"], "contradict each other"),
        (["--prompt", "x", "--temperature=-1"], "temperature=-1.0 must be at least 0"),
        (["--prompt", "x", "--session=nowhere"], "there is no session nowhere"),
        (["--prompt", "x", "--tokenizer=nowhere"], "there is no tokenizer in nowhere"),
        (["--prompt-file=nowhere"], "nowhere does not exist"),
        (
            ["--prompt", "x", "--samples=2", "--save-session=s"],
            "saves one text: remove it, or --samples",
        ),
    ],
)
def test_bad_input_is_refused(run, options, sentence, capsys):
    code, out, err = call(capsys, "generate", run, *options)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_full_attention_reports_its_capacity(make_run, capsys):
    run = make_run("full", mixers=("full",))
    code, _, err = call(capsys, "generate", run, "--prompt", "abc", "--max-length=4")
    assert code == 2
    assert "has a capacity of 4 tokens, and this takes 132; raise max_length" in err


@pytest.mark.parametrize(
    "raw", [b"a\r\nb\rc\n", b"\xef\xbb\xbfa\r\nb\xc3\xa9\n", b"\xef\xbb\xbfa\xef\xbb\xbf"]
)
def test_text_has_same_tokens_for_every_input(run, data, tmp_path, monkeypatch, capsys, raw):
    """For --prompt, --prompt-file, standard input, --prompts, `read` and `prepare`."""
    expected = [256, *raw.removeprefix(b"\xef\xbb\xbf")]  # BOS, then one token per byte
    path = tmp_path / "t.txt"
    path.write_bytes(raw)
    text = raw.decode()
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(text).encode() + b"\r\n")
    read = []

    def note(engine, session, token_T, **_):
        read.append([int(token) for token in token_T])
        raise UserError("noted")

    opened = load_model(run)
    monkeypatch.setattr(tttjax.cli.generate, "load_from_args", lambda *_, **__: opened)
    monkeypatch.setattr(
        tttjax.cli.generate, "_print_all", lambda _, __, ___, prompts, ____: note(0, 0, prompts[0])
    )
    monkeypatch.setattr(Engine, "read", note)
    for option in (
        ["--prompt", text],
        ["--prompt-file", path],
        ["--prompt-file=-"],
        ["--prompts", tmp_path / "p.jsonl"],
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
        assert call(capsys, "generate", run, *option, "--max-tokens=2")[2] == "error: noted\n"
    assert read == [expected] * 4
    tokens = [
        256,
        *(
            int(t)
            for part in tttjax.runs.long_text._encode_spans(opened.tokenizer, find_text(path))
            for t in part
        ),
    ]
    assert tokens == expected
    prepared = prepare([path], tmp_path / "d", val_fraction=0.0, num_workers=0).split("train")
    assert prepared.read(0, prepared.num_tokens).tolist() == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", "caf\udce9"], "--prompt has a lone surrogate"),
        (["--prompt", "x", "--stop", "\ud83d"], "--stop has a lone surrogate"),
        (["--prompts=surrogate.jsonl"], "surrogate.jsonl, line 2: the prompt has a lone surrogate"),
        (["--prompts=deep.jsonl"], "deep.jsonl, line 1, is not JSON"),
        (["--prompt-file=latin.txt"], "latin.txt is not UTF-8 text (byte 3)"),
        (["--prompts=latin.txt"], "latin.txt is not UTF-8 text (byte 3)"),
        (["--prompt-file=half.txt"], "half.txt is not UTF-8 text (byte 0)"),
        (["--prompt-file=a.zip"], "a.zip is a zip archive"),
        (["--prompt-file=-"], "standard input is not UTF-8 text (byte 3)"),
        (["--prompt-file=."], "Cannot read . (Is a directory)"),
    ],
)
def test_invalid_text_is_refused(run, tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "surrogate.jsonl").write_text('"a"\n"\\ud83d"\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "half.txt").write_bytes(b"\xed\xa0\xbd")
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    code, out, err = call(capsys, "generate", run, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert sentence in err


def test_many_documents_are_refused_as_one_text(run, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    read = ("read", run, tmp_path / "a.jsonl", "--save-session", tmp_path / "s")
    code, _, err = call(capsys, *read)
    assert code == 2
    assert "many documents (JSON lines)" in err


def test_save_session_does_not_overwrite_other_files(run, tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text(TEXT)
    for command in (("generate", run, "--prompt=a", "--max-tokens=0"), ("read", run, text)):
        for path, sentence in ((text, "is not a session"), (tmp_path, "is a folder")):
            code, _, err = call(capsys, *command, f"--save-session={path}")
            assert (code, sentence in err) == (2, True)
    assert text.read_text() == TEXT


def test_damaged_session_arrays_are_refused(run, tmp_path, capsys):
    path = tmp_path / "a.session"
    call(capsys, "generate", run, "--prompt=a", "--max-tokens=0", f"--save-session={path}")
    assert call(capsys, "sessions", path)[0] == 0
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, out, err = call(capsys, "sessions", path)
    assert (code, out) == (2, "")
    assert "the checksum of its arrays differs" in err
