"""Training prompts that need no download: Python functions and docstrings of this machine, and templates over word lists.

The larger part of the prompts is written by the model itself (``draft_data.invent_prompts``); these add what it seldom asks
for: texts to copy, to correct and to summarise, code to explain and to go on with, sums.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from draft_prompts import is_held_out

# ----------------------------------------------------------------------------------------------------------------------
# Word lists

TOPICS = (
    "volcanoes", "the moon", "bees", "bread", "democracy", "the human heart", "electric cars", "the Silk Road", "jazz",
    "photosynthesis", "black holes", "chess", "coffee", "earthquakes", "gravity", "the Amazon river", "penguins", "memory",
    "the printing press", "solar panels", "the immune system", "rainbows", "whales", "the French Revolution", "vaccines",
    "batteries", "clouds", "dinosaurs", "the internet", "sleep", "antibiotics", "steam engines", "coral reefs", "money",
    "the Great Wall of China", "DNA", "the water cycle", "lightning", "the Renaissance", "magnets", "yeast", "glaciers",
    "the stock market", "hurricanes", "the brain", "recycling", "nuclear power", "wolves", "opera", "the Vikings", "sugar",
    "artificial intelligence", "the ozone layer", "deserts", "trade unions", "comets", "the periodic table", "cheese",
    "Impressionism", "the metric system", "time zones", "plate tectonics", "muscles", "ants", "the steam turbine",
)  # fmt: skip
PEOPLE = (
    "Ada", "Ben", "Carla", "Dmitri", "Ella", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo", "Maya", "Nils", "Olga",
    "Priya", "Quinn", "Rosa", "Sam", "Tara", "Umar", "Vera", "Will", "Yuki", "Zoe",
)  # fmt: skip
THINGS = (
    "apples", "books", "coins", "pencils", "stamps", "eggs", "tickets", "cards", "shells", "bottles", "flowers", "stickers",
    "cookies", "bricks", "balloons", "buttons",
)  # fmt: skip
SITUATIONS = (
    "a lost suitcase", "a noisy neighbour", "a late delivery", "a broken laptop", "a school trip", "a birthday party",
    "a garden in spring", "a storm at sea", "an old clock", "a new job", "a long walk", "a forgotten key", "a small robot",
    "a city at night", "a talking cat", "a cold winter", "a market day", "a train journey", "a lost letter", "a mountain hut",
)  # fmt: skip
TASKS = (
    "reverses a string", "counts the vowels of a text", "checks whether a number is prime", "sorts a list of dictionaries",
    "merges two sorted lists", "removes duplicates from a list", "computes the factorial of a number", "finds the longest word",
    "checks for a palindrome", "converts Celsius to Fahrenheit", "flattens a nested list", "counts word frequencies",
    "computes the mean and the median", "parses a date", "validates an e-mail address", "implements a stack",
    "implements a queue", "finds the greatest common divisor", "generates a random password", "reads a JSON file",
    "draws a histogram", "computes Fibonacci numbers", "searches a binary tree", "implements bubble sort", "writes a log file",
    "downloads a web page", "splits a list into chunks", "rotates a matrix", "finds anagrams", "converts binary to decimal",
)  # fmt: skip
LANGUAGES = ("Python", "Python", "Python", "JavaScript", "Java", "C", "C++", "Go", "Rust", "SQL", "bash", "TypeScript")

_OPEN = (
    "Explain {topic} to a child.", "What are the most important facts about {topic}?", "Write a short essay about {topic}.",
    "How do people study {topic}?", "Why does {topic} matter?", "Write a quiz with five questions about {topic}.",
    "Give me three surprising facts about {topic}.", "Tell me about the history of {topic}.", "What is known about {topic}?",
    "Write a short story about {situation}.", "Write a poem about {situation}.", "Write an e-mail about {situation}.",
    "Write a dialogue between two friends about {situation}.", "Give me advice on {situation}.",
    "Write a {language} function that {task}.", "Show me a {language} program that {task}, and explain it step by step.",
    "What is the best way to write code that {task} in {language}?", "Compare {topic} and {topic2}.",
    "Make a list of ten words about {topic} and define each of them.", "Plan a lesson about {topic}.",
)  # fmt: skip
_SUMS = (
    "{person} has {a} {thing} and buys {b} more. Then {person} gives away {c}. How many {thing} are left?",
    "What is {a} times {c}? Show your steps.", "What is {a} plus {b} minus {c}?",
    "{person} reads {c} pages a day. How many days does a book of {b} pages take?",
    "{thing} cost {c} dollars each. How much do {a} {thing} cost?", "Solve for x: {c}x + {a} = {b}.",
    "A rectangle is {a} cm long and {c} cm wide. What are its area and its perimeter?",
    "{person} drives {b} km in {c} hours. What is the average speed?", "What is {c} percent of {b}?",
    "{person} and {person2} share {b} {thing} equally. How many does each of them get?",
)  # fmt: skip
_ABOUT_TEXT = (
    "Summarise this text in one sentence:\n\n{text}", "Repeat this text word for word:\n\n{text}",
    "Rewrite this text in simple English:\n\n{text}", "Correct the spelling of this text:\n\n{typos}",
    "Turn this text into a list:\n\n{text}", "What is this text about?\n\n{text}",
    "Copy this text, but write every name in capital letters:\n\n{text}", "Make this text more formal:\n\n{text}",
    "Continue this text:\n\n{half}", "Make this text shorter:\n\n{text}", "Quote the first sentence of this text:\n\n{text}",
    "Fix the mistakes and print the whole text:\n\n{typos}", "Give this text a title and explain your choice.\n\n{text}",
)  # fmt: skip
_ABOUT_CODE = (
    "Explain what this Python function does:\n\n```python\n{code}\n```", "Continue this Python code:\n\n```python\n{half}\n```",
    "Write a docstring for this function:\n\n```python\n{code}\n```", "Copy this function, but rename it to {name}:\n\n{code}",
    "Find a bug in this code, if there is one:\n\n```python\n{code}\n```", "Write a test for this function:\n\n{code}",
    "Repeat this code exactly:\n\n```python\n{code}\n```", "Add comments to this code:\n\n```python\n{code}\n```",
    "Rewrite this function with type hints:\n\n```python\n{code}\n```",
)  # fmt: skip


def template_prompts(rng: random.Random) -> Iterator[str]:
    """Endless questions, tasks and sums from the word lists."""
    while True:
        if rng.random() < 0.3:
            form = rng.choice(_SUMS)
            words = {"a": rng.randint(12, 99), "b": rng.randint(100, 999), "c": rng.randint(2, 11), "thing": rng.choice(THINGS)}
            words["person"], words["person2"] = rng.sample(PEOPLE, 2)
        else:
            form = rng.choice(_OPEN)
            words = {"situation": rng.choice(SITUATIONS), "task": rng.choice(TASKS), "language": rng.choice(LANGUAGES)}
            words["topic"], words["topic2"] = rng.sample(TOPICS, 2)
        yield form.format(**words)


def text_prompts(texts: list[str], rng: random.Random) -> Iterator[str]:
    """Endless tasks with a text in them; ``texts`` may be answers of the model or docstrings."""
    while texts:
        text = rng.choice(texts)
        form = rng.choice(_ABOUT_TEXT)
        yield form.format(text=text, half=text[: len(text) // 2], typos=misspell(text, rng))


def code_prompts(functions: list[str], rng: random.Random) -> Iterator[str]:
    """Endless tasks with a Python function in them."""
    while functions:
        code = rng.choice(functions)
        lines = code.splitlines()
        form = rng.choice(_ABOUT_CODE)
        yield form.format(code=code, half="\n".join(lines[: max(1, len(lines) // 2)]), name=f"my_{rng.choice(THINGS)}")


def misspell(text: str, rng: random.Random) -> str:
    """``text`` with two neighbouring letters swapped in about every tenth word."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 4 and word.isalpha() and rng.random() < 0.1:
            at = rng.randrange(1, len(word) - 2)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def python_sources(rng: random.Random, files: int) -> tuple[list[str], list[str]]:
    """(functions, docstring paragraphs) of ``files`` random Python files of the standard library and site-packages."""
    roots = {Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib")}
    paths = sorted({p for root in roots for p in root.glob("*/*.py")} | {p for root in roots for p in root.glob("*.py")})
    functions, paragraphs = [], []
    for path in rng.sample(paths, min(files, len(paths))):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            length = node.end_lineno - node.lineno + 1
            if isinstance(node, ast.FunctionDef) and 4 <= length <= 18:
                functions.append(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                words = paragraph.split()
                if 20 <= len(words) <= 90 and paragraph[0].isupper():
                    paragraphs.append(" ".join(words))
    return functions, paragraphs


def first(prompts: Iterator[str], count: int) -> list[str]:
    """The next ``count`` different prompts that are not held out; fewer if the source keeps repeating itself."""
    found: dict[str, None] = {}
    for tries, prompt in enumerate(prompts):
        if len(found) >= count or tries > 4 * count + 100:
            break
        if not is_held_out(prompt):
            found[prompt] = None
    return list(found)
