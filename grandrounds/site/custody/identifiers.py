"""Searches a site's own text for what looks like a person's identifiers, and counts it by kind.

The counts are for the site alone: they are shown on its screen and written to its audit log, and
nothing of them is sent. No row is quoted anywhere. This finds what somebody forgot to remove. It
removes nothing, it misses names without a title, and a text in which it finds nothing is not
thereby anonymous.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

_MONTH = (
    r"(?:jan|feb|mar|apr|may|mai|jun|jul|aug|sep|oct|okt|nov|dec|dez|janv|févr|fevr|mars|avr|juin|"
    r"juil|août|aout|déc|ene|abr|ago|dic|gen|mag|giu|lug|set|ott|mär|maerz|märz|enero|febrero|"
    r"marzo|abril|mayo|junio|julio|agosto|octubre|diciembre|luglio|giugno|maggio)[a-zé]*\.?"
)
_DATE = (
    rf"(?:\d{{1,4}}[./-]\d{{1,2}}[./-]\d{{1,4}}|\d{{1,2}}(?:st|nd|rd|th|er|º)?\.?\s+(?:de\s+|of\s+)?"
    rf"{_MONTH},?\s+(?:de\s+|del\s+)?\d{{4}}|{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}})"
)
_BORN = (
    r"(?:\bdate of birth|\bbirth\s?date|\bd\.?o\.?b\b\.?|\bborn(?:\s+on)?|"  # English
    r"\bgeboren(?:\s+am)?|\bgeb\b\.?|\bgeburtsdatum|"  # German
    r"\bn[ée]+e?\s+le|\bdate de naissance|"  # French
    r"\bnacid[oa](?:\s+el)?|\bfecha de nacimiento|"  # Spanish
    r"\bnat[oa](?:\s+il)?|\bdata di nascita)"  # Italian
)
_RECORD = (
    r"(?:\bmrn\b|\bmedical record\b|\bhospital (?:number|no)\b|\bpatient\s?(?:id|number|no)\b|"
    r"\bpatienten-?(?:nummer|nr|id)\b|\bfall-?(?:nummer|nr)\b|\bkrankenakte\b|"
    r"\bnum[ée]ro de (?:dossier|patient)\b|\bn[o°]\s?(?:de )?dossier\b|\bipp\b|"
    r"\bn[úu]mero de (?:historia|expediente)\b|\bhistoria cl[íi]nica\b|\bnhc\b|"
    r"\bcartella clinica\b|\bnumero (?:di )?paziente\b)"
)
_NAME = r"[A-ZÀ-ÖØ-Þ](?:['\u2019][A-ZÀ-ÖØ-Þ])?[a-zà-öø-ÿ]+"
_TITLE = (
    r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Herr|Herrn|Frau|Mme|Mlle|Monsieur|Madame|Sr|Sra|Srta|Señor|Señora|"
    r"Sig|Sig\.ra|Sig\.na|Signor|Signora|Dott|Dott\.ssa)\b\.?"
)

NUMBER = "0"

_BIRTH_HINTS = (
    *("birth", "dob", "d.o.b", "born", "geb", "né", "nee le", "ne le", "naissance", "nacid"),
    *("nacimiento", "nato", "nata", "nascita"),
)
_RECORD_HINTS = (
    *("mrn", "record", "hospital n", "patient", "fallnummer", "fall-n", "fallnr", "krankenakte"),
    *("dossier", "ipp", "historia", "expediente", "nhc", "cartella", "paziente"),
)

Check = Callable[[str], bool]


@dataclass(frozen=True)
class Kind:
    """One kind of identifier."""

    name: str
    """In words, for the screen and the audit log."""
    hints: tuple[str, ...]
    """Looked for first, because it is fast: every occurrence contains one of them, ignoring case.
    `NUMBER` stands for a number of at least seven digits, and none for every text."""
    pattern: re.Pattern[str]
    """Its group `number`, or the whole match, is what `check` receives."""
    check: Check = lambda _: True
    """Whether a match is one, for example by its check digit."""
    is_certain: bool = False
    """Whether `data.identifiers = "refuse"` refuses on it: it has a check digit, or says itself
    what it is."""


def _standard(module: str) -> Check:
    """Return the check of a module of python-stdnum, loaded when it is first needed."""

    @cache
    def loaded() -> Check:
        is_valid: Check = importlib.import_module(f"stdnum.{module}").is_valid
        return is_valid

    return lambda text: loaded()(text)


def _national(name: str, module: str, shape: str, label: str = "") -> Kind:
    """Return a national number with a check digit; a label is a word that must precede it."""
    labelled = rf"(?i:\b(?:{label})\b\D{{0,12}})" if label else ""
    pattern = re.compile(rf"{labelled}(?<![\w.,+-])(?P<number>{shape})(?![\w-]|[.,]\d)")
    return Kind(name, (NUMBER,), pattern, _standard(module), is_certain=True)


_NIR = r"[12] ?\d\d ?(?:0[1-9]|1[0-2]) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d"
_CODICE = r"[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z]"

KINDS = (
    Kind("e-mail address", ("@",), re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")),
    Kind(
        "telephone number",
        (NUMBER,),
        re.compile(
            r"(?<![\w.,/-])(?:\+\d{1,3}[ .-]?(?:\(0\)[ ]?)?\d{1,4}(?:[ ./-]?\d{2,4}){2,4}"
            r"|\(\d{3,5}\)[ ]?\d{3,4}[ -]?\d{3,5}|[2-9]\d{2}[.-][2-9]\d{2}[.-]\d{4}"
            r"|0\d{2,4}[ /-]\d{3,4}[ ]?\d{3,5}|0\d(?:[ .]\d\d){4})(?![\w-]|[.,]\d)"
        ),
    ),
    Kind(
        "medical record number",
        _RECORD_HINTS,
        re.compile(
            rf"{_RECORD}[^\w\n]{{0,3}}(?:number|no|nr|id|n[o°º]?)?[\s.:#°º-]{{0,4}}"
            r"(?=[\w/-]*\d{3})[A-Z]{0,3}[\d/-]{4,}",
            re.IGNORECASE,
        ),
        is_certain=True,
    ),
    Kind(
        "date of birth", _BIRTH_HINTS, re.compile(rf"{_BORN}[\s:.,(]{{0,4}}{_DATE}", re.IGNORECASE)
    ),
    Kind("title and name", (), re.compile(rf"{_TITLE}\s+(?:[A-Z]\.\s*)?{_NAME}")),
    Kind(
        "IBAN",
        (NUMBER,),
        re.compile(r"\b(?P<number>[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]{4}){2,7}(?:[ ]?[A-Z0-9]{1,3})?)\b"),
        _standard("iban"),
        is_certain=True,
    ),
    Kind(
        "US social security number",
        (NUMBER,),
        re.compile(r"(?<![\w-])(?P<number>\d{3}-\d{2}-\d{4})(?![\w-])"),
        _standard("us.ssn"),
    ),
    Kind(
        "Danish CPR number",  # without a check digit since 2007
        (NUMBER,),
        re.compile(r"(?<![\w.,+-])(?P<number>\d{6}-\d{4})(?![\w-])"),
        _standard("dk.cpr"),
    ),
    _national("NHS number", "gb.nhs", r"\d{3}[ -]?\d{3}[ -]?\d{4}", "nhs"),
    Kind(
        "number like an NHS number",  # one in eleven of such numbers has the right check digit
        (NUMBER,),
        re.compile(r"(?<![\w.,+-])(?P<number>\d{3}([ -])\d{3}\2\d{4})(?![\w-]|[.,]\d)"),
        _standard("gb.nhs"),
    ),
    _national("Austrian insurance number", "at.vnr", r"\d{4} \d{6}"),
    _national("Belgian national number", "be.nn", r"\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}"),
    _national("Brazilian CPF", "br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d{2}"),
    _national("Canadian insurance number", "ca.sin", r"\d{3}[ -]?\d{3}[ -]?\d{3}", "sin|nas"),
    _national("Chinese identity number", "cn.ric", r"\d{17}[\dX]"),
    _national("Dutch BSN", "nl.bsn", r"\d{4}\.?\d{2}\.?\d{3}", "bsn|burgerservicenummer"),
    _national("Finnish identity code", "fi.hetu", r"\d{6}[-+A]\d{3}[\dA-Y]"),
    _national(
        "French NIR", "fr.nir", r"[12] ?\d\d ?(?:0[1-9]|1[0-2]) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d"
    ),
    _national("German tax identification number", "de.idnr", r"\d{2} \d{3} \d{3} \d{3}"),
    _national("Indian Aadhaar", "in_.aadhaar", r"\d{4} ?\d{4} ?\d{4}", "aadhaar|aadhar|uid"),
    _national("Irish PPS number", "ie.pps", r"\d{7}[A-W][A-IW]?"),
    _national(
        "Italian codice fiscale",
        "it.codicefiscale",
        r"[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z]",
    ),
    _national("Korean registration number", "kr.rrn", r"\d{6}-\d{7}"),
    _national("Mexican CURP", "mx.curp", r"[A-Z]{4}\d{6}[HM][A-Z]{5}[A-Z0-9]\d"),
    _national("Norwegian birth number", "no.fodselsnummer", r"\d{6} \d{5}"),
    _national("Polish PESEL", "pl.pesel", r"\d{11}", "pesel"),
    _national("Portuguese citizen card", "pt.cc", r"\d{8} ?\d ?[A-Z]{2}\d"),
    _national("Spanish DNI", "es.dni", r"\d{8}[- ]?[A-HJ-NP-TV-Z]"),
    _national("Spanish NIE", "es.nie", r"[XYZ][- ]?\d{7}[- ]?[A-HJ-NP-TV-Z]"),
    _national("Swedish personal number", "se.personnummer", r"(?:\d{2})?\d{6}[-+]\d{4}"),
    _national("Swiss AHV number", "ch.ssn", r"756[.]\d{4}[.]\d{4}[.]\d{2}"),
)

CERTAIN = tuple(kind.name for kind in KINDS if kind.is_certain)
"""The kinds on which a site may refuse to train."""

_NUMBER = re.compile(r"\d(?:[ ./()-]{0,3}\d){6}")
_CODE = re.compile(r"[A-Z]{4}[A-Z]{0,2}\d\d")  # CURP and codice fiscale mix digits with letters


def found_in(text: str) -> set[str]:
    """Return the kinds of identifiers that a text seems to contain."""
    lower = text.lower()
    has_number = bool(_NUMBER.search(text) or _CODE.search(text))
    return {
        kind.name
        for kind in KINDS
        if _may_be_in(kind, lower, has_number)
        and any(map(kind.check, map(_number_of, kind.pattern.finditer(text))))
    }


def _may_be_in(kind: Kind, lower: str, has_number: bool) -> bool:
    if kind.hints == (NUMBER,):
        return has_number
    return not kind.hints or any(hint in lower for hint in kind.hints)


def _number_of(match: re.Match[str]) -> str:
    groups = match.groupdict()
    return groups.get("number") or match[0]


def count_identifiers(texts: Iterable[str]) -> dict[str, int]:
    """Return kind → number of texts in which it seems to occur; kinds that do not are left out."""
    counts: dict[str, int] = {}
    for text in texts:
        for name in found_in(text):
            counts[name] = counts.get(name, 0) + 1
    return {kind.name: counts[kind.name] for kind in KINDS if kind.name in counts}


def fingerprint(texts: Iterable[str]) -> str:
    """Return the SHA-256 of texts in their order."""
    found = hashlib.sha256()
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        found.update(len(encoded).to_bytes(8))
        found.update(encoded)
    return found.hexdigest()


def in_words(counts: Mapping[str, int], total: int) -> str:
    """Return counts as one line: `of 5,000 examples: e-mail address in 3, IBAN in 1`."""
    if not counts:
        return f"none of {len(KINDS)} kinds of identifiers found in {total:,} examples"
    listed = ", ".join(f"{name} in {count:,}" for name, count in counts.items())
    return f"of {total:,} examples: {listed}"
