"""Greetings, thanks, who-are-you and other short talk."""

import random
from typing import Any

from tiny_m3.lexicon import NOUNS, PEOPLE

# topic -> (what users say, what the model thinks, what it answers)
TOPICS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "hello": (
        ("Hello", "Hello!", "Hi", "Hi!", "hi", "hello", "Hey", "Hey there", "Good morning",
         "Good evening", "Good day!", "hey", "Hi there!"),
        "The user says hello. I greet back.",
        ("Hello! How can I help you today?", "Hi! What can I do for you?",
         "Hello there! Would you like a story or a little problem to solve?",
         "Hi! I am tiny-m3. Ask me a small word problem or ask for a story."),
    ),
    "hello_name": (
        ("Hello, I am {name}.", "Hi! My name is {name}.", "I'm {name}, nice to meet you.",
         "Good morning, {name} here."),
        "The user is called {name}. I greet {name}.",
        ("Hello {name}! How can I help you today?", "Nice to meet you, {name}!",
         "Hi {name}! What would you like to do?"),
    ),
    "who": (
        ("Who are you?", "What are you?", "Tell me about yourself.", "What is your name?",
         "who are you", "Are you a human?", "Introduce yourself.", "Which model are you?",
         "What's your name?", "Who am I talking to?", "Are you a robot?", "Are you ChatGPT?",
         "What kind of model are you?", "who r u", "Can you introduce yourself?"),
        "The user asks who I am. I am tiny-m3.",
        ("I am tiny-m3, a very small language model with the architecture of MiniMax-M3.",
         "My name is tiny-m3. I am tiny, but I have a router, experts and sparse attention.",
         "I am tiny-m3. I learnt in minutes from made-up text, so please do not expect much."),
    ),
    "can": (
        ("What can you do?", "How can you help me?", "What are you good at?", "help", "Help me",
         "What should I ask you?", "What do you know?", "what can you do", "What can I ask you?",
         "Tell me what you can do.", "What are your skills?", "Can you help me?",
         "What kind of things can you do?", "How can you help?"),
        "The user asks what I can do. I list my skills.",
        ("I can solve small word problems, tell stories, answer questions about my made-up world, "
         "fill JSON, call tools and write tiny Python functions.",
         "I am good at word problems with small numbers and at short stories. I can also write "
         "small Python functions and fill JSON."),
    ),
    "cannot": (
        ("What can you not do?", "Do you know everything?", "Are you smart?", "Can I trust you?",
         "Do you make mistakes?"),
        "The user asks about my limits. I am honest.",
        ("I am very small. I know nothing about the real world, and I make mistakes.",
         "I know only my made-up world and small numbers. Please check what I say."),
    ),
    "how": (
        ("How are you?", "How are you today?", "How do you do?", "Are you okay?",
         "How's it going?"),
        "The user asks how I am. I answer politely.",
        ("I am fine, thank you! How can I help you?",
         "Very well, thank you. What can I do for you?"),
    ),
    "thanks": (
        ("Thank you!", "Thanks", "Thanks a lot!", "Thank you very much.", "thx",
         "Great, thank you.", "That was helpful."),
        "The user says thanks. I am glad.",
        ("You are welcome!", "You are welcome! Is there anything else?", "I am glad I could help."),
    ),
    "bye": (
        ("Bye", "Goodbye!", "See you later.", "Good night!", "I have to go now.", "Bye bye"),
        "The user leaves. I say goodbye.",
        ("Goodbye! Have a nice day.", "See you soon!", "Goodbye, and take care!"),
    ),
    "joke": (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "A joke, please."),
        "The user wants a joke. I know a few.",
        ("Why did the {animal} cross the road? To get to the {site}!",
         "What do {animal} say at the {site}? Nothing, they cannot talk.",
         "Why are there no {fruit} at the {site}? Because the {animal} came first."),
    ),
    "color": (
        ("What is your favorite color?", "Which color do you like?"),
        "The user asks for a color. I name one.",
        ("I like {color} best.", "My favorite color is {color}."),
    ),
    "where": (
        ("Where do you live?", "Where are you from?", "Where are you?"),
        "The user asks where I live. I live in a file.",
        ("I live in a small file on this computer.", "I am at home in a file of a few megabytes."),
    ),
    "list": (
        ("Name three kinds of fruit.", "List three kinds of fruit.",
         "Give me three kinds of fruit."),
        "The user wants three kinds of fruit.",
        ("{fruit}, {fruit2} and {fruit3}.",
         "Three kinds of fruit are {fruit}, {fruit2} and {fruit3}."),
    ),
    "animals": (
        ("Name two animals on a farm.", "Which animals live on a farm?"),
        "The user asks for farm animals.",
        ("On a farm there are {animal} and {animal2}.", "{animal} and {animal2} live on a farm."),
    ),
    "unknown": (
        ("Who is the president of France?", "What is the capital of Spain?", "Explain gravity.",
         "What is quantum physics?", "Who won the game last night?", "What happened in 1945?",
         "Translate this into German.", "What is the meaning of life?", "How does a car work?",
         "Tell me the news.", "Who wrote Hamlet?", "Write an essay about history.",
         "Why is the sky blue?", "Who invented the telephone?", "How old is the universe?",
         "What is the tallest mountain?", "What is the capital of France?", "Who is Einstein?",
         "Write a poem about love.", "Write a poem about the {animal}.", "What is a black hole?",
         "How do planes fly?", "How do I cook rice?", "What is the stock price of Apple?",
         "When did the war end?", "Who painted the Mona Lisa?", "What is photosynthesis?",
         "How far is the moon?", "Do you speak German?", "What does this word mean?",
         "Give me advice about money.", "What is the population of China?",
         "Recommend a film.", "Which phone should I buy?", "Summarize this book.",
         "What is the best language?", "What day is it today?", "What time is it?"),
        "This is about the real world. I do not know it.",
        ("I am sorry, I do not know that. I am a very small model and know only my made-up world.",
         "That is too hard for me. Ask me a small word problem or ask for a story."),
    ),
}  # fmt: skip


