"""What a picture file says about the picture: its settings and how it was made. Written into PNG, JPEG and WebP, and
read from any file: PNG's texts, XMP, and the EXIF comment of A1111 and the EXIF texts of ComfyUI. What is read is
foreign: it is bounded, decoded strictly, and an XMP packet that declares a document type is not read, since entities
are declared there."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from xml.parsers import expat

from PIL import Image, PngImagePlugin

from . import __version__
from .errors import Error

MAX_TEXT = 2**20  # characters of settings or of an XMP packet; real ones have hundreds
REQUEST, MODEL, RECIPE, A1111 = "mlxdiff", "mlxdiff-model", "mlxdiff-recipe", "parameters"
ENLARGED = "mlxdiff-upscale"  # what a picture was enlarged by, as JSON
SETTINGS = {REQUEST, A1111}  # of a picture that a model drew
COMFYUI = ("prompt", "workflow")  # its graphs, as JSON

# IPTC's words for where a picture comes from. A control or reference picture only guides a new picture, so it does not
# make an edit: IPTC's examples of edits are inpainting and outpainting.
SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DRAWN = "trainedAlgorithmicMedia"
EDITED = "compositeWithTrainedAlgorithmicMedia"
COMPUTED = "algorithmicMedia"  # by a program that learned from nothing
ENHANCED = "algorithmicallyEnhanced"  # an enlarged photograph
GENERATED = (DRAWN, EDITED, "compositeSynthetic")  # a model made all or a part of it

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DESCRIPTION, _RESOURCE = f"{_RDF} Description", f"{_RDF} resource"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_XMP = "http://ns.adobe.com/xap/1.0/"
_OURS = "urn:x-mlxdiff:1.0/"
_SPACES = {"Iptc4xmpExt": _IPTC, "xmp": _XMP, "mlxdiff": _OURS}
_PROPERTIES = {REQUEST: "request", MODEL: "model", RECIPE: "recipe", ENLARGED: "upscale"}  # of texts, in _OURS
_SOURCE, _TOOL = f"{_IPTC} DigitalSourceType", f"{_XMP} CreatorTool"
QUALITY, LOSSLESS = 95, 100  # of WebP, 100 loses nothing
# Quality of a JPEG: from here on colours keep every pixel; measured at 95: 46 dB, not 40, for a quarter more bytes.
_FULL_COLOUR = 90
_EFFORT = 50  # of 100: how hard to look for a smaller file that loses nothing

_PNG_XMP = "XML:com.adobe.xmp"

_IN_JPEG = b"http://ns.adobe.com/xap/1.0/\0"  # how the marker of an XMP packet begins
_MARKER = 65533  # bytes of a JPEG's marker, without its length
_CAPTION, _MAKE, _CAMERA, _SOFTWARE, _EXIF, _COMMENT = 0x010E, 0x010F, 0x0110, 0x0131, 0x8769, 0x9286  # EXIF tags
_MOST_EXIF = 2**24  # bytes
_DEPTH = 64  # elements of XMP within each other; real packets have 8


@dataclass(frozen=True)
class Metadata:
    texts: dict[str, str]  # by the names that a PNG's chunks have, of every format
    source: str | None  # IPTC's word for how it was made: DRAWN, ..., or a foreign one
    tool: str | None  # which program says that it made it
    problems: tuple[str, ...] = ()  # what could not be read, each a clause


# ---- writing


def options(kind: str, texts: dict[str, str], source: str, quality: int | None = None) -> dict:
    """PIL's options for a file of this kind ("PNG", "JPEG", "WEBP") that carries texts and says how it was made."""
    texts = {name: _encodable(text) for name, text in texts.items() if name != _PNG_XMP}
    packet = _packet(source, texts)
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        for name, text in ({_PNG_XMP: packet} | texts).items():
            info.add_itxt(name, text)
        return {"pnginfo": info}
    exif = _exif(texts)
    quality = QUALITY if quality is None else quality
    if kind == "WEBP":
        lossy = {"quality": quality} if quality < LOSSLESS else {"lossless": True, "quality": _EFFORT}
        return lossy | {"xmp": packet.encode(), "exif": exif}
    body = _IN_JPEG + packet.encode()
    for what, data in (("settings", body), ("text for other programs", exif)):
        if len(data) + 2 > _MARKER:
            problem = f"The {what} of this picture are {len(data)} bytes, and a JPEG holds at most {_MARKER}."
            raise Error(problem, "End the name in .png or .webp, or shorten the prompt.")
    marker = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body  # a marker of its own, beside EXIF's
    return {"quality": quality, "subsampling": 0 if quality >= _FULL_COLOUR else 2, "extra": marker, "exif": exif}


