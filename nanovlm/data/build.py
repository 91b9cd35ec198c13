"""Builds prepared data: text first, then the images of the rows whose text is used.

Any number of processes may want the same data: one builds, the others wait and read. A build that
was interrupted, or killed, continues after the parts that are done, and gives the same bytes.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from nanovlm.data.build_images import ImagesDone, ImageTask, write_images
from nanovlm.data.cache import ABOUT_FILE, MANIFEST_FILE, PreparedFolder
from nanovlm.data.rows import Chosen, Subsets, describe_location, divide, locate, num_rows
from nanovlm.data.text import (
    COUNTS,
    TILED_COUNTS,
    EncodedText,
    EncodeRows,
    ReadRows,
    encode_text,
    offsets_of,
    write_samples,
    write_tiles,
)
from nanovlm.errors import UserError
from nanovlm.files import remove_folder
from nanovlm.messages import BuildProgress

logger = logging.getLogger(__name__)

OnProgress = Callable[[BuildProgress], None]

BadRows = dict[int, tuple[str, str]]
"""Column and reason of each row that cannot be read, counted through all sub-sets."""

ROWS_PER_PART = 8192
"""Of the text."""
IMAGES_PER_PART = 128
_PARTS_VERSION = 3
"""Of the files of finished parts."""
_MAX_NAMED = 3


def log_progress(progress: BuildProgress) -> None:
    """Write progress to the log."""
    p = progress
    logger.info("preparing the %s: %s %d of %d", p.what, p.stage, p.done, p.total)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is to be built, and from what."""

    what: str
    """What the data is called in messages."""
    folder: PreparedFolder
    load: Callable[[], Subsets]
    """Finds the rows; called only if something has to be built."""
    order: Callable[[int], np.ndarray]
    """From the number of rows to the ones to use, int64[M], in the order of the result."""
    text_column: str
    read_text: ReadRows = Chosen.read
    encode: EncodeRows
    images: ImageTask
    max_bad_fraction: float
    """A build ends as soon as more than this share of its rows cannot be read."""
    is_tiled: bool = False
    """Whether a row is one sample with any number of images, each of which becomes several tiles;
    else all samples of a row share one image."""
    is_whole: bool = False
    """Whether nothing may be left out: then a row without an image cannot be read either."""
    items: Callable[[Subsets], Any] = lambda _: None
    """What else of the rows goes into the manifest; JSON. Asked first: it may refuse the rows."""

    def progress(
        self, stage: Literal["text", "images", "waiting"], done: int, total: int
    ) -> BuildProgress:
        return BuildProgress(what=self.what, stage=stage, done=done, total=total)

    def check_bad_rows(
        self, num_bad: int, num_usable: int, describe: Callable[[], Sequence[Mapping[str, Any]]]
    ) -> None:
        """Raise UserError if more than `max_bad_fraction` of the rows cannot be read.

        Args:
            num_usable: rows that are, or would be, used: with an image and a turn.
            describe: returns what `_describe` does.
        """
        if num_bad <= self.max_bad_fraction * num_usable:
            return
        bad = describe()
        named = "; ".join(
            f"{describe_location(row)}, {row['column']}: {row['reason']}"
            for row in bad[:_MAX_NAMED]
        )
        more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
        by_subset = sorted(Counter(row["subset"] for row in bad).items())
        where = ", ".join(f"{name}: {number}" for name, number in by_subset)
        raise UserError(
            f"{self.what}: at least {len(bad)} of {num_usable} rows cannot be read ({where}), more "
            f"than max_bad_fraction={self.max_bad_fraction:g} allows: {named}{more}"
        )


