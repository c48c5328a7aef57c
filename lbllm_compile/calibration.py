"""What a model is calibrated on: its own samples, a text, a data set, or example inputs.

By default a language model writes its own calibration text, so that no data is needed (LLM-QAT, arXiv 2305.17888,
section 3.1): it samples at temperature 1, half of the sequences from its start token, half from random tokens. It
does so in chunks of sequences whose keys and values fit a fixed share of memory; each finished chunk is cached, under a
key of the weights, the seed and the sizes, so that an interrupted sampling goes on where it was. ``FILE.txt``,
``FILE.jsonl``, ``FILE.parquet`` and ``hf:NAME:CONFIG@SPLIT`` name other texts.

All sequences are equally long and none is padded. Calibration and validation sequences never overlap.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lbllm_compile import frontend
from lbllm_compile.codegen.cache import cache_directory, write_atomically
from lbllm_compile.codegen.errors import LbllmError, first_line
from lbllm_compile.codegen.progress import NoProgress, Progress, Task, warn
from lbllm_compile.frontend import UserModel, language_model_inputs
from lbllm_compile.native.language import context_length
from lbllm_compile.passes.base import batches_of
from lbllm_compile.passes.ir import spool
from lbllm_compile.passes.ir.program import Program

_SAMPLER = 3
"""Version of the sampling procedure, part of the cache key."""

_CHUNK_BYTES = 2 << 30
"""Most that keys and values of the sequences sampled at once take, counted in float32 on every machine."""

_LOGIT_COPIES = 4
"""Float32 copies of a step's logits while tokens are drawn: logits, probabilities, their sums, and one in passing."""

_OVERSAMPLING = 8
"""How many times the wanted tokens are read from a text before sequences are picked from them."""

_BLOCK = 1 << 16
"""Characters of a plain text that are read and tokenized at a time."""

_PIECE = 1 << 20
"""Most characters of one document that are tokenized at a time."""

_ROWS_AT_ONCE = 256
"""Documents of a parquet file that are read at a time."""

_MODULE_BATCHES = (16, 2)
"""Most random batches to calibrate and to validate a plain module with."""

_MODULE_ROWS = 64
"""Rows of such a batch."""

OWN_SAMPLES = "the model's own samples"
"""What is said of calibration data that follow from the model and the seed."""

PROBE_SHAPE = (2, 16)
"""Sequences and tokens of the probe batch."""

_PROBE_ROWS = 4
"""Rows of the probe batch of a plain module."""

DATA_SETS = f"{frontend.HUB}NAME[:CONFIG][@SPLIT]"
"""How a data set of the hub is written."""

_EXAMPLE = f"{frontend.HUB}Salesforce/wikitext:wikitext-2-raw-v1@train"
_DATA_SET = re.compile(r"((?:\w[\w.-]*/)?\w[\w.-]*)(?::([\w.+-]+))?(?:@([\w.+-]+))?")

Batch = Mapping[str, Tensor]


