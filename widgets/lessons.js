// An extension of JupyterLab, for the server of `mlxdiff lessons` alone. A lesson that is opened runs by itself if its
// code is to the letter that of the package; one that was changed runs when its button is pressed.

const LESSONS = {}; // file -> the code of its cells; lessons.py writes it here

async function meet(app, panel, met) {
  if (!panel?.sessionContext || !panel.context || met.has(panel)) return;
  met.add(panel);
  await panel.context.ready;
  const own = LESSONS[panel.context.path.split("/").pop()];
  if (own === undefined) return;
  await panel.sessionContext.ready;
  const run = async () => {
    app.shell.activateById(panel.id);
    const done = app.commands.execute("notebook:run-all-cells");
    panel.content.activeCellIndex = 0; // running them has gone to the last
    await panel.content.scrollToItem?.(0);
    await done;
  };
  const cells = panel.context.model.sharedModel.cells.filter((cell) => cell.cell_type === "code");
  if (JSON.stringify(cells.map((cell) => cell.source)) === JSON.stringify(own)) return run();
  const button = document.createElement("button");
  button.textContent = "Run this lesson";
  button.className = "mlxdiff-run-lesson";
  Object.assign(button.style, {
    position: "absolute", zIndex: 10, right: "28px", bottom: "28px", padding: "14px 22px", border: 0, borderRadius: "10px",
    background: "var(--jp-brand-color1, #1f66d0)", color: "#fff", font: "600 15px system-ui, sans-serif", cursor: "pointer",
  });
  button.onclick = () => { button.remove(); run(); };
  panel.node.append(button);
}

function activate(app) {
  const met = new WeakSet();
  const style = document.createElement("style"); // lines that an eye finds its way back from
  style.textContent = ".jp-MarkdownCell .jp-RenderedHTMLCommon > :not(table, pre) { max-width: 680px; }";
  document.head.append(style);
  app.shell.currentChanged.connect((_, { newValue }) => meet(app, newValue, met));
  app.restored.then(() => meet(app, app.shell.currentWidget, met));
}

const plugin = { id: "mlxdiff-lessons:start", autoStart: true, activate };
window._JUPYTERLAB = window._JUPYTERLAB ?? {};
window._JUPYTERLAB["mlxdiff-lessons"] = { init() {}, get: async () => () => plugin };
