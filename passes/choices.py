"""What a budget may choose: what may become of each linear, and of embedding and head, and how many bits that takes.

Linears that read the same input have one choice, a :class:`Site`, because kernels and quantizers do; so have all output
heads with the token embedding, which may be tied to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..codegen.levels import FREE
from ..codegen.sizes import DEFAULT_GROUP, int4_bytes, matrix_bytes
from .annotate import HEAD_FORM, HEAD_KEYS, decoder_linears, matched_paths, modules_of
from .base import PassError
from .head import Form, Head, outside_matrices
from .ir.annotations import LINEAR, LinearInfo, linears
from .ir.program import Program, get_attribute
from .ir.rewrite import same_storage
from .ir.scheme import Entry, Scheme, SchemeError

HEADS = (
    "*: bits=8; *: bits=4 group=32; *: bits=4 group=64; *: bits=4 group=32 embedding=4; *: bits=4 group=64 embedding=4;"
    " *: bits=2 group=32; *: bits=2 group=64; *: bits=2 group=64 embedding=4"
)
"""What an output head may become, and the token embedding beside it; with codes alone, what a decoder linear may."""

CHOICES = f"*: group=32; *: group=64; *: group=128; *: group=256; {HEADS}; *: dense"

DENSE_BITS = 32
"""Bits of a weight that stays float, as stored."""


@dataclass(frozen=True)
class Option:
    """What may become of the linears behind one input.

    Attributes:
        schemes: by path.
        bits: of their weights, as stored.
    """

    schemes: Mapping[str, Scheme]
    bits: int

    @property
    def quantizes(self) -> bool:
        """Whether any of them does not stay float."""
        return not all(scheme.dense for scheme in self.schemes.values())


@dataclass(frozen=True)
class Site:
    """The linears behind one input.

    Attributes:
        paths: of the linears.
        layer: their decoder layer; None for output heads.
        options: by rising size.
    """

    paths: tuple[str, ...]
    layer: int | None
    options: tuple[Option, ...]

    @property
    def measured(self) -> int:
        """Index of the option whose divergence is measured: the middle one of those that quantize."""
        quantizing = [index for index, option in enumerate(self.options) if option.quantizes]
        return quantizing[len(quantizing) // 2] if quantizing else 0


def sites(program: Program, entries: Sequence[Entry]) -> list[Site]:
    """What is to be chosen, in graph order.

    Raises:
        PassError: a pattern matches nothing, linears have no choice, or a weight would have two.
    """
    modules = modules_of(info for _, info in linears(program))
    covered = {entry: matched_paths(modules, entry.pattern, "choices") for entry in entries if not entry.of_head}
    found = []
    users = {info.weight: info.path for _, info in linears(program) if info.role != "decoder"}
    for nodes in decoder_linears(program.graph).values():
        behind = [node.meta[LINEAR] for node in nodes]
        for info in behind:
            if info.weight in users:
                raise PassError(
                    f"budget: '{users[info.weight]}' and '{info.path}' share one weight and read different inputs, so"
                    " they cannot have a choice each; keep both float with --keep-dense, or set no limit"
                )
        users |= {info.weight: info.path for info in behind}
        options: dict[tuple[Scheme, ...], Option] = {}
        for entry, paths in covered.items():
            if all(info.path in paths for info in behind):
                made = tuple(scheme for info in behind if (scheme := _under(info, entry)) is not None)
                if len(made) == len(behind):
                    options[made] = _option(program, behind, made)
        if not options:
            raise PassError(f"budget: none of the choices is for '{behind[0].path}'; add one, e.g. '*: group=64'")
        ordered = sorted(options.values(), key=lambda option: option.bits)
        found.append(Site(tuple(info.path for info in behind), behind[0].layer, tuple(ordered)))
    return found


def head_site(program: Program, entries: Sequence[Entry]) -> Site | None:
    """What is to be chosen for the output heads and the token embedding; None where no head is to be quantized.

    The choices are those of :func:`head_schemes`: what ``annotate`` was told of a head's form stands, and what
    contradicts its input is left out. So are those that store all that another choice makes do with, and a coarser form
    for the head: of a matrix that is tied the head then had better read what the embedding does.

    Raises:
        PassError: a pattern matches nothing, or there is no choice.
    """
    infos = [info for _, info in linears(program)]
    heads = [info for info in infos if info.role == "head"]
    if not heads:
        return None
    options: dict[tuple[Scheme, ...], Option] = {}
    stored: dict[tuple[Scheme, ...], set[tuple[str, Form]]] = {}
    for made in head_schemes(infos, entries):
        own = {info.path: scheme for info, scheme in zip(heads, made, strict=True)}
        trial = with_schemes(program, own)
        options[made] = Option(own, outside_bits(trial))
        stored[made] = {(site.path, site.form) for site in Head().sites(trial)}
    useful = [
        option
        for made, option in options.items()
        if not any(stored[other] < stored[made] and _finer(other, made) for other in options)
    ]
    ordered = sorted(useful, key=lambda option: option.bits)
    return Site(tuple(info.path for info in heads), None, tuple(ordered))


def head_schemes(infos: Sequence[LinearInfo], entries: Sequence[Entry]) -> list[tuple[Scheme, ...]]:
    """What output heads may have, a scheme of each in every choice; groups that nothing sets are written out, so that
    what is counted and measured is what will be stored. Heads that were all told a form have that without any choice.

    Args:
        infos: of all linears, at least one of a head.
        entries: the choices.

    Raises:
        PassError: a pattern matches nothing, a form that a head was told cannot be, or there is no choice.
    """
    heads = [info for info in infos if info.role == "head"]
    told = {info.path: _told(info) for info in heads if info.scheme.bits}
    modules = modules_of(infos)
    covered = {e: matched_paths(modules, e.pattern, "choices") for e in entries if e.dense or e.gives_form}
    if len(told) == len(heads):
        return [tuple(told[info.path] for info in heads)]
    found: dict[tuple[Scheme, ...], None] = {}
    keys = (*HEAD_FORM, *HEAD_KEYS)
    for entry, paths in covered.items():
        if all(info.path in paths for info in heads):
            with contextlib.suppress(SchemeError):
                made = (told.get(info.path) or _with_group(entry.on(info.scheme, keys)) for info in heads)
                found[tuple(made)] = None
    if not found:
        raise PassError(f"budget: none of the choices is for '{heads[0].path}'; add one, e.g. '*: bits=8'")
    return [*found]


def _told(info: LinearInfo) -> Scheme:
    """The form that ``annotate`` was told of a head, with its group."""
    try:
        return _with_group(info.scheme)
    except SchemeError as error:
        raise PassError(f"budget: '{info.path}' cannot have '{info.scheme}': {error}") from error


def _with_group(scheme: Scheme) -> Scheme:
    """A head's scheme with the group that it has where none is set."""
    return replace(scheme, group=Head().form(scheme).group or scheme.group)


