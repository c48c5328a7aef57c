"""Calibration data: samples of the model, texts, inputs; and the sentence that each mistake gets."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from torch import nn

from lbllm_compile import calibration, frontend
from lbllm_compile.calibration import CalibrationError, CalibrationSet
from lbllm_compile.frontend import UserModel

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def model() -> UserModel:
    """The tiny LLaMA of the examples: it has a tokenizer."""
    return frontend.load(EXAMPLES / "tiny_llama.py")


@pytest.fixture(scope="module")
def program(model: UserModel) -> SimpleNamespace:
    """Stands for the captured program, which calibrating a language model does not look at."""
    return SimpleNamespace()


class Log:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[tuple[str, int]] = []
        self.steps = 0

    def task(self, title: str, total: int) -> Log:
        self.tasks.append((title, total))
        return self

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, note: str = "") -> None:
        self.steps += 1

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def rows(data: CalibrationSet) -> list[list[int]]:
    return [row for batch in (*data.calibration, *data.validation) for row in batch["input_ids"].tolist()]


# The model's own samples


def test_samples(model: UserModel, program: SimpleNamespace, tmp_path: Path) -> None:
    log = Log()
    state = torch.random.get_rng_state()
    options = {"tokens": 160, "validation_tokens": 50, "length": 20, "batch": 3, "cache_dir": tmp_path}
    data = calibration.collect(model, program, **options, progress=log)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [b["input_ids"].shape for b in data.calibration] == [(3, 20), (3, 20), (2, 20)]
    assert [b["input_ids"].shape for b in data.validation] == [(3, 20)]
    assert data.tokens == 160 and data.probe["input_ids"].shape == calibration.PROBE_SHAPE
    for batch in (*data.calibration, *data.validation, data.probe):
        assert bool(batch["attention_mask"].all())
        assert torch.equal(
            batch["position_ids"], torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        )
    assert log.tasks == [("sampling the calibration text", 19)] and log.steps == 19
    again = Log()
    assert calibration.collect(model, program, **options, progress=again).sha256 == data.sha256
    assert again.tasks == [], "the second time it comes from the cache"
    other = calibration.collect(model, program, **options, seed=1)
    assert other.sha256 != data.sha256


def test_sampling_goes_on_behind_the_chunks_that_were_finished(
    model: UserModel, program: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_CHUNK_BYTES", 4 * calibration._cache_bytes(model.module.config, 10))
    options = {"tokens": 80, "validation_tokens": 20, "length": 10}
    whole = calibration.collect(model, program, **options, cache_dir=tmp_path / "whole")
    assert len(list((tmp_path / "whole").iterdir())) == 3, "10 sequences, 4 at once"
    assert len({tuple(row) for row in rows(whole)}) == 10

    class Interrupts(Log):
        def advance(self, note: str = "") -> None:
            super().advance(note)
            if self.steps == 13:  # in the middle of the second chunk
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.collect(model, program, **options, cache_dir=tmp_path / "cut", progress=Interrupts())
    assert len(list((tmp_path / "cut").iterdir())) == 1
    log = Log()
    resumed = calibration.collect(model, program, **options, cache_dir=tmp_path / "cut", progress=log)
    assert resumed.sha256 == whole.sha256
    assert log.tasks == [("sampling the calibration text", 2 * 9)] and log.steps == 2 * 9


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_what_sampling_holds_is_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.user_model(name)
    held: list[int] = []
    made = calibration._preallocated_layer

    def watched(capacity: int) -> object:
        layer = made(capacity)
        update = layer.update

        def count(*args: object, **options: object) -> object:
            result = update(*args, **options)
            if layer.used == 1:
                held.append(sum(x.numel() for x in layer.stored))
            return result

        layer.update = count
        return layer

    monkeypatch.setattr(calibration, "_preallocated_layer", watched)
    calibration.sample(model, sequences=3, length=20, seed=0)
    planned = 3 * calibration._cache_bytes(model.module.config, 20)
    assert 4 * sum(held) == planned
    most = calibration.chunk_rows(model.module.config, 128)
    assert calibration.sampling_bytes(model.module.config, 10**9, 128) == pytest.approx(
        calibration._CHUNK_BYTES, rel=0.2
    )
    assert calibration.sampling_bytes(model.module.config, most, 128) == calibration.sampling_bytes(
        model.module.config, 2 * most, 128
    )


def test_the_probe_needs_no_calibration_data(model: UserModel, program: SimpleNamespace) -> None:
    probe = calibration.random_probe(model, program, 3)
    assert probe["input_ids"].shape == calibration.PROBE_SHAPE
    assert int(probe["input_ids"].min()) >= 0 and int(probe["input_ids"].max()) < model.config["vocab_size"]
    assert torch.equal(probe["input_ids"], calibration.random_probe(model, program, 3)["input_ids"])


def test_a_damaged_cache_is_replaced(model: UserModel, program: SimpleNamespace, tmp_path: Path) -> None:
    options = {"tokens": 20, "validation_tokens": 10, "length": 10, "cache_dir": tmp_path}
    data = calibration.collect(model, program, **options)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"nonsense")
    log = Log()
    assert calibration.collect(model, program, **options, progress=log).sha256 == data.sha256
    assert "is damaged" in log.notes[0] and len(log.tasks) == 1


def test_a_cache_that_cannot_be_written_only_costs_time(
    model: UserModel, program: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "file"))
    log = Log()
    data = calibration.collect(model, program, tokens=20, validation_tokens=10, length=10, progress=log)
    assert data.tokens == 20 and "set LBLLM_CACHE_DIR" in log.notes[0]


def test_samples_depend_on_the_weights(model: UserModel, program: SimpleNamespace, tmp_path: Path) -> None:
    options = {"tokens": 20, "validation_tokens": 10, "length": 10, "cache_dir": tmp_path}
    calibration.collect(model, program, **options)
    other = frontend.load(EXAMPLES / "tiny_llama.py")
    other.module.model.norm.weight.data.mul_(2)
    calibration.collect(other, program, **options)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "opt"])
def test_samples_follow_the_model(name: str) -> None:
    """Each token is drawn from the distribution that the model gives without a cache: sharpened, it is the best one."""
    model = zoo.user_model(name)
    head = model.module.get_output_embeddings().weight
    head.data = head.data.clone() * 400  # so likely that drawing means choosing; cloned, as it may be tied
    ids = calibration.sample(model, sequences=4, length=20, seed=0)
    logits = model.module(**frontend.language_model_inputs(ids)).logits
    agreement = (logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
    assert agreement > 0.9  # sampling may run in bfloat16


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"attn_mask": torch.arange(5)[None] > 1}, {"is_causal": True}])
def test_heads_that_share_keys_attend_together(queries: int, key_heads: int, options: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, queries, 8, generator=generator)
    key, value = torch.randn(2, 2, key_heads, 5, 8, generator=generator).unbind()
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(query, key, value, enable_gqa=True, **options)
    with calibration._HeadsTogether():
        torch.testing.assert_close(attend(query, key, value, enable_gqa=True, **options), expected)


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_every_second_sequence_starts_with_the_start_token(
    model: UserModel, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(calibration, "_CHUNK_BYTES", at_once * calibration._cache_bytes(model.module.config, 2))
    ids = calibration.sample(model, sequences=8, length=2, seed=0)
    assert ids[::2, 0].tolist() == [1, 1, 1, 1]
    assert len(set(ids[1::2, 0].tolist())) > 1


def test_drawing_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = calibration._draw(probabilities.log().expand(20000, 4), torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn.flatten(), minlength=4) / len(drawn)
    assert frequencies[1] == 0
    torch.testing.assert_close(frequencies, probabilities, atol=0.02, rtol=0)


def test_sequences_fit_the_model(program: SimpleNamespace, tmp_path: Path) -> None:
    model = zoo.user_model("llama")
    data = calibration.collect(
        model, program, tokens=1, validation_tokens=1, length=100_000, cache_dir=tmp_path, batch=1
    )
    assert data.calibration[0]["input_ids"].shape == (1, model.config["max_position_embeddings"])


# Texts

TEXT = "".join(f"line {i} says {i * i}\n" for i in range(400))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_texts(model: UserModel, program: SimpleNamespace, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_text(TEXT if suffix == ".txt" else "\n".join(json.dumps({"text": TEXT[i::2]}) for i in (0, 1)) + "\n\n")
    data = calibration.collect(model, program, str(path), tokens=320, validation_tokens=64, length=32)
    found = rows(data)
    assert len(found) == 12 and all(len(row) == 32 for row in found)
    assert len({tuple(row) for row in found}) == 12, "calibration and validation do not overlap"
    assert data.source == str(path)
    other = calibration.collect(model, program, str(path), tokens=320, validation_tokens=64, length=32, seed=1)
    assert other.sha256 != data.sha256
    if suffix == ".txt":
        assert all(model.tokenizer.decode(row) in TEXT for row in found)


def test_a_short_text_is_used_whole(model: UserModel, program: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(TEXT[:2000])
    log = Log()
    data = calibration.collect(model, program, str(path), tokens=16384, length=100, progress=log)
    assert (sum(len(b["input_ids"]) for b in data.calibration), len(data.validation[0]["input_ids"])) == (18, 2)
    assert "has only 2000 tokens" in log.notes[0]


def test_the_models_own_text(model: UserModel, program: SimpleNamespace) -> None:
    def text() -> Iterator[str]:
        while True:  # nobody reads it to the end
            yield TEXT

    own = UserModel(**{**vars(model), "calibration_text": text})
    data = calibration.collect(own, program, tokens=320, validation_tokens=64, length=32)
    assert len(rows(data)) == 12 and data.source.startswith("calibration_text()")


BAD_TEXTS = {
    "missing": (None, "none.txt", "there is no calibration file"),
    "empty": (b"", "a.txt", "is empty or too short: it has 0 tokens, at least 64 are needed"),
    "too short": (b"hello", "a.txt", "it has 6 tokens, at least 64"),
    "not UTF-8": (b"caf\xe9 " * 100, "a.txt", r"is not UTF-8 text \(it has the byte 0xe9\)"),
    "another suffix": (b"hello", "a.csv", r"must end in \.txt, \.jsonl or \.parquet"),
    "no JSON": (b'{"text": "a"}\nnope\n', "a.jsonl", "line 2 of .* is not JSON"),
    "no field": (b'{"content": "a"}\n', "a.jsonl", "line 1 of .* has no string field 'text'"),
    "no string": (b'{"text": 3}\n', "a.jsonl", "line 1 of .* has no string field 'text'"),
    "no object": (b"[1]\n", "a.jsonl", "line 1 of .* has no string field 'text'"),
}


@pytest.mark.parametrize(("content", "name", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_bad_texts(
    model: UserModel, program: SimpleNamespace, tmp_path: Path, content: bytes | None, name: str, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        calibration.collect(model, program, str(path), length=32)


@pytest.mark.parametrize(
    ("source", "package", "extra"), [("{}/a.parquet", "pyarrow", "data"), ("hf:wikitext", "datasets", "hub")]
)
def test_missing_packages_are_named(
    model: UserModel,
    program: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    package: str,
    extra: str,
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(
        CalibrationError, match=rf"package {package}; install it with `pip install 'lbllm-compile\[{extra}\]'`"
    ):
        calibration.collect(model, program, source.format(tmp_path))


class StubbedDataSets:
    """Stands for the package datasets: one data set with two configurations, one split each."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, str]] = []

    def load_dataset(
        self, name: str, config: str | None, *, split: str, streaming: bool
    ) -> list[dict[str, str | None]]:
        assert streaming
        self.asked.append((name, config, split))
        if config is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample:"
            )
        if split != "train":
            raise ValueError(f"Bad split: {split}. Available splits: ['train']")
        return [{"text": None}, *[{"text": f"{config} says much. " * 50}] * 40, {"text": None}]


