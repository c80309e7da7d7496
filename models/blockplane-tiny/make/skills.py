"""Conversations that teach one skill each, drawn without end from a seed.

Nothing that the test split asks is in the training split: greetings, questions and numbers are divided by a
checksum of what is asked, and lists of words to repeat or reverse are drawn from different words.
"""

import random
import re
import zlib

import phrases as P

HELD_PERCENT = 12
WORDS_MAX = 8


def held(key, percent=HELD_PERCENT):
    """Whether `key` belongs to the test split; equal for ever and on every machine."""
    return zlib.crc32(key.encode()) % 100 < percent


def plain(text):
    """What is left of a text when case and punctuation do not count."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


class Skills:
    """Draws conversations: lists of `(role, text)` that end with the assistant's answer.

    `dictionary` is what `dictionary.read` found, `split` is "train" or "test".
    """

    def __init__(self, dictionary, split, seed):
        self.random = random.Random(seed)
        self.test = split == "test"
        words, others, self.forms, self.examples = dictionary
        self.words = words
        self.defined, self.inflected = list(words), list(self.forms)
        lists = [
            P.HELLO,
            P.DAYTIMES,
            P.HOW,
            P.WHO,
            P.CAN,
            P.THANKS,
            P.BYE,
            P.QUESTIONS,
            *P.SMALL_TALK.values(),
        ]
        # Alone, these words are not questions about their meaning.
        self.said_alone = {plain(text) for phrases in lists for text in phrases}
        self.glosses = [gloss for _, gloss in words.values()]
        every = self.defined + others
        self.listed = [word for word in every if held(word) == self.test and len(word) > 1]
        self.common = [word for word in self.defined[:3000] if held(word) == self.test and len(word) > 1]
        by_part = lambda part: [word for word in self.defined[:4000] if words[word][0] == part]
        self.nouns, self.verbs = by_part("noun"), by_part("verb")
        self.adjectives, self.adverbs = by_part("adjective"), by_part("adverb")
        self.tellers = (
            [self.told_secret] * 8
            + [self.told_mine, self.told_label] * 2
            + [self.told_name, self.told_number, self.told_of_person, self.told_home, self.told_place]
        )
        self.unknown_words = [word for word in others if held(word) == self.test]

    # Words.

    def made_up(self):
        """A word that nobody knows."""
        draw = self.random
        consonants = [
            "b",
            "c",
            "d",
            "f",
            "g",
            "h",
            "j",
            "k",
            "l",
            "m",
            "n",
            "p",
            "r",
            "s",
            "t",
            "v",
            "w",
            "z",
            "br",
            "ch",
            "cl",
            "dr",
            "fl",
            "gl",
            "pl",
            "sh",
            "st",
            "tr",
        ]
        while True:
            syllables = draw.choice([1, 2, 2, 3])
            word = "".join(draw.choice(consonants) + draw.choice("aeiou") for _ in range(syllables))
            word += draw.choice(["", "n", "r", "t", "x", "sh", "m", "ck", "l"])
            if held(word) == self.test and word not in self.words:
                return word

    def letters(self):
        return "".join(
            self.random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(self.random.randint(2, 7))
        )

    def listed_word(self):
        draw = self.random
        chance = draw.random()
        if chance < 0.45:
            return draw.choice(self.common)
        if chance < 0.8:
            return draw.choice(self.listed)
        if chance < 0.88:
            return self.made_up()
        if chance < 0.92:
            return self.letters()
        if chance < 0.96:
            return draw.choice(P.NAMES)
        return draw.choice(self.listed).capitalize()

    def digits(self, shortest=3, longest=6):
        return "".join(
            self.random.choice("0123456789") for _ in range(self.random.randint(shortest, longest))
        )

    # How people type.

    def typed(self, text):
        """With or without capitals and full stops."""
        draw = self.random
        chance = draw.random()
        if chance < 0.5:
            text = text[:1].upper() + text[1:]
        elif chance < 0.52:
            text = text.upper()
        if draw.random() < 0.3:
            text = text.rstrip(".?!")
        elif text and text[-1].isalpha() and draw.random() < 0.3:
            text += draw.choice("..!?")
        return text

    def spoken(self, text):
        """As `typed`, without changing words: for what is to be answered letter by letter."""
        return text[:1].upper() + text[1:] if self.random.random() < 0.6 else text

    def aside(self, text):
        return (
            f"{text} {self.random.choice(P.ASIDES)}"
            if self.random.random() < 0.04 and text[-1:] in ".?!"
            else text
        )

    # Skills. Each returns the turns of one question and its answer.

    def fresh(self, text):
        """Whether small talk belongs to this split: what is said alone belongs to training always."""
        text = plain(text)
        return not self.test if text in self.said_alone else held(text) == self.test

    def chat(self):
        draw = self.random
        while True:
            kind = draw.choice(["hello", "hello", "daytime", "how", "who", "can", "thanks", "bye"])
            opener = draw.choice(P.OPENERS)
            if kind == "hello":
                key, text = kind, f"{draw.choice(P.HELLO)} {draw.choice(P.HELLO_TO)}"
            elif kind == "daytime":
                key = draw.choice(P.DAYTIMES)
                text = (
                    f"{draw.choice(['', '', '', 'hello', 'hi', 'hey', 'oh'])} {key} {draw.choice(P.HELLO_TO)}"
                )
            elif kind == "how":
                opening = draw.choice(["", "", opener])
                key, text = (
                    kind,
                    f"{opening}{',' * bool(opening)} {draw.choice(P.HOW)} {draw.choice(P.HOW_WHEN)}?",
                )
            elif kind == "who":
                key, text = kind, f"{opener}{',' * bool(opener)} {draw.choice(P.WHO)}?"
            elif kind == "can":
                key, text = kind, f"{opener}{',' * bool(opener)} {draw.choice(P.CAN)}?"
            elif kind == "thanks":
                key, text = (
                    kind,
                    f"{draw.choice(['', '', 'ok', 'great', 'oh', 'good', 'nice', 'perfect'])} {draw.choice(P.THANKS)} {draw.choice(P.THANKS_FOR)}",
                )
            else:
                key, text = (
                    kind,
                    f"{draw.choice(['', '', 'ok', 'well', 'thanks', 'oh'])} {draw.choice(P.BYE)} {draw.choice(P.BYE_TO)}",
                )
            text = re.sub(r"\s+([,?])", r"\1", re.sub(r"\s+", " ", text)).strip()
            if self.fresh(text):
                break
        if not text.endswith("?"):
            text += draw.choice(["", "!", ".", ""])
        if draw.random() < 0.004 and not self.test:
            key, text = "hello", ""
        return [("user", self.typed(text)), ("assistant", P.REPLIES[key])]

    def small_talk(self):
        draw = self.random
        while True:
            reply = draw.choice(list(P.SMALL_TALK))
            text = f"{draw.choice(P.OPENERS[:9])} {draw.choice(P.SMALL_TALK[reply])}".strip()
            if self.fresh(text):
                return [
                    ("user", self.typed(text + draw.choice(["", "", "?", ".", "!"]))),
                    ("assistant", reply),
                ]

    def asking(self):
        """A way to ask for the meaning of `{}`."""
        draw = self.random
        if not self.test and draw.random() < 0.45:
            return draw.choice(P.DEFINE)
        parts = P.DEFINE_OPENINGS
        while True:
            opening, inner = draw.choice(
                [("{}", "what {} means"), ("ask for it", "the meaning"), ("define it", "the word")]
            )
            template = draw.choice(parts[opening]).replace("{}", draw.choice(parts[inner]))
            if held(template) == self.test and not (self.test and template in P.DEFINE):
                return template

    def define(self, word=None):
        draw = self.random
        form = word
        if word is None:
            form = word = (
                draw.choice(self.defined) if draw.random() < 0.85 else draw.choice(self.defined[:2000])
            )
            if draw.random() < 0.15:
                form = draw.choice(self.inflected)
                word = self.forms[form]
        part, gloss = self.words[word]
        template = self.asking()
        if template in ("{}", "{}?") and form in self.said_alone:
            template = "what does {} mean?"
        asked = self.typed(template.replace("{}", form))
        if draw.random() < 0.08:
            asked = draw.choice(["please ", "hello, ", "hi. ", "ok, ", "now ", "so "]) + asked
        asked = self.aside(asked)
        return [("user", asked), ("assistant", f"{word} ({part}): {gloss}.")]

    def define_unknown(self):
        draw = self.random
        word = draw.choice([self.made_up, self.letters, lambda: draw.choice(self.unknown_words)])()
        if draw.random() < 0.1:
            word = f"{draw.choice(self.defined)} {draw.choice(self.defined)}"
        if word in self.words:
            return self.define(word)
        if word in self.forms:
            word = self.made_up()
        while (template := self.asking()) in (
            "{}",
            "{}?",
            "what is {}?",
            "what is the {}?",
            "what's {}?",
            "and {}?",
            "what about {}?",
        ):
            pass
        asked = template.replace("{}", word)
        if draw.random() < 0.5:
            asked = asked[:1].upper() + asked[1:]
        return [("user", asked), ("assistant", f"I do not know what {word} means.")]

    def word_list(self, count=None):
        draw = self.random
        count = count or draw.choice([1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 8, 9, 10])
        words = [self.listed_word() for _ in range(count)]
        chance = draw.random()
        if chance < 0.06:
            words = [str(draw.randint(0, 99)) if draw.random() < 0.7 else word for word in words]
        elif chance < 0.10:
            words = [draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in words]
        elif chance < 0.12:
            words = draw.sample([str(digit) for digit in range(10)], min(count, 10))
        return words

    def copy(self, backwards, count=None):
        draw = self.random
        words = self.word_list(count)
        joint = draw.choice([" ", " ", " ", ", "])
        held_out, trained = (P.REVERSE_HELD, P.REVERSE) if backwards else (P.REPEAT_HELD, P.REPEAT)
        template = draw.choice(held_out if self.test and draw.random() < 0.5 else trained)
        if not backwards and not self.test and draw.random() < 0.1:
            return self.copy_sentence(template)
        answer = joint.join(reversed(words) if backwards else words)
        if draw.random() < 0.08:
            asked = f"{joint.join(words)}. {draw.choice(['reverse that.', 'say that backwards.', 'reverse these words.']) if backwards else draw.choice(['repeat that.', 'say that again.', 'repeat these words.'])}"
        else:
            before, after = template.split("{}")
            said, mark = joint.join(words), draw.choice(["", "", "", "."])
            if draw.random() < 0.06:
                quote = draw.choice("\"'")
                said, mark = f"{quote}{said}{quote}", ""
            asked = self.spoken(before) + said + (after or mark)
            # What is repeated is repeated with its full stop.
            answer += mark if not after and not backwards else ""
        return [("user", asked), ("assistant", answer)]

    def copy_sentence(self, template):
        sentence = self.filler()
        while len(sentence) > 90 or sentence.count(" ") > 14:
            sentence = self.filler()
        return [("user", self.spoken(template.replace("{}", sentence))), ("assistant", sentence)]

    def add(self, two_digits=False):
        draw = self.random
        while True:
            chance = 1 if two_digits else draw.random()
            if chance < 0.2:
                a, b = draw.randint(0, 9), draw.randint(0, 9)
            elif chance < 0.4:
                a, b = draw.sample([draw.randint(0, 9), draw.randint(10, 99)], 2)
            else:
                a, b = draw.randint(10, 99), draw.randint(10, 99)
            pair = f"{min(a, b)}+{max(a, b)}"
            if (min(a, b) < 10 and not self.test) or held(pair) == self.test:
                break
        asked = self.aside(self.typed(draw.choice(P.ADD).format(a=a, b=b)))
        return [("user", asked), ("assistant", f"{a} + {b} = {a + b}")]

    def other_arithmetic(self):
        draw = self.random
        if draw.random() < 0.5:
            a, b = draw.randint(0, 999), draw.randint(0, 99)
            asked = draw.choice(P.OTHER_ARITHMETIC).format(a=a, b=b)
        else:
            a, b = draw.randint(100, 99999), draw.randint(0, 9999)
            if draw.random() < 0.5:
                a, b = b, a
            asked = draw.choice(P.ADD).format(a=a, b=b)
        return [("user", self.typed(asked)), ("assistant", P.ONLY_ADD)]

    def unknown(self):
        draw = self.random
        while True:
            template = draw.choice(P.QUESTIONS)
            text = template.replace("[t]", draw.choice(P.TOPICS))
            while "{}" in text:
                chance = draw.random()
                pool = (
                    self.nouns
                    if chance < 0.7
                    else self.verbs if chance < 0.8 else self.adjectives if chance < 0.85 else None
                )
                filler = (
                    draw.choice(pool)
                    if pool
                    else draw.choice(
                        [self.made_up().capitalize, lambda: draw.choice(P.NAMES), self.made_up]
                    )()
                )
                if draw.random() < 0.15:
                    filler = f"{draw.choice(['the', 'a', 'my', 'your', 'some'])} {filler}"
                text = text.replace("{}", filler, 1)
            if "{}" not in template and "[t]" not in template or held(plain(text)) == self.test:
                return [("user", self.aside(self.typed(text))), ("assistant", P.UNKNOWN)]

    def statement(self):
        """A sentence that asks nothing, or no sentence at all."""
        draw = self.random
        if draw.random() < 0.5:
            while True:
                text = draw.choice(self.examples) if draw.random() < 0.5 else self.filler()
                if held(plain(text)) == self.test and not text.endswith("?") and len(text.split()) > 3:
                    return [("user", self.spoken(text)), ("assistant", P.REMEMBERED)]
        count = draw.choice([1, 1, 2, 3])
        text = " ".join(
            draw.choice([self.letters, self.made_up, lambda: self.digits(1, 6)])() for _ in range(count)
        )
        if count == 1 and text in self.words or held(text) != self.test:
            return self.statement()
        return [("user", text), ("assistant", P.NOT_UNDERSTOOD)]

    # Text to hide something in.

    def filler(self):
        draw = self.random
        noun, verb = (lambda: draw.choice(self.nouns)), (lambda: draw.choice(self.verbs))
        adjective, name = (lambda: draw.choice(self.adjectives)), (lambda: draw.choice(P.NAMES))
        kind = draw.randrange(26)
        if kind == 0:
            text = f"the {adjective()} {noun()} is near the {noun()}."
        elif kind == 1:
            text = f"{name()} and {name()} saw a {adjective()} {noun()} in the {draw.choice(P.PLACES)}."
        elif kind == 2:
            text = f"every {noun()} has a {noun()} and a {adjective()} {noun()}."
        elif kind == 3:
            text = f"in the {draw.choice(['morning', 'evening', 'summer', 'winter', 'spring'])} the {noun()} is {adjective()}."
        elif kind == 4:
            text = f"{name()} went to the {draw.choice(P.PLACES)} to {verb()} the {noun()}."
        elif kind == 5:
            text = f"there are {draw.randint(2, 99)} {adjective()} {noun()}s under the {noun()}."
        elif kind == 6:
            text = f"nobody can {verb()} a {noun()} without a {noun()}."
        elif kind == 7:
            text = f"the {noun()} of {name()} is {draw.choice(['very', 'not', 'quite', 'rather', 'always'])} {adjective()}."
        elif kind == 8:
            text = f"people say that the {noun()} {draw.choice(['was', 'is', 'will be'])} {adjective()}."
        elif kind == 9:
            text = f"we {verb()} and {verb()} until the {noun()} is {adjective()}."
        elif kind == 10:
            text = f"a {noun()} is {draw.choice(self.glosses)}."
        elif kind == 11:
            text = draw.choice(self.glosses) + "."
        elif kind == 12:
            text = f"on day {draw.randint(1, 400)} {name()} found {draw.randint(2, 9000)} {noun()}s."
        elif kind == 13:
            text = f"if the {noun()} is {adjective()}, then {name()} will {verb()}."
        elif kind == 14:
            text = " ".join(self.listed_word() for _ in range(draw.randint(4, 12))) + "."
        elif kind == 15:
            text = f"there was a {draw.choice(P.THINGS)} in the {draw.choice(P.PLACES)} when {name()} came to the {noun()}."
        elif kind == 16:
            text = f"this is sentence number {draw.randint(1, 999)}, and it says nothing about a {noun()}."
        elif kind < 25:
            text = draw.choice(self.examples)
            text += "" if text[-1] in ".?!" else "."
        else:
            text = f"{name()} likes the {adjective()} {noun()}, but {name()} does not."
        return text[:1].upper() + text[1:]

    def thing(self):
        """Something with a secret: a thing and what tells it from others."""
        draw = self.random
        while True:
            chance = draw.random()
            thing = draw.choice(P.THINGS) if chance < 0.6 else draw.choice(self.nouns)
            if draw.random() < 0.75:
                kind = draw.choice([P.COLORS, P.COLORS, P.SHAPES, self.adjectives])
                thing = f"{draw.choice(kind)} {thing}"
            if held(thing) == self.test:
                return thing

    def value(self):
        draw = self.random
        chance = draw.random()
        if chance < 0.6:
            return self.digits()
        if chance < 0.75:
            return draw.choice(self.listed)
        if chance < 0.85:
            return draw.choice(P.NAMES)
        if chance < 0.93:
            return self.made_up()
        return f"{draw.choice(self.adjectives)} {draw.choice(self.nouns)}"

    def fact(self, taken, numbers=False):
        """`(told, question, answer)` about something that nothing in `taken` is about."""
        draw = self.random
        while True:
            key, told, question, answer = self.told_code(draw) if numbers else draw.choice(self.tellers)(draw)
            if key not in taken:
                taken.add(key)
                return told, question, (answer or told)[:1].upper() + (answer or told)[1:]

    # What can be told: `(key, told, question, answer)`; without an answer, what was told is the answer.

    def told_code(self, draw):
        owner = self.thing()
        return (
            f"code {owner}",
            f"the code of the {owner} is {self.digits(4, 4)}.",
            f"what is the code of the {owner}?",
            None,
        )

    def told_secret(self, draw):
        secret, owner = draw.choice(P.SECRETS).replace("_", " "), self.thing()
        told = f"the {secret} of the {owner} is {self.value()}."
        return f"{secret} {owner}", told, draw.choice(P.ABOUT).format(s=secret, o=owner), None

    def told_mine(self, draw):
        mine = draw.choice(P.MINE).replace("_", " ")
        if draw.random() < 0.25:
            mine = draw.choice(
                [draw.choice(self.nouns), f"{draw.choice(self.adjectives)} {draw.choice(self.nouns)}"]
            )
        value = self.value()
        question = draw.choice(
            [
                "what is my {}?",
                "what's my {}?",
                "do you know my {}?",
                "do you remember my {}?",
                "tell me my {}.",
                "what was my {}?",
                "say my {}.",
                "what did i say is my {}?",
            ]
        ).format(mine)
        return f"my {mine}", f"my {mine} is {value}.", question, f"your {mine} is {value}."

    def told_name(self, draw):
        name = draw.choice(P.NAMES) if draw.random() < 0.7 else self.made_up().capitalize()
        told = draw.choice(
            ["my name is {}.", "my name is {}.", "i am {}.", "i'm {}.", "my name's {}."]
        ).format(name)
        question = draw.choice(
            [
                "what is my name?",
                "what's my name?",
                "who am i?",
                "do you know my name?",
                "do you remember my name?",
                "tell me my name.",
                "what am i called?",
                "say my name.",
            ]
        )
        return "my name", told, question, f"your name is {name}."

    def told_label(self, draw):
        label = (
            draw.choice(P.LABELS)
            if draw.random() < 0.6
            else f"{draw.choice(self.adjectives)} {draw.choice(self.nouns)}"
        )
        value = self.value()
        told = draw.choice(["the {} is {}.", "the {} is {}.", "the {} is: {}.", "the {} was {}."]).format(
            label, value
        )
        question = draw.choice(
            [
                "what is the {}?",
                "what is the {}?",
                "what's the {}?",
                "what was the {}?",
                "tell me the {}.",
                "do you remember the {}?",
                "say the {}.",
                "which {} did i tell you?",
                "what is the {} i told you?",
                "can you tell me the {}?",
            ]
        ).format(label)
        return f"the {label}", told, question, f"the {label} is {value}."

    def told_number(self, draw):
        kind = draw.choice(["number", "word", "code", "name"])
        value = {
            "number": self.digits(1, 6),
            "code": self.digits(4, 6),
            "word": draw.choice(self.listed),
            "name": draw.choice(P.NAMES),
        }[kind]
        told = draw.choice(
            [
                "remember the {} {}.",
                "please remember the {} {}.",
                "keep the {} {} in mind.",
                "remember this {}: {}.",
                "don't forget the {} {}.",
            ]
        ).format(kind, value)
        question = draw.choice(
            [
                "which {} did i tell you?",
                "what was the {}?",
                "what is the {}?",
                "which {} should you remember?",
                "what {} did i tell you?",
                "tell me the {}.",
            ]
        ).format(kind)
        return f"the {kind}", told, question, f"the {kind} is {value}."

    def told_of_person(self, draw):
        name, what = draw.choice(P.NAMES), draw.choice(P.MINE).replace("_", " ")
        question = draw.choice(
            [
                "what is {}?",
                "what's {}?",
                "tell me {}.",
                "do you know {}?",
                "what was {}?",
                "do you remember {}?",
            ]
        ).format(f"{name}'s {what}")
        return f"{name} {what}", f"{name}'s {what} is {self.value()}.", question, None

    def told_home(self, draw):
        name = draw.choice(P.NAMES)
        verb, asked = draw.choice(
            [("lives", "live"), ("works", "work"), ("sleeps", "sleep"), ("waits", "wait")]
        )
        return (
            f"{name} {verb}",
            f"{name} {verb} in the {draw.choice(P.PLACES)}.",
            f"where does {name} {asked}?",
            None,
        )

    def told_place(self, draw):
        owner = self.thing()
        question = draw.choice(
            [
                "where is the {}?",
                "where's the {}?",
                "do you know where the {} is?",
                "tell me where the {} is.",
                "where can i find the {}?",
                "where did i put the {}?",
            ]
        ).format(owner)
        return f"where {owner}", f"the {owner} is in the {draw.choice(P.PLACES)}.", question, None

    def missing(self, taken):
        """A question about something that was not told."""
        teller = self.random.choice([self.told_secret, self.told_mine, self.told_name])
        while (found := teller(self.random))[0] in taken:
            teller = self.told_secret
        return found[2], "You did not tell me." if found[0].startswith("my ") else "You did not tell me that."

    def recall(self, tokens, count, facts=None, numbers=False):
        """A text of about `tokens` tokens (as `count` counts them) with facts in it, and questions."""
        draw = self.random
        taken = set()
        told = facts or draw.choice([1, 1, 2, 3, 4, 6])
        facts = [self.fact(taken, numbers) for _ in range(told)]
        used = sum(count(fact[0]) + 1 for fact in facts) + 40
        sentences = []
        # The same few sentences again and again, as in prompts that people paste together.
        few = [self.filler() for _ in range(draw.randint(1, 4))] if draw.random() < 0.12 else None
        while used < tokens:
            sentence = draw.choice(few) if few else self.filler()
            used += count(sentence) + 1
            sentences.append(sentence)
        for told_fact, _, _ in facts:
            told_fact = told_fact if draw.random() < 0.05 else told_fact[:1].upper() + told_fact[1:]
            sentences.insert(draw.randint(0, len(sentences)), told_fact)
        joint = draw.choice([" ", " ", " ", "\n"])
        text = joint.join(sentences)
        if draw.random() < 0.2 and not numbers:
            text = (
                draw.choice(
                    ["Read this text: ", "Here is a text. ", "Text: ", "Remember this: ", "Read this:\n"]
                )
                + text
            )
        asked = [(self.aside(self.typed(question)), answer) for _, question, answer in facts]
        if (
            told == 1
            and not numbers
            and draw.random() < 0.15
            and (found := re.match(r"(the [a-z]+) of the", facts[0][0]))
        ):
            # Said short where there is no doubt.
            asked = [(self.typed(f"what is {found[1]}?"), facts[0][2])]
        draw.shuffle(asked)
        asked = asked[: draw.choice([1, 2, 4, 6])]
        if not numbers and draw.random() < 0.12:
            question, answer = self.missing(taken)
            asked.insert(draw.randrange(len(asked) + 1), (self.typed(question), answer))
        if numbers:
            facts_asked = facts[0]
            return [
                ("user", f"{text} {facts_asked[1][:1].upper() + facts_asked[1][1:]}"),
                ("assistant", facts_asked[2]),
            ]
        turns = []
        for index, (question, answer) in enumerate(asked):
            if index == 0:
                place = draw.random()
                if place < 0.65:
                    question = f"{text}{draw.choice([joint, ' ', chr(10), chr(10) * 2])}{question}"
                elif place < 0.75:
                    question = f"{question}{draw.choice([joint, chr(10)])}{text}"
                elif place < 0.9:
                    turns.append(("system", text))
                else:
                    turns += [("user", text), ("assistant", P.REMEMBERED)]
            turns += [("user", question), ("assistant", answer)]
        return turns

    def conversation(self):
        """Several turns about different things, with facts told on the way and asked for later."""
        draw = self.random
        turns, pending, taken = [], [], set()
        for _ in range(draw.randint(2, 7)):
            chance = draw.random()
            if chance < 0.25:
                told, question, answer = self.fact(taken)
                if answer.startswith("Your name is"):
                    reply = f"Nice to meet you, {answer[13:]}"[:-1] + "!"
                    asked = draw.choice(["{}", "hello, {}", "hi! {}", "hi, {}", "{}", "hey, {}"]).format(told)
                else:
                    reply, asked = P.REMEMBERED, draw.choice(P.ASIDE).replace("{}", told)
                asked = self.spoken(asked)
                turns += [("user", asked if draw.random() < 0.6 else asked.rstrip(".")), ("assistant", reply)]
                pending.append((question, answer))
            elif chance < 0.5 and pending:
                question, answer = draw.choice(pending)
                turns += [("user", self.typed(question)), ("assistant", answer)]
            elif chance < 0.53:
                question, answer = self.missing(taken)
                turns += [("user", self.typed(question)), ("assistant", answer)]
            else:
                turns += self.short()
        return turns

    def short(self):
        """One question of any kind that needs no text."""
        kinds = [
            self.chat,
            self.small_talk,
            self.define,
            self.define,
            self.define_unknown,
            lambda: self.copy(False),
            lambda: self.copy(True),
            self.add,
            self.other_arithmetic,
            self.unknown,
            self.statement,
        ]
        return self.random.choice(kinds)()

    def with_system(self, turns):
        if turns[0][0] != "system" and self.random.random() < 0.35:
            return [("system", self.random.choice(P.SYSTEMS)), *turns]
        return turns