def _exif(texts: dict[str, str]) -> bytes:
    """The EXIF that A1111 writes."""
    exif = Image.Exif()
    exif[_SOFTWARE] = _program()
    if A1111 in texts:
        exif[_EXIF] = {_COMMENT: b"UNICODE\0" + texts[A1111].encode("utf-16-be")}
    return exif.tobytes()


def _packet(source: str, texts: dict[str, str]) -> str:
    """An XMP packet. It repeats the texts of a PNG, since programs that turn a PNG into a JPEG keep this one."""
    held = {"Iptc4xmpExt:DigitalSourceType": SOURCES + source, "xmp:CreatorTool": _program()}
    if MODEL in texts:
        held |= {"Iptc4xmpExt:AISystemUsed": f"mlxdiff with {texts[MODEL]}"}
        held |= {"Iptc4xmpExt:AISystemVersionUsed": __version__}
    held |= {f"mlxdiff:{name}": texts[text] for text, name in _PROPERTIES.items() if text in texts}
    spaces = "".join(f' xmlns:{name}="{uri}"' for name, uri in _SPACES.items())
    inside = "".join(f"<{name}>{_legal(value)}</{name}>" for name, value in held.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="{_RDF}"><rdf:Description rdf:about=""{spaces}>{inside}</rdf:Description></rdf:RDF>'
        '</x:xmpmeta><?xpacket end="w"?>'
    )


def _program() -> str:
    return f"mlxdiff {__version__}"


