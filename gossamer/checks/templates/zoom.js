const dialog = document.querySelector("dialog"), stage = dialog.querySelector(".stage");
let view, home, svg, pointers = new Map(), spread = 0;
const show = () => svg.setAttribute("viewBox", view.join(" "));
const zoom = (factor, x, y) => { const r = svg.getBoundingClientRect(), s = Math.max(view[2] / r.width, view[3] / r.height);
  const px = view[0] + view[2] / 2 + (x - r.left - r.width / 2) * s, py = view[1] + view[3] / 2 + (y - r.top - r.height / 2) * s;
  view = [px + (view[0] - px) * factor, py + (view[1] - py) * factor, view[2] * factor, view[3] * factor]; show(); };
document.querySelectorAll("figure button").forEach(b => b.addEventListener("click", () => {
  stage.replaceChildren(b.querySelector("svg").cloneNode(true)); svg = stage.firstChild; svg.setAttribute("preserveAspectRatio", "xMidYMid meet");
  home = svg.getAttribute("viewBox").split(" ").map(Number); view = [...home]; dialog.showModal(); }));
dialog.querySelector(".close").addEventListener("click", () => dialog.close());
stage.addEventListener("wheel", e => { e.preventDefault(); zoom(e.deltaY < 0 ? 0.87 : 1.15, e.clientX, e.clientY); }, { passive: false });
stage.addEventListener("dblclick", () => { view = [...home]; show(); });
stage.addEventListener("pointerdown", e => { stage.setPointerCapture(e.pointerId); pointers.set(e.pointerId, e); });
["pointerup", "pointercancel"].forEach(n => stage.addEventListener(n, e => { pointers.delete(e.pointerId); spread = 0; }));
stage.addEventListener("pointermove", e => { const before = pointers.get(e.pointerId); if (!before) return; pointers.set(e.pointerId, e);
  const p = [...pointers.values()], r = svg.getBoundingClientRect(), s = Math.max(view[2] / r.width, view[3] / r.height);
  if (p.length === 1) { view[0] -= (e.clientX - before.clientX) * s; view[1] -= (e.clientY - before.clientY) * s; show(); }
  if (p.length === 2) { const d = Math.hypot(p[0].clientX - p[1].clientX, p[0].clientY - p[1].clientY);
    if (spread) zoom(spread / d, (p[0].clientX + p[1].clientX) / 2, (p[0].clientY + p[1].clientY) / 2); spread = d; } });
