"""``report.html``: what it tells, what it leaves alone, and how it behaves in a browser."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stages
import torch
from lbllm_compile.codegen.format import QuantizedWeight, codes_to_planes
from lbllm_compile.codegen.progress import NoProgress
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.ir.parse import parse
from test_outliers import whole as outliers

from benchmarks.browser import CHROMIUM, Page
from lbllm_compile import artifact, explain, inspect
from lbllm_compile.html_report import command, contents, figures, page, story, tradeoff, weights
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.options import CompileOptions, command_line
from lbllm_compile.records import CompileReport, MeasuredPass, Verdict

PIPELINE = (
    "smooth,observe,ptq{group=32},distill{epochs=2},activate{group=32,epochs=1,steps=2},finetune{steps=2},head,merge,"
    "lower,cache,cleanup"
)

NAME = "<b>llama</b> & </script><script>alert(1)</script>"
"""What a user may call a model."""

SHEET = {
    "bytes_original": 400_000, "bytes_compiled": 100_000, "bits_per_weight": 3.5, "bits_per_weight_file": 4.25,
    "text": "4 held-out sequences <of> text", "ppl_teacher": 41.5, "ppl": 102.1, "kld_mean": 0.82,
    "top1_agreement": 0.515, "decode_original": 28.0, "decode_compiled": 574.0,
}  # fmt: skip


def make(out: Path, name: str = NAME, sheet: dict[str, Any] = SHEET) -> Path:
    """An artifact of a tiny language model that went through every stage, and the report of its compile."""
    history: list[Any] = []
    context = dataclasses.replace(stages.context(), probe=stages.batches(1, seed=2)[0])
    program, records = pipeline.run(
        stages.annotated(), pipeline.parse(PIPELINE), context, lambda r, _, after: history.append((r.name, after))
    )
    program = dataclasses.replace(program, name=name)
    times = [
        {"spec": dataclasses.asdict(spec), "tokens": "1", "target": "cpu:avx2", "threads": 1,
         "schedule": {"layout": "lut8", "rows": 16}}
        for spec in requirements(program).linears
    ]  # fmt: skip
    digest = artifact.save(
        program, out, lock={"model": "0" * 64, "target": "cpu", "preset": "quick", "check": {"tokens": [1, 2, 3]}},
        history=history, passes=[MeasuredPass.of(record) for record in records], records=times,
    )  # fmt: skip
    measured = [{**row, "microseconds": 5.5, "roofline_microseconds": 3.3} for row in times]
    report = CompileReport(
        out, records, [Verdict("stage 2", False, "1 of 2 layers <is> better")], sheet, 0,
        {"passes": 5.0, "capture": 1.0}, 1 << 30, "lbllm-compile <model>.py --preset quick", {"CPU": "a <CPU>"},
        measured,
    )  # fmt: skip
    assert artifact.write_report(digest, report)
    return out


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        out = make(tmp_path_factory.mktemp("toy") / "toy-lbllm")
        assert page.write(out)
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


class Text(HTMLParser):
    """The text and the elements of a page, scripts and styles left out."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def data_of(file: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_the_page_answers_what_everyone_asks(toy: Path) -> None:
    text = Text((toy / "report.html").read_text()).text
    points = story.layer_errors(artifact.measured_passes(toy))
    worst = max(points[0].errors, key=lambda layer: points[0].errors[layer])
    assert f"Which layer was hurt most? Layer {worst}: " in text
    assert "Which stage repaired it?" in text
    assert re.search(r"Which kernels does it run\? .*down_proj \(72x104\): lut8, 5\.5 µs a token", text)
    assert "4.0x smaller (100.0 kB instead of 400.0 kB in 16 bit); 20.5x as fast" in text
    assert "102.1" in text and "41.5" in text and "51.5 %" in text and "0.82" in text


def test_a_slower_model_is_called_so(toy: Path) -> None:
    (slow,) = [tile for tile in story._tiles({"decode_original": 30.0, "decode_compiled": 15.0})]
    assert (slow.name, slow.value, slow.good) == ("as fast: SLOWER", "0.5x", False)


