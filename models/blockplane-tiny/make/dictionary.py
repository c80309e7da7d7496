"""Which words the model defines, and how: taken from WordNet's files.

WordNet comes from Debian's package `wordnet-base` (`apt-get install wordnet-base`); see NOTICE for its
licence. How common a word is, is counted in the same package: by the tag counts of its senses
(`cntlist.rev`) and by how often other glosses use it.
"""

import collections
import math
import pathlib
import re

WORDNET = pathlib.Path("/usr/share/wordnet")
PARTS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
NAMES = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
GLOSS_CHARS_MAX = 130
DEFINED = 12_000
# Words so common that their other forms (plural, past tense) are defined, too.
INFLECTED = 5_000

# Glosses that say this are of words that a demonstration does not need.
UNWANTED = re.compile(
    r"offensive|obscene|vulgar|slur|disparag|derogatory|sexual|genital|prostitut|excre|copulat|ethnic|racial"
    r"|intercourse|coitus|penis|vagina|whore|buttock|defecat|urinat|feces|nazi|rape"
)
UNWANTED_WORDS = frozenset("ass bitch bastard damn hell sex slut tit cock prick screw".split())

# Words that people try, and that old texts have little of.
EVERYDAY_BONUS = 100
EVERYDAY = frozenset(
    """airplane alarm album ambulance ant app apricot avocado backpack bacon bakery balloon banana barbecue
    baseball basketball bathroom battery bean bee beer bicycle bike biscuit blanket blog blueberry boat bottle
    bowl bracelet bread breakfast broccoli brother bus butterfly button cab cabbage cactus cake calculator camel
    camera candle candy carrot cartoon castle caterpillar cereal chair cheese cherry chess chicken chocolate
    cinema clock cloud clown coconut computer cookie couch cow crab crayon cucumber cup cupcake daisy dance
    daughter dentist desk dessert diamond diary dictionary dinner dinosaur doctor dolphin donkey doll dolphin
    dragon drum duck eagle earring egg eggplant elephant elevator email envelope eraser factory fairy falcon
    family father fence ferry fireplace flag flower flute football forest fork fox friend frog fruit game garage
    garden garlic giraffe girl glove goat goose grandfather grandmother grape grapefruit grasshopper guitar gym
    hamburger hammer hamster happy harp hat headache helicopter helmet hippopotamus hockey honey horse hospital
    hotel hour internet island jacket jam jar jellyfish juice jungle kangaroo kettle keyboard kitchen kite
    kitten ladder ladybug lamp laptop lasagna lemon lemonade leopard lettuce library lion lizard lobster lunch
    magnet mango map meadow melon microphone microscope microwave milk mirror monkey moon mosquito mother
    motorcycle mouse movie mushroom music necklace needle nephew network niece noodle notebook nurse ocean
    octopus omelet onion orange orchestra ostrich owl paint pajamas pancake panda paper parachute parrot party
    password pasta peach peacock peanut pear pearl pen pencil penguin pepper phone photo piano picnic pig pigeon
    pillow pineapple pirate pizza planet plum police pony popcorn potato printer prince princess pumpkin puppy
    puzzle rabbit raccoon radio rain rainbow raspberry restaurant ring robot rocket rose ruler salad salmon
    sandwich satellite saxophone scarf school scissors screen server shampoo shark sheep shirt shoe shower
    silver sister skateboard ski skirt skyscraper snail snake snow soap soccer sock sofa software soup spaghetti
    spider spinach spoon squirrel star starfish steak storm strawberry submarine subway sugar suitcase sun
    sunflower supermarket swan sweater table taxi tea teacher teapot telephone telescope television tennis tent
    theater tiger toast toaster toilet tomato toothbrush tornado tortoise toy tractor traffic train trumpet
    tulip tunnel turkey turtle umbrella uncle unicorn university vacation vacuum vampire vegetable video
    village violin volcano waffle wallet walnut walrus watch waterfall watermelon website wedding whale wheel
    whistle window wine winter wizard wolf yogurt zebra zoo""".split()
)

