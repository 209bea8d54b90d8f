"""The networks that guide a model: what names mean for controls and references, and the networks of controls, which are
checked against the model that draws and read where they are."""

from pathlib import Path

import mlx.nn as nn

from .. import builtin, recipe, weights
from ..description import Description
from ..errors import Error, did_you_mean
from ..families import ADAPTERS, MODELS, Beside, fitting
from ..models import build
from . import HUB_ID, Progress, fingerprint, local, one_file, silent

_ROLES = {  # -> what people call such a network, how it is given, what else a name may be
    "control": ("a network for control pictures", "`controls=[(MODEL, PICTURE)]`", "a hub id (org/repo), a folder"),
    "reference": ("a network for references", "`references=[(MODEL, PICTURE)]`", "a folder"),
    "lora": ("a LoRA", "`loras=[NAME]`", "a file"),
    "word": ("an embedding", "`embeddings=[NAME]`", "a file"),
}


def row(name: str | Path | None, model: Description, role: str) -> Beside | None:
    """The published network that a name means for a model, if it means one and no file. Raises if it is one for the
    other role, or for a model of another size."""
    found = ADAPTERS.get((model.family.name, str(name)))
    if found is None or local(name) is not None:
        return None
    if found.role != role:
        problem = f"{name} is {_ROLES[found.role][0]} ({found.kind}), not {_ROLES[role][0]}."
        raise Error(problem, f"Give it as {_ROLES[found.role][1]}.")
    if not found.fits(model.net):
        fit = [n for n, m in MODELS.items() if m.family is model.family and found.fits(m.networks[m.family.denoiser])]
        what = found.repo or f"a {found.kind} of the package"
        problem = f"{name} is {what}, which was made for {', '.join(fit)}: it does not fit {model.name}."
        ours = ", ".join(fitting(model.family, model.net, role))
        also = f"{model.name} has {ours}; or give" if ours else "Give"
        raise Error(problem, f"{also} the file of a network that was made for {model.name}.")
    return found


def locate(name: str | Path, model: Description, role: str) -> Path | tuple[str, str | None]:
    """What a name means: a file or folder, or a hub repository and perhaps one file of it. Nothing is fetched."""
    path = local(name)
    if path is not None:
        return path
    found = row(name, model, role)
    if found is not None:
        return builtin.FOLDER.parent / found.file if found.repo is None else (found.repo, found.file)
    match = HUB_ID.fullmatch(str(name))
    if match is not None:
        return match[1], match[2]
    known = [*fitting(model.family, model.net, role)]
    names = f"{model.name} has {', '.join(known)}; or give" if known else "Give"
    fix = f"{did_you_mean(str(name), known)}{names} {_ROLES[role][2]} or a .safetensors file."
    raise Error(f"There is no {role} network, file or folder {str(name)!r}.", fix)


def control_folder(name: str | Path, model: Description, offline: bool, progress: Progress | None) -> Path:
    """Where a control's network is. From the hub it is fetched once."""
    found = locate(name, model, "control")
    if isinstance(found, Path):
        return found
    repo, file = found
    progress = silent if progress is None else progress
    if file is not None:
        return one_file(repo, file, offline, progress)
    return one_network(repo, model.recipe.dtype != "float32", offline, progress)


def control(path: Path, model: Description) -> tuple[build.Config, str]:
    """The Config of a network that guides a model, and a fingerprint of its files. Raises unless it fits this model and
    every tensor has its place. This reads headers only."""
    from .. import convert

    checkpoint = None if (path / "model.json").is_file() else convert.open(path)
    kind = None if checkpoint is None else checkpoint.family
    if kind not in build.GUIDES:
        alone = checkpoint is not None and checkpoint.layout.family is None
        what = checkpoint.layout.title if alone else "a model"
        problem = f"{path} is {what}, not a network that reads a control picture."
        raise Error(problem, "Give a ControlNet or a T2I-Adapter; a model to draw with is given as `model=FILE`.")
    convert.check(checkpoint)
    component = checkpoint.components[kind]
    wrong = build.GUIDES[kind](component.config, model.net, model.factor)
    if wrong:
        made_for = f"Use one that was made for {model.family.title}."
        raise Error(f"{path} is {checkpoint.layout.title} that {wrong}: it does not fit {model.name}.", made_for)
    files = {piece.tensor.file for weight in component.weights.values() for piece in weight.pieces}
    return component.config, fingerprint(*sorted(files))


def control_network(path: Path, model: Description) -> nn.Module:
    """A network that guides a model, with its weights as the model's are stored. No converted copy is kept."""
    from .. import convert

    (network,) = convert.read(path, recipe.DTYPES[model.recipe.dtype]).values()
    plan = recipe.quantization_plan(model.family, model.family.denoiser, network, model.recipe.bits)
    return weights.quantized(network, plan).eval()


def one_network(repo: str, half: bool, offline: bool, progress: Progress) -> Path:
    """The folder of a repository that holds one network. One that is already here is not requested again: its
    config.json comes last."""
    from . import hub

    for config in reversed(hub.snapshots("config.json", repo)):
        if any(config.parent.glob("*.safetensors")):
            return config.parent
    commit, names = hub.held(repo, "main") if offline or hub.offline() else hub.listing(repo, "main")
    files = {name: names[name] for name in hub.select_network(repo, names, half)}
    return hub.download(repo, "main", commit, files, progress)
