"""Records what transformers makes of the templates in data/templates, for the tests of this crate.

    python frontend/tests/record_templates.py

Needs transformers and jinja2. Writes data/chat_templates.json: one case for each conversation, with
the rendered text, or the message where the template refuses the conversation.
"""

import json
from pathlib import Path

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

DATA = Path(__file__).parent / "data"

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": "What is 2 < 3 & 'x'?\n"}
ASSISTANT = {"role": "assistant", "content": " It is <true> – \"yes\". "}
USER_2 = {"role": "user", "content": "And 叫 😀?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {
                "name": "add",
                "arguments": {"b": 2, "a": 1.5, "note": "é<b>'\"", "deep": [None, True, {}]},
            },
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "3.5"}
RESULT_2 = {"role": "tool", "tool_call_id": "abcdefghj", "content": "4"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFour."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two> numbers & 'more'.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}, "return": {"type": "string"}}},
]
VALUES = {
    "text": "<é> & 'quoted' \"twice\" 😀 \t",
    "number": 3,
    "float": 0.1,
    "flag": True,
    "nothing": None,
    "nested": {"list": [1, "two", 3.0], "empty": {}, "none": []},
    "big": 1e20,
    "small": 1.5e-7,
    "a_first": 0,
}

CONVERSATIONS = {
    "plain": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ASSISTANT, USER_2],
    "no_system": [USER, ASSISTANT, USER_2],
    "call": [SYSTEM, USER, CALL, RESULT],
    "two_results": [USER, CALL, RESULT, RESULT_2],
    "thought": [USER, THOUGHT, USER_2, THOUGHT],
    "twice_user": [USER, USER_2],
    "stop": [USER, {"role": "user", "content": "stop here"}, USER_2],
    "only_tool": [RESULT],
}

VARIANTS = {
    "llama3": [{"date_string": "01 Jan 2026"}, {"date_string": "01 Jan 2026", "tools_in_user_message": False}],
    "qwen3": [{}, {"enable_thinking": False}],
    "python": [{"values": VALUES}],
}


def cases():
    for path in sorted((DATA / "templates").glob("*.jinja")):
        name = path.stem
        source = path.read_text()
        for conversation, messages in CONVERSATIONS.items():
            if name == "python" and conversation != "turns":
                continue
            for kwargs in VARIANTS.get(name, [{}]):
                for tools in (None, TOOLS):
                    for prompt in (True, False):
                        case = {
                            "template": name,
                            "conversation": conversation,
                            "tools": tools is not None,
                            "add_generation_prompt": prompt,
                            "kwargs": kwargs,
                        }
                        try:
                            rendered, _ = render_jinja_template(
                                conversations=[messages],
                                tools=tools,
                                chat_template=source,
                                add_generation_prompt=prompt,
                                **SPECIAL,
                                **kwargs,
                            )
                            case["expected"] = rendered[0]
                        except Exception as error:  # noqa: BLE001 - whatever the template raises
                            case["error"] = str(error)
                        yield case


def main():
    recorded = {
        "transformers": transformers.__version__,
        "special_tokens": SPECIAL,
        "conversations": CONVERSATIONS,
        "tools": TOOLS,
        "cases": list(cases()),
    }
    text = json.dumps(recorded, ensure_ascii=False, indent=1)
    (DATA / "chat_templates.json").write_text(text + "\n")
    print(len(recorded["cases"]), "cases")


if __name__ == "__main__":
    main()
