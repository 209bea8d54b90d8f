// Painting on the start picture: a mask says where it is drawn anew, and handles say how many pixels are added around it.
// Or on a black page: a sketch, which the next picture follows.
// The mask is the alpha of a canvas of the picture's size. What a person does is kept as a list of marks; undoing draws
// all but the last again.

const PAINT = "rgb(255, 45, 135)", CHALK = "white";
const SIDES = ["left", "top", "right", "bottom"];

export function painting({ model, send, h, covered }) {
  const canvas = h("canvas", { role: "img" });
  const picture = h("img", { alt: "The start picture", draggable: "false" });
  const ring = h("div", { class: "mlxdiff-ring", "aria-hidden": "true" });
  const box = h("div", { class: "mlxdiff-marquee", hidden: "" });
  const sheet = h("div", {
    class: "mlxdiff-sheet", tabindex: "0", role: "application",
    "aria-label": "Paint on the picture: arrow keys move the brush, Space paints, [ and ] change its size",
  }, picture, canvas, box, ring);
  const handles = SIDES.map((side, i) => h("button", {
    type: "button", class: `mlxdiff-handle mlxdiff-${side}`, role: "slider", "aria-valuemin": 0,
    "aria-label": `Add at the ${side}`, title: `Drag to add pixels at the ${side}`,
  }));
  const paper = h("div", { class: "mlxdiff-paper" }, sheet, ...handles);
  const frame = h("div", { class: "mlxdiff-frame", hidden: "" }, paper);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const sketches = () => Boolean(model.get("paper").sketch);

  // --- marks

  let marks = [], undone = [], base = null, tool = "brush", size = 24;

  function draw(mark) {
    context.globalCompositeOperation = "source-over";
    context.fillStyle = context.strokeStyle = sketches() ? CHALK : PAINT;
    if (mark.kind === "clear") context.clearRect(0, 0, canvas.width, canvas.height);
    else if (mark.kind === "invert") {
      context.globalCompositeOperation = "source-out";
      context.fillRect(0, 0, canvas.width, canvas.height);
    } else if (mark.kind === "rectangle") {
      if (mark.erase) context.globalCompositeOperation = "destination-out";
      context.fillRect(...corners(mark));
    } else mark.points.forEach((_, i) => stroke(mark, i));
  }

  // One piece of a stroke. It is drawn as it comes, and in the same pieces when it is drawn again: so the pixels are the same.
  function stroke({ points, size, erase }, i) {
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.fillStyle = context.strokeStyle = sketches() ? CHALK : PAINT;
    context.beginPath();
    if (i === 0) {
      context.arc(...points[0], size / 2, 0, 2 * Math.PI);
      context.fill();
      return;
    }
    context.lineCap = "round";
    context.lineWidth = size;
    context.moveTo(...points[i - 1]);
    context.lineTo(...points[i]);
    context.stroke();
  }

  function corners({ from, to }) {
    const [x, y] = [0, 1].map((i) => Math.round(Math.min(from[i], to[i])));
    return [x, y, ...[0, 1].map((i) => Math.round(Math.max(from[i], to[i])) - [x, y][i])];
  }

  function redraw() {
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (base) context.drawImage(base, 0, 0);
    marks.forEach(draw);
  }

  function add(mark) {
    draw(mark);
    keep(mark);
  }

  function keep(mark) {
    marks.push(mark);
    undone = [];
    changed();
  }

  function undo() {
    if (!marks.length) return;
    undone.push(marks.pop());
    redraw();
    changed();
  }

  function redo() {
    if (!undone.length) return;
    marks.push(undone.pop());
    redraw();
    changed();
  }

  // --- to Python and from it

  const me = Math.random().toString(36).slice(2); // in the id of every mask that this page sends
  let sending = Promise.resolve(), sent = 0;
  function changed() {
    buttons();
    const turn = ++sent;
    sending = sending.then(async () => {
      if (turn !== sent) return; // a later one follows
      const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
      send("mask", { id: `${me} ${turn}` }, [await blob.arrayBuffer()]);
    });
  }

  // Python tells every page of a new mask, the one that has sent it too.
  function given() {
    if (!model.get("mask").id.startsWith(me)) load();
  }

  let loading = 0;
  async function load() {
    const { png } = model.get("mask"), turn = ++loading;
    const bitmap = png?.byteLength ? await createImageBitmap(new Blob([png], { type: "image/png" })) : null;
    if (turn !== loading) return;
    [base, marks, undone] = [bitmap, [], []];
    redraw();
    buttons();
  }

  let url = null;
  function placed() {
    const { png, width, height } = model.get("paper");
    if (url) URL.revokeObjectURL(url);
    url = null;
    if (!png) return close();
    picture.src = url = URL.createObjectURL(new Blob([png], { type: "image/png" }));
    [canvas.width, canvas.height] = [width, height];
    slider.max = Math.round(Math.min(width, height) / 2);
    frame.classList.toggle("mlxdiff-sketches", sketches());
    bar.classList.toggle("mlxdiff-sketches", sketches());
    picture.alt = sketches() ? "A black page" : "The start picture";
    sized(Math.min(width, height) / (sketches() ? 50 : 8));
    load();
  }

  // --- where it is on the page

  let sides = [0, 0, 0, 0];
  function around() {
    const { sides: now, inner, step, blur } = model.get("around");
    if (!inner) return;
    sides = now;
    soft.value = Math.max(Number(soft.min), blur);
    softness.textContent = `${blur} px`;
    filled(soft);
    numbers.forEach((number, i) => { number.value = sides[i]; number.step = step; });
    layout();
  }

  function layout() {
    const { inner, blur } = model.get("around");
    const wide = inner[0] + sides[0] + sides[2], tall = inner[1] + sides[1] + sides[3];
    frame.style.setProperty("--shape", wide / tall);
    SIDES.forEach((side, i) => { sheet.style[side] = `${100 * sides[i] / (i % 2 ? tall : wide)}%`; });
    handles.forEach((handle, i) => {
      handle.setAttribute("aria-valuenow", sides[i]);
      handle.setAttribute("aria-valuetext", `${sides[i]} pixels`);
    });
    paper.classList.toggle("mlxdiff-wider", sides.some(Boolean));
    const scale = sheet.clientWidth / inner[0] || 1;
    canvas.style.filter = blur ? `blur(${blur * scale}px)` : "";
    rounded();
  }

  // The canvas fills the sheet as the picture is fitted to it: scaled until it covers it, and cut.
  function fitted() {
    const place = sheet.getBoundingClientRect();
    const scale = Math.max(place.width / canvas.width, place.height / canvas.height);
    const edge = (start, length, whole) => start + (length - whole * scale) / 2;
    return { scale, x: edge(place.left, place.width, canvas.width), y: edge(place.top, place.height, canvas.height) };
  }

  function point(event) {
    const { scale, x, y } = fitted();
    return [(event.clientX - x) / scale, (event.clientY - y) / scale];
  }

  // --- the brush

  let at = null; // where the brush is, on the canvas
  function rounded() {
    ring.hidden = at === null || tool === "rectangle";
    if (at === null) return;
    const { scale, x, y } = fitted(), place = sheet.getBoundingClientRect();
    ring.style.width = ring.style.height = `${size * scale}px`;
    ring.style.translate = `${x - place.left + (at[0] - size / 2) * scale}px ${y - place.top + (at[1] - size / 2) * scale}px`;
  }

  function sized(pixels) {
    size = Math.round(Math.min(Math.max(pixels, 1), Number(slider.max)));
    slider.value = size;
    filled(slider);
    thickness.textContent = `${size} px`;
    rounded();
  }
  const filled = ({ style, value, min, max }) => style.setProperty("--part", `${100 * (value - min) / (max - min)}%`);
  const larger = (steps) => sized(size + steps * Math.max(1, Math.round(size / 8)));

  let mark = null, pointer = null;
  function begin(event) {
    if (pointer !== null || event.button === 1 || event.button === 2) return;
    event.preventDefault();
    sheet.focus({ preventScroll: true });
    pointer = event.pointerId;
    sheet.setPointerCapture(pointer);
    at = point(event);
    const erase = tool === "eraser" || event.button === 5; // 5: the other end of a pen
    if (tool === "rectangle") mark = { kind: "rectangle", from: at, to: at, erase };
    else { mark = { kind: "stroke", points: [at], size, erase }; stroke(mark, 0); }
    rounded();
  }

  function move(event) {
    if (pointer !== null && event.pointerId !== pointer) return;
    at = point(event);
    rounded();
    if (mark?.kind === "rectangle") {
      mark.to = at;
      marquee();
    } else if (mark) {
      const all = event.getCoalescedEvents?.() ?? [];
      for (const each of all.length ? all : [event]) {
        mark.points.push(point(each));
        stroke(mark, mark.points.length - 1);
      }
    }
  }

  function end(event) {
    if (event.pointerId !== pointer) return;
    pointer = null;
    finish(event.type === "pointercancel");
  }

  function finish(cancelled = false) {
    const done = mark;
    mark = null;
    box.hidden = true;
    if (!done) return;
    if (cancelled) redraw();
    else if (done.kind === "rectangle") { if (corners(done)[2] && corners(done)[3]) add(done); }
    else keep(done);
  }

  function marquee() {
    const { scale, x, y } = fitted(), place = sheet.getBoundingClientRect(), [left, top, width, height] = corners(mark);
    box.hidden = false;
    box.style.translate = `${x - place.left + left * scale}px ${y - place.top + top * scale}px`;
    [box.style.width, box.style.height] = [`${width * scale}px`, `${height * scale}px`];
  }

  function wheel(event) {
    event.preventDefault();
    larger(event.deltaY < 0 ? 1 : -1);
  }

  // --- the handles

  handles.forEach((handle, i) => {
    const sign = i < 2 ? -1 : 1;
    let from = null;
    const step = () => model.get("around").step;
    const most = () => 2 * model.get("around").inner[i % 2];
    const put = (value) => {
      sides = sides.with(i, Math.min(Math.max(Math.round(value / step()), 0), Math.floor(most() / step())) * step());
      numbers[i].value = sides[i];
      layout();
    };
    const where = (event) => (i % 2 ? event.clientY : event.clientX);
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      from = { at: where(event), value: sides[i], scale: sheet.clientWidth / model.get("around").inner[0] };
    });
    handle.addEventListener("pointermove", (event) => {
      if (from) put(from.value + sign * (where(event) - from.at) / from.scale);
    });
    for (const name of ["pointerup", "pointercancel"]) {
      handle.addEventListener(name, () => { if (from) { from = null; send("outpaint", { sides }); } });
    }
    handle.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      put(sides[i] + sign * by * step());
      send("outpaint", { sides });
    });
    handle.put = put;
  });

  // --- the tools under the picture

  const button = (text, action, title) => h("button", { type: "button", class: "mlxdiff-button", title, onclick: action }, text);
  const tools = [["brush", "Brush", "Paint where it is drawn anew (B)"], ["eraser", "Eraser", "Take paint away (E)"],
    ["rectangle", "Rectangle", "Paint a rectangle (R)"]].map(([name, text, title]) => {
    const each = button(text, () => choose(name), title);
    each.dataset.tool = name;
    return each;
  });
  function choose(name) {
    tool = name;
    for (const each of tools) each.setAttribute("aria-pressed", each.dataset.tool === name);
    rounded();
  }
  const slider = h("input", { type: "range", min: 1, max: 256, "aria-label": "Brush size", oninput: () => sized(slider.valueAsNumber) });
  const thickness = h("output");
  const soft = h("input", {
    type: "range", min: 0, max: 32, "aria-label": "Soft edge", title: "How far the edge of the painted part fades, in pixels of the result",
    oninput: () => send("soften", { pixels: soft.valueAsNumber }),
  });
  const softness = h("output");
  const back = button("Undo", undo, "Take the last mark back (Ctrl+Z)");
  const forth = button("Redo", redo, "Paint it again (Ctrl+Shift+Z)");
  const clear = button("Clear", () => add({ kind: "clear" }), "Take all paint away");
  const numbers = SIDES.map((side, i) => h("input", {
    type: "number", min: 0, "aria-label": `Pixels to add at the ${side}`,
    onchange: (event) => { handles[i].put(Number(event.target.value) || 0); send("outpaint", { sides }); },
  }));
  const hint = h("p", { class: "mlxdiff-hint" });
  const done = button("Done", () => close(), "Back to the picture; what is painted stays (Esc)");
  const label = (text, ...content) => h("label", { class: "mlxdiff-dial" }, h("span", {}, text), ...content);
  const softening = label("Soft edge", soft, softness);
  softening.classList.add("mlxdiff-of-masks");
  const bar = h("div", { class: "mlxdiff-painting", hidden: "" },
    h("div", { class: "mlxdiff-tools", role: "toolbar", "aria-label": "Paint" }, ...tools, back, forth,
      button("Invert", () => add({ kind: "invert" }), "Paint what is not painted, and the reverse"), clear, done),
    h("div", { class: "mlxdiff-dials" }, label("Size", slider, thickness), softening),
    h("div", { class: "mlxdiff-dials mlxdiff-sides", role: "group", "aria-label": "Pixels to add around the picture" },
      h("span", {}, "Add around it"), ...SIDES.map((side, i) => label(side, numbers[i]))),
    hint);

  function buttons() {
    back.disabled = !marks.length;
    forth.disabled = !undone.length;
    const empty = !context.getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value);
    clear.disabled = empty;
    hint.textContent = sketches()
      ? "Draw the outlines of what is large, type what it is, and press Generate. The picture follows your lines."
      : empty && !sides.some(Boolean)
      ? "Paint over what is to change, type what should be there, and press Generate. With nothing painted, all of it changes."
      : "Type what should be there, and press Generate.";
  }

  // --- keys

  function keys(event) {
    if (frame.hidden) return false;
    const typing = event.target.closest?.("input:not([type=range]), textarea, select");
    if (event.key === "Escape" && !model.get("running")) close();
    else if (typing) return false;
    else if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") (event.shiftKey ? redo : undo)();
    else if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "y") redo();
    else if (event.ctrlKey || event.metaKey || event.altKey) return false;
    else if (event.key === "[") larger(-1);
    else if (event.key === "]") larger(1);
    else if ("ber".includes(event.key.toLowerCase()) && event.key.length === 1) {
      choose({ b: "brush", e: "eraser", r: "rectangle" }[event.key.toLowerCase()]);
    } else if (event.target === sheet) return walk(event);
    else return false;
    return taken(event);
  }

  function walk(event) {
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (x || y) {
      const far = event.shiftKey ? 1 : Math.max(1, Math.round(size / 4)), edge = [canvas.width, canvas.height];
      at = (at ?? edge.map((length) => length / 2)).map((value, i) => Math.min(Math.max(value + far * [x, y][i], 0), edge[i]));
      if (mark?.kind === "rectangle") { mark.to = at; marquee(); }
      rounded();
    } else if (event.key === " ") {
      at ??= [canvas.width / 2, canvas.height / 2];
      if (mark) finish();
      else if (tool === "rectangle") mark = { kind: "rectangle", from: at, to: at };
      else add({ kind: "stroke", points: [at], size, erase: tool === "eraser" });
      rounded();
    } else return false;
    return taken(event);
  }

  function taken(event) {
    event.preventDefault();
    event.stopPropagation();
    return true;
  }

  function open() {
    if (!model.get("paper").png) return;
    frame.hidden = bar.hidden = false;
    covered(true);
    sized(size);
    layout();
    buttons();
    sheet.focus({ preventScroll: true });
  }

  function close() {
    if (frame.hidden) return;
    finish(true);
    frame.hidden = bar.hidden = true;
    covered(false);
  }

  const resize = new ResizeObserver(() => { if (!frame.hidden && model.get("around").inner) layout(); });
  resize.observe(sheet);
  sheet.addEventListener("pointerdown", begin);
  sheet.addEventListener("pointermove", move);
  for (const name of ["pointerup", "pointercancel"]) sheet.addEventListener(name, end);
  sheet.addEventListener("pointerleave", () => { if (pointer === null) { at = null; rounded(); } });
  sheet.addEventListener("contextmenu", (event) => event.preventDefault());
  sheet.addEventListener("wheel", wheel, { passive: false });
  choose(tool);
  const changes = { paper: placed, mask: given, around };
  for (const [name, listener] of Object.entries(changes)) model.on(`change:${name}`, listener);
  around();
  placed();

  function away() {
    resize.disconnect();
    if (url) URL.revokeObjectURL(url);
    for (const [name, listener] of Object.entries(changes)) model.off(`change:${name}`, listener);
  }
  return { frame, bar, keys, open, close, sent: () => sending, away };
}
