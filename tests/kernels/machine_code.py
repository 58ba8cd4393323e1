"""Look for a miscompilation in sm_90 machine code: tensor cores that read registers which something else took over.

The left operand of a product may be held in registers for a whole loop. ptxas 12.8 and 13.0 were found to give such
registers to another value inside the loop. In sound code all definitions that reach an operand are of one kind.
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


class Instruction(NamedTuple):
    """One line of disassembly."""

    predicated: bool
    name: str
    writes: tuple[int, ...]
    text: str


def disassemble(cubin: bytes) -> str:
    """Machine code as text, by the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


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


def products_from_registers(code: str) -> int:
    """How many products have their left operand in registers."""
    return len(OPERAND.findall(code))


def _flow(code: str) -> tuple[list[Instruction], list[list[int]]]:
    """Instructions, and for each those that may run just before it."""
    instructions, labels, pending = [], {}, []
    for line in code.split("\n"):
        if label := re.match(r"\.(L_x_\d+):", line):
            pending.append(label[1])
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;?\s*$", line):
            labels |= dict.fromkeys(pending, len(instructions))
            pending = []
            text = match[2].rstrip(" ;")
            instructions.append(Instruction(match[1] is not None, text.split(" ", 1)[0], _writes(text), text))
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
