"""Short stories from a grammar: a hero, a wish, an obstacle, help, an ending."""

import random
import re
from typing import Any

from tiny_m3.lexicon import BOYS, GIRLS

HEROES = (
    "fox",
    "rabbit",
    "bear",
    "mouse",
    "owl",
    "hedgehog",
    "frog",
    "duck",
    "cat",
    "dog",
    "squirrel",
    "turtle",
    "wolf",
    "deer",
    "otter",
    "badger",
    "sparrow",
    "penguin",
    "goat",
    "pony",
    "beaver",
    "snail",
    "lamb",
    "crow",
    "dragon",
    "robot",
    "giant",
    "knight",
    "princess",
    "pirate",
    "wizard",
    "sailor",
    "baker",
    "shepherd",
)
TRAITS = (
    "brave",
    "shy",
    "clever",
    "lazy",
    "kind",
    "curious",
    "tiny",
    "proud",
    "hungry",
    "sleepy",
    "gentle",
    "noisy",
    "lonely",
    "cheerful",
    "grumpy",
    "patient",
    "young",
    "old",
    "quiet",
    "silly",
)
PLACES = (
    "forest",
    "valley",
    "village",
    "meadow",
    "mountain",
    "island",
    "castle",
    "harbor",
    "garden",
    "desert",
    "swamp",
    "cave",
    "farm",
    "river",
    "lake",
    "city",
    "beach",
    "mill",
    "tower",
    "hill",
)
THINGS = (
    "lantern",
    "key",
    "map",
    "bell",
    "crown",
    "ring",
    "book",
    "drum",
    "kite",
    "boat",
    "scarf",
    "mirror",
    "violin",
    "cup",
    "compass",
    "flute",
    "hat",
    "basket",
    "feather",
    "stone",
    "seed",
    "clock",
    "blanket",
    "candle",
    "whistle",
    "necklace",
)
LOOKS = (
    "red",
    "blue",
    "golden",
    "silver",
    "wooden",
    "old",
    "shiny",
    "broken",
    "tiny",
    "magic",
    "heavy",
    "green",
    "round",
    "warm",
    "glass",
)
SKILLS = (
    "swim",
    "sing",
    "fly a kite",
    "read",
    "bake bread",
    "dance",
    "climb trees",
    "whistle",
    "play the flute",
    "paint",
    "skate",
    "row a boat",
)
FOODS = (
    "berries",
    "honey cakes",
    "apples",
    "soup",
    "warm bread",
    "nuts",
    "cheese",
    "plums",
    "pancakes",
    "cookies",
)
WEATHERS = (
    "a storm came up",
    "thick fog fell",
    "it began to snow",
    "the wind grew strong",
    "heavy rain began",
    "the sun went down",
    "the river rose",
)
TIMES = (
    "One morning",
    "One cold day",
    "One evening",
    "Early in spring",
    "On a windy day",
    "One summer day",
    "One night",
    "Late in autumn",
)
FEELS = ("happy", "glad", "proud", "calm", "thankful", "full of joy")
SAD = ("sad", "afraid", "worried", "tired", "cold and tired", "ready to give up")
LESSONS = (
    "even small friends can be a great help",
    "it is good to ask for help",
    "a kind word opens many doors",
    "it is never too late to try again",
    "sharing makes every meal better",
    "being brave means going on when you are afraid",
    "patience is stronger than haste",
    "home is where your friends are",
    "a promise should be kept",
    "practice makes hard things easy",
)

