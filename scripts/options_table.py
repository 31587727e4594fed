"""The table of options as Markdown, from the module; with a file name, written into that file.

In the file it stands between the two comments `<!-- options -->` and `<!-- /options -->`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rating_agent_hep as agent

BEGIN, END = "<!-- options -->\n", "<!-- /options -->\n"


def table() -> str:
    """One row for each option: name in the file, default, meaning."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for option in agent.OPTIONS:
        default = agent.default_text(option)
        shown = f"`{default}`" if default != "none" else "none"
        rows.append(f"| `{option.name}` | {shown} | {option.help} |")
    return "\n".join(rows) + "\n"


def insert(text: str) -> str:
    """A document with the table renewed. Raises ValueError where the two comments are not."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN.strip()} and {END.strip()} in the document")
    return head + begin + table() + end + tail


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")
