// Draws each chart from its data: one legend, and a plot for each panel, drawn when it comes near the view.
"use strict";
(() => {
  const WIDTH = 2; // of lines, in pixels
  const coarse = matchMedia("(pointer: coarse)").matches;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // plotly.js reads a little HTML in its texts.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  // What is black on white paper is the ink's colour on dark paper too.
  const colour = (look) => (look.colour === "#000000" ? css("--ink") : look.colour);
  const transparent = (hex) => hex + "26";

  function traces(panel, looks, hidden) {
    return panel.lines.flatMap((line) => {
      const look = looks.get(line.name);
      const common = { x: line.x, type: "scatter", meta: line.name, visible: !hidden.has(line.name) };
      const band = { ...common, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
      const bands = line.low.length
        ? [{ ...band, y: line.low },
           { ...band, y: line.high, fill: "tonexty", fillcolor: transparent(colour(look)) }]
        : [];
      const drawn = {
        ...common,
        y: line.y,
        name: plain(line.name),
        mode: line.points ? "lines+markers" : "lines",
        line: { color: colour(look), width: WIDTH,
                dash: look.dashes.map((length) => length * WIDTH + "px").join(",") || "solid" },
        marker: { size: 6, color: colour(look) },
        hovertemplate: panel.together ? "%{y:.5~g}" : "%{y:.5~g} at %{x:.6~g}",
      };
      return [...bands, drawn];
    });
  }

  // The least and the greatest of the values that an axis shows of these lines, as plotly.js has it: in powers of
  // ten on a logarithmic axis. null if there are none.
  function extent(lines, hidden, names, log) {
    let least = Infinity, greatest = -Infinity;
    for (const line of lines) {
      if (hidden.has(line.name)) continue;
      for (const value of names.flatMap((name) => line[name])) {
        if (value === null || (log && value <= 0)) continue;
        least = Math.min(least, value);
        greatest = Math.max(greatest, value);
      }
    }
    if (least > greatest) return null;
    return log ? [Math.log10(least), Math.log10(greatest)] : [least, greatest];
  }

  function widened([least, greatest]) {
    const margin = 0.05 * (greatest - least) || 0.5;
    return [least - margin, greatest + margin];
  }

  // What the axes of a panel have to span so that all its lines shown are seen, or all of a row that shares its y.
  function spans(row, panel, hidden) {
    const lines = row.shared ? row.panels.flatMap((one) => one.lines) : panel.lines;
    return {
      x: extent(panel.lines, hidden, ["x"], panel.x.log),
      y: extent(lines, hidden, ["y", "low", "high"], panel.y.log),
    };
  }

  function layout(panel, span, revision) {
    const axis = ({ label, log }, extent) => ({
      title: { text: plain(label), standoff: 8 },
      type: log ? "log" : "linear",
      // Always given: plotly.js forgets the one it found itself when it draws the same again.
      ...(extent ? { range: widened(extent) } : {}),
      // So a logarithmic axis of few decades has numbers at 1, 2 and 5, and not at 6, 7, 8, 9, which overlap.
      nticks: !log ? 0 : extent && extent[1] - extent[0] < 2.2 ? 3 : 5,
      tickformat: ".6~g",
      gridcolor: css("--line"),
      linecolor: css("--soft"),
      showline: true,
      zeroline: false,
      automargin: true,
    });
    return {
      xaxis: {
        ...axis(panel.x, span.x),
        hoverformat: ".6~g",
        unifiedhovertitle: { text: plain(panel.x.label) + " %{x}" },
      },
      yaxis: axis(panel.y, span.y),
      margin: { l: 56, r: 12, t: 28, b: 44 },
      font: { family: "system-ui, sans-serif", size: 12, color: css("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink") } },
      hovermode: panel.together ? "x unified" : "closest",
      // A finger that drags scrolls the page, until it asks for another tool.
      dragmode: coarse ? false : "zoom",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--link") },
      showlegend: false,
      // As long as it is the same, what the reader has zoomed into and the tool at hand stay.
      uirevision: revision,
    };
  }

  function plot(place, row, panel, looks, hidden) {
    let span, zoomed = false, revision = 1;
    const everything = { name: "everything", title: "Everything", icon: Plotly.Icons.home, click: reset };
    const config = {
      responsive: true,
      displaylogo: false,
      displayModeBar: true,
      // Not plotly.js's own reset, which knows nothing of hidden lines; its time is 500 ms, as desktops have it.
      doubleClick: false,
      doubleClickDelay: 500,
      showTips: false,
      modeBarButtons: [["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", everything]],
    };
    function draw() {
      // A new range would end a zoom.
      if (!zoomed) span = spans(row, panel, hidden);
      Plotly.react(place, traces(panel, looks, hidden), layout(panel, span, revision), config);
    }
    function reset() {
      zoomed = false;
      revision += 1;
      draw();
    }
    draw();
    place.on("plotly_doubleclick", reset);
    place.on("plotly_relayout", (change) => {
      zoomed ||= Object.keys(change).some((name) => name.includes(".range"));
    });
    return draw;
  }

  function swatch(look) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("aria-hidden", "true");
    line.setAttribute("d", "M0 4H32");
    line.setAttribute("stroke", look.colour === "#000000" ? "currentColor" : look.colour);
    line.setAttribute("stroke-width", WIDTH);
    line.setAttribute("stroke-dasharray", look.dashes.map((length) => length * WIDTH).join(" "));
    svg.append(line);
    return svg;
  }

  function element(kind, name, parent, text = "") {
    const made = document.createElement(kind);
    made.className = name;
    made.textContent = text;
    parent.append(made);
    return made;
  }

  const drawn = []; // functions that draw a plot again
  const waiting = new Map(); // places of plots still to be drawn, and how
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        drawn.push(waiting.get(target)());
      }
    },
    { rootMargin: "800px" },
  );

  function chart(figure) {
    const { columns, looks: list, rows } = JSON.parse(figure.querySelector("script").textContent);
    const looks = new Map(list.map((look) => [look.name, look]));
    const hidden = new Set();
    const redraws = [];
    const legend = element("div", "legend", figure);
    for (const [name, look] of looks) {
      const button = element("button", "", legend);
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.append(swatch(look), name);
      button.addEventListener("click", () => {
        if (!hidden.delete(name)) hidden.add(name);
        button.setAttribute("aria-pressed", String(!hidden.has(name)));
        redraws.forEach((redraw) => redraw());
      });
    }
    for (const row of rows) {
      const panels = element("div", "panels", figure);
      panels.style.setProperty("--columns", columns);
      for (const panel of row.panels) {
        const box = element("div", "panel", panels);
        element("p", "", box, panel.title);
        const place = element("div", "plot", box);
        place.setAttribute("role", "group");
        place.setAttribute("aria-label", `${panel.title}: ${panel.y.label} by ${panel.x.label}`);
        waiting.set(place, () => {
          const redraw = plot(place, row, panel, looks, hidden);
          redraws.push(redraw);
          return redraw;
        });
        observer.observe(place);
      }
    }
  }

  document.querySelectorAll("figure.chart").forEach(chart);
  document.documentElement.classList.add("interactive");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((draw) => draw()));
})();
