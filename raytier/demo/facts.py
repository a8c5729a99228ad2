"""What the demo model knows of the world, and what it knows that it does not know."""

from typing import Final

CAPITALS: Final[dict[str, str]] = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Scotland": "Edinburgh", "Ireland": "Dublin", "Belgium": "Brussels", "Austria": "Vienna",
    "Switzerland": "Bern", "Poland": "Warsaw", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm",
    "Denmark": "Copenhagen", "Finland": "Helsinki", "Iceland": "Reykjavik", "Hungary": "Budapest", "Croatia": "Zagreb",
    "Romania": "Bucharest", "Bulgaria": "Sofia", "Ukraine": "Kyiv", "Russia": "Moscow", "Turkey": "Ankara",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Morocco": "Rabat", "Ghana": "Accra", "Ethiopia": "Addis Ababa",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "South Korea": "Seoul", "Indonesia": "Jakarta", "Nepal": "Kathmandu", "Mongolia": "Ulaanbaatar", "Iran": "Tehran",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Brazil": "Brasilia", "Argentina": "Buenos Aires",
    "Chile": "Santiago", "Peru": "Lima", "Colombia": "Bogota", "Australia": "Canberra", "New Zealand": "Wellington",
}  # fmt: skip

COLOURS: Final[dict[str, str]] = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a banana": "yellow", "a lemon": "yellow",
    "a tomato": "red", "a carrot": "orange", "an orange": "orange", "blood": "red", "milk": "white",
    "chocolate": "brown", "a flamingo": "pink", "a frog": "green", "the sun": "yellow", "a raven": "black",
    "a strawberry": "red", "a violet": "purple", "the sea": "blue", "salt": "white",
}  # fmt: skip

SOUNDS: Final[dict[str, str]] = {
    "dog": "woof", "cat": "meow", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink", "lion": "roar",
    "bee": "buzz", "snake": "hiss", "owl": "hoot", "frog": "croak", "horse": "neigh", "mouse": "squeak",
    "wolf": "howl", "crow": "caw",
}  # fmt: skip

YOUNG: Final[dict[str, str]] = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "duck": "duckling", "pig": "piglet",
    "lion": "cub", "horse": "foal", "goat": "kid", "goose": "gosling", "frog": "tadpole", "deer": "fawn",
    "kangaroo": "joey", "swan": "cygnet", "hen": "chick",
}  # fmt: skip

LEGS: Final[dict[str, str]] = {
    "a dog": "four", "a bird": "two", "a spider": "eight", "an ant": "six", "a snake": "no", "a horse": "four",
    "a bee": "six", "a crab": "ten", "a fish": "no", "a human": "two",
}  # fmt: skip

OPPOSITES: Final[dict[str, str]] = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "fast": "slow", "old": "young",
    "happy": "sad", "wet": "dry", "full": "empty", "hard": "soft", "light": "dark", "open": "closed", "early": "late",
    "rich": "poor", "strong": "weak", "tall": "short", "thick": "thin", "loud": "quiet", "clean": "dirty",
    "good": "bad", "near": "far", "first": "last", "high": "low", "in": "out", "on": "off", "push": "pull",
    "buy": "sell", "win": "lose", "begin": "end", "true": "false", "wide": "narrow", "deep": "shallow",
    "sweet": "sour", "always": "never",
}  # fmt: skip

PLURALS: Final[dict[str, str]] = {
    "cat": "cats", "dog": "dogs", "mouse": "mice", "child": "children", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "man": "men", "woman": "women", "box": "boxes", "bus": "buses", "baby": "babies",
    "city": "cities", "leaf": "leaves", "wolf": "wolves", "knife": "knives", "fish": "fish", "sheep": "sheep",
    "ox": "oxen", "person": "people", "potato": "potatoes", "hero": "heroes", "key": "keys", "day": "days",
    "house": "houses", "tree": "trees", "book": "books", "berry": "berries", "life": "lives", "wish": "wishes",
}  # fmt: skip

PASTS: Final[dict[str, str]] = {
    "go": "went", "eat": "ate", "see": "saw", "run": "ran", "write": "wrote", "take": "took", "give": "gave",
    "come": "came", "sing": "sang", "swim": "swam", "think": "thought", "buy": "bought", "make": "made",
    "find": "found", "speak": "spoke",
}  # fmt: skip

