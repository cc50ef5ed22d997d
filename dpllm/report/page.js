// A cursor over the timeline and the text: which token, which group, how many planes. Everything else needs no script.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("cursor-data").textContent);
  const svg = document.getElementById("timeline"), tip = document.getElementById("tip");
  const cell = document.getElementById("cell"), hair = document.getElementById("hair");
  const live = document.getElementById("live");
  const spans = new Map([...document.querySelectorAll("pre span[data-t]")].map((s) => [Number(s.dataset.t), s]));
  const column = (data.right - data.left) / data.tokens.length;
  let token = -1, group = 0;

  const lines = () => {
    const t = data.tokens[token], out = [["token " + (token + 1) + ": ", t.text]];
    if (group >= 0) out.push([data.groups[group] + ": " + t.bits[group] + " bits", ""]);
    out.push([t.effective + " effective bits · " + t.ms, ""]);
    return out;
  };

  function fill() {
    tip.replaceChildren(...lines().map(([plain, code]) => {
      const row = document.createElement("div");
      row.textContent = plain;
      if (code) row.appendChild(document.createElement("b")).textContent = code;
      return row;
    }));
  }

  function mark() {
    document.querySelectorAll("pre span.here").forEach((s) => s.classList.remove("here"));
    spans.get(token)?.classList.add("here");
    const x = data.left + column * token;
    for (const end of ["x1", "x2"]) hair.setAttribute(end, x + column / 2);
    hair.setAttribute("visibility", "visible");
    cell.setAttribute("visibility", group < 0 ? "hidden" : "visible");
    if (group < 0) return;
    cell.setAttribute("x", x);
    cell.setAttribute("y", data.rows[group]);
  }

  function show(x, y) {
    fill();
    mark();
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
  }

  function hide() {
    tip.hidden = true;
    for (const e of [cell, hair]) e.setAttribute("visibility", "hidden");
    spans.get(token)?.classList.remove("here");
  }

  svg.addEventListener("pointermove", (event) => {
    const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    if (p.x < data.left || p.x >= data.right || p.y < data.rows[0] || p.y > data.bottom) return hide();
    token = Math.min(data.tokens.length - 1, Math.floor((p.x - data.left) / column));
    group = data.rows.findLastIndex((top) => p.y >= top);
    if (p.y > data.rows[group] + data.rowHeight + 4) group = -1; // between layers, or in a lower panel
    show(event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);

  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const clamp = (v, most) => Math.max(0, Math.min(most, v));
    if (event.key === "Home") token = 0;
    else if (event.key === "End") token = data.tokens.length - 1;
    else if (moves[event.key]) {
      token = clamp(token + moves[event.key][0], data.tokens.length - 1);
      group = clamp(Math.max(0, group) + moves[event.key][1], data.groups.length - 1);
    } else return;
    event.preventDefault();
    const to = svg.getScreenCTM(), at = new DOMPoint(data.left + column * (token + 0.5), data.rows[Math.max(0, group)]);
    const p = at.matrixTransform(to);
    show(p.x, p.y);
    live.textContent = lines().map((l) => l.join("")).join(", ");
  });

  for (const [number, span] of spans) {
    span.addEventListener("pointerenter", (event) => { token = number; group = -1; show(event.clientX, event.clientY); });
    span.addEventListener("pointerleave", hide);
  }
})();
