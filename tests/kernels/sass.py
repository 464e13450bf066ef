"""Reading machine code: which uniform registers a tensor-core product may find undefined."""

from __future__ import annotations

import re

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);")
GUARD = re.compile(r"^@!?U?P\w+ ")


def undefined_descriptors(listing: str) -> list[str]:
    """Products (HGMMA) that read a descriptor from registers which no instruction has set on some path to them.

    Found once: a compiler that made a descriptor behind a branch and used it after it too, with nothing in the registers
    where the branch was not taken. listing: of ``nvdisasm -c``. A forward analysis of what is set on every path.
    """
    lines = []
    for line in listing.splitlines():
        if match := LABEL.match(line):
            lines.append(("label", match[1]))
        elif match := INSTRUCTION.search(line):
            lines.append(("instruction", match[1].strip()))
    labels = {name: i for i, (kind, name) in enumerate(lines) if kind == "label"}
    known: list[frozenset | None] = [None] * len(lines)
    known[0] = frozenset()
    todo = [0]
    while todo:
        i = todo.pop()
        kind, text = lines[i]
        after = known[i] | (_sets(text) if kind == "instruction" and not GUARD.match(text) else frozenset())
        for j in _next(lines, labels, i):
            merged = after if known[j] is None else known[j] & after
            if merged != known[j]:
                known[j] = merged
                todo.append(j)
    return [text for (kind, text), have in zip(lines, known) if have is not None and not _reads(text) <= have]


def _next(lines, labels, i: int) -> list[int]:
    kind, text = lines[i]
    to = []
    if kind == "instruction":
        if (match := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)) and match[1] in labels:
            to.append(labels[match[1]])
        if re.match(r"(BRA|EXIT|BRX|RET)\b", text):
            return to
    return to + [i + 1] * (i + 1 < len(lines))


def _sets(text: str) -> frozenset:
    operation = text.split()[0]
    match = re.match(r"\S+ (?:UP\d, )*UR(\d+)", text)
    if match is None or operation.startswith(("HGMMA", "UTMA", "STS", "BAR", "SYNCS")):
        return frozenset()
    first = int(match[1])
    return frozenset((first, first + 1) if ".64" in operation or "WIDE" in operation else (first,))


def _reads(text: str) -> frozenset:
    """Both descriptors, or the second alone where the first operand is in registers."""
    match = re.search(r"HGMMA\S* R\d+, (R\d+, )?gdesc\[UR(\d+)\]", text)
    if match is None:
        return frozenset()
    first = int(match[2])
    return frozenset(range(first + 2, first + 4) if match[1] else range(first, first + 4))