def build(recipe: Recipe, on_progress: OnProgress) -> dict[str, Any]:
    """Build what is not there yet; return the manifest once all of it is.

    Raises:
        UserError: rows are missing or cannot be read, the disk is too full, or too many images are
            unreadable. What is done stays done.
    """
    folder = recipe.folder
    try:
        if not folder.is_complete:
            with folder.locked(lambda: on_progress(recipe.progress("waiting", 0, 1))):
                if not folder.is_complete:  # by the one that we have waited for
                    _build(recipe, recipe.load(), on_progress)
    except OSError as error:
        raise UserError(
            f"preparing the {recipe.what} in {folder.path} (HF_ASSETS_CACHE puts it elsewhere): "
            f"{error}; started again, the work continues after what is done"
        ) from error
    return folder.manifest()


def _build(recipe: Recipe, subsets: Subsets, on_progress: OnProgress) -> None:
    folder = recipe.folder
    total = sum(map(num_rows, subsets.values()))
    if not total:
        raise UserError(f"{recipe.what}: {', '.join(subsets)} has no rows")
    items = recipe.items(subsets)
    # Parts of another size, by another version of this program, must not be taken for these.
    parts = folder.path / f"parts-{ROWS_PER_PART}-{IMAGES_PER_PART}-{_PARTS_VERSION}"
    parts.mkdir(parents=True, exist_ok=True)
    folder.write_json(ABOUT_FILE, folder.about)
    order = recipe.order(total)
    rows = np.sort(order)  # from here on rows are in the order of the files
    text = encode_text(
        divide(subsets, rows, ROWS_PER_PART),
        recipe.text_column,
        recipe.read_text,
        recipe.encode,
        parts,
        lambda done: on_progress(recipe.progress("text", done, len(rows))),
    )
    layout = _Layout.of(text, recipe.is_tiled)
    bad_columns = np.where(text.bad_columns == "", recipe.text_column, text.bad_columns)
    what_is_bad = zip(bad_columns.tolist(), text.reasons.tolist(), strict=True)
    bad = dict(zip(rows[text.bad_rows].tolist(), what_is_bad, strict=True))
    images = _build_images(recipe, subsets, rows, layout, bad, parts, on_progress)
    without_image = rows[layout.rows][images.without_image]
    position = np.argsort(order)  # of each row in the result
    samples = np.flatnonzero(~np.isin(rows[text.rows], [*bad, *without_image]))
    samples = samples[np.argsort(position[text.rows[samples]], kind="stable")]
    sample_rows = text.rows[samples]
    write_samples(folder, text, samples)
    if recipe.is_tiled:
        write_tiles(folder, text, samples)
    else:
        folder.write_array("image_index", np.searchsorted(layout.rows, sample_rows))
    folder.write_array("places", position[sample_rows])
    counts = TILED_COUNTS if recipe.is_tiled else COUNTS
    folder.write_json(
        MANIFEST_FILE,
        {
            "rows": len(rows),
            **layout.described(),
            "samples": len(samples),
            "multi_image_rows": images.num_multi_image_rows,
            "subsets": _count_by_subset(subsets, rows, text, counts, without_image, sample_rows),
            "usable_rows": layout.num_used + len(text.bad_rows) - len(without_image),
            "bad_rows": _describe(subsets, bad),
            "items": items,
        },
    )
    for left in folder.path.glob("parts-*"):
        remove_folder(left)


@dataclass(frozen=True)
class _Layout:
    """Where the images of the rows lie in their file."""

    num_used: int
    """Rows that have a sample."""
    rows: np.ndarray
    """int64[I], those whose images are wanted, counted through the chosen rows."""
    starts: np.ndarray
    """int64[I + 1], where what their images become starts, and the end of all."""
    image_tiles: np.ndarray | None
    """int32[all images], the tiles of each; None where an image is one square."""

    @classmethod
    def of(cls, text: EncodedText, is_tiled: bool) -> Self:
        used = np.unique(text.rows)
        if not is_tiled:
            return cls(len(used), used, np.arange(len(used) + 1), None)
        has_tiles = text.num_tiles > 0
        starts = offsets_of(text.num_tiles[has_tiles])
        return cls(len(used), text.rows[has_tiles], starts, text.image_tiles)

    def described(self) -> dict[str, int | float]:
        """Return what of it goes into the manifest."""
        tiles = self.image_tiles
        if tiles is None:
            return {"images": len(self.rows)}
        median = float(np.median(tiles)) if len(tiles) else 0.0
        return {"images": len(tiles), "tiles": int(tiles.sum()), "median_tiles": median}