def _finer(one: Sequence[Scheme], other: Sequence[Scheme]) -> bool:
    """Whether heads have more bits under the first schemes than under the others."""
    return all((a.bits or 0) > (b.bits or 0) for a, b in zip(one, other, strict=True))


def outside_bits(program: Program) -> int:
    """Bits of all matrices but those of the decoder layers' linears, as they are stored under the linears' schemes."""
    sizes = Head().sizes(program)
    stored = [get_attribute(program.module, path) for path in sizes]
    kept = [
        matrix
        for matrix in outside_matrices(program).values()
        if not any(same_storage(matrix, other) for other in stored)
    ]
    return 8 * sum(sizes.values()) + DENSE_BITS * sum(matrix.numel() for matrix in kept)


def _under(info: LinearInfo, entry: Entry) -> Scheme | None:
    """A linear's scheme under a choice: what it was told itself stands, and of codes without a group the group is
    chosen. None where the choice cannot be, because the linear was told a level rule or is stacked experts, which have
    no codes."""
    told = info.scheme
    if told.group is not None:
        return told
    if told.bits:
        return replace(told, group=dict(entry.settings).get("group", DEFAULT_GROUP))
    if entry.gives_form and (info.experts or told.levels != FREE.name):
        return None
    return Scheme(dense=True) if entry.dense else entry.on(told)


def _option(program: Program, behind: Sequence[LinearInfo], made: Sequence[Scheme]) -> Option:
    sizes = {}
    for info, scheme in zip(behind, made, strict=True):
        shape = get_attribute(program.module, info.weight).shape
        count = shape.numel()
        stored = int4_bytes if scheme.bits == 4 else matrix_bytes
        sizes[info.weight] = (
            DENSE_BITS * count
            if scheme.dense
            else 8 * stored(count // shape[-1], shape[-1], scheme.group or DEFAULT_GROUP)
        )
    return Option({info.path: scheme for info, scheme in zip(behind, made, strict=True)}, sum(sizes.values()))


def kept_bits(program: Program) -> int:
    """Bits of the decoder layers' linears that stay float whatever is chosen."""
    weights = {i.weight for _, i in linears(program) if i.role == "dense" and i.layer is not None}
    return DENSE_BITS * sum(get_attribute(program.module, weight).numel() for weight in weights)


def decoder_weights(program: Program) -> int:
    """Weights of all linears of the decoder layers."""
    weights = {info.weight for _, info in linears(program) if info.role != "head" and info.layer is not None}
    return sum(get_attribute(program.module, weight).numel() for weight in weights)


def with_choice(program: Program, found: Sequence[Site], chosen: Sequence[int]) -> Program:
    """The same program with the chosen schemes on its linears."""
    wanted = {
        path: scheme
        for site, index in zip(found, chosen, strict=True)
        for path, scheme in site.options[index].schemes.items()
    }
    return with_schemes(program, wanted)


def with_schemes(program: Program, wanted: Mapping[str, Scheme]) -> Program:
    """The same program with other schemes on some linears, by path."""
    program = program.copy()
    for node, info in linears(program):
        if info.path in wanted:
            node.meta[LINEAR] = _chosen(info, wanted[info.path])
    return program


def _chosen(info: LinearInfo, scheme: Scheme) -> LinearInfo:
    if scheme.dense:
        return replace(info, scheme=scheme, role="dense", reason="float: the budget allows it")
    return replace(info, scheme=scheme)
