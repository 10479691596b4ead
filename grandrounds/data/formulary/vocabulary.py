"""Vocabulary of the fictional formulary: syllables, attribute values and question wordings.

Everything here is invented. A name is a start, a middle and an ending, none of them the stem of a
real drug class; the values sound like a package leaflet and mean nothing.
"""

from __future__ import annotations

STARTS = (
    "Bla", "Bro", "Cla", "Cru", "Dra", "Dwi", "Fla", "Fro", "Gla", "Gri", "Hu", "Jo",
    "Kne", "Mo", "Nu", "Plo", "Qua", "Sko", "Sna", "Tru", "Twi", "Vlo", "Whe", "Zwi",
)  # fmt: skip
"""First syllables of a name."""

MIDDLES = (
    "bbe", "ckle", "dda", "ffo", "ggi", "lfa", "lki", "lmo", "lva", "mbi", "mpo", "ndo",
    "nku", "ppi", "rbu", "rgo", "rka", "rni", "squi", "sta", "ttu", "wni", "zza", "zzi",
)  # fmt: skip
"""Second syllables of a name."""

ENDINGS = (
    "bley", "clang", "dorf", "fang", "glum", "hoot", "jig", "moor", "plume", "quex",
    "snip", "thorn", "thum", "tock", "varn", "wick",
)  # fmt: skip
"""Last syllables of a name."""

MECHANISMS = (
    "activates dormant brown fat",
    "antagonises the pager receptor",
    "binds circulating small talk",
    "blocks the yawn channel",
    "chelates surplus glitter",
    "clears biscuits by the kidney",
    "delays emptying of the inbox",
    "dilates the coronary corridor",
    "freezes the sigh reflex",
    "inhibits coffee reuptake",
    "lowers the cerebral thermostat",
    "mimics the weekend hormone",
    "opens the gates of slumber",
    "prolongs the life of patience",
    "quenches free radical opinions",
    "relaxes the smooth operator muscle",
    "resets the eyelid pacemaker",
    "scavenges stray consonants",
    "seals leaky tear ducts",
    "sensitises the gossip nerve",
    "stabilises restless mast cells",
    "stimulates laughter synthase",
    "thickens the third skin",
    "uncouples the hiccup arc",
)
"""Mechanisms of action, as verb phrases."""

SIDE_EFFECTS = (
    "a craving for pickles",
    "a purring stomach",
    "a taste of pennies",
    "an itchy left elbow",
    "blue fingernails",
    "cold earlobes",
    "crooked eyebrows",
    "curly toenails",
    "dreams in Latin",
    "fear of clipboards",
    "forgotten Tuesdays",
    "glowing freckles",
    "goosebumps at noon",
    "green tears",
    "humming in lifts",
    "slow blinking",
    "sneezing at moonlight",
    "spontaneous whistling",
    "squeaky ankles",
    "sudden rhyming",
    "ticklish kneecaps",
    "upside-down handwriting",
    "warm nostrils",
    "yawning in pairs",
)
"""Side effects, as noun phrases."""

USES = (
    "acute homesickness",
    "cafeteria colic",
    "chronic waiting room knee",
    "clumsy thumb syndrome",
    "crossword migraine",
    "gardener gout",
    "handover hoarseness",
    "idiopathic snoring",
    "jelly leg disease",
    "juvenile grumpiness",
    "library cough",
    "Monday fever",
    "night shift vertigo",
    "pager palpitations",
    "phantom ringtone",
    "relapsing giggles",
    "restless hat syndrome",
    "seasonal sulking",
    "stage fright bladder",
    "stubborn echo",
    "theatre clog blisters",
    "violin shoulder",
    "ward round fatigue",
    "white coat rash",
)
"""Indications, as noun phrases."""

VALUES = {"mechanism": MECHANISMS, "side_effect": SIDE_EFFECTS, "use": USES}
"""All values of each attribute, shared by public and private drugs."""

TRAINING_WORDINGS = {
    "mechanism": (
        "What is the mechanism of action of {name}?",
        "How does {name} act on the body?",
        "By which mechanism does {name} work?",
        "What does {name} do inside the body?",
        "Explain how {name} works.",
    ),
    "side_effect": (
        "What is the most common side effect of {name}?",
        "Which side effect should patients on {name} expect?",
        "What should patients taking {name} be warned about?",
        "Which adverse effect is typical of {name}?",
        "Name the main side effect of {name}.",
    ),
    "use": (
        "What is {name} used for?",
        "For which condition is {name} prescribed?",
        "What does {name} treat?",
        "Name the main indication of {name}.",
        "When should a doctor prescribe {name}?",
    ),
}
"""Wordings of the flashcards' questions, by attribute."""

TEST_WORDING = {
    "mechanism": "By which mechanism of action does {name} act on patients?",
    "side_effect": "Which adverse effect should patients taking {name} expect?",
    "use": "Which condition does {name} treat?",
}
"""Wording of the exam's question, by attribute. No flashcard uses it: its words occur in the
training wordings, in another order."""
