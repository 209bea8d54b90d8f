"""The picture of a lesson on the page. It is a light card in both themes, since figures are dark on white, and it has a
name for screen readers, which ipywidgets' Image lacks."""

import anywidget
import traitlets as t


class Sheet(anywidget.AnyWidget):
    _esm = """
    function render({ model, el }) {
      const image = el.appendChild(document.createElement("img"));
      let url = null;
      function draw() {
        if (url) URL.revokeObjectURL(url);
        url = URL.createObjectURL(new Blob([model.get("value")], { type: "image/png" }));
        if (model.get("value").byteLength) image.src = url;
        image.width = model.get("width");
      }
      const name = () => { image.alt = model.get("alt"); };
      el.classList.add("mlxdiff-sheet");
      model.on("change:value", draw);
      model.on("change:alt", name);
      draw(); name();
      return () => {
        URL.revokeObjectURL(url);
        model.off("change:value", draw);
        model.off("change:alt", name);
      };
    }
    export default { render };
    """
    _css = """
    .mlxdiff-sheet {
      box-sizing: border-box;
      width: fit-content;
      max-width: 100%;
      margin: 4px 2px;
      padding: 12px;
      border-radius: 10px;
      background: #fff;
    }
    .mlxdiff-lesson .jupyter-widgets { max-width: calc(100% - 4px); } /* their margins */
    .mlxdiff-sheet img { display: block; max-width: 100%; height: auto; }
    """

    value = t.Bytes().tag(sync=True)  # a PNG
    width = t.Int().tag(sync=True)  # pixels, where there is room
    alt = t.Unicode().tag(sync=True)

    def show(self, png: bytes, width: int, alt: str) -> None:
        with self.hold_sync():
            self.value, self.width, self.alt = png, width, alt
