"use strict";
/**
 * How the charts look. The data of the report say what there is to draw: traces, each with a look and
 * a kind (of trials, or a colour of the style sheet), and axes. `figure` makes plotly's figures of them.
 */
const charts = (() => {
  // A shape or a pattern for each kind of trial: never the colour alone.
  const SYMBOLS = {
    completed: "circle", paused: "hourglass", stopped: "triangle-down", failed: "x",
    running: "diamond-open", confirming: "diamond", default: "square", best: "star",
  };
  const PATTERNS = { paused: "-", stopped: "/", failed: "x", confirming: ".", default: "/" };

  const color = (kind) => `var(--${kind})`;
  const marker = (kind, size) => ({
    color: color(kind), symbol: SYMBOLS[kind], size, line: { color: "var(--card)", width: 1 },
  });
  const points = (size, more) => (kind) => ({ mode: "markers", marker: marker(kind, size), ...more });
  const line = (width, shape, more) => (kind) => ({
    mode: "lines", line: { color: color(kind), width, ...shape }, ...more,
  });
  const curve = (width, size, shape, more) => (kind) => ({
    ...line(width, shape)(kind), mode: "lines+markers", marker: marker(kind, size), ...more,
  });
  const end = (symbol, size) => (kind) => ({
    mode: "markers", marker: { symbol, size, color: color(kind), line: { color: color(kind), width: 2.5 } },
  });
  const bars = (rim, more) => (kind) => ({
    type: "bar", orientation: "h",
    marker: {
      color: color(kind), line: { color: "var(--card)", width: rim },
      pattern: { shape: PATTERNS[kind] || "", fgcolor: "var(--card)", fillmode: "overlay", fgopacity: 0.25, size: 6 },
    },
    ...more,
  });

  const LOOKS = {
    points: points(9), point: points(13), small: points(8), front: points(11), chosen: points(15),
    faint: points(9, { opacity: 0.85 }),
    steps: line(3, { shape: "hv" }), edge: line(2, { shape: "hv" }), level: line(1.5, { dash: "dash" }),
    below: line(0, { shape: "hv" }, { fill: "none", showlegend: false }),
    above: (kind) => ({ ...line(0, { shape: "hv" }, { fill: "tonexty" })(kind), fillcolor: color(kind) }),
    curves: curve(1.25, 6, {}, { opacity: 0.75 }), curve: curve(3, 11), open: curve(2, 9, { dash: "dot" }),
    stopped: end("line-ew-open", 13), failed: end("x", 10),
    bars: bars(0, { error_x: { type: "data", symmetric: false, color: "var(--ink)", thickness: 1.4, width: 4 } }),
    gaps: bars(0, { hovertemplate: "waiting and first step: %{x:.2g}<extra></extra>" }),
    shares: bars(0, { textposition: "outside", cliponaxis: false, width: 0.6 }),
    legs: bars(1, {
      textposition: "inside", insidetextanchor: "middle", textangle: 0, textfont: { color: "var(--on-color)" },
    }),
  };

  const ROWS = { automargin: true, autorange: "reversed", showgrid: false, ticksuffix: "  " };
  const LAYOUTS = {
    hypervolume: { showlegend: false },
    slice: { showlegend: false, margin: { t: 12 } },
    importance: { yaxis: ROWS, showlegend: false, margin: { t: 8, r: 48 } },
    capabilities: { yaxis: ROWS, barmode: "group", bargap: 0.28, bargroupgap: 0.08 },
    workers: { yaxis: ROWS, barmode: "overlay", bargap: 0.3, uniformtext: { mode: "hide", minsize: 10 } },
  };

  function merged(below, above) {
    const result = { ...below };
    for (const [key, value] of Object.entries(above)) {
      const isPlain = value && typeof value === "object" && !Array.isArray(value);
      result[key] = isPlain && result[key] ? merged(result[key], value) : value;
    }
    return result;
  }

  // ------------------------------------------------------------------------------------- axes

  /** Return the powers of ten in the range; with few of them also their double and fivefold. */
  function logTicks(low, high) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const factor of high / low >= 100 ? [1] : [1, 2, 5]) ticks.push(Number(`${factor}e${power}`));
    }
    const within = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    return within.length > 1 ? within : [low, high];
  }

  /** Return `1e-4`, `0.01`, `3,000`. */
  function tickText(value) {
    if (value && Math.abs(value) < 0.01) return value.toExponential(1).replace(".0e", "e");
    if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(6)));
  }

  /** Return the positions on a scale at which to write what: of choices all, else the round ones. */
  function ticks({ kind, low, high, choices }) {
    if (kind === "choice") return choices.map((choice, k) => [k, choice]);
    if (kind === "log") return logTicks(low, high).map((tick) => [tick, tickText(tick)]);
    const values = [0, 1, 2, 3, 4].map((k) => low + (k * (high - low)) / 4);
    return values.map((value) => [value, tickText(Number(value.toPrecision(3)))]);
  }

  /** Return a position as a share of its scale, from 0 to 1. */
  function share({ kind, low, high }, position) {
    const [a, b, x] = kind === "log" ? [low, high, position].map(Math.log10) : [low, high, position];
    return b !== a ? (x - a) / (b - a) : 0.5;
  }

  /** Return plotly's axis of one that may have a scale. */
  function axisOf({ scale, ...axis }) {
    if (!scale) return axis;
    const at = { tickvals: ticks(scale).map(([x]) => x), ticktext: ticks(scale).map(([, text]) => text) };
    if (scale.kind === "choice") return { ...axis, ...at, range: [-0.5, scale.high + 0.5], showgrid: false };
    const [low, high] = [scale.low, scale.high].map(scale.kind === "log" ? Math.log10 : Number);
    const pad = 0.04 * (high - low || 1);
    const range = [low - pad, high + pad];
    return scale.kind === "log" ? { ...axis, ...at, type: "log", range } : { ...axis, range, nticks: 6 };
  }

  /** Return a dotted line for each rung, with its number above. */
  function rungs(milestones, isLog) {
    const dotted = { color: "var(--milestone)", width: 1.5, dash: "dot" };
    return {
      shapes: milestones.map((x) => ({
        type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", layer: "below", line: dotted,
      })),
      annotations: milestones.map((x, k) => ({
        x: isLog ? Math.log10(x) : x, y: 1, yref: "paper", yanchor: "bottom", text: `rung ${k + 1}`,
        showarrow: false, font: { size: 11, color: "var(--muted)" },
      })),
    };
  }

  // --------------------------------------------------------------------- parallel coordinates

  const NUM_SHADES = 8;  // from the worst to the best, `--shade-0` to `--shade-7`
  const NOT_USED = -0.1;  // height of a key that has no value in a trial, by its condition
  const MANY = 150;  // with more trials lines and dots are drawn thin

  /** Return the lines of the trials over an axis for each key; those that are about as good are one trace. */
  function parallelTraces({ scales, rows, special }) {
    const lines = rows.map(({ trial, isFull, positions }) => {
      const heights = positions.map((at, k) => (at === null ? NOT_USED : share(scales[k], at)));
      const shade = Math.min(NUM_SHADES - 1, Math.floor(NUM_SHADES * heights[heights.length - 1]));
      return { trial, heights, group: 2 * shade + isFull };
    });
    const axes = scales.map((_, k) => k);
    const path = (chosen, gap) => ({
      x: chosen.flatMap(() => [...axes, ...gap]), y: chosen.flatMap(({ heights }) => [...heights, ...gap]),
    });
    const thin = rows.length > MANY ? 0.5 : 1;
    const groups = [...new Set(lines.map(({ group }) => group))].sort((a, b) => a - b);
    return [
      ...groups.map((group) => ({
        ...(group % 2 ? line(1.8 * thin, {}, { opacity: 0.9 }) : line(1.2 * thin, { dash: "dot" }, { opacity: 0.75 }))(
          `shade-${Math.floor(group / 2)}`),
        ...path(lines.filter((own) => own.group === group), [null]), showlegend: false,
      })),
      ...special.map(({ trial, kind, name }) => ({
        ...curve(3, 11, { dash: kind === "default" ? "dash" : "solid" })(kind),
        ...path(lines.filter((own) => own.trial === trial), []), name,
      })),
      {
        ...path(lines, []), customdata: lines.flatMap(({ trial }) => axes.map(() => trial)), mode: "markers",
        marker: { size: 6 * thin, color: "var(--ink)", opacity: 0.28 }, name: "trials", showlegend: false,
      },
      // The trial under the pointer.
      { ...line(3.5)("accent"), x: [null], y: [null], name: "pointed at", showlegend: false },
    ];
  }

  /** Return vertical axes, with the ticks of each scale as annotations. */
  function parallelLayout({ scales }) {
    const isConditional = scales.some((scale) => scale.isConditional);
    const texts = scales.flatMap((scale, x) => [
      ...(scale.texts ? scale.texts.map((text, k) => [x, k / 4, text]) : []),
      ...(scale.texts ? [] : ticks(scale).map(([at, text]) => [x, share(scale, at), text])),
      ...(scale.isConditional ? [[x, NOT_USED, "not used"]] : []),
    ]);
    return {
      xaxis: {
        range: [-0.45, scales.length - 0.65], side: "top", showgrid: false, zeroline: false, tickangle: 0,
        tickvals: scales.map((_, x) => x), ticktext: scales.map(({ name }) => `<b>${name}</b>`), fixedrange: true,
      },
      yaxis: { range: [(isConditional ? NOT_USED : 0) - 0.05, 1.06], visible: false, fixedrange: true },
      legend: { y: -0.02, yanchor: "top" },
      shapes: scales.map((_, x) => ({
        type: "line", x0: x, x1: x, y0: 0, y1: 1, layer: "below", line: { color: "var(--axis)", width: 1.5 },
      })),
      annotations: texts.map(([x, y, text]) => ({
        x, y, text, showarrow: false, xanchor: "right", xshift: -9, bgcolor: "var(--card-veil)", borderpad: 1,
        font: { size: 11, color: "var(--muted)" },
      })),
    };
  }

  // ---------------------------------------------------------------------------------- figures

  /** Return a trace with its look, and of each trial the text where the pointer is. */
  function dressed({ look, kind, ...trace }, hover) {
    const whole = look ? merged(LOOKS[look](kind), trace) : trace;
    if (whole.hoverinfo === "skip") return whole;
    if (whole.customdata) {
      whole.hovertext = whole.customdata.map((trial) => hover[trial] || "");
      whole.hovertemplate = whole.hovertemplate || "%{hovertext}<extra></extra>";
    }
    return whole.hovertemplate ? whole : { ...whole, hoverinfo: "skip" };
  }

  /**
   * Return the traces and the layout of a variant of a chart.
   * @param hover texts by trial
   */
  function figure(name, variant, hover) {
    if (variant.rows) {
      return { data: parallelTraces(variant).map((trace) => dressed(trace, hover)), layout: parallelLayout(variant) };
    }
    const layout = { xaxis: axisOf(variant.xaxis || {}), yaxis: axisOf(variant.yaxis || {}) };
    if (variant.milestones) Object.assign(layout, rungs(variant.milestones, layout.xaxis.type === "log"));
    return {
      data: variant.traces.map((trace) => dressed(trace, hover)),
      layout: merged(LAYOUTS[name.replace(/-\d+$/, "")] || {}, layout),
    };
  }

  return { figure, merged };
})();
