// The page of server.py: it shows ipywidgets without Jupyter, those kinds that the studio uses. They get the classes that
// Jupyter gives them, so that studio.css fits both.

import studio from "./studio.js";

const socket = new WebSocket(`ws://${location.host}/wire`);
socket.binaryType = "arraybuffer";

// --- models: what Python says of each widget

const models = new Map();

class Model {
  state = {};
  listeners = new Map();

  constructor(id) {
    this.id = id;
    this.widget_manager = { get_model: async (id) => models.get(id) };
  }

  get(name) { return this.state[name]; }

  on(event, listener) {
    if (!this.listeners.has(event)) this.listeners.set(event, new Set());
    this.listeners.get(event).add(listener);
  }

  off(event, listener) { this.listeners.get(event)?.delete(listener); }

  tell(event, ...facts) { for (const listener of [...this.listeners.get(event) ?? []]) listener(...facts); }

  send(content, _, buffers = []) { post(this.id, { method: "custom", content }, buffers); }

  // A person changed this.
  put(name, value) {
    if (this.state[name] === value) return;
    this.take({ [name]: value });
    post(this.id, { method: "update", state: { [name]: value }, buffer_paths: [] });
  }

  take(state) {
    Object.assign(this.state, state);
    for (const name of Object.keys(state)) this.tell(`change:${name}`);
  }
}

const named = (reference) => models.get(reference.replace("IPY_MODEL_", ""));

// --- messages: JSON, then as many binary ones as it says

function post(id, data, buffers = []) {
  if (socket.readyState !== WebSocket.OPEN) return;
  socket.send(JSON.stringify({ id, data, buffers: buffers.length }));
  for (const buffer of buffers) socket.send(buffer);
}

let head = null, parts = [];
socket.onmessage = ({ data }) => {
  if (typeof data === "string") [head, parts] = [JSON.parse(data), []];
  else parts.push(data);
  if (parts.length === head.buffers) receive(head.id, head.data, parts);
};

function receive(id, data, buffers) {
  if (data.method === "show") return show(models.get(id));
  if (data.method === "close") return models.delete(id);
  if (!models.has(id)) models.set(id, new Model(id));
  if (data.method === "custom") return models.get(id).tell("msg:custom", data.content, buffers);
  (data.buffer_paths ?? []).forEach((path, i) => {
    const last = path.pop();
    path.reduce((place, name) => place[name], data.state)[last] = buffers[i];
  });
  models.get(id).take(data.state);
}

// A studio that was started again has another address. The same one, after the machine slept, is still there.
socket.onclose = () => {
  document.querySelector(".mlxdiff-lost").hidden = false;
  setInterval(async () => { if ((await fetch("/", { method: "HEAD" }).catch(() => null))?.ok) location.reload(); }, 2000);
};

// --- views: an element for each widget

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Call `apply` with the values of these traits, now and at every change.
function follow(model, names, apply) {
  const now = () => apply(...names.map((name) => model.get(name)));
  for (const name of names) model.on(`change:${name}`, now);
  now();
}

const elements = new Map(); // model -> its element; every widget is shown once
function view(model) {
  if (!elements.has(model)) elements.set(model, draw(model));
  return elements.get(model);
}

function draw(model) {
  const element = KINDS[model.get("_view_name")](model);
  element.classList.add("jupyter-widgets");
  let given = [];
  follow(model, ["_dom_classes"], (classes) => {
    element.classList.remove(...given);
    element.classList.add(...(given = classes));
  });
  follow(named(model.get("layout")), ["display"], (display) => { element.style.display = display ?? ""; });
  follow(model, ["tooltip"], (tooltip) => { if (tooltip) element.title = tooltip; });
  return element;
}

function box(kind) {
  return (model) => {
    const element = h("div", { class: `widget-box ${kind}` });
    follow(model, ["children"], (children) => element.replaceChildren(...children.map((each) => view(named(each)))));
    return element;
  };
}

// A control under its label.
function field(kind, model, control) {
  control.id = model.id;
  const label = h("label", { class: "widget-label", for: model.id });
  follow(model, ["description"], (text) => { label.textContent = text; label.hidden = !text; });
  follow(model, ["disabled"], (disabled) => { control.disabled = disabled; });
  return h("div", { class: kind }, label, control);
}

