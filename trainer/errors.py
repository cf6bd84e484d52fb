"""What the trainer raises: errors that its user can fix, and a stop that was requested."""


class TrainerError(Exception):
    """What is wrong (with the value and the limit) and the way out, in words a user can act on.

    Carries one string, so it survives pickling on its way from a worker to the launcher.
    """


class NotEnoughMemoryError(TrainerError):
    """A rank ran out of memory: another attempt with the same settings would too."""


class Preempted(Exception):  # noqa: N818 - nothing is wrong
    """The run was asked to stop; everything is saved, and it goes on where it was when it is started again.

    Carries one string, so it survives pickling on its way from a worker to the launcher.
    """