def _build_images(
    recipe: Recipe,
    subsets: Subsets,
    chosen: np.ndarray,
    layout: _Layout,
    bad: BadRows,
    parts: Path,
    on_progress: OnProgress,
) -> ImagesDone:
    """Write the images that `layout` asks for; return what was found, by the position in its rows.

    Args:
        chosen: the chosen rows, counted through all sub-sets.
        bad: rows whose text cannot be read; those whose image cannot be read are added.
    """
    found, task, rows = ImagesDone(), recipe.images, chosen[layout.rows]
    num_rows_with_text = layout.num_used + len(bad)

    def check() -> None:
        num_usable = num_rows_with_text - len(found.without_image)
        recipe.check_bad_rows(len(bad), num_usable, lambda: _describe(subsets, bad))

    check()
    _check_disk(recipe, int(layout.starts[-1]) * task.image_bytes)
    divided = divide(subsets, rows, IMAGES_PER_PART)
    with closing(write_images(divided, layout.starts, task, parts)) as done:
        for part in done:
            if recipe.is_whole:
                part.unreadable |= dict.fromkeys(part.without_image, "no image")
                part.without_image = []
            found.add(part)
            bad |= {int(rows[i]): (task.column, why) for i, why in part.unreadable.items()}
            on_progress(recipe.progress("images", found.num_images, len(rows)))
            check()
    return found


def _describe(subsets: Subsets, bad: BadRows) -> list[dict[str, Any]]:
    """Return `subset, file, row, column, reason` of rows that cannot be read; JSON."""
    return [
        locate(subsets, row) | {"column": column, "reason": reason}
        for row, (column, reason) in sorted(bad.items())
    ]


def _check_disk(recipe: Recipe, num_bytes: int) -> None:
    file = recipe.images.file
    folder = file.parent
    written = file.stat().st_blocks * 512 if file.exists() else 0
    free = shutil.disk_usage(folder).free
    if num_bytes - written > free:
        raise UserError(
            f"{recipe.what}: its images take {num_bytes / 1e9:.3g} GB in {folder.parent}, where "
            f"{free / 1e9:.3g} GB are free; HF_ASSETS_CACHE=FOLDER puts prepared data elsewhere, "
            "`python -m nanovlm data list` shows what can go, and a smaller "
            "data_cutoff_idx needs less"
        )


def _count_by_subset(
    subsets: Subsets,
    rows: np.ndarray,
    text: EncodedText,
    counts: Sequence[str],
    without_image: np.ndarray,
    sample_rows: np.ndarray,
) -> dict[str, dict[str, int]]:
    """Return of each sub-set the chosen rows, their turns and samples, and what was left out.

    Args:
        rows: the chosen rows, ascending and, as `without_image`, counted through all sub-sets;
            `text` and `sample_rows` count through them.
    """
    ends = np.searchsorted(rows, np.cumsum([num_rows(groups) for groups in subsets.values()]))
    starts = [0, *ends[:-1].tolist()]
    has_no_turns = text.counts[:, 0] == 0
    has_no_turns[text.bad_rows] = False
    has_no_image = np.isin(rows, without_image)
    num_samples = np.bincount(sample_rows, minlength=len(rows))
    result = {}
    for name, start, end in zip(subsets, starts, ends.tolist(), strict=True):
        summed = text.counts[start:end].sum(axis=0).tolist()
        result[name] = {
            "rows": end - start,
            "rows_without_turns": int(has_no_turns[start:end].sum()),
            "rows_without_image": int(has_no_image[start:end].sum()),
            **dict(zip(counts, summed, strict=False)),
            "samples": int(num_samples[start:end].sum()),
        }
    return result
