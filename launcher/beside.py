"""Blocking calls of Ray in a thread, so that signals reach the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_TICK_S = 0.5


def beside_main(function: Callable[[], Any], tick: Callable[[], None] = lambda: None) -> Any:  # noqa: ANN401
    """Call a function in a thread, and wait for its end.

    In a call of Ray in the main thread a signal's handler runs inside Ray's code, which drops what it raises, except
    for KeyboardInterrupt and SystemExit, and turns every exit code into 0 or 1.

    Args:
        function: Blocks in Ray.
        tick: Called about twice a second while it runs.

    Returns:
        What the function returns; what it raises is raised here.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread, which raises it
            failure.append(error)

    thread = threading.Thread(target=run, name="ray", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_TICK_S)
        tick()
    if failure:
        raise failure[0]
    return outcome[0]