CONTINENTS: Final[dict[str, str]] = {
    "France": "Europe", "Germany": "Europe", "Italy": "Europe", "Spain": "Europe", "Egypt": "Africa",
    "Kenya": "Africa", "Ghana": "Africa", "Japan": "Asia", "China": "Asia", "India": "Asia", "Thailand": "Asia",
    "Brazil": "South America", "Peru": "South America", "Chile": "South America", "Canada": "North America",
    "Mexico": "North America",
}  # fmt: skip

SIDES: Final[dict[str, str]] = {
    "triangle": "three", "square": "four", "rectangle": "four", "pentagon": "five", "hexagon": "six",
    "octagon": "eight",
}  # fmt: skip

DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: Final = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
MONTH_LENGTHS: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ORDINALS: Final = (
    "first", "second", "third", "fourth", "fifth", "sixth",
    "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth",
)  # fmt: skip
NUMBER_WORDS: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip

# (stem that follows "how many", "which" and so on, answer)
TRIVIA: Final[tuple[tuple[str, str], ...]] = (
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How many hours are in a day?", "There are twenty-four hours in a day."),
    ("How many minutes are in an hour?", "There are sixty minutes in an hour."),
    ("How many seconds are in a minute?", "There are sixty seconds in a minute."),
    ("How many days are in a year?", "There are 365 days in a year, and 366 in a leap year."),
    ("How many letters are in the alphabet?", "There are twenty-six letters in the alphabet."),
    ("How many fingers are on a hand?", "There are five fingers on a hand, counting the thumb."),
    ("How many planets are in the solar system?", "There are eight planets in the solar system."),
    ("How many continents are there?", "There are seven continents."),
    ("How many seasons are in a year?", "There are four seasons in a year: spring, summer, autumn and winter."),
    ("How many colours are in a rainbow?", "There are seven colours in a rainbow."),
    ("How many bits are in a byte?", "There are eight bits in a byte."),
    ("How many wheels are on a bicycle?", "There are two wheels on a bicycle."),
    ("How many strings are on a guitar?", "There are six strings on a guitar."),
    ("Which planet is closest to the sun?", "Mercury is the planet closest to the sun."),
    ("Which planet is the largest?", "Jupiter is the largest planet."),
    ("Which planet do we live on?", "We live on the planet Earth."),
    ("Which animal is the largest?", "The blue whale is the largest animal."),
    ("Which land animal is the fastest?", "The cheetah is the fastest land animal."),
    ("Which animal is the tallest?", "The giraffe is the tallest animal."),
    ("Which ocean is the largest?", "The Pacific is the largest ocean."),
    ("Which mountain is the highest?", "Mount Everest is the highest mountain."),
    ("Which day comes after the weekend?", "Monday comes after the weekend."),
    ("Which season is the coldest?", "Winter is the coldest season."),
    ("Which season is the warmest?", "Summer is the warmest season."),
    ("Which bird cannot fly?", "A penguin is a bird that cannot fly."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows drink?", "Cows drink water."),
    ("What do plants need?", "Plants need light, water and air."),
    ("What does a clock show?", "A clock shows the time."),
    ("What falls from clouds?", "Rain falls from clouds."),
    ("What is ice made of?", "Ice is made of frozen water."),
    ("What is bread made of?", "Bread is made of flour, water and yeast."),
    ("What is glass made of?", "Glass is made of sand."),
    ("What is cheese made of?", "Cheese is made of milk."),
)

# (phrasings, answer)
SMALL_TALK: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (
        (
            "Hello!",
            "Hi!",
            "Hey!",
            "Hi there!",
            "Hello there!",
            "Greetings!",
            "Good day!",
            "Hey there!",
            "Hello, model!",
        ),
        "Hello! I am the raytier demo model. How can I help you?",
    ),
    (
        ("Good morning!", "A good morning to you!", "Morning!", "Good morning, model!", "Have a good morning!"),
        "Good morning! How can I help you?",
    ),
    (
        ("Good evening!", "A good evening to you!", "Evening!", "Good evening, model!", "Have a good evening!"),
        "Good evening! How can I help you?",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What's your name?",
            "What is your name?",
            "Tell me who you are.",
            "Introduce yourself.",
            "Which model are you?",
            "Who am I talking to?",
            "Are you a robot?",
            "Tell me about yourself.",
            "Please introduce yourself.",
            "What model is this?",
        ),
        "I am the raytier demo model, a very small language model that lives inside the raytier package.",
    ),
    (
        (
            "What can you do?",
            "What can I ask you?",
            "How can you help me?",
            "What are you able to do?",
            "What do you know?",
            "Help!",
            "Tell me what you can do.",
            "What can you talk about?",
            "Can you help me?",
            "I need help.",
            "What should I ask you?",
        ),
        "I can answer questions about raytier, count, do small sums, name capitals and tell short stories.",
    ),
    (
        (
            "How are you?",
            "How are you doing?",
            "How do you do?",
            "How is it going?",
            "Are you well?",
            "How are you today?",
            "How do you feel?",
            "Is everything all right?",
        ),
        "I am fine, thank you. All my layers are in place.",
    ),
    (
        (
            "Thanks!",
            "Thank you!",
            "Thank you very much!",
            "Thanks a lot!",
            "Many thanks!",
            "Great, thanks!",
            "Thank you for your help!",
            "Thanks for the answer!",
            "That helped, thank you!",
            "Perfect, thank you!",
        ),
        "You are welcome!",
    ),
    (
        (
            "Goodbye!",
            "Bye!",
            "Bye bye!",
            "See you later!",
            "See you!",
            "Good night!",
            "I have to go.",
            "Goodbye, model!",
            "Talk to you later!",
        ),
        "Goodbye! Come back any time.",
    ),
    (
        (
            "Tell me a joke.",
            "Do you know a joke?",
            "Make me laugh.",
            "Can you tell a joke?",
            "Say something funny.",
            "I want to hear a joke.",
            "Tell me something funny.",
            "Please tell me a joke.",
        ),
        "Why did the layer go to disk? Because there was no more room in memory.",
    ),
    (
        (
            "Who made you?",
            "Who built you?",
            "Who trained you?",
            "Where do you come from?",
            "Who created you?",
            "How were you made?",
            "How were you trained?",
            "Where were you trained?",
        ),
        "I was trained in under an hour on two CPU cores, as part of the raytier project.",
    ),
    (
        (
            "Say hello.",
            "Say hello to me.",
            "Please say hello.",
            "Can you say hello?",
            "Could you say hello?",
            "Greet me.",
        ),
        "Hello!",
    ),
    (
        (
            "Are you smart?",
            "Are you intelligent?",
            "Are you clever?",
            "Do you know everything?",
            "How smart are you?",
            "Are you like a large model?",
            "Can you answer everything?",
        ),
        "Not very. I am a tiny model, and I know only a few things.",
    ),
    (
        ("Test", "This is a test.", "Testing, testing.", "Just a test.", "Is this working?", "Are you there?", "Ping"),
        "Yes, I am here, and it works.",
    ),
)

