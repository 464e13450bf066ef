"""Typed keys: a small grammar for walks through Doom World, and the camera poses that they lead to.

    keys  = item {("," | blank) item}
    item  = run | chord ["*" count]
    run   = two or more one-letter keys, one frame each: "wwww<<<<"
    chord = key {"+" key}, pressed together for a frame: "w+left"
    key   = w, a, s, d, up, down (move) | <, >, left, right (turn) | ., stay, with arrows such as U+2190 as well
"""

from __future__ import annotations

import re

import numpy as np

from li_compile.errors import LightInteractionError

# The nominal steps of a frame, as render.py plays them (which needs the engine to be imported).
FORWARD_STEP = 24 / 128  # in units of the poses
TURN_STEP = 7.5  # degrees
# (forward, right) of translation 0..8 and turn to the right of rotation 0..2; action = 9 * translation + rotation.
MOVES = ((0, 0), (1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
TURNS = (0, -1, 1)

#: Key -> (forward, right, turn).
KEYS = {"w": (1, 0, 0), "s": (-1, 0, 0), "a": (0, -1, 0), "d": (0, 1, 0), "<": (0, 0, -1), ">": (0, 0, 1), ".": (0, 0, 0)}
ALIASES = {"up": "w", "forward": "w", "down": "s", "back": "s", "left": "<", "right": ">", "stay": ".",
           "↑": "w", "↓": "s", "←": "<", "→": ">"}
HELP = ("w a s d move, < > turn (also left, right, up, down, arrows), . stands; a run such as 'wwww<<<<', counts such "
        "as 'left*11,right*11,w*9', keys held together such as 'w+left*4'")


class KeysError(LightInteractionError, ValueError):
    """Typed keys that cannot be read; says which part and what is understood."""


def parse(text: str) -> list[int]:
    """Typed keys -> one action (0..80) a frame. Raises KeysError."""
    actions: list[int] = []
    for item in filter(None, re.split(r"[,\s]+", text.strip().lower())):
        actions += _item(item)
    if not actions:
        raise KeysError(f"no keys in {text!r}; {HELP}")
    return actions


def _item(item: str) -> list[int]:
    chord, star, count = item.partition("*")
    if star and not re.fullmatch("[1-9][0-9]{0,2}", count):
        raise KeysError(f"{item!r}: a whole number from 1 to 999 must follow the *, such as left*11")
    if "+" not in chord and chord not in KEYS and chord not in ALIASES:
        wrong = [key for key in chord if ALIASES.get(key, key) not in KEYS]
        if wrong or not chord:
            raise KeysError(f"{item!r} is no key{f' (nor is {wrong[0]!r} in it)' if wrong else ''}; {HELP}")
        if star:
            raise KeysError(f"{item!r}: a count follows one key, as in w*9, or keys held together, as in w+left*4")
        return [_action([key], item) for key in chord]
    return [_action(chord.split("+"), item)] * int(count or 1)


def _action(keys: list[str], item: str) -> int:
    unknown = [key for key in keys if ALIASES.get(key, key) not in KEYS]
    if unknown:
        raise KeysError(f"{unknown[0]!r} in {item!r} is no key; {HELP}")
    forward, right, turn = np.array([KEYS[ALIASES.get(key, key)] for key in dict.fromkeys(keys)]).sum(0).tolist()
    if (forward, right) not in MOVES or turn not in TURNS:  # the same key under two names
        raise KeysError(f"{item!r} holds one direction twice; name each key once")
    return 9 * MOVES.index((forward, right)) + TURNS.index(turn)


def integrate(start: np.ndarray, actions: list[int]) -> np.ndarray:
    """Poses along actions: w2c [4, 4] of frame 0 -> float32 [1 + len(actions), 4, 4].

    An action first turns the camera about its vertical axis, then moves it level along its new heading; no wall stops
    it. Axes are OpenCV's: x right, y down, z forward.
    """
    camera = np.linalg.inv(start.astype(np.float64))  # camera to world
    poses = [start.astype(np.float64)]
    for action in actions:
        angle = np.radians(TURN_STEP * TURNS[action % 9])
        move = np.array(MOVES[action // 9], np.float64)
        move *= FORWARD_STEP / max(1.0, float(np.linalg.norm(move)))
        step = np.eye(4)
        step[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        step[:3, 3] = step[:3, :3] @ [move[1], 0, move[0]]
        camera = camera @ step
        poses.append(np.linalg.inv(camera))
    return np.stack(poses).astype(np.float32)
