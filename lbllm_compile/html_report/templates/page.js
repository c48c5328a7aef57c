"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  // theme

  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);

  function toggleTheme() {
    root.dataset.theme = isDark() ? "light" : "dark";
    redraw();
  }

  byId("theme").addEventListener("click", toggleTheme);
  systemDark.addEventListener("change", () => redraw());

  // plots: each is drawn when it comes into view, and again when the theme or a choice changes

  const PALETTE = ["#2f6fdb", "#e07b39", "#2c9f6b", "#a05fc4", "#c94f6d", "#5b8c9a", "#b8952f", "#7a6bd8"];
  const HEAT = {
    light: [[0, "#f3f6fb"], [0.25, "#c9d9f2"], [0.5, "#f2c48d"], [0.75, "#dd6f45"], [1, "#8c1c2b"]],
    dark: [[0, "#1f2836"], [0.25, "#33507d"], [0.5, "#b3763f"], [0.75, "#ec8f5c"], [1, "#ffe1c4"]],
  };
  const FOUR = ["#2f6fdb", "#7fb0f0", "#f0b27a", "#d9622b"];
  const CONFIG = {displaylogo: false, displayModeBar: "hover", responsive: true, showSendToCloud: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"]};
  const plots = new Map();

  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const escape = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const heat = () => HEAT[isDark() ? "dark" : "light"];

  function axis(more) {
    return {gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line"), automargin: true,
      title: {standoff: 8}, ...more};
  }

  function layout(more) {
    const {xaxis = {}, yaxis = {}, ...rest} = more;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: PALETTE,
      font: {color: color("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12},
      margin: {l: 60, r: 20, t: 20, b: 45}, xaxis: axis(xaxis), yaxis: axis(yaxis),
      hoverlabel: {bgcolor: color("--card"), bordercolor: color("--line"), font: {color: color("--ink")}},
      legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0}, hovermode: "closest",
      modebar: {bgcolor: "rgba(0,0,0,0)", color: color("--soft"), activecolor: color("--accent")}, ...rest,
    };
  }

  function draw(element) {
    const made = plots.get(element)();
    Plotly.react(element, made.traces, layout(made.layout), CONFIG);
    element.dataset.drawn = "yes";
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !entry.target.dataset.drawn) draw(entry.target);
    }
  }, {rootMargin: "300px"});

  function plot(id, make) {
    const element = byId(id);
    if (!element) return () => undefined;
    plots.set(element, make);
    seen.observe(element);
    return () => element.dataset.drawn && draw(element);
  }

  function redraw() {
    for (const element of plots.keys()) if (element.dataset.drawn) draw(element);
  }

  function heatMap(grid, unit, logarithmic) {
    const values = logarithmic ? grid.values.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))) : grid.values;
    const shown = grid.values.map((row) => row.map((v) => (v === null ? "–" : v.toPrecision(4))));
    const flat = values.flat().filter((v) => v !== null);
    const ends = [Math.min(...flat), Math.max(...flat)];
    const ticks = [0, 1, 2, 3, 4].map((i) => ends[0] + ((ends[1] - ends[0]) * i) / 4);
    return {
      traces: [{
        type: "heatmap", x: grid.layers.map(escape), y: grid.names.map(escape), z: values, text: shown,
        colorscale: heat(), xgap: 1, ygap: 1, hoverongaps: false,
        hovertemplate: `layer %{x}<br>%{y}<br>${unit} %{text}<extra></extra>`,
        colorbar: {thickness: 10, outlinewidth: 0, tickvals: ticks,
          ticktext: ticks.map((t) => (logarithmic ? 10 ** t : t).toPrecision(2))},
      }],
      layout: {xaxis: {title: {text: "decoder layer"}, type: "category", showgrid: false},
        yaxis: {autorange: "reversed", showgrid: false, type: "category"}, margin: {l: 60, r: 20, t: 34, b: 45}},
    };
  }

  function curve(name, points, colour, more) {
    return {type: "scatter", mode: "lines", name, x: points.map((p) => p[0]), y: points.map((p) => p[1]),
      line: {color: colour, width: 2}, marker: {size: 5}, hovertemplate: `${name}, step %{x}: %{y:.4g}<extra></extra>`, ...more};
  }

  const present = (grid) => grid && grid.layers.length > 0;

  if (data.alignment && data.alignment.length) {
    plot("alignment", () => ({
      traces: [
        {type: "bar", name: "before", x: data.alignment.map((a) => escape(a.name)), y: data.alignment.map((a) => a.before),
          marker: {color: PALETTE[1]}},
        {type: "bar", name: "after", x: data.alignment.map((a) => escape(a.name)), y: data.alignment.map((a) => a.after),
          marker: {color: PALETTE[0]}},
      ],
      layout: {barmode: "group", bargap: 0.55, yaxis: {title: {text: escape(data.alignment[0].measure)}, rangemode: "tozero"}},
    }));
  }

  const trained = (data.alignment || []).filter((a) => a.validation.length);
  if (trained.length) {
    plot("alignment-curves", () => ({
      traces: trained.flatMap((a, i) => [
        curve(`${escape(a.name)}: held-out`, a.validation, PALETTE[i], {mode: "lines+markers"}),
        curve(`${escape(a.name)}: training`, a.training, PALETTE[i], {line: {color: PALETTE[i], width: 1.5, dash: "dot"}}),
      ]),
      layout: {xaxis: {title: {text: "step"}, rangemode: "tozero"},
        yaxis: {title: {text: escape(trained[0].measure)}, rangemode: "tozero"}},
    }));
  }

  if (data.bytes && data.bytes.length) {
    const total = data.bytes.reduce((sum, part) => sum + part.bytes, 0);
    plot("bytes", () => ({
      traces: data.bytes.map((part, i) => ({
        type: "bar", orientation: "h", name: part.name, y: [""], x: [part.bytes], marker: {color: PALETTE[i]},
        hovertemplate: `${part.name}: ${size(part.bytes)}, ${((100 * part.bytes) / total).toFixed(1)} %<extra></extra>`,
      })),
      layout: {barmode: "stack", margin: {l: 10, r: 10, t: 40, b: 35}, xaxis: {tickformat: "~s", ticksuffix: "B", showgrid: false}},
    }));
  }

  function size(bytes) {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let unit = 0;
    while (bytes >= 1000 && unit < 4) { bytes /= 1000; unit += 1; }
    return `${unit ? bytes.toFixed(1) : bytes} ${units[unit]}`;
  }

  if (data.seconds && data.seconds.length) {
    plot("seconds", () => ({
      traces: [{type: "bar", orientation: "h", y: data.seconds.map((s) => escape(s.name)), x: data.seconds.map((s) => s.seconds),
        marker: {color: data.seconds.map((s) => (s.name.startsWith("pass ") ? PALETTE[0] : PALETTE[5]))},
        hovertemplate: "%{y}: %{x:.1f} s<extra></extra>"}],
      layout: {yaxis: {autorange: "reversed", type: "category"}, xaxis: {title: {text: "seconds"}}, bargap: 0.35},
    }));
  }

  if (present(data.layerErrors)) plot("layer-errors", () => heatMap(data.layerErrors, "error", true));
  if (present(data.linearErrors)) plot("linear-errors", () => heatMap(data.linearErrors, "error", true));
  if (present(data.density)) plot("density", () => heatMap(data.density, "density", false));

  if (data.codes && data.codes.length) {
    const names = ["lowest level (outer)", "lower inner", "upper inner", "highest level (outer)"];
    plot("codes", () => ({
      traces: names.map((name, code) => ({
        type: "bar", orientation: "h", name, y: data.codes.map((row) => escape(row.name)), x: data.codes.map((row) => row.shares[code]),
        marker: {color: FOUR[code]}, hovertemplate: "%{y}: %{x:.1%}<extra>" + name + "</extra>"})),
      layout: {barmode: "stack", bargap: 0.35, margin: {l: 60, r: 20, t: 40, b: 35}, xaxis: {tickformat: ".0%", range: [0, 1]},
        yaxis: {autorange: "reversed", type: "category"}},
    }));
  }

  function choices(select, values, start) {
    for (const [value, text] of values) select.add(new Option(text, value));
    select.value = start;
  }

  if (data.levels && data.levels.length) {
    const select = byId("levels-layer");
    choices(select, [["all", "all"], ...data.levels.map((l) => [l.layer, l.layer])], "all");
    const again = plot("levels", () => {
      const chosen = data.levels.filter((l) => select.value === "all" || String(l.layer) === select.value);
      const bins = chosen[0].counts[0].length;
      const centers = Array.from({length: bins}, (_, i) => -128 + (i + 0.5) * (256 / bins));
      return {
        traces: ["lowest (outer)", "lower inner", "upper inner", "highest (outer)"].map((name, level) => ({
          type: "bar", name, x: centers, y: centers.map((_, bin) => chosen.reduce((sum, l) => sum + l.counts[level][bin], 0)),
          marker: {color: FOUR[level]}, hovertemplate: "around %{x:.0f}: %{y} groups<extra>" + name + "</extra>"})),
        layout: {barmode: "stack", bargap: 0.05, margin: {l: 60, r: 20, t: 40, b: 45},
          xaxis: {title: {text: "int8 value of the level"}, range: [-130, 130]}, yaxis: {title: {text: "groups"}}},
      };
    });
    select.addEventListener("change", again);
  }

  if (data.training && data.training.length) {
    const stage = byId("training-stage"), layer = byId("training-layer");
    const stages = [...new Set(data.training.map((t) => t.name))];
    choices(stage, stages.map((s) => [s, s]), stages[0]);
    choices(layer, [["all", "all"], ...[...new Set(data.training.map((t) => t.layer))].map((l) => [l, l])], "all");
    const again = plot("training-curves", () => {
      const chosen = data.training.filter((t) => t.name === stage.value && (layer.value === "all" || String(t.layer) === layer.value));
      const one = chosen.length === 1, last = Math.max(1, ...data.training.map((t) => t.layer));
      const shade = (t) => (one ? PALETTE[0] : `hsl(${220 - (200 * t.layer) / last} 65% ${isDark() ? 62 : 45}%)`);
      const traces = chosen.map((t) =>
        curve(one ? "held-out" : `layer ${escape(t.layer)}`, t.validation, shade(t), {mode: "lines+markers"}));
      if (one && chosen[0].training) traces.push(curve("training", chosen[0].training, PALETTE[1]));
      if (one && chosen[0].kept) {
        const kept = chosen[0].validation.filter((p) => p[0] === chosen[0].kept);
        traces.push({type: "scatter", mode: "markers", name: "kept", x: kept.map((p) => p[0]), y: kept.map((p) => p[1]),
          marker: {size: 11, color: PALETTE[2], symbol: "circle-open", line: {width: 3}}, hoverinfo: "skip"});
      }
      return {traces, layout: {showlegend: one || chosen.length < 9, margin: {l: 60, r: 20, t: 40, b: 45},
        xaxis: {title: {text: "step"}, rangemode: "tozero"}, yaxis: {title: {text: "error against the float layer"}, type: "log"}}};
    });
    stage.addEventListener("change", again);
    layer.addEventListener("change", again);
  }

  if (data.ranges && data.ranges.length) {
    const names = data.ranges.map((r) => escape(r.linear));
    plot("ranges", () => ({
      traces: [
        {type: "bar", name: "cut off by the clip", x: names, base: data.ranges.map((r) => r.low), y: data.ranges.map((r) => r.high - r.low),
          marker: {color: isDark() ? "#54402f" : "#f3d9c2"}, customdata: data.ranges.map((r) => [r.low, r.high]),
          hovertemplate: "%{x}<br>%{customdata[0]:.4g} to %{customdata[1]:.4g}<extra>before</extra>"},
        {type: "bar", name: "left behind the clip", x: names, base: data.ranges.map((r) => r.clipped_low),
          y: data.ranges.map((r) => r.clipped_high - r.clipped_low), marker: {color: PALETTE[0]},
          customdata: data.ranges.map((r) => [r.clipped_low, r.clipped_high]),
          hovertemplate: "%{x}<br>%{customdata[0]:.4g} to %{customdata[1]:.4g}<extra>behind the clip</extra>"},
      ],
      layout: {barmode: "overlay", bargap: 0.3, margin: {l: 60, r: 20, t: 40, b: 45}, yaxis: {title: {text: "input"}},
        xaxis: {type: "category", showticklabels: names.length <= 24, title: {text: "linear, layer by layer"}}},
    }));
  }

  if (data.tradeoff && data.tradeoff.length) {
    for (const [id, key, title] of [["tradeoff-size", "bytes", "size of the weights"], ["tradeoff-speed", "speed", "tokens a second"]]) {
      plot(id, () => ({
        traces: data.tradeoff.map((item, i) => ({
          type: "scatter", mode: "markers+text", name: escape(item.name), x: [item[key]], y: [item.error], text: [escape(item.name)],
          textposition: "top center", cliponaxis: false, marker: {size: 13, color: PALETTE[i % PALETTE.length]},
          hovertemplate: `%{text}<br>%{x:.4s}<br>%{y:.4g}<extra></extra>`})),
        layout: {showlegend: false, margin: {l: 60, r: 40, t: 40, b: 50}, xaxis: {title: {text: title}, tickformat: "~s", rangemode: "tozero"},
          yaxis: {title: {text: data.tradeoff[0].measure}, rangemode: "tozero"}},
      }));
    }
  }

  // table of kernels

  const filter = byId("kernel-filter");
  if (filter) {
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase();
      for (const linear of byId("kernel-table").tBodies) linear.hidden = !linear.textContent.toLowerCase().includes(wanted);
    });
  }

  // graphs

  const search = byId("graph-search");
  if (search) {
    const {passes, texts} = data.graphs;
    const left = byId("graph-pass"), beside = byId("graph-beside"), changes = byId("graph-changes"), panes = byId("graph-panes");
    const named = passes.map((p, i) => [i, `${i + 1} ${p.name}`]);
    choices(left, named, passes.length - 1);
    choices(beside, [["", "nothing"], ...named], "");
    const shapeless = (text) => text.replace(/^(%[\w.]+): .*? = /, "$1 = ");
    const nodeOf = (text) => (/^%[\w.]+/.exec(text) || [""])[0];

    function lines(pass) {
      const found = new Map();
      for (const block of pass.blocks) {
        for (const [sign, place] of block.lines) if (sign !== "-") found.set(nodeOf(texts[place]), shapeless(texts[place]));
      }
      return found;
    }

    function ranges(numbers) {
      const runs = [];
      for (const n of numbers) {
        if (runs.length && n === runs[runs.length - 1][1] + 1) runs[runs.length - 1][1] = n;
        else runs.push([n, n]);
      }
      return runs.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
    }

    function title(block) {
      if (!block.layers.length) return "outside the decoder layers";
      const [first, ...rest] = block.layers;
      return `decoder layer ${first}` + (rest.length ? `, and ${ranges(rest)} alike` : "");
    }

    // Signs of a graph beside another: what that one lacks or has otherwise. Layers that are folded differently there
    // cannot be told apart by names, so they stay unmarked.
    function compared(pass, other, sign) {
      const theirs = lines(other), shown = new Set(other.blocks.flatMap((b) => b.layers.slice(0, 1)));
      return (block, [old, place]) => {
        if (old === "-") return null;
        if (block.layers.length && !shown.has(block.layers[0])) return " ";
        return theirs.get(nodeOf(texts[place])) === shapeless(texts[place]) ? " " : sign;
      };
    }

    function marked(line, text, wanted) {
      let from = 0;
      const lower = text.toLowerCase();
      while (wanted) {
        const at = lower.indexOf(wanted, from);
        if (at < 0) break;
        line.append(text.slice(from, at));
        line.append(Object.assign(document.createElement("mark"), {textContent: text.slice(at, at + wanted.length)}));
        from = at + wanted.length;
      }
      line.append(text.slice(from));
    }

    function pane(pass, signOf, wanted) {
      const element = Object.assign(document.createElement("div"), {className: "pane", tabIndex: 0});
      element.append(Object.assign(document.createElement("h3"), {textContent: `after ${pass.name}: ${pass.nodes} nodes`}));
      let count = 0;
      for (const block of pass.blocks) {
        const details = document.createElement("details"), heading = document.createElement("summary");
        const kept = [];
        let touched = 0;
        for (const entry of block.lines) {
          const sign = signOf(block, entry), text = texts[entry[1]];
          if (sign === null) continue;
          if (sign !== " ") touched += 1;
          if ((changes.checked && sign === " ") || (wanted && !text.toLowerCase().includes(wanted))) continue;
          kept.push([sign, text]);
        }
        if (!kept.length && (wanted || changes.checked)) continue;
        count += kept.length;
        heading.textContent = `${title(block)} · ${kept.length} nodes` + (touched ? `, ${touched} changed` : "");
        for (const [sign, text] of kept) {
          const line = document.createElement("div");
          line.className = "line" + (sign === "+" ? " new" : sign === "-" ? " gone" : "");
          line.append(Object.assign(document.createElement("i"), {textContent: sign === "-" ? "− " : `${sign} `}));
          marked(line, text, wanted);
          details.append(line);
        }
        details.prepend(heading);
        details.open = true;
        element.append(details);
      }
      panes.append(element);
      return count;
    }

    function show() {
      const wanted = search.value.trim().toLowerCase();
      panes.replaceChildren();
      const one = passes[left.value];
      let count;
      if (beside.value === "") {
        panes.className = "";
        count = pane(one, (_, entry) => entry[0], wanted);
      } else {
        const two = passes[beside.value];
        panes.className = "two";
        count = pane(one, compared(one, two, "-"), wanted) + pane(two, compared(two, one, "+"), wanted);
      }
      byId("graph-count").textContent = wanted || changes.checked ? `${count} nodes` : "";
    }

    for (const control of [left, beside, changes]) control.addEventListener("change", show);
    search.addEventListener("input", show);
    show();
  }

  // keys and navigation

  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "Escape" && event.target === search) {
      search.value = "";
      search.dispatchEvent(new Event("input"));
      search.blur();
    } else if (typing || event.ctrlKey || event.metaKey || event.altKey) {
      return;
    } else if (event.key === "/" && search) {
      event.preventDefault();
      search.scrollIntoView({block: "center"});
      search.focus({preventScroll: true});
    } else if (event.key === "t") {
      toggleTheme();
    }
  });

  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const parts = [...links.keys()].map(byId).filter(Boolean);
  function follow() {
    const here = parts.filter((part) => part.getBoundingClientRect().top < innerHeight / 3).pop() || parts[0];
    for (const [id, link] of links) {
      const current = here && id === here.id;
      link.classList.toggle("here", current);
      if (current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }
  addEventListener("scroll", follow, {passive: true});
  follow();
  root.dataset.ready = "yes";
})();
