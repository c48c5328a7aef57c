"""Text on its way in and out: encodings, chat templates, stop tokens. Nothing of it may look like a bug."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from lbllm_compile import calibration, evaluate, frontend
from lbllm_compile.native import text
from lbllm_compile.native.generate import choose
from lbllm_compile.native.language import LanguageModel, encode
from lbllm_compile.runtime import GenerationError, Sampling

ROOT = Path(__file__).resolve().parent.parent

MODEL = """
import tokenizers, torch, transformers
def build_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2))
def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"\u00ef{i}": i for i in range(40)}, unk_token="\u00ef0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="\u00ef0")
    made.chat_template = "{{ raise_exception('the first turn must be the system') }}"
    return made
"""


def words(template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")
    made.chat_template = template
    return made


# Chat templates

TEMPLATES = {
    "the date": "{{ strftime_now('%Y') }} {{ messages[0].content }}",
    "a loop that ends": "{% for m in messages * 3 %}{{ m.content }}{% if loop.index == 2 %}{% break %}{% endif %}"
    "{% endfor %}",
    "a loop that skips": "{% for m in messages * 3 %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "a marked turn": "{% set n = 'w1' %}{% generation %}{% set n = 'w2' %}{{ messages[0].content }}{% endgeneration %}"
    "{{ n }}",
    "no tools": "{% if tools is none and documents is none %}w1{% else %}w2{% endif %}",
    "a namespace": "{% set ns = namespace(last='w1') %}{% for m in messages %}{% set ns.last = m.content %}{% endfor %}"
    "{{ ns.last }}",
    "JSON": "{{ messages | tojson(indent=2, sort_keys=True) }} {{ '<ï>' | tojson }} {{ eos_token }}",
    "a dict": "{{ dict(a='w3').a }}",
    "a lone turn refused": "{% if messages | length < 2 %}{{ raise_exception('begin with a system turn') }}{% endif %}",
    "a private name": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}w1",
    "malformed": "{% if %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_render_as_in_transformers(template: str, tmp_path: Path) -> None:
    tokenizer = words(template)
    assert text.agrees(tokenizer, tmp_path)
    plain = text.TextTokenizer(tmp_path)
    turns = [{"role": "system", "content": "w4 ï"}, {"role": "user", "content": "w5"}]
    for messages in (turns, turns[1:]):
        try:
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017  # whatever it is, it is told in one sentence
                plain.apply_chat_template(messages, add_generation_prompt=True)
        else:
            assert plain.apply_chat_template(messages, add_generation_prompt=True) == expected


@pytest.mark.parametrize("name", ["a lone turn refused", "malformed"])
def test_a_template_that_refuses_is_told_in_one_sentence(name: str, tmp_path: Path) -> None:
    tokenizer = words(TEMPLATES[name])
    tokenizer.save_pretrained(str(tmp_path))
    for each in (tokenizer, text.TextTokenizer(tmp_path)):
        with pytest.raises(
            GenerationError, match=r"^the model's chat template refuses the prompt \(.+\); give other turns"
        ):
            encode(each, "w3", chat=True)
        assert encode(each, "w3") == [3]


# Files and prompts


@pytest.mark.parametrize("prompt", ["w3 \ud83d w4", "w3 \udcff"])
def test_half_a_character_is_no_prompt(prompt: str) -> None:
    with pytest.raises(GenerationError, match=r"not valid text: .*surrogate.*UTF-8"):
        encode(words(), prompt)


CALIBRATION = {
    "a byte order mark": (b'\xef\xbb\xbf{"text": "w3 w4"}\n{"text": "w5"}\n', ["w3 w4", "w5"]),
    "a null row": (b'{"text": "w3"}\n{"text": null}\n{"text": ""}\n{"text": "w5"}\n', ["w3", "w5"]),
    "half a character": (b'{"text": "w3 \\ud83d w5"}\n', ["w3 \ud83d w5"]),
}


@pytest.mark.parametrize(("content", "expected"), CALIBRATION.values(), ids=CALIBRATION)
def test_calibration_texts_as_they_come(content: bytes, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert list(calibration.read_texts(str(tmp_path / "a.jsonl"))) == expected


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"text": ' + b"9" * 10_000 + b"}"])
def test_json_that_python_gives_up_on_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(calibration.CalibrationError, match=r"^line 1 of .* is not JSON"):
        list(calibration.read_texts(str(tmp_path / "a.jsonl")))


def test_parquet_rows_may_be_null_and_pages_damaged(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    rows = [f"w{i % 7} text {i}" for i in range(3000)]
    parquet.write_table(pyarrow.table({"text": [rows[0], None, "", *rows[1:]]}), file, compression="none")
    assert list(calibration.read_texts(str(file))) == rows
    damaged = bytearray(file.read_bytes())
    damaged[4:64] = bytes(60)
    file.write_bytes(damaged)
    with pytest.raises(calibration.CalibrationError, match="is not a readable parquet file"):
        list(calibration.read_texts(str(file)))


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffw3 ï".encode())
    assert evaluate.read_text(tmp_path / "a.txt") == "w3 ï"
    assert list(calibration.read_texts(str(tmp_path / "a.txt"))) == ["w3 ï"]


def test_halves_of_characters_are_tokenized() -> None:
    pieces = calibration._token_pieces(words(), ["w3 \ud83d w5", "w7 \ud83d\ude00"], "here")
    assert [p.tolist() for p in pieces] == [[3, 0, 5, 1], [7, 0, 1]]


@given(st.text("w3 ", min_size=0, max_size=80), st.integers(1, 9))
@settings(deadline=None, max_examples=100)
def test_documents_are_cut_without_a_loss(document: str, most: int) -> None:
    class Characters:
        eos_token_id = -1

        def __call__(self, piece: str, verbose: bool, add_special_tokens: bool = True) -> dict[str, list[int]]:
            assert 0 < len(piece) <= most
            return {"input_ids": [-2] * add_special_tokens + [ord(c) for c in piece]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_PIECE", most)
        ids = [i for piece in calibration._token_pieces(Characters(), [document], "here") for i in piece.tolist()]
    assert ids == ([-2, *map(ord, document), -1] if document else [])


def test_a_long_text_is_not_held_in_memory() -> None:
    """Four million tokens would be 32 MB as a list of Python's, 120 MB with the integers in it."""
    document = "w3 " * 20_000

    class Counting:
        eos_token_id = 1

        def __call__(self, piece: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": list(range(100)) * (len(piece) // 300)}

    model = SimpleNamespace(tokenizer=Counting(), name="m", module=zoo.ZOO["llama"].build())
    wanted = (30, 10)
    length = 12_500  # oversampled to four million tokens
    tracemalloc.start()
    ids, counts = calibration._sequences_of_text(
        model, (document for _ in range(400)), "here", wanted, length, 0, SimpleNamespace(note=pytest.fail)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts == wanted and ids.shape == (40, length) and ids.dtype == torch.int64
    assert peak < 6e6


# Stop tokens and sampling


class Silent(LanguageModel):
    """A model that is asked for its stop tokens alone."""

    tokenizer = None

    def __init__(self, config: dict[str, object]):
        self.config = config

    def session(self, batch: int, capacity: int = 0) -> None:
        raise NotImplementedError


def saved(folder: Path, **generation: object) -> Path:
    model = zoo.ZOO["llama"].build()
    model.generation_config.update(**generation)
    model.save_pretrained(str(folder))
    return folder


def test_stop_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    model = frontend.load(saved(tmp_path, eos_token_id=[2, 7, 9]))
    assert model.module.config.eos_token_id == 2
    assert Silent(frontend.capture(model).config).stop_tokens() == (2, 7, 9)


def test_without_a_generation_config_the_models_own_stop_token_counts(tmp_path: Path) -> None:
    (saved(tmp_path) / "generation_config.json").unlink()
    assert Silent(frontend.load(tmp_path).config).stop_tokens() == (2,)


def test_a_damaged_generation_config_is_told(tmp_path: Path) -> None:
    (saved(tmp_path) / "generation_config.json").write_bytes(b"{")
    with pytest.raises(frontend.ModelError, match=r"^the generation_config\.json of .* cannot be read"):
        frontend.load(tmp_path)


def test_a_null_quantization_config_is_none(tmp_path: Path) -> None:
    file = saved(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": None}))
    assert frontend.load(tmp_path).kind == "causal-lm"


@given(st.sampled_from([5e-324, 1e-310, 1e-300, 1e-30, 1e-9]), st.integers(0, 2**31), st.integers(0, 20))
@settings(deadline=None, max_examples=60)
def test_the_lowest_temperatures_take_the_likeliest_token(temperature: float, seed: int, k: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((3, 12)).astype(np.float32) * 100
    drawn = choose(logits, Sampling(temperature=temperature, top_k=k, top_p=0.9), generator)
    assert drawn.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e50, 1.7e308])
def test_the_highest_temperatures_make_all_tokens_alike(temperature: float) -> None:
    logits = np.array([[3e38, -3e38, 0.0, 1.0]], np.float32)
    sampling = Sampling(temperature=temperature, top_k=99)
    generator = np.random.default_rng(0)
    drawn = np.concatenate([choose(logits, sampling, generator) for _ in range(2000)])
    assert np.abs(np.bincount(drawn, minlength=4) / len(drawn) - 0.25).max() < 0.05


@given(
    st.integers(0, 2**31),
    st.integers(1, 3000),
    st.sampled_from([0.1, 1.0, 3.0, 30.0]),
    st.sampled_from([0, 1, 7, 500]),
    st.sampled_from([1e-9, 0.3, 0.95, 1 - 1e-12, 1.0]),
)
@settings(deadline=None, max_examples=200)
def test_draws_are_those_from_the_whole_vocabulary_in_order(seed: int, size: int, spread: float, k: int, p: float):
    logits = np.random.default_rng(seed).normal(0, spread, (2, size)).astype(np.float32).round(1)  # with equal ones
    drawn = choose(logits, Sampling(temperature=0.8, top_k=k, top_p=p), np.random.default_rng(seed))
    draws = np.random.default_rng(seed).random(2)
    for row, draw, token in zip(logits, draws, drawn, strict=True):
        scaled = (row.astype(np.float64) - row.max()) / 0.8
        if 0 < k < size:
            scaled[scaled < np.sort(scaled)[-k]] = -np.inf
        shares = np.exp(scaled) / np.exp(scaled).sum()
        order = np.argsort(-shares, kind="stable")
        reached = np.cumsum(shares[order])
        kept = reached[: 1 + int((reached < p).sum())]
        borders = kept / kept[-1]
        place = int(np.flatnonzero(order == token)[0])
        assert (borders[place - 1] if place else 0.0) <= draw + 1e-9 and draw - 1e-9 <= borders[place]


def test_the_smallest_top_p_leaves_the_likeliest_token() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.3]], np.float32))
    sampling = Sampling(temperature=1.0, top_p=5e-324)
    assert {int(choose(logits, sampling, np.random.default_rng(s))[0]) for s in range(50)} == {1}


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize("option", ["temperature", "top_p"])
def test_what_is_no_number_is_refused(option: str, value: float) -> None:
    with pytest.raises(GenerationError, match=option):
        Sampling(**{option: value})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told(temperature: float, broken: float) -> None:
    logits = np.array([[0.0, 1.0, broken]], np.float32)
    with pytest.raises(GenerationError, match="weights may be damaged"):
        choose(logits, Sampling(temperature=temperature), np.random.default_rng(0))


