"""Render Doom World: first-person trajectories of Freedoom levels with exact camera poses.

    python render.py data --out DIR        # frames.bin + index.npz, the training data
    python render.py demo --demo-out DIR   # six single held-out trajectories

Needs `pip install vizdoom pillow numpy typer rich`; the engine and the levels come with vizdoom,
and no display is needed. The same seed gives the same bytes.

Poses are world-to-camera with OpenCV axes (x right, y down, z forward) in units of 128 Doom units.
A frame's action is the one that led to it, 9 * translation + rotation: the camera first turns,
then moves along its new heading.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import typer
import vizdoom as vz
from PIL import Image
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

WAD = Path(vz.__file__).with_name("freedoom2.wad")
HEIGHT, WIDTH, SHRINK = 96, 128, 5  # rendered at 480 x 640, then averaged over 5 x 5 pixels
FRAMES = 68  # 17 chunks of 4
FORWARD_STEP, TURN_STEP = 24.0, 7.5  # Doom units and degrees per frame
SUDDEN_FACTOR = 2  # only `sudden` turns faster: two steps per frame under the same label
TICS, FRICTION = 4, 0.90625  # game tics per frame; the part of the speed that a tic leaves
UNIT = 128.0  # Doom units per unit of translation
PIXEL_STRETCH = 1.2  # Doom draws heights 1.2 times as tall as widths (320 x 200 shown at 4:3)
DEPTH_STEP = 8.0  # Doom units per step of the engine's depth buffer (measured on walls)
GAMMA = 1.6  # Freedoom is dark; brighten it as the monitors of its time did
TEST_LEVELS = ("MAP08", "MAP13", "MAP22")
TRAIN_LEVELS = tuple(n for n in (f"MAP{i:02d}" for i in range(1, 29)) if n not in TEST_LEVELS)
VAL_EVERY = 16  # one trajectory in 16 of the training levels is held out
INDEX_BYTES = 32  # of index.npz per frame, a little more than was ever seen
KINDS = ("revisit",) * 7 + ("explore",) * 7 + ("loop",) * 3 + ("sudden",) * 2 + ("still",)
# name -> (level, kind, split, seed): picked by eye; their seeds are not those of the data
DEMOS = {
    "revisit": ("MAP15", "tour", "val", 1),
    "revisit_unseen": ("MAP08", "tour", "test", 7),
    "loop": ("MAP05", "loop", "val", 12),
    "explore": ("MAP25", "explore", "val", 11),
    "still": ("MAP04", "still", "val", 11),
    "sudden": ("MAP17", "sudden", "val", 12),
}
# (forward, right) for translation 0..8; turn to the right for rotation 0..2, the ones used
MOVES = ((0, 0), (1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
TURNS = (0, -1, 1)
STAY, LEFT, RIGHT, FORWARD, BACK, STRAFE_LEFT, STRAFE_RIGHT = 0, 1, 2, 9, 18, 27, 36
Plan = Iterator[int]
Recording = tuple[list["View"], list[int]]
app = typer.Typer(help=__doc__, add_completion=False)


class View(NamedTuple):
    """What the player sees, and from where."""

    image: np.ndarray  # uint8 [96, 128, 3]
    w2c: np.ndarray  # float64 [4, 4]
    clear: np.ndarray  # float64 [3], the free view to the left, ahead and right, in Doom units

    @property
    def centre(self) -> np.ndarray:
        """Camera position [3] in units of 128 Doom units."""
        return -self.w2c[:3, :3].T @ self.w2c[:3, 3]

    @property
    def dull(self) -> bool:
        """Whether the frame is dark, flat, or faces a wall right before the nose."""
        grey = self.image.mean(-1)
        return bool(grey.mean() < 32 or grey.std() < 16 or self.clear.max() < 4 * FORWARD_STEP)


# ---------------------------------------------------------------- scripts: endless runs of actions


def revisit(rng: np.random.Generator) -> Plan:
    """Leave and come back, again and again: look left and right past the start, walk and return."""
    while True:
        side = rng.permutation([LEFT, RIGHT])
        k, past, n = int(rng.integers(5, 14)), int(rng.integers(0, 12)), int(rng.integers(4, 11))
        what = rng.choice(["look", "walk", "strafe", "corner"], p=[0.4, 0.25, 0.1, 0.25])
        if what == "look":
            yield from [side[0]] * k + [side[1]] * (k + past) + [side[0]] * past
        elif what == "walk":
            yield from [FORWARD] * n + [STAY] * int(rng.integers(0, 2)) + [BACK] * n
        elif what == "strafe":
            yield from [STRAFE_LEFT] * (n // 2) + [STRAFE_RIGHT] * n + [STRAFE_LEFT] * (n - n // 2)
        else:
            yield from [side[0]] * k + [FORWARD] * n + [BACK] * n + [side[1]] * k


def tour(rng: np.random.Generator) -> Plan:
    """The tidiest revisit: about 90 degrees to either side and back, then forth and back."""
    one, other = rng.permutation([LEFT, RIGHT])
    yield from [one] * 11 + [other] * 22 + [one] * 11 + [FORWARD] * 9 + [STAY] + [BACK] * 9
    yield from revisit(rng)


def loop(rng: np.random.Generator) -> Plan:
    """A full turn, a circle, a square, or out and back the other way round."""
    turn, n, half = int(rng.choice([LEFT, RIGHT])), int(rng.integers(7, 19)), round(180 / TURN_STEP)
    plans = {
        "spin": [turn] * (2 * half) + [STAY],
        "circle": [FORWARD + turn] * (2 * half),
        "square": [FORWARD] * 4 + [turn] * (half // 2),
        "out": [FORWARD] * n + [turn] * half,
    }
    what = str(rng.choice(list(plans), p=[0.2, 0.3, 0.2, 0.3]))
    while True:
        yield from plans[what]


def still(rng: np.random.Generator) -> Plan:
    """Mostly stand; now and then a small turn."""
    while True:
        yield from [STAY] * int(rng.integers(8, 20))
        yield from [int(rng.choice([LEFT, RIGHT]))] * int(rng.integers(1, 4))


def sudden(rng: np.random.Generator) -> Plan:
    """Long quiet stretches, then a fast turn."""
    while True:
        if rng.random() < 0.4:
            yield from [STAY] * int(rng.integers(9, 20))
        else:
            yield from [int(rng.choice([FORWARD, FORWARD, BACK]))] * int(rng.integers(6, 14))
        yield from [int(rng.choice([LEFT, RIGHT]))] * int(rng.integers(4, 13))


def explore(rng: np.random.Generator, clear: Callable[[], np.ndarray]) -> Plan:
    """Walk on, now and then in a gentle curve, and turn to the freer side before a wall."""
    while True:
        left, ahead, right = clear()
        if ahead < 5 * FORWARD_STEP:
            turn = LEFT if left > right else RIGHT
            for _ in range(int(rng.integers(6, 16))):  # on to the same side: no dithering
                yield turn if clear()[1] < 12 * FORWARD_STEP else FORWARD + turn
        elif rng.random() < 0.35:
            yield from [FORWARD + int(rng.choice([LEFT, RIGHT]))] * int(rng.integers(2, 7))
        else:
            yield from [FORWARD] * int(rng.integers(1, 4))


SCRIPTS = {"revisit": revisit, "tour": tour, "loop": loop, "still": still, "sudden": sudden}

# -------------------------------------------------------------------------------------- the engine


def start_spots(level: str) -> np.ndarray:
    """Floor positions [S, 2] of a level's things (items, lamps, monsters): places to stand."""
    wad = WAD.read_bytes()
    count, at = struct.unpack_from("<ii", wad, 4)
    lumps = [struct.unpack_from("<ii8s", wad, at + 16 * i) for i in range(count)]
    names = [name.rstrip(b"\0").decode() for *_, name in lumps]
    offset, size, _ = lumps[names.index("THINGS", names.index(level))]
    return np.frombuffer(wad, "<i2", size // 2, offset).reshape(-1, 5)[:, :2].astype(float)


def pose(x: float, y: float, z: float, degrees: float) -> np.ndarray:
    """World-to-camera float64 [4, 4] from a Doom position and heading (anticlockwise from +x)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    w2c = np.eye(4)
    w2c[:3, :3] = [[s, -c, 0], [0, 0, -1], [c, s, 0]]  # rows: right, down, forward
    w2c[:3, 3] = -w2c[:3, :3] @ (np.array([x, y, z]) / UNIT)
    return w2c


class World:
    """A silent, empty, invulnerable walk through one Freedoom level after another."""

    def __init__(self, seed: int) -> None:
        game = self.game = vz.DoomGame()
        game.set_doom_game_path(str(WAD))
        self.scratch = tempfile.TemporaryDirectory()  # no settings left over from another run
        game.set_doom_config_path(str(Path(self.scratch.name) / "vizdoom.ini"))
        game.set_screen_resolution(vz.ScreenResolution.RES_640X480)
        game.set_screen_format(vz.ScreenFormat.RGB24)
        game.set_depth_buffer_enabled(True)
        game.set_window_visible(False)
        hidden = "hud weapon crosshair decals particles messages corpses screen_flashes"
        for what in (*hidden.split(), "effects_sprites"):
            getattr(game, f"set_render_{what}")(False)
        names = ("MOVE_FORWARD_BACKWARD_DELTA", "MOVE_LEFT_RIGHT_DELTA", "TURN_LEFT_RIGHT_DELTA")
        game.set_available_buttons([getattr(vz.Button, n) for n in names])
        game.add_game_args("-nomonsters +movebob 0 +sv_cheats 1")
        game.add_game_args("+cl_showsecretmessage 0 +con_midtime 0.001")  # no text in the view
        game.set_episode_timeout(0)
        game.set_seed(seed)
        game.init()

    def read(self, *names: str) -> np.ndarray:
        """Game variables as float64 [len(names)]."""
        return np.array([self.game.get_game_variable(getattr(vz.GameVariable, n)) for n in names])

    def load(self, level: str) -> None:
        """Enter a level afresh."""
        self.game.set_doom_map(level.lower())
        self.game.new_episode()
        self.game.send_game_command("god")
        self.game.send_game_command("turbo 255")  # lifts the limit on thrust: see `step`
        self.level, self.spots = level, start_spots(level)

    def place(self, rng: np.random.Generator) -> bool:
        """Stand at a random spot in a random direction; False where there is no room."""
        x, y = self.spots[rng.integers(len(self.spots))]
        self.game.send_game_command(f"warp {x:.0f} {y:.0f}")
        self.game.make_action([0, 0, float(rng.integers(0, 48) * TURN_STEP)])
        self.game.set_action([0, 0, 0])
        self.game.advance_action(12)  # the eye settles at its height, what moved comes to rest
        if self.game.is_episode_finished():
            return False
        there = self.read("POSITION_X", "POSITION_Y")
        return bool(np.abs(there - (x, y)).max() < 16 and self.look().clear[1] > 4 * FORWARD_STEP)

    def step(self, action: int, factor: int = 1) -> bool:
        """Play one frame of an action, its turn `factor` times; False if the level ended.

        Doom's players slide. So every tic thrusts to just the velocity that reaches the frame's
        goal in time (a thrust is a command / 32, and at most 127 / 32).
        """
        turn = TURN_STEP * factor * TURNS[action % 9]
        angle = np.radians(self.read("ANGLE")[0] - turn)
        axes = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
        move = np.array(MOVES[action // 9], float)
        place = self.read("POSITION_X", "POSITION_Y")
        velocity = self.read("VELOCITY_X", "VELOCITY_Y")
        goal = place + FORWARD_STEP * move / max(1.0, float(np.linalg.norm(move))) @ axes
        for tic in range(TICS):
            wanted = np.clip((goal - place) / (TICS - tic), -8, 8)
            thrust = np.clip(np.rint(axes @ (wanted - velocity) * 32), -127, 127)
            self.game.set_action([*map(float, thrust), turn if tic == 0 else 0.0])
            self.game.advance_action(1, tic == TICS - 1)  # only the last tic is drawn
            if self.game.is_episode_finished():
                return False
            velocity = velocity + thrust / 32 @ axes  # predicted; true unless a wall is hit
            place, velocity = place + velocity, velocity * FRICTION
        return True

    def look(self) -> View:
        """The present frame."""
        state = self.game.get_state()
        image = np.asarray(Image.fromarray(state.screen_buffer).reduce(SHRINK)) / 255
        image = np.rint(255 * image ** (1 / GAMMA)).astype(np.uint8)
        thirds = np.array_split(state.depth_buffer[232:250:4, ::4], 3, axis=1)
        clear = np.array([np.percentile(t, 30) for t in thirds]) * DEPTH_STEP
        place = self.read("CAMERA_POSITION_X", "CAMERA_POSITION_Y", "CAMERA_POSITION_Z")
        return View(image, pose(*place, self.read("CAMERA_ANGLE")[0]), clear)

    def intrinsics(self) -> np.ndarray:
        """K float32 [3, 3], normalised by the image's width and height."""
        fx = 0.5 / np.tan(np.radians(self.read("CAMERA_FOV")[0]) / 2)
        fy = fx * PIXEL_STRETCH * WIDTH / HEIGHT
        return np.array([[fx, 0, 0.5], [0, fy, 0.5], [0, 0, 1]], np.float32)


def check(world: World) -> None:
    """The poses mean what the module says: forward is +z, a right turn swings ahead to the left."""
    world.load("MAP01")
    rng = np.random.default_rng(0)
    while not (world.place(rng) and world.look().clear.min() > 8 * FORWARD_STEP):
        pass
    views = [world.look() for action in (STAY, FORWARD, RIGHT) if world.step(action)]
    moved = views[0].w2c[:3, :3] @ (views[1].centre - views[0].centre) * UNIT
    assert np.abs(moved - (0, 0, FORWARD_STEP)).max() < 0.5, moved
    ahead = views[2].w2c[:3, :3] @ views[1].w2c[2, :3]  # where forward was, seen after the turn
    turned = np.degrees(np.arctan2(-ahead[0], ahead[2]))
    assert abs(turned - TURN_STEP) < 0.02, turned


# ------------------------------------------------------------------------------------ trajectories


def record(world: World, kind: str, rng: np.random.Generator) -> Recording | None:
    """Views and actions of one trajectory from where the player stands; None if it is no good."""
    views, actions, blocked, dull = [world.look()], [STAY], 0, 0
    bumps = 0 if kind == "tour" else 0.2 * FRAMES  # a tour is to return to just where it began
    script = SCRIPTS.get(kind)
    plan = script(rng) if script else explore(rng, lambda: views[-1].clear)
    while len(views) < FRAMES:
        actions.append(next(plan))
        if not world.step(actions[-1], SUDDEN_FACTOR if kind == "sudden" else 1):
            return None
        views.append(world.look())
        moved = np.linalg.norm((views[-1].centre - views[-2].centre)[:2]) * UNIT
        blocked += bool(actions[-1] >= FORWARD and moved < FORWARD_STEP / 2)
        dull += views[-1].dull
        # no teleports, and few steps against a wall or in the dark
        if moved > 2 * FORWARD_STEP or blocked > bumps or dull > 0.15 * FRAMES:
            return None
    return views, actions


def find(world: World, kind: str, rng: np.random.Generator, quality: int) -> dict[str, list] | None:
    """The first good trajectory of the loaded level: images (WebP), w2c, action."""
    for _ in range(100):  # narrow levels have no room for some kinds
        if world.game.is_episode_finished():
            world.load(world.level)
        if world.place(rng) and (found := record(world, kind, rng)):
            views, actions = found
            images = [webp(view.image, quality) for view in views]
            return {"images": images, "w2c": [view.w2c for view in views], "action": actions}
    return None


def webp(image: np.ndarray, quality: int) -> bytes:
    """One uint8 image [H, W, 3] as WebP."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "WEBP", quality=quality, method=6)
    return out.getvalue()


def save(path: Path, sizes: list[int], w2c: list, action: list, **arrays: object) -> None:
    """Write an .npz so that its final name only ever holds a whole file."""
    part = path.with_suffix(".part.npz")
    offset = np.cumsum([0, *sizes], dtype=np.int64)
    poses, action = np.array(w2c, np.float32), np.array(action, np.int64)
    np.savez_compressed(part, offset=offset, w2c=poses, action=action, **arrays)
    os.replace(part, path)


def kinds(rng: np.random.Generator) -> Iterator[str]:
    """Kinds without end, in the proportions of KINDS, shuffled."""
    while True:
        yield from rng.permutation(KINDS)


def trajectories(world: World, budget: float, quality: int, seed: int) -> Iterator[tuple]:
    """(found, level, kind, split), each level with its share of the bytes (half for a test one)."""
    rng = np.random.default_rng(seed)
    decks, count, spent, allowed = {False: kinds(rng), True: kinds(rng)}, 0, 0, 0.0
    for level in TRAIN_LEVELS + TEST_LEVELS:
        world.load(level)
        test = level in TEST_LEVELS
        allowed += budget * (0.5 if test else 1) / (len(TRAIN_LEVELS) + 0.5 * len(TEST_LEVELS))
        while True:
            held = test or count % VAL_EVERY == VAL_EVERY // 2
            kind = str(next(decks[held]))
            found = find(world, kind, rng, quality)
            if found is None:
                continue
            size = sum(map(len, found["images"])) + INDEX_BYTES * FRAMES
            if spent + size > allowed:
                break  # this level's share is used up
            spent, count = spent + size, count + 1
            yield found, level, kind, "test" if test else "val" if held else "train"


@app.command()
def data(
    out: Path = typer.Option(..., help="folder for frames.bin and index.npz"),
    megabytes: float = typer.Option(57.9, help="size of both together, in 10^6 bytes"),
    quality: int = typer.Option(82, help="of the WebP images"),
    seed: int = 0,
) -> None:
    """Render the training, validation and test trajectories until the bytes are spent."""
    out.mkdir(parents=True, exist_ok=True)
    part, world = out / "frames.bin.part", World(seed)
    check(world)
    sizes, w2c, action, rows = [], [], [], []
    label = TextColumn("{task.description}")
    progress = Progress(label, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with progress as bar, part.open("wb") as file:
        task = bar.add_task("", total=megabytes * 1e6)
        for found, *row in trajectories(world, megabytes * 1e6, quality, seed):
            file.write(b"".join(found["images"]))
            sizes += map(len, found["images"])
            w2c += found["w2c"]
            action += found["action"]
            rows.append(row)
            done = file.tell() + INDEX_BYTES * len(sizes)
            bar.update(task, completed=done, description=f"{row[0]}, trajectory {len(rows)}")
    columns = dict(zip(("level", "kind", "split"), np.array(rows).T, strict=True))
    which = np.repeat(np.arange(len(rows), dtype=np.int32), FRAMES)
    save(out / "index.npz", sizes, w2c, action, trajectory=which, K=world.intrinsics(), **columns)
    os.replace(part, out / "frames.bin")
    total = sum((out / name).stat().st_size for name in ("frames.bin", "index.npz"))
    print(f"{len(rows)} trajectories, {len(sizes)} frames, {total:,} bytes")


@app.command()
def demo(
    demo_out: Path = typer.Option(..., help="folder for the .npz files"),
    frames: int = 64,
    quality: int = 85,
) -> None:
    """Write single held-out trajectories, one file each."""
    demo_out.mkdir(parents=True, exist_ok=True)
    for name, (level, kind, split, seed) in DEMOS.items():
        world = World(seed)  # afresh, so that a pick does not depend on the ones before it
        world.load(level)
        found = find(world, kind, np.random.default_rng([10**6, seed]), quality)
        assert found is not None, f"{name}: {level} has no such trajectory"
        images, w2c, action = (found[key][:frames] for key in ("images", "w2c", "action"))
        row = {"level": level, "kind": kind.replace("tour", "revisit"), "split": split}
        blob = np.frombuffer(b"".join(images), np.uint8)
        sizes = [len(image) for image in images]
        save(demo_out / f"{name}.npz", sizes, w2c, action, webp=blob, K=world.intrinsics(), **row)
        world.game.close()


if __name__ == "__main__":
    app()
