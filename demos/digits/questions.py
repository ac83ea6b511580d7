"""The demo's task: spoken questions about pictures of handwritten digits.

A kind of question is a wording and a function of the digit. The written prompt is the same for
all, so an answer needs both the picture (which digit) and the recording (which question). Two of
the sixteen kinds are answered by yes or no: whoever misses the picture or the recording cannot
do better than `best_blind_guess` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

PROMPT, ALOUD_PROMPT = "Answer the question.", "Answer aloud."

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
ORDINALS = (
    *("zeroth", "first", "second", "third", "fourth"),
    *("fifth", "sixth", "seventh", "eighth", "ninth"),
)
FRENCH = ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf")
GERMAN = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
SPANISH = ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve")
ROMAN = ("none", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")


@dataclass(frozen=True)
class Kind:
    """One kind of question: what is said, and the answer for each digit, in a `language`."""

    name: str
    wording: str
    answer: Callable[[int], str]
    language: str = "en"


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


KINDS = (
    Kind("digit", "Which digit is this?", lambda d: NUMBERS[d]),
    Kind("next", "What comes after it?", lambda d: NUMBERS[d + 1]),
    Kind("previous", "Name the one before it.", lambda d: NUMBERS[d - 1] if d else "minus one"),
    Kind("plus_three", "Add three to this number.", lambda d: NUMBERS[d + 3]),
    Kind("double", "How much is twice that?", lambda d: NUMBERS[2 * d]),
    Kind("to_ten", "How much is missing to ten?", lambda d: NUMBERS[10 - d]),
    Kind("even", "Is it even?", lambda d: _yes_no(d % 2 == 0)),
    Kind("larger", "Is it larger than five?", lambda d: _yes_no(d > 5)),
    Kind("first_letter", "Which letter begins its name?", lambda d: NUMBERS[d][0]),
    Kind("last_letter", "What letter is at the end?", lambda d: NUMBERS[d][-1]),
    Kind("spelling", "Please spell it.", lambda d: " ".join(NUMBERS[d])),
    Kind("ordinal", "Tell me the ordinal.", lambda d: ORDINALS[d]),
    Kind("french", "Say it in French.", lambda d: FRENCH[d], "fr"),
    Kind("german", "Translate it to German.", lambda d: GERMAN[d], "de"),
    Kind("spanish", "What do Spaniards call it?", lambda d: SPANISH[d], "es"),
    Kind("roman", "How did the Romans write it?", lambda d: ROMAN[d]),
)

# A tenth of the pairs: two digits of every second kind. Their answers are learned in writing
# only, so a right one to the spoken question joins what was never seen together.
HELD_OUT_PAIRS = frozenset(
    (kind.name, digit)
    for number, kind in enumerate(KINDS[::2])
    for digit in (number % 10, (number * 3 + 5) % 10)
)


@dataclass(frozen=True)
class SpokenAnswer:
    """What the narrator says for the answer `text`: other words in every `language`."""

    text: str
    language: str

    @property
    def words(self) -> str:
        """As eSpeak NG is to read it: a numeral letter by letter."""
        return " ".join(self.text) if self.text in ROMAN[1:] else self.text

    @property
    def file(self) -> str:
        """Its recording in the data folder."""
        return f"answers/{self.language}-{self.text.replace(' ', '_')}.flac"


def spoken_answers() -> list[SpokenAnswer]:
    """All answers to all questions."""
    answers = {SpokenAnswer(k.answer(digit), k.language) for k in KINDS for digit in range(10)}
    return sorted(answers, key=lambda answer: answer.file)


def question_pairs(held_out: bool) -> list[tuple[Kind, int]]:
    """All (kind, digit) pairs that are, or are not, kept from training."""
    return [
        (kind, digit)
        for kind in KINDS
        for digit in range(10)
        if ((kind.name, digit) in HELD_OUT_PAIRS) == held_out
    ]


def best_blind_guess(pairs: list[tuple[Kind, int]]) -> dict[str, float]:
    """The exact match of the best guess that knows only the question, or only the digit."""
    by_kind: dict[str, Counter[str]] = {}
    by_digit: dict[int, Counter[str]] = {}
    for kind, digit in pairs:
        by_kind.setdefault(kind.name, Counter())[kind.answer(digit)] += 1
        by_digit.setdefault(digit, Counter())[kind.answer(digit)] += 1
    return {
        "without the picture": sum(max(c.values()) for c in by_kind.values()) / len(pairs),
        "without the recording": sum(max(c.values()) for c in by_digit.values()) / len(pairs),
    }
