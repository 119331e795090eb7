"""Answers RULER's questions from the prompt alone, as a person would; knows nothing of how they were made."""

import re
from collections import Counter


def oracle(prompt: str) -> str:
    """A right answer to any of the tasks."""
    if "special magic number" in prompt:
        asked = re.findall(r"[a-z]+(?:-[a-z]+)+", prompt.rpartition("Question:")[2].partition("that the text")[0])
        told = re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", prompt)
        return ", ".join(number for name, number in told if name in asked)
    if "VAR " in prompt:
        text = prompt.rpartition("Follow the assignments.")[2]
        (value,) = set(re.findall(r"have the value (\d+)", text))
        known = {value}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            if source in known:
                known.add(name)
        return " ".join(known)
    if "numbered list of words" in prompt:
        words = re.findall(r"\d+\. (\S+)", prompt.rpartition("numbered list of words")[2].partition("Question:")[0])
        return " ".join(word for word, _ in Counter(words).most_common(10))
    if "coded word" in prompt:
        words = Counter(re.findall(r"\b[a-z]{6}\b", prompt.partition("are none.")[2].partition("Question:")[0]))
        return " ".join(word for word, _ in words.most_common(3))
    documents, _, question = prompt.rpartition("Question:")
    name = re.search(r"[A-Z]\w+ [A-Z]\. [A-Z]\w+", question).group()
    (facts,) = re.findall(
        rf"{re.escape(name)} was born in (\w+) in (\d+), worked as a ([\w-]+), and later moved to (\w+)\.", documents
    )
    order = ["town was", "which year", "trade", "move later"]
    return next(fact for fact, words in zip(facts, order, strict=True) if words in question)
