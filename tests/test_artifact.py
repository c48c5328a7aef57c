"""Artifacts: what is saved comes back, and nothing altered, foreign or half-written is read or overwritten."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import context, normal, program, token_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.passes.head import Head
from lbllm_compile.passes.ir.program import set_attribute
from lbllm_compile.passes.lower import Lower
from rtn import simulate
from safetensors.torch import load_file, save_file

from lbllm_compile import artifact
from lbllm_compile.artifact import ArtifactError

aten, lbllm = torch.ops.aten, torch.ops.lbllm


def lowered(seed: int = 0):
    def forward(root, input_ids):
        x = aten.embedding.default(root.embed.weight, input_ids)
        return aten.linear.default(aten.linear.default(x, root.a.weight), root.embed.weight)

    weights = {"embed.weight": normal(11, 40, seed=seed), "a.weight": normal(40, 40, seed=1)}
    item = simulate(program(weights, forward, head="embed"))
    for step in (Head(), Lower(target="cpu")):
        item = step.apply(item, context()).program
    return item


SPEC = dataclasses.asdict(LinearSpec("bit", out_features=8, in_features=32, group=32))
RECORDS = [{"spec": SPEC, "tokens": "1", "target": "cpu:avx2", "schedule": {"rows": 4}}]
LOCK = {"model": "0" * 64, "source": "model.py", "seed": "0"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def saved(tmp_path):
    item = lowered()
    out = tmp_path / "model-lbllm"
    artifact.save(
        item, out, lock=LOCK, history=[("lower", item)], records=RECORDS, sources={"linear0": "# text"},
        binaries={"k.cubin": b"\x7fELF"},
    )  # fmt: skip
    return item, out


def test_what_is_saved_comes_back(saved):
    item, out = saved
    loaded = artifact.load(out)
    inputs = token_inputs()
    assert torch.equal(loaded.program.run(inputs), item.run(inputs))
    assert (loaded.program.kind, loaded.program.name) == (item.kind, item.name)
    assert loaded.program.metadata == {"target": "cpu"}
    assert (dict(loaded.lock), loaded.records) == (LOCK, RECORDS)
    assert loaded.digest == hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()


def test_the_directory_is_what_it_says(saved):
    _, out = saved
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "config.json",
        "graph.json",
        "kernels/k.cubin",
        "kernels/linear0.py",
        "lbllm.lock",
        "manifest.json",
        "measured.json",
        "model.safetensors",
        "passes/001_lower.json",
        "program.json",
        "tuning.json",
    ]
    weights = load_file(out / "model.safetensors")
    assert {"a.weight.sign", "a.weight.bitmap", "a.weight.levels", "a.weight.scale"} < set(weights)
    listed = json.loads((out / "manifest.json").read_text())["files"]
    for name, entry in listed.items():
        content = (out / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_whoever_may_read_one_file_may_read_all(saved):
    modes = {path.stat().st_mode for path in saved[1].rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    item, out = saved
    artifact.save(item, tmp_path / "other", lock=LOCK, history=[("lower", item)])
    for name in ("model.safetensors", "graph.json", "passes/001_lower.json", "program.json"):
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_constant_may_mask_with_minus_infinity(tmp_path):
    mask = torch.full((3, 40), 0.0)
    mask[0, 0] = -torch.inf

    def forward(root, input_ids):
        return aten.linear.default(aten.embedding.default(root.embed.weight, input_ids), root.mask)

    for value, good in ((-torch.inf, True), (torch.inf, False), (torch.nan, False)):
        mask[0, 0] = value
        item = program({"embed.weight": normal(11, 40), "mask": mask.clone()}, forward, head="embed")
        artifact.save(item, tmp_path / "out", lock=LOCK)
        if good:
            artifact.load(tmp_path / "out")
            continue
        with pytest.raises(ArtifactError, match="'mask' has NaN or infinite values"):
            artifact.load(tmp_path / "out")


def test_large_weights_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "SHARD_BYTES", 500)
    item = lowered()
    artifact.save(item, tmp_path / "out", lock=LOCK)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(artifact.load(tmp_path / "out").program.run(token_inputs()), item.run(token_inputs()))


def test_an_older_artifact_is_replaced_whole(saved):
    _, out = saved
    artifact.save(lowered(seed=5), out, lock=LOCK)
    assert not (out / "passes").exists()
    assert torch.equal(artifact.load(out).program.run(token_inputs()), lowered(seed=5).run(token_inputs()))
    assert [p.name for p in out.parent.iterdir()] == [out.name], "nothing temporary may stay behind"


def test_a_failing_save_leaves_the_older_artifact(saved, monkeypatch):
    item, out = saved
    before = (out / "manifest.json").read_bytes()
    monkeypatch.setattr(artifact, "_write_weights", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ArtifactError, match=r"cannot write the artifact .*the disk is full"):
        artifact.save(item, out, lock=LOCK)
    assert (out / "manifest.json").read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_foreign_directories_are_not_overwritten(tmp_path, saved):
    item, _ = saved
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds files that are not an lbllm artifact"):
        artifact.save(item, foreign, lock=LOCK)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="it is not a directory"):
        artifact.check_destination(tmp_path / "file")


def users_files(out: Path):
    """What a user may have put beside an artifact: files, a folder, a link and an empty folder."""
    (out / "README.md").write_text("mine")
    (out / "report.html").write_text("mine too")
    (out / "notes" / "deep").mkdir(parents=True)
    (out / "notes" / "deep" / "a.txt").write_text("deep")
    (out / "notes" / "link").symlink_to("deep")
    (out / "empty").mkdir()


def check_users_files(out: Path):
    assert (out / "README.md").read_text() == "mine" and (out / "report.html").read_text() == "mine too"
    assert (out / "notes" / "link" / "a.txt").read_text() == "deep" and (out / "notes" / "link").is_symlink()
    assert (out / "empty").is_dir()


@pytest.mark.parametrize("links", [True, False], ids=["second names", "copies"])
def test_files_of_the_users_beside_an_artifact_stay(saved, links, monkeypatch):
    _, out = saved
    users_files(out)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(1, "no second names here")))
    artifact.save(lowered(seed=5), out, lock=LOCK)
    check_users_files(out)
    assert torch.equal(artifact.load(out).program.run(token_inputs()), lowered(seed=5).run(token_inputs()))
    assert [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("name", ["tokenizer.json", "passes/notes.txt", "kernels/mine.py", "model-1-of-2.safetensors"])
def test_a_file_of_the_users_that_an_artifact_could_have_is_in_the_way(saved, name):
    _, out = saved
    (out / name).write_text("mine")
    with pytest.raises(ArtifactError, match=f"holds '{name}', which is not part of the artifact") as raised:
        artifact.check_destination(out)
    assert "\n" not in str(raised.value)


def test_a_link_stands_for_what_it_points_to(saved, tmp_path):
    item, out = saved
    for name, target in (("link", out), ("dangling", tmp_path / "new"), ("circle", tmp_path / "circle")):
        (tmp_path / name).symlink_to(target)
    for name in ("link", "dangling"):
        artifact.save(lowered(seed=5), tmp_path / name, lock=LOCK)
        assert (tmp_path / name).is_symlink()
    for place in (out, tmp_path / "new"):
        assert torch.equal(artifact.load(place).program.run(token_inputs()), lowered(seed=5).run(token_inputs()))
    with pytest.raises(ArtifactError, match="it is not a directory"):
        artifact.save(item, tmp_path / "circle", lock=LOCK)


KILLS = """
import os, shutil, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from lbllm_compile import artifact
from test_artifact import LOCK, check_users_files, lowered, users_files

