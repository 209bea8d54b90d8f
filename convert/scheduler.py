"""diffusers' scheduler_config.json to a noise schedule in our terms. sampler None: we do not have the one it names."""

from ..dialects import DIFFUSERS
from ..families.published import DYNAMIC
from ..schedules import MOST_STEPS
from .settings import Settings

# class -> spacing if the file names none; which sampler of ours it is, `dialects` says
_CLASSES = {
    "DDIMScheduler": "leading",
    "DDPMScheduler": "leading",
    "DEISMultistepScheduler": "linspace",
    "DPMSolverMultistepScheduler": "linspace",
    "DPMSolverSDEScheduler": "linspace",
    "DPMSolverSinglestepScheduler": "linspace",
    "EulerAncestralDiscreteScheduler": "linspace",
    "EulerDiscreteScheduler": "linspace",
    "HeunDiscreteScheduler": "linspace",
    "KDPM2AncestralDiscreteScheduler": "linspace",
    "KDPM2DiscreteScheduler": "linspace",
    "LCMScheduler": "leading",
    "LMSDiscreteScheduler": "linspace",
    "PNDMScheduler": "leading",
    "TCDScheduler": "leading",
    "UniPCMultistepScheduler": "linspace",
}
_SOLVERS = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}  # of DPMSolverMultistepScheduler
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_OLD = ("HeunDiscreteScheduler", "KDPM2", "DPMSolverSDE", "LCMScheduler", "TCDScheduler")  # start from SD's betas


def from_json(s: Settings) -> tuple[dict, str]:
    """The schedule, and what the network predicts. A setting that the file lacks has the class's default."""
    cls = s.one("_class_name", None, list(_CLASSES))
    sampler, spacing = DIFFUSERS.get(cls), _CLASSES[cls]
    if cls == "DPMSolverMultistepScheduler":
        sampler = _SOLVERS.get(s.get("algorithm_type", "dpmsolver++"))
    if cls == "PNDMScheduler" and not s.flag("skip_prk_steps", False):
        sampler = None
    spacing = s.one("timestep_spacing", spacing, ["leading", "trailing", "linspace"])
    if cls == "LCMScheduler":
        s.one("original_inference_steps", 50, [50])
        spacing = "lcm"
    for name in ("karras", "exponential", "beta"):
        spacing = name if s.flag(f"use_{name}_sigmas", False) else spacing
    for key, only in (("trained_betas", None), ("timestep_type", "discrete"), ("use_flow_sigmas", False)):
        s.one(key, only, [only])
    start, end = (0.00085, 0.012) if cls.startswith(_OLD) else (0.0001, 0.02)
    betas = "scaled_linear" if cls in ("LCMScheduler", "TCDScheduler") else "linear"
    start, end = (s.positive(f"beta_{which}", default) for which, default in (("start", start), ("end", end)))
    for which, value in (("start", start), ("end", end)):
        if value >= 1:  # it is the share of the signal that one step removes
            s.refuse(f"beta_{which}", value)
    return {
        "betas": _BETAS[s.one("beta_schedule", betas, list(_BETAS))],
        "start": start,
        "end": end,
        "steps": s.whole("num_train_timesteps", 1000, MOST_STEPS, least=2),
        "zero_snr": s.flag("rescale_betas_zero_snr", False),
        "spacing": spacing,
        "offset": s.one("steps_offset", 0, [0, 1]),
        "final_alpha_one": s.flag("set_alpha_to_one", cls != "PNDMScheduler"),
        "sampler": sampler,
    }, _PREDICTIONS[s.one("prediction_type", "epsilon", list(_PREDICTIONS))]


# class -> its spacing where that is not the pipeline's
_FLOW_CLASSES = {
    "FlowMatchEulerDiscreteScheduler": None,
    "FlowMatchHeunDiscreteScheduler": None,
    "DPMSolverMultistepScheduler": "sgm_uniform",
    "UniPCMultistepScheduler": "sgm_uniform",
}


def flow_from_json(s: Settings, like: dict) -> dict:
    """The schedule of a rectified flow model. like: its family's, for what the pipeline sets: the spacing, and the
    shift that grows with the picture if that is not the scheduler's own."""
    cls = s.one("_class_name", None, list(_FLOW_CLASSES))
    spacing = _FLOW_CLASSES[cls]
    key = "shift"
    if not cls.startswith("FlowMatch"):
        s.one("use_flow_sigmas", False, [True])
        s.one("algorithm_type", "dpmsolver++", ["dpmsolver++"])
        key = "flow_shift"
    only = {"invert_sigmas": False, "shift_terminal": None, "time_shift_type": "exponential"}
    for name, value in (only | {"stochastic_sampling": False}).items():
        s.one(name, value, [value])
    spacing = like["ends"] if spacing is None else spacing
    for name in ("karras", "exponential", "beta"):
        spacing = name if s.flag(f"use_{name}_sigmas", False) else spacing
    dynamic = None
    if s.flag("use_dynamic_shifting", False):
        own = {k: (s.whole if k.endswith("len") else s.number)(k, default) for k, default in DYNAMIC.items()}
        if own["max_image_seq_len"] <= own["base_image_seq_len"]:
            s.refuse("max_image_seq_len", own["max_image_seq_len"])
        dynamic = own if like["dynamic"] is None or like["dynamic"].keys() == own.keys() else like["dynamic"]
    return {
        "steps": s.whole("num_train_timesteps", 1000, MOST_STEPS, least=2),
        "shift": s.positive(key, 1.0),
        "dynamic": dynamic,
        "spacing": spacing,
        "ends": like["ends"],
        "sampler": DIFFUSERS[cls],
    }
