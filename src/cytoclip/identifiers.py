"""What may name a person: dates, record numbers, names and addresses in a text, found by their form and masked.

Forms, not understanding: a name without a title before it or a caret in it is not found. The kinds are those of the
US Safe Harbor rule (45 CFR 164.514(b)(2)) that a caption or a picture's metadata could hold.
"""

from __future__ import annotations

import re

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
_KEYED = r"(?:mrn|accession|acc|case|patient|pat|record|specimen|chart|hospital|medical record|slide)"

# Every quantifier is bounded, so that no text takes long.
FORMS = {
    "date": re.compile(
        r"(?<!\d)(?:19|20)\d{2}([-/.:])(?:0?[1-9]|1[0-2])\1(?:0?[1-9]|[12]\d|3[01])(?!\d)"
        r"|(?<!\d)\d{1,2}([-/.])\d{1,2}\2(?:19|20)\d{2}(?!\d)"
        rf"|\b\d{{1,2}}(?:st|nd|rd|th)?\s{{1,3}}{_MONTH},?\s{{1,3}}(?:19|20)\d{{2}}\b"
        rf"|\b{_MONTH}\s{{1,3}}\d{{1,2}}(?:st|nd|rd|th)?,\s{{1,3}}(?:19|20)\d{{2}}\b",
        re.IGNORECASE,
    ),
    "record number": re.compile(
        rf"\b{_KEYED}[\s._-]{{0,3}}(?:id|no|nr|number|num)?[\s.:#=_-]{{0,4}}[a-z]{{0,3}}[-_]?\d{{4,12}}\b"
        r"|(?-i:\b[A-Z]{1,3}\d{2}-\d{3,7}\b)"  # S19-12345, as pathology numbers its cases
        r"|\b\d{3}-\d{2}-\d{4}\b",
        re.IGNORECASE,
    ),
    "name": re.compile(
        r"\b[^\W\d_]{2,30}\^[^\W\d_]{1,30}(?:\^[^\W\d_]{0,30}){0,3}"  # DOE^JANE, as DICOM writes names
        r"|\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Herr|Frau|Mme|Mlle|Sr|Sra)\.?\s[A-Z][^\W\d_]{1,30}(?:\s[A-Z][^\W\d_]{1,30})?"
        r"|(?i:\bpatient'?s?[\s_]{0,2}name)\W{1,3}\w{2,30}(?:\s\w{2,30})?"
    ),
    "address": re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{2,63}|\bhttps?://\S{4,200}", re.IGNORECASE),
}
_LONGEST = 20_000  # characters of a text that are looked at


def found(text: str) -> tuple[str, ...]:
    """The kinds of identifiers in a text, by the names of `FORMS`.

    Examples
    --------
    >>> found("Pap smear of 12.03.2019, case no. 88123"), found("HSIL, n = 2019, CD34-positive, 3-5 cells")
    (('date', 'record number'), ())
    """
    return tuple(kind for kind, form in FORMS.items() if form.search(text[:_LONGEST]))


def masked(text: str) -> str:
    """The text with each identifier replaced by its kind.

    Examples
    --------
    >>> masked("DOE^JANE, 2019-03-12: HSIL")
    '[name], [date]: HSIL'
    """
    for kind, form in FORMS.items():
        text = form.sub(f"[{kind}]", text)
    return text
