(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const kept = Object.assign(
    { theme: null, sorts: {}, hidden: [], find: "", views: {}, open: [], scroll: null, paused: false },
    history.state,
  );
  // The history entry outlives a reload, also of a file, and needs no storage to be allowed.
  const keep = () => history.replaceState(kept, "");
  const isTouch = matchMedia("(pointer: coarse)").matches;
  const variants = new Map(report.charts.map((chart) => [chart.name, chart.variants]));
  const drawn = new Set();
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // ------------------------------------------------------------------------------------ charts

  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  /** Copy a figure, with colours in place of the style sheet's variables. */
  function resolved(value) {
    if (typeof value === "string") {
      const found = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return found ? variable(found[1]) : value;
    }
    if (Array.isArray(value)) return value.map(resolved);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, resolved(part)]));
    }
    return value;
  }

  function baseLayout(width) {
    const axis = {
      gridcolor: "var(--grid)", linecolor: "var(--line)", zeroline: false, automargin: true,
      tickfont: { color: "var(--muted)" }, title: { standoff: 10, font: { size: 13 } },
      fixedrange: isTouch,
    };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "var(--ink)" },
      margin: { l: width < 480 ? 44 : 56, r: 14, t: 14, b: 44, pad: 2 },
      xaxis: axis, yaxis: axis, hovermode: "closest", dragmode: isTouch ? false : "zoom",
      legend: { traceorder: "normal", orientation: "h", x: 0, xanchor: "left", y: 1.06, yanchor: "bottom", font: { size: 12 } },
      hoverlabel: {
        bgcolor: "var(--card)", bordercolor: "var(--axis)", align: "left",
        font: { color: "var(--ink)", size: 12.5 },
      },
    };
  }

  const view = (name) => {
    const own = variants.get(name);
    return own[Math.min(kept.views[name] || 0, own.length - 1)];
  };

  /** Run plotly's 5 MB only now: numbers and tables are there before it. */
  function loadPlotly() {
    if (window.Plotly) return;
    const element = document.createElement("script");
    element.textContent = document.getElementById("plotly").textContent;
    document.head.append(element);
  }

  function draw(element, size = {}) {
    loadPlotly();
    const figure = charts.figure(element.id, view(element.id), report.hover);
    const layout = resolved(charts.merged(baseLayout(element.clientWidth), figure.layout));
    const config = {
      responsive: true, displaylogo: false, displayModeBar: isTouch ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
      toImageButtonOptions: { filename: element.id, scale: 2 },
    };
    Plotly.react(element, resolved(figure.data), { ...layout, ...size }, config);
    if (!drawn.has(element)) {
      drawn.add(element);
      element.on("plotly_click", (event) => showRow(event.points[0].customdata));
      element.on("plotly_relayout", (change) => noteZoom(element.id, change));
      if (element.id === "parallel") followPointer(element);
    }
  }

  const drawAll = () => all(".plot").filter((plot) => !drawn.has(plot)).forEach((plot) => draw(plot));
  const redraw = () => drawn.forEach((plot) => draw(plot));

  /** Draw what comes into view, and the rest when there is nothing else to do. */
  function drawWhenSeen() {
    const observer = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        if (!drawn.has(target)) draw(target);
      }
    }, { rootMargin: "250px" });
    all(".plot").forEach((plot) => observer.observe(plot));
    const whenIdle = window.requestIdleCallback || ((call) => setTimeout(call, 60));
    const next = () => {
      const waiting = all(".plot").find((plot) => !drawn.has(plot));
      if (!waiting) return void (document.body.dataset.drawn = "all");
      draw(waiting);
      whenIdle(next);
    };
    setTimeout(() => whenIdle(next), 400);
  }

  /** Draw the line of the trial under the pointer over the others. */
  function followPointer(plot) {
    plot.on("plotly_hover", (event) => {
      const { customdata: trial, data } = event.points[0];
      if (!trial) return;
      const own = data.customdata.flatMap((other, place) => (other === trial ? [place] : []));
      const places = { x: [own.map((k) => data.x[k])], y: [own.map((k) => data.y[k])] };
      Plotly.restyle(plot, places, [plot.data.length - 1]);
    });
  }

  function setUpSwitches() {
    for (const group of all(".switch")) {
      const buttons = all("button", group);
      const name = group.dataset.for;
      const show = () => {
        const chosen = variants.get(name).indexOf(view(name));
        buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === chosen)));
      };
      buttons.forEach((button, k) => button.addEventListener("click", () => {
        kept.views[name] = k;
        keep();
        show();
        draw(document.getElementById(name));
      }));
      show();
    }
  }

  // ------------------------------------------------------------------------------------- theme

  function setUpTheme() {
    document.getElementById("theme").addEventListener("click", () => {
      kept.theme = root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
      keep();
      redraw();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
      if (kept.theme) return;
      root.dataset.theme = event.matches ? "dark" : "light";
      redraw();
    });
  }

  // ------------------------------------------------------------------------------------ tables

  function sortTable(table, column, isDescending) {
    const head = table.tHead.rows[0].cells[column];
    const isNumeric = head.classList.contains("number");
    const key = (row) => {
      const cell = row.cells[column];
      return cell.dataset.key === undefined ? cell.textContent : cell.dataset.key;
    };
    const keyed = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    const sign = isDescending ? -1 : 1;
    keyed.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");  // nothing comes last, either way
      return sign * (isNumeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    });
    table.tBodies[0].append(...keyed.map(([, row]) => row));
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
  }

  function setUpTables() {
    for (const table of all("table.sortable")) {
      [...table.tHead.rows[0].cells].forEach((head, column) => {
        head.firstElementChild.addEventListener("click", () => {
          const isDescending = head.getAttribute("aria-sort") === "ascending";
          sortTable(table, column, isDescending);
          kept.sorts[table.id] = [column, isDescending];
          keep();
        });
      });
      const [column, isDescending] = kept.sorts[table.id] || [];
      if (column < table.tHead.rows[0].cells.length) sortTable(table, column, isDescending);
    }
  }

  function setUpFilters() {
    const table = document.getElementById("trials-table");
    if (!table) return;
    const box = document.getElementById("search-box");
    const show = () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = kept.hidden.includes(row.dataset.state) || !words.every((w) => text.includes(w));
        shown += !row.hidden;
      }
      const total = table.tBodies[0].rows.length;
      document.getElementById("shown").textContent = shown === total ? "" : `${shown} of ${total}`;
      for (const chip of all(".chip")) {
        chip.setAttribute("aria-pressed", String(!kept.hidden.includes(chip.dataset.filter)));
      }
    };
    box.value = kept.find;
    box.addEventListener("input", () => { kept.find = box.value; keep(); show(); });
    for (const chip of all(".chip")) {
      chip.addEventListener("click", () => {
        const state = chip.dataset.filter;
        const isHidden = kept.hidden.includes(state);
        kept.hidden = isHidden ? kept.hidden.filter((s) => s !== state) : [...kept.hidden, state];
        keep();
        show();
      });
    }
    show();
  }

  function showRow(trial) {
    const row = trial && document.getElementById(`row-${trial}`);
    if (!row) return;
    row.hidden = false;
    all("tr.found").forEach((other) => other.classList.remove("found"));
    row.classList.add("found");
    row.scrollIntoView({ block: "center", behavior: "smooth" });
  }

  // ------------------------------------------------------------------------- while it is running

  const zoomed = new Set();
  let touchedAt = 0;

  function noteZoom(name, change) {
    const keys = Object.keys(change);
    if (keys.some((key) => key.includes("range["))) zoomed.add(name);
    if (keys.some((key) => key.includes("autorange"))) zoomed.delete(name);
  }

  function ago(seconds) {
    if (seconds < 90) return `${Math.round(seconds)} s ago`;
    if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
    if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
    return `${Math.round(seconds / 86400)} days ago`;
  }

  function setUpReload() {
    const pause = document.getElementById("pause");
    const age = () => Math.max(0, Date.now() / 1000 - report.writtenAt);
    const say = (id, text) => { document.getElementById(id).textContent = text; };
    if (report.isOver) return void say("age", `, ${ago(age())}`);
    const opened = performance.now();
    const showPause = () => {
      pause.hidden = false;
      pause.setAttribute("aria-pressed", String(kept.paused));
      pause.textContent = kept.paused ? "Resume updates" : "Pause updates";
    };
    pause.addEventListener("click", () => { kept.paused = !kept.paused; keep(); showPause(); tick(); });
    for (const kind of ["pointerdown", "wheel", "keydown", "touchmove"]) {
      addEventListener(kind, () => { touchedAt = performance.now(); }, { passive: true });
    }
    const tick = () => {
      const isSilent = age() > report.silentSeconds;
      document.getElementById("status").dataset.state = isSilent ? "silent" : "running";
      say("status-word", isSilent ? "No sign of life" : "Running");
      say("age", `, ${ago(age())}${isSilent ? ": the search may have been killed" : ""}`);
      const every = isSilent ? 4 * report.reloadSeconds : report.reloadSeconds;
      const left = every - (performance.now() - opened) / 1000;
      const isBusy = performance.now() - touchedAt < 4000 || !getSelection().isCollapsed;
      if (kept.paused) return void say("next", "updates paused");
      if (zoomed.size) return void say("next", "updates wait while a chart is zoomed");
      say("next", left > 0 ? `next look in ${Math.ceil(left)} s` : "");
      if (left <= 0 && !isBusy && !document.hidden) {
        kept.scroll = [scrollX, scrollY];
        kept.open = all("details[open]").map((details) => details.id);
        keep();
        location.reload();
      }
    };
    showPause();
    tick();
    setInterval(tick, 1000);
    document.addEventListener("visibilitychange", tick);
  }

  /** Bring back what was open and in view before the page reloaded itself. */
  function restore() {
    kept.open.forEach((id) => document.getElementById(id)?.setAttribute("open", ""));
    if (!kept.scroll) return;
    const [left, top] = kept.scroll;
    kept.scroll = null;
    keep();
    scrollTo({ left, top, behavior: "instant" });
  }

  // ------------------------------------------------------------------------------ print and copy

  const PRINT_WIDTH = 690;  // of an A4 page without its margins, in pixels

  function setUpPrint() {
    let before = null;
    addEventListener("beforeprint", () => {
      before = before || root.dataset.theme;
      root.dataset.theme = "light";
      for (const plot of all(".plot")) {
        const isSlice = plot.closest(".slices");
        const width = (isSlice ? PRINT_WIDTH / 2 - 24 : PRINT_WIDTH) - 30;
        draw(plot, { width, autosize: false });
      }
      all("details").forEach((details) => details.setAttribute("open", ""));
    });
    addEventListener("afterprint", () => {
      root.dataset.theme = before;
      before = null;
      redraw();
    });
  }

  function setUpCopy() {
    for (const button of all("[data-copy]")) {
      button.addEventListener("click", () => {
        const range = document.createRange();
        range.selectNodeContents(document.getElementById(button.dataset.copy));
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
        setTimeout(() => { button.textContent = "Copy"; getSelection().removeAllRanges(); }, 1500);
      });
    }
  }

  setUpTheme();
  setUpSwitches();
  setUpTables();
  setUpFilters();
  setUpCopy();
  setUpPrint();
  restore();
  setUpReload();
  requestAnimationFrame(() => setTimeout(drawWhenSeen));
})();
