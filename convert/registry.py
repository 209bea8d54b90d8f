"""The networks that can be converted, one module each, and the layouts of the single files that hold them. A new
network is its module and one row in MODULES. Each module has

    LAYOUTS                    layouts of the files that are recognised by this network
    CLASSES                    the classes that diffusers and transformers have for it; if none, shapes alone say its
                               Config
    ORIGINAL                   a pattern that is in its original authors' names and not in diffusers' and transformers'
    recognise(keys)            which of LAYOUTS a file has; None if it does not hold this network
    table(names, like)         rules from foreign names to ours
    config(shapes, like)       its Config, read off shapes; what no shape shows is as in `like`
    from_json(s, cls)          its Config, from a config.json
    divided(config)            widths that must be multiples of a number: (width, number, what it counts)

an encoder's module of which a family reads some layers only also

    kept(config, like)         the Config of the layers that are read

a module of which a whole CLIP holds a network also

    of_whole(s)                the network's settings, from the whole one's config.json

one whose layers have other names in diffusers, or are convolutions there, also

    PUBLISHED                  rules from our layers' names to diffusers', where these are not ours
    pointwise(config)          the last names of linear layers that are convolutions of 1 x 1 there

a module whose published config.json is wrong also

    corrected(config, shapes)  its Config, from what config.json says and from shapes

and a denoiser's module also

    layout(config, components)   which of LAYOUTS a folder of diffusers has
    variant(config, called, schedule)
                                 which of the family's variants that have no further input channels
    reads(config, others)        what it takes from other networks: (which, what of it, the width it takes, the width
                                 that they give)

like: the network's Config as published, or None where it is not known. called: what a checkpoint calls itself.
schedule: what its scheduler file says, or None. components, others: the networks of the checkpoint, by their
components."""

from . import (
    clip,
    controlnet,
    depth,
    esrgan,
    flux,
    flux2,
    flux_controlnet,
    ip_adapter,
    qwen3,
    redux,
    sd3,
    sd3_controlnet,
    t2i,
    t5,
    taesd,
    unet,
    union,
    vae,
    vision,
    zimage,
)

# In the order in which they are looked for: a whole checkpoint is recognised by its denoiser. FLUX.2's names are those
# of FLUX.1 and some more, a ControlNet's those of a U-Net and some more, and so on; an IP-Adapter's are first, since
# that of FLUX.1 has names of its blocks.
MODULES = {
    "ip_adapter": ip_adapter,
    "redux": redux,
    "vision": vision,
    "flux_controlnet": flux_controlnet,
    "flux2": flux2,
    "flux": flux,
    "sd3_controlnet": sd3_controlnet,
    "sd3": sd3,
    "zimage": zimage,
    "union": union,
    "controlnet": controlnet,
    "t2i": t2i,
    "unet": unet,
    "t5": t5,
    "qwen3": qwen3,
    "vae": vae,
    "taesd": taesd,
    "esrgan": esrgan,
    "depth": depth,
    "clip": clip,
}
LAYOUTS = {name: layout for module in MODULES.values() for name, layout in module.LAYOUTS.items()}
CLASSES = {cls: name for name, module in MODULES.items() for cls in module.CLASSES}  # -> network
