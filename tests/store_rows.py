"""Rows whose every value follows from their number, so that any reader can tell a right row from a wrong one."""

import numpy as np

VIEWS = {"rgb": 16, "flow": 8}
COLUMNS = {"label": "str", "batch": "int", "size": "int"}


def features(view, rows):
    """Unit-free, never zero, exact in float32."""
    rows = np.asarray(rows, np.int64)[:, None]
    factor = {"rgb": 31, "flow": 17}[view]
    return ((rows * factor + np.arange(VIEWS[view])) % 8191 + 1).astype(np.float32)


def batch(number, first, size):
    """Arguments of an append: batch `number` of rows first .. first + size; every third lacks flow."""
    rows = np.arange(first, first + size)
    views = {view: features(view, rows) for view in VIEWS if view == "rgb" or number % 3}
    return {
        "views": views,
        "clip_id": rows,
        "video_id": rows // 3,
        "start": rows * 0.5,
        "end": rows * 0.5 + 1,
        "label": [f"label {row % 5}" for row in rows],
        "batch": np.full(size, number),
        "size": np.full(size, size),
    }


def later(number, first, size):
    """The clips of a batch without flow that a fill brings it to."""
    return np.arange(first, first + size)[::2] if number % 3 == 0 else np.empty(0, np.int64)


def wrong_rows(arrays, first=0):
    """What is wrong with rows `first` and up of arrays by name, as a list of words; nothing is if it is empty."""
    found = []
    count = len(arrays["clip_id"])
    rows = np.arange(first, first + count)
    want = {"clip_id": rows, "video_id": rows // 3, "start": rows * 0.5, "end": rows * 0.5 + 1}
    if "rgb" in arrays:
        want["rgb"] = features("rgb", rows)
    for name, values in want.items():
        if not np.array_equal(arrays[name], values):
            bad = np.flatnonzero(np.any(np.atleast_2d((arrays[name] != values).T), axis=0))
            found.append(f"{name}: {len(bad)} of {count} rows from {bad[:1] + first}")
    return found
