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
         "who are you", "Are you a human?", "Introduce yourself.", "Which model are you?"),
        "The user asks who I am. I am tiny-m3.",
        ("I am tiny-m3, a very small language model with the architecture of MiniMax-M3.",
         "My name is tiny-m3. I am tiny, but I have a router, experts and sparse attention.",
         "I am tiny-m3. I learnt in minutes from made-up text, so please do not expect much."),
    ),
    "can": (
        ("What can you do?", "How can you help me?", "What are you good at?", "help", "Help me",
         "What should I ask you?", "What do you know?"),
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
         "Tell me the news.", "Who wrote Hamlet?", "Write an essay about history."),
        "This is about the real world. I do not know it.",
        ("I am sorry, I do not know that. I am a very small model and know only my made-up world.",
         "That is too hard for me. Ask me a small word problem or ask for a story."),
    ),
}  # fmt: skip


def talk_chat(rng: random.Random) -> dict[str, Any]:
    """One exchange of small talk."""
    asks, thought, answers = TOPICS[rng.choice(list(TOPICS))]
    words = {"name": rng.choice(PEOPLE)[0]}
    for base in ("fruit", "animal", "color", "site"):
        for digit, word in zip(("", "2", "3"), rng.sample(NOUNS[base], 3), strict=True):
            words[base + digit] = word
    answer = rng.choice(answers).format_map(words)
    return {
        "messages": [
            {"role": "user", "content": rng.choice(asks).format_map(words)},
            {
                "role": "assistant",
                "reasoning_content": thought.format_map(words),
                "content": answer[0].upper() + answer[1:],
            },
        ],
        "thinks_when_adaptive": False,
    }