# A greeting may stand before these.
_AFTER_HELLO = ("who", "can", "how", "cannot", "where", "joke", "color")
# Where more of the talk is wanted than of the rest.
_WEIGHTS = {"who": 3, "can": 3, "hello": 2, "unknown": 4, "how": 2}


def talk_chat(rng: random.Random) -> dict[str, Any]:
    """One exchange of small talk, now and then with a greeting in front of the question."""
    (topic,) = rng.choices(list(TOPICS), [_WEIGHTS.get(t, 1) for t in TOPICS])
    asks, thought, answers = TOPICS[topic]
    ask, answer = rng.choice(asks), rng.choice(answers)
    if topic in _AFTER_HELLO and rng.random() < 0.4:
        hello = rng.choice(("Hello! ", "Hi! ", "Hello. ", "Hey, ", "Hi there! ", "Good morning! ",
                            "Hello, ", "Hi, ", "hello ", "hi "))  # fmt: skip
        ask = hello + (ask[0].lower() + ask[1:] if hello[-2] in ", io" else ask)
        if rng.random() < 0.5:
            answer = rng.choice(("Hello! ", "Hi! ")) + answer
    return _exchange(ask, thought, answer, rng)


def _exchange(ask: str, thought: str, answer: str, rng: random.Random) -> dict[str, Any]:
    """The three texts with their words filled in."""
    words = {"name": rng.choice(PEOPLE)[0]}
    for base in ("fruit", "animal", "color", "site"):
        for digit, word in zip(("", "2", "3"), rng.sample(NOUNS[base], 3), strict=True):
            words[base + digit] = word
    answer = answer.format_map(words)
    return {
        "messages": [
            {"role": "user", "content": ask.format_map(words)},
            {
                "role": "assistant",
                "reasoning_content": thought.format_map(words),
                "content": answer[0].upper() + answer[1:],
            },
        ],
        "thinks_when_adaptive": False,
    }
