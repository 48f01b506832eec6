"""The text of a document: plain text, Markdown or PDF. Knows files, not what is done with their text."""

from __future__ import annotations

import logging
from pathlib import Path

TEXT, PDF = (".txt", ".text", ".md", ".markdown", ".rst"), (".pdf",)


class DocumentError(ValueError):
    """A document is missing, damaged, without text or of a kind that is not read; the message names the file."""


def read_document(path: Path) -> str:
    """The text of a document, of a PDF page by page. Raises DocumentError naming the file."""
    if not path.is_file():
        raise DocumentError(f"{path}: {'is a folder; name the files in it' if path.is_dir() else 'no such file'}")
    if str(path).encode(errors="replace").decode() != str(path):
        raise DocumentError(f"{str(path)!r}: the name is not valid Unicode; rename the file")
    ending = path.suffix.lower()
    if ending in PDF:
        text = _pdf(path)
    elif ending in TEXT:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DocumentError(f"{path}: is not UTF-8 text at byte {error.start}") from None
    else:
        raise DocumentError(
            f"{path}: {ending or 'a name without ending'} is not read; known are {', '.join(TEXT + PDF)}"
        )
    if not text.strip():
        hint = "; a scan must go through text recognition first" if ending in PDF else ""
        raise DocumentError(f"{path}: holds no text{hint}")
    return text


def _pdf(path: Path) -> str:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of every oddity; we tell what matters
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError(f"{path}: is encrypted; remove its password first")
        return "\n\n".join(page.extract_text() for page in reader.pages)
    except DependencyError as error:
        raise DocumentError(f"{path}: is encrypted ({error}); `pip install cryptography` or save it without") from None
    except DocumentError:
        raise
    except Exception as error:  # a reader of damaged files trips over anything
        raise DocumentError(f"{path}: is damaged or no PDF ({error})") from None
