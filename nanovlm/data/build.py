"""Builds prepared data: text first, then the images of the rows whose text is used.

Any number of processes may want the same data: one builds, the others wait and read. A build that
was broken off, however hard, goes on after the parts that are done, and gives the same bytes.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanovlm.data import build_images, build_text
from nanovlm.data.build_images import ImagesDone, ImageTask, write_images
from nanovlm.data.build_text import EncodeRows, encode_text, read_text, write_samples
from nanovlm.data.cache import ABOUT_FILE, IMAGES_FILE, MANIFEST_FILE, PreparedFolder
from nanovlm.data.rows import Subset, choose
from nanovlm.errors import UserError
from nanovlm.messages import BuildProgress

logger = logging.getLogger(__name__)

_MAX_NAMED = 3


OnProgress = Callable[[BuildProgress], None]


def log_progress(progress: BuildProgress) -> None:
    """Write progress to the log."""
    logger.info(
        "preparing the %s: %s %d of %d",
        progress.what,
        progress.stage,
        progress.done,
        progress.total,
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is to be built, and from what."""

    what: str
    """What the data is called in messages."""
    folder: PreparedFolder
    load: Callable[[], tuple[Subset, ...]]
    """Finds the rows; called only if something has to be built."""
    order: Callable[[int], np.ndarray]
    """From the number of rows to the ones to use, int64[M], in the order of the result."""
    text_column: str
    encode: EncodeRows
    image_column: str
    image_size: int
    resampling: str
    max_bad_fraction: float
    """A build ends as soon as more than this share of its images cannot be read."""
    items: Callable[[tuple[Subset, ...]], Any] = lambda _: None
    """What else of the rows goes into the manifest; JSON."""

    def progress(
        self, stage: Literal["text", "images", "waiting"], done: int, total: int
    ) -> BuildProgress:
        return BuildProgress(what=self.what, stage=stage, done=done, total=total)


def build(recipe: Recipe, on_progress: OnProgress) -> None:
    """Build what is not there yet; returns once all of it is.

    Raises:
        UserError: rows cannot be had or read, the disk is too full, or too many images are
            unreadable. What is done stays done.
    """
    folder = recipe.folder
    if folder.is_complete:
        return
    try:
        with folder.locked(lambda: on_progress(recipe.progress("waiting", 0, 1))):
            if not folder.is_complete:  # by the one that we have waited for
                _build(recipe, recipe.load(), on_progress)
    except OSError as error:
        raise UserError(
            f"preparing the {recipe.what} in {folder.path} (HF_ASSETS_CACHE puts it elsewhere): "
            f"{error}; started again, the work goes on after what is done"
        ) from error


def _build(recipe: Recipe, subsets: tuple[Subset, ...], on_progress: OnProgress) -> None:
    folder = recipe.folder
    num_rows = sum(subset.num_rows for subset in subsets)
    if not num_rows:
        raise UserError(
            f"{recipe.what}: {', '.join(subset.name for subset in subsets)} has no rows"
        )
    # Parts of another size, by another version of this program, must not be taken for these.
    parts = folder.path / f"parts-{build_text.ROWS_PER_PART}-{build_images.IMAGES_PER_PART}"
    parts.mkdir(parents=True, exist_ok=True)
    folder.write_json(ABOUT_FILE, folder.about)
    order = recipe.order(num_rows)
    rows = np.sort(order)  # from here on rows are read, and counted, in the order of the files
    text = read_text(
        encode_text(
            choose(subsets, rows),
            recipe.text_column,
            recipe.encode,
            parts,
            lambda done: on_progress(recipe.progress("text", done, len(rows))),
        )
    )
    kept = np.unique(text.rows)
    images = _build_images(recipe, subsets, rows[kept], parts, on_progress)
    unreadable = sorted(images.unreadable)
    is_read = ~np.isin(text.rows, kept[unreadable])
    place = np.argsort(order)  # of each row in the result
    samples = np.flatnonzero(is_read)
    samples = samples[np.argsort(place[text.rows[samples]], kind="stable")]
    sample_rows = text.rows[samples]
    write_samples(folder, text, samples)
    folder.write_array("image_index", np.searchsorted(kept, sample_rows))
    folder.write_array("places", place[sample_rows])
    folder.write_json(
        MANIFEST_FILE,
        {
            "rows": len(rows),
            "images": len(kept),
            "samples": len(samples),
            "multi_image_rows": images.num_multi_image_rows,
            "subsets": _count_by_subset(subsets, rows, text.counts, sample_rows),
            "unreadable_images": _described(subsets, rows[kept], images.unreadable),
            "items": recipe.items(subsets),
        },
    )
    for left in folder.path.glob("parts-*"):
        shutil.rmtree(left)


