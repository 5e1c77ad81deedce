"""Protobuf messages of the Tinker wire, built at import from a table of field numbers.

The private package name keeps these descriptors apart from those that the Tinker SDK registers in
the same process; only field numbers and types matter on the wire.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "openmint_wire"

ENUMS: dict[str, tuple[str, ...]] = {
    "StopReason": ("STOP", "LENGTH"),
    "DType": ("UNSPECIFIED", "FLOAT32", "INT64", "INT32", "BFLOAT16"),
}

# Fields apart by `/` or newline: number, name, type. `*` repeats; `?` has presence; `|name` is a
# branch of the oneof `name`; `map<T>` is a map from string to T.
MESSAGES: dict[str, str] = {
    "ForwardBackwardRequest": """
        1 model_id string / 2 seq_id int32 / 3 data Datum* / 4 loss_fn string
        5 loss_fn_config map<double> / 6 forward_only bool
        7 loss_fn_config_v2 map<LossConfigValue>""",
    "LossConfigValue": "1 number double |value / 2 text string |value",
    "Datum": """
        1 model_input Chunk* / 2 loss_fn_inputs map<Tensor>
        3 model_input_spans Opaque* / 4 loss_fn_input_spans Opaque*""",
    "Opaque": "",
    "Chunk": "1 encoded_text EncodedText |chunk / 2 image Opaque |chunk / 3 dmel Opaque |chunk",
    "EncodedText": "1 tokens bytes",
    "Tensor": """
        1 dense bytes |encoding / 2 sparse_csr SparseCsr |encoding
        3 dtype DType / 4 shape int64*""",
    "SparseCsr": "1 values bytes / 2 crow_indices bytes / 3 col_indices bytes",
    "ForwardBackwardOutput": """
        1 loss_fn_output_type string / 2 loss_fn_outputs ArrayRecord* / 3 metrics map<double>""",
    "ArrayRecord": "1 type_tag string / 2 fields map<BatchedTensor> / 3 num_datums int64",
    "BatchedTensor": """
        1 data bytes / 2 offsets bytes / 3 dtype DType / 4 trailing_shape int64*""",
    "SampleResponse": """
        1 sequences SampledSequence* / 2 prompt_logprobs bytes?
        3 topk_prompt_logprobs TopkLogprobs / 4 prompt_cache_hit_tokens int32
        5 target_prompt_logprobs Tensor / 6 prompt_alt_tokens PromptAltTokens""",
    "PromptAltTokens": "1 tokens Tensor / 2 logprobs Tensor",
    "SampledSequence": """
        1 stop_reason StopReason / 2 tokens bytes / 3 logprobs bytes?
        4 topk_sampled_logprobs TopkLogprobs""",
    "TopkLogprobs": "1 token_ids bytes / 2 logprobs bytes / 3 k uint32 / 4 length uint32",
}

SCALARS = {
    "string": 9,
    "bytes": 12,
    "double": 1,
    "int32": 5,
    "uint32": 13,
    "int64": 3,
    "bool": 8,
}
OPTIONAL, REPEATED, MESSAGE, ENUM = 1, 3, 11, 14


def _set_type(field: Any, name: str) -> None:
    if name in SCALARS:
        field.type = SCALARS[name]
        return
    field.type = ENUM if name in ENUMS else MESSAGE
    field.type_name = f".{PACKAGE}.{name}"


def _add_map(message: Any, field: Any, value_type: str) -> None:
    entry_name = "".join(part.capitalize() for part in field.name.split("_")) + "Entry"
    entry = message.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=OPTIONAL, type=SCALARS["string"])
    _set_type(entry.field.add(name="value", number=2, label=OPTIONAL), value_type)
    field.label, field.type = REPEATED, MESSAGE
    field.type_name = f".{PACKAGE}.{message.name}.{entry_name}"


def _add_field(message: Any, line: str, oneofs: dict[str, int]) -> None:
    number, name, kind, *oneof = line.split()
    field = message.field.add(name=name, number=int(number), label=OPTIONAL)
    if kind.startswith("map<"):
        _add_map(message, field, kind[4:-1])
        return
    _set_type(field, kind.rstrip("*?"))
    if kind.endswith("*"):
        field.label = REPEATED
    if kind.endswith("?"):
        field.proto3_optional = True
        oneof = [f"|_{name}"]
    if oneof:
        group = oneof[0][1:]
        if group not in oneofs:
            oneofs[group] = len(oneofs)
            message.oneof_decl.add(name=group)
        field.oneof_index = oneofs[group]


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="openmint_wire.proto", package=PACKAGE, syntax="proto3"
    )
    for enum_name, values in ENUMS.items():
        enum = file.enum_type.add(name=enum_name)
        for number, value in enumerate(values):
            enum.value.add(name=f"{enum_name}_{value}", number=number)
    for message_name, table in MESSAGES.items():
        message = file.message_type.add(name=message_name)
        oneofs: dict[str, int] = {}
        for line in filter(None, (part.strip() for part in table.replace("\n", "/").split("/"))):
            _add_field(message, line, oneofs)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    find = pool.FindMessageTypeByName
    return {name: message_factory.GetMessageClass(find(f"{PACKAGE}.{name}")) for name in MESSAGES}


_CLASSES = _build()
ForwardBackwardRequest: Any = _CLASSES["ForwardBackwardRequest"]
ForwardBackwardOutput: Any = _CLASSES["ForwardBackwardOutput"]
SampleResponse: Any = _CLASSES["SampleResponse"]
Tensor: Any = _CLASSES["Tensor"]

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
STOP, LENGTH = 0, 1
