"""Seeds and names: the same on every machine, and safe in files."""

from pipeline.identity import file_safe, seed_of

# The first eight bytes, little-endian, of sha256(b"7\0cat\x000").
SEED_BYTES = "8c6b873b860a5752"


def test_names_of_output_files_are_safe():
    assert file_safe("a/b c.ü-1=2_3") == "a_b_c__-1=2_3"


def test_seeds_are_those_of_the_key_on_every_machine():
    assert seed_of(7, "cat", 0) == int.from_bytes(bytes.fromhex(SEED_BYTES), "little")
    assert len({seed_of(seed, key, view) for seed in range(3) for key in ("a", "b", "a0") for view in range(3)}) == 27
    assert seed_of(0, "caf\udce9", 0) != seed_of(0, "caf\udce8", 0)
