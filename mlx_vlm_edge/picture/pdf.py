"""A page of a PDF -> an RGB image, by the extra [pdf]."""

from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 2048  # pixels of a rendered page's longer side
_PDFIUM = Lock()  # which is not for two threads at once, whatever documents they have


@dataclass(frozen=True)
class Page:
    """A page of a PDF, to give in the place of an image; pages are counted from 1."""

    source: Any
    number: int

    def __post_init__(self) -> None:
        if type(self.number) is not int or self.number < 1:
            raise UsageError(f"page {self.number!r}: pages are counted from 1")


def is_pdf(source: Any) -> bool:
    """Whether a file's name or content says that it is a PDF."""
    if isinstance(source, bytes):
        return source.startswith(b"%PDF-")
    return str(source).lower().partition("?")[0].endswith(".pdf")


def page_image(source: Path | bytes, name: str, number: int | None) -> "Image":
    """The page of that number; None for the only one. Raises UsageError without the extra, for a
    damaged PDF, and where several pages leave a choice."""
    try:
        import pypdfium2
    except ImportError:
        raise UsageError(
            f"{name}: reading PDF pages needs pypdfium2: pip install pypdfium2"
        ) from None
    try:
        with _PDFIUM, pypdfium2.PdfDocument(source) as document:
            return _rendered(document, name, number)
    except (pypdfium2.PdfiumError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UsageError(f"{name}: cannot be read as a PDF ({error})") from None


def _rendered(document: Any, name: str, number: int | None) -> "Image":
    count = len(document)
    if number is None and count > 1:
        raise UsageError(
            f"{name}: has {count:,} pages: save the one that is meant as a picture or a PDF of its "
            "own, or name it (generate --page N; picture.pdf.Page in Python)"
        )
    if not 1 <= (number or 1) <= count:
        raise UsageError(f"{name}: has {count:,} pages, no page {number or 1}")
    page = document[(number or 1) - 1]
    bitmap = page.render(scale=LONGEST / max(page.get_size()))
    image: Image = bitmap.to_pil().convert("RGB")
    bitmap.close()  # here, not when Python gets to it: another thread may be in PDFium then
    page.close()
    return image