def _build_images(
    recipe: Recipe,
    subsets: tuple[Subset, ...],
    rows: np.ndarray,
    parts: Path,
    on_progress: OnProgress,
) -> ImagesDone:
    """Write the first image of each of `rows`; return what was found in all."""
    folder = recipe.folder
    task = ImageTask(
        column=recipe.image_column,
        size=recipe.image_size,
        resampling=recipe.resampling,
        file=folder.path / IMAGES_FILE,
    )
    _check_disk(recipe, len(rows) * task.image_bytes)
    num_done = num_multi = 0
    unreadable: dict[int, str] = {}

    def on_part(part: ImagesDone) -> None:
        nonlocal num_done, num_multi
        num_done += part.num_images
        num_multi += part.num_multi_image_rows
        unreadable.update(part.unreadable)
        on_progress(recipe.progress("images", num_done, len(rows)))
        if len(unreadable) > recipe.max_bad_fraction * len(rows):
            bad = _described(subsets, rows, unreadable)
            check_readable(recipe.what, bad, len(rows), recipe.max_bad_fraction)

    write_images(choose(subsets, rows), task, parts, _num_cpus(), on_part)
    return ImagesDone(num_done, num_multi, unreadable)


def check_readable(
    what: str, bad: Sequence[Mapping[str, Any]], num_images: int, max_bad_fraction: float
) -> None:
    """Raise UserError if more than a share of the images cannot be read.

    Args:
        bad: `subset`, `row` and `reason` of each that cannot.
    """
    if len(bad) <= max_bad_fraction * num_images:
        return
    named = "; ".join(f"{b['subset']} row {b['row']}: {b['reason']}" for b in bad[:_MAX_NAMED])
    more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
    by_subset: dict[str, int] = {}
    for image in bad:
        by_subset[image["subset"]] = by_subset.get(image["subset"], 0) + 1
    where = ", ".join(f"{name}: {number}" for name, number in sorted(by_subset.items()))
    raise UserError(
        f"{what}: at least {len(bad)} of {num_images} images cannot be read ({where}), more than "
        f"max_bad_fraction={max_bad_fraction:g} allows: {named}{more}"
    )


def _check_disk(recipe: Recipe, num_bytes: int) -> None:
    folder = recipe.folder.path
    file = folder / IMAGES_FILE
    written = file.stat().st_blocks * 512 if file.exists() else 0
    free = shutil.disk_usage(folder).free
    if num_bytes - written > free:
        raise UserError(
            f"{recipe.what}: its images take {_gigabytes(num_bytes)} in {folder.parent}, where "
            f"{_gigabytes(free)} are free; HF_ASSETS_CACHE=FOLDER puts prepared data elsewhere, "
            "`python -m nanovlm.prepared_data list` shows what can go, and a smaller "
            "data_cutoff_idx needs less"
        )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _described(
    subsets: Sequence[Subset], rows: np.ndarray, unreadable: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Return `subset, row, reason` of the unreadable images, given by their place in `rows`."""
    return [
        _place_of(subsets, int(rows[place])) | {"reason": reason}
        for place, reason in sorted(unreadable.items())
    ]


def _place_of(subsets: Sequence[Subset], row: int) -> dict[str, Any]:
    """Return the sub-set of a row counted through all of them, and its number there, from 0."""
    for subset in subsets:
        if row < subset.num_rows:
            return {"subset": subset.name, "row": row}
        row -= subset.num_rows
    raise AssertionError(f"row {row} behind the last one")


def _count_by_subset(
    subsets: Sequence[Subset], rows: np.ndarray, counts: np.ndarray, sample_rows: np.ndarray
) -> dict[str, dict[str, int]]:
    """Return of each sub-set the chosen rows, their turns and samples, and what was left out.

    Args:
        rows: the chosen rows, ascending; `counts` (of `EncodedText`) and `sample_rows` count
            through them.
    """
    ends = np.searchsorted(rows, np.cumsum([subset.num_rows for subset in subsets]))
    starts = np.concatenate([[0], ends[:-1]])
    result = {}
    for subset, start, end in zip(subsets, starts.tolist(), ends.tolist(), strict=True):
        turns, over_long, incomplete = counts[start:end].sum(axis=0).tolist()
        result[subset.name] = {
            "rows": end - start,
            "turns": turns,
            "over_long_turns": over_long,
            "incomplete_turns": incomplete,
            "samples": int(((sample_rows >= start) & (sample_rows < end)).sum()),
        }
    return result


def _num_cpus() -> int:
    """Return the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