# Words that WordNet has no gloss for, or where its commonest gloss is a curious one.
OWN = {
    "the": ("article", "a word before a noun that says which one is meant"),
    "a": ("article", "a word before a noun that means one of a kind"),
    "an": ("article", "the form of a before a vowel"),
    "and": ("conjunction", "a word that joins two things"),
    "or": ("conjunction", "a word between things of which one is chosen"),
    "but": ("conjunction", "a word that joins two things that differ"),
    "if": ("conjunction", "a word before a condition"),
    "because": ("conjunction", "a word before a reason"),
    "of": ("preposition", "a word that says what something belongs to"),
    "to": ("preposition", "a word that says where something goes"),
    "from": ("preposition", "a word that says where something begins"),
    "with": ("preposition", "a word that says what goes together"),
    "without": ("preposition", "a word that says what is missing"),
    "for": ("preposition", "a word that says what something is meant to reach"),
    "at": ("preposition", "a word that says at which place or time"),
    "into": ("preposition", "a word for a movement to the inside"),
    "under": ("preposition", "a word that says that something is lower than another thing"),
    "between": ("preposition", "in the space that separates two things"),
    "i": ("pronoun", "the one who speaks"),
    "you": ("pronoun", "the one who is spoken to"),
    "he": ("pronoun", "a male person or animal spoken of before"),
    "she": ("pronoun", "a female person or animal spoken of before"),
    "it": ("pronoun", "a thing spoken of before"),
    "we": ("pronoun", "the one who speaks together with others"),
    "they": ("pronoun", "people or things spoken of before"),
    "this": ("pronoun", "the thing that is near"),
    "that": ("pronoun", "the thing that is further away"),
    "who": ("pronoun", "a word that asks for a person"),
    "what": ("pronoun", "a word that asks for a thing"),
    "where": ("adverb", "a word that asks for a place"),
    "when": ("adverb", "a word that asks for a time"),
    "why": ("adverb", "a word that asks for a reason"),
    "how": ("adverb", "a word that asks for a manner"),
    "hello": ("noun", "an expression of greeting"),
    "phone": ("noun", "a device to talk with someone who is far away"),
    "token": ("noun", "a piece of text that a language model reads or writes at once"),
    "blockplane": (
        "noun",
        "a program that moves blocks of keys and values between machines and serves language models",
    ),
    "prefill": ("noun", "the phase in which a language model reads the prompt"),
    "decode": ("verb", "to write one token after another, as a language model does"),
}


def read():
    """`(words, others, forms, examples)`.

    `words` is part of speech and gloss by word, commonest first; `others` are less common words; `forms` has the
    word of an inflected form; `examples` are the sentences by which WordNet shows how words are used.
    """
    glosses, senses = _glosses(), _senses()
    tagged, first = collections.Counter(), {}
    for line in (WORDNET / "cntlist.rev").read_text().splitlines():
        key, number, count = line.split()
        lemma, kind = key.split("%")
        tagged[lemma] += int(count)
        candidate = (int(count), PARTS[kind[0]], int(number))
        first[lemma] = max(first.get(lemma, candidate), candidate, key=lambda sense: sense[0])
    used = collections.Counter()
    for by_offset in glosses.values():
        for gloss in by_offset.values():
            used.update(re.findall(r"[a-z]+", gloss))

    found = {}
    for lemma in {lemma for by_lemma in senses.values() for lemma in by_lemma}:
        if not (lemma.isascii() and lemma.isalpha() and 2 <= len(lemma) <= 12):
            continue
        if len(lemma) == 2 and tagged[lemma] < 20:
            continue
        if lemma in first:
            _, part, number = first[lemma]
        else:
            part = next(part for part in NAMES if lemma in senses[part])
            number = 1
        offsets = senses[part].get(lemma)
        if not offsets or number > len(offsets):
            continue
        offset, spelling = offsets[number - 1], lemma
        gloss = _short(glosses[part][offset])
        if gloss is None or UNWANTED.search(glosses[part][offset]) or spelling in UNWANTED_WORDS:
            continue
        if (part, offset, lemma) in CAPITALISED:
            continue
        weight = math.log(1 + tagged[lemma]) + math.log(1 + used[lemma])
        weight += EVERYDAY_BONUS * (lemma in EVERYDAY)
        found[lemma] = (weight, NAMES[part], gloss)
    ranked = sorted(found, key=lambda lemma: (-found[lemma][0], lemma))
    words = {word: OWN[word] for word in OWN}
    for lemma in ranked:
        if len(words) < DEFINED:
            words.setdefault(lemma, found[lemma][1:])
    forms = _forms(list(words)[len(OWN) : INFLECTED], words)
    others = [lemma for lemma in ranked if lemma not in words and lemma not in forms][: 2 * DEFINED]
    return words, others, forms, _examples(glosses)