REFUSAL: Final = (
    "I am a very small demo model, and I do not know that. "
    "Ask me about raytier, capitals, small sums, counting or a short story."
)
REFUSAL_SUM: Final = "That is too hard for me. I can only add and subtract small numbers."

# Questions that the model should decline: (patterns, fillers)
UNKNOWN: Final[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = (
    (
        (
            "What is {x}?", "Explain {x}.", "What's {x}?", "Tell me about {x}.", "Can you explain {x}?",
            "Describe {x}.",
            "What do you know about {x}?", "Help me understand {x}.", "Give me a short explanation of {x}.",
        ),
        (
            "photosynthesis", "gravity", "democracy", "jazz", "the stock market", "a black hole", "evolution",
            "the internet", "quantum physics", "philosophy", "the French revolution", "inflation", "a volcano",
            "chess", "electricity", "algebra", "the Roman empire", "a vaccine", "bitcoin", "climate change", "opera",
            "a computer virus", "geometry", "the moon landing", "yoga", "football", "economics", "chemistry",
            "a mortgage", "poetry", "psychology", "a blockchain", "a telescope", "magnetism", "Kubernetes", "Linux",
            "a database", "JavaScript", "Docker", "love", "the meaning of life", "sushi", "ballet", "a hurricane",
        ),
    ),
    (
        (
            "Who is {x}?", "Who was {x}?", "Tell me about {x}.", "When was {x} born?", "What did {x} do?",
            "What do you know about {x}?", "Where was {x} born?", "Why is {x} famous?",
        ),
        (
            "Albert Einstein", "Napoleon", "Shakespeare", "Mozart", "Isaac Newton", "Cleopatra", "Marie Curie",
            "Leonardo da Vinci", "Julius Caesar", "Picasso", "Beethoven", "Charles Darwin", "the president", "the king",
            "Ada Lovelace", "Alan Turing", "Gandhi", "Plato", "Galileo", "the pope",
        ),
    ),
    (
        (
            "How do I {x}?", "How can I {x}?", "Tell me how to {x}.", "What is the best way to {x}?", "I want to {x}.",
            "Please show me how to {x}.", "Can you teach me how to {x}?",
        ),
        (
            "bake a cake", "fix my car", "learn French", "play the piano", "lose weight", "cook rice", "plant a tree",
            "get rich", "sleep better", "draw a face", "ride a bike", "write a book", "make coffee", "build a house",
            "find a job", "tie a tie", "clean my shoes", "paint a wall", "buy a house", "train a cat",
        ),
    ),
    (
        (
            "What is the weather in {x}?", "How is the weather in {x}?", "Will it rain in {x}?",
            "What time is it in {x}?",
            "How many people live in {x}?", "Who is the mayor of {x}?", "What can I see in {x}?",
            "How do I get to {x}?",
            "Where can I eat in {x}?",
        ),
        (
            "London", "Paris", "Berlin", "New York", "Tokyo", "Madrid", "Rome", "Sydney", "Chicago", "Boston", "Milan",
            "Munich", "Dubai", "Toronto",
        ),
    ),
    (
        (
            "Translate {x} into French.", "How do you say {x} in German?", "What is {x} in Spanish?",
            "Write a poem about {x}.", "Write a song about {x}.", "Write an essay about {x}.", "Draw a picture of {x}.",
            "Write code for {x}.", "What is the history of {x}?",
        ),
        (
            "water", "the house", "friendship", "a tree", "music", "the sea", "summer", "a car", "happiness", "bread",
            "the city", "a river", "winter", "school", "rain", "a game", "cooking", "sport",
        ),
    ),
    (
        (
            "Who won the {x}?", "When was the {x}?", "Who will win the {x}?", "What happened at the {x}?",
            "Where is the next {x}?", "When does the {x} start?",
        ),
        (
            "world cup", "election", "Olympic games", "last race", "chess championship", "Nobel prize", "super bowl",
            "song contest", "marathon", "Tour de France",
        ),
    ),
)  # fmt: skip

PEOPLE: Final[tuple[tuple[str, str], ...]] = (
    ("Mia", "she"), ("Tom", "he"), ("Lily", "she"), ("Max", "he"), ("Ella", "she"), ("Ben", "he"), ("Nora", "she"),
    ("Sam", "he"), ("Ruby", "she"), ("Leo", "he"), ("Anna", "she"), ("Finn", "he"), ("Zoe", "she"), ("Oscar", "he"),
    ("Clara", "she"), ("Hugo", "he"), ("Ivy", "she"), ("Jack", "he"), ("Rosa", "she"), ("Paul", "he"),
)  # fmt: skip

SUBJECTS: Final[tuple[str, ...]] = (
    "fox", "robot", "cat", "dog", "dragon", "rabbit", "bear", "mouse", "bird", "owl", "frog", "turtle", "horse", "wolf",
    "lion", "penguin", "squirrel", "elephant", "knight", "princess", "pirate", "wizard", "farmer", "girl", "boy",
    "monkey", "duck", "whale", "unicorn", "ghost", "giant", "king", "queen", "sailor", "tiger", "bee", "snail",
    "hedgehog", "computer", "cloud", "star", "train", "teacher", "baker", "fish", "snake", "goat", "witch",
)  # fmt: skip
