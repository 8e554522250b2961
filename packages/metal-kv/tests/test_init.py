import metal_kv


def test_every_exported_name_exists_once():
    assert len(metal_kv.__all__) == len(set(metal_kv.__all__))
    assert all(hasattr(metal_kv, name) for name in metal_kv.__all__)
