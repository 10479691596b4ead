"""What looks like a person's identifier is found by kind; medical numbers are not."""

from __future__ import annotations

import gzip
import json

import pytest

from grandrounds.site.custody.identifiers import (
    CERTAIN,
    KINDS,
    count_identifiers,
    found_in,
    in_words,
)
from tests.places import SHARED

WIKIDOC = SHARED / "train" / "wikidoc_patient_information.jsonl.gz"

PLANTED = {
    "e-mail address": ["write to jane.roe@clinic.example.org"],
    "telephone number": [
        "call +44 20 7946 0018",
        "Tel. +49 (0)30 901820",
        "(0711) 123 4567",
        "212-555-0142",
        "01 42 68 53 00",
    ],
    "medical record number": [
        "MRN: 00123456",
        "medical record number 4711-22",
        "Patientennummer 0815471",
        "Fallnummer: A123456",
        "numéro de dossier 778899",
        "historia clínica nº 445566",
        "cartella clinica n. 20231188",
    ],
    "date of birth": [
        "DOB 03/04/1961",
        "date of birth: 4 March 1961",
        "born on March 4, 1961",
        "geb. 04.03.1961",
        "geboren am 4. März 1961",
        "née le 4 mars 1961",
        "fecha de nacimiento 04-03-1961",
        "nata il 4 marzo 1961",
    ],
    "title and name": ["Mrs. Roe came back", "Herr Müller klagt", "seen by Dr. J. O'Neill-Brown"],
    "IBAN": ["pays from GR16 0110 1050 0000 1054 7023 795"],
    "US social security number": ["SSN 536-90-4399"],
    "Danish CPR number": ["CPR 211062-5629"],
    "NHS number": ["NHS number 9434765870", "NHS no. 943 476 5870"],
    "number like an NHS number": ["943-476-5870", "943 476 5870"],
    "Austrian insurance number": ["SV 1237 010180"],
    "Belgian national number": ["85.07.30-033.28"],
    "Brazilian CPF": ["390.533.447-05"],
    "Canadian insurance number": ["SIN 123-456-782"],
    "Chinese identity number": ["360426199101010071"],
    "Dutch BSN": ["BSN: 111222333", "bsn 1112.22.333"],
    "Finnish identity code": ["131052-308T"],
    "French NIR": ["2 95 10 99 126 111 93"],
    "German tax identification number": ["36 574 261 809"],
    "Indian Aadhaar": ["Aadhaar 2341 2341 2346", "UID: 234123412346"],
    "Irish PPS number": ["6433435F"],
    "Italian codice fiscale": ["RCCMNL83S18D969H"],
    "Korean registration number": ["971013-9019902"],
    "Mexican CURP": ["BOXW310820HNERXN09"],
    "Norwegian birth number": ["151086 95088"],
    "Polish PESEL": ["PESEL 44051401359"],
    "Portuguese citizen card": ["00000000 0 ZZ4"],
    "Spanish DNI": ["54362315-K", "54362315K"],
    "Spanish NIE": ["X-2482300W"],
    "Swedish personal number": ["880320-0016"],
    "Swiss AHV number": ["756.9217.0769.85"],
}


def test_every_kind_is_planted() -> None:
    assert PLANTED.keys() == {kind.name for kind in KINDS}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_identifier_is_found(kind: str) -> None:
    for text in PLANTED[kind]:
        assert kind in found_in(text), text
        assert kind in found_in(f"The patient ({text}), aged 61, takes 5 mg."), text


@pytest.mark.parametrize(
    "text",
    [
        "Give 0.5-1 mg/kg every 4-6 hours, at most 4000 mg in 24 h; INR 2.0-3.0.",
        "Doses of 500 250 1000 mg, 100-200-300 mg and 10 000 000 units in 2019-2021.",
        "Cases in 1961 rose from 12,345,678 to 1,234,567,890 (95 % CI 1.02-1.15).",
        "NCT01234567, PMID 12377809, doi 10.1016/0140-6736(91)91234-5, ICD-10 E11.9.",
        "The doctor and the patient were born to wait; his record was good.",
        "He was born in 1961. Patient 12 of 40 had a fever.",
    ],
)
def test_medical_numbers_are_none(text: str) -> None:
    assert found_in(text) == set()


@pytest.mark.parametrize(
    "text", ["943-476-5871", "54362315-A", "GR16 0110 1050 0000 1054 7023 796", "131052-308U"]
)
def test_a_number_with_a_wrong_check_digit_is_none_that_is_refused(text: str) -> None:
    assert not found_in(text).intersection(CERTAIN)


def test_counts_are_by_kind_and_quote_nothing() -> None:
    counts = count_identifiers(["MRN 123456, MRN 654321", "a@b.org", "c@d.org", "nothing"])
    assert counts == {"e-mail address": 2, "medical record number": 1}
    told = in_words(counts, 4)
    assert told == "of 4 examples: e-mail address in 2, medical record number in 1"
    assert in_words({}, 4) == f"none of {len(KINDS)} kinds of identifiers found in 4 examples"


@pytest.mark.skipif(not WIKIDOC.is_file(), reason="no shared data beside the checkout")
def test_published_medical_text_gives_no_reason_to_refuse() -> None:
    """Of 4,952 rows (85 words each), 4 name a doctor and 1 has an e-mail address, all of them real;
    0.4 seconds of CPU."""
    with gzip.open(WIKIDOC, "rt") as file:
        rows = [json.loads(line) for line in file]
    counts = count_identifiers(f"{row['input']}\n{row['output']}" for row in rows)
    assert counts == {"e-mail address": 1, "title and name": 4}


def test_a_refusal_needs_a_check_digit_or_the_word() -> None:
    unsure = {"e-mail address", "telephone number", "date of birth", "title and name"}
    unsure |= {"US social security number", "Danish CPR number", "number like an NHS number"}
    assert set(CERTAIN) == PLANTED.keys() - unsure
