"""Schemes: how one linear is quantized, and the text that gives linears their schemes by path.

``*.down_proj: group=32 act=8; *.layers.0.*: dense`` is a list of entries, divided by semicolons. An entry has a shell
pattern over module paths and, behind a colon, what holds for the linears that it matches: ``dense``, or settings as
``key=value``. Later entries win: a setting replaces that of an earlier entry, ``dense`` replaces all of them, and a
setting behind ``dense`` quantizes the linear after all. What no entry sets is left to the options of the passes.

An entry with ``bits`` gives the form of weights as a whole. With ``bits=4`` all linears that the pattern matches have
codes, those of the decoder layers and output heads: ``*.v_proj: bits=4 group=64``. ``bits=8``, ``bits=2`` and
``embedding`` are for output heads alone: ``lm_head: bits=4 group=32 embedding=4``; a linear of a decoder layer has
W(1+1) where nothing gives it bits. Entries without ``bits`` are for the linears of the decoder layers; heads have their
``act-group``, too.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...codegen import levels as level_rules
from ...codegen.errors import LbllmError, suggestion
from ...codegen.operators import Arguments
from ...codegen.sizes import ACTIVATION_BITS, GROUPS
from .rewrite import LINEARS, UNPACKED, Node, is_call, operands_of

_lbllm = torch.ops.lbllm

CODEBOOKS = ("none", "knees", "planes")
"""Codes of 4-bit activations: uniform over a clipped range, or places in a table that two knees, or the scales of four
binary planes, shape."""

BITS = (2, 4, 8)
"""Bits of a linear's weights: W(1+1), 4-bit codes, int8 rows; 2 and 8 are told of output heads alone."""

EMBEDDING_BITS = (4, 8)
"""Bits of the token embedding beside a head of fewer than 8: codes or int8 rows."""

KEYS = {
    "bits": "bits",
    "group": "group",
    "levels": "levels",
    "act": "act_bits",
    "act-group": "act_group",
    "codebook": "codebook",
    "outliers": "outliers",
    "embedding": "embedding",
}
"""Keys of the text, and the fields of :class:`Scheme` that they set."""

_PATTERN = re.compile(r"[^\s:;]+")


class SchemeError(LbllmError):
    """A scheme that cannot be, or text that is none."""


@dataclass(frozen=True)
class Scheme:
    """How a linear is quantized. A field that is None is as the options of ``ptq``, ``activate`` and ``head`` say.

    Attributes:
        group: input columns per group of levels, or per scale of 4-bit codes; None for int8 rows, which have no groups.
        levels: name of the level rule (:mod:`lbllm_compile.codegen.levels`).
        act_bits: of the input: 4, 8 or 16.
        act_group: channels per scale of the input: 0 for one scale per token, else a divisor of the weights' group.
        codebook: for 4-bit inputs ``knees`` or ``planes``, where these shape a table; else ``none``.
        outliers: the last columns of the weight and channels of the input that have 8 bits, which the pass ``outliers``
            put there.
        bits: of an output head's weights: 8 (int8 rows), 4 (codes) or 2 (W(1+1)). Of another linear's 4, or None for
            W(1+1).
        embedding: bits of the token embedding beside a head of 4 or 2 bits: 8 or 4.
        dense: the linear stays float.

    Raises:
        SchemeError: a field has a value that it cannot have, or two contradict each other.
    """

    group: int | None = None
    levels: str = level_rules.FREE.name
    act_bits: int | None = None
    act_group: int | None = None
    codebook: str | None = None
    outliers: int = 0
    bits: int | None = None
    embedding: int | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        for key, name in KEYS.items():
            _check(key, getattr(self, name))
        if self.dense and self._set():
            raise SchemeError("a linear that is dense has no other setting")
        if self.bits and self.levels != level_rules.FREE.name:
            raise SchemeError(
                f"levels={self.levels} does not go with bits={self.bits}: only linears of decoder layers have level"
                " rules, for their W(1+1)"
            )
        if self.bits and self.outliers:
            raise SchemeError(
                f"outliers={self.outliers} does not go with bits={self.bits}: only W(1+1) leaves outliers 8 bits"
            )
        if self.bits == 8 and self.group:
            raise SchemeError(f"group={self.group} does not go with bits=8: int8 rows have a scale a row")
        if self.embedding and self.bits not in (2, 4):
            raise SchemeError(
                f"embedding={self.embedding} needs bits=4 or bits=2 beside it; an embedding beside an int8 head has"
                " int8 rows"
            )
        if self.group and self.act_group and self.group % self.act_group:
            raise SchemeError(
                f"act-group={self.act_group} does not go with group={self.group}; inputs have a scale per token (0) or"
                " per group of the weights or part of it"
            )
        if self.codebook in ("knees", "planes") and self.act_bits != 4:
            raise SchemeError(f"codebook={self.codebook} needs act=4 beside it: only 4-bit inputs have {self.codebook}")

    @property
    def activation(self) -> Scheme:
        """The part that all linears behind one quantizer share: how their input is quantized."""
        return Scheme(act_bits=self.act_bits, act_group=self.act_group, codebook=self.codebook)

    def __str__(self) -> str:
        """The settings as text that :func:`parse` reads behind a pattern; empty where none is set."""
        return "dense" if self.dense else " ".join(f"{key}={value}" for key, value in self._set().items())

    def _set(self) -> dict[str, Any]:
        """The settings that are not as where nothing is set."""
        values = {key: getattr(self, name) for key, name in KEYS.items()}
        return {key: value for key, value in values.items() if value != getattr(type(self), KEYS[key])}