function text(kind, tag) {
  return (model) => {
    const control = h(tag, tag === "input" ? { type: "text" } : { rows: model.get("rows") });
    follow(model, ["value"], (value) => { if (control.value !== value) control.value = value; });
    follow(model, ["placeholder"], (words) => { control.placeholder = words ?? ""; });
    control.addEventListener(model.get("continuous_update") ? "input" : "change", () => model.put("value", control.value));
    return field(kind, model, control);
  };
}

// A text box that offers some values.
function combobox(model) {
  const element = text("widget-text", "input")(model), offers = h("datalist", { id: `${model.id}-offers` });
  follow(model, ["options"], (options) => offers.replaceChildren(...options.map((value) => h("option", { value }))));
  element.querySelector("input").setAttribute("list", offers.id);
  element.append(offers);
  return element;
}

const number = (whole) => (model) => {
  const control = h("input", { type: "number" }); // it has no min, from which its arrows would count the steps
  follow(model, ["step"], (step) => { control.step = step; });
  follow(model, ["value"], (value) => { control.value = value; });
  control.addEventListener("change", () => {
    const typed = whole ? Math.round(control.valueAsNumber) : control.valueAsNumber;
    const value = Math.min(Math.max(typed, model.get("min")), model.get("max"));
    if (Number.isFinite(value)) model.put("value", value);
    control.value = model.get("value");
  });
  return field("widget-text", model, control);
};

function slider(model) {
  const control = h("input", { type: "range" }), readout = h("output", { class: "widget-readout", for: model.id });
  follow(model, ["min", "max", "step"], (...limits) => { [control.min, control.max, control.step] = limits; });
  const digits = Number(/\.(\d)f/.exec(model.get("readout_format"))?.[1] ?? 0);
  follow(model, ["value", "max"], (value) => {
    control.value = value;
    control.style.setProperty("--part", `${100 * (value - control.min) / (control.max - control.min)}%`);
    readout.textContent = value.toFixed(digits);
  });
  control.addEventListener("input", () => model.put("value", control.valueAsNumber));
  const element = field("widget-hslider", model, control);
  element.append(readout);
  return element;
}

function list(model) {
  const control = h("select");
  follow(model, ["_options_labels", "index"], (labels, index) => {
    control.replaceChildren(...labels.map((label) => h("option", {}, label)));
    control.selectedIndex = index ?? -1;
  });
  control.addEventListener("change", () => model.put("index", control.selectedIndex));
  return field("widget-dropdown", model, control);
}

function button(kind, click) {
  return (model) => {
    const element = h("button", { type: "button", class: `jupyter-button ${kind}` });
    follow(model, ["description"], (words) => { element.textContent = words; });
    follow(model, ["disabled"], (disabled) => { element.disabled = disabled; });
    follow(model, ["button_style"], (style) => element.classList.toggle("mod-primary", style === "primary"));
    follow(model, ["value"], (on) => element.classList.toggle("mod-active", Boolean(on)));
    element.addEventListener("click", () => click(model));
    return element;
  };
}

function html(model) {
  const content = h("div", { class: "widget-html-content" });
  follow(model, ["value"], (value) => { content.innerHTML = value; });
  return h("div", { class: "widget-html" }, content);
}

function any(model) {
  const element = h("div");
  studio.render({ model, el: element });
  return element;
}

const KINDS = {
  HBoxView: box("widget-hbox"),
  VBoxView: box("widget-vbox"),
  TextView: text("widget-text", "input"),
  ComboboxView: combobox,
  TextareaView: text("widget-textarea", "textarea"),
  IntTextView: number(true),
  FloatTextView: number(false),
  IntSliderView: slider,
  FloatSliderView: slider,
  DropdownView: list,
  ButtonView: button("widget-button", (model) => model.send({ event: "click" })),
  ToggleButtonView: button("widget-toggle-button", (model) => model.put("value", !model.get("value"))),
  HTMLView: html,
  AnyView: any,
};

function show(model) {
  document.body.append(view(model));
}
