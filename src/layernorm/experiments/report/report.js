// What plotly.js does not do by itself: it draws a plot only when that comes near the view (a hundred at once would
// hold up the page for seconds), it has no legend that the keyboard reaches and that is of several plots, and
// it takes all drags of a finger, which are to scroll the page until another tool is chosen.
"use strict";
(() => {
  function shown(plot, traces) {
    const off = [...plot.closest("figure").querySelectorAll("[aria-pressed=false]")].map((button) => button.value);
    return traces.map(({ meta }) => !off.includes(meta));
  }

  function draw(plot) {
    const figure = JSON.parse(plot.previousElementSibling.textContent);
    if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;
    shown(plot, figure.data).forEach((visible, i) => (figure.data[i].visible = visible));
    Plotly.newPlot(plot, figure);
  }

  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "800px" },
  );

  document.documentElement.classList.add("interactive");
  document.querySelectorAll(".plot").forEach((plot) => observer.observe(plot));
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
      for (const plot of button.closest("figure").querySelectorAll(".js-plotly-plot")) {
        Plotly.restyle(plot, { visible: shown(plot, plot.data) });
      }
    });
  }
})();
