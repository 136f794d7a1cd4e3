"""What the server tells its worker inside vLLM, and which layers vLLM has to wrap for our adapters."""

from collections.abc import Collection, Iterable, Mapping

ADAPTED = "thumbloop_adapted_modules"
"""Key of vLLM's additional_config: names of all modules that an adapter may change."""
MERGED_BYTES = "thumbloop_merged_bytes"
"""Key of vLLM's additional_config: most bytes of weights that adapters are merged into."""
THREADS = "thumbloop_threads"
"""Key of vLLM's additional_config: CPU threads of the worker."""


def leaves(adapted: Iterable[str]) -> list[str]:
    """Return the distinct last parts of the modules' names: {"a.q_proj", "b.q_proj"} has one."""
    return sorted({name.rpartition(".")[2] for name in adapted})


def unwrapped(
    adapted: Iterable[str], wrapped: Collection[str], packed: Mapping[str, Collection[str]]
) -> list[str]:
    """Return the adapted modules that are neither wrapped nor part of a wrapped packed one.

    `packed` names the parts of each packed module: {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
    vLLM drops an adapter's part for a module it did not wrap, in silence.
    """
    whole_of = {part: whole for whole, parts in packed.items() for part in parts}

    def is_wrapped(name: str) -> bool:
        parent, dot, leaf = name.rpartition(".")
        return name in wrapped or f"{parent}{dot}{whole_of.get(leaf, leaf)}" in wrapped

    return sorted(name for name in adapted if not is_wrapped(name))
