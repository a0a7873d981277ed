"""Interrupts at chosen instructions: what Ctrl-C does, at every moment at which it can come.

CPython serves signals when a Python function is entered, when a call has returned and at jumps back. A trace function
calls the handler of the signal at such a moment; the same program has the same moments every time.
"""

import dis
import signal
import sys
import threading
from pathlib import Path

import torch

import nngeometry

LIBRARY = str(Path(nngeometry.__file__).parent)
_TORCH = Path(torch.__file__).parent
#: Where something of the user's is swapped: the library, and what it uses to do so.
SWAPPING = (
    LIBRARY,
    str(Path(sys.modules["contextlib"].__file__)),
    str(Path(sys.modules["warnings"].__file__)),
    *(
        str(_TORCH / name)
        for name in (
            "nn/utils/stateless.py",
            "nn/utils/_named_member_accessor.py",
            "nn/attention",
            "_functorch",
            "func",
            "utils/hooks.py",
            "utils/_contextlib.py",
            "utils/_python_dispatch.py",
            "autograd/grad_mode.py",
            "overrides.py",
            "backends",
        )
    ),
)


def _servable(code):
    """The instructions of a function before which signals may have been served: after calls, and jumps back.

    A call serves them itself, inside of the blocks in which it is: what follows must be in the same ones.
    """
    found, before = set(), None
    for instruction in dis.get_instructions(code):
        called = before is not None and before.opname.startswith("CALL") and "INTRINSIC" not in before.opname
        called = called and _blocks(code, before.offset) == _blocks(code, instruction.offset)
        if called or instruction.opname.startswith("JUMP_BACKWARD"):
            found.add(instruction.offset)
        if instruction.opname not in ("CACHE", "NOP", "EXTENDED_ARG"):
            before = instruction
    return found


def _blocks(code, offset):
    """Where an exception at an instruction goes."""
    return [entry.target for entry in dis._parse_exception_table(code) if entry.start <= offset < entry.end]


class Tracer:
    """Runs programs, and notes or interrupts the moments inside of files that start with one of ``files``.

    A moment is (function, instruction, how often it was there before); instruction -1 is that of being entered.
    """

    def __init__(self, files=SWAPPING):
        self.files = files
        self._wanted = {}  # by code: None, or where signals can come
        self.seen = {}
        self.at = None

    def _moment(self, code, offset, frame):
        key = code, offset
        count = self.seen.get(key, 0)
        self.seen[key] = count + 1
        if self.at == (code, offset, count):
            self.at = None
            signal.getsignal(signal.SIGINT)(signal.SIGINT, frame)  # as it would be called here

    def _enter(self, frame, event, arg):
        code = frame.f_code
        if code not in self._wanted:
            inside = code.co_filename.startswith(self.files)
            self._wanted[code] = _servable(code) if inside else None
        servable = self._wanted[code]
        if servable is None:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False

        def opcode(frame, event, arg):
            if event == "opcode" and frame.f_lasti in servable:
                self._moment(code, frame.f_lasti, frame)
            return opcode

        self._moment(code, -1, frame)
        return opcode

    def run(self, program, at=None):
        """Run a program, interrupted at a moment; the exception that came through, with its traceback.

        torch may make an error of its own of it: ``finally`` of vmap undoes what it had not begun.
        """
        self.seen, self.at = {}, at
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            program()
        except BaseException as error:
            if at is None or self.at is not None:
                raise  # not by us
            return error
        finally:
            sys.settrace(before)
        return None

    def moments(self, program):
        """All moments of a program, each instruction for the first and for the last time that it is there."""
        self.run(program)
        return [(code, offset, k) for (code, offset), count in self.seen.items() for k in sorted({0, count - 1})]


def where(moment):
    """File, function and line of a moment."""
    code, offset, count = moment
    lines = {i.offset: i.positions.lineno for i in dis.get_instructions(code) if i.positions is not None}
    line = code.co_firstlineno if offset < 0 else lines.get(offset)
    return f"{'/'.join(Path(code.co_filename).parts[-2:])}:{line} {code.co_qualname}, call {count + 1}"


def interrupted(program, check, files=SWAPPING, most=None):
    """Interrupt a program at its moments, at most so many of them evenly spread, and check after each, while the
    exception is still there. Returns what was found wrong, with where.
    """
    tracer = Tracer(files)
    moments = tracer.moments(program)
    assert moments, "the program does nothing in these files"
    stride = 1 if most is None else max(1, len(moments) // most)
    wrong = []
    for moment in moments[::stride]:
        interrupt = tracer.run(program, moment)
        found = check()
        if found:
            wrong.append((where(moment), found))
        del interrupt
    return wrong


def in_threads(*programs, rounds=1):
    """Run programs at the same time, each in a thread of its own; what each returned or raised, in all rounds."""
    results = [[] for _ in programs]
    start = threading.Barrier(len(programs))

    def work(program, into):
        start.wait()
        for _ in range(rounds):
            try:
                into.append(program())
            except Exception as error:
                into.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=pair) for pair in zip(programs, results, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    return results
