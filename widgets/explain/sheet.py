"""The picture of a lesson on the page. It is a light card in both themes, since figures are dark on white, and it has a
name for screen readers, which ipywidgets' Image lacks."""

from pathlib import Path

import anywidget
import traitlets as t

_HERE = Path(__file__).parent


class Sheet(anywidget.AnyWidget):
    _esm = """
    function render({ model, el }) {
      const image = el.appendChild(document.createElement("img"));
      let url = null;
      function draw() {
        if (url) URL.revokeObjectURL(url);
        url = URL.createObjectURL(new Blob([model.get("value")], { type: "image/png" }));
        if (model.get("value").byteLength) image.src = url;
        image.style.setProperty("--wide", `${model.get("width")}px`);
      }
      const name = () => { image.alt = model.get("alt"); };
      el.classList.add("mlxdiff-figure");
      model.on("change:value", draw);
      model.on("change:alt", name);
      draw(); name();
      const arrival = new ResizeObserver(() => {
        const lesson = el.closest(".mlxdiff-lesson");
        if (!lesson) return;
        arrival.disconnect();
        for (const play of lesson.querySelectorAll(".widget-play")) {
          ["Play, pause", "Stop", "Play again and again"].forEach((does, i) => { play.children[i].title ||= does; });
        }
      });
      arrival.observe(el);
      return () => {
        arrival.disconnect();
        URL.revokeObjectURL(url);
        model.off("change:value", draw);
        model.off("change:alt", name);
      };
    }
    export default { render };
    """
    _css = "".join((_HERE / name).read_text(encoding="utf-8") for name in ("../theme.css", "lesson.css"))

    value = t.Bytes().tag(sync=True)  # a PNG
    width = t.Int().tag(sync=True)  # pixels, at most
    alt = t.Unicode().tag(sync=True)

    def show(self, png: bytes, width: int, alt: str) -> None:
        with self.hold_sync():
            self.value, self.width, self.alt = png, width, alt
