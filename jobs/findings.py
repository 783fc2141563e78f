"""What is wrong with a labelled set, as findings: from its listing, from the looks, and from looks side by side."""

from collections import Counter
from collections.abc import Sequence
from itertools import permutations, product
from typing import NamedTuple

from jobs.contract import Finding, InspectConfig, Severity
from jobs.labelled import Listed, Sample
from jobs.looks import Look
from jobs.neighbours import find_neighbours

NUM_IDS = 5


class Kind(NamedTuple):
    """A kind of finding: how bad it is, what it is, and what to do."""

    severity: Severity
    what: str
    advice: str


SCORES = "scores on one would be flattered by training on the other"

KINDS: dict[str, Kind] = {
    "image_without_mask": Kind("error", "images without a mask", "add the masks, or take the images out"),
    "image_without_file": Kind("error", "images without a file", "add the files, or take the images out of the JSON"),
    "image_without_row": Kind(
        "error", "images without a split", "name it in splits.csv, the key of the JSON or the column"
    ),
    "row_without_image": Kind("error", "rows of splits.csv without an image", "add the images, or take the rows out"),
    "mask_without_image": Kind("warning", "masks without an image", "add the images, or take the masks out"),
    "undecodable_image": Kind("error", "images that cannot be decoded", "replace them, or take them out"),
    "undecodable_mask": Kind("error", "masks that cannot be decoded", "replace them, or take their images out"),
    "unlabelled_mask": Kind("error", "masks without a labelled pixel", "take their images out"),
    "size_mismatch": Kind("error", "masks of another size than their image", "export them again at the image's size"),
    "wrong_class": Kind(
        "error", "masks with values that are no class", "set num_classes or ignore_index, or mend them"
    ),
    "odd_values": Kind(
        "warning",
        "masks with other values than 0 and 1 or 255: all become foreground",
        "where they are classes set num_classes; where masks were scaled, do it without interpolation",
    ),
    "full_mask": Kind("warning", "masks of one class alone, without background", "see whether they are inverted"),
    "empty_mask": Kind("note", "masks with background alone", "right where there is nothing; else label them"),
    "narrow_range": Kind(
        "warning",
        "images that use less than 5 % of the value range",
        "set model.value_range (here value_range) to what the camera gives, or model.gamma",
    ),
    "beyond_range": Kind(
        "warning",
        "images with values outside of the value range, or none",
        "set model.value_range (here value_range) to what the files hold",
    ),
    "mixed_pixel_types": Kind("note", "images of other pixel types than most", "see that their values mean the same"),
    "duplicate_across_splits": Kind(
        "warning", f"images that are the same in two splits: {SCORES}", "keep one of them, or put both into one split"
    ),
    "duplicate_in_split": Kind("note", "images that are the same within a split", "keep one of them"),
    "group_across_splits": Kind(
        "warning", f"groups with images in two splits: {SCORES}", "put all of a group into one split"
    ),
    "neighbours_across_splits": Kind(
        "warning",
        f"images whose borders go on in an image of another split, crops of one field: {SCORES}",
        "put all crops of a field into one split; --split-column tries another column",
    ),
}
"""Every kind of finding by its code, in the order in which they are told."""


class Findings(NamedTuple):
    """All findings, the worst first, and the codes of each image by its position."""

    findings: tuple[Finding, ...]
    codes: list[list[str]]


