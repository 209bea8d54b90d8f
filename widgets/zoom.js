// How the finished picture is looked at: enlarged more sharply than a browser does, and zoomed in full screen.

const MOST = 32; // times
const SOFT = 0.65, FIRM = 0.8; // the radius in the picture's pixels, and the strength, of the unsharp mask

// A picture of few pixels on a large screen: bicubic, and a little firmer. `copy` lies over `canvas`, whose pixels stay the
// file's.
export function sharpening(canvas, copy) {
  const blurred = document.createElement("canvas");
  function draw() {
    const wide = Math.round(canvas.clientWidth * devicePixelRatio), scale = wide / canvas.width;
    const tall = Math.round(canvas.height * scale);
    copy.hidden = scale < 1.5 || wide * tall > 2 ** 23;
    if (copy.hidden) return;
    for (const each of [copy, blurred]) [each.width, each.height] = [wide, tall];
    const to = copy.getContext("2d", { willReadFrequently: true }), soft = blurred.getContext("2d");
    for (const each of [to, soft]) each.imageSmoothingQuality = "high";
    to.drawImage(canvas, 0, 0, wide, tall);
    soft.filter = `blur(${SOFT * scale}px)`;
    soft.drawImage(copy, 0, 0);
    if (soft.filter === undefined) return; // Safari before 18
    const sharp = to.getImageData(0, 0, wide, tall), low = soft.getImageData(0, 0, wide, tall).data, data = sharp.data;
    for (let i = 0; i < data.length; i++) if (i % 4 < 3 && low[i | 3] === 255) data[i] += FIRM * (data[i] - low[i]);
    to.putImageData(sharp, 0, 0);
  }
  let due = 0;
  const later = () => { clearTimeout(due); due = setTimeout(draw, 80); };
  const resize = new ResizeObserver(() => { if (!copy.hidden) later(); });
  resize.observe(canvas);
  return { draw, hide: () => { copy.hidden = true; clearTimeout(due); }, away: () => { resize.disconnect(); clearTimeout(due); } };
}

// In full screen: wheel, + and -, a pinch and a double click zoom; a drag and the arrow keys move.
export function zooming(stage, canvas, note) {
  let zoom = 1, x = 0, y = 0, hiding = 0; // x, y: how far the picture is moved, in CSS pixels
  const full = () => document.fullscreenElement === stage;
  const fingers = new Map(); // pointer -> where

  function to(next, at = [0, 0]) {
    next = Math.min(Math.max(next, 1), MOST);
    [x, y] = [x, y].map((moved, i) => at[i] - (at[i] - moved) * next / zoom);
    zoom = next;
    show();
  }

  function show() {
    const room = [stage.clientWidth, stage.clientHeight].map((edge) => (zoom - 1) * edge / 2);
    [x, y] = [x, y].map((moved, i) => Math.min(Math.max(moved, -room[i]), room[i]));
    stage.style.setProperty("--zoom", zoom);
    stage.style.setProperty("--moved", `${x}px ${y}px`);
    const fit = Math.min(stage.clientWidth / canvas.width, stage.clientHeight / canvas.height);
    stage.classList.toggle("mlxdiff-squares", full() && zoom > 1 && zoom * fit >= 12); // so large that its pixels are seen
    note.textContent = `${Math.round(100 * zoom * fit * devicePixelRatio)} %`;
    note.hidden = !full();
    clearTimeout(hiding);
    hiding = setTimeout(() => { note.hidden = true; }, 1500);
  }

  // From the middle of the stage, which a zoom leaves in place.
  const place = (event) => [event.clientX - stage.clientWidth / 2, event.clientY - stage.clientHeight / 2];

  function wheel(event) {
    if (!full()) return;
    event.preventDefault();
    to(zoom * 2 ** (-event.deltaY * (event.ctrlKey ? 8 : 1) / 300), place(event));
  }

  function down(event) {
    if (!full() || event.target.closest("input")) return;
    fingers.set(event.pointerId, place(event));
    stage.setPointerCapture(event.pointerId);
  }

  const middle = (points) => [0, 1].map((i) => points.reduce((sum, point) => sum + point[i], 0) / points.length);
  const apart = ([one, two]) => (two ? Math.hypot(one[0] - two[0], one[1] - two[1]) : 1);
  function move(event) {
    if (!fingers.has(event.pointerId)) return;
    const before = [...fingers.values()];
    fingers.set(event.pointerId, place(event));
    const after = [...fingers.values()], at = middle(after), from = middle(before);
    [x, y] = [x + at[0] - from[0], y + at[1] - from[1]];
    to(zoom * apart(after) / Math.max(apart(before), 1), at);
  }

  const up = (event) => fingers.delete(event.pointerId);
  const twice = (event) => { if (full()) to(zoom > 1 ? 1 : 3, place(event)); };

  function keys(event) {
    if (!full() || event.ctrlKey || event.metaKey || event.altKey) return false;
    const step = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (["+", "="].includes(event.key)) to(zoom * 1.25);
    else if (["-", "_"].includes(event.key)) to(zoom / 1.25);
    else if (event.key === "0") to(1);
    else if (step && !event.target.closest?.("input")) { [x, y] = [x + 60 * step[0], y + 60 * step[1]]; show(); }
    else return false;
    event.preventDefault();
    event.stopPropagation();
    return true;
  }

  const began = () => { [zoom, x, y] = [1, 0, 0]; fingers.clear(); show(); };
  stage.addEventListener("fullscreenchange", began);
  stage.addEventListener("wheel", wheel, { passive: false });
  stage.addEventListener("pointerdown", down);
  stage.addEventListener("pointermove", move);
  for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, up);
  stage.addEventListener("dblclick", twice);
  return { keys };
}
