"""Artifacts that were damaged or crafted, and what reading and running them must come to.

:func:`mutate` changes one thing of an artifact, decided by a seed alone. Sometimes it leaves the manifest as it was,
which then tells; mostly it makes the manifest fit again, as someone would who crafts an artifact, so that what reads
the files behind it is on its own. :func:`check` reads what came out and runs it in torch, and a part of it natively,
and says what is wrong with how that ended. To replay one mutation with its traceback::

    python tests/mutations.py SEED
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from lbllm_compile.codegen.backend import Kernels
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.operators import operators, stored
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.threads import thread_count
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import graph_json
from lbllm_compile.passes.ir.program import Program
from reference_kernels import ReferenceKernels
from rtn import simulate
from safetensors.torch import load_file, save_file
from torch import Tensor

from lbllm_compile import artifact, frontend, inspect
from lbllm_compile.artifact import Artifact
from lbllm_compile.frontend import UserModel
from lbllm_compile.lowering import compare
from lbllm_compile.lowering.build import build_native, workshop
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.native.language import LanguageModel
from lbllm_compile.records import CompileReport, MeasuredPass, PassRecord, Verdict
from lbllm_compile.runtime import CompiledModel
from lbllm_compile.runtime.loader import build_kernels

VOCABULARY, CONTEXT = 37, 64

MEMORY = 2 << 30
"""Bytes that one artifact may take beyond what the process had before."""

SECONDS = 300
"""Most that one artifact may take, on a machine that does other things as well."""

UNDECIDING = ("lbllm.lock", "measured.json", "tuning.json", "report.json", "passes/", "kernels/", "config", "tokenizer")
"""Starts of names of files that say nothing of what the model computes."""

NATIVELY = 5
"""Of so many artifacts that are read and hold another program or other schedules than before, one runs natively, too;
and every one in whose graph an operator got another number."""


# Artifacts


def _tokenizer() -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    chat = "{% for message in messages %}w1 {{ message.content }} {% endfor %}"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", eos_token="w2", chat_template=chat
    )


_TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _language_model(config: Any, **options: Any) -> UserModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = config(**{**_TINY, **options})
        module = transformers.AutoModelForCausalLM.from_config(made).eval().requires_grad_(False)
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return frontend.prepare(UserModel(module, "causal-lm", "tiny", "tiny"))


def _llama() -> UserModel:
    return _language_model(transformers.LlamaConfig)


def _experts() -> UserModel:
    return _language_model(transformers.MixtralConfig, num_local_experts=3, num_experts_per_tok=2)


def _convolutions() -> UserModel:
    return _language_model(
        transformers.Lfm2Config,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )


def _mlp() -> UserModel:
    return frontend.load(Path(__file__).parent.parent / "examples" / "mlp.py")


MODELS: dict[str, tuple[Callable[[], UserModel], str]] = {
    "llama": (_llama, "head{group=32},merge,lower,cache,cleanup"),
    "uncached": (_llama, "head{group=32},lower,cleanup"),
    "experts": (_experts, "head{group=32},merge,lower,cache,cleanup"),
    "convolutions": (_convolutions, "head{group=32},merge,lower,cache,cleanup"),
    "mlp": (_mlp, "merge,lower,cleanup"),
    "codes": (_llama, "head{group=32},merge,lower,cache,cleanup"),
}
"""Models by name, and the passes behind simulated quantization."""

OF_CODES = {"codes": ("q_proj", "k_proj", "v_proj", "down_proj")}
"""How paths of linears with 4-bit codes end, by model."""


def make(directory: Path) -> None:
    """Writes an artifact of every model, each in a folder of its name."""
    for name, (build, text) in MODELS.items():
        model = build()
        program = frontend.capture(model)
        probe = model.inputs if model.kind != "causal-lm" else frontend.language_model_inputs(_ids(2, 5))
        context, history = PassContext(probe=probe), []
        for part in ("canonicalize,annotate", text):
            for item in pipeline.parse(part):
                program = item.apply(program, context).program
                history.append((item.name, program))
            if part != text:
                program = simulate(program, coded=OF_CODES.get(name, ()))
        program = dataclasses.replace(program, tokenizer=_tokenizer() if model.kind == "causal-lm" else None)
        measured = [MeasuredPass("lower", "lower", "exact", [{"layer": 0, "error": 0.5}], {"counts": 3})]
        out = directory / name
        digest = artifact.save(
            program, out, lock={"model": "0" * 64, "seed": "0"}, history=history, passes=measured,
            records=_records(program), sources={"linear": "# text"},
        )  # fmt: skip
        passed = PassRecord(1, "lower", "lower", 0.5, 0.1, 10, 12, "exact", 0.0, [], {})
        verdicts = [Verdict("stage 1", True, "better")]
        artifact.write_report(
            digest, CompileReport(out, [passed], verdicts, {"size": {"bytes": 1}}, 0, {"all": 1.0}, 9)
        )


def _records(program: Program) -> list[dict[str, Any]]:
    """A tuning record for every linear of a program and every number of tokens, as if they had been searched here."""
    target = Target.parse("cpu")
    return [
        {
            "spec": dataclasses.asdict(spec),
            "tokens": bucket.name,
            "target": target.name,
            "threads": thread_count(),
            "schedule": dataclasses.asdict(cpu.implementations(spec, target)[0].schedules(bucket)[0]),
        }
        for spec in requirements(program).linears
        for bucket in cpu.BUCKETS
    ]


def _ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# Reading and running


def inputs_of(program: Program) -> dict[str, Tensor]:
    """What a program is run on: two sequences, one of them padded, or a batch of random vectors."""
    if program.kind == "causal-lm":
        mask = torch.ones((2, 5), dtype=torch.int64)
        mask[0, :2] = 0
        return frontend.language_model_inputs(_ids(2, 5), mask)
    return {"x": torch.randn((3, 259), generator=torch.Generator().manual_seed(1))}


@dataclasses.dataclass(frozen=True)
class Read:
    """What an artifact came to.

    Attributes:
        loaded: the artifact in memory.
        outputs: of a module on its inputs; of a language model on a prompt, and where it has a state, of every step
            after that.
    """

    loaded: Artifact
    outputs: list[Tensor]


def read(directory: Path, changed: str = "", before: Read | None = None) -> Read:
    """Reads an artifact and runs it as users do: a module on its inputs, a language model on a prompt and token by
    token.

    Args:
        directory: the artifact.
        changed: a file of it, which is looked at even if it is none that running takes.
        before: what another one came to. Where this one holds the same program its outputs are the same, too.

    Raises:
        LbllmError: it cannot be read, or not be run.
        AssertionError: on kernels it gives another output than the graph alone.
    """
    read_documents(directory, changed)
    loaded = artifact.load(directory)
    program = loaded.program
    if program.kind == "causal-lm":
        Text(program).use()
    if before is not None and same_program(program, before.loaded.program):
        return Read(loaded, before.outputs)
    model = CompiledModel(program, ReferenceKernels())
    inputs = inputs_of(program)
    graph = program.copy()
    graph.graph.eliminate_dead_code()  # which may fail, and is not run
    outputs = [model(**inputs)] if program.kind != "causal-lm" else answers(model, inputs)
    if not _same(outputs[0], graph.run(inputs)):
        raise AssertionError("bound to kernels it gives another answer than its graph")
    return Read(loaded, outputs)


class Text(LanguageModel):
    """What a program has for text, without what runs it."""

    def __init__(self, program: Program):
        self.config, self.tokenizer = program.config, program.tokenizer

    def session(self, batch: int, capacity: int = 0) -> Any:
        raise AssertionError("text has no session")

    def use(self) -> None:
        self.stop_tokens()
        if self.tokenizer is not None:
            self.decode(self.encode("w3 w1 w4"))
            self.encode("w5", chat=True)
        _ = self.context_length


def answers(model: CompiledModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Logits of a language model for its inputs at once, and where it has a state, of the same and of more tokens step
    by step."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    given = [model.logits(ids, mask)]
    if model.program.state_placeholders():
        session = model.session(2)
        session.start(mask.numpy())
        for part in (ids, *(token[:, None] for token in _ids(3, 2, seed=1))):
            given.append(torch.from_numpy(np.array(session.step(part.numpy()))))
    return given


def same_program(a: Program, b: Program) -> bool:
    """Whether two programs are of one kind, graph and weights, to the bit, so that they compute the same."""
    weights, others = dict(a.parameters()), dict(b.parameters())
    return (
        a.kind == b.kind
        and graph_json.dumps(a.module) == graph_json.dumps(b.module)
        and all(_same_bits(tensor, others[path]) for path, tensor in weights.items())
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_documents(directory: Path, changed: str) -> None:
    """Reads what is not needed to run: the lock, the report, what passes measured, and the graph in a changed file."""
    artifact.read_lock(directory)
    artifact.measured_passes(directory)
    artifact.read_report(directory)
    for item in inspect.stored_passes(directory):
        if item.file == changed:
            inspect.look(directory, item.name)
    if not changed.startswith(("passes/", "kernels/", "model", "token")):
        inspect.look(directory)


# Mutations


@dataclasses.dataclass(frozen=True)
class Mutation:
    """What was done to an artifact.

    Attributes:
        model: which.
        text: what was changed, for people.
        file: the file that was changed.
        crafted: the manifest was made to fit again.
    """

    model: str
    text: str
    file: str
    crafted: bool


_NUMBERS = [0, 1, -1, 2, 3, 7, 255, 1 << 15, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, -(1 << 63)]
_FLOATS = [0.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf]
_VALUES: list[Any] = [
    *_NUMBERS, *_FLOATS, 10**40, -(10**40), None, True, False, "", "x", "0", "x" * 3000, "../../etc/passwd",
    "a\nb", "\ud800",
    "input_ids", "causal-lm", "module", "int64", [], {}, [[[[[[[[[[1]]]]]]]]]], [1, 2], {"node": "x"}, {"float": "nan"},
    {"dtype": "int8"}, {"tuple": []}, {"slice": [0, 1, None]},
]  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON document."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*at, key))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def edit_json(document: Any, chance: random.Random) -> tuple[Any, str]:
    """A JSON document with one value changed, removed, added, renamed or swapped."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    path = chance.choice(places)
    if not path:
        value = chance.choice(_VALUES)
        return value, f"all = {str(value)[:40]!r}"
    parent, key = _at(document, path[:-1]), path[-1]
    value, where = parent[key], ".".join(map(str, path))
    kind = chance.choice(("replace", "replace", "tweak", "tweak", "remove", "add", "copy", "swap", "rename", "double"))
    if kind == "tweak" and isinstance(value, (int, float)) and not isinstance(value, bool):
        parent[key] = chance.choice(
            (value + 1, value - 1, -value, value * 2, value + chance.randint(-9, 9), float(value))
        )
    elif kind == "tweak" and isinstance(value, str) and value:
        place = chance.randrange(len(value))
        parent[key] = chance.choice((value[:place] + value[place + 1 :], value + "x", value.upper(), value[::-1]))
    elif kind == "remove":
        del parent[key]
    elif kind == "add":
        if isinstance(parent, dict):
            parent[chance.choice(("x", "", "args", "kwargs", "meta", "__class__"))] = chance.choice(_VALUES)
        else:
            parent.insert(key, chance.choice(_VALUES))
    elif kind in ("copy", "swap"):
        other = chance.choice(places[1:])
        there = _at(document, other[:-1])
        if kind == "swap":
            there[other[-1]], parent[key] = copy.deepcopy(value), copy.deepcopy(there[other[-1]])
        else:
            parent[key] = copy.deepcopy(there[other[-1]])
        where += " and " + ".".join(map(str, other))
    elif kind == "rename" and isinstance(parent, dict):
        parent[chance.choice((key + "x", "x", key.upper()))] = parent.pop(key)
    elif kind == "double" and isinstance(parent, list):
        parent.insert(chance.randrange(len(parent) + 1), copy.deepcopy(value))
    else:
        parent[key] = chance.choice(_VALUES)
    return document, f"{kind} {where}"


