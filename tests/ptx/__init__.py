"""PTX run on a CPU: what a kernel compiles to for a GPU, instruction by instruction, on the memory of CPU tensors.

Triton's interpreter runs a kernel's source, one program after the other. Here the compiled code runs, with its layouts,
shuffles, shared memory, barriers and atomics, warps in any order, and what a GPU leaves undefined or lets pass is a
`Fault`: memory outside the arguments, accesses that are not aligned, shared memory and registers read before they are
written, races of warps between two barriers and of programs in a launch, barriers and shuffles that not all threads
reach. It says nothing about time, and ptxas, which makes machine code of PTX, is not part of it.

`program` reads PTX, `instructions` says what each one does, `arithmetic` the numbers that numpy has no function for,
`memory` holds and checks accesses, `machine` runs threads, `launch` puts it in the place of a GPU.
"""