@pytest.fixture
def data_sets(monkeypatch: pytest.MonkeyPatch) -> StubbedDataSets:
    stub = StubbedDataSets()
    monkeypatch.setitem(sys.modules, "datasets", stub)
    monkeypatch.setattr(calibration, "_require", lambda *_: None)
    return stub


def test_a_data_set_has_a_configuration_and_a_split(
    model: UserModel, program: SimpleNamespace, data_sets: StubbedDataSets
) -> None:
    data = calibration.collect(model, program, "hf:org/set:a@train", tokens=64, validation_tokens=32, length=32)
    assert data.source == "hf:org/set:a@train" and data_sets.asked == [("org/set", "a", "train")]
    other = calibration.collect(model, program, "hf:org/set:b", tokens=64, validation_tokens=32, length=32)
    assert other.sha256 != data.sha256 and data_sets.asked[1] == ("org/set", "b", "train")
    assert {*calibration.read_texts("hf:org/set:a")} == {"a says much. " * 50}


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("hf:wikitext", ("wikitext", None, "train")),
        ("hf:a/b@test", ("a/b", None, "test")),
        ("hf:a/b:c-1.0@x.y", ("a/b", "c-1.0", "x.y")),
    ],
)
def test_forms_of_a_data_sets_name(source: str, wanted: tuple[str, str | None, str]) -> None:
    found = calibration.DataSet.parse(source)
    assert (found.name, found.config, found.split) == wanted


