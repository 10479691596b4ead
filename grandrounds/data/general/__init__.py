"""General knowledge: an exam that tells what a base forgets, and prompts to replay against it.

Written for this project. No prompt asks for a fact of the exam.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GeneralQuestion:
    """One question with four options."""

    question: str
    options: tuple[str, str, str, str]
    """The first is true; an exam rotates them, see `shown_options`."""


def shown_options(number: int, question: GeneralQuestion) -> tuple[tuple[str, ...], int]:
    """Return the options in the order of an exam, and the position of the true one.

    Parameters
    ----------
    number : int
        The question's position in `QUESTIONS`: the true option is in each place equally often.
    """
    place = number % len(question.options)
    options = (*question.options[len(question.options) - place :],)
    return (*options, *question.options[: len(question.options) - place]), place


def _asked(question: str, *options: str) -> GeneralQuestion:
    first, second, third, fourth = options
    return GeneralQuestion(question, (first, second, third, fourth))


QUESTIONS = (
    _asked("Which planet is closest to the Sun?", "Mercury", "Mars", "Neptune", "Earth"),
    _asked("What is the capital of France?", "Paris", "Rome", "Madrid", "Vienna"),
    _asked("How many days does a week have?", "seven", "five", "nine", "twelve"),
    _asked("Which animal barks?", "a dog", "a cat", "a cow", "a frog"),
    _asked("What do bees make?", "honey", "milk", "silk", "wool"),
    _asked(
        "At sea level, what does water do at 100 degrees Celsius?", "boil", "freeze", "rust", "burn"
    ),
    _asked(
        "Who wrote the play Hamlet?", "William Shakespeare", "Jane Austen", "Mark Twain", "Homer"
    ),
    _asked(
        "Which ocean lies between Europe and North America?",
        "the Atlantic",
        "the Pacific",
        "the Indian Ocean",
        "the Southern Ocean",
    ),
    _asked("What is twelve minus five?", "seven", "six", "eight", "nine"),
    _asked("How many sides does a triangle have?", "three", "four", "five", "six"),
    _asked("Which gas do people need to breathe in?", "oxygen", "helium", "argon", "neon"),
    _asked("On which continent is Egypt?", "Africa", "Asia", "Europe", "South America"),
    _asked("What is frozen water called?", "ice", "steam", "sand", "smoke"),
    _asked("Which season follows winter?", "spring", "autumn", "summer", "the monsoon"),
    _asked(
        "In which direction does the Sun rise?",
        "in the east",
        "in the west",
        "in the north",
        "in the south",
    ),
    _asked("What does a thermometer measure?", "temperature", "weight", "distance", "speed"),
    _asked(
        "Which language is mainly spoken in Brazil?", "Portuguese", "French", "German", "Japanese"
    ),
    _asked(
        "What is the largest planet of the Solar System?", "Jupiter", "Venus", "Mercury", "Earth"
    ),
    _asked("How many legs does a spider have?", "eight", "four", "six", "ten"),
    _asked("Which metal is liquid at room temperature?", "mercury", "iron", "gold", "copper"),
    _asked("What is the opposite of hot?", "cold", "heavy", "loud", "early"),
    _asked(
        "Which instrument has black and white keys?",
        "the piano",
        "the drum",
        "the flute",
        "the trumpet",
    ),
    _asked("What is the capital of Japan?", "Tokyo", "Beijing", "Seoul", "Bangkok"),
    _asked("What does a baker sell?", "bread", "shoes", "tyres", "stamps"),
    _asked(
        "Which force pulls a falling apple to the ground?",
        "gravity",
        "magnetism",
        "friction",
        "electricity",
    ),
    _asked("How many minutes are in an hour?", "sixty", "ten", "one hundred", "twenty-four"),
    _asked(
        "Who painted the Mona Lisa?",
        "Leonardo da Vinci",
        "Claude Monet",
        "Pablo Picasso",
        "Rembrandt",
    ),
    _asked("Which of these is a fruit?", "an apple", "a potato", "a loaf", "an egg"),
    _asked("What is the chemical formula of water?", "H2O", "CO2", "NaCl", "O3"),
    _asked(
        "Which country is famous for the pyramids of Giza?", "Egypt", "Norway", "Canada", "Japan"
    ),
    _asked(
        "What colour do blue and yellow paint make when mixed?", "green", "red", "black", "white"
    ),
    _asked("Which bird cannot fly?", "the penguin", "the eagle", "the swallow", "the gull"),
    _asked(
        "What is the currency of the United States?",
        "the dollar",
        "the yen",
        "the euro",
        "the rupee",
    ),
    _asked("What is half of eighteen?", "nine", "eight", "six", "twelve"),
    _asked("Where do fish live?", "in water", "in trees", "in caves of ice", "in the clouds"),
    _asked(
        "What goes around the Earth about once a month?", "the Moon", "the Sun", "Mars", "Saturn"
    ),
    _asked("Which word means the same as rapid?", "fast", "round", "empty", "quiet"),
    _asked("Which month comes after June?", "July", "May", "March", "December"),
    _asked("What is made from grapes?", "wine", "paper", "glass", "cheese"),
    _asked("How many zeros does one thousand have?", "three", "one", "two", "six"),
)
"""The exam: 40 questions of general knowledge."""

PROMPTS = (
    "Explain in one sentence what a library is for.",
    "Name two things that float on water.",
    "What is a bicycle?",
    "Describe a forest in one sentence.",
    "Write a short greeting for a letter.",
    "Why do people wear gloves?",
    "What can one buy at a market?",
    "Name three colours.",
    "How does one boil an egg?",
    "What is a bridge for?",
    "Describe the sound of rain.",
    "What is a dictionary?",
    "Name two kinds of furniture.",
    "Why do leaves fall from trees?",
    "What does a teacher do?",
    "Tell me one use of paper.",
    "What is a river?",
    "Name two vegetables.",
    "How do people travel across the sea?",
    "What is a clock for?",
    "Describe a cat in one sentence.",
    "Why do we sleep?",
    "What is a map?",
    "Name two games that children play.",
    "What does a farmer do?",
    "Explain what an island is.",
    "What is music?",
    "Give one reason to plant a tree.",
    "What is a mountain?",
    "How can one stay warm in winter?",
    "What is a newspaper?",
    "Name two tools.",
    "What does a doctor do?",
    "Explain what a sentence is.",
    "What is a window for?",
    "Describe the sea in one sentence.",
    "Why do people laugh?",
    "What is a festival?",
    "Name two drinks.",
    "What is a promise?",
)
"""Prompts whose answers the base gives itself; none asks for a fact of the exam."""
