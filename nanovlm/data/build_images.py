"""The images of chosen rows as pixels in one file, by several processes, part by part."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanovlm.data.images import (
    StoredImage,
    UnreadableImage,
    image_size,
    is_there,
    read_image,
    resize_to_uint8,
)
from nanovlm.data.rows import BadValue, Chosen
from nanovlm.data.tiles import Tiling, cut_into_tiles
from nanovlm.errors import UserError
from nanovlm.files import replace_text
from nanovlm.process import usable_cpus

_FEW_IMAGES = 2000
"""So many, or tiles, are done in this process, before others would have started."""


@dataclass(frozen=True)
class ImageTask:
    """What happens to the images of every row."""

    column: str
    """Of images or of lists of them."""
    size: int
    """Side in pixels of what they become."""
    prepare: Callable[[Sequence[StoredImage]], np.ndarray]
    """From the images of a row to uint8[n, 3, size, size]; picklable. Raises UnreadableImage."""
    file: Path
    """Of uint8[R, 3, size, size], what the images of all rows become, in the order of the rows."""

    @property
    def image_bytes(self) -> int:
        return 3 * self.size * self.size


def first_squashed(images: Sequence[StoredImage], size: int, resampling: str) -> np.ndarray:
    """Return the first image as a square, uint8[1, 3, size, size]."""
    return resize_to_uint8(read_image(images[0]), size, resampling)[None]


def all_in_tiles(
    images: Sequence[StoredImage], tile: Callable[[int, int], Tiling], size: int, resampling: str
) -> np.ndarray:
    """Return the tiles of all images, uint8[n, 3, size, size].

    Args:
        tile: from width and height to the grid.
        resampling: the filter of the global tiles.
    """
    return np.concatenate(
        [
            cut_into_tiles(read_image(image), tile(*image_size(image)), size, resampling)
            for image in images
        ]
    )


@dataclass
class ImagesDone:
    """What was found in the images of some rows."""

    num_images: int = 0
    num_multi_image_rows: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    """The reason by the position of the row; in the file it keeps zeros."""
    without_image: list[int] = field(default_factory=list)
    """Positions of the rows that have none; they keep zeros, too."""

    def add(self, other: "ImagesDone") -> None:
        """Count what was found in other rows."""
        self.num_images += other.num_images
        self.num_multi_image_rows += other.num_multi_image_rows
        self.unreadable |= other.unreadable
        self.without_image += other.without_image


class ImagePart(NamedTuple):
    """Rows that one process takes on."""

    rows: Sequence[Chosen]
    starts: np.ndarray
    """int64[n + 1], where in the file what the images of each row become starts, and the end."""

    @property
    def num_images(self) -> int:
        return int(self.starts[-1] - self.starts[0])


def write_images(
    parts: Sequence[Sequence[Chosen]], starts: np.ndarray, task: ImageTask, folder: Path
) -> Generator[ImagesDone, None, None]:
    """Write all images; yield what was found in each part, also in those that were done before.

    Closing the generator ends the work, and the parts that are done stay done.

    Args:
        parts: rows that one process takes on.
        starts: int64[M + 1], as `ImagePart` has it, of all of them.
        folder: where it is noted which parts are done.
    """
    notes = [folder / f"images-{number:05}.json" for number in range(len(parts))]
    if not task.file.exists():  # then no part is done, though notes may be left
        for note in notes:
            note.unlink(missing_ok=True)
    with task.file.open("ab") as file:
        file.truncate(int(starts[-1]) * task.image_bytes)
    for note in notes:
        if note.exists():
            yield _read_note(note)
    left = {
        note: _with_starts(part, starts)
        for part, note in zip(parts, notes, strict=True)
        if not note.exists()
    }
    few = sum(part.num_images for part in left.values()) <= _FEW_IMAGES or usable_cpus() == 1
    with closing((_run_here if few else _run_in_processes)(left, task)) as results:
        for done, note in results:
            replace_text(note, json.dumps(done.__dict__))
            yield done


def write_part(part: ImagePart, task: ImageTask) -> ImagesDone:
    """Write the images of consecutive groups, safe on the disk when this returns."""
    done = ImagesDone()
    first_row = part.rows[0].first
    with task.file.open("r+b") as file:
        for some in part.rows:
            values = some.group.read(task.column, some.rows)
            for position, value in enumerate(values, some.first):
                done.num_images += 1
                start, end = part.starts[position - first_row :][:2].tolist()
                try:
                    images = images_of(value)
                    done.num_multi_image_rows += len(images) > 1
                    if not images:
                        done.without_image.append(position)
                        continue
                    pixels = task.prepare(images)
                    if len(pixels) != end - start:
                        raise UnreadableImage("has become another while it was prepared")
                except UnreadableImage as error:
                    done.unreadable[position] = str(error)
                else:
                    os.pwrite(file.fileno(), pixels.tobytes(), start * task.image_bytes)
        os.fsync(file.fileno())
    return done


def _with_starts(part: Sequence[Chosen], starts: np.ndarray) -> ImagePart:
    first, num_rows = part[0].first, sum(len(some.rows) for some in part)
    return ImagePart(part, starts[first : first + num_rows + 1])


def images_of(value: Any) -> list[StoredImage]:
    """Return the images of a row, without the empty ones. Raises UnreadableImage."""
    if isinstance(value, BadValue):
        raise UnreadableImage(value.reason)
    listed = value if isinstance(value, list) else [value]
    return [image for image in listed if is_there(image)]


def _read_note(note: Path) -> ImagesDone:
    content = json.loads(note.read_text())
    unreadable = {int(position): reason for position, reason in content["unreadable"].items()}
    return ImagesDone(**{**content, "unreadable": unreadable})


Results = Generator[tuple[ImagesDone, Path], None, None]


def _run_here(left: dict[Path, ImagePart], task: ImageTask) -> Results:
    for note, part in left.items():
        yield write_part(part, task), note


def _run_in_processes(left: dict[Path, ImagePart], task: ImageTask) -> Results:
    # Spawned, not forked: threads of the tokenizer and of torch would be cut off in mid-air.
    context = multiprocessing.get_context("spawn")
    others_end, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(usable_cpus(), context, _end_with_parent, (others_end,))
    try:
        futures: dict[Future[ImagesDone], Path] = {
            pool.submit(write_part, part, task): note for note, part in left.items()
        }
        for future in as_completed(futures):
            yield future.result(), futures[future]
    except BrokenProcessPool as error:
        raise UserError(
            "preparing images: a process ended unexpectedly, killed or for want of memory; started "
            "again, the work continues after what is done"
        ) from error
    except BaseException:  # Ctrl-C too: the parts in progress are dropped and done again
        lifeline.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        lifeline.close()


def _end_with_parent(lifeline: Connection) -> None:
    """End this process once the parent has closed the other end, or is no more."""
    for number in (signal.SIGINT, signal.SIGHUP):  # which a terminal sends to the parent too
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
