"""The tokenizer: byte-level BPE in which a word is the same tokens wherever it stands.

Every space, digit and mark is a token of its own, so that no word has a second form with a space before it:
what is repeated, reversed or recalled is then copied token by token.
"""

import json
import pathlib
import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, START, END = range(3)
PIECES = r"\p{L}+|\p{N}|\s|[^\s\p{L}\p{N}]"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def train(texts, folder):
    """Learns the merges from `texts` and writes `tokenizer.json` and `tokenizer_config.json`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[END_OF_TEXT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Encoder:
    """Tokens of texts, with a memory of words: no word's tokens depend on its neighbours."""

    def __init__(self, folder):
        self.tokenizer = Tokenizer.from_file(str(pathlib.Path(folder) / "tokenizer.json"))
        self.known = {}

    def __call__(self, text):
        tokens = []
        for piece in re.findall(r"[^\W\d_]+|\d|\s|[^\w\s]|_", text):
            found = self.known.get(piece)
            if found is None:
                found = self.known[piece] = self.tokenizer.encode(piece, add_special_tokens=False).ids
            tokens += found
        return tokens

    def chat(self, turns):
        """Tokens of a conversation, and for each whether the assistant is to say it."""
        tokens, said = [], []
        for role, text in turns:
            head = [START, *self(role + "\n")]
            body = [*self(text.strip()), END]
            tokens += head + body + self("\n")
            said += [False] * len(head) + [role == "assistant"] * len(body) + [False]
        return tokens, said