def test_the_page_tells_what_was_checked_and_what_was_not_met(toy: Path) -> None:
    reasons = story.reasons(contents.gather(toy))
    names = ["Files", "Contracts", "Kernels for cpu:avx2", "Self-check", "Stage 2"]
    assert [(r.name, r.passed) for r in reasons] == [(name, name != "Stage 2") for name in names]
    assert "they gave the reference's bits" in reasons[2].text and "3 greedy tokens" in reasons[3].text
    assert "✗" in (toy / "report.html").read_text() and 'class="failed"' in (toy / "report.html").read_text()


def test_calibrating_passes_keep_no_bits(toy: Path) -> None:
    found = contents.gather(toy)
    assert found.report is not None
    held = [r for r in found.report.records if r.contract != "calibrating"]
    exact = sum(r.error == 0 for r in held)
    unmoved = [
        dataclasses.replace(r, error=0.0 if r.contract == "calibrating" else r.error) for r in found.report.records
    ]
    changed = dataclasses.replace(found, report=dataclasses.replace(found.report, records=unmoved))
    text = story.reasons(changed)[1].text
    assert text.startswith(f"{len(held)} of {len(unmoved)} passes promise") and f"; {exact} of them kept it" in text


def test_kernels_that_did_not_run_are_not_said_to_have_given_bits(toy: Path) -> None:
    found = contents.gather(toy)
    assert found.report is not None
    sheet = {**SHEET, "cuda_kernels": "sm_90: emulated on CPU", "other_kernels": "x1: not run: no compiler"}
    elsewhere = dataclasses.replace(
        found,
        kernels=[dataclasses.replace(kernel, schedules=()) for kernel in found.kernels],
        report=dataclasses.replace(found.report, sheet=sheet),
    )
    assert [(r.passed, r.name, r.text) for r in story.reasons(elsewhere) if r.name.startswith("Kernels")] == [
        (True, "Kernels for cuda", "sm_90: emulated on CPU"),
        (False, "Kernels for other", "x1: not run: no compiler"),
    ]


def test_a_time_stands_beside_its_own_schedule(toy: Path) -> None:
    found = contents.gather(toy)
    (first, *_) = found.kernels
    assert first.spec is not None
    record = {k: v for k, v in first.schedules[0].items() if k in ("spec", "target", "threads", "schedule")}
    records = [{**record, "tokens": tokens} for tokens in ("1", "2-16", "17+")]
    rows = explain.kernels_of(records, [{**records[1], "microseconds": 7.5}], first.spec)
    lone = dataclasses.replace(found, kernels=[dataclasses.replace(k, schedules=rows) for k in found.kernels])
    table = page.render(lone).partition('<table id="kernel-table">')[2].partition("</tbody>")[0]
    lines = [Text(row).text for row in re.findall(r"<tr>.*?</tr>", table.partition("<tbody>")[2], re.DOTALL)]
    assert [line.endswith("7.5 µs") for line in lines] == [False, True, False]
    assert [re.search(r"\S+ lut8", line)[0] for line in lines] == ["1 lut8", "2-16 lut8", "17+ lut8"]


@pytest.mark.parametrize(
    "wrong", [{"microseconds": None}, {"tokens": 1}, {"spec": []}, {"roofline_microseconds": "x"}, {"candidates": [{}]}]
)
def test_a_damaged_time_is_said_to_be(toy: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    out = copy_of(toy, tmp_path / "out")
    document = json.loads((out / "report.json").read_text())
    document["kernels"][-1] |= wrong
    (out / "report.json").write_text(json.dumps(document))
    with pytest.raises(artifact.ArtifactError, match=r"report\.json' is damaged; remove it"):
        artifact.read_report(out)


def test_weights_and_sizes_have_the_names_that_inspect_gives(toy: Path) -> None:
    texts = data_of(toy / "report.html")["graphs"]["texts"]
    assert "%model_embed_tokens_weight: f32[101, 72] = weight model.embed_tokens.weight" in texts
    assert not any("[0] = weight" in text for text in texts)
    lines = {mark["text"] for block in inspect.look(toy, "cleanup")[1]["graph"] for mark in block["lines"]}
    assert lines <= set(texts)


def test_nothing_of_a_models_or_users_text_is_markup(toy: Path) -> None:
    content = (toy / "report.html").read_text()
    assert "<script>alert" not in content and "<of>" not in content and "<is>" not in content
    parsed = Text(content)
    assert NAME in parsed.text and "a <CPU>" in parsed.text and "<model>.py" in parsed.text
    assert sum(tag == "script" for tag, _ in parsed.elements) == 3


def test_the_page_names_no_address(toy: Path) -> None:
    for tag, attributes in Text((toy / "report.html").read_text()).elements:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)