@functools.cache
def _operators() -> list[str]:
    """Every name that a stored graph may call."""
    names = {operator.name for operator in operators()} | {*stored._FUNCTIONS}
    for packet in sorted(stored._ATEN):
        found = getattr(torch.ops.aten, packet, None)
        names |= {f"aten.{packet}.{overload}" for overload in ([] if found is None else found.overloads())}
    return sorted(name for name in names if stored.resolve(name) is not None)


def _arguments(node: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Every argument of a node as the container that holds it and its key there, references in lists included."""
    found = []
    for key in ("args", "kwargs"):
        values = node.get(key, ())
        found += [(values, k) for k in (values if isinstance(values, dict) else range(len(values)))]
    for container, key in list(found):
        if isinstance(container[key], list):
            found += [(container[key], k) for k in range(len(container[key]))]
    return found


def edit_graph(document: Any, chance: random.Random) -> tuple[Any, str]:
    """A graph's document with one node rewired, retyped, resized, moved, doubled, removed or made to call another
    operator; or a new node."""
    document = copy.deepcopy(document)
    nodes = document["nodes"]
    place = chance.randrange(len(nodes))
    node = nodes[place]
    before = [n["name"] for n in nodes[:place]]
    arguments = _arguments(node)
    kinds = ["rewire"] * 4 + ["number"] * 3 + ["operator"] * 3
    kind = chance.choice(
        (*kinds, "move", "double", "remove", "new", "new", "meta", "meta", "arguments", "target", "names")
    )
    text = f"{kind} {node['name']}"
    calls = [n for n in nodes if n["op"] == "call_function"]
    if kind == "rewire" and arguments and before:
        nested = [(c, k) for c, k in arguments if isinstance(c[k], dict)] or arguments
        container, key = chance.choice(nested)
        container[key] = {"node": chance.choice(before)}
    elif kind == "number" and arguments:
        plain = [(c, k) for c, k in arguments if isinstance(c[k], (int, float))] or arguments
        container, key = chance.choice(plain)
        old = container[key]
        near = [old + 1, old - 1, -old, old * 2] if isinstance(old, (int, float)) else []
        container[key] = chance.choice([*near, *near, *_NUMBERS, *_FLOATS[:4], None, True, [], [2, 3]])
    elif kind == "operator" and node["op"] == "call_function":
        known = [n["target"] for n in calls]
        node["target"] = chance.choice((chance.choice(known), chance.choice(_operators())))
        text += f" to {node['target']}"
    elif kind == "move":
        nodes.insert(chance.randrange(len(nodes)), nodes.pop(place))
    elif kind == "double":
        other = {**copy.deepcopy(node), "name": node["name"] + "_twice"}
        nodes.insert(place + 1, other)
        if arguments and place + 2 < len(nodes):
            user = chance.choice(nodes[place + 2 :])
            if found := _arguments(user):
                container, key = chance.choice(found)
                container[key] = {"node": other["name"]}
    elif kind == "remove":
        del nodes[place]
    elif kind == "new" and before:
        made = _new_node(before, chance)
        nodes.insert(place, made)
        if arguments:
            container, key = chance.choice([(c, k) for c, k in arguments if isinstance(c[k], dict)] or arguments)
            container[key] = {"node": made["name"]}
        text += f": {made['target']}"
    elif kind == "meta":
        place = chance.randrange(len(nodes))
        told = [n for n in nodes if set(n.get("meta", {})) & {"linear", "state", "in_features"}] or [nodes[place]]
        chosen = chance.choice(told)
        chosen["meta"], text = edit_json(chosen.get("meta", {}), chance)
        text = f"meta of {chosen['name']}: {text}"
    elif kind == "arguments" and "args" in node:
        args = node["args"]
        change = chance.choice(("less", "more", "shuffle", "names"))
        if change == "less" and args:
            args.pop()
        elif change == "shuffle":
            chance.shuffle(args)
        elif change == "names":
            node["kwargs"] = {**node.get("kwargs", {}), chance.choice(("dim", "dtype", "self", "alpha", "group")): 1}
        else:
            args.append(chance.choice((1, None, [1], {"node": chance.choice(before or ["x"])})))
    elif kind == "target":
        node["target"] = chance.choice(nodes)["target"]
    elif kind == "names":
        other = chance.choice(nodes)
        node["name"], other["name"] = other["name"], node["name"]
    else:
        return edit_json(document, chance)
    return document, text


def _new_node(before: list[str], chance: random.Random) -> dict[str, Any]:
    """A call that makes much of little, or reads what may not be there."""
    x, y = ({"node": chance.choice(before)} for _ in range(2))
    size = chance.choice((0, 1, -1, 7, 1 << 20, 1 << 28, 1 << 33, 1 << 40, 1 << 62))
    calls: list[tuple[str, list[Any]]] = [
        ("aten.zeros.default", [[size]]),
        ("aten.zeros.default", [[size, size]]),
        ("aten.full.default", [[size, 2], 1.5]),
        ("aten.arange.default", [size]),
        ("aten.eye.default", [size]),
        ("aten.expand.default", [x, [size, -1, -1]]),
        ("aten.repeat.default", [x, [size, 1, 1]]),
        ("aten.repeat_interleave.self_int", [x, size]),
        ("aten.constant_pad_nd.default", [x, [size, size]]),
        ("aten.one_hot.default", [x, size]),
        ("aten.index_select.default", [x, 0, y]),
        ("aten.gather.default", [x, chance.choice((0, 1, -1)), y]),
        ("aten.embedding.default", [x, y]),
        ("aten.index.Tensor", [x, [y]]),
        ("aten.select.int", [x, 0, size]),
        ("aten.slice.Tensor", [x, 0, size, chance.choice((0, 5, 1 << 62)), chance.choice((1, 0, -1, 1 << 62))]),
        ("aten.empty_like.default", [x]),
        ("aten.new_empty.default", [x, [3, size]]),
        ("aten.dropout.default", [x, 0.5, True]),
        ("aten.nonzero.default", [x]),
        ("aten.matmul.default", [x, y]),
        ("aten.view.default", [x, [size, -1]]),
        ("aten.upsample_nearest2d.default", [x, [size, size]]),
        ("aten.zero_.default", [x]),
        ("aten.div_.Tensor", [x, y]),
        ("aten.index_put_.default", [x, [y], y]),
        ("aten.masked_fill_.Scalar", [x, y, 1.5]),
        ("aten.pow.Tensor_Scalar", [x, 1e30]),
        ("operator.mul", [x, y]),
        ("operator.getitem", [x, size]),
        ("operator.mul", [x, size]),
    ]
    target, args = chance.choice(calls)
    return {"name": "crafted", "op": "call_function", "target": target, "args": args}


def edit_tensors(path: Path, chance: random.Random) -> str:
    """A file of tensors with one renamed, retyped, resized, removed, swapped or filled with what may not be there."""
    tensors = load_file(path)
    name, other = chance.choice(list(tensors)), chance.choice(list(tensors))
    tensor = tensors[name]
    dtypes = (
        torch.int8,
        torch.uint8,
        torch.int64,
        torch.float16,
        torch.float32,
        torch.bfloat16,
        torch.bool,
        torch.float64,
    )
    kind = chance.choice(
        ("type", "bits", "size", "shape", "rename", "swap", "remove", "add", "fill", "fill", "element")
    )
    if kind == "type":
        tensors[name] = tensor.to(chance.choice(dtypes))
    elif kind == "bits":
        same = [d for d in dtypes if d.itemsize == tensor.element_size() and d != torch.bool]
        tensors[name] = tensor.view(chance.choice(same))
    elif kind == "size":
        dim = chance.randrange(tensor.dim()) if tensor.dim() else 0
        cut = (
            tensor.narrow(dim, 0, chance.randrange(tensor.shape[dim]))
            if tensor.numel() and tensor.dim()
            else tensor[None]
        )
        tensors[name] = chance.choice(
            (cut, torch.cat([tensor, tensor], dim) if tensor.dim() else tensor[None])
        ).contiguous()
    elif kind == "shape":
        forms = (
            tensor.reshape(-1),
            tensor[None],
            tensor.reshape(1, -1),
            tensor.reshape(-1, 1),
            tensor.mT if tensor.dim() > 1 else tensor[None],
        )
        tensors[name] = chance.choice(forms).contiguous()
    elif kind == "rename":
        tensors[chance.choice((name + "x", "x", name.replace(".", "/"), other + ".y", "__class__"))] = tensors.pop(name)
    elif kind == "swap":
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == "remove":
        del tensors[name]
    elif kind == "add":
        tensors[chance.choice(("more", name + ".more", ""))] = torch.ones(3)
    elif kind == "fill":
        number = chance.choice((0, 1, -1, 255, 1e30, math.nan, math.inf, -math.inf, "random"))
        if number == "random":
            generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
            whole = torch.randint(0, 256, (tensor.nbytes,), dtype=torch.uint8, generator=generator)
            if tensor.dtype != torch.bool and tensor.dim():
                tensors[name] = whole.view(tensor.dtype).reshape(tensor.shape)
        else:
            tensors[name] = torch.full(tensor.shape, number).to(tensor.dtype)
        kind += f" {number}"
    elif tensor.numel():
        flat = tensor.clone().reshape(-1)
        raw = flat.view(torch.uint8)
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8) if tensor.dtype != torch.bool else 1
        tensors[name] = flat.reshape(tensor.shape)
    save_file(tensors, str(path), metadata={"format": "pt"})
    return f"{kind} {name}"


def edit_header(path: Path, chance: random.Random) -> str:
    """A file of tensors with a value of its header changed."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    document, text = edit_json(json.loads(content[8 : 8 + length]), chance)
    header = json.dumps(document).encode()
    told = chance.choice((len(header), len(header), len(header), 0, 1 << 40, (1 << 64) - 1, len(header) + 1))
    path.write_bytes(struct.pack("<Q", told) + header + content[8 + length :])
    return f"header {text}"


def edit_bytes(path: Path, chance: random.Random) -> str:
    """A file with bytes flipped, inserted, removed or cut off."""
    content = bytearray(path.read_bytes())
    kind = chance.choice(("flip", "flip", "set", "insert", "remove", "truncate", "append", "empty"))
    place = chance.randrange(max(len(content), 1))
    if kind == "flip" and content:
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "set":
        content[place : place + 4] = chance.randbytes(min(4, len(content) - place))
    elif kind == "insert":
        content[place:place] = chance.randbytes(chance.choice((1, 8, 1000)))
    elif kind == "remove":
        del content[place : place + chance.choice((1, 8, 1000))]
    elif kind == "truncate":
        del content[place:]
    elif kind == "append":
        content += chance.choice((b"\0", b"}", b"\n{}", chance.randbytes(100)))
    else:
        content.clear()
    path.write_bytes(content)
    return f"{kind} at {place}"


def mutate(base: Path, directory: Path, seed: int) -> Mutation:
    """Copies one of the artifacts below ``base`` to ``directory``, with one thing changed."""
    chance = random.Random(seed)
    model = chance.choice(list(MODELS))
    shutil.copytree(base / model, directory)
    files = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    name = chance.choice((chance.choice(files), "graph.json", "graph.json", "model.safetensors"))
    path, crafted = directory / name, chance.random() < 0.8
    kind = chance.choice(("content", "content", "content", "content", "content", "content", "bytes", "bytes", "files"))
    if kind == "bytes":
        text = edit_bytes(path, chance)
    elif kind == "files":
        text = _edit_files(directory, files, name, chance)
    elif name.endswith(".safetensors"):
        text = (edit_tensors if chance.random() < 0.7 else edit_header)(path, chance)
    elif path.suffix in (".json", ".lock"):
        edit = edit_graph if name == "graph.json" or name.startswith("passes/") else edit_json
        document, text = edit(json.loads(path.read_bytes()), chance)
        path.write_text(json.dumps(document))
    else:
        text = edit_bytes(path, chance)
    if crafted and name != artifact.MANIFEST:
        fit(directory)
    return Mutation(model, f"{name}: {text}", name, crafted)


def _edit_files(directory: Path, files: list[str], name: str, chance: random.Random) -> str:
    path, other = directory / name, directory / chance.choice(files)
    kind = chance.choice(("remove", "swap", "copy", "add", "directory", "link"))
    if kind == "remove":
        path.unlink()
    elif kind == "swap":
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "copy":
        path.write_bytes(other.read_bytes())
    elif kind == "add":
        added = (
            "more.json",
            "model-00002-of-00002.safetensors",
            "tokenizer.model",
            "vocab.txt",
            "merges.txt",
            "config.py",
        )
        shutil.copy(path, directory / chance.choice(added))
    else:
        path.unlink()
        path.mkdir() if kind == "directory" else path.symlink_to("/etc/passwd")
    return f"{kind} ({other.name})"


def fit(directory: Path) -> None:
    """Makes the manifest fit the files, as who crafts an artifact does."""
    path = directory / artifact.MANIFEST
    if not path.is_file():
        return
    files = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in (path.name, artifact.REPORT)):
        content = file.read_bytes()
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files[file.relative_to(directory).as_posix()] = entry
    path.write_text(json.dumps({"format": artifact.FORMAT, "version": artifact.VERSION, "files": files}))


