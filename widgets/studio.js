// The browser's part of view.py: canvas, progress, history, file drop, shortcuts. It only mirrors traits and sends
// messages. It fetches nothing: view.py puts painting.js and zoom.js into it.

import { painting } from "./painting.js";
import { sharpening, zooming } from "./zoom.js";

const PART = 4 * 2 ** 20; // bytes of a dropped file in one message: Jupyter's server closes on messages above 10 MiB

const KEYS = [
  ["Ctrl + Enter", "Generate"], ["Esc", "Cancel"], ["← →", "Walk the history"], ["Drop", "Use a picture of yours"],
  ["B E R", "Brush, eraser, rectangle"], ["[ ]", "A smaller or larger brush"], ["Ctrl + Z", "Undo, with Shift redo"],
  ["Arrows, Space", "Move the brush, paint"], ["+ - 0, drag", "Zoom and move in full screen"],
];

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Frames are decoded off the page's thread and may arrive out of order: a frame older than the drawn one is dropped.
function painter(canvas) {
  let asked = 0, drawn = 0;
  return async (bytes, type, title) => {
    const turn = ++asked;
    const bitmap = await createImageBitmap(new Blob([bytes], { type }), { colorSpaceConversion: "none" });
    if (turn < drawn) return;
    drawn = turn;
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    canvas.closest(".mlxdiff-frame").style.setProperty("--shape", bitmap.width / bitmap.height);
    canvas.setAttribute("aria-label", title);
    canvas.dataset.frames = 1 + Number(canvas.dataset.frames || 0);
    bitmap.close();
  };
}