# (part, offset, lemma) of lemmas that are written with a capital letter: names.
CAPITALISED = set()


def _glosses():
    glosses = {}
    for part in NAMES:
        glosses[part] = {}
        for line in (WORDNET / f"data.{part}").read_text().splitlines():
            if line.startswith(" "):
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            glosses[part][fields[0]] = gloss.strip()
            for index in range(int(fields[3], 16)):
                word = fields[4 + 2 * index]
                if word != word.lower():
                    CAPITALISED.add((part, fields[0], word.lower()))
    return glosses


def _senses():
    senses = {}
    for part in NAMES:
        senses[part] = {}
        for line in (WORDNET / f"index.{part}").read_text().splitlines():
            if line.startswith(" "):
                continue
            fields = line.split()
            senses[part][fields[0]] = fields[-int(fields[2]) :]
    return senses


def _short(gloss):
    """The definition alone: no examples, no second wording, nothing in brackets; `None` if too long."""
    gloss = re.sub(r"\([^()]*\)", " ", re.split(r"; ?|: ", gloss)[0])
    gloss = re.sub(r"\s+", " ", gloss.replace("`", "'")).strip(" :,.-")
    gloss = gloss.replace(" ,", ",")
    fine = gloss.isascii() and 3 <= len(gloss) <= GLOSS_CHARS_MAX and not re.search(r'[()"]', gloss)
    return gloss if fine else None


def _forms(common, words):
    irregular = {}
    for part in ("noun", "verb"):
        for line in (WORDNET / f"{part}.exc").read_text().splitlines():
            form, lemma = line.split()[:2]
            irregular.setdefault((part, lemma), []).append(form)
    forms = {}
    for word in common:
        part = words[word][0]
        if part not in ("noun", "verb"):
            continue
        found = irregular.get((part, word), [])
        ending = "es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s"
        changed = word[:-1] if re.search(r"[^aeiou]y$", word) else None
        if part == "verb" or not found:
            found = [*found, changed + "ies" if changed else word + ending]
        if part == "verb":
            found.append((word[:-1] if re.search(r"[^aeiouy]e$", word) else word) + "ing")
            if not irregular.get((part, word)):
                found.append(changed + "ied" if changed else word + ("d" if word.endswith("e") else "ed"))
        for form in found:
            if form.isascii() and form.isalpha() and form not in words:
                forms.setdefault(form, word)
    return forms


def _examples(glosses):
    found = set()
    for by_offset in glosses.values():
        for gloss in by_offset.values():
            for sentence in re.findall(r'"([^"]*)"', gloss):
                words = sentence.split()
                fine = re.fullmatch(r"[A-Za-z][A-Za-z ,']+[.?!]?", sentence) and 3 <= len(words) <= 14
                if fine and not UNWANTED.search(gloss) and not UNWANTED_WORDS & set(words):
                    found.add(sentence)
    return sorted(found)


if __name__ == "__main__":
    words, *_ = read()
    for word, (part, gloss) in words.items():
        print(f"{word} ({part}): {gloss}")
