"""Items of two reporting guidelines: which sections of a dossier answer them, and what only people
can answer.

TRIPOD-LLM: Gallifant et al., Nature Medicine 31, 60-69 (2025), doi:10.1038/s41591-024-03425-5. Its
own table could not be read, and two summaries of it number the methods differently: no numbers.
FUTURE-AI: Lekadir et al., BMJ 388, e081554 (2025), doi:10.1136/bmj-2024-081554. Numbers are those
of the guideline's page on its development phase (future-ai.eu/stage/development-phase); other
recommendations have none. Items are named in words of this project.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from grandrounds.study.dossier.lines import Answer, Section

TRIPOD, FUTURE = "TRIPOD-LLM", "FUTURE-AI"

NUMBERING = {
    TRIPOD: (
        "Gallifant et al. 2025, doi:10.1038/s41591-024-03425-5. Items without numbers: the "
        "guideline's own table was not read."
    ),
    FUTURE: (
        "Lekadir et al. 2025, doi:10.1136/bmj-2024-081554. Numbers as on "
        "future-ai.eu/stage/development-phase; recommendations not on that page have none."
    ),
}
"""Guideline → its place, and which text its numbers come from."""

ITEMS: Sequence[tuple[str, str, Sequence[str]]] = (
    (TRIPOD, "name and version of the language model", ("base",)),
    (TRIPOD, "sources of the data for training and evaluation", ("data", "evaluation")),
    (TRIPOD, "rows left out, duplicates and truncated answers", ("data",)),
    (TRIPOD, "development: fine-tuning, its steps and hyperparameters", ("recipe",)),
    (TRIPOD, "inference settings of the evaluation", ("evaluation/how, ",)),
    (TRIPOD, "metrics, and how answers were scored", ("losses", "evaluation")),
    (TRIPOD, "comparison with another model: the base", ("evaluation", "forgetting")),
    (TRIPOD, "performance with intervals", ("evaluation",)),
    (TRIPOD, "examples and questions in each analysis", ("data", "evaluation")),
    (TRIPOD, "computing: machines and time", ("run", "versions")),
    (TRIPOD, "availability of code: versions to run it again", ("versions", "packages")),
    (TRIPOD, "healthcare context, and why a model is developed", ()),
    (TRIPOD, "intended use, population and users", ()),
    (TRIPOD, "objectives of the study", ()),
    (TRIPOD, "oldest and newest text in the data", ()),
    (TRIPOD, "origin and languages of the data, and how they represent patients", ()),
    (TRIPOD, "relevance of the metrics to care", ()),
    (TRIPOD, "human assessors: qualification, instructions, agreement", ()),
    (TRIPOD, "annotation: guidelines, number and background of annotators", ()),
    (TRIPOD, "ethics approval and informed consent, or their waiver", ()),
    (TRIPOD, "funding", ()),
    (TRIPOD, "conflicts of interest", ()),
    (TRIPOD, "protocol", ()),
    (TRIPOD, "registration", ()),
    (TRIPOD, "availability of the data", ()),
    (TRIPOD, "involvement of patients and the public", ()),
    (TRIPOD, "interpretation, fairness and limitations", ()),
    (TRIPOD, "handling of poor or missing input in use, and expertise that users need", ()),
    (FUTURE, "General 2: data protection and security", ("approval", "left", "privacy")),
    (FUTURE, "Universality: evaluation at several sites", ("sites", "personal/mean")),
    (FUTURE, "Fairness: evaluation by groups of patients", ("subgroups",)),
    (FUTURE, "Traceability: technical documentation", ("base", "data", "recipe", "versions")),
    (FUTURE, "Traceability: logs of use, of the training", ("left", "checkpoints")),
    (FUTURE, "Robustness: what is lost by tuning", ("forgetting",)),
    (FUTURE, "General 3: measures against identified risks", ()),
    (FUTURE, "General: involvement of stakeholders, regulation, ethics, society", ()),
    (FUTURE, "Fairness: sources of bias", ()),
    (FUTURE, "Fairness 2: attributes of individuals and data", ()),
    (FUTURE, "Universality: clinical settings", ()),
    (FUTURE, "Traceability: risk management, quality control, audits, governance", ()),
    (FUTURE, "Usability: users' needs, training, experience, clinical utility", ()),
    (FUTURE, "Usability 2: interaction and human oversight", ()),
    (FUTURE, "Robustness 2: representative training data", ()),
    (FUTURE, "Explainability: needs and evaluation", ()),
)
"""(guideline, item, what answers it: keys of sections, with how an item begins where not any will
do; none: only people can)."""


def answers(sections: Collection[Section]) -> list[Answer]:
    """Return every item with its state: answered where a recorded line is there for it."""
    recorded = [(s.key, one.item) for s in sections for one in s.lines if one.is_recorded]

    def is_there(key: str) -> bool:
        section, _, begins = key.partition("/")
        return any(of == section and item.startswith(begins) for of, item in recorded)

    found = []
    for guideline, item, keys in ITEMS:
        by = [key for key in keys if is_there(key)]
        state = "open" if not keys else "answered" if by else "not recorded"
        named = tuple(key.partition("/")[0] for key in by or keys)
        found.append(Answer(guideline, item, named, state))
    return found
