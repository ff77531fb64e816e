"""The public surface is what tests/surface.txt says: a change is seen, and then either undone or written down."""

import difflib

from surface import FILE, surface


def test_the_public_surface_is_the_recorded_one() -> None:
    changes = [
        line
        for line in difflib.unified_diff(FILE.read_text().splitlines(), surface().splitlines(), lineterm="", n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert not changes, (
        "the public surface changed; if that is meant, follow docs/plugins/versioning.md and run python tests/surface.py:\n"
        + "\n".join(changes)
    )