function render({ model, el }) {
  const send = (action, extra = {}, buffers = []) => model.send({ do: action, ...extra }, undefined, buffers);
  const button = (content, action, title, kind = "mlxdiff-button") =>
    h("button", { type: "button", class: kind, title, onclick: action }, content);

  const canvas = h("canvas", { role: "img", "aria-label": "No picture yet" });
  const paint = painter(canvas);
  const purpose = h("span");
  const hint = ["Your picture forms here.", h("br"), purpose];
  const empty = h("p", { class: "mlxdiff-empty" }, ...hint);
  const began = h("img", { alt: "What it began with" });
  const split = h("div", { class: "mlxdiff-split", hidden: "" }, began, h("input", {
    type: "range", min: 0, max: 100, "aria-label": "Before and after", oninput: (event) => cut(event.target.value),
  }));
  const cut = (part) => { began.style.clipPath = `inset(0 ${100 - part}% 0 0)`; split.style.setProperty("--cut", `${part}%`); };
  const copy = h("canvas", { class: "mlxdiff-sharp", "aria-hidden": "true", hidden: "" });
  const percent = h("output", { class: "mlxdiff-percent", hidden: "" });
  const stage = h("div", { class: "mlxdiff-stage" }, empty, canvas, copy, split, percent);
  const sharp = sharpening(canvas, copy), zoom = zooming(stage, canvas, percent);

  const fill = h("div");
  const range = { "aria-label": "Progress", "aria-valuemin": 0, "aria-valuemax": 100 };
  const bar = h("div", { class: "mlxdiff-bar", role: "progressbar", ...range }, fill);
  const status = h("p", { class: "mlxdiff-status" });
  const spoken = h("p", { class: "mlxdiff-spoken", role: "status", "aria-live": "polite" });
  const error = h("div", { class: "mlxdiff-error", role: "alert" });

  const words = h("dl", { class: "mlxdiff-words" });
  const caption = h("p", { class: "mlxdiff-caption" });
  const path = h("p", { class: "mlxdiff-path" });
  const download = h("a", { class: "mlxdiff-button" }, "Download");
  const copies = [["JPEG", "jpg"], ["WebP", "webp"]].map(([name, ending]) =>
    button(name, () => send("copy", { key: current, ending }), `Download it as a ${name}, with its settings`));
  const back = button("Back to the preview", () => { pinned = null; update(); }, "Show the running picture");
  const begin = button("", () => send("begin", { key: current }), "");
  const enlarge = button("Enlarge 2×", () => send("enlarge", { key: current }), "");
  const compare = button("Before / after", () => {
    if (split.hidden) send("before", { key: current });
    split.hidden = true;
  }, "Slide between this picture and what it began with");
  const full = button("Full screen", () => stage.requestFullscreen(), "The picture alone (Esc: back)");
  full.hidden = !document.fullscreenEnabled;
  const star = button("", () => send("star", { key: current }), "");
  const remove = button("Delete", () => {
    if (remove.dataset.sure) send("delete", { key: current });
    sure(!remove.dataset.sure);
  }, "Delete its file");
  let unsure = 0;
  function sure(yes) {
    clearTimeout(unsure);
    remove.textContent = yes ? "Really delete?" : "Delete";
    if (!yes) return delete remove.dataset.sure;
    remove.dataset.sure = "yes";
    unsure = setTimeout(() => sure(false), 4000);
  }
  const change = button("Change a part of it", () => send("paint", { key: current }), "");
  const settle = h("div", { class: "mlxdiff-tools mlxdiff-settle", role: "group", "aria-label": "Its settings" },
    button("Restore settings", () => send("restore", { key: current }), "Take over all settings of this picture"),
    button("Use its seed", () => send("seed", { key: current }), "Take over the seed and keep it"));
  const tools = h("div", { class: "mlxdiff-tools", role: "group", "aria-label": "This picture" }, begin, change, enlarge, compare, star, full, download, ...copies, remove, back);
  const frame = h("div", { class: "mlxdiff-frame" }, stage);
  const covered = (yes) => { frame.hidden = yes; main.classList.toggle("mlxdiff-paints", yes); };
  const paper = painting({ model, send, h, covered });
  function chooser(text, action) {
    const chosen = (event) => { const file = event.target.files[0]; event.target.value = ""; if (file) action(file); };
    const file = h("input", { type: "file", accept: "image/*", class: "mlxdiff-spoken", onchange: chosen });
    return h("label", { class: "mlxdiff-button mlxdiff-open" }, text, file);
  }
  const other = h("span");
  const help = h("details", { class: "mlxdiff-keys" }, h("summary", { class: "mlxdiff-button" }, "Keys"),
    h("dl", {}, ...KEYS.flatMap(([key, does]) => [h("dt", {}, key), h("dd", {}, does)])));
  const sketch = button("Draw a sketch", () => send("sketch"), "Draw lines with the mouse, which the next picture follows");
  const open = h("div", { class: "mlxdiff-tools mlxdiff-files" },
    chooser("Restore settings from…", (file) => take(file, "restore")), chooser(other, (file) => take(file, "begin")),
    chooser("Guide with a picture…", (file) => ask(file)), sketch, help);
  const strip = h("div", { class: "mlxdiff-strip", role: "group", "aria-label": "History", onkeydown: walk });
  const only = button("★ Favourites", () => { only.setAttribute("aria-pressed", only.ariaPressed !== "true"); history(); },
    "Show only these");
  only.setAttribute("aria-pressed", "false");
  const past = h("div", { class: "mlxdiff-tools mlxdiff-head" }, h("span", {}, "History"), only);

  const asks = h("div", { class: "mlxdiff-asks", role: "dialog", "aria-label": "What is this picture for?", hidden: "" });

  el.classList.add("mlxdiff-view");
  const about = h("div", { class: "mlxdiff-about" }, words, h("div", { class: "mlxdiff-facts" }, caption, path), settle);
  const main = h("div", { class: "mlxdiff-main" },
    frame, paper.frame, paper.bar, bar, status, spoken, error, tools);
  el.append(main, h("div", { class: "mlxdiff-side" }, about, past, strip, open), asks);

  let current = null; // key of the picture on the canvas; null for a preview, which has no file
  let pinned = null; // key of an older picture that the user looks at while a new one forms
  let url = null;

  function shown() {
    const it = model.get("shown");
    split.hidden = true;
    compare.hidden = !it.began;
    sure(false);
    if (!it.png) {
      canvas.setAttribute("aria-label", "No picture yet");
      about.hidden = true;
      empty.hidden = false;
      return setCurrent(null);
    }
    about.hidden = false;
    enlarge.disabled = Boolean(it.unenlargeable);
    enlarge.title = it.unenlargeable || "Draw it again, and then on at twice its size";
    empty.hidden = true;
    paint(it.png, "image/png", it.title).then(() => { if (current !== null) sharp.draw(); });
    words.replaceChildren(...it.words.flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, h("span", { title: text }, text), copier(text))]));
    caption.textContent = it.caption;
    path.textContent = it.path;
    if (url) URL.revokeObjectURL(url);
    url = URL.createObjectURL(new Blob([it.png], { type: "image/png" }));
    download.href = url;
    download.download = it.name;
    setCurrent(it.key);
  }

  function hand(bytes, name) {
    const src = URL.createObjectURL(new Blob([bytes]));
    h("a", { href: src, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(src), 60000); // the browser may still read it
  }

  function beside(png) {
    const src = URL.createObjectURL(new Blob([png], { type: "image/png" }));
    began.onload = () => URL.revokeObjectURL(src);
    began.src = src;
    split.querySelector("input").value = 50;
    cut(50);
    split.hidden = false;
    split.querySelector("input").focus();
  }

  function copier(text) {
    const copy = button("Copy", async () => {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    }, "", "mlxdiff-copy");
    copy.hidden = !navigator.clipboard; // only a page of this machine or of https has one
    return copy;
  }

  function purposes() {
    const edits = model.get("edits");
    purpose.textContent = `Drop one to ${edits ? "edit it" : "begin with it"}, or for another use.`;
    other.textContent = edits ? "Edit a picture…" : "Begin with a picture…";
    begin.textContent = edits ? "Edit it" : "Begin with it";
    begin.title = edits ? "Edit this picture next" : "Begin the next picture with this one";
    sketch.hidden = !model.get("sketches");
    change.disabled = Boolean(model.get("unpaintable"));
    change.title = model.get("unpaintable") || "Paint where this picture is drawn anew, or add to its sides";
  }

  function arrived() {
    if (pinned === null || pinned === model.get("shown").key) shown();
  }

  function setCurrent(key) {
    current = key;
    for (const part of [about, tools]) part.classList.toggle("mlxdiff-past", key === null);
    for (const child of strip.children) child.setAttribute("aria-pressed", String(Number(child.dataset.key) === key));
    const starred = Boolean(model.get("history").find((it) => it.key === key)?.star);
    star.textContent = starred ? "★ Favourite" : "☆ Favourite";
    star.title = starred ? "It is a favourite no more" : "Keep it among the favourites";
    star.setAttribute("aria-pressed", starred);
  }

  const thumbs = new Map(); // key -> button: kept, so that existing thumbnails stay in place as the history grows
  function history() {
    for (const it of model.get("history")) {
      if (thumbs.has(it.key)) continue;
      const src = URL.createObjectURL(new Blob([it.thumb], { type: "image/jpeg" }));
      const image = h("img", { src, alt: "", onload: () => URL.revokeObjectURL(src) });
      const thumb = button(image, () => look(it.key), it.title, "mlxdiff-thumb");
      thumb.setAttribute("aria-label", it.title);
      thumb.dataset.key = it.key;
      thumbs.set(it.key, thumb);
    }
    const kept = new Set(model.get("history").map((it) => it.key));
    for (const [key, thumb] of thumbs) if (!kept.has(key)) { thumb.remove(); thumbs.delete(key); }
    let next = null; // the newest is the first
    for (const it of model.get("history")) {
      const thumb = thumbs.get(it.key);
      if (!thumb.isConnected || thumb.nextSibling !== next) strip.insertBefore(thumb, next);
      next = thumb;
      thumb.classList.toggle("mlxdiff-starred", it.star);
      thumb.setAttribute("aria-label", it.star ? `${it.title}, a favourite` : it.title);
      thumb.hidden = only.ariaPressed === "true" && !it.star;
    }
    only.hidden = only.ariaPressed !== "true" && !model.get("history").some((it) => it.star);
    strip.hidden = past.hidden = thumbs.size === 0;
    setCurrent(current);
  }

  function look(key) {
    pinned = model.get("running") ? key : null;
    if (key === model.get("shown").key) shown();
    else send("view", { key });
    update();
  }

  function walk(event) {
    const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    let target = next && document.activeElement[next];
    while (target?.hidden) target = target[next];
    if (target) { target.focus(); event.preventDefault(); }
  }

  function update() {
    const running = model.get("running"), progress = model.get("progress"), wrong = model.get("error");
    if (!running) pinned = null;
    status.textContent = model.get("status");
    status.hidden = Boolean(wrong.problem);
    spoken.textContent = model.get("spoken");
    back.hidden = pinned === null;
    bar.classList.toggle("mlxdiff-unknown", running && progress < 0);
    bar.classList.toggle("mlxdiff-idle", !running);
    if (progress < 0) bar.removeAttribute("aria-valuenow");
    else bar.setAttribute("aria-valuenow", Math.round(100 * progress));
    fill.style.width = `${100 * Math.max(0, progress)}%`;
  }

  function failed() {
    const { problem, fix, trace } = model.get("error");
    error.replaceChildren();
    error.hidden = !problem;
    if (problem) {
      error.append(h("p", {}, h("strong", {}, problem), " ", fix));
      error.append(h("details", {}, h("summary", {}, "Details"), h("pre", {}, trace)));
    }
    update();
  }

  // Ask what a picture is for.
  let before = null;
  function ask(file) {
    before = document.activeElement;
    const src = URL.createObjectURL(file);
    const forget = () => URL.revokeObjectURL(src);
    const picture = h("img", { src, alt: file.name, onload: forget, onerror: forget });
    const choices = model.get("uses").map(({ name, label, why }) => {
      const choice = button(label, () => { asked(); take(file, name); }, why);
      choice.disabled = Boolean(why);
      return why ? h("div", {}, choice, h("small", {}, why)) : h("div", {}, choice);
    });
    asks.replaceChildren(picture, h("p", {}, "What is this picture for?"), ...choices, button("Cancel", asked, "Esc"));
    asks.hidden = false;
    asks.querySelector("button:enabled").focus();
  }

  function asked() {
    if (asks.hidden) return;
    asks.hidden = true;
    before?.focus?.();
  }

  async function take(dropped, use) {
    const parts = Math.ceil(dropped.size / PART) || 1, file = `${Math.random()}`;
    for (let part = 0; part < parts; part++) {
      send("drop", { file, part, parts, use }, [await dropped.slice(part * PART, (part + 1) * PART).arrayBuffer()]);
    }
  }

  function receive(message, buffers) {
    if (message.do === "paint") return paper.open();
    if (message.do === "before") return message.key === current && beside(buffers[0]);
    if (message.do === "copy") return hand(buffers[0], message.name);
    if (message.do !== "frame" || pinned !== null || !model.get("running")) return;
    empty.hidden = split.hidden = true;
    sharp.hide();
    paint(buffers[0], "image/jpeg", message.title);
    setCurrent(null);
  }

  function keys(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) act(event, "generate");
    else if (event.key === "Escape" && !asks.hidden) { asked(); event.stopPropagation(); }
    else if (event.key === "Escape" && closed(event)) return;
    else if (zoom.keys(event) || paper.keys(event)) return;
    else if (event.key === "Escape" && model.get("running")) act(event, "cancel");
  }

  // On a page of its own some buttons open a panel over the picture: a click elsewhere and Esc close it.
  function closePanel(focus) {
    const open = [...el.closest(".mlxdiff-studio").querySelectorAll(".mlxdiff-unfold.mod-active")].find((each) => {
      const content = panelOf(each);
      return content && getComputedStyle(content).position === "fixed" && !each.closest(".mlxdiff-fold")?.contains(focus);
    });
    open?.click();
    return open;
  }
  const panelOf = (button) => button.closest(".mlxdiff-fold").querySelector(".mlxdiff-panel");

  function closed(event) {
    const button = closePanel(null);
    button?.focus();
    if (button) { event.preventDefault(); event.stopPropagation(); }
    return Boolean(button);
  }

  function clicks(event) {
    if (!help.contains(event.target)) help.open = false;
    closePanel(event.target);
    const chip = event.target.closest(".mlxdiff-chip");
    if (chip) say(chip.textContent);
    else if (event.target.closest(".mlxdiff-generate")) act(event, "generate");
    else if (event.target.closest(".mlxdiff-compare")) act(event, "compare");
  }

  // Put words at the end of the prompt, as if they were typed.
  function say(words) {
    const prompt = el.closest(".mlxdiff-studio").querySelector("textarea");
    prompt.value = `${prompt.value.trimEnd()} ${words}`.trimStart();
    prompt.dispatchEvent(new Event("input", { bubbles: true }));
    prompt.dispatchEvent(new Event("change", { bubbles: true }));
  }

  // Jupyter may pass the messages of two widgets to two threads of the kernel, so that a click is read before the text
  // that was typed before it. So the settings travel with the request for a run; the button does not send its message.
  async function act(event, action) {
    event.preventDefault();
    event.stopPropagation();
    if (action === "generate") paper.close();
    const box = document.activeElement; // a text box reports typed text only when it loses the focus
    if (box instanceof HTMLInputElement) { box.blur(); box.focus(); }
    if (action === "cancel") return send(action);
    if (action === "compare") closePanel(null);
    await paper.sent(); // what was painted last
    const turn = model.get("turn"); // before the settings, which may only be newer
    send(action, { settings: await settings(), turn });
  }

  // A list cuts off a long entry: its tooltip shows all of it, and what the list is for.
  function entitle({ target }) {
    if (!(target instanceof HTMLSelectElement)) return;
    target.dataset.what ??= target.title || target.closest(".widget-dropdown")?.title || "";
    target.title = [target.selectedOptions[0]?.text, target.dataset.what].filter(Boolean).join(". ");
  }

  async function settings() {
    const values = {};
    for (const [name, id] of Object.entries(model.get("controls"))) {
      const control = await model.widget_manager.get_model(id);
      values[name] = control.get("index") ?? control.get("value");
    }
    return values;
  }

  const over = (event) => { event.preventDefault(); stage.classList.add("mlxdiff-over"); };
  const leave = () => stage.classList.remove("mlxdiff-over");
  const drop = (event) => {
    event.preventDefault();
    event.stopPropagation();
    leave();
    if (event.dataTransfer.files[0]) ask(event.dataTransfer.files[0]);
  };

  // The listeners are on the whole studio, which can be found only once this part of it is on the page.
  const away = new AbortController();
  const arrival = new ResizeObserver(() => {
    const root = el.closest(".mlxdiff-studio");
    if (!root) return;
    arrival.disconnect();
    root.dataset.lmSuppressShortcuts = "true"; // else JupyterLab runs the cell on Ctrl+Enter
    const ground = root.closest(".mlxdiff-page") ?? root; // on its own page it hears every key
    // ipywidgets' text boxes stop key events from bubbling up, so these listeners capture events on their way down.
    ground.addEventListener("keydown", keys, { signal: away.signal, capture: true });
    root.addEventListener("click", clicks, { signal: away.signal, capture: true });
    const listeners = { dragover: over, dragleave: leave, drop, pointerover: entitle };
    for (const [name, listener] of Object.entries(listeners)) {
      ground.addEventListener(name, listener, { signal: away.signal });
    }
    naming.observe(root, { childList: true, subtree: true, attributeFilter: ["class", "title"] });
    name(root);
  });
  arrival.observe(el);

  // ipywidgets' sliders have no accessible name, its toggles do not announce their state, and a control without a tooltip
  // gets "null" as one. This is put right whenever a control is drawn or changes its look.
  const naming = new MutationObserver(() => name(el.closest(".mlxdiff-studio")));
  function name(root) {
    for (const slider of root?.querySelectorAll(".widget-hslider") ?? []) {
      const label = slider.querySelector(".widget-label")?.textContent;
      slider.querySelector(".noUi-handle")?.setAttribute("aria-label", label);
      slider.querySelector(".widget-readout")?.setAttribute("aria-label", `${label}, as a number`);
    }
    for (const toggle of root?.querySelectorAll(".widget-toggle-button") ?? []) {
      const state = toggle.matches(".mlxdiff-unfold") ? "aria-expanded" : "aria-pressed";
      toggle.setAttribute(state, toggle.classList.contains("mod-active"));
    }
    for (const each of root?.querySelectorAll('[title="null"]') ?? []) each.removeAttribute("title");
  }

  const changes = { shown: arrived, history, error: failed, edits: purposes, unpaintable: purposes, sketches: purposes };
  for (const name of ["status", "spoken", "progress", "running"]) changes[name] = update;
  for (const [name, listener] of Object.entries(changes)) model.on(`change:${name}`, listener);
  model.on("msg:custom", receive);
  shown(); history(); failed(); purposes();

  return () => {
    paper.away();
    sharp.away();
    arrival.disconnect();
    naming.disconnect();
    away.abort();
    if (url) URL.revokeObjectURL(url);
    for (const [name, listener] of Object.entries(changes)) model.off(`change:${name}`, listener);
    model.off("msg:custom", receive);
  };
}

export default { render };
