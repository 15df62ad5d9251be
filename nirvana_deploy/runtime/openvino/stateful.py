"""A decoder whose KV cache OpenVINO keeps itself, as states of the model.

OpenVINO's CPU joins cache and attention into one operator, which copies no cache, where it finds
ReadValue, Gather by ``beam_idx``, Concat and, for heads that share keys, Unsqueeze, Broadcast and Reshape
before ScaledDotProductAttention (its StatefulSDPAFusion). openvino-genai takes models of this form alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nirvana_deploy.runtime.openvino.installed import openvino_module

BEAMS = "beam_idx"
"""Input [N], int32: which sequence of the batch before each sequence continues."""
_PAST, _PRESENT = "past_key_values.", "present."


def keep_cache_inside(model: Any) -> None:
    """Turn past and present keys and values of ``model`` into its states; changes it.

    Left are the inputs of tokens with BEAMS, and ``logits`` in float32. In a new request a state is empty,
    for any number of sequences.
    """
    ops = openvino_module().opset13
    transformations = openvino_module("openvino._offline_transformations")
    pasts = [tensor for tensor in model.inputs if tensor.any_name.startswith(_PAST)]
    _pick_beams(model, ops, pasts)
    _ease_attention(model, ops)
    _logits_in_float32(model, ops)
    names = {past.any_name: past.any_name.replace(_PAST, _PRESENT, 1) for past in pasts}
    transformations.apply_make_stateful_transformation(model, names)
    _begin_empty(model, ops)
    model.validate_nodes_and_infer_types()


def _pick_beams(model: Any, ops: Any, pasts: list[Any]) -> None:
    """Read every past through a Gather along the batch."""
    beams = ops.parameter([-1], np.int32, name=BEAMS)
    beams.output(0).set_names({BEAMS})
    model.add_parameters([beams])
    for past in pasts:
        readers = past.get_target_inputs()
        picked = ops.gather(past, beams, ops.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(picked.output(0))


def _ease_attention(model: Any, ops: Any) -> None:
    """Repeat keys and values in the form that the fusion knows; drop the guard against rows without keys.

    In graphs of this package each query sees itself at least.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Tile" and node.input_value(0).get_node().get_type_name() == "Unsqueeze":
            times = node.input_value(1).get_node().get_data().astype(np.int64)
            wide = ops.broadcast(node.input_value(0), ops.constant(times), broadcast_spec="BIDIRECTIONAL")
            node.output(0).replace(wide.output(0))
        elif node.get_type_name() == "Select":
            attended = node.input_value(2)
            if attended.get_node().get_type_name() == "ScaledDotProductAttention":
                node.output(0).replace(attended)


def _logits_in_float32(model: Any, ops: Any) -> None:
    result = model.output("logits").get_node()
    source = result.input_value(0)
    if source.get_element_type().to_dtype() == np.float32:
        return
    names = source.get_names()
    source.set_names(set())
    wide = ops.convert(source, "f32")
    wide.output(0).set_names(names)
    result.input(0).replace_source_output(wide.output(0))


def _begin_empty(model: Any, ops: Any) -> None:
    """Let every state begin with no slots, for as many sequences as there are tokens' rows."""
    shape = ops.shape_of(model.input("input_ids"))
    zero = ops.constant(np.int64(0))
    sequences = ops.gather(shape, ops.constant(np.array([0], np.int64)), zero)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ReadValue":
            _, K, _, d = node.get_output_partial_shape(0)
            rest = ops.constant(np.array([K.get_length(), 0, d.get_length()], np.int64))
            nothing = ops.constant(0, dtype=node.get_output_element_type(0))
            node.set_arguments([ops.broadcast(nothing, ops.concat([sequences, rest], 0))])