class CalibrationError(LbllmError):
    """The calibration data the user named cannot be used."""


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs for the passes that calibrate.

    Attributes:
        calibration: batches to fit on, each a mapping from placeholder to tensor.
        validation: held-out batches.
        probe: one small batch, cut from the validation batches.
        source: where they come from, in words.
        sha256: over the token ids (or input tensors) of calibration and validation, in order.
    """

    calibration: Sequence[Batch]
    validation: Sequence[Batch]
    probe: Batch
    source: str
    sha256: str

    @property
    def tokens(self) -> int:
        """Calibration tokens (or rows) in all."""
        return sum(_rows(batch) for batch in self.calibration)


def collect(
    model: UserModel,
    program: Program,
    source: str | None = None,
    *,
    tokens: int = 16384,
    validation_tokens: int = 2048,
    length: int = 256,
    batch: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Collects the calibration set of a model.

    Args:
        model: the loaded model; it is the one that samples.
        program: its captured program.
        source: ``FILE.txt``, ``FILE.jsonl`` (field ``text``), ``FILE.parquet`` (column ``text``), or
            ``hf:NAME:CONFIG@SPLIT``; None for the model.py's own hooks and, without those, the model's samples
            (gaussian inputs for a plain module).
        tokens, validation_tokens: how many to use, rounded up to whole sequences.
        length: tokens of a sequence, cut to what the model takes.
        batch: sequences of a batch.
        seed: of sampling and of picking sequences.
        device: where sampling runs.
        cache_dir: where sampled text is kept; by default ``calibration`` in the cache directory.
        progress: where to report.

    Raises:
        CalibrationError: the source is missing, unreadable, empty or too short, or the model cannot use it.
    """
    progress = progress or NoProgress()
    if model.kind != "causal-lm":
        if source is not None:
            raise CalibrationError(
                f"'{model.name}' is no language model, so the text '{source}' cannot calibrate it; define"
                " calibration_inputs() in its model.py instead"
            )
        return _module_set(model, program, tokens, validation_tokens, seed)
    length = min(length, _longest(model))
    counts = (math.ceil(tokens / length), math.ceil(validation_tokens / length))
    if writes_own(model, source):
        sequences = _cached_samples(model, counts, length, seed, torch.device(device), cache_dir, progress)
        origin = OWN_SAMPLES
    else:
        texts = model.calibration_text() if source is None else read_texts(source)  # type: ignore[misc]
        origin = source or model.calibration_origin or f"calibration_text() of {model.source}"
        sequences, counts = _sequences_of_text(model, texts, origin, counts, length, seed, progress)
    fit, held_out = sequences[: counts[0]], sequences[counts[0] :]
    rows, columns = PROBE_SHAPE
    return CalibrationSet(
        calibration=[language_model_inputs(ids) for ids in fit.split(batch)],
        validation=[language_model_inputs(ids) for ids in held_out.split(batch)],
        probe=language_model_inputs(held_out[:rows, :columns].clone()),
        source=origin,
        sha256=hashlib.sha256(sequences.numpy().tobytes()).hexdigest(),
    )


def writes_own(model: UserModel, source: str | None) -> bool:
    """Whether a model is calibrated on text that it writes itself: it is a language model, and no text is named."""
    return model.kind == "causal-lm" and source is None and model.calibration_text is None


def random_probe(model: UserModel, program: Program, seed: int) -> Batch:
    """A small batch that needs no calibration data: random tokens, or the example inputs of a plain module."""
    if model.kind != "causal-lm":
        return _some_rows(model.inputs, program)
    rows, columns = PROBE_SHAPE
    shape = (rows, min(columns, _longest(model)))
    generator = torch.Generator().manual_seed(seed)
    return language_model_inputs(torch.randint(_vocabulary(model), shape, generator=generator))


def _rows(batch: Batch) -> int:
    tensor = next(iter(batch.values()))
    return tensor.numel() if "input_ids" in batch else tensor.shape[0]


def _vocabulary(model: UserModel) -> int:
    return int(model.module.get_input_embeddings().num_embeddings)  # type: ignore[operator]


def _longest(model: UserModel) -> int:
    return context_length(model.config) or 1 << 30


# Text


