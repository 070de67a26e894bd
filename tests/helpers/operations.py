"""Count the operations that a function runs; on a GPU each would launch at least one kernel."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

_NO_KERNEL = ("aten::empty", "aten::new_empty", "aten::_unsafe_view")


class Operations(TorchDispatchMode):
    """Counts within its context every operation but views and allocations, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, returns = func._schema.name, func._schema.returns
        view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        if not view and not name.startswith(_NO_KERNEL):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return self.counts.total()


def operations(function):
    """How many operations a call of the function runs."""
    with Operations() as operations:
        function()
    return operations.total
