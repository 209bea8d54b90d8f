"""Content Credentials, and `mlxdiff inspect PICTURE`. References: c2pa's own reader, which is not ours; the bytes of
files changed one by one; keys and certificates of `cryptography`; NumPy for what a JPEG changes."""

import datetime
import io
import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlxdiff import images, metadata, provenance, signing
from mlxdiff.convert.inspect import main as inspect
from mlxdiff.errors import Error
from mlxdiff.generate import main as generate
from mlxdiff.guides import Guide
from mlxdiff.request import Request

from .test_metadata import A1111, ENDINGS, FULL, exif, picture, put, source_of

HERE = all(__import__("importlib.util").util.find_spec(name) for name in ("c2pa", "cryptography"))
signs = pytest.mark.skipif(not HERE, reason="signing needs c2pa-python: pip install .[sign]")


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch) -> Path:
    """A user's folder without a key."""
    monkeypatch.setenv("MLXDIFF_CONFIG", str(tmp_path / "config"))
    for name in (signing.KEY, signing.CERTIFICATE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "config"


def signed(path: Path, **options) -> Path:
    return images.save(picture(), path, FULL, "m", "float32", signer=signing.signer(), **options)


# ---- signing


@signs
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_signed_file_holds_and_a_changed_one_does_not(tmp_path, ending):
    """By c2pa's reader: valid, with what it says. Then one pixel is changed by hand, in the same file."""
    import c2pa

    file = signed(tmp_path / f"a.{ending}")
    kind = images.kind_of(file)
    with open(file, "rb") as stream, c2pa.Reader(signing.MIMES[kind], stream) as reader:
        said = json.loads(reader.json())
    assert said["validation_state"] == "Valid"
    (held,) = said["manifests"].values()
    assert held["claim_generator_info"][0]["name"] == "mlxdiff"
    (action,) = [a for e in held["assertions"] if e["label"].startswith("c2pa.actions") for a in e["data"]["actions"]]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", metadata.SOURCES + metadata.DRAWN)
    assert images.read_settings(file) == (FULL, "m")
    assert source_of(file.read_bytes()) == metadata.DRAWN
    plain = images.save(picture(), tmp_path / f"plain.{ending}", FULL, "m", "float32")
    assert np.array_equal(np.asarray(images.read(file)), np.asarray(images.read(plain)))

    ours = signing.verify(file, kind)
    assert (ours["state"], ours["problem"], ours["this_machine"]) == (signing.HOLDS, None, True)
    assert (ours["actions"], ours["sources"]) == (["c2pa.created"], [metadata.DRAWN])
    whole = file.read_bytes()
    at = whole.index({"png": b"IDAT", "jpg": b"\xff\xda", "webp": b"VP8 "}[ending]) + 40  # within the pixels
    for where in (at, whole.index(b"mlxdiff:request") + 40):  # and within the settings
        (tmp_path / "changed").write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
        found = signing.verify(tmp_path / "changed", kind)
        assert (found["state"], found["problem"]) == (signing.CHANGED, "assertion.dataHash.mismatch")


@signs
def test_one_changed_pixel_of_a_png_is_found(tmp_path):
    """Drawn into the picture and packed again, with the old credentials put back: what a forger would do."""
    file = signed(tmp_path / "a.png")
    chunk = _chunk(file.read_bytes(), b"caBX")
    pixels = np.array(Image.open(file))
    pixels[3, 5, 0] ^= 1
    out = io.BytesIO()
    images.encode(Image.fromarray(pixels), out, "PNG", metadata.DRAWN, images.read_metadata(file).texts)
    forged = out.getvalue()[:33] + chunk + out.getvalue()[33:]
    (tmp_path / "forged.png").write_bytes(forged)
    assert Image.open(tmp_path / "forged.png").getpixel((5, 3)) != picture().getpixel((5, 3))
    assert signing.verify(tmp_path / "forged.png", "PNG")["state"] == signing.CHANGED
    unchanged = file.read_bytes()
    assert forged != unchanged
    assert signing.verify(file, "PNG")["state"] == signing.HOLDS


def _chunk(png: bytes, name: bytes) -> bytes:
    at = png.index(name) - 4
    return png[at : at + 12 + int.from_bytes(png[at : at + 4], "big")]


@signs
def test_the_local_key_is_made_once_and_is_the_users_alone(tmp_path, config):
    first = signing.signer()
    key = config / "signing" / "key.pem"
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(key.parent).st_mode) == 0o700
    assert sorted(p.name for p in config.rglob("*")) == ["certificate.pem", "key.pem", "signing"]
    assert (signing.signer(), first.local) == (first, True)
    assert "PRIVATE" not in repr(first)
    key.chmod(0o644)
    with pytest.raises(Error, match="Others can read the key"):
        signing.signer()


