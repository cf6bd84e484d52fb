"""What a DeepSpeed engine has learnt, by parameter name: master weights and Adam's moments.

DeepSpeed keeps the same numbers in four layouts: whole parameters (ZeRO 0), whole parameters with fp32 copies (ZeRO 0
in bf16), slices of one flat vector over all parameters (ZeRO 1 and 2), a slice of each parameter (ZeRO 3). A `Fragment`
says the same thing of all four: elements `start ... start + numel` of the flattened parameter `name` lie here, at
`offset` in the fp32 tensor that the optimizer updates. Fragments carry no trace of rank, world size or stage, so what
one layout wrote another can read.

Layouts were read from DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py,
runtime/fp16/unfused_optimizer.py, runtime/fp16/fused_optimizer.py, runtime/bf16_optimizer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer2State
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from trainer.errors import TrainerError
from trainer.stored import KINDS, Kind

# (kind, parameter name, first element, number of elements) -> these elements of the flattened parameter, fp32
Read = Callable[[Kind, str, int, int], torch.Tensor]


@dataclass(frozen=True)
class Fragment:
    """A run of elements of one parameter that this rank's optimizer holds.

    Attributes:
        name: The parameter, as `module.named_parameters()` calls it.
        start: First element, counted in the flattened parameter.
        numel: Number of elements.
        master: The fp32 tensor that the optimizer updates and under which it keeps its moments.
        offset: Where the run starts in the flattened `master`.
    """

    name: str
    start: int
    numel: int
    master: torch.Tensor
    offset: int


def trainable(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The parameters that are trained, by name, with the attributes ZeRO gave them; a tied one under its first name."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def shape_of(parameter: torch.nn.Parameter) -> list[int]:
    """The whole parameter's shape, also where ZeRO 3 has left only a slice of it here."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def is_replicated(engine: DeepSpeedEngine) -> bool:
    """Whether every rank holds the whole optimizer state (ZeRO 0)."""
    return not isinstance(engine.optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3 | BF16_Optimizer)


def fragments(engine: DeepSpeedEngine) -> list[Fragment]:
    """Where this rank's optimizer keeps what.

    Args:
        engine: A DeepSpeed engine with an Adam optimizer.

    Returns:
        Every run of elements that lies here; over all ranks they cover every trained parameter.

    Raises:
        TrainerError: The optimizer's state lies in a layout that is not known here.
    """
    optimizer = engine.optimizer
    parameters = trainable(engine)
    match optimizer:
        case DeepSpeedZeroOptimizer_Stage3():
            return list(_fragments_of_slices(optimizer, parameters))
        case DeepSpeedZeroOptimizer() | BF16_Optimizer():
            return list(_fragments_of_flat_slices(optimizer, parameters))
        case FP16_Optimizer():
            names = {id(parameter): name for name, parameter in parameters.items()}
            return list(_fragments_of_flat_groups(optimizer, names))
        case FP16_UnfusedOptimizer():
            masters = {
                id(low): high
                for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
                for low, high in zip(lows, highs, strict=True)
            }
            return [Fragment(name, 0, p.numel(), masters[id(p)], 0) for name, p in parameters.items()]
        case torch.optim.Optimizer():
            return [Fragment(name, 0, p.numel(), p, 0) for name, p in parameters.items()]
    raise TrainerError(f"checkpoints of the optimizer {type(optimizer).__name__} are not supported")


def _fragments_of_slices(optimizer: DeepSpeedZeroOptimizer_Stage3, parameters: dict[str, Any]) -> Iterator[Fragment]:
    """ZeRO 3: rank r has the r-th of equal slices of each parameter; the last one may run over its end."""
    for name, parameter in parameters.items():
        group, offset, slice_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = slice_numel * optimizer._get_param_partition_rank(parameter)
        numel = min(slice_numel, parameter.ds_numel - start)
        if numel > 0:
            yield Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def _fragments_of_flat_slices(
    optimizer: DeepSpeedZeroOptimizer | BF16_Optimizer, parameters: dict[str, Any]
) -> Iterator[Fragment]:
    """ZeRO 1 and 2: one flat vector of all parameters, of which rank r has the r-th of equal slices."""
    if isinstance(optimizer, BF16_Optimizer):
        masters = optimizer.fp32_groups_flat_partition
    else:
        masters = optimizer.single_partition_of_fp32_groups
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(name, here.start, here.numel, masters[mapping.param_group_index], there.start)