def _check(key: str, value: Any) -> None:
    """Checks one setting by itself.

    Raises:
        SchemeError: it cannot be; the message says what can.
    """
    if key == "outliers":
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SchemeError("outliers must be a number of columns")
    elif key == "levels":
        if not isinstance(value, str):
            raise SchemeError("levels must be the name of a level rule")
        level_rules.get(value)
    else:
        choices = {
            "bits": BITS,
            "group": GROUPS,
            "act": ACTIVATION_BITS,
            "act-group": (0, *GROUPS),
            "codebook": CODEBOOKS,
            "embedding": EMBEDDING_BITS,
        }[key]
        if value is not None and (isinstance(value, bool) or value not in choices):
            raise SchemeError(f"{key} cannot be {value}; choose {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class Entry:
    """What holds for the linears that a pattern matches.

    Attributes:
        pattern: shell pattern over module paths.
        settings: ``(key, value)`` in the order written, of :data:`KEYS`; none means ``dense``.

    Raises:
        SchemeError: a key is unknown or given twice, or a value cannot be.
    """

    pattern: str
    settings: tuple[tuple[str, int | str], ...] = ()

    def __post_init__(self) -> None:
        if not _PATTERN.fullmatch(self.pattern):
            raise SchemeError(f"scheme: '{self.pattern}' is no pattern: patterns have no spaces, ':' or ';'")
        seen: set[str] = set()
        for key, value in self.settings:
            if key not in KEYS:
                hint = suggestion(key, KEYS)
                raise SchemeError(f"scheme: there is no '{key}'{hint}; choose dense or {', '.join(KEYS)}")
            if key in seen:
                raise SchemeError(f"scheme: '{key}' is given twice for '{self.pattern}'; keep one")
            seen.add(key)
            try:
                _check(key, value)
            except LbllmError as error:
                raise SchemeError(f"scheme: {error}") from error

    @property
    def dense(self) -> bool:
        """Whether the linears stay float."""
        return not self.settings

    def on(self, scheme: Scheme, keys: Iterable[str] = KEYS) -> Scheme:
        """A scheme with the settings of this entry, or those of them that are among ``keys``.

        Raises:
            SchemeError: they contradict what earlier entries set.
        """
        if self.dense:
            return Scheme(dense=True)
        changes: dict[str, Any] = {KEYS[key]: value for key, value in self.settings if key in keys}
        if "bits" in changes:
            changes = {"group": None, "embedding": None, **changes}
        return replace(Scheme() if scheme.dense and changes else scheme, **changes)

    @property
    def gives_form(self) -> bool:
        """Whether it gives the form of weights as a whole, and so is for output heads, too."""
        return "bits" in dict(self.settings)

    @property
    def of_head(self) -> bool:
        """Whether it is for output heads alone."""
        settings = dict(self.settings)
        return self.gives_form and (settings["bits"] != 4 or "embedding" in settings)

    def __str__(self) -> str:
        return f"{self.pattern}: " + (" ".join(f"{key}={value}" for key, value in self.settings) or "dense")


def parse(text: str) -> tuple[Entry, ...]:
    """Reads the entries of a text; blank ones are skipped.

    Raises:
        SchemeError: one cannot be read.
    """
    return tuple(_entry(part.strip()) for part in text.split(";") if part.strip())


def render(entries: Sequence[Entry]) -> str:
    """Entries as text, which :func:`parse` reads."""
    return "; ".join(map(str, entries))


def _entry(text: str) -> Entry:
    pattern, colon, rest = text.partition(":")
    words = rest.split()
    if not colon or not words:
        raise SchemeError(f"scheme: '{text}' is no entry; write 'PATTERN: group=32 act=8' or 'PATTERN: dense'")
    if words == ["dense"]:
        return Entry(pattern.strip())
    settings: list[tuple[str, int | str]] = []
    for word in words:
        key, equals, value = word.partition("=")
        if word == "dense":
            raise SchemeError(f"scheme: '{text}' has settings beside dense; a linear that stays float has none")
        if not equals or not value:
            raise SchemeError(f"scheme: '{word}' in '{text}' is no setting; write key=value, or dense")
        settings.append((key, int(value) if re.fullmatch(r"\d{1,9}", value) else value))
    return Entry(pattern.strip(), tuple(settings))


_STORED_BITS = {
    _lbllm.bit_linear.default: 2,
    _lbllm.grouped_bit_linear.default: 2,
    _lbllm.unpack_weight.default: 2,
    _lbllm.int4_linear.default: 4,
    _lbllm.unpack_int4.default: 4,
    _lbllm.int8_linear.default: 8,
    _lbllm.unpack_rows.default: 8,
}
"""Bits of the weights of integer linears, and of simulated weights."""


def told(linear: Node, head: bool) -> dict[str, Any]:
    """The fields of a linear's scheme that the operators of its graph decide; none where it is computed in float.

    Args:
        linear: the call.
        head: whether it is an output head, whose scheme always says how many bits its weights have.
    """
    if is_call(linear, *_STORED_BITS):
        bits, grouped, source = _STORED_BITS[linear.target], linear, Arguments(linear).values
    elif is_call(linear, *LINEARS):
        source, grouped = operands_of(linear)
        if not is_call(grouped, *UNPACKED):
            return {}
        bits = _STORED_BITS[grouped.target]
    else:
        return {}
    fields: dict[str, Any] = {"group": None if bits == 8 else Arguments(grouped).group, "dense": False}
    if head or bits != 8:  # the int8 rows beside a decoder linear's W(1+1) are its outliers
        fields["bits"] = bits if head or bits == 4 else None
    if is_call(source, operator.getitem):
        source = Arguments(source).value
    if is_call(source, _lbllm.fake_quantize.default, _lbllm.quantize_activation.default):
        quantizer = Arguments(source)
        fields |= {"act_bits": quantizer.bits, "act_group": quantizer.group, "codebook": codebook_of(source)}
    return fields


def codebook_of(quantizer: Node) -> str:
    """What shapes the table of a quantizer's codes, simulated or not: one of :data:`CODEBOOKS`."""
    if Arguments(quantizer).plane_scales is not None:
        return "planes"
    return "none" if Arguments(quantizer).knees is None else "knees"
