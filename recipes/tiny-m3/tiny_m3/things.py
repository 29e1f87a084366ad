"""Words of composed problems: many things, names, roles and verbs, so that none of them counts."""

import random

from tiny_m3.lexicon import NOUNS
from tiny_m3.spelling import WORDS

MORE_NAMES = {
    "girls": (
        "Mia Ava Chloe Zoey Amelia Nina Priya Aisha Fatima Leila Mei Yuki Hana Sakura Lin Xia Ana "
        "Maria Lucia Carmen Elena Ines Noor Amina Zainab Sana Ritu Anika Kavya Meera Jade Skye "
        "Paige Brooke Sophie Charlotte Emily Hannah Sarah Rachel Rebecca Linda Susan Karen Betty "
        "Lisa Nancy Sandra Ashley Donna Carol Amanda Melissa Stephanie Laura Cynthia Amy Angela "
        "Janet Claire Marie Natalia Weng Toni Tracy Megan Abby Kelly Kim Jessica Samantha"
    ).split(),
    "boys": (
        "Josh Lucas Ethan Mason Logan Liam Aiden Caleb Ryan Nathan Aaron Ahmed Ali Hassan Omar "
        "Raj Arjun Vikram Rohan Wei Chen Hiro Kenji Takeshi Jin Juan Carlos Diego Luis Miguel "
        "Jose Mateo Andre Marcus Jamal Tyrone Malik Kwame Sanjay Ravi Kenny Danny Bobby Billy "
        "Jimmy Mike Dave Steve Bob Joe John Robert Michael William Richard Joseph Thomas Charles "
        "Daniel Matthew Anthony Brian Jason Jeff Gary Eric Larry Scott Brandon Greg Sean Toby Roy"
    ).split(),
}  # fmt: skip

_HE, _SHE, _IT = ("he", "him", "his"), ("she", "her", "her"), ("it", "it", "its")
# (role, its pronouns)
ROLES = tuple(
    [(w, _HE) for w in ("farmer", "baker", "boy", "man", "fisherman", "king", "postman", "cook",
                        "gardener", "shopkeeper", "teacher", "builder", "collector", "driver")]
    + [(w, _SHE) for w in ("girl", "woman", "queen", "librarian", "florist", "nurse", "painter",
                           "tailor", "student", "seller", "doctor", "coach")]
    + [(w, _IT) for w in ("shop", "school", "store", "bakery", "factory", "library", "museum",
                          "restaurant", "hotel", "company", "club", "farm", "zoo", "squirrel",
                          "cafe", "kitchen", "team", "class", "family", "museum shop")]
)  # fmt: skip

# Past forms that rules do not give.
IRREGULAR = dict(
    pair.split("/")
    for pair in (
        "have/had give/gave buy/bought lose/lost find/found get/got sell/sold eat/ate "
        "take/took bring/brought break/broke throw/threw send/sent spend/spent lend/lent "
        "leave/left make/made build/built win/won draw/drew catch/caught grow/grew keep/kept "
        "put/put hold/held begin/began do/did go/went come/came fly/flew run/ran write/wrote "
        "read/read drink/drank pay/paid cut/cut steal/stole hide/hid fall/fell let/let "
        "set/set lay/laid see/saw tear/tore burn/burned bake/baked think/thought know/knew "
        "drive/drove ride/rode swim/swam sink/sank cost/cost weigh/weighed need/needed "
        "pour/poured become/became feed/fed meet/met hit/hit sit/sat stand/stood sew/sewed "
        "sing/sang tell/told say/said hand/handed shut/shut bend/bent dig/dug rise/rose "
        "spill/spilled teach/taught sleep/slept split/split beat/beat shoot/shot"
    ).split()
)

