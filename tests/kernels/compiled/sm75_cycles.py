"""Where a T4 spends its cycles in the main loop of a kernel, read off its machine code.

The machine code of a launch is decoded with its control codes: stall counts and barriers, the 21
bits at bit 105 of an instruction. For one turn of the loop and one block this gives the cycles that
each unit of an SM is taken, and a small simulation of one of its four sub-cores.

Rates are per SM and cycle: HMMA.1688 takes 8 cycles of a sub-core (ptxas itself stalls 8 after
each), FMA and integer instructions 2, MUFU 8; shared memory moves 64 bytes, L2 20; a load takes 250
cycles. The last three are from Jia et al. 2019 (arXiv 1903.07486). Nothing is calibrated, for no T4
has been at hand: compare tilings and see which unit is the busiest, but do not read microseconds as
measured. DRAM is not seen in the code; `layer` adds it from the bytes that each kernel moves.
"""

import collections
import re
from typing import NamedTuple

from compiled import aot

LATENCY = {"LDG": 250, "LDS": 19, "LDSM": 22, "STS": 19, "SHFL": 22, "MUFU": 18, "HMMA": 14}
SHARED, L2 = 64, 20  # bytes a cycle
SMS, FLOPS, DRAM = 40, 22e12, 220e9  # SMs; FLOP/s and bytes/s that a T4 reaches in practice
CLOCKS = (1.0e9, 1.6e9)  # under the card's limit of 70 W, and its boost


class Instruction(NamedTuple):
    """A machine instruction and its control code."""

    address: int
    text: str
    stall: int
    write: int  # barrier that it sets when its result is there; 7: none
    read: int  # barrier that it sets when its operands are read; 7: none
    wait: int  # barriers that it waits for, as bits

    @property
    def opcode(self):
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def unit(self):
        """The unit of a sub-core that executes it, and for how many cycles."""
        base = self.opcode.split(".")[0]
        if base == "HMMA":
            return "tensor", 8
        if base in ("MUFU", "I2F", "F2I", "POPC", "FLO"):
            return "mufu", 8
        if base in ("LDS", "LDSM", "STS", "LDG", "STG", "SHFL", "LDC"):
            return "memory", 2
        if base in ("FFMA", "FADD", "FMUL", "IMAD", "HADD2", "HMUL2", "HFMA2", "F2F", "FSETP"):
            return "fma", 2
        if base in ("BRA", "BAR", "EXIT", "BSYNC", "BSSY", "NOP") or base.startswith("U"):
            return "control", 1
        return "int", 2

    @property
    def moved(self):
        """Bytes that it moves for a warp: in shared memory, and to or from L2."""
        if self.opcode.startswith("LDSM"):
            return 128 * int(self.opcode.split(".")[-1]), 0
        if self.opcode.startswith("SHFL"):
            return 128, 0
        found = re.search(r"\.(?:U\.)?(\d+)(?:\.|$)", self.opcode)
        width = int(found[1]) // 8 if found else 4
        if self.opcode.startswith(("LDS", "STS")):
            return 32 * width, 0
        if self.opcode.startswith(("LDG", "STG")):
            return 0, 32 * (2 if "U16" in self.opcode else 1 if ".U8" in self.opcode else width)
        return 0, 0


def decode(compiled):
    """The instructions of a compiled kernel."""
    found, first = [], None
    for line in aot.dump(compiled, "-sass").splitlines():
        if match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x([0-9a-f]{16}) \*/", line):
            first = int(match[1], 16), match[2].strip(), int(match[3], 16)
        elif first and (match := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            c = ((int(match[1], 16) << 64 | first[2]) >> 105) & 0x1FFFFF
            control = c & 15, c >> 5 & 7, c >> 8 & 7, c >> 11 & 63
            found.append(Instruction(*first[:2], *control))
            first = None
    return found


def main_loop(code):
    """The loop with tensor-core instructions, the shortest of such."""
    loops = []
    for line in code:
        match = re.search(r"BRA(?:\.\w+)*\s+.*?0x([0-9a-f]+)", line.text)
        if match and int(match[1], 16) < line.address:
            loops.append([i for i in code if int(match[1], 16) <= i.address <= line.address])
    return min(loops, key=lambda body: (not any("MMA" in i.text for i in body), len(body)))


def taken(body, warps):
    """Cycles of an SM that each unit is taken in one turn of one block."""
    cycles = collections.Counter(issue=len(body) * warps / 4)
    for line in body:
        unit, own = line.unit
        cycles[unit] += own * warps / 4
        shared, far = line.moved
        cycles["shared"] += shared * warps / SHARED
        cycles["L2"] += far * warps / L2
    return {unit: round(cycles[unit]) for unit in ("tensor", "issue", "shared", "L2")}


def simulate(body, warps, turns=40):
    """Cycles a turn of `warps` warps on one sub-core; the one furthest behind goes first."""
    place, ready, done = [0] * warps, [0] * warps, [0] * warps
    barriers, free = [[0] * 6 for _ in range(warps)], collections.Counter()
    units, bytes_shared = [line.unit for line in body], [line.moved[0] for line in body]
    bases = [line.opcode.split(".")[0] for line in body]
    now, shared_free = 0, 0.0
    while min(done) < turns and now < 10**6:
        for w in sorted(range(warps), key=lambda w: (done[w], -place[w])):
            line, (unit, cycles), base = body[place[w]], units[place[w]], bases[place[w]]
            waits = any(line.wait >> k & 1 and barriers[w][k] > now for k in range(6))
            if done[w] >= turns or ready[w] > now or waits or free[unit] > now:
                continue
            free[unit] = now + cycles
            latency = LATENCY.get(base, 0)
            if moved := bytes_shared[place[w]]:
                shared_free = max(shared_free, now) + 4 * moved / SHARED
                latency = max(latency, shared_free - now + 12)
            for k in (line.write, line.read):
                if k < 6:
                    barriers[w][k] = max(barriers[w][k], now + latency)
            ready[w] = now + max(line.stall, 1) + (10 if base == "BAR" else 0)
            place[w] = (place[w] + 1) % len(body)
            done[w] += place[w] == 0
            break
        now += 1
    return now / turns


def layer(cycles, clock, chunks, M=4096, H=768, r=32, targets=2):
    """Microseconds of each part of a query, key and value layer on route "gemm", both directions.

    `cycles` are the cycles for one element of x of lora_down with the copy, lora_add for dx, and
    lora_outer for dA, which adds up `chunks` of rows. A kernel takes as long as its bytes in DRAM
    or its cycles, the longer of the two; vendor products run at the practical rate.
    """
    product = 2 * 2 * M * H * 3 * H / FLOPS  # forward, and dx
    element = M * H * 2 / DRAM  # to read or write one matrix of x's size
    down, add, outer = (targets * M * H * own / (SMS * clock) for own in cycles)
    parts = {
        "frozen product, forward and dx": product,
        "extended K": product * targets * r / H,
        "down-projection with the copy of x": max(2 * element, down),
        "dx": max(2 * element, add),
        "dA": max(element, outer),
        "the partial sums of dA, written and read": 2 * targets * chunks * r * H * 4 / DRAM,
        "dB": targets * element,
    }
    return {name: 1e6 * seconds for name, seconds in parts.items()}
