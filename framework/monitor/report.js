// A cross-hair over each curve: the nearest point's step and value.
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = svg.dataset.points.split(" ").map((p) => p.split(",").map(Number));
  const figure = svg.parentElement, tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip";
  const name = (n) => document.createElementNS("http://www.w3.org/2000/svg", n);
  const cross = svg.appendChild(name("g")), line = cross.appendChild(name("line")), dot = cross.appendChild(name("circle"));
  cross.setAttribute("class", "cross"); dot.setAttribute("r", 4); cross.style.display = "none";
  const hide = () => { cross.style.display = tip.style.display = "none"; };
  svg.addEventListener("mouseleave", hide);
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const near = points.reduce((a, b) => (Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a));
    for (const k of ["x1", "x2"]) line.setAttribute(k, near[2]);
    line.setAttribute("y1", 30); line.setAttribute("y2", svg.viewBox.baseVal.height - 34);
    dot.setAttribute("cx", near[2]); dot.setAttribute("cy", near[3]);
    tip.textContent = `step ${near[0]}: ${near[1]}`;
    tip.style.left = `${near[2] / scale + svg.offsetLeft + 14}px`;
    tip.style.top = `${near[3] / scale + box.top - figure.getBoundingClientRect().top}px`;
    cross.style.display = ""; tip.style.display = "block";
  });
}