def _fragments_of_flat_groups(optimizer: FP16_Optimizer, names: dict[int, str]) -> Iterator[Fragment]:
    """ZeRO 0 in bf16 with a fused Adam: one flat fp32 vector of each parameter group, whole on every rank."""
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            yield Fragment(names[id(parameter)], 0, parameter.numel(), master, offset)
            offset += parameter.numel()


def by_master(engine: DeepSpeedEngine, here: list[Fragment]) -> Iterator[tuple[list[Fragment], bool]]:
    """The fragments of one master tensor after the other, with the tensor and its moments in memory.

    Where the optimizer is offloaded to NVMe, DeepSpeed holds them there; they are read before a tensor's turn and
    written after it, so that no more than one tensor's share is in memory.

    Args:
        engine: The engine.
        here: Its fragments.

    Yields:
        A tensor's fragments, and whether their views are only good until the next turn.
    """
    optimizer = engine.optimizer
    groups: dict[int, list[Fragment]] = {}
    for fragment in here:
        groups.setdefault(id(fragment.master), []).append(fragment)
    swapped = {}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        flat = enumerate(optimizer.fp32_partitioned_groups_flat)
        swapped = {id(master): n for n, master in flat if optimizer._swappable_optimizer_subgroup(n)}
    for master, fragments_of_it in groups.items():
        if master not in swapped:
            yield fragments_of_it, False
            continue
        optimizer._optimizer_states_and_gradient_swap_in(swapped[master])
        yield fragments_of_it, True
        optimizer._optimizer_states_and_gradient_swap_out(swapped[master])


def view(engine: DeepSpeedEngine, fragment: Fragment, kind: Kind) -> torch.Tensor:
    """The live numbers of a fragment: writing into the result changes the engine.

    Args:
        engine: The engine whose fragment it is.
        fragment: Which elements.
        kind: The master weight or one of Adam's moments; these must exist (see `num_optimizer_steps`).

    Returns:
        Flat view [numel], fp32.
    """
    source = fragment.master if kind == "weight" else engine.basic_optimizer.state[fragment.master][kind]
    return source.detach().view(-1).narrow(0, fragment.offset, fragment.numel)


def num_optimizer_steps(engine: DeepSpeedEngine) -> int:
    """Steps that Adam counts in its bias correction; 0 where it has made none and has no moments yet.

    Args:
        engine: The engine.

    Returns:
        The count. FusedAdam counts on the last of its tensors only, hence the largest.
    """
    states = engine.basic_optimizer.state.values()
    return max((int(state["step"]) for state in states if "exp_avg" in state or "state1" in state), default=0)


def has_own_moments(engine: DeepSpeedEngine) -> bool:
    """Whether the moments lie in bitsandbytes' blocks, which no other layout can take over; see `own_moments`."""
    return isinstance(engine.basic_optimizer, Optimizer2State)


def own_moments(engine: DeepSpeedEngine, here: list[Fragment]) -> dict[str, torch.Tensor]:
    """bitsandbytes' moments as they are: 8-bit numbers and the scales of their blocks, or fp32.

    A block of 256 numbers shares a scale, and the blocks follow each other in the tensor that this rank updates. So
    they are kept by tensor, and fit a run of the same layout alone.

    Args:
        engine: An engine with one of bitsandbytes' optimizers.
        here: Its fragments.

    Returns:
        `<number of the tensor>/<state1, state2, absmax1 or absmax2>` to live tensor; empty before the first step.
    """
    state = engine.basic_optimizer.state
    names = ("state1", "state2", "absmax1", "absmax2")
    return {
        f"{number}/{name}": state[master][name]
        for number, master in enumerate(_masters(here))
        for name in names
        if name in state[master]
    }