def test_the_page_has_every_pass_with_alike_lines_once(toy: Path) -> None:
    graphs = data_of(toy / "report.html")["graphs"]
    assert [p["name"] for p in graphs["passes"]] == [p.partition("{")[0] for p in re.split(r",(?![^{]*})", PIPELINE)]
    assert len(set(graphs["texts"])) == len(graphs["texts"])
    last = graphs["passes"][-1]
    lines = [graphs["texts"][place] for block in last["blocks"] for sign, place in block["lines"] if sign != "-"]
    assert sum("lbllm.bit_linear" in line for line in lines) == 4 * len([b for b in last["blocks"] if b["layers"]])
    assert all(sign in "+- " for block in last["blocks"] for sign, _ in block["lines"])


def test_a_file_of_the_users_is_left_alone(toy: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(toy, tmp_path / "out"))
    file = out / page.PAGE
    assert page.write(out), "what was written here is replaced"
    ours = file.read_text()
    for theirs in ("my notes", ours + "<p>my remark</p>", "", ours[:-1]):
        file.write_text(theirs)
        assert not page.write(out) and file.read_text() == theirs
    file.unlink()
    (tmp_path / "elsewhere.html").write_text(ours)
    file.symlink_to(tmp_path / "elsewhere.html")
    assert not page.write(out) and file.is_symlink()
    file.unlink()
    assert page.write(out) and file.read_text() == ours, "the same artifact gives the same page"


def test_only_a_page_that_was_written_here_gives_way_to_a_newer_artifact(toy: Path, tmp_path: Path) -> None:
    file = tmp_path / page.PAGE
    page.discard(tmp_path)
    file.write_text("mine")
    page.discard(tmp_path)
    assert file.read_text() == "mine"
    file.write_bytes((toy / page.PAGE).read_bytes())
    page.discard(tmp_path)
    assert not file.exists()


def test_a_page_that_cannot_be_written_is_one_sentence(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page, "write_atomically", full)
    out = Path(shutil.copytree(toy, tmp_path / "out"))
    with pytest.raises(page.ReportError, match=r"cannot write '.*report\.html': the disk is full"):
        page.write(out)


def test_an_artifact_with_a_page_loads(toy: Path) -> None:
    artifact.load(toy)


def test_an_artifact_without_a_report_has_a_page(toy: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(toy, tmp_path / "out"))
    (out / "report.json").unlink()
    (out / page.PAGE).unlink()
    assert page.write(out)
    text = Text((out / page.PAGE).read_text()).text
    assert "no figures of speed, size and quality" in text and "Which layer was hurt most?" in text


@pytest.mark.parametrize("columns", [1, 7, 8, 33, 64])
def test_code_shares_are_those_of_the_codes(columns: int) -> None:
    codes = torch.randint(0, 4, (5, columns), generator=torch.Generator().manual_seed(columns))
    sign, bitmap = (plane.numpy() for plane in codes_to_planes(codes))
    shares = weights.code_shares(sign, bitmap, codes.numel())
    assert shares == tuple(int((codes == code).sum()) / codes.numel() for code in range(4))


