"""A bar in the console while the workers load a model.

Runs in: host process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

DELAY_S = 1.0
"""A load that is done sooner shows no bar."""


@contextmanager
def load_bar(num_ranks: int, device_word: str) -> Iterator[Callable[[int, float], None]]:
    """Show how far the slowest rank is.

    Yields:
        A function to be called with a rank and the part of its load that is done, 0 to 1.
    """
    from tqdm.auto import tqdm

    done = [0.0] * num_ranks
    with tqdm(
        total=100,
        desc=f"xDiT: loading on {num_ranks} {device_word}",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        delay=DELAY_S,
        leave=False,
    ) as bar:

        def update(rank: int, part: float) -> None:
            done[rank] = part
            bar.update(100 * min(done) - bar.n)

        yield update