def find_all(listed: Listed, looks: Sequence[Look], config: InspectConfig) -> Findings:
    """Everything that is wrong with a set, or odd."""
    codes = [list(look.faults) for look in looks]
    found: dict[str, tuple[int, list[str], str]] = {
        problem.code: (len(problem.ids), list(problem.ids), "") for problem in listed.problems
    }
    for code in KINDS:
        concerned = [look.sample.id for look in looks if code in look.faults]
        if concerned:
            first = next(look.faults[code] for look in looks if code in look.faults)
            found[code] = (len(concerned), concerned, f"of the first: {first}")
    for code, several in (
        ("mixed_pixel_types", _of_other_types(looks)),
        ("duplicate_across_splits", _duplicates(looks, config, across=True)),
        ("duplicate_in_split", _duplicates(looks, config, across=False)),
        ("neighbours_across_splits", _neighbours(looks, config)),
    ):
        if several:
            names = [" + ".join(looks[position].sample.id for position in some) for some in several]
            concerned_positions = {position for some in several for position in some}
            for position in concerned_positions:
                codes[position].append(code)
            found[code] = (len(concerned_positions), names, _by_splits(looks, several))
    shared = _shared_groups(looks, config)
    if shared:
        found["group_across_splits"] = (len(shared), shared, "")
    order: list[Severity] = ["error", "warning", "note"]
    findings = [_finding(code, *found[code]) for code in KINDS if code in found]
    return Findings(tuple(sorted(findings, key=lambda finding: order.index(finding.severity))), codes)


def _finding(code: str, count: int, ids: Sequence[str], detail: str) -> Finding:
    kind = KINDS[code]
    what = kind.what + (f" ({detail})" if detail else "")
    return Finding(
        code=code, severity=kind.severity, count=count, ids=tuple(ids[:NUM_IDS]), what=what, advice=kind.advice
    )


def _of_other_types(looks: Sequence[Look]) -> list[tuple[int, ...]]:
    counts = Counter(look.pixel_type for look in looks if look.is_image)
    most = max(counts, key=lambda kind: counts[kind], default="")
    return [(position,) for position, look in enumerate(looks) if look.is_image and look.pixel_type != most]


def _by_picture(looks: Sequence[Look]) -> list[list[int]]:
    """Positions of the images with equal pixels, for every picture."""
    pictures: dict[bytes, list[int]] = {}
    for position, look in enumerate(looks):
        if look.is_image:
            pictures.setdefault(look.digest, []).append(position)
    return list(pictures.values())


def _duplicates(looks: Sequence[Look], config: InspectConfig, *, across: bool) -> list[tuple[int, ...]]:
    """Images with equal pixels, the positions of one picture together: those in several splits, or those in one."""
    several = []
    for positions in _by_picture(looks):
        compared = [position for position in positions if looks[position].sample.split not in config.leave_out]
        is_across = len({looks[position].sample.split for position in compared}) > 1
        if len(positions) > 1 and is_across is across:
            several.append(tuple(compared if across else positions))
    return several


def _neighbours(looks: Sequence[Look], config: InspectConfig) -> list[tuple[int, ...]]:
    """Pairs of images of different splits that lie side by side."""
    pictures = _by_picture(looks)  # each once: a border with two best matches would have none
    return sorted(
        pair
        for one, other in find_neighbours([looks[positions[0]].borders for positions in pictures])
        for pair in product(pictures[one], pictures[other])
        if _are_apart(looks[pair[0]].sample, looks[pair[1]].sample, config)
    )


def _are_apart(one: Sample, other: Sample, config: InspectConfig) -> bool:
    """Whether two samples are in two splits that must not know of each other."""
    return one.split != other.split and not {one.split, other.split} & set(config.leave_out)


def _shared_groups(looks: Sequence[Look], config: InspectConfig) -> list[str]:
    """The values of the column `group` that are in several splits."""
    splits: dict[str, set[str]] = {}
    for look in looks:
        group, split = look.sample.groups.get("group", ""), look.sample.split
        if group and split not in config.leave_out:
            splits.setdefault(group, set()).add(split)
    return sorted(group for group, several in splits.items() if len(several) > 1)


def _by_splits(looks: Sequence[Look], several: Sequence[tuple[int, ...]]) -> str:
    """`12 of test with 20 of train`: images of one split that have a fellow in another, for every two splits."""
    fellows: dict[tuple[str, str], set[int]] = {}
    for some in several:
        for one, other in permutations(some, 2):
            fellows.setdefault((looks[one].sample.split, looks[other].sample.split), set()).add(one)
    told = []
    for fewer, more in sorted(fellows):
        here, there = len(fellows[fewer, more]), len(fellows[more, fewer])
        if fewer != more and (here, fewer) < (there, more):
            told.append(f"{here} of {fewer} with {there} of {more}")
    return ", ".join(told)
