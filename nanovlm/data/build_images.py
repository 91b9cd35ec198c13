"""The images of chosen rows as pixels in one file, by several processes, part by part."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nanovlm.data.images import (
    StoredImage,
    UnreadableImage,
    is_there,
    read_image,
    resize_to_uint8,
)
from nanovlm.data.rows import BadValue, Chosen
from nanovlm.errors import UserError
from nanovlm.files import replace_text
from nanovlm.process import usable_cpus

_FEW_IMAGES = 2000
"""So many are done in this process, before others would have started."""


@dataclass(frozen=True)
class ImageTask:
    """What happens to every image."""

    column: str
    """Of images or of lists of them, whose first one is taken."""
    size: int
    """Side in pixels."""
    resampling: str
    file: Path
    """Image i of the chosen rows becomes uint8[3, size, size] at position i of this file."""

    @property
    def image_bytes(self) -> int:
        return 3 * self.size * self.size


@dataclass
class ImagesDone:
    """What was found in the images of some rows."""

    num_images: int = 0
    num_multi_image_rows: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    """The reason by the position in the file, which keeps zeros."""
    without_image: list[int] = field(default_factory=list)
    """Positions of the rows that have none; they keep zeros, too."""

    def add(self, other: "ImagesDone") -> None:
        """Count what was found in other rows."""
        self.num_images += other.num_images
        self.num_multi_image_rows += other.num_multi_image_rows
        self.unreadable |= other.unreadable
        self.without_image += other.without_image


def write_images(
    parts: Sequence[Sequence[Chosen]], task: ImageTask, folder: Path
) -> Generator[ImagesDone, None, None]:
    """Write all images; yield what was found in each part, also in those that were done before.

    Closing the generator ends the work, and the parts that are done stay done.

    Args:
        parts: rows that one process takes on.
        folder: where it is noted which parts are done.
    """
    notes = [folder / f"images-{number:05}.json" for number in range(len(parts))]
    if not task.file.exists():  # then no part is done, though notes may be left
        for note in notes:
            note.unlink(missing_ok=True)
    with task.file.open("ab") as file:
        file.truncate(_num_rows(parts) * task.image_bytes)
    for note in notes:
        if note.exists():
            yield _read_note(note)
    left = {note: part for part, note in zip(parts, notes, strict=True) if not note.exists()}
    few = _num_rows(list(left.values())) <= _FEW_IMAGES or usable_cpus() == 1
    with closing((_run_here if few else _run_in_processes)(left, task)) as results:
        for done, note in results:
            replace_text(note, json.dumps(done.__dict__))
            yield done


def write_part(part: Sequence[Chosen], task: ImageTask) -> ImagesDone:
    """Write the images of consecutive groups, safe on the disk when this returns."""
    done = ImagesDone()
    with task.file.open("r+b") as file:
        for some in part:
            values = some.group.read(task.column, some.rows)
            for position, value in enumerate(values, some.first):
                done.num_images += 1
                try:
                    images = _images_of(value)
                    done.num_multi_image_rows += len(images) > 1
                    if not images:
                        done.without_image.append(position)
                        continue
                    pixels = resize_to_uint8(read_image(images[0]), task.size, task.resampling)
                except UnreadableImage as error:
                    done.unreadable[position] = str(error)
                else:
                    os.pwrite(file.fileno(), pixels.tobytes(), position * task.image_bytes)
        os.fsync(file.fileno())
    return done


def _num_rows(parts: Sequence[Sequence[Chosen]]) -> int:
    return sum(len(some.rows) for part in parts for some in part)


def _images_of(value: Any) -> list[StoredImage]:
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


def _run_here(left: dict[Path, Sequence[Chosen]], task: ImageTask) -> Results:
    for note, part in left.items():
        yield write_part(part, task), note


def _run_in_processes(left: dict[Path, Sequence[Chosen]], task: ImageTask) -> Results:
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
