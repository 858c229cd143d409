"use strict";
// Shows the values under the pointer, and opens what is folded before printing. The page is complete without it.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const curves = JSON.parse(svg.dataset.chart);
  const steps = curves.flatMap((c) => c.points);
  if (!steps.length) continue;
  const figure = svg.closest("figure");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const hair = document.createElementNS(svg.namespaceURI, "line");
  hair.setAttribute("class", "hair");
  hair.setAttribute("y1", "20");
  hair.setAttribute("y2", String(svg.viewBox.baseVal.height - 24));
  hair.style.display = "none";
  svg.append(hair);

  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  const hide = () => {
    tip.hidden = true;
    hair.style.display = "none";
  };
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const at = nearest(steps, (event.clientX - box.left) / scale);
    const lines = [`step ${at[2]}`];
    for (const curve of curves) {
      if (!curve.points.length) continue;
      const point = nearest(curve.points, at[0]);
      if (Math.abs(point[0] - at[0]) < 4) lines.push(`${curve.name} ${point[3]}`);
    }
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    hair.style.display = "";
    hair.setAttribute("x1", String(at[0]));
    hair.setAttribute("x2", String(at[0]));
    const frame = figure.getBoundingClientRect();
    const x = at[0] * scale + box.left - frame.left;
    const left = x + 10 + tip.offsetWidth < frame.width ? x + 10 : x - 10 - tip.offsetWidth;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${box.top - frame.top + 26 * scale}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