@signs
def test_ctrl_c_leaves_no_half_of_a_key(config, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        signing.signer()
    assert not [*config.iterdir()]


@signs
def test_a_clock_that_was_set_back_is_named(config, monkeypatch):
    """The key was made while it was ten days ahead."""

    class Ahead(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(days=10)

    made = SimpleNamespace(datetime=Ahead, timedelta=datetime.timedelta, timezone=datetime.timezone)
    monkeypatch.setattr(signing, "datetime", made)
    with pytest.raises(Error, match=r"not valid at time of signing\. Check this machine's clock"):
        signing.signer()


@signs
def test_a_key_of_another_machine_is_not_called_ours(tmp_path, config, monkeypatch):
    file = signed(tmp_path / "a.png")
    monkeypatch.setenv("MLXDIFF_CONFIG", str(tmp_path / "other"))
    for _ in range(2):  # without a key here, and with another
        found = signing.verify(file, "PNG")
        assert (found["state"], found["this_machine"], found["signer"]) == (signing.HOLDS, False, signing.LOCAL)
        signing.signer()


@signs
def test_a_forger_with_our_names_and_number_is_not_called_ours(tmp_path, config, monkeypatch):
    """All that a published picture shows of a certificate can be copied. Only the root's signature cannot."""
    from cryptography import x509

    signing.signer()
    mine = (config / "signing" / "certificate.pem").read_bytes()
    number = x509.load_pem_x509_certificates(mine)[0].serial_number
    monkeypatch.setattr(x509, "random_serial_number", lambda: number)
    monkeypatch.setenv("MLXDIFF_CONFIG", str(tmp_path / "forger"))
    file = signed(tmp_path / "a.png")
    monkeypatch.setenv("MLXDIFF_CONFIG", str(config))
    found = signing.verify(file, "PNG")
    assert (found["state"], found["signer"], found["this_machine"]) == (signing.HOLDS, signing.LOCAL, False)
    assert signing.verify(signed(tmp_path / "b.png"), "PNG")["this_machine"]


@signs
def test_a_damaged_folder_of_keys_is_one_error_and_hides_nothing(tmp_path, config):
    file = signed(tmp_path / "a.png")
    place = config / "signing"
    for name, text in (("certificate.pem", "hello"), ("certificate.pem", "\xff"), ("key.pem", ""), ("key.pem", None)):
        if text is None:
            (place / name).unlink()
        else:
            (place / name).write_text(text)
        with pytest.raises(Error, match=r"cannot be read.*Delete .*signing for a new key"):
            signing.signer()
        found = signing.verify(file, "PNG")
        assert (found["state"], found["this_machine"]) == (signing.HOLDS, False)


def own(folder: Path, algorithm: str = "ed25519", mail: bool = True) -> tuple[Path, Path]:
    """A user's key and certificate, issued by another. mail: for what it may be used."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    makes = {
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "ps256": lambda: rsa.generate_private_key(65537, 2048),
        "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    }
    issuer, key = ec.generate_private_key(ec.SECP256R1()), makes[algorithm]()
    name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Jane\x1b[31m Doe")])
    above = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Issuer")])
    now = datetime.datetime.now(datetime.timezone.utc)
    use = x509.ExtendedKeyUsageOID.EMAIL_PROTECTION if mail else x509.ExtendedKeyUsageOID.SERVER_AUTH
    used = dict.fromkeys(signing._USES, False) | {"digital_signature": True}
    made = (
        x509.CertificateBuilder(above, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(x509.KeyUsage(**used), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
        .sign(issuer, hashes.SHA256())
    )
    old = (
        serialization.PrivateFormat.PKCS8 if algorithm == "ed25519" else serialization.PrivateFormat.TraditionalOpenSSL
    )
    pem = serialization.Encoding.PEM
    (folder / "key.pem").write_bytes(key.private_bytes(pem, old, serialization.NoEncryption()))
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    return folder / "key.pem", folder / "cert.pem"


@signs
@pytest.mark.parametrize("algorithm", ["ed25519", "es384", "ps256"])
def test_a_users_own_key_signs(tmp_path, config, monkeypatch, algorithm):
    key, certificate = own(tmp_path, algorithm)
    signer = signing.signer(key, certificate)
    assert (signer.algorithm, signer.local) == (algorithm, False)
    file = images.save(picture(), tmp_path / "a.jpg", FULL, "m", "float32", signer=signer)
    found = signing.verify(file, "JPEG")
    assert (found["state"], found["signer"], found["this_machine"]) == (signing.HOLDS, "Jane\x1b[31m Doe", False)
    assert not config.exists()
    monkeypatch.setenv(signing.KEY, str(key))
    monkeypatch.setenv(signing.CERTIFICATE, str(certificate))
    assert signing.signer() == signer


@signs
def test_keys_that_cannot_sign_are_refused_before_the_work(tmp_path, capsys, monkeypatch):
    key, certificate = own(tmp_path)
    (tmp_path / "other").mkdir()
    other, bad = own(tmp_path / "other", "secp256k1", mail=False)
    (tmp_path / "mail").mkdir()
    server, wrong = own(tmp_path / "mail", mail=False)
    (tmp_path / "text.pem").write_text("hello")
    monkeypatch.chdir(tmp_path)
    for typed, says in (
        (["--sign-key", key], "nothing is to be signed"),
        (["--sign", "--sign-key", key], "The key has no certificate"),
        (["--sign", "--sign-cert", certificate], "The certificate has no key"),
        (["--sign", "--sign-key", "no.pem", "--sign-cert", certificate], "no.pem cannot be read"),
        (["--sign", "--sign-key", "text.pem", "--sign-cert", certificate], "text.pem cannot be read as a key"),
        (["--sign", "--sign-key", key, "--sign-cert", "text.pem"], "text.pem cannot be read as a certificate"),
        (["--sign", "--sign-key", key, "--sign-cert", wrong], "is of another key than"),
        (["--sign", "--sign-key", other, "--sign-cert", bad], "C2PA knows no key like"),
        (["--sign", "--sign-key", server, "--sign-cert", wrong], "The picture cannot be signed"),
    ):
        assert generate(["a house", "-o", "a.png", *map(str, typed)]) == 1
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_without_the_extra_there_is_one_line_and_no_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert generate(["a house", "--sign", "-o", "a.png"]) == 1
    said = capsys.readouterr().err
    assert "written by c2pa-python" in said
    assert "pip install" in said
    assert "[sign]" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@signs
def test_the_command_signs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["a red house", "-s", "3", "--steps", "1", "-W", "64", "-H", "64"]
    assert generate([*small, "--sign", "-o", "a.webp"]) == 0
    assert "Signed with a key that mlxdiff made" in capsys.readouterr().err
    assert inspect(["a.webp"]) == 0
    out = capsys.readouterr().out
    assert "Content Credentials hold, the file is as it was signed: mlxdiff" in out
    assert "says c2pa.created, trainedAlgorithmicMedia\n" in out
    own = "a key that mlxdiff made on this machine: it shows that the file was not changed since, not who made it"
    assert f"signed by   {own}\n" in out
    monkeypatch.setenv("MLXDIFF_CONFIG", str(tmp_path / "elsewhere"))
    assert inspect(["a.webp"]) == 0
    assert f"“{signing.LOCAL}”, a name that nothing here vouches for" in capsys.readouterr().out


@signs
def test_the_studio_signs(tmp_path, monkeypatch, capsys):
    """Its pictures, its comparisons, and its copies in other formats."""
    pytest.importorskip("anywidget", reason="the studio needs ipywidgets and anywidget: pip install .[studio]")
    from mlxdiff.widgets import Studio
    from mlxdiff.widgets.worker import Worker

    from . import fakes

    monkeypatch.chdir(tmp_path)
    studio = Studio("fake", worker=Worker(fakes.load), steps=2, signer=signing.announced())
    assert signing.MEANS in capsys.readouterr().err
    studio.generate().result(30)
    studio.compare(seed=[1, 2]).result()
    studio._worker.submit("fake", None, lambda *_: None).result(30)
    files = list((tmp_path / "pictures").glob("*.png"))
    assert len(files) == 4
    assert {signing.verify(file, "PNG")["state"] for file in files} == {signing.HOLDS}
    name, data = studio.images[0].copy("jpg", studio.signer)
    (tmp_path / name).write_bytes(data)
    assert signing.verify(tmp_path / name, "JPEG")["state"] == signing.HOLDS


# ---- inspect


def test_inspect_says_where_a_picture_comes_from(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "_STRIP", 16)  # it is compared in strips
    images.save(picture(), Path("a.png"), FULL, "storybook", "float32")
    assert inspect(["a.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Request.from_json(json.dumps(found["settings"])) == FULL
    assert (found["model"], found["source"], found["program"][:8]) == ("storybook", metadata.DRAWN, "mlxdiff ")
    assert (found["format"], found["width"], found["height"], found["credentials"]) == ("PNG", 72, 40, None)
    picture().save("b.jpg", quality=95)
    apart = np.abs(np.asarray(Image.open("b.jpg"), float) - np.asarray(picture()))
    assert found["as_jpeg"]["largest_change"] == apart.max()
    assert found["as_jpeg"]["decibels"] == round(10 * np.log10(255**2 / (apart**2).mean()), 1)
    assert inspect(["a.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = ["program", "settings", "LoRA", "reference", "mark", "signature", "as"]
    assert [line.split()[0] for line in lines[1:]] == named
    assert "seed 7, steps 20, sampler dpmpp_2m" in lines[2]
    assert lines[3:5] == ["  LoRA        a.safetensors:0.8", "  reference   ip-adapter b.png at 0.5"]
    assert "IPTC trainedAlgorithmicMedia (made by a model)" in lines[5]
    guided = Guide("photo.png", "canny", 0.8, (0, 0.5), detect="canny")
    images.save(picture(), Path("c.png"), replace(FULL, controls=(guided,)), "storybook", "float32")
    assert inspect(["c.png"]) == 0
    told = "  control     canny photo.png (canny of it) at 0.8 from 0 to 0.5 of the steps\n"
    assert told in capsys.readouterr().out


def test_inspect_of_pictures_of_others(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(Path("a.jpg"), "JPEG", exif(b"UNICODE\0" + A1111.encode("utf-16-le"), software="\x1b[31mred"))
    picture().save("plain.bmp")
    clear = picture().convert("RGBA")
    clear.putalpha(7)
    clear.save("clear.webp")
    for name, says in (
        ("a.jpg", ["\\x1b[31mred", "“a house”, seed 5", "mark        none", "signature   none"]),
        ("plain.bmp", ["says nothing", "none that mlxdiff reads"]),
        ("clear.webp", ["loses its transparency"]),
    ):
        assert inspect([name]) == 0
        out = capsys.readouterr().out
        assert all(words in out for words in says)
        assert "\x1b" not in out


@pytest.mark.parametrize("ending", ENDINGS)
def test_credentials_are_seen_without_the_extra(tmp_path, capsys, monkeypatch, ending):
    """The box of a signed file, written by hand: whether it holds is not known here."""
    file = images.save(picture(), tmp_path / f"a.{ending}", FULL, "m", "float32")
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert provenance.facts(file)["credentials"] is None
    if HERE:
        monkeypatch.undo()
        monkeypatch.setenv("MLXDIFF_CONFIG", str(tmp_path / "config"))
        file = signed(tmp_path / f"b.{ending}")
        monkeypatch.setitem(sys.modules, "c2pa", None)
        assert inspect([str(file)]) == 0
        assert "Content Credentials, not checked: c2pa-python is not here; install it: pip" in capsys.readouterr().out


@signs
def test_damaged_credentials_are_told_in_one_line(tmp_path):
    """100 files with a byte changed within the claims and the signature of a JPEG."""
    file, rng = signed(tmp_path / "a.jpg"), np.random.default_rng(5)
    whole, states = file.read_bytes(), []
    for _ in range(100):
        data, where = bytearray(whole), rng.integers(whole.index(b"jumb"), whole.index(b"c2pa.signature") + 400)
        data[where] ^= rng.integers(1, 256)
        (tmp_path / "bad.jpg").write_bytes(data)
        found = provenance.facts(tmp_path / "bad.jpg")
        states.append(found["credentials"] and found["credentials"]["state"])
        assert provenance.describe(found).count("\n") == 7 + (states[-1] == signing.HOLDS)
    assert states.count(signing.CHANGED) > 90  # the others lie where nothing is said


def test_what_is_no_picture_is_inspected_as_a_model(tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "BM.safetensors").write_bytes(b"BM\0\0\0\0\0\0{}")
    assert inspect([str(tmp_path / "cut.png")]) == 1
    assert "cannot be read as a picture" in capsys.readouterr().err
    assert inspect([str(tmp_path / "BM.safetensors")]) == 1
    assert "BM.safetensors" in capsys.readouterr().err
