"""The images of chosen rows as pixels in one file, by several processes, part by part."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
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
from nanovlm.data.rows import BadValue, Chosen, in_parts
from nanovlm.errors import UserError
from nanovlm.files import replace_text

IMAGES_PER_PART = 128
_FEW_IMAGES = 2000
"""So many are done here, before other processes would have started."""


@dataclass(frozen=True)
class ImageTask:
    """What happens to every image."""

    column: str
    """Of images or of lists of them, whose first one is taken."""
    size: int
    """Side in pixels."""
    resampling: str
    file: Path
    """Image i of the chosen rows becomes uint8[3, size, size] at place i of this file."""

    @property
    def image_bytes(self) -> int:
        return 3 * self.size * self.size


@dataclass(frozen=True)
class ImagesDone:
    """What was found in a part."""

    num_images: int
    num_multi_image_rows: int
    unreadable: Mapping[int, str]
    """The reason by the place in the file, which keeps zeros."""
    without_image: Sequence[int]
    """Places of the rows that have none; they keep zeros, too."""


def write_images(
    chosen: Sequence[Chosen],
    task: ImageTask,
    folder: Path,
    num_workers: int,
    on_part: Callable[[ImagesDone], None],
) -> None:
    """Write all images; parts that `folder` says are done stay as they are.

    Args:
        folder: where it is noted which parts are done.
        num_workers: processes, if there are more than a few images.
        on_part: called for each part, also for those that were done before. What it raises ends
            the work, and the parts that are done stay done.
    """
    parts = in_parts(chosen, IMAGES_PER_PART)
    notes = [folder / f"images-{number:05}.json" for number in range(len(parts))]
    if not task.file.exists():  # then nothing of it is done, whatever the notes say
        for note in notes:
            note.unlink(missing_ok=True)
    _set_size(task, sum(len(group.rows) for group in chosen))
    for note in notes:
        if note.exists():
            on_part(_read_note(note))
    left = [(part, note) for part, note in zip(parts, notes, strict=True) if not note.exists()]
    num_left = sum(len(group.rows) for part, _ in left for group in part)
    run = _run_here if num_left <= _FEW_IMAGES or num_workers == 1 else _run_in_processes
    with closing(run(left, task, num_workers)) as results:
        for done, note in results:
            replace_text(note, json.dumps(done.__dict__))
            on_part(done)


def write_part(part: Sequence[Chosen], task: ImageTask) -> ImagesDone:
    """Write the images of consecutive groups, safe on the disk when this returns."""
    unreadable: dict[int, str] = {}
    without_image: list[int] = []
    num_images = num_multi = 0
    with task.file.open("r+b") as file:
        for chosen in part:
            for place, value in enumerate(
                chosen.group.read(task.column, chosen.rows), chosen.first
            ):
                num_images += 1
                try:
                    images = _images_of(value)
                    num_multi += len(images) > 1
                    if not images:
                        without_image.append(place)
                        continue
                    pixels = resize_to_uint8(read_image(images[0]), task.size, task.resampling)
                except UnreadableImage as error:
                    unreadable[place] = str(error)
                else:
                    os.pwrite(file.fileno(), pixels.tobytes(), place * task.image_bytes)
        os.fsync(file.fileno())
    return ImagesDone(num_images, num_multi, unreadable, without_image)


def _images_of(value: Any) -> list[StoredImage]:
    """Return the images of a row, without the empty places. Raises UnreadableImage."""
    if isinstance(value, BadValue):
        raise UnreadableImage(value.reason)
    listed = value if isinstance(value, list) else [value]
    return [image for image in listed if is_there(image)]


def _set_size(task: ImageTask, num_images: int) -> None:
    with task.file.open("ab") as file:
        file.truncate(num_images * task.image_bytes)


def _read_note(note: Path) -> ImagesDone:
    content = json.loads(note.read_text())
    unreadable = {int(place): reason for place, reason in content.pop("unreadable").items()}
    return ImagesDone(**content, unreadable=unreadable)


Work = Sequence[tuple[list[Chosen], Path]]
Results = Generator[tuple[ImagesDone, Path], None, None]


def _run_here(work: Work, task: ImageTask, _: int) -> Results:
    for part, note in work:
        yield write_part(part, task), note


def _run_in_processes(work: Work, task: ImageTask, num_workers: int) -> Results:
    # Spawned, not forked: threads of the tokenizer and of torch would be cut off in mid-air.
    context = multiprocessing.get_context("spawn")
    others_end, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(num_workers, context, _end_with_parent, (others_end,))
    try:
        futures: dict[Future[ImagesDone], Path] = {
            pool.submit(write_part, part, task): note for part, note in work
        }
        for future in as_completed(futures):
            yield future.result(), futures[future]
    except BrokenProcessPool as error:
        raise UserError(
            "preparing images: a process ended unexpectedly, killed or for want of memory; started "
            "again, the work goes on after what is done"
        ) from error
    except BaseException:  # Ctrl-C too: nobody waits for the parts under way, they are done again
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
