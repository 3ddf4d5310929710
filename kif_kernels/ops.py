"""The operations as `torch.ops.kif.*`: schemas that say what is mutated, and one implementation a device.

With these, torch.compile and CUDA graphs see each operation as one opaque call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._ops import add_op_namespace_prefix, ops
from .backend import implementation

SCHEMAS = {
    "gradient_state_": "(Tensor grad, Tensor(a!) scale, Tensor(b!) skip, Tensor(c!) step, Tensor(d!) skipped, "
    "float max_norm, Tensor? inv_scale, Tensor(e!)? norm) -> ()",
    "importance_ema_": "(Tensor(a!) importance, Tensor weight, Tensor grad, float decay, bool reset, "
    "Tensor(b!)? uncertainty, float uncertainty_decay, Tensor? skip, Tensor(c!)? histogram, Tensor? window) -> ()",
    "adamw_importance_": "(Tensor(a!) weight, Tensor(b!) grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
    "Tensor(e!)? importance, Tensor(f!)? uncertainty, Tensor(g!)? snapshot_before, Tensor(h!)? snapshot_after, "
    "Tensor(i!)? shadow, Tensor(j!)? histogram, Tensor? window, float lr, Tensor? lr_tensor, float step, "
    "Tensor? step_tensor, float beta1, float beta2, float eps, float weight_decay, float decay, "
    "float uncertainty_decay, bool reset, bool after_update, bool zero_grad, Tensor? grad_scale, Tensor? inv_scale, "
    "Tensor? skip) -> ()",
    "histogram_": "(Tensor(a!) histogram, Tensor window, Tensor importance, Tensor? uncertainty) -> ()",
    "thresholds_": "(Tensor(a!) thresholds, Tensor(b!)? histograms, Tensor(c!)? state, Tensor ranks, Tensor limits, "
    "Tensor[] scores, Tensor[] factors, bool counted, int[] starts, int[] numels, Tensor? chunks) -> ()",
    "fuse_": "(Tensor(a!) theta, Tensor(b!) theta_start, Tensor theta_inner, Tensor importance_in, "
    "Tensor importance_out, Tensor? uncertainty_in, Tensor? uncertainty_out, Tensor threshold_in, "
    "Tensor threshold_out, float[] weights, bool strict, bool write_start, Tensor(c!)? shadow, Tensor(d!)? kept, "
    "int numel, int[] starts, int[] numels, Tensor? chunks) -> ()",
}

_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")


def _on_device(name: str) -> Callable[..., None]:
    arguments = getattr(ops, name).default._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]

    def run(*args: Any) -> None:
        # a parameter is written as the kernels write it, whatever the backend
        with torch.no_grad():
            getattr(implementation(args[0].device.type), name)(*args)
        # kernels write behind autograd's back: without this a graph made before would be run with the new values
        changed = [args[i] for i in written if args[i] is not None and not args[i].is_inference()]
        torch.autograd.graph.increment_version(changed)

    return run


def _fake(*args: Any) -> None:
    """No operation returns anything or changes a shape."""


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _on_device(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(_name), _fake, lib=_library)
