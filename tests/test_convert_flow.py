"""Conversion of SD3, FLUX and T5. References: the modules of diffusers and transformers that were saved; what FLUX's
fused layers are made of, from parity/bfl.py; SD3's original names from original.py, held to the manifests here."""

import json
import shutil
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from mlxdiff import Error, convert
from mlxdiff.convert import inspect, rules, scheduler, write
from mlxdiff.convert.__main__ import main
from mlxdiff.convert.settings import Settings
from mlxdiff.convert.source import Tensor
from mlxdiff.families import FAMILIES

from . import clip_vocab, original, t5_vocab
from .checkpoints import full, manifest, sparse
from .parity.bfl import from_diffusers
from .parity.tiny import stir
from .test_convert import arrays, listing, read, text

T5 = T5Config(
    vocab_size=300, d_model=24, d_kv=5, d_ff=40, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=8,
)  # fmt: skip
FLUX = {"attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 24,
        "pooled_projection_dim": 64, "in_channels": 16}  # fmt: skip
SD3 = {"joint_attention_dim": 24, "pooled_projection_dim": 64 + 128, "in_channels": 4, "out_channels": 4,
       "pos_embed_max_size": 6, "sample_size": 4}  # fmt: skip
KINDS = ("dev", "schnell", "sd3", "sd3.5")
DYNAMIC = FAMILIES["flux"].schedule["dynamic"]


def vae(seed: int, **kinds) -> diffusers.AutoencoderKL:
    torch.manual_seed(seed)
    return stir(diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        block_out_channels=(32, 64), use_quant_conv=False, use_post_quant_conv=False, **kinds,
    ), seed)  # fmt: skip


def nets(kind: str) -> dict[str, torch.nn.Module]:
    """Small, and with the numbers no shape tells as the family has them."""
    torch.manual_seed(0)
    clip = text(1, 64, "quick_gelu", projected=kind.startswith("sd3"))
    if kind.startswith("sd3"):
        torch.nn.init.eye_(clip.text_projection.weight)  # as published: SD3 reads CLIP-L without its projection
    t5 = stir(T5EncoderModel(T5), 2)
    if kind in ("dev", "schnell"):
        net = diffusers.FluxTransformer2DModel(**FLUX, num_layers=2, num_single_layers=3, guidance_embeds=kind == "dev")
        own = vae(4, scaling_factor=0.3611, shift_factor=0.1159)
        return {"text_encoder": clip, "text_encoder_2": t5, "transformer": stir(net, 3), "vae": own}
    if kind == "sd3":
        kinds = {"num_attention_heads": 1, "attention_head_dim": 64, "caption_projection_dim": 64, "num_layers": 2}
    else:
        kinds = {"num_attention_heads": 3, "attention_head_dim": 16, "caption_projection_dim": 48, "num_layers": 3,
                 "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}  # fmt: skip
    net = stir(diffusers.SD3Transformer2DModel(**SD3, **kinds), 5)
    own = vae(6, scaling_factor=1.5305, shift_factor=0.0609)
    clip_g = text(7, 128, "gelu", projected=True)
    return {
        "text_encoder": clip, "text_encoder_2": clip_g, "text_encoder_3": t5, "transformer": net, "vae": own
    }  # fmt: skip


def t5_of(kind: str) -> str:
    return "text_encoder_3" if kind.startswith("sd3") else "text_encoder_2"


def folder(path: Path, kind: str, parts: dict) -> Path:
    index = {k: ["x", type(v).__name__] for k, v in parts.items()}
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "X"], "_class_name": "P"}))
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True} if kind == "dev" else {}
    shift = {"shift": 1.0 if kind == "schnell" else 3.0} | dynamic
    diffusers.FlowMatchEulerDiscreteScheduler(**shift).save_pretrained(path / "scheduler")
    for name, part in parts.items():
        part.save_pretrained(path / name)
        if name == t5_of(kind):
            t5_vocab.write(path / name.replace("text_encoder", "tokenizer"))
        elif name.startswith("text_encoder"):
            clip_vocab.write(path / name.replace("text_encoder", "tokenizer"), clip_vocab.trained(150))
    return path


def t5_state(module) -> dict:
    """As ComfyUI's files have it: the words under both names."""
    held = arrays(module)
    return held | {"encoder.embed_tokens.weight": held["shared.weight"]}


def clip_state(module) -> dict:
    held = {f"text_model.{k.removeprefix('text_model.')}": x for k, x in arrays(module).items()}
    return {k.replace("text_model.text_projection", "text_projection"): x for k, x in held.items()}


def transformer_state(kind: str, module) -> dict:
    if kind.startswith("sd3"):
        return original.sd3(arrays(module))
    return {k: x.detach().numpy() for k, x in from_diffusers(module.state_dict()).items()}