folder, swaps = Path(sys.argv[2]), sys.argv[3] == "swap"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CALLS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
older, newer = lowered(), lowered(seed=5)
swap = artifact.exchange if swaps else lambda *_: False


def arm(moment):
    left = moment

    def count():
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in CALLS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            count()

    def counted(*names):
        count()
        done = swap(*names)
        count()
        return done

    sys.addaudithook(hook)
    artifact.exchange = counted


moment, found = 0, set()
while True:
    moment += 1
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "out"
    digests = {artifact.save(older, out, lock=LOCK): "older"}
    users_files(out)
    child = os.fork()
    if not child:
        arm(moment)
        artifact.save(newer, out, lock=LOCK)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    loaded = artifact.load(out)
    found.add(digests.get(loaded.digest, "newer"))
    check_users_files(out)
    artifact.save(newer, out, lock=LOCK)
    check_users_files(out)
    assert artifact.load(out).digest not in digests
    assert [p.name for p in folder.iterdir()] == ["out"], list(folder.iterdir())
    if status == 0:
        break
assert found == {"older", "newer"} and moment > 40, (found, moment)
"""


@pytest.mark.parametrize("way", ["swap", "two renames"])
def test_a_kill_between_any_two_calls_leaves_one_whole_artifact(tmp_path, way):
    """Also where the file system cannot swap two names at once; and what users put there stays."""
    tests = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", KILLS, str(tests), str(tmp_path / "kills"), way], cwd=tests.parent, check=True
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_destination_is_told_first(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ArtifactError, match="not writable"):
        artifact.check_destination(tmp_path / "locked" / "out")


def edit_manifest(out: Path, change):
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def sign_again(out: Path, name: str):
    """An attacker who alters a file can alter its hash too."""
    content = (out / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(out, lambda m: m["files"].update({name: entry}))


def edit_graph(out: Path, change):
    graph = json.loads((out / "graph.json").read_text())
    change(graph)
    (out / "graph.json").write_text(json.dumps(graph))
    sign_again(out, "graph.json")


def edit_weights(out: Path, change):
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors")
    sign_again(out, "model.safetensors")


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def relink(path: Path):
    moved = path.with_suffix(".moved")
    path.rename(moved)
    path.symlink_to(moved)


def call(target: str):
    def change(graph):
        next(n for n in graph["nodes"] if n["op"] == "call_function")["target"] = target

    return change


def argument(target: str, name: str, value):
    """Gives the first call of an operator another argument, by name; no linear says what it should be."""

    def change(graph):
        for described in graph["nodes"]:
            described.get("meta", {}).pop("linear", None)
        node = next(n for n in graph["nodes"] if n["target"] == target)
        names = [a.name for a in getattr(lbllm, target.split(".")[1]).default._schema.arguments]
        given = {**dict(zip(names, node.pop("args", []), strict=False)), **node.get("kwargs", {})}
        node["kwargs"] = {**given, name: value}

    return change


def transposed(graph):
    """Has the embedding compute its table."""
    index, node = next((i, n) for i, n in enumerate(graph["nodes"]) if n["target"] == "lbllm.int8_embedding.default")
    turned = {"name": "turned", "op": "call_function", "target": "aten.t.default", "args": node["args"][:1]}
    graph["nodes"].insert(index, turned)
    node["args"][0] = {"node": "turned"}


DAMAGES = {
    "truncated weights": (lambda d: truncate(d / "model.safetensors"), "bytes instead of"),
    "flipped bit in weights": (lambda d: flip(d / "model.safetensors"), "was altered"),
    "flipped bit in the graph": (lambda d: flip(d / "graph.json"), "was altered"),
    "flipped bit in a stored pass": (lambda d: flip(d / "passes/001_lower.json"), "was altered"),
    "missing file": (lambda d: (d / "lbllm.lock").unlink(), "is missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "has no manifest.json"),
    "truncated manifest": (lambda d: truncate(d / "manifest.json"), "damaged"),
    "foreign manifest": (lambda d: (d / "manifest.json").write_text('{"files": {}}'), "is not an lbllm artifact"),
    "another version": (lambda d: edit_manifest(d, lambda m: m.update(version=99)), "version 99, this build reads"),
    "a version that is text": (lambda d: edit_manifest(d, lambda m: m.update(version="1")), "this build reads"),
    "no files": (lambda d: edit_manifest(d, lambda m: m.update(files={})), "lists no files"),
    "a path outside": (
        lambda d: edit_manifest(d, lambda m: m["files"].update({"../secret": m["files"]["graph.json"]})),
        "not a plain name inside",
    ),
    "an absolute path": (
        lambda d: edit_manifest(d, lambda m: m["files"].update({"/etc/passwd": m["files"]["graph.json"]})),
        "not a plain name inside",
    ),
    "a link": (lambda d: relink(d / "graph.json"), "is a link"),
    "a linked manifest": (lambda d: relink(d / "manifest.json"), "is not an lbllm artifact"),
    "a malformed hash": (
        lambda d: edit_manifest(d, lambda m: m["files"].update({"graph.json": {"bytes": 1, "sha256": "0"}})),
        "damaged at 'graph.json'",
    ),
    "an operator outside the list": (lambda d: edit_graph(d, call("aten.from_file.default")), "outside the operators"),
    "an unlisted tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "is not part of the artifact"),
    "an unused weight": (lambda d: edit_weights(d, lambda w: w.update(extra=torch.ones(1))), "does not use"),
    "a weight less": (lambda d: edit_weights(d, lambda w: w.pop("a.weight.sign")), "not stored"),
    "unsorted levels": (
        lambda d: edit_weights(d, lambda w: w.update({"a.weight.levels": w["a.weight.levels"].flip(-1).contiguous()})),
        "not sorted",
    ),
    "a NaN scale": (
        lambda d: edit_weights(d, lambda w: w["a.weight.scale"].fill_(float("nan"))),
        "negative, NaN or infinite",
    ),
    "a wrong shape": (
        lambda d: edit_weights(d, lambda w: w.update({"a.weight.sign": w["a.weight.sign"][:, :-1].contiguous()})),
        "the format needs",
    ),
    "rows of another type": (
        lambda d: edit_weights(d, lambda w: w.update({"embed.weight.rows": w["embed.weight.rows"].float()})),
        "not int8 rows",
    ),
    "a table that is computed": (lambda d: edit_graph(d, transposed), "computes an int8 matrix"),
    "bits that do not exist": (
        lambda d: edit_graph(d, argument("lbllm.quantize_activation.default", "bits", 5)),
        r"damaged: 'quantize_activation_default' \(lbllm.quantize_activation.default\): 5 bits are not one of",
    ),
    "a clip factor beyond the range": (
        lambda d: edit_weights(d, lambda w: next(t for p, t in w.items() if p.endswith("clip")).fill_(2.0)),
        r"'quantize_activation_default' \(lbllm.quantize_activation.default\): clip has values that are not above 0",
    ),
    "a group that is not the weight's": (
        lambda d: edit_graph(d, argument("lbllm.int8_linear.default", "group", 32)),
        r"'int8_linear_default' \(lbllm.int8_linear.default\): x_scale has 1 scales a token, not 2",
    ),
    "a file that is no safetensors": (
        lambda d: ((d / "model.safetensors").write_bytes(b"\xff" * 64), sign_again(d, "model.safetensors")),
        "not a safetensors file",
    ),
    "a program of no kind": (
        lambda d: ((d / "program.json").write_text("{}"), sign_again(d, "program.json")),
        "does not describe a program",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_artifacts_are_refused_with_one_sentence(saved, name):
    _, out = saved
    damage, message = DAMAGES[name]
    damage(out)
    with pytest.raises(ArtifactError, match=message) as raised:
        artifact.load(out)
    assert "\n" not in str(raised.value)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(ArtifactError, match="no artifact at"):
        artifact.load(tmp_path / "nothing")


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_is_found(saved, tmp_path, data):
    _, out = saved
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy)
    name = data.draw(st.sampled_from(sorted(json.loads((out / "manifest.json").read_text())["files"])))
    content = bytearray((copy / name).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match="was altered"):
        artifact.load(copy)


def test_a_graph_that_cannot_be_loaded_is_not_saved(tmp_path):
    item = lowered()
    graph = item.module.graph
    with graph.inserting_before(graph.output_node()):
        noise = graph.call_function(aten.rand_like.default, (graph.output_node().args[0],))
    graph.output_node().args = (noise,)
    item.module.recompile()
    with pytest.raises(Exception, match=r"aten\.rand_like.*outside the operators"):
        artifact.save(item, tmp_path / "out", lock=LOCK)
    assert not (tmp_path / "out").exists()


def test_only_artifacts_written_here_are_remembered(saved, tmp_path):
    item, out = saved
    assert artifact.compiled_from(artifact.load(out).digest) == {}
    digest = artifact.save(item, out, lock=LOCK, places={"source": "/somewhere/model.py"})
    assert artifact.compiled_from(digest) == {"source": "/somewhere/model.py"}
    edit_manifest(out, lambda m: m.update(note="from elsewhere"))
    assert artifact.compiled_from(artifact.load(out).digest) is None


def test_a_tied_pair_is_stored_once(saved):
    item, out = saved
    set_attribute(item.module, "unrelated", torch.ones(1))
    assert sum(p.endswith(".rows") for p in load_file(out / "model.safetensors")) == 1