# Natively


_PERTURB = -6
"""The parameter of glibc's ``mallopt`` that sets a byte which memory is filled with when it is taken or given back."""

_built: dict[Any, Kernels] = {}


def kernels_of(loaded: Artifact) -> Kernels:
    """The kernels of an artifact, each distinct set built once in a process."""
    key = (requirements(loaded.program), json.dumps(loaded.records))
    if key not in _built:
        _built[key] = build_kernels(loaded)
    return _built[key]


def run_natively(found: Read) -> bool:
    """Runs a language model's native program; False where it has none, and its graph runs in torch.

    Raises:
        LbllmError: it is refused.
        AssertionError: it gives something else than its graph in torch, or what it gives depends on memory that nobody
            has written.
    """
    program, kernels = found.loaded.program, kernels_of(found.loaded)
    with workshop() as folder:
        native = build_native(program, kernels, folder)
        if native is None:
            return False
        model, inputs = CompiledModel(program, kernels, native), inputs_of(program)
        _, bound = compare.distances(program, kernels, native)
        runs = []
        for byte in (0x55, 0xAA):
            ctypes.CDLL(None).mallopt(_PERTURB, byte)
            runs.append(answers(model, inputs))
        ctypes.CDLL(None).mallopt(_PERTURB, 0)
    if not all(map(_same_bits, *runs)):
        raise AssertionError("natively it gives another answer every time")
    seen = inputs["attention_mask"].bool()
    for ours, theirs in zip(runs[0], found.outputs, strict=True):
        # What quantizers make of activations that are not finite is not defined.
        defined = torch.isfinite(theirs).all(-1)
        if defined.shape == seen.shape:
            defined &= seen
        mean = float(compare._distance(ours, theirs)[defined].mean()) if defined.any() else 0.0
        if not mean <= bound:
            raise AssertionError(f"natively it gives another answer: {mean:.2g} from its graph's, and not {bound:.2g}")
    return True