OPENINGS = (
    "Once upon a time there was a {trait} {hero} named {name} who lived near a {place}.",
    "In a small house by the {place} lived {name}, a {trait} {hero}.",
    "Long ago, a {trait} {hero} called {name} lived at the edge of a {place}.",
    "{name} was a {trait} {hero}. {He} lived all alone in a {place}.",
    "There once was a {hero} named {name}. Everyone in the {place} knew how {trait} {he} was.",
)
PLANS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lost": (
        (
            "{time}, {name} noticed that {his} {look} {thing} was gone.",
            "{time}, {name} could not find {his} {look} {thing} anywhere.",
            "{time}, a crow stole the {look} {thing} that {name} loved most.",
        ),
        (
            "{He} looked under the bed, behind the door and in the {place2}, but it was not there.",
            "{He} searched the whole {place2} from morning until noon.",
            "{He} asked everyone in the {place2}, but nobody had seen it.",
        ),
        ("{Weather}, and {name} felt {sad}.", "Then {weather}. {name} was {sad}."),
        (
            'A {trait2} {friend} named {name2} came by and said, "I will help you look."',
            "{name2} the {friend} heard about it and offered to help.",
            '"Do not cry," said {name2}, a {trait2} {friend}. "Two can see more than one."',
        ),
        (
            "Together they found the {thing} under a pile of leaves.",
            "At last they found the {thing} at the bottom of an old well.",
            "They followed small footprints, and there was the {thing}, behind a big rock.",
        ),
    ),
    "quest": (
        (
            "{time}, {name} heard about a {look} {thing} hidden in the {place2}.",
            "{time}, an old woman told {name} of a {look} {thing} far away in the {place2}.",
            "{name} dreamed of a {look} {thing} that lay in the {place2}.",
        ),
        (
            "{He} packed some {food} and set out at once.",
            "{He} took a stick and some {food} and began to walk.",
            "With a bag full of {food}, {he} went on {his} way.",
        ),
        (
            "On the way {weather}, and soon {name} was {sad}.",
            "The road was long, then {weather}. {name} felt {sad}.",
        ),
        (
            "There {he} met {name2}, a {trait2} {friend}, who knew a secret path.",
            "A {friend} named {name2} shared a fire with {him} and showed {him} the way.",
            "In a small hut lived {name2}, a {trait2} {friend}, who gave {him} good advice.",
        ),
        (
            "The next day {name} found the {thing} and carried it home.",
            "And so {he} reached the {place2}, where the {thing} was waiting in the grass.",
            "At the end of the path lay the {thing}, just as {he} had hoped.",
        ),
    ),
    "learn": (
        (
            "{name} wanted to learn to {skill}, but {he} did not know how.",
            "More than anything, {name} wished to {skill}.",
            "All {his} friends could {skill}, only {name} could not.",
        ),
        (
            "{time}, {he} tried it in the {place2} and fell right into the mud.",
            "{time}, {he} tried for the first time, and everyone laughed.",
            "{He} tried ten times, and ten times it went wrong.",
        ),
        (
            '{name} was {sad}. "I will never learn it," {he} said.',
            "{He} sat down by the road and felt {sad}.",
        ),
        (
            'Then {name2}, a {trait2} {friend}, said, "I will teach you, step by step."',
            'But {name2} the {friend} smiled and said, "I also needed a long time."',
            "A {trait2} {friend} named {name2} sat down beside {him} and showed {him} a trick.",
        ),
        (
            "Every day they practiced together, and after a week {name} could {skill}.",
            "They practiced until the stars came out, and at last it worked.",
            "Slowly it went better, and one day {name} could {skill} better than anyone.",
        ),
    ),
    "gift": (
        (
            "{time}, {name} wanted to make a gift for {name2}, a {trait2} {friend}.",
            "It was the birthday of {name2}, the {trait2} {friend}, and {name} had no gift.",
        ),
        (
            "{He} wanted to give {him2} a {look} {thing}, but {he} had no money.",
            "{He} had seen a {look} {thing} at the market in the {place2}, but it cost too much.",
        ),
        (
            "So {he} worked all day and gathered {food} to sell.",
            "So {he} swept floors and carried water in the {place2} until {his} feet hurt.",
        ),
        (
            "On the way home {weather}, and {name} was {sad}.",
            "In the evening {weather}, but {name} did not stop.",
        ),
        (
            "When {name2} saw the {thing}, {he2} laughed and hugged {him}.",
            '{name2} opened the parcel and said, "This is the best gift of all."',
        ),
    ),
    "contest": (
        (
            "{time}, there was a great race from the {place} to the {place2}.",
            "{time}, the king called everyone to a race through the {place2}.",
        ),
        (
            "The prize was a {look} {thing}, and {name} wanted to win it.",
            "Whoever came first would get a {look} {thing}. {name} started to run.",
        ),
        (
            "Halfway there, {he} saw {name2}, a {trait2} {friend}, stuck in a hole.",
            "Near the bridge {weather}, and {name2} the {friend} could not go on.",
        ),
        (
            "{name} stopped and pulled {him2} out, though all the others ran past.",
            '"Climb on my back," said {name}, and {he} carried {him2}.',
        ),
        (
            "{name} came last, but {name2} shared {food} with {him}, and the king gave "
            "{him} the {thing}.",
            "They came in last, but everyone cheered, and the king gave the {thing} to {name}.",
        ),
    ),
    "home": (
        (
            "{time}, {name} went for a walk in the {place2} and lost {his} way.",
            "{time}, {name} followed a butterfly deep into the {place2}.",
        ),
        (
            "Soon {weather}, and {he} could not see the path any more.",
            "All paths looked the same, and then {weather}.",
        ),
        (
            "{name} was {sad} and hungry, for {he} had only a few {food} left.",
            "{He} ate the last {food} and felt {sad}.",
        ),
        (
            "Then {he} heard the voice of {name2}, a {trait2} {friend} with a {look} {thing}.",
            "Suddenly a light shone. It was {name2} the {friend} with a {look} {thing}.",
        ),
        (
            "With the {thing} they found the path and were home before midnight.",
            "{name2} led {him} home, and they drank hot tea by the fire.",
        ),
    ),
}
ENDINGS = (
    "{name} was {feel} and learned that {lesson}.",
    "From that day on, {name} and {name2} were the best of friends.",
    "That night {name} slept well. {He} knew now that {lesson}.",
    "They shared {food2} and were {feel}. And {name} never forgot that {lesson}.",
    "Everyone in the {place} was {feel}, and {name} knew that {lesson}.",
)
ASKS = (
    "Tell me a story about {a} {trait} {hero}.",
    "Write a short story about {a} {trait} {hero}.",
    "Can you tell me a story about {a} {hero}?",
    "Tell me a story about {a} {hero} named {name}.",
    "I would like a story about {a} {hero} and {a2} {thing}.",
    "Please write a story with {a} {trait} {hero} called {name} and {a2} {thing}.",
    "Tell a bedtime story about {a} {trait} {hero}.",
    "A story about {a} {hero}, please.",
    "Tell me a story.",
)
PLANS_TEXT = {
    "lost": "looks for a lost {thing}",
    "quest": "goes to find a {thing}",
    "learn": "learns to {skill}",
    "gift": "wants to give a {thing} to a friend",
    "contest": "runs a race for a {thing}",
    "home": "gets lost and finds the way home",
}


