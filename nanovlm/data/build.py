"""Builds prepared data: text first, then the images of the rows whose text is used.

Any number of processes may want the same data: one builds, the others wait and read. A build that
was broken off, however hard, goes on after the parts that are done, and gives the same bytes.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanovlm.data import build_images, build_text
from nanovlm.data.build_images import ImagesDone, ImageTask, write_images
from nanovlm.data.build_text import (
    EncodedText,
    EncodeRows,
    encode_text,
    read_text,
    write_samples,
)
from nanovlm.data.cache import ABOUT_FILE, IMAGES_FILE, MANIFEST_FILE, PreparedFolder
from nanovlm.data.left_out import BadCell, check_bad_rows, describe_bad
from nanovlm.data.rows import Subset, choose
from nanovlm.errors import UserError
from nanovlm.files import remove_folder
from nanovlm.messages import BuildProgress
from nanovlm.process import usable_cpus

logger = logging.getLogger(__name__)

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
    """A build ends as soon as more than this share of its rows cannot be read."""
    is_whole: bool = False
    """Whether nothing may be left out: then a row without an image cannot be read either."""
    items: Callable[[tuple[Subset, ...]], Any] = lambda _: None
    """What else of the rows goes into the manifest; JSON. Asked first: it may refuse the rows."""

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
    items = recipe.items(subsets)
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
    bad = {
        int(rows[row]): BadCell(recipe.text_column, str(reason))
        for row, reason in zip(text.bad_rows, text.reasons, strict=True)
    }
    images = _build_images(recipe, subsets, rows[kept], bad, parts, on_progress)
    bad |= images.bad
    place = np.argsort(order)  # of each row in the result
    samples = np.flatnonzero(~np.isin(rows[text.rows], [*bad, *images.without_image]))
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
            "subsets": _count_by_subset(subsets, rows, text, images.without_image, sample_rows),
            "usable_rows": len(kept) + len(text.bad_rows) - len(images.without_image),
            "bad_rows": describe_bad(subsets, bad),
            "items": items,
        },
    )
    for left in folder.path.glob("parts-*"):
        remove_folder(left)


@dataclass
class _Images:
    """What was found in the images of all parts so far."""

    num_done: int = 0
    num_multi_image_rows: int = 0
    bad: dict[int, BadCell] = field(default_factory=dict)
    """By the number of the row, counted through all sub-sets."""
    without_image: list[int] = field(default_factory=list)
    """Rows, counted through all sub-sets."""


def _build_images(
    recipe: Recipe,
    subsets: tuple[Subset, ...],
    rows: np.ndarray,
    bad_text: Mapping[int, BadCell],
    parts: Path,
    on_progress: OnProgress,
) -> _Images:
    """Write the first image of each of `rows`; return what was found in all."""
    folder, found = recipe.folder, _Images()
    task = ImageTask(
        column=recipe.image_column,
        size=recipe.image_size,
        resampling=recipe.resampling,
        file=folder.path / IMAGES_FILE,
    )

    def check() -> None:
        num_usable = len(rows) + len(bad_text) - len(found.without_image)
        if len(found.bad) + len(bad_text) > recipe.max_bad_fraction * num_usable:
            bad = describe_bad(subsets, {**bad_text, **found.bad})
            check_bad_rows(recipe.what, bad, num_usable, recipe.max_bad_fraction)

    def on_part(part: ImagesDone) -> None:
        found.num_done += part.num_images
        found.num_multi_image_rows += part.num_multi_image_rows
        reasons, without_image = dict(part.unreadable), part.without_image
        if recipe.is_whole:
            reasons |= dict.fromkeys(without_image, "no image")
            without_image = []
        found.bad |= {int(rows[i]): BadCell(task.column, why) for i, why in reasons.items()}
        found.without_image += [int(rows[i]) for i in without_image]
        on_progress(recipe.progress("images", found.num_done, len(rows)))
        check()

    check()
    _check_disk(recipe, len(rows) * task.image_bytes)
    write_images(choose(subsets, rows), task, parts, usable_cpus(), on_part)
    return found


def _check_disk(recipe: Recipe, num_bytes: int) -> None:
    folder = recipe.folder.path
    file = folder / IMAGES_FILE
    written = file.stat().st_blocks * 512 if file.exists() else 0
    free = shutil.disk_usage(folder).free
    if num_bytes - written > free:
        raise UserError(
            f"{recipe.what}: its images take {_gigabytes(num_bytes)} in {folder.parent}, where "
            f"{_gigabytes(free)} are free; HF_ASSETS_CACHE=FOLDER puts prepared data elsewhere, "
            "`python -m nanovlm data list` shows what can go, and a smaller "
            "data_cutoff_idx needs less"
        )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _count_by_subset(
    subsets: Sequence[Subset],
    rows: np.ndarray,
    text: EncodedText,
    without_image: Sequence[int],
    sample_rows: np.ndarray,
) -> dict[str, dict[str, int]]:
    """Return of each sub-set the chosen rows, their turns and samples, and what was left out.

    Args:
        rows: the chosen rows, ascending and, as `without_image`, counted through all sub-sets;
            `text` and `sample_rows` count through them.
    """
    ends = np.searchsorted(rows, np.cumsum([subset.num_rows for subset in subsets]))
    starts = np.concatenate([[0], ends[:-1]])
    has_no_turns = text.counts[:, 0] == 0
    has_no_turns[text.bad_rows] = False
    has_no_image = np.isin(rows, without_image)
    num_samples = np.bincount(sample_rows, minlength=len(rows))
    result = {}
    for subset, start, end in zip(subsets, starts.tolist(), ends.tolist(), strict=True):
        turns, over_long, incomplete = text.counts[start:end].sum(axis=0).tolist()
        result[subset.name] = {
            "rows": end - start,
            "rows_without_turns": int(has_no_turns[start:end].sum()),
            "rows_without_image": int(has_no_image[start:end].sum()),
            "turns": turns,
            "over_long_turns": over_long,
            "incomplete_turns": incomplete,
            "samples": int(num_samples[start:end].sum()),
        }
    return result
