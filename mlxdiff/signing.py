"""Content Credentials (C2PA): signs the files of pictures, and says whether a signed file is as it was signed. The key
is the user's, or one that mlxdiff makes on this machine: then a signature shows that a file was not changed since, not
who made it. Needs the extra `sign`; the key is sent nowhere, and nothing is fetched."""

import datetime
import io
import json
import os
import secrets
import shutil
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from . import __version__, foreign
from .console import install, warn
from .errors import Error
from .metadata import DRAWN, SOURCES

KEY, CERTIFICATE = "MLXDIFF_SIGN_KEY", "MLXDIFF_SIGN_CERT"  # names in the environment
MIMES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
LOCAL = "mlxdiff, self-signed on one machine"  # the owner's name in a certificate that mlxdiff made
MEANS = "It shows that a file was not changed since, not who made it."
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_YEARS = 10
_OFFLINE = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}


def check() -> None:
    """Raise before the work if files cannot be signed here."""
    try:
        import c2pa  # noqa: F401 (a native library of 50 MB, which nothing else needs)
        import cryptography  # noqa: F401
    except (ImportError, OSError) as e:  # the second: its native library does not load
        why = f"{e.name} is not here" if isinstance(e, ImportError) else f"it does not load: {_line(e)}"
        raise Error(
            f"Content Credentials are written by c2pa-python, and {why}.", f"Install it: {install('sign')}"
        ) from None


@dataclass(frozen=True)
class Signer:
    certificates: bytes  # PEM: the key's, and those that vouch for it
    key: bytes = field(repr=False)  # PEM, PKCS#8
    algorithm: str  # in C2PA's word
    local: bool  # made by mlxdiff

    def sign(self, data: bytes, kind: str, source: str) -> bytes:
        """A file's bytes with Content Credentials. source: how the picture was made, in IPTC's word."""
        import c2pa

        program = {"name": "mlxdiff", "version": __version__}
        made = {"action": "c2pa.created", "digitalSourceType": SOURCES + source, "softwareAgent": program}
        manifest = {
            "claim_generator_info": [program],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [made]}}],
        }
        out = io.BytesIO()
        info = c2pa.C2paSignerInfo(self.algorithm, self.certificates, self.key, None)
        try:
            with c2pa.Context.from_dict(_OFFLINE) as context, c2pa.Signer.from_info(info) as signer:
                c2pa.Builder(manifest, context).sign(signer, MIMES[kind], io.BytesIO(data), out)
        except c2pa.C2paError as e:
            fix = "C2PA takes certificates for signing documents or mail, issued by another certificate."
            if "not valid at time" in str(e):  # after the clock was set back, or ten years later
                fix = f"Check this machine's clock. For a new key of mlxdiff, delete {folder()}."
            raise Error(f"The picture cannot be signed: {_line(e)}.", fix) from None
        return out.getvalue()


def signer(key: str | Path | None = None, certificate: str | Path | None = None) -> Signer:
    """The signer of the user's key and certificate: PEM files, by default those that MLXDIFF_SIGN_KEY and
    MLXDIFF_SIGN_CERT name; if there are none, those that mlxdiff makes once on this machine. Raises before the work if
    they cannot sign."""
    check()
    key = os.environ.get(KEY) or None if key is None else key
    certificate = os.environ.get(CERTIFICATE) or None if certificate is None else certificate
    if (key is None) != (certificate is None):
        lacks = "key has no certificate" if certificate is None else "certificate has no key"
        raise Error(f"The {lacks} to sign with.", f"Give both, or set both {KEY} and {CERTIFICATE}.")
    if key is not None and certificate is not None:
        made = _read(foreign.path(key), foreign.path(certificate), local=False)
    else:
        own = folder()
        if not own.exists():
            _make(own)
        made = _read(own / "key.pem", own / "certificate.pem", local=True)
    with io.BytesIO() as small:
        Image.new("L", (1, 1)).save(small, "PNG")
        made.sign(small.getvalue(), "PNG", DRAWN)  # a certificate that C2PA refuses is found here
    return made


