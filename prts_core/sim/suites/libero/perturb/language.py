"""LIBERO-Plus, language instructions (and LIBERO-Pro's semantic axis): a task said in other words. No simulator.

Definition: LIBERO-Plus's kinds (distraction, commonsense replacement, added reasoning). Ours: the words. Its rewrites
come from a language model and ship as files; here they are made from the tables below, and level L adds to level L - 1.
LIBERO-Plus's own reading of an instruction from a file name appends the numbers of other axes to it; ours never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prts_core.sim.suites.libero.perturb.draws import draw, levelled

KINDS = ("distraction", "commonsense", "reasoning")
# Level 1 and up: how one is asked.
ASKING = (
    "please {}",
    "could you {}",
    "would you mind helping me: {}",
    "i would like you to {}",
    "go ahead and {}",
    "your task is to {}",
)
# Level 2 and up: verbs and joints of the sentence.
VERBS = (
    ("pick up", ("grab", "take", "lift")),
    ("place it", ("put it", "set it down", "lay it")),
    ("put", ("place", "set", "lay")),
    ("turn on", ("switch on", "start", "light")),
    ("open", ("pull open", "slide open")),
    ("push", ("slide", "move")),
    ("close", ("shut",)),
)
# Levels 3, 4, 5 of a kind: one more of these each.
DISTRACTION = (
    "ignore everything else you see",
    "the weather is lovely today and lunch can wait",
    "by the way, my neighbour also has a robot, but hers only sings",
)
COMMONSENSE = (
    ("basket", "container that one carries shopping in"),
    ("plate", "flat dish one eats from"),
    ("bowl", "round dish for soup"),
    ("milk", "white drink from a cow"),
    ("ketchup", "red sauce for fries"),
    ("butter", "spread that one puts on bread"),
    ("orange juice", "drink made of pressed oranges"),
    ("alphabet soup", "can of soup with letters in it"),
    ("tomato sauce", "can of red sauce for pasta"),
    ("bbq sauce", "sauce for grilled meat"),
    ("salad dressing", "bottle one pours over lettuce"),
    ("chocolate pudding", "box of brown dessert"),
    ("cream cheese", "soft white spread"),
    ("wine bottle", "bottle that needs a corkscrew"),
    ("drawer", "compartment that slides out"),
    ("stove", "thing one cooks on"),
    ("microwave", "oven that heats with waves"),
    ("mug", "cup for hot drinks"),
    ("moka pot", "pot that brews coffee"),
    ("caddy", "desk organiser"),
    ("book", "thing one reads"),
    ("cabinet", "piece of furniture with drawers"),
)
REASONING = (
    "look at the scene first and make sure you choose the right thing",
    "if something is in the way, leave it where it is",
    "when you are done, nothing else should have moved",
)


def rewritten(instruction: str, settings: Mapping[str, Any], task: str) -> str:
    """The instruction in other words, of {level, kind, seed}. ConfigError for other settings."""
    kind, level, seed = levelled("language", settings, KINDS)
    rng = draw("language", kind, level, seed, task)
    said = instruction.strip().lower()
    if level >= 2:
        for verb, others in VERBS:
            if f" {verb} " in f" {said} ":
                said = f" {said} ".replace(f" {verb} ", f" {others[int(rng.integers(len(others)))]} ", 1).strip()
    extra = max(level - 2, 0)
    if kind == "commonsense":
        known = [(name, told) for name, told in COMMONSENSE if name in said]
        for name, told in known[:extra]:
            said = said.replace(name, told)
    asked = ASKING[int(rng.integers(len(ASKING)))].format(said)
    more = {"distraction": DISTRACTION, "reasoning": REASONING}.get(kind, ())[:extra]
    return ". ".join((asked, *more))
