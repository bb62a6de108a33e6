"""A model's address range on the card, and whether a weight's place in it is backed by memory ("faulted in").

A fault gives a signature that stays the same until memory is freed, so core knows a weight is still there; or None if
there is no room: never, or always once a test has set FULL. Freeing any amount drops the whole model. Not shown: room
for a part of a model, which model gives way to which, pins against it, and use of a weight after its memory went.
"""

FULL = False
refused = 0  # faults that found no room


class ModelVBAR:
    def __init__(self, size, device):
        self.max_size, self.device, self.offset = size, device, 0
        self.generation = 0  # how often its memory was freed
        self.backed = {}  # (offset, bytes) -> the bytes

    def prioritize(self):
        pass

    def alloc(self, num_bytes):
        start = (self.offset + 511) & ~511
        if start + num_bytes > self.max_size:
            raise MemoryError("comfy_aimdo stand-in: the model's address range is used up")
        self.offset = start + num_bytes
        return self, start, num_bytes

    def loaded_size(self):
        return sum(num_bytes for _, num_bytes in self.backed)

    def free_memory(self, size_bytes):
        freed = self.loaded_size()
        self.backed.clear()
        self.generation += 1
        return freed


def vbar_fault(alloc):
    global refused
    vbar, start, _ = alloc
    refused += FULL
    return None if FULL else (vbar.generation, start)


def vbar_signature_compare(a, b):
    return a is not None and a == b


def vbar_unpin(alloc):
    pass


def vbars_analyze(device=None):
    """Bytes the library could free for others: not counted."""
    return 0


def vbars_reset_watermark_limits():
    pass