def announced(key: Path | None = None, certificate: Path | None = None) -> Signer:
    """The signer of a command. It says on standard error when it is a key that mlxdiff made."""
    made = signer(key, certificate)
    if made.local:
        warn(f"Signed with a key that mlxdiff made, in {folder()}. {MEANS}")
    return made


def folder() -> Path:
    """Of the local key: $MLXDIFF_CONFIG, else the system's folder for the settings of programs."""
    named, home = os.environ.get("MLXDIFF_CONFIG"), foreign.path("~")
    if named:
        return foreign.path(named) / "signing"
    if sys.platform == "darwin":
        return home / "Library/Application Support/mlxdiff/signing"
    return Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "mlxdiff/signing"


def _read(key: Path, certificate: Path, local: bool) -> Signer:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    fix = f"Delete {key.parent} for a new key." if local else "Give a PEM file that no password protects."
    try:
        private = serialization.load_pem_private_key(foreign.read(key, fix), None)
    except (ValueError, TypeError) as e:  # the second: it has a password
        raise Error(f"{key} cannot be read as a key: {_line(e)}.", fix) from None
    if local and stat.S_IMODE(os.stat(key).st_mode) & 0o077:
        fix = f"chmod 600 {key}; on a drive without permissions, let MLXDIFF_CONFIG point to another folder."
        raise Error(f"Others can read the key {key}.", fix)
    fix = fix if local else "Give a PEM file of the certificate and those that vouch for it."
    chain = foreign.read(certificate, fix)
    try:
        first = x509.load_pem_x509_certificates(chain)[0]
    except ValueError as e:
        raise Error(f"{certificate} cannot be read as a certificate: {_line(e)}.", fix) from None
    if first.public_key() != private.public_key():
        raise Error(f"{certificate} is of another key than {key}.", "Put the key's own certificate first in the file.")
    if isinstance(private, ec.EllipticCurvePrivateKey):
        algorithm = _CURVES.get(private.curve.name)
    elif isinstance(private, ed25519.Ed25519PrivateKey):
        algorithm = "ed25519"
    else:
        algorithm = "ps256" if isinstance(private, rsa.RSAPrivateKey) else None
    if algorithm is None:
        raise Error(f"C2PA knows no key like {key}.", "Use a P-256, P-384, P-521, Ed25519 or RSA key.")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Signer(chain, private.private_bytes(*form), algorithm, local)