def read_texts(source: str) -> Iterator[str]:
    """The documents of a text source.

    Raises:
        CalibrationError: it does not exist, has no such format, or holds something else than text.
    """
    if source.startswith(frontend.HUB):
        return _read_data_set(DataSet.parse(source))
    path = Path(source).expanduser()
    if not path.is_file():
        raise CalibrationError(f"there is no calibration file '{source}'; name a .txt, .jsonl or .parquet file")
    readers = {".txt": _read_plain, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise CalibrationError(f"the calibration file '{path}' must end in .txt, .jsonl or .parquet, or be {DATA_SETS}")
    return readers[path.suffix](path)


def _lines(path: Path, longest: int = -1) -> Iterator[str]:
    """Lines of a UTF-8 file, those of more than ``longest`` characters in parts; a byte order mark is skipped."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while line := file.readline(longest):
                yield line
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"the calibration file '{path}' is not UTF-8 text (it has the byte 0x{error.object[error.start]:02x});"
            " convert it first, e.g. with iconv"
        ) from error
    except OSError as error:
        raise CalibrationError(f"the calibration file '{path}' cannot be read: {error.strerror}") from error


def _read_plain(path: Path) -> Iterator[str]:
    """Blocks of ``_BLOCK`` characters or so, cut at line ends where lines are shorter."""
    block: list[str] = []
    size = 0
    for line in _lines(path, _BLOCK):
        block.append(line)
        size += len(line)
        if size > _BLOCK:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def _read_json_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or first_line(error)
            raise CalibrationError(f"line {number} of '{path}' is not JSON: {reason}") from error
        if not isinstance(value, dict) or not isinstance(value.get("text", 0), str | None):
            raise CalibrationError(f"line {number} of '{path}' has no string field 'text'")
        if value["text"]:
            yield value["text"]


def _read_parquet(path: Path) -> Iterator[str]:
    _require("pyarrow", "data", f"reading '{path}'")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise CalibrationError(f"'{path}' has no column 'text'; it has {', '.join(file.schema_arrow.names)}")
        for part in file.iter_batches(_ROWS_AT_ONCE, columns=["text"]):
            yield from (value for value in part.column(0).to_pylist() if value)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"'{path}' is not a readable parquet file: {first_line(error)}") from error


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub: its name, one of its configurations (None where it has only one), and a split of that."""

    name: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, source: str) -> DataSet:
        """Reads ``hf:NAME``, ``hf:NAME:CONFIG``, ``hf:NAME@SPLIT`` or ``hf:NAME:CONFIG@SPLIT``.

        Raises:
            CalibrationError: it is none of these.
        """
        match = _DATA_SET.fullmatch(source.removeprefix(frontend.HUB))
        if match is None:
            raise CalibrationError(f"'{source}' names no data set; write it as {DATA_SETS}, e.g. {_EXAMPLE}")
        name, config, split = match.groups()
        return cls(name, config, split or cls.split)

    def __str__(self) -> str:
        return f"{self.name}{f':{self.config}' if self.config else ''}@{self.split}"


def _read_data_set(wanted: DataSet) -> Iterator[str]:
    _require("datasets", "hub", f"reading the data set '{wanted.name}'")
    import datasets  # pyright: ignore[reportMissingImports]

    try:
        stream = datasets.load_dataset(wanted.name, wanted.config, split=wanted.split, streaming=True)
        for row in stream:
            if not isinstance(row.get("text", 0), str | None):
                raise CalibrationError(f"the data set '{wanted}' has no column 'text'; it has {', '.join(row)}")
            if row["text"]:
                yield row["text"]
    except LbllmError:
        raise
    except Exception as error:
        # Which configurations and splits there are is in the second line.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
        reason = " ".join(lines).rstrip(".") or type(error).__name__
        raise CalibrationError(f"the data set '{wanted}' cannot be read: {reason}; write it as {DATA_SETS}") from error


