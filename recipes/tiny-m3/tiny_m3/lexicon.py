"""Word lists shared by every part of the corpus.

`fill` replaces slots such as {name}, {He2} or {fruit} in a sentence. A slot is the name of a list
in NOUNS with an optional digit; different digits give different picks, so {fruit} and {fruit2}
never name the same thing. {name}, {name2}, ... pick people; He/he/his/him follow their person.
"""

import random
import re

GIRLS = (
    "Mira Anna Lena Sofia Clara Nora Ella Ivy Ruby Zoe Maya Lucy Emma Alice Grace Hanna Julia "
    "Kate Lily Molly Olga Paula Rosa Sara Tina Vera Wendy Yara Dana Eva Freya Gina Holly Iris "
    "Jane Kira Laura Mona Nina Petra Rita Stella Tara Uma Viola Willa Amira Bella Carla Dora Elsa "
    "Fiona Greta Helen Ingrid Joy Lola Marta Nadia Opal Pia Rhea Sonia Thea Wilma Zara Ada Beth "
    "Cora Daisy Edith Flora Gloria Hilda Isla Jenny Lotta Mabel Norma Olive Pearl Ruth Sylvia "
    "Tilda Ursula Vicky "
).split()
BOYS = (
    "Tom Ben Leo Max Sam Paul Jack Oscar Finn Hugo Noah Adam Bruno Carl Dan Emil Felix George "
    "Henry Ian James Karl Liam Mark Nick Omar Peter Ralf Simon Theo Victor Will Yusuf Zack Alex "
    "Boris Colin David Erik Frank Gabe Harry Ivan Jonas Kurt Louis Milo Nils Otto Pablo Quinn "
    "Robin Sven Tim Umar Vince Walter Anton Basil Cyrus Dylan Edgar Fred Gus Hank Igor Jasper "
    "Kofi Lars Marco Albert Bert Clive Derek Ernest Felipe Gerald Herman Isaac Joel Kevin Leon "
    "Martin Norman Oliver Philip "
).split()
PEOPLE = tuple(
    [(n, ("She", "she", "her", "her")) for n in GIRLS]
    + [(n, ("He", "he", "his", "him")) for n in BOYS]
)

NOUNS: dict[str, tuple[str, ...]] = {
    "fruit": (
        "apples",
        "pears",
        "plums",
        "oranges",
        "lemons",
        "peaches",
        "bananas",
        "mangoes",
        "figs",
        "cherries",
        "melons",
        "limes",
        "apricots",
        "strawberries",
    ),
    "bake": (
        "muffins",
        "cookies",
        "pies",
        "rolls",
        "bagels",
        "cakes",
        "pretzels",
        "waffles",
        "tarts",
        "donuts",
        "buns",
        "scones",
    ),
    "toy": (
        "marbles",
        "stickers",
        "toy cars",
        "cards",
        "puzzles",
        "kites",
        "balloons",
        "beads",
        "coins",
        "stamps",
        "shells",
        "robots",
        "dolls",
        "crayons",
    ),
    "animal": (
        "sheep",
        "goats",
        "cows",
        "hens",
        "ducks",
        "rabbits",
        "horses",
        "pigs",
        "geese",
        "lambs",
        "ponies",
        "bees",
    ),
    "flower": (
        "roses",
        "tulips",
        "lilies",
        "daisies",
        "sunflowers",
        "violets",
        "orchids",
        "poppies",
    ),
    "supply": (
        "pencils",
        "pens",
        "erasers",
        "notebooks",
        "rulers",
        "markers",
        "folders",
        "brushes",
        "paper clips",
        "envelopes",
    ),
    "tool": ("hammers", "nails", "screws", "ropes", "lamps", "bolts", "hooks", "buckets", "planks"),
    "wear": (
        "shirts",
        "hats",
        "scarves",
        "socks",
        "gloves",
        "jackets",
        "caps",
        "belts",
        "sweaters",
    ),
    "drink": ("juice", "milk", "water", "tea", "lemonade", "soup", "cocoa"),
    "box": ("boxes", "bags", "baskets", "crates", "jars", "packets", "shelves", "drawers"),
    "site": (
        "park",
        "library",
        "museum",
        "market",
        "harbor",
        "school",
        "castle",
        "farm",
        "zoo",
        "garden",
        "theater",
        "station",
        "beach",
        "forest",
    ),
    "shop": ("bakery", "bookshop", "toy shop", "grocery", "flower shop", "corner shop", "kiosk"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "color": (
        "red",
        "blue",
        "green",
        "yellow",
        "white",
        "black",
        "purple",
        "orange",
        "pink",
        "silver",
        "golden",
        "brown",
        "gray",
    ),
    "worker": (
        "baker",
        "farmer",
        "gardener",
        "teacher",
        "tailor",
        "fisher",
        "carpenter",
        "painter",
    ),
    "club": ("chess club", "book club", "music class", "swim team", "art class", "drama group"),
    "reading": ("books", "comics", "magazines", "letters", "stories", "poems"),
    "sport": ("football", "tennis", "basketball", "hockey", "volleyball"),
}

_SLOT = re.compile(r"\{([A-Za-z]+)(\d*)\}")
_PRONOUN = {"He": 0, "he": 1, "his": 2, "him": 3}


def choose_words(text: str, rng: random.Random) -> dict[str, str]:
    """Pick a word for every slot of `text` that is a person, a pronoun or one of NOUNS.

    Returns slot -> word; number slots ({a}, {ans}) are left to the caller. The picks do not
    depend on the order of the slots in the text: people first, then the lists by name.
    """
    slots = sorted({m.group(0)[1:-1] for m in _SLOT.finditer(text)})
    words: dict[str, str] = {}
    people = sorted(
        {s for s in slots if s.rstrip("0123456789") == "name"}
        | {
            "name" + s[len(s.rstrip("0123456789")) :]
            for s in slots
            if s.rstrip("0123456789") in _PRONOUN
        }
    )
    for slot, (name, forms) in zip(people, rng.sample(PEOPLE, len(people)), strict=True):
        words[slot] = name
        digits = slot[len("name") :]
        for pronoun, column in _PRONOUN.items():
            words[pronoun + digits] = forms[column]
    by_list: dict[str, list[str]] = {}
    for slot in slots:
        base = slot.rstrip("0123456789")
        if base in NOUNS:
            by_list.setdefault(base, []).append(slot)
    for base, members in sorted(by_list.items()):
        for slot, word in zip(members, rng.sample(NOUNS[base], len(members)), strict=True):
            words[slot] = word
    return words


def fill(text: str, words: dict[str, str]) -> str:
    """Replace every slot of `text`; a slot without a word is a KeyError."""
    return _SLOT.sub(lambda m: words[m.group(0)[1:-1]], text)