def _make(folder: Path) -> None:
    """Make a key and its certificate. C2PA takes no certificate that vouches for itself, so a second key, which is kept
    nowhere, issues it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    root, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, LOCAL)])] * 2
    names = [
        x509.Name([*name, x509.NameAttribute(x509.NameOID.COMMON_NAME, cn)])
        for name, cn in zip(names, ("root", "key"), strict=True)
    ]

    def certificate(name: x509.Name, public, is_root: bool) -> bytes:
        uses = dict.fromkeys(_USES, False) | dict.fromkeys(("key_cert_sign", "crl_sign"), is_root)
        uses["digital_signature"] = not is_root
        made = x509.CertificateBuilder(names[0], name, public, x509.random_serial_number())
        made = made.not_valid_before(now - datetime.timedelta(days=1))
        made = made.not_valid_after(now + datetime.timedelta(days=365 * _YEARS))
        made = made.add_extension(x509.BasicConstraints(is_root, None), critical=True)
        made = made.add_extension(x509.KeyUsage(**uses), critical=True)
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
        made = made.add_extension(issuer, critical=False)
        if not is_root:
            made = made.add_extension(
                x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
            )
        return made.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    chain = certificate(names[1], key.public_key(), False) + certificate(names[0], root.public_key(), True)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    part = folder.with_name(f".{secrets.token_hex(8)}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir(mode=0o700)
        for name, data in (("key.pem", key.private_bytes(*form)), ("certificate.pem", chain)):
            with open(os.open(part / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
        part.rename(folder)
    except OSError as e:
        if folder.exists():  # another process was faster
            return
        fix = "Let MLXDIFF_CONFIG point to a folder for the key."
        raise Error(f"The key cannot be written to {folder}: {e.strerror or e}.", fix) from None
    finally:  # of a key that was not finished, whatever the reason, nothing stays
        shutil.rmtree(part, ignore_errors=True)


_USES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
_USES += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")


# ---- verifying

HOLDS, CHANGED, NOT_CHECKED = "holds", "changed", "not checked"


def verify(file: Path, kind: str) -> dict | None:
    """What a file's Content Credentials say, and whether they hold. None: it has none. "state" is HOLDS if the file is
    as it was signed, CHANGED if it is not, or NOT_CHECKED with why in "problem"."""
    try:
        import c2pa
    except (ImportError, OSError):
        why = f"c2pa-python is not here; install it: {install('sign')}"
        return {"state": NOT_CHECKED, "problem": why} if kind in MIMES and _carries(file) else None
    own, number = _own()
    try:
        with (
            open(file, "rb") as stream,
            c2pa.Context.from_dict(_OFFLINE | ({"trust": {"user_anchors": own}} if own else {})) as context,
            c2pa.Reader(MIMES[kind], stream, context=context) as reader,
        ):
            return _said(json.loads(reader.json()), number)
    except c2pa.C2paError.ManifestNotFound:
        return None
    except (c2pa.C2paError, ValueError, RecursionError) as e:
        return {"state": CHANGED, "problem": f"they cannot be read: {_line(e)}"}
    except OSError as e:
        raise Error(f"{file} cannot be read: {e.strerror or e}.", "Check the path.") from None


def _said(store: dict, own: str | None) -> dict:
    """The facts of the newest manifest, whose assertions may hold anything. own: our certificate's number."""
    state, manifest = (
        store.get("validation_state"),
        _of(_of(store, "manifests", dict), store.get("active_manifest"), dict),
    )
    actions = []
    for held in _dicts(manifest, "assertions"):
        if str(held.get("label")).startswith("c2pa.actions"):
            actions += _dicts(_of(held, "data", dict), "actions")
    program = next(iter(_dicts(manifest, "claim_generator_info")), {})
    signed = _of(manifest, "signature_info", dict)
    failed = [str(s.get("code")) for s in _dicts(store, "validation_status")]
    return {
        "state": HOLDS if state in ("Valid", "Trusted") else CHANGED,
        "problem": ", ".join(code for code in failed if code != _UNTRUSTED) or None,
        "program": " ".join(str(program[k]) for k in ("name", "version") if k in program) or None,
        "actions": [str(a.get("action")) for a in actions],
        "sources": [str(a["digitalSourceType"]).removeprefix(SOURCES) for a in actions if "digitalSourceType" in a],
        "signer": _of(signed, "issuer", str) or None,
        # By the signature of a root whose key is kept nowhere, and by the one certificate that it signed.
        "this_machine": state == "Trusted" and _of(signed, "cert_serial_number", str) == own,
    }


def _of(held: dict, name: str, kind: type):
    """A value of a foreign object if it is of this kind, else an empty one."""
    return held[name] if isinstance(held.get(name), kind) else kind()


def _dicts(held: dict, name: str) -> list[dict]:
    return [value for value in _of(held, name, list) if isinstance(value, dict)]


def _own() -> tuple[str | None, str | None]:
    """The certificates that mlxdiff made here, as PEM, and the number of the first."""
    from cryptography import x509

    try:
        pem = (folder() / "certificate.pem").read_text(encoding="ascii")
        return pem, str(x509.load_pem_x509_certificates(pem.encode())[0].serial_number)
    except (OSError, ValueError):
        return None, None


_UNTRUSTED = "signingCredential.untrusted"  # its certificate is on no list here: there is none but our own


def _carries(file: Path) -> bool:
    """Whether a file may have Content Credentials, by the name of the box that they begin with."""
    with open(file, "rb") as stream:
        head = stream.read(2**20)
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 2**20))
        return any(b"jumb" in part and b"c2pa" in part for part in (head, stream.read()))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
