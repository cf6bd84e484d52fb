"""The scale of the loss in fp16, whose smallest numbers gradients would fall below (arXiv:1710.03740). Pure.

DeepSpeed (0.19.8) multiplies the loss by the scale, divides the gradients by it, and refuses a step whose gradients
overflow. It would also choose the scale; but when it doubles it, it does so between the two, and that step's gradient
comes out half as long. So the scale is chosen here and set before each step, as the learning rate is.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST = 1.0
"""An overflow at this scale is no matter of scaling: it is treated as any number that is not finite."""
STEPS_TO_DOUBLE = 1000
"""Steps without an overflow after which a larger scale is tried."""


@dataclass(frozen=True)
class LossScale:
    """The scale, and how it came to it.

    Attributes:
        value: What the loss is multiplied by; a power of 2, so that scaling rounds nothing.
        clean_steps: Steps taken since it last changed.
        num_overflows: Steps of the run that had to be taken again at a lower scale.
    """

    value: float
    clean_steps: int = 0
    num_overflows: int = 0

    def after_overflow(self) -> LossScale:
        """The scale that the same step is tried with again.

        >>> LossScale(4.0, clean_steps=7).after_overflow()
        LossScale(value=2.0, clean_steps=0, num_overflows=1)
        """
        return LossScale(max(SMALLEST, self.value / 2), 0, self.num_overflows + 1)

    def after_step(self) -> LossScale:
        """The scale of the next step.

        >>> LossScale(4.0, clean_steps=999).after_step()
        LossScale(value=8.0, clean_steps=0, num_overflows=0)
        """
        if self.clean_steps + 1 < STEPS_TO_DOUBLE:
            return LossScale(self.value, self.clean_steps + 1, self.num_overflows)
        return LossScale(self.value * 2, 0, self.num_overflows)
