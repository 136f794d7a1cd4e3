from server.engine.wrapping import leaves, unwrapped

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def test_a_part_of_a_wrapped_packed_module_is_wrapped():
    adapted = ["layers.0.q_proj", "layers.0.v_proj", "layers.0.o_proj"]
    assert unwrapped(adapted, {"layers.0.qkv_proj", "layers.0.o_proj"}, PACKED) == []


def test_what_vllm_did_not_wrap_is_named():
    adapted = ["layers.0.q_proj", "layers.1.q_proj", "layers.0.fc", "head"]
    assert unwrapped(adapted, {"layers.0.qkv_proj"}, PACKED) == [
        "head",
        "layers.0.fc",
        "layers.1.q_proj",
    ]


def test_leaves_are_distinct():
    assert leaves(["layers.0.q_proj", "layers.1.q_proj", "fc"]) == ["fc", "q_proj"]
