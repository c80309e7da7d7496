"""An agent in a process of its own, told by lines on standard input what to do.

One JSON array for each line: the name of a command and its arguments. One JSON value for each answer.
"""

from __future__ import annotations

import base64
import json
import sys

import numpy as np

from nixl._api import nixl_agent, nixl_agent_config


def main() -> None:
    """Serves commands until the input ends."""
    name, size = sys.argv[1], int(sys.argv[2])
    memory = np.resize(np.arange(256, dtype=np.uint8), size)
    agent = nixl_agent(name, nixl_agent_config(enable_listen_thread=True, listen_port=0))
    registered = agent.register_memory([(memory.ctypes.data, size, 0, "")], "DRAM")
    more = []

    def grow() -> list[int]:
        more.append(np.full(4096, 77, dtype=np.uint8))
        agent.register_memory([(more[-1].ctypes.data, 4096, 0, "")], "DRAM")
        return [more[-1].ctypes.data, 4096]

    def notifs() -> dict[str, list[str]]:
        found = agent.get_new_notifs()
        return {sender: [note.decode() for note in notes] for sender, notes in found.items()}

    commands = {
        "address": lambda: memory.ctypes.data,
        "metadata": lambda: base64.b64encode(agent.get_agent_metadata()).decode(),
        "add": lambda blob: agent.add_remote_agent(base64.b64decode(blob)).decode(),
        "knows": agent.check_remote_metadata,
        "port": agent.get_listen_port,
        "fill": lambda value: memory.fill(value),
        "bytes": lambda start, count: memory[start : start + count].tolist(),
        "notifs": notifs,
        "send": lambda to, text: agent.send_notif(to, text),
        "grow": grow,
        "deregister": lambda: agent.deregister_memory(registered),
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(commands[command](*arguments)), flush=True)


if __name__ == "__main__":
    main()
