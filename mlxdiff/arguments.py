"""Checks the arguments of the public calls. It refuses diffusers' names, misspelt names, settings of a picture given to
`load`, options of `load` given to a picture, and values of the wrong type. One Error names all wrong arguments of a
call."""

import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType, UnionType

from .errors import Error, near

# Options of `load`.
OPTIONS = ("model", "bits", "text_bits", "dtype", "refiner", "taesd", "low_memory", "force", "request", "offline")
OPTIONS += ("revision", "tokenizer", "prediction", "parts", "t5", "loras", "embeddings", "lora_dir", "prompt_cache")
OPTIONS += ("progress",)
# Names from diffusers and similar programs -> our names.
THEIRS = {
    "batch": "count",
    "batch_count": "count",
    "batch_size": "count",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "checkpoint": "model",
    "ckpt": "model",
    "control_image": "controls",
    "controlnet": "controls",
    "ddim_steps": "steps",
    "denoise": "strength",
    "denoising_end": "refine_at",
    "denoising_start": "refine_at",
    "denoising_strength": "strength",
    "generator": "seed",
    "guidance_rescale": "rescale",
    "guidance_scale": "guidance",
    "image_path": "image",
    "init_image": "image",
    "init_img": "image",
    "ip_adapter": "references",
    "ip_adapter_image": "references",
    "local_files_only": "offline",
    "lora_path": "loras",
    "lora_paths": "loras",
    "low_cpu_mem_usage": "low_memory",
    "mask_image": "mask",
    "n_iter": "count",
    "n_samples": "count",
    "negative_prompt": "negative",
    "num_images": "count",
    "num_images_per_prompt": "count",
    "num_inference_steps": "steps",
    "num_steps": "steps",
    "pretrained_model_name_or_path": "model",
    "quantization_config": "bits",
    "quantize": "bits",
    "sampling_method": "sampler",
    "scale": "guidance",
    "scheduler": "sampler",
    "skip_guidance_layers": "skip_layers",
    "skip_layer_guidance_scale": "skip_scale",
    "skip_layer_guidance_start": "skip_interval",
    "skip_layer_guidance_stop": "skip_interval",
    "text_encoder": "parts",
    "text_encoder_2": "parts",
    "text_encoder_3": "t5",
    "torch_dtype": "dtype",
    "true_cfg_scale": "true_cfg",
    "vae": "parts",
}
# Their names without a counterpart here -> what to do instead.
NEITHER = {
    "cache_dir": "set the environment variable MLXDIFF_CACHE",
    "callback": "loop over pipe.stream(...)",
    "callback_on_step_end": "loop over pipe.stream(...)",
    "controlnet_conditioning_scale": "write the number behind the picture of `controls`",
    "device": "leave it out: MLX chooses the device",
    "device_map": "leave it out: MLX chooses the device",
    "image_strength": "give `strength`, which is larger where more is drawn anew",
    "ip_adapter_scale": "write the number behind the picture of `references`",
    "lora_scale": "write the number behind the file: `loras=FILE:0.8`",
    "lora_scales": "write the number behind the file: `loras=FILE:0.8`",
    "output_type": "leave it out: result.images are PIL images",
    "return_dict": "leave it out: a call returns a Result",
    "safety_checker": "leave it out: there is none",
    "size": "give `width` and `height`",
    "token": "log in with `hf auth login`",
    "use_safetensors": "leave it out: pickles are never read",
    "variant": "leave it out: of several, the file without a suffix is read, then fp16",
}
_KINDS = {bool: "True or False", int: "a whole number", str: "text", Path: "a path", dict: "a dict"}
_KINDS |= {NoneType: "None", Callable: "a function"}


def check_settings(names: Iterable[str], settings: tuple[str, ...]) -> None:
    """Raise if one of the names is not a setting of a picture. settings: the names of all settings."""
    unknown = [n for n in names if n not in settings]
    if unknown:
        hints = [_hint(name, settings, OPTIONS, "mlxdiff.load") for name in unknown]
        raise _error("A picture has no setting", unknown, hints, settings)


def check_options(load: Callable, given: dict, settings: tuple[str, ...]) -> None:
    """Raise if `load` was given an option that it does not have (`given["unknown"]`), or a value whose type does not
    match the annotation."""
    if unknown := [*given["unknown"]]:
        hints = [_hint(name, OPTIONS, ("prompt", *settings), "the call that draws") for name in unknown]
        raise _error("mlxdiff.load has no option", unknown, hints, OPTIONS)
    types = {name: _members(hint) for name, hint in typing.get_type_hints(load).items() if name in OPTIONS}
    wrong = [name for name, kinds in types.items() if not isinstance(given[name], kinds)]
    if wrong:
        values = ", ".join(f"`{name}` {given[name]!r:.60}" for name in wrong)
        fixes = (f"{name} is {' or '.join(_KINDS.get(k, k.__name__) for k in types[name])}" for name in wrong)
        raise Error(f"mlxdiff.load cannot take {values}.", f"Their types: {'; '.join(fixes)}.")
    for part, file in ({} if given["parts"] is None else given["parts"]).items():
        if not isinstance(file, str | Path):
            raise Error(f"mlxdiff.load cannot take {file!r:.60} as the {part} of `parts`.", "Give the path of a file.")


def _members(hint) -> tuple[type, ...]:
    """The types of an annotation: dict[str, Path] | None -> dict, NoneType."""
    members = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(typing.get_origin(m) or m for m in members)


def _error(what: str, unknown: list[str], hints: list[str], names: tuple[str, ...]) -> Error:
    fix = " ".join(h for h in hints if h)
    if not all(hints):
        known = ", ".join(n for n in names if not n.endswith(("_hash", "_hashes")))  # those are set by `resolve`
        fix = f"{fix} The names are {known}.".strip()
    *most, last = unknown
    return Error(f"{what} {', '.join(most)}{' or ' if most else ''}{last}.", fix)


def _hint(name: str, names: tuple[str, ...], other: tuple[str, ...], place: str) -> str:
    """The advice for a wrong name; "" if no known name is close."""
    if name in NEITHER:
        return f"For {name}, {NEITHER[name]}."
    ours = THEIRS.get(name) or (name if name in other else near(name, names) or near(name, other))
    if ours in names:
        return f"For {name}, use `{ours}`."
    return f"For {name}, give `{ours}` to {place}." if ours else ""
