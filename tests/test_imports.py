"""The direction of the imports, held module by module to the table below (reference: the README's map), read with ast.
Reading down the table, a module may import what stands above it, never what stands below."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NONE: set[str] = set()

# module -> what of mlxdiff it may import
MAY = {
    "mlxdiff.errors": NONE,
    "mlxdiff.foreign": {"mlxdiff.errors"},
    "mlxdiff.adapters": set(),
    "mlxdiff.arguments": {"mlxdiff.errors"},
    "mlxdiff.spelling": NONE,
    "mlxdiff.blas": NONE,
    "mlxdiff.builtin": {"mlxdiff.errors"},
    "mlxdiff": {"mlxdiff.blas", "mlxdiff.errors", "mlxdiff.guides", "mlxdiff.pipeline", "mlxdiff.request"},
    "mlxdiff.dialects": {"mlxdiff", "mlxdiff.errors"},
    "mlxdiff.models": NONE,
    "mlxdiff.models.layers": NONE,
    "mlxdiff.models.*": {"mlxdiff.models.layers"},
    "mlxdiff.models.controlnet": {"mlxdiff.models.layers", "mlxdiff.models.unet"},
    "mlxdiff.models.flux_controlnet": {
        "mlxdiff.models.controlnet",
        "mlxdiff.models.flux",
        "mlxdiff.models.layers",
    },
    "mlxdiff.models.sd3_controlnet": {"mlxdiff.models.layers", "mlxdiff.models.sd3"},
    "mlxdiff.models.t2i": {"mlxdiff.models.unet"},
    "mlxdiff.models.flux2": {"mlxdiff.models.flux", "mlxdiff.models.layers"},
    "mlxdiff.models.zimage": {"mlxdiff.models.flux", "mlxdiff.models.layers", "mlxdiff.models.qwen3"},
    "mlxdiff.models.vision": {"mlxdiff.models.clip"},
    "mlxdiff.models.ip_adapter": {"mlxdiff.models.layers", "mlxdiff.models.vision"},
    "mlxdiff.models.redux": {"mlxdiff.models.vision"},
    "mlxdiff.models.build": {"mlxdiff.errors", "mlxdiff.foreign", "mlxdiff.models.*"},
    "mlxdiff.noise": {"mlxdiff.errors"},
    "mlxdiff.schedules": {"mlxdiff.errors"},
    "mlxdiff.samplers": {"mlxdiff.errors", "mlxdiff.schedules"},
    "mlxdiff.guidance": {"mlxdiff.errors", "mlxdiff.schedules"},
    "mlxdiff.tokenizers": {"mlxdiff.errors", "mlxdiff.foreign"},
    "mlxdiff.guides": {"mlxdiff.errors"},
    "mlxdiff.request": {
        "mlxdiff.arguments",
        "mlxdiff.dialects",
        "mlxdiff.errors",
        "mlxdiff.foreign",
        "mlxdiff.guides",
        "mlxdiff.noise",
        "mlxdiff.samplers",
        "mlxdiff.schedules",
    },
    "mlxdiff.images": {"mlxdiff.dialects", "mlxdiff.errors", "mlxdiff.foreign", "mlxdiff.request"},
    "mlxdiff.result": {"mlxdiff.foreign", "mlxdiff.images", "mlxdiff.request"},
    "mlxdiff.families.base": {"mlxdiff.models.build", "mlxdiff.request"},
    "mlxdiff.families.published": {"mlxdiff.families.base", "mlxdiff.models.*"},
    # A family's file: its own network, and what several families share.
    "mlxdiff.families.*": {
        "mlxdiff.errors",
        "mlxdiff.families.base",
        "mlxdiff.families.published",
        "mlxdiff.models.*",
        "mlxdiff.request",
    },
    "mlxdiff.families": {"mlxdiff.families.*"},
    "mlxdiff.recipe": {"mlxdiff.errors", "mlxdiff.families", "mlxdiff.families.base"},
    "mlxdiff.weights": {
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.foreign",
        "mlxdiff.models.build",
        "mlxdiff.recipe",
    },
    "mlxdiff.description": {
        "mlxdiff.families.published",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.families.base",
        "mlxdiff.foreign",
        "mlxdiff.guides",
        "mlxdiff.models.build",
        "mlxdiff.models.vae",
        "mlxdiff.recipe",
        "mlxdiff.request",
        "mlxdiff.samplers",
        "mlxdiff.schedules",
        "mlxdiff.seal",
        "mlxdiff.tokenizers",
    },
    "mlxdiff.seal": {"mlxdiff.errors", "mlxdiff.foreign"},
    "mlxdiff.conditioning": {
        "mlxdiff.adapters",
        "mlxdiff.errors",
        "mlxdiff.guides",
        "mlxdiff.models.controlnet",
        "mlxdiff.models.flux_controlnet",
        "mlxdiff.models.sd3_controlnet",
        "mlxdiff.description",
        "mlxdiff.families.base",
        "mlxdiff.models.layers",
        "mlxdiff.models.qwen3",
        "mlxdiff.models.t2i",
        "mlxdiff.models.t5",
        "mlxdiff.request",
        "mlxdiff.tokenizers",
        "mlxdiff.models.clip",
    },
    "mlxdiff.networks": {
        "mlxdiff.adapters",
        "mlxdiff.blas",
        "mlxdiff.description",
        "mlxdiff.models.layers",
        "mlxdiff.weights",
    },
    "mlxdiff.memory": {
        "mlxdiff.models.vae",
        "mlxdiff.description",
        "mlxdiff.families",
        "mlxdiff.models.build",
        "mlxdiff.recipe",
        "mlxdiff.request",
    },
    "mlxdiff.pictures": {
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.families.base",
        "mlxdiff.images",
        "mlxdiff.request",
    },
    "mlxdiff.start": {
        "mlxdiff.images",
        "mlxdiff.memory",
        "mlxdiff.networks",
        "mlxdiff.pictures",
        "mlxdiff.request",
        "mlxdiff.result",
        "mlxdiff.schedules",
    },
    "mlxdiff.advice": {
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.memory",
        "mlxdiff.pictures",
        "mlxdiff.recipe",
        "mlxdiff.request",
    },
    "mlxdiff.convert.*": {
        "mlxdiff.adapters",
        "mlxdiff.convert.*",
        "mlxdiff.description",
        "mlxdiff.dialects",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.families.*",
        "mlxdiff.foreign",
        "mlxdiff.models.*",
        "mlxdiff.recipe",
        "mlxdiff.weights",
    },
    "mlxdiff.convert": {"mlxdiff.convert.*"},
    "mlxdiff.convert.tokenizer": {
        "mlxdiff.convert.*",
        "mlxdiff.errors",
        "mlxdiff.foreign",
        "mlxdiff.models.build",
        "mlxdiff.tokenizers",
    },
    "mlxdiff.convert.inspect": {
        "mlxdiff.convert.*",
        "mlxdiff.console",
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.models.build",
        "mlxdiff.recipe",
        "mlxdiff.spelling",
        "mlxdiff.store",
        "mlxdiff.weights",
    },
    "mlxdiff.convert.__main__": {
        "mlxdiff.convert.*",
        "mlxdiff.console",
        "mlxdiff.families",
        "mlxdiff.recipe",
        "mlxdiff.request",
        "mlxdiff.spelling",
        "mlxdiff.store",
        "mlxdiff.store.tokenizer",
    },
    "mlxdiff.store.hub": {"mlxdiff.errors"},
    "mlxdiff.store.cache": {"mlxdiff.description", "mlxdiff.errors", "mlxdiff.foreign", "mlxdiff.recipe"},
    "mlxdiff.store.tokenizer": {
        "mlxdiff.convert",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.store.cache",
        "mlxdiff.store.hub",
        "mlxdiff.tokenizers",
    },
    "mlxdiff.store.references": {
        "mlxdiff.convert",
        "mlxdiff.convert.settings",
        "mlxdiff.convert.vision",
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.families.published",
        "mlxdiff.memory",
        "mlxdiff.models.*",
        "mlxdiff.store",
        "mlxdiff.store.hub",
    },
    "mlxdiff.store": {
        "mlxdiff.adapters",
        "mlxdiff.builtin",
        "mlxdiff.convert.*",
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.foreign",
        "mlxdiff.models.build",
        "mlxdiff.recipe",
        "mlxdiff.seal",
        "mlxdiff.store.*",
        "mlxdiff.weights",
    },
    "mlxdiff.store.__main__": {
        "mlxdiff.console",
        "mlxdiff.description",
        "mlxdiff.seal",
        "mlxdiff.errors",
        "mlxdiff.store",
        "mlxdiff.store.cache",
    },
    "mlxdiff.references": {
        "mlxdiff.conditioning",
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.guides",
        "mlxdiff.images",
        "mlxdiff.models.ip_adapter",
        "mlxdiff.models.redux",
        "mlxdiff.models.vision",
        "mlxdiff.recipe",
        "mlxdiff.request",
        "mlxdiff.result",
        "mlxdiff.store.references",
    },
    "mlxdiff.attached": {
        "mlxdiff.detect",
        "mlxdiff.memory",
        "mlxdiff.references",
        "mlxdiff.adapters",
        "mlxdiff.conditioning",
        "mlxdiff.description",
        "mlxdiff.dialects",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.guides",
        "mlxdiff.images",
        "mlxdiff.models.build",
        "mlxdiff.models.controlnet",
        "mlxdiff.request",
        "mlxdiff.store",
    },
    "mlxdiff.detect": {
        "mlxdiff.console",
        "mlxdiff.errors",
        "mlxdiff.images",
        "mlxdiff.models.depth",
        "mlxdiff.store",
    },
    "mlxdiff.detect.__main__": {
        "mlxdiff.console",
        "mlxdiff.detect",
        "mlxdiff.foreign",
        "mlxdiff.generate",
        "mlxdiff.images",
    },
    "mlxdiff.upscale": {
        "mlxdiff.advice",
        "mlxdiff.errors",
        "mlxdiff.images",
        "mlxdiff.memory",
        "mlxdiff.networks",
        "mlxdiff.recipe",
        "mlxdiff.store",
    },
    "mlxdiff.upscale.__main__": {
        "mlxdiff.console",
        "mlxdiff.errors",
        "mlxdiff.foreign",
        "mlxdiff.generate",
        "mlxdiff.images",
        "mlxdiff.recipe",
        "mlxdiff.result",
        "mlxdiff.upscale",
    },
    "mlxdiff.pipeline": {
        "mlxdiff.attached",
        "mlxdiff.references",
        "mlxdiff.guides",
        "mlxdiff.models.controlnet",
        "mlxdiff.advice",
        "mlxdiff.arguments",
        "mlxdiff.builtin",
        "mlxdiff.conditioning",
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.guidance",
        "mlxdiff.images",
        "mlxdiff.memory",
        "mlxdiff.networks",
        "mlxdiff.noise",
        "mlxdiff.pictures",
        "mlxdiff.recipe",
        "mlxdiff.request",
        "mlxdiff.result",
        "mlxdiff.samplers",
        "mlxdiff.schedules",
        "mlxdiff.start",
        "mlxdiff.store",
        "mlxdiff.upscale",
    },
    "mlxdiff.probe": {
        "mlxdiff.conditioning",
        "mlxdiff.errors",
        "mlxdiff.families.base",
        "mlxdiff.images",
        "mlxdiff.models.layers",
        "mlxdiff.pipeline",
        "mlxdiff.request",
        "mlxdiff.samplers",
        "mlxdiff.schedules",
        "mlxdiff.tokenizers",
    },
    "mlxdiff.console": {"mlxdiff.arguments", "mlxdiff.errors", "mlxdiff.foreign", "mlxdiff.spelling"},
    "mlxdiff.catalogue": {
        "mlxdiff.advice",
        "mlxdiff.builtin",
        "mlxdiff.console",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.memory",
        "mlxdiff.recipe",
    },
    "mlxdiff.generate": {
        "mlxdiff.guides",
        "mlxdiff",
        "mlxdiff.builtin",
        "mlxdiff.console",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.families.base",
        "mlxdiff.images",
        "mlxdiff.pipeline",
        "mlxdiff.recipe",
        "mlxdiff.request",
        "mlxdiff.samplers",
        "mlxdiff.schedules",
    },
    "mlxdiff.bench.random_model": {
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.families.base",
        "mlxdiff.models.build",
        "mlxdiff.networks",
        "mlxdiff.pipeline",
        "mlxdiff.recipe",
        "mlxdiff.tokenizers",
        "mlxdiff.weights",
    },
    "mlxdiff.bench.step": NONE,
    "mlxdiff.bench.start": {"mlxdiff.bench.step", "mlxdiff.errors", "mlxdiff.request"},
    "mlxdiff.bench.against_torch": {
        "mlxdiff.bench.step",
        "mlxdiff.errors",
        "mlxdiff.models.unet",
        "mlxdiff.pipeline",
        "mlxdiff.request",
    },
    "mlxdiff.bench": NONE,
    "mlxdiff.bench.__main__": {
        "mlxdiff",
        "mlxdiff.bench.*",
        "mlxdiff.console",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.families.base",
        "mlxdiff.pipeline",
        "mlxdiff.recipe",
        "mlxdiff.request",
    },
    "mlxdiff.__main__": {"mlxdiff", "mlxdiff.errors"},
    "mlxdiff.train.storybook": {"mlxdiff.train.storybook.*"},
    "mlxdiff.train.storybook.*": {"mlxdiff.train.storybook.*"},
    "mlxdiff.train.*": {
        "mlxdiff.errors",
        "mlxdiff.foreign",
        "mlxdiff.guidance",
        "mlxdiff.families",
        "mlxdiff.models.*",
        "mlxdiff.samplers",
        "mlxdiff.schedules",
        "mlxdiff.tokenizers",
        "mlxdiff.train.*",
    },
    "mlxdiff.train.folder": {"mlxdiff.errors", "mlxdiff.foreign", "mlxdiff.images"},
    "mlxdiff.train.lora": {"mlxdiff.adapters", "mlxdiff.description", "mlxdiff.errors", "mlxdiff.train.fit"},
    "mlxdiff.train.inversion": {
        "mlxdiff.adapters",
        "mlxdiff.conditioning",
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.pipeline",
        "mlxdiff.request",
        "mlxdiff.train.*",
    },
    "mlxdiff.train.tune": {
        "mlxdiff.conditioning",
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.foreign",
        "mlxdiff.families.base",
        "mlxdiff.images",
        "mlxdiff.networks",
        "mlxdiff.pipeline",
        "mlxdiff.request",
        "mlxdiff.samplers",
        "mlxdiff.schedules",
        "mlxdiff.train.*",
    },
    "mlxdiff.train.measure": {"mlxdiff.pipeline", "mlxdiff.probe", "mlxdiff.train.*"},
    "mlxdiff.train.__main__": {
        "mlxdiff",
        "mlxdiff.blas",
        "mlxdiff.console",
        "mlxdiff.errors",
        "mlxdiff.images",
        "mlxdiff.recipe",
        "mlxdiff.request",
        "mlxdiff.train.*",
    },
    "mlxdiff.widgets": {"mlxdiff.console", "mlxdiff.errors", "mlxdiff.widgets.*"},
    "mlxdiff.widgets.gallery": {"mlxdiff.errors", "mlxdiff.images", "mlxdiff.pictures", "mlxdiff.request"},
    "mlxdiff.widgets.previews": {"mlxdiff.images", "mlxdiff.pipeline"},
    "mlxdiff.widgets.worker": {
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.pipeline",
        "mlxdiff.request",
        "mlxdiff.widgets.previews",
    },
    "mlxdiff.widgets.start_picture": {"mlxdiff.errors", "mlxdiff.images", "mlxdiff.widgets.gallery"},
    "mlxdiff.widgets.history": {
        "mlxdiff.errors",
        "mlxdiff.images",
        "mlxdiff.widgets.gallery",
        "mlxdiff.widgets.start_picture",
        "mlxdiff.widgets.view",
    },
    "mlxdiff.widgets.guide_rows": {
        "mlxdiff.console",
        "mlxdiff.guides",
        "mlxdiff.images",
        "mlxdiff.widgets.start_picture",
    },
    "mlxdiff.widgets.second_pictures": {
        "mlxdiff.detect",
        "mlxdiff.errors",
        "mlxdiff.guides",
        "mlxdiff.widgets.gallery",
        "mlxdiff.widgets.guide_rows",
        "mlxdiff.widgets.painting",
        "mlxdiff.widgets.settings",
        "mlxdiff.widgets.start_picture",
    },
    "mlxdiff.widgets.painting": {
        "mlxdiff.errors",
        "mlxdiff.images",
        "mlxdiff.pictures",
        "mlxdiff.request",
        "mlxdiff.widgets.settings",
        "mlxdiff.widgets.start_picture",
        "mlxdiff.widgets.view",
    },
    "mlxdiff.widgets.known": {
        "mlxdiff.advice",
        "mlxdiff.description",
        "mlxdiff.families",
        "mlxdiff.images",
        "mlxdiff.memory",
        "mlxdiff.recipe",
        "mlxdiff.request",
    },
    "mlxdiff.widgets.settings": {
        "mlxdiff.advice",
        "mlxdiff.description",
        "mlxdiff.dialects",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.families.base",
        "mlxdiff.guides",
        "mlxdiff.images",
        "mlxdiff.memory",
        "mlxdiff.request",
        "mlxdiff.samplers",
        "mlxdiff.widgets.known",
    },
    "mlxdiff.widgets.controls": {
        "mlxdiff.builtin",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.recipe",
        "mlxdiff.request",
        "mlxdiff.samplers",
        "mlxdiff.schedules",
        "mlxdiff.widgets.guide_rows",
        "mlxdiff.widgets.known",
        "mlxdiff.widgets.settings",
        "mlxdiff.widgets.start_picture",
    },
    "mlxdiff.widgets.view": {
        "mlxdiff.errors",
        "mlxdiff.spelling",
        "mlxdiff.widgets.gallery",
        "mlxdiff.widgets.worker",
    },
    "mlxdiff.widgets.studio": {
        "mlxdiff.builtin",
        "mlxdiff.description",
        "mlxdiff.errors",
        "mlxdiff.families",
        "mlxdiff.images",
        "mlxdiff.request",
        "mlxdiff.widgets.*",
    },
    "mlxdiff.widgets.explain": {"mlxdiff.widgets.explain.*"},
    "mlxdiff.widgets.explain.lesson": {"mlxdiff.families", "mlxdiff.widgets.explain.sheet", "mlxdiff.widgets.worker"},
    "mlxdiff.widgets.explain.*": {
        "mlxdiff.errors",
        "mlxdiff.images",
        "mlxdiff.probe",
        "mlxdiff.schedules",
        "mlxdiff.train.*",
        "mlxdiff.widgets.explain.*",
    },
    "mlxdiff.widgets.server": set(),
    "mlxdiff.widgets.lab": {"mlxdiff.console", "mlxdiff.errors", "mlxdiff.store"},
    "mlxdiff.widgets.app": {
        "mlxdiff.console",
        "mlxdiff.store",
        "mlxdiff.widgets",
        "mlxdiff.widgets.lab",
        "mlxdiff.widgets.server",
        "mlxdiff.widgets.studio",
    },
    "mlxdiff.widgets.lessons": {"mlxdiff", "mlxdiff.console", "mlxdiff.errors", "mlxdiff.widgets.lab"},
}
ORACLES = {"torch", "diffusers", "transformers", "peft", "accelerate", "scipy"}
THIRD_PARTY = {
    "mlx",
    "numpy",
    "PIL",
    "huggingface_hub",
    "safetensors",
    "gguf",
    "tokenizers",
    "tqdm",
    "ipywidgets",
    "anywidget",
    "comm",
    "tornado",
    "traitlets",
    "matplotlib",
    "cv2",
    "IPython",
    "jupyterlab",
    "jupyter_client",
    "jupyter_core",
    "nbformat",
    "sentencepiece",
    "typing_extensions",  # for type checkers alone, which bring it
}


def modules() -> dict[str, Path]:
    found = {}
    for top, name in (("mlxdiff", "mlxdiff"), ("convert", "mlxdiff.convert"), ("widgets", "mlxdiff.widgets")):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = [name, *path.relative_to(ROOT / top).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Every module the file imports, relative ones made absolute; `from . import a, b` gives a and b."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    known, out = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                out.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
    return out


def row(name: str) -> set[str]:
    return MAY[name] if name in MAY else MAY[name.rpartition(".")[0] + ".*"]


def allowed(target: str, rows: set[str]) -> bool:
    package = target.rpartition(".")[0] + ".*"
    return target in rows or package in rows or f"{target}.*" in rows


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_its_row_allows(name):
    for target in imports(name, modules()[name]):
        if target.split(".")[0] == "mlxdiff":
            assert target == name or allowed(target, row(name)), f"{name} imports {target}"
        else:
            top = target.split(".")[0]
            assert top not in ORACLES, f"{name} imports the test oracle {top}"
            assert top in THIRD_PARTY or top in sys.stdlib_module_names, f"{name} imports {top}"


def test_only_the_store_calls_convert():
    for name, path in modules().items():
        # The search for tokenizers is the store's, and names convert's Checkpoint in its types alone.
        stores = ("mlxdiff.store", "mlxdiff.store.references", "mlxdiff.store.tokenizer")
        if not name.startswith("mlxdiff.convert") and name not in stores:
            assert not any(t.startswith("mlxdiff.convert") for t in imports(name, path)), name


def test_the_check_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from ..pipeline import load\nimport torch\n")
    found = imports("mlxdiff.models.bad", bad)
    assert found == {"mlxdiff.pipeline", "torch"}
    assert not allowed("mlxdiff.pipeline", row("mlxdiff.models.bad"))