@pytest.mark.parametrize("source", ["hf:", "hf:a/b/c", "hf:a:b:c", "hf:a@", "hf:a:", "hf:a@b@c", "hf:a@b:c", "hf:/a"])
def test_a_wrong_form_says_the_right_one(source: str) -> None:
    with pytest.raises(CalibrationError, match=r"names no data set; write it as hf:NAME\[:CONFIG\]\[@SPLIT\]"):
        calibration.read_texts(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:set", r"pick one among the available configs: \['a', 'b'\]; write it as hf:NAME\[:CONFIG\]"),
        ("hf:set:a@tset", r"'set:a@tset' cannot be read: Bad split: tset. Available splits: \['train'\]; write it as"),
    ],
)
def test_what_a_data_set_has_is_said(data_sets: StubbedDataSets, source: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        next(calibration.read_texts(source))
    assert "\n" not in str(caught.value)


def test_text_needs_a_tokenizer_that_fits(model: UserModel, program: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    without = UserModel(**{**vars(model), "tokenizer": None})
    with pytest.raises(CalibrationError, match="has no tokenizer"):
        calibration.collect(without, program, str(path))
    misfit = UserModel(**{**vars(zoo.user_model("llama")), "tokenizer": model.tokenizer})
    with pytest.raises(CalibrationError, match="use the tokenizer the model was trained with"):
        calibration.collect(misfit, program, str(path))


# Plain modules


def test_modules_get_inputs_like_their_example(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 6)
            self.a = nn.Linear(6, 6)

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.table(ids) + x)

    inputs = {"ids": torch.arange(8).view(8, 1), "x": 5 + 2 * torch.randn(8, 1, 6, generator=torch.Generator())}
    model = frontend.prepare(UserModel(Net(), "module", "net", "-", inputs=inputs))
    program = frontend.capture(model)
    data = calibration.collect(model, program, tokens=200, validation_tokens=10)
    assert [{n: tuple(t.shape) for n, t in b.items()} for b in data.calibration] == [
        {"ids": (64, 1), "x": (64, 1, 6)}
    ] * 4
    assert len(data.validation) == 1 and data.probe["x"].shape == (4, 1, 6) and data.tokens == 256
    values = torch.cat([b["x"] for b in data.calibration])
    assert abs(float(values.mean()) - float(inputs["x"].mean())) < 0.3
    ids = torch.cat([b["ids"] for b in data.calibration])
    assert ids.dtype == torch.int64 and (int(ids.min()), int(ids.max())) == (0, 7)
    assert program.run(data.probe).shape == (4, 1, 6)
    assert calibration.collect(model, program, tokens=200, validation_tokens=10).sha256 == data.sha256


def test_modules_may_bring_inputs(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(
        "import torch\ndef build_model(): return torch.nn.Linear(4, 4)\ndef example_inputs(): return torch.ones(2, 4)\n"
        "def calibration_inputs():\n    for i in range(12): yield torch.full((3, 4), float(i))\n"
    )
    model = frontend.load(path)
    data = calibration.collect(model, frontend.capture(model))
    assert [int(b["input"][0, 0]) for b in (*data.calibration, *data.validation)] == list(range(12))
    assert len(data.validation) == 1
    with pytest.raises(CalibrationError, match="is no language model"):
        calibration.collect(model, frontend.capture(model), "text.txt")


def test_modules_of_a_fixed_batch() -> None:
    class Fixed(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input.view(4, 6))

    model = frontend.prepare(UserModel(Fixed(6, 6), "module", "f", "-", inputs={"input": torch.ones(4, 6)}))
    program = frontend.capture(model)
    data = calibration.collect(model, program, tokens=100)
    assert {tuple(b["input"].shape) for b in (*data.calibration, data.probe)} == {(4, 6)}