def test_extreme_levels_have_a_bin() -> None:
    levels = np.array([[[-127, -1, 0, 127]], [[-127, -127, 127, 127]]], dtype=np.int8)
    found = weights.level_histograms(levels)
    assert found.shape == (4, weights.BINS) and found.sum(1).tolist() == [2, 2, 2, 2]
    assert found[0, 0] == 2 and found[3, -1] == 2 and found[1, 0] == 1 and found[2, weights.BINS // 2] == 1


def test_weights_are_those_of_the_artifact(toy: Path) -> None:
    found = contents.gather(toy).weights
    state = dict(artifact.load(toy).program.parameters())
    assert len(found) == 2 * 7
    for item in found:
        path = f"{item.linear}.weight"
        planes = (state[f"{path}.{name}"] for name in ("sign", "bitmap", "levels", "scale"))
        codes = QuantizedWeight(*planes, in_features=item.shape[-1], group=32).codes()
        assert item.density == pytest.approx(float(((codes == 1) | (codes == 2)).float().mean()))


def test_bytes_of_outliers_are_a_part_of_their_own() -> None:
    found = contents.parts_of(outliers()[1])
    parts = {path: part for path, part in found.items() if path.startswith("model.layers.0.self_attn.")}
    assert parts["model.layers.0.self_attn.q_proj.weight.outliers.rows"] == "int8 outlier columns"
    assert parts["model.layers.0.self_attn.q_proj.weight.outliers.row_scale"] == "int8 outlier columns"
    assert parts["model.layers.0.self_attn.q_proj.weight.sign"] == "sign planes"
    assert parts["model.layers.0.self_attn.q_proj.input_order"] == "orders of inputs with outliers"


def test_bytes_are_named_by_what_reads_them(toy: Path) -> None:
    """A head of 4 bits beside an embedding with int8 rows, and parameters of a user's own."""
    program = parse("""
        %ids: i64[1, 3] = input input_ids
        %rows: i8[7, 64] = weight embed.weight.rows
        %row_scale: f32[7] = weight embed.weight.row_scale
        %embedding = lbllm.int8_embedding(%rows, %row_scale, %ids)
        %own: f32[64] = weight own.table
        %other: f32[64] = weight own.codes
        %first = aten.add.Tensor(%embedding, %own)
        %both = aten.add.Tensor(%first, %other)
        %clip: f32[2] = weight head.input_clip
        %quantized = lbllm.quantize_activation(%both, %clip, 8, 32)
        %values = getitem(%quantized, 0)
        %x_scale = getitem(%quantized, 1)
        %codes: u8[7, 32] = weight head.weight.codes
        %table: i8[16] = weight head.weight.table
        %code_scale: f16[7, 2] = weight head.weight.code_scale
        %logits = lbllm.int4_linear(%values, %x_scale, %codes, %table, %code_scale, None, 32)
        return %logits
    """)
    sizes = {path: t.numel() * t.element_size() for path, t in program.parameters()}
    whole = dataclasses.replace(contents.gather(toy), tensors=sizes, parts=contents.parts_of(program))
    assert {part["name"]: part["bytes"] for part in figures.of(whole)["bytes"]} == {
        "int8 embedding": 7 * 64 + 7 * 4,
        "4-bit head": 7 * 32 + 16 + 7 * 2 * 2,
        figures.FLOAT: 2 * 64 * 4 + 2 * 4,
    }
    parts = {part["name"] for part in figures.of(contents.gather(toy))["bytes"]}
    assert parts == {"sign planes", "bitmaps", "levels", "group scales", "int8 embedding and head", figures.FLOAT}


def test_a_pass_that_is_named_twice_has_two_times(toy: Path) -> None:
    found = contents.gather(toy)
    assert found.report is not None
    records = [dataclasses.replace(found.report.records[0], index=index, seconds=3.0 * index) for index in (1, 2)]
    twice = dataclasses.replace(found, report=dataclasses.replace(found.report, records=records))
    seconds = [row["seconds"] for row in figures.of(twice)["seconds"] if row["name"].startswith("pass ")]
    assert seconds == [record.seconds + record.check_seconds for record in records]
    assert len({row["name"] for row in figures.of(twice)["seconds"]}) == len(figures.of(twice)["seconds"])


def test_a_stage_that_is_named_twice_is_two_stages(toy: Path) -> None:
    def rows(error: float) -> list[dict[str, Any]]:
        return [{"layer": 0, "after": error}]

    steps = [("distill", 0.9), ("finetune", 0.8), ("activate", 0.7), ("finetune", 0.1)]
    ends = {"kl_before": 2.0, "kl_after": 1.0}
    measured = [
        MeasuredPass(name, name, "calibrating", rows(error), ends if name == "finetune" else {})
        for name, error in steps
    ]
    found = dataclasses.replace(contents.gather(toy), measured=measured)
    data = figures.of(found)
    assert data["layerErrors"]["values"] == [[0.9], [0.8], [0.7], [0.1]]
    assert [row["name"] for row in data["alignment"]] == ["finetune (whole model)", "finetune (whole model) 2"]
    (repaired,) = [answer.text for answer in story.answers(found) if answer.question.startswith("Which stage")]
    assert repaired.startswith("Finetune (whole model) 2 lowered the error of layer 0 from 0.7 to 0.1")


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)")