def _encodable(text: str) -> str:
    """The text with what is not Unicode escaped: a path may hold any bytes, and no name may cost a finished picture."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _legal(text: str) -> str:
    """The text as XML holds it. The characters that it cannot hold are escaped as in JSON, which has them in strings
    alone, so that there they mean the same."""
    for c, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):  # as `xml.sax.saxutils.escape`, which loads slowly
        text = text.replace(c, entity)
    return "".join(c if c >= " " and c not in "\ufffe\uffff" else f"\\u{ord(c):04x}" for c in text)


# ---- reading


def read(image: Image.Image, whole: bool = False) -> Metadata:
    """What an opened picture says about itself. whole: also what a PNG says behind its pixels, which are read then."""
    info, problems = image.info, []
    named = (getattr(image, "text", {}) if whole else info).items()
    texts = {k: str(v) for k, v in named if isinstance(k, str) and isinstance(v, str)} if image.format == "PNG" else {}
    packet, found = texts.pop(_PNG_XMP, None) or info.get("xmp"), {}
    try:
        found = properties(packet.encode() if isinstance(packet, str) else packet) if packet else {}
    except (ValueError, expat.ExpatError) as e:
        problems.append(f"its XMP cannot be read: {e}")
    in_xmp = {text: found[f"{_OURS} {name}"] for text, name in _PROPERTIES.items() if f"{_OURS} {name}" in found}
    try:
        in_exif, software = _of_exif(info.get("exif"))
    except (ValueError, SyntaxError, OSError, RuntimeError, struct.error, TypeError, KeyError) as e:
        in_exif, software = {}, None
        problems.append(f"its EXIF cannot be read: {e}")
    source = found.get(_SOURCE, "")
    return Metadata(
        in_exif | in_xmp | texts,
        source.removeprefix(SOURCES).removeprefix(SOURCES.replace("http:", "https:")) or None,
        found.get(_TOOL) or software or texts.get("Software"),
        tuple(problems),
    )


def properties(packet: bytes) -> dict[str, str]:
    """The properties of an XMP packet, by "namespace name". Of a list or a structure, the texts are joined. Raises
    ValueError or ExpatError."""
    if len(packet) > MAX_TEXT:
        raise ValueError(f"it has {len(packet)} bytes, more than {MAX_TEXT}")
    packet = packet.rstrip(b"\0")
    if "\0" in packet.decode("utf-8"):
        raise ValueError("it is not UTF-8")
    found: dict[str, list[str]] = {}
    above: list[str] = []  # the elements around the text that is read
    parser = expat.ParserCreate("utf-8", " ")  # whatever encoding the packet declares
    parser.buffer_text = True

    def begin(name: str, attributes: dict[str, str]) -> None:
        above.append(name)
        if len(above) > _DEPTH:
            raise ValueError("its elements are nested too deeply")
        if name == _DESCRIPTION and above.count(name) == 1:
            found.update({key: [value] for key, value in attributes.items()})
        elif _RESOURCE in attributes and within() == name:
            found[name] = [attributes[_RESOURCE]]

    def within() -> str | None:
        """The property that is read: the element within the outermost description."""
        at = above.index(_DESCRIPTION) + 1 if _DESCRIPTION in above else len(above)
        return above[at] if at < len(above) else None

    def text(piece: str) -> None:
        if (name := within()) is not None:
            found.setdefault(name, []).append(piece)

    def refuse(*_) -> None:
        raise ValueError("it declares a document type")

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.CharacterDataHandler = begin, text
    parser.EndElementHandler = lambda _: above.pop()
    parser.Parse(packet, True)
    return {name: "".join(pieces).strip() for name, pieces in found.items()}


def _of_exif(raw: bytes | None) -> tuple[dict[str, str], str | None]:
    """The texts that other programs write into EXIF, and the program's name."""
    if not raw:
        return {}, None
    if len(raw) > _MOST_EXIF:
        raise ValueError(f"it has {len(raw)} bytes, more than {_MOST_EXIF}")
    exif = Image.Exif()
    exif.load(raw)
    texts = dict(_graphs(exif))
    if (comment := _comment(exif.get_ifd(_EXIF).get(_COMMENT))) is not None:
        texts[A1111] = comment
    software = exif.get(_SOFTWARE)
    return texts, software.strip("\0 ") if isinstance(software, str) else None


def _graphs(exif: Image.Exif) -> Iterator[tuple[str, str]]:
    """ComfyUI and its extensions write "prompt:{...}" and "workflow:{...}" into fields that are meant for cameras."""
    for tag in (_CAMERA, _MAKE, _CAPTION):
        value = exif.get(tag)
        name, colon, text = value.partition(":") if isinstance(value, str) else ("", "", "")
        if colon and name.strip().lower() in COMFYUI and text.strip("\0 ").startswith("{"):
            yield name.strip().lower(), text.strip("\0 ")


def _comment(value: object) -> str | None:
    """EXIF's UserComment, if it holds A1111's text: it begins with the name of its encoding, which programs disagree
    about. None: a camera's, or none."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bytes):
        code, body = value[:8], value[8:]
        if code == b"UNICODE\0" and b"\0" in body:
            text = body.decode(_utf16(body))
        else:
            text = (body if code in (b"UNICODE\0", b"ASCII\0\0\0", bytes(8)) else value).decode("utf-8")
    else:
        return None
    text = text.strip("\0 \ufeff")
    return text if "Steps:" in text else None  # A1111 writes it always, and cameras never


def _utf16(body: bytes) -> str:
    """Which byte order a text is in, by the zeros beside its Latin letters."""
    return "utf-16-be" if body[::2].count(0) >= body[1::2].count(0) else "utf-16-le"
