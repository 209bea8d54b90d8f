// A square on which a person draws points in two colours, and on which new points then move from noise to them.
// Drawn points go to Python as the trait `points`; what moves comes from there as `run`. Keys do all that a mouse does.

const SIZE = 2.4; // half the side of the square, in the world's units
const COLOURS = ["#2f6fb7", "#d9822b"];
const NAMES = ["Blue", "Orange", "Rubber"];
const KEYS = "Arrows move the cross, with Shift further. Space draws a dot. P lets the cross draw as it moves. "
  + "1 is blue, 2 orange, 3 the rubber.";

function render({ model, el }) {
  const make = (tag, props = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(props)) key in node ? (node[key] = value) : node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  el.classList.add("mlxdiff-board");
  const canvas = make("canvas", { tabIndex: 0 });
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", `The world to draw on. ${KEYS}`);
  const spoken = make("span", { className: "mlxdiff-board-spoken" });
  spoken.setAttribute("aria-live", "polite");
  const pens = NAMES.map((name, i) => {
    const button = make("button", { type: "button", onclick: () => choose(i) }, name);
    button.setAttribute("aria-pressed", String(i === 0));
    if (COLOURS[i]) button.style.setProperty("--pen", COLOURS[i]);
    return button;
  });
  const clear = make("button", { type: "button", onclick: () => { points = []; send(); } }, "Clear");
  const play = make("button", { type: "button", onclick: () => { playing = !playing; last = null; tell(); tick(); } });
  const when = make("input", { type: "range", min: 0, max: 1, step: 0.001, value: 0 });
  when.setAttribute("aria-label", "Moment, from noise to points");
  when.oninput = () => { playing = false; moment = Number(when.value); tell(); draw(); };
  const pen = make("div", { className: "mlxdiff-board-row" }, ...pens, clear);
  const time = make("div", { className: "mlxdiff-board-row" }, play, when);
  el.append(pen, canvas, time, make("div", { className: "mlxdiff-board-keys" }, KEYS), spoken);

  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let points = model.get("points"), kind = 0, cross = [0, 0], holds = false, down = false, keyed = false;
  let playing = !still, moment = still ? 1 : 0, last = null, frame = null, run = null;

  function choose(i) {
    kind = i;
    pens.forEach((button, k) => button.setAttribute("aria-pressed", String(k === i)));
  }

  function tell() {
    play.textContent = playing ? "Pause" : "Play";
  }

  function put([x, y]) {
    if (kind === 2) points = points.filter(([a, b]) => Math.hypot(a - x, b - y) > 0.2);
    else if (points.length < model.get("most")) {
      const near = points.some(([a, b, k]) => k === kind && Math.hypot(a - x, b - y) < 0.06);
      if (!near) points = [...points, [x, y, kind]];
    }
    draw();
  }

  function send() {
    model.set("points", points);
    model.save_changes();
    draw();
  }

  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width * 2 - 1) * SIZE, (1 - (event.clientY - box.top) / box.height * 2) * SIZE];
  };
  canvas.onpointerdown = (event) => {
    down = true;
    keyed = false;
    canvas.setPointerCapture(event.pointerId);
    put(place(event));
  };
  canvas.onpointermove = (event) => {
    if (down) for (const each of event.getCoalescedEvents?.() ?? [event]) put(place(each));
  };
  canvas.onpointerup = canvas.onpointercancel = () => { if (down) { down = false; send(); } };
  canvas.onblur = () => { if (holds) { holds = false; send(); } keyed = false; draw(); };

  canvas.onkeydown = (event) => {
    const step = event.shiftKey ? 0.4 : 0.1;
    const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
    if (move) {
      cross = cross.map((value, i) => Math.max(-SIZE, Math.min(SIZE, value + move[i])));
      if (holds) put(cross);
      spoken.textContent = `${cross[0].toFixed(1)}, ${cross[1].toFixed(1)}`;
    } else if (event.key === " ") {
      put(cross);
      if (!holds) send();
    } else if (event.key.toLowerCase() === "p") {
      holds = !holds;
      spoken.textContent = holds ? "The cross draws" : "The cross moves";
      if (holds) put(cross); else send();
    } else if ("123".includes(event.key)) choose(Number(event.key) - 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
    keyed = true;
    draw();
  };

  // What moves: a path for each point, and arrows on a grid in each step. Numbers are float32, little-endian.
  function arrived() {
    const { steps, count, grid } = model.get("run");
    const read = (name) => {
      const view = model.get(name);
      return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
    };
    run = steps ? { steps, count, grid, paths: read("paths"), arrows: read("arrows"), places: read("places") } : null;
    if (!still) { moment = 0; playing = true; }
    last = null;
    tell();
    tick();
  }

  function tick(now) {
    if (frame !== null) cancelAnimationFrame(frame);
    frame = null;
    if (!canvas.isConnected && now !== undefined) return;
    if (playing && run && now !== undefined) {
      if (last !== null) moment += (now - last) / 5000;
      if (moment > 1.25) moment = 0; // the end is shown for a while
      last = now;
    }
    when.value = Math.min(1, moment);
    draw();
    if (playing && run) frame = requestAnimationFrame(tick);
  }

  function draw() {
    const side = canvas.clientWidth || 480, sharp = devicePixelRatio || 1;
    if (canvas.width !== Math.round(side * sharp)) canvas.width = canvas.height = Math.round(side * sharp);
    const pencil = canvas.getContext("2d"), scale = side / (2 * SIZE);
    pencil.setTransform(sharp, 0, 0, sharp, 0, 0);
    pencil.fillStyle = "#fff";
    pencil.fillRect(0, 0, side, side);
    const at = (x, y) => [(x + SIZE) * scale, (SIZE - y) * scale];
    const dot = (x, y, size) => { pencil.beginPath(); pencil.arc(...at(x, y), size, 0, 7); pencil.fill(); };
    if (run) {
      const part = Math.min(1, moment) * run.steps, k = Math.min(Math.floor(part), run.steps - 1), f = part - k;
      pencil.strokeStyle = "#b9bdc4";
      pencil.lineWidth = 1;
      for (let i = 0; i < run.grid; i++) {
        const [x, y] = [run.places[2 * i], run.places[2 * i + 1]], j = 2 * (k * run.grid + i);
        const [dx, dy] = [run.arrows[j], run.arrows[j + 1]];
        const [a, b] = [at(x, y), at(x + dx, y + dy)], angle = Math.atan2(b[1] - a[1], b[0] - a[0]);
        pencil.beginPath();
        pencil.moveTo(...a);
        pencil.lineTo(...b);
        for (const turn of [2.6, -2.6]) {
          pencil.moveTo(...b);
          pencil.lineTo(b[0] + 4 * Math.cos(angle + turn), b[1] + 4 * Math.sin(angle + turn));
        }
        pencil.stroke();
      }
      points.forEach(([x, y, which]) => { pencil.fillStyle = `${COLOURS[which]}55`; dot(x, y, 4); });
      const spot = (n, i) => [run.paths[2 * (n * run.count + i)], run.paths[2 * (n * run.count + i) + 1]];
      pencil.fillStyle = "#1f1f23";
      pencil.strokeStyle = "#1f1f2333";
      for (let i = 0; i < run.count; i++) {
        const [a, b] = [spot(k, i), spot(k + 1, i)], here = [a[0] + f * (b[0] - a[0]), a[1] + f * (b[1] - a[1])];
        if (i < 40) { // some show the way that they came
          pencil.beginPath();
          for (let n = 0; n <= k; n++) pencil.lineTo(...at(...spot(n, i)));
          pencil.lineTo(...at(...here));
          pencil.stroke();
        }
        dot(...here, 1.8);
      }
    } else {
      points.forEach(([x, y, which]) => { pencil.fillStyle = COLOURS[which]; dot(x, y, 4); });
      if (!points.length) {
        pencil.fillStyle = "#62626a";
        pencil.font = "14px system-ui, sans-serif";
        pencil.textAlign = "center";
        pencil.fillText("Draw here", side / 2, side / 2);
      }
    }
    if (keyed) {
      const [x, y] = at(...cross);
      pencil.strokeStyle = kind === 2 ? "#b8434e" : COLOURS[kind];
      pencil.lineWidth = 2;
      pencil.strokeRect(x - 7, y - 7, 14, 14);
    }
  }

  const repaint = () => { points = model.get("points"); draw(); };
  model.on("change:points", repaint);
  model.on("change:run", arrived);
  const watch = new ResizeObserver(draw);
  watch.observe(canvas);
  arrived();
  return () => {
    watch.disconnect();
    if (frame !== null) cancelAnimationFrame(frame);
    model.off("change:points", repaint);
    model.off("change:run", arrived);
  };
}

export default { render };
