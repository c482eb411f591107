"""Students cut from their teacher: some of its layers, its embeddings and its head."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from model.encoder import LengthAdaptiveModel


def cut_student(teacher: LengthAdaptiveModel, layers: Sequence[int]) -> LengthAdaptiveModel:
    """A network of the teacher's class and width that is made of copies of some of its layers.

    Embeddings and head are copies too, and so is what the config says of tokens' ranking, of windows and the rest.
    Encoders whose layers share weights share them in the student.

    Args:
        teacher: Where the weights come from; it does not change.
        layers: Which of its layers, from 0 and ascending; all of them give a copy of the teacher.
    Returns:
        The student, in the teacher's mode and on its device.
    Raises:
        ValueError: No layers, one that the teacher has not, an order that does not ascend, or a layer that the
            architecture has no place for.
    """
    chosen = [int(layer) for layer in layers]
    last = teacher.num_layers - 1
    if not chosen or chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] <= last:
        raise ValueError(f"layers={chosen}; choose one or more of the teacher's layers 0..{last}, ascending.")
    config = copy.deepcopy(teacher.network.config)
    per_count, rest = divmod(teacher.num_layers, config.num_hidden_layers)
    if rest or len(chosen) % per_count:
        raise ValueError(f"layers={chosen}; this encoder repeats {per_count} layers, choose a multiple of that.")
    config.num_hidden_layers = len(chosen) // per_count
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [kinds[layer] for layer in chosen]
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are all replaced
        network = type(teacher.network)(config)
    student = LengthAdaptiveModel(network, teacher.task)
    weights = teacher.network.state_dict()
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    for own, layer in enumerate(chosen):
        _copy_layer(teacher, layer, student, own)
    for own, layer in enumerate(chosen):
        if not _equal(_layer(teacher, layer), _layer(student, own)):
            raise ValueError(
                f"layers={chosen}; layer {own} of {len(chosen)} has to share weights with a layer that those of the "
                f"teacher's layer {layer} are not for; choose equally many of each group of layers that share."
            )
    student.to(teacher.device, next(teacher.parameters()).dtype)
    return student.train(teacher.training)


def _copy_layer(teacher: LengthAdaptiveModel, layer: int, student: LengthAdaptiveModel, own: int) -> None:
    try:
        _layer(student, own).load_state_dict(_layer(teacher, layer).state_dict())
    except RuntimeError as error:
        model_type = teacher.network.config.model_type
        raise ValueError(
            f"Layer {layer} of the teacher cannot be layer {own} of a {model_type} encoder, which is built otherwise "
            "there; keep layer 0 first."
        ) from error


def _layer(model: LengthAdaptiveModel, layer: int) -> Any:
    return model.family.layer(model.network, layer)


def _equal(left: Any, right: Any) -> bool:
    other = right.state_dict()
    return all(torch.equal(weight, other[name].to(weight)) for name, weight in left.state_dict().items())