def _require(package: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise CalibrationError(
            f"{purpose} needs the package {package}; install it with `pip install 'lbllm-compile[{extra}]'`"
        )


def _sequences_of_text(
    model: UserModel,
    texts: Iterable[str],
    origin: str,
    counts: tuple[int, int],
    length: int,
    seed: int,
    progress: Progress,
) -> tuple[Tensor, tuple[int, int]]:
    """Token ids ``[sequences, length]`` picked from a text, and how many of them calibrate and validate.

    A text shorter than asked for is used whole, one sequence in nine for validation.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise CalibrationError(
            f"'{model.name}' has no tokenizer to read '{origin}' with; define tokenizer() in its model.py"
        )
    wanted = sum(counts)
    stored, tokens, highest = _tokenized(tokenizer, texts, origin, length, _OVERSAMPLING * wanted * length)
    available = len(stored)
    if available < 2:
        raise CalibrationError(
            f"the calibration text '{origin}' is empty or too short: it has {tokens} tokens, at least {2 * length} are"
            " needed"
        )
    if highest >= _vocabulary(model):
        raise CalibrationError(
            f"the tokenizer of '{model.name}' makes the token {highest}, but the model has only"
            f" {_vocabulary(model)}; use the tokenizer the model was trained with"
        )
    if available < wanted:
        held_out = max(1, available // 9)
        counts = (available - held_out, held_out)
        warn(progress, None, f"{origin} has only {available * length} tokens, all of which are used")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    picked = torch.empty((sum(counts), length), dtype=torch.int64)
    for row, index in zip(picked, order.tolist(), strict=False):
        row.copy_(stored[index].read())
    return picked, counts


def _tokenized(
    tokenizer: Any, texts: Iterable[str], origin: str, length: int, most: int
) -> tuple[list[spool.Record], int, int]:
    """Whole sequences of ``length`` token ids, int32 and kept in a file; the number of tokens, and the highest of them.

    Documents are read and tokenized a piece at a time, until there are ``most`` tokens or more; an end token stands
    behind each document where the tokenizer has one.
    """
    records, stored = spool.Records(), []
    rest = np.empty(0, np.int32)
    tokens, highest = 0, -1
    for ids in _token_pieces(tokenizer, texts, origin):
        tokens, highest = tokens + len(ids), max(highest, int(ids.max(initial=-1)))
        rest = np.concatenate([rest, ids])
        whole = len(rest) // length * length
        stored += [records.put(torch.from_numpy(rest[i : i + length])) for i in range(0, whole, length)]
        rest = rest[whole:]
        if tokens >= most:
            break
    return stored, tokens, highest


def _token_pieces(tokenizer: Any, texts: Iterable[str], origin: str) -> Iterator[np.ndarray]:
    """Token ids int32 of one piece of a document after the other, the last of them with an end token.

    Halves of surrogate pairs, which JSON can spell and no tokenizer takes, become U+FFFD.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        if not isinstance(text, str):
            raise CalibrationError(f"{origin} yields {type(text).__name__} instead of strings")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        start = 0
        while start < len(text):
            stop = _cut(text, start)
            # What a tokenizer puts in front of a text goes in front of the first piece alone.
            options = {"add_special_tokens": False} if start else {}
            ids = tokenizer(text[start:stop], verbose=False, **options)["input_ids"]
            yield np.array([*ids, *(end if stop == len(text) else ())], np.int32)
            start = stop


def _cut(text: str, start: int) -> int:
    """Where a piece ends that starts at ``start``: at most ``_PIECE`` characters on, in front of a space if any."""
    if len(text) - start <= _PIECE:
        return len(text)
    space = text.rfind(" ", start + 1, start + _PIECE)
    return space if space > start else start + _PIECE


# Samples


def _cached_samples(
    model: UserModel,
    counts: tuple[int, int],
    length: int,
    seed: int,
    device: torch.device,
    cache_dir: Path | None,
    progress: Progress,
) -> Tensor:
    directory = cache_dir or cache_directory() / "calibration"
    key = json.dumps([_SAMPLER, frontend.weights_hash(model.module), length, seed, device.type])
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    return sample(model, sum(counts), length, seed, device, progress, directory / digest)


def sample(
    model: UserModel,
    sequences: int,
    length: int,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    kept: Path | None = None,
) -> Tensor:
    """Samples token ids ``int64 [sequences, length]`` from a language model at temperature 1.

    Every second sequence starts with the model's start token (where it has one), the others with a random token. The
    weights are bfloat16 where the device multiplies that natively: the text needs to be likely, not exact.

    Args:
        kept: start of the names of the files in which finished chunks are kept, and looked for first; None keeps none.
    """
    progress = progress or NoProgress()
    most = chunk_rows(model.module.config, length)  # type: ignore[arg-type]
    rows = [min(most, sequences - start) for start in range(0, sequences, most)]
    files = [None if kept is None else kept.with_name(f"{kept.name}-{i}x{n}.safetensors") for i, n in enumerate(rows)]
    chunks = {
        i: ids for i, file in enumerate(files) if (ids := _read_chunk(file, (rows[i], length), progress)) is not None
    }
    missing = [i for i in range(len(rows)) if i not in chunks]
    if missing:
        module = _sampling_module(model.module, torch.device(device))
        with progress.task("sampling the calibration text", len(missing) * (length - 1)) as task:
            for i in missing:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
                first = _first_tokens(model, range(i * most, i * most + rows[i]), generator)
                chunks[i] = _generate(module, first, length, generator, task)
                _write_chunk(files[i], chunks[i], progress)
        spool.release()
    return torch.cat([chunks[i] for i in range(len(rows))])


def chunk_rows(config: Any, length: int) -> int:
    """Sequences of ``length`` tokens that are sampled at once.

    Args:
        config: the model's transformers configuration.
    """
    return max(1, _CHUNK_BYTES // _cache_bytes(config, length))


def _cache_bytes(config: Any, length: int) -> int:
    """Float32 keys and values of one sequence."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return 2 * 4 * config.num_hidden_layers * kept * width * length


def sampling_bytes(config: Any, sequences: int, length: int) -> int:
    """Memory that sampling a calibration text takes at most, the model itself not counted."""
    rows = min(sequences, chunk_rows(config, length))
    return rows * (_cache_bytes(config, length) + 4 * _LOGIT_COPIES * config.get_text_config().vocab_size)


def _read_chunk(file: Path | None, shape: tuple[int, int], progress: Progress) -> Tensor | None:
    """A finished chunk of token ids; None where there is none, or where it is damaged."""
    from safetensors.torch import load_file

    if file is None or not file.is_file():
        return None
    try:
        ids = load_file(file)["input_ids"].long()
    except Exception as error:
        warn(progress, None, f"the cached calibration text {file} is damaged ({error}); it is sampled again")
        return None
    return ids if ids.shape == shape else None


def _write_chunk(file: Path | None, ids: Tensor, progress: Progress) -> None:
    from safetensors.torch import save

    if file is None:
        return
    try:
        write_atomically(file, save({"input_ids": ids.int()}))
    except OSError as error:
        warn(
            progress,
            "calibration not kept",
            f"the calibration text is not kept for the next time ({error}); set LBLLM_CACHE_DIR",
        )


def _first_tokens(model: UserModel, sequences: range, generator: torch.Generator) -> Tensor:
    """Token ids ``[sequences, 1]`` to start from, of sequences of these numbers."""
    first = torch.randint(_vocabulary(model), (len(sequences), 1), generator=generator)
    start = model.config.get("bos_token_id")
    if isinstance(start, int) and 0 <= start < _vocabulary(model):
        first[sequences.start % 2 :: 2] = start
    return first


def _sampling_module(module: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, in bfloat16 where that is fast."""
    if device.type != "cpu" or samples_in_bfloat16():
        return _bfloat16_copy(module, device)
    return module


def samples_in_bfloat16() -> bool:
    """Whether sampling on the CPU takes a bfloat16 copy of the weights."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def _bfloat16_copy(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy with bfloat16 parameters; buffers, such as rotary frequencies, keep their precision."""
    memo: dict[int, Any] = {}
    gauge = spool.Gauge()
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to(device, torch.bfloat16), False)
        gauge.use([parameter])
    memo.update({id(b): b.to(device) for b in module.buffers()})
    return copy.deepcopy(module, memo)


@torch.inference_mode()
def _generate(module: nn.Module, first: Tensor, length: int, generator: torch.Generator, task: Task) -> Tensor:
    from transformers.cache_utils import Cache

    device = next(module.parameters()).device
    layers = module.config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    cache = Cache(layers=[_preallocated_layer(length) for _ in range(layers)])
    ids = first
    with _HeadsTogether():
        for _ in range(length - 1):
            logits = module(input_ids=ids[:, -1:].to(device), past_key_values=cache, use_cache=True).logits[:, -1]
            ids = torch.cat([ids, _draw(logits.float().cpu(), generator)], 1)
            task.advance()
    return ids


class _HeadsTogether(TorchFunctionMode):
    """Lets the query heads that share a key head attend as rows of one, which is the same attention where each sequence
    has one query: torch's kernel for CPUs reads, and in bfloat16 rearranges, the keys anew for every head."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attend = functional.scaled_dot_product_attention
        if func is not attend or not _one_query_of_shared_heads(*args, **(kwargs or {})):
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        batch, heads, length, width = query.shape
        rows = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
        found = attend(rows, key, value, scale=(kwargs or {}).get("scale"))
        return found.reshape(batch, heads, length, value.shape[-1])


def _one_query_of_shared_heads(query: Tensor, key: Tensor, value: Tensor, *masked: Any, **options: Any) -> bool:
    """Whether a call of torch's attention has one query a sequence, of heads that share key heads, for all its keys."""
    plain = not (masked or any(v for k, v in options.items() if k not in ("scale", "enable_gqa", "attn_mask")))
    shared = query.dim() == key.dim() == 4 and query.shape[1] > key.shape[1] == value.shape[1]
    return plain and options.get("attn_mask") is None and shared and query.shape[2] == 1


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row ``[B, 1]`` from logits ``[B, V]``, by inverting the distribution function."""
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    point = torch.rand((len(logits), 1), generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).clamp_(max=logits.shape[-1] - 1)


def _preallocated_layer(capacity: int) -> Any:
    """A KV cache layer that writes into place, where transformers' own copies all it has at every token."""
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        used = 0

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.stored = [x.new_empty((*x.shape[:2], capacity, x.shape[3])) for x in (key_states, value_states)]
            end = self.used + key_states.shape[2]
            for stored, new in zip(self.stored, (key_states, value_states), strict=True):
                stored[:, :, self.used : end] = new
            self.used = end
            self.keys, self.values = (stored[:, :, :end] for stored in self.stored)
            return self.keys, self.values

    return PreallocatedLayer()


# Plain modules


def _module_set(model: UserModel, program: Program, tokens: int, validation_tokens: int, seed: int) -> CalibrationSet:
    """Batches for a module that is no language model: the user's, or gaussian ones like its example."""
    if model.calibration_inputs is not None:
        origin = model.calibration_origin or f"calibration_inputs() of {model.source}"
        batches = [_fitting(model, program, inputs, origin) for inputs in model.calibration_inputs()]
        if len(batches) < 2:
            raise CalibrationError(f"{origin} yields {len(batches)} batches; at least 2 are needed")
        held_out = max(1, len(batches) // 9)
        fit, validation = batches[:-held_out], batches[-held_out:]
    else:
        origin = "random inputs like example_inputs()"
        rows = _MODULE_ROWS if _batch_is_dynamic(program) else _rows(model.inputs)
        generator = torch.Generator().manual_seed(seed)
        wanted = zip((tokens, validation_tokens), _MODULE_BATCHES, strict=True)
        counts = [min(most, max(1, math.ceil(count / rows))) for count, most in wanted]
        fit, validation = ([_variation(model.inputs, rows, generator) for _ in range(count)] for count in counts)
    digest = hashlib.sha256()
    for batch in chain(fit, validation):
        for name, tensor in batch.items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return CalibrationSet(fit, validation, _some_rows(validation[0], program), origin, digest.hexdigest())


def _some_rows(batch: Batch, program: Program) -> Batch:
    """A few rows of a plain module's batch; all of it where the batch size is fixed."""
    return next(batches_of(batch, _PROBE_ROWS)) if _batch_is_dynamic(program) else batch


def _fitting(model: UserModel, program: Program, inputs: Any, origin: str) -> Batch:
    """One of the user's batches, which must be like the example inputs that the program was captured with.

    Raises:
        CalibrationError: it has other sizes or another dtype.
    """
    batch = frontend.bind_inputs(model.module, inputs, "calibration_inputs")
    free = 1 if _batch_is_dynamic(program) else 0

    def kind(tensor: Tensor) -> tuple[torch.dtype, int, torch.Size]:
        return tensor.dtype, tensor.dim(), tensor.shape[free:]

    for name, example in model.inputs.items():
        tensor = batch.get(name)
        if tensor is None or kind(tensor) != kind(example):
            given = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CalibrationError(
                f"{origin} gives {given} for '{name}', where example_inputs() has {example.dtype}"
                f" {tuple(example.shape)}; only the batch size may differ"
            )
    return batch


def _batch_is_dynamic(program: Program) -> bool:
    """Whether the first dimension of the program's inputs is free."""
    values = [node.meta["val"] for node in program.placeholders()]
    return all(isinstance(value.shape[0], torch.SymInt) for value in values if value.dim())


def _variation(inputs: Batch, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random inputs with the mean and spread of the example: gaussian, or uniform over the range of integers."""
    batch = {}
    for name, example in inputs.items():
        shape = (rows, *example.shape[1:]) if example.dim() else ()
        if example.is_floating_point():
            spread = float(example.std()) if example.numel() > 1 else 1.0
            batch[name] = torch.randn(shape, generator=generator) * (spread or 1.0) + float(example.mean())
        elif example.dtype is torch.bool:
            batch[name] = torch.rand(shape, generator=generator) < 0.5
        else:
            low, high = int(example.min()), int(example.max())
            batch[name] = torch.randint(low, high + 1, shape, generator=generator, dtype=example.dtype)
    return batch
