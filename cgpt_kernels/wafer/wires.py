"""Colours for messages along rows or columns, found by interval colouring.

A message from position s to position d of a line occupies the routers from s to d; two messages may
share a colour where these intervals do not touch. The greedy order by the left end needs the fewest
colours there can be.
"""

from __future__ import annotations

from .program import EAST, NORTH, RAMP, SOUTH, WEST, Program


class Wires:
    """Sets routes of a program along one axis: the same on every line.

    Args:
        axis: "x" (lines are rows, positions px) or "y" (lines are columns, positions py).
        lines: which lines; default all.
    """

    def __init__(self, program: Program, axis: str, lines=slice(None)):
        self.program, self.axis, self.lines = program, axis, lines
        self.P = program.columns if axis == "x" else program.rows
        self.forward, self.backward = (EAST, WEST) if axis == "x" else (SOUTH, NORTH)

    def _route(self, colour, receive, send, p, position=0):
        where = (self.lines, p) if self.axis == "x" else (p, self.lines)
        self.program.route(colour, receive, send, *where, position=position)

    def _new_colour(self) -> int:
        colour = self.program.next_colour
        self.program.next_colour += 1
        return colour

    def connect(self, edges) -> dict[tuple[int, int], int]:
        """Colours of messages (from, to) that may all be on their way at once."""
        ends: list[tuple[int, int]] = []  # last router in use, colour
        found = {}
        for s, d in sorted(edges, key=lambda e: (min(e), max(e))):
            low, high = min(s, d), max(s, d)
            for n, (last, colour) in enumerate(ends):
                if last < low:
                    ends[n] = high, colour
                    break
            else:
                colour = self._new_colour()
                ends.append((high, colour))
            ahead, behind = (
                (self.forward, self.backward) if d > s else (self.backward, self.forward)
            )
            self._route(colour, (RAMP,), (ahead,), s)
            for p in range(low + 1, high):
                self._route(colour, (behind,), (ahead,), p)
            self._route(colour, (behind,), (RAMP,), d)
            found[s, d] = colour
        return found

    def flood(self, root: int) -> int:
        """A colour on which the root's words reach every core of its line."""
        colour = self._new_colour()
        for p in range(self.P):
            out = []
            if p >= root and p + 1 < self.P:
                out.append(self.forward)
            if p <= root and p > 0:
                out.append(self.backward)
            if p == root:
                if out:
                    self._route(colour, (RAMP,), out, p)
            else:
                self._route(colour, (self.backward if p > root else self.forward,), (*out, RAMP), p)
        return colour

    def shared(self, direction: str, done: int = 0) -> int:
        """A colour towards one end on which the cores send one after the other, position 0 first.

        All beyond receive, and so does the sender, whose own words come back by its ramp. Backward,
        the next core may be ready to send before this one's words are on their way: a switch keeps
        it out until the last of them (ADVANCE_OWN). done: so many positions have sent already.
        """
        colour = self._new_colour()
        ahead, behind = (
            (self.forward, self.backward)
            if direction == "forward"
            else (self.backward, self.forward)
        )
        first, last = (0, self.P - 1) if direction == "forward" else (self.P - 1, 0)
        for p in range(self.P):
            send = (ahead, RAMP) if p != last else (RAMP,)
            turns = [(behind,)] if p == last else [(RAMP,)] if p == first else [(behind, RAMP)]
            if direction == "backward" and p not in (first, last):
                turns = [(behind,), (RAMP,)] if p < done else [(RAMP,), (behind,)]
            for position, receive in enumerate(turns):
                self._route(colour, receive, send, p, position)
        return colour

    def star(self) -> int:
        """A colour on which all send to position 0: own words first, then what comes from behind.

        The switch of each router advances with the last of its core's own words.
        """
        colour = self._new_colour()
        for p in range(1, self.P):
            self._route(colour, (RAMP,), (self.backward,), p)
            if p + 1 < self.P:
                self._route(colour, (self.forward,), (self.backward,), p, position=1)
        self._route(colour, (self.forward,), (RAMP,), 0)
        return colour