@pytest.fixture(scope="module")
def shown(toy: Path) -> Iterator[Page]:
    with Page() as browser:
        browser.open(toy / "report.html")
        yield browser


@needs_chromium
class TestInABrowser:
    def test_nothing_goes_wrong_and_nothing_is_asked_for(self, shown: Page, toy: Path) -> None:
        assert shown.evaluate("document.documentElement.dataset.ready") == "yes"
        for section in shown.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash)"):
            assert shown.evaluate(f"document.querySelector('{section}') !== null"), section
        draw_all(shown)
        assert shown.errors == []
        assert shown.requests == [(toy / "report.html").resolve().as_uri()]

    def test_every_plot_is_drawn(self, shown: Page) -> None:
        assert shown.evaluate(
            "new Set([...document.querySelectorAll('[id]:not(.plot *)')].map(e => e.id)).size === "
            "document.querySelectorAll('[id]:not(.plot *)').length"
        ), "no two elements have one id"
        draw_all(shown)
        plots = shown.evaluate(
            "[...document.querySelectorAll('.plot')].map(p => [p.id, p.querySelectorAll('.main-svg').length])"
        )
        assert {
            "layer-errors",
            "linear-errors",
            "alignment",
            "alignment-curves",
            "bytes",
            "seconds",
            "levels",
            "density",
            "codes",
            "training-curves",
            "ranges",
        } <= {name for name, _ in plots}
        assert all(count > 0 for _, count in plots), plots

    def test_every_drawing_stays_in_its_place(self, shown: Page) -> None:
        def outside() -> list[str]:
            draw_all(shown)
            return shown.evaluate(
                """[...document.querySelectorAll('.plot')].filter(plot => {
                  const place = plot.getBoundingClientRect();
                  return [...plot.querySelectorAll('.main-svg')].some(drawing => {
                    const own = drawing.getBoundingClientRect();
                    return own.top < place.top - 1 || own.bottom > place.bottom + 1 || own.right > place.right + 1;
                  });
                }).map(plot => plot.id)"""
            )

        assert outside() == []
        choose(shown, "training-layer", "1")
        shown.press("t")
        assert outside() == []
        shown.press("t")
        choose(shown, "training-layer", "all")

    def test_the_table_of_kernels_shows_whole_linears_that_match(self, shown: Page) -> None:
        linears = "[...document.getElementById('kernel-table').tBodies].filter(b => !b.hidden).map(b => b.textContent)"
        everything = shown.evaluate(linears)
        shown.evaluate("document.getElementById('kernel-filter').focus()")
        shown.type("DOWN_proj")
        assert len(everything) > 2 and [("down_proj" in text) for text in shown.evaluate(linears)] == [True, True]
        shown.evaluate("document.getElementById('kernel-filter').value = ''")
        shown.evaluate("document.getElementById('kernel-filter').dispatchEvent(new Event('input'))")
        shown.evaluate("document.activeElement.blur()")
        assert shown.evaluate(linears) == everything

    def test_the_graph_is_searched_from_the_keyboard(self, shown: Page) -> None:
        count = "document.querySelectorAll('#graph-panes .line').length"
        everything = shown.evaluate(count)
        shown.press("/")
        assert shown.evaluate("document.activeElement.id") == "graph-search"
        shown.type("BIT_LINEAR")
        texts = shown.evaluate("[...document.querySelectorAll('#graph-panes .line')].map(l => l.textContent)")
        assert 0 < len(texts) < everything and all("bit_linear" in text for text in texts)
        assert shown.evaluate("document.querySelectorAll('#graph-panes mark').length") >= len(texts)
        assert shown.evaluate("document.getElementById('graph-count').textContent") == f"{len(texts)} nodes"
        shown.press("Escape")
        assert shown.evaluate(count) == everything

    def test_two_graphs_stand_side_by_side(self, shown: Page) -> None:
        choose(shown, "graph-pass", " merge")
        choose(shown, "graph-beside", " lower")
        panes = shown.evaluate("[...document.querySelectorAll('.pane')].map(p => p.innerText)")
        assert len(panes) == 2
        gone, new = (
            shown.evaluate(
                f"[...document.querySelectorAll('.pane')[{i}].querySelectorAll('.line.{kind}')].map(l => l.textContent)"
            )
            for i, kind in enumerate(("gone", "new"))
        )
        assert any("lbllm.unpack_weight" in line for line in gone) and any("lbllm.bit_linear" in line for line in new)
        assert not any("= weight model.norm.weight" in line for line in (*gone, *new)), "it is in both"
        choose(shown, "graph-beside", "nothing")

    def test_dark_and_light(self, shown: Page) -> None:
        back = "getComputedStyle(document.body).backgroundColor"
        light = shown.evaluate(back)
        shown.evaluate("document.activeElement.blur()")
        shown.press("t")
        dark = shown.evaluate(back)
        assert dark != light
        shown.press("t")
        assert shown.evaluate(back) == light
        shown.evaluate("delete document.documentElement.dataset.theme")
        shown.prefer("dark")
        assert shown.evaluate(back) == dark
        shown.prefer("light")
        assert shown.evaluate(back) == light


