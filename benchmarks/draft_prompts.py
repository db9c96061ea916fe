"""Held-out prompts: what a draft head's accept length is measured on, five sets of eight, and what keeps them held out.

All are written for this file; no training prompt may share a run of eight words with one of them, or contain one that is
shorter (``is_held_out``).
"""

from __future__ import annotations

import re

RUN = 8  # words

_LETTER = (
    "Dear Ms Halvorsen, thank you for your letter of 3 June. The boiler in flat 12 was looked at on Monday, and the fitter "
    "found that a valve is worn out. The new valve will be here in nine days. Until then the hot water may fail in the "
    "mornings. We are sorry for the trouble and will take 40 pounds off the rent for June."
)
_REPORT = (
    "The lake was sampled at six points in March. Oxygen was normal at five of them. At the north inlet it was low, and the "
    "water smelled of sulphur. A farm two kilometres upstream had spread manure on frozen ground in February. The council has "
    "asked the farm to stop doing so and will sample again in May."
)
_RECIPE = (
    "Peel two onions and cut them fine. Fry them in butter until they are golden. Add one litre of stock and three "
    "potatoes, and let it boil for twenty minutes. Stir in a cup of cream. Serve with rye bread."
)

HELD_OUT: dict[str, tuple[str, ...]] = {
    "chat": (
        "I moved to a new town last month and know nobody here. How can I make friends?",
        "My sister turns thirty on Saturday. Help me write a short and funny toast.",
        "I keep waking up at four in the morning. What could I try?",
        "Which would you take on a long train ride, a thick novel or a pack of cards, and why?",
        "My landlord wants to raise my rent. Write a polite message that asks him to wait until spring.",
        "Give me five ideas for a rainy Sunday with two small children.",
        "I have a job interview tomorrow and feel nervous. What should I do tonight?",
        "Write a short poem about a bicycle that was left out in the snow.",
    ),
    "code": (
        "Write a Python function that returns the second largest number of a list.",
        "Write a Python class for a bank account with deposit, withdraw and balance.",
        "How do I read a CSV file in Python and print the sum of one column?",
        "Write a SQL query that finds the three customers with the most orders.",
        "Write a JavaScript function that turns a sentence into title case.",
        "Explain what this code does:\n\nfor i in range(1, 16):\n    print('Fizz' * (i % 3 == 0) + 'Buzz' * (i % 5 == 0) or i)",
        "Write a bash script that deletes all files older than thirty days in a folder.",
        "Show me how to test a Python function with pytest, with a small example.",
    ),
    "maths": (
        "A train leaves at 14:20 and arrives at 17:05. How long is the ride in minutes? Show your steps.",
        "Tom has 48 marbles. He gives a quarter to Ann and 9 to Bo. How many are left?",
        "Solve for x: 5x - 7 = 3x + 11. Explain each step.",
        "What is the area of a circle with a radius of 6 cm? Show the calculation.",
        "A shirt costs 40 dollars and is 15 percent off. What is the new price?",
        "List the prime numbers between 40 and 70 and say how you found them.",
        "Explain what the derivative of x squared is, and why.",
        "A box holds 3 red and 5 blue balls. What is the chance of drawing a red one?",
    ),
    "edit": (
        f"Summarise this letter in two sentences:\n\n{_LETTER}",
        f"Rewrite this report for children:\n\n{_REPORT}",
        f"Turn this recipe into a numbered list:\n\n{_RECIPE}",
        f"Copy this text, but change June to July everywhere:\n\n{_LETTER}",
        f"What does this text say about the farm? Quote the sentences.\n\n{_REPORT}",
        f"Correct the spelling: \n\nThe wether was vary cold yestarday and the rode was full of ise. {_RECIPE[:44]}",
        f"Write this recipe again for twice as many people:\n\n{_RECIPE}",
        "Make this sentence more formal: we can't come on Friday because the kids are sick, so let's do it next week.",
    ),
    "knowledge": (
        "What causes the tides of the sea?",
        "Who was Marie Curie and what did she discover?",
        "How does a refrigerator keep food cold?",
        "What is the difference between a virus and a bacterium?",
        "Name the planets of the solar system in order and say one thing about each.",
        "Why did the Roman Empire fall? Give the main reasons.",
        "How is glass made?",
        "What is inflation, and how do central banks fight it?",
    ),
}


def word_runs(text: str, length: int = RUN) -> set[tuple[str, ...]]:
    """Every run of ``length`` words of ``text``, in lower case and without punctuation."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def _held_out_runs() -> dict[int, set[tuple[str, ...]]]:
    """By length: runs of eight words of every held-out prompt, the shorter prompts as they are."""
    runs: dict[int, set[tuple[str, ...]]] = {}
    for text in (prompt for prompts in HELD_OUT.values() for prompt in prompts):
        length = min(RUN, len(re.findall(r"[a-z0-9']+", text.lower())))
        runs.setdefault(length, set()).update(word_runs(text, length))
    return runs


_HELD_OUT_RUNS = _held_out_runs()


def is_held_out(text: str) -> bool:
    """Whether ``text`` shares a run of eight words with a held-out prompt, or contains a shorter one."""
    return any(not runs.isdisjoint(word_runs(text, length)) for length, runs in _HELD_OUT_RUNS.items())