def is_to_run_natively(found: Read, before: Read, base: Path, seed: int) -> bool:
    """Whether an artifact is one of those that run natively, too."""
    if found.loaded.program.kind != "causal-lm":
        return False
    numbers = _numbers(base)
    if any(numbers.get(call, given) != given for call, given in _numbers(found.loaded.directory).items()):
        return True
    same = same_program(found.loaded.program, before.loaded.program) and found.loaded.records == before.loaded.records
    return not same and seed % NATIVELY == 0


def _numbers(directory: Path) -> dict[tuple[str, str], list[Any]]:
    """What every call of an artifact's graph gets that is no tensor, by its name and operator."""
    nodes = json.loads((directory / "graph.json").read_bytes())["nodes"]
    return {
        (node["name"], node["target"]): [c[k] for c, k in _arguments(node) if isinstance(c[k], (int, float))]
        for node in nodes
        if node["op"] == "call_function"
    }


# Verdicts


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutated artifact.

    Attributes:
        verdict: ``"refused"``, ``"same"`` (it gives the answers from before), ``"other"`` or ``"wrong"``.
        text: what was done, and the refusal or what is wrong.
        natively: ``"run"``, ``"in torch"`` (its graph has no native program) or ``"refused"``; empty where it was not
            tried.
    """

    verdict: str
    text: str
    natively: str = ""


def expected(base: Path) -> dict[str, Read]:
    """What the artifacts came to as they were."""
    return {name: read(base / name) for name in MODELS}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def _sentence(error: LbllmError) -> str:
    """What an error tells a user.

    Raises:
        AssertionError: that is no sentence, or calls itself a bug.
    """
    sentence = str(error)
    if not 20 < len(sentence) < 800 or "\n" in sentence:
        raise AssertionError(f"this is no sentence: {sentence!r}") from error
    if error.exit_code == 1:
        raise AssertionError(f"this should not be a bug: {sentence}") from error
    return f"{type(error).__name__}: {sentence}"


def check(base: Path, before: Mapping[str, Read], directory: Path, seed: int) -> Outcome:
    """Mutates, reads and runs.

    Only a crafted graph, weights or kind of program may give other answers than before, and then those that the graph
    itself has in the reference's arithmetic.

    Raises:
        AssertionError: what reading or running raised that is no :class:`LbllmError`, or what is wrong with the result.
    """
    mutation = mutate(base, directory, seed)
    what = f"{mutation.model}, {mutation.text}, {'crafted' if mutation.crafted else 'damaged'}"
    try:
        return _checked(base / mutation.model, before[mutation.model], directory, mutation, what, seed)
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def _checked(base: Path, before: Read, directory: Path, mutation: Mutation, what: str, seed: int) -> Outcome:
    try:
        found = read(directory, mutation.file, before)
    except LbllmError as error:
        return Outcome("refused", f"{what}: {_sentence(error)}")
    same = len(found.outputs) == len(before.outputs) and all(map(_same, found.outputs, before.outputs))
    if not same and (not mutation.crafted or mutation.file.startswith(UNDECIDING)):
        raise AssertionError("the answer is another one")
    verdict = "same" if same else "other"
    if not is_to_run_natively(found, before, base, seed):
        return Outcome(verdict, what)
    try:
        return Outcome(verdict, what, "run" if run_natively(found) else "in torch")
    except LbllmError as error:
        return Outcome(verdict, f"{what}; natively {_sentence(error)}", "refused")


def work(base: Path, first: int, last: int) -> None:
    """Checks the mutations of some seeds, one line before and one behind each, on bounded memory and time.

    A process that takes longer for one is ended by its alarm. What libraries print goes to stderr.
    """
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    before = expected(base)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in range(first, last):
        print(json.dumps({"seed": seed}), file=lines, flush=True)
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = check(base, before, Path(folder) / "mutated", seed)
            except BaseException as error:
                outcome = Outcome("wrong", f"{error}\n{''.join(traceback.format_exception(error))}")
        signal.alarm(0)
        print(json.dumps({"seed": seed, **dataclasses.asdict(outcome)}), file=lines, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as made:
            os.environ["LBLLM_CACHE_DIR"] = str(Path(made) / "cache")
            make(Path(made))
            for seed in map(int, sys.argv[1:]):
                work(Path(made), seed, seed + 1)