def choose(shown: Page, select: str, end: str) -> None:
    """Chooses the option whose text ends so."""
    shown.evaluate(
        f"""(() => {{
          const select = document.getElementById("{select}");
          select.value = [...select.options].find(option => option.text.endsWith("{end}")).value;
          select.dispatchEvent(new Event("change"));
        }})()"""
    )


def draw_all(shown: Page) -> None:
    """Brings every plot into view once, as a reader would, and waits until it is drawn."""
    shown.evaluate(
        """(async () => {
          for (const plot of document.querySelectorAll('.plot')) {
            plot.scrollIntoView({behavior: "instant"});
            while (!plot.dataset.drawn) await new Promise(done => setTimeout(done, 20));
          }
          scrollTo({top: 0, behavior: "instant"});
        })()"""
    )


def copy_of(toy: Path, out: Path, **figures: Any) -> Path:
    """The artifact at another place, measured otherwise."""
    shutil.copytree(toy, out)
    document = json.loads((out / "report.json").read_text())
    document["sheet"] |= figures
    (out / "report.json").write_text(json.dumps(document))
    return out


class TestTheTradeoff:
    def test_the_beaten_are_named(self, toy: Path, tmp_path: Path) -> None:
        better = copy_of(toy, tmp_path / "better", bytes_compiled=90_000, kld_mean=0.5)
        other = copy_of(toy, tmp_path / "other", bytes_compiled=50_000, kld_mean=3.0)
        found = tradeoff.compare([toy, better, other])
        assert [c.name for c in found.candidates] == ["toy-lbllm", "better", "other"]
        assert [c.beaten_by for c in found.candidates] == [("better",), (), ()]
        assert not found.warnings
        text = Text(tradeoff.render(found)).text
        assert "no: better is no worse in anything" in text and "mean KL divergence from the original" in text

    def test_equals_do_not_beat_each_other(self, toy: Path, tmp_path: Path) -> None:
        found = tradeoff.compare([toy, copy_of(toy, tmp_path / "same")])
        assert all(c.beaten_by == () for c in found.candidates)

    def test_directories_of_one_name_are_told_apart(self, toy: Path, tmp_path: Path) -> None:
        found = tradeoff.compare([copy_of(toy, tmp_path / "a" / "out"), copy_of(toy, tmp_path / "b" / "out")])
        assert [c.name for c in found.candidates] == ["a/out", "b/out"]

    def test_what_cannot_be_compared_is_said(self, toy: Path, tmp_path: Path) -> None:
        other = copy_of(toy, tmp_path / "other", text="another", bytes_original=7)
        assert len(tradeoff.compare([toy, other]).warnings) == 2
        module = copy_of(toy, tmp_path / "module", kld_mean=None, relative_error=0.5)
        with pytest.raises(tradeoff.TradeoffError, match="not measured alike"):
            tradeoff.compare([toy, module])
        unmeasured = copy_of(toy, tmp_path / "unmeasured", not_measured="quality and speed")
        with pytest.raises(tradeoff.TradeoffError, match="was compiled with --no-sheet"):
            tradeoff.compare([toy, unmeasured])
        (other / "report.json").unlink()
        with pytest.raises(tradeoff.TradeoffError, match=r"has no report\.json of its compile"):
            tradeoff.compare([toy, other])

    @needs_chromium
    def test_it_is_drawn(self, toy: Path, tmp_path: Path) -> None:
        other = copy_of(toy, tmp_path / "other", bytes_compiled=50_000, kld_mean=3.0)
        marked = copy_of(toy, tmp_path / "<b>x</b>", kld_mean=1.5)
        all_three = [marked, copy_of(toy, tmp_path / "y</b>"), other]
        names = [candidate.name for candidate in tradeoff.compare(all_three).candidates]
        assert names[:2] == ["<b>x</b>", "y</b>"]
        file = command.write(all_three, tmp_path / "all.html", NoProgress())
        with Page(dark=True) as browser:
            browser.open(file)
            draw_all(browser)
            points = "[...document.querySelectorAll('#tradeoff-size .textpoint')].map(t => t.textContent)"
            assert browser.evaluate(points) == names
            assert browser.errors == [] and browser.requests == [file.resolve().as_uri()]


