"""The ways in which a question of each kind is worded; braces stand for what it is about."""

from typing import Final

DEFINE: Final = (
    "What {be} {x}?", "What's {x}?", "Explain {x}.", "Can you explain {x}?", "Tell me about {x}.", "Describe {x}.",
    "Could you tell me what {x} {be}?", "Please explain what {x} {be}.", "I would like to know what {x} {be}.",
    "Give me a short explanation of {x}.", "What {be} {x} in raytier?", "What is meant by {x}?",
    "Help me understand {x}.", "What do you know about {x}?", "Do you know what {x} {be}?", "Define {x}.",
)  # fmt: skip
HOWTO: Final = (
    "How do I {x}?", "How can I {x}?", "How to {x}?", "Tell me how to {x}.", "I want to {x}.", "How would I {x}?",
    "What do I have to do to {x}?", "Please show me how to {x}.", "How does one {x}?",
    "I need to {x}, how do I do that?",
    "What is the best way to {x}?", "What is the command to {x}?", "How could I {x}?", "Can you tell me how to {x}?",
)  # fmt: skip
ABILITY: Final = (
    "Can raytier {x}?", "Is raytier able to {x}?", "Is it possible for raytier to {x}?", "Could raytier {x}?",
    "Will raytier {x}?", "Can I make raytier {x}?", "Does raytier know how to {x}?", "Tell me whether raytier can {x}.",
    "I wonder if raytier can {x}.", "Can it {x}?",
)  # fmt: skip
CAPITAL: Final = (
    "What is the capital of {x}?", "What's the capital of {x}?", "Tell me the capital of {x}.",
    "Name the capital of {x}.",
    "Which city is the capital of {x}?", "What is the capital city of {x}?", "Do you know the capital of {x}?",
    "The capital of {x}?", "What is {x}'s capital?", "Can you tell me the capital of {x}?", "Capital of {x}",
    "I need to know the capital of {x}.",
)  # fmt: skip
CAPITAL_OF: Final = (
    "Of which country is {x} the capital?", "{x} is the capital of which country?",
    "Which country has {x} as its capital?",
    "What country is {x} the capital of?", "Which country's capital is {x}?", "Whose capital is {x}?",
)  # fmt: skip
COLOUR: Final = (
    "What colour is {x}?", "What color is {x}?", "What is the colour of {x}?", "What is the color of {x}?",
    "Tell me the colour of {x}.", "Which colour does {x} have?", "Which color is {x}?",
    "Do you know the colour of {x}?",
)  # fmt: skip
SOUND: Final = (
    "What sound does a {x} make?", "What does a {x} say?", "Which sound does a {x} make?",
    "What noise does a {x} make?",
    "Tell me the sound of a {x}.", "How does a {x} sound?", "What is the sound of a {x}?",
)  # fmt: skip
YOUNG: Final = (
    "What is a young {x} called?", "What is a baby {x} called?", "What do you call a baby {x}?",
    "What do you call a young {x}?", "What is the name for a baby {x}?", "How do you call a young {x}?",
    "Tell me what a baby {x} is called.",
)  # fmt: skip
LEGS: Final = (
    "How many legs does {x} have?", "What number of legs does {x} have?", "Tell me how many legs {x} has.",
    "How many legs has {x}?", "Do you know how many legs {x} has?", "What is the number of legs of {x}?",
)  # fmt: skip
OPPOSITE: Final = (
    "What is the opposite of {x}?", "What's the opposite of {x}?", "Tell me the opposite of {x}.",
    "The opposite of {x}?",
    "Name the opposite of {x}.", "Give me the opposite of {x}.", "Which word is the opposite of {x}?",
    "Do you know the opposite of {x}?", "What word means the opposite of {x}?",
)  # fmt: skip
PLURAL: Final = (
    "What is the plural of {x}?", "What's the plural of {x}?", "Tell me the plural of {x}.", "Plural of {x}?",
    "Give me the plural of {x}.", "What is the plural form of {x}?", "Which word is the plural of {x}?",
    "Do you know the plural of {x}?", "One {x}, two what?",
)  # fmt: skip
PAST: Final = (
    "What is the past tense of {x}?", "What's the past tense of {x}?", "Tell me the past tense of {x}.",
    "Give me the past tense of {x}.", "Past tense of {x}?", "What is the past form of {x}?",
    "Do you know the past tense of {x}?",
)  # fmt: skip
CONTINENT: Final = (
    "On which continent is {x}?", "Which continent is {x} on?", "What continent is {x} on?", "Where is {x}?",
    "In which part of the world is {x}?", "On what continent is {x}?", "Tell me the continent of {x}.",
)  # fmt: skip
SIDES: Final = (
    "How many sides does a {x} have?", "What number of sides does a {x} have?", "Tell me how many sides a {x} has.",
    "How many sides are there in a {x}?", "Do you know how many sides a {x} has?", "How many sides has a {x}?",
)  # fmt: skip
AFTER: Final = (
    "What {kind} comes after {x}?", "Which {kind} comes after {x}?", "What comes after {x}?",
    "Which {kind} follows {x}?",
    "What is the {kind} after {x}?", "What {kind} is after {x}?", "Tell me the {kind} after {x}.",
    "Name the {kind} after {x}.",
)  # fmt: skip
BEFORE: Final = (
    "What {kind} comes before {x}?", "Which {kind} comes before {x}?", "What comes before {x}?",
    "What is the {kind} before {x}?", "What {kind} is before {x}?", "Tell me the {kind} before {x}.",
    "Name the {kind} before {x}.",
)  # fmt: skip
MONTH_NUMBER: Final = (
    "What is the {x} month of the year?", "Which month is the {x} one?", "What's the {x} month?", "Name the {x} month.",
    "Which is the {x} month of the year?", "Tell me the {x} month of the year.", "What month is the {x} of the year?",
)  # fmt: skip
MONTH_LENGTH: Final = (
    "How many days are in {x}?", "How many days does {x} have?", "How long is {x}?", "Tell me how many days {x} has.",
    "What is the number of days in {x}?", "How many days are there in {x}?", "How many days has {x}?",
)  # fmt: skip
TRIVIA: Final = (
    "{x}?", "Tell me, {y}?", "Do you know, {y}?", "I have a question: {y}?", "Please answer: {y}?", "Can you say {y}?",
    "Quick question, {y}?", "I wonder, {y}?",
)  # fmt: skip
ADD: Final = (
    "What is {a} + {b}?", "What's {a} plus {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a} + {b} = ?", "{a}+{b}",
    "{a} + {b} =", "How much is {a} plus {b}?", "How much is {a} + {b}?", "Add {a} and {b}.", "Calculate {a} + {b}.",
    "Can you add {a} and {b}?", "Compute {a} + {b}.", "What is the sum of {a} and {b}?", "What's {a}+{b}?",
    "Tell me what {a} plus {b} is.",
)  # fmt: skip
ADD_WORDS: Final = (
    "What is {wa} plus {wb}?",
    "How much is {wa} plus {wb}?",
    "Add {wa} and {wb}.",
    "What's {wa} plus {wb}?",
)
SUBTRACT: Final = (
    "What is {a} - {b}?", "What's {a} minus {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a} - {b} = ?", "{a}-{b}",
    "{a} - {b} =", "How much is {a} minus {b}?", "How much is {a} - {b}?", "Subtract {b} from {a}.",
    "Calculate {a} - {b}.",
    "Can you subtract {b} from {a}?", "Compute {a} - {b}.", "Take {b} away from {a}.", "What's {a}-{b}?",
    "Tell me what {a} minus {b} is.",
)  # fmt: skip
SUBTRACT_WORDS: Final = (
    "What is {wa} minus {wb}?",
    "How much is {wa} minus {wb}?",
    "Take {wb} from {wa}.",
    "What's {wa} minus {wb}?",
)
HARD_SUM: Final = (
    "What is {a} + {b}?", "What's {a} plus {b}?", "{a} * {b}", "What is {a} times {b}?", "{a} + {b}",
    "Calculate {a} * {b}.",
    "What is {a} divided by {b}?", "How much is {a} times {b}?", "{a} / {b}", "Multiply {a} and {b}.",
    "What is {a} - {b}?",
)  # fmt: skip
COUNT_UP: Final = (
    "Count from {a} to {b}.", "Can you count from {a} to {b}?", "Please count from {a} to {b}.",
    "Count up from {a} to {b}.",
    "List the numbers from {a} to {b}.", "Count {a} to {b}.", "Give me the numbers from {a} to {b}.",
    "Say the numbers from {a} to {b}.", "I want you to count from {a} to {b}.", "Write the numbers from {a} to {b}.",
)  # fmt: skip
COUNT_TO: Final = (
    "Count to {b}.", "Can you count to {b}?", "Please count to {b}.", "Count up to {b}.", "Could you count to {b}?",
    "I want you to count to {b}.", "Count to {w}.", "Can you count to {w}?",
)  # fmt: skip
COUNT_DOWN: Final = (
    "Count down from {a} to {b}.", "Count backwards from {a} to {b}.", "Can you count down from {a} to {b}?",
    "Please count down from {a} to {b}.", "Count from {a} down to {b}.", "List the numbers from {a} down to {b}.",
    "Can you count backwards from {a} to {b}?",
)  # fmt: skip
COUNT_BY: Final = (
    "Count by {w} from {a} to {b}.", "Count from {a} to {b} by {w}.", "Can you count by {w} from {a} to {b}?",
    "Please count from {a} to {b} by {w}.", "Count in {w} from {a} to {b}.", "Count from {a} to {b} in {w}.",
    "Can you count from {a} to {b} by {w}?",
)  # fmt: skip
STORY: Final = (
    "Tell me a short story about {x}.", "Tell me a story about {x}.", "Write a short story about {x}.",
    "Write a story about {x}.", "Can you tell me a story about {x}?", "I would like to hear a story about {x}.",
    "Please tell me a story about {x}.", "A story about {x}, please.", "Make up a story about {x}.",
    "Give me a short story about {x}.", "Do you know a story about {x}?", "Story about {x}",
    "Could you write a short story about {x}?", "I want a story about {x}.",
)  # fmt: skip
ANY_STORY: Final = (
    "Tell me a story.", "Tell me a short story.", "Write a story.", "Can you tell me a story?", "A story, please.",
    "I want to hear a story.", "Do you know a story?", "Please write a short story.",
)  # fmt: skip
MY_NAME: Final = (
    "My name is {x}.", "I am {x}.", "Hi, I am {x}.", "Hello, my name is {x}.", "I'm {x}.", "Hello! I'm {x}.",
    "Call me {x}.",
    "You can call me {x}.", "People call me {x}.",
)  # fmt: skip
WHAT_NAME: Final = (
    "What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "Do you know my name?",
    "Tell me my name.", "Can you tell me my name?", "How am I called?",
)  # fmt: skip
WHAT_ABOUT: Final = ("And of {x}?", "What about {x}?", "And {x}?", "And the capital of {x}?", "How about {x}?")
REPEAT: Final = (
    "Repeat after me: {x}", "Repeat: {x}", "Please repeat: {x}", "Say this: {x}", "Repeat this: {x}",
    "Can you repeat this? {x}", "Write this: {x}", "Copy this: {x}",
)  # fmt: skip