THINGS = tuple(
    dict.fromkeys(
        [w for kind in ("fruit", "bake", "toy", "animal", "flower", "supply", "tool", "wear",
                        "reading") for w in NOUNS[kind]]
        + """grapes berries nuts walnuts chestnuts carrots potatoes tomatoes onions pumpkins
        cucumbers peppers beans mushrooms eggs loaves sandwiches pizzas pancakes sweets candies
        chocolates lollipops biscuits crackers cupcakes brownies sausages burgers dumplings noodles
        cans bottles cups glasses plates bowls spoons forks knives pots pans kettles candles matches
        lanterns torches batteries bulbs cables phones cameras tablets clocks watches rings
        necklaces bracelets earrings buttons ribbons pillows blankets towels curtains carpets
        chairs tables desks benches sofas beds doors windows bricks tiles stones rocks pebbles logs
        sticks branches leaves seeds bulbs trees bushes plants cactuses ferns fish trout salmon
        turtles frogs snails butterflies ladybugs ants beetles birds parrots pigeons owls cats dogs
        puppies kittens hamsters mice lizards snakes monkeys elephants camels donkeys cars trucks
        buses bikes scooters trains boats ships planes rockets wheels tires tickets coupons tokens
        badges medals trophies flags posters pictures photos paintings drawings maps globes
        newspapers postcards parcels packages gifts toys blocks dice tops yo-yos balls bats rackets
        helmets skates shoes boots sandals slippers coats dresses skirts jeans ties umbrellas
        wallets purses keys locks ladders shovels rakes saws drills brooms mops sponges soaps
        toothbrushes combs mirrors vases baskets barrels jugs buckets tents sleeping-bags lamps
        fans radios drums guitars flutes violins pianos bells whistles songs videos films games
        points stars hearts gems diamonds pearls crystals fossils feathers acorns pinecones
        snowballs sandcastles tasks questions problems messages emails calls reports
        forms pages chapters words recipes jokes students pupils guests visitors workers soldiers
        players dancers singers passengers tourists customers children girls boys people members
        runners riders swimmers actors knights pirates robots aliens dragons wizards seats rooms
        houses cookies jars buttons spools beads threads needles screws wires magnets""".split()
    )
)  # fmt: skip
PEOPLE_WORDS = frozenset(
    """students pupils guests visitors workers soldiers players dancers singers passengers tourists
    customers children girls boys people members runners riders swimmers actors knights pirates
    robots aliens dragons wizards seats rooms houses points problems""".split()
)
OWNED = tuple(t for t in THINGS if t not in PEOPLE_WORDS)
CROWDS = (
    "people children students guests visitors passengers tourists dancers players birds ducks "
    "sheep cows horses cars boats bees customers fish frogs penguins pigeons swimmers runners "
    "singers soldiers workers members cats monkeys"
).split()
BOXES = (
    "boxes bags baskets crates jars packets shelves drawers cartons bins trays buckets sacks "
    "cases tins packs bowls bundles rows tables rooms wagons carts cages pots piles stacks "
    "chests folders pockets cupboards barrels racks"
).split()
PLACES = (
    "park library museum market harbor school castle farm zoo garden theater station beach "
    "forest bus train hall field pond lake room kitchen yard barn shop store box basket "
    "street village hotel cinema club stadium pool playground office cellar attic garage "
    "bakery restaurant classroom meadow tent boat"
).split()
MATERIALS = (
    "water milk juice oil paint soup tea lemonade sand flour sugar rice salt honey soil wheat "
    "corn cement wood coal fuel gas syrup vinegar cream glue ink"
).split()
PERIODS = "day week month hour year minute evening morning".split()
COLORS = NOUNS["color"]
_IRREGULAR_ONE = {
    "children": "child", "people": "person", "mice": "mouse", "geese": "goose", "knives": "knife",
    "loaves": "loaf", "leaves": "leaf", "scarves": "scarf", "shelves": "shelf", "sheep": "sheep",
    "fish": "fish", "trout": "trout", "salmon": "salmon", "dice": "die", "cookies": "cookie",
    "pies": "pie", "ties": "tie", "movies": "movie", "brownies": "brownie", "cactuses": "cactus",
    "jeans": "pair of jeans", "boxes": "box", "buses": "bus", "benches": "bench",
}  # fmt: skip
_SYLLABLES = "bor gla zim tik wu plo nar ved sho kri mo fen dap lur qui zo ba hes jin cro".split()


def singular(plural: str) -> str:
    """apples -> apple."""
    if plural in _IRREGULAR_ONE:
        return _IRREGULAR_ONE[plural]
    if plural.endswith("ies"):
        return plural[:-3] + "y"
    if plural.endswith(("shes", "ches", "sses", "xes", "oes")):
        return plural[:-2]
    return plural.removesuffix("s")


def draw_thing(rng: random.Random) -> str:
    """A countable thing in the plural; one in ten is any word, one in twenty means nothing."""
    kind = rng.random()
    if kind < 0.05:
        return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3))) + "s"
    if kind < 0.12:
        return f"{rng.choice(WORDS)} {rng.choice(OWNED)}"
    if kind < 0.2:
        return f"{rng.choice(COLORS)} {rng.choice(OWNED)}"
    return rng.choice(OWNED)


def draw_words(rng: random.Random) -> dict[str, str]:
    """The words of one text, by slot."""
    x, y = draw_thing(rng), draw_thing(rng)
    while y == x:
        y = draw_thing(rng)
    box, box2 = rng.sample(BOXES, 2)
    place, place2 = rng.sample(PLACES, 2)
    color, color2 = rng.sample(COLORS, 2)
    day, day2 = rng.sample(NOUNS["day"], 2)
    period = rng.choice(PERIODS[:5])
    return {
        "x": x, "x1": singular(x), "y": y, "y1": singular(y), "crowd": rng.choice(CROWDS),
        "box": box, "box1": singular(box), "box2": box2, "box3": singular(box2), "place": place,
        "place2": place2, "color": color, "color2": color2, "day": day, "day2": day2,
        "shop": rng.choice(NOUNS["shop"]), "stuff": rng.choice(MATERIALS), "period": period,
        "periods": period + "s", "sport": rng.choice(NOUNS["sport"]),
    }  # fmt: skip
