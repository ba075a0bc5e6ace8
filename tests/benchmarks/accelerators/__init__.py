"""What an optimizer step with a clip compiles to on a GPU and a TPU that are not here.

Claim: on an H100 and on TPUs v5e and v6e, a clip by norm reads the gradients at most 0.1 times more than optax's. It
has no conditional, copies nothing between device and host, and takes no temporary memory of the gradients' size.

    pip install -e ".[aot-gpu]"     # in an environment of its own
    python -m tests.benchmarks.accelerators gpu
    python -m tests.benchmarks.accelerators gpu --tree gpt2 --dtype bfloat16 --clip clip_by_global_norm zclip
    python -m tests.benchmarks.accelerators gpu --check

    pip install -e ".[aot-tpu]"     # in another
    python -m tests.benchmarks.accelerators tpu --topology v6e:2x2
    python -m tests.benchmarks.accelerators tpu --sharded
    python -m tests.benchmarks.accelerators tpu --check

How it measures. XLA compiles `update` and `apply_updates` ahead of time, with parameters and optimizer state donated.
No device is needed and nothing runs. The optimised program is read instruction by instruction (`hlo`, `counts`).
Latency, overlap and the choice of the fastest variant of a kernel are in none of the figures.

| column | what it counts |
|---|---|
| reads | main memory read and written beyond Adam's 7, in multiples of the gradients |
| at worst | the same with the more expensive branch of every conditional; all other columns: the cheaper one |
| kernels | operations that run by themselves. On a TPU most are scalar |
| conditionals, loops | those that a step meets. A loop's body is counted once |
| host | transfers between device and host. On a GPU each conditional is one, and each loop of unknown length |
| collectives | those that communicate between devices |
| temporary | memory beside arguments and results, in multiples of the gradients |
| compile s | processor seconds from the lowered program to the compiled one |

`--check` fails if a transformation of `tests/table.py` does not compile, or if a step of `bounds.BOUNDED` exceeds its
bounds. `--sharded` prints the collectives on 2x2 devices, for each set of mesh axes.
"""
