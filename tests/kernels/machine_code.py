"""Look for two faults in sm_90 machine code that tests on a GPU may miss.

Tensor cores that read registers which something else took over: the left operand of a product may be held in registers
for a whole loop. ptxas 12.8 and 13.0 were found to give such registers to another value inside the loop. In sound code
all definitions that reach an operand are of one kind.

Shared memory that is given back too early: a barrier says that a tile has been read, and the copy engine may overwrite
it, while a load from it is still under way. Neither the barrier nor the synchronisation of the warps before it waits
for loads; only an instruction that needs their result does. Loads can be late because stores to global memory are in
front of them in the queue. It made a few gradients in a thousand wrong at N = 128.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

REGISTER = re.compile(r"\bR(\d+)\b")
OPERAND = re.compile(r"HGMMA\S*\s+R\d+, R(\d+),")
LOADS = {"LDSM", "LDL"}
"""Kinds of definitions that may share an operand: a tile from shared memory, and the same spilled and brought back."""

NO_RESULT = ("ST", "BRA", "RED", "BAR", "SYNCS", "WARP", "EXIT", "NOP", "ISETP", "FSETP", "PLOP", "MEMBAR", "R2UR")


CONTROL = 41
"""Bit of the second word from which on it says what an instruction waits for."""
NO_SCOREBOARD = 7


class Instruction(NamedTuple):
    """One line of disassembly."""

    predicated: bool
    name: str
    writes: tuple[int, ...]
    text: str
    sets: int | None
    """Scoreboard that is taken until the result is there."""
    waits: int
    """Bits of the scoreboards that must be free before."""


def disassemble(cubin: bytes) -> str:
    """Machine code as text, by the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", "-hex", file.name], capture_output=True, text=True, check=True).stdout


def overwritten_operands(code: str) -> list[str]:
    """Products whose register operand is defined in more than one way.

    Parameters
    ----------
    code : str
        Output of :func:`disassemble`.

    Returns
    -------
    list of str
        One line a register: the product, the register and the kinds of its definitions.
    """
    instructions, before = _flow(code)
    found = []
    for index, instruction in enumerate(instructions):
        operand = OPERAND.search(instruction.text)
        if operand is None:
            continue
        for register in range(int(operand[1]), int(operand[1]) + 4):
            kinds = {instructions[j].name.partition(".")[0] for j in _reaching(instructions, before, index, register)}
            if len(kinds) > 1 and not kinds <= LOADS:
                found.append(f"{instruction.text}: R{register} from {', '.join(sorted(kinds))}")
    return found


def unfinished_loads(code: str) -> list[str]:
    """Arrivals at a barrier that loads from shared memory may outlast.

    Parameters
    ----------
    code : str
        Output of :func:`disassemble`.

    Returns
    -------
    list of str
        One line an arrival, with the scoreboards of the loads.
    """
    instructions, before = _flow(code)
    after: list[int] = [0] * len(instructions)
    changed = True
    while changed:
        changed = False
        for index, instruction in enumerate(instructions):
            pending = 0
            for j in before[index]:
                pending |= after[j]
            pending &= ~instruction.waits
            if instruction.name.startswith(("LDS.", "LDSM")) and instruction.sets is not None:
                pending |= 1 << instruction.sets
            changed |= pending != after[index]
            after[index] = pending
    arrivals = [index for index, x in enumerate(instructions) if x.name.startswith("SYNCS.ARRIVE")]
    return [f"{instructions[index].text}: scoreboards {after[index]:06b}" for index in arrivals if after[index]]


def arrivals(code: str) -> int:
    """How many arrivals at barriers there are."""
    return sum(instruction.name.startswith("SYNCS.ARRIVE") for instruction in _flow(code)[0])


def products_from_registers(code: str) -> int:
    """How many products have their left operand in registers."""
    return len(OPERAND.findall(code))


def _flow(code: str) -> tuple[list[Instruction], list[list[int]]]:
    """Instructions, and for each those that may run just before it."""
    instructions, labels, pending = [], {}, []
    lines = code.split("\n")
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if label := re.match(r"\.(L_x_\d+):", line):
            pending.append(label[1])
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/", line):
            labels |= dict.fromkeys(pending, len(instructions))
            pending = []
            text = match[2].rstrip(" ;")
            control = int(following.strip().strip("/* "), 16) >> CONTROL
            board = control >> 5 & 7
            sets = None if board == NO_SCOREBOARD else board
            name = text.split(" ", 1)[0]
            found = Instruction(match[1] is not None, name, _writes(text), text, sets, control >> 11 & 63)
            instructions.append(found)
    before: list[list[int]] = [[] for _ in instructions]
    for index, instruction in enumerate(instructions):
        target = re.search(r"`\(\.(L_x_\d+)\)", instruction.text)
        branch = instruction.name.startswith("BRA") and target is not None
        if branch:
            before[labels[target[1]]].append(index)
        always = not instruction.predicated and re.search(r"BRA\S*\s+!?U?P\d", instruction.text) is None
        leaves = (branch or instruction.name.startswith("EXIT")) and always
        if not leaves and index + 1 < len(instructions):
            before[index + 1].append(index)
    return instructions, before


def _writes(text: str) -> tuple[int, ...]:
    """Numbers of the general registers that an instruction writes."""
    name, _, arguments = text.partition(" ")
    if name.startswith(NO_RESULT):
        return ()
    first = re.sub(r"^(!?U?P[T\d]+,\s*)+", "", arguments).split(",", 1)[0]
    register = REGISTER.match(first.strip())
    if register is None:
        return ()
    width = 1
    if name.startswith("HGMMA"):
        width = int(re.search(r"64x(\d+)x", name)[1]) // 2
    elif ".128" in name or (name.startswith("LDSM") and ".4" in name):
        width = 4
    elif ".64" in name or "WIDE" in name or name.startswith("CS2R") or (name.startswith("LDSM") and ".2" in name):
        width = 2
    start = int(register[1])
    return tuple(range(start, start + width))


def _reaching(instructions: list[Instruction], before: list[list[int]], index: int, register: int) -> set[int]:
    """Definitions of a register that may reach an instruction."""
    seen: set[int] = set()
    found: set[int] = set()
    todo = list(before[index])
    while todo:
        j = todo.pop()
        if j in seen:
            continue
        seen.add(j)
        if register in instructions[j].writes:
            found.add(j)
            if not instructions[j].predicated:
                continue
        todo += before[j]
    return found