# The command

ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
"""Variables of a process whose files and streams are ASCII where nothing else is said."""

STRICT = """
import warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"lbllm_compile\\b")
from lbllm_compile import cli
cli.main()
"""
"""The command, in which a file of this package that is opened without an encoding is an error."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An artifact whose words are not ASCII and whose chat template refuses every prompt.

    Compiled where the locale's encoding is ASCII, and nothing may be read or written in it, to what a link points to.
    """
    folder = tmp_path_factory.mktemp("texts")
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    (folder / "text.txt").write_text("\ufeff" + " ".join(f"ï{i * i % 40}" for i in range(30_000)), encoding="utf-8")
    (folder / "elsewhere").mkdir()
    (folder / "out").symlink_to("elsewhere")
    environment = {**os.environ, "LBLLM_CACHE_DIR": str(folder / "cache")}
    line = [sys.executable, "-c", STRICT, "model.py", "--out", "out", "--calibration", "text.txt", "--preset", "quick"]
    line += ["--pipeline", 'canonicalize,annotate{keep_dense="*"},lower,cache,cleanup']
    variables = {**ASCII, "PYTHONWARNDEFAULTENCODING": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run(line, cwd=folder, env=environment | variables, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    return folder / "out", environment


def command(built: tuple[Path, dict[str, str]], arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Runs ``lbllm-compile run`` in a shell, which can close what Python cannot."""
    line = f"exec {sys.executable} -m lbllm_compile run {built[0]} --max-tokens 4 {arguments}"
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=built[1] | variables, capture_output=True, check=False)


def test_a_compile_in_an_ascii_locale_writes_utf8_to_where_a_link_points(built) -> None:
    out = built[0]
    assert out.is_symlink() and (out.parent / "elsewhere" / "graph.json").is_file()
    assert list(json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])[3] == "ï3"
    assert json.loads((out / "lbllm.lock").read_text(encoding="utf-8"))["calibration_source"] == "text.txt"


def test_an_ascii_output_gets_escapes(built) -> None:
    """And files are UTF-8 whatever the locale says."""
    plain = command(built, "--raw --prompt 'ï3 ï4'", PYTHONIOENCODING="utf-8")
    escaped = command(built, "--raw --prompt 'ï3 ï4'", **ASCII)
    assert plain.returncode == escaped.returncode == 0, escaped.stderr
    assert plain.stdout.decode().replace("ï", "\\xef") == escaped.stdout.decode("ascii")
    assert b"\\xef" in escaped.stdout


def test_a_refused_turn_is_one_sentence(built) -> None:
    result = command(built, "--prompt 'ï3'")
    assert result.returncode == 2
    said = b"refuses the prompt (the first turn must be the system); give other turns, or plain text (--raw)\n"
    assert result.stderr.endswith(said)


CLOSED = {
    "output": ("--raw --prompt ï3 >&-", 0, b""),
    "output and errors": ("--raw --prompt ï3 >&- 2>&-", 0, b""),
    "input that is not asked": ("--raw --prompt ï3 <&-", 0, b""),
    "input": ("--raw --prompt - <&-", 2, b"standard input is closed"),
    "a prompt that is no text": (r"--raw --prompt $'\xff3'", 2, b"the prompt is not UTF-8 text"),
    "input that is no text": (r"--raw --prompt - <<< $'\xff3'", 2, b"is not UTF-8 text"),
}


@pytest.mark.parametrize(("arguments", "code", "said"), CLOSED.values(), ids=CLOSED)
def test_what_is_closed_or_no_text(built, arguments: str, code: int, said: bytes) -> None:
    result = command(built, arguments)
    assert result.returncode == code, result.stderr
    assert said in result.stderr
    assert b"bug" not in result.stderr and b"Traceback" not in result.stderr


def test_a_byte_order_mark_is_no_part_of_a_prompt(built) -> None:
    marked = command(built, r"--raw --json --prompt - <<< $'\xef\xbb\xbfï3'")
    assert json.loads(marked.stdout)["prompt"] == "ï3"
