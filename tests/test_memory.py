"""What a compile holds in memory: one layer, whatever the number of layers; and what ``plan`` says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import memory
from lbllm_compile import plan, resident
from lbllm_compile.options import CompileOptions

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 256,
}
"""Layers of 11.3 million weights and next to nothing else."""

LAYER_BYTES = 4 * 11_272_192
STAGES = ("stage 1, ptq", "stage 2, distill", "stage 3, activate")


PEAK = "from lbllm_compile import resident; print(resident.peak_memory())"


@pytest.mark.skipif(not resident.STATUS.is_file(), reason="the system does not say what a process holds")
def test_a_peak_is_that_of_the_process_itself() -> None:
    """Neither of the one that started it, nor less than what it held and gave back."""
    parent = "import subprocess, sys; x = bytearray(400 << 20); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    held = f"x = bytearray(400 << 20); del x; {PEAK}"
    for words, low, high in (((parent, PEAK), 1 << 20, 200 << 20), ((held,), 400 << 20, 800 << 20)):
        shown = subprocess.run([sys.executable, "-c", *words], cwd=ROOT, check=True, capture_output=True, text=True)
        assert low < int(shown.stdout) < high


def planned(folder: Path, layers: int, pipeline: str) -> dict[str, int]:
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    (folder / "text.txt").write_text("words")
    options = CompileOptions(str(folder), pipeline=pipeline, calibration=str(folder / "text.txt"))
    return plan.make_plan(options).memory


def test_the_plan_of_the_stages_does_not_depend_on_the_number_of_layers(tmp_path: Path) -> None:
    few, many = (planned(tmp_path / str(layers), layers, memory.PIPELINE) for layers in (2, 16))
    assert all(few[stage] == many[stage] for stage in (*STAGES, "reading", "capture and preflight"))
    assert few["comparison with the original"] < many["comparison with the original"]


def test_the_plan_names_the_phase_that_needs_the_whole_model(tmp_path: Path) -> None:
    together = memory.PIPELINE.replace("epochs=1,steps=0", "steps=4")
    few, many = (planned(tmp_path / str(layers), layers, together) for layers in (2, 16))
    phase = "training all layers together"
    assert many[phase] - few[phase] > 14 * LAYER_BYTES
    assert phase not in planned(tmp_path / "2", 2, memory.PIPELINE)


def test_the_benchmarks_model_is_one_that_transformers_loads(tmp_path: Path) -> None:
    memory.write_model(tmp_path, memory.SHAPES["tiny"], 3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert module.dtype is torch.bfloat16 and 0.019 < float(module.lm_head.weight.float().std()) < 0.021
    assert module.config.num_hidden_layers == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_the_peak_does_not_grow_with_the_layers_and_is_as_planned(tmp_path: Path) -> None:
    results = []
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        folder.mkdir()
        memory.write_model(folder, SHAPE, layers)
        command = [sys.executable, "-m", "benchmarks.memory", "--model", str(folder), "--json", str(tmp_path / "out")]
        environment = os.environ | {"PYTHONPATH": ":".join(p for p in sys.path if p)}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        results += json.loads((tmp_path / "out").read_text())
    few, many = (max(r["measured"].values()) for r in results)
    assert many - few < LAYER_BYTES
    for result in results:
        expected = max(result["planned"][memory.PLANNED[p]] for p in result["measured"] if p in memory.PLANNED)
        assert 0.75 < max(result["measured"].values()) / expected < 1.25