def _article(text: str) -> str:
    """a -> an before a vowel, also in the sentences of the grammar."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def story_chat(rng: random.Random) -> dict[str, Any]:
    """One chat with a request and a story of 5 to 8 sentences."""
    girl, girl2 = rng.random() < 0.5, rng.random() < 0.5
    name, name2 = rng.choice(GIRLS if girl else BOYS), rng.choice(GIRLS if girl2 else BOYS)
    while name2 == name:
        name2 = rng.choice(GIRLS if girl2 else BOYS)
    place, place2 = rng.sample(PLACES, 2)
    hero, friend = rng.sample(HEROES, 2)
    trait, trait2 = rng.sample(TRAITS, 2)
    food, food2 = rng.sample(FOODS, 2)
    weather = rng.choice(WEATHERS)
    words = {
        "name": name,
        "name2": name2,
        "place": place,
        "place2": place2,
        "hero": hero,
        "friend": friend,
        "trait": trait,
        "trait2": trait2,
        "food": food,
        "food2": food2,
        "thing": rng.choice(THINGS),
        "look": rng.choice(LOOKS),
        "skill": rng.choice(SKILLS),
        "time": rng.choice(TIMES),
        "weather": weather,
        "sad": rng.choice(SAD),
        "Weather": weather[0].upper() + weather[1:],
        "feel": rng.choice(FEELS),
        "lesson": rng.choice(LESSONS),
        "a": "a",
        "a2": "a",
        "He": "She" if girl else "He",
        "he": "she" if girl else "he",
        "his": "her" if girl else "his",
        "him": "her" if girl else "him",
        "he2": "she" if girl2 else "he",
        "him2": "her" if girl2 else "him",
    }
    plan = rng.choice(list(PLANS))
    lines = [rng.choice(OPENINGS), *(rng.choice(p) for p in PLANS[plan]), rng.choice(ENDINGS)]
    if rng.random() < 0.25:
        lines.append("The end.")
    asks = [a for a in ASKS if "{thing}" not in a or plan not in ("learn", "home")]
    ask = _article(rng.choice(asks).format_map(words))
    story = _article(" ".join(lines).format_map(words))
    thought = _article(
        f"The user wants a story. My hero is {name} the {hero}, who "
        + PLANS_TEXT[plan].format_map(words)
        + "."
    )
    return {
        "messages": [
            {"role": "user", "content": ask},
            {"role": "assistant", "reasoning_content": thought, "content": story},
        ],
        "thinks_when_adaptive": False,
    }
