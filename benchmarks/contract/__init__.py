"""The static performance contract: what the kernels cost, read off compiled code and counted launches, without a GPU.

`variants` lists ways to call the operations, `formulas` states their bytes; `entries` are the launches they make;
`compile` records launches and compiles them for sm_80 and sm_90; `read` takes bytes, widths, registers and instructions
out of the compiled code; `measure` does this for all of them, in a process of its own; `check` compares with the
recorded figures. `counts` counts launches and host syncs of a round. `controls` holds kernels that must fail.
`python -m benchmarks.contract` runs the check.
"""
