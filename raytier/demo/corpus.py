"""The text that the demo model learns from, generated deterministically from a seed (no torch, no files).

An `Intent` is something a user may want: one answer (or a story) and many phrasings. A fixed share of the phrasings
of every intent is held out: that wording is never seen for that intent in training, in no spelling variant.
"""

import random
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from raytier.demo import about_raytier, facts, wording

Role = Literal["system", "user", "assistant", "text"]

HELD_OUT_SHARE: Final = 0.18
MIN_TRAINING_PHRASINGS: Final = 3

# Share of the questions in training, by group of intents.
GROUP_WEIGHTS: Final[dict[str, float]] = {
    "raytier": 0.15,
    "general": 0.16,
    "small sums": 0.26,
    "larger sums": 0.10,
    "counting to": 0.05,
    "counting": 0.08,
    "stories": 0.04,
    "unknown": 0.06,
    "small talk": 0.04,
    "repeating": 0.06,
}

# Never held out: what the README asks.
README_QUESTIONS: Final = (
    "What is raytier?",
    "Tell me a short story about a robot.",
    "Tell me a short story about a fox.",
    "What is 7 + 5?",
    "Count from 1 to 10.",
    "What is the capital of France?",
    "How do I start the server?",
    "Who are you?",
    "What is a KV block?",
    "What is the prefix cache?",
    "What are the tiers?",
    "How are you?",
    "Good night!",
    "Make me laugh.",
    "Test",
)

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are the raytier demo model.",
    "You are a friendly assistant. Answer briefly.",
    "Answer in one or two sentences.",
    "You are a helpful assistant that answers questions about raytier.",
    "Be brief and correct.",
    "You are a small language model.",
)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; the role `text` is a plain document without a chat around it."""

    role: Role
    content: str


@dataclass(frozen=True)
class Intent:
    """Something a user may want. `subject` is set for stories, which have many good answers."""

    category: str
    group: str
    phrasings: tuple[str, ...]
    answer: str
    subject: str | None = None


@dataclass(frozen=True)
class Question:
    """A held-out question with what came before it, and the answer expected."""

    category: str
    messages: tuple[Message, ...]
    answer: str
    subject: str | None = None


def normalise(text: str) -> str:
    """Text without case, punctuation and repeated spaces; what counts as the same wording."""
    return " ".join(re.sub(r"[.,!?'\":;]", "", text.lower()).split())


def with_article(noun: str) -> str:
    """The noun with `a` or `an` before it."""
    vowel = noun[0] in "aeio" or (noun.startswith("un") and not noun.startswith("uni"))
    return f"{'an' if vowel else 'a'} {noun}"


def count(first: int, last: int, step: int = 1) -> str:
    """The numbers from `first` to `last` as the model writes them."""
    return ", ".join(str(number) for number in range(first, last + (1 if step > 0 else -1), step)) + "."


def _fill(patterns: Iterable[str], **values: str | int) -> tuple[str, ...]:
    return tuple(pattern.format(**values) for pattern in patterns)


def _raytier() -> Iterator[Intent]:
    for names, be, answer in about_raytier.TOPICS:
        yield Intent("raytier", "raytier", tuple(p for x in names for p in _fill(wording.DEFINE, x=x, be=be)), answer)
    for actions, answer in about_raytier.HOWTOS:
        yield Intent("raytier", "raytier", tuple(p for x in actions for p in _fill(wording.HOWTO, x=x)), answer)
    for abilities, answer in about_raytier.ABILITIES:
        yield Intent("raytier", "raytier", tuple(p for x in abilities for p in _fill(wording.ABILITY, x=x)), answer)
    for phrasings, answer in about_raytier.FREE_FACTS:
        yield Intent("raytier", "raytier", phrasings, answer)


def _general() -> Iterator[Intent]:
    def intent(patterns: Iterable[str], answer: str, **values: str) -> Intent:
        return Intent("general", "general", _fill(patterns, **values), answer)

    for country, city in facts.CAPITALS.items():
        yield intent(wording.CAPITAL, f"The capital of {country} is {city}.", x=country)
        yield intent(wording.CAPITAL_OF, f"{city} is the capital of {country}.", x=city)
    for thing, colour in facts.COLOURS.items():
        yield intent(wording.COLOUR, f"{thing[0].upper()}{thing[1:]} is {colour}.", x=thing)
    for animal, sound in facts.SOUNDS.items():
        yield intent(
            wording.SOUND, f"A {animal} says {sound}." if animal != "owl" else f"An owl says {sound}.", x=animal
        )
    for animal, young in facts.YOUNG.items():
        yield intent(wording.YOUNG, f"A young {animal} is called {with_article(young)}.", x=animal)
    for animal, legs in facts.LEGS.items():
        yield intent(wording.LEGS, f"{animal[0].upper()}{animal[1:]} has {legs} legs.", x=animal)
    for word, opposite in facts.OPPOSITES.items():
        yield intent(wording.OPPOSITE, f"The opposite of {word} is {opposite}.", x=word)
        yield intent(wording.OPPOSITE, f"The opposite of {opposite} is {word}.", x=opposite)
    for word, plural in facts.PLURALS.items():
        yield intent(wording.PLURAL, f"The plural of {word} is {plural}.", x=word)
    for word, past in facts.PASTS.items():
        yield intent(wording.PAST, f"The past tense of {word} is {past}.", x=word)
    for country, continent in facts.CONTINENTS.items():
        yield intent(wording.CONTINENT, f"{country} is in {continent}.", x=country)
    for shape, sides in facts.SIDES.items():
        yield intent(wording.SIDES, f"{with_article(shape).capitalize()} has {sides} sides.", x=shape)
    for kind, names in (("day", facts.DAYS), ("month", facts.MONTHS)):
        for name, following in zip(names, (*names[1:], names[0]), strict=True):
            yield intent(wording.AFTER, f"{following} comes after {name}.", x=name, kind=kind)
            yield intent(wording.BEFORE, f"{name} comes before {following}.", x=following, kind=kind)
    for ordinal, month, length in zip(facts.ORDINALS, facts.MONTHS, facts.MONTH_LENGTHS, strict=True):
        yield intent(wording.MONTH_NUMBER, f"{month} is the {ordinal} month of the year.", x=ordinal)
        leap = ", and 29 in a leap year" if month == "February" else ""
        yield intent(wording.MONTH_LENGTH, f"{month} has {length} days{leap}.", x=month)
    for question, answer in facts.TRIVIA:
        stem = question.removesuffix("?")
        yield intent(wording.TRIVIA, answer, x=stem, y=stem[0].lower() + stem[1:])


def _sums() -> Iterator[Intent]:
    words = facts.NUMBER_WORDS
    for a in range(51):
        for b in range(21):
            small = a <= 20
            if not small and b > 10:
                continue
            group = "small sums" if small else "larger sums"
            named: dict[str, str | int] = {"a": a, "b": b, "wa": words[a] if small else "", "wb": words[b]}
            yield Intent(
                "sums", group, _fill(wording.ADD + wording.ADD_WORDS * small, **named), f"{a} + {b} = {a + b}."
            )
            if b <= a:
                yield Intent(
                    "sums",
                    group,
                    _fill(wording.SUBTRACT + wording.SUBTRACT_WORDS * small, **named),
                    f"{a} - {b} = {a - b}.",
                )


def _counting() -> Iterator[Intent]:
    words = facts.NUMBER_WORDS
    for last in range(2, 31):
        patterns = wording.COUNT_TO if last < len(words) else tuple(p for p in wording.COUNT_TO if "{w}" not in p)
        values: dict[str, str | int] = {"b": last, "w": words[last] if last < len(words) else ""}
        phrasings = _fill(patterns, **values) + _fill(wording.COUNT_UP, a=1, b=last)
        yield Intent("counting", "counting to", phrasings, count(1, last))
        yield Intent("counting", "counting to", _fill(wording.COUNT_DOWN, a=last, b=1), count(last, 1, -1))
    for first in range(21):
        for last in range(first + 3, first + 13):
            if first != 1:
                yield Intent("counting", "counting", _fill(wording.COUNT_UP, a=first, b=last), count(first, last))
                yield Intent("counting", "counting", _fill(wording.COUNT_DOWN, a=last, b=first), count(last, first, -1))
    for step, word in ((2, "twos"), (3, "threes"), (5, "fives"), (10, "tens")):
        for start in {0, 1, step, 2 * step, 3 * step}:
            for length in range(4, 11):
                last = start + step * length
                if last <= 100:
                    phrasings = _fill(wording.COUNT_BY, a=start, b=last, w=word)
                    yield Intent("counting", "counting", phrasings, count(start, last, step))


def _others(rng: random.Random) -> Iterator[Intent]:
    for subject in facts.SUBJECTS:
        yield Intent("stories", "stories", _fill(wording.STORY, x=with_article(subject)), "", subject)
    yield Intent("stories", "stories", wording.ANY_STORY, "", "")
    for phrasings, answer in facts.SMALL_TALK:
        yield Intent("small talk", "small talk", phrasings, answer)
    yield Intent("small talk", "small talk", wording.WHAT_NAME, "You have not told me your name.")
    for patterns, fillers in facts.UNKNOWN:
        for filler in fillers:
            yield Intent("unknown", "unknown", _fill(patterns, x=filler), facts.REFUSAL)
    for _ in range(150):
        a, b = rng.randint(100, 9999), rng.randint(100, 9999)
        yield Intent("unknown", "unknown", _fill(wording.HARD_SUM, a=a, b=b), facts.REFUSAL_SUM)
    words = (*facts.SUBJECTS, *facts.OPPOSITES, *facts.PLURALS)
    for number in range(1500):
        length = rng.randint(2, 7)
        if number % 3:
            text = " ".join(rng.choices(words, k=length))
        else:
            text = " ".join(str(rng.randint(0, 50)) for _ in range(length))
        yield Intent("repeating", "repeating", _fill(wording.REPEAT, x=text), text)


def story(rng: random.Random, subject: str) -> str:
    """A short story about the subject (any subject where it is empty)."""
    subject = subject or rng.choice(facts.SUBJECTS)
    (name, they), (friend_name, friend_they) = rng.sample(facts.PEOPLE, 2)
    friend = rng.choice([other for other in facts.SUBJECTS if other != subject])
    their = {"she": "her", "he": "his"}[they]
    They, Friend_they = they.capitalize(), friend_they.capitalize()
    adjective = rng.choice(
        ("little", "brave", "kind", "curious", "quiet", "small", "friendly", "clever", "happy", "shy")
    )
    place = rng.choice((
        "in a small house by the river", "near the old forest", "on top of a green hill", "in a quiet village",
        "by the sea", "at the edge of a big city", "under a large tree", "in a valley full of flowers",
    ))  # fmt: skip
    thing = rng.choice(("key", "ball", "hat", "map", "lamp", "bell", "red scarf", "golden ring", "book", "blue stone"))
    spot = rng.choice(("under a leaf", "behind a rock", "next to the well", "in the tall grass", "on a wooden bridge"))
    wish = rng.choice(("sing", "dance", "swim", "read", "paint", "count to ten", "cook soup", "play the drum"))
    weather = rng.choice(("a storm came", "it began to snow", "thick fog came", "the rain did not stop"))
    opening = (
        f"Once upon a time there was a {adjective} {subject} named {name}. {name} lived {place}. "
        if rng.random() < 0.7
        else f"Once upon a time there was a {adjective} {subject} named {name}, who lived {place}. "
    )
    met = f"Then {they} met a {friend} named {friend_name}. "
    arcs = (
        f"One day {name} lost {their} {thing}. {They} looked everywhere and felt sad. {met}"
        f"Together they searched until they found the {thing} {spot}. {name} was happy and thanked {their} new friend.",
        f"One night {weather}, and {name} could not find the way home. {met}{friend_name} had a "
        f"lamp and showed the way. "
        f"From that day on they were the best of friends.",
        f"{name} wanted to learn how to {wish}, but it was hard. {met}{friend_name} could {wish} "
        f"very well and helped every "
        f"day. At last {name} could {wish} too, and everybody cheered.",
        f"One morning {name} found a {thing} {spot}. It belonged to a {friend} named {friend_name}. "
        f"{name} walked all day to bring it back. {friend_name} was so glad that {friend_they} "
        f"made a big dinner for two.",
        f"{name} was often alone and wished for a friend. One day a {friend} named {friend_name} knocked on the door. "
        f"{Friend_they} was hungry and cold. {name} shared {their} bread, and after that {they} was never alone again.",
    )
    return f"{opening}{rng.choice(arcs)} The end."


def _hash(seed: int, *parts: object) -> float:
    return zlib.crc32(repr((seed, *parts)).encode()) / 2**32


class Corpus:
    """All intents, split into training and held-out phrasings, and the conversations made from them."""

    def __init__(self, seed: int = 0) -> None:
        """Build the intents and the split; the same seed gives the same corpus on every machine."""
        self.seed = seed
        sources = (_raytier(), _general(), _sums(), _counting(), _others(random.Random(seed)))
        self.intents = [intent for source in sources for intent in source]
        self._held_out = [self._choose(intent) for intent in self.intents]
        wordings = {normalise(phrasing) for held in self._held_out for phrasing in held}
        self._training: dict[str, list[tuple[Intent, tuple[str, ...]]]] = defaultdict(list)
        for intent in self.intents:
            kept = tuple(phrasing for phrasing in intent.phrasings if normalise(phrasing) not in wordings)
            self._training[intent.group].append((intent, kept))
        self.held_out_wordings = frozenset(wordings)

    def _choose(self, intent: Intent) -> tuple[str, ...]:
        """The phrasings of an intent that are held out."""
        ranked = sorted(intent.phrasings, key=lambda phrasing: _hash(self.seed, intent.answer, phrasing))
        below = [
            phrasing
            for phrasing in ranked
            if _hash(self.seed, intent.answer, phrasing) < HELD_OUT_SHARE and phrasing not in README_QUESTIONS
        ]
        return tuple(below[: max(0, len(ranked) - MIN_TRAINING_PHRASINGS)])

    def training_phrasings(self) -> Iterator[tuple[Intent, str]]:
        """Every phrasing that training may use, with its intent."""
        for entries in self._training.values():
            for intent, phrasings in entries:
                for phrasing in phrasings:
                    yield intent, phrasing

    def _ask(self, rng: random.Random) -> tuple[Message, Message]:
        """A training question and its answer."""
        group = rng.choices(tuple(GROUP_WEIGHTS), tuple(GROUP_WEIGHTS.values()))[0]
        intent, phrasings = rng.choice(self._training[group])
        answer = intent.answer if intent.subject is None else story(rng, intent.subject)
        question = rng.choice(phrasings)
        if group != "repeating":
            question = _variant(rng, question)
        return Message("user", question), Message("assistant", answer)

    def conversation(self, rng: random.Random, turns: int) -> list[Message]:
        """A training conversation with so many questions, now and then with a system prompt."""
        messages: list[Message] = []
        if rng.random() < 0.15:
            messages.append(Message("system", rng.choice(SYSTEM_PROMPTS)))
        named = turns > 1 and rng.random() < 0.2
        name = rng.choice(facts.PEOPLE)[0]
        if named:
            messages += _introduction(name, rng.choice(self.context_patterns(wording.MY_NAME, name)[0]))
        for _ in range(turns - 2 * named):
            if not named and turns > 1 and rng.random() < 0.08:
                messages += self._capitals(rng)
                continue
            question, answer = self._ask(rng)
            if named and answer.content == "You have not told me your name.":
                answer = Message("assistant", f"Your name is {name}.")
            messages += [question, answer]
        if named:
            question_text = rng.choice(self.context_patterns(wording.WHAT_NAME, name)[0])
            messages += [Message("user", question_text), Message("assistant", f"Your name is {name}.")]
        return messages

    def _capitals(self, rng: random.Random) -> list[Message]:
        """A question for a capital and a short one that refers back to it."""
        first, second = rng.sample(tuple(facts.CAPITALS), 2)
        patterns = [p for p in wording.CAPITAL if normalise(p.format(x=first)) not in self.held_out_wordings]
        follow_up = rng.choice(self.context_patterns(wording.WHAT_ABOUT, second)[0])
        return [
            Message("user", _variant(rng, rng.choice(patterns).format(x=first))),
            Message("assistant", f"The capital of {first} is {facts.CAPITALS[first]}."),
            Message("user", _variant(rng, follow_up)),
            Message("assistant", f"The capital of {second} is {facts.CAPITALS[second]}."),
        ]

    def context_patterns(self, patterns: Sequence[str], value: str) -> tuple[list[str], list[str]]:
        """Filled patterns of a question that needs its context: those for training and those held out."""
        held = [p.format(x=value) for p in patterns[2:] if _hash(self.seed, p, value) < HELD_OUT_SHARE]
        return [p for p in _fill(patterns, x=value) if p not in held], held

    def documents(self, rng: random.Random) -> Iterator[list[Message]]:
        """Endless training documents: short chats, and a few plain texts."""
        while True:
            if rng.random() < 0.04:
                intent, _ = rng.choice(self._training[rng.choice(("stories", "raytier", "general"))])
                text = intent.answer if intent.subject is None else story(rng, intent.subject)
                yield [Message("text", text)]
            else:
                yield self.conversation(rng, rng.choices((1, 2, 3, 4), (0.6, 0.22, 0.13, 0.05))[0])

    def held_out(self, per_category: int) -> list[Question]:
        """Held-out questions, at most so many of each category, always the same ones."""
        rng = random.Random(self.seed + 1)
        questions: dict[str, list[Question]] = defaultdict(list)
        for intent, phrasings in zip(self.intents, self._held_out, strict=True):
            for phrasing in phrasings:
                text = phrasing if rng.random() < 0.7 else normalise_case(phrasing)
                message = Message("user", text)
                questions[intent.category].append(Question(intent.category, (message,), intent.answer, intent.subject))
        for country in facts.CAPITALS:
            for follow_up in self.context_patterns(wording.WHAT_ABOUT, country)[1]:
                before = self._capitals(rng)[:2]
                answer = f"The capital of {country} is {facts.CAPITALS[country]}."
                questions["context"].append(Question("context", (*before, Message("user", follow_up)), answer))
        for name, _ in facts.PEOPLE:
            for asked in self.context_patterns(wording.WHAT_NAME, name)[1]:
                told = rng.choice(self.context_patterns(wording.MY_NAME, name)[0])
                between = self._ask(rng)
                messages = (*_introduction(name, told), *between, Message("user", asked))
                questions["context"].append(Question("context", messages, f"Your name is {name}."))
        chosen = {c: rng.sample(found, min(per_category, len(found))) for c, found in questions.items()}
        later = rng.sample([q for found in chosen.values() for q in found if len(q.messages) == 1], per_category)
        chosen["later turn"] = [
            Question("later turn", (*self._ask(rng), *self._ask(rng), *q.messages), q.answer, q.subject) for q in later
        ]
        return [question for found in chosen.values() for question in found]


def _introduction(name: str, told: str) -> list[Message]:
    return [Message("user", told), Message("assistant", f"Nice to meet you, {name}!")]


def normalise_case(text: str) -> str:
    """The text as a hasty user types it: lower case, no mark at the end."""
    return text.lower().rstrip(".?!")


def _variant(rng: random.Random, text: str) -> str:
    """The same question in one of the spellings that users choose."""
    draw = rng.random()
    if draw < 0.5:
        return text
    if draw < 0.7:
        return normalise_case(text)
    if draw < 0.8:
        return text.lower()
    if draw < 0.9:
        return text.rstrip(".?!")
    if draw < 0.94:
        return rng.choice(("Hi! ", "Hello! ", "Hey, ", "Hi, ", "Okay. ", "So, ")) + text
    return text.rstrip(".?!") + rng.choice((" please", ", please.", "??", "!", " ?", ", please?"))