def load_own_moments(engine: DeepSpeedEngine, moments: dict[str, torch.Tensor], num_steps: int) -> None:
    """Give a fresh engine what `own_moments` returned for another of the same layout, after its weights are loaded.

    Args:
        engine: A fresh engine with the same optimizer, stage, world size and parameters.
        moments: By number of the tensor and name.
        num_steps: The optimizer's count of its steps.
    """
    optimizer = engine.basic_optimizer
    optimizer.state.clear()
    for number, master in enumerate(_masters(fragments(engine)) if num_steps else ()):
        state = {"step": num_steps}
        for name in ("state1", "state2"):
            stored = moments[f"{number}/{name}"]
            state[name] = optimizer.get_state_buffer(master, dtype=stored.dtype)  # paged, where the optimizer pages
            state[name].copy_(stored)
            if stored.dtype == torch.uint8:
                order = name[-1]
                optimizer.name2qmap |= {key: qmap.to(master.device) for key, qmap in optimizer.name2qmap.items()}
                state[f"absmax{order}"] = moments[f"{number}/absmax{order}"].to(master.device)
                state[f"qmap{order}"] = optimizer.name2qmap["dynamic" if order == "1" else "udynamic"]
        optimizer.state[master] = state


def _masters(here: list[Fragment]) -> list[torch.Tensor]:
    """The tensors that the optimizer updates, each once, in the order of the parameters."""
    return list({id(fragment.master): fragment.master for fragment in here}.values())


def prepare_moments(engine: DeepSpeedEngine, master: torch.Tensor, num_steps: int) -> None:
    """Give Adam the state that it would make itself in its first step, as after `num_steps` steps.

    Args:
        engine: A fresh engine.
        master: The tensor whose state it is.
        num_steps: Adam's own count of its steps; for 0 there is no state.
    """
    if num_steps == 0:
        return
    optimizer = engine.basic_optimizer
    step: int | torch.Tensor = num_steps
    if isinstance(optimizer, torch.optim.Adam):  # AdamW too; torch counts in a float tensor
        on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        step = torch.tensor(float(num_steps), device=master.device if on_device else "cpu")
    optimizer.state[master] = {
        "step": step,
        "exp_avg": torch.zeros_like(master, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
    }


def load(engine: DeepSpeedEngine, read: Read, num_steps: int) -> None:
    """Give a fresh engine the weights and moments of another, whatever its stage and world size; no communication.

    Streams one run of elements at a time: no rank ever holds more than one parameter beside its own share. Call
    `refresh` on every rank afterwards.

    Args:
        engine: A fresh engine over the same parameters.
        read: Where the elements come from.
        num_steps: Adam's own count of its steps; of bitsandbytes' moments only the weights are loaded here.
    """
    kinds = KINDS if num_steps and not has_own_moments(engine) else KINDS[:1]
    engine.basic_optimizer.state.clear()
    for of_one_master, _ in by_master(engine, fragments(engine)):
        prepare_moments(engine, of_one_master[0].master, num_steps if len(kinds) > 1 else 0)
        for fragment in of_one_master:
            for kind in kinds:
                view(engine, fragment, kind).copy_(read(kind, fragment.name, fragment.start, fragment.numel))
    if not isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        for name, parameter in trainable(engine).items():  # the forward pass's weights, rounded as a step rounds them
            parameter.data.copy_(read("weight", name, 0, parameter.numel()).view_as(parameter))


def refresh(engine: DeepSpeedEngine) -> None:
    """Bring ZeRO 3's weights of the forward pass up to its master weights; collective, and nothing to do elsewhere."""
    if not isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        return
    parameters = trainable(engine)
    engine.optimizer.checkpoint_event_prologue()  # whole parameters back to slices
    for of_one_master, _ in by_master(engine, fragments(engine)):
        for fragment in of_one_master:
            weight = view(engine, fragment, "weight")
            parameters[fragment.name].ds_tensor.data.view(-1).narrow(0, 0, fragment.numel).copy_(weight)
    engine.optimizer.checkpoint_event_epilogue()  # DeepSpeed keeps small parameters whole
