"""How XLA compiles in tests: slower programs in a third of the time, or, where that matters, as users compile.

Nothing here may import jax, which reads its flags as it starts.
"""

import importlib.metadata

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
AS_USERS_DO = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
# The older emitters of XLA, which compile in half the time and make NaN of a float8_e4m3b11fnuz that rounds to -0.
# jax 0.12 has one kind only, and this can go when no older one is supported.
if importlib.metadata.version("jax").startswith(("0.8.", "0.9.", "0.10.")):
    QUICK["xla_cpu_use_fusion_emitters"] = False
    AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True


def as_flags(options: dict[str, object]) -> str:
    """For the environment variable XLA_FLAGS."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
