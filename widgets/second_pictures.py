"""The pictures beside the prompt that come from the page: what each is for, and those that guide the next one."""

import io
from dataclasses import replace

from ..errors import Error
from ..guides import MASKED, Guide
from .gallery import writable
from .guide_rows import GuideRows, Offer
from .painting import Painting
from .settings import GUIDES, Settings
from .start_picture import GUIDE, START, write_picture


class SecondPictures:
    """Those of one studio. rows: for its controls and its references, which are in its traits of GUIDES."""

    def __init__(self, studio: Settings, painting: Painting, rows: dict[str, GuideRows]):
        self._studio, self._painting, self._rows = studio, painting, rows

    def uses(self) -> list[dict[str, str]]:
        """What a picture from the page may be for: name, label, and why not ("" if it may)."""
        model, known = self._studio.model, self._studio._known
        edits = known.edits > 0
        no_mask = "" if self._studio._taken else "There is no start picture yet."
        no_mask = f"{model} edits: it takes no mask." if edits else no_mask
        no_reference = "" if known.takes_references else f"{model} takes no references."
        rows = (
            ("begin", "Edit it" if edits else "Begin with it", ""),
            ("mask", "As a mask: white is drawn anew", no_mask),
            ("control", "As a control: follow its lines", ""),
            ("reference", "As a reference: take over its style", no_reference),
            ("restore", "Restore its settings", ""),
        )
        return [dict(zip(("name", "label", "why"), row, strict=True)) for row in rows]

    def take(self, data: bytes, use: str) -> str:
        """Take a picture from the page for a use, by its name. Returns what happened."""
        studio = self._studio
        if why := {row["name"]: row["why"] for row in self.uses()}[use]:
            raise Error(why)
        folder = writable(studio.folder)
        if use == "restore":
            studio.load(data)
            return "Settings restored"
        if use == "mask":
            self._painting.take_file(data, folder)
            return "Only what is white in this mask is drawn anew"
        if use == "begin":
            studio._add(write_picture(data, folder, START))
            return f"The next picture {'edits' if studio._known.edits else 'begins with'} this one"
        names = [] if self._alone(use) else studio._known.networks(use)
        guide = Guide(write_picture(data, folder, GUIDE), names[0] if names else None)
        studio.set_trait(GUIDES[use], [*getattr(studio, GUIDES[use]), guide])
        return f"This picture is a {use} of the next one"

    def show(self) -> None:
        """Show the guides that the next run takes."""
        for what, rows in self._rows.items():
            try:
                rows.show(getattr(self._studio, GUIDES[what]), self._offer(what))
            except Error:
                self._studio.set_trait(GUIDES[what], [])
                raise

    def make_edges(self, i: int) -> None:
        """Put a control picture's edges in its place."""
        from .. import detect

        guides, file = [*self._studio.control_guides], io.BytesIO()
        detect.run("canny", guides[i].image).save(file, "PNG")
        folder = writable(self._studio.folder)
        guides[i] = replace(guides[i], image=write_picture(file.getvalue(), folder, GUIDE))
        self._studio.control_guides = guides

    def inpaint(self) -> None:
        """Let a network that was made to inpaint guide what is drawn anew of the start picture."""
        studio = self._studio
        names = studio._known.networks("control", masked=True)
        studio.control_guides = [*studio.control_guides, Guide(MASKED, names[0] if names else None)]

    def forget_mask(self) -> None:
        """There is no mask any more: what reads the masked start picture goes with it."""
        self._studio.control_guides = [guide for guide in self._studio.control_guides if not guide.masked]

    @property
    def inpaintable(self) -> bool:
        """Whether a network may guide what is drawn anew, and none does yet."""
        studio = self._studio
        networks = studio._known.networks("control", masked=True)
        return studio.masked and bool(networks) and not any(guide.masked for guide in studio.control_guides)

    def _offer(self, what: str) -> Offer:
        known = self._studio._known
        networks = known.networks(what), known.networks(what, masked=True)
        return Offer(*map(tuple, networks), known.aspects if what == "reference" else (), self._alone(what))

    def _alone(self, what: str) -> bool:
        """Whether the model itself reads such a picture."""
        return what == "control" and self._studio._known.reads_control