def single(path: Path, kind: str, parts: dict) -> Path:
    """All in one, under the names of ComfyUI's files."""
    state = original.under("model.diffusion_model.", transformer_state(kind, parts["transformer"]))
    state |= original.under("vae." if kind == "dev" else "first_stage_model.", original.vae(arrays(parts["vae"])))
    state |= original.under("text_encoders.clip_l.transformer.", clip_state(parts["text_encoder"]))
    if kind.startswith("sd3"):
        state |= original.under("text_encoders.clip_g.transformer.", clip_state(parts["text_encoder_2"]))
    state |= original.under("text_encoders.t5xxl.transformer.", t5_state(parts[t5_of(kind)]))
    return full(path, state | {"text_encoders.clip_l.logit_scale": np.ones((), np.float32)})


def apart(root: Path, kind: str, parts: dict) -> Path:
    """The transformer in a file of its own, and beside it the others under the names people know."""
    full(root / "ae.safetensors" if kind in ("dev", "schnell") else root / "sd3_vae.safetensors",
         original.vae(arrays(parts["vae"])))  # fmt: skip
    full(root / "text_encoders" / "clip_l.safetensors", clip_state(parts["text_encoder"]))
    if kind.startswith("sd3"):
        full(root / "clip_g.safetensors", clip_state(parts["text_encoder_2"]))
    full(root / "t5xxl_fp16.safetensors", t5_state(parts[t5_of(kind)]))
    full(root / "t5xxl_fp8_e4m3fn.safetensors", {"of": np.ones(1, np.float32)})  # the more precise one is taken
    return full(root / "transformer.safetensors", transformer_state(kind, parts["transformer"]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """kind -> (modules, diffusers folder, its conversion)"""
    root, made = tmp_path_factory.mktemp("saved"), {}
    for kind in KINDS:
        parts = nets(kind)
        source = folder(root / kind, kind, parts)
        made[kind] = parts, source, convert.convert(source, root / f"{kind}-out", dtype="float32")
    return made


def same(one: Path, other: Path, parts) -> None:
    """Of a single SD3 file, CLIP-L comes without its projection."""
    for name in parts:
        if read(one)[0]["components"][name] == read(other)[0]["components"][name]:
            assert (one / f"{name}.safetensors").read_bytes() == (other / f"{name}.safetensors").read_bytes(), name
        else:
            a, b = (read(path)[1][name] for path in (one, other))
            assert (name, a.keys() - b.keys()) == ("text_encoder", {"text_projection.weight"})
            assert all(np.array_equal(x, a[key]) for key, x in b.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_diffusers_keeps_every_number(saved, kind):
    """Reference: the modules' own state, FLUX's put together by bfl.py. Exact."""
    parts, _, out = saved[kind]
    model, ours = read(out)
    assert model["family"] == ("sd3" if kind.startswith("sd3") else "flux")
    assert (model["variant"], model["prediction"]) == ("schnell" if kind == "schnell" else "base", "flow")
    for name, part in parts.items():
        theirs = {k.removeprefix("text_model."): x for k, x in arrays(part).items()}
        if name == "transformer" and model["family"] == "flux":
            theirs = transformer_state(kind, part)
        theirs = {k: x for k, x in theirs.items() if "position_ids" not in k and "embed_tokens" not in k}
        assert ours[name].keys() == theirs.keys()
        for key, x in theirs.items():
            x = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
            assert np.array_equal(ours[name][key], x.reshape(ours[name][key].shape)), key


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_and_files_apart_equal_the_folder(saved, tmp_path, kind):
    parts, source, out = saved[kind]
    for file in (single(tmp_path / "one.safetensors", kind, parts), apart(tmp_path / "apart", kind, parts)):
        got = convert.convert(file, tmp_path / f"{file.stem}-out", dtype="float32", tokenizer=source)
        theirs, ours = read(out)[0], read(got)[0]
        if kind.startswith("sd3"):
            theirs["components"]["text_encoder"]["projection"] = None
        for key in ("family", "variant", "prediction", "schedule", "zero_negative", "tokenizers", "components"):
            assert ours[key] == theirs[key], key
        same(out, got, parts)
        for words in theirs["tokenizers"]:
            assert listing(out / words) == listing(got / words)


def test_parts_are_given_by_flags(saved, tmp_path, monkeypatch):
    """Under any name, anywhere; they go before the checkpoint's own."""
    parts, source, out = saved["dev"]
    lone = full(tmp_path / "a" / "net.safetensors", transformer_state("dev", parts["transformer"]))
    apart(tmp_path / "b", "dev", parts)
    given = ["--vae", str(tmp_path / "b" / "ae.safetensors"), "--t5", str(tmp_path / "b" / "t5xxl_fp16.safetensors")]
    given += ["--clip", str(source / "text_encoder"), "--tokenizer", str(source)]  # a folder of one component
    monkeypatch.chdir(tmp_path)
    assert main([str(lone), "-o", "out", "--dtype", "float32", *given]) == 0
    same(out, tmp_path / "out", parts)
    changed = {k: x + 1 for k, x in original.vae(arrays(parts["vae"])).items()}
    other = full(tmp_path / "other.safetensors", changed)
    got = convert.convert(source, tmp_path / "replaced", dtype="float32", parts={"vae": other})
    same(out, got, ["transformer", "text_encoder", "text_encoder_2"])
    assert (out / "vae.safetensors").read_bytes() != (got / "vae.safetensors").read_bytes()


def test_sd3_needs_no_t5(saved, tmp_path):
    parts, _, out = saved["sd3"]
    state = {k: x for k, x in parts.items() if k != "text_encoder_3"}
    few = folder(tmp_path / "few", "sd3", state)
    got = convert.convert(few, tmp_path / "out", dtype="float32")
    same(out, got, state)
    assert read(got)[0]["tokenizers"] == ["tokenizer", "tokenizer_2"]


@pytest.mark.parametrize("projection", [None, 64])
def test_a_single_sd3_file_whose_clip_has_any_projection(saved, tmp_path, projection):
    """Stability's code, ComfyUI and diffusers (an identity) read none there. Other copies of CLIP-L have one."""
    parts, source, out = saved["sd3"]
    file = single(tmp_path / "one.safetensors", "sd3", parts)
    tensors, name = convert.source.read(file).tensors, "text_encoders.clip_l.transformer.text_projection.weight"
    held = {k: np.array(t.read()) for k, t in tensors.items() if k != name}
    held |= {} if projection is None else {name: np.ones((projection, projection), np.float32)}
    got = convert.convert(full(file, held), tmp_path / "out", dtype="float32", tokenizer=source)
    assert read(got)[0]["components"]["text_encoder"]["projection"] is None
    same(out, got, parts)


def test_the_inverse_table_gives_the_published_names():
    for name in ("sd3_medium", "sd35_large", "sd35_medium"):
        facts = {k: tuple(s) for k, s in manifest(name)["tensors"].items() if k.startswith("model.")}
        theirs = {k: np.broadcast_to(np.int8(0), s) for k, s in manifest(f"{name}_transformer")["tensors"].items()}
        made = {k: x.shape for k, x in original.sd3(theirs).items()}
        assert original.under("model.diffusion_model.", made) == facts


def test_t5_in_every_form(tmp_path):
    """transformers' own names, the words under the one, the other or both names, and a whole T5, decoder and all."""
    whole = arrays(stir(T5ForConditionalGeneration(T5), 2))
    words = "encoder.embed_tokens.weight"
    forms = [t5_state(stir(T5EncoderModel(T5), 2)), whole | {"lm_head.weight": whole["shared.weight"]}]
    forms.append({k: x for k, x in forms[0].items() if k != "shared.weight"})
    forms.append({k: x for k, x in forms[0].items() if k != words})
    for i, held in enumerate(forms):
        found = convert.open(full(tmp_path / f"{i}.safetensors", held))
        t5 = found.components["text_encoder"]
        assert (found.family, found.unmapped, found.missing) == ("t5", {}, [])
        for key, weight in t5.weights.items():
            source = held.get(key, held.get(words))
            assert np.array_equal(np.array(weight.array()), source)


def test_a_whole_t5_whose_settings_lie_beside_it(tmp_path):
    """As T5's own repository has it: the same encoder as by its shapes alone."""
    held = arrays(stir(T5ForConditionalGeneration(T5), 2))
    settings = T5.to_dict() | {"architectures": ["T5ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    whole, alone = (convert.open(full(tmp_path / f"{n}.safetensors", held)) for n in ("model", "t5xxl"))
    assert (whole.family, whole.unmapped, whole.missing) == ("t5", {}, [])
    assert whole.components["text_encoder"].config == alone.components["text_encoder"].config


def test_a_t5_of_scaled_8_bit_floats(saved, tmp_path):
    """As ComfyUI's t5xxl_fp8_e4m3fn_scaled has it: each matrix has its own scale. Reference: torch's product."""
    parts, source, _ = saved["dev"]
    held, want = {}, {}
    for key, x in t5_state(parts["text_encoder_2"]).items():
        x = torch.from_numpy(x)
        if x.ndim == 2 and "SelfAttention" in key and "bias" not in key:
            scale = x.abs().max() / 448  # the largest e4m3
            held[key], held[key.replace("weight", "scale_weight")] = (x / scale).to(torch.float8_e4m3fn), scale
            want[key] = held[key].float() * scale
        else:
            held[key] = want[key] = x
    held["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    lone = apart(tmp_path, "dev", parts)
    save_file({k: x.clone() for k, x in held.items()}, tmp_path / "t5xxl_fp16.safetensors")
    got = read(convert.convert(lone, tmp_path / "out", dtype="float32", tokenizer=source))[1]["text_encoder_2"]
    for key, x in got.items():
        assert np.array_equal(x, want[key].numpy()), key


def test_t5_can_be_left_out(saved, tmp_path, monkeypatch, capsys):
    """Of a folder, though its files be missing too; of one file; and of what lies beside one."""
    parts, source, out = saved["sd3"]
    state = {k: x for k, x in parts.items() if k != "text_encoder_3"}
    few = Path(shutil.copytree(source, tmp_path / "few"))
    shutil.rmtree(few / "text_encoder_3")
    shutil.rmtree(few / "tokenizer_3")
    one = single(tmp_path / "one.safetensors", "sd3", parts)
    monkeypatch.chdir(tmp_path)
    for i, path in enumerate((source, few, one, apart(tmp_path / "apart", "sd3", parts))):
        words = ["--tokenizer", str(few)] if path.is_file() else []
        assert main([str(path), "-o", str(i), "--dtype", "float32", "--no-t5", *words]) == 0
        same(out, tmp_path / str(i), state)
        model = read(tmp_path / str(i))[0]
        assert model["components"].keys() == state.keys()
        assert model["tokenizers"] == ["tokenizer", "tokenizer_2"]
    capsys.readouterr()
    t5 = str(tmp_path / "apart" / "t5xxl_fp16.safetensors")
    for argv, said in (([str(saved["dev"][1])], "is of flux, which has no T5"), ([str(one), "--t5", t5], "Use one of")):
        assert main([*argv, "-o", "x", "--no-t5"]) == 1
        assert said in capsys.readouterr().err


def test_inspect_says_what_a_folder_became(saved, tmp_path, capsys):
    """Of the checkpoint and of its quantized copy; references: the files' own sizes, and model.json."""
    parts, source, _ = saved["dev"]
    out = convert.convert(source, tmp_path / "out", bits="nvfp4", dtype="bfloat16")
    facts = []
    for path in (source, out):
        assert inspect.main([str(path), "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
        assert inspect.main([str(path)]) == 0
        shown = capsys.readouterr().out
        assert "FLUX.1, base" in shown
        assert all(name in shown for name in (*parts, "tokenizer_2", "dynamic", "predicts flow"))
    held, made = facts
    assert (held["layout"], made["layout"]) == ("diffusers", "converted")
    for key in ("family", "variant", "prediction", "schedule", "tokenizers"):
        assert held[key] == made[key], key
    for name, part in parts.items():
        tensors = {k: x for k, x in arrays(part).items() if "position_ids" not in k and "embed_tokens" not in k}
        size = sum(x.size for x in tensors.values())
        assert (held["components"][name]["parameters"], held["components"][name]["bytes"]) == (size, 4 * size)
        assert (held["components"][name]["dtype"], made["components"][name]["parameters"]) == ("F32", size)
        file = (out / f"{name}.safetensors").read_bytes()
        assert made["components"][name]["bytes"] == len(file) - 8 - int.from_bytes(file[:8], "little")
    errors = {n: c["error"] for n, c in made["components"].items() if c["error"] is not None}
    assert errors == json.loads((out / "model.json").read_text())["error"]
    assert made["components"]["vae"]["dtype"] == "float32"
    assert made["components"]["transformer"]["dtype"] == "bfloat16-nvfp4"
    assert f"nvfp4, quantized with an error of {errors['transformer']:.2%}" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_a_component_s_folder_says_what_it_is(saved, tmp_path, kind):
    """With config.json; and from shapes alone, which agree with it."""
    source, bare = saved[kind][1] / "transformer", tmp_path / "net.safetensors"
    bare.symlink_to(next(source.glob("*.safetensors")))
    told, read = convert.open(source), convert.open(bare)
    assert (told.unmapped, told.missing, told.family) == ({}, [], read.family)
    assert told.components["transformer"].config == read.components["transformer"].config


def test_kontext_is_told_where_something_says_so(saved, tmp_path, capsys):
    """Its shapes are dev's. A folder's pipeline says it, and a file's architecture; and its copy knows."""
    _, source, _ = saved["dev"]
    shutil.copytree(source, tmp_path / "kontext")
    index = tmp_path / "kontext" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxKontextPipeline"}))
    made = convert.convert(index.parent, tmp_path / "out")
    for path in (index.parent, made):
        assert inspect.main([str(path)]) == 0
        assert "FLUX.1, kontext" in capsys.readouterr().out
    for name, called, variant in (
        ("flux1-dev", "Flux.1-dev/kontext", "kontext"),
        ("flux1-dev", "Flux.1-dev", "base"),
        ("flux1-schnell", "Flux.1-schnell", "schnell"),
        ("flux1-fill-dev", "Flux.1-fill-dev", "fill"),
    ):
        tensors = manifest(name)["tensors"]
        file = sparse(tmp_path / f"{name}.safetensors", tensors, metadata={"modelspec.architecture": called})
        assert convert.open(file).variant == variant


@pytest.mark.parametrize(("double", "single"), [(1, 0), (0, 1)])
def test_flux_of_one_kind_of_block(tmp_path, double, single):
    net = diffusers.FluxTransformer2DModel(**FLUX, num_layers=double, num_single_layers=single)
    net.save_pretrained(tmp_path)
    found = convert.open(tmp_path)
    assert (found.unmapped, found.missing) == ({}, [])
    config = found.components["transformer"].config
    assert (config.double, config.single) == (double, single)


def test_a_24_gb_file_passes_in_little_more_memory_than_its_largest_tensor(tmp_path):
    """A sparse file of full size, in diffusers' layout, whose pieces are put together: its first single block."""
    m = manifest("flux_dev_transformer")
    found = convert.open(sparse(tmp_path / "a.safetensors", m["tensors"], dtype=m["dtype"])).components["transformer"]
    block = [w for k, w in found.weights.items() if k.startswith("single_blocks.0.")]
    largest = max(2 * np.prod(w.shape) for w in block)  # linear1, 132 MB
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for weight in block:
        mx.eval(write._sound(weight, mx.bfloat16))
    # The pieces of one, and the whole they are copied into; the rest of the 24 GB is not looked at.
    assert mx.get_peak_memory() - before <= 2.1 * largest < 0.02 * 2 * found.parameters


# ---- rules


def test_pieces_are_laid_end_to_end_and_halves_exchanged(tmp_path):
    rng = np.random.default_rng(0)
    held = {k: rng.normal(size=(n, 3)).astype(np.float32) for k, n in (("v", 4), ("q", 2), ("k", 2), ("mod", 6))}
    table = [(r"^([qkv])$", r"\1"), *[(rf"^{p}$", f"qkv+{i}") for i, p in enumerate("qkv")], (r"^mod$", ("m+1", "m+0"))]
    tensors = convert.source.read(full(tmp_path / "a.safetensors", held)).tensors
    filled, unmapped, missing = rules.fill(list(tensors.items()), table, {"qkv": (8, 3), "m": (6, 3)})
    assert (unmapped, missing) == ({}, [])
    assert np.array_equal(filled["qkv"].array(), np.concatenate([held[k] for k in "qkv"]))
    assert np.array_equal(filled["m"].array(), np.concatenate([held["mod"][3:], held["mod"][:3]]))


@pytest.mark.parametrize(("shape", "why"), [((3, 3), "does not fit"), ((2, 4), "does not fit"), ((), "does not fit")])
def test_pieces_that_do_not_fit_are_told(shape, why):
    tensors = [(k, Tensor(Path("f"), k, "F32", s, 0)) for k, s in (("q", (2, 3)), ("k", shape))]
    table = [(r"^q$", "qk+0"), (r"^k$", "qk+1")]
    filled, unmapped, missing = rules.fill(tensors, table, {"qk": (4, 3)})
    assert (filled, missing) == ({}, ["qk"])
    assert why in unmapped["k"]
    assert rules.fill(tensors[:1], table, {"qk": (4, 3)})[2] == ["qk"]  # a piece that is absent


# ---- schedules


@pytest.mark.parametrize(
    ("made", "want"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {"shift": 3.0, "dynamic": None, "sampler": "euler"}),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.2),
            {
                "dynamic": FAMILIES["flux"].schedule["dynamic"] | {"max_shift": 1.2},
                "spacing": "trailing",
                "ends": "trailing",
            },
        ),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), {"spacing": "karras", "ends": "trailing"}),
        (diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0), {"shift": 2.0, "sampler": "heun"}),
        (
            diffusers.DPMSolverMultistepScheduler(
                use_flow_sigmas=True, flow_shift=2.5, prediction_type="flow_prediction"
            ),
            {"shift": 2.5, "sampler": "dpmpp_2m", "spacing": "sgm_uniform", "ends": "trailing"},
        ),
    ],
)
def test_flow_schedulers_in_our_terms(tmp_path, made, want):
    made.save_pretrained(tmp_path)
    schedule = scheduler.flow_from_json(Settings(tmp_path / "scheduler_config.json"), FAMILIES["flux"].schedule)
    assert schedule.items() >= want.items()
    assert schedule.keys() == FAMILIES["flux"].schedule.keys()


@pytest.mark.parametrize(
    "values",
    [
        {"_class_name": "DDIMScheduler"}, {"time_shift_type": "linear"}, {"shift_terminal": 0.02}, {"shift": 0},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        {"num_train_timesteps": 0}, {"base_shift": "a", "use_dynamic_shifting": True}, {"shift": 1e31},
        {"_class_name": "UniPCMultistepScheduler"}, {"use_dynamic_shifting": True, "max_image_seq_len": 256},
    ],
)  # fmt: skip
def test_flow_schedulers_that_are_refused(tmp_path, values):
    (tmp_path / "s.json").write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"} | values))
    with pytest.raises(Error, match=r"s\.json has "):
        scheduler.flow_from_json(Settings(tmp_path / "s.json"), FAMILIES["sd3"].schedule)


# ---- what is wrong


def given(kind: str, **changes):
    """The transformer with parts in other places."""

    def prepare(saved: dict, root: Path) -> list[str]:
        parts, source, _ = saved[kind]
        apart(root, kind, parts)
        argv = [str(root / "transformer.safetensors"), "--tokenizer", str(source)]
        for flag, make in changes.items():
            argv += [f"--{flag.replace('_', '-')}", str(make(saved, root))]
        return argv

    return prepare


def without(kind: str, *names: str):
    def prepare(saved: dict, root: Path) -> list[str]:
        parts, source, _ = saved[kind]
        file = apart(root, kind, parts)
        for name in names:
            for path in root.rglob(name):
                path.unlink()
        return [str(file), "--tokenizer", str(source)]

    return prepare


def changed(kind: str, change):
    def prepare(saved: dict, root: Path) -> list[str]:
        parts, source, _ = saved[kind]
        file = apart(root, kind, parts)
        full(file, change(transformer_state(kind, parts["transformer"])))
        return [str(file), "--tokenizer", str(source)]

    return prepare


def in_folder(kind: str, path: str, **values):
    def prepare(saved: dict, root: Path) -> list[str]:
        source = Path(shutil.copytree(saved[kind][1], root / "bad"))
        content = json.loads((source / path).read_text())
        (source / path).write_text(json.dumps(content | values))
        return [str(source)]

    return prepare


def piece_gone(saved: dict, root: Path) -> list[str]:
    source = Path(shutil.copytree(saved["dev"][1], root / "bad"))
    file = next((source / "transformer").glob("*.safetensors"))
    held = {k: np.array(t.read()) for k, t in convert.source.read(file).tensors.items()}
    full(file, {k: x for k, x in held.items() if k != "single_transformer_blocks.1.proj_mlp.bias"})
    return [str(source)]


def file_of(kind: str, name: str, state=arrays):
    return lambda saved, root: full(root / "elsewhere" / "part.safetensors", state(saved[kind][0][name]))


def small_t5(saved: dict, root: Path) -> Path:
    config = T5Config(**{**T5.to_dict(), "d_model": 32})
    return full(root / "elsewhere" / "t5.safetensors", t5_state(T5EncoderModel(config)))


def scaled(saved: dict, root: Path) -> Path:
    held = t5_state(saved["dev"][0]["text_encoder_2"]) | {"scaled_fp8": np.zeros(0, np.float32)}
    return full(root / "elsewhere" / "t5.safetensors", held)


def other_vae(saved: dict, root: Path) -> Path:
    return full(root / "elsewhere" / "vae.safetensors", original.vae(arrays(vae(9, latent_channels=8))))


def published(**parts: str):
    """FLUX.1 dev as it was published, by its manifest, with parts by theirs."""

    def prepare(saved: dict, root: Path) -> list[str]:
        def empty(name: str) -> str:
            m = manifest(name)
            return str(sparse(root / f"{name}.safetensors", m["tensors"], dtype=m["dtype"], dtypes=m.get("dtypes")))

        argv = [empty("flux1-dev"), "--tokenizer", str(saved["dev"][1])]
        for flag, name in ({"vae": "flux_ae", "clip": "comfy_clip_l", "t5": "comfy_t5xxl_fp16"} | parts).items():
            argv += [f"--{flag}", empty(name)]
        return argv

    return prepare


def no_t5_words(saved: dict, root: Path) -> list[str]:
    parts, source, _ = saved["dev"]
    return [str(apart(root, "dev", parts)), "--tokenizer", str(source / "tokenizer")]


def words(file: str, content: str):
    def prepare(saved: dict, root: Path) -> list[str]:
        source = Path(shutil.copytree(saved["dev"][1], root / "bad"))
        (source / file).write_text(content)
        return [str(source)]

    return prepare


def long_clip(saved: dict, root: Path) -> Path:
    held = clip_state(saved["dev"][0]["text_encoder"])
    held["text_model.embeddings.position_embedding.weight"] = np.ones((248, 64), np.float32)
    return full(root / "elsewhere" / "long.safetensors", held)


def put(key: str, *shape: int):
    return lambda held: held | {key: np.ones(shape, np.float32)}


def lose(key: str):
    return lambda held: {k: x for k, x in held.items() if k != key}


MOD = "joint_blocks.1.context_block.adaLN_modulation.1.bias"

# name -> (what to type, what the error must name)
BAD = {
    "FLUX without a T5": (without("dev", "t5xxl*"), "without text_encoder_2. Give --t5 t5xxl*.safetensors"),
    "FLUX without any": (without("dev", "t5*", "ae*", "clip*"), "without text_encoder, text_encoder_2, vae. Give --cl"),
    "SD3 without CLIP-G": (without("sd3", "clip_g*"), "without text_encoder_2. Give --clip-g clip_g*.safetensors"),
    "a T5 of another size": (
        given("dev", t5=small_t5), "takes text 24 wide and a text_encoder_2 (t5.safetensors) that gives 32"),
    "a T5 of another size for SD3": (
        given("sd3", t5=small_t5), "takes text 24 wide and a text_encoder_3 (t5.safetensors) that gives 32"),
    "a T5 in scaled numbers": (given("dev", t5=scaled), "a file of scaled 8-bit numbers"),
    "a VAE of another family": (
        given("dev", vae=other_vae), "takes patches 16 wide and a vae (vae.safetensors) that gives 32"),
    "a VAE of another family for SD3": (given("sd3", vae=other_vae), "takes latents 4 wide and a vae (vae.saf"),
    "SDXL's VAE for FLUX": (published(vae="sdxl_vae"), "takes patches 64 wide and a vae (sdxl_vae.safetensors) that"),
    "CLIP-G as FLUX's CLIP": (published(clip="comfy_clip_g"), "takes a text vector 768 wide"),
    "SDXL's U-Net for FLUX's T5": (published(t5="sdxl_base_unet"), "holds sdxl weights, not T5"),
    "CLIP-G given to FLUX": (
        given("dev", clip=file_of("sd3", "text_encoder_2", clip_state)), "takes a text vector 64 wide"),
    "CLIP-L given for CLIP-G": (
        given("sd3", clip_g=file_of("dev", "text_encoder", clip_state)),
        "a CLIP text encoder, not the second CLIP of SDXL and SD3"),
    "a VAE given for a T5": (given("dev", t5=file_of("dev", "vae")), "part.safetensors holds a VAE, not T5"),
    "a transformer given for a VAE": (given("dev", vae=file_of("sd3", "transformer")), "holds sd3 weights, not a VAE"),
    "a part of no use": (given("dev", clip_g=file_of("sd3", "text_encoder_2")), "takes no --clip-g. It takes --clip, "),
    "a part that is absent": (given("dev", vae=lambda s, r: r / "gone.safetensors"), "gone.safetensors cannot be read"),
    "a prediction": (given("dev", prediction=lambda s, r: "v"), "of flux, which predicts flow"),
    "a tensor missing": (changed("dev", lose("double_blocks.1.img_mod.lin.bias")), "img_mod.lin.bias"),
    "a tensor too many": (changed("sd3", put("joint_blocks.0.x_block.attn2.qkv.bias", 3)), "attn2"),
    "a last block that shifts too much": (changed("sd3", put(MOD, 384)), "does not fit transformer_blocks.1.norm1_con"),
    "a piece missing": (piece_gone, "single_blocks.1.linear1.bias"),
    "guidance where there is none": (changed("schnell", put("guidance_in.in_layer.weight", 48, 256)), "guidance_in."),
    "Chroma": (changed("dev", put("distilled_guidance_layer.in_proj.bias", 2)), "a Chroma model"),
    "bitsandbytes": (changed("dev", put("img_in.weight.absmax", 2)), "quantized by bitsandbytes"),
    "axes of no head": (in_folder("dev", "transformer/config.json", axes_dims_rope=[4, 6, 8]), "axes_dims_rope"),
    "odd axes": (in_folder("dev", "transformer/config.json", axes_dims_rope=[4, 5, 7]), "axes_dims_rope"),
    "heads of another width": (in_folder("sd3", "transformer/config.json", num_attention_heads=2), "caption_pro"),
    "a norm not implemented": (in_folder("sd3.5", "transformer/config.json", qk_norm="layer_norm"), "'layer_norm'"),
    "a config without guidance": (in_folder("dev", "transformer/config.json", guidance_embeds=False), "guidance_emb"),
    "a T5 of two buckets": (
        in_folder("dev", "text_encoder_2/config.json", relative_attention_num_buckets=2), "_buckets = 2, which"),
    "a T5 that tells no distances apart": (
        in_folder("dev", "text_encoder_2/config.json", relative_attention_max_distance=2), "_distance = 2, which"),
    "a T5 of the first version": (in_folder("dev", "text_encoder_2/config.json", feed_forward_proj="relu"), "'relu'"),
    "a scheduler of another kind": (in_folder("dev", "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
                                    "DDIMScheduler"),
    "a transformer unknown": (
        in_folder("dev", "model_index.json", transformer=["diffusers", "ChromaTransformer2DModel"]),
        "whose transformer is a ChromaTransformer2DModel"),
    "no T5 tokenizer": (no_t5_words, "no tokenizer of T5"),
    "a T5 tokenizer damaged": (words("tokenizer_2/spiece.model", "nonsense"), "spiece.model is damaged"),
    "a T5 tokenizer.json of another kind": (words("tokenizer_2/tokenizer.json", '{"model": {}}'), "tokenizer_2 cannot"),
    "a CLIP tokenizer of another kind": (words("tokenizer/tokenizer.json", '{"model": {}}'), "is not a byte-level BPE"),
    "a vocabulary without its pieces": (words("tokenizer/vocab.json", '{"a": 0}'), "a merge unknown to the vocab"),
    "special tokens of no kind": (words("tokenizer/tokenizer_config.json", '{"pad_token": 5}'), "tokenizer are malf"),
    "chunks of 200 tokens": (words("tokenizer/tokenizer_config.json", '{"model_max_length": 200}'), "knows 77 pos"),
    "chunks of no tokens": (words("tokenizer/tokenizer_config.json", '{"model_max_length": 0}'), "chunks of 0 tokens"),
    "a Long-CLIP": (given("dev", clip=long_clip), "long.safetensors has a Long-CLIP of 248 positions"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(saved, tmp_path, monkeypatch, capsys, case):
    prepare, named = BAD[case]
    (tmp_path / "in").mkdir()
    argv = prepare(saved, tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "-o", "out", "--dtype", "float32", "--offline"]) == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert named in said.err
    assert listing(tmp_path) == ["in"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_mix_of_names_and_shapes_is_told_or_refused(saved, tmp_path, capsys, kind):
    """Dropped, renamed, resized and exchanged tensors: inspect ends in 0 or in one line, never else."""
    for seed in range(20):
        mix_of_names_and_shapes(saved, tmp_path, capsys, kind, seed)


def mix_of_names_and_shapes(saved, tmp_path: Path, capsys, kind: str, seed: int) -> None:
    parts = saved[kind][0]
    rng = np.random.default_rng(seed)
    state = arrays(parts["transformer"]) if seed % 2 else transformer_state(kind, parts["transformer"])
    shapes = {k: x.shape for k, x in state.items()}
    for _ in range(rng.integers(1, 6)):
        name, other = (str(x) for x in rng.choice(list(shapes), 2, replace=False))
        change = rng.integers(5)
        if change == 0:
            del shapes[name]
        elif change == 1:
            shapes[name] = tuple(int(x) for x in rng.integers(0, 40, rng.integers(0, 6)))
        elif change == 2:
            shapes[name], shapes[other] = shapes[other], shapes[name]
        elif change == 3:
            part = rng.choice(name.split("."))
            shapes = {k: s for k, s in shapes.items() if f".{part}." not in k} or {"x": ()}
        else:
            shapes[name.replace(".0.", f".{rng.integers(99)}.")] = shapes.pop(name)
        if len(shapes) < 2:
            break
    code = inspect.main([str(sparse(tmp_path / "a.safetensors", shapes, dtype="F32")), "--json"])
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == (code != 0)
    if said.out:
        told = json.loads(said.out)
        assert (code == 0) == (told["unmapped"] == {} and told["missing"] == [])


def test_numbers_stay_what_they_are_in_eight_bits(tmp_path):
    """A FLUX file of 8-bit floats, as many are published, is read like any other: every value is exact in float16."""
    shapes = manifest("flux1-schnell")["tensors"]
    found = convert.open(sparse(tmp_path / "a.safetensors", shapes, dtype="F8_E4M3"))
    assert (found.unmapped, found.missing) == ({}, [])
    assert found.components["transformer"].weights["img_in.bias"].array().dtype == mx.float16