class TestTheCommand:
    def test_it_writes_the_page_again(self, toy: Path, tmp_path: Path) -> None:
        out = copy_of(toy, tmp_path / "out", ppl=77.7)
        assert command.write([out], None, NoProgress()) == out / page.PAGE
        assert "77.7" in Text((out / page.PAGE).read_text()).text
        assert (out / page.PAGE).stat().st_mode == (out / "manifest.json").stat().st_mode

    def test_it_replaces_nothing_of_the_users(self, toy: Path, tmp_path: Path) -> None:
        file = tmp_path / "mine.html"
        file.write_text("mine")
        with pytest.raises(command.ReportError, match="not a page as lbllm-compile wrote it"):
            command.write([toy], file, NoProgress())
        assert file.read_text() == "mine"
        with pytest.raises(command.ReportError, match="pass --out FILE"):
            command.write([toy, toy], None, NoProgress())

    def test_an_altered_artifact_has_no_page(self, toy: Path, tmp_path: Path) -> None:
        out = copy_of(toy, tmp_path / "out")
        with (out / "passes" / "003_ptq.json").open("a") as file:
            file.write(" ")
        with pytest.raises(artifact.ArtifactError, match="bytes instead of"):
            command.write([out], None, NoProgress())


def test_the_command_line_asks_for_the_same_again(tmp_path: Path) -> None:
    given = CompileOptions(
        model="my model.py", preset="quick", scheme=("*.down_proj: group=32", "*.up_proj: act=8"), seed=7, fresh=True,
        time_passes=True, out=tmp_path / "out", no_sheet=True,
    )  # fmt: skip
    words = shlex.split(command_line(given))
    assert words[:2] == ["lbllm-compile", "my model.py"] and "--fresh" not in words and "--time-passes" not in words
    assert words[2:] == [
        "--scheme", "*.down_proj: group=32", "--scheme", "*.up_proj: act=8", "--out", str(tmp_path / "out"),
        "--preset", "quick", "--seed", "7", "--no-sheet",
    ]  # fmt: skip
    assert command_line(CompileOptions(model=torch.nn.Linear(2, 2))) == "lbllm-compile '<Linear>'"


def test_neither_plots_nor_templates_are_loaded_to_run_an_artifact() -> None:
    code = "import sys, lbllm_compile.cli, lbllm_compile.native.program, lbllm_compile.manifest\n"
    code += "print(sorted({'plotly', 'narwhals', 'torch'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
